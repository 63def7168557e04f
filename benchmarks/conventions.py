"""Names that the commands share with tools/gpu_suite, which must not import torch. So this file does not either."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: The name of our implementation in rows. All others are compared with it.
OURS = "fused_attn"

#: The names in rows of our single GPU backends. They are timed one by one if several can compute a case; `OURS` is the
#: backend that a user gets.
OUR_BACKENDS = {f"{OURS}[{backend}]": backend for backend in ("triton", "cuda")}

#: The name in rows of our call that leaves padded queries out, as `skip_padded_queries` does in modules.
SKIPPING = f"{OURS}-skipping"

#: Exit code of a command after a kernel has made the GPU unusable. A new process can go on with ``--resume``.
DEVICE_LOST = 70


def commit() -> str:
    """The short hash of the commit in the source tree, with ``-dirty`` after it if the tree has other changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
