"""Keys and values that are kept between decoding steps, so that each step computes only its new tokens.

A decoder gets one `KVCache`. The parts of the cache go to the parts of the decoder:

- ``cache.layers[i]`` goes to layer i.
- ``cache.layers[i].self_attention`` goes to the self-attention of that layer. Its keys grow with every step.
- ``cache.layers[i].cross_attention`` goes to the cross-attention of that layer. Its keys are those of the encoder
  memory, and are computed once.

There are four kinds of `KVCache`. docs/caches.md says what each costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.nn.cache_checks import (
    WritableCopies,
    as_writable,
    check_count,
    check_indices,
    check_pair,
    check_target,
    select_entries,
)
from fused_attn.nn.paged_cache import PagedKVCache
from fused_attn.nn.paged_self_attention import PagedSelfAttentionCache
from fused_attn.nn.self_attention_cache import (
    SelfAttentionCache,
    SlidingSelfAttentionCache,
    StaticSelfAttentionCache,
)


class CrossAttentionCache(WritableCopies):
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

    is_filled_once = True

    def __init__(self):
        self._pair: tuple[Tensor, Tensor] | None = None
        self._memory: Tensor | None = None
        self._version: int | None = None  # of the memory; see `_version_of`

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_version": self._version == _version_of(self._memory)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy of a tensor counts anew. No tensor has version -1, so a memory that was written stays refused.
        self._version = _version_of(self._memory) if state.get("_version", True) else -1

    def __len__(self) -> int:
        """Number of rows of the memory; 0 before the first step."""
        return 0 if self._pair is None else self._pair[0].shape[2]

    @property
    def length(self) -> int:
        """Number of rows of the memory; 0 before the first step."""
        return len(self)

    def get(self, memory: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """(keys (B, Hkv, S, D), values (B, Hkv, S, Dv)), or None before the first step.

        Args:
            memory: the memory of this step, to be compared with the memory of the step before. The same tensor needs no
                comparison. The values of another tensor are compared, which waits for a GPU. After `reorder`, and in a
                traced graph, only the sizes are compared.

        Raises:
            ValueError: the cache was filled with another memory, or the memory was written in place since.
        """
        if self._pair is not None and memory is not None:
            self._check_memory(memory, batch=self._pair[0].shape[0])
        if self._pair is not None and torch.is_grad_enabled():  # autograd cannot save tensors of inference mode
            self._pair = as_writable(self._pair)
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
        check_pair(key, value)
        if self._pair is not None:
            raise RuntimeError("cross_attention cache: filled already; use a new KVCache for another memory")
        self._pair, self._memory, self._version = (key, value), memory, _version_of(memory)
        return self._pair

    def reorder(self, indices: Tensor) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was; see `KVCache.reorder`."""
        check_indices(indices)
        if self._pair is not None:
            key, value = self._pair
            self._pair = select_entries(key, indices), select_entries(value, indices)
            self._memory = None  # the next step brings the memory in the new order

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert the rows; see `KVCache.to`."""
        check_target(device, dtype)
        if self._pair is not None:
            key, value = self._pair
            self._pair = key.to(device, dtype), value.to(device, dtype)
            self._memory = None  # the next step brings the memory of the new device

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs."""
        return self._pair, self._memory, self._version

    def restore(self, state: tuple[Any, ...]) -> None:
        """Be what the cache was when `state` was called."""
        self._pair, self._memory, self._version = state

    def _check_memory(self, memory: Tensor, batch: int) -> None:
        """Raises ValueError if memory is not the memory that filled the cache.

        batch: the batch size of the cache
        """
        filled, hint = "the one that the cache was filled with", "use a new cache for another memory"
        version = _version_of(self._memory)
        if version is not None and self._version is not None and version != self._version:
            raise checks.fail("memory", filled, f"one that was written in place since; {hint}")
        if memory is self._memory:
            return
        length = self.length
        sizes = tuple(memory.shape[:-1])
        if sizes not in ((batch, length), (length, batch)) and not (batch == 1 and sizes == (length,)):
            expected = f"batch size {batch} and length {length}, as in the cache"
            raise checks.fail("memory", expected, f"shape {tuple(memory.shape)}; {hint}")
        can_compare = not (torch.compiler.is_compiling() or memory.is_meta)
        if self._memory is not None and can_compare and not _is_equal(memory, self._memory):
            raise checks.fail("memory", filled, f"another of shape {tuple(memory.shape)}; {hint}")
        self._memory, self._version = memory, _version_of(memory)


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
        self_attention: the cache of the self-attention. The default is a `SelfAttentionCache` with max_length.
    """

    def __init__(
        self,
        max_length: int | None = None,
        *,
        self_attention: SelfAttentionCache | StaticSelfAttentionCache | PagedSelfAttentionCache | None = None,
    ):
        if self_attention is not None and not hasattr(self_attention, "append"):
            raise checks.wrong_type("self_attention", "None or the cache of a self-attention", self_attention)
        if self_attention is not None and max_length is not None:
            raise checks.fail("max_length", "None beside self_attention, which has a length of its own", max_length)
        self.self_attention = SelfAttentionCache(max_length) if self_attention is None else self_attention
        self.cross_attention = CrossAttentionCache()


class KVCache:
    """The keys and values that a decoder, or a causal encoder, keeps between steps. The buffers grow with the target.

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
        check_count("num_layers", num_layers)
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    def __len__(self) -> int:
        """Number of layers. The number of tokens is `length`."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """Number of tokens in the cache, of the longest batch entry."""
        return self.layers[0].self_attention.length

    @property
    def position(self) -> int | Tensor:
        """The position of the next token: an int, or (B,) int64 on the device if the cache counts there."""
        return self.layers[0].self_attention.position

    def crop(self, length: int | Tensor) -> None:
        """Forget the tokens from token `length` on. Shorter batch entries stay as they are.

        Speculative decoding needs this: the main model reads several drafted tokens at once, and those that it does not
        accept are forgotten. The next tokens overwrite the forgotten ones. So results of ``update`` must no longer be
        used.

        >>> import torch
        >>> from fused_attn import KVCache
        >>> cache = KVCache(num_layers=1)
        >>> rows = torch.randn(3, 8, 5, 64)  # (B, Hkv, L, D)
        >>> _ = cache.layers[0].self_attention.update(rows, rows)
        >>> cache.crop(2)
        >>> cache.length
        2

        Args:
            length: the number of tokens that stay. A `StaticKVCache` also takes a tensor (B,) of integers on its
                device, a length for each batch entry. The host does not wait for it. From then on, the host no longer
                knows how full the cache is. Too many tokens then raise an error on the device, and not before.

        Raises:
            TypeError: length is neither an int nor a tensor that this cache takes.
            ValueError: length is negative, or not 0 for a `SlidingKVCache`, or a tensor of another shape or dtype. On
                a GPU, a negative length in a tensor is taken for 0.
        """
        for layer in self.layers:
            layer.self_attention.crop(length)

    def reorder(self, indices: Tensor, *, include_cross_attention: bool = True) -> None:
        """Batch entry n becomes what entry ``indices[n]`` was. Beam search needs this.

        >>> import torch
        >>> from fused_attn import KVCache
        >>> cache = KVCache(num_layers=1)
        >>> rows = torch.randn(3, 8, 5, 64)  # (B, Hkv, L, D)
        >>> _ = cache.layers[0].self_attention.update(rows, rows)
        >>> cache.reorder(torch.tensor([2, 0, 0]))  # keeps entry 2 once, entry 0 twice, and drops entry 1

        Args:
            indices: (new B,) int64 or int32, on the device of the cache. The new batch may be smaller or larger, except
                in a `StaticKVCache` or a `SlidingKVCache`, which are written in place. With a `PagedBatch`, the host
                reads the indices.
            include_cross_attention: False saves a copy. Pass False if every entry keeps its memory, as when hypotheses
                change places among the beams of one source.

        Raises:
            IndexError: on a CPU, an index is outside of [0, B). On a GPU, the kernel stops with an error. A
                `PagedBatch` raises ValueError.
            TypeError: indices is no tensor, or include_cross_attention is no bool.
            ValueError: indices has another shape or dtype.
        """
        check_indices(indices)
        checks.check_flag("include_cross_attention", include_cross_attention)
        for layer in self.layers:
            layer.self_attention.reorder(indices)
            if include_cross_attention:
                layer.cross_attention.reorder(indices)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Move the cache to a device, or convert keys and values to a dtype, in place.

        >>> import torch
        >>> from fused_attn import KVCache
        >>> cache = KVCache(num_layers=1)
        >>> rows = torch.randn(3, 8, 5, 64)  # (B, Hkv, L, D)
        >>> _ = cache.layers[0].self_attention.update(rows, rows)
        >>> keys, values = cache.to(dtype=torch.float64).layers[0].self_attention.update(rows.double(), rows.double())
        >>> keys.dtype
        torch.float64

        Args:
            device: the new device. None leaves the cache where it is.
            dtype: the new dtype. None leaves the dtype as it is.

        Returns:
            The cache.

        Raises:
            TypeError: device or dtype is of another type than torch takes.
            RuntimeError: there is no device of this name.
        """
        check_target(device, dtype)
        for layer in self.layers:
            layer.self_attention.to(device, dtype)
            layer.cross_attention.to(device, dtype)
        return self


