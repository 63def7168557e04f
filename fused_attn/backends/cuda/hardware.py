"""The native module `fused_attn._cuda`, and which of its kernels the GPU of a problem runs."""

from __future__ import annotations

import functools

import torch

from fused_attn import architectures, driver, native
from fused_attn.attention.problem import AttentionProblem


def why_not_installed(error: ImportError) -> str:
    """A text for users: why ``fused_attn._cuda`` could not be imported, and what to do about it."""
    command = native.install_command(FUSED_ATTN_CUDA="ON")
    remedy = f"on a machine with an NVIDIA driver, {command} gets nvcc and builds them"
    return native.why_missing("_cuda", "nvcc", error, remedy)


try:
    import fused_attn._cuda as module
except ImportError as error:
    # The package may have been installed without nvcc. The other backends work, and `info` shows this text.
    module = None
    missing = why_not_installed(error)
else:
    missing = native.why_stale
    if missing:
        module = None


#: The kernels for sm_90a load keys in pieces of this many rows, kLeastPieceRows of csrc/cuda/tiles.h.
PAGE_STEP = 8


def device_type() -> str:
    """The type of device that the kernels run on: "cuda", or "cpu" for the module in which tests emulate a GPU."""
    return getattr(module, "device_type", "cuda")


def architecture(problem: AttentionProblem, has_large_kernels: bool) -> int:
    """The architecture whose kernels run forward: that of the device, unless its kernels cannot load the pages."""
    loads_pages = not has_large_kernels or problem.page_size % PAGE_STEP == 0
    return device_architecture(problem) if loads_pages else 80


def device_architecture(problem: AttentionProblem) -> int:
    """The architecture of the fastest kernels: 90 on compute capability 9.0 if the binary has them, else 80.

    The kernels for 90 (sm_90a) use instructions that only Hopper has. The kernels for 80 run on every later GPU.
    """
    return 90 if problem.capability == (9, 0) and has_hopper_kernels() else 80


@functools.cache
def has_hopper_kernels() -> bool:
    """Whether the binary has the kernels for sm_90a."""
    return any(built.name == "90a" for built in architectures.parsed(module.build_info()["architectures"]))


def runs_on_hopper(problem: AttentionProblem) -> bool:
    """Whether the kernels for sm_90a run; True if there is no GPU in this machine."""
    is_here = problem.device.type == "cuda" and torch.cuda.is_available()
    return not is_here or device_architecture(problem) == 90


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; those of an H100 if there is none in this machine."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_reason(problem: AttentionProblem) -> str | None:
    """Why the kernels cannot run on the GPU of the problem.

    None means that they can, or that nobody can know: the GPU that the problem describes is not in this machine.
    """
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if problem.device.index is None else problem.device.index
    is_here = index < torch.cuda.device_count() and torch.cuda.get_device_capability(index) == problem.capability
    return unusable_reason(index) if is_here else None


@functools.cache
def unusable_reason(index: int) -> str | None:
    """Why the driver cannot load the kernels on GPU number `index`, or None. The driver is asked once.

    A driver refuses kernels if it is older than the nvcc that has built them.

    Raises:
        RuntimeError: for a cause that may pass, such as a lack of memory. No cache, and no plan, keeps this answer: the
            next call asks the driver again.
    """
    with torch.cuda.device(index):  # torch restores the current device, also where the process has no context
        reason = module.unusable_reason(index)
    if not reason:
        return None
    return (
        f"the driver refuses the CUDA kernels: {reason} (driver: {driver.driver()}; the kernels were built by "
        f"{module.build_info()['compiler']}); update the driver, or build the kernels with an nvcc that the driver "
        f"supports: {native.install_command()} on this machine"
    )
