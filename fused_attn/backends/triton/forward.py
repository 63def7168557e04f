"""The forward kernel: softmax(scores) @ value, one program for a block of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.scores import (
    add_sink,
    biased_scores,
    dropout_keep,
    exp_from,
    exponent_unit,
    hide,
    rescale_factor,
    to_exponent,
)
from fused_attn.backends.triton.sums import plus_product
from fused_attn.backends.triton.tiles import (
    head_slice_of,
    is_valid_key,
    key_blocks,
    load_key_rows,
    load_query_rows,
    num_partial_blocks,
    partial_block,
    query_pointer,
    scheduled_tile,
    split_blocks,
    store_tile,
)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_splits", "split_rows"))
def attention_fwd_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    out,  # Rows (B, H, L, Dv); of the first split if IS_SPLIT
    lse,  # (B, H, L) float32 or None; if IS_SPLIT (2, num_splits, B, H, L): maxima of the rows, sums of the probs
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,  # between heads
    band_offset,
    heads_per_l2_group,
    num_splits,
    split_rows,  # rows between one split and the next
    PACK_HEADS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """PACK_HEADS: a tile holds all query heads that share a key head, so that few queries still fill it.

    IS_SPLIT: the keys are divided among `num_splits` programs; `merge_splits_kernel` joins what they store.
    """
    # Which rows. Row r of a head is query r // heads_per_tile. So a tile spans few queries of the band.
    heads_per_tile = settings.group_size if PACK_HEADS else 1
    num_blocks = tl.cdiv(seqlen_q * heads_per_tile, settings.BLOCK_M)
    num_tile_heads = settings.num_heads // heads_per_tile
    block, tile_head, batch = scheduled_tile(num_blocks, num_tile_heads, heads_per_l2_group, LAST_FIRST=True)
    first_row = block * settings.BLOCK_M
    row = first_row + tl.arange(0, settings.BLOCK_M)
    query = row // heads_per_tile
    if PACK_HEADS:
        kv_head = tile_head
        head = tile_head * heads_per_tile + (row % heads_per_tile)[:, None]
    else:
        kv_head = tile_head // settings.group_size
        head = tile_head
    head_slice = head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset)
    num_rows = head_slice.seqlen_q * heads_per_tile
    if first_row >= num_rows:
        return

    # Load.
    is_row = row < num_rows
    q_tile = load_query_rows(q, head_slice, query, is_row, settings.HEAD_DIM, settings.BLOCK_D)

    # Loop: full blocks without tests, then the partial ones.
    last_row = tl.minimum(first_row + settings.BLOCK_M, num_rows) - 1
    blocks = key_blocks(first_row // heads_per_tile, last_row // heads_per_tile, head_slice, masks, settings)
    if IS_SPLIT:
        blocks = split_blocks(blocks, tl.program_id(1), num_splits, settings.BLOCK_N)
    row_max = tl.full([settings.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([settings.BLOCK_M], tl.float32)
    acc = tl.zeros([settings.BLOCK_M, settings.BLOCK_DV], tl.float32)
    for first_key in tl.range(blocks.full_start, blocks.full_end, settings.BLOCK_N):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, query, first_key, k, v, head_slice, masks, settings, IS_FULL=True
        )
    for index in tl.range(0, num_partial_blocks(blocks, settings.BLOCK_N)):
        first_key = partial_block(blocks, index, settings.BLOCK_N)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, query, first_key, k, v, head_slice, masks, settings, IS_FULL=False
        )

    # Epilogue. A row that saw nothing has maximum -inf and sum 0: its output is 0 and its LSE -inf.
    row_max *= exponent_unit(settings)
    if masks.sinks is not None and not IS_SPLIT:
        sink = tl.load(masks.sinks + head).to(tl.float32)
        if PACK_HEADS:
            sink = tl.sum(sink, 1)  # of one column
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, sink)
    row_sum = tl.where(row_max == float("-inf"), 1.0, row_sum)
    out_tile = acc * (settings.dropout_scale / row_sum)[:, None]
    row_lse = row_max + tl.log(row_sum)
    out_pointer = query_pointer(out, head_slice, query, settings.BLOCK_DV)
    lse_offset = head_slice.lse_offset + query[:, None]
    if IS_SPLIT:
        split_offset = tl.program_id(1).to(tl.int64) * split_rows
        out_pointer += split_offset * settings.VALUE_DIM
        lse_offset += split_offset
        # Where logits are large, their LSE is too coarse a number to join the splits by.
        row_lse = row_max
        sum_offset = num_splits.to(tl.int64) * split_rows + lse_offset
        tl.store(lse + sum_offset, row_sum[:, None], mask=is_row[:, None])
    store_tile(out_pointer, out_tile, is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    if lse is not None:
        tl.store(lse + lse_offset, row_lse[:, None], mask=is_row[:, None])


@triton.jit
def _attend(
    acc,  # (M, BLOCK_DV)
    row_max,  # (M,) by `to_exponent`
    row_sum,  # (M,)
    q_tile,
    query,
    first_key,
    k,
    v,
    head_slice,
    masks,
    settings,
    IS_FULL: tl.constexpr,
):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867): (acc, row_max, row_sum)."""
    key = first_key + tl.arange(0, settings.BLOCK_N)
    is_valid = None if IS_FULL else is_valid_key(key, head_slice, masks)
    k_tile = load_key_rows(k, head_slice, key, is_valid, settings.HEAD_DIM, settings.BLOCK_D)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=settings.PRECISION)
    scores, _ = biased_scores(qk, query[:, None], key[None, :], head_slice, masks, settings, IS_FULL)
    is_valid_column = None if IS_FULL else is_valid[None, :]
    scores = hide(
        scores, float("-inf"), query[:, None], key[None, :], is_valid_column, head_slice, masks, settings, IS_FULL
    )

    new_max = tl.maximum(row_max, to_exponent(tl.max(scores, 1), settings))
    # -inf - -inf is NaN: rows that have seen nothing yet take 0 for their maximum, and probs exp(-inf) = 0.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = exp_from(scores, finite_max[:, None], settings)
    rescale = rescale_factor(row_max, finite_max, settings)
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    if masks.seed is not None:
        probs = tl.where(dropout_keep(query[:, None], first_key, head_slice, masks, settings), probs, 0.0)
    v_tile = load_key_rows(v, head_slice, key, is_valid, settings.VALUE_DIM, settings.BLOCK_DV)
    acc = plus_product(acc * rescale[:, None], probs.to(v_tile.dtype), v_tile, settings)
    return acc, new_max, row_sum
