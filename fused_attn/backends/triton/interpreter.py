"""Whether Triton's kernels run in Python, without a GPU."""

from __future__ import annotations

import os


def is_interpreting() -> bool:
    """Triton's own switch: its kernels run in Python on the CPU. Read by Triton when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
