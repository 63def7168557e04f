"""The C++ kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, run many cases without a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# A process with libasan preloaded runs this script. It leaves out most cases in float64 and float16, because the
# kernels are templates over the dtype: only loads and stores differ.
SCRIPT = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("fused_attn._C", sys.argv[1])
sys.modules["fused_attn._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path.insert(0, sys.argv[2])

import torch
import cases
from fused_attn.backends import cpu

assert cpu._C is module and module.build_info()["sanitize"], "not the sanitized build"
torch.set_num_threads(2)
done = 0
for isa in module.cpu_isas():
    module.select_cpu_isa(isa)
    for case in cases.CASES:
        if case.seqlen_q * case.seqlen_k > 100_000 or "past-2-31" in case.id:
            continue
        for dtype in case.dtypes:
            if dtype in (torch.float32, torch.bfloat16) or case.is_quick:
                print(isa, case.id, dtype, flush=True)
                cases.run(case.make(dtype), "cpu")
                done += 1
print("done", done)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a native module that is built with the sanitizers, in a folder of its own."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if sys.platform != "linux" or compiler is None or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    pytest.importorskip("cmake", reason="needs the Python package cmake")
    pytest.importorskip("ninja", reason="needs the Python package ninja")
    pybind11 = pytest.importorskip("pybind11", reason="needs the Python package pybind11")
    build = tmp_path_factory.mktemp("sanitized")
    defines = {
        "FUSED_ATTN_SANITIZE": "ON",
        "FUSED_ATTN_CPU_ISAS": "runnable",
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_COMPILER": "g++",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    cmake = [sys.executable, "-m", "cmake"]
    for command in (
        [*cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in defines.items())],
        [*cmake, "--build", build],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(build.glob("_C*.so"))


def library(name: str) -> str:
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not os.path.isabs(path.stdout.strip()):
        pytest.skip(f"the compiler has no {name}")
    return path.stdout.strip()


@pytest.mark.slow
def test_no_bad_access_and_no_undefined_behaviour(sanitized: Path) -> None:
    environment = os.environ | {
        # libstdc++ must be preloaded as well: ASan looks up its exception functions before a module loads it.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch do not free all memory at exit, so there is no search for leaks.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sanitized), str(ROOT / "tests")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"after {last}:\n{result.stderr[-6000:]}"
    assert last[0].startswith("done ") and int(last[0].split()[1]) > 300
