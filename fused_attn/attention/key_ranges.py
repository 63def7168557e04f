"""The argument `key_ranges` for a mask that exists as a bool tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention.checks import fail


def key_ranges_of(mask: Tensor) -> Tensor:
    """The `key_ranges` of a bool mask: for each query, the runs of keys that it sees.

    Call the function once for a mask that many calls use. It reads the mask, so on a GPU the host waits. A mask whose
    rows have many runs is better given as `attn_mask`: every kernel reads all ranges of a row.

    Args:
        mask: (..., L, S) bool, True = attend, with any dimensions before L.

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
    # A run begins where a visible key follows a hidden one, and ends where a hidden key follows a visible one.
    hidden = mask.new_zeros((*mask.shape[:-1], 1))
    starts = torch.cat([mask, hidden], -1) & ~torch.cat([hidden, mask], -1)
    ends = ~torch.cat([mask, hidden], -1) & torch.cat([hidden, mask], -1)
    number = starts.cumsum(-1)
    count = max(int(number[..., -1].max()), 1) if number.numel() else 1
    ranges = torch.zeros((*mask.shape[:-1], count, 2), dtype=torch.int32, device=mask.device)
    for side, borders in enumerate((starts, ends)):
        position = borders.nonzero(as_tuple=True)
        # Within a row, the borders come in ascending order, so their number in the row is the number of the run.
        run = borders.cumsum(-1)[position] - 1
        index = (*position[:-1], run)
        ranges[..., side][index] = position[-1].int()
    return ranges
