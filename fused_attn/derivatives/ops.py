"""The registered operators ``fused_attn::attention`` and ``fused_attn::attention_backward``.

`torch.compile`, `torch.export` and AOTInductor record these operators and not the Python code inside of them. An eager
call runs as an operator only if a tracer or a `TorchDispatchMode` records operators; `fused_attn.modes` finds out.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks, formula
from fused_attn.attention.inputs import (
    Gradients,
    Inputs,
    Results,
    Saved,
    Shapes,
    Wanted,
    gradients_of_arguments,
    shape_of_lse,
    shapes_of,
    take,
)
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem, Scalars, lengths_of
from fused_attn.backends import dispatch, events
from fused_attn.backends.base import Backend
from fused_attn.derivatives import flops, gradients

_INPUTS = ", ".join(f"Tensor{'?' if name in Inputs._field_defaults else ''} {name}" for name in Inputs._fields)
_SAVED = "Tensor out, Tensor lse, Tensor? dout, Tensor? dlse"
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in Gradients._fields)
_SCALARS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, "
    "SymInt band_left, SymInt band_right, SymInt band_offset, bool band_from_end, int num_splits, "
    "SymInt dropout_batch, SymInt dropout_head, SymInt dropout_query, SymInt dropout_key"
)

_library = torch.library.Library("fused_attn", "DEF")
_library.define(
    f"attention({_INPUTS}, {_SCALARS}, str backend, bool needs_max) -> (Tensor out, Tensor lse, Tensor row_max)"
)
_library.define(f"attention_backward({_INPUTS}, {_SAVED}, bool[] wanted, {_SCALARS}, str backend) -> ({_GRADIENTS})")


def call(problem: AttentionProblem, backend: str | None, inputs: Inputs, needs_max: bool) -> Results:
    """The `Results`, computed by the registered operator.

    backend: None = the operator chooses a backend when it runs
    """
    if torch.compiler.is_compiling() and modes.in_functorch():
        return formula.forward(problem, inputs)  # the operator has no rules for torch.func
    out, lse, row_max = torch.ops.fused_attn.attention(*inputs, *problem.scalars, backend or "", needs_max)
    return out, lse, row_max if needs_max else None


def call_backward(
    backend: Backend, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted
) -> Gradients:
    """`gradients.compute` as a registered operator, for calls that a tracer or a mode records."""
    return _call_backward(inputs, saved, wanted, problem.scalars, backend.name)


def _call_backward(inputs: Inputs, saved: Saved, wanted: Wanted, scalars: Scalars, backend: str) -> Gradients:
    """The wanted gradients, computed by the backward operator. All are None if neither out nor lse has a gradient."""
    if saved.dout is None and saved.dlse is None:
        return Gradients()
    return wanted.select(torch.ops.fused_attn.attention_backward(*inputs, *saved, wanted, *scalars, backend))


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(*arguments):
    """The operator ``attention``: the `Results` of a backend. The arguments are in the order of the schema."""
    inputs, others = take(Inputs, arguments)
    scalars, (backend, needs_max) = take(Scalars, others)
    problem = _problem_of(inputs, scalars)
    chosen = events.named(dispatch.choose(problem, backend or None))
    out, lse, row_max = chosen.forward(problem, inputs, True, needs_max)
    # An operator must return a tensor for each result.
    return out, lse, row_max if needs_max else inputs.query.new_empty(0, dtype=problem.accumulate_dtype)


def by_formula(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the reference formula, in operators of torch."""
    inputs, others = take(Inputs, arguments)
    scalars, (_, needs_max) = take(Scalars, others)
    problem = _problem_of(inputs, scalars)
    out, lse, row_max = formula.forward(problem, inputs)
    return out, lse, row_max if needs_max else inputs.query.new_empty(0, dtype=problem.accumulate_dtype)


