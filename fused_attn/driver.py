"""What the NVIDIA driver says about itself, asked through its library libcuda.

torch says only whether it sees a GPU. For a user who wonders why it sees none, `info` tells a missing driver from one
that is too old and from one that finds no GPU.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

#: The kernel module of the driver writes its version into this file.
VERSION_FILE = Path("/proc/driver/nvidia/version")


class Driver(NamedTuple):
    """The NVIDIA driver of this machine.

    version: of the driver, such as "570.86.15"; empty if unknown
    cuda: the latest version of CUDA that it runs, such as "12.8"; empty if unknown
    problem: why it can be used for no GPU; empty if it can
    """

    version: str
    cuda: str
    problem: str

    def __str__(self) -> str:
        names = " ".join(filter(None, (self.version, self.cuda and f"for CUDA up to {self.cuda}")))
        return "; ".join(filter(None, (names, self.problem)))


def driver() -> Driver:
    """Asks the driver. No context is created on a GPU."""
    version = _version()
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Driver(version, "", f"none that can be loaded ({error})")
    number = ctypes.c_int()
    libcuda.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else ""
    status = libcuda.cuInit(0)
    return Driver(version, cuda, f"it does not start: {_error(libcuda, status)}" if status else "")


def _version() -> str:
    """The field `Driver.version`."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", VERSION_FILE.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _error(libcuda: ctypes.CDLL, status: int) -> str:
    """The driver's text for an error number, with the number."""
    text = ctypes.c_char_p()
    libcuda.cuGetErrorString(status, ctypes.byref(text))
    return f"{text.value.decode() if text.value else 'unknown error'} (error {status})"
