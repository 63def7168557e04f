"""emulator.py builds anew if and only if a source has changed, and says why a machine cannot emulate kernels."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import emulator
import pytest
import torch
from emulator import CSRC, EMULATION, Builder, Library

KERNELS = [Path(__file__).parent / "fragments.cu"]


def descriptor(library: Library) -> int:
    """What the primitive matrix_descriptor returns for a stride of 1024 bytes, without the bits of the swizzle."""
    library.start()
    out = torch.zeros(1, dtype=torch.int64)
    library.call("descriptor", 0, 0, 1024, library.buffer(out, is_writable=True))
    return out.item() & (1 << 62) - 1


def test_changed_sources_are_built_and_the_product_is_not(builder: Builder, tmp_path: Path):
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    header = copy / "cuda" / "primitives.h"
    source = header.read_text()
    assert source.count("uint64_t(stride_bytes >> 4)") == 1
    header.write_text(source.replace("uint64_t(stride_bytes >> 4)", "uint64_t(stride_bytes >> 5)"))
    assert descriptor(builder.library(KERNELS, csrc=copy)) == (1024 >> 5) << 32
    assert descriptor(builder.library(KERNELS)) == (1024 >> 4) << 32


def test_a_build_is_kept(builder: Builder):
    builder.library(KERNELS)
    before = {path: path.stat().st_mtime_ns for path in builder.cache.iterdir()}
    builder.library(KERNELS)
    assert {path: path.stat().st_mtime_ns for path in builder.cache.iterdir()} == before


def test_other_machines_get_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "not on linux on aarch64" in emulator.why_unavailable()


def test_options_and_statistics_are_those_of_the_library():
    """The ctypes structures of emulator.py have the fields of options.h, in the same order and with the same types."""
    source = (EMULATION / "options.h").read_text()
    for structure in (emulator.Options, emulator.Statistics):
        body = source.partition(f"struct {structure.__name__} {{")[2].partition("};")[0]
        fields = [line.split()[:2] for line in body.splitlines() if line.strip()]
        names = {ctypes.c_uint64: "uint64_t", ctypes.c_int32: "int32_t"}
        assert fields == [[names[kind], name] for name, kind in structure._fields_]
