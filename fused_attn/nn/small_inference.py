"""Small self-attention without gradients, in one native call.

A small module spends most of its time on calling one operator after another. Here, the projections and the attention
are one call of the CPU kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from fused_attn import modes
from fused_attn.backends import events
from fused_attn.backends.cpu import DTYPES, MAX_HEAD_DIM
from fused_attn.native import _C
from fused_attn.nn import few_rows

#: The largest number of multiply-adds in the projections for which `self_attention` makes the native call. Up to this
#: size, the native call takes at most 0.85 of the time that `FusedMultiheadAttention.forward` takes without the native
#: call. This was measured on one core and on two. With few rows, the native call takes a third of the time.
MOST_PRODUCTS = 2_000_000


def self_attention(
    module: nn.MultiheadAttention, x: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The output (N, L, E) of the module for x (N, L, E), or None if the native call cannot compute the output.

    key_padding_mask: None, or (N, L) bool, True = ignore.

    The caller has ruled out gradients, a cache, wanted weights and all other masks.
    """
    if (
        _C is None
        or not is_plain(module)
        or not _takes_options(module)
        or not _takes_input(module, x)
        or not _is_plain_padding(key_padding_mask, x)
    ):
        return None
    out_proj: Any = module._modules["out_proj"]
    parameters, out_parameters = module._parameters, out_proj._parameters
    out = torch.empty_like(x)
    run = _C.self_attention
    if profiler._is_profiler_enabled:
        run = events.recorded("self_attention[cpu]", run)
    run(
        x, parameters["in_proj_weight"], parameters["in_proj_bias"], out_parameters["weight"], out_parameters["bias"],
        out, module.num_heads, key_padding_mask, is_causal, torch.get_num_threads(),
    )  # fmt: skip
    return out


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
        and few_rows.is_plain(out_proj)
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
    return x is None or (type(x) is nn.Parameter and x.is_cpu and x.layout is torch.strided and x.is_contiguous())


def _takes_options(module: nn.MultiheadAttention) -> bool:
    """Whether the native call computes what the options of the module ask for."""
    return (
        module.batch_first
        and not (module.training and module.dropout)
        and module.rotary is None
        and module.relative_bias is None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.backend in (None, "cpu")
        and module.head_dim <= MAX_HEAD_DIM
    )


def _takes_input(module: nn.MultiheadAttention, x: Tensor) -> bool:
    """Whether the native call can read x (N, L, E), and x is small enough that the native call is faster."""
    out_proj: Any = module._modules["out_proj"]
    weight, out_weight = module._parameters["in_proj_weight"], out_proj._parameters["weight"]
    return (
        weight is not None  # None if kdim or vdim differs from embed_dim
        and type(x) is Tensor
        and x.dim() == 3
        and x.is_cpu
        and x.dtype == weight.dtype == out_weight.dtype
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.shape[-1] == module.embed_dim
        and 0 < x.numel() * (weight.shape[0] + module.embed_dim) <= MOST_PRODUCTS
    )


def _is_plain_padding(mask: Tensor | None, x: Tensor) -> bool:
    """Whether the native call can read the mask (N, L), or there is none."""
    return mask is None or (
        type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu and mask.shape == x.shape[:2]
    )
