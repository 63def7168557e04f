"""Splits: several programs divide the keys of one row among themselves, and a second kernel merges their results.

Without splits, few queries (such as one in decoding) against many keys make too few programs to occupy a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton.arguments import Rows
from fused_attn.backends.triton.scores import add_sink, divisor, exponent_unit, largest_logit, rescale_factor
from fused_attn.backends.triton.tiles import load_tile, row_pointer, store_tile

#: A program for fewer keys than this costs more than it gains.
MIN_KEYS_PER_SPLIT = 512

#: The splits that a program of `merge_splits_kernel` loads at a time.
LOADED_SPLITS = tl.constexpr(16)


class Splits(NamedTuple):
    """What the splits of `attention_fwd_kernel` have written.

    out: (num_splits, B, H, L, Dv) float32
    sums: (2, num_splits, B, H, L) float32, first row_max after `to_exponent`, then row_sum
    """

    out: Tensor
    sums: Tensor


class Merged(NamedTuple):
    """What `merge_splits_kernel` writes.

    out: (B, H, L, Dv)
    lse: (B, H, L) float32 or None
    row_max: (B, H, L) float32 or None, the largest logit of each row
    """

    out: Rows
    lse: Tensor | None
    row_max: Tensor | None


def num_splits(num_programs: int, num_keys: int, multiprocessors: int) -> int:
    """How many programs divide the keys of one row among themselves, so that two programs run per multiprocessor.

    num_programs: the programs of the launch without splits
    num_keys: the keys that a program of that launch visits, at most
    """
    if num_programs >= multiprocessors:
        return 1
    return max(1, min(2 * multiprocessors // num_programs, num_keys // MIN_KEYS_PER_SPLIT))


@triton.jit(do_not_specialize=("num_splits", "rows_per_head", "num_rows"))
def merge_splits_kernel(
    splits,
    merged,
    sinks,  # (H,) or None
    settings,
    num_splits,
    rows_per_head,  # L
    num_rows,  # B * H * L
):
    """Merges the splits of one row per program. Rows are numbered through all heads and batch entries.

    The output of a row is the mean of its splits' outputs, weighted by exp(split_max) * split_sum. Splits are used when
    rows are few, so a program for several rows would leave multiprocessors idle. The order of the sums depends on
    num_splits and the dimension of values alone, so the bits of a row do not depend on the other rows.
    """
    row = tl.program_id(0)
    column = tl.arange(0, settings.BLOCK_DV)
    head_and_batch = row // rows_per_head
    head = head_and_batch % settings.num_heads

    # Vectors of one element, because `add_sink` and `store_tile` take tiles.
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, settings.BLOCK_DV], tl.float32)
    first_sum = tl.cast(num_splits, tl.int64) * num_rows
    for first_split in range(0, num_splits, LOADED_SPLITS):
        split = first_split + tl.arange(0, LOADED_SPLITS)
        is_split = split < num_splits
        split_row = split.to(tl.int64) * num_rows + row
        split_max = tl.load(splits.sums + split_row, mask=is_split, other=float("-inf"))
        split_sum = tl.load(splits.sums + first_sum + split_row, mask=is_split, other=0.0)
        split_pointer = splits.out + split_row[:, None] * settings.VALUE_DIM + column[None, :]
        tile = load_tile(split_pointer, is_split, settings.VALUE_DIM, settings.BLOCK_DV)
        new_max = tl.maximum(row_max, tl.max(split_max, 0))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = rescale_factor(row_max, finite_max, settings)
        weight = rescale_factor(split_max, finite_max, settings) * split_sum
        acc = acc * rescale[:, None] + tl.sum(tile * weight[:, None], 0)[None, :]
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        row_max = new_max
    row_max *= exponent_unit(settings)
    keys_max = largest_logit(row_max, row_sum)
    if sinks is not None:
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, tl.load(sinks + head).to(tl.float32))
    row_sum = divisor(row_max, row_sum)

    out, lse, max_out = merged
    out_row = row_pointer(out, head_and_batch // settings.num_heads, head, row % rows_per_head)
    is_row = tl.full([1], True, tl.int1)
    store_tile((out_row + column)[None, :], acc / row_sum[:, None], is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    offset = row + tl.arange(0, 1)
    if lse is not None:
        tl.store(lse + offset, row_max + tl.log(row_sum))
    if max_out is not None:
        tl.store(max_out + offset, keys_max)
