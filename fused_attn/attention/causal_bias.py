"""The causal biases of `torch.nn.attention.bias`: tensors by type, which hold no more than two lengths."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CausalBiasMeta(NamedTuple):
    """A `torch.nn.attention.bias` causal bias; offset is that of `Band`."""

    seqlen_q: int
    seqlen_k: int
    offset: int


def causal_bias(attn_mask: Tensor) -> CausalBiasMeta | None:
    """What a `torch.nn.attention.bias` causal bias says; None for any other tensor."""
    if type(attn_mask) is Tensor:
        return None
    # Imported here: only a caller who has built such an object has paid for the module already.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return None
    seqlen_q, seqlen_k = attn_mask.seq_len_q, attn_mask.seq_len_kv
    return CausalBiasMeta(
        seqlen_q, seqlen_k, seqlen_k - seqlen_q if attn_mask.variant == CausalVariant.LOWER_RIGHT else 0
    )


def causal_bias_offset(attn_mask: Tensor) -> int | None:
    """The offset of a causal bias; None for any other tensor."""
    bias = causal_bias(attn_mask)
    return None if bias is None else bias.offset
