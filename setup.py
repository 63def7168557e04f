"""Builds fused_attn._C, and with nvcc fused_attn._cuda, with CMake. All else about the package is in pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import cmake_defines

ROOT = Path(__file__).resolve().parent

NO_COMPILER = """
********************************************************************************
WARNING: fused_attn is being installed WITHOUT its native kernels, because CMake
found no C++ compiler that it can use. The package works, on the backends that
are written in Python; on a CPU they are slower. To get the native kernels,
install a C++ compiler (for instance the package g++ or clang), or name one in
the variable CXX, and install fused_attn again.
********************************************************************************
"""
NO_NVCC = """
fused_attn is being installed without its CUDA kernels, because CMake found no nvcc that it can use. On GPUs the Triton
kernels run.
"""

NOT_BUILT = {"fused_attn._C": NO_COMPILER, "fused_attn._cuda": NO_NVCC}

#: What CMake reads of the environment.
ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS")


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        self.installed = self._build()  # of all extensions at once
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        built = Path(self.get_ext_fullpath(extension.name)).resolve()
        built.unlink(missing_ok=True)
        installed = next(self.installed.glob(f"{extension.name.rpartition('.')[2]}.*"), None)
        if installed is not None:
            built.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed, built)
            return
        # CMake succeeded and had nothing to build; a compile error never comes here.
        print(NOT_BUILT[extension.name], file=sys.stderr, flush=True)
        extension.optional = True  # or setuptools would insist on a file to copy
        if self.editable_mode:
            # A module that an earlier build left in the tree must not pass for this one.
            in_place = ROOT / self.get_ext_filename(self.get_ext_fullname(extension.name))
            in_place.unlink(missing_ok=True)

    def _build(self) -> Path:
        """Returns the folder with the modules that could be built."""
        import ninja

        # One folder per Python, inside the tree, so that the next build compiles only what has changed.
        build_dir = ROOT / "build" / sysconfig.get_config_var("SOABI")
        self._discard_if_configured_otherwise(build_dir)
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",  # no folder: it is on the PATH
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self._lasting_pybind11(build_dir) / "share/cmake/pybind11",
            **cmake_defines,
        }
        self._cmake(
            "-S", ROOT, "-B", build_dir, "-G", "Ninja", *(f"-D{name}={value}" for name, value in defines.items())
        )
        self._cmake("--build", build_dir)
        installed = build_dir / "installed"
        shutil.rmtree(installed, ignore_errors=True)
        installed.mkdir()
        self._cmake("--install", build_dir, "--prefix", installed)
        return installed

    def _cmake(self, *arguments: str | Path) -> None:
        # Through the interpreter: the isolated environment's scripts need not be on the PATH.
        command = [sys.executable, "-m", "cmake", *map(str, arguments)]
        print("+ cmake", *command[3:], flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"building the native kernels failed, see the messages above: {error}") from None

    def _discard_if_configured_otherwise(self, build_dir: Path) -> None:
        """CMake caches settings for good: an option given once would silently hold for every later install."""
        wanted = {
            "source": str(ROOT),
            "defines": cmake_defines,
            "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
            "nvcc": shutil.which("nvcc"),
        }
        record = build_dir / "settings.json"
        if not record.exists() or json.loads(record.read_text()) != wanted:
            shutil.rmtree(build_dir, ignore_errors=True)
            build_dir.mkdir(parents=True)
            record.write_text(json.dumps(wanted, indent=2))

    def _lasting_pybind11(self, build_dir: Path) -> Path:
        """A copy in the build folder: the original is in an isolated environment whose path changes every time,
        which would make every build compile the bindings again."""
        import pybind11

        copy = build_dir / f"pybind11-{pybind11.__version__}"
        if not copy.exists():
            shutil.copytree(Path(pybind11.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return copy


setup(ext_modules=[Extension(name, sources=[]) for name in NOT_BUILT], cmdclass={"build_ext": CMakeBuild})
