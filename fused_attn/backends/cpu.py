"""The C++ kernels for CPUs (csrc/cpu): fills in buffers and pointers, computes nothing itself."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_attn.attention.inputs import SHARED, Gradients, Inputs, Saved, Wanted
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem
from fused_attn.backends.base import clear_rows
from fused_attn.native import _C, why_no_C

missing = why_no_C

name = "cpu"
is_composite = False

Tensors = TypeVar("Tensors", Inputs, Saved)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if _C is None:
        reasons.append(missing)
    if problem.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.device}, expected cpu")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} is none of {', '.join(map(str, DTYPES))}")
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        reasons.append(f"head dim {max(problem.head_dim, problem.value_dim)} is above {MAX_HEAD_DIM}")
    return reasons


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool) -> tuple[Tensor, Tensor | None]:
    query = inputs.query
    if problem.has_shared or query.is_neg() or inputs.key.is_neg() or inputs.value.is_neg():
        inputs = _readable(problem, inputs)
        query = inputs.query
    is_same = problem.value_dim == problem.head_dim
    out = torch.empty_like(query) if is_same else empty_like_layout(query, problem.value_dim)
    lse = None
    if needs_lse:
        batch, heads, rows, _ = query.shape
        lse = torch.empty(batch, heads, rows, dtype=problem.accumulate_dtype, device=problem.device)
    if problem.is_packed:
        clear_rows(lse, out)
    try:
        _C.forward(inputs, out, lse, _config(problem), torch.get_num_threads())
    except ValueError:
        # Forgiveness instead of permission: asking three tensors for a stride costs as much as the whole kernel call.
        copied = _with_unit_strides(inputs, "query", "key", "value")
        if copied is inputs:
            raise
        return forward(problem, copied, needs_lse)
    return out, lse


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    read = inputs
    if problem.has_shared or inputs.query.is_neg() or inputs.key.is_neg() or inputs.value.is_neg():
        read = _readable(problem, inputs)
    _, _, dout, dlse = saved
    assert dout is not None, "backends get one"
    if dout.is_neg() or (dlse is not None and dlse.is_neg()):
        saved = saved._replace(dout=dout.resolve_neg(), dlse=None if dlse is None else dlse.resolve_neg())
    dquery = torch.empty_like(read.query) if wanted.query else None
    dkey = torch.empty_like(read.key) if wanted.key else None
    dvalue = torch.empty_like(read.value) if wanted.value else None
    if problem.is_packed:
        clear_rows(None, dquery, dkey, dvalue)
    grads = Gradients(dquery, dkey, dvalue)
    if wanted.is_any_shared:
        grads = grads._replace(**_empty_shared_gradients(problem, inputs, wanted))
    try:
        _C.backward(read, saved, grads, _config(problem), torch.get_num_threads())
    except ValueError:
        copied, saved_copied = _with_unit_strides(inputs, "query", "key", "value"), _with_unit_strides(saved, "dout")
        if copied is inputs and saved_copied is saved:
            raise
        return backward(problem, copied, saved_copied, wanted)
    if wanted.is_any_shared:
        pairs = zip(inputs, grads, strict=False)
        grads = Gradients(*(None if x is None or dx is None else dx.to(x.dtype) for x, dx in pairs))
    return grads


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem) -> Any:
    """What the kernels need of a problem besides tensors, converted once."""
    left, right, offset = problem.band
    return _C.Config(
        scale=problem.scale,
        softcap=problem.softcap,
        window_left=None if left == UNBOUNDED else left,
        window_right=None if right == UNBOUNDED else right,
        diagonal_offset=offset,
        dropout_p=problem.dropout_p,
        max_seqlen_q=problem.seqlen_q,
        max_seqlen_k=problem.seqlen_k,
    )


def _readable(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The kernels see the data alone, no lazy negation (``x.conj().imag``), and small tensors as they sum them."""
    bias = inputs.bias
    if bias is not None:
        bias = bias.resolve_neg()
        if bias.dtype != problem.dtype:
            bias = bias.to(problem.accumulate_dtype)

    def small(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.resolve_neg().to(problem.accumulate_dtype).contiguous()

    return inputs._replace(
        query=inputs.query.resolve_neg(),
        key=inputs.key.resolve_neg(),
        value=inputs.value.resolve_neg(),
        bias=bias,
        relative_bias=small(inputs.relative_bias),
        sinks=small(inputs.sinks),
    )


def _empty_shared_gradients(problem: AttentionProblem, inputs: Inputs, wanted: Wanted) -> dict[str, Tensor]:
    """Of the inputs that batch entries share, in the accumulate dtype."""
    # A bias that is expanded to no score at all would show the kernel nothing to write to.
    has_scores = problem.batch and problem.num_heads and problem.seqlen_q and problem.seqlen_k
    allocate = torch.empty if has_scores else torch.zeros
    return {
        name: allocate(getattr(inputs, name).shape, dtype=problem.accumulate_dtype, device=problem.device)
        for name in SHARED
        if getattr(wanted, name)
    }


def _with_unit_strides(tensors: Tensors, *names: str) -> Tensors:
    """The kernels take any strides but the last; only such tensors are copied. Without any, the same object."""
    copies = {}
    for name in names:
        x = getattr(tensors, name)
        if x.stride(-1) != 1:
            # Not .contiguous(), which leaves empty tensors and last dimensions of size 1 as they are.
            copies[name] = x.clone(memory_format=torch.contiguous_format)
    return tensors._replace(**copies) if copies else tensors
