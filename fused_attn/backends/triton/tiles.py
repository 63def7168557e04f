"""Which block of which head a program works on, which blocks it visits in its loop, and loads and stores of tiles."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class HeadSlice(NamedTuple):
    """One head of one sequence (or batch entry): its indices, offsets and lengths. All fields are scalars, except head.

    head: a scalar, or (M, 1) if the rows of a tile belong to different heads
    q_offset, k_offset: the first row of the sequence in packed tensors, else 0
    seqlen_q, seqlen_k: the lengths of this sequence
    key_padding_stride: elements from one batch entry of the padding mask, or of the key bias, to the next
    lse_offset: the index of the first query in tensors of the shape of the LSE
    band_offset: the band's diagonal is key - query = band_offset
    relative_bias_offset: the column of relative_bias for key - query is key - query + relative_bias_offset
    """

    batch: tl.tensor
    head: tl.tensor
    kv_head: tl.tensor
    q_offset: tl.tensor
    k_offset: tl.tensor
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    key_padding_stride: tl.tensor
    lse_offset: tl.tensor
    band_offset: tl.tensor
    relative_bias_offset: tl.tensor


class Blocks(NamedTuple):
    """The blocks that a loop visits, as positions that are multiples of the block size.

    [start, full_start): partial blocks
    [full_start, full_end): full blocks. The sequence's end, band and padding hide no entry of these, so that the loop
        skips the tests for all three
    [full_end, end): partial blocks
    """

    start: tl.tensor
    full_start: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


@triton.jit
def scheduled_tile(num_blocks, num_heads, heads_per_l2_group, LAST_FIRST: tl.constexpr):
    """(block, head, batch) that this program works on. A grid has a program for each block of each head.

    The heads of an L2 group run side by side, so that their keys and values stay in the L2 cache. The blocks of a group
    that take longest start first, so that multiprocessors do not wait for a long block at the end.
    LAST_FIRST: the last blocks take longest. Under a causal mask, these are the last queries, which see most keys. For
        blocks of keys it is False, because the first keys are seen by most queries
    """
    program = tl.program_id(0)
    total_heads = tl.num_programs(0) // num_blocks
    # Without this limit, the product in the next line could exceed 2^31.
    heads_per_l2_group = tl.minimum(heads_per_l2_group, total_heads)
    l2_group = program // (heads_per_l2_group * num_blocks)
    first_head = l2_group * heads_per_l2_group
    heads_here = tl.minimum(heads_per_l2_group, total_heads - first_head)
    within = program - first_head * num_blocks
    block = within // heads_here
    if LAST_FIRST:
        block = num_blocks - 1 - block
    head = first_head + within % heads_here
    return block, head % num_heads, head // num_heads


@triton.jit
def sequence_rows(cu_seqlens, batch, seqlen):
    """(first row, number of rows) of a sequence: from cu_seqlens in a packed call, else (0, seqlen)."""
    first = batch * 0  # 0 as a tensor, because the fields of `HeadSlice` are tensors
    length = first + seqlen
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - first
    return first, length


@triton.jit
def head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset):
    """The `HeadSlice` of a head of a sequence; seqlen_q and seqlen_k are the lengths of the call."""
    q_offset, length_q = sequence_rows(masks.cu_seqlens_q, batch, seqlen_q)
    k_offset, length_k = sequence_rows(masks.cu_seqlens_k, batch, seqlen_k)
    if masks.key_lengths is not None:
        # The host has not checked the lengths, because reading them would make it wait.
        length_k = tl.minimum(tl.maximum(tl.load(masks.key_lengths + batch), 0), length_k)
    if settings.is_band_from_end is not None:
        band_offset += length_k - length_q
    # The LSE is (B, H, L), or (H, total rows) if packed.
    if masks.cu_seqlens_q is not None:
        lse_offset = head.to(tl.int64) * lse_stride + q_offset
    else:
        lse_offset = (batch.to(tl.int64) * settings.num_heads + head) * lse_stride
    return HeadSlice(
        batch, head, kv_head, q_offset, k_offset, length_q, length_k, seqlen_k, lse_offset, band_offset, seqlen_q - 1
    )  # fmt: skip


@triton.jit
def key_blocks(first_row, last_row, head_slice, masks, settings):
    """The `Blocks` of keys of which the queries first_row ... last_row may see any key."""
    start = head_slice.seqlen_k * 0
    full_start = start
    end = head_slice.seqlen_k
    full_end = end
    if settings.band_left is not None:
        start = tl.maximum(start, first_row + head_slice.band_offset - settings.band_left)
        full_start = tl.maximum(full_start, last_row + head_slice.band_offset - settings.band_left)
    if settings.band_right is not None:
        end = tl.minimum(end, last_row + head_slice.band_offset + settings.band_right + 1)
        full_end = tl.minimum(full_end, first_row + head_slice.band_offset + settings.band_right + 1)
    if masks.key_padding is not None:
        first_valid, end_valid, has_holes = valid_keys(head_slice, masks)
        start = tl.maximum(start, first_valid)
        full_start = tl.maximum(full_start, first_valid)
        end = tl.minimum(end, end_valid)
        full_end = tl.where(has_holes, 0, tl.minimum(full_end, end_valid))
    return _align(start, full_start, full_end, end, settings.BLOCK_N)


@triton.jit
def query_blocks(first_key, last_key, is_full, head_slice, settings):
    """The `Blocks` of queries that may see any of the keys first_key ... last_key.

    is_full: all of these keys exist and none is padding. If it is false, there are no full blocks
    """
    start = head_slice.seqlen_q * 0
    full_start = start
    end = head_slice.seqlen_q
    full_end = tl.where(is_full, end, 0)
    if settings.band_right is not None:
        start = tl.maximum(start, first_key - head_slice.band_offset - settings.band_right)
        full_start = tl.maximum(full_start, last_key - head_slice.band_offset - settings.band_right)
    if settings.band_left is not None:
        end = tl.minimum(end, last_key - head_slice.band_offset + settings.band_left + 1)
        full_end = tl.minimum(full_end, first_key - head_slice.band_offset + settings.band_left + 1)
    return _align(start, full_start, full_end, end, settings.BLOCK_M)


@triton.jit
def _align(start, full_start, full_end, end, BLOCK: tl.constexpr):
    """The `Blocks` that cover the positions [start, end), of which those within [full_start, full_end) are full."""
    start = start // BLOCK * BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK, start)
    full_start = tl.cdiv(full_start, BLOCK) * BLOCK
    full_end = tl.maximum(full_end, 0) // BLOCK * BLOCK
    has_full = full_end > full_start
    return Blocks(start, tl.where(has_full, full_start, end), tl.where(has_full, full_end, end), end)


@triton.jit
def split_blocks(blocks, split, num_splits, BLOCK: tl.constexpr):
    """The `Blocks` of split number `split`: one of num_splits shares of about equal size."""
    share = tl.cdiv((blocks.end - blocks.start) // BLOCK, num_splits) * BLOCK
    start = tl.minimum(blocks.start + split * share, blocks.end)
    end = tl.minimum(start + share, blocks.end)
    full_start = tl.maximum(blocks.full_start, start)
    full_end = tl.minimum(blocks.full_end, end)
    has_full = full_end > full_start
    return Blocks(start, tl.where(has_full, full_start, end), tl.where(has_full, full_end, end), end)


@triton.jit
def num_full_blocks(blocks, BLOCK: tl.constexpr):
    """How many full blocks there are. The division is exact, because all positions of `Blocks` are multiples of BLOCK.

    Loops over blocks count from 0, because Triton 3.9 does not pipeline a loop whose lower bound comes from another
    loop. With padding, the positions come from the loop of `valid_keys`.
    """
    return (blocks.full_end - blocks.full_start) // BLOCK


@triton.jit
def num_partial_blocks(blocks, BLOCK: tl.constexpr):
    return (blocks.full_start - blocks.start + blocks.end - blocks.full_end) // BLOCK


@triton.jit
def partial_block(blocks, index, BLOCK: tl.constexpr):
    """Where the partial block number `index` starts.

    The numbers run through both ranges of partial blocks. So one loop visits both, and its body is compiled once.
    """
    start = blocks.start + index * BLOCK
    return tl.where(start < blocks.full_start, start, start + blocks.full_end - blocks.full_start)


@triton.jit
def valid_keys(head_slice, masks):
    """(first valid key, last valid key + 1, whether padding lies between them) of a batch entry.

    Every program reads all S bytes of the entry's padding mask. That is cheaper than another kernel launch, because
    each key costs the program one byte here, and at least 2 * BLOCK_M * head dim multiplications later.
    """
    CHUNK: tl.constexpr = 1024
    offs = tl.arange(0, CHUNK)
    seqlen_k = head_slice.key_padding_stride
    padding = masks.key_padding + head_slice.batch.to(tl.int64) * seqlen_k
    first = tl.zeros([CHUNK], tl.int32) + seqlen_k
    end = tl.zeros([CHUNK], tl.int32)
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(0, seqlen_k, CHUNK):
        key = start + offs
        is_valid = tl.load(padding + key, mask=key < seqlen_k, other=1) == 0
        first = tl.minimum(first, tl.where(is_valid, key, seqlen_k))
        end = tl.maximum(end, tl.where(is_valid, key + 1, 0))
        count += is_valid.to(tl.int32)
    first_valid = tl.min(first, 0)
    end_valid = tl.max(end, 0)
    return first_valid, end_valid, tl.sum(count, 0) != end_valid - first_valid


@triton.jit
def is_valid_key(key, head_slice, masks):
    """Which of the keys, (N,), exist and are no padding: (N,) bool."""
    is_valid = key < head_slice.seqlen_k
    if masks.key_padding is not None:
        padding = masks.key_padding + head_slice.batch.to(tl.int64) * head_slice.key_padding_stride
        is_padding = tl.load(padding + key, mask=is_valid, other=1)
        # The maximum over an axis of size 1 changes no value. It hides this load of bytes from Triton, which looks for
        # the loads that a product depends on. The result of this load masks the loads of the tiles, so Triton would
        # find it too. For mma.sync, Triton would then choose a layout of the factors that suits bytes, and the other
        # loads of 16-bit tiles would not be pipelined. Compiled for sm_80 by Triton 3.9 with head dim 64, the loops for
        # dk and dv each had 2 such loads of 4, and 24 bytes of spilled registers. Now they have none.
        is_valid = tl.max(is_padding.to(tl.int32)[:, None], 1) == 0
    return is_valid


@triton.jit
def row_pointer(x, batch, head, row):
    """Pointers to the first elements of rows of x, which is `Rows` or `Scores`. batch, head and row broadcast.

    Offsets have 64 bits, because large tensors have more than 2^31 elements.
    """
    of_batch = x.ptr + batch.to(tl.int64) * aligned(x.stride_b, x)
    of_head = of_batch + head.to(tl.int64) * aligned(x.stride_h, x)
    return of_head + row.to(tl.int64) * aligned(x.stride_row, x)


@triton.jit
def aligned(stride, x):
    """A stride of x as it is, in a form that shows Triton that the stride is a multiple of x.ALIGN."""
    return stride // x.ALIGN * x.ALIGN


@triton.jit
def query_pointer(x, head_slice, query, BLOCK: tl.constexpr):
    """(M, BLOCK) pointers to the rows `query` of the head slice in x, which is `Rows` with a row for each query."""
    row = (head_slice.q_offset + query)[:, None]
    return row_pointer(x, head_slice.batch, head_slice.head, row) + tl.arange(0, BLOCK)[None, :]


@triton.jit
def key_pointer(x, head_slice, key, BLOCK: tl.constexpr):
    """(N, BLOCK) pointers to the rows `key` of the head slice in x, which is `Rows` with a row for each key."""
    row = (head_slice.k_offset + key)[:, None]
    return row_pointer(x, head_slice.batch, head_slice.kv_head, row) + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_query_rows(x, head_slice, query, is_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(M, BLOCK) tile of the rows `query` of x; see `load_tile` for is_row, COLUMNS and BLOCK."""
    return load_tile(query_pointer(x, head_slice, query, BLOCK), is_row, COLUMNS, BLOCK)


