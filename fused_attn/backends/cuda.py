"""The CUDA C++ kernels (csrc/cuda) for what is worth a kernel written by hand: half precision and common head dims."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_attn import native
from fused_attn.attention.inputs import SHARED, Gradients, Inputs, Saved, Wanted
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem
from fused_attn.backends.base import clear_rows

try:
    import fused_attn._cuda as _kernels
except ImportError as error:
    # Installed without nvcc, perhaps: everything else still works, and `info` shows this text.
    _kernels = None
    missing = native.why_missing("_cuda", "nvcc of CUDA 12.3 or newer", error)
else:
    missing = ""

name = "cuda"
is_composite = False

Tensors = TypeVar("Tensors", Inputs, Saved)

DTYPES = (torch.float16, torch.bfloat16)
#: Head dims that have kernels of their own. Another one runs in the next larger kernel, which takes the missing columns
#: as zeros.
HEAD_DIMS = (64, 96, 128, 256)
HEAD_DIM_STEP = 8
MIN_CAPABILITY = (8, 0)
#: kMaxRows of csrc/cuda/params.h: rows are counted in 32 bits.
MAX_ROWS = 2**29


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if _kernels is None:
        reasons.append(missing)
    elif problem.device.type != device_type():
        reasons.append(f"the tensors are on {problem.device}, expected {device_type()}")
    elif (reason := _device_reason(problem)) is not None:
        reasons.append(reason)
    if torch.version.hip is not None and problem.device.type == "cuda":
        reasons.append("the kernels have been written for NVIDIA GPUs only")
    elif problem.capability is not None and problem.capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, capability)) for capability in (problem.capability, MIN_CAPABILITY))
        reasons.append(f"the GPU has compute capability {have}, expected {need} or higher")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} is none of {', '.join(map(str, DTYPES))}")
    for dim in dict.fromkeys((problem.head_dim, problem.value_dim)):
        if not 0 < dim <= HEAD_DIMS[-1] or dim % HEAD_DIM_STEP != 0:
            reasons.append(f"head dim {dim} is no multiple of {HEAD_DIM_STEP} up to {HEAD_DIMS[-1]}")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_ROWS:
        reasons.append(f"more than {MAX_ROWS} rows")
    return reasons


def device_type() -> str:
    """Where the kernels run: "cuda", or "cpu" for the module with which tests execute them."""
    return getattr(_kernels, "device_type", "cuda")


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool) -> tuple[Tensor, Tensor | None]:
    inputs = _readable_inputs(problem, inputs)
    query = inputs.query
    out = empty_like_layout(query, problem.value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if needs_lse else None
    if problem.is_packed:
        clear_rows(lse, out)
    if 0 in (out.numel(), problem.batch, problem.seqlen_q):  # a launch of no blocks is an error
        return out, lse
    if 0 in (inputs.key.numel(), problem.seqlen_k):
        return out.zero_(), None if lse is None else lse.fill_(float("-inf"))
    workspace = _workspace(problem, inputs, wanted=None)
    _kernels.forward(inputs, out, lse, _config(problem), _architecture(problem), workspace)
    return out, lse


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    read = _readable_inputs(problem, inputs)
    saved = _readable(saved, "out", "dout")
    query, key, value = read.query, read.key, read.value
    grads = Gradients(
        empty_like_layout(query, problem.head_dim) if wanted.query else None,
        empty_like_layout(key, problem.head_dim) if wanted.key else None,
        empty_like_layout(value, problem.value_dim) if wanted.value else None,
        *(_empty_shared_gradients(inputs, wanted) if wanted.is_any_shared else ()),
    )
    if problem.is_packed:
        clear_rows(None, *grads[:3])
    if 0 in (query.numel(), key.numel(), problem.batch, problem.seqlen_q, problem.seqlen_k):
        return _in_dtypes_of(inputs, Gradients(*(None if dx is None else dx.zero_() for dx in grads)))
    assert saved.lse is not None, "backends get one"
    saved = saved._replace(
        lse=saved.lse.contiguous(),  # under vmap it can be an expanded view
        dlse=None if saved.dlse is None else saved.dlse.resolve_neg(),
    )
    workspace = _workspace(problem, read, wanted)
    _kernels.backward(read, saved, grads, _config(problem), _architecture(problem), workspace)
    return _in_dtypes_of(inputs, grads) if wanted.is_any_shared else grads


def _empty_shared_gradients(inputs: Inputs, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Of the inputs that batch entries share. Kernels write sums of floats."""
    device = inputs.query.device
    return tuple(
        torch.empty(getattr(inputs, name).shape, dtype=torch.float32, device=device) if getattr(wanted, name) else None
        for name in SHARED
    )


def _in_dtypes_of(inputs: Inputs, grads: Gradients) -> Gradients:
    return Gradients(*(None if dx is None else dx.to(x.dtype) for x, dx in zip(inputs, grads, strict=False)))


