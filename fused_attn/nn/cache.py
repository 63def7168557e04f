"""Keys and values that are kept between decoding steps, so that each step computes only its new tokens.

A decoder gets one `KVCache`. The parts of the cache go to the parts of the decoder:

- ``cache.layers[i]`` goes to layer i.
- ``cache.layers[i].self_attention`` goes to the self-attention of that layer. Its keys grow with every step.
- ``cache.layers[i].cross_attention`` goes to the cross-attention of that layer. Its keys are those of the encoder
  memory, and are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of the first buffer of a cache without max_length. The buffer doubles whenever it is full.
MIN_CAPACITY = 16


class SelfAttentionCache:
    """The keys and values of every token so far.

    >>> import torch
    >>> from fused_attn.nn import SelfAttentionCache
    >>> cache = SelfAttentionCache()
    >>> row = torch.randn(2, 8, 1, 64)  # (B, Hkv, L, D), one new token
    >>> with torch.no_grad():
    ...     _ = cache.update(row, row)
    ...     keys, values = cache.update(row, row)
    >>> keys.shape
    torch.Size([2, 8, 2, 64])

    Rows are written into a buffer. A full buffer doubles. With max_length, the buffer has all rows from the start. So a
    step copies its own rows and, on average, at most one older row for each of these.

    With gradients enabled, every step concatenates, which copies all rows. Autograd needs the tensors of earlier steps
    unchanged, even if only a query has a gradient. So decode under ``torch.no_grad()`` if you need no gradient.

    Args:
        max_length: the most rows. None means no limit.

    Raises:
        TypeError: max_length is no int.
        ValueError: max_length is below 1.
    """

    is_static = False  # the cache grows

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
            key: (B, Hkv, L, D), the keys of L new tokens, of the dtype and device of the first ones.
            value: (B, Hkv, L, Dv), the values of these tokens.

        Returns:
            keys: (B, Hkv, length, D), the new rows included.
            values: (B, Hkv, length, Dv), the new rows included.
                Both are views of the buffers. A later update does not change their contents.

        Raises:
            ValueError: key and value have shapes that do not fit each other or the rows in the cache, another dtype or
                device, or too many rows for max_length.
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
        """A new buffer with exactly the rows in the cache and the new rows (B, Hkv, L, D)."""
        return rows if buffer is None else torch.cat((buffer[:, :, : self.length], rows), dim=2)

    def _appended(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        """The buffer with the new rows (B, Hkv, L, D) written after the last row. If it is full, a larger buffer."""
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
        """A new buffer whose batch entry n is the entry ``indices[n]`` of the given one."""
        # This makes a new buffer, because views of the old one may still be in use. Only filled rows are copied.
        selected = buffer.new_empty(indices.shape[0], *buffer.shape[1:])
        selected[:, :, : self.length] = buffer[:, :, : self.length].index_select(0, indices)
        return selected


class CrossAttentionCache:
    """The keys and values of the encoder memory. The first step fills the cache, and the other steps read it.

    >>> import torch
    >>> from fused_attn import FusedMultiheadAttention
    >>> from fused_attn.nn import CrossAttentionCache
    >>> attention = FusedMultiheadAttention(64, 4, batch_first=True)
    >>> memory, cache = torch.randn(2, 10, 64), CrossAttentionCache()
    >>> for token in torch.randn(2, 3, 64).split(1, dim=1):  # (N, 1, E)
    ...     out, _ = attention(token, memory, memory, need_weights=False, cache=cache)
    >>> cache.length
    10
    """

    is_static = True  # the cache is filled once

    def __init__(self):
        self._pair: tuple[Tensor, Tensor] | None = None
        self._memory: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of rows of the memory; 0 before the first step."""
        return 0 if self._pair is None else self._pair[0].shape[2]

    def get(self, memory: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """(keys (B, Hkv, S, D), values (B, Hkv, S, Dv)), or None before the first step.

        Args:
            memory: the memory of this step, to be compared with the memory of the step before. The same tensor needs no
                comparison. The values of another tensor are compared, which waits for a GPU. After `reorder`, and in a
                traced graph, only the sizes are compared.

        Raises:
            ValueError: the cache was filled with another memory.
        """
        if self._pair is not None and memory is not None:
            self._check_memory(memory, batch=self._pair[0].shape[0])
        return self._pair

    def update(self, key: Tensor, value: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill the cache with the keys and values of the memory, and return both.

        Args:
            key: (B, Hkv, S, D).
            value: (B, Hkv, S, Dv).
            memory: the memory that key and value were computed from. `get` compares later ones with this memory.

        Raises:
            ValueError: key and value have shapes that do not fit each other.
            RuntimeError: the cache is filled already. Another memory needs another cache.
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
            self._memory = None  # the next step brings the memory in the new order

    def _check_memory(self, memory: Tensor, batch: int) -> None:
        """Raises ValueError if memory is not the memory that filled the cache.

        batch: the batch size of the cache
        """
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
    """The part of a `KVCache` that belongs to one decoder layer.

    >>> import torch
    >>> from fused_attn import TransformerDecoderLayer
    >>> from fused_attn.nn import LayerCache
    >>> layer, cache = TransformerDecoderLayer(64, 4, batch_first=True), LayerCache()
    >>> with torch.no_grad():
    ...     out = layer(torch.randn(2, 1, 64), torch.randn(2, 10, 64), cache=cache)
    >>> cache.self_attention.length, cache.cross_attention.length
    (1, 10)

    Args:
        max_length: see `KVCache`.
    """

    def __init__(self, max_length: int | None = None):
        self.self_attention = SelfAttentionCache(max_length)
        self.cross_attention = CrossAttentionCache()


class KVCache:
    """The keys and values that a decoder keeps between decoding steps.

    >>> import torch
    >>> from fused_attn import KVCache, TransformerDecoder, TransformerDecoderLayer
    >>> decoder = TransformerDecoder(TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> memory, newest_token = torch.randn(2, 10, 64), torch.randn(2, 1, 64)
    >>> cache = KVCache(num_layers=2)
    >>> with torch.no_grad():
    ...     for _ in range(3):
    ...         newest_token = decoder(newest_token, memory, cache=cache)  # (B, 1, E), sees all earlier tokens
    >>> cache.length
    3

    Args:
        num_layers: the number of decoder layers.
        max_length: the longest target. The buffers then have this size from the start. By default the buffers grow.

    Raises:
        TypeError: a number is no int.
        ValueError: a number is below 1.
    """

    def __init__(self, num_layers: int, max_length: int | None = None):
        _check_count("num_layers", num_layers)
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """Number of tokens in the cache. This is also the position of the next token."""
        return self.layers[0].self_attention.length

    def reorder(self, indices: Tensor, *, include_cross_attention: bool = True) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was. Beam search needs this.

        >>> import torch
        >>> from fused_attn import KVCache
        >>> cache = KVCache(num_layers=1)
        >>> rows = torch.randn(3, 8, 5, 64)  # (B, Hkv, L, D)
        >>> _ = cache.layers[0].self_attention.update(rows, rows)
        >>> cache.reorder(torch.tensor([2, 0, 0]))  # keeps entry 2 once, entry 0 twice, and drops entry 1

        Args:
            indices: (new B,) int64 or int32, on the device of the cache. The new batch may be smaller or larger.
            include_cross_attention: False saves a copy. Pass False if every entry keeps its memory, as when hypotheses
                change places among the beams of one source.

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
    """Raises TypeError or ValueError unless count is an int of at least 1."""
    if not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether a and b have the same dtype, device, shape and values. Padding may hold NaN, so NaN equals NaN here."""
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _check_pair(key: Tensor, value: Tensor) -> None:
    """Raises ValueError unless key is (B, Hkv, L, D) and value is (B, Hkv, L, Dv)."""
    if key.dim() != 4:
        raise ValueError(f"key: expected shape (B, Hkv, L, D), got {tuple(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape {(*key.shape[:3], 'Dv')}, got {tuple(value.shape)}")


def _check_continues(name: str, buffer: Tensor, rows: Tensor) -> None:
    """Raises ValueError unless the new rows have the sizes, dtype and device of the rows in the cache."""
    batch, heads, _, columns = buffer.shape
    if (batch, heads, columns) != (rows.shape[0], rows.shape[1], rows.shape[3]):
        raise ValueError(
            f"{name}: expected shape {(batch, heads, 'L', columns)}, as in the cache, got {tuple(rows.shape)}"
        )
    if (buffer.dtype, buffer.device) != (rows.dtype, rows.device):
        raise ValueError(
            f"{name}: expected {buffer.dtype} on {buffer.device}, as in the cache, got {rows.dtype} on {rows.device}"
        )
