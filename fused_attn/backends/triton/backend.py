"""The interface of the Triton backend for `dispatch`.

This module does not import Triton when it is imported itself. The first call that could run on this backend does.
"""

from __future__ import annotations

import functools
import importlib.util
import re

import torch

from fused_attn.attention.inputs import Gradients, Inputs, Results, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import dropout_reasons, dtype_reasons, gpu_reasons
from fused_attn.backends.triton.interpreter import is_interpreting

name = "triton"
is_composite = False

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512
#: Products of exact float32 keep whole rows of both factors in registers. Longer rows would not fit.
MAX_HEAD_DIM_FLOAT32 = 256
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why this backend cannot run the problem, one sentence for each reason. An empty list means that it can."""
    reasons = []
    is_on_cpu = problem.device.type == "cpu" and is_interpreting()
    if (problem.device.type == "cuda" or is_on_cpu) and (reason := installation_problem()) is not None:
        reasons.append(reason)
    if problem.device.type == "cuda":
        reasons += gpu_reasons(problem, MIN_CAPABILITY)
    elif not is_on_cpu:
        reasons.append(f"the tensors are on {problem.device}, expected cuda")
    elif problem.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter does not multiply bfloat16 correctly")
    reasons += dtype_reasons(problem, DTYPES)
    limit = max_head_dim(problem.dtype)
    if max(problem.head_dim, problem.value_dim) > limit:
        reasons.append(f"head dim {max(problem.head_dim, problem.value_dim)} is above {limit} in {problem.dtype}")
    return reasons + dropout_reasons(problem)


def max_head_dim(dtype: torch.dtype) -> int:
    """The largest head dim of queries, keys and values that the kernels compute in a dtype."""
    return MAX_HEAD_DIM_FLOAT32 if dtype == torch.float32 else MAX_HEAD_DIM


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    from fused_attn.backends.triton import launcher

    return launcher.forward(problem, inputs, needs_lse, needs_max)


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    from fused_attn.backends.triton import launcher

    return launcher.backward(problem, inputs, saved, wanted)


@functools.cache
def installation_problem() -> str | None:
    """Why the installed Triton cannot be used, or None if it can.

    The answer needs an import of Triton, which is slow. So ask only if the problem could run otherwise.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        import triton
    except ImportError as error:
        return f"triton is installed but cannot be imported: {error}"
    numbers = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    if numbers < MIN_TRITON:
        return f"triton {triton.__version__} is installed, expected {'.'.join(map(str, MIN_TRITON))} or newer"
    return None
