"""Sums over blocks of keys or queries. In float32 their error does not grow with the number of blocks.

Without these functions, Triton adds all products of an entry in one chain of float32 multiply-adds. The rounding error
of such a chain grows with its length, beyond the error of PyTorch's matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Sum(NamedTuple):
    """A compensated sum (Kahan, CACM 8:40, 1965).

    total: the sum so far
    lost: the rounding error within `total`, which `add` takes off the next term. Only float32 needs it. With 16-bit
        inputs it is an unused tensor of one number
    """

    total: tl.tensor
    lost: tl.tensor


@triton.jit
def zero_sum(SHAPE: tl.constexpr, settings):
    return Sum(tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE if settings.IS_FLOAT32 else [1], tl.float32))


@triton.jit
def add(acc, x, settings):
    """The Sum `acc` plus the tile x."""
    if settings.IS_FLOAT32:
        x -= acc.lost
        total = acc.total + x
        return Sum(total, (total - acc.total) - x)
    else:
        return Sum(acc.total + x, acc.lost)


@triton.jit
def add_product(acc, a, b, settings):
    """The Sum `acc` plus the product a @ b."""
    if settings.IS_FLOAT32:
        return add(acc, tl.dot(a, b, input_precision=settings.PRECISION), settings)
    else:
        return Sum(tl.dot(a, b, acc.total, input_precision=settings.PRECISION), acc.lost)


@triton.jit
def plus_product(acc, a, b, settings):
    """acc + a @ b, where acc is a plain tensor. In float32, the product is summed on its own before it is added.

    That is exact enough for sums over keys (out and dq): the probs of a row sum to 1, however many keys there are.
    Sums over queries (dk and dv) have no such bound and need a `Sum`.
    """
    if settings.IS_FLOAT32:
        # The compiler would turn acc + dot(a, b) into one chain of multiply-adds. It leaves a difference as it is.
        return acc - tl.dot(-a, b, input_precision=settings.PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=settings.PRECISION)
