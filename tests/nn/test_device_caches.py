"""All kinds of self-attention caches against plain lists of rows, and in modules against attention without a cache."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import fused_attn as fused
from fused_attn import FusedMultiheadAttention
from fused_attn.nn import (
    KVCache,
    PagedBatch,
    PagedKVCache,
    PagedSelfAttentionCache,
    SelfAttentionCache,
    SlidingKVCache,
    SlidingSelfAttentionCache,
    StaticKVCache,
    StaticSelfAttentionCache,
    T5RelativeBias,
)
from fused_attn.nn.paged_self_attention import PagedRows
from tests.nn.test_seq2seq import make_model

BATCH, HEADS, COLUMNS, WINDOW, CAPACITY = 3, 2, 4, 5, 64

KINDS = {
    "growing": lambda: SelfAttentionCache(),
    "preallocated": lambda: SelfAttentionCache(CAPACITY),
    "static": lambda: StaticSelfAttentionCache(CAPACITY),
    "sliding": lambda: SlidingSelfAttentionCache(WINDOW),
    "paged": lambda: paged_cache(),
}


def paged_cache() -> PagedSelfAttentionCache:
    pages = PagedKVCache(BATCH * CAPACITY // 3, 3, HEADS, COLUMNS, dtype=torch.float64)
    return PagedSelfAttentionCache(pages, [pages.add() for _ in range(BATCH)])


def attended(rows, query: Tensor) -> Tensor:
    """What attention over the rows of a cache gives, by the module's own way of passing the masks on."""
    if isinstance(rows, PagedRows):
        return fused.fused_attention_paged(query, *rows, is_causal=True)
    options = dict(rows.options)
    if rows.diagonal:
        options["attn_mask"] = causal_lower_right(query.shape[2], rows.keys.shape[2])
    elif rows.diagonal == 0:
        options["is_causal"] = True
    return fused.fused_attention(query, rows.keys, rows.values, **options)


