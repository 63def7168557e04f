"""What a reader needs to judge a result: the device, the versions, and the matmul and copy rates of the device."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_attn
from benchmarks import conventions, timing
from benchmarks.inputs import DTYPES


def about(device: torch.device | str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """The fields that all rows of a run share. commit: for a source tree without git history."""
    device = torch.device(device)
    versions = {
        "torch": torch.__version__,
        "fused_attn": fused_attn.__version__,
        "python": platform.python_version(),
        "commit": commit or conventions.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return (_gpu(device) if device.type == "cuda" else _cpu()) | versions


def _cpu() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    try:
        from fused_attn import _C

        isa = _C.cpu_isa()
    except ImportError:
        isa = "none"
    return {"device": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


def _driver() -> str | None:
    # torch tells the CUDA version that the driver supports, but not the version of the driver itself.
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found[0] if found else None


def matmul_tflops(device: torch.device, dtype: str, is_quick: bool = False) -> float:
    """The rate of a large matrix product of torch, as a yardstick. The matrices are random, because a product of zeros
    can run faster."""
    size = 8192 if device.type == "cuda" else 256 if is_quick else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, is_quick) / 1e12


def copy_gb_per_s(device: torch.device, is_quick: bool = False) -> float:
    """The rate of a large copy: the bytes that it reads and those that it writes."""
    count = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * count / _seconds(lambda: target.copy_(source), device, is_quick) / 1e9


def _seconds(call: timing.Call, device: torch.device, is_quick: bool) -> float:
    times = timing.measure({"call": call}, timing.timer_for(device), 30, 0.1 if is_quick else 0.5)
    return timing.quantiles(times["call"])[1]
