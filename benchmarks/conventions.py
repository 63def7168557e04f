"""What the commands and the suite agree on. Imports no torch, because the suite leaves the GPU to its stages."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: The implementation that the others are compared with.
OURS = "fused_attn"

#: Our kernels for GPUs, timed one by one where several can compute a case; `OURS` is what users get.
OUR_BACKENDS = {f"{OURS}[{backend}]": backend for backend in ("triton", "cuda")}

#: Exit code: the device no longer answers, and a new process has to go on with ``--resume``.
DEVICE_LOST = 70


def commit() -> str:
    """Short hash of the tree; ``-dirty`` marks changes that are not in it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")