class StaticKVCache(KVCache):
    """A `KVCache` with buffers of a fixed size, which are written in place at positions that the device knows.

    Every decoding step has the same shapes, and its Python code reads no length. So a step can be captured as a CUDA
    graph, and a compiled decoder is compiled once. `Seq2SeqTransformer.generate` uses this cache.

    >>> import torch
    >>> from fused_attn import TransformerDecoder, TransformerDecoderLayer
    >>> from fused_attn.nn import StaticKVCache
    >>> decoder = TransformerDecoder(TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> memory, newest_token = torch.randn(2, 10, 64), torch.randn(2, 1, 64)
    >>> cache = StaticKVCache(num_layers=2, max_length=16)
    >>> with torch.no_grad():
    ...     for _ in range(3):
    ...         newest_token = decoder(newest_token, memory, cache=cache)  # (B, 1, E), sees all earlier tokens
    >>> cache.position
    tensor([3, 3])

    Args:
        num_layers: the number of decoder layers.
        max_length: the longest target.

    Raises:
        TypeError: a number is no int.
        ValueError: a number is below 1.
    """

    def __init__(self, num_layers: int, max_length: int):
        check_count("num_layers", num_layers)
        self.max_length = max_length
        self._parts = [StaticSelfAttentionCache(max_length) for _ in range(num_layers)]
        self.layers = [LayerCache(self_attention=part) for part in self._parts]

    def reserve(self, max_length: int) -> None:
        """Give the buffers more rows, which copies them. A captured step must be captured again.

        Raises:
            TypeError: max_length is no int.
            ValueError: max_length is below 1.
        """
        for part in self._parts:
            part.reserve(max_length)
        self.max_length = max(self.max_length, max_length)


