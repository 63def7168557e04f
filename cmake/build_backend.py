"""The build backend: scikit-build-core's, which also asks pip for nvcc where a build needs one and finds none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from find_nvcc import choose
from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  (the hooks that stay as they are)
from scikit_build_core.settings.skbuild_read_settings import SettingsReader

Settings = dict[str, Any] | None  # what the user passes as -C


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build.get_requires_for_build_wheel(config_settings) + compiler_wheels(config_settings, "wheel")


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build.get_requires_for_build_editable(config_settings) + compiler_wheels(config_settings, "editable")


def compiler_wheels(config_settings: Settings, state: Literal["wheel", "editable"]) -> list[str]:
    """The wheels of nvcc, if the build will compile CUDA kernels and the machine has no nvcc that it can use."""
    settings = SettingsReader.from_file("pyproject.toml", config_settings, state=state).settings
    defines = settings.cmake.define
    if not settings.wheel.cmake or defines.get("FUSED_ATTN_SANITIZE", "OFF") != "OFF" or not has_host_compiler():
        return []
    choice = choose(
        str(defines.get("FUSED_ATTN_CUDA", "auto")),
        str(defines.get("FUSED_ATTN_CUDA_ARCHITECTURES", "auto")),
        Path("build"),
    )
    if choice.wheels:
        print(
            f"fused_attn: {'; '.join(choice.notes)}. Asks for the compiler wheels: {', '.join(choice.wheels)}. If pip "
            "cannot fetch them, install a CUDA toolkit, or leave the CUDA kernels out with "
            "-C cmake.define.FUSED_ATTN_CUDA=OFF"
        )
    return list(choice.wheels)


def has_host_compiler() -> bool:
    """Whether there is a C++ compiler, without which nvcc is of no use."""
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (named[:1] or ("c++", "g++", "clang++")))
