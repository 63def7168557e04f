"""Encoders with a cache decode step by step, as models without a memory do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_attn import KVCache, PagedKVCache, TransformerEncoder, TransformerEncoderLayer
from fused_attn.nn import PagedBatch, SlidingKVCache, StaticKVCache

WIDTH, HEADS, LENGTH = 32, 4, 11
#: The rows of each step: a prompt, single tokens, and two at once.
STEPS = (4, 1, 1, 2, 1, 1, 1)


def make_encoder(**options) -> TransformerEncoder:
    torch.manual_seed(0)
    arguments = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True} | options
    layer = TransformerEncoderLayer(WIDTH, HEADS, **arguments)
    return TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH, dtype=options.get("dtype"))).eval()


def paged() -> PagedBatch:
    layers = [PagedKVCache(num_pages=8, page_size=4, num_kv_heads=HEADS, head_dim=WIDTH // HEADS) for _ in range(2)]
    sequences = [[layer.add() for _ in range(2)] for layer in layers]
    return PagedBatch(layers, sequences[0])


CACHES = {
    "growing": lambda: KVCache(2),
    "static": lambda: StaticKVCache(2, LENGTH),
    "sliding": lambda: SlidingKVCache(2, 5),
    "paged": paged,
}


def in_steps(encoder: TransformerEncoder, x: Tensor, cache: KVCache, **options) -> Tensor:
    """The outputs of all rows, computed a few rows at a time. x: (B, L, E)"""
    return torch.cat([encoder(rows, cache=cache, **options) for rows in x.split(STEPS, dim=1)], dim=1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_steps_equal_the_whole(name: str, norm_first: bool, grad: bool) -> None:
    """Without gradients, native calls compute the steps."""
    encoder, x = make_encoder(norm_first=norm_first), torch.randn(2, LENGTH, WIDTH)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    if name == "sliding":
        hidden |= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-5)
    with torch.set_grad_enabled(grad and name == "growing"):
        expected = encoder(x, hidden)
        for options in ({}, {"is_causal": True}):
            torch.testing.assert_close(in_steps(encoder, x, CACHES[name](), **options), expected)


def test_gradients_through_steps() -> None:
    encoder = make_encoder(dtype=torch.float64)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    grads = []
    for out in (encoder(x, is_causal=True), in_steps(encoder, x, KVCache(2))):
        grads.append(torch.autograd.grad((out * weight).sum(), [x, *encoder.parameters()]))
    torch.testing.assert_close(grads[1], grads[0])


def test_padding_covers_all_rows_so_far() -> None:
    encoder, x = make_encoder(), torch.randn(2, LENGTH, WIDTH)
    is_padding = torch.arange(LENGTH) < torch.tensor([[0], [3]])
    with torch.no_grad():
        expected = encoder(x, is_causal=True, src_key_padding_mask=is_padding)
        cache, end, outs = KVCache(2), 0, []
        for rows in x.split(STEPS, dim=1):
            end += rows.shape[1]
            outs.append(encoder(rows, src_key_padding_mask=is_padding[:, :end], cache=cache))
    is_token = ~is_padding
    torch.testing.assert_close(torch.cat(outs, dim=1)[is_token], expected[is_token])


def test_a_layer_alone() -> None:
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0)
    x = torch.randn(LENGTH, 2, WIDTH)  # (S, N, E)
    cache = KVCache(1)
    outs = [layer(rows, cache=cache.layers[0]) for rows in x.split(STEPS)]
    torch.testing.assert_close(torch.cat(outs), layer(x, is_causal=True))
    assert cache.length == LENGTH


def test_a_failed_step_leaves_the_cache_as_it_was() -> None:
    encoder, cache = make_encoder(), KVCache(2)
    encoder(torch.randn(2, 3, WIDTH), cache=cache)
    hook = encoder.layers[1].linear1.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        encoder(torch.randn(2, 1, WIDTH), cache=cache)
    hook.remove()
    assert cache.length == 3 and len(cache.layers[0].self_attention) == 3


class TorchSignature(TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


def test_errors() -> None:
    encoder, x = make_encoder(), torch.randn(2, 3, WIDTH)
    with pytest.raises(TypeError, match="cache: expected a KVCache, got LayerCache"):
        encoder(x, cache=KVCache(2).layers[0])
    with pytest.raises(ValueError, match="cache: expected one for 2 layers, got one for 3"):
        encoder(x, cache=KVCache(3))
    with pytest.raises(TypeError, match=r"cache: expected a layer's cache such as cache\.layers\[i\], got KVCache"):
        encoder.layers[0](x, cache=KVCache(2))
    ranges = torch.zeros(3, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="src_key_ranges: expected None with a cache"):
        encoder(x, src_key_ranges=ranges, cache=KVCache(2))
    other = TransformerEncoder(TorchSignature(WIDTH, HEADS, batch_first=True), 1)
    with pytest.raises(ValueError, match="cache: expected None, since a layer or its self-attention takes no cache"):
        other(x, cache=KVCache(1))
