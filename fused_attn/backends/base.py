"""What every backend offers. Backends are siblings: none imports another."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fused_attn.attention import dropout
from fused_attn.attention.inputs import Gradients, Inputs, Results, Saved, Wanted, inputs_of
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem


class Backend(Protocol):
    """What dispatch and derivatives call. Query, key and value of the `Inputs` may have any strides."""

    name: str
    #: True if `forward` is differentiable PyTorch code. Then torch finds the gradients, and `backward` is not called.
    is_composite: bool

    def __hash__(self) -> int: ...

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this backend cannot run the problem; empty when it can."""

    def forward(self, problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
        """The results of the call. Without needs_lse, lse may be None, and without needs_max, row_max may be."""

    def backward(self, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients: ...


def gpu_reasons(problem: AttentionProblem, min_capability: tuple[int, int]) -> list[str]:
    """Why kernels for NVIDIA GPUs of this compute capability or a higher one cannot run on the GPU of the problem."""
    if torch.version.hip is not None and problem.device.type == "cuda":
        return ["the kernels have been written for NVIDIA GPUs only"]
    if problem.capability is None or problem.capability >= min_capability:
        return []
    have, need = (".".join(map(str, capability)) for capability in (problem.capability, min_capability))
    return [f"the GPU has compute capability {have}, expected {need} or higher"]


def dtype_reasons(problem: AttentionProblem, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Why kernels for these dtypes cannot run the problem."""
    if problem.dtype in dtypes:
        return []
    return [f"dtype {problem.dtype} is none of {', '.join(map(str, dtypes))}"]


def dropout_reasons(problem: AttentionProblem) -> list[str]:
    """Why kernels that draw random numbers for a whole group of keys cannot run the problem."""
    first = problem.dropout_origin.key
    if first % dropout.GROUP == 0:
        return []
    return [f"dropout numbers the keys from {first} on, expected a multiple of {dropout.GROUP}"]


def with_readable_shared(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs with the `inputs.SHARED` in the form that the native kernels read.

    No tensor is negated lazily, as ``x.conj().imag`` is: its sign is a flag that kernels do not see. A bias has the
    accumulate dtype or the query's. The others are contiguous and have the accumulate dtype.
    """
    query, key, value, bias, key_bias, relative_bias, sinks, *others = inputs
    if bias is not None:
        bias = bias.resolve_neg()
        if bias.dtype != problem.dtype:
            bias = bias.to(problem.accumulate_dtype)
    if key_bias is not None:
        key_bias = key_bias.resolve_neg().to(problem.accumulate_dtype).contiguous()
    if relative_bias is not None:
        relative_bias = relative_bias.resolve_neg().to(problem.accumulate_dtype).contiguous()
    if sinks is not None:
        sinks = sinks.resolve_neg().to(problem.accumulate_dtype).contiguous()
    return inputs_of(query, key, value, bias, key_bias, relative_bias, sinks, *others)


def in_dtypes_of(inputs: Inputs, grads: Gradients) -> Gradients:
    """The gradients, converted to the dtypes of their inputs."""
    pairs = zip(inputs, grads, strict=False)
    return Gradients(*(None if x is None or dx is None else dx.to(x.dtype) for x, dx in pairs))


def gradient_of_row_bias(inputs: Inputs, lse: Tensor, dlse: Tensor | None, delta: Tensor | None) -> Tensor:
    """The gradient of a bias that is one number for all keys of a row: (B|1, H|1, L|1, 1), in the dtype of the bias.

    Such a bias x raises the LSE by x, and lowers the probability of the sink. Without a sink it does not change the
    output. So the gradient is dlse + delta * (probability of the sink), and 0 for a row that sees no key. The sum of
    the dscores of a row would be the same number, but its terms nearly cancel, so that rounding errors would remain.

    delta: (B, H, L), rowsum(dout * out) - dlse; None = there are no sinks
    """
    drow = torch.zeros_like(lse) if dlse is None else dlse
    if inputs.sinks is not None and delta is not None:
        drow = drow + delta * torch.exp(inputs.sinks.float()[:, None] - lse)
    drow = drow.masked_fill(lse == float("-inf"), 0.0)
    assert inputs.bias is not None, "its gradient is wanted"
    return drow.unsqueeze(3).sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)


def native_numbers(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments of Config, which both native modules have, except num_splits."""
    band = problem.band
    return {
        "scale": problem.scale,
        "softcap": problem.softcap,
        "band_left": band.left,
        "band_right": band.right,
        "band_offset": band.offset,
        "band_from_end": band.is_from_end,
        "dropout_p": problem.dropout_p,
        "dropout_origin": problem.dropout_origin,
        "max_seqlen_q": problem.seqlen_q,
        "max_seqlen_k": problem.seqlen_k,
        "is_part": problem.is_part,
    }


def keys_in_band(problem: AttentionProblem, queries: int) -> int:
    """How many keys a block of so many neighbouring queries sees by the band, at most."""
    band, offset = problem.band, problem.band.offset_of(problem.seqlen_q, problem.seqlen_k)
    begin = 0 if band.left == UNBOUNDED else max(offset - band.left, 0)
    end = problem.seqlen_k if band.right == UNBOUNDED else min(problem.seqlen_q + offset + band.right, problem.seqlen_k)
    return _within_band(problem, end - begin, min(queries, problem.seqlen_q))


def queries_in_band(problem: AttentionProblem, keys: int) -> int:
    """How many queries see a block of so many neighbouring keys by the band, at most."""
    band, offset = problem.band, problem.band.offset_of(problem.seqlen_q, problem.seqlen_k)
    begin = 0 if band.right == UNBOUNDED else max(-offset - band.right, 0)
    end = problem.seqlen_q if band.left == UNBOUNDED else min(problem.seqlen_k - offset + band.left, problem.seqlen_q)
    return _within_band(problem, end - begin, min(keys, problem.seqlen_k))


def _within_band(problem: AttentionProblem, rows: int, block: int) -> int:
    """The most of these rows that a block of rows of the other side meets: both diagonals bound them."""
    band = problem.band
    if UNBOUNDED not in (band.left, band.right):
        rows = min(rows, band.left + band.right + block)
    return max(rows, 0)


def clear_rows(*tensors: Tensor | None, value: float = 0.0) -> None:
    """Fills tensors with a value, before a kernel writes the rows of packed sequences.

    A row that belongs to no sequence keeps this value, because no kernel visits such a row. The backends for GPUs fill
    all rows: which rows belong to no sequence is known from cu_seqlens alone, and the host would wait for the GPU to
    read cu_seqlens.
    """
    for x in tensors:
        if x is not None:
            x.fill_(value)
