"""Chooses the nvcc that compiles the CUDA kernels, and the GPU architectures that they are compiled for.

The build backend asks `choose` which wheels pip has to fetch. CMake runs this file, which prints the choice as JSON.
Both ask the same function, so they agree.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODES = ("auto", "ON", "OFF", "wheels")
OLDEST_NVCC = (12, 3)
#: The CUDA version of the compiler that is taken from wheels. PyPI has no older one that is whole, so this is the one
#: whose programs the most drivers run, PTX included. And the kernels are written for it: 13.5 spills registers in some.
WHEEL_VERSION = (13, 0)
#: The wheels of a compiler, each with a path in it that the compiler cannot do without.
WHEELS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "include/cuda_runtime.h",
    "nvidia-cuda-cccl": "include/nv/target",
}
#: What kernels can be compiled for, and the compute capabilities of the GPUs that run them. The kernels for 80 contain
#: PTX, from which the driver makes code for GPUs that are newer than Hopper.
ARCHITECTURES = {80: "8.x and from 10.0 on", 90: "9.x"}


class Driver(NamedTuple):
    """The NVIDIA driver of this machine."""

    cuda: tuple[int, int]  #: the newest CUDA version whose programs the driver runs
    capabilities: frozenset[tuple[int, int]]  #: of the GPUs that the driver shows; none in many containers


class Choice(NamedTuple):
    """How the CUDA kernels are to be compiled, or why they are not."""

    nvcc: str = ""  #: path of the compiler; empty if there is none yet, or none is wanted
    architectures: tuple[int, ...] = ()  #: keys of ARCHITECTURES
    wheels: tuple[str, ...] = ()  #: requirements that would bring the compiler which is missing
    notes: tuple[str, ...] = ()  #: what was looked for and where, in sentences for the user
    is_wanted: bool = False  #: whether the user, or a GPU in this machine, has use for the kernels


def choose(mode: str, architectures: str, build_folder: Path) -> Choice:
    """The compiler and the architectures for the settings FUSED_ATTN_CUDA and FUSED_ATTN_CUDA_ARCHITECTURES.

    build_folder: where earlier builds have kept compilers from wheels
    """
    if mode not in MODES:
        raise ValueError(f"FUSED_ATTN_CUDA: expected {', '.join(MODES)}, got {mode!r}")
    if mode == "OFF":
        return Choice()
    if sys.platform != "linux":
        return Choice(notes=("they are built on Linux alone",))
    driver = find_driver()
    wanted = wanted_architectures(architectures, driver)
    is_wanted = mode != "auto" or driver is not None
    if not wanted:
        have = ", ".join(f"{major}.{minor}" for major, minor in sorted(driver.capabilities))
        return Choice(
            notes=(f"no GPU here can run the kernels: compute capability {have}, expected 8.0 or higher",),
            is_wanted=mode != "auto",
        )
    notes = []
    if mode != "wheels":
        for nvcc, where in toolkits():
            reason = why_not(nvcc, driver)
            if reason is None:
                return Choice(str(nvcc), wanted, notes=(*notes, f"nvcc is {nvcc}, from {where}"), is_wanted=is_wanted)
            notes.append(f"{nvcc} ({where}) is not used: {reason}")
        notes = notes or ["no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, on the PATH or in /usr/local/cuda"]
        if mode == "auto" and driver is None:
            notes.append("no NVIDIA driver (libcuda.so.1), so that no compiler is fetched")
            notes.append("-C cmake.define.FUSED_ATTN_CUDA=wheels builds them with a compiler from PyPI")
            return Choice(notes=tuple(notes))
    if mode != "wheels" and driver is not None and driver.cuda < WHEEL_VERSION:
        notes.append(
            f"the driver runs programs of CUDA {text(driver.cuda)} at most, and PyPI's compiler is for CUDA "
            f"{text(WHEEL_VERSION)}: update the driver (580 or newer), or install a CUDA toolkit that it can run, "
            f"{text(OLDEST_NVCC)} or newer"
        )
        return Choice(notes=tuple(notes), is_wanted=True)
    for root in wheel_roots(build_folder):
        if all((root / part).exists() for part in WHEELS.values()):
            found = version_of(root / "bin/nvcc")
            if found is not None and found[:2] == WHEEL_VERSION:
                notes.append(f"nvcc {text(found)} comes from wheels, in {root}")
                return Choice(str(root / "bin/nvcc"), wanted, notes=tuple(notes), is_wanted=True)
    searched = ", ".join(map(str, wheel_roots(build_folder))) or "no folder nvidia/cu13 on Python's path"
    notes.append(f"no compiler wheels of CUDA {text(WHEEL_VERSION)} for {sys.executable} (looked in: {searched})")
    return Choice("", wanted, requirements(), tuple(notes), is_wanted=True)


def text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def find_driver() -> Driver | None:
    """What the driver library says, or None if there is none that works."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    address = ctypes.byref(number)
    if library.cuDriverGetVersion(address) != 0 or number.value == 0:
        return None
    cuda = (number.value // 1000, number.value % 1000 // 10)
    capabilities = set()
    if library.cuInit(0) == 0 and library.cuDeviceGetCount(address) == 0:
        for index in range(number.value):
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            compute_capability_major, compute_capability_minor = 75, 76  # of the enumeration CUdevice_attribute
            if (
                library.cuDeviceGet(ctypes.byref(device), index) == 0
                and library.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, device) == 0
                and library.cuDeviceGetAttribute(ctypes.byref(minor), compute_capability_minor, device) == 0
            ):
                capabilities.add((major.value, minor.value))
    return Driver(cuda, frozenset(capabilities))


