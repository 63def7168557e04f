"""A Triton driver that needs no GPU. The launcher compiles kernels for any NVIDIA architecture, and nothing runs."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Architecture(NamedTuple):
    """Limits of an architecture, from the table of compute capabilities in the CUDA programming guide.

    shared_per_block, shared_per_multiprocessor: KiB of shared memory
    """

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    warps_per_multiprocessor: int
    blocks_per_multiprocessor: int


ARCHITECTURES = {
    80: Architecture(108, 163, 164, 64, 32),
    86: Architecture(84, 99, 100, 48, 16),
    90: Architecture(132, 227, 228, 64, 32),
    100: Architecture(148, 227, 228, 64, 32),
}


class Usage(NamedTuple):
    """The registers and stack of one thread.

    stack: bytes. All of them are spilled registers, because the kernels call no functions and index no local arrays
    spills_in_loops: the number of instructions in hot loops that store to the stack or load from it
    """

    registers: int
    stack: int
    spills_in_loops: int


def usage_of(cubin: bytes) -> Usage:
    """The usage of the only kernel in a cubin, according to cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _cuobjdump("-res-usage", file.name)
        registers, stack, local = (
            int(re.search(rf"\b{name}:(\d+)", resources)[1]) for name in ("REG", "STACK", "LOCAL")
        )
        in_loops = spills_in_loops(_cuobjdump("-sass", file.name)) if stack + local else 0
    return Usage(registers, stack + local, in_loops)


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> int:
    """The number of instructions for spilled registers in the hot loops of a kernel's machine code.

    Hot loops are the innermost loops around a matrix product or an exponential, where a kernel spends its time. Code
    at the end of a kernel that waits for a barrier, and then jumps back to where it came from, is not a loop. The
    result is 0 if the products are in no loop, because a program computes one tile.
    """
    code = {int(address, 16): text for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)}
    successors = _control_flow(code)
    predecessors = {address: [] for address in code}
    for address, following in successors.items():
        for target in following:
            predecessors[target].append(address)
    loops = []
    for branch, following in successors.items():
        for target in following:
            # A backward branch makes a loop only if all paths to the branch lead through its target.
            if target <= branch and branch not in _reachable(successors, min(code), avoiding=target):
                loops.append(_reachable(predecessors, branch, avoiding=target) | {target})
    loops.sort(key=len)
    works = [address for address, text in code.items() if re.search(r"MMA|MUFU\.EX2", text)]
    hot = set().union(*(next((loop for loop in loops if address in loop), set()) for address in works))
    if not hot:
        # A program of the kernel may compute one tile. Then no path leads from a product back to the product.
        for address in works:
            later = set().union(*(_reachable(successors, start) for start in successors[address]))
            assert address not in later, "no loop was recognised around the matrix products"
    return sum(address in hot and re.search(r"\b(STL|LDL)\b", text) is not None for address, text in code.items())


def _control_flow(code: dict[int, str]) -> dict[int, list[int]]:
    """The addresses that can follow each instruction."""
    addresses = sorted(code)
    next_of = dict(itertools.pairwise(addresses))
    successors = {}
    for address in addresses:
        text = code[address]
        assert not re.search(r"\bBRX\b", text), "the targets of an indirect branch are unknown"
        is_passed = not re.match(r"(BRA 0x|BRA\.U 0x|EXIT|RET)", text.strip())
        successors[address] = [next_of[address]] if is_passed and address in next_of else []
        if target := re.search(r"\b(?:BRA|CALL)\b.*?(0x[0-9a-f]+)", text):
            successors[address].append(int(target[1], 16))
    return successors


def _reachable(edges: dict[int, list[int]], start: int, avoiding: int | None = None) -> set[int]:
    """All nodes on paths from start that do not pass the node `avoiding`."""
    seen, waiting = set(), [start]
    while waiting:
        address = waiting.pop()
        if address not in seen and address != avoiding:
            seen.add(address)
            waiting += edges[address]
    return seen


class _Utils:
    """The functions that Triton calls to load a kernel."""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[str, int, int, int, int]:
        """(module, function, registers, spills, most threads of a block). Nothing is loaded; `usage_of` tells more."""
        return "module", 1, 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Without a limit, kernels that need too much shared memory are compiled too. `aot.Resources.faults` names them.
        return {"max_shared_mem": 2**30, "multiprocessor_count": ARCHITECTURES[device].multiprocessors}


class _Launcher:
    """The object that Triton calls to launch a kernel. It does nothing."""

    def __init__(self, source, metadata):
        pass

    def __call__(self, *args) -> None:
        pass


class StubDriver:
    """A driver with one device for each architecture.

    The index of a device is the number of its architecture. Triton caches kernels by device, so each architecture has
    its own cache.
    """

    launcher_cls = _Launcher
    utils = _Utils()

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def set_current_device(self, device: int) -> None:
        self.architecture = device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.architecture)


def install(architecture: int) -> None:
    """From now on, Triton compiles kernels for this architecture, for example 90 for sm_90."""
    driver.set_active(StubDriver(architecture))


class UncompiledKernel:
    """A replacement for Triton's compiled kernel in tests that ask which kernels are compiled, or run, and when.

    name: all properties of the arguments that Triton compiles a kernel for
    ran: the names of all kernels of this class that were launched
    """

    function = packed_metadata = None
    ran: ClassVar[list[tuple]] = []

    def __init__(self, source, target, options, _env_vars=None):
        self.name = (source.fn.__name__, str(source.signature), str(source.attrs), str(source.constants))

    def launch_metadata(self, *args) -> None:
        pass

    def run(self, *args) -> None:
        self.ran.append(self.name)

    def __getitem__(self, grid):
        return self.run


def compile_nothing() -> None:
    """From now on, Triton makes an `UncompiledKernel` of each kernel, which saves the seconds of compiling it."""
    triton.compiler.compile = UncompiledKernel


def compiled(kernel: JITFunction) -> list[CompiledKernel]:
    """The kernels that Triton has compiled from a function since `forget`, for all architectures."""
    return [binary for kernels, *_ in kernel.device_caches.values() for binary in kernels.values()]


def forget(kernel: JITFunction) -> None:
    """Empties Triton's cache of the kernels compiled from a function."""
    kernel.device_caches.clear()
