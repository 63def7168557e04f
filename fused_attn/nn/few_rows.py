"""Linear layers without gradients on a CPU, with what follows them in a layer.

For few rows, as in a decoding step, a product takes as long as reading the weight. torch's product is made for many
rows, and was the largest part of a decoding step. In bfloat16, torch also copies the weight into another order in every
call. So few rows have a product of their own.

For many rows, torch multiplies. In float32 and float64, `torch.nn.functional.linear` first copies the bias into each
row of the output, and then adds the product to that. Here, torch only multiplies, and one native call adds the bias,
together with all else that has to be done to each row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch.nn.modules import module as nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_attn import modes
from fused_attn.backends.cpu import DTYPES
from fused_attn.native import _C
from fused_attn.nn.native_call import NativeCall

#: The most rows for which the native product is used. The product reads the weight once for all rows.
MOST_ROWS = 16

#: The same where tiles of AMX multiply, as `most_rows` says. Up to 16 rows, the native product takes half the time of
#: torch's, and with 256 rows about the same time.
MOST_ROWS_OF_TILES = 256

#: The dtypes of many rows for which a native call adds the bias. With bfloat16 and float16, torch adds the bias as a
#: part of the product. Without the bias, torch would round the product before the bias is added.
DTYPES_OF_PRODUCTS = (torch.float32, torch.float64)

#: `linear` leaves smaller outputs of many rows to torch. The second call costs more than the copy of the bias there.
FEWEST_OUTPUTS = 1 << 15

#: `linear` leaves smaller weights of float32 and float64 to torch. What a call costs whatever its size is 5 us more
#: here. The native product saves less than that.
FEWEST_WEIGHTS = 1 << 17


#: The forward methods of classes for which native calls stand in. A patch of a class may replace them. The modules of
#: this package add theirs.
FORWARDS: dict[type, Any] = {
    kind: kind.forward for kind in (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.Dropout)
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) . weight (out, in)^T + bias (out,), as `torch.nn.functional.linear`."""
    if torch.is_grad_enabled() or not _takes(x, weight, bias) or not _is_faster(x, weight, bias):
        return F.linear(x, weight, bias)
    return linear_call(x, weight, bias).run()


def native_call(
    module: nn.Module,
    x: Tensor,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> NativeCall | None:
    """Computes ``norm(residual + relu(module(x)))``, without what is None or off. None if no native call can do that.

    The caller has ruled out gradients, a module that is not plain, and a norm that the native call cannot compute.
    """
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if not _takes(x, weight, bias):
        return None
    if residual is not None and not _is_plain_result(residual, x.dtype, (*x.shape[:-1], weight.shape[0])):
        return None
    return linear_call(x, weight, bias, relu, residual, norm)


def add_and_normalise(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> NativeCall | None:
    """Computes ``norm(x + y)``. None if no native call can compute it.

    The caller has ruled out gradients and a norm that the native call cannot compute.
    """
    if (
        _C is None
        or not _is_plain_result(x, x.dtype, x.shape)
        or not _is_plain_result(y, x.dtype, x.shape)
        or x.dtype not in DTYPES
        or x.numel() == 0
        or modes.is_any_autocast_enabled()
        or not modes.is_direct()
    ):
        return None
    out = torch.empty_like(x)
    arguments = y, None, False, x, *norm_arguments(norm), out
    return NativeCall("finish_rows[cpu]", _C.finish_rows, arguments, out)


def call(module: Any, x: Tensor) -> Tensor:
    """``module(x)``. The module may be of any class. Only plain linear layers are computed by `linear`.

    A trace of torch.jit calls the module, too. For torch traces once more without gradients, and compares the graphs.
    """
    if torch.is_grad_enabled() or _get_tracing_state() is not None or not is_plain(module):
        return module(x)
    return linear(x, module._parameters["weight"], module._parameters["bias"])


def most_rows(dtype: torch.dtype, features: int, out_features: int) -> int:
    """The most rows for which the native product is used. With more, torch's is faster."""
    # LinearTiles::fits in csrc/cpu/linear_tiles.h has the same condition for features and out_features.
    has_tiles = dtype == torch.bfloat16 and features % 32 == 0 and out_features >= 32 and _C.cpu_isa() == "amx"
    return MOST_ROWS_OF_TILES if has_tiles else MOST_ROWS


def is_plain(module: nn.Module) -> bool:
    """Whether `linear` can stand in for a call of the module, so that nobody sees a difference.

    These modules are not plain:

    - subclasses, such as parametrisations and FSDP2 make,
    - modules with hooks, where global hooks count, too,
    - modules with a forward of their own, such as offloading installs.
    """
    return (
        type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)
        and is_called_plainly(module)
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias", False)) in (nn.Parameter, type(None))
    )


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but run the forward of its class."""
    return (
        "forward" not in module.__dict__
        and FORWARDS.get(type(module), type(module).forward) is type(module).forward
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and module._compiled_call_impl is None
        and not nn_module._has_any_global_hook()
    )


def is_plain_vector(x: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the native call can read a bias, or a parameter of a norm."""
    if x is None or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.dtype == dtype and x.is_cpu and x.is_contiguous() and not x.is_neg()


def linear_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool = False,
    residual: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    out: Tensor | None = None,
) -> NativeCall:
    """Computes ``norm(residual + relu(x . weight^T + bias))``, without what is None or off.

    x: (..., in). weight: (out, in). bias: (out,). residual, out: (..., out). All must be contiguous and of one dtype.
    """
    if out is None:
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    rest = relu, residual, *norm_arguments(norm), out
    if _has_few_rows(x, weight):
        return NativeCall("linear[cpu]", _C.linear, (x, weight, bias, *rest), out)
    factors, products = (x.flatten(0, -2), weight.t()), out.flatten(0, -2)
    if bias is None or x.dtype in DTYPES_OF_PRODUCTS:
        multiply = functools.partial(torch.mm, *factors, out=products)
    else:
        multiply = functools.partial(torch.addmm, bias, *factors, out=products)
        bias = None
    return NativeCall("finish_rows[cpu]", _C.finish_rows, (out, bias, *rest), out, before=multiply)


def norm_arguments(norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """What native calls get of a layer norm: its weight, bias and eps."""
    return (None, None, 0.0) if norm is None else (norm._parameters["weight"], norm._parameters["bias"], norm.eps)


def _has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the native product is faster than torch's."""
    return x.numel() <= most_rows(x.dtype, *weight.shape[::-1]) * x.shape[-1]


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_call` is faster than one operator of torch, for a linear layer with nothing around it."""
    if _has_few_rows(x, weight):
        return weight.numel() >= FEWEST_WEIGHTS or x.dtype not in DTYPES_OF_PRODUCTS
    outputs = x.numel() // x.shape[-1] * weight.shape[0]
    return bias is not None and outputs >= FEWEST_OUTPUTS and x.dtype in DTYPES_OF_PRODUCTS


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


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the native calls can read the tensors."""
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
        and x.is_contiguous()
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and (bias is None or (is_plain_vector(bias, x.dtype) and bias.numel() == weight.shape[0]))
        and not (x.is_neg() or weight.is_neg())
        and not modes.is_any_autocast_enabled()
        and modes.is_direct()
    )
