"""Compiles every row of the Triton backend's table of tiles, without a GPU, and prints the resources of each kernel.

A row is compiled for the combination of features that needs most registers, or, with ``--all``, for every combination
that it is for. A row for `configs.ANY` is compiled with all features at once. Kernels whose results are stored in
compilations.json are not compiled again; see compilations.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

# Triton reads this variable when the kernels are imported. A test session that interprets kernels sets it.
os.environ.pop("TRITON_INTERPRET", None)

import compilations
import stub_driver
import torch
import triton
from compilations import Compilation
from stub_driver import ARCHITECTURES

from fused_attn.attention.inputs import Inputs, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends.triton import configs, launcher

KERNELS = {
    "forward": launcher.attention_fwd_kernel,
    "dq": launcher.attention_bwd_dq_kernel,
    "dkdv": launcher.attention_bwd_dkdv_kernel,
    "bias": launcher.attention_bwd_dbias_kernel,
    "relative bias": launcher.attention_bwd_drelative_bias_kernel,
}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Spills(NamedTuple):
    """Spilled registers. stack: bytes of a thread; in_loops: instructions in hot loops that access the stack."""

    stack: int
    in_loops: int


#: A kernel may spill a few bytes outside its loops, because that costs less than a smaller tile. The table is chosen
#: for the newest Triton. An older one may spill a little more, even within loops.
IS_OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
TOLERATED = Spills(128, 32) if IS_OLD_TRITON else Spills(64, 0)
#: Products of exact float32 keep whole rows of both factors in registers. At head dim 256, all tiles spill.
TOLERATED_FLOAT32_256 = Spills(512, 512)

BATCH, HEADS, KV_HEADS, LENGTH = 2, 4, 2, 1024


EVERYTHING = "padding+sinks+bias+relative_bias+softcap+dropout"
#: The combinations of features that a row of `configs.TABLE` is for, those that need most registers first. PLAIN and
#: ANY are missing, because `cells` names their combinations itself.
MASKS = {
    configs.ONE: ("mask", "bias", "softcap", "dropout"),
    configs.ONE_AND_DROPOUT: ("bias+dropout", "mask+dropout", "softcap+dropout"),
    configs.RELATIVE_BIAS: ("relative_bias+dropout", "relative_bias"),
}
#: Other inputs that use rows of the combinations above. They are compiled for head dim 64 alone.
LAYOUTS = ("varlen", "float-padding", "ranges")
#: A head dim that is no multiple of 16. Tiles are loaded in pieces of 16 bytes nevertheless; see `arguments.Rows`.
ODD_HEAD_DIM = 40


class Cell(NamedTuple):
    """A problem on an architecture, for which kernels are compiled. features: names joined by "+"."""

    architecture: int
    dtype: str
    head_dim: int
    features: str

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.dtype} {self.head_dim} {self.features}"


class Resources(NamedTuple):
    """The resources that one kernel needs.

    tile: block_m x block_n
    seconds: the time of compiling the kernel, on average over the kernels of its cell
    """

    cell: Cell
    kernel: str
    tile: str
    stages: int
    compilation: Compilation
    seconds: float

    @property
    def warps(self) -> int:
        return self.compilation.metadata["num_warps"]

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.compilation.metadata["shared"]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many thread blocks a multiprocessor runs at a time, as registers, shared memory and warps allow."""
        limits = ARCHITECTURES[self.cell.architecture]
        registers_per_warp = -(-self.compilation.usage.registers * 32 // 256) * 256
        return min(
            2**16 // registers_per_warp // self.warps,
            limits.shared_per_multiprocessor * 1024 // (self.shared + 1024),
            limits.warps_per_multiprocessor // self.warps,
            limits.blocks_per_multiprocessor,
        )

    @property
    def rows(self) -> int:
        """How many rows the left factors of the kernel's matrix products have."""
        block_m, block_n = map(int, self.tile.split("x"))
        return block_n if self.kernel == "dkdv" else block_m

    @property
    def faults(self) -> list[str]:
        """What the test of the table does not allow.

        These are spills, too much shared memory, slow matrix instructions, and loads that are not pipelined.
        """
        faults = []
        tolerated = TOLERATED_FLOAT32_256 if self.cell[1:3] == ("fp32", 256) else TOLERATED
        usage, mma = self.compilation.usage, self.compilation.mma
        if usage.stack > tolerated.stack or usage.spills_in_loops > tolerated.in_loops:
            faults.append(f"{usage.stack} bytes spilled, {usage.spills_in_loops} instructions for it in loops")
        limit = ARCHITECTURES[self.cell.architecture].shared_per_block * 1024
        if self.shared > limit:
            faults.append(f"{self.shared} bytes of shared memory, there are {limit}")
        if self.cell.dtype != "fp32":
            wanted = {8: "mma.sync", 9: "wgmma", 10: "tcgen05"}[self.cell.architecture // 10]
            if self.rows < 64:
                wanted = "mma.sync"  # wgmma and tcgen05 multiply at least 64 rows
            if any(count > 0 if kind != wanted else count == 0 for kind, count in mma.items()):
                faults.append(f"matrix products by {mma}, expected {wanted} alone")
        if self.stages > 1 and self.compilation.plain_loads:
            faults.append(f"{self.compilation.plain_loads} loads of factors are not pipelined")
        return faults


def cells(architectures: Iterable[int], wants_all: bool) -> Iterator[Cell]:
    """Cells that cover every row of the table.

    Rows of exact float32 are the same for all architectures, so one architecture has cells for them.
    """
    for architecture in architectures:
        for head_dim in configs.HEAD_DIMS:
            yield Cell(architecture, "fp16", head_dim, "padding+sinks")
            yield Cell(architecture, "fp16", head_dim, EVERYTHING)
            yield Cell(architecture, "fp16", head_dim, EVERYTHING + "+decode")
            if head_dim in configs.TABLE["forward", configs.TF32, configs.PLAIN]:
                yield Cell(architecture, "tf32", head_dim, "padding+sinks")
            if architecture == min(ARCHITECTURES) and head_dim in configs.TABLE["forward", 4, configs.ANY]:
                yield Cell(architecture, "fp32", head_dim, EVERYTHING)
            for features, masks in MASKS.items():
                if head_dim in configs.TABLE["forward", 2, features]:
                    for mask in masks if wants_all else masks[:1]:
                        yield Cell(architecture, "fp16", head_dim, f"padding+sinks+{mask}")
        for layout in LAYOUTS:
            yield Cell(architecture, "fp16", 64, layout)
        yield Cell(architecture, "fp16", ODD_HEAD_DIM, "padding+sinks")


def compile_cell(cell: Cell, is_fresh: bool = False) -> list[Resources]:
    """Runs forward and backward of the cell's representative through the launcher.

    is_fresh: kernels are compiled even if `compilations.json` has their results
    """
    warnings.simplefilter("ignore")
    stub_driver.install(cell.architecture)
    compilations.install(is_fresh)
    for kernel in KERNELS.values():
        stub_driver.forget(kernel)
    problem, inputs = representative(cell)
    # The problem as the launcher completes it.
    known = replace(problem, has_bias=problem.has_bias or problem.has_key_bias, allows_tf32=cell.dtype == "tf32")
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high" if cell.dtype == "tf32" else "highest")
    if "decode" in cell.features.split("+"):
        launcher.forward(problem, inputs, needs_lse=True, needs_max=False)
    else:
        # The table has rows for the gradients of biases under `configs.ANY` alone.
        launch(problem, inputs, wants_bias=cell.features == EVERYTHING)
    results = []
    for name, kernel in KERNELS.items():
        # One kernel, or none if the problem does not need it.
        for binary in stub_driver.compiled(kernel):
            results.append(_resources(cell, name, known, Compilation.of(binary)))
    seconds = (time.perf_counter() - started) / len(results)
    return [result._replace(seconds=seconds) for result in results]


def representative(cell: Cell) -> tuple[AttentionProblem, Inputs]:
    """A windowed problem with the cell's features, and its tensors."""
    dtype, head_dim, features = DTYPES[cell.dtype], cell.head_dim, cell.features.split("+")
    is_packed, seqlen_q = "varlen" in features, 1 if "decode" in features else LENGTH
    problem = AttentionProblem(
        BATCH, HEADS, KV_HEADS, seqlen_q, LENGTH, head_dim, head_dim, dtype,
        torch.device("cuda", cell.architecture),
        scale=head_dim**-0.5,
        num_splits=2 if "decode" in features else 0,
        softcap=30.0 if "softcap" in features else 0.0,
        dropout_p=0.1 if "dropout" in features else 0.0,
        band=Band(left=300, right=100),
        is_packed=is_packed,
        has_mask="mask" in features,
        has_key_padding="padding" in features,
        has_bias="bias" in features,
        num_ranges=2 if "ranges" in features else 0,
        has_key_bias="float-padding" in features,
        has_relative_bias="relative_bias" in features,
        has_sinks="sinks" in features,
        capability=divmod(cell.architecture, 10),
    )  # fmt: skip

    def rows(heads: int, length: int) -> torch.Tensor:
        shape = (BATCH * length, heads) if is_packed else (BATCH, heads, length)
        return torch.empty(*shape, head_dim, dtype=dtype)

    cu_seqlens = torch.empty(BATCH + 1, dtype=torch.int32) if is_packed else None
    inputs = Inputs(
        rows(HEADS, seqlen_q),
        rows(KV_HEADS, LENGTH),
        rows(KV_HEADS, LENGTH),
        sinks=torch.empty(HEADS) if problem.has_sinks else None,
        seed=torch.empty((), dtype=torch.int64) if problem.dropout_p else None,
        mask=torch.empty(BATCH, 1, seqlen_q, LENGTH, dtype=torch.bool) if "mask" in features else None,
        key_ranges=torch.empty(BATCH, 1, seqlen_q, 2, 2, dtype=torch.int32) if problem.num_ranges else None,
        bias=torch.empty(BATCH, HEADS, seqlen_q, LENGTH, dtype=dtype) if problem.has_bias else None,
        key_bias=torch.empty(BATCH, LENGTH, dtype=dtype) if "float-padding" in features else None,
        relative_bias=torch.empty(HEADS, seqlen_q + LENGTH - 1, dtype=dtype) if problem.has_relative_bias else None,
        key_padding=torch.empty(BATCH, LENGTH, dtype=torch.bool) if problem.has_key_padding else None,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
    )
    return problem, inputs


def launch(problem: AttentionProblem, inputs: Inputs, wants_bias: bool = True) -> None:
    """Calls forward and backward of the launcher. wants_bias: also for the gradients of the biases."""
    out, lse, _ = launcher.forward(problem, inputs, needs_lse=True, needs_max=False)
    wanted = Wanted.of(*(x is not None for x in inputs))
    if not wants_bias:
        wanted = wanted._replace(bias=False, key_bias=False, relative_bias=False)
    launcher.backward(problem, inputs, Saved(out, lse, dout=out), wanted)


def _resources(cell: Cell, name: str, problem: AttentionProblem, compilation: Compilation) -> Resources:
    config = configs.choose("bias" if name == "relative bias" else name, problem)
    if name == "relative bias":
        config = config._replace(block_m=config.block_n)
    return Resources(cell, name, f"{config.block_m}x{config.block_n}", config.num_stages, compilation, 0.0)


def compile_all(cells: Iterable[Cell], jobs: int, is_fresh: bool) -> Iterator[Resources]:
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(partial(compile_cell, is_fresh=is_fresh), cells):
            yield from results


HEADER = (
    f"{'row':58}{'kernel':15}{'tile':9}{'warps':>5}{'stages':>7}{'registers':>10}{'spilled':>8}"
    f"{'shared':>9}{'blocks/SM':>10}{'matrix products':>22}{'time':>7}"
)


def line(result: Resources) -> str:
    """The line of a kernel below `HEADER`."""
    usage = result.compilation.usage
    mma = ", ".join(f"{count} {kind}" for kind, count in result.compilation.mma.items() if count) or "none"
    text = (
        f"{result.cell!s:58}{result.kernel:15}{result.tile:9}{result.warps:5}{result.stages:7}{usage.registers:10}"
        f"{usage.stack:8}{result.shared / 1024:8.1f}K{result.blocks_per_multiprocessor:10}{mma:>22}"
        f"{result.seconds:6.1f}s"
    )
    return f"{text}  {'; '.join(result.faults)}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every combination of features that a row is for")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations side by side")
    parser.add_argument("--fresh", action="store_true", help="compile kernels whose results are stored, too")
    parser.add_argument("--store", action="store_true", help=f"make {compilations.FILE.name} of these results")
    parser.add_argument("--json", metavar="FILE", help="where to write what is printed")
    arguments = parser.parse_args()
    print(HEADER)
    results = []
    selected = [cell for cell in cells(arguments.arch, arguments.all) if arguments.only in str(cell)]
    for result in compile_all(selected, arguments.jobs, arguments.fresh):
        print(line(result), flush=True)
        results.append(result)
    if arguments.store:
        compilations.store([result.compilation for result in results])
    if arguments.json:
        rows = [
            {"cell": str(result.cell), "kernel": result.kernel, "compilation": result.compilation,
             "faults": result.faults}
            for result in results
        ]  # fmt: skip
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
