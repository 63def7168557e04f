"""Checks of the arguments of layers and stacks, which speak of the names that these arguments have there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_attn.attention import checks
from fused_attn.attention.causal_bias import causal_bias
from fused_attn.nn import strided
from fused_attn.nn.arguments import accepts, batch_layout, check_divides, check_mask_dtype, check_sizes
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.attention_mask import ranges_of_heads
from fused_attn.nn.paged_self_attention import paged_hint

if TYPE_CHECKING:
    from fused_attn.nn.cache import CrossAttentionCache


def check_layer(
    d_model: int,
    nhead: int,
    dim_feedforward: int,
    dropout: float,
    activation: str | Callable[[Tensor], Tensor],
    layer_norm_eps: float = 1e-5,
) -> None:
    """Raises TypeError or ValueError if no layer can have these arguments."""
    check_sizes(1, d_model=d_model, nhead=nhead)
    check_sizes(0, dim_feedforward=dim_feedforward)
    check_divides("nhead", nhead, "d_model", d_model)
    checks.check_probability("dropout", dropout)
    if not isinstance(activation, str) and not callable(activation):
        raise checks.wrong_type("activation", "a name or a callable", activation)
    if isinstance(activation, str) and activation not in ("relu", "gelu"):
        raise checks.fail("activation", "'relu', 'gelu' or a callable", repr(activation))
    checks.check_number("layer_norm_eps", layer_norm_eps)
    if not layer_norm_eps >= 0.0:
        raise checks.fail("layer_norm_eps", "a number >= 0", layer_norm_eps)


def check_stack(name: str, layer: nn.Module, padding: str | None, num_layers: int, norm: nn.Module | None) -> None:
    """Raises TypeError or ValueError if no stack can have these arguments.

    name: the argument `layer`
    padding: the keyword with which the stack gives a layer its padding mask; None for a forward of a subclass
    """
    if not isinstance(layer, nn.Module):
        raise checks.wrong_type(name, "a torch.nn.Module", layer)
    is_scripted = isinstance(layer, torch.jit.ScriptModule)  # its forward has no signature
    if padding is not None and not is_scripted and not accepts(layer.forward, padding):
        raise checks.wrong_type(name, f"a module whose forward takes {padding}", layer)
    check_sizes(0, num_layers=num_layers)
    check_module("norm", norm)


def check_module(name: str, module: nn.Module | None) -> None:
    """Raises TypeError unless module is a module or None."""
    if module is not None and not isinstance(module, nn.Module):
        raise checks.wrong_type(name, "None or a torch.nn.Module", module)


def check_hint(name: str, is_causal: bool | None) -> None:
    """Raises TypeError unless the hint is None or a bool."""
    if is_causal is not None:
        checks.check_flag(name, is_causal)


def check_compared(name: str, mask: Tensor | None) -> None:
    """Raises AssertionError if a mask is neither bool nor floating point.

    Attention would raise this error, too, but only after a stack has compared the mask with the causal mask.
    """
    if mask is not None and causal_bias(mask) is None:
        check_mask_dtype(name, mask)


def check_decoder_masks(
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    memory_is_causal: bool,
) -> None:
    """Raises TypeError if a mask of a decoder is no tensor, or its hint no bool.

    Attention would raise such an error, too, but it would speak of its own arguments.
    """
    checks.check_tensors(
        tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
    )  # fmt: skip
    checks.check_flag("memory_is_causal", memory_is_causal)


def check_layer_cache(cache: Any) -> None:
    """Raises TypeError unless the cache is None or that of a layer."""
    if cache is not None and not hasattr(cache, "self_attention"):
        raise TypeError(
            f"cache: expected a layer's cache such as cache.layers[i], got {type(cache).__name__}{paged_hint(cache)}"
        )


def takes_ranges(block: Callable, attention: Any) -> bool:
    """Whether a block of a layer, which calls this attention module, may get ranges of keys."""
    return accepts(block, "key_ranges") and getattr(attention, "takes_key_ranges", False)


def check_ranges(name: str, ranges: Tensor, query: Tensor, block: Callable, attention: Any) -> None:
    """Raises TypeError or ValueError if a layer takes no ranges of keys, or if the given ones do not fit.

    name: the argument of the layer
    block, attention: what gets the ranges, see `takes_ranges`
    """
    if not takes_ranges(block, attention):
        parts = f"{block.__qualname__} or {type(attention).__name__}"
        raise checks.fail(name, f"None, since {parts} takes none", "a tensor")
    if query.is_nested:
        raise checks.fail(name, "None with nested tensors", "a tensor")
    ranges_of_heads(name, ranges, query, attention)


def check_nested_source(stack: Any, **others: object) -> None:
    """Raises ValueError if an encoder cannot take a nested tensor src (N, length, E), because of its layers or others.

    others: the arguments that need a dense src, by their names
    """
    for name, argument in others.items():
        if argument is not None:
            raise checks.fail(name, "None with a nested tensor", f"a {type(argument).__name__}")
    if not stack.layers[0].self_attn.batch_first:
        raise checks.fail("src", "a dense tensor in layers with batch_first=False", "a nested tensor")


def check_layout(**inputs: Tensor) -> None:
    """Raises TypeError if an input of a decoder is a nested tensor with ``layout=torch.strided``."""
    for name, x in inputs.items():
        if strided.is_strided(x):
            expected = "a dense tensor, or a nested one with layout=torch.jagged"
            raise TypeError(f"{name}: expected {expected}, got one with layout=torch.strided")


def check_takes_ranges(stack: nn.Module, **ranges: Tensor) -> None:
    """Raises an error if ranges of keys are given that are no tensor, or that the stack or a layer of it does not take.

    ranges: by the names of their arguments
    """
    checks.check_tensors(**ranges)
    for name in ranges:
        if not accepts(stack.forward, name):
            raise checks.fail(name, f"None, since {type(stack).__name__} takes none", "a tensor")
        for i, layer in enumerate(getattr(stack, "layers", ())):
            if not getattr(layer, "takes_key_ranges", False):
                which = f"layer {i}, a {type(layer).__name__}, or a part of it takes none"
                raise checks.fail(name, f"None, since {which}", "a tensor")


def check_memory(
    layer: Any,
    tgt: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    cache: CrossAttentionCache | None,
) -> None:
    """Raises the errors that cross-attention would raise, before self-attention adds its rows to the cache.

    `Restoring` takes these rows out again after an error, but not in compiled code.

    layer: a decoder layer
    mask, key_padding_mask, is_causal: those of the memory
    cache: that of the cross-attention of the layer. None means that it is not looked at
    """
    sizes, tgt_sizes = memory.shape, tgt.shape
    if len(sizes) != len(tgt_sizes):
        raise AssertionError(f"memory: expected {len(tgt_sizes)} dimensions, as tgt has, got {tuple(sizes)}")
    batch, length, rows = 1, sizes[0], tgt_sizes[0]
    if len(sizes) == 3:
        batch_dim = 0 if layer.self_attn.batch_first else 1
        batch, length, rows = sizes[batch_dim], sizes[1 - batch_dim], tgt_sizes[1 - batch_dim]
        if batch != tgt_sizes[batch_dim]:
            raise RuntimeError(
                f"memory: expected the batch size of tgt, {tgt_sizes[batch_dim]}, got {batch}; "
                + batch_layout(batch_dim == 0)
            )
    if key_padding_mask is not None:
        check_mask_dtype("memory_key_padding_mask", key_padding_mask)
        expected = (batch, length) if len(sizes) == 3 else (length,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"memory_key_padding_mask: expected shape {expected}, got {tuple(key_padding_mask.shape)}"
            )
    attention = layer._modules.get("multihead_attn")  # looking up an attribute of a module takes three times as long
    if isinstance(attention, FusedMultiheadAttention):
        if sizes[-1] != attention.kdim:
            raise RuntimeError(f"memory: expected {attention.kdim} features, got shape {tuple(sizes)}")
        if mask is not None and causal_bias(mask) is None:
            check_mask_dtype("memory_mask", mask)
            is_read = key_padding_mask is not None or not is_causal
            shapes = (rows, length), (batch * attention.num_heads, rows, length)
            if is_read and mask.shape not in shapes:
                raise RuntimeError(f"memory_mask: expected shape {shapes[0]} or {shapes[1]}, got {tuple(mask.shape)}")
    if cache is not None:
        cache.get(memory)
