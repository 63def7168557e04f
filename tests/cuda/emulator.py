"""Builds CUDA kernels for the emulation (tools/emulation), and calls them from Python.

g++ compiles the sources that nvcc compiles, and links them with the emulation to a library. The library exports plain C
functions that return an error text, or it is a Python module. Builds are kept in pytest's cache, under a name that is a
hash of all files and flags that they are made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TOOLS = ROOT / "tools"
EMULATION = TOOLS / "emulation"

# Without -march=native, each conversion of a 16-bit float would be a function call. -O1, because compiling the kernels
# with -O2 takes half as long again, and their own code takes a twentieth of the time of a test.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-march=native",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",
    "-Werror",
    "-DFUSED_ATTN_EMULATION",
)

#: The emulation takes ten times as long as the code of the kernels. -O3 makes vector instructions of its loops, and the
#: other flag lets a function inline another one that the library exports.
EMULATION_FLAGS = ("-O3", "-fno-semantic-interposition")

#: Host code of the product that every library needs.
SHARED_SOURCES = ("cuda/tensor_map_rules.cpp",)

#: Sources in which no time is spent. Their compilation takes longer than all their calls.
UNOPTIMIZED = ("bindings.cpp",)


class EmulationError(AssertionError):
    """A fault that the emulation has found in a kernel."""


# ---- Building


def why_unavailable() -> str:
    """Why kernels cannot be emulated on this machine, or an empty text."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the CUDA emulation runs on Linux on x86-64, not on {sys.platform} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "the CUDA emulation is compiled with g++, which is not on the PATH"
    return ""


class Builder:
    """Compiles into the folder ``cache``, where later runs find the files. Several processes may share the folder."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def library(self, sources: Sequence[Path], csrc: Path = CSRC, flags: Sequence[str] = ()) -> Library:
        """Compiles these sources (C++, whatever their suffix), links them with the emulation, and loads the library.

        ``csrc`` is the folder that they include headers from: the product's, or for a test of mutations a copy of that
        folder with some lines changed.
        """
        return Library(self._link(sources, csrc, flags))

    def module(self, name: str, sources: Sequence[Path], csrc: Path = CSRC, flags: Sequence[str] = ()) -> ModuleType:
        """The same for sources that are a pybind11 module ``name``. Each call loads another module object."""
        pybind11 = pytest.importorskip("pybind11", reason="needs the Python package pybind11")
        includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
        linked = self._link(sources, csrc, (*flags, *includes, "-fvisibility=hidden"))
        spec = importlib.util.spec_from_file_location(name, linked)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert Path(module.__file__) == linked, f"{name} is another module already"
        return module

    def _link(self, sources: Sequence[Path], csrc: Path, flags: Sequence[str]) -> Path:
        """Compiles all sources in parallel, and links them. Returns the path of the library."""
        emulation = self._joined([f"emulation/{path.name}" for path in EMULATION.glob("*.cpp")], SHARED_SOURCES)
        compiled = [(emulation, csrc, (*FLAGS, *EMULATION_FLAGS))]  # the same for all libraries
        for source in sources:
            compiled.append((source, csrc, (*FLAGS, *flags, *(["-O0"] if source.name in UNOPTIMIZED else []))))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda arguments: self._object(*arguments), compiled))
        key = _digest(*(path.name for path in objects))
        linked = self.cache / f"lib{sources[0].stem}-{key}.so"
        if not linked.exists():
            # -Bsymbolic: a function calls another one of the library directly, not by way of a table.
            self._produce(linked, ["g++", "-shared", "-Wl,-Bsymbolic", *flags, *map(str, objects)])
        return linked

    def _joined(self, *sources: Sequence[str]) -> Path:
        """A source that includes all of these: compiled together, they read the headers of C++ once."""
        text = "".join(f'#include "{name}"\n' for names in sources for name in sorted(names))
        path = self.cache / f"joined-{_digest(text)}.cpp"
        if not path.exists():
            with self._replaced(path) as temporary:
                Path(temporary).write_text(text)
        return path

    def _object(self, source: Path, csrc: Path, flags: Sequence[str]) -> Path:
        """Compiles one source, unless the cache has an object of the same contents and flags. Returns its path."""
        compile_command = ["g++", *flags, f"-I{csrc}", f"-I{TOOLS}", "-x", "c++", str(source)]
        # -MM prints the files that the source includes, as a rule for make: "target: source header header ...".
        rule = _run([*compile_command, "-MM", "-MT", "target"]).replace("\\\n", " ")
        dependencies = [Path(name).read_bytes() for name in rule.split()[1:]]
        key = _digest(_compiler_version(), *flags, *dependencies)
        compiled = self.cache / f"{source.stem}-{key}.o"
        if not compiled.exists():
            self._produce(compiled, [*compile_command, "-c"])
        return compiled

    def _produce(self, target: Path, command: list[str]) -> None:
        """Runs a command that writes ``target``."""
        with self._replaced(target) as temporary:
            _run([*command, "-o", temporary])

    @contextlib.contextmanager
    def _replaced(self, target: Path) -> Iterator[str]:
        """A temporary name, under which the caller writes what becomes ``target``.

        Another process may write the same file at the same time, or may be killed half-way.
        """
        handle, temporary = tempfile.mkstemp(dir=self.cache, prefix=target.stem, suffix=target.suffix)
        os.close(handle)
        try:
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _run(command: list[str]) -> str:
    """Runs a command, and returns its output. Fails with its error output if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    return result.stdout


