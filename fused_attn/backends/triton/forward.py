"""The forward kernel: softmax(logits) @ value. One program computes the output of a block of queries of one head."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.pages import load_paged_rows, page_of
from fused_attn.backends.triton.scores import (
    add_sink,
    biased_scores,
    divisor,
    dropout_keep,
    exp_from,
    exponent_unit,
    hide,
    largest_logit,
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
    num_full_blocks,
    num_partial_blocks,
    partial_block,
    query_pointer,
    scheduled_tile,
    split_blocks,
    store_tile,
)


class QueryTile(NamedTuple):
    """The rows that a program computes.

    index: (M,) positions in the sequence
    q: (M, BLOCK_D)
    """

    index: tl.tensor
    q: tl.tensor


class Softmax(NamedTuple):
    """The online softmax of Milakov and Gimelshein (arXiv 1805.02867) over the keys that have been visited.

    row_max: (M,) after `to_exponent`
    row_sum: (M,)
    acc: (M, BLOCK_DV)
    """

    row_max: tl.tensor
    row_sum: tl.tensor
    acc: tl.tensor


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_splits", "split_rows"))
def attention_fwd_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D), or of pages
    v,  # Rows (B, Hkv, S, Dv), or of pages
    out,  # Rows (B, H, L, Dv), written. If IS_SPLIT: the first split of (num_splits, B, H, L, Dv) float32
    lse,  # (B, H, L) float32 or None, written. If IS_SPLIT: `Splits.sums`
    max_out,  # (B, H, L) float32 or None, the largest logit of each row, written unless IS_SPLIT
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,  # rows from one head to the next
    band_offset,
    heads_per_l2_group,
    num_splits,
    split_rows,  # rows from one split to the next
    PACK_HEADS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """
    PACK_HEADS: a tile holds the queries of a whole head group (all heads that share a key head), so that few queries
        fill a tile, and keys are loaded once for all heads of the group
    IS_SPLIT: `num_splits` programs divide the keys of a tile among themselves. Each stores the output, row_max and
        row_sum of its own keys. `merge_splits_kernel` combines these.
    """
    # Which rows this program computes. Row r of a tile that packs heads is query r // heads_per_tile of head
    # r % heads_per_tile. So neighbouring rows share a query, and the tile spans as few positions as possible.
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

    is_row = row < num_rows
    queries = QueryTile(query, load_query_rows(q, head_slice, query, is_row, settings.HEAD_DIM, settings.BLOCK_D))

    # Visit the full blocks, which need no tests, then the partial ones.
    last_row = tl.minimum(first_row + settings.BLOCK_M, num_rows) - 1
    blocks = key_blocks(first_row // heads_per_tile, last_row // heads_per_tile, head_slice, masks, settings)
    if IS_SPLIT:
        blocks = split_blocks(blocks, tl.program_id(1), num_splits, settings.BLOCK_N)
    row_max = tl.full([settings.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([settings.BLOCK_M], tl.float32)
    softmax = Softmax(row_max, row_sum, tl.zeros([settings.BLOCK_M, settings.BLOCK_DV], tl.float32))
    for index in tl.range(0, num_full_blocks(blocks, settings.BLOCK_N)):
        first_key = blocks.full_start + index * settings.BLOCK_N
        softmax = _attend(softmax, queries, first_key, k, v, head_slice, masks, settings, IS_FULL=True)
    for index in tl.range(0, num_partial_blocks(blocks, settings.BLOCK_N)):
        first_key = partial_block(blocks, index, settings.BLOCK_N)
        softmax = _attend(softmax, queries, first_key, k, v, head_slice, masks, settings, IS_FULL=False)

    # Divide by row_sum and store. An empty row has row_max = -inf, row_sum = 0 and acc = 0.
    row_max, row_sum, acc = softmax
    if not IS_SPLIT:
        row_max *= exponent_unit(settings)
    keys_max = largest_logit(row_max, row_sum)
    if masks.sinks is not None and not IS_SPLIT:
        sink = tl.load(masks.sinks + head).to(tl.float32)
        if PACK_HEADS:
            sink = tl.sum(sink, 1)  # (M, 1) -> (M,)
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, sink)
    row_sum = divisor(row_max, row_sum)
    out_tile = acc * (settings.dropout_scale / row_sum)[:, None]
    row_lse = row_max + tl.log(row_sum)
    out_pointer = query_pointer(out, head_slice, query, settings.BLOCK_DV)
    lse_offset = head_slice.lse_offset + query[:, None]
    if IS_SPLIT:
        split_offset = tl.program_id(1).to(tl.int64) * split_rows
        out_pointer += split_offset * settings.VALUE_DIM
        lse_offset += split_offset
        # A split stores row_sum and row_max, as `to_exponent` returns it. The LSE and the maximum as a logit have
        # rounding errors that would weight the splits of large logits wrongly.
        row_lse = row_max
        sum_offset = num_splits.to(tl.int64) * split_rows + lse_offset
        tl.store(lse + sum_offset, row_sum[:, None], mask=is_row[:, None])
    store_tile(out_pointer, out_tile, is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    if lse is not None:
        tl.store(lse + lse_offset, row_lse[:, None], mask=is_row[:, None])
    if max_out is not None and not IS_SPLIT:
        tl.store(max_out + lse_offset, keys_max[:, None], mask=is_row[:, None])


@triton.jit
def _attend(softmax, queries, first_key, k, v, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """The `Softmax` after the block of keys that begins at first_key.

    If the maximum of a row rises, acc and row_sum are rescaled to the new maximum.
    queries: the `QueryTile` of the softmax
    IS_FULL: the block is full, so that no entry needs a test for padding, band or the sequence's end
    """
    row_max, row_sum, acc = softmax
    query = queries.index
    key = first_key + tl.arange(0, settings.BLOCK_N)
    is_valid = None if IS_FULL else is_valid_key(key, head_slice, masks)
    if masks.block_table is not None:
        page, row = page_of(key, first_key, head_slice, masks, settings)
        k_tile = load_paged_rows(k, page, row, head_slice, is_valid, settings.HEAD_DIM, settings.BLOCK_D)
    else:
        k_tile = load_key_rows(k, head_slice, key, is_valid, settings.HEAD_DIM, settings.BLOCK_D)
    qk = tl.dot(queries.q, tl.trans(k_tile), input_precision=settings.PRECISION)
    scores, _ = biased_scores(qk, query[:, None], key[None, :], head_slice, masks, settings, IS_FULL)
    is_valid_column = None if IS_FULL else is_valid[None, :]  # type: ignore[index]
    scores = hide(
        scores, float("-inf"), query[:, None], key[None, :], is_valid_column, head_slice, masks, settings, IS_FULL
    )

    new_max = tl.maximum(row_max, to_exponent(tl.max(scores, 1), settings))
    # A row that has seen no key yet has the maximum -inf, and -inf - -inf would be NaN. With 0 in its place, the probs
    # become exp(-inf - 0) = 0.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = exp_from(scores, finite_max[:, None], settings)
    rescale = rescale_factor(row_max, finite_max, settings)
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    if masks.seed is not None:
        probs = tl.where(dropout_keep(query[:, None], first_key, head_slice, masks, settings), probs, 0.0)
    if masks.block_table is not None:
        v_tile = load_paged_rows(v, page, row, head_slice, is_valid, settings.VALUE_DIM, settings.BLOCK_DV)
    else:
        v_tile = load_key_rows(v, head_slice, key, is_valid, settings.VALUE_DIM, settings.BLOCK_DV)
    acc = plus_product(acc * rescale[:, None], probs.to(v_tile.dtype), v_tile, settings)
    return Softmax(new_max, row_sum, acc)
