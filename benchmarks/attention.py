"""Time and error of one attention call, ours and every rival's: ``python -m benchmarks attention``.

Every implementation of a case is first compared with float64. An implementation that is wrong, or that cannot compute
the case, gets a row with the reason and without a time. All others are timed in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from benchmarks import cases, extras, machine, rivals, session, summary, timing
from benchmarks.accuracy import Reference
from benchmarks.cases import Case
from benchmarks.conventions import DEVICE_LOST, OURS
from benchmarks.inputs import DTYPES, Inputs
from benchmarks.rivals import RIVALS, Prepared
from benchmarks.rows import Row, select
from benchmarks.session import Session

#: These rivals compile a quarter of a minute for every shape, so they are measured at these lengths only.
COMPILED_RIVALS, COMPILED_LENGTHS = ("flex",), (2048, 8192)


class DeviceLostError(Exception):
    """A kernel has made the GPU unusable for this process. The argument is the rows of the case."""


def run_case(
    case: Case, device: torch.device, names: list[str], reference: Reference, timer: timing.Timer | None, rounds: int,
    seconds: float, refused: Collection[str] = (), rows_first: bool = True,
) -> list[Row]:  # fmt: skip
    """Checks and times the implementations of one case, and returns one row for each.

    Args:
        names: of `RIVALS`. A single backend of ours gets a row only if at least two backends can compute the case.
        timer: None to check without timing.
        rounds, seconds: at most this many rounds, and about this long for all implementations together.
        refused: backends of ours whose tests have failed. They are neither checked nor timed.
        rows_first: see `Inputs`.
    """
    inputs = Inputs(case, device, rows_first)
    absent = set(rivals.OUR_BACKENDS) - set(rivals.able_backends(inputs, refused))
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
        try:
            calls[name] = rivals.call_of(right[name], inputs)
            calls[name]()
        except Exception as problem:  # Packages raise exceptions of any class.
            rows[name]["failed"] = rivals.reason(problem)
            calls.pop(name, None)
            del right[name]
            _check_device(device, rows.values())

    def drop(name: str, error: Exception) -> None:
        rows[name]["failed"] = rivals.reason(error)
        del right[name]

    times, kind = timing.measure_those_that_can(calls, timer, rounds, seconds, drop), timer.kind
    _check_device(device, rows.values())
    shortest = min((timing.quantiles(own)[1] for own in times.values()), default=1.0)
    if device.type == "cuda" and shortest < timing.WORTH_A_GRAPH:
        # All implementations are timed as graphs, or none is: times of graphs and times of events differ.
        try:
            graphs = {
                name: timing.graph_of(lambda name=name: rivals.call_of(right[name], inputs), device) for name in calls
            }
            times, kind = timing.measure(graphs, timer, rounds, seconds), "graph"
        except Exception:  # A call cannot be captured or replayed, so the times of events stay.
            _check_device(device, rows.values())
    for name, fields in timing.fields_of(times).items():
        per_tera = fields["median_ms"] * 1e9
        rates = {"tflops": case.flops / per_tera, "effective_tflops": case.effective_flops / per_tera}
        rows[name] |= fields | {"timing": kind} | rates
    return list(rows.values())


def _check(name: str, inputs: Inputs, reference: Reference, rows: dict[str, Row], right: dict[str, Prepared]) -> None:
    """Prepares and checks one implementation; if its results are right, adds it to `right`.

    This is a function of its own so that its local variables free their tensors when it returns.
    """
    row = rows[name]
    try:
        prepared = rivals.fastest(name, inputs)
        row |= {"given": prepared.given} | ({"problem": prepared.problem} if prepared.problem else {})
        other_dropout = inputs.case.dropout_p > 0 and not name.startswith(OURS)
        error = reference.error(rivals.results_of(prepared, inputs), prepared.problem is not None, other_dropout)
    except Exception as problem:  # Packages raise exceptions of any class.
        row["cannot"] = rivals.reason(problem)
        _check_device(inputs.device, rows.values())
        return
    allowed, is_right = reference.allowed_error(other_dropout), reference.is_right(error, other_dropout)
    row |= {"error": error, "allowed": allowed, "is_right": is_right}
    if name == OURS:
        row["backend"] = rivals.our_backend(inputs)
    if row["is_right"]:
        right[name] = prepared


def _row_of(case: Case, name: str) -> Row:
    about = {name: getattr(case, name) for name in ("seqlen_q", "kv_heads", "mask", "dtype", "direction")}
    about = {"benchmark": "attention", "shape": list(case.shape)} | about
    return about | {"implementation": name} | rivals.version_of(name)


def _check_device(device: torch.device, rows: Iterable[Row]) -> None:
    """Raises DeviceLostError if the GPU can no longer finish its work. Empties torch's cache otherwise."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        for row in rows:
            if "cannot" not in row and "failed" not in row:
                row["failed"] = "another implementation of this case broke the device"
        raise DeviceLostError(list(rows)) from error
    # torch refuses to empty the cache while a stream is captured. The device is well nevertheless.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def describe(rows: list[Row]) -> str:
    """One line: the time of ours, those of the rivals from fast to slow, then who is wrong, has failed or cannot."""
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


