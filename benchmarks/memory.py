"""Peak memory of one attention call against length: ``python -m benchmarks memory``.

What counts is the memory that a call needs beyond its inputs and results, and the memory of what an implementation must
be given besides the inputs, such as a dense mask. On a GPU torch's allocator tells both to the byte. On a CPU the
resident memory of a process is read, in which nothing else happens.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cases, rivals, session, summary
from benchmarks.cases import Case
from benchmarks.conventions import OURS
from benchmarks.inputs import Inputs
from benchmarks.rivals import RIVALS
from benchmarks.rows import Row, select
from benchmarks.session import Session

MASKS = ("none", "causal", "padded", "causal+padded", "relative-bias", "bias")
HEADS, HEAD_DIM = 4, 64
#: These are not measured. flex would compile for each length, torch-varlen supports none of MASKS, and nobody would
#: choose the others for their memory.
NOT_ON_GPU = ("flex", "torch-varlen", "torch-causal-only", *rivals.OUR_BACKENDS)
ON_GPU = [name for name in RIVALS if name not in NOT_ON_GPU]
ON_CPU = [OURS, "torch", "torch-math"]
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384, 32768)}
QUICK_LENGTHS = (256, 512, 1024)
#: The fields that the rows of one sweep over lengths share.
SWEEP = ("mask", "dtype", "direction", "implementation")
MIB = 2**20


class Peak(NamedTuple):
    """The memory of a call in bytes.

    extra: the peak during the call, without results and without what was allocated before
    results: the output, or the gradients of the inputs of the case
    held: what is made for the call beforehand: a dense mask, or a dense bias in place of a relative one
    """

    extra: int
    results: int
    held: int


def peak_of(case: Case, name: str, device: torch.device, threads: int | None = None) -> Peak:
    """The memory that the implementation needs for the case. threads: of a CPU; by default torch's choice."""
    if device.type == "cuda":
        return _peak_on_gpu(case, name, device)
    # The call runs in a new process, forked from a server that has only imported this module.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        return processes.submit(_peak_here, case, name, threads or torch.get_num_threads()).result()


def _peak_on_gpu(case: Case, name: str, device: torch.device) -> Peak:
    # A small case runs first. It brings compiled code and the workspaces of libraries, which do not count.
    for length in (64, case.length):
        inputs = Inputs(replace(case, length=length), device, rows_first=True)
        torch.cuda.synchronize(device)
        given = torch.cuda.memory_allocated(device)
        prepared = RIVALS[name].prepare(inputs)
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - given
        call = rivals.call_of(prepared, inputs)
        call()
        torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = _results_of(inputs)
    call()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before - results, results, held)


def _peak_here(case: Case, name: str, threads: int) -> Peak:
    """`peak_of` on a CPU, for the process that this function runs in, which must be a fresh one."""
    torch.set_num_threads(threads)
    # A small case runs first. It brings threads, code and workspaces, which do not count.
    small = Inputs(replace(case, length=64))
    rivals.call_of(RIVALS[name].prepare(small), small)()
    inputs = Inputs(case)
    _give_back()
    given = _resident("VmRSS")
    prepared = RIVALS[name].prepare(inputs)
    _give_back()
    held = max(0, _resident("VmRSS") - given)
    call = rivals.call_of(prepared, inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    results = _results_of(inputs)
    call()
    return Peak(_resident("VmHWM") - before - results, results, held)


def _give_back() -> None:
    """Returns memory that earlier calls have freed to the system. Later calls would use it again, unseen."""
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """The resident memory of this process in bytes: VmRSS is the present one, VmHWM is the peak since the last write to
    clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _results_of(inputs: Inputs) -> int:
    tensors = [inputs.dout] if inputs.case.direction == "forward" else list(inputs.leaves.values())
    return sum(x.numel() * x.element_size() for x in tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, quick="short sequences, two masks", is_timed=False)
    parser.add_argument("--only", nargs="+", choices=MASKS, metavar="MASK", help=f"some of {', '.join(MASKS)} (all)")
    parser.add_argument("--lengths", nargs="+", type=session.whole)
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS, default=["forward", "forward+backward"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS,
                        help=f"implementations ({', '.join(ON_CPU)}; on a GPU all)")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    run = Session(arguments)
    kind = run.device.type
    if kind == "cpu" and sys.platform != "linux":
        print("--device cpu: the memory of a process is read from /proc, which only Linux has", file=sys.stderr)
        return 1
    names = arguments.rivals or (ON_GPU if kind == "cuda" else ON_CPU)
    masks = arguments.only or (("none", "causal+padded") if run.is_quick else MASKS)
    lengths = arguments.lengths or (QUICK_LENGTHS if run.is_quick else LENGTHS[kind])
    sweeps = [
        sweep
        for sweep in itertools.product(masks, run.dtypes, arguments.directions, names)
        if RIVALS[sweep[3]].is_for(_case(*sweep[:3], lengths[0])) and not _is_done(sweep, lengths, run.earlier)
    ]
    if not sweeps and not run.earlier:
        raise SystemExit(f"--rivals: expected implementations for the masks {', '.join(masks)}, got {', '.join(names)}")
    for sweep in run.steps(sweeps, " ".join):
        rows = _sweep(*sweep, lengths, run.device)
        run.record(rows, f"{' '.join(sweep[:3]):40} {sweep[3]:16} {describe(rows)}")
    return 0


def _is_done(sweep: tuple[str, ...], lengths: Iterable[int], earlier: list[Row]) -> bool:
    """Whether each length of a sweep has a row, up to the one that ended it."""
    own = select(earlier, benchmark="memory", **dict(zip(SWEEP, sweep, strict=True)))
    rows = {row["shape"][2]: row for row in own}
    for length in lengths:
        row = rows.get(length)
        if row is None or "cannot" in row:
            return row is not None
    return True


def _sweep(
    mask: str, dtype: str, direction: str, name: str, lengths: tuple[int, ...], device: torch.device
) -> list[Row]:
    """One row for each length. The first length that fails ends the sweep, because longer ones need more memory."""
    rows = []
    for length in lengths:
        case = _case(mask, dtype, direction, length)
        about = dict(zip(SWEEP, (mask, dtype, direction, name), strict=True))
        rows.append({"benchmark": "memory", "shape": list(case.shape)} | about | rivals.version_of(name))
        try:
            peak = peak_of(case, name, device)
        except Exception as error:  # Packages raise exceptions of any class.
            rows[-1]["cannot"] = rivals.reason(error)
            break
        sizes = {"extra_mib": max(0, peak.extra), "held_mib": peak.held, "results_mib": peak.results}
        rows[-1] |= {name: size / MIB for name, size in sizes.items()}
    return rows


def _case(mask: str, dtype: str, direction: str, length: int) -> Case:
    return Case(1, HEADS, length, HEAD_DIM, mask, dtype, direction)


def describe(rows: list[Row]) -> str:
    """One line: the MiB at each length, the exponent of growth, and why the sweep ended early."""
    sizes = [row for row in rows if "extra_mib" in row]
    cells = [f"{row['shape'][2]}: {summary.mib_of(row):.1f} MiB" for row in sizes]
    exponent = summary.growth_exponent(sizes)
    if exponent is not None:
        cells.append(f"~ L^{exponent:.2f}")
    cells += [f"cannot: {row['cannot']}" for row in rows if "cannot" in row]
    return ", ".join(cells)
