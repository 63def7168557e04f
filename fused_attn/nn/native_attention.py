"""Attention modules without gradients on a CPU, with little between one operator and the next.

A small module spends most of its time on calling one operator after another. Here, the projections and the attention
are one call of the CPU kernels. `self_attention` is for sequences, `attention_step` for a step of decoding.

With more rows, torch's products are faster. Then `self_attention` calls the parts of the module, but asks all that has
to be asked about the module only once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_attn import modes
from fused_attn.api import fused_attention
from fused_attn.backends.cpu import DTYPES, MAX_HEAD_DIM
from fused_attn.native import _C
from fused_attn.nn import native_linear
from fused_attn.nn.cache import CrossAttentionCache
from fused_attn.nn.native_call import NativeCall, norm_arguments
from fused_attn.nn.plain import is_plain_linear
from fused_attn.nn.self_attention_cache import StaticSelfAttentionCache

#: With more rows than `native_linear.most_rows`, the largest number of multiply-adds in the projections for which
#: `self_attention` makes one native call. In float32 on one core, the call takes 0.7 of the time of `CallOfParts` with
#: a million, and the same time with four. In bfloat16, it takes half the time. With few rows, it takes a third.
MOST_PRODUCTS = 4_000_000


def self_attention(
    module: nn.MultiheadAttention,
    x: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    norm: nn.LayerNorm | None = None,
    norm_first: bool = False,
) -> NativeCall | CallOfParts | None:
    """The call that computes the output (N, L, E) of the module for x (N, L, E). None if no native call can do so.

    key_padding_mask: None, or (N, L) bool, True = ignore.
    norm, norm_first: see `attention_step`.

    The caller has ruled out gradients, a cache, wanted weights and all other masks.
    """
    if (
        _C is None
        or not is_plain(module)
        or not _takes_options(module)
        or not module.batch_first
        or not _takes_input(module, x)
        or not _is_plain_padding(key_padding_mask, x.shape[:2])
    ):
        return None
    out_proj: Any = module._modules["out_proj"]
    parameters, out_parameters = module._parameters, out_proj._parameters
    has_parts = not is_small(module, x)
    # `native_linear.native_call` says why not in training. If the heads do not fit, the module raises an error.
    if has_parts and (module.training or module.embed_dim % module.num_heads or module.num_heads % module._group_size):
        return None
    out = torch.empty_like(x)
    if has_parts:
        return CallOfParts(module, x, key_padding_mask, is_causal, norm, norm_first, out)
    arguments = (
        x, parameters["in_proj_weight"], parameters["in_proj_bias"], out_parameters["weight"], out_parameters["bias"],
        out, module.num_heads, key_padding_mask, is_causal, *norm_arguments(norm), norm_first,
    )  # fmt: skip
    return NativeCall("self_attention[cpu]", _C.self_attention, arguments, out)


class CallOfParts(NamedTuple):
    """The call of a module for more rows: the projections, the attention, and the projection of its result to `out`.

    The fields but `out` are the arguments of `self_attention`.
    """

    module: nn.MultiheadAttention
    x: Tensor
    key_padding_mask: Tensor | None
    is_causal: bool
    norm: nn.LayerNorm | None
    norm_first: bool
    out: Tensor

    def run(self) -> Tensor:
        module, x, norm = self.module, self.x, self.norm
        out_proj: Any = module._modules["out_proj"]
        of_heads: Any = module._parameters
        backend: Any = module.backend
        of_result = out_proj._parameters
        rows = norm(x) if norm is not None and self.norm_first else x
        projected = native_linear.linear_call(rows, of_heads["in_proj_weight"], of_heads["in_proj_bias"]).run()
        heads = projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        q, k, v = heads.split_with_sizes((module.num_heads, module.num_kv_heads, module.num_kv_heads), dim=1)
        attended: Any = fused_attention(
            q, k, v, None, key_padding_mask=self.key_padding_mask, is_causal=self.is_causal,
            enable_gqa=module.num_kv_heads != module.num_heads, backend=backend,
        )  # fmt: skip
        rows = attended.transpose(1, 2).flatten(-2).contiguous()
        residual, last = None if norm is None else x, None if self.norm_first else norm
        project = native_linear.linear_call(
            rows, of_result["weight"], of_result["bias"], residual=residual, norm=last, out=self.out
        )
        return project.run()


def is_small(module: nn.MultiheadAttention, x: Tensor) -> bool:
    """Whether one native call is faster than one operator after another, for x (N, L, E)."""
    features = module.embed_dim
    if x.shape[0] * x.shape[1] <= native_linear.most_rows(x.dtype, features, features):
        return True
    return x.numel() * 2 * (features + module.num_kv_heads * module.head_dim) <= MOST_PRODUCTS


def attention_step(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    is_self: bool,
    cache: Any,
    *,
    norm: nn.LayerNorm | None = None,
    norm_first: bool = False,
) -> NativeCall | None:
    """The call that computes the output for one new row of each batch entry. None if no native call can compute it.

    query: (N, 1, E), or (1, N, E) without batch_first
    key: the memory, in cross-attention
    key_padding_mask: None, or (N, S) bool, True = ignore; S rows are in the cache, or fit into it
    is_self: whether query, key and value are one tensor
    cache: a cache that is filled, by `append` or by `update`. The native call appends to a static cache.
    norm: with it, the output is that of the module with what surrounds it in a layer: ``query + module(norm(query))``
        if norm_first, else ``norm(query + module(query))``. The native call can compute the norm.

    The caller has ruled out wanted weights and all other masks.
    """
    batch_dim = 0 if module.batch_first else 1
    is_static = type(cache) is StaticSelfAttentionCache
    is_cross = type(cache) is CrossAttentionCache and not is_causal
    if _C is None or torch.is_grad_enabled() or not (is_self if is_static else is_cross):
        return None
    if query.dim() != 3 or query.shape[1 - batch_dim] != 1:
        return None
    if query.shape[batch_dim] > native_linear.most_rows(query.dtype, module.embed_dim, module.embed_dim):
        return None
    if not is_plain(module) or not _takes_options(module):
        return None
    query = query.contiguous()
    if not _takes_input(module, query):
        return None
    batch = query.shape[batch_dim]
    sizes: Any = batch, module.num_kv_heads, module.head_dim
    lengths = key_lengths = None
    rows: Any = None
    if is_static:
        rows = cache.rows_to_fill(*sizes, query.dtype)
        if rows is None:
            return None
        keys, values, lengths, key_lengths = rows.contents()
    else:
        pair = cache.get(key)
        if pair is None:
            return None
        keys, values = pair
        if not (_is_plain_rows(keys, sizes, query.dtype) and _is_plain_rows(values, sizes, query.dtype)):
            return None
    if not _is_plain_padding(key_padding_mask, (batch, keys.shape[2])):
        return None
    out_proj: Any = module._modules["out_proj"]
    parameters, out_parameters = module._parameters, out_proj._parameters
    out = torch.empty_like(query)
    of_entries = (query, out) if module.batch_first else (query.transpose(0, 1), out.transpose(0, 1))
    arguments = (
        of_entries[0], parameters["in_proj_weight"], parameters["in_proj_bias"], out_parameters["weight"],
        out_parameters["bias"], of_entries[1], module.num_heads, keys, values, lengths, key_lengths, key_padding_mask,
        *norm_arguments(norm), norm_first,
    )  # fmt: skip
    after = cache.count_filled if is_static else None
    return NativeCall("attention_step[cpu]", _C.attention_step, arguments, out, after=after)


def _is_plain_rows(x: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype) -> bool:
    """Whether the native call can read the keys or the values (B, Hkv, S, D) of a cache.

    sizes: B, Hkv and D
    """
    return (
        type(x) is Tensor
        and x.dim() == 4
        and (x.shape[0], x.shape[1], x.shape[3]) == sizes
        and x.dtype == dtype
        and x.is_cpu
        and x.stride(3) == 1
        and not x.is_neg()
    )


def is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether the native call can take the place of the module's own operators, so that nobody sees a difference.

    The native call reads the weights, and does not call ``out_proj``. This function alone decides whether that is
    allowed. These modules and calls are not plain:

    - Subclasses of the module or of ``out_proj``, such as parametrisations and FSDP2 make, and adapters in the place of
      ``out_proj``.
    - An ``out_proj`` with hooks or with a forward of its own, such as offloading installs. Global hooks count, too.
    - Parameters that are no plain `nn.Parameter`: merged, pruned, quantised or sharded ones.
    - Parameters that are sparse, on another device, or on "meta" until the call.
    - Calls under a mode that sees operators or functions, or that changes dtypes (autocast).
    """
    out_proj: Any = module._modules["out_proj"]  # the dicts, since attributes of modules take three times as long
    return (
        type(module).__base__ is nn.MultiheadAttention  # FusedMultiheadAttention itself, which cannot be imported here
        and is_plain_linear(out_proj)
        and _is_plain_parameter(module, "in_proj_weight")
        and _is_plain_parameter(module, "in_proj_bias")
        and _is_plain_parameter(out_proj, "weight")
        and _is_plain_parameter(out_proj, "bias")
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )


