"""The examples in README.md run. (tests/test_benchmarks.py compares its figures with the committed rows.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_attn

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

#: An expression for each example, in the order of the page. It must be true after the example has run.
CHECKS = (
    "assert out.isfinite().all() and query.grad.isfinite().all()",
    "assert out.isfinite().all() and out.shape == tokens.shape",
    "assert logits.isfinite().all() and logits.shape == (4, 12, 80) and tokens.shape[0] == 4",
)


@pytest.mark.quick
def test_the_page_is_short():
    assert len(README.read_text().splitlines()) <= 130


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.quick
def test_every_example_is_checked():
    assert len(_examples()) == len(CHECKS)


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_examples_run_when_pasted_alone(number: int, tmp_path: Path):
    """Each example runs in a process of its own, so it cannot use names of the other examples."""
    code = _examples()[number] + CHECKS[number]
    package = Path(fused_attn.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
