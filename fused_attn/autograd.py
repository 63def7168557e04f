"""Differentiation of eager calls: a `torch.autograd.Function` with a combined forward, the cheapest way to a kernel.

Under ``torch.compile`` and ``torch.export`` the same two steps are the registered operators of `fused_attn.ops`.
Derivatives that the kernels do not have (second order, forward mode, functorch transforms) are those of the reference
formula, which is plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import gradients, modes, ops
from fused_attn.backends.base import Backend
from fused_attn.inputs import Inputs, Saved, Wanted, gradients_of_arguments
from fused_attn.problem import AttentionProblem


class FusedAttention(torch.autograd.Function):
    """``apply(*inputs, (backend, problem, return_lse))`` -> out, or (out, lse).

    A plain problem passes the first three inputs alone. Every argument of a Function costs time, one that is no tensor
    0.5 us, and the plain problem is the one where time per call is felt.
    """

    @staticmethod
    def forward(ctx, *arguments: Tensor | tuple[Backend, AttentionProblem, bool] | None):
        *tensors, call = arguments
        backend, problem, return_lse = ctx.call = call
        out, lse = backend.forward(problem, Inputs(*tensors), True)
        ctx.save_for_backward(*tensors, out, lse)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None):
        *tensors, out, lse = ctx.saved_tensors
        backend, problem, _ = ctx.call
        compute = gradients.compute
        # Grad mode is on here only under create_graph, which needs gradients that are themselves differentiable.
        if torch.is_grad_enabled():
            backend = None
        elif modes.is_backward_observed(dout, dlse):
            compute = ops.call_backward
        saved = Saved(out, lse, dout, dlse)
        return gradients_of_arguments(
            compute(backend, problem, Inputs(*tensors), saved, Wanted.of(ctx.needs_input_grad))
        )


#: `FusedAttention.apply` without its preparations for `torch.func`, which `api` has ruled out; they cost 4 us a call.
apply_fused_attention = super(torch.autograd.Function, FusedAttention).apply
