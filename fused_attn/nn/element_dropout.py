"""Dropout of the elements of a tensor, which layers apply to the output of a block, in training on a CPU.

torch draws the random number of one element after the other: this took a third of the training time of a layer in
bfloat16. torch also keeps a factor for each element until backward. Here, all threads draw numbers, and backward draws
them again from the seed.

The random numbers come from Philox, as in `fused_attn.attention.dropout`. Element e, counted in the order of indices,
belongs to word ``e // 64 % 4`` of the counter ``(e // 256, e % 64, 0, 0)``. The element survives if this word is at
least ``threshold(p)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, empty, get_num_threads, is_grad_enabled, nn  # not torch.empty: see `modes`
from torch._C._functorch import is_legacy_batchedtensor

from fused_attn import modes
from fused_attn.attention import dropout
from fused_attn.backends import events
from fused_attn.backends.cpu import DTYPES
from fused_attn.native import _C
from fused_attn.nn.few_rows import is_called_plainly

#: For fewer elements, torch is as fast: what a call costs whatever its size is 8 us more here, with backward.
FEWEST_ELEMENTS = 1024

#: The elements with one and the same first number in the counter of Philox, and those with one and the same word.
_CHUNK, _RUN = 256, 64


def call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a layer's dropout. The module may be of any class. Only `torch.nn.Dropout` runs natively."""
    if (
        # torch.compile must not trace the other tests. It makes one kernel of dropout and its neighbours anyway.
        not modes.is_dynamo_compiling() and type(module) is nn.Dropout and is_called_plainly(module) and _is_readable(x)
    ):
        if not module.training:
            return x
        if 0 < module.p <= 1 and not module.inplace and x.numel() >= FEWEST_ELEMENTS:
            return _drop(x, dropout.draw_seed(x.device), float(module.p))
    return module(x)


def factors(seed: Tensor, p: float, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies a tensor of this shape by: 0, or 1 / (1 - p). In plain PyTorch, and slow.

    seed: 0-d int64
    """
    elements = shape.numel()
    chunks = torch.arange(-(-elements // _CHUNK), device=seed.device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    counter = (chunks, torch.arange(_RUN, device=seed.device), zero, zero)
    words = torch.stack(dropout.philox(counter, seed), dim=1)  # (chunks, 4, _RUN)
    survives = words.flatten()[:elements].view(shape) >= dropout.threshold(p)
    return survives.to(dtype) * dropout.scale(p)


def _is_readable(x: Tensor) -> bool:
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
    """x times its `factors`. The kernel must be able to read x."""
    return _apply(x, seed, p) if is_grad_enabled() and x.requires_grad else _run_kernel(x, seed, p)


def _run_kernel(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    out = empty(x.shape, dtype=x.dtype)
    events.recorded_if_profiling("dropout[cpu]", _C.dropout)(x, out, seed, p, get_num_threads())
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
        if not modes.is_dynamo_compiling() and _is_readable(dout):
            return _drop(dout, seed, ctx.p), None, None
        return dout * factors(seed, ctx.p, dout.shape, dout.dtype), None, None


#: `_Dropout.apply` without the code that torch runs for `torch.func`, see `derivatives.autograd`.
_apply = super(torch.autograd.Function, _Dropout).apply
