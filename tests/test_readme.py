"""What the README shows is what the code does and what was measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def _report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.quick
def test_results_are_those_of_the_committed_rows():
    report = _report()
    readme = README.read_text()
    assert report.with_results(readme, report.read(report.CPU_RESULTS)) == readme


def test_committed_rows_say_where_they_come_from():
    report = _report()
    for row in report.read(report.CPU_RESULTS):
        assert {"device", "torch", "fused_attn", "commit", "date"} <= row.keys()
        assert not row["commit"].endswith("-dirty")


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:  # each builds on the names of those before, as a reader would type them
        if "transformers" not in block or importlib.util.find_spec("transformers"):
            exec(block, namespace)
    assert namespace["out"].isfinite().all()
    assert namespace["logits"].shape == (4, 12, 80)
    assert namespace["tokens"].shape[0] == 4
