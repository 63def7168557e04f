"""The causal biases of `torch.nn.attention.bias`: tensor subclasses that hold two lengths and no data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CausalBiasMeta(NamedTuple):
    """The contents of a causal bias: L, S, the offset of its diagonal, as in `Band`, and its alignment."""

    seqlen_q: int
    seqlen_k: int
    offset: int
    is_lower_right: bool


def causal_bias(attn_mask: Tensor) -> CausalBiasMeta | None:
    """The contents of a `torch.nn.attention.bias` causal bias; None for any other tensor."""
    if type(attn_mask) is Tensor:
        return None
    # The import takes a second, so it stands here. A caller who passes a causal bias has imported the module already.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return None
    seqlen_q, seqlen_k = attn_mask.seq_len_q, attn_mask.seq_len_kv
    is_lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
    return CausalBiasMeta(seqlen_q, seqlen_k, seqlen_k - seqlen_q if is_lower_right else 0, is_lower_right)


def causal_bias_offset(attn_mask: Tensor) -> int | None:
    """The offset of the diagonal of a causal bias, as in `Band`; None for any other tensor."""
    bias = causal_bias(attn_mask)
    return None if bias is None else bias.offset