@triton.jit
def load_key_rows(x, head_slice, key, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(N, BLOCK) tile of the rows `key` of x, with zeros in the rows that are not valid.

    Keys and values that are padding must not be loaded, because they may be NaN, and a prob of 0 times NaN is NaN.
    """
    return load_tile(key_pointer(x, head_slice, key, BLOCK), is_valid, COLUMNS, BLOCK)


@triton.jit
def load_tile(pointer, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) tile, with zeros in the columns from COLUMNS on and in the rows that are not valid.

    is_valid: (rows,) bool, or None if all rows are valid
    """
    column = tl.arange(0, BLOCK)[None, :]
    if is_valid is None and COLUMNS == BLOCK:
        return tl.load(pointer)
    elif is_valid is None:
        return tl.load(pointer, mask=column < COLUMNS, other=0.0)
    elif COLUMNS == BLOCK:
        return tl.load(pointer, mask=is_valid[:, None], other=0.0)
    else:
        return tl.load(pointer, mask=is_valid[:, None] & (column < COLUMNS), other=0.0)


@triton.jit
def store_tile(pointer, tile, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the first COLUMNS columns of the valid rows of a (rows, BLOCK) tile, in the dtype of `pointer`."""
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(pointer, tile.to(pointer.dtype.element_ty), mask=is_valid[:, None] & (column < COLUMNS))
