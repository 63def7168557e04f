"""Where a program works: its rows and heads, the key blocks it has to visit, and how tiles are read."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class HeadSlice(NamedTuple):
    """One sequence (or batch entry) and head. Scalars; where a tile packs several heads, head is a column (M, 1).

    first_q, first_k: first row of the sequence in packed tensors, else 0
    len_q, len_k: its lengths
    padding_stride: keys in a row of the padding mask
    lse_offset: of the head's first entry in tensors shaped like the LSE
    band_offset, table_offset: constants of the diagonals of the band and of the relative bias
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
    table_offset: tl.tensor


class Blocks(NamedTuple):
    """Multiples of the block size: [start, full_start) and [full_end, end) hold partial blocks, the middle full ones.

    A full block lies within the sequences, the band and the keys that padding keeps, so it needs none of their tests.
    """

    start: tl.tensor
    full_start: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


@triton.jit
def scheduled_tile(num_blocks, num_heads, heads_per_l2_group, LAST_FIRST: tl.constexpr):
    """(block, unit, batch) of this program, where a unit is a head.

    The units of a section run side by side, so that their keys and values stay in the L2 cache. Within a section the
    longest blocks start first (the last ones where causal queries are tiled, the first ones where keys are), so that
    only short ones are left when the multiprocessors run out of work.
    """
    program = tl.program_id(0)
    total_heads = tl.num_programs(0) // num_blocks
    heads_per_l2_group = tl.minimum(heads_per_l2_group, total_heads)  # otherwise the product below could exceed 2^31
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
    """(first row, number of rows) of a sequence."""
    first = batch * 0
    length = first + seqlen
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - first
    return first, length


@triton.jit
def head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset):
    q_offset, length_q = sequence_rows(masks.cu_seqlens_q, batch, seqlen_q)
    k_offset, length_k = sequence_rows(masks.cu_seqlens_k, batch, seqlen_k)
    # (B, H, L), or packed (1, H, total).
    if masks.cu_seqlens_q is not None:
        lse_offset = head.to(tl.int64) * lse_stride + q_offset
    else:
        lse_offset = (batch.to(tl.int64) * settings.num_heads + head) * lse_stride
    return HeadSlice(
        batch, head, kv_head, q_offset, k_offset, length_q, length_k, seqlen_k, lse_offset, band_offset, seqlen_q - 1
    )  # fmt: skip


@triton.jit
def key_blocks(first_row, last_row, head_slice, masks, settings):
    """The `Blocks` of keys that the queries first_row ... last_row have to visit."""
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
    """The `Blocks` of queries that see any of the keys first_key ... last_key.

    is_full: all of these keys exist and are kept
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
    start = start // BLOCK * BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK, start)
    full_start = tl.cdiv(full_start, BLOCK) * BLOCK
    full_end = tl.maximum(full_end, 0) // BLOCK * BLOCK
    has_full = full_end > full_start
    return Blocks(start, tl.where(has_full, full_start, end), tl.where(has_full, full_end, end), end)


@triton.jit
def split_blocks(blocks, split, num_splits, BLOCK: tl.constexpr):
    """The share of one of several programs that divide the blocks among them."""
    share = tl.cdiv((blocks.end - blocks.start) // BLOCK, num_splits) * BLOCK
    start = tl.minimum(blocks.start + split * share, blocks.end)
    end = tl.minimum(start + share, blocks.end)
    full_start = tl.maximum(blocks.full_start, start)
    full_end = tl.minimum(blocks.full_end, end)
    has_full = full_end > full_start
    return Blocks(start, tl.where(has_full, full_start, end), tl.where(has_full, full_end, end), end)


@triton.jit
def num_partial_blocks(blocks, BLOCK: tl.constexpr):
    return (blocks.full_start - blocks.start + blocks.end - blocks.full_end) // BLOCK


@triton.jit
def partial_block(blocks, index, BLOCK: tl.constexpr):
    """Where the index-th partial block starts; one loop over both ends compiles the tests once."""
    start = blocks.start + index * BLOCK
    return tl.where(start < blocks.full_start, start, start + blocks.full_end - blocks.full_start)


@triton.jit
def valid_keys(head_slice, masks):
    """(first kept key, end of the last one, whether any between them is dropped) of one batch entry's byte mask.

    Every program reads the whole row, which is cheaper than a launch of its own: a byte a key, against at least
    2 * BLOCK_M * head dim multiplications.
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
    """Which keys exist and are not dropped by padding: bool, of the shape of `key`."""
    is_valid = key < head_slice.seqlen_k
    if masks.key_padding is not None:
        padding = masks.key_padding + head_slice.batch.to(tl.int64) * head_slice.key_padding_stride
        is_valid = tl.load(padding + key, mask=is_valid, other=1) == 0
    return is_valid


@triton.jit
def query_pointer(x, head_slice, query, BLOCK: tl.constexpr):
    """(M, BLOCK) pointers into the rows `query` of the place's head. 64-bit: large tensors pass 2^31 elements."""
    base = x.ptr + head_slice.batch.to(tl.int64) * x.stride_b + head_slice.head.to(tl.int64) * x.stride_h
    row = head_slice.q_offset + query
    return base + row.to(tl.int64)[:, None] * x.stride_row + tl.arange(0, BLOCK)[None, :]


@triton.jit
def key_pointer(x, head_slice, key, BLOCK: tl.constexpr):
    """(N, BLOCK) pointers into the rows `key` of the place's key head."""
    base = x.ptr + head_slice.batch.to(tl.int64) * x.stride_b + head_slice.kv_head.to(tl.int64) * x.stride_h
    row = head_slice.k_offset + key
    return base + row.to(tl.int64)[:, None] * x.stride_row + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_query_rows(x, head_slice, query, is_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    return _load_tile(query_pointer(x, head_slice, query, BLOCK), is_row, COLUMNS, BLOCK)


@triton.jit
def load_key_rows(x, head_slice, key, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropped keys and values may hold NaN, which not even a weight of 0 would stop: they must not be read."""
    return _load_tile(key_pointer(x, head_slice, key, BLOCK), is_valid, COLUMNS, BLOCK)


@triton.jit
def _load_tile(pointer, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) tile; zeros beyond COLUMNS and in the rows where `keep` (bool, or None = everywhere) is false."""
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
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(pointer, tile.to(pointer.dtype.element_ty), mask=is_valid[:, None] & (column < COLUMNS))
