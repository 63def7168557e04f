"""Fixtures for all tests: the backends that run on this machine, and memory in which a missing write is noticed."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Must be set before torch starts OpenMP. Otherwise waiting threads spin, and small operations are slow on a busy
# machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton's interpreter multiplies small matrices with numpy. For such small products, more threads are slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# MKL then adds in the same order on all processors. The error of torch's eager attention is the yardstick of the tests.
# With AVX-512, it is smaller in a few products of vectors, by chance.
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")
# torch's compiler then compiles in this process. Its other processes would import torch first, which takes longer.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch

from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import cpu, dispatch
from fused_attn.backends.triton import backend as triton_backend

#: The device on which the Triton kernels are tested. Without a GPU, they run in Triton's interpreter, which must be
#: switched on before Triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Runs of the same selection of tests draw the same random examples, so that a failure can be repeated. Hypothesis also
# draws constants of the modules that are loaded, so another selection may draw other examples.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("ci")

# torch collects the functions that make tensors when a device context is first entered. If this happened while
# `poisoned` has replaced torch.empty, contexts such as torch.device("meta") would ignore torch.empty for the rest of
# the process.
with torch.device("meta"):
    torch.zeros(())


def runnable_backends() -> list[str]:
    """Names of the backends that run a plain float32 problem on this machine's CPU.

    Triton is left out, because its interpreter is a thousand times slower than the other backends. tests/triton tests
    it.
    """
    problem = AttentionProblem(1, 1, 1, 1, 1, 8, 8, torch.float32, torch.device("cpu"), 1.0)
    return [
        backend.name
        for backend in dispatch.BACKENDS
        if backend is not triton_backend and not backend.unsupported_reasons(problem)
    ]


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over all modules and tests. To look at them took a sixth of the time of tests.

    It also runs more rarely than by default. Tests in Triton's interpreter then take 0.82 of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20)


@pytest.hookimpl(trylast=True)  # after the marks of the tests
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        # The last parameter varies fastest, so tests of one case on different backends run one after another, and
        # `cases.expected` computes the result of the oracle once.
        metafunc.parametrize("backend", runnable_backends())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For `-m timing`, leaves out the files without such a test: their imports take longer than the tests."""
    if config.option.markexpr == "timing" and collection_path.suffix == ".py":
        return "mark.timing" not in collection_path.read_text() or None
    return None


def dynamo_collections() -> int:
    """How often torch.compile has collected the functions of torch that it knows."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    return 0 if rules is None else rules.get_torch_obj_rule_map.cache_info().misses


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with poison(monkeypatch):
        yield


@contextlib.contextmanager
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills uninitialised tensors with NaN, True or the lowest integer, so that a missing write is noticed."""
    collections = dynamo_collections()

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
        (cpu, "empty"),
        (cpu, "empty_like"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    yield
    if dynamo_collections() != collections:
        # What was collected has the replaced functions. Later tests could not compile torch.empty.
        torch._dynamo.trace_rules.clear_lru_cache()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def builder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """The `emulator.Builder` of the tests in tests/cuda.

    The fixture is in this file, because a second conftest.py would be imported under the same module name.
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
