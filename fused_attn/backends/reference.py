"""The specification: attention in plain PyTorch, on any device, differentiable to any order. Clear before fast."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import dropout
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem

name = "reference"
is_composite = True


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    return []


def forward(
    problem: AttentionProblem,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    sinks: Tensor | None,  # (H,)
    seed: Tensor | None,
    mask: MaskSpec,
) -> tuple[Tensor, Tensor]:
    compute = problem.accumulate_dtype
    if mask.key_padding is not None:
        # Zeroed before any product, because 0 * NaN is NaN.
        dropped = ~mask.key_padding[:, None, :, None]
        key, value = key.masked_fill(dropped, 0.0), value.masked_fill(dropped, 0.0)
    key, value = (_repeat_heads(x.to(compute), problem.num_heads) for x in (key, value))

    scores = (query.to(compute) * problem.scale) @ key.transpose(-2, -1)  # (B, H, L, S)
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    visible, bias = mask.to_dense(problem, query.device)
    if bias is not None:
        scores = scores + bias.to(compute)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))

    # A row that sees nothing has maximum -inf; 0 in its place keeps exp and its gradients finite.
    row_max = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    )
    is_empty = row_max == float("-inf")
    if sinks is not None:
        sink = sinks.to(compute)[None, :, None, None]
        row_max = torch.maximum(row_max, sink.detach())
    row_max = row_max.masked_fill(is_empty, 0.0)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sink - row_max)
    row_sum = row_sum.masked_fill(is_empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(is_empty, float("-inf")).squeeze(-1)  # (B, H, L)

    weights = weights / row_sum
    if problem.dropout_p:
        rows, columns = mask.positions(problem, query.device)
        keep = dropout.keep_mask(seed, problem.dropout_p, query.shape[0], problem.num_heads, rows, columns)
        weights = weights * keep * dropout.inverse_keep(problem.dropout_p)
    return (weights @ value).to(query.dtype), lse


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, H, S, D): key head h serves the query heads h * group ... (h + 1) * group - 1."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