def wanted_architectures(setting: str, driver: Driver | None) -> tuple[int, ...]:
    """auto: those of the GPUs in this machine, or all if no driver shows a GPU; all; or a list such as 80;90.

    Empty if no GPU in this machine can run any kernel.
    """
    if setting == "all" or (setting == "auto" and (driver is None or not driver.capabilities)):
        return tuple(ARCHITECTURES)
    if setting == "auto":
        return tuple(sorted({90 if major == 9 else 80 for major, _ in driver.capabilities if major >= 8}))
    names = re.split("[;,]", setting)
    if not all(name.isdecimal() and int(name) in ARCHITECTURES for name in names):
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"FUSED_ATTN_CUDA_ARCHITECTURES: expected auto, all or a list of {known}, got {setting!r}")
    return tuple(sorted(set(map(int, names))))


def toolkits() -> Iterator[tuple[Path, str]]:
    """The compilers of toolkits on this machine, each with where it was found; the best first."""
    if "CUDACXX" in os.environ:
        if found := shutil.which(os.environ["CUDACXX"]):
            yield Path(found), "CUDACXX"
        return
    folders = {name: os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")}
    for name, folder in folders.items():
        if folder and (found := shutil.which("nvcc", path=str(Path(folder, "bin")))):
            yield Path(found), name
    if found := shutil.which("nvcc"):
        yield Path(found), "the PATH"
    if not any(folders.values()) and (found := shutil.which("nvcc", path="/usr/local/cuda/bin")):
        yield Path(found), "the usual place"


def version_of(nvcc: Path) -> tuple[int, ...] | None:
    """The version that nvcc reports, such as (13, 0, 88); None if it does not run."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release [\d.]+, V(\d+)\.(\d+)\.(\d+)", output)
    return match and tuple(map(int, match.groups()))


def why_not(nvcc: Path, driver: Driver | None) -> str | None:
    """Why the compiler of a toolkit cannot be used, or None if it can."""
    version = version_of(nvcc)
    if version is None:
        return "`nvcc --version` fails"
    if version[:2] < OLDEST_NVCC:
        return f"its version is {text(version)}, expected {text(OLDEST_NVCC)} or newer"
    if driver is not None and version[0] > driver.cuda[0]:  # within a major version, drivers run newer programs, too
        return f"its version is {text(version)}, and the driver runs programs of CUDA {text(driver.cuda)} at most"
    return None


def requirements() -> tuple[str, ...]:
    """The wheels of the compiler. CCCL has versions of its own, and any of them does, because one header is used."""
    return tuple(
        f"{wheel}>=13,<14" if wheel == "nvidia-cuda-cccl" else f"{wheel}=={text(WHEEL_VERSION)}.*" for wheel in WHEELS
    )


def wheel_roots(build_folder: Path) -> list[Path]:
    """The folders in which the wheels of a compiler may be: kept by an earlier build, or installed for this Python."""
    namespace = importlib.util.find_spec("nvidia")
    locations = namespace.submodule_search_locations if namespace is not None else None
    installed = [Path(location, "cu13") for location in locations or ()]
    return [root for root in (*sorted(build_folder.glob("nvcc-*"), reverse=True), *installed) if root.is_dir()]


def keep(choice: Choice, build_folder: Path) -> Choice:
    """Copies a compiler from wheels into the build folder, and chooses the copy.

    - pip deletes the wheels after the build. With the copy, the next build fetches nothing.
    - The path of the copy stays the same, so the next build compiles only what has changed.
    - nvcc 13.0 looks for its libraries in lib64, but the wheels have them in lib.
    """
    nvcc = Path(choice.nvcc)
    root = nvcc.parent.parent
    if not choice.nvcc or root not in wheel_roots(build_folder) or root.parent == build_folder:
        return choice
    version = version_of(nvcc)
    assert version is not None, "choose has run this nvcc"
    kept = build_folder / f"nvcc-{text(version)}"
    unfinished = build_folder / f"unfinished-{kept.name}-{os.getpid()}"
    shutil.copytree(root, unfinished)
    if not (unfinished / "lib64").exists():
        (unfinished / "lib64").symlink_to("lib")
    shutil.rmtree(kept, ignore_errors=True)
    unfinished.rename(kept)
    return choice._replace(nvcc=str(kept / "bin/nvcc"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", help=f"FUSED_ATTN_CUDA: {', '.join(MODES)}")
    parser.add_argument("architectures", help="FUSED_ATTN_CUDA_ARCHITECTURES")
    parser.add_argument("build_folder", type=Path)
    options = parser.parse_args()
    try:
        choice = keep(
            choose(options.mode, options.architectures, options.build_folder),
            options.build_folder,
        )
    except ValueError as error:
        sys.exit(str(error))
    lists = {"architectures": ";".join(map(str, choice.architectures)), "notes": "; ".join(choice.notes)}
    print(json.dumps(choice._asdict() | lists))


if __name__ == "__main__":
    main()
