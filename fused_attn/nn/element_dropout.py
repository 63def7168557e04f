"""Dropout of the elements of a tensor, which layers apply to the output of a block, in training on a CPU.

torch draws the random number of one element after the other: this took a third of the training time of a layer in
bfloat16. torch also keeps a factor for each element until backward. Here, all threads draw numbers, and backward draws
them again from the seed. After a relu, backward needs no random numbers, because the result has what it needs.

The random numbers come from Philox, as in `fused_attn.attention.dropout`. Element e, counted in the order of indices,
belongs to word ``e // 128 % 4`` of the counter ``(e // 512, e // 2 % 64, 0, 0)``: to its low half if e is even, to its
high half if e is odd. The element survives if this number of 16 bits is at least ``threshold(p)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, empty, get_num_threads, is_grad_enabled, nn  # not torch.empty: see `modes`
from torch._C._functorch import is_legacy_batchedtensor

from fused_attn import modes
from fused_attn.attention import dropout
from fused_attn.backends import events
from fused_attn.backends.cpu import DTYPES
from fused_attn.native import _C
from fused_attn.nn.plain import is_called_plainly

#: For fewer elements, torch is as fast: what a call costs whatever its size is 8 us more here, with backward.
FEWEST_ELEMENTS = 1024

#: The elements with one and the same first number in the counter of Philox, and the counters of these elements.
_CHUNK, _RUN = 512, 64


def call(module: Any, x: Tensor) -> Tensor:
    """``module(x)`` for a layer's dropout. The module may be of any class. Only `torch.nn.Dropout` runs natively."""
    if not _is_plain(module, x):
        return module(x)
    if not module.training:
        return x
    return _drop(x, dropout.draw_seed(x.device), float(module.p)) if _takes(module, x) else module(x)


def call_after_relu(module: Any, x: Tensor) -> Tensor:
    """``module(relu(x))`` for a layer's dropout. Where it is native, backward needs the result alone."""
    if not (_is_plain(module, x) and module.training and _takes(module, x)):
        return call(module, F.relu(x))
    run = _apply_after_relu if is_grad_enabled() and x.requires_grad else _run_kernel
    return run(x, dropout.draw_seed(x.device), float(module.p), True)


def survivors(seed: Tensor, p: float, shape: torch.Size) -> Tensor:
    """Which elements of a tensor of this shape survive, a bool tensor. In plain PyTorch, and slow.

    seed: 0-d int64
    """
    elements = shape.numel()
    chunks = torch.arange(-(-elements // _CHUNK), device=seed.device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    counter = (chunks, torch.arange(_RUN, device=seed.device), zero, zero)
    numbers = dropout.numbers(counter, seed).unflatten(-1, (4, 2)).transpose(1, 2)  # (chunks, 4, _RUN, 2)
    return numbers.flatten()[:elements].view(shape) >= dropout.threshold(p)


def _is_plain(module: Any, x: Tensor) -> bool:
    """Whether a native call can stand in for the module, so that nobody sees a difference."""
    # torch.compile must not trace the other tests. It makes one kernel of dropout and its neighbours anyway.
    if modes.is_dynamo_compiling():
        return False
    return type(module) is nn.Dropout and is_called_plainly(module) and is_readable(x)


def _takes(module: Any, x: Tensor) -> bool:
    """Whether the native call computes what the module does in training, and is not slower."""
    return 0 < module.p <= 1 and not module.inplace and x.numel() >= FEWEST_ELEMENTS


def is_readable(x: Tensor) -> bool:
    """Whether the kernel can read the tensor, and nobody watches the call."""
    return (
        _C is not None
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()
        and not is_legacy_batchedtensor(x)
        and modes.is_direct()
    )


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x, times 1 / (1 - p) where it survives, and else times 0. The kernel must be able to read x."""
    return _apply(x, seed, p) if is_grad_enabled() and x.requires_grad else _run_kernel(x, seed, p)


def _run_kernel(x: Tensor, seed: Tensor, p: float, relu: bool = False) -> Tensor:
    """The same for x or relu(x), without a gradient. The result is contiguous."""
    x = x.contiguous()
    out = empty(x.shape, dtype=x.dtype)
    events.recorded_if_profiling("dropout[cpu]", _C.dropout)(x, out, seed, p, relu, get_num_threads())
    return out


class _Dropout(torch.autograd.Function):
    """``apply(x, seed, p)`` is `_drop` with a gradient, which may be differentiated in its turn."""

    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _run_kernel(x, seed, p)

    @staticmethod
    def backward(ctx, dout: Tensor):
        (seed,) = ctx.saved_tensors
        if not modes.is_dynamo_compiling() and is_readable(dout):
            return _drop(dout, seed, ctx.p), None, None
        return dout * survivors(seed, ctx.p, dout.shape) * dropout.scale(ctx.p), None, None


class _DropoutAfterRelu(torch.autograd.Function):
    """``apply(x, seed, p, True)`` is ``_run_kernel`` with a gradient, which may be differentiated in its turn.

    The result says which elements were positive and survived. The linear layer that follows saves the result, too,
    unless its weight is frozen. A result of NaN, such as a dropped infinity makes, gets the gradient of an element
    that survived.
    """

    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, p: float, relu: bool) -> Tensor:
        out = _run_kernel(x, seed, p, relu)
        ctx.save_for_backward(out)
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        (out,) = ctx.saved_tensors
        if modes.is_dynamo_compiling() or is_grad_enabled() or not is_readable(dout):
            return (dout * dropout.scale(ctx.p)).masked_fill(out <= 0, 0.0), None, None, None
        dout, out = dout.contiguous(), out.contiguous()  # hooks may have stored `out` in another way
        dx = empty(dout.shape, dtype=dout.dtype)
        run = events.recorded_if_profiling("dropout[cpu]", _C.relu_dropout_backward)
        run(dout, dx, out, ctx.p, get_num_threads())
        return dx, None, None, None


#: `_Dropout.apply` without the code that torch runs for `torch.func`, see `derivatives.autograd`.
_apply = super(torch.autograd.Function, _Dropout).apply
_apply_after_relu = super(torch.autograd.Function, _DropoutAfterRelu).apply
