"""Tile sizes, warps and pipeline stages by kernel, architecture, dtype, head dim and features.

Chosen without a GPU, from what `tests/triton/aot.py` prints: the largest tiles whose loops keep everything in
registers, in the proportions that are known to be fast (FlashAttention 2 and FlexAttention on these architectures).
`python -m fused_attn tune` measures the neighbours of a row on the GPU at hand; its table wins over this one.
"""

from __future__ import annotations

import bisect
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


#: `bias` serves the gradient of attn_mask, and with squares of block_n that of relative_bias.
KERNELS = ("forward", "dq", "dkdv", "bias")


class Row(NamedTuple):
    """One configuration per class of architectures."""

    sm_80: Config  # 163 KiB of shared memory, mma
    small: Config  # consumer GPUs: 99 KiB, mma
    sm_90: Config  # 227 KiB, wgmma
    sm_100: Config  # 227 KiB and accumulators in tensor memory, tcgen05


def everywhere(config: Config) -> Row:
    return Row(config, config, config, config)


#: The first capability of each class in ascending order; a newer one that is not here belongs to the last before it.
ARCHITECTURES = (
    ((8, 0), "sm_80"),
    ((8, 6), "small"),
    ((8, 7), "sm_80"),
    ((8, 9), "small"),
    ((9, 0), "sm_90"),
    ((10, 0), "sm_100"),
    ((12, 0), "small"),
)

#: A row holds up to its head dim, the wider of keys and values.
HEAD_DIMS = (64, 128, 256)

#: Scores changed by nothing but scale, band and padding; and everything else, which needs registers beside them.
PLAIN, RICH = False, True

C = Config

#: (kernel, bytes per element, features) -> head dim up to -> configurations.
TABLE = {
    # 4 warps at head dim 64: two blocks share a multiprocessor, one multiplies while the other takes exponentials.
    ("forward", 2, PLAIN): {
        64: Row(C(128, 64, 4, 3), C(128, 64, 4, 2), C(128, 64, 4, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 128, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 2), C(64, 32, 8, 1), C(128, 64, 8, 2), C(128, 32, 8, 2)),
    },
    ("forward", 2, RICH): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(64, 32, 8, 1), C(64, 16, 4, 2), C(64, 32, 8, 1)),
    },
    ("dq", 2, PLAIN): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 1), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(16, 32, 4, 1), C(128, 32, 8, 1), C(64, 32, 8, 1)),
    },
    ("dq", 2, RICH): {
        64: Row(C(64, 32, 4, 1), C(64, 32, 4, 1), C(64, 32, 4, 1), C(64, 32, 4, 1)),
        128: Row(C(64, 32, 8, 1), C(64, 32, 8, 1), C(128, 32, 8, 1), C(64, 32, 4, 1)),
        256: Row(C(16, 32, 4, 1), C(16, 32, 4, 1), C(16, 32, 4, 1), C(64, 16, 4, 1)),
    },
    # Keys are the rows of the matrix products, hence the wider side.
    ("dkdv", 2, PLAIN): {
        64: Row(C(64, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 2), C(32, 128, 8, 2), C(64, 128, 8, 2)),
        256: Row(C(32, 32, 8, 1), C(32, 32, 8, 1), C(16, 64, 8, 2), C(32, 64, 8, 1)),
    },
    ("dkdv", 2, RICH): {
        64: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(32, 128, 8, 1), C(32, 64, 4, 1)),
        128: Row(C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 4, 1)),
        256: Row(C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 64, 8, 1)),
    },
    ("bias", 2, RICH): {
        64: Row(C(64, 32, 4, 1), C(64, 32, 4, 1), C(64, 64, 8, 1), C(64, 64, 8, 1)),
        128: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 64, 8, 1)),
        256: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 16, 4, 1)),
    },
    # Exact float32 has no matrix instructions: every architecture multiplies alike, and registers hold the operands.
    ("forward", 4, RICH): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 16, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("dq", 4, RICH): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 16, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("dkdv", 4, RICH): {
        64: everywhere(C(16, 32, 4, 1)),
        128: everywhere(C(16, 32, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("bias", 4, RICH): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 32, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
}

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
    """The package's configuration; see `tuned.choose` for the user's."""
    if problem.device.type == "cpu":
        longest = max(problem.seqlen_q, problem.seqlen_k)
        return (INTERPRETER_SMALL if longest <= 128 else INTERPRETER_LARGE)[kernel]
    rows = TABLE[kernel, problem.dtype.itemsize, is_rich(kernel, problem)]
    head_dim = max(problem.head_dim, problem.value_dim)
    return getattr(rows[next(limit for limit in rows if head_dim <= limit)], architecture_class(problem.capability))


def is_rich(kernel: str, problem: AttentionProblem) -> bool:
    """Whether scores are changed by more than scale, band and padding. In float32 that is left out of account."""
    return (
        problem.dtype.itemsize == 4
        or kernel == "bias"
        or bool(
            problem.has_mask
            or problem.has_bias
            or problem.has_relative_bias
            or problem.softcap > 0.0
            or problem.dropout_p > 0.0
        )
    )


def architecture_class(capability: tuple[int, int]) -> str:
    """The field of a `Row` for a GPU."""
    return ARCHITECTURES[bisect.bisect(ARCHITECTURES, capability, key=lambda entry: entry[0]) - 1][1]


def candidates(kernel: str, problem: AttentionProblem) -> list[Config]:
    """What `tune` is to try: the row of the table, then its neighbours, those with the fewest changes first."""
    row = choose(kernel, problem)
    tiles = [(row.block_m * m, row.block_n * n) for m, n in _PROPORTIONS]
    tiles = [(int(m), int(n)) for m, n in tiles if min(m, n) >= 16]
    neighbours = (
        Config(block_m, block_n, num_warps, num_stages)
        for block_m, block_n in tiles
        for num_warps in (4, 8)
        for num_stages in range(max(1, row.num_stages - 1), row.num_stages + 2)
    )
    return sorted(neighbours, key=lambda config: _num_changes(row, config))


#: Factors of a tile's sides: the same area, half and twice of it.
_PROPORTIONS = ((1, 1), (0.5, 2), (2, 0.5), (0.5, 1), (1, 0.5), (2, 1), (1, 2))


def _num_changes(row: Config, other: Config) -> int:
    is_other_tile = row[:2] != other[:2]
    return is_other_tile + (row.num_warps != other.num_warps) + (row.num_stages != other.num_stages)
