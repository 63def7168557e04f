"""Fixtures of all tests: the backends that can run here, and allocations that show what a kernel forgot to write."""

from __future__ import annotations

import os

# Before torch starts OpenMP: threads that wait by spinning make many small operations slow on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton's interpreter multiplies small matrices with numpy, whose threads would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import dispatch
from fused_attn.backends.triton import backend as triton_backend

#: Where the Triton kernels are tested. Without a GPU in Triton's interpreter, which has to be chosen before any import
#: of Triton.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every run: a red pipeline must be red again when it is looked at.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("ci")

# torch remembers which functions make tensors when it first meets a device context. Were that inside `poisoned`,
# contexts such as torch.device("meta") would not know torch.empty for the rest of the process.
with torch.device("meta"):
    torch.zeros(())


def runnable_backends() -> list[str]:
    """Names of the backends that run a plain float32 problem on this machine's CPU.

    Not Triton's interpreter, a thousand times slower than the others: tests/triton is for it.
    """
    problem = AttentionProblem(1, 1, 1, 1, 1, 8, 8, torch.float32, torch.device("cpu"), 1.0)
    return [
        backend.name
        for backend in dispatch.BACKENDS
        if backend is not triton_backend and not backend.unsupported_reasons(problem)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        # The last parameter varies fastest, so that the backends of one case follow one another.
        metafunc.parametrize("backend", runnable_backends())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (True, the lowest integer), so that an entry never written cannot pass."""

    def poisoning(allocate):
        def poisoned_allocate(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.is_floating_point():
                x.detach().fill_(float("nan"))
            elif x.dtype == torch.bool:
                x.fill_(True)
            else:
                x.fill_(torch.iinfo(x.dtype).min)
            return x

        return poisoned_allocate

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def builder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """The `emulator.Builder` of the tests in tests/cuda.

    Here, because a second conftest.py would be imported under this one's name.
    """
    import emulator

    if reason := emulator.why_unavailable():
        pytest.skip(reason)
    cache = getattr(pytestconfig, "cache", None)
    return emulator.Builder(cache.mkdir("cuda_emulation") if cache else tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture(scope="session")
def kernels(builder):
    """The `kernels.Kernels` of the tests in tests/cuda: a build of all CUDA kernels in the emulation."""
    from kernels import Kernels

    return Kernels(builder)
