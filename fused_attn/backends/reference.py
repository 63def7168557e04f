"""The reference formula as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from fused_attn.attention import formula
from fused_attn.attention.inputs import Inputs, Results
from fused_attn.attention.problem import AttentionProblem

name = "reference"
is_composite = True


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    return []


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    return formula.forward(problem, inputs)


backward = formula.backward
