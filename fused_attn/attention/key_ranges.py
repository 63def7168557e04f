"""The argument `key_ranges` for a bool mask, and for documents that stand one after another in a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fused_attn.attention.checks import check_tensor, fail


def key_ranges_of_segments(segment_ids: Tensor) -> Tensor:
    """The `key_ranges` of packed documents: each token sees the tokens of its own document.

    A document is a run of equal ids. Two runs with the same id are two documents. Nothing waits for a GPU, and the
    memory is O(L).

    Args:
        segment_ids: (..., L) integers, the document of each token.

    Returns:
        (..., L, 1, 2) int32. Modules take the ranges of segment_ids (B, L) as they are. `fused_attention` takes those
        of segment_ids (L,) as they are; for segment_ids (B, L), add a dimension for the heads: ``ranges[:, None]``.

    Raises:
        TypeError, ValueError: segment_ids is no dense tensor of integers, or has no dimension.

    >>> import torch
    >>> from fused_attn import key_ranges_of_segments
    >>> key_ranges_of_segments(torch.tensor([7, 7, 7, 8, 8])).tolist()
    [[[0, 3]], [[0, 3]], [[0, 3]], [[3, 5]], [[3, 5]]]
    """
    if has_torch_function_unary(segment_ids):  # as fx traces it
        return handle_torch_function(key_ranges_of_segments, (segment_ids,), segment_ids)
    check_tensor("segment_ids", segment_ids)
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise TypeError(f"segment_ids: expected integers, got {segment_ids.dtype}")
    if segment_ids.layout != torch.strided or segment_ids.is_nested:
        raise fail("segment_ids", "a dense tensor", "a nested or sparse one")
    if not segment_ids.dim():
        raise fail("segment_ids", "shape (..., L)", "a tensor without dimensions")
    length = segment_ids.shape[-1]
    position = torch.arange(length, device=segment_ids.device, dtype=torch.int32)
    is_first = (segment_ids != segment_ids.roll(1, -1)) | (position == 0)
    is_last = is_first.roll(-1, -1)
    begin = position.where(is_first, 0).cummax(-1).values
    end = (position + 1).where(is_last, length).flip(-1).cummin(-1).values.flip(-1)
    return torch.stack([begin, end], dim=-1).unsqueeze(-2)


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
    check_tensor("mask", mask)
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
