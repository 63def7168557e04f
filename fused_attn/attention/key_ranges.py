"""The argument `key_ranges` for a mask that exists as a bool tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention.checks import fail


def key_ranges_of(mask: Tensor) -> Tensor:
    """The `key_ranges` of a bool mask: for each query, the runs of keys that it sees.

    Call the function once for a mask that many calls use. It reads the mask, so on a GPU the host waits. A mask whose
    rows have very many runs, such as a hundred, is better given as `attn_mask`: kernels read all ranges of a row again
    and again.

    Args:
        mask: (..., L, S) bool, True = attend, with any dimensions before L. The last dimension must have all S keys: a
            mask that broadcasts along the keys has to be expanded first.

    Returns:
        (..., L, N, 2) int32, where N is the largest number of runs of a row, at least 1. Rows with fewer runs end with
        empty ranges (0, 0).

    Raises:
        TypeError, ValueError: mask is no bool tensor, or has fewer than two dimensions.

    >>> import torch
    >>> from fused_attn import key_ranges_of
    >>> key_ranges_of(torch.tensor([[True, True, False, True], [False, True, True, False]]))
    tensor([[[0, 2],
             [3, 4]],
    <BLANKLINE>
            [[1, 3],
             [0, 0]]], dtype=torch.int32)
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() < 2:
        raise fail("mask", "shape (..., L, S)", f"shape {tuple(mask.shape)}")
    # A border stands where a visible key and a hidden one are neighbours: a run begins, or a run ends. Behind the last
    # key and before the first one, all is hidden.
    borders = mask.new_zeros((*mask.shape[:-1], mask.shape[-1] + 1))
    borders[..., :-1] = mask
    borders[..., 1:] ^= mask
    of_row = borders.sum(-1, dtype=torch.int32).flatten()  # an even number: each run has two borders
    count = max(int(of_row.max()) // 2, 1) if of_row.numel() else 1
    ranges = torch.zeros((*mask.shape[:-1], count, 2), dtype=torch.int32, device=mask.device)
    row, key = borders.flatten(0, -2).nonzero(as_tuple=True)  # row by row, in ascending order of keys
    first_of_row = of_row.cumsum(0) - of_row
    number = torch.arange(row.shape[0], device=mask.device) - first_of_row[row]  # of the border in its row
    ranges.view(of_row.shape[0], 2 * count)[row, number] = key.int()
    return ranges
