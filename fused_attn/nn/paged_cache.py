"""A cache of keys and values in pages, for many sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import checks
from fused_attn.nn.cache_checks import WritableCopies, check_target


class OutOfPages(RuntimeError):
    """A `PagedKVCache` has too few free pages for an append. The cache is as it was before the call.

    >>> import torch
    >>> from fused_attn.nn import OutOfPages, PagedKVCache
    >>> cache = PagedKVCache(num_pages=1, page_size=4, num_kv_heads=2, head_dim=8)
    >>> rows = torch.randn(1, 2, 5, 8)
    >>> try:
    ...     cache.append([cache.add()], rows, rows)
    ... except OutOfPages:
    ...     print("wait until another sequence has ended")
    wait until another sequence has ended
    """


class _Table(NamedTuple):
    """A block table that is right as long as no list of pages changes.

    of: the sequences of its rows, and its device
    version: the version of the tensor, by which one can tell that nobody has written to it since
    """

    of: tuple[tuple[int, ...], torch.device]
    table: Tensor
    version: int


class PagedKVCache(WritableCopies):
    """The keys and values of one attention layer for many sequences, in pages that the sequences share.

    A sequence takes a page whenever its last one is full, so a sequence wastes less than one page. `fork` copies no
    row: both sequences have the same pages, and a page is copied when one of them writes to it. Sequences are named by
    numbers. ``len(cache)`` is how many there are.

    >>> import torch
    >>> from fused_attn import PagedKVCache, fused_attention_paged
    >>> cache = PagedKVCache(num_pages=100, page_size=16, num_kv_heads=2, head_dim=64)
    >>> sequences = [cache.add(), cache.add()]
    >>> cache.append(sequences, torch.randn(2, 2, 5, 64), torch.randn(2, 2, 5, 64))  # 5 tokens each
    >>> beam = cache.fork(sequences[0])
    >>> query = torch.randn(3, 8, 1, 64)
    >>> out = fused_attention_paged(query, cache.key_pages, cache.value_pages, *cache.table([*sequences, beam]))
    >>> cache.length(beam), cache.num_free_pages
    (5, 98)

    The numbers of the pages are kept on the host. `append` copies a number for each row to the device, and `table` one
    for each page. Neither waits for the device.

    Args:
        num_pages: how many pages there are.
        page_size: the rows of a page.
        num_kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv; default: D.
        dtype: of keys and values; default: torch's default dtype.
        device: default: torch's default device.

    Attributes:
        key_pages: (num_pages, page_size, Hkv, D), as `fused_attention_paged` takes them. In memory, the rows of a head
            follow one another within a page.
        value_pages: (num_pages, page_size, Hkv, Dv).

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {
            "num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
            "value_dim": value_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            if not checks.is_int(size) or size < 1:
                raise checks.fail(name, "an int of at least 1", repr(size))
        if dtype is not None:
            checks.check_dtype("dtype", dtype)
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside of it
            self.key_pages, self.value_pages = (
                torch.zeros(num_pages, num_kv_heads, page_size, dim, dtype=dtype, device=device).transpose(1, 2)
                for dim in (head_dim, value_dim)
            )
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is taken first
        self._users = [0] * num_pages  # how many sequences have each page
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_sequence = 0
        self._last_table: _Table | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def page_size(self) -> int:
        """The rows of a page."""
        return self.key_pages.shape[1]

    @property
    def num_free_pages(self) -> int:
        """How many pages belong to no sequence."""
        return len(self._free)

    def add(self) -> int:
        """A new, empty sequence. It takes no page yet."""
        sequence = self._next_sequence
        self._next_sequence += 1
        self._pages[sequence], self._lengths[sequence] = [], 0
        return sequence

    def length(self, sequence: int) -> int:
        """How many rows the sequence has."""
        self._check_known(sequence)
        return self._lengths[sequence]

    def append(
        self, sequences: Sequence[int], key: Tensor, value: Tensor, lengths: Sequence[int] | None = None
    ) -> None:
        """Appends L rows to each of the sequences, or the packed rows of sequences that get different numbers of rows.

        Args:
            sequences: B different sequences.
            key: (B, Hkv, L, D), of the dtype and device of the cache; with ``lengths`` (total, Hkv, D), the rows of all
                sequences one after the other.
            value: (B, Hkv, L, Dv), likewise; with ``lengths`` (total, Hkv, Dv).
            lengths: how many rows each sequence gets; their sum is ``total``.

        Raises:
            OutOfPages: there are too few free pages. No sequence has changed.
            TypeError, ValueError: a sequence is unknown or named twice, key, value or lengths do not fit, or a gradient
                is asked for.
        """
        self.check_different(sequences)
        if lengths is None:
            rows = self._check_rows("key", key, self.key_pages, len(sequences))
            if self._check_rows("value", value, self.value_pages, len(sequences)) != rows:
                raise checks.fail("value", f"as many rows as key, {rows}", f"shape {tuple(value.shape)}")
            added = dict.fromkeys(sequences, rows)
        else:
            _check_lengths(lengths, len(sequences))
            self._check_packed_rows("key", key, self.key_pages, sum(lengths))
            self._check_packed_rows("value", value, self.value_pages, sum(lengths))
            added = dict(zip(sequences, lengths, strict=True))
        if not any(added.values()):
            return
        try:
            self._reserve(added)
            page_size, slots = self.page_size, []
            for sequence, rows in added.items():
                start, numbers = self._lengths[sequence], self._pages[sequence]
                slots += [numbers[j // page_size] * page_size + j % page_size for j in range(start, start + rows)]
            slot = self._on_device(slots, torch.int64)
            page, row = slot // page_size, slot % page_size
            with torch.no_grad():
                for pages, x in ((self.key_pages, key), (self.value_pages, value)):
                    pages[page, row] = x.transpose(1, 2).flatten(0, 1) if lengths is None else x
            # One call, so that Ctrl-C finds all sequences longer, or none.
            self._lengths.update({sequence: self._lengths[sequence] + rows for sequence, rows in added.items()})
        except BaseException:
            for sequence in sequences:
                self.crop(sequence, self._lengths[sequence])  # gives the pages without rows back
            raise

    def table(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(block_table (B, pages of the longest) int32, key_lengths (B,) int32), as `fused_attention_paged` takes them.

        A sequence may occur several times.
        """
        _check_sequences(sequences)
        for sequence in sequences:
            self._check_known(sequence)
        lengths = self._on_device([self._lengths[sequence] for sequence in sequences], torch.int32)
        if torch.compiler.is_compiling():
            return self._new_table(sequences), lengths
        # Most tokens fill pages that their sequences have already. So most calls need no new table, which the host
        # would take time for that grows with the number of pages.
        last, of = self._last_table, (tuple(sequences), self.key_pages.device)
        if last is None or last.of != of or last.table._version != last.version:
            with torch.inference_mode(False):  # a tensor of inference mode has no version
                table = self._new_table(sequences)
            self._last_table = last = _Table(of, table, table._version)
        return last.table, lengths

    def _new_table(self, sequences: Sequence[int]) -> Tensor:
        """The block table of the sequences, made of the lists of their pages."""
        lists = [self._pages[sequence] for sequence in sequences]
        columns = max([0, *map(len, lists)])  # Dynamo does not trace max(..., default=0)
        numbers = [number for pages in lists for number in (*pages, *[0] * (columns - len(pages)))]
        return self._on_device(numbers, torch.int32).view(len(lists), columns)

    def fork(self, sequence: int) -> int:
        """A new sequence with the rows of `sequence`. No row is copied until one of the two writes to a shared page."""
        self._check_known(sequence)
        copy = self.add()
        self._pages[copy] = list(self._pages[sequence])
        self._lengths[copy] = self._lengths[sequence]
        for page in self._pages[copy]:
            self._users[page] += 1
        return copy

    def free(self, sequence: int) -> None:
        """Removes the sequence. The pages that no other sequence has become free."""
        self._check_known(sequence)
        for page in self._pages.pop(sequence):
            self._release(page)
        del self._lengths[sequence]

    def crop(self, sequence: int, length: int) -> None:
        """Removes all rows of the sequence but the first `length`, as after rejected speculative tokens.

        Raises:
            ValueError: length is below 0 or above the length of the sequence.
        """
        self._check_known(sequence)
        if not checks.is_int(length):
            raise checks.wrong_type("length", "an int", length)
        if not 0 <= length <= self._lengths[sequence]:
            raise checks.fail("length", f"0 to {self._lengths[sequence]}", length)
        pages = self._pages[sequence]
        while len(pages) * self.page_size >= length + self.page_size:
            self._release(pages.pop())
        self._lengths[sequence] = length

    def reorder(self, sequences: Sequence[int], indices: Sequence[int]) -> list[int]:
        """New sequences for the next step of a beam search: number n continues ``sequences[indices[n]]``.

        The old sequences are removed.

        Raises:
            TypeError: an index is no int.
            ValueError: a sequence is unknown or named twice, or an index is outside of [0, B). No sequence has changed.
        """
        self.check_different(sequences)
        if not isinstance(indices, Sequence):
            raise checks.wrong_type("indices", "a list of ints", indices)
        for index in indices:
            if not checks.is_int(index):
                raise TypeError(f"indices: expected ints, got {type(index).__name__} {index!r}")
            if not 0 <= index < len(sequences):
                raise checks.fail("indices", f"numbers of [0, {len(sequences)})", index)
        chosen = [self.fork(sequences[index]) for index in indices]
        for sequence in sequences:
            self.free(sequence)
        return chosen

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PagedKVCache:
        """Moves the pages to a device, or converts them to a floating-point dtype. Returns the cache itself."""
        check_target(device, dtype)
        with torch.inference_mode(False):
            self.key_pages = self.key_pages.to(device=device, dtype=dtype)
            self.value_pages = self.value_pages.to(device=device, dtype=dtype)
        self._last_table = None
        return self

    def check_different(self, sequences: Sequence[int]) -> None:
        """Raises TypeError unless sequences is a list of ints, ValueError if a sequence is unknown or named twice."""
        _check_sequences(sequences)
        if len(set(sequences)) != len(sequences):
            raise checks.fail("sequences", "each sequence once", list(sequences))
        for sequence in sequences:
            self._check_known(sequence)

    def _reserve(self, added: dict[int, int]) -> None:
        """Makes every page that the next rows of the sequences go to their own, or raises `OutOfPages`.

        added: how many rows each sequence gets
        """
        users = {page: self._users[page] for sequence in added for page in self._pages[sequence][-1:]}
        needed, shared = 0, []
        for sequence, rows in added.items():
            pages, length = self._pages[sequence], self._lengths[sequence]
            needed += -(-(length + rows) // self.page_size) - len(pages)
            if rows and length % self.page_size and users[pages[-1]] > 1:
                users[pages[-1]] -= 1  # the last of the sequences that share a page keeps it
                shared.append(sequence)
        if needed + len(shared) > len(self._free):
            raise OutOfPages(
                f"expected {needed + len(shared)} free pages for {_rows_text(added)}, got "
                f"{len(self._free)} of {len(self._users)}: free or crop a sequence, or make a cache of more pages"
            )
        if shared:
            old = [self._pages[sequence][-1] for sequence in shared]
            new = self._free[: -len(shared) - 1 : -1]  # those that _take will return
            source, target = self._on_device(old, torch.int64), self._on_device(new, torch.int64)
            for x in (self.key_pages, self.value_pages):
                x[target] = x[source]
            for sequence, page in zip(shared, old, strict=True):
                self._pages[sequence][-1] = self._take()
                self._release(page)
        for sequence, rows in added.items():
            pages = self._pages[sequence]
            while len(pages) * self.page_size < self._lengths[sequence] + rows:
                pages.append(self._take())

    def _take(self) -> int:
        """A free page, which has one user from now on."""
        page = self._free.pop()
        self._users[page] = 1
        self._last_table = None
        return page

    def _release(self, page: int) -> None:
        """One sequence less has the page."""
        self._last_table = None
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _on_device(self, numbers: list[int], dtype: torch.dtype) -> Tensor:
        """The numbers as a tensor on the device of the pages. The host does not wait for a GPU."""
        device = self.key_pages.device
        x = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        return x.to(device, non_blocking=True)

    def _check_known(self, sequence: int) -> None:
        if not checks.is_int(sequence):
            raise checks.wrong_type("sequence", "an int", sequence)
        if sequence not in self._lengths:
            raise checks.fail("sequence", f"one of the {len(self)} sequences of the cache", repr(sequence))

    @classmethod
    def _check_rows(cls, name: str, x: Tensor, pages: Tensor, batch: int) -> int:
        """Checks new keys or values; returns how many rows each sequence gets."""
        checks.check_tensor(name, x)
        _, _, heads, dim = pages.shape
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, dim):
            hint = "; packed rows need lengths" if x.dim() == 3 else ""
            raise checks.fail(name, f"shape ({batch}, {heads}, L, {dim})", f"{tuple(x.shape)}{hint}")
        cls._check_kind(name, x, pages)
        return x.shape[2]

    @classmethod
    def _check_packed_rows(cls, name: str, x: Tensor, pages: Tensor, total: int) -> None:
        """Checks new keys or values of sequences that get different numbers of rows, `total` in all."""
        checks.check_tensor(name, x)
        expected = (total, *pages.shape[2:])
        if x.shape != expected:
            raise checks.fail(name, f"shape {expected}, as the lengths add up to {total}", tuple(x.shape))
        cls._check_kind(name, x, pages)

    @staticmethod
    def _check_kind(name: str, x: Tensor, pages: Tensor) -> None:
        if x.dtype != pages.dtype or x.device != pages.device:
            raise checks.fail(name, f"{pages.dtype} on {pages.device}", f"{x.dtype} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise checks.fail(name, "a tensor without gradient", "one that requires it; append under torch.no_grad()")


def _check_sequences(sequences: Sequence[int]) -> None:
    """Raises TypeError unless sequences is a list, or another sequence, of ints."""
    if not isinstance(sequences, Sequence) or not all(map(checks.is_int, sequences)):
        raise TypeError(f"sequences: expected a list of ints, got {sequences!r}")


def _check_lengths(lengths: Sequence[int], count: int) -> None:
    """Raises TypeError unless lengths is a list of ints, ValueError unless it has `count` numbers of rows."""
    if not isinstance(lengths, Sequence) or not all(map(checks.is_int, lengths)):
        raise TypeError(f"lengths: expected a list of ints, got {lengths!r}")
    if len(lengths) != count or any(length < 0 for length in lengths):
        expected = f"a number of rows of at least 0 for each of the {count} sequences"
        raise checks.fail("lengths", expected, list(lengths))


def _rows_text(added: dict[int, int]) -> str:
    """The rows that sequences get, for messages."""
    rows = sorted(set(added.values()))
    count = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    return f"{count} more rows of {len(added)} sequences"
