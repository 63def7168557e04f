"""Runs a planned call: on a backend directly, through autograd, or as a registered operator.

Which of these is right depends on the modes of torch that surround the call (see `modes`).
"""

from __future__ import annotations

from torch import is_grad_enabled  # not torch.is_grad_enabled: see `modes`
from torch.autograd import profiler

from fused_attn import modes
from fused_attn.attention import formula
from fused_attn.attention.inputs import Gradients, Inputs, Results
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import events
from fused_attn.backends.base import Backend
from fused_attn.derivatives import ops, transforms
from fused_attn.derivatives.autograd import apply_fused_attention


def run(
    problem: AttentionProblem,
    backend: Backend | None,
    name: str | None,
    is_direct: bool,
    inputs: Inputs,
    return_lse: bool,
    return_max: bool,
) -> Results:
    """The results of the call. Without return_lse, lse may be None, and without return_max, row_max may be.

    backend: None under compilation, because the operator chooses a backend when the compiled code runs
    name: the backend that the user has asked for, which the operator takes then; None = any
    is_direct: no tensor is of a subclass, and `modes.is_direct()` is true. The caller has computed this already.
    """
    if backend is None:
        return ops.call(problem, name, inputs, return_max)
    if profiler._is_profiler_enabled:
        backend = events.named(backend)
    if backend.is_composite:
        return backend.forward(problem, inputs, True, return_max)
    if not is_direct:
        if modes.in_forward_mode():
            return formula.forward(problem, inputs)
        if modes.in_functorch():
            return transforms.call(problem, backend, inputs, return_max)
        if modes.is_observed(inputs[:3] if problem.is_plain else inputs):  # a plain problem has no other tensors
            return ops.call(problem, backend.name, inputs, return_max)
    if is_grad_enabled():
        query, key, value = inputs.query, inputs.key, inputs.value
        if (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (problem.has_shared and inputs.is_shared_grad_required())
        ):
            call = (backend, problem, return_lse, return_max, inputs)
            tensors = inputs[: len(Gradients._fields)] if problem.has_shared else (query, key, value)
            result = apply_fused_attention(call, *tensors)
            return result if return_lse or return_max else (result, None, None)
    return backend.forward(problem, inputs, return_lse, return_max)
