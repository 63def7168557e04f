"""CPU speed, memory and error against `F.scaled_dot_product_attention`: ``python -m benchmarks cpu``.

Method: both sides of a case run in one process, one after the other in every round, in reverse order every second
round; a ratio is the median over rounds of (torch's time / ours) of that same round, with its quartiles. On a busy
machine both sides of a round suffer alike. torch is asked for each case in the way that is fastest for it. A result
that is wrong against float64 has no speed. ``python benchmarks/cpu.py`` is the same command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import fused_attn  # noqa: E402
from benchmarks import cpu_tables, machine, memory, rivals, summary, timing  # noqa: E402
from benchmarks.accuracy import Reference  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.conventions import OURS  # noqa: E402
from benchmarks.inputs import Inputs  # noqa: E402
from benchmarks.progress import progress  # noqa: E402
from benchmarks.rows import Row, Writer  # noqa: E402
from benchmarks.timing import Call  # noqa: E402

SHAPES = ((2, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 4, 8192, 64))
QUICK_SHAPES = SHAPES[:2]
SHORT_SHAPES = tuple((1, 8, length, 64) for length in (8, 16, 32, 64))
SHORT_MASKS = ("none", "causal")
DECODE_SHAPES = ((1, 8, 4096, 64), (1, 8, 65536, 64))  # in the cache, and beyond
OVERHEAD_SHAPE = (1, 2, 4, 8)
OVERHEAD_CALLS = 100  # in one loop
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
DTYPES = tuple(DTYPE_BYTES)
MASKS = ("none", "causal", "padded", "causal+padded", "bias")
DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = (OURS, "torch")
#: masks: the table of README. short, decode: the same for short sequences, and for one query against many keys.
TABLES = ("masks", "short", "decode", "features", "modules", "isa", "step", "overhead")
TIMER = timing.CpuTimer()


def run_case(
    case: Case, arguments: argparse.Namespace, probe: timing.Probe | None, benchmark: str = "cpu"
) -> list[Row]:
    """One row for each implementation; one whose result is wrong has a row without times."""
    inputs = Inputs(case)
    reference = Reference(inputs)
    prepared = {name: rivals.fastest(name, inputs) for name in IMPLEMENTATIONS}
    errors = {name: reference.error(rivals.results_of(one, inputs)) for name, one in prepared.items()}
    rows = {
        name: {
            "benchmark": benchmark,
            "shape": list(case.shape),
            "mask": case.mask,
            "dtype": case.dtype,
            "direction": case.direction,
            "implementation": name,
            "given": prepared[name].given,
            "error": errors[name],
        }
        for name in IMPLEMENTATIONS
    }
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not reference.is_right(error)]
    if wrong:
        print(f"{case!s:52} WRONG, not timed: {', '.join(wrong)}; allowed {reference.allowed:.1e}", flush=True)
        return list(rows.values())
    calls = {name: rivals.call_of(one, inputs) for name, one in prepared.items()}
    is_quiet = (lambda: True) if probe is None else probe.is_quiet
    times, rejected = timing.measure(calls, TIMER, arguments.rounds, arguments.seconds, is_quiet)
    for name, row in rows.items():
        row |= timing.times_of(times[name])
        row["rejected_rounds"] = rejected
        has_memory = benchmark == "cpu" and not arguments.no_memory
        row |= memory_of(case, name) if has_memory else {"extra_mib": None}
    ratios = [theirs / ours for theirs, ours in zip(times["torch"], times[OURS], strict=True)]
    low, ratio, high = timing.quartiles(ratios)
    rows[OURS] |= {"ratio": ratio, "ratio_q1": low, "ratio_q3": high}
    ours, theirs = rows[OURS], rows["torch"]
    mib = "/".join("-" if row["extra_mib"] is None else f"{summary.mib_of(row):.0f}" for row in (ours, theirs))
    print(
        f"{case!s:52} {ours['median_ms']:9.3f} {theirs['median_ms']:9.3f}   {ratio:5.2f} [{low:.2f}, {high:.2f}]"
        f"  {mib:>10}  {ours['error']:.0e}/{theirs['error']:.0e}",
        flush=True,
    )
    return list(rows.values())


def memory_of(case: Case, name: str) -> Row:
    """Peak resident memory that one call adds, results included, and that of what is made for it beforehand."""
    if sys.platform != "linux":  # only there /proc tells
        return {"extra_mib": None}
    peak = memory.peak_of(case, name, torch.device("cpu"))
    return {"extra_mib": (peak.extra + peak.results) / memory.MIB, "held_mib": peak.held / memory.MIB}


def run_overhead(arguments: argparse.Namespace) -> list[Row]:
    """Microseconds of a call whose work is nothing: the best of many short loops, which take turns.

    Whatever else the machine does can only add to such a time, and a loop of a millisecond often escapes it.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(OVERHEAD_SHAPE, generator=generator) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    dout = torch.randn(OVERHEAD_SHAPE, generator=generator)
    functions = {"fused_attn": fused_attn.fused_attention, "torch": scaled_dot_product_attention}

    def no_grad(function: Callable) -> Call:
        return lambda: function(query, key, value)

    def with_grad(function: Callable) -> Call:
        return lambda: function(*leaves)

    def backward(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    rows = []
    print(f"\nper call at {OVERHEAD_SHAPE}, microseconds, best of many: ours, torch, torch / ours")
    kinds = {"forward": no_grad, "forward with grad": with_grad, "forward+backward": backward}
    for label, kind in kinds.items():
        calls = {name: kind(function) for name, function in functions.items()}
        for call in calls.values():
            TIMER.seconds(call, 50)
        times = {name: [] for name in calls}
        end = time.perf_counter() + 2 * arguments.seconds
        while time.perf_counter() < end:
            for name, call in calls.items():
                times[name].append(TIMER.seconds(call, OVERHEAD_CALLS))
        best = {name: min(values) for name, values in times.items()}
        for name in IMPLEMENTATIONS:
            p20, median, p80 = timing.quantiles(times[name])
            row = {
                "benchmark": "cpu-overhead",
                "shape": list(OVERHEAD_SHAPE),
                "mask": "none",
                "dtype": "float32",
                "direction": label,
                "implementation": name,
                "best_ms": best[name] * 1e3,
                "median_ms": median * 1e3,
                "p20_ms": p20 * 1e3,
                "p80_ms": p80 * 1e3,
                "rounds": len(times[name]),
            }
            rows.append(row)
        ours, theirs = (best[name] * 1e6 for name in IMPLEMENTATIONS)
        print(f"{label:20} {ours:7.2f} {theirs:7.2f}   {theirs / ours:5.2f}", flush=True)
    return rows


def run_decode(arguments: argparse.Namespace, probe: timing.Probe | None) -> list[Row]:
    """One query for each head: what counts is how fast keys and values are read."""
    read = cpu_tables.read_gb_per_s()
    print(f"a sum reads {read:.1f} GB/s from main memory")
    rows = []
    for dtype in arguments.dtype:
        for shape in DECODE_SHAPES[: 1 if arguments.quick else None]:
            case = Case(*shape, "decode", dtype, "forward")
            found = run_case(case, arguments, probe, "cpu-decode")
            for row in found:
                if "median_ms" in row:
                    row["gb_per_s"] = case.fewest_bytes(DTYPE_BYTES[dtype]) / row["median_ms"] * 1e-6
                    row["read_gb_per_s"] = read
                    print(f"{row['implementation']:12} {row['gb_per_s']:6.1f} GB/s", flush=True)
            rows += found
    return rows


def print_geometric_means(rows: list[Row]) -> None:
    print("\ngeometric mean of torch / ours over the shapes")
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            cells = []
            for mask in MASKS:
                ratios = [
                    row["ratio"]
                    for row in rows
                    if "ratio" in row
                    and (row["dtype"], row["direction"], row["mask"]) == (dtype, direction, mask)
                    and row["benchmark"] == "cpu"
                ]
                if ratios:
                    cells.append(f"{mask} {statistics.geometric_mean(ratios):.2f}")
            if cells:
                print(f"{dtype:9} {direction:17} {'   '.join(cells)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the two small shapes and few rounds: under a minute")
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE", help=", ".join(TABLES)
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shapes", nargs="*", type=_shape, metavar="B,H,L,D", help="of masks: 2,8,512,64")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--rounds", type=int, help="at most so many rounds a case (default 15, with --quick 5)")
    parser.add_argument("--seconds", type=float, help="at most so long a case (default 1.5, with --quick 0.4)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--probe", action="store_true", help="repeat rounds in which the machine was busy with other work"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the subprocess that measures memory")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")


