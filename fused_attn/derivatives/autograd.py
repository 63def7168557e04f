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
from fused_attn.attention.inputs import Gradients, Inputs, Saved, Wanted, gradients_of_arguments
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import Backend
from fused_attn.derivatives import gradients, ops


class FusedAttention(torch.autograd.Function):
    """``apply((backend, problem, return_lse, return_max, inputs), *tensors)`` -> out, or (out, lse, row_max).

    tensors: the tensors of inputs as arguments of their own, because torch looks for gradients only there. For a plain
        problem, these are query, key and value alone: each further argument takes time, 0.5 us for a None, and a small
        plain call takes a few microseconds in all.
    """

    @staticmethod
    def forward(
        ctx,
        call: tuple[Backend, AttentionProblem, bool, bool, Inputs],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Tensor | None,
    ):
        """Returns out (B, H, L, Dv), or all `Results` with return_lse or return_max. Saves what `backward` needs."""
        backend, problem, return_lse, return_max, inputs = call
        ctx.call = backend, problem  # without the inputs, which save_for_backward keeps and guards against changes
        out, lse, row_max = backend.forward(problem, inputs, True, return_max)
        if others:
            ctx.save_for_backward(out, lse, query, key, value, *others)
        else:  # Unpacking an empty tuple would take 0.5 us, and a small plain call takes a few microseconds in all.
            ctx.save_for_backward(out, lse, query, key, value)
        if not (return_lse or return_max):
            return out
        ctx.set_materialize_grads(False)  # torch then passes None, not zeros, for an output without a gradient
        if return_max:
            ctx.mark_non_differentiable(row_max)
        return out, lse, row_max

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None, _: None = None):
        """The gradients of the arguments of `forward`; None for `call`, which is no tensor."""
        out, lse, query, key, value, *others = ctx.saved_tensors
        inputs = Inputs(query, key, value, *others)
        backend, problem = ctx.call
        compute: Callable[..., Gradients] = gradients.compute
        # Grad mode is on in backward only with create_graph. The gradients must then be differentiable themselves.
        if is_grad_enabled():
            backend = None
        elif modes.is_backward_observed(dout, dlse):
            compute = ops.call_backward
        grads = compute(backend, problem, inputs, Saved(out, lse, dout, dlse), _wanted(ctx.needs_input_grad))
        return (None,) + gradients_of_arguments(grads)  # noqa: RUF005  # unpacking would take twice as long


@functools.cache
def _wanted(needs_input_grad: tuple[bool, ...]) -> Wanted:
    """The gradients that torch asks `FusedAttention` for. The first argument, the call, is no tensor and is skipped."""
    return Wanted.of(*needs_input_grad[1:])


#: `FusedAttention.apply` without the code that torch runs for `torch.func`, which takes 4 us for each call. The caller,
#: `running.run`, makes sure that no transform of `torch.func` is active.
apply_fused_attention = super(torch.autograd.Function, FusedAttention).apply
