"""Counts the calls of a native function."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[str]:
    """A list that gets an entry whenever `module` calls the function ``_C.<name>``, and no other kernel of ``_C``."""
    found: list[str] = []
    function = getattr(module._C, name)

    def counted(*arguments):
        found.append(name)
        return function(*arguments)

    monkeypatch.setattr(module, "_C", SimpleNamespace(**{name: counted}, cpu_isa=module._C.cpu_isa))
    return found
