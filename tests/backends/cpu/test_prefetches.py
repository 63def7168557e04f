"""The compiler keeps the prefetches of the CPU kernels.

GCC deletes the call of a function that only prefetches, because it takes this function for one without effect. No
result changes then, so only the assembly shows it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# One forward and one backward kernel.
SOURCE = """
#include "cpu/backward.h"
#include "cpu/query_blocks.h"

namespace fused_attn::cpu {
using Policy = ElementPolicy<float, float, 1>;
void forward(const AttentionParams& p) { forward_by_query_blocks<Policy>(p); }
void backward(const AttentionParams& p) { backward_with_policy<Policy>(p); }
}  // namespace fused_attn::cpu
"""


@pytest.fixture(scope="module")
def prefetches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The number of prefetch instructions in each function, by its mangled name."""
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs g++ on a processor of the x86-64 family")
    folder = tmp_path_factory.mktemp("prefetches")
    source, assembly = folder / "kernels.cpp", folder / "kernels.s"
    source.write_text(SOURCE)
    flags = ["-O3", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", "-S", *flags, str(source), "-o", str(assembly)], check=True)
    counts: dict[str, int] = {}
    function = ""
    for line in assembly.read_text().splitlines():
        if label := re.match(r"(_Z[\w.]+):", line):
            function = label[1]
        elif re.match(r"\s+prefetch", line):
            counts[function] = counts.get(function, 0) + 1
    return counts


@pytest.mark.parametrize("kernel", ["forward_block", "backward_block"])
def test_kernels_prefetch(prefetches: dict[str, int], kernel: str) -> None:
    found = sum(count for function, count in prefetches.items() if kernel in function)
    # The dense mask and the dense bias, at the least.
    assert found >= 2, f"{kernel} prefetches nothing; the functions that do: {prefetches}"
