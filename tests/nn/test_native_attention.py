"""A small module without gradients is one native call, which must give what the general way gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fused_attn import FusedMultiheadAttention
from fused_attn.backends import cpu
from fused_attn.nn import native_attention
from tests.nn.native_calls import count_calls

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call."""
    return count_calls(monkeypatch, native_attention, "self_attention")


def attend(module: nn.Module, x: Tensor, has_gradients: bool = False, **masks) -> Tensor:
    with torch.set_grad_enabled(has_gradients):
        return module(x, x, x, need_weights=False, **masks)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 5, 11])
@pytest.mark.parametrize(
    ("embed_dim", "heads", "kv_heads", "bias"), [(64, 4, 4, True), (60, 6, 2, True), (33, 3, 1, False), (8, 8, 8, True)]
)
@pytest.mark.parametrize("mask", [None, "padding", "causal", "causal and padding"])
def test_equals_the_general_way(embed_dim, heads, kv_heads, bias, length, mask, dtype, calls: list[str]) -> None:
    torch.manual_seed(0)
    module = FusedMultiheadAttention(embed_dim, heads, bias=bias, batch_first=True, num_kv_heads=kv_heads, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, length, embed_dim, dtype=dtype)
    masks = {}
    if mask is not None and "padding" in mask:
        masks["key_padding_mask"] = torch.arange(length) >= torch.tensor([[length // 2 + 1], [0]])
        masks["is_causal"] = "causal" in mask
    elif mask == "causal":
        masks = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype), "is_causal": True}
    found = attend(module, x, **masks)
    assert len(calls) == 1
    expected = attend(module, x, has_gradients=True, **masks)
    assert len(calls) == 1
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


def test_padding_may_hold_anything(calls: list[str]) -> None:
    """Padding may hold NaN or infinity, because it has no effect on other rows, as in the general way."""
    module = FusedMultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 6, 16)
    ignored = torch.tensor([[False] * 4 + [True] * 2])
    expected = attend(module, x, key_padding_mask=ignored)[:, :4]
    x[:, 4:] = float("nan")
    assert torch.equal(attend(module, x, key_padding_mask=ignored)[:, :4], expected)
    assert len(calls) == 2


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _many_rows(module, x):
    return module, torch.randn(50, 100, 16)


def _transposed(module, x):
    return module, x.transpose(0, 1)


def _hooked(module, x):
    module.out_proj.register_forward_hook(lambda each, inputs, out: 2 * out)
    return module, x


def _replaced(module, x):
    linear = Doubled(16, 16)
    linear.load_state_dict(module.out_proj.state_dict())
    module.out_proj = linear
    return module, x


def _on_the_reference(module, x):
    module.backend = "reference"
    return module, x


def _in_dropout(module, x):
    module.dropout = 1.0
    return module.train(), x


def _replaced_forward(module, x):
    module.out_proj.forward = lambda x: 2 * nn.functional.linear(x, module.out_proj.weight)
    return module, x


def _offloaded(module, x):
    """Offloads the weights as tools do it: hooks move the weights from "meta" to the CPU for the time of a call."""
    linear, forward = module.out_proj, module.out_proj.forward
    in_memory = dict(linear._parameters)
    away = {name: nn.Parameter(p.to("meta")) for name, p in in_memory.items()}
    linear._parameters.update(away)

    def call(x):
        linear._parameters.update(in_memory)
        try:
            return forward(x)
        finally:
            linear._parameters.update(away)

    linear.forward = call
    return module, x


def _offloaded_by_hooks(module, x):
    linear = module.out_proj
    in_memory, away = linear.bias, nn.Parameter(linear.bias.to("meta"))
    linear.bias = away
    linear.register_forward_pre_hook(lambda *_: setattr(linear, "bias", in_memory))
    linear.register_forward_hook(lambda *_: setattr(linear, "bias", away), always_call=True)
    return module, x


def _old_style_hooked(module, x):
    module.out_proj = nn.utils.spectral_norm(module.out_proj).eval()
    return module, x


def _hooked_backward(module, x):
    module.out_proj.register_full_backward_hook(lambda *_: None)
    return module, x


def _compiled(module, x):
    module.out_proj.compile(backend="eager")
    return module, x


def _parametrised(module, x):
    nn.utils.parametrizations.weight_norm(module.out_proj)
    return module, x


def _pruned(module, x):
    prune.l1_unstructured(module, "in_proj_weight", 0.5)
    prune.l1_unstructured(module.out_proj, "bias", 0.5)
    return module, x


def _merged(module, x):
    """Puts a plain tensor in the place of a parameter, as an adapter does for the time of a call."""
    merged = module.in_proj_weight.detach() + 1.0
    del module.in_proj_weight
    module.in_proj_weight = merged
    return module, x


