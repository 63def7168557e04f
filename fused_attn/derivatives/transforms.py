"""Attention as a `torch.autograd.Function` that works inside `torch.func` transforms.

`torch.func` needs Functions with ``setup_context`` and ``vmap``. A call of such a Function takes 20 us more, so eager
calls use `autograd.FusedAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention.inputs import (
    MAY_BROADCAST,
    WITHOUT_BATCH,
    Gradients,
    Inputs,
    Results,
    Saved,
    Wanted,
    gradients_of_arguments,
    take,
)
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import Backend
from fused_attn.derivatives import gradients, ops


def call(problem: AttentionProblem, backend: Backend, inputs: Inputs, needs_max: bool) -> Results:
    """The `Results` of a backend, differentiable inside `torch.func` transforms."""
    out, lse, *row_max = TransformableAttention.apply(*inputs, backend, problem, needs_max)
    return out, lse, row_max[0] if needs_max else None


class TransformableAttention(torch.autograd.Function):
    """``apply(*inputs, backend, problem, needs_max)`` -> (out, lse), or with needs_max (out, lse, row_max)."""

    @staticmethod
    def forward(*arguments):
        """The results of a backend, or of the registered operator if a tracer records operators."""
        inputs, (backend, problem, needs_max) = take(Inputs, arguments)
        if modes.is_observed(inputs):
            results = ops.call(problem, backend.name, inputs, needs_max)
        else:
            results = backend.forward(problem, inputs, True, needs_max)
        return results if needs_max else results[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Saves what `backward` needs: all arguments of `forward`, out and lse."""
        *tensors, ctx.backend, ctx.problem, _ = inputs
        out, lse, *row_max = output
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(*row_max)

    @staticmethod
    def backward(ctx, dout, dlse, _=None):
        """The gradients of all arguments, computed by `_TransformableGradients`, so that they are differentiable."""
        asked_for = Wanted.of(*ctx.needs_input_grad)
        found = iter(_TransformableGradients.apply(*ctx.saved_tensors, dout, dlse, asked_for, ctx.backend, ctx.problem))
        return gradients_of_arguments(Gradients(*(next(found) if is_wanted else None for is_wanted in asked_for)))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        """The results for every entry of the vmapped dimension; see `_vmap`."""
        *tensors, backend, problem, needs_max = arguments

        def apply(problem, *tensors):
            return TransformableAttention.apply(*tensors, backend, problem, needs_max)

        return _vmap(apply, info.batch_size, problem, in_dims, tensors, are_gradients_shared=False)


class _TransformableGradients(torch.autograd.Function):
    """``apply(*inputs, *saved, wanted, backend, problem)`` -> the wanted gradients, in the order of `Gradients`."""

    @staticmethod
    def forward(*arguments):
        """The wanted gradients by a backend, or by the registered operator if a tracer records operators."""
        inputs, others = take(Inputs, arguments)
        saved, (asked_for, backend, problem) = take(Saved, others)
        is_observed = modes.is_observed((*inputs, *saved))
        compute = ops.call_backward if is_observed else gradients.compute
        return tuple(grad for grad in compute(backend, problem, inputs, saved, asked_for) if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Saves what `backward` needs: the inputs and the gradients of out and lse."""
        *tensors, ctx.wanted, _, ctx.problem = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *ddgrads):
        """The second derivatives, which are those of the differentiable formula."""
        inputs, saved = take(Inputs, ctx.saved_tensors)
        tensors = gradients.differentiable(inputs, Saved(*saved))

        def formula(*replaced):
            named = dict(zip(tensors, replaced, strict=True))
            return tuple(gradients.of_formula(ctx.problem, inputs, ctx.wanted, named))

        vjp = torch.func.vjp(formula, *tensors.values())[1]
        return gradients.second_of_arguments(dict(zip(tensors, vjp(ddgrads), strict=True)))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        """The wanted gradients for every entry of the vmapped dimension; see `_vmap`."""
        *tensors, asked_for, backend, problem = arguments

        def apply(problem, *tensors):
            return _TransformableGradients.apply(*tensors, asked_for, backend, problem)

        return _vmap(apply, info.batch_size, problem, in_dims, tensors, asked_for.is_any_shared)


def _vmap(
    apply: Callable[..., tuple[Tensor, ...]],
    size: int,
    problem: AttentionProblem,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    are_gradients_shared: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of torch.func.vmap for a Function: (outputs, the vmapped dimension of each output, always 0).

    If possible, the vmapped dimension is folded into the batch, and one call computes all entries. Each entry of the
    vmapped dimension is a call of its own in these cases:

    - packed sequences and pages, whose rows have no batch dimension,
    - a relative bias or sinks for each entry,
    - a bias or a mask that folding would copy, such as one with a batch dimension that all entries share,
    - dropout, because the bits of dropout depend on the index of the batch entry,
    - gradients that are sums over the batch, because one call would also add up the vmapped entries.

    apply: the Function, from (problem, *tensors) to its outputs
    size: the length of the vmapped dimension
    in_dims: the vmapped dimension of each tensor, or None; entries for further arguments are not read
    tensors: `Inputs`, and behind them those of `Saved` if the Function is that of the gradients
    """
    names = (*Inputs._fields, *Saved._fields)
    given = [(name, x, dim) for name, x, dim in zip(names, tensors, in_dims, strict=False) if x is not None]

    def is_separate(name: str, x: Tensor, dim: int | None) -> bool:
        """True if the tensor keeps the vmapped dimension from being folded."""
        if name in WITHOUT_BATCH:
            return dim is not None
        if name not in ("bias", "mask"):
            return False
        batch = x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]
        return batch != (1 if dim is None else problem.batch)

    def fold(name: str, x: Tensor, dim: int | None) -> Tensor:
        """x with the vmapped dimension as a part of the batch dimension. What all entries share stays as it is."""
        if dim is None and (name in WITHOUT_BATCH or (name in MAY_BROADCAST and x.shape[0] == 1)):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x.expand(size, problem.batch, *x.shape[2:]).flatten(0, 1)
        return x.contiguous() if name == "key_ranges" else x

    if (
        problem.is_packed
        or problem.is_paged
        or problem.dropout_p
        or are_gradients_shared
        or any(is_separate(*tensor) for tensor in given)
    ):
        with_dims = [(x, dim) for x, dim in zip(tensors, in_dims, strict=False)]
        entries = [
            apply(problem, *(x if x is None or dim is None else x.select(dim, n) for x, dim in with_dims))
            for n in range(size)
        ]
        outputs = tuple(torch.stack(columns) for columns in zip(*entries, strict=True))
    else:
        folded = {name: fold(name, x, dim) for name, x, dim in given}
        outputs = apply(replace(problem, batch=size * problem.batch), *map(folded.get, names[: len(tensors)]))
        outputs = tuple(x.unflatten(0, (size, problem.batch)) for x in outputs)
    return outputs, (0,) * len(outputs)
