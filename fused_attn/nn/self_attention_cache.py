"""The keys and values of the tokens so far, for self-attention: growing, static, or a ring for a sliding window.

All three have the methods `append`, `crop`, `reorder`, `to`, `state` and `restore`. They differ in who knows the number
of rows:

- A growing cache counts on the host. Its tensors become longer with every step.
- A static cache and a ring count on the device, for each batch entry. Every step has the same shapes and reads no
  number from the host. So a step can be captured as a CUDA graph, and a compiled layer is compiled once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import checks
from fused_attn.nn.cache_checks import (
    WritableCopies,
    check_continues,
    check_count,
    check_indices,
    check_pair,
    check_target,
    checked_length,
    checked_lengths,
    select_entries,
)

#: Rows of the first buffer of a growing cache without max_length. The buffer doubles whenever it is full.
MIN_CAPACITY = 16


class CachedRows(NamedTuple):
    """What attention over a cache reads.

    keys: (B, Hkv, S, D)
    values: (B, Hkv, S, Dv)
    diagonal: with a number, new query i sees the keys j <= i + diagonal. None means that there is no causal mask
    options: more arguments of `fused_attention`, which say which keys are visible
    """

    keys: Tensor
    values: Tensor
    diagonal: int | None
    options: dict[str, Any]


class SelfAttentionCache(WritableCopies):
    """The keys and values of every token so far, in buffers that grow.

    >>> import torch
    >>> from fused_attn.nn import SelfAttentionCache
    >>> cache = SelfAttentionCache()
    >>> row = torch.randn(2, 8, 1, 64)  # (B, Hkv, L, D), one new token
    >>> with torch.no_grad():
    ...     _ = cache.update(row, row)
    ...     keys, values = cache.update(row, row)
    >>> keys.shape, len(cache)
    (torch.Size([2, 8, 2, 64]), 2)

    Rows are written into a buffer. A full buffer doubles. With max_length, the buffer has all rows from the start. So a
    step copies its own rows and, on average, at most one older row for each of these.

    With gradients enabled, every step concatenates, which copies all rows. Autograd needs the tensors of earlier steps
    unchanged, even if only a query has a gradient. So decode under ``torch.no_grad()`` if you need no gradient. A step
    without gradients after one with gradients copies the rows, too. Later steps then send no gradient to older rows.

    Args:
        max_length: the most rows. None means no limit.

    Raises:
        TypeError: max_length is no int.
        ValueError: max_length is below 1.
    """

    is_filled_once = False

    def __init__(self, max_length: int | None = None):
        if max_length is not None:
            check_count("max_length", max_length)
        self.length = 0
        self._max_length = max_length
        self._keys: Tensor | None = None  # (B, Hkv, capacity, D)
        self._values: Tensor | None = None  # (B, Hkv, capacity, Dv)
        #: Whether rows may be written into the buffers. No after a step with gradients: the buffers can then be tensors
        #: of the caller or of autograd.
        self._is_writable = False

    def __len__(self) -> int:
        """Number of rows in the cache."""
        return self.length

    @property
    def position(self) -> int:
        """The position of the next token."""
        return self.length

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new rows and return all rows so far.

        Args:
            key: (B, Hkv, L, D), the keys of L new tokens, of the dtype and device of the first ones.
            value: (B, Hkv, L, Dv), the values of these tokens.

        Returns:
            keys: (B, Hkv, length, D), the new rows included.
            values: (B, Hkv, length, Dv), the new rows included.
                Both are views of the buffers. A later update does not change their contents, except after `crop`.

        Raises:
            ValueError: key and value have shapes that do not fit each other or the rows in the cache, another dtype or
                device, or too many rows for max_length.
        """
        check_pair(key, value)
        if self._keys is not None and self._values is not None:
            check_continues("key", self._keys, key)
            check_continues("value", self._values, value)
        length = self.length + key.shape[2]
        if self._max_length is not None and length > self._max_length:
            raise checks.fail("cache", f"at most max_length={self._max_length} rows", length)
        if torch.is_grad_enabled():
            self._is_writable = False
            self._keys, self._values = self._concatenated(self._keys, key), self._concatenated(self._values, value)
        else:
            self._keys, self._values = self._appended(self._keys, key), self._appended(self._values, value)
            self._is_writable = True
        self.length = length
        return self._keys[:, :, :length], self._values[:, :, :length]

    def append(self, key: Tensor, value: Tensor) -> CachedRows:
        """What attention of the new tokens reads. The arguments and errors are those of `update`."""
        position = self.length
        keys, values = self.update(key, value)
        # One query is the newest token, which sees every key.
        return CachedRows(keys, values, None if key.shape[2] == 1 else position, {})

    def crop(self, length: int | Tensor) -> None:
        """Forget all rows from row `length` on; see `KVCache.crop`. The length must be an int."""
        self.length = min(self.length, checked_length(length))
        if self.length == 0:  # the next rows may have another batch size or dtype
            self._keys = self._values = None

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`."""
        check_indices(indices)
        if self._keys is not None and self._values is not None:
            self._keys = self._selected(self._keys, indices)
            self._values = self._selected(self._values, indices)
            # The new buffers belong to the cache alone, unless autograd has recorded how they were made.
            self._is_writable = not (self._keys.requires_grad or self._values.requires_grad)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert the rows; see `KVCache.to`."""
        check_target(device, dtype)
        if self._keys is not None and self._values is not None:
            with torch.inference_mode(False):
                self._keys, self._values = self._keys.to(device, dtype), self._values.to(device, dtype)

    def state(self) -> tuple[int, bool]:
        """What `restore` needs. No buffer is among it, so a step that makes larger buffers frees the old ones."""
        return self.length, self._keys is None

    def restore(self, state: tuple[int, bool]) -> None:
        """Forget all rows that were appended since `state` was called."""
        self.length, was_empty = state
        if was_empty:  # the first rows may have another batch size or dtype next time
            self._keys = self._values = None

    def _concatenated(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        """A new buffer with exactly the rows in the cache and the new rows (B, Hkv, L, D)."""
        return rows if buffer is None else torch.cat((buffer[:, :, : self.length], rows), dim=2)

    def _appended(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        """The buffer with the new rows (B, Hkv, L, D) written after the last row. If they cannot be, a new buffer."""
        end = self.length + rows.shape[2]
        if buffer is None or end > buffer.shape[2] or not self._is_writable:
            capacity = self._max_length or max(end, 2 * self.length, MIN_CAPACITY)
            larger = _empty(rows, rows.shape[0], capacity)
            if buffer is not None:
                larger[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = larger
        buffer[:, :, self.length : end] = rows
        return buffer

    def _selected(self, buffer: Tensor, indices: Tensor) -> Tensor:
        """A new buffer whose batch entry n is the entry ``indices[n]`` of the given one."""
        # This makes a new buffer, because views of the old one may still be in use. Only filled rows are copied.
        selected = _empty(buffer, indices.shape[0], buffer.shape[2])
        selected[:, :, : self.length] = select_entries(buffer[:, :, : self.length], indices)
        return selected


class StaticSelfAttentionCache(WritableCopies):
    """The keys and values of every token so far, in buffers of a fixed size that are written in place.

    >>> import torch
    >>> from fused_attn.nn import StaticSelfAttentionCache
    >>> cache = StaticSelfAttentionCache(max_length=32)
    >>> row = torch.randn(2, 8, 1, 64)  # (B, Hkv, L, D), one new token
    >>> with torch.no_grad():
    ...     rows = cache.append(row, row)
    >>> rows.keys.shape, rows.options["key_lengths"].tolist(), len(cache)
    (torch.Size([2, 8, 32, 64]), [1, 1], 1)

    The number of rows is a tensor on the device, one number for each batch entry. So batch entries may have different
    lengths, as after `crop` with a tensor.

    Args:
        max_length: the most rows of a batch entry.

    Raises:
        TypeError: max_length is no int.
        ValueError: max_length is below 1.
    """

    is_filled_once = False

    def __init__(self, max_length: int):
        check_count("max_length", max_length)
        self.max_length = max_length
        self._rows: _StaticRows | None = None
        #: The most rows that the host knows of. None after `crop` with a tensor, which the host does not read.
        self._at_most: int | None = 0
        #: How many rows were appended after the newest call of `state`. Compiled code only writes this number. If such
        #: code read the number, there would be a compilation for each value.
        self._newest = 0

    def __len__(self) -> int:
        """Number of rows of the longest batch entry. The host waits for the device."""
        lengths = None if self._rows is None else self._rows.lengths
        return 0 if lengths is None or lengths.numel() == 0 else int(lengths.max())

    @property
    def length(self) -> int:
        """Number of rows of the longest batch entry. The host waits for the device."""
        return len(self)

    @property
    def position(self) -> Tensor | int:
        """The position of the next token of each batch entry, (B,) int64, on the device; 0 before the first rows."""
        return 0 if self._rows is None else self._rows.lengths

    def append(self, key: Tensor, value: Tensor) -> CachedRows:
        """Write the new rows behind the last row of each batch entry.

        Args:
            key: (B, Hkv, L, D), the keys of L new tokens, of the dtype and device of the first ones.
            value: (B, Hkv, L, Dv), the values of these tokens.

        Returns:
            What attention reads: both whole buffers, with the lengths as ``key_lengths``. The next call changes all of
            these tensors.

        Raises:
            ValueError: key and value have shapes that do not fit each other or the rows in the cache, another dtype or
                device, a gradient, or too many rows for max_length.
        """
        self._check(key, value)
        if self._rows is None:
            self._rows = _StaticRows.of(key, value, self._capacity)
        return self._write(self._rows, key, value)

    def rows_to_fill(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> _StaticRows | None:
        """The buffers, for a native call that appends a row to each batch entry by itself. `count_filled` must follow.

        None if only `append` can do this: in the first call, or if it would raise an error.
        """
        rows = self._rows
        if rows is None:
            return None
        if not self.has_room():
            return None
        shape = batch, heads, rows.keys.shape[2], head_dim
        fits = rows.keys.shape == rows.values.shape == shape and rows.keys.dtype == rows.values.dtype == dtype
        return rows if fits and rows.keys.is_cpu else None

    def has_room(self) -> bool:
        """Whether one more row fits into each batch entry, as far as the host knows the lengths."""
        return self._at_most is None or self._at_most < self.max_length

    def count_filled(self) -> None:
        """Counts the rows that a native call has appended to the buffers of `rows_to_fill`."""
        assert self._rows is not None
        torch.autograd.graph.increment_version(self._rows.contents())  # for graphs that have saved them
        if self._at_most is not None:
            self._at_most += 1
        self._newest = 1

    def crop(self, length: int | Tensor) -> None:
        """Forget all rows from row `length` on; see `KVCache.crop`."""
        if isinstance(length, Tensor):
            if self._rows is not None:  # otherwise there is no row to forget
                own = self._rows.lengths
                own.clamp_(max=checked_lengths(length, own.shape[0]).to(own.device))
                self._at_most = None
            return
        length = checked_length(length)
        if self._at_most is not None:
            self._at_most = min(self._at_most, length)
        if self._rows is not None:
            self._rows.lengths.clamp_(max=length)

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`."""
        check_indices(indices)
        if self._rows is None:
            return
        batch = self._rows.lengths.shape[0]
        if indices.shape[0] != batch:
            raise checks.fail("indices", f"the batch size of a static cache, {batch}", indices.shape[0])
        for x in self._rows.contents():
            x.copy_(select_entries(x, indices))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert the rows; see `KVCache.to`."""
        check_target(device, dtype)
        if self._rows is not None:
            self._rows = self._rows.to(device, dtype)

    def reserve(self, max_length: int) -> None:
        """Give the buffers more rows, which copies them. A captured step must be captured again."""
        check_count("max_length", max_length)
        if self._rows is not None and max_length > self.max_length:
            self._rows = self._rows.with_capacity(max_length)
        self.max_length = max(self.max_length, max_length)

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs. The device does nothing."""
        self._newest = 0
        return self._rows, self._at_most

    def restore(self, state: tuple[Any, ...]) -> None:
        """Forget the rows of the one `append` since `state` was called, if there was one."""
        self._rows, self._at_most = state
        # A captured step does not run, so the device has not counted its rows.
        if self._newest and self._rows is not None and not _is_capturing(self._rows.lengths):
            self._rows.lengths.sub_(self._newest)
        self._newest = 0  # `restore` of the caller may follow

    @property
    def _capacity(self) -> int:
        """Rows of a buffer."""
        return self.max_length

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Raises ValueError if the new rows cannot be written."""
        check_pair(key, value)
        if self._rows is not None:
            check_continues("key", self._rows.keys, key)
            check_continues("value", self._rows.values, value)
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise checks.fail("cache", "keys and values without gradient in a static cache", "one; use torch.no_grad()")
        if self._at_most is None or torch.compiler.is_compiling():
            return  # On a CPU, `_write` refuses too many rows. On a GPU, its kernel stops with an error.
        most = self._at_most + key.shape[2]
        if most > self.max_length:
            raise checks.fail("cache", f"at most max_length={self.max_length} rows", most)
        self._at_most = most

    def _write(self, rows: _StaticRows, key: Tensor, value: Tensor) -> CachedRows:
        """Writes the new rows, and returns what attention reads."""
        seqlen_q = key.shape[2]
        try:
            rows.write(rows.columns(seqlen_q), key, value)
        except IndexError:  # on a CPU, where nothing has been written then
            most = int(rows.lengths.max()) + seqlen_q
            raise checks.fail("cache", f"at most max_length={self.max_length} rows", most) from None
        self._add_lengths(rows, seqlen_q)
        rows.key_lengths.copy_(rows.lengths)
        options: dict[str, Any] = {"key_lengths": rows.key_lengths}
        if seqlen_q > 1:
            options["attn_mask"] = lower_right(seqlen_q, self._capacity)
        return CachedRows(rows.keys, rows.values, None, options)

    def _add_lengths(self, rows: _StaticRows, seqlen_q: int) -> None:
        """Counts the new rows."""
        rows.lengths.add_(seqlen_q)
        self._newest = seqlen_q


