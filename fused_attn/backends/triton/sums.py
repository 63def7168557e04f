"""Sums over blocks of keys or queries. In float32 they are as exact as PyTorch's, however many blocks there are.

Left alone, Triton sums all products of a float32 entry by one chain of multiply-adds, whose error grows with each.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Sum(NamedTuple):
    """lost: what rounding has added to `total` in float32 (Kahan, CACM 8:40, 1965); elsewhere one unused number."""

    total: tl.tensor
    lost: tl.tensor


@triton.jit
def zero_sum(SHAPE: tl.constexpr, settings):
    return Sum(tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE if settings.IS_FLOAT32 else [1], tl.float32))


@triton.jit
def add(acc, x, settings):
    """The Sum `acc` with x in it."""
    if settings.IS_FLOAT32:
        x -= acc.lost
        total = acc.total + x
        return Sum(total, (total - acc.total) - x)
    else:
        return Sum(acc.total + x, acc.lost)


@triton.jit
def add_product(acc, a, b, settings):
    """The Sum `acc` with a @ b in it."""
    if settings.IS_FLOAT32:
        return add(acc, tl.dot(a, b, input_precision=settings.PRECISION), settings)
    else:
        return Sum(tl.dot(a, b, acc.total, input_precision=settings.PRECISION), acc.lost)


@triton.jit
def plus_product(acc, a, b, settings):
    """acc + a @ b, for sums whose probs do not grow with their length: blocks by themselves are exact enough."""
    if settings.IS_FLOAT32:
        # Triton would make acc + dot one chain again; it does not look for differences.
        return acc - tl.dot(-a, b, input_precision=settings.PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=settings.PRECISION)
