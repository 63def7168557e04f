"""A Triton driver without a GPU: the launcher compiles its kernels for any NVIDIA architecture, and nothing runs."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Architecture(NamedTuple):
    """Limits from the CUDA programming guide's table of compute capabilities, in KiB of shared memory."""

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
    """What a thread needs. stack: bytes, all of them spilled registers, as the kernels neither call nor index arrays.

    spills_in_loops: instructions in hot loops that store to the stack or load from it
    """

    registers: int
    stack: int
    spills_in_loops: int


def usage_of(cubin: bytes) -> Usage:
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
    """In the innermost loops around a matrix product or an exponential: there a kernel spends its time.

    Code far away that waits for a barrier and comes back makes no loop.
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
            # A natural loop: all ways to the branch lead through its target.
            if target <= branch and branch not in _reachable(successors, min(code), avoiding=target):
                loops.append(_reachable(predecessors, branch, avoiding=target) | {target})
    loops.sort(key=len)
    works = [address for address, text in code.items() if re.search(r"MMA|MUFU\.EX2", text)]
    hot = set().union(*(next((loop for loop in loops if address in loop), set()) for address in works))
    assert hot or not works, "no loop was recognised around the matrix products"
    return sum(address in hot and re.search(r"\b(STL|LDL)\b", text) is not None for address, text in code.items())


def _control_flow(code: dict[int, str]) -> dict[int, list[int]]:
    """Where each instruction can lead."""
    addresses = sorted(code)
    next_of = dict(itertools.pairwise(addresses))
    successors = {}
    for address in addresses:
        text = code[address]
        assert not re.search(r"\bBRX\b", text), "an indirect branch leads anywhere"
        is_passed = not re.match(r"(BRA 0x|BRA\.U 0x|EXIT|RET)", text.strip())
        successors[address] = [next_of[address]] if is_passed and address in next_of else []
        if target := re.search(r"\b(?:BRA|CALL)\b.*?(0x[0-9a-f]+)", text):
            successors[address].append(int(target[1], 16))
    return successors


def _reachable(edges: dict[int, list[int]], start: int, avoiding: int) -> set[int]:
    seen, waiting = set(), [start]
    while waiting:
        address = waiting.pop()
        if address not in seen and address != avoiding:
            seen.add(address)
            waiting += edges[address]
    return seen


class _Utils:
    """What a kernel asks of its device when it is loaded; `shared_per_block` is left to the reader of the results."""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Usage, int, int, int, int]:
        usage = usage_of(cubin)
        # The module is what Triton keeps and hands back for nothing but unloading.
        return usage, 1, usage.registers, usage.stack // 4, 1024

    def unload_module(self, module: Usage) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30, "multiprocessor_count": ARCHITECTURES[device].multiprocessors}


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args) -> None:
        pass


class StubDriver:
    """One device per architecture, and its number is that of the architecture: Triton caches kernels by device."""

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
    """From here on kernels are compiled for this architecture, 90 for sm_90."""
    driver.set_active(StubDriver(architecture))


def compiled(kernel: JITFunction) -> list[CompiledKernel]:
    """What Triton has compiled of a kernel since `forget`, for all architectures."""
    return [binary for kernels, *_ in kernel.device_caches.values() for binary in kernels.values()]


def forget(kernel: JITFunction) -> None:
    kernel.device_caches.clear()
