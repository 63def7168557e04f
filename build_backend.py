"""setuptools.build_meta plus CMake settings: `pip install . -C cmake.define.NAME=VALUE`."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no settings, as they are

PREFIX = "cmake.define."

# Read by setup.py, which setuptools executes in this process. The standard hooks have no way to hand
# a front end's settings on to a command such as build_ext.
cmake_defines: dict[str, str] = {}


def _take_cmake_defines(config_settings: dict | None) -> dict:
    """Moves the cmake.define.* entries into `cmake_defines`; returns the others, which are setuptools'."""
    rest = {}
    for name, value in (config_settings or {}).items():
        if name.startswith(PREFIX):
            # A front end collects repeated settings in a list. The last one wins, as with cmake -D.
            cmake_defines[name.removeprefix(PREFIX)] = value[-1] if isinstance(value, list) else value
        elif name.startswith("cmake"):
            raise SystemExit(f"unknown setting {name!r}: expected {PREFIX}NAME=VALUE")
        else:
            rest[name] = value
    return rest


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools copies modules to build/lib* and never removes one: without this, a module that was
    # deleted from the source tree would live on in every later wheel.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, _take_cmake_defines(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return build_meta.build_editable(wheel_directory, _take_cmake_defines(config_settings), metadata_directory)
