"""A GPU call that another installation would run on faster kernels says so, once, with the command that mends it."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator

import pytest
import torch

import fused_attn
from fused_attn import native
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import cpu, dispatch
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.backends.triton import backend as triton

pytestmark = pytest.mark.quick

#: A binary for sm_86 alone, and the default build.
ONLY_86, DEFAULT = "86-real", "80,90a-real"


class WithoutModules(type(native.PACKAGE)):
    """The folder of the package, in which no compiled module is found."""

    def glob(self, pattern: str) -> Iterator[WithoutModules]:
        return iter(())


@pytest.fixture(autouse=True)
def installation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The only installation, with Triton and without CUDA kernels, which has not warned yet."""
    monkeypatch.setattr(hardware, "module", None)
    monkeypatch.setattr(native, "PACKAGE", WithoutModules(native.PACKAGE))
    monkeypatch.setattr(native, "_installed_copy", lambda module: None)
    monkeypatch.setattr(hardware, "missing", hardware.why_not_installed(ModuleNotFoundError()))
    monkeypatch.setattr(triton, "installation_problem", lambda: None)
    caches = (
        dispatch.choose,
        dispatch._warn_of_triton,
        dispatch._warn_of_reference,
        dispatch._warn_of_instruction_set,
        hardware.unusable_reason,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def built(monkeypatch: pytest.MonkeyPatch, architectures: str, refusal: str = "") -> None:
    """As if CUDA kernels had been built for these architectures. The driver refuses them with a text, or takes them."""
    build = {"version": "1", "compiler": "nvcc 13.0", "architectures": architectures}
    module = types.SimpleNamespace(build_info=lambda: build, unusable_reason=lambda index: refusal)
    monkeypatch.setattr(hardware, "module", module)


def problem(length: int = 2048, capability: tuple[int, int] = (9, 0), **changes) -> AttentionProblem:
    """A problem on a GPU that is not here."""
    options = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "head_dim": 64} | changes
    head_dim = options.pop("head_dim")
    return AttentionProblem(2, 8, 8, length, length, head_dim, head_dim, scale=0.125, capability=capability, **options)


def chosen(*problems: AttentionProblem) -> tuple[list[str], list[str]]:
    """(the names of the backends that run the problems, the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [dispatch.choose(each, None).name for each in problems]
    return names, [str(warning.message) for warning in caught]


def test_without_cuda_kernels_one_warning_names_the_command() -> None:
    first = problem()
    names, (warning,) = chosen(first, first, problem(4096), problem(capability=(8, 6)), problem(dtype=torch.float16))
    assert set(names) == {"triton"}
    assert "runs on the Triton kernels. The CUDA kernels, which come first for this call, cannot run: " in warning
    assert native.install_command(FUSED_ATTN_CUDA="ON") in warning and "pip install -e " in warning


@pytest.mark.parametrize(
    "quiet",
    [
        problem(dtype=torch.float32),  # no installation has CUDA kernels for these
        problem(head_dim=20),
        problem(device=torch.device("meta")),
    ],
    ids=["float32", "head-dim-20", "meta"],
)
def test_no_warning_where_another_installation_would_not_help(quiet: AttentionProblem) -> None:
    assert chosen(quiet)[1] == []


def test_no_warning_where_the_caller_has_named_the_backend() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(problem(), "triton") is triton


def test_a_second_call_looks_the_answer_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning is decided when the plan is made. A later call asks no backend anything."""
    asked = problem()
    chosen(asked)
    for backend in dispatch.BACKENDS:
        monkeypatch.setattr(backend, "unsupported_reasons", None)
    monkeypatch.setattr(cuda, "build_reason", None)
    assert chosen(asked) == (["triton"], [])


def test_without_any_gpu_kernel_the_warning_names_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "installation_problem", lambda: "triton is not installed (pip install triton)")
    names, (warning,) = chosen(problem(), problem(4096))
    assert names == ["reference", "reference"]
    assert "which is slow" in warning and "pip install triton" in warning
    assert native.install_command(FUSED_ATTN_CUDA="ON") in warning


