"""Compiles every row of the Triton backend's table of tiles, without a GPU, and prints what each kernel needs.

A row is compiled for the combination of features that needs most registers; with ``--all``, for every one that it is
for. A row for anything stands for all of them at once.
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
from dataclasses import replace
from typing import NamedTuple

# Read when the kernels are imported: they are to be compiled, even from a test session that interprets them.
os.environ.pop("TRITON_INTERPRET", None)

import stub_driver
import torch
import triton
from stub_driver import ARCHITECTURES
from triton.compiler import CompiledKernel

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


EVERYTHING = "padding+sinks+bias+relative_bias+softcap+dropout"
#: What other rows of `configs.TABLE` than those for nothing and for anything are for, the greediest first.
MASKS = {
    configs.ONE: ("mask", "bias", "softcap", "dropout"),
    configs.ONE_AND_DROPOUT: ("bias+dropout", "mask+dropout", "softcap+dropout"),
    configs.RELATIVE_BIAS: ("relative_bias+dropout", "relative_bias"),
}
#: Other shapes and masks that share rows with those above, each compiled on one width.
LAYOUTS = ("varlen", "float-padding")


class Cell(NamedTuple):
    """One problem on one architecture. features: names joined by "+"."""

    architecture: int
    dtype: str
    head_dim: int
    features: str

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.dtype} {self.head_dim} {self.features}"


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
        tolerated = TOLERATED_FLOAT32_256 if self.cell[1:3] == ("fp32", 256) else TOLERATED
        if self.spills > tolerated.stack or self.spills_in_loops > tolerated.in_loops:
            faults.append(f"{self.spills} bytes spilled, {self.spills_in_loops} instructions for it in loops")
        limit = ARCHITECTURES[self.cell.architecture].shared_per_block * 1024
        if self.shared > limit:
            faults.append(f"{self.shared} bytes of shared memory, there are {limit}")
        if self.cell.dtype != "fp32":
            wanted = {8: "mma.sync", 9: "wgmma", 10: "tcgen05"}[self.cell.architecture // 10]
            if self.rows < 64:
                wanted = "mma.sync"  # the others multiply 64 rows at once
            if any(count > 0 if kind != wanted else count == 0 for kind, count in self.mma.items()):
                faults.append(f"matrix products by {self.mma}, expected {wanted} alone")
        return faults


def cells(architectures: Iterable[int], wants_all: bool) -> Iterator[Cell]:
    """Every row of the table; those of exact float32, which uses no matrix instructions, on one architecture."""
    for architecture in architectures:
        for head_dim in configs.HEAD_DIMS:
            yield Cell(architecture, "fp16", head_dim, "padding+sinks")
            yield Cell(architecture, "fp16", head_dim, EVERYTHING)
            yield Cell(architecture, "fp16", head_dim, EVERYTHING + "+decode")
            if head_dim in configs.TABLE["forward", configs.TF32, configs.PLAIN]:
                yield Cell(architecture, "tf32", head_dim, "padding+sinks")
            if architecture == min(ARCHITECTURES):
                yield Cell(architecture, "fp32", head_dim, EVERYTHING)
            for features, masks in MASKS.items():
                if head_dim in configs.TABLE["forward", 2, features]:
                    for mask in masks if wants_all else masks[:1]:
                        yield Cell(architecture, "fp16", head_dim, f"padding+sinks+{mask}")
        for layout in LAYOUTS:
            yield Cell(architecture, "fp16", 64, layout)


def compile_cell(cell: Cell) -> list[Resources]:
    """Runs forward and backward of the cell's representative through the launcher."""
    warnings.simplefilter("ignore")
    stub_driver.install(cell.architecture)
    for kernel in KERNELS.values():
        stub_driver.forget(kernel)
    problem, inputs = representative(cell)
    # As the launcher sees it.
    known = replace(problem, has_bias=inputs.bias is not None, allows_tf32=cell.dtype == "tf32")
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high" if cell.dtype == "tf32" else "highest")
    if "decode" in cell.features.split("+"):
        launcher.forward(problem, inputs, needs_lse=True)
    else:
        # Gradients of biases have rows for anything alone.
        launch(problem, inputs, wants_bias=cell.features == EVERYTHING)
    results = []
    for name, kernel in KERNELS.items():
        # The launcher compiles nothing that the problem does not need.
        for binary in stub_driver.compiled(kernel):
            results.append(_resources(cell, name, known, binary))
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
        softcap=30.0 if "softcap" in features else 0.0,
        dropout_p=0.1 if "dropout" in features else 0.0,
        band=Band(left=300, right=100),
        is_packed=is_packed,
        has_mask="mask" in features,
        has_key_padding="padding" in features,
        has_bias="bias" in features,
        has_relative_bias="relative_bias" in features,
        has_sinks="sinks" in features,
        capability=divmod(cell.architecture, 10),
    )  # fmt: skip

    def rows(heads: int, length: int) -> torch.Tensor:
        shape = (1, heads, BATCH * length) if is_packed else (BATCH, heads, length)
        return torch.empty(*shape, head_dim, dtype=dtype)

    cu_seqlens = torch.empty(BATCH + 1, dtype=torch.int32) if is_packed else None
    bias = None
    if "bias" in features:
        bias = torch.empty(BATCH, HEADS, seqlen_q, LENGTH, dtype=dtype)
    elif "float-padding" in features:
        bias = torch.empty(BATCH, 1, 1, LENGTH, dtype=dtype)
    inputs = Inputs(
        rows(HEADS, seqlen_q),
        rows(KV_HEADS, LENGTH),
        rows(KV_HEADS, LENGTH),
        sinks=torch.empty(HEADS) if problem.has_sinks else None,
        seed=torch.empty((), dtype=torch.int64) if problem.dropout_p else None,
        mask=torch.empty(BATCH, 1, seqlen_q, LENGTH, dtype=torch.bool) if "mask" in features else None,
        bias=bias,
        relative_bias=torch.empty(HEADS, seqlen_q + LENGTH - 1, dtype=dtype) if problem.has_relative_bias else None,
        key_padding=torch.empty(BATCH, LENGTH, dtype=torch.bool) if problem.has_key_padding else None,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
    )
    return problem, inputs


