"""Layouts of instructions' operands in the notation of CuTe, as NVIDIA documents them.

A layout (shape : stride) maps a coordinate to an index, the sum of coordinate * stride over all modes. A mode may be a
nested tuple: one number then counts through its entries, the first entry fastest. For example, in the mode (4, 8), the
number 5 is the coordinate (1, 1).

The constants below come from CUTLASS's atom traits (`mma_traits_sm80.hpp`, `mma_traits_sm90_gmma.hpp`). The emulation
was written from another source, NVIDIA's PTX manual. So it means something if both agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Layout(NamedTuple):
    """A map from a coordinate, with a number for each mode, to an index."""

    shape: tuple
    stride: tuple

    def __call__(self, *coordinate: int) -> int:
        return sum(_index(*mode) for mode in zip(coordinate, self.shape, self.stride, strict=True))

    @property
    def sizes(self) -> list[int]:
        return [_size(shape) for shape in self.shape]

    def __iter__(self) -> Iterator:
        raise TypeError("call it with a coordinate")


def _size(shape: int | tuple) -> int:
    """The number of coordinates of a mode."""
    if isinstance(shape, int):
        return shape
    product = 1
    for mode in shape:
        product *= _size(mode)
    return product


def _index(coordinate: int, shape: int | tuple, stride: int | tuple) -> int:
    """The index of a number in a mode."""
    if isinstance(shape, int):
        return coordinate * stride
    index = 0
    for mode, step in zip(shape, stride, strict=True):
        index += _index(coordinate % _size(mode), mode, step)
        coordinate //= _size(mode)
    return index


# ---- Fragments in registers: (thread, value) -> row + rows * column

MMA_A = Layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)))  # 16 x 16
MMA_B = Layout(((4, 8), (2, 2)), ((16, 1), (8, 64)))  # 8 x 16: (n, k)
MMA_C = Layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))  # 16 x 8

WGMMA_A = Layout(((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)))  # 64 x 16


def wgmma_c(n: int) -> Layout:  # 64 x n
    return Layout(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))


# ---- Operands in shared memory: (mn, k) -> number of the 16-bit element, before swizzling. mn counts rows of the left
# factor or columns of the right one, and the product sums over k. Rows have 128 or 64 bytes, B = 3 or 2 in the names of
# swizzles.

CHUNK = 8  # elements in 16 bytes, T in CuTe's comments


def k_major(stride_bytes: int, mn: int, row_bytes: int) -> Layout:
    """Swizzle<3,4,3> o ((8,m),(T,2)):((8T,SBO),(1,T)), Swizzle<2,4,3> o ((8,m),(T,2)):((4T,SBO),(1,T))"""
    return Layout(((8, mn // 8), (CHUNK, 2)), ((row_bytes // 2, stride_bytes // 2), (1, CHUNK)))


def mn_major(leading_bytes: int, stride_bytes: int, mn: int, row_bytes: int) -> Layout:
    """Swizzle<3,4,3> o ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), Swizzle<2,4,3> o ((T,4,m),(8,k)):((1,T,LBO),(4T,SBO))"""
    width = row_bytes // 2
    shape = (CHUNK, width // CHUNK, -(-mn // width)), (8, 2)
    return Layout(shape, ((1, CHUNK, leading_bytes // 2), (width, stride_bytes // 2)))


def swizzle(byte: int, row_bytes: int) -> int:
    """Swizzle<B,4,3> of a byte address: the B bits from bit 4 on are XORed with those from bit 7 on."""
    bits = (byte >> 7) & {128: 0b111, 64: 0b011}[row_bytes]
    return byte ^ (bits << 4)