class Doubling(Tensor):
    """Stands for a quantised weight: a parameter whose value is not what its memory holds."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 2 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def _weight_of_a_subclass(module, x):
    module.out_proj.weight = nn.Parameter(module.out_proj.weight.detach().as_subclass(Doubling))
    return module, x


def _bias_of_a_subclass(module, x):
    module.out_proj.bias = nn.Parameter(torch.ones(16).as_subclass(Doubling))
    return module, x


def _other_features(module, x):
    module.out_proj = nn.Linear(16, 7)
    return module, x


def _out_bias_of_one_element(module, x):
    module.out_proj.bias = nn.Parameter(torch.randn(1))
    return module, x


def _in_bias_of_one_element(module, x):
    module.in_proj_bias = nn.Parameter(torch.randn(1))
    return module, x


def _negated_in_weight(module, x):
    module.in_proj_weight = nn.Parameter(torch._neg_view(torch.randn(48, 16)))
    return module, x


def _negated_in_bias(module, x):
    module.in_proj_bias = nn.Parameter(torch._neg_view(torch.randn(48)))
    return module, x


def _negated_out_weight(module, x):
    module.out_proj.weight = nn.Parameter(torch._neg_view(torch.randn(16, 16)))
    return module, x


class Shifted(FusedMultiheadAttention):
    def _split_heads(self, x, seq_dim, position=None):
        return super()._split_heads(x + 1, seq_dim, position)


def _subclass(module, x):
    module.__class__ = Shifted
    return module, x


CHANGES = [
    _many_rows, _transposed, _hooked, _replaced, _on_the_reference, _in_dropout, _replaced_forward, _offloaded,
    _offloaded_by_hooks, _old_style_hooked, _hooked_backward, _compiled, _parametrised, _pruned, _merged,
    _weight_of_a_subclass, _bias_of_a_subclass, _other_features, _out_bias_of_one_element, _in_bias_of_one_element,
    _negated_in_weight, _negated_in_bias, _negated_out_weight, _subclass,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_goes_the_general_way(change, calls: list[str]) -> None:
    module, x = change(FusedMultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 3, 16))
    found = attend(module, x)
    assert not calls
    torch.testing.assert_close(found, attend(module, x, has_gradients=True))


def test_who_watches_functions_or_all_modules_sees_the_projection(calls: list[str]) -> None:
    module, x, seen = FusedMultiheadAttention(16, 2, batch_first=True), torch.randn(2, 3, 16), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        attend(module, x)
    assert nn.functional.linear in seen
    hook = nn.modules.module.register_module_forward_hook(lambda each, inputs, out: seen.append(each))
    with hook:
        attend(module, x)
    assert module.out_proj in seen and not calls
    attend(module, x)
    assert len(calls) == 1


def test_wrong_inputs_are_refused_as_ever() -> None:
    module = FusedMultiheadAttention(16, 2, batch_first=True)
    with pytest.raises(AssertionError, match="query: expected embed_dim=16"):
        attend(module, torch.randn(2, 3, 15))
    with pytest.raises(AssertionError, match="key_padding_mask: expected shape"):
        attend(module, torch.randn(2, 3, 16), key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        attend(module, torch.randn(2, 3, 16, dtype=torch.float64))


def test_the_native_call_checks_its_arguments() -> None:
    x, weight, out_weight = torch.randn(1, 2, 8), torch.randn(24, 8), torch.randn(8, 8)
    out = torch.empty_like(x)

    def call(x=x, weight=weight, out_weight=out_weight, heads=2, padding=None, norm=(None, None, 0.0)):
        cpu._C.self_attention(x, weight, None, out_weight, None, out, heads, padding, False, *norm, False, 1)

    call()
    for arguments, message in (
        ({"x": x[0]}, "x: expected 3 dimensions"),
        ({"x": x.long()}, "x: expected float32"),
        ({"weight": weight.double()}, "in_weight: expected float32, got float64"),
        ({"weight": torch.randn(23, 8)}, "in_weight: expected"),
        ({"weight": torch.randn(8, 24).T}, "in_weight: expected a contiguous tensor"),
        ({"out_weight": torch.randn(8, 7)}, "out_weight: expected shape"),
        ({"heads": 3}, "num_heads: expected a divisor of 8, got 3"),
        ({"padding": torch.zeros(1, 3, dtype=torch.bool)}, "key_padding: expected shape"),
        ({"norm": (torch.ones(7), None, 1e-5)}, "norm_weight: expected shape"),
        ({"norm": (torch.ones(8), torch.ones(8).double(), 1e-5)}, "norm_bias: expected float32, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
