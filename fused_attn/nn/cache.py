"""Keys and values kept between decoding steps, so that each step computes only its new tokens.

A decoder gets one `KVCache` and hands ``cache.layers[i]`` to its layer i. That layer hands ``.self_attention`` to its
self-attention, whose keys grow by one step at a time, and ``.cross_attention`` to its cross-attention, whose keys are
those of the encoder memory and are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of the first buffer of a cache without max_length; it doubles whenever it is full.
MIN_CAPACITY = 16


class SelfAttentionCache:
    """The keys and values of every token so far.

    Rows are written into a buffer that doubles when it is full (or that has max_length rows from the start), so that a
    step copies its own rows and, on average, no more than one older row for each of them.

    With gradients enabled every step concatenates instead, which copies all rows: autograd needs the tensors of earlier
    steps unchanged, be it only for the gradient of a query. So decode under ``torch.no_grad()`` where none is wanted.
    """

    is_static = False

    def __init__(self, max_length: int | None = None):
        if max_length is not None:
            _check_count("max_length", max_length)
        self.length = 0
        self._max_length = max_length
        self._keys: Tensor | None = None  # (B, Hkv, capacity, D)
        self._values: Tensor | None = None  # (B, Hkv, capacity, Dv)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new rows and return all rows so far.

        Args:
            key: (B, Hkv, L, D), the keys of L new tokens.
            value: (B, Hkv, L, Dv).

        Returns:
            keys (B, Hkv, length, D) and values (B, Hkv, length, Dv), the new rows included. They are views of the
            buffers; a later update leaves their contents as they are.

        Raises:
            ValueError: the shapes do not belong together or to the rows in the cache, or max_length would be exceeded.
        """
        _check_pair(key, value)
        if self._keys is not None and self._values is not None:
            _check_continues("key", self._keys, key)
            _check_continues("value", self._values, value)
        length = self.length + key.shape[2]
        if self._max_length is not None and length > self._max_length:
            raise ValueError(f"key: expected at most max_length={self._max_length} rows in the cache, got {length}")
        if torch.is_grad_enabled():
            self._keys, self._values = self._concatenated(self._keys, key), self._concatenated(self._values, value)
        else:
            self._keys, self._values = self._appended(self._keys, key), self._appended(self._values, value)
        self.length = length
        return self._keys[:, :, :length], self._values[:, :, :length]

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`."""
        if self._keys is not None and self._values is not None:
            self._keys = self._selected(self._keys, indices)
            self._values = self._selected(self._values, indices)

    def _concatenated(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        return rows if buffer is None else torch.cat((buffer[:, :, : self.length], rows), dim=2)

    def _appended(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        end = self.length + rows.shape[2]
        if buffer is None or end > buffer.shape[2]:
            capacity = self._max_length or max(end, 2 * self.length, MIN_CAPACITY)
            larger = rows.new_empty(*rows.shape[:2], capacity, rows.shape[3])
            if buffer is not None:
                larger[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = larger
        buffer[:, :, self.length : end] = rows
        return buffer

    def _selected(self, buffer: Tensor, indices: Tensor) -> Tensor:
        # Views of the old buffer may still be in use, and only the rows that are filled need to move.
        selected = buffer.new_empty(indices.shape[0], *buffer.shape[1:])
        selected[:, :, : self.length] = buffer[:, :, : self.length].index_select(0, indices)
        return selected


class CrossAttentionCache:
    """The keys and values of the encoder memory: filled by the first step, read by the others."""

    is_static = True

    def __init__(self):
        self._pair: tuple[Tensor, Tensor] | None = None
        self._memory: Tensor | None = None

    @property
    def length(self) -> int:
        """Rows of the memory; 0 before the first step."""
        return 0 if self._pair is None else self._pair[0].shape[2]

    def get(self, memory: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """(keys (B, Hkv, S, D), values (B, Hkv, S, Dv)), or None before the first step.

        Args:
            memory: what this step would compute them from. If it is another tensor than that of the step before, its
                values are compared, for which a GPU is waited for; after `reorder` or in a traced graph only sizes are.

        Raises:
            ValueError: it is not the memory that the cache was filled with.
        """
        if self._pair is not None and memory is not None:
            self._check_memory(memory, batch=self._pair[0].shape[0])
        return self._pair

    def update(self, key: Tensor, value: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill the cache with the keys (B, Hkv, S, D) and values (B, Hkv, S, Dv) of the memory, and return them.

        Args:
            key: (B, Hkv, S, D).
            value: (B, Hkv, S, Dv).
            memory: what they were computed from, kept for `get` to compare.

        Raises:
            ValueError: the shapes do not belong together.
            RuntimeError: the cache is filled already; another memory needs another cache.
        """
        _check_pair(key, value)
        if self._pair is not None:
            raise RuntimeError("cross_attention cache: filled already; use a new KVCache for another memory")
        self._pair, self._memory = (key, value), memory
        return self._pair

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`."""
        if self._pair is not None:
            key, value = self._pair
            self._pair = key.index_select(0, indices), value.index_select(0, indices)
            self._memory = None  # the next step brings the one in the new order

    def _check_memory(self, memory: Tensor, batch: int) -> None:
        if memory is self._memory:
            return
        length = self.length
        sizes = tuple(memory.shape[:-1])
        if sizes not in ((batch, length), (length, batch)) and not (batch == 1 and sizes == (length,)):
            raise ValueError(
                f"memory: expected batch size {batch} and length {length}, as in the cache, got shape "
                f"{tuple(memory.shape)}; use a new cache for another memory"
            )
        if self._memory is not None and not torch.compiler.is_compiling() and not _is_equal(memory, self._memory):
            raise ValueError(
                f"memory: expected the one that the cache was filled with, got another of shape {tuple(memory.shape)}; "
                "use a new cache for another memory"
            )
        self._memory = memory


class LayerCache:
    """What one decoder layer keeps."""

    def __init__(self, max_length: int | None = None):
        self.self_attention = SelfAttentionCache(max_length)
        self.cross_attention = CrossAttentionCache()


class KVCache:
    """What a decoder keeps between decoding steps.

    >>> cache = KVCache(num_layers=6)
    >>> for _ in range(steps):
    ...     out = decoder(newest_token, memory, cache=cache)  # (B, 1, E); sees all earlier tokens

    Args:
        num_layers: decoder layers.
        max_length: the longest target. The buffers then have this size from the start; by default they grow.

    Raises:
        TypeError, ValueError: a number that is no int, or below 1.
    """

    def __init__(self, num_layers: int, max_length: int | None = None):
        _check_count("num_layers", num_layers)
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens in the cache, which is the position of the next one."""
        return self.layers[0].self_attention.length

    def reorder(self, indices: Tensor, *, include_cross_attention: bool = True) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was: beam search keeps some hypotheses, twice or not at all.

        Args:
            indices: (new B,) int64 on the device of the cache. Fewer or more entries than before are allowed.
            include_cross_attention: False saves the copy when every entry keeps the memory it has, as it does when
                hypotheses change places among the beams of one source.

        Raises:
            TypeError: indices is no tensor.
            ValueError: indices has another shape or dtype.
        """
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices: expected a tensor of shape (B,), got {type(indices).__name__}")
        if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"indices: expected integers of shape (B,), got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        for layer in self.layers:
            layer.self_attention.reorder(indices)
            if include_cross_attention:
                layer.cross_attention.reorder(indices)


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Of one dtype, device and shape, with the same values; NaN, which padding may hold, equals NaN."""
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _check_pair(key: Tensor, value: Tensor) -> None:
    if key.dim() != 4:
        raise ValueError(f"key: expected shape (B, Hkv, L, D), got {tuple(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape {(*key.shape[:3], 'Dv')}, got {tuple(value.shape)}")


def _check_continues(name: str, buffer: Tensor, rows: Tensor) -> None:
    """The new rows have the batch size, heads, columns, dtype and device of the rows in the cache."""
    batch, heads, _, columns = buffer.shape
    if (batch, heads, columns) != (rows.shape[0], rows.shape[1], rows.shape[3]):
        raise ValueError(
            f"{name}: expected shape {(batch, heads, 'L', columns)}, as in the cache, got {tuple(rows.shape)}"
        )
    if (buffer.dtype, buffer.device) != (rows.dtype, rows.device):
        raise ValueError(
            f"{name}: expected {buffer.dtype} on {buffer.device}, as in the cache, got {rows.dtype} on {rows.device}"
        )
