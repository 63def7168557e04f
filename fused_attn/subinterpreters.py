"""Refuses to be imported in a sub-interpreter, where `import torch` may wait forever."""

from __future__ import annotations

import importlib
from typing import Any


def _interpreters() -> Any:
    """CPython's module of sub-interpreters, by its name since Python 3.13 or before; None without one."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


if (_module := _interpreters()) is not None and _module.get_current() != _module.get_main():
    raise ImportError(
        "fused_attn: expected the main interpreter of the process, got a sub-interpreter, which torch does not "
        "support; use a process of its own in place of the sub-interpreter"
    )
