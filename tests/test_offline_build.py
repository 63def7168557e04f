"""What pip tells a user whose machine needs the compiler wheels when no package index has them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from test_build import DRIVER, ROOT, WHEELS_13_0
from test_build import pytestmark as pytestmark  # the same machines can run this test


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What pip reads of the repository before it builds, with the packages that every build needs beside the backend.

    So pip need not install these packages, which takes seconds.
    """
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "cmake", root / "cmake", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    pytest.importorskip("scikit_build_core")
    for package in ("scikit-build-core", "pathspec", "packaging"):
        installed = distribution(package)
        for folder in {file.parts[0] for file in installed.files if ".." not in file.parts}:
            (root / "cmake" / folder).symlink_to(installed.locate_file(folder))
    text, count = re.subn(r"(?m)^requires = \[.*?\]", "requires = []", (ROOT / "pyproject.toml").read_text())
    assert count == 1
    (root / "pyproject.toml").write_text(text)
    return root


def test_without_the_compiler_wheels_pip_says_what_is_missing(clone: Path, tmp_path: Path) -> None:
    """pip fails, instead of an installation that is slow on the GPU. With -v, it shows the reason and the way on."""
    pytest.importorskip("pip")
    (tmp_path / "cuda.cpp").write_text(DRIVER)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.cpp"], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "PIP"))}
    environment |= {
        "LD_LIBRARY_PATH": str(tmp_path),
        "DRIVER_CUDA": "13000",
        "DRIVER_CAPABILITY": "90",
        "CUDACXX": str(tmp_path / "no-nvcc"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "-v", "-w", tmp_path, clone]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    text = " ".join((failed.stdout + failed.stderr).split())
    assert failed.returncode != 0
    assert "pip subprocess to install backend dependencies did not run successfully" in text
    assert "No matching distribution found for " in text, "whichever pip looks for first"
    assert "Asks for the compiler wheels: " + ", ".join(WHEELS_13_0) in text
    assert all(f"'{wheel}'" in text for wheel in WHEELS_13_0), "in the command of pip that failed"
    assert "no nvcc in CUDACXX" in text and "FUSED_ATTN_CUDA=OFF" in text
