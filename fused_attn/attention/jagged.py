"""Converts nested tensors with ``layout=torch.jagged`` to the packed rows of `fused_attention_varlen`, and back."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor

#: How to make a value that shares the offsets tensor of key, for messages.
_WITH_OFFSETS_OF_KEY = "make value with torch.nested.nested_tensor_from_jagged(rows, key.offsets())"


class Packed(NamedTuple):
    """The rows of all sequences, one after the other.

    rows: (total, ...)
    offsets: (B + 1,), the row at which each sequence begins. This is the tensor that the nested tensor itself holds,
        because torch considers two nested tensors equally long only if they share this tensor.
    """

    rows: Tensor
    offsets: Tensor
    max_seqlen: int  # the longest length; under torch.compile, the number of all rows, which is an upper bound

    def like(self, rows: Tensor) -> Tensor:
        """Other rows of the same sequences, as a nested tensor (B, length, ...)."""
        # torch gets the longest length here, so that the next layer need not read the length from a device. Under
        # compilation, max_seqlen is only an upper bound, and torch would take the bound for the length.
        longest = None if torch.compiler.is_compiling() else self.max_seqlen
        return torch.nested.nested_tensor_from_jagged(rows, self.offsets, max_seqlen=longest)


def is_nested(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if one of the three is a nested tensor.

    False if one of them is no tensor. The checks of the call raise an error in that case.
    """
    try:
        return query.is_nested or key.is_nested or value.is_nested
    except AttributeError:
        return False


def pack_all(query: Tensor, key: Tensor, value: Tensor, length_dim: int) -> tuple[Packed, Packed, Packed]:
    """The rows of the nested tensors of one call, see `_pack`.

    Args:
        query, key, value: (B, ..., length, ...), jagged in dimension length_dim.

    Raises:
        TypeError: one of them is no nested tensor, or one of another layout.
        ValueError: another dimension is jagged, there are gaps between the sequences, there are other numbers of
            sequences, or the sequences of value are not as long as those of key.
    """
    q, k, v = (_pack(name, x, length_dim) for name, x in (("query", query), ("key", key), ("value", value)))
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] != query.shape[0]:
            raise checks.fail(name, f"as many sequences as query, {query.shape[0]}", x.shape[0])
    # torch considers these two sizes equal if the offsets are the same tensor.
    if value.shape[length_dim] != key.shape[length_dim]:
        _check_equal_lengths(k.offsets, v.offsets)
    return q, k, v


def _check_equal_lengths(key_offsets: Tensor, value_offsets: Tensor) -> None:
    """Raises ValueError unless the two offsets tensors (B + 1,) have the same contents, or if these cannot be read."""
    if not (modes.has_values(key_offsets) and modes.has_values(value_offsets)):
        expected = f"the offsets tensor of key, since two of them cannot be compared here ({_WITH_OFFSETS_OF_KEY})"
        raise checks.fail("value", expected, "another one")
    if not key_offsets.is_cpu:
        _warn_of_waiting()
    # The dtypes and the devices may differ. Other checks refuse a value on another device, and name the devices.
    if not torch.equal(key_offsets, value_offsets.to(key_offsets)):
        raise checks.fail("value", "sequences as long as those of key", "other lengths")


@functools.cache
def _warn_of_waiting() -> None:
    """Warns once that the comparison of two offsets tensors waits for a device."""
    warnings.warn(
        "value: the nested tensors key and value have different offsets tensors. Comparing the contents waits for the "
        f"device in every call. Instead, {_WITH_OFFSETS_OF_KEY}.",
        stacklevel=2,
    )


def _pack(name: str, x: Tensor, length_dim: int) -> Packed:
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
        # torch closes gaps only in tensors that are jagged in dimension 1.
        swap = f".transpose(1, {length_dim})" if length_dim != 1 else ""
        raise ValueError(
            f"{name}: expected sequences that follow one another; close the gaps with {name}{swap}.contiguous(){swap}"
        )
    rows = (x.transpose(1, length_dim) if length_dim != 1 else x).values()
    # Compiled code cannot read the lengths. The number of all rows is the only bound that it knows.
    max_seqlen = rows.shape[0] if torch.compiler.is_compiling() else x._get_max_seqlen()
    return Packed(rows, x.offsets(), max_seqlen)


def _is_jagged(x: Tensor) -> TypeGuard[NestedTensor]:
    """Whether a nested tensor has ``layout=torch.jagged``."""
    return x.layout == torch.jagged
