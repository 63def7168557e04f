"""The reference formula as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from torch import Tensor

from fused_attn.attention import formula
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import AttentionProblem

name = "reference"
is_composite = True


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    return []


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool) -> tuple[Tensor, Tensor]:
    return formula.forward(problem, inputs)


backward = formula.backward
