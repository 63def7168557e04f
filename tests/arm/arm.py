"""A plugin of pytest that runs the CPU kernels on an emulated ARM processor, with NEON.

    pip install ziglang unicorn
    PYTHONPATH=tests/arm pytest -p arm tests/backends/cpu/test_isa.py

The package ziglang brings Clang and a C++ library for ARM. It compiles the kernels to a program for ARM, which unicorn
emulates. The bindings stay code of this machine: g++ links them with kernels that call the emulation. The result is a
module ``fused_attn._C`` whose kernels take the same addresses as always, because the emulated processor sees the memory
of this process. So every test of the CPU kernels can run in this way.

The kernels run on one thread: they are compiled without OpenMP.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import pybind11
import unicorn
from unicorn import arm64_const as arm64

STDERR = os.dup(2)  # pytest replaces descriptor 2 by a file, which nobody reads if the process ends at once

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CSRC = ROOT / "csrc"
FLAGS = ("-std=c++17", "-DNDEBUG", f"-I{CSRC}")

#: Where the program and its stack lie. Linux gives these addresses to no process that does not ask for them.
IMAGE_BASE = 1 << 44
STACK = IMAGE_BASE - (1 << 30)
STACK_BYTES = 8 << 20

#: The processor sees the memory of this process in pieces of this size.
PIECE = 1 << 30


# ---- Building


def build(cache: Path) -> tuple[Path, Path]:
    """The program for ARM, and the module for this process. Both are in ``cache`` if an earlier run has made them."""
    zig = [sys.executable, "-m", "ziglang", "c++", "-target"]
    sources = [FOLDER / "arm_kernels.cpp", CSRC / "cpu/kernels_baseline.cpp"]
    objects = [
        _made(cache, f"{source.stem}.o", [*zig, "aarch64-linux-musl", "-c", "-O3", *FLAGS], [source])
        for source in sources
    ]
    # Without an operating system, there are no libraries but that of the compiler, which has `memcpy` and `exp`.
    place = [f"-Wl,--image-base={IMAGE_BASE:#x},--entry=finished"]
    program = _made(cache, "arm_kernels", [*zig, "aarch64-freestanding-none", "-static", *place], objects)
    build_info = (
        'FUSED_ATTN_INTERFACE=""',
        'FUSED_ATTN_SETTINGS=""',
        'FUSED_ATTN_VERSION=""',
        'FUSED_ATTN_COMPILER="Clang"',
        "FUSED_ATTN_SANITIZE=0",
    )
    module = _made(
        cache,
        "_C.so",
        ["g++", "-shared", "-fPIC", "-O1", "-fvisibility=hidden", "-Wno-psabi", *FLAGS]
        + [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        + [f"-D{definition}" for definition in build_info],
        [FOLDER / "host_kernels.cpp", CSRC / "cpu/dispatch.cpp", CSRC / "python/bindings.cpp"],
    )
    return program, module


def _made(cache: Path, name: str, command: list[str], sources: list[Path]) -> Path:
    """Compiles and links ``sources``, unless ``cache`` has the result of the same command and the same code."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(path for path in (*CSRC.rglob("*"), *FOLDER.glob("*.cpp")) if path.is_file()):
        digest.update(path.read_bytes())
    target = cache / f"{digest.hexdigest()[:20]}-{name}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # another process may make the same file
            made = Path(folder) / name
            result = subprocess.run([*command, *map(str, sources), "-o", str(made)], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{name} does not compile for ARM:\n{result.stderr}")
            made.replace(target)
        for older in cache.glob(f"*-{name}"):
            if older != target:
                older.unlink(missing_ok=True)
    return target


# ---- Emulating


class Processor:
    """An ARM processor that runs functions of one program. It sees the memory of this process."""

    def __init__(self, program: Path) -> None:
        self._unicorn = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._functions = _functions_of(program)
        self._seen: set[int] = set()  # pieces, counted from address 0
        self._lock = threading.Lock()
        self._load(program.read_bytes())
        self._unicorn.mem_map(STACK, STACK_BYTES, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)

    def call(self, function: str, argument: int) -> None:
        """Runs a function of the program until it returns."""
        with self._lock:
            self._see_memory()
            self._unicorn.reg_write(arm64.UC_ARM64_REG_SP, STACK + STACK_BYTES)
            self._unicorn.reg_write(arm64.UC_ARM64_REG_X0, argument)
            self._unicorn.reg_write(arm64.UC_ARM64_REG_LR, self._functions["finished"])
            self._unicorn.emu_start(self._functions[function], self._functions["finished"])

    def where(self) -> str:
        """The function that the processor is in."""
        address = self._unicorn.reg_read(arm64.UC_ARM64_REG_PC)
        return max(self._functions, key=lambda name: (self._functions[name] <= address, self._functions[name]))

    def _load(self, program: bytes) -> None:
        """Copies the program to its memory. The layout is that of ELF, for 64 bits and the little byte order."""
        headers_at, count = struct.unpack_from("<Q", program, 32)[0], struct.unpack_from("<H", program, 56)[0]
        segments = []  # (position in the file, address, bytes in the file, bytes in memory)
        for header in range(count):
            kind, _, begin, address, _, size, memory, _ = struct.unpack_from(
                "<IIQQQQQQ", program, headers_at + 56 * header
            )
            if kind == 1:  # to be loaded
                segments.append((begin, address, size, memory))
        page = 1 << 16
        end = max(address + memory for _, address, _, memory in segments)
        self._unicorn.mem_map(IMAGE_BASE, (end - IMAGE_BASE + page - 1) // page * page)
        for begin, address, size, _ in segments:
            self._unicorn.mem_write(address, program[begin : begin + size])

    def _see_memory(self) -> None:
        """Maps the pieces of memory in which this process may write, which is where tensors lie, to the same addresses.

        A piece stays mapped, because the emulation translates the program again after each change. That takes longer
        than most calls. An access to an address where this process has no memory ends the process.
        """
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, permissions, *_ = line.split(maxsplit=2)
            if permissions.startswith("rw"):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                for piece in set(range(begin // PIECE, -(-end // PIECE))) - self._seen:
                    address = piece * PIECE
                    rights = unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE
                    self._unicorn.mem_map_ptr(address, PIECE, rights, address)
                    self._seen.add(piece)


def _functions_of(program: Path) -> dict[str, int]:
    """The addresses of the functions of a program."""
    lines = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    entries = [line.split() for line in lines]
    return {
        name: int(address, 16)
        for address, kind, name in (entry for entry in entries if len(entry) == 3)
        if kind in "tT"
    }


# ---- The module that the tests use


def install() -> None:
    """Makes a module whose kernels are emulated the ``fused_attn._C`` of this process."""
    program, path = build(ROOT / ".pytest_cache" / "arm")
    processor = Processor(program)

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
    def emulate(function: bytes, params: int) -> None:
        try:
            processor.call(function.decode(), params)
        except BaseException as error:  # ctypes would ignore the error, and the test would go on with a wrong result
            os.write(STDERR, f"the emulated processor stopped in {processor.where()}: {error}\n".encode())
            os._exit(1)

    library = ctypes.CDLL(str(path))
    library.set_emulation(emulate)
    library.emulate = emulate  # as long as the library is there, so is the function
    spec = importlib.util.spec_from_file_location("fused_attn._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.emulation = library
    sys.modules["fused_attn._C"] = module


install()
