"""emulator.py builds anew if and only if a source has changed, and says why a machine cannot emulate kernels."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import emulator
import pytest
from emulator import CSRC, EMULATION, Builder, Library

#: Exports a constant of a header that the emulation does not include. So a change of the header compiles this alone.
SOURCE = """
#include "cuda/params.h"
extern "C" const char* row_block(int* out) {
  *out = fused_attn::gpu::kRowBlock;
  return "";
}
"""


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    path = tmp_path / "row_block.cpp"
    path.write_text(SOURCE)
    return [path]


def row_block(library: Library) -> int:
    out = ctypes.c_int()
    library.call("row_block", ctypes.byref(out))
    return out.value


def test_changed_sources_are_built_and_the_product_is_not(builder: Builder, sources: list[Path], tmp_path: Path):
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    header = copy / "cuda" / "params.h"
    source = header.read_text()
    assert source.count("kRowBlock = 128") == 1
    header.write_text(source.replace("kRowBlock = 128", "kRowBlock = 256"))
    assert row_block(builder.library(sources, csrc=copy)) == 256
    assert row_block(builder.library(sources)) == 128


def test_a_build_is_kept(builder: Builder, sources: list[Path]):
    builder.library(sources)
    before = {path: path.stat().st_mtime_ns for path in builder.cache.iterdir()}
    builder.library(sources)
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
