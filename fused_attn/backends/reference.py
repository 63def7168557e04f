"""The reference formula as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from fused_attn import modes
from fused_attn.attention import checks, formula
from fused_attn.attention.inputs import Inputs, Results
from fused_attn.attention.problem import AttentionProblem

name = "reference"
is_composite = True


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    return []


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    lengths, block_table = inputs.key_lengths, inputs.block_table
    if lengths is not None and modes.can_read(lengths):
        checks.check_key_lengths_values(lengths, problem.seqlen_k)
        if block_table is not None and modes.can_read(block_table):
            checks.check_block_table_values(block_table, lengths, problem.page_size, inputs.key.shape[0])
    return formula.forward(problem, inputs)


backward = formula.backward