class SlidingSelfAttentionCache(StaticSelfAttentionCache):
    """The keys and values of the newest tokens: a ring, in which a new row overwrites the oldest one.

    Attention over this cache is attention with a sliding window: a token sees itself and the ``window - 1`` tokens
    before it.

    >>> import torch
    >>> from fused_attn.nn import SlidingSelfAttentionCache
    >>> cache = SlidingSelfAttentionCache(window=4)
    >>> row = torch.randn(2, 8, 1, 64)  # (B, Hkv, L, D), one new token
    >>> with torch.no_grad():
    ...     for _ in range(10):
    ...         rows = cache.append(row, row)
    >>> rows.keys.shape, rows.options["key_lengths"].tolist(), len(cache)
    (torch.Size([2, 8, 4, 64]), [4, 4], 10)

    The rows of a ring are in no order, so a module with a relative bias cannot use this cache. Rotary embeddings are
    applied before rows are written, so their modules can.

    Args:
        window: the number of tokens that a token sees, itself included.

    Raises:
        TypeError: window is no int.
        ValueError: window is below 1.
    """

    def __init__(self, window: int):
        check_count("window", window)
        super().__init__(max_length=window)
        self.window = window
        self._at_most = None  # a ring takes any number of rows
        #: Rows that the newest call has overwritten although a repeated call sees them, as `_StaticRows.write` takes
        #: them. None if there are none.
        self._overwritten: tuple[Tensor, Tensor, Tensor] | None = None

    def crop(self, length: int | Tensor) -> None:
        """Forget all rows from row `length` on. Only 0 is possible, because old rows have been overwritten."""
        if isinstance(length, Tensor) or checked_length(length) != 0:
            raise checks.fail("length", "0 for a sliding window, whose older rows have been overwritten", length)
        if self._rows is not None:
            self._rows.lengths.zero_()

    def reserve(self, max_length: int) -> None:
        """Nothing: a ring takes any number of rows."""

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs. The device does nothing."""
        return super().state(), self._overwritten

    def restore(self, state: tuple[Any, ...]) -> None:
        """Forget the rows of the one `append` since `state` was called, if there was one."""
        own, overwritten = state
        super().restore(own)
        if self._overwritten is not overwritten and self._overwritten is not None and self._rows is not None:
            self._rows.write(*self._overwritten)
        self._overwritten = overwritten

    def _write(self, rows: _StaticRows, key: Tensor, value: Tensor) -> CachedRows:
        seqlen_q, window = key.shape[2], self.window
        self._overwritten = None
        if seqlen_q != 1:
            read = self._earlier_and_new(rows, key, value)
        columns = rows.columns(seqlen_q) % window
        newest = slice(max(0, seqlen_q - window), None)  # no column occurs twice
        rows.write(columns[:, newest], key[:, :, newest], value[:, :, newest])
        self._add_lengths(rows, seqlen_q)
        if seqlen_q != 1:
            return read
        rows.key_lengths.copy_(rows.lengths.clamp(max=window))
        return CachedRows(rows.keys, rows.values, None, {"key_lengths": rows.key_lengths})

    def _earlier_and_new(self, rows: _StaticRows, key: Tensor, value: Tensor) -> CachedRows:
        """The window - 1 rows before the new ones, in order, then the new ones (B, Hkv, L, D)."""
        seqlen_q, earlier = key.shape[2], self.window - 1
        positions = rows.lengths[:, None] - torch.arange(earlier, 0, -1, device=key.device)  # (B, window - 1)
        columns = positions % self.window
        old = [rows.read(columns, x) for x in (rows.keys, rows.values)]
        self._overwritten = columns, old[0], old[1]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, (key, value), strict=True))
        is_missing = torch.nn.functional.pad(positions < 0, (0, seqlen_q))
        options = {
            "attn_mask": lower_right(seqlen_q, earlier + seqlen_q),
            "window_size": (earlier, 0),
            "key_padding_mask": is_missing,
        }
        return CachedRows(keys, values, None, options)


class _StaticRows(NamedTuple):
    """The tensors of a static cache, all of which are written in place.

    keys: (B, Hkv, capacity, D)
    values: (B, Hkv, capacity, Dv)
    lengths: (B,) int64, the number of rows of each batch entry
    key_lengths: (B,) int32, the same for attention, at most capacity
    entries: (B, 1) int64, the numbers of the batch entries
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    key_lengths: Tensor
    entries: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int) -> _StaticRows:
        """Empty buffers for rows like key (B, Hkv, L, D) and value (B, Hkv, L, Dv)."""
        batch, device = key.shape[0], key.device
        keys, values = (_empty(x, batch, capacity) for x in (key, value))
        with torch.inference_mode(False):
            lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            return cls(keys, values, lengths, lengths.int(), torch.arange(batch, device=device)[:, None])

    def contents(self) -> tuple[Tensor, ...]:
        """The tensors that belong to batch entries."""
        return self.keys, self.values, self.lengths, self.key_lengths

    def columns(self, count: int) -> Tensor:
        """(B, count): the rows of the buffers behind the last row of each batch entry."""
        first = self.lengths[:, None]
        return first if count == 1 else first + torch.arange(count, device=first.device)

    def write(self, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes key (B, Hkv, L, D) and value (B, Hkv, L, Dv) into the rows `columns` (B, L) of the buffers."""
        for buffer, x in ((self.keys, key), (self.values, value)):
            buffer[self.entries, :, columns] = x.transpose(1, 2)

    def read(self, columns: Tensor, buffer: Tensor) -> Tensor:
        """The rows `columns` (B, L) of a buffer, as (B, Hkv, L, D)."""
        return buffer[self.entries, :, columns].transpose(1, 2)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> _StaticRows:
        """The same rows on a device and in a dtype. None leaves either as it is."""
        with torch.inference_mode(False):
            counts = (x.to(device) for x in self[2:])
            return _StaticRows(self.keys.to(device, dtype), self.values.to(device, dtype), *counts)

    def with_capacity(self, capacity: int) -> _StaticRows:
        """The same rows in larger buffers."""
        larger = _StaticRows.of(self.keys, self.values, capacity)
        for new, old in zip(larger.contents(), self.contents(), strict=True):
            (new[:, :, : old.shape[2]] if new.dim() == 4 else new).copy_(old)
        return larger


def _empty(rows: Tensor, batch: int, capacity: int) -> Tensor:
    """A buffer (batch, Hkv, capacity, D) for rows like those given, (B, Hkv, L, D)."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be written outside of it
        return torch.empty(batch, rows.shape[1], capacity, rows.shape[3], dtype=rows.dtype, device=rows.device)


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def lower_right(seqlen_q: int, seqlen_k: int) -> Tensor:
    """The causal bias by which the last query sees the last key."""
    # This import takes a second, and only calls with several new tokens need the module.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(seqlen_q, seqlen_k)
