"""The backend of the CUDA C++ kernels (csrc/cuda), which run in half precision on NVIDIA GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_attn import architectures, native
from fused_attn.attention.inputs import SHARED, Gradients, Inputs, Results, Saved, Wanted, shape_of_lse
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import (
    clear_rows,
    dropout_reasons,
    dtype_reasons,
    gpu_reasons,
    gradient_of_row_bias,
    in_dtypes_of,
    native_numbers,
)
from fused_attn.backends.cuda import hardware, splits
from fused_attn.backends.cuda.readable import readable_inputs, readable_saved
from fused_attn.backends.cuda.workspace import rows_of_heads, workspace

name = "cuda"
is_composite = False

DTYPES = (torch.float16, torch.bfloat16)
#: Head dims that have kernels of their own. Another head dim runs in the next larger kernel, which reads zeros in place
#: of the missing columns. Queries of 192 columns with values of 128 have kernels, too.
HEAD_DIMS = (64, 96, 128, 256)
HEAD_DIM_STEP = 8
MIN_CAPABILITY = (8, 0)
#: The longest sequence, kMaxRows of csrc/cuda/params.h. Kernels count rows in 32 bits.
MAX_ROWS = 2**29


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why the CUDA kernels cannot run the problem; empty if they can."""
    reasons = []
    if problem.device.type != hardware.device_type():
        reasons.append(f"the tensors are on {problem.device}, expected {hardware.device_type()}")
    elif (reason := build_reason(problem)) is not None:
        reasons.append(reason)
    reasons += gpu_reasons(problem, MIN_CAPABILITY)
    reasons += dtype_reasons(problem, DTYPES)
    for dim in dict.fromkeys((problem.head_dim, problem.value_dim)):
        if not 0 < dim <= HEAD_DIMS[-1] or dim % HEAD_DIM_STEP != 0:
            reasons.append(f"head dim {dim} is no multiple of {HEAD_DIM_STEP} up to {HEAD_DIMS[-1]}")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_ROWS:
        reasons.append(f"more than {MAX_ROWS} rows")
    return reasons + dropout_reasons(problem)


