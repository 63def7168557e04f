"""Into how many parts the kernels divide their work, so that few rows make use of the whole GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

from fused_attn.attention.checks import MAX_SPLITS
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import keys_in_band, queries_in_band
from fused_attn.backends.cuda import hardware


class KeySplits(NamedTuple):
    """Into how many parts each kind of forward kernel divides the keys of a row; 0 = no kernel of this kind runs.

    If both kinds run, the decode kernels compute the sequences of a packed call that have few queries.
    """

    decode: int = 0
    large: int = 1


UNDIVIDED = KeySplits()


class GradientSplits(NamedTuple):
    """How many programs share the work for a block of rows of a gradient: for dq each visits a part of the keys, for dk
    and dv each visits a part of the queries. The fused backward of sm_90a has no blocks of dq.
    """

    dq: int = 1
    dk: int = 1


UNDIVIDED_GRADIENTS = GradientSplits()

#: The decode kernels have tiles of this many rows: a row is a query of one of the heads of a head group.
DECODE_ROWS = 16
#: With more tiles than this for a head group, the large kernels run. Each tile reads all keys, though most of them from
#: the L2 cache, and makes little use of the tensor cores.
MAX_DECODE_TILES = 2
#: A program of the decode kernels for fewer keys than this would spend its time waiting for the first ones.
MIN_KEYS_PER_SPLIT = 256

#: With a fixed number of splits, the large kernels divide keys for at most this many queries. The number may be more
#: than the device has use for, and the sums of the splits take memory and time.
MAX_QUERIES_OF_FIXED_SPLITS = 128
#: Tiles of the large kernels have about this many queries.
LARGE_TILE_ROWS = 128

#: The fused backward has blocks of this many keys, and the other kernels for dk and dv have blocks of KEY_BLOCK keys.
FUSED_KEY_BLOCK = 128
KEY_BLOCK = 64
#: The large kernels visit about this many rows in a step.
STEP_ROWS = 64
#: Estimates in steps, not measured: to start a program and to store its sums, and to launch the kernel that merges
#: them. This kernel reads the sums of several splits in the time of a step. With head dim 128 on an H100, a step takes
#: about 0.9 us in forward and 1.5 us in backward.
STEPS_OF_PART = 8
STEPS_OF_MERGING = 8
SPLITS_MERGED_IN_A_STEP = 4
#: With more programs than this for each one that can run at a time, the last round of them matters little.
ENOUGH_ROUNDS = 4


def decode_tiles(problem: AttentionProblem) -> int:
    """How many tiles of rows the decode kernels have for each head group; 0 = these kernels do not run."""
    most_rows = MAX_DECODE_TILES * DECODE_ROWS
    if problem.dropout_p > 0.0 or problem.group_size > most_rows:
        return 0
    if (rows := problem.seqlen_q * problem.group_size) <= most_rows:
        return -(-rows // DECODE_ROWS)
    # The tokens and the prompts of a server share a call. Packed calls without pages are rather those of training,
    # whose sequences are long.
    return MAX_DECODE_TILES if problem.is_packed and problem.is_paged else 0


@functools.lru_cache(maxsize=4096)
def key_splits(problem: AttentionProblem) -> KeySplits:
    """The kernels that run forward, and into how many parts they divide the keys of each row.

    The numbers follow from shapes, the band and the device alone, never from lengths or masks.
    """
    tiles = decode_tiles(problem)
    if not tiles:
        return KeySplits(large=large_splits(problem))
    rows = problem.seqlen_q * problem.group_size
    is_mixed = rows > MAX_DECODE_TILES * DECODE_ROWS
    return KeySplits(_decode_splits(problem, tiles), large_splits(problem) if is_mixed else 0)


def _decode_splits(problem: AttentionProblem, tiles: int) -> int:
    """The splits of the decode kernels, which have `tiles` tiles of rows for each head group."""
    if problem.num_splits:
        return problem.num_splits
    programs = max(problem.batch * problem.num_kv_heads * tiles, 1)
    most = keys_in_band(problem, problem.seqlen_q) // MIN_KEYS_PER_SPLIT
    return max(1, min(_splits_of_programs(programs, _resident_programs(problem)), most))


def large_splits(problem: AttentionProblem) -> int:
    """The splits of the large kernels. Without splits, each tile of queries has one program."""
    if problem.num_splits:
        # The longest sequence of a packed call must not decide about the bits of the other ones.
        has_few = problem.seqlen_q <= MAX_QUERIES_OF_FIXED_SPLITS and not problem.is_packed
        return problem.num_splits if has_few else 1
    tiles = problem.batch * problem.num_heads * -(-problem.seqlen_q // LARGE_TILE_ROWS)
    steps = -(-keys_in_band(problem, LARGE_TILE_ROWS) // STEP_ROWS)
    return _splits_of_steps(tiles, steps, 1, _resident_large_programs(problem, hardware.runs_on_hopper(problem)))


@functools.lru_cache(maxsize=4096)
def gradient_splits(problem: AttentionProblem, rows_q: int, rows_k: int) -> GradientSplits:
    """How many programs share the work for a block of rows of a gradient.

    The numbers follow from shapes, the band and the device alone, never from lengths or masks.

    rows_q, rows_k: the rows of a head of query and key; of all sequences if the problem is packed
    """
    is_hopper = hardware.device_architecture(problem) == 90
    kv_heads, group_size = problem.num_kv_heads, problem.group_size
    resident = _resident_large_programs(problem, is_hopper)

    def splits_of(heads: int, rows: int, longest: int, block: int, visited: int, step_rows: int, repeats: int) -> int:
        blocks = problem.batch * -(-longest // block)
        if problem.is_packed:
            blocks = min(blocks, rows // block + problem.batch)
        return _splits_of_steps(heads * blocks, -(-visited // step_rows), step_rows // STEP_ROWS * repeats, resident)

    if is_fused_backward(problem):
        # The kernel for head dim 64 visits 128 queries at a time.
        visited, step_rows = queries_in_band(problem, FUSED_KEY_BLOCK), 128 if problem.head_dim <= 64 else STEP_ROWS
        return GradientSplits(
            dk=splits_of(kv_heads, rows_k, problem.seqlen_k, FUSED_KEY_BLOCK, visited, step_rows, group_size)
        )
    query_block = 128 if is_hopper else 64
    keys, queries = keys_in_band(problem, query_block), queries_in_band(problem, KEY_BLOCK)
    return GradientSplits(
        dq=splits_of(problem.num_heads, rows_q, problem.seqlen_q, query_block, keys, STEP_ROWS, 1),
        dk=splits_of(kv_heads, rows_k, problem.seqlen_k, KEY_BLOCK, queries, STEP_ROWS, group_size),
    )


def is_fused_backward(problem: AttentionProblem) -> bool:
    """Whether one kernel computes dq, dk and dv: on sm_90a, with head dims up to 128."""
    return hardware.device_architecture(problem) == 90 and max(problem.head_dim, problem.value_dim) <= 128


@functools.lru_cache(maxsize=4096)
def _splits_of_steps(blocks: int, visits: int, steps_of_visit: int, resident: int) -> int:
    """How many programs should share the `visits` of each of `blocks` blocks of rows, by an estimate of the time.

    All programs take equally long, and run in rounds of `resident` programs. This serves the large forward kernels and
    backward. The decode kernels wait for memory instead: see `_splits_of_programs`.

    steps_of_visit: how many steps a visit takes; they are not divided
    """
    blocks = max(blocks, 1)
    most = min(ENOUGH_ROUNDS * resident // blocks, visits, MAX_SPLITS)

    def time(splits: int) -> int:
        rounds, steps = -(-blocks * splits // resident), -(-visits // splits) * steps_of_visit
        if splits == 1:
            return rounds * steps
        return rounds * (steps + STEPS_OF_PART) + STEPS_OF_MERGING + splits // SPLITS_MERGED_IN_A_STEP

    return min(range(1, most + 1), key=time, default=1)


def _splits_of_programs(programs: int, resident: int) -> int:
    """How many splits make the best use of a device on which `resident` programs run at a time.

    If all programs run at once, all of them get the same share of the memory's bandwidth and end together. Otherwise a
    last round of few programs leaves bandwidth unused, the less so the more rounds there are.
    """
    if programs <= resident:
        return min(resident // programs, MAX_SPLITS)
    # For each number of splits, the share of all rounds that its programs use.
    used = {n: programs * n / (resident * -(-programs * n // resident)) for n in range(1, 5)}
    return next((n for n, share in used.items() if share >= 0.9), max(used, key=lambda n: used[n]))


def _resident_programs(problem: AttentionProblem) -> int:
    """How many programs of the decode kernels run at a time: their shared memory allows two for a multiprocessor of
    compute capability 9.0, and one on smaller ones.
    """
    return hardware.multiprocessors(problem.device) * (2 if hardware.runs_on_hopper(problem) else 1)


def _resident_large_programs(problem: AttentionProblem, is_hopper: bool) -> int:
    """How many programs of the other kernels run at a time. Those for sm_90a take a multiprocessor each. Two of those
    for sm_80 share one, with head dims up to 128.
    """
    return hardware.multiprocessors(problem.device) * (2 if not is_hopper and problem.head_dim <= 128 else 1)
