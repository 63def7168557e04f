"""The tensors of a call in the form that the kernels read."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Saved
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import with_readable_shared

Tensors = TypeVar("Tensors", Inputs, Saved)


def readable_inputs(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the form that kernels read.

    query, key and value are as `_with_readable_rows` returns them, the others as `with_readable_shared` returns them.
    """
    of_query = _rows_dim(problem)
    of_keys = 1 if problem.is_paged else of_query
    inputs = _readable(inputs, (("query", of_query), ("key", of_keys), ("value", of_keys)))
    if inputs.key_lengths is not None:
        block_table = inputs.block_table
        block_table = None if block_table is None else block_table.contiguous()
        inputs = inputs._replace(key_lengths=inputs.key_lengths.contiguous(), block_table=block_table)
    return with_readable_shared(problem, inputs) if problem.has_shared else inputs


def readable_saved(problem: AttentionProblem, saved: Saved) -> Saved:
    """The tensors that forward has saved, with out and dout in the form that kernels read."""
    rows_dim = _rows_dim(problem)
    return _readable(saved, (("out", rows_dim), ("dout", rows_dim)))


def _rows_dim(problem: AttentionProblem) -> int:
    """The dimension of query, and of key and value without pages, that counts the rows of a head."""
    return 0 if problem.is_packed else 2


def _readable(tensors: Tensors, rows: tuple[tuple[str, int], ...]) -> Tensors:
    """The tuple with some tensors as `_with_readable_rows` returns them.

    rows: the names of these tensors, and the dimension of each that counts the rows of a head

    If no tensor changes, the tuple itself is returned, because making a new tuple takes longer than all the checks.
    """
    changed = {}
    for name, rows_dim in rows:
        x = getattr(tensors, name)
        found = _with_readable_rows(x, rows_dim)
        if found is not x:
            changed[name] = found
    return tensors._replace(**changed) if changed else tensors


def _with_readable_rows(x: Tensor, rows_dim: int) -> Tensor:
    """x, or a copy if kernels cannot read x as it is. Dimension `rows_dim` counts the rows of a head.

    - Kernels read a row in pieces of 16 bytes. So rows must be contiguous and begin at multiples of 16 bytes.
    - Each row must have an address of its own, so the rows must not be expanded.
    - Kernels read the memory and do not know torch's flag for a negation that has not been carried out.
    """
    strides = x.stride()  # of 4 dimensions, or of 3 if sequences are packed
    # The usual tensor passes these tests in a quarter of the time that the general ones below take.
    is_usual = strides[-1] == 1 and strides[rows_dim] and not (strides[0] | strides[1] | strides[-2]) % 8
    if is_usual and x.data_ptr() % 16 == 0 and not x.is_neg():
        return x
    x = x.resolve_neg()
    is_expanded = x.stride(rows_dim) == 0 and x.shape[rows_dim] > 1
    is_aligned = (
        not is_expanded
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    )
    # Not .contiguous(): it returns a contiguous tensor itself, even if its memory begins at no multiple of 16 bytes.
    return x if is_aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
