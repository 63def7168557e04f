"""Gradients where a backend's backward cannot be called as it stands: one output has none, or second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention import formula
from fused_attn.attention.inputs import Gradients, Inputs, Saved, Wanted, gradients_of_arguments
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import events
from fused_attn.backends.base import Backend


def compute(
    backend: Backend | None, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted
) -> Gradients:
    """The gradients by the backend's backward, also if out or lse has no gradient (dout or dlse is None).

    backend: None = the formula, whose gradients can be differentiated again
    """
    if saved.dout is None:
        if saved.dlse is None:
            return Gradients()
        assert saved.out is not None, "an autograd step saves its output"
        saved = saved._replace(dout=torch.zeros_like(saved.out))
    backward = formula.backward if backend is None else events.named(backend).backward
    return backward(problem, inputs, saved, wanted)


# ---- Second derivatives are those of the formula's gradients, as functions of the tensors that are named here.
# out and lse are functions of the inputs, so nothing flows to them.


def differentiable(inputs: Inputs, saved: Saved) -> dict[str, Tensor]:
    """The tensors that the gradients depend on, by name: dout, dlse, and the inputs that can have gradients.

    A tensor that the call does not have is left out.
    """
    tensors = inputs._asdict() | {"dout": saved.dout, "dlse": saved.dlse}
    names = ("dout", "dlse", *Gradients._fields)
    return {name: tensors[name] for name in names if tensors[name] is not None}


def of_formula(problem: AttentionProblem, inputs: Inputs, wanted: Wanted, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The wanted gradients as functions of `tensors`, which replace the inputs, dout and dlse of the same names.

    tensors: as `differentiable` returns them
    """
    saved = Saved(dout=tensors["dout"], dlse=tensors.get("dlse"))
    inputs = inputs._replace(**{name: x for name, x in tensors.items() if name in Gradients._fields})
    return [grad for grad in compute(None, problem, inputs, saved, wanted) if grad is not None]


def second_of_arguments(found: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """`gradients_of_arguments` for an autograd step that takes `Inputs`, then `Saved`.

    found: the second derivatives by the names that `differentiable` uses
    """
    first = Gradients(**{name: x for name, x in found.items() if name in Gradients._fields})
    return gradients_of_arguments(first, Saved(dout=found.get("dout"), dlse=found.get("dlse")))
