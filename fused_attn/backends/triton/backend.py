"""The Triton backend as `dispatch` sees it. Triton is imported by the first call that runs here, not before."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from fused_attn.backends.base import Gradients, Wanted
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem

name = "triton"
is_composite = False

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if not _is_installed():
        reasons.append("triton is not installed (pip install triton)")
    if problem.device.type == "cuda":
        if torch.version.hip is not None:
            reasons.append("the kernels have been written for NVIDIA GPUs only")
        elif problem.capability is not None and problem.capability < MIN_CAPABILITY:
            have, need = (".".join(map(str, capability)) for capability in (problem.capability, MIN_CAPABILITY))
            reasons.append(f"the GPU has compute capability {have}, expected {need} or higher")
    elif not (problem.device.type == "cpu" and is_interpreting()):
        reasons.append(f"the tensors are on {problem.device}, expected cuda")
    elif problem.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter does not multiply bfloat16 correctly")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} is none of {', '.join(map(str, DTYPES))}")
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        reasons.append(f"head dim {max(problem.head_dim, problem.value_dim)} is above {MAX_HEAD_DIM}")
    return reasons


def is_interpreting() -> bool:
    """Triton's own switch: its kernels run in Python on the CPU. Read by Triton when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    from fused_attn.backends.triton import launcher

    return launcher.forward(problem, query, key, value, sinks, seed, mask, needs_lse)


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
    from fused_attn.backends.triton import launcher

    return launcher.backward(problem, wanted, dout, dlse, query, key, value, out, lse, sinks, seed, mask)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
