"""What a call hands to its backend, for tests that look at the launcher of the Triton backend alone."""

from __future__ import annotations

import cases
import pytest

from fused_attn import running
from fused_attn.attention.inputs import Inputs, shape_of_lse
from fused_attn.attention.problem import AttentionProblem


def arguments_of_backend(inputs: cases.Inputs) -> tuple[AttentionProblem, Inputs]:
    """The (problem, inputs) that a call would hand to its backend. The call itself computes nothing."""
    received = []

    def run(problem, backend, name, is_direct, inputs, return_lse, return_max):
        query, value = inputs.query, inputs.value
        received.append((problem, inputs))
        of_rows = query.new_empty(shape_of_lse(query, problem.is_packed))
        return query.new_empty((*query.shape[:-1], value.shape[-1])), of_rows, of_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "run", run)
        inputs.function(**inputs.tensors, **inputs.options, return_lse=True)
    return received[0]