def launch(problem: AttentionProblem, inputs: Inputs, wants_bias: bool = True) -> None:
    out, lse = launcher.forward(problem, inputs, needs_lse=True)
    wanted = Wanted.of(*(x is not None for x in inputs))
    if not wants_bias:
        wanted = wanted._replace(bias=False, relative_bias=False)
    launcher.backward(problem, inputs, Saved(out, lse, dout=out), wanted)


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
    f"{'row':58}{'kernel':15}{'tile':9}{'warps':>5}{'stages':>7}{'registers':>10}{'spilled':>8}"
    f"{'shared':>9}{'blocks/SM':>10}{'matrix products':>22}{'time':>7}"
)


def line(result: Resources) -> str:
    mma = ", ".join(f"{count} {kind}" for kind, count in result.mma.items() if count) or "none"
    text = (
        f"{result.cell!s:58}{result.kernel:15}{result.tile:9}{result.warps:5}{result.stages:7}{result.registers:10}"
        f"{result.spills:8}{result.shared / 1024:8.1f}K{result.blocks_per_multiprocessor:10}{mma:>22}"
        f"{result.seconds:6.1f}s"
    )
    return f"{text}  {'; '.join(result.faults)}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every combination of features that a row is for")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations side by side")
    parser.add_argument("--json", metavar="FILE", help="where to store what is printed")
    arguments = parser.parse_args()
    print(HEADER)
    results = []
    for result in compile_all(cells(arguments.arch, arguments.all), arguments.jobs):
        print(line(result), flush=True)
        results.append(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            rows = ({**result._asdict(), "cell": result.cell._asdict(), "faults": result.faults} for result in results)
            json.dump(list(rows), file, indent=1)
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
