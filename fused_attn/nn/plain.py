"""Which modules and tensors are plain: a native call can take their place, so that nobody sees a difference.

These modules are not plain:

- subclasses, such as parametrisations and FSDP2 make,
- modules with hooks, where global hooks count, too,
- modules with a forward of their own, such as offloading installs, and modules whose class has been patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def _forward_of_torch(kind: type) -> Any:
    """torch's own forward of a class; None, which no call has, if a patch has replaced it before this import."""
    forward = kind.forward  # type: ignore[attr-defined]
    is_own = getattr(forward, "__module__", "").startswith("torch.nn.") and not hasattr(forward, "__wrapped__")
    return forward if is_own else None


#: The forward methods of classes for which native calls stand in. A patch of a class may replace them. The modules of
#: this package add theirs.
FORWARDS: dict[type, Any] = {
    kind: _forward_of_torch(kind) for kind in (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.Dropout)
}

#: In the place of a parameter that a module does not have
_MISSING: Any = False


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


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `native_linear.linear` can take the place of a call of the module."""
    return (
        type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)
        and is_called_plainly(module)
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias", _MISSING)) in (nn.Parameter, type(None))
    )


def is_plain_norm(norm: Any, x: Tensor) -> bool:
    """Whether native calls can compute the layer norm of the last dimension of x."""
    if type(norm) is not nn.LayerNorm or x.is_nested or not is_called_plainly(norm):
        return False
    # FSDP puts plain tensors in the place of parameters, outside of `_parameters`.
    weight, bias = (norm._parameters.get(name, _MISSING) for name in ("weight", "bias"))
    return (
        norm.normalized_shape == x.shape[-1:]
        and is_plain_vector(weight, x.dtype)
        and weight.shape == x.shape[-1:]
        and (bias is None or (is_plain_vector(bias, x.dtype) and bias.shape == x.shape[-1:]))
    )


def is_plain_vector(x: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether native calls can read a bias, or a parameter of a norm."""
    if x is None or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.dtype == dtype and x.is_cpu and x.layout is torch.strided and x.is_contiguous() and not x.is_neg()


def does_nothing(dropout: nn.Module | None) -> bool:
    """Whether a call of this module, a layer's dropout, returns its argument."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and is_called_plainly(dropout)
