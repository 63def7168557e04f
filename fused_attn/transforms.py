"""The differentiable step inside `torch.func` transforms.

The Functions here carry ``setup_context`` and ``vmap``, which `torch.func` needs and which cost 20 us a call;
eager calls therefore use `fused_attn.autograd.FusedAttention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_attn import modes, ops
from fused_attn.backends import reference
from fused_attn.backends.base import Backend, Gradients, Wanted, gradients
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem


class TransformableAttention(torch.autograd.Function):
    """``apply(backend, problem, query, key, value, sinks, seed, *mask)`` -> (out, lse)."""

    @staticmethod
    def forward(backend: Backend, problem: AttentionProblem, query, key, value, sinks, seed, *mask):
        if modes.is_observed(query, key, value):
            return ops.call(problem, backend.name, query, key, value, sinks, seed, MaskSpec(*mask))
        return backend.forward(problem, query, key, value, sinks, seed, MaskSpec(*mask), True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.problem, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, out, lse = ctx.saved_tensors
        # needs: of backend, problem, query, key, value, sinks, seed, bias, relative_bias, ...
        needs = ctx.needs_input_grad
        wanted = Wanted(*needs[2:5], bias=needs[7], relative_bias=needs[8], sinks=needs[5])
        grads = iter(_TransformableGradients.apply(ctx.backend, ctx.problem, wanted, dout, dlse, out, lse, *tensors))
        grads = Gradients(*(next(grads) if is_wanted else None for is_wanted in wanted))
        none = (None,) * 4
        return (
            None,
            None,
            grads.query,
            grads.key,
            grads.value,
            grads.sinks,
            None,
            grads.bias,
            grads.relative_bias,
            *none,
        )

    @staticmethod
    def vmap(info, in_dims, backend, problem, *tensors):
        def apply(problem, *tensors):
            return TransformableAttention.apply(backend, problem, *tensors)

        return _vmap(apply, info.batch_size, problem, in_dims[2:], tensors, are_gradients_shared=False)


class _TransformableGradients(torch.autograd.Function):
    """``apply(backend, problem, wanted, dout, dlse, out, lse, *inputs)`` -> the wanted gradients."""

    @staticmethod
    def forward(backend, problem, wanted, dout, dlse, out, lse, query, key, value, sinks, seed, *mask):
        compute = ops.call_backward if modes.is_observed(query, key, value) else gradients
        grads = compute(backend, problem, wanted, dout, dlse, query, key, value, out, lse, sinks, seed, MaskSpec(*mask))
        return tuple(grad for grad, is_wanted in zip(grads, wanted, strict=True) if is_wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.problem, ctx.wanted, dout, dlse, _, _, *tensors = inputs
        ctx.save_for_backward(dout, dlse, *tensors)

    @staticmethod
    def backward(ctx, *ddgrads):
        dout, dlse, query, key, value, sinks, seed, bias, relative_bias, *others = ctx.saved_tensors
        differentiable = (dout, dlse, query, key, value, sinks, bias, relative_bias)
        is_present = [x is not None for x in differentiable]

        def formula(*present):
            tensors = iter(present)
            dout, dlse, query, key, value, sinks, bias, relative_bias = (
                next(tensors) if p else None for p in is_present
            )
            mask = MaskSpec(bias, relative_bias, *others)
            grads = reference.backward(
                ctx.problem, ctx.wanted, dout, dlse, query, key, value, None, None, sinks, seed, mask
            )
            return tuple(grad for grad, is_wanted in zip(grads, ctx.wanted, strict=True) if is_wanted)

        _, vjp = torch.func.vjp(formula, *(x for x in differentiable if x is not None))
        second = iter(vjp(ddgrads))
        d_dout, d_dlse, dquery, dkey, dvalue, dsinks, dbias, drelative_bias = (
            next(second) if p else None for p in is_present
        )
        none = (None,) * 4
        return (
            None, None, None, d_dout, d_dlse, None, None,
            dquery, dkey, dvalue, dsinks, None, dbias, drelative_bias, *none,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, backend, problem, wanted, *tensors):
        def apply(problem, *tensors):
            return _TransformableGradients.apply(backend, problem, wanted, *tensors)

        return _vmap(
            apply, info.batch_size, problem, in_dims[3:], tensors, are_gradients_shared=wanted[3:] != (False,) * 3
        )


def _vmap(
    apply: Callable[..., tuple[Tensor, ...]],
    size: int,
    problem: AttentionProblem,
    in_dims: tuple[int | None, ...],
    tensors: tuple[Tensor | None, ...],
    are_gradients_shared: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmapped dimension joins the batch where every tensor has a batch dimension; otherwise one call an entry.

    One call each also serves dropout, whose bits depend on the place in the batch, and gradients summed over the batch.
    """
    is_batched_throughout = replace(problem, has_key_padding=False).is_plain and not are_gradients_shared
    if not is_batched_throughout:
        entries = [
            apply(problem, *(x if dim is None else x.select(dim, n) for x, dim in zip(tensors, in_dims, strict=True)))
            for n in range(size)
        ]
        outputs = tuple(torch.stack(columns) for columns in zip(*entries, strict=True))
    else:
        folded = (
            None if x is None else (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(tensors, in_dims, strict=True)
        )
        outputs = apply(replace(problem, batch=size * problem.batch), *folded)
        outputs = tuple(x.unflatten(0, (size, problem.batch)) for x in outputs)
    return outputs, (0,) * len(outputs)