#: Options that choose among cases of cases.py and implementations.
NOT_OF_EXTRAS = ("only", "shapes", "directions", "rivals", "refuse", "head_dim", "lengths", "tokens")
#: The table that has every mask at several lengths, and the tables for a CPU.
LENGTH, CPU = "attention", (*cases.FIXED, *extras.TABLES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, quick="few sizes and rounds")
    parser.add_argument("--tables", nargs="+", choices=(LENGTH, "cpu", *CPU), default=[LENGTH], metavar="TABLE",
                        help=f"{LENGTH}: every mask at several lengths; cpu: all of {', '.join(CPU)}")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=cases.MASKS, metavar="MASK",
                        help=f"masks (all; on a CPU all but {', '.join(cases.FEATURES)})")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="B,H,L,D", help="shapes of table masks")
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS, help="directions (those of the table)")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="implementations (all; on a CPU ours and torch's)")
    parser.add_argument("--check-only", action="store_true", help="measure errors, but no times")
    parser.add_argument("--refuse", nargs="+", choices=rivals.OUR_BACKENDS.values(), default=[], metavar="BACKEND",
                        help="backends of ours that are not run, because their tests have failed")  # fmt: skip
    group = parser.add_argument_group(f"table {LENGTH}")
    group.add_argument("--head-dim", nargs="+", type=session.whole)
    group.add_argument("--lengths", nargs="+", type=session.whole)
    group.add_argument("--tokens", type=session.whole, help="batch size times length (16384 on a GPU)")
    group.add_argument("--no-compile", action="store_true", help="leave out rivals that compile for every shape")


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(session.whole, text.split(",")))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected B,H,L,D, got {text!r}")
    return sizes