def _architecture(problem: AttentionProblem) -> int:
    """Whose kernels run: 90 (sm_90a) on compute capability 9 alone; those for sm_80 run on all that came later."""
    return 90 if problem.capability is not None and problem.capability[0] == 9 else 80


def _device_reason(problem: AttentionProblem) -> str | None:
    """Why the kernels cannot run on the GPU at hand; None where they can, or where the problem is about another GPU."""
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if problem.device.index is None else problem.device.index
    is_here = index < torch.cuda.device_count() and torch.cuda.get_device_capability(index) == problem.capability
    return _unusable_reason(index) if is_here else None


@functools.cache
def _unusable_reason(index: int) -> str | None:
    """Asked of the driver once: it may be older than the nvcc that built the kernels."""
    reason = _kernels.unusable_reason(index)
    return f"the driver refuses the CUDA kernels: {reason}" if reason else None


def _readable_inputs(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    inputs = _readable(inputs, "query", "key", "value")
    if not problem.has_shared:
        return inputs
    bias = inputs.bias
    if bias is not None:
        bias = bias.resolve_neg()
        bias = bias if bias.dtype == problem.dtype else bias.float()

    def small(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.resolve_neg().float().contiguous()

    return inputs._replace(bias=bias, relative_bias=small(inputs.relative_bias), sinks=small(inputs.sinks))


def _readable(tensors: Tensors, *names: str) -> Tensors:
    """The kernels see the data alone, no lazy negation, and read rows in pieces of 16 bytes, each at another place."""
    return tensors._replace(**{name: _with_readable_rows(getattr(tensors, name)) for name in names})


def _with_readable_rows(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    is_expanded = x.stride(2) == 0 and x.shape[2] > 1
    is_aligned = (
        not is_expanded
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    )
    # Not .contiguous(), which leaves misaligned tensors as they are.
    return x if is_aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem) -> Any:
    """What the kernels need of a problem besides tensors, converted once."""
    left, right, offset = problem.band
    return _kernels.Config(
        scale=problem.scale,
        softcap=problem.softcap,
        window_left=None if left == UNBOUNDED else left,
        window_right=None if right == UNBOUNDED else right,
        diagonal_offset=offset,
        dropout_p=problem.dropout_p,
        max_seqlen_q=problem.seqlen_q,
        max_seqlen_k=problem.seqlen_k,
    )


def _workspace(problem: AttentionProblem, inputs: Inputs, wanted: Wanted | None) -> Tensor | None:
    """``wanted``: the gradients of a backward call."""
    mask, relative_bias = inputs.mask, inputs.relative_bias
    size = _workspace_bytes(
        problem,
        inputs.query.shape,
        wanted,
        0 if relative_bias is None else relative_bias.shape[0],
        0 if mask is None else _distinct_entries(mask),
        inputs.bias.shape if wanted is not None and wanted.bias else None,
    )
    return torch.empty(size // 4, dtype=torch.float32, device=inputs.query.device) if size else None


def _distinct_entries(mask: Tensor) -> int:
    """How many pairs of a batch entry and a head have a mask of their own."""
    count = 1
    for dim in (0, 1):
        count *= 1 if mask.stride(dim) == 0 else mask.shape[dim]
    return count


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    problem: AttentionProblem,
    query_shape: torch.Size,
    wanted: Wanted | None,
    relative_bias_heads: int,
    mask_entries: int,
    dbias_shape: torch.Size | None,
) -> int:
    batch_entries, num_heads, rows_q, _ = query_shape
    is_head_dim_exact = problem.head_dim == problem.value_dim and problem.head_dim in HEAD_DIMS
    is_scale_positive = torch.tensor(problem.scale, dtype=torch.float32).item() > 0.0
    is_general = (
        problem.softcap != 0.0
        or problem.has_bias
        or problem.has_relative_bias
        or problem.has_mask
        or not is_scale_positive
        or (problem.dropout_p > 0.0 and not is_head_dim_exact)
    )
    return _kernels.workspace_bytes(
        architecture=_architecture(problem),
        is_backward=wanted is not None,
        wants_all_gradients=wanted is not None and wanted.query and (wanted.key or wanted.value),
        batch=problem.batch,
        batch_entries=batch_entries,
        num_heads=num_heads,
        num_kv_heads=problem.num_kv_heads,
        rows_q=rows_q,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=max(problem.head_dim, problem.value_dim),
        is_packed=problem.is_packed,
        has_key_padding=problem.has_key_padding,
        is_general=is_general,
        relative_bias_heads=relative_bias_heads,
        mask_entries=mask_entries,
        dbias_shape=dbias_shape,
        wants_drelative_bias=wanted is not None and wanted.relative_bias,
    )
