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

# Kernels of bfloat16 prefetch nothing but what masks need. Those of float32 also prefetch keys and values in forward.
SOURCE = """
#include "cpu/backward.h"
#include "cpu/forward_blocks.h"

namespace fused_attn::cpu {
void forward(const AttentionParams& p) { forward_blocks<ElementPolicy<float, float, 1>>(p); }
void masked_forward(const AttentionParams& p) { forward_blocks<ElementPolicy<BFloat16, float, 1>>(p); }
void masked_backward(const AttentionParams& p) { backward_with_policy<ElementPolicy<BFloat16, float, 1>>(p); }
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


@pytest.mark.parametrize(
    ("function", "dtype", "least"),
    [
        ("forward_block", "BFloat16", 2),  # the dense mask, the dense bias
        ("backward_block", "BFloat16", 3),  # and the gradient of the dense bias
        ("forward_block", "ElementPolicyIff", 4),  # the mask, the bias, keys and values
    ],
)
def test_kernels_prefetch(prefetches: dict[str, int], function: str, dtype: str, least: int) -> None:
    found = sum(count for name, count in prefetches.items() if function in name and dtype in name)
    assert found >= least, f"{function} of {dtype}: {found} prefetches; the functions that have some: {prefetches}"
