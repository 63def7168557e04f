"""The source distribution contains all that a build reads, and nothing that a build or a test has left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore")
FOLDERS = ("csrc", "cmake", "fused_attn", "tests")

#: What builds, tests and tools leave in a clone.
LEFT_BEHIND = (
    "build/cp311/csrc/kernels.o",
    "dist/fused_attn.whl",
    "fused_attn/_C.cpython-311-x86_64-linux-gnu.so",
    "fused_attn/__pycache__/api.cpython-311.pyc",
    "fused_attn.egg-info/PKG-INFO",
    ".pytest_cache/d/cuda_emulation/kernels.o",
    ".hypothesis/examples/0",
    ".mypy_cache/3.11/api.json",
    ".ruff_cache/0",
    "runs/model.pt",
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with what is left behind in it, and without git."""
    pytest.importorskip("scikit_build_core")
    if not all((ROOT / name).exists() for name in (*FILES, *FOLDERS)):
        pytest.skip("needs the whole repository")
    root = tmp_path_factory.mktemp("sdist") / "clone"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, root)
    for name in LEFT_BEHIND:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_contents_of_the_sdist(clone: Path, tmp_path: Path) -> None:
    build = (
        f"import sys; sys.path.insert(0, 'cmake'); import build_backend as b; print(b.build_sdist({str(tmp_path)!r}))"
    )
    built = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(clone)) for folder in FOLDERS for path in (clone / folder).rglob("*")}
    expected = {name for name in sources | set(FILES) if name not in LEFT_BEHIND and (clone / name).is_file()}
    assert "csrc/cuda/sm90/forward.h" in expected and "fused_attn/py.typed" in expected
    generated = {"PKG-INFO"}
    assert packed == expected | generated, packed.symmetric_difference(expected | generated)