@torch.library.register_fake("fused_attn::attention", lib=_library)
def _attention_fake(*arguments):
    """Empty tensors with the shapes, dtypes and strides of the results, which torch traces in their place."""
    inputs, (*_, needs_max) = take(Inputs, arguments)
    query = inputs.query
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = shape_of_lse(query, inputs.cu_seqlens_q is not None)
    row_max = query.new_empty(shape if needs_max else 0, dtype=dtype)
    return empty_like_layout(query, inputs.value.shape[-1]), query.new_empty(shape, dtype=dtype), row_max


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(*arguments):
    """The operator ``attention_backward``: a gradient for each of `Gradients`, empty if it is not wanted."""
    inputs, others = take(Inputs, arguments)
    saved, (wanted, *options) = take(Saved, others)
    scalars, (backend,) = take(Scalars, options)
    problem = _problem_of(inputs, scalars)
    chosen = dispatch.choose(problem, backend or None)
    grads = gradients.compute(chosen, problem, inputs, saved, Wanted(*wanted))
    # An operator must return a tensor for each result, and no two may share memory. So each gradient that is not wanted
    # is a new empty tensor.
    return tuple(inputs.query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fused_attn::attention_backward", lib=_library)
def _attention_backward_fake(*arguments):
    """Empty tensors with the shapes, dtypes and strides of the gradients, which torch traces in place of results."""
    inputs, others = take(Inputs, arguments)
    _, (wanted, *_) = take(Saved, others)
    wanted = Wanted(*wanted)

    def make(name: str) -> Tensor:
        """An empty tensor like the gradient of the input of this name."""
        x = getattr(inputs, name)
        if not getattr(wanted, name):
            return inputs.query.new_empty(0)
        follows_input = name in ("query", "key", "value")
        return empty_like_layout(x, x.shape[-1]) if follows_input else x.new_empty(x.shape)

    return tuple(map(make, Gradients._fields))


def _setup_context(ctx, inputs, output):
    """Saves what `_attention_grads` needs: the arguments of ``attention``, its out and its lse."""
    tensors, (*ctx.scalars, ctx.backend, _) = take(Inputs, inputs)
    out, lse, row_max = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(row_max)
    ctx.set_materialize_grads(False)  # torch then passes None, not zeros, for an output without a gradient


def _attention_grads(ctx, dout, dlse, _):
    """The gradients of the arguments of ``attention``, by the operator ``attention_backward``."""
    inputs, (out, lse) = take(Inputs, ctx.saved_tensors)
    saved = Saved(out, lse, dout, dlse)
    return gradients_of_arguments(
        _call_backward(inputs, saved, Wanted.of(*ctx.needs_input_grad), ctx.scalars, ctx.backend)
    )


torch.library.register_autograd("fused_attn::attention", _attention_grads, setup_context=_setup_context, lib=_library)


def _setup_double_backward(ctx, inputs, output):
    """Saves what `_double_backward` needs: the inputs, dout and dlse. A missing dout is saved as zeros."""
    tensors, arguments = take(Inputs, inputs)
    (out, _, dout, dlse), (ctx.wanted, *ctx.scalars, _) = take(Saved, arguments)
    assert out is not None, "the schema requires out"
    ctx.save_for_backward(*tensors, torch.zeros_like(out) if dout is None else dout, dlse)
    ctx.has_dout = dout is not None


def _double_backward(ctx, *ddgrads):
    """The gradients of the arguments of ``attention_backward``, from those of its results (ddgrads).

    The function computes the first gradients again, by the differentiable formula, and differentiates them.
    """
    inputs, (dout, dlse) = take(Inputs, ctx.saved_tensors)
    problem, wanted = _problem_of(inputs, Scalars(*ctx.scalars)), Wanted(*ctx.wanted)
    tensors = gradients.differentiable(inputs, Saved(dout=dout, dlse=dlse))
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Detached tensors keep the graph of this recomputation apart from the caller's graph. With create_graph, the
        # recomputation becomes a part of the caller's graph instead.
        leaves = {
            name: x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for name, x in tensors.items()
        }
        grads = gradients.of_formula(problem, inputs, wanted, leaves)
        of_wanted = [dg for dg, is_wanted in zip(ddgrads, wanted, strict=True) if is_wanted]
        pairs = [(g, dg) for g, dg in zip(grads, of_wanted, strict=True) if dg is not None and g.requires_grad]
        if not pairs:
            return gradients.second_of_arguments({})
        second = torch.autograd.grad(
            [g for g, _ in pairs], list(leaves.values()), [dg for _, dg in pairs],
            create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
    found: dict[str, Tensor | None] = dict(zip(leaves, second, strict=True))
    if not ctx.has_dout:  # torch accepts no gradient for an argument that was None
        del found["dout"]
    return gradients.second_of_arguments(found)


torch.library.register_autograd(
    "fused_attn::attention_backward", _double_backward, setup_context=_setup_double_backward, lib=_library
)


flops.register_flop_formulas()


def _problem_of(inputs: Inputs, scalars: Scalars) -> AttentionProblem:
    """The problem of a call of an operator. Calls with equal shapes and scalars get the same, cached problem."""
    known = (shapes_of(inputs), inputs.query.dtype, inputs.query.device, scalars)
    try:
        return _cached_problem(*known)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _problem_of_shapes(*known)  # sizes are symbolic, as in `make_fx`


def _problem_of_shapes(shapes: Shapes, dtype: torch.dtype, device: torch.device, scalars: Scalars) -> AttentionProblem:
    """The problem of a call with tensors of these shapes, and with the lengths that `lengths_of` finds."""
    seqlen_q, seqlen_k = lengths_of(shapes, scalars)
    if shapes.relative_bias is not None:
        columns = max(seqlen_q + seqlen_k - 1, 0)
        if shapes.relative_bias[-1] != columns:
            expected = f"shape (H, L + S - 1) with {columns} columns"
            raise checks.fail("relative_bias", expected, f"shape {tuple(shapes.relative_bias)}")
    return AttentionProblem.of(shapes, dtype, device, scalars._replace(max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k))


_cached_problem = functools.lru_cache(maxsize=4096)(_problem_of_shapes)
