"""The forward kernel: softmax(scores) @ value, one program for a block of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.scores import LN_2, LOG2_E, dropout_keep, hide, log2_scores
from fused_attn.backends.triton.tiles import (
    block_and_unit,
    first_row_of,
    is_kept,
    key_blocks,
    load_rows,
    num_partial_blocks,
    partial_block,
    place_of,
    split_blocks,
    store_rows,
)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_splits", "split_rows"))
def attention_fwd_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    out,  # Rows (B, H, L, Dv), or (num_splits, B, H, L, Dv) float32
    lse,  # (B, H, L) float32, or (num_splits, B, H, L), or None
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,  # between heads
    band_offset,
    units_per_section,
    num_splits,
    split_rows,  # rows between two splits
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PACK_HEADS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """PACK_HEADS: a tile holds all query heads that share a key head, so that few queries still fill it.

    IS_SPLIT: the keys are divided among `num_splits` programs; `merge_splits_kernel` joins what they store.
    """
    # Which rows. Row r of a unit is query r // heads_per_unit, so that a tile spans few queries of the band.
    heads_per_unit = settings.group_size if PACK_HEADS else 1
    num_blocks = tl.cdiv(seqlen_q * heads_per_unit, BLOCK_M)
    block, unit, batch = block_and_unit(
        num_blocks, settings.num_heads // heads_per_unit, units_per_section, LAST_FIRST=True
    )
    first_row = block * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    if PACK_HEADS:
        kv_head = unit
        head = unit * settings.group_size + row % settings.group_size
        query = row // settings.group_size
        place = place_of(batch, head[:, None], masks, seqlen_q, seqlen_k, band_offset)
    else:
        kv_head = unit // settings.group_size
        head = unit
        query = row
        place = place_of(batch, head, masks, seqlen_q, seqlen_k, band_offset)
    if first_row >= place.len_q * heads_per_unit:
        return
    is_row = query < place.len_q

    # Load.
    if PACK_HEADS:
        q_base = first_row_of(q, batch, unit * settings.group_size, place.first_q)
        q_base += (row % settings.group_size).to(tl.int64)[:, None] * q.stride_h
    else:
        q_base = first_row_of(q, batch, head, place.first_q)
    q_tile = load_rows(q_base, q.stride_row, query, is_row, HEAD_DIM, BLOCK_D)
    k_base = first_row_of(k, batch, kv_head, place.first_k)
    v_base = first_row_of(v, batch, kv_head, place.first_k)

    # Loop: full blocks without tests, then the partial ones.
    last_query = tl.minimum(first_row + BLOCK_M - 1, place.len_q * heads_per_unit - 1) // heads_per_unit
    blocks = key_blocks(first_row // heads_per_unit, last_query, place, masks, settings, seqlen_k, BLOCK_N)
    if IS_SPLIT:
        blocks = split_blocks(blocks, tl.program_id(1), num_splits, BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first_key in tl.range(blocks.full_start, blocks.full_end, BLOCK_N):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, query[:, None], first_key, k, k_base, v, v_base, place, masks, settings,
            seqlen_k, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, IS_FULL=True,
        )  # fmt: skip
    for index in tl.range(0, num_partial_blocks(blocks, BLOCK_N)):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, query[:, None], partial_block(blocks, index, BLOCK_N),
            k, k_base, v, v_base, place, masks, settings,
            seqlen_k, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, IS_FULL=False,
        )  # fmt: skip

    # Epilogue. A row that saw nothing has maximum -inf and sum 0: its output is 0 and its LSE -inf.
    is_empty = row_max == float("-inf")
    if masks.sinks is not None and not IS_SPLIT:
        sink = tl.load(masks.sinks + head).to(tl.float32) * LOG2_E
        with_sink = tl.maximum(row_max, sink)
        rescale = tl.exp2(row_max - with_sink)
        acc *= rescale[:, None]
        row_sum = tl.where(is_empty, 0.0, row_sum * rescale + tl.exp2(sink - with_sink))
        row_max = with_sink
    out_tile = acc * (settings.inverse_keep / tl.where(is_empty, 1.0, row_sum))[:, None]
    split_offset = tl.program_id(1).to(tl.int64) * split_rows if IS_SPLIT else 0
    if PACK_HEADS:
        out_base = first_row_of(out, batch, unit * settings.group_size, place.first_q)
        out_base += (row % settings.group_size).to(tl.int64)[:, None] * out.stride_h
    else:
        out_base = first_row_of(out, batch, head, place.first_q)
    store_rows(out_base + split_offset * VALUE_DIM, out.stride_row, query, is_row, out_tile, VALUE_DIM, BLOCK_DV)
    if lse is not None:
        row_lse = tl.where(is_empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
        lse_base = lse + split_offset + lse_row(batch, head, place.first_q, masks, settings, lse_stride)
        tl.store(lse_base + query, row_lse, mask=is_row)


@triton.jit
def lse_row(batch, head, first_q, masks, settings, lse_stride):
    """Offset of a head's first entry in (B, H, L), or packed (1, H, total)."""
    if masks.cu_seqlens_q is not None:
        return head.to(tl.int64) * lse_stride + first_q
    else:
        return (batch.to(tl.int64) * settings.num_heads + head) * lse_stride


@triton.jit
def _attend(
    acc,  # (M, BLOCK_DV)
    row_max,  # (M,) base 2
    row_sum,  # (M,)
    q_tile,
    query,  # (M, 1)
    first_key,
    k,
    k_base,
    v,
    v_base,
    place,
    masks,
    settings,
    seqlen_k,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867): (acc, row_max, row_sum)."""
    key = first_key + tl.arange(0, BLOCK_N)
    if IS_FULL:
        keep = None
    else:
        keep = is_kept(key, place, masks, seqlen_k)
    k_tile = load_rows(k_base, k.stride_row, key, keep, HEAD_DIM, BLOCK_D)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    scores, unit, _ = log2_scores(qk, query, key[None, :], place, masks, settings, IS_FULL)
    scores = hide(
        scores, float("-inf"), query, key[None, :], None if IS_FULL else keep[None, :], place, masks, settings, IS_FULL
    )

    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    # -inf - -inf is NaN: rows that have seen nothing yet take 0 for their maximum, and weights exp2(-inf) = 0.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * unit - finite_max[:, None])
    rescale = tl.exp2(row_max - finite_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if masks.seed is not None:
        weights = tl.where(dropout_keep(query, first_key, place, masks, settings, BLOCK_N), weights, 0.0)
    v_tile = load_rows(v_base, v.stride_row, key, keep, VALUE_DIM, BLOCK_DV)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum
