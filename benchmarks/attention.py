"""Time and error of one attention call against every rival that is there: ``python -m benchmarks attention``.

Every implementation of a case is first checked against float64. What is wrong, or cannot compute the case, has a row
that says so and no time; the others are timed in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import fused_attn
from benchmarks import cases, machine, rivals, timing
from benchmarks.accuracy import Reference
from benchmarks.cases import Case
from benchmarks.conventions import DEVICE_LOST, OURS
from benchmarks.inputs import DTYPES, Inputs
from benchmarks.progress import progress
from benchmarks.rivals import RIVALS, Prepared
from benchmarks.rows import Row, Writer, read

#: Rivals that are compiled anew for every shape, a quarter of a minute each, are asked at these lengths only.
COMPILED_RIVALS, COMPILED_LENGTHS = ("flex",), (2048, 8192)


class DeviceLostError(Exception):
    """A kernel has failed in a way that ends the process's use of the GPU."""


def run_case(
    case: Case,
    device: torch.device,
    names: list[str],
    reference: Reference,
    timer: timing.Timer | None,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """One row for each implementation. timer: None = check only."""
    inputs = Inputs(case, device, rows_first=True)
    rows = {name: _row_of(case, name) for name in names}
    right: dict[str, Prepared] = {}
    for name in names:
        try:
            prepared = RIVALS[name].prepare(inputs)
            error = reference.error(rivals.results_of(prepared, inputs))
        # Packages raise what they like; KeyboardInterrupt is no Exception.
        except Exception as problem:
            rows[name]["cannot"] = rivals.reason(problem)
            _check_device(device, rows)
            continue
        rows[name] |= {"error": error, "allowed": reference.allowed, "is_right": reference.is_right(error)}
        if name == OURS:
            rows[name]["backend"] = _backend(inputs)
        if reference.is_right(error):
            right[name] = prepared
    if timer is None or not right:
        return list(rows.values())
    calls, kind = {}, timer.kind
    for name, prepared in right.items():
        try:
            calls[name] = rivals.call_of(prepared, inputs)
            calls[name]()
        except Exception as problem:
            rows[name]["cannot"] = rivals.reason(problem)
            _check_device(device, rows)
            calls.pop(name, None)
    measured = _measure(calls, timer, rounds, seconds, rows)
    if device.type == "cuda" and min(map(_median, measured.times.values())) < timing.WORTH_A_GRAPH:
        graphs = _graphs(calls, right, inputs, rows)
        if len(graphs) == len(calls):  # all or none: the two ways are not comparable
            measured, kind = timing.measure(graphs, timer, rounds, seconds), "graph"
    for name, times in measured.times.items():
        rows[name] |= timing.times_of(times) | {"timing": kind}
        rows[name] |= _rates(case, _median(times))
        if OURS in measured.times and name != OURS:
            ratios = [theirs / ours for theirs, ours in zip(times, measured.times[OURS], strict=True)]
            low, ratio, high = timing.quartiles(ratios)
            rows[name] |= {"over_ours": ratio, "over_ours_q1": low, "over_ours_q3": high}
    return list(rows.values())


def _measure(
    calls: dict[str, timing.Call], timer: timing.Timer, rounds: int, seconds: float, rows: dict[str, Row]
) -> timing.Measured:
    """Without the last ones, should the memory not suffice for all at once: those of `RIVALS` that need most."""
    while True:
        try:
            return timing.measure(calls, timer, rounds, seconds)
        except torch.OutOfMemoryError:
            if len(calls) == 1:
                raise
            last, _ = calls.popitem()
            rows[last]["cannot"] = "out of memory beside the others"
            torch.cuda.empty_cache()


def _row_of(case: Case, name: str) -> Row:
    return {
        "benchmark": "attention",
        "shape": list(case.shape),
        "seqlen_q": case.seqlen_q,
        "kv_heads": case.kv_heads,
        "mask": case.mask,
        "dtype": case.dtype,
        "direction": case.direction,
        "implementation": name,
        "version": rivals.version_of(name),
    }


def _rates(case: Case, seconds: float) -> Row:
    return {"tflops": case.flops / seconds / 1e12, "effective_tflops": case.effective_flops / seconds / 1e12}


def _median(times: list[float]) -> float:
    return timing.quantiles(times)[1]


def _backend(inputs: Inputs) -> str | None:
    """Which kernel ours was, where `explain` can tell."""
    if inputs.case.is_packed:
        return None
    options = rivals.our_options(inputs)
    return fused_attn.explain(inputs.query, inputs.key, inputs.value, **options).chosen


def _graphs(
    calls: dict[str, timing.Call], right: dict[str, Prepared], inputs: Inputs, rows: dict[str, Row]
) -> dict[str, timing.Call]:
    """Fewer than there are calls if one cannot be captured."""
    graphs = {}
    for name in calls:
        try:
            graphs[name] = timing.graph_of(lambda name=name: rivals.call_of(right[name], inputs), inputs.device)
        except Exception:
            _check_device(inputs.device, rows)
            break
    return graphs


def _check_device(device: torch.device, rows: dict[str, Row]) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        for row in rows.values():
            row.setdefault("cannot", "not run: another implementation of this case broke the device")
        raise DeviceLostError(list(rows.values())) from error


def describe(rows: list[Row]) -> str:
    """One line: ours, then the fastest rivals first, then who could not or was wrong."""
    timed = sorted((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"])
    cells = []
    for row in sorted(timed, key=lambda row: row["implementation"] != OURS):
        cell = f"{row['implementation']} {row['median_ms']:.3f} ms {row['effective_tflops']:.3g} TF"
        cells.append(cell + (f" ({row['over_ours']:.2f}x)" if "over_ours" in row else ""))
    wrong = [f"{row['implementation']} {row['error']:.1e}" for row in rows if row.get("is_right") is False]
    if wrong:
        cells.append(f"WRONG: {', '.join(wrong)}")
    if not timed:
        cells += [f"{row['implementation']} right" for row in rows if row.get("is_right")]
    cannot = [row["implementation"] for row in rows if "cannot" in row]
    if cannot:
        cells.append(f"cannot: {' '.join(cannot)}")
    return " | ".join(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds: under a minute")
    parser.add_argument("--only", nargs="+", choices=cases.MASKS, default=list(cases.MASKS), metavar="MASK")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--head-dim", nargs="+", type=int)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS, default=["forward", "backward"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="default: all; on a CPU ours and torch's")
    parser.add_argument("--rounds", type=int, help="at most so many rounds a case (default 30, with --quick 5)")
    parser.add_argument("--seconds", type=float, help="at most so long a case (default 1, with --quick 0.2)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--check-only", action="store_true", help="errors, no times")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that --out has rows of")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")


def rivals_of(case: Case, arguments: argparse.Namespace) -> list[str]:
    """Those that were named; by default those whose time on the case is worth its cost."""
    if arguments.rivals:
        return arguments.rivals
    if torch.device(arguments.device).type == "cpu":
        # The packages have no CPU kernels, and torch itself chooses its only fast one.
        return [OURS, "torch"]
    skipped = () if case.length in COMPILED_LENGTHS else COMPILED_RIVALS
    return [name for name in RIVALS if name not in skipped and (case.is_packed or name != "torch-varlen")]


def scale_of(arguments: argparse.Namespace) -> cases.Scale:
    if torch.device(arguments.device).type == "cuda":
        scale = cases.GPU_QUICK if arguments.quick else cases.GPU
    else:
        scale = cases.CPU_QUICK if arguments.quick else cases.CPU
    chosen = {"dtypes": arguments.dtype, "head_dims": arguments.head_dim, "lengths": arguments.lengths}
    return scale._replace(**{name: tuple(values) for name, values in chosen.items() if values})


def main(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    todo = list(cases.table(scale_of(arguments), arguments.only, arguments.directions))
    if arguments.resume and arguments.out is not None and arguments.out.exists():
        done = {_key(row) for row in read(arguments.out) if row["benchmark"] == "attention"}
        todo = [case for case in todo if _key(_row_of(case, OURS)) not in done]
    writer = Writer(arguments.out, machine.about(device, arguments.commit))
    print(" | ".join(f"{name} {value}" for name, value in writer.about.items()), flush=True)
    peaks: dict[str, float] = {}
    timer = None if arguments.check_only else timing.timer_for(device)
    if timer is not None:
        for dtype in dict.fromkeys(case.dtype for case in todo):
            peaks[dtype] = machine.matmul_tflops(device, dtype, 0.1 if arguments.quick else 0.5)
            print(f"{dtype} matmul {peaks[dtype]:.3g} TFLOP/s", flush=True)
        if any(case.mask == "decode" for case in todo):
            copy_rate = machine.copy_gb_per_s(device, 0.1 if arguments.quick else 0.5)
            print(f"copy {copy_rate:.4g} GB/s", flush=True)
    end = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with progress(len(todo)) as advance:
        for number, case in enumerate(todo):
            if time.monotonic() >= end:
                print(f"time is up: {len(todo) - number} of {len(todo)} cases not run", flush=True)
                break
            try:
                rows = _rows_of(case, device, timer, arguments)
            except DeviceLostError as lost:
                writer.record(lost.args[0])
                print(f"{case} | the device no longer answers", flush=True)
                return DEVICE_LOST
            for row in rows:
                if "effective_tflops" in row:
                    row["matmul_tflops"] = peaks[case.dtype]
                    row["matmul_fraction"] = row["effective_tflops"] / peaks[case.dtype]
                if "median_ms" in row and case.mask == "decode":
                    row["gb_per_s"] = case.fewest_bytes(DTYPES[case.dtype].itemsize) / row["median_ms"] / 1e6
                    row["copy_gb_per_s"] = copy_rate
            writer.record(rows)
            print(f"{case} | {describe(rows)}", flush=True)
            advance(str(case))
    wrong = [row for row in writer.rows if row["implementation"] == OURS and not row.get("is_right", False)]
    for row in wrong:
        print(f"ours has no right result: {row['shape']} {row['dtype']} {row['mask']} {row['direction']}: "
              f"{row.get('cannot') or row['error']}")  # fmt: skip
    return 1 if wrong else 0


def _rows_of(case: Case, device: torch.device, timer: timing.Timer | None, arguments: argparse.Namespace) -> list[Row]:
    names = rivals_of(case, arguments)
    rounds = arguments.rounds or (5 if arguments.quick else 30)
    seconds = arguments.seconds or (0.2 if arguments.quick else 1.0)
    try:
        reference = Reference(Inputs(case, device, rows_first=True))
    except torch.OutOfMemoryError as error:
        return [_row_of(case, name) | {"cannot": f"its reference: {rivals.reason(error)}"} for name in names]
    rows = run_case(case, device, names, reference, timer, rounds, seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _key(row: dict[str, Any]) -> tuple:
    return (*row["shape"], row["mask"], row["dtype"], row["direction"])
