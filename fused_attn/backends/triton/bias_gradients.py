"""The gradients of the two biases: attn_mask, which is a dense bias, and relative_bias.

Both are sums of the gradient of the logits: that of attn_mask over the dimensions that it broadcasts, and that of
relative_bias along the diagonals. Each kernel recomputes the gradient of the logits, and one program computes all terms
of a sum in a fixed order. So results are deterministic, and no matrix of size L x S is stored unless the bias has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.backward import QueryTensors, load_keys, load_queries, probs_and_gradients
from fused_attn.backends.triton.sums import add, zero_sum
from fused_attn.backends.triton.tiles import head_slice_of


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_batches"))
def attention_bwd_dbias_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    dout,  # Rows (B, H, L, Dv)
    lse,  # (B, H, L) float32
    delta,  # (B, H, L) float32
    factor,  # (B, H, L) float32
    dbias,  # (B|1, H|1, L or, if SUMS_ROWS, blocks of queries, S) float32, contiguous, written
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    num_batches,
    SUMS_BATCHES: tl.constexpr,
    SUMS_HEADS: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
):
    """A program owns a tile of the gradient. It sums over the batch and the heads if the bias broadcasts there.

    SUMS_BATCHES, SUMS_HEADS, SUMS_ROWS: the bias has size 1 in this dimension, and broadcasts
    If SUMS_ROWS, each program stores one row, the sum over the rows of its tile. The caller sums these rows.
    """
    # Which tile this program computes. The grid has one axis alone, because the other axes are limited to 65535
    # programs. Models such as Swin fold their windows into the batch, which can be larger than that.
    row_blocks = tl.cdiv(seqlen_q, settings.BLOCK_M)
    column_blocks = tl.cdiv(seqlen_k, settings.BLOCK_N)
    column_block = tl.program_id(0) % column_blocks
    row_block = tl.program_id(0) // column_blocks % row_blocks
    matrix = tl.program_id(0) // column_blocks // row_blocks
    num_heads = 1 if SUMS_HEADS else settings.num_heads
    query = row_block * settings.BLOCK_M + tl.arange(0, settings.BLOCK_M)
    first_key = column_block * settings.BLOCK_N
    key = first_key + tl.arange(0, settings.BLOCK_N)
    first_head = matrix % num_heads
    first_batch = matrix // num_heads
    heads_here = settings.num_heads if SUMS_HEADS else 1
    batches_here = num_batches if SUMS_BATCHES else 1

    # Sum over heads and batch. A tile outside the band has no term.
    nearest = first_key - (row_block * settings.BLOCK_M + settings.BLOCK_M - 1)
    farthest = first_key + settings.BLOCK_N - 1 - row_block * settings.BLOCK_M
    terms = heads_here * batches_here * _is_in_band(nearest - band_offset, farthest - band_offset, settings)
    query_tensors = QueryTensors(q, dout, lse, delta, factor)
    acc = zero_sum([settings.BLOCK_M, settings.BLOCK_N], settings)
    for term in range(terms):
        batch = first_batch + term // heads_here
        head = first_head + term % heads_here
        head_slice = head_slice_of(
            batch, head, head // settings.group_size, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset
        )
        tile = _logit_gradient(query_tensors, query, k, v, first_key, head_slice, masks, settings)
        acc = add(acc, tile, settings)

    # Store the tile, or the sum of its rows.
    num_rows = row_blocks if SUMS_ROWS else seqlen_q
    base = dbias + matrix.to(tl.int64) * num_rows * seqlen_k
    if SUMS_ROWS:
        tl.store(base + row_block.to(tl.int64) * seqlen_k + key, tl.sum(acc.total, 0), mask=key < seqlen_k)
    else:
        is_inside = (query[:, None] < seqlen_q) & (key[None, :] < seqlen_k)
        tl.store(base + query.to(tl.int64)[:, None] * seqlen_k + key[None, :], acc.total, mask=is_inside)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_batches"))
def attention_bwd_drelative_bias_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    dout,  # Rows (B, H, L, Dv)
    lse,  # (B, H, L) float32
    delta,  # (B, H, L) float32
    factor,  # (B, H, L) float32
    drelative_bias,  # (2, H, (block diagonals + 1) * BLOCK_N) float32, written. Zeros before: some entries stay
    masks,
    settings,  # BLOCK_M = BLOCK_N
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    num_batches,
):
    """A program owns one block diagonal of one head: the square tiles with the same (column block - row block).

    It sums the entries of equal key - query over all tiles of the block diagonal. There are 2 * BLOCK_N - 1 such sums:
    - BLOCK_N on and above the main diagonals of the tiles. They go to drelative_bias[1].
    - BLOCK_N - 1 below the main diagonals. They go to drelative_bias[0]. The program of the block diagonal before this
      one computes a part of the same sums, above its main diagonals.
    Two planes keep programs from writing to the same entry. The caller adds the planes.
    """
    # Which block diagonal this program sums: that of column block - row block = shift.
    row_blocks = tl.cdiv(seqlen_q, settings.BLOCK_N)
    num_diagonals = row_blocks + tl.cdiv(seqlen_k, settings.BLOCK_N) - 1
    head = tl.program_id(0) // num_diagonals
    diagonal = tl.program_id(0) % num_diagonals
    shift = diagonal - (row_blocks - 1)

    # Visit the tiles. A gather moves column (c + r) % BLOCK_N of row r to column c. Then column c holds two diagonals:
    # key - query = c of the tile where c + r < BLOCK_N, and key - query = c - BLOCK_N in the other rows.
    index = tl.arange(0, settings.BLOCK_N)
    unwrapped = index[:, None] + index[None, :]
    query_tensors = QueryTensors(q, dout, lse, delta, factor)
    above = zero_sum([settings.BLOCK_N], settings)
    below = zero_sum([settings.BLOCK_N], settings)
    distance = shift * settings.BLOCK_N - band_offset
    is_visible = _is_in_band(distance - (settings.BLOCK_N - 1), distance + settings.BLOCK_N - 1, settings)
    for sequence in range(num_batches * is_visible):
        batch = head * 0 + sequence
        head_slice = head_slice_of(
            batch, head, head // settings.group_size, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset
        )
        last_block = tl.cdiv(head_slice.seqlen_k, settings.BLOCK_N) - shift
        last_block = tl.minimum(tl.cdiv(head_slice.seqlen_q, settings.BLOCK_N), last_block)
        for row_block in range(tl.maximum(0, -shift), last_block):
            query = row_block * settings.BLOCK_N + index
            first_key = (row_block + shift) * settings.BLOCK_N
            tile = _logit_gradient(query_tensors, query, k, v, first_key, head_slice, masks, settings)
            skewed = tl.gather(tile, unwrapped % settings.BLOCK_N, 1)
            above = add(above, tl.sum(tl.where(unwrapped < settings.BLOCK_N, skewed, 0.0), 0), settings)
            below = add(below, tl.sum(tl.where(unwrapped < settings.BLOCK_N, 0.0, skewed), 0), settings)

    # Store. Entry x of a plane is the sum for key - query = x - row_blocks * BLOCK_N.
    columns = (num_diagonals + 1) * settings.BLOCK_N
    base = drelative_bias + head.to(tl.int64) * columns + diagonal * settings.BLOCK_N + index
    next_plane = (head * 0 + settings.num_heads).to(tl.int64) * columns
    tl.store(base, below.total)
    tl.store(base + next_plane + settings.BLOCK_N, above.total)


@triton.jit
def _is_in_band(nearest, farthest, settings):
    """1 if the band shows any of the diagonals nearest ... farthest, counted from the band's own diagonal, else 0.

    If the band's diagonal differs between sequences, the result is always 1.
    """
    visible = nearest <= farthest
    if settings.is_band_from_end is None:
        if settings.band_right is not None:
            visible = visible & (nearest <= settings.band_right)
        if settings.band_left is not None:
            visible = visible & (farthest >= -settings.band_left)
    return visible.to(tl.int32)


@triton.jit
def _logit_gradient(query_tensors, query, k, v, first_key, head_slice, masks, settings):
    """The gradient of the logits of a (M, N) tile, 0 beyond the sequence's end and where entries are hidden.

    query_tensors: `QueryTensors`
    query: (M,) positions of the tile's rows. Its columns begin at first_key
    """
    queries = load_queries(query_tensors, query, query < head_slice.seqlen_q, head_slice, masks, settings)
    keys = load_keys(k, v, first_key, head_slice, masks, settings, IS_FULL=False)
    _, dlogits, _ = probs_and_gradients(queries, keys, head_slice, masks, settings, IS_FULL=False, IS_TRANSPOSED=False)
    return dlogits
