"""A decoder layer's parts for a step of decoding: each module with its residual connection and layer norm.

With one new row for each target, calling the operators one by one takes longer than the arithmetic. Here, an attention
with all that surrounds it is one native call, and a feed-forward block is two.

Each function returns None if the native calls cannot take the place of the layer's own modules, so that nobody would
see a difference. The layer then calls its modules. The caller has ruled out subclasses of the layer, which may override
a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.nn import few_rows, small_inference


def attention(
    layer: nn.TransformerDecoderLayer,
    number: int,
    x: Tensor,
    memory: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None, bool],
    cache: Any,
) -> Tensor | None:
    """The output of an attention of the layer, around which stand the residual connection and the layer norm.

    number: 1 for the self-attention, 2 for the cross-attention, as in the names of norms and dropouts
    x: (N, 1, E), or (1, N, E) without batch_first
    memory: the encoder's output, for the cross-attention
    masks: attn_mask, key_padding_mask and is_causal
    cache: the cache of this attention
    """
    modules: Any = layer._modules  # attributes of modules take three times as long
    attn_mask, key_padding_mask, is_causal = masks
    module = modules["self_attn" if number == 1 else "multihead_attn"]
    norm = modules[f"norm{number}"]
    if (
        attn_mask is not None
        or torch.is_grad_enabled()
        or not isinstance(module, nn.MultiheadAttention)
        or not few_rows.is_called_plainly(module)
        or not _does_nothing(modules[f"dropout{number}"])
        or not _is_plain_norm(norm, x)
    ):
        return None
    return small_inference.attention_step(
        module, x, x if memory is None else memory, key_padding_mask, is_causal, memory is None, cache,
        norm=norm, norm_first=layer.norm_first,
    )  # fmt: skip


def feed_forward(layer: nn.TransformerDecoderLayer, x: Tensor) -> Tensor | None:
    """The output of the feed-forward block, around which stand the residual connection and the layer norm."""
    modules: Any = layer._modules
    norm, last = modules["norm3"], modules["linear2"]
    if (
        torch.is_grad_enabled()
        or not few_rows.is_plain(last)
        or not _does_nothing(modules["dropout"])
        or not _does_nothing(modules["dropout3"])
        or not _is_plain_norm(norm, x)
    ):
        return None
    hidden = layer.activation(few_rows.call(modules["linear1"], norm(x) if layer.norm_first else x))
    added = few_rows.linear_and_residual(last, hidden, x, None if layer.norm_first else norm)
    if added is not None:
        return added
    added = x + last(hidden)
    return added if layer.norm_first else norm(added)


def _does_nothing(dropout: nn.Module) -> bool:
    """Whether a call of this module returns its argument."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and few_rows.is_called_plainly(dropout)


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether the native calls can compute the layer norm of the last dimension of x."""
    return (
        type(norm) is nn.LayerNorm
        and few_rows.is_called_plainly(norm)
        and norm.normalized_shape == x.shape[-1:]
        and few_rows.is_plain_vector(norm._parameters["weight"], x.dtype)
        and (norm._parameters["bias"] is None or few_rows.is_plain_vector(norm._parameters["bias"], x.dtype))
    )
