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


def forward(problem: AttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """All `Results`. row_max has no gradient."""
    # Autocast has been applied to the inputs already. The formula itself computes in the accumulate dtype.
    with without_autocast(inputs.query.device):
        x = _to_compute(problem, inputs)
        probs, lse, row_max, _ = _softmax(problem, x)
        if problem.dropout_p:
            probs = probs * _dropout_factors(problem, x)
        out = (probs @ x.value).to(problem.dtype)
        if problem.is_packed:
            # These rows of out are 0 already. Masking them makes their gradient 0 as well, before it enters a product.
            out = _without_strays(out, masks.positions(problem, x)[0])
            lse, row_max = lse[0], row_max[0]
        return _in_layout_of(inputs.query, out), lse, row_max


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The gradients in plain PyTorch, so that they can be differentiated again.

    ``saved.out`` and ``saved.lse`` are not used, because they may have no autograd history. Both are computed again.
    """
    return _backward(problem, inputs, saved, wanted, uses_saved=False)


def backward_from_saved(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The gradients from ``saved.out`` and ``saved.lse``, as kernels compute them.

    These two may be those of a softmax over more keys than this problem has; see `fused_attn.partial`.
    """
    return _backward(problem, inputs, saved, wanted, uses_saved=True)


def _backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted, uses_saved: bool) -> Gradients:
    with without_autocast(inputs.query.device):
        x = _to_compute(problem, inputs)
        if problem.is_packed:
            saved = _with_batch_of_one(saved)
        assert saved.dout is not None, "backward needs the gradient of out"
        if uses_saved:
            assert saved.out is not None and saved.lse is not None, "the caller has saved both"
            logits, dcap = _logits(problem, x)
            lse = saved.lse.to(problem.accumulate_dtype)
            probs = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        else:
            probs, lse, _, dcap = _softmax(problem, x)
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
        if uses_saved and saved.out is not None:
            delta = (dout * saved.out.to(problem.accumulate_dtype)).sum(-1, keepdim=True)
        else:
            delta = (probs * dprobs).sum(-1, keepdim=True)  # (B, H, L, 1)
        if dlse is not None:
            delta = delta - dlse.unsqueeze(-1)
        dbiased = probs * (dprobs - delta)  # the gradient of the logits
        dscores = (dbiased if dcap is None else dbiased * dcap) * problem.scale

        grads = {}
        if wanted.query:
            grads["query"] = _in_layout_of(inputs.query, (dscores @ x.key).to(problem.dtype))
        if wanted.key:
            grads["key"] = _in_layout_of(inputs.key, _sum_groups(problem, dscores.transpose(-2, -1) @ x.query))
        if wanted.value:
            grads["value"] = _in_layout_of(inputs.value, _sum_groups(problem, dropped_probs.transpose(-2, -1) @ dout))
        if wanted.bias and inputs.bias is not None:
            grads["bias"] = dbiased.sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)
        if wanted.key_bias and inputs.key_bias is not None:
            grads["key_bias"] = dbiased.sum((1, 2)).to(inputs.key_bias.dtype)
        if wanted.relative_bias and inputs.relative_bias is not None:
            diagonals = _sum_diagonals(problem, dbiased, x, *inputs.relative_bias.shape)
            grads["relative_bias"] = diagonals.to(inputs.relative_bias.dtype)
        if wanted.sinks and inputs.sinks is not None and x.sinks is not None:
            grads["sinks"] = dsinks(x.sinks, lse, delta.squeeze(-1)).to(inputs.sinks.dtype)
        return Gradients(**grads)


def dsinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of sinks (H,), from lse and delta (B, H, L). All have the accumulate dtype.

    exp(sink - lse) is the weight of the sink. In an empty row, lse is -inf, and the weight must be 0. So the exponent
    is set to -inf there. If the result of exp were set to 0 instead, second derivatives would be infinity times 0,
    which is NaN.
    """
    weight = torch.exp((sinks[:, None] - lse).masked_fill(lse == float("-inf"), float("-inf")))
    return -(weight * delta).sum((0, 2))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context that switches autocast off, if the device has autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Softmax(NamedTuple):
    """The softmax of the logits.

    probs:   (B, H, L, S)
    lse:     (B, H, L), the log-sum-exp of each row
    row_max: (B, H, L), the largest logit of each row, without the sink and without gradient
    dcap:    (B, H, L, S), the derivative of the softcap at each score; None without softcap
    """

    probs: Tensor
    lse: Tensor
    row_max: Tensor
    dcap: Tensor | None


def _logits(problem: AttentionProblem, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """The logits (hidden ones are -inf), and the derivative of the softcap.

    x: the inputs from `_to_compute`
    """
    scores = (x.query * problem.scale) @ x.key.transpose(-2, -1)  # (B, H, L, S)
    logits, dcap = scores, None
    if problem.softcap:
        capped = torch.tanh(scores / problem.softcap)
        logits, dcap = problem.softcap * capped, 1.0 - capped * capped
    visible, bias = masks.to_dense(problem, x)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return logits, dcap


def _softmax(problem: AttentionProblem, x: Inputs) -> Softmax:
    """The probs, the log-sum-exp, the largest logits, and the derivative of the softcap. x: from `_to_compute`."""
    logits, dcap = _logits(problem, x)
    # The maximum of a row without visible keys is -inf. The row gets 0 as its maximum instead, which keeps exp and the
    # gradients of exp finite.
    row_max = (
        logits.detach().amax(-1, keepdim=True)
        if logits.shape[-1]
        else logits.new_full((*logits.shape[:-1], 1), float("-inf"))
    )
    is_empty = row_max == float("-inf")
    reference = row_max
    sink = None if x.sinks is None else x.sinks[:, None, None]  # (H, 1, 1)
    if sink is not None:
        reference = torch.maximum(reference, sink.detach())
    reference = reference.masked_fill(is_empty, 0.0)
    probs = torch.exp(logits - reference)
    row_sum = probs.sum(-1, keepdim=True)
    if sink is not None:
        # The exponent of an empty row is masked, and not the sum alone: the gradient of an infinite exp is NaN.
        row_sum = row_sum + torch.exp((sink - reference).masked_fill(is_empty, float("-inf")))
    row_sum = row_sum.masked_fill(is_empty, 1.0)
    lse = (reference + row_sum.log()).masked_fill(is_empty, float("-inf")).squeeze(-1)
    return Softmax(probs / row_sum, lse, row_max.squeeze(-1), dcap)


def _to_compute(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the accumulate dtype, with as many key heads as query heads, and with zeros in hidden keys.

    All have the dimensions (B, H, rows, columns), with B = 1 if the queries are packed. Pages are gathered, so that
    there are S keys. If the queries are packed, there are B * S keys, as `masks.positions` counts them.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if problem.is_packed:
        query = _with_batch(query)
    if inputs.block_table is not None:
        key, value = (pages.gather(x, inputs.block_table) for x in (key, value))
        if problem.is_packed:
            key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (key, value))
    elif problem.is_packed:
        key, value = _with_batch(key), _with_batch(value)
    inputs = inputs._replace(query=query, key=key, value=value)
    hidden = masks.hidden_keys(problem, inputs)
    if hidden is not None:
        # Hidden keys may hold NaN. They are replaced before any product, because 0 * NaN is NaN.
        key, value = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (key, value))
    if problem.is_packed:
        rows, columns = masks.positions(problem, inputs)
        query, key, value = (_without_strays(x, at) for x, at in ((query, rows), (key, columns), (value, columns)))
    # Key head h serves the query heads h * group_size ... (h + 1) * group_size - 1.
    compute, group_size = problem.accumulate_dtype, problem.group_size
    key, value = (x.to(compute) for x in (key, value))
    if group_size > 1:
        key, value = (x.repeat_interleave(group_size, dim=1) for x in (key, value))
    sinks = None if inputs.sinks is None else inputs.sinks.to(compute)
    return inputs._replace(query=query.to(compute), key=key, value=value, sinks=sinks)


def _with_batch(rows: Tensor) -> Tensor:
    """Packed rows (total, heads, columns) as (1, heads, total, columns)."""
    return rows.transpose(0, 1)[None]


def _with_batch_of_one(saved: Saved) -> Saved:
    """What forward has saved of packed rows, with a batch of 1."""
    out, lse, dout, dlse = saved
    return Saved(
        out=None if out is None else _with_batch(out),
        lse=None if lse is None else lse[None],
        dout=None if dout is None else _with_batch(dout),
        dlse=None if dlse is None else dlse[None],
    )


def _in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """x (B, heads, rows, columns) in the layout of `like`, which may be packed rows (total, heads, columns)."""
    return follow_layout(x[0].transpose(0, 1) if like.dim() == 3 else x, like)


def _without_strays(x: Tensor, positions: Positions) -> Tensor:
    """x (B, heads, rows, columns) with zeros in rows that belong to no packed sequence. Such rows may hold NaN."""
    return x.masked_fill(~positions.has_sequence[:, None], 0.0)


def _dropout_factors(problem: AttentionProblem, x: Inputs) -> Tensor:
    """(B, H, L, S): 0 for each dropped entry, 1 / (1 - p) for each other one."""
    assert x.seed is not None, "dropout_p > 0 needs a seed"
    rows, columns = masks.positions(problem, x)
    batch, origin = x.query.shape[0], problem.dropout_origin
    dropout_keep = dropout.keep_mask(x.seed, problem.dropout_p, batch, problem.num_heads, rows, columns, origin)
    return dropout_keep.to(problem.accumulate_dtype) * dropout.scale(problem.dropout_p)


def _sum_groups(problem: AttentionProblem, dx: Tensor) -> Tensor:
    """Turns the gradients (B, H, S, D) of repeated key heads into (B, Hkv, S, D): the sum over each head group."""
    batch, _, rows, columns = dx.shape
    return dx.reshape(batch, problem.num_kv_heads, problem.group_size, rows, columns).sum(2).to(problem.dtype)


def _sum_diagonals(problem: AttentionProblem, dbiased: Tensor, x: Inputs, heads: int, num_columns: int) -> Tensor:
    """The gradient (heads, num_columns) of a relative bias: the sum of dbiased (B, H, L, S) along each diagonal.

    heads: H, or 1 if all heads share one bias
    num_columns: L + S - 1
    """
    rows, columns = masks.positions(problem, x)
    distance = columns.position[None, :] - rows.position[:, None]
    # A distance between different packed sequences may have no column. Its gradient is 0, so any column can stand in.
    column = (distance + (problem.seqlen_q - 1)).clamp(0, max(num_columns - 1, 0))
    per_head = dbiased.sum(0).flatten(1)  # (H, L * S)
    diagonals = per_head.new_zeros(per_head.shape[0], num_columns).index_add(1, column.flatten(), per_head)
    return diagonals.sum_to_size(heads, num_columns)
