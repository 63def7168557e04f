"""Kernels compiled for GPUs that this machine does not have, by `aot.py` and other scripts of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn.attention.problem import AttentionProblem

configs = pytest.importorskip("fused_attn.backends.triton.configs", exc_type=ImportError)

FOLDER = Path(__file__).parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script in another process, because this one may have imported the kernels for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, env=environment
    )


def table(path: Path, *arguments: str) -> list[dict]:
    """The rows that `aot.py` prints; `path` is where it may write them."""
    process = run("aot.py", "--jobs", "2", "--json", str(path), *arguments)
    print(process.stdout)
    assert path.exists(), process.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_row_of_the_table_and_stored_compilations(tmp_path):
    """No kernel has `aot.Resources.faults`, such as spills or loads that are not pipelined.

    Kernels that are in compilations.json are not compiled again. But one kernel for each architecture is, and its
    result is compared with the stored one. Both are one test, because every run of `aot.py` imports torch three times.
    """
    rows = table(tmp_path / "table.json")
    assert {row["cell"].split()[0] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100"}
    assert not [(row["cell"], row["kernel"], row["faults"]) for row in rows if row["faults"]]
    text = "fp16 64 padding+sinks+bias+relative_bias+softcap+dropout+decode"
    stored = [row for row in rows if text in row["cell"]]
    fresh = table(tmp_path / "fresh.json", "--only", text, "--fresh")
    assert len(stored) == 4
    assert stored == fresh


@pytest.mark.slow
def test_triton_accepts_a_case_of_each_kind():
    process = run("front_end.py", "--quick")
    assert process.returncode == 0, process.stderr


# The code at 0x90 waits for a barrier, and jumps back. The outer loop, from 0x10 to 0x70, contains the inner one, from
# 0x20 to 0x50, and no product or exponential besides.
SASS = """
        /*0000*/  STL [R1], R0 ;
        /*0010*/  FADD R2, R2, R2 ;
        /*0020*/  MUFU.EX2 R0, R1 ;
        /*0030*/  @P0 BRA 0x90 ;
        /*0040*/  {loop} ;
        /*0050*/  @P1 BRA 0x20 ;
        /*0060*/  {tail} ;
        /*0070*/  @P2 BRA 0x10 ;
        /*0080*/  EXIT ;
        /*0090*/  SYNCS P0, [R3] ;
        /*00a0*/  BRA 0x40 ;
"""


@pytest.mark.quick
def test_spills_are_counted_in_hot_loops_alone():
    stub_driver = pytest.importorskip("stub_driver")
    assert stub_driver.spills_in_loops(SASS.format(loop="FADD R0, R0, R0", tail="LDL R0, [R1]")) == 0
    assert stub_driver.spills_in_loops(SASS.format(loop="LDL R0, [R1]", tail="LDL R0, [R1]")) == 1
    assert stub_driver.spills_in_loops("/*0000*/ STL [R1], R0 ; /*0010*/ HGMMA R0, R1 ; /*0020*/ EXIT ;") == 0
    # A cycle with two entries, 0x10 and 0x20, is no loop whose head is known.
    two_entries = "/*0000*/ @P0 BRA 0x20 ; /*0010*/ HGMMA R0, R1 ; /*0020*/ FADD R0, R0, R0 ; /*0030*/ BRA 0x10 ;"
    with pytest.raises(AssertionError, match="no loop"):
        stub_driver.spills_in_loops(two_entries)


# Only the first load in the loop is a plain load of a factor: the second is a bias, and a copy replaces a third. The
# factors before the loop and after the loop are loaded once.
TTGIR = """
    %before = tt.load %p : tensor<64x64x!tt.ptr<f16>, #blocked>
    %q = ttg.local_alloc %before : (tensor<64x64xf16, #blocked>) -> !ttg.memdesc<64x64xf16, #shared, #smem>
    %acc:2 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %zero) -> (tensor<64x64xf32, #mma>)  : i32 {
      %k = tt.load %p_1, %mask, %other : tensor<64x64x!tt.ptr<f16>, #blocked>
      %k_2 = ttg.local_alloc %k : (tensor<64x64xf16, #blocked>) -> !ttg.memdesc<64x64xf16, #shared, #smem>
      %k_3 = ttg.memdesc_trans %k_2 {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xf16, #shared1, #smem>
      %bias = tt.load %p_2 : tensor<64x64x!tt.ptr<f16>, #mma>
      %scores = arith.extf %bias : tensor<64x64xf16, #mma> to tensor<64x64xf32, #mma>
      %v = ttg.async_copy_global_to_local %p_3, %slot : tensor<64x64x!tt.ptr<f16>, #blocked>
      %qk = {product} %q, %k_3, %scores : !ttg.memdesc<64x64xf16, #shared, #smem> -> tensor<64x64xf32, #mma>
      scf.yield %qk : tensor<64x64xf32, #mma>
    } loc(#loc)
    %k = tt.load %p_1 : tensor<64x64x!tt.ptr<f16>, #blocked>
    %qk = {product} %q, %k, %acc#0 : !ttg.memdesc<64x64xf16, #shared, #smem> -> tensor<64x64xf32, #mma>
"""


@pytest.mark.quick
@pytest.mark.parametrize("product", ["tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma"])
def test_loads_of_factors_that_stay_in_a_loop_are_counted(product):
    compilations = pytest.importorskip("compilations")
    assert compilations.count_plain_loads(TTGIR.replace("{product}", product)) == 1
    is_copied = TTGIR.replace("%k = tt.load %p_1, %mask, %other", "%k = ttg.local_load %slot")
    assert compilations.count_plain_loads(is_copied.replace("{product}", product)) == 0


def test_batches_of_other_lengths_compile_nothing_new():
    process = run("recompilation.py")
    assert process.returncode == 0, process.stdout + process.stderr


def test_reused_kernels_are_those_that_triton_would_choose():
    process = run("reused_kernels.py")
    assert process.returncode == 0, process.stdout + process.stderr


def test_kernels_compiled_asynchronously_are_reused():
    process = run("asynchronous.py")
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.quick
@pytest.mark.parametrize(
    "capability, expected",
    [
        ((8, 0), "sm_80"),
        ((8, 6), "small"),
        ((8, 7), "sm_80"),
        ((8, 9), "small"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 1), "small"),
    ],
)
def test_every_architecture_has_rows(capability, expected):
    assert configs.architecture_class(capability) == expected
    for kernel in configs.KERNELS:
        for dtype in (torch.float16, torch.float32):
            for head_dim in (8, 64, 80, 256, 512)[: 5 if dtype == torch.float16 else 4]:
                problem = AttentionProblem(
                    1, 1, 1, 64, 64, 8, head_dim, dtype, torch.device("cuda", 0), 1.0, capability=capability
                )
                tried = configs.candidates(kernel, problem)
                assert tried[0] == configs.choose(kernel, problem)
                assert len(set(tried)) == len(tried)
