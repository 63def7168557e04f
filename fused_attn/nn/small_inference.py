"""Small self-attention without gradients in one native call.

Where there is little to multiply, most of the time of a module goes into calling one operator after another. Here the
projections and the attention are one call of the CPU kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    weight, out_proj = module.in_proj_weight, module.out_proj
    if (
        _C is None
        or not _is_plain(module, x, weight, out_proj)
        or x.shape[-1] != module.embed_dim
        or module.head_dim > MAX_HEAD_DIM
        or not 0 < x.numel() * (weight.shape[0] + module.embed_dim) <= MOST_PRODUCTS
        or not _is_plain_padding(key_padding_mask, x)
    ):
        return None
    out = torch.empty_like(x)
    run = _C.self_attention
    if profiler._is_profiler_enabled:
        run = profiling.recorded("self_attention[cpu]", run)
    run(
        x, weight, module.in_proj_bias, out_proj.weight, out_proj.bias, out, module.num_heads, key_padding_mask,
        is_causal, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _is_plain(module: FusedMultiheadAttention, x: Tensor, weight: Tensor | None, out_proj: nn.Module) -> bool:
    """Nothing but the projections and the attention is asked for, and nobody watches what happens between them."""
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and type(out_proj) is NonDynamicallyQuantizableLinear
        and type(out_proj.weight) is nn.Parameter
        and x.dim() == 3
        and x.is_cpu
        and x.dtype == weight.dtype == out_proj.weight.dtype
        and x.dtype in DTYPES
        and x.is_contiguous()
        and weight.is_contiguous()
        and out_proj.weight.is_contiguous()
        and module.batch_first
        and not (module.training and module.dropout)
        and module.rotary is None
        and module.relative_bias is None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.backend in (None, "cpu")
        and not (out_proj._forward_hooks or out_proj._forward_pre_hooks)
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )


def _is_plain_padding(mask: Tensor | None, x: Tensor) -> bool:
    return mask is None or (
        type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu and mask.shape == x.shape[:2]
    )
