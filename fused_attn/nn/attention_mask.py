"""The mask of a call of `FusedMultiheadAttention`: from attn_mask, is_causal, padding and the cache to one mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.attention.causal_bias import causal_bias_offset
from fused_attn.nn.self_attention_cache import CachedRows, lower_right


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
