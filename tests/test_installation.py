"""After an installation as in README.md, Python imports the right fused_attn, or says which other one it imports."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fused_attn
from fused_attn import native
from fused_attn.backends import cpu

PACKAGE = Path(fused_attn.__file__).parent
ROOT = PACKAGE.parent

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="the native kernels are not built")


def python(*arguments: str, cwd: Path, site: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with the folder `site` before installed packages, and without the paths of editable installs (-S)."""
    packages = [entry for entry in sys.path if "-packages" in entry]
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "TRITON_INTERPRET")}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join([str(site), *packages]), **environment}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the repository in which nothing has been built."""
    root = tmp_path / "clone" / "fused_attn"
    shutil.copytree(PACKAGE, root / "fused_attn", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return root


@needs_kernels
@pytest.mark.slow
def test_sources_that_hide_an_installed_package_say_so(sources: Path, tmp_path: Path) -> None:
    """After `pip install .`, Python in the root of the clone imports the clone, which has no kernels.

    A warning says so.
    """
    site = tmp_path / "site-packages"
    shutil.copytree(PACKAGE, site / "fused_attn", ignore=shutil.ignore_patterns("__pycache__"))
    here, installed = str(sources / "fused_attn"), str(site / "fused_attn")

    shadowed = python("-m", "fused_attn", "info", cwd=sources, site=site)
    assert shadowed.returncode == 0, shadowed.stderr
    for text in (shadowed.stdout, shadowed.stderr):  # the text of `info`, and the warning at import
        assert f"Python has imported the sources in {here}, which have not been built" in text
        assert installed in text and "pip install -e ." in text

    elsewhere = python("-c", "import fused_attn; print(fused_attn.__file__)", cwd=tmp_path, site=site)
    assert elsewhere.stdout.startswith(installed) and "UserWarning: fused_attn" not in elsewhere.stderr


@pytest.mark.quick
def test_why_a_compiled_module_is_missing(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = sources / "fused_attn"
    monkeypatch.setattr(native, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", ["", str(sources), str(sources.parent)])  # the last would give a namespace package
    monkeypatch.chdir(sources)

    def why(error: ImportError) -> str:
        return native.why_missing("_C", "a C++ compiler such as g++", error)

    not_found = ModuleNotFoundError("No module named 'fused_attn._C'")
    assert "installed without fused_attn._C, whose sources need a C++ compiler such as g++" in why(not_found)
    broken = ImportError("libgomp.so.1: cannot open shared object file")
    assert why(broken) == "fused_attn._C is there but cannot be loaded: libgomp.so.1: cannot open shared object file"
    (package / "_C.cpython-23-x86_64-linux-gnu.so").touch()
    assert "built for another Python" in why(not_found) and "_C.cpython-23-x86_64-linux-gnu.so" in why(not_found)


@needs_kernels
@pytest.mark.quick
def test_the_module_knows_the_settings_of_its_build() -> None:
    known = {"FUSED_ATTN_CPU_ISAS", "FUSED_ATTN_CUDA", "FUSED_ATTN_CUDA_ARCHITECTURES"}
    settings = native.build_settings()
    assert settings.keys() <= known and "auto" not in settings.values()
    for name, value in settings.items():
        assert f" -C cmake.define.{name}={value}" in native.install_command()


def build_editable(sources: Path, site: Path, settings: dict[str, str], **environment: str) -> str:
    """Does what `pip install -e` does, but without an isolated environment, and returns the output of the build."""
    pytest.importorskip("scikit_build_core")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("installed without its sources")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "cmake", sources / "cmake", ignore=shutil.ignore_patterns("__pycache__"))
    build = (
        "import sys; sys.path.insert(0, 'cmake'); import build_backend as b; "
        f"print(b.build_editable({str(site.parent)!r}, {settings!r}))"
    )
    built = python("-c", build, cwd=sources, site=site, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(site.parent / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(site)
    return built.stdout + built.stderr


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_clone_s_parent(sources: Path, tmp_path: Path) -> None:
    """There, the folder of the clone, which has the same name and no `__init__.py`, comes first in the search path."""
    site = tmp_path / "site-packages"
    build_editable(sources, site, {"wheel.cmake": "false"})
    other = tmp_path / "other" / "fused_attn"
    shutil.copytree(sources / "fused_attn", other)

    find = "import importlib.util as u; print(u.find_spec('fused_attn').origin)"  # and import nothing, to be quick
    find = f"import site; site.addsitedir({str(site)!r}); {find}"
    for folder in (sources.parent, sources, tmp_path):
        found = python("-c", find, cwd=folder, site=site)
        assert found.stdout.strip() == str(sources / "fused_attn" / "__init__.py"), found
    # Python searches the folder in which it is started first, so there it finds the sources of this folder.
    found = python("-c", find, cwd=other.parent, site=site)
    assert found.stdout.strip() == str(other / "__init__.py"), found


@pytest.mark.slow
def test_an_installation_without_a_compiler_says_so(sources: Path, tmp_path: Path) -> None:
    for package in ("cmake", "ninja"):
        pytest.importorskip(package, reason=f"needs the Python package {package}")
    stale, of_another_python = (
        sources / "fused_attn" / f"_C.{abi}.so" for abi in (sysconfig.get_config_var("SOABI"), "cpython-23-somewhere")
    )
    stale.touch()
    of_another_python.touch()
    text = build_editable(sources, tmp_path / "site-packages", {}, PATH="", CXX="", CUDACXX="")
    assert "WITHOUT its native kernels" in text
    assert not stale.exists() and of_another_python.exists()


@needs_kernels
@pytest.mark.quick
def test_the_kernels_are_of_this_version() -> None:
    """CMake reads the version in `fused_attn/__init__.py`, so the native module must have the same one."""
    assert cpu._C.build_info()["version"] == fused_attn.__version__


@needs_kernels
def test_modules_that_were_built_before_the_sources_changed(sources: Path) -> None:
    """After `git pull` in the clone of an editable install, Python runs the new files and finds the old modules.

    Without the check, a call would raise TypeError, because a function takes other arguments.
    """
    assert native.why_stale == "" and native._why_stale(native._C.build_info()) == ""
    for extension in PACKAGE.glob("_C*.so"):
        shutil.copy(extension, sources / "fused_attn")
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    code = """import torch, fused_attn
x = torch.randn(1, 1, 2, 8)
fused_attn.fused_attention(x, x, x)
print(fused_attn.explain(x, x, x).chosen)"""
    first = python("-c", code, cwd=sources, site=sources)
    assert first.stdout == "cpu\n" and "without its native kernels" not in first.stderr, first.stderr
    with open(sources / "csrc" / "python" / "inputs.h", "a") as file:
        file.write("// A new function.\n")
    second = python("-c", code, cwd=sources, site=sources)
    assert second.stdout == "reference\n"
    assert "have changed since the native modules were built; `pip install -e" in second.stderr


@pytest.mark.quick
def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import of transformers fail
    monkeypatch.delitem(sys.modules, "fused_attn.integrations.huggingface", raising=False)
    with pytest.raises(ImportError, match=r"transformers 5\.15 or newer .*\.\[huggingface\]"):
        importlib.import_module("fused_attn.integrations.huggingface")