def _cases(arguments: argparse.Namespace, shapes: Iterable[tuple[int, ...]], masks: Iterable[str]) -> list[Case]:
    return [
        Case(*shape, mask, dtype, direction)
        for dtype in arguments.dtype
        for direction in DIRECTIONS
        for shape in shapes
        for mask in masks
    ]


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected B,H,L,D, got {text}")
    return sizes


def main(arguments: argparse.Namespace) -> int:
    arguments.rounds = arguments.rounds or (5 if arguments.quick else 15)
    arguments.seconds = arguments.seconds or (0.4 if arguments.quick else 1.5)
    arguments.no_memory = arguments.no_memory or arguments.quick
    if arguments.shapes is None:
        arguments.shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    writer = Writer(arguments.out, machine.about("cpu", arguments.commit))
    probe = timing.Probe() if arguments.probe else None
    print(" | ".join(f"{name} {value}" for name, value in writer.about.items()))
    print(
        f"{'case':52} {'ours ms':>9} {'torch ms':>9}   torch/ours [quartiles]  MiB ours/torch  error ours/torch",
        flush=True,
    )
    cases = [
        ("cpu", case) for case in _cases(arguments, arguments.shapes, arguments.masks) if "masks" in arguments.only
    ]
    cases += [("cpu-short", case) for case in _cases(arguments, SHORT_SHAPES, SHORT_MASKS) if "short" in arguments.only]
    with progress(len(cases)) as advance:
        for benchmark, case in cases:
            writer.record(run_case(case, arguments, probe, benchmark))
            advance(str(case))
    if "decode" in arguments.only:
        writer.record(run_decode(arguments, probe))
    if "features" in arguments.only:
        for dtype in arguments.dtype:
            writer.record(cpu_tables.run_features(dtype, arguments))
    if "modules" in arguments.only:
        writer.record(cpu_tables.run_modules(arguments))
    if "isa" in arguments.only:
        writer.record(cpu_tables.run_isas(arguments))
    if "step" in arguments.only:
        writer.record(cpu_tables.run_training_step(arguments))
    if "overhead" in arguments.only:
        writer.record(run_overhead(arguments))
    print_geometric_means(writer.rows)
    if any("median_ms" not in row for row in writer.rows):
        print("some results are wrong; their speed is not reported", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
