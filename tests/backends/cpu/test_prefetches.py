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


READ, WRITE = "prefetcht1", "prefetchw"


@pytest.fixture(scope="module")
def prefetches(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], int]:
    """How often each function has each prefetch instruction, by the function's mangled name and the instruction."""
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs g++ on a processor of the x86-64 family")
    folder = tmp_path_factory.mktemp("prefetches")
    source, assembly = folder / "kernels.cpp", folder / "kernels.s"
    source.write_text(SOURCE)
    flags = ["-O3", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-mprfchw", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", "-S", *flags, str(source), "-o", str(assembly)], check=True)
    counts: dict[tuple[str, str], int] = {}
    function = ""
    for line in assembly.read_text().splitlines():
        if label := re.match(r"(_Z[\w.]+):", line):
            function = label[1]
        elif found := re.match(r"\s+(prefetch\w+)", line):
            counts[function, found[1]] = counts.get((function, found[1]), 0) + 1
    return counts


@pytest.mark.parametrize(
    ("function", "dtype", "instruction", "least"),
    [
        ("forward_block", "BFloat16", READ, 2),  # the dense mask, the dense bias
        ("backward_block", "BFloat16", READ, 2),  # the same
        ("backward_block", "BFloat16", WRITE, 2),  # the gradients of the query and of the dense bias
        ("prefetch_key_gradients", "BFloat16", WRITE, 2),  # those of key and value
        ("forward_block", "ElementPolicyIff", READ, 4),  # the mask, the bias, keys and values
    ],
)
def test_kernels_prefetch(
    prefetches: dict[tuple[str, str], int], function: str, dtype: str, instruction: str, least: int
) -> None:
    found = sum(
        n for (name, kind), n in prefetches.items() if function in name and dtype in name and kind == instruction
    )
    assert found >= least, f"{function} of {dtype}: {found} {instruction}; the functions that have some: {prefetches}"