def build_reason(problem: AttentionProblem) -> str | None:
    """Why this installation has no kernels for the GPU of the problem, and what to do about it; None if it has.

    Another installation would have the kernels, so `dispatch` warns if another backend runs for this reason alone.
    """
    if hardware.module is None:
        return hardware.missing
    capability = problem.capability
    if problem.device.type != "cuda" or capability is None or capability < MIN_CAPABILITY:
        return None
    built = architectures.parsed(hardware.module.build_info()["architectures"])
    if architectures.way_on(built, capability) is None:
        # The GPUs of capability 9.x have kernels of their own. All others run those of the setting 80.
        command = native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="90" if capability[0] == 9 else "80")
        return (
            f"the CUDA kernels have been built for {', '.join(map(str, built))}, expected sm_{capability[0]}"
            f"{capability[1]}; on the machine with the GPU, {command} builds them for it"
        )
    has_odd_pages = problem.page_size % hardware.PAGE_STEP != 0
    has_hopper_kernels_alone = all(x.name == "90a" for x in built)
    if has_odd_pages and has_hopper_kernels_alone and splits.key_splits(problem).large > 0:
        command = native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="80,90")
        return (
            f"the CUDA kernels have been built for {', '.join(map(str, built))} alone, expected sm_80, too, for pages "
            f"of {problem.page_size} rows, which are no multiple of {hardware.PAGE_STEP}; {command} builds both"
        )
    return hardware.device_reason(problem)


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    """The results of the call. lse and row_max are float32, or None if they are not needed."""
    # The decode kernels know no maxima.
    parts = splits.KeySplits(large=splits.large_splits(problem)) if needs_max else splits.key_splits(problem)
    if parts.decode and inputs.key_bias is not None:
        inputs = _with_key_bias_in_bias(inputs)
    # Results follow the layout of what the caller has given, as compiled code expects, and not that of a copy.
    out = empty_like_layout(inputs.query, problem.value_dim)
    inputs = readable_inputs(problem, inputs)
    query = inputs.query
    shape = shape_of_lse(query, problem.is_packed)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device) if needs_lse else None
    row_max = torch.empty(shape, dtype=torch.float32, device=query.device) if needs_max else None
    results = out, lse, row_max
    # CUDA refuses to launch a grid without blocks.
    if 0 in (inputs.key.numel(), problem.seqlen_k, out.numel(), problem.batch, problem.seqlen_q):
        clear_rows(out)
        clear_rows(lse, row_max, value=float("-inf"))
        return results
    memory = workspace(problem, inputs, wanted=None, key_splits=parts)
    architecture = hardware.architecture(problem, has_large_kernels=parts.large > 0)
    hardware.module.forward(inputs, results, _config(problem), *parts, architecture, memory)
    return results


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The wanted gradients, each in the shape and dtype of its input."""
    if wanted.bias and _is_bias_of_rows(problem, inputs):
        others = backward(problem, inputs, saved, wanted._replace(bias=False))
        assert saved.lse is not None, "backends get it"
        delta = None if inputs.sinks is None else _delta(saved)
        return others._replace(bias=gradient_of_row_bias(inputs, saved.lse, saved.dlse, delta))
    read = readable_inputs(problem, inputs)
    saved = readable_saved(problem, saved)
    query, key, value = inputs.query, inputs.key, inputs.value
    grads = Gradients(
        empty_like_layout(query, problem.head_dim) if wanted.query else None,
        empty_like_layout(key, problem.head_dim) if wanted.key else None,
        empty_like_layout(value, problem.value_dim) if wanted.value else None,
        *(_empty_shared_gradients(inputs, wanted) if wanted.is_any_shared else ()),
    )
    if 0 in (query.numel(), key.numel(), problem.batch, problem.seqlen_q, problem.seqlen_k):
        return in_dtypes_of(inputs, Gradients(*(None if dx is None else dx.zero_() for dx in grads)))
    assert saved.lse is not None, "backward needs the lse of forward"
    saved = saved._replace(
        lse=saved.lse.contiguous(),  # under vmap, lse can be an expanded view
        dlse=None if saved.dlse is None else saved.dlse.resolve_neg(),
    )
    parts = splits.gradient_splits(problem, *rows_of_heads(problem, inputs))
    memory = workspace(problem, read, wanted, gradient_splits=parts)
    architecture = hardware.device_architecture(problem)
    hardware.module.backward(read, saved, grads, _config(problem), *parts, architecture, memory)
    return in_dtypes_of(inputs, grads) if wanted.is_any_shared else grads


def _with_key_bias_in_bias(inputs: Inputs) -> Inputs:
    """The same call for the decode kernels, which read one dense bias: at head dim 256, they have no register left for
    a second one. There are few queries, so the sum of both biases is small.
    """
    assert inputs.key_bias is not None, "the caller has one"
    key_bias = inputs.key_bias[:, None, None]
    bias = key_bias if inputs.bias is None else inputs.bias.float() + key_bias
    return inputs._replace(bias=bias, key_bias=None)


def _is_bias_of_rows(problem: AttentionProblem, inputs: Inputs) -> bool:
    """Whether the bias moves the logits of all keys of a row alike. The other keys of a part have other logits."""
    if inputs.bias is None or inputs.bias.shape[3] != 1:
        return False
    return not (problem.is_packed or problem.is_part)


def _delta(saved: Saved) -> Tensor:
    """(B, H, L), rowsum(dout * out) - dlse."""
    assert saved.out is not None and saved.dout is not None, "backends get both"
    delta = (saved.dout.float() * saved.out.float()).sum(-1)
    return delta if saved.dlse is None else delta - saved.dlse


def _empty_shared_gradients(inputs: Inputs, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of `SHARED`, in the shapes of the inputs. Kernels sum these gradients in float32.

    They write them as float32, too, except the one of bias. It may be as large as the scores, so it gets the dtype of
    the query if bias has this dtype.
    """

    def empty(name: str) -> Tensor | None:
        if not getattr(wanted, name):
            return None
        x, query = getattr(inputs, name), inputs.query
        dtype = query.dtype if name == "bias" and x.dtype == query.dtype else torch.float32
        return torch.empty(x.shape, dtype=dtype, device=query.device)

    return tuple(empty(name) for name in SHARED)


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem) -> Any:
    """The numbers of a problem as the native module takes them, converted once for each problem."""
    return hardware.module.Config(**native_numbers(problem))
