"""Nested tensors with ``layout=torch.jagged``: to the packed rows of `fused_attention_varlen`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor


class Packed(NamedTuple):
    """The rows of all sequences, one after the other.

    rows: (total, ...)
    offsets: (B + 1,), where each sequence begins; the nested tensor's own, so that a result has the same lengths to
        torch as what it was computed from
    """

    rows: Tensor
    offsets: Tensor
    max_seqlen: int  # at least the longest length, under torch.compile the number of rows

    def like(self, rows: Tensor) -> Tensor:
        """Other rows of the same sequences, as a nested tensor (B, length, ...)."""
        # The result is told its longest length, so that the next layer need not read this length from a device. Under
        # compilation max_seqlen is an upper bound only, which must not be taken for the length.
        longest = None if torch.compiler.is_compiling() else self.max_seqlen
        return torch.nested.nested_tensor_from_jagged(rows, self.offsets, max_seqlen=longest)


def is_nested(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if any of them is a nested tensor; False if one is no tensor, which the checks of the call report."""
    try:
        return query.is_nested or key.is_nested or value.is_nested
    except AttributeError:
        return False


def pack(name: str, x: Tensor, length_dim: int) -> Packed:
    """The rows of a nested tensor, differentiable and without a copy.

    Args:
        x: (B, ..., length, ...), jagged in dimension length_dim.

    Raises:
        TypeError: x is no nested tensor, or one of another layout.
        ValueError: another dimension is jagged, or there are gaps between the sequences.
    """
    if not (isinstance(x, Tensor) and x.is_nested):
        got = "a dense one" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a nested tensor, since another one is nested, got {got}")
    if not _is_jagged(x):
        raise TypeError(f"{name}: expected a nested tensor with layout=torch.jagged, got one with {x.layout}")
    if x._ragged_idx != length_dim:
        raise ValueError(
            f"{name}: expected lengths that differ in dimension {length_dim}, got ones that differ in {x._ragged_idx}"
        )
    if x.lengths() is not None:
        raise ValueError(f"{name}: expected sequences that follow one another; close the gaps with {name}.contiguous()")
    rows = (x.transpose(1, length_dim) if length_dim != 1 else x).values()
    # Compiled code cannot look at lengths. All rows together are the only bound that it knows.
    max_seqlen = rows.shape[0] if torch.compiler.is_compiling() else x._get_max_seqlen()
    return Packed(rows, x.offsets(), max_seqlen)


def _is_jagged(x: Tensor) -> TypeGuard[NestedTensor]:
    return x.layout == torch.jagged
