"""What Python gets if a call of the CUDA kernels fails. The real bindings, and kernels that do nothing but fail."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from emulator import CSRC, Builder
from kernels import of_architecture

import fused_attn
from fused_attn.backends.cuda import hardware

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failing(builder: Builder) -> types.ModuleType:
    """A module with two ways to fail: the kernels for sm_90a lack memory, those for sm_80 have another error."""
    sources = [Path(__file__).with_name("failing_attention.cpp"), CSRC / "cuda" / "bindings.cpp"]
    return builder.module("_cuda_failing", sources, CSRC, ("-DFUSED_ATTN_CUDA_MODULE=_cuda_failing", "-Wno-psabi"))


def call(requires_grad: bool = False) -> torch.Tensor:
    x = torch.randn(1, 2, 16, 64, dtype=torch.float16, requires_grad=requires_grad)
    return fused_attn.fused_attention(x, x, x, backend="cuda")


def test_a_lack_of_memory_is_torch_s_error(failing: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training loops catch it. It keeps no tensor alive, and the next call works as before."""
    monkeypatch.setattr(hardware, "module", failing)
    with of_architecture(90):
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                call()
    with of_architecture(80), pytest.raises(RuntimeError, match="invalid device function") as caught:
        call()
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_a_failed_call_keeps_no_tensor(failing: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "module", failing)
    x = torch.randn(1, 2, 16, 64, dtype=torch.float16)
    before = sys.getrefcount(x)
    with of_architecture(90):
        for _ in range(10):
            with pytest.raises(torch.OutOfMemoryError):
                fused_attn.fused_attention(x, x, x, backend="cuda")
    assert sys.getrefcount(x) == before


def test_what_may_pass_is_no_reason_against_a_device(failing: types.ModuleType) -> None:
    assert failing.unusable_reason(0) == ""
    assert failing.unusable_reason(2) == "the driver is too old"
    with pytest.raises(torch.OutOfMemoryError):
        failing.unusable_reason(1)
    with pytest.raises(RuntimeError, match="the device is busy"):
        failing.unusable_reason(3)


def test_the_module_says_how_it_was_built(failing: types.ModuleType) -> None:
    assert set(failing.build_info()) == {"version", "compiler", "architectures"}
