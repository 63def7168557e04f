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

    query, key and value are as `readable` returns them, the others as `with_readable_shared` returns them.
    """
    inputs = readable(inputs, "query", "key", "value")
    if inputs.key_lengths is not None:
        block_table = inputs.block_table
        block_table = None if block_table is None else block_table.contiguous()
        inputs = inputs._replace(key_lengths=inputs.key_lengths.contiguous(), block_table=block_table)
    return with_readable_shared(problem, inputs) if problem.has_shared else inputs


def readable(tensors: Tensors, *names: str) -> Tensors:
    """The tuple with its tensors `names` in the form that kernels read; see `_with_readable_rows`.

    If no tensor changes, the tuple itself is returned, because making a new tuple takes longer than all the checks.
    """
    changed = {}
    for name in names:
        x = getattr(tensors, name)
        found = _with_readable_rows(x)
        if found is not x:
            changed[name] = found
    return tensors._replace(**changed) if changed else tensors


def _with_readable_rows(x: Tensor) -> Tensor:
    """x (B, H, rows, columns), or a copy if kernels cannot read x as it is.

    - Kernels read a row in pieces of 16 bytes. So rows must be contiguous and begin at multiples of 16 bytes.
    - Each row must have an address of its own, so the rows must not be expanded.
    - Kernels read the memory and do not know torch's flag for a negation that has not been carried out.
    """
    x = x.resolve_neg()
    is_expanded = x.stride(2) == 0 and x.shape[2] > 1
    is_aligned = (
        not is_expanded
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    )
    # Not .contiguous(): it returns a contiguous tensor itself, even if its memory begins at no multiple of 16 bytes.
    return x if is_aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)
