"""Tile sizes, warps and pipeline stages by kernel, architecture, dtype, head dim and features.

Chosen without a GPU, from what `tests/triton/aot.py` prints: the largest tiles whose loops keep everything in
registers, in the proportions that are known to be fast (FlashAttention 2 and FlexAttention on these architectures).
`python -m fused_attn tune` measures the neighbours of a row on the GPU at hand; its table wins over this one.
"""

from __future__ import annotations

import bisect
import enum
from typing import NamedTuple

import triton

from fused_attn.attention.problem import AttentionProblem


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


class Features(enum.Enum):
    """What changes scores, and so needs registers beside them. Scale, band, padding and sinks do not count."""

    PLAIN = "nothing"
    ONE = "a mask, a bias, a soft cap or dropout"
    ONE_AND_DROPOUT = "dropout, and a mask, a bias or a soft cap"
    RELATIVE_BIAS = "a relative bias, perhaps dropout"
    ANY = "anything"


PLAIN, ONE, ANY = Features.PLAIN, Features.ONE, Features.ANY
ONE_AND_DROPOUT, RELATIVE_BIAS = Features.ONE_AND_DROPOUT, Features.RELATIVE_BIAS

#: Float32 whose products torch allows to be rounded: matrix instructions, for factors of 4 bytes.
TF32 = "tf32"

C = Config

#: (kernel, bytes per element or TF32, features) -> head dim up to -> configurations.
TABLE = {
    # 4 warps at head dim 64: two blocks share a multiprocessor, one multiplies while the other takes exponentials.
    ("forward", 2, PLAIN): {
        64: Row(C(128, 64, 4, 3), C(128, 64, 4, 2), C(128, 64, 4, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 128, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 2), C(64, 32, 8, 1), C(128, 64, 8, 2), C(128, 32, 8, 2)),
    },
    ("forward", 2, ONE): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
    },
    ("forward", 2, ONE_AND_DROPOUT): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
    },
    # Each score's address is its own: a gather, which keeps many registers.
    ("forward", 2, RELATIVE_BIAS): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(64, 32, 4, 2), C(64, 32, 4, 2), C(128, 32, 8, 2), C(128, 32, 8, 2)),
    },
    ("forward", 2, ANY): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(64, 32, 8, 1), C(64, 16, 4, 2), C(64, 32, 8, 1)),
    },
    ("dq", 2, PLAIN): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 1), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(16, 32, 4, 1), C(128, 32, 8, 1), C(64, 32, 8, 1)),
    },
    ("dq", 2, ONE): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 1), C(128, 32, 8, 2), C(128, 32, 8, 2)),
    },
    ("dq", 2, ONE_AND_DROPOUT): {
        64: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 1), C(128, 32, 8, 2), C(128, 32, 8, 2)),
    },
    ("dq", 2, RELATIVE_BIAS): {
        64: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 32, 8, 2), C(64, 64, 8, 1), C(128, 32, 8, 2), C(128, 32, 8, 2)),
    },
    ("dq", 2, ANY): {
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
    ("dkdv", 2, ONE): {
        64: Row(C(32, 128, 8, 2), C(32, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(32, 64, 8, 1), C(32, 128, 8, 2), C(32, 128, 8, 2)),
    },
    ("dkdv", 2, ONE_AND_DROPOUT): {
        64: Row(C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2)),
        128: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(16, 64, 8, 2), C(32, 64, 8, 2)),
    },
    ("dkdv", 2, RELATIVE_BIAS): {
        64: Row(C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2)),
        128: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(32, 64, 8, 2), C(32, 64, 8, 2)),
    },
    ("dkdv", 2, ANY): {
        64: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(32, 128, 8, 1), C(32, 64, 4, 1)),
        128: Row(C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 4, 1)),
        256: Row(C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 64, 8, 1)),
    },
    ("bias", 2, ANY): {
        64: Row(C(64, 32, 4, 1), C(64, 32, 4, 1), C(64, 64, 8, 1), C(64, 64, 8, 1)),
        128: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 64, 8, 1)),
        256: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 16, 4, 1)),
    },
    ("forward", TF32, PLAIN): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 32, 8, 2), C(64, 32, 8, 2), C(128, 32, 8, 1), C(128, 32, 8, 1)),
    },
    ("dq", TF32, PLAIN): {
        64: Row(C(64, 32, 8, 2), C(64, 32, 8, 2), C(64, 64, 8, 1), C(64, 64, 8, 1)),
        128: Row(C(64, 32, 8, 1), C(32, 32, 8, 1), C(32, 32, 8, 1), C(64, 32, 8, 1)),
    },
    ("dkdv", TF32, PLAIN): {
        64: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(64, 64, 8, 1), C(64, 64, 8, 1)),
        128: Row(C(32, 64, 8, 1), C(16, 64, 8, 1), C(16, 32, 8, 1), C(32, 64, 8, 1)),
    },
    # Exact float32 has no matrix instructions: every architecture multiplies alike, and registers hold the operands.
    # TF32 makes do with these tiles for all that is not plain.
    ("forward", 4, ANY): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 16, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("dq", 4, ANY): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 16, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("dkdv", 4, ANY): {
        64: everywhere(C(16, 32, 4, 1)),
        128: everywhere(C(16, 32, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
    ("bias", 4, ANY): {
        64: everywhere(C(32, 32, 8, 1)),
        128: everywhere(C(16, 32, 8, 1)),
        256: everywhere(C(16, 16, 8, 1)),
    },
}

#: Of the forward kernel for few rows, all of whose time goes into loading keys: head dim up to -> configuration.
FEW_ROWS = {
    64: Row(C(16, 128, 4, 3), C(16, 64, 4, 3), C(16, 128, 4, 3), C(16, 128, 4, 3)),
    128: Row(C(16, 64, 4, 3), C(16, 64, 4, 2), C(16, 64, 4, 3), C(16, 64, 4, 3)),
    256: Row(C(16, 32, 4, 3), C(16, 32, 4, 2), C(16, 32, 4, 3), C(16, 32, 4, 3)),
}
MAX_FEW_ROWS = 16

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
    head_dim = next(limit for limit in HEAD_DIMS if max(problem.head_dim, problem.value_dim) <= limit)
    dtype = TF32 if problem.allows_tf32 else problem.dtype.itemsize
    architecture = architecture_class(problem.capability)
    # All heads that share a key head share a tile.
    rows_per_kv_head = problem.seqlen_q * (problem.num_heads // max(problem.num_kv_heads, 1))
    if kernel == "forward" and dtype == 2 and rows_per_kv_head <= MAX_FEW_ROWS:
        return getattr(FEW_ROWS[head_dim], architecture)
    row = TABLE.get((kernel, dtype, features_of(problem)), {}).get(head_dim)
    return getattr(row or TABLE[kernel, problem.dtype.itemsize, ANY][head_dim], architecture)


def features_of(problem: AttentionProblem) -> Features:
    has_dropout = problem.dropout_p > 0.0
    others = [problem.has_mask, problem.has_bias, problem.softcap > 0.0]
    if problem.has_relative_bias:
        return ANY if any(others) else RELATIVE_BIAS
    if sum(others) == 1 and has_dropout:
        return ONE_AND_DROPOUT
    return {0: PLAIN, 1: ONE}.get(sum(others) + has_dropout, ANY)


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