def test_a_binary_for_other_gpus_falls_back_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, ONLY_86)
    names, (warning,) = chosen(problem(capability=(8, 6)), problem(capability=(8, 9)), problem(capability=(9, 0)))
    assert names == ["cuda", "cuda", "triton"]
    assert "have been built for sm_86 (machine code), expected sm_90" in warning
    assert native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="90") in warning


def test_ptx_runs_on_later_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, DEFAULT)
    assert chosen(*(problem(capability=capability) for capability in ((8, 9), (9, 0), (12, 0)))) == (["cuda"] * 3, [])


def test_a_binary_without_kernels_for_hopper_runs_those_for_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, the kernels for sm_80 run from their PTX if those for sm_90a have not been built."""
    for architectures, expected in ((DEFAULT, 90), ("80", 80)):
        built(monkeypatch, architectures)
        hardware.has_hopper_kernels.cache_clear()
        assert hardware.device_architecture(problem()) == expected
        assert hardware.device_architecture(problem(capability=(8, 0))) == 80
    hardware.has_hopper_kernels.cache_clear()


def test_pages_that_the_kernels_for_hopper_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, "90a-real")
    hardware.has_hopper_kernels.cache_clear()
    names, (warning,) = chosen(problem(page_size=16), problem(page_size=12))
    assert names == ["cuda", "triton"]
    assert "expected sm_80, too, for pages of 12 rows, which are no multiple of 8" in warning
    assert "FUSED_ATTN_CUDA_ARCHITECTURES=80,90" in warning
    built(monkeypatch, DEFAULT)
    assert chosen(problem(page_size=12)) == (["cuda"], [])
    hardware.has_hopper_kernels.cache_clear()


def test_explain_says_what_a_binary_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, ONLY_86)
    query = torch.randn(2, 4, 2048, 64, dtype=torch.bfloat16)
    explanation = fused_attn.explain(query, query, query, device="sm_100")
    assert explanation.chosen == "triton"
    (reason,) = explanation.reasons["cuda"]
    assert "built for sm_86 (machine code), expected sm_100" in reason


def as_if_here(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """As if torch saw one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


