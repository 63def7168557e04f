"""What the processes of `test_train_long.py` run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def train_long(dtype: torch.dtype, *argv: str) -> list[float]:
    """The losses of examples/train_long.py in a dtype, on the processes that are there."""
    sys.path.insert(0, str(EXAMPLES))
    import train_long

    sys.path.remove(str(EXAMPLES))
    torch.set_default_dtype(dtype)
    try:
        return train_long.train(train_long.arguments(list(argv)))
    finally:
        torch.set_default_dtype(torch.float32)