def _is_plain_parameter(module: nn.Module, name: str) -> bool:
    """Whether the native call can read a parameter of the module, or the parameter is None (a bias that is off)."""
    # None is a bias that is off. False means that the module has no parameter of this name any more.
    x = module._parameters.get(name, False)
    return x is None or (
        type(x) is nn.Parameter
        and x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and not x.is_neg()  # then the memory holds the negative values
    )


def _takes_options(module: nn.MultiheadAttention) -> bool:
    """Whether the native call computes what the options of the module ask for."""
    return (
        not (module.training and module.dropout)
        and module.rotary is None
        and module.relative_bias is None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.backend in (None, "cpu")
        and module.embed_dim <= MAX_HEAD_DIM * module.num_heads
    )


def _takes_input(module: nn.MultiheadAttention, x: Tensor) -> bool:
    """Whether the native call can read x (N, L, E), and the parameters have the shapes that it expects.

    Parameters of other shapes go the general way, which does what torch does with them. For example, torch broadcasts a
    bias of one element, and takes an ``out_proj`` with another number of features.
    """
    out_proj: Any = module._modules["out_proj"]
    weight, out_weight = module._parameters["in_proj_weight"], out_proj._parameters["weight"]
    bias, out_bias = module._parameters["in_proj_bias"], out_proj._parameters["bias"]
    features = module.embed_dim
    rows = features + 2 * (features // module._group_size)  # if num_heads does not fit, the native call raises
    return (
        weight is not None  # None if kdim or vdim differs from embed_dim
        and type(x) is Tensor
        and x.dim() == 3
        and x.is_cpu
        and x.dtype == weight.dtype == out_weight.dtype
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.shape[-1] == features
        and weight.shape == (rows, features)
        and (bias is None or bias.shape == (rows,))
        and out_weight.shape == (features, features)
        and (out_bias is None or out_bias.shape == (features,))
        and x.numel() > 0
        and not x.is_neg()
    )


def _is_plain_padding(mask: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the native call can read the mask (N, S), or there is none."""
    return mask is None or (type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu and mask.shape == shape)
