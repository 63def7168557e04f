"""What a user meets on a GPU besides results: ``info``, ``check``, a full GPU, a fork, another current device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn.__main__ import main
from fused_attn.backends.cuda import hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(hardware.module is None, reason="fused_attn._cuda has not been built")


def leaves(length: int = 2048, device: str = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, length, 64)
    return [torch.randn(shape, generator=generator).half().to(device).requires_grad_() for _ in range(3)]


def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """out and the gradients, by a backward that needs a workspace."""
    out = fused_attn.fused_attention(*tensors, is_causal=True, backend="cuda")
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@needs_kernels
def test_info_says_that_the_kernels_run() -> None:
    found = fused_attn.info()
    assert found.cuda["on cuda:0"].startswith("yes, ")
    assert found.cuda["driver"].startswith(tuple("0123456789f")) and "does not start" not in found.cuda["driver"]


@pytest.mark.slow
@pytest.mark.timing
def test_check_is_right_and_has_speeds(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    backends = {result["backend"] for result in report["results"]}
    assert "triton" in backends and ("cuda" in backends or hardware.module is None)
    for line in report["speed"]:
        assert line["failure"] == "", line
        assert 0 < line["tflops"] < 1.05 * line["matmul_tflops"]  # no attention is faster than a matrix product


@needs_kernels
def test_a_full_gpu_raises_torch_s_error_and_leaves_no_state() -> None:
    tensors = leaves()
    expected = run(tensors)
    torch.cuda.synchronize()
    del expected[1:]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            kept = []
            while True:
                kept.append(run(tensors))
        del kept
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(run(tensors)[0], expected[0])


@needs_kernels
def test_a_forked_process_says_what_is_wrong() -> None:
    """torch itself refuses new CUDA calls there. A call of the kernels with tensors of the parent must not hang."""
    code = """
import os, torch, fused_attn
x = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.float16)
fused_attn.fused_attention(x, x, x, backend="cuda")
torch.cuda.synchronize()
pid = os.fork()
if pid == 0:
    try:
        fused_attn.fused_attention(x, x, x, backend="cuda")
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "fork" in done.stdout and "spawn" in done.stdout


@needs_kernels
def test_a_limit_on_the_multiprocessors_changes_no_bit() -> None:
    """As MPS sets it (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE). Without an MPS server, the variable does nothing."""
    code = """
import sys, torch
sys.path[:0] = ["tests/cuda", "tests"]
from test_use_on_gpu import leaves, run
print([x.double().sum().item() for x in run(leaves())])
"""
    texts = []
    for percentage in ("100", "13"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]


@needs_kernels
def test_the_current_device_stays_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = run(leaves(device="cuda:0")), run(leaves(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for x, y in zip(here, there, strict=True):
        assert torch.equal(x.cpu(), y.cpu())