def expected(history: list[list[tuple[Tensor, Tensor]]], query: Tensor, window: int | None) -> Tensor:
    """The same from lists of (key (Hkv, D), value (Hkv, D)), one list for each batch entry."""
    out = torch.empty_like(query)
    count = query.shape[2]
    for b, entry in enumerate(history):
        for i in range(count):
            end = len(entry) - count + i + 1
            seen = entry[max(0, end - window) if window else 0 : end]
            keys, values = (torch.stack(x, dim=1) for x in zip(*seen, strict=True))  # (Hkv, S, D)
            weights = (keys @ query[b, :, i, :, None] / COLUMNS**0.5).softmax(dim=1)
            out[b, :, i] = (weights * values).sum(dim=1)
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fuzz_against_lists(kind, seed):
    """append, crop, reorder, moves between dtypes and wraps of the ring, in random order."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache, dtype, window = KINDS[kind](), torch.float64, WINDOW if kind == "sliding" else None
    history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(BATCH)]
    lengths_seen = set()
    for _ in range(40):
        action = draw.choice(["append", "append", "append", "crop", "reorder", "to"])
        longest = max(map(len, history))
        if action == "append" and longest < CAPACITY - 8:
            count = draw.choice([1, 1, 1, 2, WINDOW, 8])
            key, value, query = (
                torch.randn(BATCH, HEADS, count, COLUMNS, generator=generator, dtype=dtype) for _ in range(3)
            )
            for b, entry in enumerate(history):
                entry += [(key[b, :, i], value[b, :, i]) for i in range(count)]
            torch.testing.assert_close(attended(cache.append(key, value), query), expected(history, query, window))
            lengths_seen.add(longest + count)
        elif action == "crop" and kind != "sliding":
            length = draw.randint(0, longest + 1)
            if kind == "static" and draw.random() < 0.5:
                lengths = [draw.randint(1, longest + 1) for _ in history]
                cache.crop(torch.tensor(lengths))
            else:
                lengths = [length] * BATCH
                cache.crop(length)
            for entry, most in zip(history, lengths, strict=True):
                del entry[most:]
        elif action == "crop" and draw.random() < 0.2:
            cache.crop(0)
            history = [[] for _ in range(BATCH)]
        elif action == "reorder":
            order = [draw.randrange(BATCH) for _ in range(BATCH)]
            cache.reorder(torch.tensor(order))
            history = [list(history[n]) for n in order]
        elif action == "to":
            cache.to(dtype=torch.float32)
            cache.to("cpu", torch.float64)
            history = [[(k.float().double(), v.float().double()) for k, v in entry] for entry in history]
        assert len(cache) == cache.length == max(map(len, history))
    assert len(lengths_seen) > 8


# ---- in modules

MODULES = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "rotary": {"rotary": True},
    "relative-bias": {"relative_bias": "t5"},
    "sequence-first": {"batch_first": False},
    "rotary-sequence-first": {"batch_first": False, "rotary": True},
}


def make_module(options: dict) -> FusedMultiheadAttention:
    torch.manual_seed(0)
    options = {"batch_first": True, "dtype": torch.float64} | options
    if "relative_bias" in options:
        options["relative_bias"] = T5RelativeBias(8, 4, bidirectional=False, max_distance=16, dtype=torch.float64)
        torch.nn.init.normal_(options["relative_bias"].weight)
    return FusedMultiheadAttention(16, 4, **options).eval()


@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 3, 1), (9,)], ids=str)
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_static_cache_gives_causal_attention(name, chunks):
    module = make_module(MODULES[name])
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    full, _ = module(x, x, x, need_weights=False, is_causal=True) if module.batch_first else _transposed(module, x)
    cache, out = StaticSelfAttentionCache(12), []
    for part in x.split(chunks, dim=1):
        part = part if module.batch_first else part.transpose(0, 1)
        y = module(part, part, part, need_weights=False, cache=cache)[0]
        out.append(y if module.batch_first else y.transpose(0, 1))
    torch.testing.assert_close(torch.cat(out, dim=1), full)


def _transposed(module: FusedMultiheadAttention, x: Tensor) -> tuple[Tensor, None]:
    x = x.transpose(0, 1)
    return module(x, x, x, need_weights=False, is_causal=True)[0].transpose(0, 1), None


@pytest.mark.parametrize("chunks", [(1,) * 12, (4, 1, 6, 1), (12,), (2, 10)], ids=str)
@pytest.mark.parametrize("name", ["plain", "gqa", "rotary"])
@torch.no_grad()
def test_a_ring_gives_attention_with_a_window(name, chunks):
    module = make_module(MODULES[name])
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    distance = torch.arange(12) - torch.arange(12)[:, None]
    full, _ = module(x, x, x, need_weights=False, attn_mask=(distance > 0) | (distance <= -WINDOW))
    cache = SlidingSelfAttentionCache(WINDOW)
    out = [module(part, part, part, need_weights=False, cache=cache)[0] for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), full)
    assert len(cache) == 12


@torch.no_grad()
def test_batch_entries_of_different_lengths():
    """After a crop by a tensor, each entry goes on at its own position."""
    module = make_module(MODULES["rotary"])
    x, lengths = torch.randn(3, 8, 16, dtype=torch.float64), [5, 1, 3]
    cache = StaticSelfAttentionCache(12)
    module(x[:, :5], x[:, :5], x[:, :5], need_weights=False, cache=cache)
    cache.crop(torch.tensor(lengths))
    new = torch.stack([x[b, n : n + 2] for b, n in enumerate(lengths)])
    out = [module(part, part, part, need_weights=False, cache=cache)[0] for part in new.split(1, dim=1)]
    for b, n in enumerate(lengths):
        one = x[b : b + 1, : n + 2]
        full, _ = module(one, one, one, need_weights=False, is_causal=True)
        torch.testing.assert_close(torch.cat(out, dim=1)[b], full[0, n:])
    assert cache.position.tolist() == [7, 3, 5] and len(cache) == 7


@torch.no_grad()
def test_left_padding_in_a_static_cache():
    module = make_module({})
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    cache = StaticSelfAttentionCache(8)
    is_padding = torch.zeros(2, 8, dtype=torch.bool)
    is_padding[0, :2] = True
    out = [
        module(part, part, part, is_padding, need_weights=False, cache=cache)[0] for part in x.split((4, 1, 1), dim=1)
    ]
    alone = x[:1, 2:]
    full, _ = module(alone, alone, alone, need_weights=False, is_causal=True)
    torch.testing.assert_close(torch.cat(out, dim=1)[0, 2:], full[0])


@pytest.mark.parametrize("make", [lambda: StaticKVCache(2, 16), lambda: SlidingKVCache(2, 16)], ids=["static", "ring"])
@torch.no_grad()
def test_speculative_decoding_with_a_decoder(make):
    """A decoder reads drafted tokens at once, forgets those behind the accepted ones, and goes on."""
    torch.manual_seed(0)
    layer = fused.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    decoder = fused.TransformerDecoder(layer, 2).eval()
    tgt, memory = (torch.randn(2, n, 16, dtype=torch.float64) for n in (8, 5))
    full = decoder(tgt, memory, tgt_is_causal=True)
    cache = make()
    out = [decoder(tgt[:, :3], memory, cache=cache)]
    if isinstance(cache, StaticKVCache):  # a ring cannot be cropped
        decoder(torch.randn(2, 4, 16, dtype=torch.float64), memory, cache=cache)
        cache.crop(3)
    out += [decoder(part, memory, cache=cache) for part in tgt[:, 3:].split((3, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), full)
    assert cache.length == 8


# ---- memory, moves, errors


@torch.no_grad()
def test_buffers_never_move():
    row = torch.randn(2, 2, 1, 4)
    for make in (KINDS["static"], KINDS["sliding"]):
        cache, places = make(), set()
        for _ in range(40):
            rows = cache.append(row, row)
            places.add((rows.keys.data_ptr(), rows.values.data_ptr(), rows.options["key_lengths"].data_ptr()))
        cache.reorder(torch.tensor([1, 0]))
        rows = cache.append(row, row)
        places.add((rows.keys.data_ptr(), rows.values.data_ptr(), rows.options["key_lengths"].data_ptr()))
        assert len(places) == 1


@torch.no_grad()
def test_reserve_keeps_the_rows():
    cache, x = StaticKVCache(1, 3), torch.randn(2, 2, 3, 4)
    part = cache.layers[0].self_attention
    part.append(x, x)
    with pytest.raises(ValueError, match="cache: expected at most max_length=3 rows, got 4"):
        part.append(x[:, :, :1], x[:, :, :1])
    cache.reserve(8)
    rows = part.append(x, x)
    assert rows.keys.shape[2] == 8 == cache.max_length and cache.length == 6
    assert torch.equal(rows.keys[:, :, :6], torch.cat((x, x), dim=2))


@pytest.mark.parametrize("make", [lambda: KVCache(1), lambda: StaticKVCache(1, 8), lambda: SlidingKVCache(1, 8)])
@torch.no_grad()
def test_to_moves_every_part(make):
    cache, x = make(), torch.randn(2, 2, 3, 4)
    assert cache.to(dtype=torch.float64) is cache  # an empty cache
    cache.layers[0].self_attention.append(x, x)
    cache.layers[0].cross_attention.update(x, x)
    cache.to(dtype=torch.bfloat16)
    assert cache.layers[0].cross_attention.get()[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"key: expected torch.bfloat16 on cpu, as in the cache, got torch.float32"):
        cache.layers[0].self_attention.append(x, x)
    rows = cache.layers[0].self_attention.append(x.bfloat16(), x.bfloat16())
    assert rows.keys.dtype == torch.bfloat16 and cache.length == 6
    assert {x.device.type for x in (cache.to("meta").layers[0].cross_attention.get())} == {"meta"}


@torch.no_grad()
def test_inference_mode_and_no_grad_mix():
    cache, x = StaticSelfAttentionCache(8), torch.randn(2, 2, 1, 4)
    with torch.inference_mode():
        cache.append(x, x)
    assert len(cache) == 1
    cache.append(x, x)
    assert len(cache) == 2


def test_errors():
    x = torch.randn(2, 2, 1, 4)
    static, ring = StaticSelfAttentionCache(8), SlidingSelfAttentionCache(4)
    static.append(x, x)
    ring.append(x, x)
    with pytest.raises(ValueError, match=r"cache: expected keys and values without gradient .*; use torch\.no_grad"):
        static.append(x.clone().requires_grad_(), x)
    with pytest.raises(ValueError, match="indices: expected the batch size of a static cache, 2, got 3"):
        static.reorder(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"length: expected 0 for a sliding window, .*, got 1"):
        ring.crop(1)
    for cache in (KVCache(1), StaticKVCache(1, 4)):
        with pytest.raises(ValueError, match="length: expected at least 0, got -1"):
            cache.crop(-1)
        with pytest.raises(TypeError, match="length: expected an int, got float"):
            cache.crop(1.0)
    with pytest.raises(TypeError, match="length: expected an int, got Tensor; StaticKVCache takes a tensor of lengths"):
        KVCache(1).crop(torch.tensor([1]))
    for length, message in (
        (
            torch.tensor([1]),
            r"length: expected an int or integers of shape \(B,\) = \(2,\), got torch.int64 of shape \(1,\)",
        ),
        (torch.tensor([1.0, 1.0]), "length: expected an int or integers of shape .*, got torch.float32"),
        (torch.tensor([1, -1]), "length: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            static.crop(length)
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        StaticKVCache(1, 0)
    with pytest.raises(TypeError, match="window: expected an int, got float"):
        SlidingKVCache(1, 2.0)
    y = torch.randn(2, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(ValueError, match="need_weights: expected False with a StaticSelfAttentionCache, got True"):
            make_module({})(y, y, y, cache=StaticSelfAttentionCache(4))
        with pytest.raises(ValueError, match="cache: expected no sliding window in a module with relative_bias"):
            make_module(MODULES["relative-bias"])(y, y, y, need_weights=False, cache=SlidingSelfAttentionCache(4))
        with pytest.raises(ValueError, match="key_padding_mask: expected None with a sliding window"):
            padding = torch.zeros(2, 1, dtype=torch.bool)
            make_module({})(y, y, y, padding, need_weights=False, cache=SlidingSelfAttentionCache(4))


@pytest.mark.parametrize("caller", ["decoder", "layer"])
@pytest.mark.parametrize("make", [lambda: KVCache(2), lambda: StaticKVCache(2, 8)], ids=["growing", "static"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_mask": torch.zeros(3, 4)}, r"memory_mask: expected shape \(1, 4\) or \(4, 1, 4\), got \(3, 4\)"),
        ({"memory_mask": torch.zeros(1, 4).long()}, "memory_mask: expected bool or floating point, got torch.int64"),
        ({"memory_key_padding_mask": torch.zeros(4, 2)}, r"memory_key_padding_mask: expected shape \(2, 4\), got"),
        ({"memory_key_padding_mask": torch.zeros(2, 4).int()}, "memory_key_padding_mask: expected bool or floating"),
        ({"tgt_key_padding_mask": torch.zeros(2, 1)}, r"key_padding_mask: expected shape \(N, S\) = \(2, [28]\), got"),
        ({"memory": torch.zeros(2, 4, 9)}, r"memory: expected 8 features, got shape \(2, 4, 9\)"),
        ({"memory": torch.zeros(3, 4, 8)}, r"memory: expected the batch size of tgt, 2, got 3"),
        ({"memory": torch.zeros(2, 5, 8)}, r"memory: expected batch size 2 and length 4, as in the cache"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@torch.no_grad()
def test_a_step_can_be_repeated_after_an_error(caller, make, wrong, message):
    """A wrong argument of a step adds no row to the cache of any layer."""
    torch.manual_seed(0)
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    tgt, memory, cache = torch.randn(2, 2, 8), torch.randn(2, 4, 8), make()
    if caller == "layer":
        step, full, kept = decoder.layers[0], decoder.layers[0](tgt, memory, tgt_is_causal=True), cache.layers[0]
    else:
        step, full, kept = decoder, decoder(tgt, memory, tgt_is_causal=True), cache
    first, second = tgt.split(1, dim=1)
    step(first, memory, cache=kept)
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=f"^{message}"):
        step(second, **{"memory": memory} | wrong, cache=kept)
    torch.testing.assert_close(step(second, memory, cache=kept), full[:, 1:])
    assert all(layer.self_attention.length == 2 for layer in (cache.layers if caller == "decoder" else [kept]))


def decoder_caches(kind: str, layers: int) -> KVCache:
    """A cache of the kind for a decoder of 2 heads with 4 columns and a batch of 2."""
    if kind != "paged":
        makers = {
            "growing": KVCache,
            "static": lambda n: StaticKVCache(n, 16),
            "sliding": lambda n: SlidingKVCache(n, 3),
        }
        return makers[kind](layers)
    pages = [PagedKVCache(16, 2, 2, 4) for _ in range(layers)]
    for layer in pages:
        assert [layer.add(), layer.add()] == [0, 1]
    return PagedBatch(pages, [0, 1])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["growing", "static", "sliding", "paged"])
@torch.no_grad()
def test_a_step_can_be_repeated_after_an_error_anywhere(kind, count):
    """An error of another cause than the arguments, in whatever module, leaves no row in the cache of any layer."""
    torch.manual_seed(0)
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    tgt, memory = torch.randn(2, 6 + count, 8), torch.randn(2, 4, 8)
    hidden = torch.ones(6 + count, 6 + count, dtype=torch.bool).triu(1)
    if kind == "sliding":
        hidden |= torch.ones_like(hidden).tril(-3)
    expected = decoder(tgt, memory, tgt_mask=hidden)[:, 6:]

    def interrupt(*_):
        raise KeyboardInterrupt

    for module in decoder.layers[1].modules():
        cache = decoder_caches(kind, 2)
        decoder(tgt[:, :6], memory, cache=cache)
        hook = module.register_forward_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                decoder(torch.randn(2, count, 8), memory, cache=cache)
        finally:
            hook.remove()
        assert cache.length == 6
        torch.testing.assert_close(decoder(tgt[:, 6:], memory, cache=cache), expected)


@pytest.mark.parametrize("kind", ["growing", "static", "sliding", "paged"])
def test_a_cache_of_inference_mode_goes_on_under_no_grad(kind):
    torch.manual_seed(0)
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    tgt, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    with torch.inference_mode():
        cache = decoder_caches(kind, 2)
        decoder(tgt[:, :1], memory, cache=cache)
        cache.reorder(torch.tensor([0, 1]))
        cache.to(dtype=torch.float64).to(dtype=torch.float32)
        decoder(tgt[:, 1:2], memory, cache=cache)
    with torch.no_grad():
        expected = decoder(tgt, memory, tgt_is_causal=True)[:, 2:]
        torch.testing.assert_close(decoder(tgt[:, 2:], memory, cache=cache), expected)


@pytest.mark.parametrize("kind", ["growing", "static", "sliding"])
@torch.no_grad()
def test_the_first_step_can_be_repeated_with_another_batch(kind):
    torch.manual_seed(0)
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    cache, tgt, memory = decoder_caches(kind, 2), torch.randn(3, 1, 8), torch.randn(3, 4, 8)
    with decoder.layers[1].linear2.register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        decoder(tgt, memory, cache=cache)
    expected = decoder(tgt[:2], memory[:2], tgt_is_causal=True)
    torch.testing.assert_close(decoder(tgt[:2], memory[:2], cache=cache), expected)


@pytest.mark.parametrize("positional", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
def test_targets_behind_max_len_are_refused(kind: type, positional: str) -> None:
    model = make_model(max_len=8, positional=positional).eval()
    memory, padding = model.encode(torch.full((2, 5), 3))
    cache = kind(len(model.decoder.layers), 40)
    with torch.no_grad():
        model.decode(torch.full((2, 6), 3), memory, padding, cache=cache)
        for _ in range(2):  # the refused call leaves the cache as it was
            with pytest.raises(ValueError, match="tgt: expected at most max_len=8 tokens, got 9"):
                model.decode(torch.full((2, 3), 3), memory, padding, cache=cache)
    assert cache.length == 6
