"""Differentiation, once and above all backends.

Eager calls go through `FusedAttention`, a `torch.autograd.Function` with a combined forward: the cheapest way from
Python to a kernel. Under ``torch.compile`` and ``torch.export`` the same two steps are the registered operators of
`fused_attn.ops`. Derivatives that the kernels do not have (second order, forward mode, functorch transforms) are those
of the reference formula, which is plain PyTorch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_attn import modes, ops
from fused_attn.backends import reference
from fused_attn.backends.base import Backend, Wanted, gradients
from fused_attn.masks import NO_MASK, MaskSpec
from fused_attn.problem import AttentionProblem

_NO_OTHERS = (None, None, NO_MASK)


class FusedAttention(torch.autograd.Function):
    """``apply((backend, problem, return_lse), query, key, value, *others)`` -> out, or (out, lse).

    others: () for a plain problem, else (sinks, seed, *mask). Every argument of a Function costs time, one that is no
    tensor 0.5 us, and the plain problem is the one where time per call is felt.
    """

    @staticmethod
    def forward(
        ctx,
        call: tuple[Backend, AttentionProblem, bool],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Tensor | None,
    ):
        backend, problem, return_lse = ctx.call = call
        sinks, seed, mask = _unpack(others) if others else _NO_OTHERS
        out, lse = backend.forward(problem, query, key, value, sinks, seed, mask, True)
        ctx.save_for_backward(query, key, value, out, lse, *others)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None):
        query, key, value, out, lse, *others = ctx.saved_tensors
        sinks, seed, mask = _unpack(others) if others else _NO_OTHERS
        wanted = _wanted(ctx.needs_input_grad)
        backend, problem, _ = ctx.call
        compute = gradients
        # Grad mode is on here only under create_graph, which needs gradients that are themselves differentiable.
        if torch.is_grad_enabled():
            backend = reference
        elif modes.is_backward_observed(dout, dlse):
            compute = ops.call_backward
        grads = compute(backend, problem, wanted, dout, dlse, query, key, value, out, lse, sinks, seed, mask)
        dquery, dkey, dvalue, dbias, drelative_bias, dsinks = grads
        if not others:
            return None, dquery, dkey, dvalue
        return None, dquery, dkey, dvalue, dsinks, None, dbias, drelative_bias, None, None, None, None


#: `FusedAttention.apply` without its preparations for `torch.func`, which `api` has ruled out; they cost 4 us a call.
apply_fused_attention = super(torch.autograd.Function, FusedAttention).apply


@functools.cache
def _wanted(needs: tuple[bool, ...]) -> Wanted:
    """needs: of the call, query, key, value and perhaps sinks, seed, bias, relative_bias, ..."""
    sinks, _, bias, relative_bias = needs[4:8] or (False,) * 4
    return Wanted(*needs[1:4], bias, relative_bias, sinks)


def _unpack(others: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None, MaskSpec]:
    """(sinks, seed, mask)"""
    return others[0], others[1], MaskSpec(*others[2:])
