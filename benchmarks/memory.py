"""Peak memory of one attention call against length, and the largest length that fits: ``python -m benchmarks memory``.

Counted is what a call takes beyond its inputs and results, and what an implementation has to be given beside the inputs
of the case, such as a dense mask: on a GPU by torch's allocator, to the byte; on a CPU as resident memory of a process
that does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cases, machine, rivals, summary
from benchmarks.cases import Case
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES, Inputs
from benchmarks.progress import progress
from benchmarks.rivals import RIVALS
from benchmarks.rows import Row, Writer, read, select

MASKS = ("none", "causal", "padded", "causal+padded", "relative-bias", "bias")
HEADS, HEAD_DIM = 4, 64
#: What is compiled for each length anew takes too long for a sweep of lengths; packed sequences have no masks; and what
#: a single kernel of ours or a smaller problem takes is nothing that a user chooses by.
NOT_ON_GPU = ("flex", "torch-varlen", "torch-causal-only", *rivals.OUR_BACKENDS)
ON_GPU = [name for name in RIVALS if name not in NOT_ON_GPU]
ON_CPU = [OURS, "torch", "torch-math"]
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384, 32768)}
QUICK_LENGTHS = (256, 512, 1024)
#: The search for the largest length stops where the next call would take longer than this.
LONGEST_CALL = 2.0
MIB = 2**20


class Peak(NamedTuple):
    """Bytes.

    extra: at most at once during the call, beyond what was there and the results
    results: of the output or of the gradients of the case's inputs; larger ones of an implementation are extra
    held: of what is made for the call beforehand: a dense mask, or a dense bias in place of a table
    """

    extra: int
    results: int
    held: int


def peak_of(case: Case, name: str, device: torch.device, threads: int | None = None) -> Peak:
    if device.type == "cuda":
        return _peak_on_gpu(case, name, device)
    with fresh_processes() as processes:
        return processes.submit(_peak_here, case, name, threads or torch.get_num_threads()).result()


def _peak_on_gpu(case: Case, name: str, device: torch.device) -> Peak:
    # A small case first: libraries' workspaces and compiled code are no part of the call.
    for length in (64, case.length):
        inputs = Inputs(_with_length(case, length), device, rows_first=True)
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
    """Run in a fresh process."""
    torch.set_num_threads(threads)
    small = Inputs(_with_length(case, 64))
    rivals.call_of(RIVALS[name].prepare(small), small)()  # threads, code and library scratch are no part of the call
    inputs = Inputs(case)
    given = _resident("VmRSS")
    prepared = RIVALS[name].prepare(inputs)
    held = max(0, _resident("VmRSS") - given)
    call = rivals.call_of(prepared, inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    results = _results_of(inputs)
    call()
    return Peak(_resident("VmHWM") - before - results, results, held)


def fresh_processes() -> ProcessPoolExecutor:
    """One process per task, forked from a server that has imported torch and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def _resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the mark was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _results_of(inputs: Inputs) -> int:
    tensors = [inputs.dout] if inputs.case.direction == "forward" else list(inputs.leaves.values())
    return sum(x.numel() * x.element_size() for x in tensors)


def _with_length(case: Case, length: int) -> Case:
    return Case(case.batch, case.heads, length, case.head_dim, case.mask, case.dtype, case.direction)


class Largest(NamedTuple):
    """stopped_by: "memory", or "time" where longer ones may fit but were not tried."""

    length: int
    stopped_by: str


def largest_length(fits: Callable[[int], float], start: int = 1024, longest: float = LONGEST_CALL) -> Largest:
    """The largest length, to an eighth, for which `fits` returns its seconds instead of raising MemoryError."""
    largest, too_long, length = 0, None, start
    while True:
        try:
            seconds = fits(length)
        except MemoryError:
            too_long = length
        else:
            largest = length
            if too_long is None and 4.0 * seconds > longest:
                return Largest(largest, "time")
        if too_long is None:
            length = 2 * largest
        elif too_long - largest <= max(1, largest // 8):
            return Largest(largest, "memory")
        else:
            length = (largest + too_long) // 2


def _largest_on_gpu(case: Case, name: str, device: torch.device) -> Largest:
    def fits(length: int) -> float:
        try:
            inputs = Inputs(_with_length(case, length), device, rows_first=True)
            call = rivals.call_of(RIVALS[name].prepare(inputs), inputs)
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            return time.perf_counter() - start
        except torch.OutOfMemoryError as error:
            raise MemoryError from error
        finally:
            torch.cuda.empty_cache()

    return largest_length(fits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="short sequences, two masks: under a minute")
    parser.add_argument("--only", nargs="+", choices=MASKS, metavar="MASK")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS, default=["forward", "forward+backward"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="default: ours, torch, torch-math; on a GPU all")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--no-largest", action="store_true", help="skip the search for the largest length (GPU only)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has rows of")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")


