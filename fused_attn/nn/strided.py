"""Nested tensors with ``layout=torch.strided``: the modules compute with padded copies of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Padded(NamedTuple):
    """A padded copy of a nested tensor (N, length, E). L is the longest length."""

    rows: Tensor  # (N, L, E), zero behind the end of a sequence
    is_padding: Tensor  # (N, L) bool
    lengths: list[int]


def is_strided(x: Tensor) -> bool:
    """Whether x is a nested tensor with ``layout=torch.strided``."""
    return x.is_nested and x.layout == torch.strided


def pad(x: Tensor) -> Padded:
    """The padded copy of a nested tensor (N, length, E)."""
    rows = list(x.unbind())
    lengths = [row.shape[0] for row in rows]
    # to_padded_tensor would refuse a batch in which all sequences have length 0.
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = torch.arange(padded.shape[1], device=x.device)
    return Padded(padded, positions >= torch.tensor(lengths, device=x.device)[:, None], lengths)


def unpad(x: Tensor, lengths: list[int]) -> Tensor:
    """The nested tensor (N, length, E) of a padded one, (N, L, E)."""
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(x, lengths, strict=True)])
