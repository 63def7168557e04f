"""The specification: attention in plain PyTorch, on any device, differentiable to any order.

The code is meant to be clear first and fast second.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import dropout, masks, pages
from fused_attn.attention.inputs import Gradients, Inputs, Saved, Wanted
from fused_attn.attention.masks import Positions
from fused_attn.attention.memory_order import follow_layout
from fused_attn.attention.problem import AttentionProblem


def forward(problem: AttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out (B, H, L, Dv), lse (B, H, L)); shapes and meanings are those of `Inputs`."""
    # Autocast has been applied to the inputs already. The formula itself computes in the accumulate dtype.
    with _without_autocast(inputs.query.device):
        x = _to_compute(problem, inputs)
        probs, lse, _ = _softmax(problem, x)
        if problem.dropout_p:
            probs = probs * _dropout_factors(problem, x)
        out = (probs @ x.value).to(problem.dtype)
        if problem.is_packed:
            # These rows of out are 0 already. Masking them makes their gradient 0 as well, before it enters a product.
            out = _without_strays(out, masks.positions(problem, x)[0])
        return follow_layout(out, inputs.query), lse


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The gradients in plain PyTorch, so that they can be differentiated again.

    ``saved.out`` and ``saved.lse`` are not used, because they may have no autograd history. Both are computed again.
    """
    with _without_autocast(inputs.query.device):
        x = _to_compute(problem, inputs)
        probs, lse, dcap = _softmax(problem, x)
        assert saved.dout is not None, "backward needs the gradient of out"
        dout, dlse = saved.dout.to(problem.accumulate_dtype), saved.dlse
        if problem.is_packed:
            rows, _ = masks.positions(problem, x)
            dout = _without_strays(dout, rows)
            dlse = None if dlse is None else dlse.masked_fill(~rows.has_sequence, 0.0)

        dprobs = dout @ x.value.transpose(-2, -1)  # (B, H, L, S)
        dropped_probs = probs
        if problem.dropout_p:
            factors = _dropout_factors(problem, x)
            dropped_probs, dprobs = probs * factors, dprobs * factors
        delta = (probs * dprobs).sum(-1, keepdim=True)  # (B, H, L, 1)
        if dlse is not None:
            delta = delta - dlse.unsqueeze(-1)
        dbiased = probs * (dprobs - delta)  # the gradient of the scores after softcap and bias
        dscores = (dbiased if dcap is None else dbiased * dcap) * problem.scale

        grads = {}
        if wanted.query:
            grads["query"] = follow_layout((dscores @ x.key).to(problem.dtype), inputs.query)
        if wanted.key:
            grads["key"] = follow_layout(_sum_groups(problem, dscores.transpose(-2, -1) @ x.query), inputs.key)
        if wanted.value:
            grads["value"] = follow_layout(_sum_groups(problem, dropped_probs.transpose(-2, -1) @ dout), inputs.value)
        if wanted.bias and inputs.bias is not None:
            grads["bias"] = dbiased.sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)
        if wanted.relative_bias and inputs.relative_bias is not None:
            diagonals = _sum_diagonals(problem, dbiased, x, *inputs.relative_bias.shape)
            grads["relative_bias"] = diagonals.to(inputs.relative_bias.dtype)
        if wanted.sinks and inputs.sinks is not None and x.sinks is not None:
            # exp(sink - lse) is the weight of the sink, which is 0 in an empty row. The exponent is masked. If exp were
            # masked instead, second derivatives would be infinity times 0, which is NaN.
            sink_weight = torch.exp((x.sinks[:, None] - lse).masked_fill(lse == float("-inf"), float("-inf")))
            grads["sinks"] = -(sink_weight * delta.squeeze(-1)).sum((0, 2)).to(inputs.sinks.dtype)
        return Gradients(**grads)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context that switches autocast off, if the device has autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Softmax(NamedTuple):
    """The softmax of the logits.

    probs: (B, H, L, S)
    lse:   (B, H, L), the log-sum-exp of each row
    dcap:  (B, H, L, S), the derivative of the softcap at each score; None without softcap
    """

    probs: Tensor
    lse: Tensor
    dcap: Tensor | None


def _softmax(problem: AttentionProblem, x: Inputs) -> Softmax:
    """The probs, the log-sum-exp, and the derivative of the softcap. x: the inputs from `_to_compute`."""
    scores = (x.query * problem.scale) @ x.key.transpose(-2, -1)  # (B, H, L, S)
    dcap = None
    if problem.softcap:
        capped = torch.tanh(scores / problem.softcap)
        scores, dcap = problem.softcap * capped, 1.0 - capped * capped
    visible, bias = masks.to_dense(problem, x)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))

    # The maximum of a row without visible keys is -inf. 0 in its place keeps exp and its gradients finite.
    row_max = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    )
    is_empty = row_max == float("-inf")
    sink = None if x.sinks is None else x.sinks[:, None, None]  # (H, 1, 1)
    if sink is not None:
        row_max = torch.maximum(row_max, sink.detach())
    row_max = row_max.masked_fill(is_empty, 0.0)
    probs = torch.exp(scores - row_max)
    row_sum = probs.sum(-1, keepdim=True)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink - row_max)
    row_sum = row_sum.masked_fill(is_empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(is_empty, float("-inf")).squeeze(-1)
    return Softmax(probs / row_sum, lse, dcap)


def _to_compute(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the accumulate dtype, with as many key heads as query heads, and with zeros in hidden keys.

    Pages are gathered, so that key and value are (B, H, S, D) and (B, H, S, Dv).
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if inputs.block_table is not None:
        key, value = (pages.gather(x, inputs.block_table) for x in (key, value))
    hidden = masks.hidden_keys(problem, inputs)
    if hidden is not None:
        # Hidden keys may hold NaN. They are replaced before any product, because 0 * NaN is NaN.
        key, value = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (key, value))
    if problem.is_packed:
        rows, columns = masks.positions(problem, inputs)
        query, key, value = (_without_strays(x, at) for x, at in ((query, rows), (key, columns), (value, columns)))
    # Key head h serves the query heads h * group ... (h + 1) * group - 1.
    group = problem.num_heads // max(problem.num_kv_heads, 1)
    compute = problem.accumulate_dtype
    key, value = (x.to(compute).repeat_interleave(group, dim=1) if group > 1 else x.to(compute) for x in (key, value))
    sinks = None if inputs.sinks is None else inputs.sinks.to(compute)
    return inputs._replace(query=query.to(compute), key=key, value=value, sinks=sinks)


def _without_strays(x: Tensor, positions: Positions) -> Tensor:
    """x (B, heads, rows, columns) with zeros in rows that belong to no packed sequence. Such rows may hold NaN."""
    return x.masked_fill(~positions.has_sequence[:, None], 0.0)


def _dropout_factors(problem: AttentionProblem, x: Inputs) -> Tensor:
    """(B, H, L, S): 0 for each dropped entry, 1 / (1 - p) for each other one."""
    assert x.seed is not None, "dropout_p > 0 needs a seed"
    rows, columns = masks.positions(problem, x)
    dropout_keep = dropout.keep_mask(x.seed, problem.dropout_p, x.query.shape[0], problem.num_heads, rows, columns)
    return dropout_keep.to(problem.accumulate_dtype) * dropout.scale(problem.dropout_p)


def _sum_groups(problem: AttentionProblem, dx: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, Hkv, S, D): a shared key head collects the gradients of the query heads that it serves."""
    batch, _, rows, columns = dx.shape
    group = problem.num_heads // max(problem.num_kv_heads, 1)
    return dx.reshape(batch, problem.num_kv_heads, group, rows, columns).sum(2).to(problem.dtype)


def _sum_diagonals(problem: AttentionProblem, dbiased: Tensor, x: Inputs, heads: int, num_columns: int) -> Tensor:
    """(B, H, L, S) -> (heads, num_columns): the gradient of a Toeplitz bias is the sum along each diagonal."""
    rows, columns = masks.positions(problem, x)
    distance = columns.position[None, :] - rows.position[:, None]
    column = (distance + (problem.seqlen_q - 1)).clamp(0, max(num_columns - 1, 0))
    per_head = dbiased.sum(0).flatten(1)  # (H, L * S)
    diagonals = per_head.new_zeros(per_head.shape[0], num_columns).index_add(1, column.flatten(), per_head)
    return diagonals.sum_to_size(heads, num_columns)