def main(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if device.type == "cpu" and sys.platform != "linux":
        print("on a CPU the peak is read from /proc, which only Linux has", file=sys.stderr)
        return 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = arguments.rivals or (ON_GPU if device.type == "cuda" else ON_CPU)
    masks = arguments.only or (("none", "causal+padded") if arguments.quick else MASKS)
    lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS[device.type])
    dtypes = arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])
    sweeps = [(m, t, d, n) for m in masks for t in dtypes for d in arguments.directions for n in names]
    if arguments.resume and arguments.out is not None and arguments.out.exists():
        done = {_key(row) for row in select(read(arguments.out), benchmark="memory")}
        sweeps = [sweep for sweep in sweeps if sweep not in done]
    writer = Writer(arguments.out, machine.about(device, arguments.commit))
    print(" | ".join(f"{name} {value}" for name, value in writer.about.items()), flush=True)
    end = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with progress(len(sweeps)) as advance:
        for number, sweep in enumerate(sweeps):
            if time.monotonic() >= end:
                print(f"time is up: {len(sweeps) - number} of {len(sweeps)} sweeps not run", flush=True)
                break
            finds_largest = not (arguments.no_largest or arguments.quick) and "backward" in sweep[2]
            rows = _sweep(*sweep, lengths, device, finds_largest)
            writer.record(rows)
            print(f"{' '.join(sweep[:3]):40} {sweep[3]:16} {describe(rows)}", flush=True)
            advance(" ".join(sweep))
    return 0


def _key(row: Row) -> tuple[str, ...]:
    return row["mask"], row["dtype"], row["direction"], row["implementation"]


def _sweep(
    mask: str,
    dtype: str,
    direction: str,
    name: str,
    lengths: tuple[int, ...],
    device: torch.device,
    finds_largest: bool,
) -> list[Row]:
    """One row for each length, and one for the largest."""
    rows = []
    for length in lengths:
        case = Case(1, HEADS, length, HEAD_DIM, mask, dtype, direction)
        row = {
            "benchmark": "memory",
            "shape": list(case.shape),
            "mask": mask,
            "dtype": dtype,
            "direction": direction,
            "implementation": name,
            **rivals.version_of(name),
        }
        rows.append(row)
        # Packages raise what they like; KeyboardInterrupt is no Exception.
        try:
            peak = peak_of(case, name, device)
        except Exception as error:
            row["cannot"] = rivals.reason(error)
            break
        row |= {
            "extra_mib": max(0, peak.extra) / MIB,
            "held_mib": peak.held / MIB,
            "results_mib": peak.results / MIB,
        }
    if finds_largest and device.type == "cuda" and "cannot" not in rows[0]:
        try:
            largest = _largest_on_gpu(case, name, device)
        except Exception as error:
            return [*rows, rows[0] | {"benchmark": "memory-largest", "cannot": rivals.reason(error)}]
        fields = {"benchmark": "memory-largest", "largest_length": largest.length, "stopped_by": largest.stopped_by}
        rows.append({k: v for k, v in rows[0].items() if not k.endswith("_mib")} | fields)
    return rows


def describe(rows: list[Row]) -> str:
    sizes = [row for row in rows if "extra_mib" in row]
    cells = [f"{row['shape'][2]}: {summary.mib_of(row):.1f} MiB" for row in sizes]
    exponent = summary.growth_exponent([row["shape"][2] for row in sizes], list(map(summary.mib_of, sizes)))
    if exponent is not None:
        cells.append(f"~ L^{exponent:.2f}")
    cells += [f"largest L {row['largest_length']} ({row['stopped_by']})" for row in rows if "largest_length" in row]
    cells += [f"cannot: {row['cannot']}" for row in rows if "cannot" in row]
    return ", ".join(cells)
