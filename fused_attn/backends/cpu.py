"""The backend of the C++ kernels for CPUs (csrc/cpu): allocates the results and calls the native module."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, empty, empty_like, get_num_threads  # not torch.empty: see `modes`

from fused_attn.attention.inputs import (
    SHARED_ITEMS,
    Gradients,
    Inputs,
    Results,
    Saved,
    Wanted,
    gradients_of,
    inputs_of,
    shape_of_lse,
)
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import clear_rows, dtype_reasons, in_dtypes_of, native_numbers, with_readable_shared
from fused_attn.native import _C, install_command, why_no_C

missing = why_no_C

name = "cpu"
is_composite = False

Tensors = TypeVar("Tensors", Inputs, Saved)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: With more columns, a slab of backward (csrc/cpu/backward_plan.h) would hold too few keys of float64.
MAX_HEAD_DIM = 512
#: The kernels keep the number of a key in 32 bits.
MAX_KEYS = 2**31 - 1


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if _C is None:
        reasons.append(missing)
    if problem.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.device}, expected cpu")
    reasons += dtype_reasons(problem, DTYPES)
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        reasons.append(f"head dim {max(problem.head_dim, problem.value_dim)} is above {MAX_HEAD_DIM}")
    if problem.seqlen_k > MAX_KEYS:
        reasons.append(f"{problem.seqlen_k} keys are more than {MAX_KEYS}")
    return reasons


def build_reason() -> str | None:
    """Why another installation would be faster on this machine, and what to do about it; None if none would."""
    if _C is None or (best := _C.best_cpu_isa()) in _C.cpu_isas():
        return None
    built = ", ".join(_C.build_info()["cpu_isas"])
    command = install_command(FUSED_ATTN_CPU_ISAS=best)
    return f"the CPU kernels have been built for {built}, expected {best}; here, {command} builds them for it"


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    query = inputs.query
    if problem.has_shared or query.is_neg() or inputs.key.is_neg() or inputs.value.is_neg():
        inputs = _readable_inputs(problem, inputs)
        query = inputs.query
    is_same = problem.value_dim == problem.head_dim
    out = empty_like(query) if is_same else empty_like_layout(query, problem.value_dim)
    lse = row_max = None
    if needs_lse or needs_max:
        shape = shape_of_lse(query, problem.is_packed)
        # Sizes one by one, because torch.empty takes twice as long with a tuple.
        if needs_lse:
            lse = empty(*shape, dtype=problem.accumulate_dtype, device=problem.device)
        if needs_max:
            row_max = empty(*shape, dtype=problem.accumulate_dtype, device=problem.device)
    if problem.is_packed:
        _clear_rows_outside(inputs.cu_seqlens_q, out)
        # lse and row_max are (H, total_q).
        by_rows = [None if x is None else x.t() for x in (lse, row_max)]
        _clear_rows_outside(inputs.cu_seqlens_q, *by_rows, value=float("-inf"))
    results = out, lse, row_max
    try:
        _C.forward(inputs, results, problem.prepared.get(name) or _config(problem), get_num_threads())
    except ValueError:
        # The kernel refuses a last stride that is not 1. Checking three tensors beforehand would take as long as a
        # kernel of a few rows.
        copied = _with_unit_strides(inputs, "query", "key", "value", "key_lengths", "block_table")
        if copied is inputs:
            raise
        return forward(problem, copied, needs_lse, needs_max)
    return results


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    read = inputs
    if problem.has_shared or inputs.query.is_neg() or inputs.key.is_neg() or inputs.value.is_neg():
        read = _readable_inputs(problem, inputs)
    _, _, dout, dlse = saved
    assert dout is not None, "backends get one"
    if dout.is_neg() or (dlse is not None and dlse.is_neg()):
        saved = saved._replace(dout=dout.resolve_neg(), dlse=None if dlse is None else dlse.resolve_neg())
    dquery = empty_like(read.query) if wanted.query else None
    dkey = empty_like(read.key) if wanted.key else None
    dvalue = empty_like(read.value) if wanted.value else None
    if problem.is_packed:
        _clear_rows_outside(inputs.cu_seqlens_q, dquery)
        _clear_rows_outside(inputs.cu_seqlens_k, dkey, dvalue)
    if problem.has_key_lengths:
        clear_rows(dkey, dvalue)  # no kernel visits the keys behind the length of their batch entry
    grads = gradients_of(dquery, dkey, dvalue, None, None, None, None)
    wants_shared = problem.has_shared and wanted.is_any_shared
    if wants_shared:
        grads = Gradients(dquery, dkey, dvalue, *_empty_shared_gradients(problem, inputs, wanted))
    try:
        _C.backward(read, saved, grads, problem.prepared.get(name) or _config(problem), get_num_threads())
    except ValueError:
        copied = _with_unit_strides(inputs, "query", "key", "value", "key_lengths")
        saved_copied = _with_unit_strides(saved, "out", "lse", "dout")
        if copied is inputs and saved_copied is saved:
            raise
        return backward(problem, copied, saved_copied, wanted)
    return in_dtypes_of(inputs, grads) if wants_shared else grads


def _clear_rows_outside(offsets: Tensor | None, *tensors: Tensor | None, value: float = 0.0) -> None:
    """Fills the rows of packed tensors that belong to no sequence. The kernels write all others.

    offsets: (batch + 1,) int32, cu_seqlens_q or cu_seqlens_k
    tensors: (total rows, ...)
    """
    assert offsets is not None, "packed calls with gradients have offsets of queries and keys"
    begin, end = int(offsets[0]), int(offsets[-1])
    for x in tensors:
        if x is not None and (begin > 0 or end < x.shape[0]):
            clear_rows(x[:begin], x[end:], value=value)


def _config(problem: AttentionProblem) -> Any:
    """The numbers of a problem in the form that the kernels read. Made once for each problem, which keeps them."""
    problem.prepared[name] = config = _C.Config(**native_numbers(problem), num_splits=problem.num_splits)
    return config


def _readable_inputs(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the form that the kernels read; see `with_readable_shared`."""
    query, key, value, *others = inputs
    if query.is_neg() or key.is_neg() or value.is_neg():
        inputs = inputs_of(query.resolve_neg(), key.resolve_neg(), value.resolve_neg(), *others)
    return with_readable_shared(problem, inputs) if problem.has_shared else inputs


