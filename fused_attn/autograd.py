"""Differentiation, once and above all backends.

Eager calls go through `FusedAttention`, a `torch.autograd.Function` with a combined forward: the cheapest way from
Python to a kernel. Under ``torch.compile`` and ``torch.export`` the same two steps are the registered operators of
`fused_attn.ops`. Derivatives that the kernels do not have (second order, forward mode, functorch transforms) are those
of the reference formula, which is plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.backends import reference
from fused_attn.backends.base import Backend, Gradients, Wanted
from fused_attn.masks import NO_MASK, MaskSpec
from fused_attn.problem import AttentionProblem


class FusedAttention(torch.autograd.Function):
    """(out, lse) of a backend with its own backward; only ``bias``, ``relative_bias`` of the mask are differentiable."""

    @staticmethod
    def forward(
        ctx,
        backend: Backend,
        problem: AttentionProblem,
        return_lse: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        *mask: Tensor | None,
    ):
        out, lse = backend.forward(problem, query, key, value, sinks, seed, _mask_spec(problem, mask))
        ctx.backend, ctx.problem = backend, problem
        ctx.save_for_backward(query, key, value, out, lse, sinks, seed, *mask)
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None):
        query, key, value, out, lse, sinks, seed, *mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # Order of the inputs: backend, problem, return_lse, query, key, value, sinks, seed, bias, relative_bias, ...
        wanted = Wanted(needs[3], needs[4], needs[5], needs[8], needs[9], needs[6])
        # Grad mode is on here only under create_graph, which needs gradients that are themselves differentiable.
        backend = reference if torch.is_grad_enabled() else ctx.backend
        grads = gradients(
            backend, ctx.problem, wanted, dout, dlse, query, key, value, out, lse, sinks, seed,
            _mask_spec(ctx.problem, mask),
        )  # fmt: skip
        return (
            None, None, None, grads.query, grads.key, grads.value, grads.sinks, None,
            grads.bias, grads.relative_bias, None, None, None, None,
        )  # fmt: skip


def gradients(
    backend: Backend, problem: AttentionProblem, wanted: Wanted, dout: Tensor | None, dlse: Tensor | None, *inputs
) -> Gradients:
    """The backend's gradients, where either output may have none."""
    if dout is None and dlse is None:
        return Gradients()
    if dout is None:
        out = inputs[3]
        dout = torch.zeros_like(out)
    return backend.backward(problem, wanted, dout, dlse, *inputs)


def _mask_spec(problem: AttentionProblem, fields: tuple[Tensor | None, ...]) -> MaskSpec:
    return NO_MASK if problem.is_plain else MaskSpec(*fields)
