"""Checks of the arguments of `FusedMultiheadAttention`. `module` is the module that is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.attention.causal_bias import causal_bias_offset
from fused_attn.nn.arguments import check_divides, check_mask_dtype, check_sizes
from fused_attn.nn.paged_self_attention import PagedSelfAttentionCache, paged_hint
from fused_attn.nn.self_attention_cache import SlidingSelfAttentionCache, StaticSelfAttentionCache


def check_nested(
    module: Any, key_padding_mask, need_weights: bool, attn_mask, key_ranges, cache, is_padded: bool
) -> None:
    """Raises ValueError if an argument or an option needs dense tensors.

    is_padded: the call computes with padded copies of the nested tensors
    """
    for name, argument in (
        ("key_padding_mask", key_padding_mask),
        ("attn_mask", attn_mask),
        ("key_ranges", key_ranges),
        ("cache", cache),
    ):
        if argument is not None:
            raise checks.fail(name, "None with nested tensors", f"a {type(argument).__name__}")
    if need_weights and not is_padded:
        raise checks.fail("need_weights", "False with nested tensors, whose weights have no common shape", "True")
    for option, is_set in (
        ("batch_first=False", not module.batch_first),
        ("add_bias_kv or add_zero_attn", module._num_appended > 0 and not is_padded),
        ("rotary", module.rotary is not None and not is_padded),
    ):
        if is_set:
            raise checks.fail("query", f"a dense tensor in a module with {option}", "a nested tensor")


def check_heads(module: Any) -> None:
    """Raises ValueError if num_heads was changed after construction to a number that does not fit."""
    check_sizes(1, num_heads=module.num_heads)
    check_divides("num_heads", module.num_heads, "embed_dim", module.embed_dim)
    if module.num_heads % module._group_size:
        expected = f"a multiple of {module._group_size}, the number of heads for each head of keys"
        raise checks.fail("num_heads", expected, module.num_heads)


def check_inputs(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Raises AssertionError, as the parent class does, if a shape does not fit.

    Raises TypeError if query, key, value or a mask is no tensor.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, x)
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query: expected 2 (unbatched) or 3 dimensions, got shape {tuple(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.dim() != rank:
            raise AssertionError(f"{name}: expected {rank} dimensions, as query has, got shape {tuple(x.shape)}")
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"query: expected embed_dim={module.embed_dim} features, got {query.shape[-1]}")
    # With kdim or vdim, the projections are separate, and key and value may differ in their features.
    compared = slice(None) if module.in_proj_weight is not None else slice(-1)
    if key.shape[compared] != value.shape[compared]:
        raise AssertionError(f"value: expected the sizes of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    if key_padding_mask is not None:
        check_mask_dtype("key_padding_mask", key_padding_mask)
        if key_padding_mask.dim() != rank - 1:
            raise AssertionError(
                f"key_padding_mask: expected {rank - 1} dimensions for a query with {rank}, "
                f"got shape {tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None and causal_bias_offset(attn_mask) is None:
        check_mask_dtype("attn_mask", attn_mask)
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"attn_mask: expected shape (L, S) or (N * num_heads, L, S), got {tuple(attn_mask.shape)}"
            )


def check_cache(
    module: Any,
    query: Tensor,
    key: Tensor,
    cache: Any,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raises an error if `cache` is not the cache of an attention module, or does not go with this call."""
    if not hasattr(cache, "is_filled_once"):
        raise TypeError(
            "cache: expected a layer's cache such as cache.layers[i].self_attention, got "
            f"{type(cache).__name__}{paged_hint(cache)}"
        )
    seq_dim = 0 if query.dim() == 2 or not module.batch_first else 1
    if not cache.is_filled_once and query.shape[seq_dim] != key.shape[seq_dim]:
        expected = f"as many rows as query, {query.shape[seq_dim]}, with a self-attention cache"
        raise checks.fail("key", expected, key.shape[seq_dim])
    if module._num_appended:
        raise checks.fail("cache", "None in a module with add_bias_kv or add_zero_attn", "a cache")
    if cache.is_filled_once and (module.rotary is not None or module.relative_bias is not None):
        expected = "one for self-attention in a module with rotary or relative_bias"
        raise checks.fail("cache", expected, f"a {type(cache).__name__}")
    is_mask_given = attn_mask is not None and not is_causal and causal_bias_offset(attn_mask) is None
    if is_mask_given and not cache.is_filled_once:
        raise checks.fail("attn_mask", "None, or is_causal=True, with a self-attention cache", "a tensor")
    if isinstance(cache, (StaticSelfAttentionCache, PagedSelfAttentionCache)) and need_weights:
        raise checks.fail("need_weights", f"False with a {type(cache).__name__}", "True")
    if isinstance(cache, SlidingSelfAttentionCache):
        if module.relative_bias is not None:
            raise checks.fail("cache", "no sliding window in a module with relative_bias", "one")
        if key_padding_mask is not None:
            raise checks.fail("key_padding_mask", "None with a sliding window, whose rows move", "a mask")
    if isinstance(cache, PagedSelfAttentionCache):
        if module.relative_bias is not None:
            raise checks.fail("cache", "no pages in a module with relative_bias", "some; use a StaticKVCache")
        if key_padding_mask is not None:
            raise checks.fail("key_padding_mask", "None with pages, which hold no padding", "a mask")
        if module.training and module.dropout > 0.0:
            raise checks.fail("cache", "no pages in training with dropout", "some; call eval() first")


def check_projected(module: Any, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> None:
    """Raises a RuntimeError that names the input whose layout, size, device or dtype does not fit the projections.

    key, value: None if only the query is projected
    The module calls this function only after a projection has raised a RuntimeError, so that other calls do not wait
    for the checks. The message of torch's own error names no argument.
    """
    weight = module.out_proj.weight
    for name, x, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x is None:
            continue
        if x.layout != torch.strided:
            raise RuntimeError(f"{name}: expected a dense tensor, got layout {x.layout}")
        if x.shape[-1] != features:
            raise RuntimeError(f"{name}: expected {features} features, got shape {tuple(x.shape)}")
        if x.device != weight.device:
            raise RuntimeError(f"{name}: expected the device of the module, {weight.device}, got {x.device}")
        if x.dtype == weight.dtype:
            continue
        hint = "or torch.autocast" if x.dtype.is_floating_point else "as embeddings or features have"
        if modes.is_autocast_enabled(x.device):
            uncast = [y for y in (x.dtype, weight.dtype) if y == torch.float64 or not y.is_floating_point]
            if not uncast:
                continue
            hint = f"since autocast casts no {uncast[0]}"
        raise RuntimeError(f"{name}: expected the dtype of the module, {weight.dtype}, {hint}, got {x.dtype}")
