"""Differentiation of eager calls by a `torch.autograd.Function`.

The forward of the Function takes ``ctx``, and there is no ``setup_context``. torch calls such a Function fastest.

- Under ``torch.compile`` and ``torch.export``, forward and backward are registered operators (`ops.py`).
- Inside `torch.func`, another Function is used (`transforms.py`).
- The kernels compute no second derivatives and no forward-mode derivatives. These are computed by the reference
  formula, which is plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, is_grad_enabled  # not torch.is_grad_enabled: see `modes`

from fused_attn import modes
from fused_attn.attention.inputs import NO_OTHERS, Gradients, Inputs, Wanted, inputs_of, saved_of
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import Backend
from fused_attn.derivatives import gradients, ops


class FusedAttention(torch.autograd.Function):
    """``apply((backend, problem, return_lse, return_max, inputs), *tensors)`` -> out, or (out, lse, row_max).

    tensors: those of the inputs that may have gradients, as arguments of their own, because torch looks for gradients
        only there. They are query, key and value, and with ``problem.has_shared`` all of `Gradients`: each argument
        takes time, 0.5 us for a None, and a small call takes a few microseconds in all.
    """

    @staticmethod
    def forward(ctx, call: tuple[Backend, AttentionProblem, bool, bool, Inputs], *tensors: Tensor | None):
        """Returns out, or all `Results` with return_lse or return_max. Saves what `backward` needs."""
        backend, problem, return_lse, return_max, inputs = call
        ctx.call = backend, problem  # without the inputs, which save_for_backward keeps and guards against changes
        out, lse, row_max = backend.forward(problem, inputs, True, return_max)
        ctx.save_for_backward(out, lse, *(tensors if problem.is_plain else inputs))
        if not (return_lse or return_max):
            return out
        ctx.set_materialize_grads(False)  # torch then passes None, not zeros, for an output without a gradient
        if return_max:
            ctx.mark_non_differentiable(row_max)
        return out, lse, row_max

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None, _: None = None):
        """The gradients of the arguments of `forward`; None for `call`, which is no tensor."""
        out, lse, *others = ctx.saved_tensors
        backend, problem = ctx.call
        inputs = inputs_of(*others, *NO_OTHERS) if problem.is_plain else inputs_of(*others)
        compute: Callable[..., Gradients] = gradients.compute
        # Grad mode is on in backward only with create_graph. The gradients must then be differentiable themselves.
        if is_grad_enabled():
            backend = None
        elif modes.is_backward_observed(dout, dlse):
            compute = ops.call_backward
        saved = saved_of(out, lse, dout, dlse)
        grads = compute(backend, problem, inputs, saved, _wanted(ctx.needs_input_grad))
        # torch allows further gradients that are None, behind those of the arguments.
        return (None,) + grads  # noqa: RUF005  # unpacking would take twice as long


@functools.cache
def _wanted(needs_input_grad: tuple[bool, ...]) -> Wanted:
    """The gradients that torch asks `FusedAttention` for. The first argument, the call, is no tensor and is skipped."""
    return Wanted.of(*needs_input_grad[1:])


#: `FusedAttention.apply` without the code that torch runs for `torch.func`, which takes 4 us for each call. The caller,
#: `running.run`, makes sure that no transform of `torch.func` is active.
apply_fused_attention = super(torch.autograd.Function, FusedAttention).apply
