"""The registered operators ``fused_attn::attention`` and ``fused_attn::attention_backward``.

`torch.compile`, `torch.export` and AOTInductor see these instead of the Python in between. Eager calls come here only
where somebody watches operators, see `fused_attn.modes`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import formula
from fused_attn.attention.inputs import Gradients, Inputs, Saved, Shapes, Wanted, gradients_of_arguments, take
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem, Scalars
from fused_attn.backends import dispatch, events
from fused_attn.backends.base import Backend
from fused_attn.derivatives import flops, gradients

_INPUTS = ", ".join(f"Tensor{'?' if name in Inputs._field_defaults else ''} {name}" for name in Inputs._fields)
_SAVED = "Tensor out, Tensor lse, Tensor? dout, Tensor? dlse"
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in Gradients._fields)
_SCALARS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, "
    "SymInt band_left, SymInt band_right, SymInt band_offset"
)

_library = torch.library.Library("fused_attn", "DEF")
_library.define(f"attention({_INPUTS}, {_SCALARS}, str backend) -> (Tensor out, Tensor lse)")
_library.define(f"attention_backward({_INPUTS}, {_SAVED}, bool[] wanted, {_SCALARS}, str backend) -> ({_GRADIENTS})")


def call(problem: AttentionProblem, backend: str | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() and modes.in_functorch():
        return formula.forward(problem, inputs)  # operators have no such rules
    return torch.ops.fused_attn.attention(*inputs, *problem.scalars, backend or "")


def call_backward(
    backend: Backend, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted
) -> Gradients:
    """`gradients.compute`, where somebody must see the operator."""
    return _call_backward(inputs, saved, wanted, problem.scalars, backend.name)


def _call_backward(inputs: Inputs, saved: Saved, wanted: Wanted, scalars: Scalars, backend: str) -> Gradients:
    if saved.dout is None and saved.dlse is None:
        return Gradients()
    return wanted.select(torch.ops.fused_attn.attention_backward(*inputs, *saved, wanted, *scalars, backend))


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(*arguments):
    inputs, others = take(Inputs, arguments)
    scalars, (backend,) = take(Scalars, others)
    problem = _problem_of(inputs, scalars)
    return events.named(dispatch.choose(problem, backend or None)).forward(problem, inputs, True)


@torch.library.register_fake("fused_attn::attention", lib=_library)
def _attention_fake(query, key, value, *rest):
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_like_layout(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=lse_dtype)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(*arguments):
    inputs, others = take(Inputs, arguments)
    saved, (wanted, *options) = take(Saved, others)
    scalars, (backend,) = take(Scalars, options)
    problem = _problem_of(inputs, scalars)
    chosen = dispatch.choose(problem, backend or None)
    grads = gradients.compute(chosen, problem, inputs, saved, Wanted(*wanted))
    # An operator returns tensors, all of its own: absent gradients are empty ones.
    return tuple(inputs.query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fused_attn::attention_backward", lib=_library)
def _attention_backward_fake(*arguments):
    inputs, others = take(Inputs, arguments)
    _, (wanted, *_) = take(Saved, others)
    wanted = Wanted(*wanted)

    def make(name: str) -> Tensor:
        x = getattr(inputs, name)
        if not getattr(wanted, name):
            return inputs.query.new_empty(0)
        follows_input = name in ("query", "key", "value")
        return empty_like_layout(x, x.shape[3]) if follows_input else x.new_empty(x.shape)

    return tuple(map(make, Gradients._fields))


def _setup_context(ctx, inputs, output):
    tensors, (*ctx.scalars, ctx.backend) = take(Inputs, inputs)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _attention_grads(ctx, dout, dlse):
    inputs, (out, lse) = take(Inputs, ctx.saved_tensors)
    saved = Saved(out, lse, dout, dlse)
    return gradients_of_arguments(
        _call_backward(inputs, saved, Wanted.of(*ctx.needs_input_grad), ctx.scalars, ctx.backend)
    )


torch.library.register_autograd("fused_attn::attention", _attention_grads, setup_context=_setup_context, lib=_library)


def _setup_double_backward(ctx, inputs, output):
    tensors, arguments = take(Inputs, inputs)
    (out, _, dout, dlse), (ctx.wanted, *ctx.scalars, _) = take(Saved, arguments)
    assert out is not None, "the schema has one"
    ctx.save_for_backward(*tensors, torch.zeros_like(out) if dout is None else dout, dlse)
    ctx.has_dout = dout is not None


def _double_backward(ctx, *ddgrads):
    inputs, (dout, dlse) = take(Inputs, ctx.saved_tensors)
    problem, wanted = _problem_of(inputs, Scalars(*ctx.scalars)), Wanted(*ctx.wanted)
    tensors = gradients.differentiable(inputs, Saved(dout=dout, dlse=dlse))
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # The graph of this recomputation must not reach back into the caller's, unless that is to grow.
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
    if not ctx.has_dout:  # torch takes no gradient for an argument that was None
        del found["dout"]
    return gradients.second_of_arguments(found)


torch.library.register_autograd(
    "fused_attn::attention_backward", _double_backward, setup_context=_setup_double_backward, lib=_library
)


flops.register_flop_formulas()


def _problem_of(inputs: Inputs, scalars: Scalars) -> AttentionProblem:
    shapes = Shapes._make(None if x is None else x.shape for x in inputs)
    known = (shapes, inputs.query.dtype, inputs.query.device, scalars)
    try:
        return _problem_of_shapes(*known)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return AttentionProblem.of(*known)  # sizes are symbolic, as in `make_fx`


_problem_of_shapes = functools.lru_cache(maxsize=4096)(AttentionProblem.of)
