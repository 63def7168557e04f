"""Counts the calls of native functions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[str]:
    """A list that gets a name whenever `module` calls a function ``_C.<name>``, and no other kernel of ``_C``."""
    found: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(module._C, name)
        return lambda *arguments: found.append(name) or function(*arguments)

    functions = {name: counted(name) for name in names}
    monkeypatch.setattr(module, "_C", SimpleNamespace(**functions, cpu_isa=module._C.cpu_isa))
    return found
