"""The CPU kernels for ARM, on an emulated processor. `arm.py` says how, and which packages that needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
TESTS = FOLDER.parent
NATIVE_CALLS = ("native_attention", "native_linear", "decoder_step")


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(
            ["backends/cpu/test_isa.py", "-k", "test_case or everything or huge or kept or bias_of_scores"], id="blocks"
        ),
        pytest.param(
            ["backends/cpu/test_isa.py", "-k", "(few or decoding or slabs or finite) and not everything"],
            id="few-queries",
        ),
        pytest.param(
            # What a graph has depends on no processor.
            [*[f"nn/test_{name}.py" for name in NATIVE_CALLS], "-k", "not torch_compile"],
            id="modules",
        ),
        pytest.param(["nn/test_element_dropout.py", "-k", "kernel or layers"], id="dropout"),
    ],
)
def test_on_arm(tests: list[str]) -> None:
    for package in ("ziglang", "unicorn"):
        pytest.importorskip(package, reason=f"needs the Python package {package}")
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "arm", "-p", "no:xdist", *tests]
    result = subprocess.run(command, cwd=TESTS, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
