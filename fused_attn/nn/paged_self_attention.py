"""Self-attention of a module over sequences of a `PagedKVCache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.nn.cache_checks import check_indices, check_target, checked_length
from fused_attn.nn.paged_cache import PagedKVCache


class PagedRows(NamedTuple):
    """What attention over pages reads: the arguments of `fused_attention_paged` after the query."""

    key_pages: Tensor
    value_pages: Tensor
    block_table: Tensor
    key_lengths: Tensor


class PagedSelfAttentionCache:
    """Some sequences of a `PagedKVCache`, as the batch of a module's self-attention.

    >>> import torch
    >>> from fused_attn import FusedMultiheadAttention, PagedKVCache
    >>> from fused_attn.nn import PagedSelfAttentionCache
    >>> attention = FusedMultiheadAttention(64, 4, batch_first=True).eval()
    >>> pages = PagedKVCache(num_pages=8, page_size=16, num_kv_heads=4, head_dim=16)
    >>> cache = PagedSelfAttentionCache(pages, [pages.add(), pages.add()])
    >>> with torch.no_grad():
    ...     for token in torch.randn(2, 3, 64).split(1, dim=1):  # (N, 1, E)
    ...         out, _ = attention(token, token, token, need_weights=False, cache=cache)
    >>> len(cache)
    3

    Args:
        pages: the keys and values.
        sequences: B different sequences of `pages`. They may have different lengths.

    Attributes:
        sequences: the sequences of the batch. `reorder` gives them new numbers.

    Raises:
        TypeError: pages is no `PagedKVCache`, or sequences is no list of ints.
        ValueError: a sequence is unknown or named twice.
    """

    is_filled_once = False

    def __init__(self, pages: PagedKVCache, sequences: Sequence[int]):
        if not isinstance(pages, PagedKVCache):
            raise TypeError(f"pages: expected a PagedKVCache, got {type(pages).__name__}")
        pages.check_different(sequences)
        self._pages = pages
        self.sequences = list(sequences)

    def __len__(self) -> int:
        """Number of rows of the longest sequence."""
        return max([0, *self._lengths()])  # Dynamo does not trace max(..., default=0)

    @property
    def length(self) -> int:
        """Number of rows of the longest sequence."""
        return len(self)

    @property
    def position(self) -> Tensor:
        """The position of the next token of each sequence, (B,) int64, on the device."""
        return self._pages._on_device(self._lengths(), torch.int64)

    def append(self, key: Tensor, value: Tensor) -> PagedRows:
        """Append L rows to each sequence. The arguments and errors are those of `PagedKVCache.append`.

        Returns:
            What attention of the new rows reads.
        """
        self._pages.append(self.sequences, key, value)
        return PagedRows(self._pages.key_pages, self._pages.value_pages, *self._pages.table(self.sequences))

    def crop(self, length: int | Tensor) -> None:
        """Forget the rows from row `length` on; see `KVCache.crop`. The length must be an int."""
        length = checked_length(length)
        for sequence, own in zip(self.sequences, self._lengths(), strict=True):
            self._pages.crop(sequence, min(own, length))

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`. No row is copied."""
        check_indices(indices)
        self.sequences = self._pages.reorder(self.sequences, indices.tolist())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert all pages, also those of other sequences; see `KVCache.to`."""
        check_target(device, dtype)
        self._pages.to(device, dtype)

    def state(self) -> int:
        """What `restore` needs: the length of one sequence, since all sequences of the batch get equally many rows."""
        return self._pages.length(self.sequences[0]) if self.sequences else 0

    def restore(self, state: int) -> None:
        """Forget all rows that were appended since `state` was called. Their pages become free."""
        more = self.state() - state
        for sequence, length in zip(self.sequences, self._lengths(), strict=True):
            self._pages.crop(sequence, length - more)

    def _lengths(self) -> list[int]:
        return [self._pages.length(sequence) for sequence in self.sequences]


def paged_hint(cache: object) -> str:
    """The end of a message that refuses `cache`: what to pass for a `PagedKVCache`, which does not know the batch."""
    if not isinstance(cache, PagedKVCache):
        return ""
    return "; a module takes PagedSelfAttentionCache(cache, sequences), a decoder PagedBatch(caches, sequences)"
