"""Which of torch's modes surround a call. The private names are the only ones that answer in 50 ns."""

from __future__ import annotations

from torch import Tensor
from torch._C import _are_functorch_transforms_active as in_functorch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch.autograd import forward_ad

__all__ = ["in_forward_mode", "in_functorch", "is_any_autocast_enabled", "is_direct", "is_observed"]


def in_forward_mode() -> bool:
    """True inside forward-mode AD, which sees through PyTorch code but not into kernels."""
    return forward_ad._current_level >= 0


def is_direct() -> bool:
    """True where nothing surrounds a call on plain tensors: none of the others here, autocast aside, would be true."""
    return (
        forward_ad._current_level < 0
        and not in_functorch()
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
    )


def is_observed(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True where somebody must see an operator: tracers, `TorchDispatchMode`, tensors that are no plain ones.

    A kernel that is called past the dispatcher would be invisible to them, and its output uninitialised in their eyes.
    """
    return (
        _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or not (type(query) is type(key) is type(value) is Tensor)
    )
