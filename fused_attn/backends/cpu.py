"""The C++ kernels for CPUs (csrc/cpu): fills in buffers and pointers, computes nothing itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_attn import native
from fused_attn.backends.base import Gradients, Wanted, clear_rows, empty_like_layout
from fused_attn.masks import MaskSpec
from fused_attn.problem import UNBOUNDED, AttentionProblem

try:
    import fused_attn._C as _C
except ImportError as error:
    # Installed without a C++ compiler, perhaps: everything else still works, and `info` shows this text.
    _C = None
    missing = native.why_missing("_C", "a C++ compiler such as g++", error)
    native.warn_of_sources()
else:
    missing = ""

name = "cpu"
is_composite = False

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


def forward(
    problem: AttentionProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if query.is_neg() or key.is_neg() or value.is_neg():
        query, key, value = query.resolve_neg(), key.resolve_neg(), value.resolve_neg()
    is_same = problem.value_dim == problem.head_dim
    out = torch.empty_like(query) if is_same else empty_like_layout(query, problem.value_dim)
    lse = None
    if needs_lse:
        batch, heads, rows, _ = query.shape
        lse = torch.empty(batch, heads, rows, dtype=problem.accumulate_dtype, device=problem.device)
    if problem.is_packed:
        clear_rows(lse, out)
    try:
        _C.forward(
            query,
            key,
            value,
            out,
            lse,
            _config(problem),
            None if problem.is_plain else _kernel_masks(problem, sinks, seed, mask),
            torch.get_num_threads(),
        )
    except ValueError as error:
        # Forgiveness instead of permission: asking three tensors for a stride costs as much as the whole kernel call.
        return forward(problem, *_with_unit_strides(error, query, key, value), sinks, seed, mask, needs_lse)
    return out, lse


def backward(
    problem: AttentionProblem,
    wanted: Wanted,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
) -> Gradients:
    # Views such as x.conj().imag keep their sign apart from their data, which is all that a kernel sees.
    if dout.is_neg() or query.is_neg() or key.is_neg() or value.is_neg():
        dout, query, key, value = dout.resolve_neg(), query.resolve_neg(), key.resolve_neg(), value.resolve_neg()
    dlse = None if dlse is None else dlse.resolve_neg()
    wants_query, wants_key, wants_value, wants_bias, wants_relative_bias, wants_sinks = wanted
    dquery = torch.empty_like(query) if wants_query else None
    dkey = torch.empty_like(key) if wants_key else None
    dvalue = torch.empty_like(value) if wants_value else None
    if problem.is_packed:
        clear_rows(None, dquery, dkey, dvalue)
    dbias = drelative_bias = dsinks = None
    if wants_bias or wants_relative_bias or wants_sinks:
        accumulate = {"dtype": problem.accumulate_dtype, "device": problem.device}
    if wants_bias:
        # Expanded to no score at all, it would show the kernel nothing to write to.
        has_scores = problem.batch and problem.num_heads and problem.seqlen_q and problem.seqlen_k
        allocate = torch.empty if has_scores else torch.zeros
        dbias = allocate(mask.bias.shape, **accumulate)
    if wants_relative_bias:
        drelative_bias = torch.empty(mask.relative_bias.shape, **accumulate)
    if wants_sinks:
        dsinks = torch.empty(sinks.shape, **accumulate)
    try:
        _C.backward(
            dout,
            dlse,
            query,
            key,
            value,
            out,
            lse,
            dquery,
            dkey,
            dvalue,
            dbias,
            drelative_bias,
            dsinks,
            _config(problem),
            None if problem.is_plain else _kernel_masks(problem, sinks, seed, mask),
            torch.get_num_threads(),
        )
    except ValueError as error:
        dout, query, key, value = _with_unit_strides(error, dout, query, key, value)
        return backward(problem, wanted, dout, dlse, query, key, value, out, lse, sinks, seed, mask)
    return Gradients(
        dquery,
        dkey,
        dvalue,
        None if dbias is None else dbias.to(mask.bias.dtype),
        None if drelative_bias is None else drelative_bias.to(mask.relative_bias.dtype),
        None if dsinks is None else dsinks.to(sinks.dtype),
    )


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem):
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


def _kernel_masks(
    problem: AttentionProblem, sinks: Tensor | None, seed: Tensor | None, mask: MaskSpec
) -> tuple[Tensor | None, ...]:
    """The masks of `_C`; small ones in the accumulate dtype."""
    accumulate = problem.accumulate_dtype
    bias = mask.bias
    if bias is not None:
        bias = bias.resolve_neg()
        if bias.dtype != problem.dtype:
            bias = bias.to(accumulate)
    relative_bias = mask.relative_bias
    if relative_bias is not None:
        relative_bias = relative_bias.resolve_neg().to(accumulate).contiguous()
    return (
        mask.key_padding,
        mask.mask,
        bias,
        relative_bias,
        None if sinks is None else sinks.resolve_neg().to(accumulate).contiguous(),
        seed,
        mask.cu_seqlens_q,
        mask.cu_seqlens_k,
    )


def _with_unit_strides(error: ValueError, *tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but the last; only such tensors are copied. Without any, the error is raised."""
    if all(x.stride(-1) == 1 for x in tensors):
        raise error
    # Not .contiguous(), which leaves empty tensors and last dimensions of size 1 as they are.
    return [x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format) for x in tensors]
