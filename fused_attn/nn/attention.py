"""`FusedMultiheadAttention`: `torch.nn.MultiheadAttention` on the fused kernel."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function_variadic

from fused_attn.api import fused_attention, fused_attention_paged, fused_attention_varlen
from fused_attn.attention import checks, jagged
from fused_attn.attention.dropout import draw_seed
from fused_attn.nn import native_attention, native_linear, strided
from fused_attn.nn.arguments import (
    accepts,
    batch_layout,
    check_backend,
    check_divides,
    check_sizes,
    given,
    runs_methods_of,
)
from fused_attn.nn.attention_checks import check_cache, check_heads, check_inputs, check_nested, check_projected
from fused_attn.nn.attention_mask import (
    CallMasks,
    Mask,
    believed_mask,
    cached_mask,
    mask_above,
    ranges_of_heads,
    with_ranges,
    without_padded_queries,
)
from fused_attn.nn.paged_self_attention import PagedRows
from fused_attn.nn.plain import FORWARDS
from fused_attn.nn.positions import RotaryEmbedding
from fused_attn.nn.restoring import restoring
from fused_attn.nn.self_attention_cache import CachedRows
from fused_attn.nn.tracing import call_node
from fused_attn.nn.weights import attention_weights


class AttentionCache(Protocol):
    """What `FusedMultiheadAttention` asks of a cache of rows that are appended.

    `fused_attn.nn.self_attention_cache` has the implementations.

    A cache with ``is_filled_once = True`` has the rows of a memory that does not grow, see `CrossAttentionCache`. It
    has two other methods:

    - ``get(memory)`` returns (keys, values), or None before the cache is filled. For another memory than that of the
      cache, ``get`` raises ValueError.
    - ``update(key, value, memory)`` fills the cache.

    A cache may also have ``state()`` and ``restore(state)``. After an error in a call, ``restore`` then makes the cache
    what the cache was when ``state`` was called. Without these methods, the rows of a failed call may stay.
    """

    #: Whether the first call fills the cache, and the later calls only read it.
    is_filled_once: bool

    @property
    def position(self) -> int | Tensor:
        """The position of the next row: an int, or (B,) int64 on the device."""

    def append(self, key: Tensor, value: Tensor) -> CachedRows | PagedRows:
        """Appends key (B, Hkv, L, D) and value (B, Hkv, L, D), and returns what attention of these rows reads."""


class FusedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose output always comes from the fused kernel.

    Constructor, forward contract and state-dict keys are those of the parent class. The arguments after `dtype` are
    new. State dicts load both ways as long as the new options are off.

    >>> import torch
    >>> from fused_attn import FusedMultiheadAttention
    >>> attention = FusedMultiheadAttention(64, 4, batch_first=True)
    >>> x = torch.randn(2, 10, 64)  # (N, L, E)
    >>> is_padding = torch.arange(10) >= torch.tensor([[10], [7]])  # (N, S), True = ignore this key
    >>> out, weights = attention(x, x, x, key_padding_mask=is_padding)
    >>> out.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))

    With a cache, each call takes only the new tokens:

    >>> from fused_attn.nn import SelfAttentionCache
    >>> cache = SelfAttentionCache()
    >>> with torch.no_grad():
    ...     for token in x.split(1, dim=1):  # (N, 1, E)
    ...         out, _ = attention(token, token, token, need_weights=False, cache=cache)  # sees all tokens so far
    >>> cache.length
    10

    The parent class can return NaN for a query that sees no key. Here, the output of such a query is the bias of
    ``out_proj``, its weights are 0 and its gradients are 0.

    Padded keys and values may hold anything, also NaN. The output does not change. The projections, however, read every
    row of the inputs, so NaN in a padded row reaches the gradient of ``in_proj_weight``.

    Args:
        embed_dim: E.
        num_heads: H. The head dim D is E / H.
        dropout: the probability of dropping an attention weight in training mode.
        bias: whether the input and output projections have biases.
        add_bias_kv: append a learnable row to the keys and one to the values.
        add_zero_attn: append a row of zeros to the keys and one to the values.
        kdim: features of the keys. The default is E.
        vdim: features of the values. The default is E.
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        num_kv_heads: heads of keys and values (grouped-query attention), a divisor of H. The default is H. The
            projections of keys and values have ``num_kv_heads * D`` rows.
        rotary: True, or the base of the angles. Queries and keys are then rotated by their positions, see
            `RotaryEmbedding`. True means the base 10000.0.
        relative_bias: a callable from ``(seqlen_q, seqlen_k)`` to a bias (H, L + S - 1), one entry for each distance
            between query and key; see `fused_attention`. `T5RelativeBias` is such a callable.
        skip_padded_queries: leave out the queries, too, that key_padding_mask ignores as keys, where one tensor is
            query and key. Their output is then the bias of ``out_proj``, and the gradients of their scores are 0.
            The output of all other rows stays the same. NaN in a padded row can still reach the gradients of other
            rows, because 0 * NaN is NaN. The option saves time in long batches of unequal lengths, whose padded rows
            nobody reads. Three kinds of calls compute the padded rows nevertheless: with weights (``need_weights``,
            which is True by default), with a cache, or with a floating-point attn_mask that is not causal.
        backend: see `fused_attention`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that does not fit. If num_heads does not divide embed_dim, the error is also
            an AssertionError, as in the parent class.
    """

    skip_padded_queries = False  # for modules that were pickled before there was this option
    _group_size = 1  # the number of heads of queries for each head of keys and values

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        num_kv_heads: int | None = None,
        rotary: bool | float | None = None,
        relative_bias: Callable[[int, int], Tensor] | None = None,
        skip_padded_queries: bool = False,
        backend: str | None = None,
    ):
        check_sizes(1, embed_dim=embed_dim, num_heads=num_heads)
        check_sizes(0, kdim=kdim, vdim=vdim)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        checks.check_probability("dropout", dropout)
        checks.check_flags(
            bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first,
            skip_padded_queries=skip_padded_queries,
        )  # fmt: skip
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if num_kv_heads is not None:
            checks.check_integer("num_kv_heads", num_kv_heads, "None or an int")
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise checks.fail("num_kv_heads", f"a divisor of num_heads={num_heads}", num_kv_heads)
        if relative_bias is not None and not callable(relative_bias):
            expected = "a callable (seqlen_q, seqlen_k) -> (H, L + S - 1)"
            raise checks.wrong_type("relative_bias", expected, relative_bias)
        heads_of_bias = getattr(relative_bias, "num_heads", num_heads)
        if heads_of_bias != num_heads:
            expected = f"a {type(relative_bias).__name__} with num_heads={num_heads}"
            raise checks.fail("relative_bias", expected, f"one with num_heads={heads_of_bias}")
        if relative_bias is not None and (add_bias_kv or add_zero_attn):
            expected = "None with add_bias_kv or add_zero_attn, whose rows are at no distance from a query"
            raise checks.fail("relative_bias", expected, type(relative_bias).__name__)
        self._group_size = num_heads // (num_kv_heads or num_heads)
        self.rotary = _rotary(rotary, self.head_dim)
        self.relative_bias = relative_bias
        self.skip_padded_queries = skip_padded_queries
        check_backend(backend)
        self.backend = backend
        if self.num_kv_heads != num_heads:
            self._drop_kv_rows()
            self._reset_parameters()

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, backend: str | None = None, *, skip_padded_queries: bool = False
    ) -> FusedMultiheadAttention:
        """A fused module that shares parameters, hooks and training mode with a `torch.nn.MultiheadAttention`.

        >>> import torch
        >>> from fused_attn import FusedMultiheadAttention
        >>> module = torch.nn.MultiheadAttention(64, 4)
        >>> fused = FusedMultiheadAttention.from_torch(module)
        >>> fused.in_proj_weight is module.in_proj_weight
        True

        Args:
            module: the module to share with.
            backend: see `fused_attention`.
            skip_padded_queries: see the constructor.

        Raises:
            TypeError: the module is no `torch.nn.MultiheadAttention`, or it is a `FusedMultiheadAttention` already; or
                skip_padded_queries is no bool.
            ValueError: the module has a forward of its own, or is parametrised: the fused module would use neither. Or
                there is no backend of this name, or the module's dropout is no probability.
        """
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, FusedMultiheadAttention):
            raise checks.wrong_type("module", "a torch.nn.MultiheadAttention", module)
        if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
            raise checks.fail("module", "the forward of torch.nn.MultiheadAttention", "a forward of its own")
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            expected = "no parametrisation, which torch.nn.utils.parametrize.remove_parametrizations can remove"
            raise checks.fail("module", expected, f"one of {', '.join(module.parametrizations)}")
        check_backend(backend)
        checks.check_flag("skip_padded_queries", skip_padded_queries)
        checks.check_probability("dropout", module.dropout)
        fused = cls.__new__(cls)
        # Both modules have the same dicts of parameters and hooks, so optimizers and handles of hooks stay valid.
        fused.__dict__.update(module.__dict__)
        # If module.compile() was called, its result would call the old module.
        fused.__dict__.pop("_compiled_call_impl", None)
        fused.__dict__.pop("head_dim", None)  # a property here
        fused.rotary = fused.relative_bias = None
        fused.skip_padded_queries = skip_padded_queries
        fused.backend = backend
        return fused

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Modules that were pickled before these two were properties
        num_kv_heads = self.__dict__.pop("num_kv_heads", None)
        self.__dict__.pop("head_dim", None)
        if num_kv_heads is not None:
            self._group_size = self.num_heads // num_kv_heads

    @property
    def head_dim(self) -> int:
        """D. The parent class divides in every call, so num_heads may be changed after construction."""
        return self.embed_dim // self.num_heads

    @head_dim.setter
    def head_dim(self, head_dim: int) -> None:
        # The constructor of the parent class sets the attribute, and so do tools that change num_heads.
        if head_dim != self.head_dim:
            raise checks.fail("head_dim", f"embed_dim // num_heads = {self.head_dim}", head_dim)

    @property
    def num_kv_heads(self) -> int:
        """Hkv. If num_heads is changed after construction, this number changes by the same factor."""
        return self.num_heads // self._group_size

    @num_kv_heads.setter
    def num_kv_heads(self, num_kv_heads: int) -> None:
        if num_kv_heads != self.num_kv_heads:
            raise checks.fail("num_kv_heads", f"{self.num_kv_heads}, for which the projections were made", num_kv_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_ranges: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`, all of the dtype of the module unless autocast is on.

        Args:
            query: (L, N, E), or (N, L, E) with batch_first, or (L, E).
            key: (S, N, kdim), or (N, S, kdim) with batch_first, or (S, kdim).
            value: (S, N, vdim), or (N, S, vdim) with batch_first, or (S, vdim).
            key_padding_mask: (N, S), or (S,) without a batch. Bool: True = ignore the key, and blocks of such keys are
                skipped. Floating point: added to the scores.
            need_weights: also return the weights, which take O(L * S) memory. The output is the same with them.
            attn_mask: (L, S) or (N * H, L, S). Bool: True = may NOT attend. Floating point: added to the scores. A
                causal bias of ``torch.nn.attention.bias`` takes no memory.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that attn_mask is the causal mask. As in the parent class, the hint is believed and
                attn_mask is not read, unless weights are wanted or a key_padding_mask is given. Without an attn_mask,
                is_causal=True means the causal mask itself, where the parent class raises. Every query sees the rows of
                add_bias_kv and add_zero_attn under this causal mask. As a hint, is_causal=True hides these rows, which
                stand behind the last key, as in the parent class.
            key_ranges: (L, R, 2), (N, L, R, 2) or (N, H, L, R, 2) int32, where N and H may be 1. A query sees only
                keys of its R ranges, see `fused_attention`. The batch comes first whether batch_first is True or False.
                With is_causal or a mask, a query sees the keys that both show. The ranges do not hide the rows of
                add_bias_kv and add_zero_attn. Of the caches, only a `CrossAttentionCache` can be used with ranges.
            cache: the keys and values of earlier calls.
                A `SelfAttentionCache` makes the call causal: query i has the position ``cache.position + i`` and sees
                all rows up to its own. key_padding_mask then covers all rows so far. With a `StaticSelfAttentionCache`,
                key_padding_mask covers the whole buffer. With a `SlidingSelfAttentionCache`, a query sees a window, and
                key_padding_mask must be None. With a `PagedSelfAttentionCache`, key_padding_mask must be None, too.
                Such a cache is for inference only.
                A `CrossAttentionCache` keeps the projections of the first `key` and `value`. Later calls must bring the
                same `key`, which nobody has written in place since. Their `value` is not read.

        Two kinds of nested tensors (N, length, E) are accepted:

        - ``layout=torch.jagged``, for query, key and value, if batch_first is set. is_causal=True then means the causal
          mask. need_weights must be False. Masks, ranges, caches and rotary embeddings are refused. See
          `fused_attention` for the offsets of key and value.
        - ``layout=torch.strided``, if one tensor is query, key and value, and batch_first is set. torch's own encoder
          makes such a tensor of a padded one in eval mode. The module may have all other options. is_causal=True means
          the causal mask. The weights are dense, and zero where the query or the key does not exist. Masks, ranges and
          caches are refused.

        Returns:
            out: the shape of query, with E features.
            weights: None without need_weights. Otherwise (N, L, S), or (N, H, L, S) without averaging, after dropout.
                N is missing if query has no batch. S includes the rows of add_bias_kv and add_zero_attn.

        Raises:
            AssertionError: a shape or the dtype of a mask does not fit, as in the parent class.
            RuntimeError: a size, dtype or device does not fit, as in the parent class.
            TypeError: query, key, value, a mask or key_ranges is no tensor, key_ranges are not int32, a flag is no
                bool, or `cache` is not the cache of an attention module.
            ValueError: the cache or key_ranges does not fit the call, or a `CrossAttentionCache` was filled with
                another `key`.
        """
        # Some calls leave early. fx records the whole call as one node, because it cannot trace the branches below.
        # Nested tensors have no common length. For small inputs, and for a step of decoding, the Python code below
        # takes longer than a kernel, so `native_attention` does without most of that code.
        if has_torch_function_variadic(query, key, value):
            options = given(key_ranges=key_ranges, cache=cache)
            arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            node = call_node(self, query, key, value, *arguments, **options)
            if node is not None:
                return node
        if not type(need_weights) is type(average_attn_weights) is type(is_causal) is bool:
            checks.check_flags(
                need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal
            )
        if not self.num_heads or self.embed_dim % self.num_heads or self.num_heads % self._group_size:
            check_heads(self)
        if jagged.is_nested(query, key, value):
            is_padded = query is key and key is value and strided.is_strided(query)
            check_nested(self, key_padding_mask, need_weights, attn_mask, key_ranges, cache, is_padded)
            if is_padded:
                return self._strided_forward(query, is_causal, need_weights, average_attn_weights)
            return self._nested_forward(query, key, value, is_causal), None
        check_inputs(self, query, key, value, key_padding_mask, attn_mask)
        is_self = query is key and key is value
        is_bare = is_self and cache is None and key_ranges is None and not need_weights
        if is_bare and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            is_believed = is_causal and type(attn_mask) is Tensor and key_padding_mask is None
            is_skipping = self.skip_padded_queries and key_padding_mask is not None
            if (is_believed or attn_mask is None) and not is_skipping:
                call = native_attention.self_attention(self, query, key_padding_mask, is_causal)
                if call is not None:
                    return call.run(), None
        if key_ranges is not None:
            key_ranges = ranges_of_heads("key_ranges", key_ranges, query, self)
        masks = CallMasks(key_padding_mask, attn_mask, is_causal, key_ranges)
        average_weights = average_attn_weights if need_weights else None
        if cache is None:
            return self._dense_forward(query, key, value, masks, average_weights)
        check_cache(self, query, key, cache, key_padding_mask, need_weights, attn_mask, is_causal)
        if key_ranges is not None and not cache.is_filled_once:
            raise checks.fail("key_ranges", "None with a self-attention cache", "a tensor")
        if attn_mask is None and key_ranges is None and not need_weights:
            step = native_attention.attention_step(self, query, key, key_padding_mask, is_causal, is_self, cache)
            if step is not None:
                return step.run(), None
        with restoring((cache,)):
            return self._dense_forward(query, key, value, masks, average_weights, cache)

    def _dense_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: CallMasks,
        average_weights: bool | None,
        cache: AttentionCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The results of `forward` for dense tensors, with arguments that have been checked.

        average_weights: None if no weights are wanted
        """
        need_weights = average_weights is not None
        is_batched = query.dim() == 3
        seq_dim = 1 if self.batch_first or not is_batched else 0
        rows = self._projected_rows(query, key, value, seq_dim, cache)
        if not is_batched and masks.key_padding_mask is not None:
            masks = masks._replace(key_padding_mask=masks.key_padding_mask.unsqueeze(0))
        if isinstance(rows.cached, PagedRows):
            return self._merge_heads(self._paged_attention(rows.q, rows.cached), seq_dim, is_batched), None
        mask = self._mask_of_call(rows, masks, need_weights)
        skips_padding = self.skip_padded_queries and query is key and cache is None and not need_weights
        out, weights = self._attention(rows, mask, masks, average_weights, skips_padding)
        if weights is not None and not is_batched:
            weights = weights.squeeze(0)
        return self._merge_heads(out, seq_dim, is_batched), weights

    def _projected_rows(
        self, query: Tensor, key: Tensor, value: Tensor, seq_dim: int, cache: AttentionCache | None
    ) -> _Rows:
        """The first step of a call: the projections of the inputs, after the rows that the cache holds.

        A `CrossAttentionCache` that is filled has the projections of key and value, so these are not computed.

        seq_dim: the dimension of the inputs that counts positions, once they have a dimension for the batch
        """
        is_self, shares_kv = query is key and key is value, key is value
        store: Any = cache  # typed as Any, because only a cache that is filled once has `get`
        stored = store.get(key) if cache is not None and cache.is_filled_once else None
        memory = key
        if query.dim() != 3:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        is_growing = cache is not None and not cache.is_filled_once
        needs_position = is_growing and (self.rotary is not None or self.relative_bias is not None)
        position = store.position if needs_position else 0
        if stored is not None:
            q = self._split_heads(self._project_query(query), seq_dim)
            k, v = stored
        else:
            q, k, v = self._project(query, key, value, is_self, shares_kv)
            q, k = self._split_heads(q, seq_dim, position), self._split_heads(k, seq_dim, position)
            v = self._split_heads(v, seq_dim)
        if k.shape[0] != q.shape[0]:
            raise RuntimeError(
                f"key: expected the batch size of query, {q.shape[0]}, got {k.shape[0]}; "
                + batch_layout(self.batch_first)
            )
        cached = store.append(k, v) if is_growing else None
        if isinstance(cached, CachedRows):
            k, v = cached.keys, cached.values
        elif cache is not None and cache.is_filled_once and stored is None:
            k, v = store.update(k, v, memory)
        return _Rows(q, k, v, position, cached)

    def _mask_of_call(self, rows: _Rows, masks: CallMasks, need_weights: bool) -> Mask:
        """The second step of a call: where the diagonal lies, and attn_mask as `fused_attention` takes masks.

        `fused_attention` knows no positions, so the diagonal of rows behind a cache is decided here.
        """
        seqlen_q = rows.q.shape[2]
        key_padding_mask, attn_mask, is_causal, _ = masks
        if isinstance(rows.cached, CachedRows):
            mask = cached_mask(rows.cached, seqlen_q)
        elif is_causal and attn_mask is None:
            # Every query sees the appended rows. No diagonal can express this, so the mask becomes dense.
            mask = Mask(mask_above(0, seqlen_q, rows.k), None) if self._num_appended else Mask(None, 0)
        else:
            mask = believed_mask(attn_mask, is_causal, key_padding_mask is None and not need_weights)
        return self._checked_mask(mask, key_padding_mask, seqlen_q, rows.k)

    def _attention(
        self,
        rows: _Rows,
        mask: Mask,
        masks: CallMasks,
        average_weights: bool | None,
        skips_padding: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The third step of a call: the attention of the heads, (N, H, L, D), and the weights if they are wanted.

        The kernel forms no weights. `attention_weights` computes the weights that the kernel has used. So both
        functions get the same arguments, and the seed of dropout is drawn here.
        """
        q, k, v = rows.q, self._append_rows(rows.k, self.bias_k), self._append_rows(rows.v, self.bias_v)
        need_weights = average_weights is not None
        arguments: dict[str, Any] = {
            "key_padding_mask": self._padded(masks.key_padding_mask),
            "dropout_p": self.dropout if self.training else 0.0,
            "scale": 1.0 / math.sqrt(self.head_dim),
        }
        options = rows.cached.options if isinstance(rows.cached, CachedRows) else None
        if options:
            arguments |= options
            mask = Mask(arguments.pop("attn_mask", None), None)
            if self.relative_bias is not None:
                mask = Mask(self._dense_bias(q, arguments["key_lengths"], k.shape[2]), None)
        else:
            arguments["relative_bias"] = self._relative_bias(q, rows.position, k.shape[2])
        if need_weights and arguments["dropout_p"]:
            arguments["dropout_seed"] = draw_seed(q.device)
        key_ranges = self._padded_ranges(masks.key_ranges, rows.k.shape[2])
        seen, is_causal = mask.attn_mask, mask.attn_mask is None and mask.diagonal is not None
        if skips_padding and masks.key_padding_mask is not None:
            seen, is_causal = without_padded_queries(mask, masks.key_padding_mask)
        out: Any = fused_attention(
            q, k, v, seen, is_causal=is_causal, key_ranges=key_ranges,
            enable_gqa=self.num_kv_heads != self.num_heads, return_lse=need_weights, backend=self.backend, **arguments,
        )  # fmt: skip
        if not need_weights:
            return out, None
        out, lse = out
        of_weights = mask.attn_mask if mask.diagonal is None else mask_above(mask.diagonal, q.shape[2], k).logical_not()
        weights = attention_weights(q, k, lse, attn_mask=with_ranges(of_weights, key_ranges, k.shape[2]), **arguments)
        return out, (weights.mean(dim=1) if average_weights else weights).to(out.dtype)

    def _paged_attention(self, q: Tensor, rows: PagedRows) -> Tensor:
        """The attention (N, H, L, D) of the last rows of sequences, q (N, H, L, D), over pages."""
        out: Any = fused_attention_paged(q, *rows, is_causal=True, backend=self.backend)
        return out

    def _merge_heads(self, out: Tensor, seq_dim: int, is_batched: bool) -> Tensor:
        """The output of the module: (N, L, E) or (L, N, E), or (L, E), of the heads (N, H, L, D)."""
        # No copy is made, because the memory order of out follows that of q.
        out = out.transpose(1, 2) if seq_dim == 1 else out.permute(2, 0, 1, 3)
        out = native_linear.call(self.out_proj, out.flatten(-2))
        return out if is_batched else out.squeeze(0)

    def _nested_forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """The output for jagged tensors: query (N, length, E), key (N, length, kdim), value (N, length, vdim).

        The output is jagged, too: (N, length, E), with the lengths of the query.
        """
        q, k, v = jagged.pack_all(query, key, value, length_dim=1)
        is_self, shares_kv = query is key and key is value, key is value
        query, key, value = q.rows, k.rows, v.rows
        projected = self._project(query, key, value, is_self, shares_kv)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)  # (total, heads, D)
        out: Any = fused_attention_varlen(
            query, key, value, q.offsets.int(), k.offsets.int(), q.max_seqlen, k.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            relative_bias=None if self.relative_bias is None else self.relative_bias(q.max_seqlen, k.max_seqlen),
            backend=self.backend,
        )  # fmt: skip
        return q.like(self.out_proj(out.flatten(-2)))

    def _strided_forward(
        self, x: Tensor, is_causal: bool, need_weights: bool, average_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The self-attention of x, a nested tensor (N, length, E); the output has the same layout and shape.

        The method calls `forward` with a padded copy of x, because all options of the module work with padded tensors.
        """
        rows, is_padding, lengths = strided.pad(x)
        out, weights = self.forward(rows, rows, rows, is_padding, need_weights, None, average_weights, is_causal)
        if weights is not None:
            is_missing = is_padding if average_weights else is_padding[:, None]
            weights = weights.masked_fill(is_missing[..., None], 0.0)
        return strided.unpad(out, lengths), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_self: bool, shares_kv: bool) -> tuple[Tensor, ...]:
        """The projections of query (..., E), key (..., kdim) and value (..., vdim).

        Their shapes are (..., E), (..., Hkv * D) and (..., Hkv * D).

        is_self: query, key and value are one tensor, so that one matrix product computes all three projections
        shares_kv: key and value are one tensor, so that two products are enough
        """
        try:
            return self._products(query, key, value, is_self, shares_kv)
        except RuntimeError:
            check_projected(self, query, key, value)
            raise

    def _products(
        self, query: Tensor, key: Tensor, value: Tensor, is_self: bool, shares_kv: bool
    ) -> tuple[Tensor, ...]:
        """`_project`, with torch's own errors."""
        kv_dim = self.num_kv_heads * self.head_dim
        sizes: tuple[int, ...] = (self.embed_dim, kv_dim, kv_dim)
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif is_self:
            return native_linear.linear(query, self.in_proj_weight, bias).split_with_sizes(sizes, dim=-1)
        elif shares_kv:
            sizes = (self.embed_dim, 2 * kv_dim)
            weights = self.in_proj_weight.split(sizes)
            biases = (None, None) if bias is None else bias.split(sizes)
            keys_values = native_linear.linear(key, weights[1], biases[1])
            return native_linear.linear(query, weights[0], biases[0]), *keys_values.chunk(2, dim=-1)
        else:
            weights = self.in_proj_weight.split(sizes)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        return tuple(native_linear.linear(*args) for args in zip((query, key, value), weights, biases, strict=True))

    def _project_query(self, query: Tensor) -> Tensor:
        """The projection (..., E) of query (..., E) alone, for calls whose cache holds the keys and values."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight[: self.embed_dim]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.embed_dim]
        try:
            return native_linear.linear(query, weight, bias)
        except RuntimeError:
            check_projected(self, query)
            raise

    def _split_heads(self, x: Tensor, seq_dim: int, position: int | Tensor | None = None) -> Tensor:
        """Turns x, (N, L, heads * D) or (L, N, heads * D), into a view (N, heads, L, D).

        seq_dim: the dimension of x that counts positions, 1 or 0
        position: the position of the first row, or that of each batch entry (N,). A module with `rotary` rotates the
            rows by their positions. None means that no row is rotated, as values need it
        """
        x = x.view(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim)
        if self.rotary is not None and position is not None:
            x = self.rotary(x, seq_dim, position)
        return x.transpose(1, 2) if seq_dim == 1 else x.permute(1, 2, 0, 3)

    def _relative_bias(self, q: Tensor, position: int | Tensor, seqlen_k: int) -> Tensor | None:
        """The relative bias of queries q (N, H, L, D), (H, L + S - 1) or (L + S - 1,); None if the module has none.

        position: the position of the first query
        """
        if self.relative_bias is None:
            return None
        assert isinstance(position, int), "a cache that counts on the device takes a dense bias"
        # The callable returns the bias of queries that begin at position 0. The queries of this call are the last L of
        # these. The bias begins with the most negative distances between key and query, which belong to the last
        # queries. So the first L + S - 1 columns are the bias of this call.
        seqlen_q = q.shape[2]
        bias = self._checked_bias(q, position + seqlen_q, seqlen_k)
        return bias[..., : max(seqlen_q + seqlen_k - 1, 0)] if position else bias

    def _dense_bias(self, q: Tensor, key_lengths: Tensor, seqlen_k: int) -> Tensor:
        """(N, H, L, S): the relative bias of q (N, H, L, D), the last rows of the batch entries; -inf for later keys.

        Batch entries may have different lengths, so the distances of a query to the same column differ.
        """
        seqlen_q = q.shape[2]
        key = torch.arange(seqlen_k, device=key_lengths.device)
        query = (key_lengths - seqlen_q)[:, None] + key[:seqlen_q]  # (N, L)
        distance = key - query[:, :, None]  # (N, L, S)
        by_distance = self._checked_bias(q, seqlen_k, seqlen_k).expand(self.num_heads, -1)
        dense = by_distance[:, distance + (seqlen_k - 1)].transpose(0, 1)
        return dense.masked_fill(distance[:, None] > 0, -math.inf)

    def _checked_bias(self, q: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
        """What the callable `relative_bias` returns for the lengths.

        `fused_attention` checks the bias, too, but only after the columns of a call have been cut out.

        Raises:
            TypeError, ValueError: the bias is no tensor, or its dtype, device or shape does not fit.
        """
        by_distance: Any = self.relative_bias
        if isinstance(seqlen_q, Tensor) or isinstance(seqlen_k, Tensor):
            # torch.jit.trace makes tensors of lengths. The callable takes ints, so the trace is for these lengths only.
            seqlen_q, seqlen_k = int(seqlen_q), int(seqlen_k)
        bias = by_distance(seqlen_q, seqlen_k)
        metas = checks.meta("relative_bias", bias), checks.meta("query", q)
        checks.check_relative_bias(*metas, self.num_heads, seqlen_q, seqlen_k)
        return bias

    def _append_rows(self, x: Tensor, row: Tensor | None) -> Tensor:
        """x (N, Hkv, S, D), the keys or the values, with the rows of add_bias_kv and add_zero_attn at its end.

        row: the learnable row, which is bias_k for keys and bias_v for values, (1, 1, Hkv * D). None without
            add_bias_kv
        """
        rows = [x]
        if row is not None:
            row = row.to(x.dtype).view(1, self.num_kv_heads, 1, self.head_dim)
            rows.append(row.expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            rows.append(x.new_zeros(*x.shape[:2], 1, self.head_dim))
        return torch.cat(rows, dim=2) if len(rows) > 1 else x

    @property
    def takes_key_ranges(self) -> bool:
        """Whether ranges of keys may be passed. A subclass may have a forward with torch's signature."""
        return accepts(self.forward, "key_ranges")

    @property
    def takes_is_causal(self) -> bool:
        """Whether is_causal=True without a mask is the causal mask. The forward of a subclass may not read the flag.

        Wrappers of the module (checkpoint, compile) pass this attribute on.
        """
        return runs_methods_of(FusedMultiheadAttention, self, "forward")

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed to forward."""
        return not self._num_appended and accepts(self.forward, "cache")

    @property
    def _num_appended(self) -> int:
        """The number of rows that add_bias_kv and add_zero_attn append to the keys: 0, 1 or 2."""
        return (self.bias_k is not None) + self.add_zero_attn

    def _checked_mask(self, mask: Mask, key_padding_mask: Tensor | None, seqlen_q: int, key: Tensor) -> Mask:
        """Turns a mask of this module into a mask of `fused_attention`, and checks its shape and that of the padding.

        In a bool mask of `fused_attention`, True means that the query sees the key, which is the opposite of the
        meaning here. A mask for each head has the shape (N, H, L, S) there and (N * H, L, S) here.

        key: the projected keys, (N, Hkv, S, D)

        Raises:
            AssertionError: key_padding_mask has the wrong shape.
            RuntimeError: attn_mask has the wrong shape.
        """
        batch, seqlen_k = key.shape[0], key.shape[2]
        if key_padding_mask is not None and key_padding_mask.shape != (batch, seqlen_k):
            raise AssertionError(
                f"key_padding_mask: expected shape (N, S) = {(batch, seqlen_k)}, got {tuple(key_padding_mask.shape)}; "
                + batch_layout(self.batch_first)
            )
        attn_mask, diagonal = mask
        if attn_mask is None:
            return mask
        sizes = (seqlen_q, seqlen_k)
        if diagonal is not None:
            # attn_mask is a causal bias of torch.nn.attention.bias, which holds two lengths and no data. It stays as it
            # is, unless rows are appended. Every query sees these, so the mask becomes dense.
            bias: Any = attn_mask
            got: tuple[int, ...] = (bias.seq_len_q, bias.seq_len_kv)
            if got != sizes:
                raise RuntimeError(f"attn_mask: expected a causal bias for (L, S) = {sizes}, got one for {got}")
            if not self._num_appended:
                return mask
            attn_mask = mask_above(diagonal, seqlen_q, key)
        expected = sizes if attn_mask.dim() == 2 else (batch * self.num_heads, *sizes)
        if attn_mask.shape != expected:
            got = tuple(attn_mask.shape)
            name = "(L, S)" if attn_mask.dim() == 2 else "(N * num_heads, L, S)"
            raise RuntimeError(
                f"attn_mask: expected shape {name} = {expected}, got {got}; {batch_layout(self.batch_first)}"
            )
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        padded: Any = self._padded(attn_mask)
        return Mask(padded.logical_not() if padded.dtype == torch.bool else padded, None)

    def _padded(self, mask: Tensor | None) -> Tensor | None:
        """A mask (..., S) of this module, with further columns for the rows that `_append_rows` appends to the keys.

        These columns hold False in a bool mask and 0.0 in a floating-point mask. Both mean that every query sees the
        row.
        """
        return F.pad(mask, (0, self._num_appended)) if mask is not None and self._num_appended else mask

    def _padded_ranges(self, key_ranges: Tensor | None, seqlen_k: int) -> Tensor | None:
        """Ranges (..., R, 2) of S keys, with a further range of the rows that `_append_rows` appends to the keys."""
        if key_ranges is None or not self._num_appended:
            return key_ranges
        # A tensor of numbers of Python would be a constant in a traced graph, and a copy for which a GPU waits.
        end = seqlen_k + self._num_appended
        appended = torch.arange(seqlen_k, end + 1, self._num_appended, dtype=torch.int32, device=key_ranges.device)
        return torch.cat([key_ranges, appended.expand(*key_ranges.shape[:-2], 1, 2)], dim=-2)

    def _drop_kv_rows(self) -> None:
        """Removes rows of the parameters, so that keys and values have `num_kv_heads` heads instead of `num_heads`.

        The caller initialises the parameters again.
        """
        kv_dim = self.num_kv_heads * self.head_dim
        packed = self.embed_dim + 2 * kv_dim
        for name, size in (
            ("in_proj_weight", packed), ("in_proj_bias", packed), ("k_proj_weight", kv_dim), ("v_proj_weight", kv_dim),
        ):  # fmt: skip
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[:size].clone()))
        for name in ("bias_k", "bias_v"):
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[..., :kv_dim].clone()))


FORWARDS[FusedMultiheadAttention] = FusedMultiheadAttention.forward


class _Rows(NamedTuple):
    """The projected rows of one call, in heads. Behind a cache, keys and values are those of all rows so far."""

    q: Tensor  # (N, H, L, D)
    k: Tensor  # (N, Hkv, S, D)
    v: Tensor  # (N, Hkv, S, D)
    position: int | Tensor  # of the first query, if the module needs positions; otherwise 0
    cached: CachedRows | PagedRows | None  # what a cache of self-attention returned. With pages, k and v are new rows


def _rotary(rotary: bool | float | None, head_dim: int) -> RotaryEmbedding | None:
    """The module for the argument `rotary` of `FusedMultiheadAttention`; None if the argument turns it off."""
    if rotary is None or rotary is False:
        return None
    if rotary is not True:
        expected = "None, a bool or the base of the angles, a positive number"
        if not isinstance(rotary, numbers.Real):
            raise checks.wrong_type("rotary", expected, rotary)
        if not 0.0 < rotary < math.inf:
            raise checks.fail("rotary", expected, rotary)
    if head_dim % 2:
        raise checks.fail("rotary", f"None with head_dim={head_dim}, whose columns form no pairs", rotary)
    if rotary is True:
        return RotaryEmbedding(head_dim)
    return RotaryEmbedding(head_dim, float(rotary))
