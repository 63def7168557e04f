"""Tile sizes, warps and pipeline stages by kernel, architecture, dtype and head dim."""

from __future__ import annotations

from typing import NamedTuple

import triton

from fused_attn.problem import AttentionProblem


class Config(NamedTuple):
    """block_m queries x block_n keys per tile; stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


def padded_head_dim(head_dim: int) -> int:
    """Tiles are powers of two, and tensor cores want at least 16 columns."""
    return max(16, triton.next_power_of_2(head_dim))


KERNELS = ("forward", "dq", "dkdv", "bias")

#: In the interpreter a step costs the same whatever its size: few steps, but more than one block of most cases.
INTERPRETER_SMALL = {
    "forward": Config(64, 32),
    "dq": Config(32, 64),
    "dkdv": Config(32, 64),
    "bias": Config(64, 32),
}
INTERPRETER_LARGE = {
    "forward": Config(128, 64),
    "dq": Config(64, 128),
    "dkdv": Config(64, 128),
    "bias": Config(64, 128),
}


def choose(kernel: str, problem: AttentionProblem) -> Config:
    return (INTERPRETER_SMALL if max(problem.seqlen_q, problem.seqlen_k) <= 128 else INTERPRETER_LARGE)[kernel]
