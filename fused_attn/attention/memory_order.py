"""Results (..., columns) whose dimensions have the same order in memory as those of an input."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like_layout(like: Tensor, columns: int) -> Tensor:
    """Uninitialised (..., columns), with the other dimensions and the memory order of `like`.

    For a transposed (B, L, H, D) or (L, B, H, D) tensor, the heads of the result can then be merged without a copy. The
    result is contiguous if the last stride of `like` is not 1.
    """
    if like.stride(-1) != 1:
        return torch.empty((*like.shape[:-1], columns), dtype=like.dtype, device=like.device)
    if like.shape[-1] == columns:
        x = torch.empty_like(like)  # It keeps the order of the dimensions, unless they overlap in memory (expand).
        return x if x.stride(-1) == 1 or columns == 1 else x.new_empty(like.shape)
    order = _memory_order(like.stride())
    in_order = like.new_empty((*(like.shape[dim] for dim in order), columns))
    return in_order.permute(*map(order.index, range(len(order))), -1)


def follow_layout(x: Tensor, like: Tensor) -> Tensor:
    """x (..., columns) with the strides that `empty_like_layout` would give it."""
    twin = torch.empty_strided(like.shape, like.stride(), device="meta")
    strides = empty_like_layout(twin, x.shape[-1]).stride()
    order = _memory_order(strides)
    x = x.permute(*order, -1).contiguous().permute(*map(order.index, range(len(order))), -1)
    # Only strides of dimensions of size 1 can still differ. Such strides have no effect on the memory that is read.
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _memory_order(strides: tuple[int, ...]) -> list[int]:
    """The dimensions before the last one in the order of their strides, the largest stride first.

    Equal strides keep their order. The loop compares strides, because `torch.compile` cannot sort by symbolic ones.
    """
    order: list[int] = []
    for dim in range(len(strides) - 1):
        at = len(order)
        while at > 0 and strides[order[at - 1]] < strides[dim]:
            at -= 1
        order.insert(at, dim)
    return order