def test_a_driver_that_refuses_the_kernels_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_here(monkeypatch)
    built(monkeypatch, DEFAULT, refusal="the driver is too old")
    names, (warning,) = chosen(problem(), problem(4096))
    assert names == ["triton", "triton"]
    for text in ("the driver refuses the CUDA kernels: the driver is too old", "nvcc 13.0", "update the driver"):
        assert text in warning


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("the device is busy")], ids=["memory", "busy"]
)
def test_what_may_pass_is_no_lasting_reason(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call raises the error. The next call asks the driver again."""
    as_if_here(monkeypatch)
    built(monkeypatch, DEFAULT)

    def fails(index: int) -> str:
        raise error

    asked = problem()
    works = hardware.module.unusable_reason
    hardware.module.unusable_reason = fails
    with pytest.raises(type(error), match=str(error)):
        dispatch.choose(asked, None)
    hardware.module.unusable_reason = works
    assert chosen(asked) == (["cuda"], [])


def with_instruction_sets(monkeypatch: pytest.MonkeyPatch, *compiled: str, best: str) -> None:
    """As if the CPU kernels had been compiled for some instruction sets, on a machine that runs them up to `best`."""
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    runnable = [isa for isa in compiled if order.index(isa) <= order.index(best)]
    module = types.SimpleNamespace(
        build_info=lambda: {"version": "1", "compiler": "g++", "openmp": True, "cpu_isas": list(compiled)},
        cpu_isas=lambda: runnable,
        cpu_isa=lambda: runnable[-1],
        best_cpu_isa=lambda: best,
    )
    monkeypatch.setattr(cpu, "_C", module)


def test_a_build_without_the_best_instruction_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = [problem(length, device=torch.device("cpu"), dtype=torch.float32) for length in (16, 32)]
    with_instruction_sets(monkeypatch, "baseline", "avx2", best="avx512")
    names, (warning,) = chosen(*on_cpu, on_cpu[0])
    assert set(names) == {"cpu"}
    command = native.install_command(FUSED_ATTN_CPU_ISAS="avx512")
    assert "have been built for baseline, avx2, expected avx512" in warning and command in warning
    told = fused_attn.info().native
    assert told["CPU kernels"] == told["run here"] == "baseline, avx2"
    assert told["in use here"].startswith("avx2: ") and command in told["in use here"]
    dispatch.choose.cache_clear()
    assert chosen(*on_cpu)[1] == [], "once"


def with_settings(monkeypatch: pytest.MonkeyPatch, settings: str) -> None:
    """As if the CPU kernels had been built with these settings, in the form of ``_C.build_info()``."""
    build = types.SimpleNamespace(build_info=lambda: {"settings": settings})
    monkeypatch.setattr(native, "_C", build)
    monkeypatch.setattr(hardware, "missing", hardware.why_not_installed(ModuleNotFoundError()))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ("", ""),
        ("FUSED_ATTN_CPU_ISAS=avx2 FUSED_ATTN_CUDA=OFF", " -C cmake.define.FUSED_ATTN_CPU_ISAS=avx2"),
        (
            "FUSED_ATTN_CUDA=wheels FUSED_ATTN_CUDA_ARCHITECTURES=80,90",
            " -C cmake.define.FUSED_ATTN_CUDA=wheels -C cmake.define.FUSED_ATTN_CUDA_ARCHITECTURES=80,90",
        ),
    ],
)
def test_the_command_for_missing_cuda_kernels_keeps_the_other_settings(monkeypatch, settings, options) -> None:
    with_settings(monkeypatch, settings)
    _, (warning,) = chosen(problem())
    assert f"`pip install -e {native.PACKAGE.parent}{options}`" in warning or f"`pip install -e .{options}`" in warning
    assert f"{options}`" in fused_attn.info().cuda["kernels"]


@pytest.mark.parametrize(("settings", "expected"), [("80", "80,90"), ("auto", None), ("all", "all"), ("90", "90")])
def test_the_command_adds_an_architecture(monkeypatch: pytest.MonkeyPatch, settings: str, expected: str) -> None:
    built(monkeypatch, ONLY_86)
    name = "FUSED_ATTN_CUDA_ARCHITECTURES"
    with_settings(monkeypatch, "" if settings == "auto" else f"FUSED_ATTN_CPU_ISAS=all {name}={settings}")
    _, (warning,) = chosen(problem(capability=(9, 0)))
    options = "" if expected is None else f" -C cmake.define.FUSED_ATTN_CPU_ISAS=all -C cmake.define.{name}={expected}"
    assert f"{options}`" in warning and (expected or name not in warning)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [("", ""), ("avx2", "avx2,avx512"), ("runnable", "runnable"), ("avx2,avx512", "avx2,avx512")],
)
def test_the_command_adds_an_instruction_set(monkeypatch: pytest.MonkeyPatch, settings: str, expected: str) -> None:
    name = "FUSED_ATTN_CPU_ISAS"
    with_settings(monkeypatch, f"{name}={settings} FUSED_ATTN_CUDA=OFF" if settings else "FUSED_ATTN_CUDA=OFF")
    with_instruction_sets(monkeypatch, "baseline", "avx2", best="avx512")
    _, (warning,) = chosen(problem(device=torch.device("cpu"), dtype=torch.float32))
    options = f" -C cmake.define.{name}={expected}" if expected else ""
    assert options in warning and " -C cmake.define.FUSED_ATTN_CUDA=OFF`" in warning
    assert expected or name not in warning


def test_without_a_build_the_command_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    assert native.build_settings() == {} and "-C" not in native.install_command(FUSED_ATTN_CPU_ISAS="avx2")


@pytest.mark.parametrize("best", ["baseline", "avx2", "avx512"])
def test_a_build_with_the_best_instruction_set_is_quiet(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    with_instruction_sets(monkeypatch, "baseline", "avx2", "avx512", best=best)
    assert chosen(problem(device=torch.device("cpu"), dtype=torch.float32)) == (["cpu"], [])
    assert fused_attn.info().native["in use here"] == best
