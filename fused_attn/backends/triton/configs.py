"""Tile sizes, warps and pipeline stages by kernel, architecture, dtype, head dim and features.

The table was chosen without a GPU, from the registers and shared memory that `tests/triton/aot.py` prints. Its tiles
are the largest whose loops spill no registers, in proportions that are known to be fast from FlashAttention 2 and
FlexAttention. `python -m fused_attn tune` measures similar configurations on the user's GPU. Those that are faster
take precedence over this table.
"""

from __future__ import annotations

import bisect
import enum
from typing import NamedTuple

import triton

from fused_attn.attention.problem import AttentionProblem


class Config(NamedTuple):
    """A tile is block_m queries x block_n keys. num_stages: the stages of Triton's software pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


def padded_head_dim(head_dim: int) -> int:
    """The columns of a tile for head_dim: a power of two as Triton demands, at least 16 for matrix instructions."""
    return max(16, triton.next_power_of_2(head_dim))


#: The kernels that have rows in the table. `bias` is for two kernels: that of the gradient of attn_mask, and that of
#: the gradient of relative_bias, whose tiles are block_n x block_n.
KERNELS = ("forward", "dq", "dkdv", "bias")


class Row(NamedTuple):
    """One configuration for each class of architectures."""

    sm_80: Config  # 163 KiB of shared memory, mma
    small: Config  # consumer GPUs: 99 KiB, mma
    sm_90: Config  # 227 KiB, wgmma
    sm_100: Config  # 227 KiB and accumulators in tensor memory, tcgen05


def everywhere(config: Config) -> Row:
    """A row with the same configuration for all architectures."""
    return Row(config, config, config, config)


#: (compute capability, field of `Row`), ascending. An entry holds from its capability up to that of the next entry.
ARCHITECTURES = (
    ((8, 0), "sm_80"),
    ((8, 6), "small"),
    ((8, 7), "sm_80"),
    ((8, 9), "small"),
    ((9, 0), "sm_90"),
    ((10, 0), "sm_100"),
    ((12, 0), "small"),
)

#: The keys of the table's inner dictionaries: a row is for all head dims up to this number, and above the number before
#: it. If keys and values differ, the larger head dim counts.
HEAD_DIMS = (64, 128, 256, 512)


class Features(enum.Enum):
    """The features of a problem that need more registers, because they change scores.

    Scale, band, padding and sinks need hardly any, so they do not count.
    """

    PLAIN = "nothing"
    ONE = "a mask, a bias, a soft cap or dropout"
    ONE_AND_DROPOUT = "dropout, and a mask, a bias or a soft cap"
    RELATIVE_BIAS = "a relative bias, with or without dropout"
    ANY = "any other combination"


PLAIN, ONE, ANY = Features.PLAIN, Features.ONE, Features.ANY
ONE_AND_DROPOUT, RELATIVE_BIAS = Features.ONE_AND_DROPOUT, Features.RELATIVE_BIAS

#: The key of rows for float32 inputs if torch allows TF32, so that matrix instructions can multiply them.
TF32 = "tf32"

C = Config

#: (kernel, bytes per element or TF32, features) -> entry of HEAD_DIMS -> row. If a row is missing, `choose` takes the
#: row of (kernel, bytes per element, ANY). At head dim 512, wgmma and tcgen05 spill registers in the loops of forward,
#: because their tiles have at least 64 rows. So the tiles have 32 rows or fewer, which mma multiplies, also on sm_90.
TABLE = {
    # 4 warps at head dim 64, so that two thread blocks share a multiprocessor. One computes matrix products while the
    # other one computes exponentials.
    ("forward", 2, PLAIN): {
        64: Row(C(128, 64, 4, 3), C(128, 64, 4, 2), C(128, 64, 4, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 128, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 2), C(64, 32, 8, 1), C(128, 64, 8, 2), C(128, 32, 8, 2)),
        512: Row(C(32, 32, 8, 3), C(32, 32, 8, 1), C(32, 64, 8, 2), C(32, 64, 8, 2)),
    },
    ("forward", 2, ONE): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
    },
    ("forward", 2, ONE_AND_DROPOUT): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
    },
    # Each thread needs an address in relative_bias for each of its scores, and these addresses occupy registers.
    ("forward", 2, RELATIVE_BIAS): {
        64: Row(C(128, 64, 8, 3), C(128, 64, 8, 2), C(128, 64, 8, 3), C(128, 64, 8, 2)),
        128: Row(C(64, 32, 4, 2), C(64, 32, 4, 2), C(128, 32, 8, 2), C(128, 32, 8, 2)),
    },
    ("forward", 2, ANY): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(64, 32, 8, 1), C(64, 16, 4, 2), C(64, 32, 8, 1)),
        512: Row(C(32, 32, 8, 1), C(32, 32, 8, 1), C(32, 64, 8, 1), C(32, 64, 8, 1)),
    },
    ("dq", 2, PLAIN): {
        64: Row(C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 1), C(128, 64, 8, 2), C(128, 64, 8, 2)),
        256: Row(C(64, 32, 8, 1), C(16, 32, 4, 1), C(128, 32, 8, 1), C(64, 32, 8, 1)),
        512: Row(C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 64, 8, 2), C(16, 64, 8, 1)),
    },
    ("dq", 2, ONE): {
        64: Row(C(128, 32, 8, 2), C(128, 32, 8, 2), C(128, 64, 8, 2), C(128, 64, 8, 2)),
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
        128: Row(C(64, 32, 8, 1), C(64, 32, 4, 1), C(128, 32, 8, 1), C(64, 32, 4, 1)),
        256: Row(C(16, 32, 4, 1), C(16, 32, 4, 1), C(16, 32, 4, 1), C(64, 16, 4, 1)),
        512: Row(C(32, 32, 8, 1), C(16, 16, 8, 1), C(16, 32, 8, 1), C(16, 64, 8, 1)),
    },
    # The rows of this kernel's matrix products are keys, so block_n is larger than block_m.
    ("dkdv", 2, PLAIN): {
        64: Row(C(64, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(64, 64, 8, 2), C(32, 128, 8, 2), C(64, 128, 8, 2)),
        256: Row(C(32, 32, 8, 1), C(32, 32, 8, 1), C(16, 64, 8, 2), C(32, 64, 8, 1)),
        512: Row(C(16, 32, 8, 1), C(16, 16, 8, 1), C(32, 16, 8, 1), C(32, 16, 8, 1)),
    },
    ("dkdv", 2, ONE): {
        64: Row(C(32, 128, 8, 2), C(32, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 2)),
        128: Row(C(64, 64, 8, 2), C(32, 64, 8, 1), C(32, 128, 8, 2), C(32, 128, 8, 2)),
    },
    ("dkdv", 2, ONE_AND_DROPOUT): {
        64: Row(C(16, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2)),
        128: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(16, 64, 8, 2), C(32, 64, 8, 2)),
    },
    ("dkdv", 2, RELATIVE_BIAS): {
        64: Row(C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2), C(32, 128, 8, 2)),
        128: Row(C(32, 64, 8, 1), C(16, 64, 8, 1), C(32, 64, 8, 2), C(32, 64, 8, 2)),
    },
    ("dkdv", 2, ANY): {
        64: Row(C(32, 64, 8, 1), C(32, 64, 8, 1), C(32, 128, 8, 1), C(32, 64, 4, 1)),
        128: Row(C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 8, 1), C(16, 64, 4, 1)),
        256: Row(C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 64, 8, 1)),
        512: everywhere(C(16, 16, 8, 1)),
    },
    ("bias", 2, ANY): {
        64: Row(C(64, 32, 4, 1), C(64, 32, 4, 1), C(64, 64, 8, 1), C(64, 64, 8, 1)),
        128: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 64, 8, 1)),
        256: Row(C(64, 16, 8, 1), C(64, 16, 4, 1), C(64, 16, 4, 1), C(64, 16, 4, 1)),
        512: Row(C(32, 16, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 2), C(16, 16, 8, 2)),
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
    # Exact float32 has no matrix instructions, so tiles are small: the factors of products are held in registers. All
    # architectures use the same tiles. TF32 uses them too for all problems that are not plain.
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

#: The rows of the forward kernel for at most MAX_FEW_ROWS queries per key head, by entry of HEAD_DIMS. With so few
#: queries, loads of keys and values take all of the time.
FEW_ROWS = {
    64: Row(C(16, 128, 4, 3), C(16, 64, 4, 3), C(16, 128, 4, 3), C(16, 128, 4, 3)),
    128: Row(C(16, 64, 4, 3), C(16, 64, 4, 2), C(16, 64, 4, 3), C(16, 64, 4, 3)),
    256: Row(C(16, 32, 4, 3), C(16, 32, 4, 2), C(16, 32, 4, 3), C(16, 32, 4, 3)),
    512: Row(C(16, 32, 8, 3), C(16, 32, 8, 2), C(16, 32, 8, 3), C(16, 32, 8, 3)),
}
MAX_FEW_ROWS = 16

#: In the interpreter, the time of a step hardly depends on the size of its tile, so larger tiles are faster. Most tests
#: have short sequences. For these the tiles are small, so that a test still covers more than one block.
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
    """The configuration that the package's own tables have for this kernel and problem.

    Callers that launch kernels use `tuned.choose`, which prefers a row that was measured on the user's GPU.
    """
    if problem.device.type == "cpu":
        longest = max(problem.seqlen_q, problem.seqlen_k)
        return (INTERPRETER_SMALL if longest <= 128 else INTERPRETER_LARGE)[kernel]
    head_dim = next(limit for limit in HEAD_DIMS if max(problem.head_dim, problem.value_dim) <= limit)
    dtype = TF32 if problem.allows_tf32 else problem.dtype.itemsize
    assert problem.capability is not None, "a problem on a GPU has a compute capability"
    architecture = architecture_class(problem.capability)
    # If there are few queries, the heads that share a key head are packed into one tile.
    rows_per_kv_head = problem.seqlen_q * problem.group_size
    if kernel == "forward" and dtype == 2 and rows_per_kv_head <= MAX_FEW_ROWS:
        return getattr(FEW_ROWS[head_dim], architecture)
    row = TABLE.get((kernel, dtype, features_of(problem)), {}).get(head_dim)
    return getattr(row or TABLE[kernel, problem.dtype.itemsize, ANY][head_dim], architecture)


def features_of(problem: AttentionProblem) -> Features:
    """The `Features` of a problem, by which `TABLE` has its rows.

    A relative bias has rows of its own, with and without dropout. Otherwise the number of features counts.
    """
    has_dropout = problem.dropout_p > 0.0
    num_features = (problem.has_mask or problem.num_ranges > 0) + problem.has_bias + (problem.softcap > 0.0)
    if problem.has_relative_bias:
        return ANY if num_features else RELATIVE_BIAS
    if num_features == 1 and has_dropout:
        return ONE_AND_DROPOUT
    return {0: PLAIN, 1: ONE}.get(num_features + has_dropout, ANY)


def architecture_class(capability: tuple[int, int]) -> str:
    """The name of the field of a `Row` for a GPU of this compute capability."""
    return ARCHITECTURES[bisect.bisect(ARCHITECTURES, capability, key=lambda entry: entry[0]) - 1][1]


def candidates(kernel: str, problem: AttentionProblem) -> list[Config]:
    """The configurations that `tune` tries. The first is that of the table, and those that differ least come next.

    All combinations are tried of tiles with the same, half and twice the area, of 4 or 8 warps, and of as many stages
    as in the table, one more or one less.
    """
    row = choose(kernel, problem)
    tiles = [(int(row.block_m * m), int(row.block_n * n)) for m, n in _PROPORTIONS]
    neighbours = (
        Config(block_m, block_n, num_warps, num_stages)
        for block_m, block_n in tiles
        if min(block_m, block_n) >= 16
        for num_warps in (4, 8)
        for num_stages in range(max(1, row.num_stages - 1), row.num_stages + 2)
    )
    return sorted(neighbours, key=lambda config: _num_changes(row, config))


#: Factors for (block_m, block_n), which keep a tile's area, halve it or double it.
_PROPORTIONS = ((1, 1), (0.5, 2), (2, 0.5), (0.5, 1), (1, 0.5), (2, 1), (1, 2))


def _num_changes(row: Config, other: Config) -> int:
    """How many of tile, warps and stages differ."""
    is_other_tile = row[:2] != other[:2]
    return is_other_tile + (row.num_warps != other.num_warps) + (row.num_stages != other.num_stages)
