"""The memory of a call for intermediate results."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Wanted
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.cuda import hardware
from fused_attn.backends.cuda.splits import UNDIVIDED, UNDIVIDED_GRADIENTS, GradientSplits, KeySplits


def workspace(
    problem: AttentionProblem,
    inputs: Inputs,
    wanted: Wanted | None,
    key_splits: KeySplits = UNDIVIDED,
    gradient_splits: GradientSplits = UNDIVIDED_GRADIENTS,
) -> Tensor | None:
    """Uninitialised memory for intermediate results of a call, float32; None if the call needs none.

    wanted: the wanted gradients of a backward call; None for forward
    """
    relative_bias = inputs.relative_bias
    size = workspace_bytes(
        problem,
        *rows_of_heads(problem, inputs),
        _mask_entries(inputs),
        0 if relative_bias is None else relative_bias.shape[0],
        key_splits,
        gradient_splits,
        wanted,
        None if inputs.bias is None or wanted is None or not wanted.bias else inputs.bias.shape,
    )
    return torch.empty(size // 4, dtype=torch.float32, device=inputs.query.device) if size else None


def rows_of_heads(problem: AttentionProblem, inputs: Inputs) -> tuple[int, int]:
    """The rows of a head of query and of key: of all sequences if they are packed, and of a page if they are paged."""
    rows_q = inputs.query.shape[0] if problem.is_packed else problem.seqlen_q
    if problem.is_paged:
        return rows_q, problem.page_size
    return rows_q, inputs.key.shape[0] if problem.is_packed else problem.seqlen_k


def _mask_entries(inputs: Inputs) -> int:
    """How many (L, S) masks the mask (B|1, H|1, ...) and the ranges of keys make; 0 without both.

    A dimension of batch entries or heads that is expanded counts once.
    """
    masks = [x for x in (inputs.mask, inputs.key_ranges) if x is not None]
    if not masks:
        return 0
    return math.prod(max(1 if x.stride(dim) == 0 else x.shape[dim] for x in masks) for dim in (0, 1))


@functools.lru_cache(maxsize=4096)
def workspace_bytes(
    problem: AttentionProblem,
    rows_q: int,
    rows_k: int,
    mask_entries: int,
    relative_bias_heads: int,
    key_splits: KeySplits,
    gradient_splits: GradientSplits,
    wanted: Wanted | None,
    dbias_shape: torch.Size | None,
) -> int:
    """The size of the workspace in bytes, as the native module computes it.

    rows_q, rows_k: as `rows_of_heads` returns them
    mask_entries: see `_mask_entries`
    relative_bias_heads: the heads of relative_bias; 0 without one
    wanted: the wanted gradients of a backward call; None for forward
    dbias_shape: the shape of the gradient of bias; None if it is not wanted
    """
    wants = Wanted() if wanted is None else wanted
    # In the order of WorkspaceNeeds (csrc/cuda/attention.h).
    return hardware.module.workspace_bytes(
        architecture=hardware.architecture(problem, has_large_kernels=key_splits.large > 0),
        is_backward=wanted is not None,
        batch=problem.batch,
        batch_entries=1 if problem.is_packed else problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        rows_q=rows_q,
        rows_k=rows_k,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        is_packed=problem.is_packed,
        has_key_padding=problem.has_key_padding,
        mask_entries=mask_entries,
        relative_bias_heads=relative_bias_heads,
        decode_splits=key_splits.decode,
        large_splits=key_splits.large,
        dq_splits=gradient_splits.dq,
        dk_splits=gradient_splits.dk,
        wants_dquery=wants.query,
        wants_dkey=wants.key,
        wants_dvalue=wants.value,
        dbias_shape=dbias_shape,
        wants_dkey_bias=wants.key_bias,
        wants_drelative_bias=wants.relative_bias,
    )
