"""Keys and values in pages, as caches for inference store them. A block table lists the pages of each batch entry."""

from __future__ import annotations

from torch import Tensor


def gather(pages: Tensor, block_table: Tensor) -> Tensor:
    """A copy of pages (num_pages, page_size, heads, columns) as rows (B, heads, S, columns).

    S is the number of columns of the table times page_size. An entry of the table that names no page, which may stand
    behind the last key only, gets the rows of any page.

    block_table: (B, pages of an entry) int32
    """
    batch, columns = block_table.shape
    num_pages, page_size, heads, row = pages.shape
    # Not pages[numbers], whose backward writes in place, which torch's older transforms refuse.
    numbers = block_table.flatten().clamp(0, max(num_pages - 1, 0))
    found = pages.index_select(0, numbers).view(batch, columns * page_size, heads, row)
    return found.transpose(1, 2)
