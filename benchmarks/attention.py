"""Time and error of one attention call against every rival that is there: ``python -m benchmarks attention``.

Every implementation of a case is first checked against float64. What is wrong, or cannot compute the case, has a row
that says so and no time; the others are timed in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, rivals, timing
from benchmarks.accuracy import Reference
from benchmarks.cases import Case
from benchmarks.conventions import DEVICE_LOST, OURS
from benchmarks.inputs import DTYPES, Inputs
from benchmarks.progress import progress
from benchmarks.rivals import RIVALS, Prepared
from benchmarks.rows import Row, Writer, read, select

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
    refused: Collection[str] = (),
) -> list[Row]:
    """One row for each implementation; of our single kernels only those that can.

    timer: None = check only; refused: backends of ours whose tests are red
    """
    inputs = Inputs(case, device, rows_first=True)
    absent = set(rivals.OUR_BACKENDS) - set(rivals.able_backends(inputs))
    names = [name for name in names if name not in absent]
    rows = {name: _row_of(case, name) for name in names}
    right: dict[str, Prepared] = {}
    for name in names:
        if red := rivals.backends_of(name, inputs).intersection(refused):
            rows[name]["cannot"] = f"tests of {', '.join(sorted(red))} are red"
        else:
            _check(name, inputs, reference, rows, right)
    if timer is None:
        return list(rows.values())
    calls = {}
    for name in list(right):
        _make_call(name, inputs, rows, right, calls)

    def drop(name: str, error: Exception) -> None:
        rows[name]["failed"] = rivals.reason(error)
        del right[name]

    measured, kind = timing.measure_those_that_can(calls, timer, rounds, seconds, drop), timer.kind
    _check_device(device, rows.values())
    if device.type == "cuda" and min(map(_median, measured.times.values()), default=1.0) < timing.WORTH_A_GRAPH:
        graphs = _graphs(calls, right, inputs, rows)
        if len(graphs) == len(calls):  # all or none: the two ways are not comparable
            try:
                measured, kind = timing.measure(graphs, timer, rounds, seconds), "graph"
            except timing.CallError:  # the times by events are as good as they were
                _check_device(device, rows.values())
    for name, times in measured.times.items():
        rows[name] |= timing.times_of(times) | {"timing": kind}
        rows[name] |= _rates(case, _median(times))
        if OURS in measured.times and name != OURS:
            ratios = [theirs / ours for theirs, ours in zip(times, measured.times[OURS], strict=True)]
            low, ratio, high = timing.quartiles(ratios)
            rows[name] |= {"over_ours": ratio, "over_ours_q1": low, "over_ours_q3": high}
    return list(rows.values())


def _check(name: str, inputs: Inputs, reference: Reference, rows: dict[str, Row], right: dict[str, Prepared]) -> None:
    """Adds to `right` what is; a function of its own, so that no variable keeps what is dropped later."""
    row = rows[name]
    try:
        prepared = rivals.fastest(name, inputs)
        row |= {"given": prepared.given} | ({"problem": prepared.problem} if prepared.problem else {})
        error = reference.error(rivals.results_of(prepared, inputs), ignores_padding=prepared.problem is not None)
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    except Exception as problem:
        row["cannot"] = rivals.reason(problem)
        _check_device(inputs.device, rows.values())
        return
    row |= {"error": error, "allowed": reference.allowed, "is_right": reference.is_right(error)}
    if name == OURS:
        row["backend"] = rivals.our_backend(inputs)
    if row["is_right"]:
        right[name] = prepared


def _make_call(
    name: str, inputs: Inputs, rows: dict[str, Row], right: dict[str, Prepared], calls: dict[str, timing.Call]
) -> None:
    try:
        call = rivals.call_of(right[name], inputs)
        call()
    except Exception as problem:
        rows[name]["failed"] = rivals.reason(problem)
        del right[name]
        _check_device(inputs.device, rows.values())
    else:
        calls[name] = call


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
        **rivals.version_of(name),
    }


def _rates(case: Case, seconds: float) -> Row:
    return {"tflops": case.flops / seconds / 1e12, "effective_tflops": case.effective_flops / seconds / 1e12}


def _median(times: list[float]) -> float:
    return timing.quantiles(times)[1]


def _graphs(
    calls: dict[str, timing.Call], right: dict[str, Prepared], inputs: Inputs, rows: dict[str, Row]
) -> dict[str, timing.Call]:
    """Fewer than there are calls if one cannot be captured."""
    graphs = {}
    for name in calls:
        try:
            graphs[name] = timing.graph_of(lambda name=name: rivals.call_of(right[name], inputs), inputs.device)
        except Exception:
            _check_device(inputs.device, rows.values())
            break
    return graphs


def _check_device(device: torch.device, rows: Iterable[Row]) -> None:
    """Raises DeviceLostError with all rows, if the device no longer finishes what it is given."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        for row in rows:
            if "cannot" not in row and "failed" not in row:
                row["failed"] = "another implementation of this case broke the device"
        raise DeviceLostError(list(rows)) from error
    # Refused while a stream is being captured, which says nothing about the device.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def describe(rows: list[Row]) -> str:
    """One line: ours, then the fastest rivals first, then who could not or was wrong."""
    timed = sorted((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"])
    cells = []
    for row in sorted(timed, key=lambda row: row["implementation"] != OURS):
        cell = f"{row['implementation']} {row['median_ms']:.3f} ms {row['effective_tflops']:.3g} TF"
        cell += f" ({row['over_ours']:.2f}x)" if "over_ours" in row else ""
        cells.append(cell + (" other problem" if "problem" in row else ""))
    wrong = [f"{row['implementation']} {row['error']:.1e}" for row in rows if row.get("is_right") is False]
    if wrong:
        cells.append(f"WRONG: {', '.join(wrong)}")
    if not timed:
        cells += [f"{row['implementation']} right" for row in rows if row.get("is_right")]
    for field in ("failed", "cannot"):
        if names := [row["implementation"] for row in rows if field in row]:
            cells.append(f"{field}: {' '.join(names)}")
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
    parser.add_argument("--tokens", type=int, help="of all sequences of a batch together; default: 16384 on a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out rivals that are compiled for every shape")
    parser.add_argument("--rounds", type=int, help="at most so many rounds a case (default 30, with --quick 5)")
    parser.add_argument("--seconds", type=float, help="at most so long a case (default 1, with --quick 0.2)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--refuse", nargs="+", choices=rivals.OUR_BACKENDS.values(), default=[], metavar="BACKEND",
                        help="of ours, whose tests are red: neither checked nor timed")  # fmt: skip
    parser.add_argument("--check-only", action="store_true", help="errors, no times")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has rows of")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")


def rivals_of(case: Case, arguments: argparse.Namespace) -> list[str]:
    """Those that were named; by default those whose time on the case is worth its cost."""
    if arguments.rivals:
        return [name for name in arguments.rivals if RIVALS[name].is_for(case)]
    if torch.device(arguments.device).type == "cpu":
        # The packages have no CPU kernels, and torch itself chooses its only fast one.
        return [OURS, "torch"] + ["torch-causal-only"] * RIVALS["torch-causal-only"].is_for(case)
    skipped = () if case.length in COMPILED_LENGTHS and not arguments.no_compile else COMPILED_RIVALS
    return [name for name, rival in RIVALS.items() if name not in skipped and rival.is_for(case)]


def scale_of(arguments: argparse.Namespace) -> cases.Scale:
    if torch.device(arguments.device).type == "cuda":
        scale = cases.GPU_QUICK if arguments.quick else cases.GPU
    else:
        scale = cases.CPU_QUICK if arguments.quick else cases.CPU
    chosen = {"dtypes": arguments.dtype, "head_dims": arguments.head_dim, "lengths": arguments.lengths}
    scale = scale._replace(**{name: tuple(values) for name, values in chosen.items() if values})
    return scale._replace(tokens=arguments.tokens or scale.tokens)


def main(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    todo = list(cases.table(scale_of(arguments), arguments.only, arguments.directions))
    names = {case: rivals_of(case, arguments) for case in todo}
    if arguments.resume and arguments.out is not None and arguments.out.exists():
        done = {(_key(row), row["implementation"]) for row in select(read(arguments.out), benchmark="attention")}
        names = {case: _missing(case, own, done) for case, own in names.items()}
        todo = [case for case in todo if names[case]]
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
                rows = _rows_of(case, names[case], device, timer, arguments)
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
    wrong = [row for row in select(writer.rows, implementation=OURS) if "failed" in row or not row.get("is_right")]
    for row in wrong:
        print(f"ours has no right result: {row['shape']} {row['dtype']} {row['mask']} {row['direction']}: "
              f"{row.get('cannot') or row.get('failed') or row['error']}")  # fmt: skip
    return 1 if wrong else 0


def _missing(case: Case, names: list[str], done: set[tuple]) -> list[str]:
    """Those without a row, and ours, which they are compared with; nobody if only single kernels of ours have none,
    because those have rows only where several can."""
    missing = [name for name in names if (_key(_row_of(case, name)), name) not in done]
    if all(name in rivals.OUR_BACKENDS for name in missing):
        return []
    return missing if OURS in missing or OURS not in names else [OURS, *missing]


def _rows_of(
    case: Case, names: list[str], device: torch.device, timer: timing.Timer | None, arguments: argparse.Namespace
) -> list[Row]:
    rounds = arguments.rounds or (5 if arguments.quick else 30)
    seconds = arguments.seconds or (0.2 if arguments.quick else 1.0)
    step = "the reference"
    try:
        reference = Reference(Inputs(case, device, rows_first=True))
        step = "all together"
        rows = run_case(case, device, names, reference, timer, rounds, seconds, arguments.refuse)
    except DeviceLostError:
        raise
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    except Exception as error:
        why = {"failed": f"{step}: {rivals.reason(error)}"}
        rows = [_row_of(case, name) | why for name in names if name not in rivals.OUR_BACKENDS]
    _check_device(device, rows)
    return rows


def _key(row: dict[str, Any]) -> tuple:
    return (*row["shape"], row["mask"], row["dtype"], row["direction"])
