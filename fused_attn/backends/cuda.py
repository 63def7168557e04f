"""The backend of the CUDA C++ kernels (csrc/cuda), which run in half precision on NVIDIA GPUs."""

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
    # The package may have been installed without nvcc. The other backends work, and `info` shows this text.
    _kernels = None
    missing = native.why_missing("_cuda", "nvcc of CUDA 12.3 or newer", error)
else:
    missing = ""

name = "cuda"
is_composite = False

Tensors = TypeVar("Tensors", Inputs, Saved)

DTYPES = (torch.float16, torch.bfloat16)
#: Head dims that have kernels of their own. Another head dim runs in the next larger kernel, which reads zeros in place
#: of the missing columns.
HEAD_DIMS = (64, 96, 128, 256)
HEAD_DIM_STEP = 8
MIN_CAPABILITY = (8, 0)
#: The longest sequence, kMaxRows of csrc/cuda/params.h. Kernels count rows in 32 bits.
MAX_ROWS = 2**29


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why the CUDA kernels cannot run the problem; empty if they can."""
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
    """The type of device that the kernels run on: "cuda", or "cpu" for the module in which tests emulate a GPU."""
    return getattr(_kernels, "device_type", "cuda")


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out (B, H, L, Dv), lse (B, H, L) float32 or None)."""
    inputs = _readable_inputs(problem, inputs)
    query = inputs.query
    out = empty_like_layout(query, problem.value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if needs_lse else None
    if problem.is_packed:
        clear_rows(lse, out)
    if 0 in (out.numel(), problem.batch, problem.seqlen_q):  # CUDA refuses to launch a grid without blocks
        return out, lse
    if 0 in (inputs.key.numel(), problem.seqlen_k):
        return out.zero_(), None if lse is None else lse.fill_(float("-inf"))
    workspace = _workspace(problem, inputs, wanted=None)
    _kernels.forward(inputs, out, lse, _config(problem), _architecture(problem), workspace)
    return out, lse


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The wanted gradients, each in the shape and dtype of its input."""
    if wanted.bias and _is_bias_without_effect(problem, inputs):
        others = backward(problem, inputs, saved, wanted._replace(bias=False))
        return others._replace(bias=_gradient_by_lse_alone(inputs, saved))
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
    assert saved.lse is not None, "backward needs the lse of forward"
    saved = saved._replace(
        lse=saved.lse.contiguous(),  # under vmap, lse can be an expanded view
        dlse=None if saved.dlse is None else saved.dlse.resolve_neg(),
    )
    workspace = _workspace(problem, read, wanted)
    _kernels.backward(read, saved, grads, _config(problem), _architecture(problem), workspace)
    return _in_dtypes_of(inputs, grads) if wanted.is_any_shared else grads


def _is_bias_without_effect(problem: AttentionProblem, inputs: Inputs) -> bool:
    """Whether the bias moves all logits of a row alike. The softmax does not change then, and lse moves by the bias."""
    return inputs.bias is not None and inputs.bias.shape[3] == 1 and not (problem.has_sinks or problem.is_packed)


def _gradient_by_lse_alone(inputs: Inputs, saved: Saved) -> Tensor:
    """The gradient of a bias without effect on the softmax: dlse, summed to the bias's shape; 0 for empty rows.

    The kernel would find the same as a sum of rounding errors that nearly cancel.
    """
    bias, lse, dlse = inputs.bias, saved.lse, saved.dlse
    assert bias is not None and lse is not None, "the caller has asked for the gradient"
    if dlse is None:
        return torch.zeros_like(bias)
    seen = dlse.masked_fill(lse == float("-inf"), 0.0)
    return seen.sum_to_size(bias.shape[:3]).unsqueeze(3).to(bias.dtype)


def _empty_shared_gradients(inputs: Inputs, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of `SHARED`, in the shapes of the inputs. Kernels sum these gradients in float32."""
    device = inputs.query.device
    return tuple(
        torch.empty(getattr(inputs, name).shape, dtype=torch.float32, device=device) if getattr(wanted, name) else None
        for name in SHARED
    )


def _in_dtypes_of(inputs: Inputs, grads: Gradients) -> Gradients:
    """The gradients, converted to the dtypes of their inputs. Kernels write the gradients of `SHARED` as float32."""
    pairs = zip(inputs, grads, strict=False)
    return Gradients(*(None if x is None or dx is None else dx.to(x.dtype) for x, dx in pairs))


def _architecture(problem: AttentionProblem) -> int:
    """The architecture whose kernels run: 90 on compute capability 9.x, else 80.

    The kernels for 90 (sm_90a) use instructions that only Hopper has. The kernels for 80 run on every later GPU.
    """
    return 90 if problem.capability is not None and problem.capability[0] == 9 else 80


def _device_reason(problem: AttentionProblem) -> str | None:
    """Why the kernels cannot run on the GPU of the problem.

    None means that they can, or that nobody can know: the GPU that the problem describes is not in this machine.
    """
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if problem.device.index is None else problem.device.index
    is_here = index < torch.cuda.device_count() and torch.cuda.get_device_capability(index) == problem.capability
    return _unusable_reason(index) if is_here else None


@functools.cache
def _unusable_reason(index: int) -> str | None:
    """Why the driver cannot load the kernels on GPU number `index`, or None. The driver is asked once.

    A driver refuses kernels if it is older than the nvcc that has built them.
    """
    reason = _kernels.unusable_reason(index)
    return f"the driver refuses the CUDA kernels: {reason}" if reason else None


def _readable_inputs(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the form that kernels read.

    query, key and value are as `_readable` returns them. relative_bias and sinks are contiguous float32. bias has the
    dtype of the problem or float32, with any strides.
    """
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
    """The tuple with its tensors `names` in the form that kernels read; see `_with_readable_rows`.

    If no tensor changes, the tuple itself is returned, because making a new tuple takes longer than all the checks.
    """
    changed = {}
    for name in names:
        x = getattr(tensors, name)
        readable = _with_readable_rows(x)
        if readable is not x:
            changed[name] = readable
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


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem) -> Any:
    """The numbers of a problem as the native module takes them, converted once for each problem."""
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
    """Uninitialised memory for intermediate results of a call, float32; None if the call needs none.

    wanted: the wanted gradients of a backward call; None for forward
    """
    mask, relative_bias = inputs.mask, inputs.relative_bias
    size = _workspace_bytes(
        problem,
        inputs.query.shape,
        wanted,
        0 if relative_bias is None else relative_bias.shape[0],
        0 if mask is None else _distinct_entries(mask),
        None if inputs.bias is None or wanted is None or not wanted.bias else inputs.bias.shape,
    )
    return torch.empty(size // 4, dtype=torch.float32, device=inputs.query.device) if size else None


def _distinct_entries(mask: Tensor) -> int:
    """The number of (L, S) masks in mask (B, H, L, S) that differ: a dimension that is expanded counts once."""
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
    """The size of the workspace in bytes, as the native module computes it.

    query_shape: (B, H, L, D), with B = 1 for packed problems
    wanted: the wanted gradients of a backward call; None for forward
    relative_bias_heads: the heads of relative_bias; 0 without one
    mask_entries: see `_distinct_entries`; 0 without a mask
    dbias_shape: the shape of the gradient of bias; None if it is not wanted
    """
    batch_entries, num_heads, rows_q, _ = query_shape
    is_scale_positive = torch.tensor(problem.scale, dtype=torch.float32).item() > 0.0
    # Whether the general variant of the kernels runs. The plain variant knows fewer features.
    is_general = (
        problem.softcap != 0.0
        or problem.has_bias
        or problem.has_relative_bias
        or problem.has_mask
        or not is_scale_positive
        or problem.dropout_p > 0.0
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
