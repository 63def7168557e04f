"""Layers without gradients and without a cache: their native parts must give what their modules give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer
from fused_attn.backends import cpu
from fused_attn.nn import native_attention, native_layer, native_linear
from tests.nn.native_calls import count_calls

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
E, HEADS = 32, 4


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call of an attention module."""
    return count_calls(monkeypatch, native_attention, "self_attention")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call of a linear layer, or of what follows a product of torch."""
    return count_calls(monkeypatch, native_linear, "linear", "finish_rows")


@contextlib.contextmanager
def general_way() -> Iterator[None]:
    """No native call stands for an attention module, or for more than a linear layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_attention, "self_attention", lambda *args, **options: None)
        patch.setattr(native_layer, "feed_forward", lambda *args: None)
        patch.setattr(native_layer, "add_and_normalise", lambda *args: None)
        yield


def random_layer(kind: Any = TransformerEncoderLayer, seed: int = 0, **options) -> Any:
    torch.manual_seed(seed)
    layer = kind(E, HEADS, 48, **{"batch_first": True, **options}).eval()
    for parameter in layer.parameters():  # also those that begin as zeros and ones
        nn.init.normal_(parameter, std=0.3)
    return layer


@torch.no_grad()
def check(layer: Any, *inputs: Tensor, **masks) -> None:
    """The layer gives what it gives the general way, and leaves its inputs alone."""
    before = [x.clone() for x in inputs]
    found = layer(*inputs, **masks)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    with general_way():
        expected = layer(*inputs, **masks)
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4]])},
    "all is padding": {"src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [0]])},
    "causal": {"is_causal": True},
    "both": {"is_causal": True, "src_key_padding_mask": torch.arange(7) < torch.tensor([[0], [3]])},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"activation": "gelu"}, {"activation": F.silu}],
    ids=["plain", "no bias", "gelu", "silu"],
)
def test_encoder_layers(options, masks, norm_first, dtype, attentions, products) -> None:
    layer = random_layer(norm_first=norm_first, dtype=dtype, **options)
    check(layer, torch.randn(2, 7, E, dtype=dtype), **MASKS[masks])
    assert len(attentions) == 1 and len(products) >= 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layers_without_a_cache(norm_first, attentions, products) -> None:
    layer = random_layer(TransformerDecoderLayer, norm_first=norm_first, dtype=torch.float64)
    tgt, memory = torch.randn(2, 5, E, dtype=torch.float64), torch.randn(2, 7, E, dtype=torch.float64)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    check(layer, tgt, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
    assert len(attentions) == 1 and len(products) >= 2


def test_shared_key_heads(attentions) -> None:
    layer = random_layer(dtype=torch.float64)
    layer.self_attn = FusedMultiheadAttention(E, HEADS, batch_first=True, num_kv_heads=2, dtype=torch.float64).eval()
    check(layer, torch.randn(2, 7, E, dtype=torch.float64))
    assert len(attentions) == 1


@pytest.mark.skipif("amx" not in (cpu._C.cpu_isas() if cpu._C else ()), reason="needs a processor with AMX")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", [(1, 250), (8, 32), (60, 3)], ids=str)
def test_many_rows_where_tiles_multiply(shape, norm_first, attentions, products) -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(64, 4, 96, norm_first=norm_first, batch_first=True, dtype=torch.bfloat16).eval()
    check(layer, torch.randn(*shape, 64, dtype=torch.bfloat16), is_causal=True)
    assert len(attentions) == 1 and len(products) >= 2


def test_a_stack(attentions) -> None:
    encoder = TransformerEncoder(random_layer(dtype=torch.float64), 3, nn.LayerNorm(E, dtype=torch.float64)).eval()
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for masks in ({}, {"mask": mask}, {"src_key_padding_mask": MASKS["padding"]["src_key_padding_mask"]}):
        check(encoder, torch.randn(2, 7, E, dtype=torch.float64), **masks)
    assert len(attentions) == 9


# ---- What the modules compute


def hooked(layer: Any, name: str) -> Any:
    layer.get_submodule(name).register_forward_hook(lambda module, arguments, out: (2 * out[0], None)
                                                    if isinstance(out, tuple) else 2 * out)  # fmt: skip
    return layer


class Doubled(TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


class OtherNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_other_norm(layer: Any) -> Any:
    layer.norm1.__class__ = layer.norm2.__class__ = OtherNorm
    return layer


def with_a_block_of_its_own(layer: Any) -> Any:
    layer._sa_block = lambda x, *masks: 2 * TransformerEncoderLayer._sa_block(layer, x, *masks)
    layer._ff_block = lambda x: 2 * TransformerEncoderLayer._ff_block(layer, x)
    return layer


def with_an_activation_module(layer: Any) -> Any:
    layer.activation = nn.Sequential(nn.ReLU(), nn.Tanh())
    return layer


OTHERS = {
    "hooks on the norms": lambda: hooked(hooked(random_layer(), "norm1"), "norm2"),
    "hooks on linear1": lambda: hooked(random_layer(), "linear1"),
    "hooks on linear2": lambda: hooked(random_layer(), "linear2"),
    "hooks on the attention": lambda: hooked(random_layer(), "self_attn"),
    "hooks on out_proj": lambda: hooked(random_layer(), "self_attn.out_proj"),
    "hooks on the dropouts": lambda: hooked(hooked(hooked(random_layer(), "dropout"), "dropout1"), "dropout2"),
    "a subclass": lambda: random_layer(Doubled),
    "norms of another class": lambda: with_other_norm(random_layer()),
    "blocks of its own": lambda: with_a_block_of_its_own(random_layer()),
    "an activation module": lambda: with_an_activation_module(random_layer()),
    "norms without weights": lambda: random_layer(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_other_modules_are_called(name: str, norm_first: bool) -> None:
    layer = OTHERS[name]()
    layer.norm_first = norm_first
    if name == "norms without weights":
        layer.norm1, layer.norm2 = (nn.LayerNorm(E, elementwise_affine=False) for _ in range(2))
    x = torch.randn(2, 7, E)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer(x).detach())  # with gradients, nothing is native


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TransformerEncoderLayer, "_sa_block"),
        (TransformerEncoderLayer, "_ff_block"),
        (FusedMultiheadAttention, "forward"),
        (nn.LayerNorm, "forward"),
        (nn.Linear, "forward"),
        (nn.Dropout, "forward"),
    ],
)
def test_a_patch_of_a_class_is_called(kind, name, monkeypatch) -> None:
    layer, method, calls = random_layer(), getattr(kind, name), []
    monkeypatch.setattr(kind, name, lambda self, *args, **options: calls.append(1) or method(self, *args, **options))
    with torch.no_grad():
        layer(torch.randn(2, 7, E))
    without_gradients = len(calls)
    layer(torch.randn(2, 7, E))
    assert 0 < without_gradients == len(calls) - without_gradients


