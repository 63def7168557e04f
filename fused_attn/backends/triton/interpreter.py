"""Whether Triton's interpreter is switched on, which runs kernels in Python on the CPU."""

from __future__ import annotations

import os


def is_interpreting() -> bool:
    """Whether the environment variable TRITON_INTERPRET, which is Triton's own, switches the interpreter on.

    Triton reads the variable when `triton.jit` decorates a kernel. A change after the import of kernels has no effect.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"
