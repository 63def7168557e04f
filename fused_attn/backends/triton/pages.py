"""Tiles of keys and values that lie in pages."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.tiles import load_tile, row_pointer


@triton.jit
def page_of(key, first_key, head_slice, masks, settings):
    """(page, row of the page) of each key of a block. If the whole block lies in one page, `page` is a scalar.

    The numbers of the pages are clipped to those that exist, because the host has not checked them. Keys behind the
    last one of the batch entry get page 0, because the block table may hold any number there.
    key: (N,), the positions from first_key on
    """
    block_table = masks.block_table + head_slice.batch.to(tl.int64) * masks.block_table_stride
    if settings.PAGE_SIZE % settings.BLOCK_N == 0:
        column = first_key // settings.PAGE_SIZE
        page = tl.load(block_table + column)
        row = key - column * settings.PAGE_SIZE
    else:
        page = tl.load(block_table + key // settings.PAGE_SIZE, mask=key < head_slice.seqlen_k, other=0)
        row = key % settings.PAGE_SIZE
    return tl.minimum(tl.maximum(page, 0), masks.num_pages - 1).to(tl.int64), row


@triton.jit
def load_paged_rows(x, page, row, head_slice, is_valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(N, BLOCK) tile of the rows of x, which is `Rows` of pages; see `load_tile` for is_valid, COLUMNS and BLOCK.

    page, row: as `page_of` returns them
    """
    pointer = row_pointer(x, page, head_slice.kv_head, row)[:, None] + tl.arange(0, BLOCK)[None, :]
    return load_tile(pointer, is_valid, COLUMNS, BLOCK)
