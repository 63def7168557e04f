"""Gradients in the cases that the backward of a backend does not handle:

- out or lse has no gradient,
- the gradients must be differentiable themselves, for second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler

from fused_attn.attention import formula
from fused_attn.attention.inputs import Gradients, Inputs, Saved, Wanted, gradients_of_arguments
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import events
from fused_attn.backends.base import Backend


def compute(
    backend: Backend | None, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted
) -> Gradients:
    """The wanted gradients, computed by the backward of the backend. A dout or dlse of None counts as zero.

    backend: None = the reference formula, whose gradients are differentiable
    """
    if problem.is_paged:
        raise NotImplementedError("fused_attention_paged has no gradients; detach its inputs")
    if saved.dout is None:
        if saved.dlse is None:
            return Gradients()
        assert saved.out is not None, "the step of autograd has saved its output"
        saved = saved._replace(dout=torch.zeros_like(saved.out))
    if backend is None:
        return formula.backward(problem, inputs, saved, wanted)
    if profiler._is_profiler_enabled:
        backend = events.named(backend)
    return backend.backward(problem, inputs, saved, wanted)


# ---- Second derivatives: `of_formula` computes the gradients as a differentiable function of the tensors that
# `differentiable` names, and the caller differentiates that function. out and lse are no arguments of the function. The
# formula computes both from the inputs, so they get no gradient of their own.


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
    """The second derivatives as the backward of a step returns them: an entry for each of `Inputs`, then of `Saved`.

    found: the second derivatives, under the names that `differentiable` uses
    """
    first = Gradients(**{name: x for name, x in found.items() if name in Gradients._fields})
    return gradients_of_arguments(first, Saved(dout=found.get("dout"), dlse=found.get("dlse")))