def test_rows_that_are_skipped(attentions) -> None:
    layer = random_layer()
    layer.self_attn.skip_padded_queries = True
    check(layer, torch.randn(2, 7, E), **MASKS["padding"])
    assert not attentions
    check(layer, torch.randn(2, 7, E))
    assert len(attentions) == 1


@pytest.mark.parametrize(
    "x", [torch.randn(7, E), torch.randn(0, 7, E), torch.randn(2, 0, E)], ids=lambda x: str(x.shape)
)
def test_other_shapes(x: Tensor) -> None:
    check(random_layer(), x)


def test_other_layouts(attentions) -> None:
    check(random_layer(), torch.randn(7, 2, E).transpose(0, 1))
    check(random_layer(batch_first=False), torch.randn(7, 2, E))
    assert not attentions


def test_dropout_in_training(attentions) -> None:
    layer = random_layer(dropout=0.5).train()
    x = torch.randn(2, 7, E)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
    assert not attentions


def test_gradients(attentions, products) -> None:
    layer = random_layer()
    layer(torch.randn(2, 7, E)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert not attentions and not products


@torch.no_grad()
def test_autocast(attentions, products) -> None:
    layer = random_layer()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 7, E))
    assert not attentions and not products


@torch.no_grad()
def test_wrong_inputs_are_refused_as_ever() -> None:
    layer = random_layer()
    with pytest.raises(AssertionError, match="query: expected embed_dim=32"):
        layer(torch.randn(2, 7, E + 1))
    with pytest.raises(AssertionError, match="key_padding_mask: expected shape"):
        layer(torch.randn(2, 7, E), src_key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 7, E, dtype=torch.float64))


def test_relu_overwrites_only_what_nobody_sees() -> None:
    layer = random_layer()
    seen: list[Tensor] = []
    layer.linear1.register_forward_hook(lambda module, arguments, out: seen.append(out))
    x = torch.randn(2, 7, E, requires_grad=True)
    layer(x).sum().backward()
    assert (seen[0] < 0).any(), "a hook sees the output of linear1 before the activation"
    hooked_grad = x.grad.clone()
    layer.linear1._forward_hooks.clear()
    x.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, hooked_grad)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_parameters_of_a_norm_that_are_plain_attributes(norm: str, name: str) -> None:
    """FSDP puts views of its flat parameter in the place of parameters."""
    layer, x = random_layer(), torch.randn(2, 3, E)
    expected = layer(x)
    module = getattr(layer, norm)
    tensor = getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, tensor)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_block_without_hidden_features(dtype: torch.dtype) -> None:
    layer, x = (
        TransformerEncoderLayer(E, HEADS, 0, batch_first=True, dtype=dtype).eval(),
        torch.randn(2, 3, E).to(dtype),
    )
    with torch.enable_grad():
        expected = layer(x).detach()
    torch.testing.assert_close(layer(x), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("flag", ["no", 1, torch.tensor(True)])
def test_a_flag_must_be_a_bool(flag: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="is_causal: expected a bool"):
        random_layer()(torch.randn(2, 3, E), is_causal=flag)


@torch.no_grad()
def test_the_cpu_as_default_device_changes_nothing(attentions: list[str], products: list[str]) -> None:
    layer, x = random_layer(), torch.randn(2, 3, E)
    expected = layer(x)
    calls = len(attentions), len(products)
    with torch.device("cpu"):
        assert torch.equal(layer(x), expected)
    torch.set_default_device("cpu")
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_default_device(None)
    assert (len(attentions), len(products)) == (3 * calls[0], 3 * calls[1]) and calls[0] > 0
