"""lint.py finds nothing in csrc/cuda, and it finds each kind of forbidden code that is planted in a small kernel."""

from __future__ import annotations

import lint
import pytest

#: A kernel without fault. A test replaces BUG by a statement.
KERNEL = """
#include "primitives.h"
namespace fused_attn::gpu {
struct Params { const float* x; float scale[2]; };
GPU_DEVICE float twice(float x) { return 2 * x; }
GPU_KERNEL void GPU_LAUNCH_BOUNDS(32, 1) kernel(const Params p, float (&r)[4]) {
  const int thread = thread_index();  // *comments* may say what[ever] they like, asm too
  float acc[2][4], sum[2] = {}, last[3];
  acc[0][1] = -p.scale[1] * sum[0] * r[2] * last[1];
  const float* next = p.x + thread * 4;
  auto half = [&](float x) -> float { return x / 2; };
  store_shared(shared_address(shared_memory()), twice(half(load_global(next))));
  BUG
}
}  // namespace fused_attn::gpu
"""


def test_csrc_is_clean():
    assert lint.check() == []


def found(tmp_path, statement: str) -> list[str]:
    """The findings in a folder with only KERNEL, in which `statement` replaces BUG."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "kernel.h").write_text(KERNEL.replace("BUG", statement))
    return lint.check(folder)


def test_nothing_is_found_in_a_clean_kernel(tmp_path):
    assert found(tmp_path, "") == []


@pytest.mark.parametrize(
    "statement, what",
    [
        ("acc[0][0] = *next;", "a dereferenced pointer"),
        ("acc[0][0] = thread + *(next + 1);", "a dereferenced pointer"),
        ("*next = 1;", "a dereferenced pointer"),
        ("return *next;", "a dereferenced pointer"),
        ("acc[0][0] = next[thread];", "a subscript of what is no array"),
        ("acc[0][0] = p.x[thread];", "a subscript of what is no array"),
        ("acc[0][0] = pointer->x;", "a dereferenced pointer"),
        ('asm volatile("bar.sync 0;");', "asm"),
        ("__shared__ float tile[32];", "a CUDA specifier"),
        ("if (threadIdx.x == 0) return;", "a built-in variable"),
        ("__syncthreads();", "an intrinsic function"),
        ("sum[0] = __shfl_xor_sync(~0u, sum[0], 1);", "an intrinsic function"),
        ("atomicAdd(next, 1.0f);", "an atomic function"),
        ("memcpy(acc, next, 16);", "a library function on memory"),
        ("#pragma unroll", "a pragma"),
        ("#include <cuda_fp16.h>", "an include of CUDA's headers"),
    ],
)
def test_each_way_past_the_primitives_is_found(tmp_path, statement, what):
    (message,) = found(tmp_path, statement)
    line = 2 + KERNEL[: KERNEL.index("BUG")].count("\n") - 1
    assert message.startswith(f"kernel.h:{line}: {what}")