class SlidingKVCache(KVCache):
    """A `KVCache` of the newest tokens. A new token overwrites the oldest one, so the memory does not grow.

    Self-attention then has a sliding window: a token sees itself and the ``window - 1`` tokens before it.

    >>> import torch
    >>> from fused_attn import TransformerDecoder, TransformerDecoderLayer
    >>> from fused_attn.nn import SlidingKVCache
    >>> decoder = TransformerDecoder(TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> memory, newest_token = torch.randn(2, 10, 64), torch.randn(2, 1, 64)
    >>> cache = SlidingKVCache(num_layers=2, window=4)
    >>> with torch.no_grad():
    ...     for _ in range(10):
    ...         newest_token = decoder(newest_token, memory, cache=cache)  # (B, 1, E), sees the last 4 tokens
    >>> cache.position
    tensor([10, 10])

    Args:
        num_layers: the number of decoder layers.
        window: the number of tokens that a token sees, itself included.

    Raises:
        TypeError: a number is no int.
        ValueError: a number is below 1.
    """

    def __init__(self, num_layers: int, window: int):
        check_count("num_layers", num_layers)
        self.layers = [LayerCache(self_attention=SlidingSelfAttentionCache(window)) for _ in range(num_layers)]


class PagedBatch(KVCache):
    """A `KVCache` of sequences that lie in pages: the batch that a decoder computes now.

    Each layer of the decoder has a `PagedKVCache`. These outlive the batch: a later batch may have other sequences.
    Sequences may have different lengths. Decoding is for inference only.

    >>> import torch
    >>> from fused_attn import PagedKVCache, TransformerDecoder, TransformerDecoderLayer
    >>> from fused_attn.nn import PagedBatch
    >>> decoder = TransformerDecoder(TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2).eval()
    >>> pages = [PagedKVCache(num_pages=8, page_size=16, num_kv_heads=4, head_dim=16) for _ in decoder.layers]
    >>> for sequence in range(2):
    ...     assert all(layer.add() == sequence for layer in pages)
    >>> memory, newest_token = torch.randn(2, 10, 64), torch.randn(2, 1, 64)
    >>> cache = PagedBatch(pages, [0, 1])
    >>> with torch.no_grad():
    ...     for _ in range(3):
    ...         newest_token = decoder(newest_token, memory, cache=cache)  # (B, 1, E), sees all earlier tokens
    >>> cache.position
    tensor([3, 3])

    Args:
        pages: a `PagedKVCache` for each decoder layer, all with equally many pages of one size. So the first layer is
            the one that runs out of pages, and `OutOfPages` leaves all layers as they were.
        sequences: B different sequences, which have the same numbers and lengths in all layers.

    Attributes:
        sequences: the sequences of the batch. `reorder` gives them new numbers.

    Raises:
        TypeError: pages is no list, an entry of pages is no `PagedKVCache`, or sequences is no list of ints.
        ValueError: there are no pages, layers share a cache or differ, or a sequence is unknown or named twice.
    """

    def __init__(self, pages: Sequence[PagedKVCache], sequences: Sequence[int]):
        if not isinstance(pages, Sequence):
            raise TypeError(f"pages: expected a list with a PagedKVCache for each layer, got {type(pages).__name__}")
        if not pages:
            raise checks.fail("pages", "a PagedKVCache for each layer", "none")
        self._parts = [PagedSelfAttentionCache(layer, sequences) for layer in pages]
        if len({id(layer) for layer in pages}) != len(pages):
            raise checks.fail("pages", "a PagedKVCache of its own for each layer", "one cache for several layers")
        self.layers = [LayerCache(self_attention=part) for part in self._parts]
        first = pages[0]
        for i, layer in enumerate(pages):
            sizes, first_sizes = (tuple(x.key_pages.shape[:2]) for x in (layer, first))
            if sizes != first_sizes:
                expected = f"the (num_pages, page_size) of layer 0 in all layers, {first_sizes}"
                raise checks.fail("pages", expected, f"{sizes} in layer {i}")
            for sequence in sequences:
                length, first_length = layer.length(sequence), first.length(sequence)
                if length != first_length:
                    expected = f"the length of sequence {sequence} in layer 0 in all layers, {first_length}"
                    raise checks.fail("sequences", expected, f"{length} in layer {i}")

    @property
    def sequences(self) -> list[int]:
        """The sequences of the batch. `reorder` gives them new numbers."""
        return self._parts[0].sequences


def _version_of(memory: Tensor | None) -> int | None:
    """How often the memory, or a tensor that shares its storage, was written in place; None if nobody counts.

    Tensors of inference mode have no counter. In a traced graph, reading the counter would be an operator.
    """
    if memory is None or modes.is_dynamo_compiling() or memory.is_inference():
        return None
    return memory._version


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether a and b have the same dtype, device, shape and values. Padding may hold NaN, so NaN equals NaN here."""
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
