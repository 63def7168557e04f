"""A step of a decoder layer with a cache is a few native calls, which must give what the general way gives."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, KVCache, TransformerDecoderLayer, fused_attention
from fused_attn.backends import cpu
from fused_attn.nn import (
    CrossAttentionCache,
    StaticKVCache,
    StaticSelfAttentionCache,
    native_attention,
    native_layer,
    native_linear,
)
from fused_attn.nn.cache import LayerCache, SlidingKVCache
from tests.nn.native_calls import count_calls

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
E, HEADS = 24, 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call of an attention module."""
    return count_calls(monkeypatch, native_attention, "attention_step")


@contextlib.contextmanager
def general_way() -> Iterator[None]:
    """No native call stands for an attention module, or for more than a linear layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_attention, "attention_step", lambda *args, **options: None)
        patch.setattr(native_layer, "feed_forward", lambda *args: None)
        yield


def random_layer(seed: int = 0, **options) -> TransformerDecoderLayer:
    torch.manual_seed(seed)
    layer = TransformerDecoderLayer(E, HEADS, 40, **{"batch_first": True, **options}).eval()
    for parameter in layer.parameters():  # also those that begin as zeros and ones
        nn.init.normal_(parameter, std=0.3)
    return layer


def random_inputs(
    layer: TransformerDecoderLayer, batch: int = 3, steps: int = 5, length: int = 7
) -> tuple[list, Tensor]:
    """The rows of each step, and the memory."""
    dtype = layer.norm1.weight.dtype
    sizes = [(batch, n, E) if layer.self_attn.batch_first else (n, batch, E) for n in (*[1] * steps, length)]
    *rows, memory = (torch.randn(size, dtype=dtype) for size in sizes)
    return rows, memory


@torch.no_grad()
def run_steps(layer: nn.Module, rows: list[Tensor], memory: Tensor, cache: KVCache | None = None, **masks) -> list:
    """The outputs of the steps, and the rows of the cache."""
    cache = StaticKVCache(1, len(rows) + 1) if cache is None else cache
    outs = [layer(row, memory, cache=cache.layers[0], **masks) for row in rows]
    own = cache.layers[0].self_attention
    state = [own._rows.keys, own._rows.values] if isinstance(own, StaticSelfAttentionCache) else []
    return [*outs, *(x[:, :, : len(rows)] for x in state), torch.tensor(len(own))]


def check(layer: nn.Module, rows: list[Tensor], memory: Tensor, make_cache: Callable = lambda: None, **masks) -> None:
    """The steps give what they give the general way."""
    found = run_steps(layer, rows, memory, make_cache(), **masks)
    with general_way():
        expected = run_steps(layer, rows, memory, make_cache(), **masks)
    tolerance = TOLERANCE[memory.dtype]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"activation": "gelu"}], ids=str)
def test_equals_the_general_way(options: dict, norm_first: bool, dtype: torch.dtype, calls: list[str]) -> None:
    layer = random_layer(norm_first=norm_first, dtype=dtype, **options)
    rows, memory = random_inputs(layer)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    check(layer, rows, memory, memory_key_padding_mask=padding)
    # The first step fills the caches the general way.
    assert len(calls) == 2 * (len(rows) - 1)


@pytest.mark.parametrize("features", [1, 5, 16, 40, 65])
def test_the_norm_of_any_number_of_features(features: int) -> None:
    norm = nn.LayerNorm(features)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    module = nn.Linear(3, features)
    x, residual = torch.randn(4, 3), 100 + torch.randn(4, features)
    with torch.no_grad():
        found = native_linear.native_call(module, x, takes_many=False, residual=residual, norm=norm).run()
        torch.testing.assert_close(found, norm(residual + module(x)), rtol=1e-4, atol=1e-4)
        found = native_linear.native_call(module, x, takes_many=False, residual=residual).run()
        torch.testing.assert_close(found, residual + module(x))


@pytest.mark.parametrize("features", [5, 512, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_norm_of_rows_with_a_large_mean(spread: float, features: int) -> None:
    """The rounding of the mean must not become a part of the result."""
    row = 1000.7 + spread * torch.randn(1, features)
    norm, module = nn.LayerNorm(features), nn.Linear(3, features)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
        found = native_linear.native_call(module, torch.randn(1, 3), takes_many=False, residual=row, norm=norm).run()
        exact = nn.functional.layer_norm(row.double(), (features,), eps=norm.eps)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_a_graph_that_has_saved_the_cache_sees_the_step(calls: list[str]) -> None:
    torch.manual_seed(0)
    module, x = FusedMultiheadAttention(8, 2, batch_first=True), torch.randn(1, 1, 8)
    cache = StaticSelfAttentionCache(4)
    with torch.no_grad():
        rows = cache.append(*torch.randn(2, 1, 2, 1, 4))
    query = torch.randn(1, 2, 1, 4, requires_grad=True)
    out = fused_attention(query, rows.keys, rows.values, **rows.options)
    with torch.no_grad():
        module(x, x, x, need_weights=False, cache=cache)
    assert calls
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_step_of_a_module(calls: list[str]) -> None:
    """`FusedMultiheadAttention` alone, with grouped heads, and padding over the whole buffer."""
    torch.manual_seed(0)
    module = FusedMultiheadAttention(24, 6, num_kv_heads=2, batch_first=True)
    rows = [torch.randn(2, 1, 24) for _ in range(4)]
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, :2] = True

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        cache = StaticSelfAttentionCache(6)
        return [module(x, x, x, need_weights=False, key_padding_mask=padding, cache=cache)[0] for x in rows]

    found = outputs()
    assert len(calls) == 3
    with general_way():
        torch.testing.assert_close(found, outputs())


def test_batch_entries_of_different_lengths(calls: list[str]) -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        cache = StaticKVCache(1, 8)
        for row in rows:
            layer(row, memory, cache=cache.layers[0])
        cache.crop(torch.tensor([0, 5, 2]))
        out = [layer(row, memory, cache=cache.layers[0]) for row in rows[:2]]
        return [*out, cache.layers[0].self_attention._rows.lengths]

    found = outputs()
    assert len(calls) == 2 * 6 and found[-1].tolist() == [2, 7, 4]
    with general_way():
        torch.testing.assert_close(found, outputs())


def _hook(name: str) -> Callable:
    def change(layer: nn.Module) -> nn.Module:
        layer.get_submodule(name).register_forward_hook(lambda module, args, out: _scaled(out))
        return layer

    change.__name__ = f"hook_{name}"
    return change


def _scaled(out):
    return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5


def _forward_of_its_own(name: str) -> Callable:
    def change(layer: nn.Module) -> nn.Module:
        module = layer.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **options: _scaled(forward(*args, **options))
        return layer

    change.__name__ = f"forward_{name}"
    return change


class _Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Attention(nn.MultiheadAttention):
    """A class that looks like `FusedMultiheadAttention`, and computes something else."""

    num_kv_heads, rotary, relative_bias, backend, takes_is_causal = HEADS, None, None, None, True

    def forward(self, query: Tensor, key: Tensor, *args, **options) -> tuple[Tensor, None]:
        return query + key.sum(dim=1 if self.batch_first else 0, keepdim=True), None


def _own_attention(layer: nn.Module) -> nn.Module:
    layer.multihead_attn = _Attention(E, HEADS, batch_first=True)
    return layer


def _own_blocks(layer: nn.Module) -> nn.Module:
    self_attention, feed_forward = layer._sa_block, layer._ff_block
    layer._sa_block = lambda *args, **options: 2 * self_attention(*args, **options)
    layer._ff_block = lambda x: 2 * feed_forward(x)
    return layer


def _function_as_dropout(layer: nn.Module) -> nn.Module:
    del layer.dropout1, layer.dropout3
    layer.dropout1 = layer.dropout3 = lambda x: 2 * x
    return layer


class _Layer(TransformerDecoderLayer):
    def _sa_block(self, *args, **options) -> Tensor:
        return 2 * super()._sa_block(*args, **options)

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


def _subclass(layer: nn.Module) -> nn.Module:
    layer.__class__ = _Layer
    return layer


def _other_norms(layer: nn.Module) -> nn.Module:
    layer.norm1, layer.norm2, layer.norm3 = _Norm(E), nn.LayerNorm(E, elementwise_affine=False), nn.RMSNorm(E)
    return layer


def _parametrised(layer: nn.Module) -> nn.Module:
    for module in (layer.linear2, layer.self_attn.out_proj):
        nn.utils.parametrizations.weight_norm(module)
        nn.init.constant_(module.parametrizations.weight.original0, 2.0)
    return layer


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _other_dropout(layer: nn.Module) -> nn.Module:
    layer.dropout1 = layer.dropout2 = layer.dropout3 = _Doubling()
    return layer


HOOKED = ["self_attn", "norm1", "dropout1", "multihead_attn", "norm2", "linear1", "linear2", "norm3"]
CHANGES = [
    *map(_hook, HOOKED),
    *map(_forward_of_its_own, ["self_attn", "norm1", "dropout2", "linear2", "dropout", "norm3"]),
    _subclass, _other_norms, _parametrised, _other_dropout, _own_attention, _own_blocks, _function_as_dropout,
]  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_layer_computes_what_its_modules_compute(change: Callable, norm_first: bool) -> None:
    plain = random_layer(norm_first=norm_first)
    layer = change(copy.deepcopy(plain))
    rows, memory = random_inputs(layer)
    check(layer, rows, memory)
    assert not torch.allclose(run_steps(layer, rows, memory)[0], run_steps(plain, rows, memory)[0])


def _sliding() -> KVCache:
    return SlidingKVCache(1, 3)


def _growing() -> KVCache:
    return KVCache(1)


@pytest.mark.parametrize("make_cache", [_sliding, _growing])
def test_other_caches_take_the_general_way(make_cache: Callable, calls: list[str]) -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)
    check(layer, rows, memory, make_cache)
    assert len(calls) == len(rows) - 1  # the cross-attention alone


@pytest.mark.skipif("amx" not in (cpu._C.cpu_isas() if cpu._C else ()), reason="needs a processor with AMX")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch", [3, 17, 100])
def test_more_entries_where_tiles_multiply(batch: int, norm_first: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    layer = TransformerDecoderLayer(64, 4, 96, norm_first=norm_first, batch_first=True, dtype=torch.bfloat16).eval()
    rows = [torch.randn(batch, 1, 64, dtype=torch.bfloat16) for _ in range(4)]
    check(layer, rows, torch.randn(batch, 7, 64, dtype=torch.bfloat16))
    assert len(calls) == 2 * (len(rows) - 1)


def test_calls_that_the_native_call_does_not_take(calls: list[str]) -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)
    check(layer, [torch.cat(rows, dim=1)], memory, lambda: StaticKVCache(1, 5))  # several rows at a time
    check(layer, *random_inputs(layer, batch=native_linear.MOST_ROWS + 1))
    assert not calls
    check(layer, rows, memory, memory_mask=torch.zeros(1, 7))
    assert len(calls) == len(rows) - 1  # the self-attention alone


def test_dropout_in_training(calls: list[str]) -> None:
    layer = random_layer(dropout=0.5)
    layer.train()
    rows, memory = random_inputs(layer)
    first, second = (run_steps(layer, rows, memory)[2] for _ in range(2))
    assert not calls and not torch.equal(first, second)


def test_modes_see_the_modules(calls: list[str]) -> None:
    layer, seen = random_layer(), []
    rows, memory = random_inputs(layer)
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module)):
        run_steps(layer, rows, memory)
    assert {layer.norm1, layer.norm3, layer.self_attn, layer.linear2, layer.dropout2} <= set(seen) and not calls
    with torch.autocast("cpu", torch.bfloat16):
        layer.self_attn(rows[0], rows[0], rows[0], need_weights=False)
        cache = LayerCache(self_attention=StaticSelfAttentionCache(4))
        with torch.no_grad():
            for row in rows[:2]:
                layer(row, memory, cache=cache)
    assert cache.self_attention._rows.keys.dtype == torch.bfloat16 and not calls


def test_a_full_cache_is_refused_as_ever(calls: list[str]) -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)
    for capped in (False, True):
        cache = StaticKVCache(1, 2)
        run_steps(layer, rows[:2], memory, cache)
        if capped:
            cache.crop(torch.tensor([2, 2, 1]))  # now the host does not know the number of rows
        before = [x.clone() for x in cache.layers[0].self_attention._rows]
        with torch.no_grad(), pytest.raises(IndexError if capped else ValueError):
            layer(rows[2], memory, cache=cache.layers[0])
        assert all(map(torch.equal, before, cache.layers[0].self_attention._rows))


def test_a_failed_step_leaves_the_cache_as_it_was(calls: list[str]) -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)
    cache = StaticKVCache(1, 8)
    run_steps(layer, rows[:3], memory, cache)
    assert calls
    with torch.no_grad(), pytest.raises(ValueError, match="memory: expected the one that the cache was filled with"):
        layer(rows[3], memory + 1, cache=cache.layers[0])
    assert len(cache.layers[0].self_attention) == 3
    with torch.no_grad():
        found = layer(rows[3], memory, cache=cache.layers[0])
    expected = run_steps(layer, rows[:4], memory)[3]
    torch.testing.assert_close(found, expected)


def test_gradients_are_recorded() -> None:
    layer = random_layer()
    rows, memory = random_inputs(layer)
    cache = LayerCache()
    for row in rows[:2]:
        out = layer(row, memory, cache=cache)
    out.sum().backward()
    assert layer.linear2.weight.grad is not None and layer.norm1.weight.grad is not None


def test_the_native_call_checks_its_arguments() -> None:
    def arguments() -> dict[str, object]:
        return {
            "x": torch.randn(2, 1, 8), "in_weight": torch.randn(24, 8), "in_bias": torch.randn(24),
            "out_weight": torch.randn(8, 8), "out_bias": None, "out": torch.empty(2, 1, 8), "num_heads": 2,
            "keys": torch.zeros(2, 2, 5, 4), "values": torch.zeros(2, 2, 5, 4),
            "lengths": torch.tensor([0, 4]), "key_lengths": torch.zeros(2, dtype=torch.int32),
            "key_padding": torch.zeros(2, 5, dtype=torch.bool), "norm_weight": torch.ones(8), "norm_bias": None,
            "norm_eps": 1e-5, "norm_first": False, "num_threads": 1,
        }  # fmt: skip

    whole = arguments()
    cpu._C.attention_step(*whole.values())
    assert whole["lengths"].tolist() == [1, 5] and whole["key_lengths"].tolist() == [1, 5]
    for name, wrong in (
        ("x", torch.randn(2, 8)),
        ("in_weight", torch.randn(23, 8)),
        ("keys", torch.zeros(2, 2, 5)),
        ("keys", torch.zeros(2, 2, 5, 4).double()),
        ("keys", torch.zeros(2, 2, 4, 5).transpose(2, 3)),
        ("values", torch.zeros(2, 2, 6, 4)),
        ("lengths", torch.tensor([0, 4]).int()),
        ("key_lengths", torch.tensor([0, 4])),
        ("key_padding", torch.zeros(2, 6, dtype=torch.bool)),
        ("norm_weight", torch.ones(7)),
        ("norm_bias", torch.ones(8).double()),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
            cpu._C.attention_step(*(arguments() | {name: wrong}).values())
    for lengths in ([0, 5], [-1, 0]):
        whole = arguments() | {"lengths": torch.tensor(lengths)}
        with pytest.raises(IndexError, match="lengths: expected 0 to 4"):
            cpu._C.attention_step(*whole.values())
        assert whole["lengths"].tolist() == lengths and not whole["keys"].any()


def test_the_cross_attention_cache_of_another_module_kind(calls: list[str]) -> None:
    """A cache may hold keys of another dtype or stride than the module makes."""
    module = FusedMultiheadAttention(8, 2, batch_first=True).eval()
    memory, x = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    cache, strided = CrossAttentionCache(), CrossAttentionCache()
    with torch.no_grad():
        for _ in range(2):
            expected = module(x, memory, memory, need_weights=False, cache=cache)[0]
        assert len(calls) == 1
        strided.update(*(k.transpose(2, 3).contiguous().transpose(2, 3) for k in cache.get()), memory)
        torch.testing.assert_close(module(x, memory, memory, need_weights=False, cache=strided)[0], expected)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [StaticSelfAttentionCache, CrossAttentionCache])
@pytest.mark.parametrize("change", ["features", "bias", "negated"])
def test_a_step_with_parameters_that_only_torch_takes(kind: type, change: str, calls: list[str]) -> None:
    module = FusedMultiheadAttention(8, 2, batch_first=True).eval()
    if change == "features":
        module.out_proj = nn.Linear(8, 7)
    elif change == "bias":
        module.out_proj.bias = nn.Parameter(torch.randn(1))
    else:
        module.in_proj_weight = nn.Parameter(torch._neg_view(torch.randn(24, 8)))
    memory, x = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    is_self = kind is StaticSelfAttentionCache
    cache = StaticSelfAttentionCache(4) if is_self else CrossAttentionCache()
    keys = x if is_self else memory
    expected, _ = module(x, keys, keys, need_weights=False, is_causal=is_self)
    with torch.no_grad():
        steps = [
            module(row, *(row, row) if is_self else (memory, memory), need_weights=False, cache=cache)[0]
            for row in x.split(1, dim=1)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    assert not calls