def rivals_of(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The implementations of --rivals; by default those that are worth their time on this case."""
    if arguments.rivals:
        return [name for name in arguments.rivals if RIVALS[name].is_for(case)]
    if torch.device(arguments.device).type == "cpu":
        # The other packages have no CPU kernels. torch has one fast CPU kernel, and chooses it by itself.
        return [OURS, "torch"] + ["torch-causal-only"] * RIVALS["torch-causal-only"].is_for(case)
    skipped = () if case.length in COMPILED_LENGTHS and not arguments.no_compile else COMPILED_RIVALS
    return [name for name, rival in RIVALS.items() if name not in skipped and rival.is_for(case)]


def scale_of(arguments: argparse.Namespace) -> cases.Scale:
    """The sizes of the table: those for the device and --quick, changed by the other options."""
    is_gpu = torch.device(arguments.device).type == "cuda"
    scales = (cases.GPU, cases.GPU_QUICK) if is_gpu else (cases.CPU, cases.CPU_QUICK)
    scale = scales[arguments.quick]
    chosen = {"dtypes": arguments.dtype, "head_dims": arguments.head_dim, "lengths": arguments.lengths}
    scale = scale._replace(**{name: tuple(values) for name, values in chosen.items() if values})
    return scale._replace(tokens=arguments.tokens or scale.tokens)


class Step(NamedTuple):
    """A case of a table, and the names of the implementations that are measured on the case."""

    table: str
    case: Case
    names: list[str]


def steps_of(tables: Iterable[str], arguments: argparse.Namespace, earlier: list[Row]) -> list[Step]:
    """The cases of these tables, each with the implementations that have no row in `earlier`."""
    is_gpu = torch.device(arguments.device).type == "cuda"
    masks = arguments.only or [mask for mask in cases.MASKS if is_gpu or mask not in cases.FEATURES]
    fields = ("benchmark", "mask", "dtype", "direction", "implementation")
    done = {(*map(row.get, fields), *row["shape"]) for row in earlier if "shape" in row}
    steps = []
    for table in tables:
        if table == LENGTH:
            found = cases.table(scale_of(arguments), masks, arguments.directions or ("forward", "backward"))
        else:
            fixed = cases.FIXED[table]
            shapes = arguments.shapes if arguments.shapes and table == "masks" else fixed.shapes
            shapes = shapes[: fixed.quick] if arguments.quick else shapes
            directions = arguments.directions or fixed.directions
            fixed = fixed._replace(shapes=tuple(shapes), directions=tuple(directions))
            found = fixed.cases(arguments.dtype or scale_of(arguments).dtypes, masks)
        for case in found:
            names = _missing(table, case, rivals_of(case, arguments), done)
            steps += [Step(table, case, names)] if names else []
    return steps


def main(arguments: argparse.Namespace) -> int:
    run = Session(arguments)
    tables = [one for table in arguments.tables for one in (CPU if table == "cpu" else (table,))]
    arguments.rounds, arguments.seconds = session.limits(arguments, quick=(3, 0.05), full=(30, 1.0))
    todo = steps_of([table for table in tables if table not in extras.TABLES], arguments, run.earlier)
    others = _extra_tables(tables, arguments, run.device)
    if not (todo or others or run.earlier):
        raise SystemExit("no case is left: expected tables, masks, sizes and rivals that go together, got none that do")
    timer = None if arguments.check_only else timing.timer_for(run.device)
    peaks: dict[str, float] = {}
    copy_rate = 0.0
    if timer is not None:
        for dtype in dict.fromkeys(step.case.dtype for step in todo):
            peaks[dtype] = machine.matmul_tflops(run.device, dtype, run.is_quick)
            print(f"{dtype} matmul {peaks[dtype]:.3g} TFLOP/s", flush=True)
        if any(step.case.mask == "decode" for step in todo):
            copy_rate = machine.copy_gb_per_s(run.device, run.is_quick)
            print(f"copy {copy_rate:.4g} GB/s", flush=True)
    for step in run.steps(todo, lambda step: str(step.case)):
        case = step.case
        try:
            rows = _rows_of(step, run.device, timer, arguments)
        except DeviceLostError as lost:
            run.record(lost.args[0], f"{case} | the device no longer answers")
            return DEVICE_LOST
        for row in rows:
            if "effective_tflops" in row:
                row["matmul_tflops"] = peaks[case.dtype]
                row["matmul_fraction"] = row["effective_tflops"] / peaks[case.dtype]
            if "median_ms" in row and case.mask == "decode":
                row["gb_per_s"] = case.fewest_bytes(DTYPES[case.dtype].itemsize) / row["median_ms"] / 1e6
                row["copy_gb_per_s"] = copy_rate
        run.record(rows, f"{case} | {describe(rows)}")
    # --resume measures these tables again, because one row does not tell that a table is complete.
    for table in run.steps(others):
        for rows in extras.TABLES[table](arguments):
            run.record(rows, f"{table} | {extras.describe(rows)}")
    print("\n".join(summary.ratio_lines(run.rows)))
    ours = [row for row in select(run.rows, implementation=OURS) if row["benchmark"] not in extras.TABLES]
    wrong = [row for row in ours if "failed" in row or not row.get("is_right")]
    for row in wrong:
        print(f"ours has no right result: {row['shape']} {row['dtype']} {row['mask']} {row['direction']}: "
              f"{row.get('cannot') or row.get('failed') or row['error']}")  # fmt: skip
    return 1 if wrong else 0


def _extra_tables(tables: Iterable[str], arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Those of the tables that are in extras.py. Ends the command if they cannot be measured on the device, and says
    which options they do not have."""
    found = [table for table in tables if table in extras.TABLES]
    if device.type != "cpu" and (wrong := [table for table in found if table != "overhead"]):
        raise SystemExit(f"--device: expected cpu for the tables {', '.join(wrong)}, got {arguments.device!r}")
    ignored = [name for name in NOT_OF_EXTRAS if getattr(arguments, name)]
    if found and ignored:
        print(f"no effect on the tables {', '.join(found)}: {', '.join(map(_option, ignored))}", file=sys.stderr)
    if found and arguments.check_only:
        print(f"--check-only: leaves out the tables {', '.join(found)}, which have only times", file=sys.stderr)
    return [] if arguments.check_only else found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _missing(table: str, case: Case, names: list[str], done: set[tuple]) -> list[str]:
    """The names without a row in `done`, and ours, because ratios need ours in the same run; all if ours has no row.

    The result is empty if only single backends of ours have no row. They have rows only if several backends can compute
    the case, so a missing row does not mean that the case has not been measured.
    """
    about = table, case.mask, case.dtype, case.direction
    missing = [name for name in names if (*about, name, *case.shape) not in done]
    if all(name in rivals.OUR_BACKENDS for name in missing):
        return []
    if OURS not in names:
        return missing
    return names if OURS in missing else [OURS, *missing]


def _rows_of(step: Step, device: torch.device, timer: timing.Timer | None, arguments: argparse.Namespace) -> list[Row]:
    """The rows of one case. An error that concerns the whole case becomes the field "failed" of every row."""
    case, names, rows_first = step.case, step.names, step.table == LENGTH
    at = "the reference"
    try:
        reference = Reference(Inputs(case, device, rows_first))
        at = "all together"
        limits = arguments.rounds, arguments.seconds
        rows = run_case(case, device, names, reference, timer, *limits, arguments.refuse, rows_first)
    except DeviceLostError:
        raise
    except Exception as error:  # Packages raise exceptions of any class.
        why = {"failed": f"{at}: {rivals.reason(error)}"}
        rows = [_row_of(case, name) | why for name in names if name not in rivals.OUR_BACKENDS]
    for row in rows:
        row["benchmark"] = step.table
    _check_device(device, rows)
    return rows
