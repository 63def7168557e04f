"""Small modules without gradients: one native call, which must give what the general way gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention
from fused_attn.backends import cpu
from fused_attn.nn import small_inference

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each call that takes the short way."""
    found = []
    short_way = small_inference._C.self_attention

    class Counted:
        @staticmethod
        def self_attention(*arguments):
            found.append("self_attention")
            return short_way(*arguments)

    monkeypatch.setattr(small_inference, "_C", Counted)
    return found


def attend(module: nn.Module, x: Tensor, has_gradients: bool = False, **masks) -> Tensor:
    with torch.set_grad_enabled(has_gradients):
        return module(x, x, x, need_weights=False, **masks)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 5, 11])
@pytest.mark.parametrize(
    ("embed_dim", "heads", "kv_heads", "bias"), [(64, 4, 4, True), (60, 6, 2, True), (33, 3, 1, False), (8, 8, 8, True)]
)
@pytest.mark.parametrize("mask", [None, "padding", "causal"])
def test_equals_the_general_way(embed_dim, heads, kv_heads, bias, length, mask, dtype, calls: list[str]) -> None:
    torch.manual_seed(0)
    module = FusedMultiheadAttention(embed_dim, heads, bias=bias, batch_first=True, num_kv_heads=kv_heads, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, length, embed_dim, dtype=dtype)
    masks = {}
    if mask == "padding":
        masks["key_padding_mask"] = torch.arange(length) >= torch.tensor([[length // 2 + 1], [0]])
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
    """As in the general way: what is ignored does not reach the rows that ignore it."""
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


def _long(module, x):
    return module, torch.randn(1, 2000, 16)


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


@pytest.mark.parametrize("change", [_long, _transposed, _hooked, _replaced, _on_the_reference, _in_dropout])
def test_anything_else_goes_the_general_way(change, calls: list[str]) -> None:
    module, x = change(FusedMultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 3, 16))
    found = attend(module, x)
    assert not calls
    torch.testing.assert_close(found, attend(module, x, has_gradients=True))


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

    def call(x=x, weight=weight, out_weight=out_weight, heads=2, padding=None):
        cpu._C.self_attention(x, weight, None, out_weight, None, out, heads, padding, False, 1)

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
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
