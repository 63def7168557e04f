"""The libraries of `emulator.py` compiled by nvcc: the same tests on a GPU show that the emulation is right."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from emulator import CSRC, EmulationError

#: Host code of the product that every library needs.
SHARED_SOURCES = ("cuda/tensor_map_rules.cpp", "cuda/tensor_map_driver.cu")


class GpuLibrary:
    """`emulator.Library`, with tensors that are copied to the GPU for a call and back after it. It has no options."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._buffers: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def start(self, *_args: object, **_options: object) -> None:
        self._buffers.clear()

    def buffer(self, tensor: torch.Tensor | None, *, is_writable: bool = False) -> ctypes.c_void_p:
        if tensor is None:
            return ctypes.c_void_p(None)
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        copy.copy_(tensor)
        self._buffers.append((tensor, copy, is_writable))
        return ctypes.c_void_p(copy.data_ptr())

    def call(self, function: str, *arguments: object) -> None:
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        if error := entry(*arguments):
            raise EmulationError(error.decode())
        torch.cuda.synchronize()
        for tensor, copy, is_writable in self._buffers:
            if is_writable:
                tensor.copy_(copy)


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from the PATH or where the toolkit usually is; skips the test without it."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which(name) or shutil.which(name, path=str(folder))
    if found is None:
        pytest.skip(f"needs {name} of the CUDA toolkit, which is neither on the PATH nor in {folder}")
    return found


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time, of those that share the GPU."""
    import fcntl  # which not every system has that collects tests

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Path, library: Path) -> None:
    nvcc = tool("nvcc")
    sources = [source, *(CSRC / name for name in SHARED_SOURCES)]
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC}", "-shared", "-Xcompiler=-fPIC"]
    result = subprocess.run([nvcc, *flags, "-o", library, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def library(source: Path, folders: pytest.TempPathFactory) -> GpuLibrary:
    """Compiled for sm_90a, once for all workers; skips the test where it cannot run."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9")
    folder = folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"lib{source.stem}.so"
    with alone(path.with_suffix(".lock")):
        if not path.exists():
            build(source, path)
    return GpuLibrary(path)


def error_in_another_process(function: Callable[..., None], *arguments: object) -> str:
    """What the function raised, or an empty text: a fault on the GPU would end all that follows in this process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_error_of, function, *arguments).result()


def _error_of(function: Callable[..., None], *arguments: object) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return str(error)
    return ""
