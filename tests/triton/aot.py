"""Compiles every row of the Triton backend's table of tiles, without a GPU, and prints what each kernel needs.

The representative of a row is the problem with all the features that the row is for: it needs the most registers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

# Read when the kernels are imported: they are to be compiled, even from a test session that interprets them.
os.environ.pop("TRITON_INTERPRET", None)

import stub_driver
import torch
import triton
from stub_driver import ARCHITECTURES
from triton.compiler import CompiledKernel

from fused_attn.backends.base import Wanted
from fused_attn.backends.triton import configs, launcher
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem, Band

KERNELS = {
    "forward": launcher.attention_fwd_kernel,
    "dq": launcher.attention_bwd_dq_kernel,
    "dkdv": launcher.attention_bwd_dkdv_kernel,
    "bias": launcher.attention_bwd_dbias_kernel,
    "relative bias": launcher.attention_bwd_dtable_kernel,
}
DTYPES = {2: torch.float16, 4: torch.float32}


class Spills(NamedTuple):
    """stack: bytes of a thread; in_loops: instructions within loops that store to the stack or load from it."""

    stack: int
    in_loops: int


#: A few bytes may wait on the stack while a kernel loops; that costs less than a smaller tile. The table is chosen for
#: the newest Triton; an older one may do a little worse, even within loops.
IS_OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
TOLERATED = Spills(128, 32) if IS_OLD_TRITON else Spills(64, 0)
#: Exact float32 keeps whole rows of both factors in registers, which no tile is small enough for.
TOLERATED_FLOAT32_256 = Spills(512, 512)

BATCH, HEADS, KV_HEADS, LENGTH = 2, 4, 2, 1024


class Cell(NamedTuple):
    """A row of the table (for all kernels) on one architecture."""

    architecture: int
    dtype_bytes: int
    head_dim: int
    is_rich: bool

    def __str__(self) -> str:
        features = "rich" if self.is_rich else "plain"
        return f"sm_{self.architecture} {8 * self.dtype_bytes}-bit head dim {self.head_dim} {features}"


class Resources(NamedTuple):
    """What one kernel needs.

    spills: bytes per thread
    spills_in_loops: instructions within loops
    mma: instructions of each kind
    """

    cell: Cell
    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    spills_in_loops: int
    shared: int
    mma: dict[str, int]
    seconds: float

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks fit side by side, as far as registers, shared memory and warps tell."""
        limits = ARCHITECTURES[self.cell.architecture]
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            2**16 // registers_per_warp // self.warps,
            limits.shared_per_multiprocessor * 1024 // (self.shared + 1024),
            limits.warps_per_multiprocessor // self.warps,
            limits.blocks_per_multiprocessor,
        )

    @property
    def rows(self) -> int:
        """Of the left factors of the matrix products."""
        block_m, block_n = map(int, self.tile.split("x"))
        return block_n if self.kernel == "dkdv" else block_m

    @property
    def faults(self) -> list[str]:
        faults = []
        tolerated = TOLERATED_FLOAT32_256 if self.cell[1:3] == (4, 256) else TOLERATED
        if self.spills > tolerated.stack or self.spills_in_loops > tolerated.in_loops:
            faults.append(f"{self.spills} bytes spilled, {self.spills_in_loops} instructions for it in loops")
        limit = ARCHITECTURES[self.cell.architecture].shared_per_block * 1024
        if self.shared > limit:
            faults.append(f"{self.shared} bytes of shared memory, there are {limit}")
        if self.cell.dtype_bytes == 2:
            wanted = {8: "mma.sync", 9: "wgmma", 10: "tcgen05"}[self.cell.architecture // 10]
            if self.rows < 64:
                wanted = "mma.sync"  # the others multiply 64 rows at once
            if any(count > 0 if kind != wanted else count == 0 for kind, count in self.mma.items()):
                faults.append(f"matrix products by {self.mma}, expected {wanted} alone")
        return faults


def cells(architectures: Iterable[int]) -> Iterator[Cell]:
    """Every row of the table; those of float32, which uses no matrix instructions, on one architecture."""
    for architecture in architectures:
        for head_dim in configs.HEAD_DIMS:
            yield Cell(architecture, 2, head_dim, False)
            yield Cell(architecture, 2, head_dim, True)
            if architecture == min(ARCHITECTURES):
                yield Cell(architecture, 4, head_dim, True)


def compile_cell(cell: Cell) -> list[Resources]:
    """Runs forward and backward of the cell's representative through the launcher."""
    warnings.simplefilter("ignore")
    stub_driver.install(cell.architecture)
    for kernel in KERNELS.values():
        stub_driver.forget(kernel)
    problem, tensors = representative(cell)
    started = time.perf_counter()
    launch(problem, *tensors)
    results = []
    for name, kernel in KERNELS.items():
        # The launcher compiles nothing that the problem does not need.
        for binary in stub_driver.compiled(kernel):
            results.append(_resources(cell, name, problem, binary))
    seconds = (time.perf_counter() - started) / len(results)
    return [result._replace(seconds=seconds) for result in results]


def representative(cell: Cell) -> tuple[AttentionProblem, tuple]:
    """The problem with all features of the row, and its query, key, value, sinks, seed and masks."""
    dtype, head_dim, rich = DTYPES[cell.dtype_bytes], cell.head_dim, cell.is_rich
    problem = AttentionProblem(
        BATCH, HEADS, KV_HEADS, LENGTH, LENGTH, head_dim, head_dim, dtype,
        torch.device("cuda", cell.architecture),
        scale=head_dim**-0.5,
        softcap=30.0 if rich else 0.0,
        dropout_p=0.1 if rich else 0.0,
        band=Band(left=300, right=100),
        has_key_padding=True,
        has_bias=rich,
        has_relative_bias=rich,
        has_sinks=True,
        capability=divmod(cell.architecture, 10),
    )  # fmt: skip
    query = torch.empty(BATCH, HEADS, LENGTH, head_dim, dtype=dtype)
    key, value = (torch.empty(BATCH, KV_HEADS, LENGTH, head_dim, dtype=dtype) for _ in range(2))
    mask = MaskSpec(
        bias=torch.empty(BATCH, HEADS, LENGTH, LENGTH, dtype=dtype) if rich else None,
        relative_bias=torch.empty(HEADS, 2 * LENGTH - 1, dtype=dtype) if rich else None,
        key_padding=torch.empty(BATCH, LENGTH, dtype=torch.bool),
    )
    seed = torch.empty((), dtype=torch.int64) if rich else None
    return problem, (query, key, value, torch.empty(HEADS), seed, mask)


def launch(problem: AttentionProblem, query, key, value, sinks, seed, mask: MaskSpec) -> None:
    out, lse = launcher.forward(problem, query, key, value, sinks, seed, mask, needs_lse=True)
    wanted = Wanted(True, True, True, mask.bias is not None, mask.relative_bias is not None, sinks is not None)
    launcher.backward(problem, wanted, out, None, query, key, value, out, lse, sinks, seed, mask)


def _resources(cell: Cell, name: str, problem: AttentionProblem, binary: CompiledKernel) -> Resources:
    config = configs.choose("bias" if name == "relative bias" else name, problem)
    if name == "relative bias":
        config = config._replace(block_m=config.block_n)
    ptx = binary.asm["ptx"]
    return Resources(
        cell, name, f"{config.block_m}x{config.block_n}", binary.metadata.num_warps, binary.metadata.num_stages,
        binary.n_regs, binary.module.stack, binary.module.spills_in_loops,
        binary.metadata.shared,
        {
            "mma.sync": len(re.findall(r"\bmma\.sync", ptx)),
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
        },
        0.0,
    )  # fmt: skip


def compile_all(cells: Iterable[Cell], jobs: int) -> Iterator[Resources]:
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(compile_cell, cells):
            yield from results


HEADER = (
    f"{'row':38}{'kernel':15}{'tile':9}{'warps':>5}{'stages':>7}{'registers':>10}{'spilled':>8}"
    f"{'shared':>9}{'blocks/SM':>10}{'matrix products':>22}{'time':>7}"
)


def line(result: Resources) -> str:
    mma = ", ".join(f"{count} {kind}" for kind, count in result.mma.items() if count) or "none"
    text = (
        f"{result.cell!s:38}{result.kernel:15}{result.tile:9}{result.warps:5}{result.stages:7}{result.registers:10}"
        f"{result.spills:8}{result.shared / 1024:8.1f}K{result.blocks_per_multiprocessor:10}{mma:>22}"
        f"{result.seconds:6.1f}s"
    )
    return f"{text}  {'; '.join(result.faults)}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations side by side")
    parser.add_argument("--json", metavar="FILE", help="where to store what is printed")
    arguments = parser.parse_args()
    print(HEADER)
    results = []
    for result in compile_all(cells(arguments.arch), arguments.jobs):
        print(line(result), flush=True)
        results.append(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            rows = ({**result._asdict(), "cell": result.cell._asdict(), "faults": result.faults} for result in results)
            json.dump(list(rows), file, indent=1)
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
