"""Describes what is installed: versions, compiled code, hardware, and which backends can run and why others cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from fused_attn import architectures
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import cpu, dispatch
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.backends.triton import backend as triton
from fused_attn.driver import driver


@dataclass(frozen=True)
class Info:
    """The description that `info` returns. ``print(info())`` shows it as text; programs read the fields.

    versions: {package: version}
    native:   {property of the compiled CPU kernels: value}
    cuda:     {property of the NVIDIA driver and of the compiled CUDA kernels: value}
    triton:   {property of the Triton kernels: value}
    devices:  {device, such as "cuda:0": name and properties}
    backends: {device and dtype, such as "cuda:0 bfloat16": {backend: reasons why it cannot run; empty = it can}}
    """

    versions: dict[str, str]
    native: dict[str, str]
    cuda: dict[str, str]
    triton: dict[str, str]
    devices: dict[str, str]
    backends: dict[str, dict[str, list[str]]]

    def __str__(self) -> str:
        lines = []
        sections = {
            "versions": self.versions,
            "native code": self.native,
            "CUDA kernels": self.cuda,
            "Triton kernels": self.triton,
            "devices": self.devices,
        }
        for title, entries in sections.items():
            lines.append(title)
            lines += [f"  {name:<18} {value}" for name, value in entries.items()]
        lines.append("backends (the first that can run is used)")
        for where, backends in self.backends.items():
            lines.append(f"  {where}")
            lines += [f"    {name:<16} {'; '.join(reasons) or 'runs'}" for name, reasons in backends.items()]
        return "\n".join(lines)


def info() -> Info:
    """Describes this installation and this machine. No kernel is loaded onto a GPU."""
    return Info(_versions(), _native(), _cuda(), _triton(), _devices(), _backends())


def _versions() -> dict[str, str]:
    """The field `Info.versions`."""

    def version(package: str) -> str:
        """The version of a package, or "not installed"."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "fused_attn": version("fused_attn"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none (CPU build)",
        "triton": version("triton"),
    }


def _native() -> dict[str, str]:
    """The field `Info.native`: how the CPU kernels were built, and which instruction set they use here."""
    if cpu._C is None:
        return {"CPU kernels": f"none, so that the slow reference runs: {cpu.missing}"}
    build = cpu._C.build_info()
    return {
        "version": build["version"],
        "compiler": build["compiler"],
        "OpenMP": "yes" if build["openmp"] else "no: the kernels run on one thread",
        "CPU kernels": ", ".join(build["cpu_isas"]),
        "run here": ", ".join(cpu._C.cpu_isas()),
        "in use here": cpu._C.cpu_isa() + (f": {reason}" if (reason := cpu.build_reason()) else ""),
    }


def _cuda() -> dict[str, str]:
    """The field `Info.cuda`: the driver, how the CUDA kernels were built, and for each GPU how they run or why not."""
    found = {"driver": str(driver())}
    if hardware.module is None:
        return found | {"kernels": f"none: {hardware.missing}"}
    build = hardware.module.build_info()
    built = architectures.parsed(build["architectures"])
    found |= {
        "version": build["version"],
        "compiler": build["compiler"],
        "architectures": ", ".join(map(str, built)),
    }
    for index in range(torch.cuda.device_count()):
        problem = _typical_problem(torch.device("cuda", index), torch.bfloat16)
        reasons = cuda.unsupported_reasons(problem)
        way = None if problem.capability is None else architectures.way_on(built, problem.capability)
        found[f"on cuda:{index}"] = f"no: {'; '.join(reasons)}" if reasons else f"yes, {way}"
    return found


def _triton() -> dict[str, str]:
    """The field `Info.triton`: whether the Triton kernels can run here, and where each GPU's tile sizes come from."""
    needed = f"an NVIDIA GPU of compute capability {'.'.join(map(str, triton.MIN_CAPABILITY))} or higher"
    if not torch.cuda.is_available():
        if triton.is_interpreting():
            return {"run here": "in Triton's interpreter on the CPU (TRITON_INTERPRET=1), slowly, for debugging"}
        why = "torch sees none" if torch.version.cuda else "this torch is a CPU build"
        return {"run here": f"no: they need {needed}, and {why}"}
    if (reason := triton.installation_problem()) is not None:
        return {"run here": f"no: {reason}"}
    return {"run here": f"on {needed}"} | {
        f"tiles of cuda:{index}": _tiles(index) for index in range(torch.cuda.device_count())
    }


def _tiles(index: int) -> str:
    """Where the tile sizes of GPU number `index` come from: the package's own table, or `tune`."""
    # `tuned` imports Triton, which takes half a second. So the import stands here, and machines without a GPU skip it.
    from fused_attn.backends.triton import tuned

    table = tuned.table_of(index)
    if table is None:
        return "the package's own; `python -m fused_attn tune` looks for faster ones"
    path = tuned.path_of(torch.cuda.get_device_name(index))
    return f"{len(table.rows)} of the package's replaced by those tuned on {table.about.get('date')}, {path}"


def _devices() -> dict[str, str]:
    """The field `Info.devices`: the CPU and every GPU that torch sees."""
    devices = {
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} as torch sees it, "
        f"{torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor} "
            f"(sm_{properties.major}{properties.minor}), {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _backends() -> dict[str, dict[str, list[str]]]:
    """The field `Info.backends`: what each backend says about a typical problem, for each device and dtype."""
    places = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    problems = {
        f"{device} {str(dtype).removeprefix('torch.')}": _typical_problem(device, dtype)
        for device in places
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {
        where: {backend.name: backend.unsupported_reasons(problem) for backend in dispatch.preferred(problem)}
        for where, problem in problems.items()
    }


def _typical_problem(device: torch.device, dtype: torch.dtype) -> AttentionProblem:
    """Padded self-attention with head dim 64, which every kernel supports."""
    return AttentionProblem(
        batch=8,
        num_heads=16,
        num_kv_heads=16,
        seqlen_q=1024,
        seqlen_k=1024,
        head_dim=64,
        value_dim=64,
        dtype=dtype,
        device=device,
        scale=0.125,
        has_key_padding=True,
    )
