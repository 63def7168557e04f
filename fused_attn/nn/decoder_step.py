"""A decoder layer's parts for a step of decoding: each module with its residual connection and layer norm.

With one new row for each target, calling the operators one by one takes longer than the arithmetic. Here, an attention
with all that surrounds it is one native call, and a feed-forward block is two.

Each function returns None if a native call cannot take the place of the layer's own modules, for instance because one
of them has hooks or is of another class. The layer then calls its modules. `is_plain` must be true of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.nn import few_rows, small_inference
from fused_attn.nn.attention import FusedMultiheadAttention

#: attn_mask, key_padding_mask and is_causal
Masks = tuple[Tensor | None, Tensor | None, bool]


def is_plain(layer: nn.Module) -> bool:
    """Whether nothing but the modules of the layer decides what its blocks compute.

    The class of the layer must not override a block. The caller checks this.
    """
    return not layer.__dict__.keys() & {"_sa_block", "_mha_block", "_ff_block"}


def self_attention(layer: nn.TransformerDecoderLayer, x: Tensor, masks: Masks, cache: Any) -> Tensor | None:
    """The output of the self-attention, around which stand the residual connection and the layer norm.

    x: (N, 1, E), or (1, N, E) without batch_first
    """
    modules: Any = layer._modules  # attributes of modules take three times as long
    parts = modules.get("self_attn"), modules.get("norm1"), modules.get("dropout1")
    return _attention(layer, *parts, x, x, masks, cache)


def cross_attention(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, masks: Masks, cache: Any
) -> Tensor | None:
    """The output of the cross-attention, around which stand the residual connection and the layer norm."""
    modules: Any = layer._modules
    parts = modules.get("multihead_attn"), modules.get("norm2"), modules.get("dropout2")
    return _attention(layer, *parts, x, memory, masks, cache)


def feed_forward(layer: nn.TransformerDecoderLayer, x: Tensor) -> Tensor | None:
    """The output of the feed-forward block, around which stand the residual connection and the layer norm."""
    modules: Any = layer._modules
    norm, first, last = (modules.get(name) for name in ("norm3", "linear1", "linear2"))
    if (
        torch.is_grad_enabled()
        or first is None
        or last is None
        or not few_rows.is_plain(last)
        or not _does_nothing(modules.get("dropout"))
        or not _does_nothing(modules.get("dropout3"))
        or not _is_plain_norm(norm, x)
    ):
        return None
    hidden = layer.activation(few_rows.call(first, norm(x) if layer.norm_first else x))
    added = few_rows.linear_and_residual(last, hidden, x, None if layer.norm_first else norm)
    if added is not None:
        return added
    added = x + last(hidden)  # `hidden` is computed, so the blocks of the layer cannot be called any more
    return added if layer.norm_first else norm(added)


def _attention(
    layer: nn.TransformerDecoderLayer,
    module: nn.Module | None,
    norm: Any,
    dropout: nn.Module | None,
    x: Tensor,
    key: Tensor,
    masks: Masks,
    cache: Any,
) -> Tensor | None:
    """``norm(x + module(x, key))``, or ``x + module(norm(x), key)`` if norm_first."""
    attn_mask, key_padding_mask, is_causal = masks
    if (
        attn_mask is not None
        or torch.is_grad_enabled()
        or type(module) is not FusedMultiheadAttention
        or not few_rows.is_called_plainly(module)
        or not _does_nothing(dropout)
        or not _is_plain_norm(norm, x)
    ):
        return None
    return small_inference.attention_step(
        module, x, key, key_padding_mask, is_causal, key is x, cache, norm=norm, norm_first=layer.norm_first
    )


def _does_nothing(dropout: nn.Module | None) -> bool:
    """Whether a call of this module returns its argument."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and few_rows.is_called_plainly(dropout)


def _is_plain_norm(norm: Any, x: Tensor) -> bool:
    """Whether the native calls can compute the layer norm of the last dimension of x."""
    return (
        type(norm) is nn.LayerNorm
        and few_rows.is_called_plainly(norm)
        and norm.normalized_shape == x.shape[-1:]
        and few_rows.is_plain_vector(norm._parameters["weight"], x.dtype)
        and (norm._parameters["bias"] is None or few_rows.is_plain_vector(norm._parameters["bias"], x.dtype))
    )
