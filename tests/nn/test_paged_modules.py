"""Modules whose self-attention reads a `PagedKVCache` compute what they compute over a growing cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_attn import (
    FusedMultiheadAttention,
    KVCache,
    PagedKVCache,
    Seq2SeqTransformer,
    TransformerDecoder,
    TransformerDecoderLayer,
)
from fused_attn.nn import LayerCache, OutOfPages, PagedBatch, PagedSelfAttentionCache, SelfAttentionCache

pytestmark = pytest.mark.quick


def pages_of(attention: FusedMultiheadAttention, num_pages: int = 12, page_size: int = 3) -> PagedKVCache:
    return PagedKVCache(num_pages, page_size, attention.num_kv_heads, attention.head_dim)


def attend(attention: FusedMultiheadAttention, x: Tensor, cache) -> Tensor:
    return attention(x, x, x, need_weights=False, cache=cache)[0]


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"rotary": True}, {"batch_first": False}], ids=str)
@torch.no_grad()
def test_attention_module(options: dict) -> None:
    """Sequences of different lengths: each row is that of its own sequence, computed alone over a growing cache."""
    torch.manual_seed(0)
    attention = FusedMultiheadAttention(32, 4, **{"batch_first": True} | options).eval()
    seq_dim = 1 if attention.batch_first else 0
    pages = pages_of(attention)
    sequences = [pages.add(), pages.add()]
    single = [SelfAttentionCache(), SelfAttentionCache()]
    for n, length in enumerate((4, 7)):
        prompt = torch.randn(1, length, 32) if seq_dim else torch.randn(length, 1, 32)
        out = attend(attention, prompt, PagedSelfAttentionCache(pages, sequences[n : n + 1]))
        torch.testing.assert_close(out, attend(attention, prompt, single[n]))
    both = PagedSelfAttentionCache(pages, sequences)
    assert both.position.tolist() == [4, 7] and len(both) == both.length == 7
    for count in (1, 1, 3):
        x = torch.randn(2, count, 32) if seq_dim else torch.randn(count, 2, 32)
        expected = torch.cat(
            [attend(attention, row, cache) for row, cache in zip(x.split(1, 1 - seq_dim), single, strict=True)],
            1 - seq_dim,
        )
        torch.testing.assert_close(attend(attention, x, both), expected)
    assert both.position.tolist() == [9, 12]


@torch.no_grad()
def test_unbatched() -> None:
    attention = FusedMultiheadAttention(16, 2).eval()
    pages, growing = pages_of(attention), SelfAttentionCache()
    cache = PagedSelfAttentionCache(pages, [pages.add()])
    for x in torch.randn(3, 2, 16):  # (L, E)
        torch.testing.assert_close(attend(attention, x, cache), attend(attention, x, growing))


def decoder_of(layers: int = 2) -> TransformerDecoder:
    return TransformerDecoder(TransformerDecoderLayer(32, 4, 64, batch_first=True), num_layers=layers).eval()


def batch_of(decoder: TransformerDecoder, count: int) -> tuple[list[PagedKVCache], PagedBatch]:
    pages = [pages_of(layer.self_attn) for layer in decoder.layers]
    sequences = [[layer.add() for _ in range(count)] for layer in pages]
    return pages, PagedBatch(pages, sequences[0])


@torch.no_grad()
def test_decoder_with_crop_and_reorder() -> None:
    torch.manual_seed(0)
    decoder = decoder_of()
    pages, paged = batch_of(decoder, 2)
    growing = KVCache(num_layers=2)
    memory = torch.randn(2, 5, 32)

    def step(count: int) -> None:
        tgt = torch.randn(memory.shape[0], count, 32)
        torch.testing.assert_close(decoder(tgt, memory, cache=paged), decoder(tgt, memory, cache=growing))

    step(4)
    step(1)
    paged.crop(3)
    growing.crop(3)
    assert paged.length == 3
    step(2)
    order = torch.tensor([1, 1, 0])
    before = paged.sequences
    paged.reorder(order)
    growing.reorder(order)
    assert len(set(paged.sequences)) == 3 and not set(paged.sequences) & set(before)
    assert [pages[1].length(sequence) for sequence in paged.sequences] == [5, 5, 5]
    memory = memory[order]
    step(1)
    step(2)
    assert len(pages[0]) == 3 and paged.position.tolist() == [8, 8, 8]


@torch.no_grad()
def test_a_batch_of_other_sequences_continues() -> None:
    """Continuous batching: a sequence leaves the batch, another one joins, and both keep their tokens."""
    torch.manual_seed(0)
    decoder = decoder_of(layers=1)
    (pages,), _ = batch_of(decoder, 3)
    memory, rows = torch.randn(3, 5, 32), torch.randn(3, 4, 32)
    expected = [decoder(rows[n : n + 1], memory[n : n + 1], cache=KVCache(1))[:, -1] for n in range(3)]
    last = {}
    for batch, columns in (([0, 1], (0, 3)), ([1, 2], (3, 4)), ([2, 0], (1, 4)), ([2], (0, 0))):
        if columns[0] == columns[1]:
            continue
        lengths = [pages.length(sequence) for sequence in batch]
        if len(set(lengths)) > 1:  # the sequences have different numbers of tokens to read: one after the other
            for sequence in batch:
                rest = rows[sequence, pages.length(sequence) :][None]
                if rest.shape[1]:
                    out = decoder(rest, memory[sequence : sequence + 1], cache=PagedBatch([pages], [sequence]))
                    last[sequence] = out[:, -1]
        else:
            decoder(rows[batch][:, slice(*columns)], memory[batch], cache=PagedBatch([pages], batch))
    for sequence, out in last.items():
        torch.testing.assert_close(out, expected[sequence])
    assert sorted(last) == [0, 1, 2]


@torch.no_grad()
def test_seq2seq_decodes_over_pages() -> None:
    torch.manual_seed(0)
    model = Seq2SeqTransformer(30, 30, 32, 4, 1, 2, 64).eval()
    memory, padding = model.encode(torch.randint(3, 30, (2, 6)))
    _, paged = batch_of(model.decoder, 2)
    growing = KVCache(num_layers=2)
    for tokens in torch.randint(3, 30, (5, 2, 1)):
        logits = [model.decode(tokens, memory, padding, cache=cache) for cache in (paged, growing)]
        torch.testing.assert_close(*logits)


def test_what_is_refused() -> None:
    attention = FusedMultiheadAttention(16, 2, dropout=0.1, batch_first=True)
    pages = pages_of(attention, num_pages=1)
    cache, x = PagedSelfAttentionCache(pages, [pages.add()]), torch.randn(1, 1, 16)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"in training with dropout, got some; call eval\(\)"):
            attend(attention, x, cache)
        attention.eval()
        with pytest.raises(ValueError, match="need_weights: expected False with a PagedSelfAttentionCache"):
            attention(x, x, x, cache=cache)
        with pytest.raises(ValueError, match="key_padding_mask: expected None with pages"):
            attention(x, x, x, torch.zeros(1, 1, dtype=torch.bool), need_weights=False, cache=cache)
        with pytest.raises(ValueError, match="attn_mask: expected None"):
            attention(x, x, x, attn_mask=torch.zeros(1, 1), need_weights=False, cache=cache)
        with pytest.raises(ValueError, match=r"key: expected shape \(1, 2, L, 8\)"):
            attend(attention, x.expand(2, -1, -1), cache)
        with pytest.raises(OutOfPages):
            attend(attention, x.expand(-1, 4, -1), cache)
        biased = FusedMultiheadAttention(16, 2, relative_bias=lambda q, k: torch.zeros(q + k - 1), batch_first=True)
        with pytest.raises(ValueError, match="relative_bias, got some; use a StaticKVCache"):
            attend(biased.eval(), x, cache)
    with pytest.raises(ValueError, match=r"append under torch\.no_grad"):
        attend(attention, x, cache)
    assert cache.length == 0 and pages.num_free_pages == 1  # no error has changed the cache


def test_messages_for_wrong_objects() -> None:
    decoder = decoder_of(layers=1)
    pages = pages_of(decoder.layers[0].self_attn)
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        for call in (
            lambda: attend(decoder.layers[0].self_attn, x, pages),
            lambda: decoder.layers[0](x, x, cache=pages),
            lambda: decoder(x, x, cache=pages),
        ):
            with pytest.raises(TypeError, match=r"PagedSelfAttentionCache\(cache, sequences\), a decoder PagedBatch\("):
                call()
    with pytest.raises(TypeError, match="pages: expected a PagedKVCache, got KVCache"):
        PagedSelfAttentionCache(KVCache(1), [0])
    with pytest.raises(ValueError, match="sequence: expected one of the 0 sequences"):
        PagedSelfAttentionCache(pages, [0])
    with pytest.raises(ValueError, match="pages: expected a PagedKVCache for each layer"):
        PagedBatch([], [0])
    sequence = pages.add()
    with pytest.raises(ValueError, match="sequences: expected each sequence once"):
        PagedBatch([pages], [sequence, sequence])
    cache = PagedSelfAttentionCache(pages, [sequence])
    with pytest.raises(TypeError, match="length: expected an int"):
        cache.crop(torch.tensor([0]))
    assert LayerCache(self_attention=cache).self_attention is cache


@torch.no_grad()
def test_layers_that_differ_are_refused() -> None:
    """A layer that ran out of pages after the others would make a repeated step append its tokens twice to these."""
    decoder = decoder_of()
    pages, cache = batch_of(decoder, 1)
    attention = decoder.layers[0].self_attn
    with pytest.raises(TypeError, match="pages: expected a list with a PagedKVCache for each layer, got PagedKVCache"):
        PagedBatch(pages[0], [0])
    smaller = pages_of(attention, num_pages=1)
    smaller.add()
    with pytest.raises(ValueError, match=r"in all layers, \(12, 3\), got \(1, 3\) in layer 1"):
        PagedBatch([pages[0], smaller], [0])
    with pytest.raises(ValueError, match="pages: expected a PagedKVCache of its own for each layer"):
        PagedBatch([pages[0]] * 2, [0])
    decoder(torch.randn(1, 2, 32), torch.randn(1, 3, 32), cache=cache)
    pages[1].crop(0, 1)
    with pytest.raises(ValueError, match="the length of sequence 0 in layer 0 in all layers, 2, got 1 in layer 1"):
        PagedBatch(pages, [0])
