"""What `emulator.py` promises: builds by content, mutations of the sources, a reason where nothing can be emulated."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import emulator
import pytest
import torch
from emulator import CSRC, Builder, Library, Mutation

KERNELS = [Path(__file__).parent / "fragments.cu"]


def descriptor(library: Library) -> int:
    library.start()
    out = torch.zeros(1, dtype=torch.int64)
    library.call("descriptor", 0, 0, 1024, library.buffer(out, is_writable=True))
    return out.item() & (1 << 62) - 1


def test_a_mutation_is_built_and_the_product_is_not_changed(builder: Builder, tmp_path: Path):
    mutation = Mutation(
        "stride-in-other-units",
        "cuda/primitives.h",
        "uint64_t(stride_bytes >>    4) << 32",  # any white space
        "uint64_t(stride_bytes >> 5) << 32",
    )
    before = (CSRC / mutation.file).read_text()
    mutated = builder.library(KERNELS, csrc=mutation.apply(tmp_path))
    assert descriptor(mutated) == (1024 >> 5) << 32
    assert descriptor(builder.library(KERNELS)) == (1024 >> 4) << 32
    assert (CSRC / mutation.file).read_text() == before


@pytest.mark.parametrize("old, times", [("no such line;", 0), ("#pragma once", 1), ("uint32_t address", None)])
def test_a_mutation_has_one_place(tmp_path: Path, old: str, times: int | None):
    mutation = Mutation("anything", "cuda/primitives.h", old, "")
    if times == 1:
        mutation.apply(tmp_path)
    else:
        with pytest.raises(AssertionError, match=r"mutation anything: .* times in cuda/primitives.h, expected once"):
            mutation.apply(tmp_path)


def test_a_build_is_kept(builder: Builder):
    builder.library(KERNELS)
    before = {path: path.stat().st_mtime_ns for path in builder.cache.iterdir()}
    builder.library(KERNELS)
    assert {path: path.stat().st_mtime_ns for path in builder.cache.iterdir()} == before


def test_other_machines_get_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "not on linux on aarch64" in emulator.why_unavailable()


def test_options_and_statistics_are_those_of_the_library():
    """Field by field, in order, as options.h has them."""
    source = (CSRC / "emulation" / "options.h").read_text()
    for structure in (emulator.Options, emulator.Statistics):
        body = source.partition(f"struct {structure.__name__} {{")[2].partition("};")[0]
        fields = [line.split()[:2] for line in body.splitlines() if line.strip()]
        names = {ctypes.c_uint64: "uint64_t", ctypes.c_int32: "int32_t"}
        assert fields == [[names[kind], name] for name, kind in structure._fields_]
