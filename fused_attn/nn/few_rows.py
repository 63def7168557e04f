"""Linear layers for few rows without gradients, as in a decoding step on a CPU.

Such a product takes as long as reading the weight. torch's product is made for many rows, and was the largest part of a
decoding step. In bfloat16, torch also copies the weight into another order in every call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_tracing_state

from fused_attn import modes
from fused_attn.backends.cpu import DTYPES
from fused_attn.native import _C
from fused_attn.nn.native_call import NativeCall, norm_arguments
from fused_attn.nn.plain import is_plain_linear, is_plain_vector

#: The most rows for which the native product is used. The product reads the weight once for all rows.
MOST_ROWS = 16

#: The same where tiles of AMX multiply, as `most_rows` says. Up to 16 rows, the native product takes half the time of
#: torch's, and with 256 rows about the same time.
MOST_ROWS_OF_TILES = 256

#: `linear` leaves smaller weights of float32 and float64 to torch. What a call costs whatever its size is 5 us more
#: here. The native product saves less than that.
FEWEST_WEIGHTS = 1 << 17


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) . weight (out, in)^T + bias (out,), as `torch.nn.functional.linear`."""
    is_small = weight.numel() < FEWEST_WEIGHTS and weight.dtype in (torch.float32, torch.float64)
    if torch.is_grad_enabled() or is_small or not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    return _native_linear(x, weight, bias, None, None).run()


def native_call(
    module: nn.Module, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
) -> NativeCall | None:
    """Computes ``norm(residual + module(x))``, without what is None. None if no native call can compute it.

    The caller has ruled out gradients, a module that is not plain, and a norm that the native call cannot compute.
    """
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if not _takes(x, weight, bias):
        return None
    if residual is not None and not (
        type(residual) is Tensor
        and residual.dtype == x.dtype
        and residual.is_contiguous()
        and not residual.is_neg()
        and residual.shape == (*x.shape[:-1], weight.shape[0])
    ):
        return None
    return _native_linear(x, weight, bias, residual, norm)


def call(module: Any, x: Tensor) -> Tensor:
    """``module(x)``. The module may be of any class. Only plain linear layers are computed by `linear`.

    A trace of torch.jit calls the module, too. For torch traces once more without gradients, and compares the graphs.
    """
    if torch.is_grad_enabled() or _get_tracing_state() is not None or not is_plain_linear(module):
        return module(x)
    return linear(x, module._parameters["weight"], module._parameters["bias"])


def most_rows(dtype: torch.dtype, features: int, out_features: int) -> int:
    """The most rows for which the native product is used. With more, torch's is faster."""
    # LinearTiles::fits in csrc/cpu/linear_tiles.h has the same condition for features and out_features.
    has_tiles = dtype == torch.bfloat16 and features % 32 == 0 and out_features >= 32 and _C.cpu_isa() == "amx"
    return MOST_ROWS_OF_TILES if has_tiles else MOST_ROWS


def _native_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: nn.LayerNorm | None
) -> NativeCall:
    """norm(residual + x . weight^T + bias); None = without."""
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    arguments = x, weight, bias, residual, *norm_arguments(norm), out
    return NativeCall("linear[cpu]", _C.linear, arguments, out)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the native product can read the tensors, and is faster."""
    return (
        _C is not None
        # torch.compile must not trace the other tests. It cannot trace `is_neg`, and would compile anew for more than
        # MOST_ROWS rows. This test costs 40 ns, `is_direct` ten times as much. So most tensors that the native
        # product does not take are found before `is_direct`, which comes last.
        and not modes.is_dynamo_compiling()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        and x.dim() > 0
        and x.shape[-1] == weight.shape[-1]
        and weight.numel() > 0
        and 0 < x.numel() <= most_rows(x.dtype, *weight.shape[::-1]) * x.shape[-1]
        and x.is_contiguous()
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and (bias is None or (is_plain_vector(bias, x.dtype) and bias.numel() == weight.shape[0]))
        and not (x.is_neg() or weight.is_neg())
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )
