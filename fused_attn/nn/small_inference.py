"""Small self-attention without gradients in one native call.

Where there is little to multiply, most of the time of a module goes into calling one operator after another. Here the
projections and the attention are one call of the CPU kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.nn.modules import module as nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_attn import modes, profiling
from fused_attn.backends.cpu import _C, DTYPES, MAX_HEAD_DIM

if TYPE_CHECKING:
    from fused_attn.nn.attention import FusedMultiheadAttention

#: Multiply-adds of the projections. Up to here this takes at most 0.85 of the general way's time, on one core or two,
#: and a third of it where rows are few.
MOST_PRODUCTS = 2_000_000


def self_attention(
    module: FusedMultiheadAttention, x: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """(N, L, E) from x (N, L, E) and key_padding_mask (N, L) bool; None where only the general way can.

    The caller has ruled out gradients, a cache, wanted weights and masks other than these.
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
        run = profiling.recorded("self_attention[cpu]", run)
    run(
        x, parameters["in_proj_weight"], parameters["in_proj_bias"], out_parameters["weight"], out_parameters["bias"],
        out, module.num_heads, key_padding_mask, is_causal, torch.get_num_threads(),
    )  # fmt: skip
    return out


def is_plain(module: FusedMultiheadAttention) -> bool:
    """Nothing observable differs where the weights are read and ``out_proj`` is not called. The one place to say so.

    Not plain are

    - subclasses of the module or of ``out_proj``, as parametrisations and FSDP2 make them, and adapters in its place;
    - an ``out_proj`` with hooks, global ones included, or with a forward of its own, as offloading installs;
    - parameters that are no plain `nn.Parameter`: merged, pruned, quantised, sharded;
    - parameters whose data are not in memory as they seem: on another device, on "meta" until the call, sparse;
    - calls under a mode that sees operators or functions, or that changes dtypes (autocast).
    """
    out_proj = module._modules["out_proj"]  # the dicts, since attributes of modules take three times as long
    return (
        type(module).__base__ is nn.MultiheadAttention  # the class itself, which this module cannot import
        and type(out_proj) is NonDynamicallyQuantizableLinear
        and "forward" not in out_proj.__dict__
        and not (out_proj._forward_hooks or out_proj._forward_pre_hooks)
        and not (out_proj._backward_hooks or out_proj._backward_pre_hooks)
        and out_proj._compiled_call_impl is None
        and not nn_module._has_any_global_hook()
        and _is_plain_parameter(module, "in_proj_weight")
        and _is_plain_parameter(module, "in_proj_bias")
        and _is_plain_parameter(out_proj, "weight")
        and _is_plain_parameter(out_proj, "bias")
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )


def _is_plain_parameter(module: nn.Module, name: str) -> bool:
    x = module._parameters.get(name, False)  # None is a bias that is off, False what is no parameter any more
    return x is None or (type(x) is nn.Parameter and x.is_cpu and x.layout is torch.strided and x.is_contiguous())


def _takes_options(module: FusedMultiheadAttention) -> bool:
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


def _takes_input(module: FusedMultiheadAttention, x: Tensor) -> bool:
    out_proj: Any = module._modules["out_proj"]
    weight, out_weight = module._parameters["in_proj_weight"], out_proj._parameters["weight"]
    return (
        weight is not None  # as it is where kdim or vdim is another one
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
    return mask is None or (
        type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu and mask.shape == x.shape[:2]
    )
