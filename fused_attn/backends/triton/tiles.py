"""Where a program works: its rows and heads, the key blocks it has to visit, and how tiles are read."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
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
    first_q: tl.tensor
    first_k: tl.tensor
    len_q: tl.tensor
    len_k: tl.tensor
    padding_stride: tl.tensor
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
def block_and_unit(num_blocks, num_units, units_per_section, LAST_FIRST: tl.constexpr):
    """(block, unit, batch) of this program, where a unit is a head.

    The units of a section run side by side, so that their keys and values stay in the L2 cache. Within a section the
    longest blocks start first (the last ones where causal queries are tiled, the first ones where keys are), so that
    only short ones are left when the multiprocessors run out of work.
    """
    program = tl.program_id(0)
    total_units = tl.num_programs(0) // num_blocks
    units_per_section = tl.minimum(units_per_section, total_units)  # or the product below could pass 2^31
    section = program // (units_per_section * num_blocks)
    first_unit = section * units_per_section
    units_here = tl.minimum(units_per_section, total_units - first_unit)
    within = program - first_unit * num_blocks
    block = within // units_here
    if LAST_FIRST:
        block = num_blocks - 1 - block
    unit = first_unit + within % units_here
    return block, unit % num_units, unit // num_units


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
def place_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset):
    first_q, len_q = sequence_rows(masks.cu_seqlens_q, batch, seqlen_q)
    first_k, len_k = sequence_rows(masks.cu_seqlens_k, batch, seqlen_k)
    # (B, H, L), or packed (1, H, total).
    if masks.cu_seqlens_q is not None:
        lse_offset = head.to(tl.int64) * lse_stride + first_q
    else:
        lse_offset = (batch.to(tl.int64) * settings.num_heads + head) * lse_stride
    return Place(
        batch, head, kv_head, first_q, first_k, len_q, len_k, seqlen_k, lse_offset, band_offset, seqlen_q - 1
    )  # fmt: skip


@triton.jit
def key_blocks(first_row, last_row, place, masks, settings):
    """The `Blocks` of keys that the queries first_row ... last_row have to visit."""
    start = place.len_k * 0
    full_start = start
    end = place.len_k
    full_end = end
    if settings.band_left is not None:
        start = tl.maximum(start, first_row + place.band_offset - settings.band_left)
        full_start = tl.maximum(full_start, last_row + place.band_offset - settings.band_left)
    if settings.band_right is not None:
        end = tl.minimum(end, last_row + place.band_offset + settings.band_right + 1)
        full_end = tl.minimum(full_end, first_row + place.band_offset + settings.band_right + 1)
    if masks.padding is not None:
        first_kept, end_kept, has_holes = kept_keys(place, masks)
        start = tl.maximum(start, first_kept)
        full_start = tl.maximum(full_start, first_kept)
        end = tl.minimum(end, end_kept)
        full_end = tl.where(has_holes, 0, tl.minimum(full_end, end_kept))
    return _align(start, full_start, full_end, end, settings.BLOCK_N)


@triton.jit
def query_blocks(first_key, last_key, is_full, place, settings):
    """The `Blocks` of queries that see any of the keys first_key ... last_key.

    is_full: all of these keys exist and are kept
    """
    start = place.len_q * 0
    full_start = start
    end = place.len_q
    full_end = tl.where(is_full, end, 0)
    if settings.band_right is not None:
        start = tl.maximum(start, first_key - place.band_offset - settings.band_right)
        full_start = tl.maximum(full_start, last_key - place.band_offset - settings.band_right)
    if settings.band_left is not None:
        end = tl.minimum(end, last_key - place.band_offset + settings.band_left + 1)
        full_end = tl.minimum(full_end, first_key - place.band_offset + settings.band_left + 1)
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
def kept_keys(place, masks):
    """(first kept key, end of the last one, whether any between them is dropped) of one batch entry's byte mask.

    Every program reads the whole row, which is cheaper than a launch of its own: a byte a key, against at least
    2 * BLOCK_M * head dim multiplications.
    """
    CHUNK: tl.constexpr = 1024
    offs = tl.arange(0, CHUNK)
    seqlen_k = place.padding_stride
    padding = masks.padding + place.batch.to(tl.int64) * seqlen_k
    first = tl.zeros([CHUNK], tl.int32) + seqlen_k
    end = tl.zeros([CHUNK], tl.int32)
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(0, seqlen_k, CHUNK):
        key = start + offs
        keep = tl.load(padding + key, mask=key < seqlen_k, other=1) == 0
        first = tl.minimum(first, tl.where(keep, key, seqlen_k))
        end = tl.maximum(end, tl.where(keep, key + 1, 0))
        count += keep.to(tl.int32)
    first_kept = tl.min(first, 0)
    end_kept = tl.max(end, 0)
    return first_kept, end_kept, tl.sum(count, 0) != end_kept - first_kept


@triton.jit
def is_kept(key, place, masks):
    """Which keys exist and are not dropped by padding: bool, of the shape of `key`."""
    keep = key < place.len_k
    if masks.padding is not None:
        padding = masks.padding + place.batch.to(tl.int64) * place.padding_stride
        keep = tl.load(padding + key, mask=keep, other=1) == 0
    return keep


@triton.jit
def query_pointer(x, place, query, BLOCK: tl.constexpr):
    """(M, BLOCK) pointers into the rows `query` of the place's head. 64-bit: large tensors pass 2^31 elements."""
    base = x.ptr + place.batch.to(tl.int64) * x.stride_b + place.head.to(tl.int64) * x.stride_h
    row = place.first_q + query
    return base + row.to(tl.int64)[:, None] * x.stride_row + tl.arange(0, BLOCK)[None, :]


@triton.jit
def key_pointer(x, place, key, BLOCK: tl.constexpr):
    """(N, BLOCK) pointers into the rows `key` of the place's key head."""
    base = x.ptr + place.batch.to(tl.int64) * x.stride_b + place.kv_head.to(tl.int64) * x.stride_h
    row = place.first_k + key
    return base + row.to(tl.int64)[:, None] * x.stride_row + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_query_rows(x, place, query, is_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    return _load_tile(query_pointer(x, place, query, BLOCK), is_row, COLUMNS, BLOCK)


@triton.jit
def load_key_rows(x, place, key, keep, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropped keys and values may hold NaN, which not even a weight of 0 would stop: they must not be read."""
    return _load_tile(key_pointer(x, place, key, BLOCK), keep, COLUMNS, BLOCK)


@triton.jit
def _load_tile(pointer, keep, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) tile; zeros beyond COLUMNS and in the rows where `keep` (bool, or None = everywhere) is false."""
    column = tl.arange(0, BLOCK)[None, :]
    if keep is None and COLUMNS == BLOCK:
        return tl.load(pointer)
    elif keep is None:
        return tl.load(pointer, mask=column < COLUMNS, other=0.0)
    elif COLUMNS == BLOCK:
        return tl.load(pointer, mask=keep[:, None], other=0.0)
    else:
        return tl.load(pointer, mask=keep[:, None] & (column < COLUMNS), other=0.0)


@triton.jit
def store_tile(pointer, tile, keep, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(pointer, tile.to(pointer.dtype.element_ty), mask=keep[:, None] & (column < COLUMNS))
