"""What the README shows is what the code does. tests/test_benchmarks.py has what it shows of measurements."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


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
