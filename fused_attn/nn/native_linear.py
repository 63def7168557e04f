"""Linear layers without gradients on a CPU, with what follows them in a layer.

For few rows, as in a decoding step, a product takes as long as reading the weight. torch's product is made for many
rows, and was the largest part of a decoding step. In bfloat16, torch also copies the weight into another order in every
call. So few rows have a product of their own.

For many rows, torch multiplies. In float32 and float64, `torch.nn.functional.linear` first copies the bias into each
row of the output, and then adds the product to that. Here, torch only multiplies, and one native call adds the bias,
together with all else that has to be done to each row.
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

#: The dtypes of many rows for which a native call adds the bias. With bfloat16 and float16, torch adds the bias as a
#: part of the product. Without the bias, torch would round the product before the bias is added.
DTYPES_OF_PRODUCTS = (torch.float32, torch.float64)

#: `linear` leaves smaller weights of float32 and float64 to torch. What a call costs whatever its size is 5 us more
#: here. The native product saves less than that.
FEWEST_WEIGHTS = 1 << 17


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) . weight (out, in)^T + bias (out,), as `torch.nn.functional.linear`."""
    is_small = weight.numel() < FEWEST_WEIGHTS and weight.dtype in DTYPES_OF_PRODUCTS
    if torch.is_grad_enabled() or is_small or not _takes(x, weight, bias, takes_many=False):
        return F.linear(x, weight, bias)
    return linear_call(x, weight, bias).run()


def native_call(
    module: nn.Module,
    x: Tensor,
    *,
    takes_many: bool,
    relu: bool = False,
    residual: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> NativeCall | None:
    """The call that computes ``norm(residual + relu(module(x)))``, without what is None or off. None if there is none.

    takes_many: whether x may have many rows. For a layer in training mode, it may not: a checkpoint may compute a layer
        without gradients first, and with gradients later. The results should not differ by a rounding.

    The caller has ruled out gradients, a module that is not plain, and a norm that the native call cannot compute.
    """
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if not _takes(x, weight, bias, takes_many=takes_many):
        return None
    if residual is not None and not _is_plain_result(residual, x.dtype, (*x.shape[:-1], weight.shape[0])):
        return None
    return linear_call(x, weight, bias, relu, residual, norm)


def add_and_normalise(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> NativeCall | None:
    """The call that computes ``norm(x + y)``. None if no native call can compute it.

    The caller has ruled out gradients, training mode, torch's modes, and a norm that the native call cannot compute.
    """
    if (
        _C is None
        or not _is_plain_result(x, x.dtype, x.shape)
        or not _is_plain_result(y, x.dtype, x.shape)
        or x.dtype not in DTYPES
        or x.numel() == 0
        or modes.is_any_autocast_enabled()
    ):
        return None
    out = torch.empty_like(x)
    arguments = y, None, False, x, *norm_arguments(norm), out
    return NativeCall("finish_rows[cpu]", _C.finish_rows, arguments, out)


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


def linear_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool = False,
    residual: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    out: Tensor | None = None,
) -> NativeCall:
    """The call that computes ``norm(residual + relu(x . weight^T + bias))``, without what is None or off.

    x: (..., in). weight: (out, in). bias: (out,). residual, out: (..., out). All must be contiguous and of one dtype.
    """
    if out is None:
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    rest = relu, residual, *norm_arguments(norm), out
    if _has_few_rows(x, weight):
        return NativeCall("linear[cpu]", _C.linear, (x, weight, bias, *rest), out)
    rows, products = x.flatten(0, -2), out.flatten(0, -2)
    added = None if x.dtype in DTYPES_OF_PRODUCTS else bias  # by torch

    def multiply() -> None:
        factor = weight.t()  # anew each time, for a parameter may get other memory between two runs
        if added is None:
            torch.mm(rows, factor, out=products)
        else:
            torch.addmm(added, rows, factor, out=products)

    last = bias if added is None else None
    return NativeCall("finish_rows[cpu]", _C.finish_rows, (out, last, *rest), out, before=multiply)


def _has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the native product is faster than torch's."""
    return x.numel() <= most_rows(x.dtype, *weight.shape[::-1]) * x.shape[-1]


def _is_plain_result(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the native calls can read what another part of the layer has computed."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype == dtype
        and x.layout is torch.strided
        and x.shape == shape
        and x.is_contiguous()
        and not x.is_neg()
    )


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, takes_many: bool) -> bool:
    """Whether the native calls can read the tensors, and the rows are few if they have to be."""
    return (
        _C is not None
        # torch.compile must not trace the other tests. It cannot trace `is_neg`, and would compile anew for more than
        # MOST_ROWS rows. This test costs 40 ns, `is_direct` ten times as much. So most tensors that the native
        # calls do not take are found before `is_direct`, which comes last.
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
        and x.numel() > 0
        and (takes_many or _has_few_rows(x, weight))
        and x.is_contiguous()
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and (bias is None or (is_plain_vector(bias, x.dtype) and bias.shape == weight.shape[:1]))
        and not (x.is_neg() or weight.is_neg())
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )
