"""Which of torch's modes surround a call: tracers, compilers, transforms, and modes written in Python.

`autocast` also does what one of them asks for.

Every call asks these questions, so the answers must be fast:

- The functions with private names answer in 50 ns. torch has no public ones that are as fast.
- Functions are imported one by one, because looking up ``torch.name`` takes as long as calling the function.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, compiler
from torch._C import _are_functorch_transforms_active as in_functorch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

#: The classes of arguments that see no operators.
_HAVE_NO_OPERATORS = frozenset((Tensor, Parameter, type(None)))

__all__ = [
    "autocast",
    "can_read",
    "has_values",
    "in_forward_mode",
    "in_functorch",
    "is_any_autocast_enabled",
    "is_autocast_enabled",
    "is_backward_observed",
    "is_direct",
    "is_dynamo_compiling",
    "is_jit_tracing",
    "is_observed",
    "is_pre_dispatch",
    "is_watched",
]


def in_forward_mode() -> bool:
    """True inside forward-mode AD, which can differentiate PyTorch code, but no kernel."""
    return forward_ad._current_level >= 0


def is_direct() -> bool:
    """True if no mode of torch surrounds the call: no compiler, tracer, transform, or Python mode. Autocast may be on.

    A call on plain tensors can then run a kernel without asking the other questions in this module.
    """
    return (
        # The next two lines do what `torch.compiler.is_compiling` does, in a quarter of its time. The first of
        # them is True while torch.compile traces.
        not is_dynamo_compiling()
        and not compiler._is_compiling_flag
        and forward_ad._current_level < 0
        and not in_functorch()
        and _len_torch_dispatch_stack() == 0
        and (_len_torch_function_stack() == 0 or _changes_no_function())
        and _get_tracing_state() is None
    )


def _changes_no_function() -> bool:
    """True if all function modes are those of ``torch.device("cpu")`` and ``torch.set_default_device("cpu")``.

    Tensors are made on the CPU without these modes, too. Another default device would change where kernels get theirs.
    """
    return all(type(mode) is DeviceContext and mode.device.type == "cpu" for mode in _get_current_function_mode_stack())


def is_autocast_enabled(device: torch.device) -> bool:
    """True if autocast casts tensors on this device. It never casts on "meta", about which torch cannot be asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts the inputs as autocast casts those of SDPA: all floating-point tensors except float64 get its dtype."""
    if not isinstance(query, Tensor) or not is_autocast_enabled(query.device):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return _to_autocast(query, dtype), _to_autocast(key, dtype), _to_autocast(value, dtype)


def _to_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype of autocast, if x is a floating-point tensor other than float64."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def is_observed(tensors: Iterable[Tensor | None]) -> bool:
    """True if a call must be a registered operator: under tracers and `TorchDispatchMode`, and for tensor subclasses.

    Tracers, modes and subclasses record or replace operators, and see nothing else. A kernel that is called without an
    operator would be missing from a trace. The trace would then return an output that nothing has written. A subclass
    of `Parameter` counts as a subclass.
    """
    return is_watched() or not _HAVE_NO_OPERATORS.issuperset(map(type, tensors))


def is_watched() -> bool:
    """True under tracers and `TorchDispatchMode`. This is the part of `is_observed` that does not depend on tensors."""
    return (
        _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or (_len_torch_function_stack() > 0 and is_pre_dispatch())  # the first test saves most calls
    )


def is_jit_tracing() -> bool:
    """True inside `torch.jit.trace`, which stores numbers of Python, such as lengths, as constants."""
    return _get_tracing_state() is not None


def is_pre_dispatch() -> bool:
    """True under tracers that record operators before autograd runs, such as `make_fx(pre_dispatch=True)`.

    Such a tracer also sets a `TorchFunctionMode`. The number of these modes is read first, because that is faster.
    """
    return _len_torch_function_stack() > 0 and _len_torch_dispatch_stack_pre_dispatch() > 0


def is_backward_observed(dout: Tensor | None, dlse: Tensor | None) -> bool:
    """True if backward must be a registered operator although forward was none.

    `torch.autograd.grad` with ``is_grads_batched`` passes tensors that hold several gradients each. Only operators can
    take such tensors, and tensors of subclasses.
    """
    return (
        is_observed((dout, dlse))
        or (dout is not None and is_legacy_batchedtensor(dout))
        or (dlse is not None and is_legacy_batchedtensor(dlse))
    )


def can_read(x: Tensor) -> bool:
    """True if the contents of x can be read at once: x is a plain tensor on the CPU, and no tracer records the call."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not is_watched()
        and not is_functorch_wrapped_tensor(x)
    )


def has_values(x: Tensor) -> bool:
    """True if x has contents that a program may compare: one tensor, not on "meta", and nothing records the call.

    Tracers and the capture of a CUDA graph record it. Modes that only watch, such as `FlopCounterMode`, and gradients
    of `torch.func` do not stand in the way.
    """
    if torch.compiler.is_compiling() or x.is_meta or is_jit_tracing() or is_pre_dispatch():
        return False
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return False
        x = get_unwrapped(x)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    # Only torch's own tracers have a key: fake tensors, proxies and functional tensors. Modes that watch have none.
    is_traced = any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack())
    return not is_traced and not isinstance(x, FakeTensor)
