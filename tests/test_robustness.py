"""Surroundings in which the package is imported and used: drivers of all kinds, forks, sub-interpreters, full GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn

ROOT = Path(fused_attn.__file__).parents[1]

#: A stand-in for the driver's library. It has the version and the error of cuInit that it is compiled with.
LIBCUDA = """
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { (void)flags; return STATUS; }
int cuGetErrorString(int error, const char** text) { *text = error == 100 ? "no device is detected" : 0; return 0; }
"""

#: Imports all that is compiled, runs on the CPU, and says what the package knows of the driver.
USE = """
import torch, fused_attn
from fused_attn.backends.cuda import hardware
x = torch.randn(1, 2, 8, 16)
fused_attn.fused_attention(x, x, x)
print("driver:", fused_attn.info().cuda["driver"])
print("cuda:", hardware.missing or repr(hardware.module.unusable_reason(0)))
"""


def python(code: str, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in another process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def libcuda(folder: Path, version: int, status: int) -> str:
    """Compiles the stand-in. Returns the folder that it is in."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    source = folder / "libcuda.c"
    source.write_text(LIBCUDA)
    flags = ["-shared", "-fPIC", f"-DVERSION={version}", f"-DSTATUS={status}"]
    subprocess.run(["gcc", *flags, "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return str(folder)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in must not hide the driver of a GPU")


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        pytest.param(13000, 0, "for CUDA up to 13.0", id="works"),
        pytest.param(11040, 0, "for CUDA up to 11.4", id="old"),
        pytest.param(
            12080, 100, "for CUDA up to 12.8; it does not start: no device is detected (error 100)", id="no-device"
        ),
        pytest.param(0, 803, "it does not start: unknown error (error 803)", id="broken"),
    ],
)
def test_a_driver_of_any_kind(tmp_path: Path, version: int, status: int, said: str) -> None:
    done = python(USE, LD_LIBRARY_PATH=libcuda(tmp_path, version, status))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(said)
    assert lines[1].startswith("cuda: ") and lines[1] not in ("cuda: ", "cuda: ''")  # there is no device


@needs_no_gpu
@pytest.mark.slow
def test_no_driver(tmp_path: Path) -> None:
    """A file that is no library stands for a driver that cannot be loaded."""
    (tmp_path / "libcuda.so.1").write_text("")
    done = python(USE, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "driver: none that can be loaded (" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("is_isolated", [True, False], ids=["isolated", "shared"])
def test_a_sub_interpreter_refuses(is_isolated: bool) -> None:
    """It says so before it imports torch, which may wait forever there."""
    code = f"""
try:
    import _interpreters as interpreters
    interpreter = interpreters.create("isolated" if {is_isolated} else "legacy")
    error = interpreters.run_string(interpreter, "import fused_attn")
    print(error)
except ImportError:
    import _xxsubinterpreters as interpreters
    interpreter = interpreters.create(isolated={is_isolated})
    try:
        interpreters.run_string(interpreter, "import fused_attn")
    except Exception as error:
        print(error)
"""
    done = python(code)
    assert "fused_attn: expected the main interpreter of the process, got a sub-interpreter" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_imports_and_runs() -> None:
    """Forked before and after the first call, as a DataLoader forks its workers, with one thread as there."""
    code = """
import os, torch
torch.randn(2)
def fork(work):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
def use():
    import fused_attn
    from fused_attn.backends.cuda import hardware
    x = torch.randn(2, 4, 300, 64, requires_grad=True)
    fused_attn.fused_attention(x, x, x).sum().backward()
    assert hardware.missing or hardware.module.build_info()["architectures"]
fork(use)
use()
fork(use)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
