"""The masks of a call of `FusedMultiheadAttention`, as `fused_attention` takes them: from attn_mask, is_causal, padding
and the cache to one mask, and ranges of keys with a dimension for the heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import checks
from fused_attn.attention.causal_bias import causal_bias_offset
from fused_attn.attention.masks import visible_in_ranges
from fused_attn.nn.arguments import batch_layout
from fused_attn.nn.self_attention_cache import CachedRows, lower_right


class CallMasks(NamedTuple):
    """The masks that the caller of a module has given. key_ranges are what `ranges_of_heads` returns."""

    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    key_ranges: Tensor | None


class Mask(NamedTuple):
    """The attn_mask of one call."""

    #: A mask (L, S) or (N, H, L, S), or None. If `diagonal` is set, this is the causal bias of that diagonal, or None
    #: for the diagonal 0.
    attn_mask: Tensor | None
    #: With a number, query i sees the keys j <= i + diagonal. None means that there is no causal mask.
    diagonal: int | None


def believed_mask(attn_mask: Tensor | None, is_causal: bool, is_believed: bool) -> Mask:
    """The mask of a call without a self-attention cache.

    is_causal: the hint that attn_mask is the causal mask
    is_believed: whether the hint is followed without a look at attn_mask. If not, attn_mask alone decides
    """
    diagonal = None if attn_mask is None else causal_bias_offset(attn_mask)
    if is_causal and is_believed and diagonal is None:
        # The diagonal hides the appended rows, too. The parent class does the same.
        return Mask(None, 0)
    return Mask(attn_mask, diagonal)


def with_ranges(attn_mask: Tensor | None, key_ranges: Tensor | None, seqlen_k: int) -> Tensor | None:
    """An attn_mask of `fused_attention`, in which True means attend, that hides what the ranges hide, too."""
    if key_ranges is None:
        return attn_mask
    visible = visible_in_ranges(key_ranges, seqlen_k)
    if attn_mask is None:
        return visible
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return attn_mask.masked_fill(visible.logical_not(), float("-inf"))


def without_padded_queries(mask: Mask, padding: Tensor) -> tuple[Tensor | None, bool]:
    """The attn_mask and is_causal of `fused_attention` that also hide every key from the queries of padding (N, L).

    mask: what `_checked_mask` returns. A floating-point mask, and a diagonal but the causal one, stay as they are.
    """
    valid = padding.logical_not() if padding.dtype == torch.bool else padding != float("-inf")
    valid = valid[:, None, :, None]
    if mask.diagonal == 0 or mask == (None, None):
        return valid, mask.diagonal == 0
    if mask.attn_mask is not None and mask.diagonal is None and mask.attn_mask.dtype == torch.bool:
        return mask.attn_mask & valid, False
    return mask.attn_mask, mask.attn_mask is None


def ranges_of_heads(name: str, key_ranges: Tensor, query: Tensor, attention: Any) -> Tensor:
    """The ranges of a call as `fused_attention` takes them: (L, R, 2), (N|1, 1, L, R, 2) or (N|1, H|1, L, R, 2).

    Raises TypeError or ValueError if the ranges do not fit.

    name: of the argument that the caller has given
    query: (N, L, E) or (L, N, E), or (L, E), whose N is 1
    attention: the module, whose batch_first counts, and its num_heads if it has any
    """
    checks.check_tensor(name, key_ranges)
    if key_ranges.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {key_ranges.dtype}")
    if key_ranges.device != query.device:
        raise checks.fail(name, f"the device of the queries, {query.device}", key_ranges.device)
    num_heads, batch_first = getattr(attention, "num_heads", None), getattr(attention, "batch_first", False)
    seqlen, batch, hint = query.shape[0], 1, ""
    if query.dim() == 3:
        batch, seqlen = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
        hint = f"; {batch_layout(batch_first)}"
    shape = key_ranges.shape
    fits = 3 <= len(shape) <= 5 and shape[-3] == seqlen and shape[-2] > 0 and shape[-1] == 2
    fits = (
        fits
        and (len(shape) == 3 or shape[0] in (1, batch))
        and (len(shape) < 5 or num_heads is None or shape[1] in (1, num_heads))
    )
    if not fits:
        expected = "(L, R, 2), (N, L, R, 2) or (N, H, L, R, 2)"
        sizes = f"L = {seqlen}, N = {batch} or 1, and H = {num_heads} or 1"
        raise checks.fail(name, f"shape {expected} with {sizes}", f"shape {tuple(shape)}{hint}")
    return key_ranges.unsqueeze(1) if len(shape) == 4 else key_ranges


def cached_mask(cached: CachedRows, seqlen_q: int) -> Mask:
    """The mask of a call with a self-attention cache, whose queries are L new rows.

    The new rows see all earlier rows, and they are causal among themselves.
    """
    if not cached.diagonal:
        return Mask(None, cached.diagonal)
    return Mask(lower_right(seqlen_q, cached.keys.shape[2]), cached.diagonal)


def mask_above(diagonal: int, seqlen_q: int, key: Tensor) -> Tensor:
    """A mask (L, S) of this module, which hides the keys j > i + diagonal from query i. key: (N, Hkv, S, D)."""
    return torch.ones(seqlen_q, key.shape[2], dtype=torch.bool, device=key.device).triu(diagonal + 1)