def _empty_shared_gradients(problem: AttentionProblem, inputs: Inputs, wanted: Wanted) -> list[Tensor | None]:
    """Uninitialised gradients of `inputs.SHARED`; None for each that is not wanted.

    They have the accumulate dtype, but for a bias of the query's dtype with an entry for each score: its gradient is
    no sum, so the kernel can round it.
    """
    # A bias that is expanded to no score at all would show the kernel nothing to write to.
    has_scores = problem.batch and problem.num_heads and problem.seqlen_q and problem.seqlen_k
    allocate = empty if has_scores else torch.zeros
    scores_shape = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
    gradients: list[Tensor | None] = []
    for x, is_wanted in zip(tuple(inputs)[SHARED_ITEMS], tuple(wanted)[SHARED_ITEMS], strict=True):
        if is_wanted and x is not None:
            is_sum = x.dtype != problem.dtype or x.shape != scores_shape
            dtype = problem.accumulate_dtype if is_sum else problem.dtype
            gradients.append(allocate(*x.shape, dtype=dtype, device=problem.device))
        else:
            gradients.append(None)
    return gradients


def _with_unit_strides(tensors: Tensors, *names: str) -> Tensors:
    """Copies each named tensor whose last stride is not 1. Returns the same object if there is none.

    The kernels accept any strides of the other dimensions. But where the rows of a tensor overlap, the last stride of
    its `empty_like`, which is to hold a result, may not be 1. Such a tensor is copied, too.
    """
    copies = {}
    for name in names:
        x = getattr(tensors, name)
        if x is not None and (x.stride(-1) != 1 or (x.shape[-1] > 1 and empty_like(x).stride(-1) != 1)):
            # Not .contiguous(), which leaves empty tensors and last dimensions of size 1 as they are.
            copies[name] = x.clone(memory_format=torch.contiguous_format)
    return tensors._replace(**copies) if copies else tensors
