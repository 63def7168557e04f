"""The Triton kernels: every case on the GPU, or without one in Triton's interpreter on the CPU."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import CASES, Case
from conftest import DEVICE

triton = pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned", "patched_language")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

# The interpreter does not multiply bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
HUGE = ("strides-past-2-31", "strides-past-2-31-mask")


@pytest.fixture(scope="module")
def patched_language():
    """`triton.language` as the interpreter wants it, once for all.

    It does so itself in every call of one kernel function by another, for a third of its time.
    """
    if DEVICE == "cuda":
        yield
        return
    import types

    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scope = patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    yield
    interpreter._patch_lang = patch
    scope.restore()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{NAMES[dtype]}")
        for case in CASES
        for dtype in DTYPES
        if not (case.id in HUGE and dtype == torch.float32)
    ],
)
def test_case(case: Case, dtype: torch.dtype) -> None:
    cases.check(case, dtype, "triton", DEVICE)