def _digest(*parts: str | bytes) -> str:
    """A short hash of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


@functools.cache
def _compiler_version() -> str:
    # The output includes the target flags: -march=native means other flags on another machine.
    return _run(["g++", "-march=native", "-Q", "--help=target", "--version"])


# ---- Calling


class Options(ctypes.Structure):
    """The struct Options of tools/emulation/options.h, which says what each field means."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("timing", ctypes.c_int32),
        ("race_detection", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("strict_wgmma", ctypes.c_int32),
        ("count_bank_conflicts", ctypes.c_int32),
        ("resident_blocks", ctypes.c_int32),
        ("ordered_sums", ctypes.c_int32),
        ("registers_per_thread", ctypes.c_int32),
    )


BY_SEED, EARLY, LATE = range(3)


class Statistics(ctypes.Structure):
    """The struct Statistics of tools/emulation/options.h, which says what each field means."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "blocks",
            "switches",
            "warp_operations",
            "barriers",
            "mma",
            "wgmma",
            "async_copies",
            "tma_loads",
            "tma_stores",
            "most_registers",
            "shared_accesses",
            "shared_wavefronts",
            "ideal_wavefronts",
        )
    )


class Library:
    """A loaded library of kernels. Each of its functions returns an error text, empty or null if all is well."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_register_buffer.restype = ctypes.c_void_p
        self._library.emulation_statistics.restype = Statistics
        self._buffers: list[torch.Tensor] = []
        self.start()

    def start(
        self,
        seed: int = 0,
        *,
        timing: int = BY_SEED,
        race_detection: bool = True,
        poison: bool = True,
        strict_wgmma: bool = True,
        count_bank_conflicts: bool = False,
        resident_blocks: int = 2,
        ordered_sums: bool = True,
        registers_per_thread: int = 0,
    ) -> None:
        """Sets options for the calls that follow, and forgets all buffers and statistics."""
        options = Options(
            seed,
            timing,
            race_detection,
            poison,
            strict_wgmma,
            count_bank_conflicts,
            resident_blocks,
            ordered_sums,
            registers_per_thread,
        )
        self._library.emulation_start(ctypes.byref(options))
        self._buffers.clear()

    def buffer(self, tensor: torch.Tensor | None, *, is_writable: bool = False) -> ctypes.c_void_p:
        """Registers the memory of a tensor, and returns the handle that kernels get in place of a pointer.

        Kernels may access all elements from the first one to the last one, also those between strided rows.
        """
        if tensor is None:
            return ctypes.c_void_p(None)
        self._buffers.append(tensor)  # keeps the memory alive until the next start
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bytes_spanned = elements * tensor.element_size() if tensor.numel() else 0
        return ctypes.c_void_p(
            self._library.emulation_register_buffer(
                ctypes.c_void_p(tensor.data_ptr()), ctypes.c_uint64(bytes_spanned), ctypes.c_int32(is_writable)
            )
        )

    def call(self, function: str, *arguments: object) -> None:
        """Calls a function of the library. Python's integers become C's int, floats become float.

        Raises:
            EmulationError: with the text that the function has returned.
        """
        converted = [ctypes.c_float(x) if isinstance(x, float) else x for x in arguments]
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        if error := entry(*converted):
            raise EmulationError(error.decode())

    @property
    def statistics(self) -> Statistics:
        """The statistics of all launches since `start`."""
        return self._library.emulation_statistics()
