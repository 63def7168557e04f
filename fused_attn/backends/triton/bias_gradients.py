"""Gradients of the two biases: a dense one, summed over the dimensions it broadcasts, and a table of distances.

Both are sums of the scores' gradient. They recompute it, with programs laid out along the sum, so that each entry is
summed by one program in a fixed order and nothing of the size L x S is stored that was not given by the user.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.backward import load_lse, weights_and_gradients
from fused_attn.backends.triton.tiles import first_row_of, is_kept, load_rows, place_of


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_batches"))
def attention_bwd_dbias_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dbias,  # (B|1, H|1, L or blocks of queries, S or blocks of keys) float32, contiguous
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    num_batches,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS_BATCHES: tl.constexpr,
    SUMS_HEADS: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    SUMS_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of scores and sums it over batch and heads as far as the bias broadcasts.

    Where the bias has one row (column) for all, each program stores the sum over its own rows (columns).
    """
    # Which tile.
    row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    column_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    row_block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    first_row = row_block * BLOCK_M
    first_key = column_block * BLOCK_N
    query = first_row + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)
    first_head = tl.program_id(1)
    first_batch = tl.program_id(2)
    heads_here = settings.num_heads if SUMS_HEADS else 1
    batches_here = num_batches if SUMS_BATCHES else 1

    # Loop.
    terms = heads_here * batches_here
    nearest = first_key - (first_row + BLOCK_M - 1) - band_offset
    farthest = first_key + BLOCK_N - 1 - first_row - band_offset
    if settings.band_right is not None:
        terms = tl.where(nearest > settings.band_right, 0, terms)
    if settings.band_left is not None:
        terms = tl.where(farthest < -settings.band_left, 0, terms)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for term in range(0, terms):
        acc += score_gradient(
            q, k, v, dout, lse, delta, first_batch + term // heads_here, first_head + term % heads_here,
            query, key, first_key, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip

    # Store the tile, or its sum along the axes on which the bias broadcasts.
    num_rows = row_blocks if SUMS_ROWS else seqlen_q
    num_columns = column_blocks if SUMS_COLUMNS else seqlen_k
    matrix = first_batch.to(tl.int64) * tl.num_programs(1) + first_head
    base = dbias + matrix * num_rows * num_columns
    if SUMS_ROWS and SUMS_COLUMNS:
        tl.store(base + row_block * num_columns + column_block, tl.sum(tl.sum(acc, 1), 0))
    elif SUMS_ROWS:
        tl.store(base + tl.cast(row_block, tl.int64) * num_columns + key, tl.sum(acc, 0), mask=key < seqlen_k)
    elif SUMS_COLUMNS:
        tl.store(base + query.to(tl.int64) * num_columns + column_block, tl.sum(acc, 1), mask=query < seqlen_q)
    else:
        is_inside = (query[:, None] < seqlen_q) & (key[None, :] < seqlen_k)
        tl.store(base + query.to(tl.int64)[:, None] * num_columns + key[None, :], acc, mask=is_inside)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_batches"))
def attention_bwd_dtable_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dtable,  # (2, H, (block diagonals + 1) * BLOCK) float32, zeros where no program stores
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    num_batches,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns the square tiles along one block diagonal of one head and sums each of their diagonals.

    Such tiles share 2 * BLOCK - 1 diagonals: on or above their main diagonals, and below. Neighbouring block diagonals
    share the latter with the former, hence two planes, which the caller adds.
    """
    # Which block diagonal: column block - row block = shift.
    head = tl.program_id(1)
    shift = tl.program_id(0) - (tl.cdiv(seqlen_q, BLOCK) - 1)

    # Loop. Gathering column (c + r) % BLOCK in row r puts the diagonal c, wrapped around, into one column.
    index = tl.arange(0, BLOCK)
    unwrapped = index[:, None] + index[None, :]
    above = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)
    for batch in range(0, num_batches):
        place = place_of(batch + tl.program_id(0) * 0, head, masks, seqlen_q, seqlen_k, band_offset)
        last_block = tl.minimum(tl.cdiv(place.len_q, BLOCK), tl.cdiv(place.len_k, BLOCK) - shift)
        nearest = shift * BLOCK - (BLOCK - 1) - band_offset
        farthest = shift * BLOCK + (BLOCK - 1) - band_offset
        if settings.band_right is not None:
            last_block = tl.where(nearest > settings.band_right, 0, last_block)
        if settings.band_left is not None:
            last_block = tl.where(farthest < -settings.band_left, 0, last_block)
        for row_block in range(tl.maximum(0, -shift), last_block):
            first_key = (row_block + shift) * BLOCK
            tile = score_gradient(
                q, k, v, dout, lse, delta, place.batch, head, row_block * BLOCK + index, first_key + index, first_key,
                masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK, PRECISION,
            )  # fmt: skip
            skewed = tl.gather(tile, unwrapped % BLOCK, 1)
            above += tl.sum(tl.where(unwrapped < BLOCK, skewed, 0.0), 0)
            below += tl.sum(tl.where(unwrapped < BLOCK, 0.0, skewed), 0)

    # Store: entry x stands for the distance x - (row blocks) * BLOCK between key and query.
    columns = (tl.num_programs(0) + 1) * BLOCK
    base = dtable + tl.cast(head, tl.int64) * columns + tl.program_id(0) * BLOCK + index
    tl.store(base, below)
    tl.store(base + tl.num_programs(1).to(tl.int64) * columns + BLOCK, above)


@triton.jit
def score_gradient(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    batch,
    head,
    query,
    key,
    first_key,
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile (queries, keys) of the gradient of the scores after softcap and bias; 0 outside the sequence."""
    place = place_of(batch, head, masks, seqlen_q, seqlen_k, band_offset)
    kv_head = head // settings.group_size
    is_row = query < place.len_q
    keep = is_kept(key, place, masks, seqlen_k)
    q_tile = load_rows(first_row_of(q, batch, head, place.first_q), q.stride_row, query, is_row, HEAD_DIM, BLOCK_D)
    dout_base = first_row_of(dout, batch, head, place.first_q)
    dout_tile = load_rows(dout_base, dout.stride_row, query, is_row, VALUE_DIM, BLOCK_DV)
    k_tile = load_rows(first_row_of(k, batch, kv_head, place.first_k), k.stride_row, key, keep, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(first_row_of(v, batch, kv_head, place.first_k), v.stride_row, key, keep, VALUE_DIM, BLOCK_DV)
    row_lse, row_offset = load_lse(lse, batch, head, query, is_row, place, masks, settings, lse_stride)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_delta = tl.load(delta + row_offset + query, mask=is_row, other=0.0)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
    _, dbiased, _ = weights_and_gradients(
        qk, dweights, query[:, None], key[None, :], first_key, keep[None, :],
        row_lse[:, None], row_delta[:, None], place, masks, settings, BLOCK_N, IS_FULL=False, IS_TRANSPOSED=False,
    )  # fmt: skip
    return dbiased
