"""Each example in a docstring runs alone, because it contains its imports."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import fused_attn.distributed
import fused_attn.integrations
import fused_attn.nn


def _modules() -> list[str]:
    packages = (fused_attn.nn, fused_attn.integrations, fused_attn.distributed)
    modules = [module.name for each in packages for module in pkgutil.iter_modules(each.__path__, each.__name__ + ".")]
    return ["fused_attn.api", "fused_attn.partial", *modules]


@pytest.mark.parametrize("name", _modules())
def test_examples_run(name: str) -> None:
    if name.endswith("huggingface"):
        pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        test.globs = {}  # no names of the module, because a reader who pastes the example has none either
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


@pytest.mark.quick
@pytest.mark.parametrize("name", fused_attn.nn.__all__)
def test_every_public_module_has_an_example_that_imports_it(name: str) -> None:
    lines = [line.strip() for line in inspect.getdoc(getattr(fused_attn.nn, name)).splitlines()]
    imports = [line for line in lines if line.startswith(">>> from fused_attn")]
    assert any(name == word for line in imports for word in line.replace(",", "").split()), imports
