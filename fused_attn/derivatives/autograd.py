"""Differentiation of eager calls: a `torch.autograd.Function` with a combined forward, the cheapest way to a kernel.

Under ``torch.compile`` and ``torch.export`` the same two steps are registered operators (`ops.py`).
Derivatives that the kernels do not have (second order, forward mode, functorch transforms) are those of the reference
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
    """``apply((backend, problem, return_lse, inputs), *tensors)`` -> out, or (out, lse).

    tensors: those of inputs, for torch to see. Of a plain problem the first three alone: every argument of a Function
        costs time, one that is no tensor 0.5 us, and the plain problem is the one where time per call is felt.
    """

    @staticmethod
    def forward(
        ctx,
        call: tuple[Backend, AttentionProblem, bool, Inputs],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Tensor | None,
    ):
        backend, problem, return_lse, inputs = call
        ctx.call = backend, problem  # not the inputs: torch keeps the tensors, and looks after them
        out, lse = backend.forward(problem, inputs, True)
        if others:
            ctx.save_for_backward(out, lse, query, key, value, *others)
        else:  # A star takes 0.5 us, which a plain problem of a few rows feels.
            ctx.save_for_backward(out, lse, query, key, value)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None):
        out, lse, query, key, value, *others = ctx.saved_tensors
        inputs = Inputs(query, key, value, *others)
        backend, problem = ctx.call
        compute: Callable[..., Gradients] = gradients.compute
        # Grad mode is on here only under create_graph, which needs gradients that are themselves differentiable.
        if is_grad_enabled():
            backend = None
        elif modes.is_backward_observed(dout, dlse):
            compute = ops.call_backward
        grads = compute(backend, problem, inputs, Saved(out, lse, dout, dlse), _wanted(ctx.needs_input_grad))
        return (None,) + gradients_of_arguments(grads)  # noqa: RUF005  # a star would take twice as long


@functools.cache
def _wanted(needs_input_grad: tuple[bool, ...]) -> Wanted:
    """The gradients that torch asks `FusedAttention` for. Its first argument is the call, which can have none."""
    return Wanted.of(*needs_input_grad[1:])


#: `FusedAttention.apply` without its preparations for `torch.func`, which cost 4 us a call. `running.run` has ruled
#: `torch.func` out.
apply_fused_attention = super(torch.autograd.Function, FusedAttention).apply
