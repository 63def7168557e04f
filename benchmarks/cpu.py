"""CPU speed, memory and error against `F.scaled_dot_product_attention`: ``python benchmarks/cpu.py --help``.

Method: both sides of a case run in one process, one after the other in every round, in reverse order every second
round; a ratio is the median over rounds of (torch's time / ours) of that same round, with its quartiles. On a busy
machine both sides of a round suffer alike. torch is asked for each case in the way that is fastest for it. A result
that is wrong against float64 has no speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import fused_attn  # noqa: E402

SHAPES = ((2, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 4, 8192, 64))
QUICK_SHAPES = SHAPES[:2]
OVERHEAD_SHAPE = (1, 2, 4, 8)
OVERHEAD_CALLS = 100  # in one loop
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKS = ("none", "causal", "padded", "causal+padded", "bias")
DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = ("fused_attn", "torch")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """``bias`` is a float mask (1, H, L, S) that requires grad where there is a backward."""

    shape: tuple[int, int, int, int]
    mask: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.mask} {self.direction}"


class Inputs:
    """Tensors of a case and the best way to say it to either implementation."""

    def __init__(self, case: Case) -> None:
        batch, heads, length, head_dim = case.shape
        generator = torch.Generator().manual_seed(0)
        self.case = case

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

        self.query, self.key, self.value, self.dout = (randn(batch, heads, length, head_dim) for _ in range(4))
        self.ours: dict[str, Any] = {}
        self.torch: dict[str, Any] = {}
        keep = (torch.arange(length) < length // 2).expand(batch, length)
        if case.mask == "causal":
            self.ours["is_causal"] = self.torch["is_causal"] = True
        elif case.mask == "padded":
            self.ours["key_padding_mask"] = ~keep
            self.torch["attn_mask"] = keep[:, None, None, :].clone()
        elif case.mask == "causal+padded":
            self.ours |= {"is_causal": True, "key_padding_mask": ~keep}
            self.torch["attn_mask"] = torch.ones(length, length, dtype=torch.bool).tril() & keep[:, None, None, :]
        elif case.mask == "bias":
            self.ours["attn_mask"] = self.torch["attn_mask"] = randn(1, heads, length, length)
        self._make_leaves()

    def cut_to_head(self, head: int, dtype: torch.dtype) -> None:
        """Keeps one head, in another dtype."""
        for name in ("query", "key", "value", "dout"):
            setattr(self, name, getattr(self, name).detach()[:, head : head + 1].to(dtype))
        if self.case.mask == "bias":
            bias = self.torch["attn_mask"].detach()[:, head : head + 1].to(dtype)
            self.ours["attn_mask"] = self.torch["attn_mask"] = bias
        self._make_leaves()

    def _make_leaves(self) -> None:
        self.leaves = [self.query, self.key, self.value]
        if self.case.mask == "bias":
            self.leaves.append(self.torch["attn_mask"])
        if self.case.direction != "forward":
            for x in self.leaves:
                x.requires_grad_()

    def call(self, implementation: str) -> Call:
        if implementation == "fused_attn":
            function, options = fused_attn.fused_attention, self.ours
        else:
            function, options = scaled_dot_product_attention, self.torch
        query, key, value = self.query, self.key, self.value
        if self.case.direction == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(query, key, value, **options)

            return forward
        return lambda: torch.autograd.grad(function(query, key, value, **options), self.leaves, self.dout)


# ---- Error


def errors_of(case: Case) -> dict[str, float]:
    """Largest error of any output or gradient against float64, relative to the largest entry of that tensor."""
    results = {name: _results(Inputs(case).call(name)()) for name in IMPLEMENTATIONS}
    errors = dict.fromkeys(IMPLEMENTATIONS, 0.0)
    largest = [0.0] * len(results["torch"])
    differences = {name: [0.0] * len(largest) for name in IMPLEMENTATIONS}
    _, num_heads, length, _ = case.shape
    # One head at a time: in float64 a bias with a gradient takes several matrices of scores. Of long ones two suffice.
    for head in range(num_heads) if length < 4096 else (0, num_heads - 1):
        wide = Inputs(case)
        wide.cut_to_head(head, torch.float64)
        truth = _results(wide.call("torch")())
        for index, ref in enumerate(truth):
            largest[index] = max(largest[index], ref.abs().max().item())
            for name in IMPLEMENTATIONS:
                difference = (results[name][index][:, head : head + 1].double() - ref).abs().max().item()
                differences[name][index] = max(differences[name][index], difference)
    for name in IMPLEMENTATIONS:
        errors[name] = max(d / m for d, m in zip(differences[name], largest, strict=True))
    return errors


def _results(returned: Any) -> list[Tensor]:
    return [x.detach() for x in (returned if isinstance(returned, tuple) else (returned,))]


# ---- Time


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def time_of(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Probe:
    """A short piece of fixed work before and after a round: how fast the machine was just then."""

    def __init__(self) -> None:
        self.a = torch.randn(256, 256)
        self.best = min(self() for _ in range(20))

    def __call__(self) -> float:
        return time_of(lambda: torch.mm(self.a, self.a), 3)

    def is_quiet(self) -> bool:
        return self() < 1.3 * self.best


def measure(
    calls: dict[str, Call], rounds: int, budget: float, probe: Probe | None
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call of each, in paired rounds, and how many rounds the probe rejected."""
    first = {name: time_of(call, 1) for name, call in calls.items()}  # warm-up too
    repeats = {name: max(1, math.ceil(2e-3 / seconds)) for name, seconds in first.items()}
    one_round = sum(first[name] * repeats[name] for name in calls)
    rounds = max(3 if one_round < 4 else 2, min(rounds, int(budget / one_round)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    rejected = 0
    number = 0
    while number < rounds:
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        was_quiet = probe is None or probe.is_quiet()
        round_times = {name: time_of(calls[name], repeats[name]) for name in order}
        if not was_quiet or not (probe is None or probe.is_quiet()):
            rejected += 1
            if rejected < 3 * rounds:  # a machine that is never quiet must still finish
                continue
        for name, seconds in round_times.items():
            times[name].append(seconds)
        number += 1
    return times, rejected


# ---- Memory


def extra_memory_here(case: Case, implementation: str, threads: int) -> int:
    """KiB of peak resident memory that one call adds, outputs and gradients included. Run in a fresh process."""
    torch.set_num_threads(threads)
    batch, heads, _, head_dim = case.shape
    small = Case((batch, heads, 64, head_dim), case.mask, case.dtype, case.direction)
    Inputs(small).call(implementation)()  # threads, code and library scratch are no part of the call
    call = Inputs(case).call(implementation)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    result = call()
    peak = _peak_kib()
    del result
    return peak - before


def extra_memory(case: Case, implementation: str, processes: ProcessPoolExecutor) -> float | None:
    """MiB; None where /proc does not tell."""
    if sys.platform != "linux":
        return None
    return processes.submit(extra_memory_here, case, implementation, torch.get_num_threads()).result() / 1024


def fresh_processes() -> ProcessPoolExecutor:
    """One process per task, forked from a server that has imported torch and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- Rows


def machine() -> dict[str, Any]:
    """What a reader must know to judge a figure."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), model
        )
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip() if git.returncode == 0 else "unknown"
    try:
        from fused_attn import _C

        isa = _C.cpu_isa()
    except ImportError:
        isa = "none"
    return {
        "device": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "torch": torch.__version__,
        "fused_attn": fused_attn.__version__,
        "python": platform.python_version(),
        "commit": commit + ("-dirty" if dirty.stdout.strip() else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar where rich is installed and the output is a terminal; otherwise nothing but the result lines."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda label: None
        return
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    from rich.console import Console

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def run_case(
    case: Case, arguments: argparse.Namespace, probe: Probe | None, processes: ProcessPoolExecutor
) -> list[dict[str, Any]]:
    """One row for each implementation; an implementation whose result is wrong has a row without times."""
    error = errors_of(case)
    is_right = error["fused_attn"] <= 2 * error["torch"] + 4 * torch.finfo(DTYPES[case.dtype]).eps
    inputs = Inputs(case)
    rows = [
        {
            "benchmark": "cpu",
            "shape": list(case.shape),
            "mask": case.mask,
            "dtype": case.dtype,
            "direction": case.direction,
            "implementation": name,
            "error": error[name],
        }
        for name in IMPLEMENTATIONS
    ]
    if not is_right:
        print(
            f"{case!s:52} WRONG: error {error['fused_attn']:.1e}, torch's {error['torch']:.1e}; not timed", flush=True
        )
        return rows
    calls = {name: inputs.call(name) for name in IMPLEMENTATIONS}
    times, rejected = measure(calls, arguments.rounds, arguments.seconds, probe)
    memory = {name: None if arguments.no_memory else extra_memory(case, name, processes) for name in IMPLEMENTATIONS}
    low, ratio, high = quartiles([t / o for t, o in zip(times["torch"], times["fused_attn"], strict=True)])
    for row, name in zip(rows, IMPLEMENTATIONS, strict=True):
        p20, median, p80 = quantiles(times[name])
        row |= {
            "median_ms": median * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "rounds": len(times[name]),
            "rejected_rounds": rejected,
            "extra_mib": memory[name],
        }
    rows[0] |= {"ratio": ratio, "ratio_q1": low, "ratio_q3": high}
    error_text = f"{error['fused_attn']:.0e}/{error['torch']:.0e}"
    mib = "/".join("-" if memory[name] is None else f"{memory[name]:.0f}" for name in IMPLEMENTATIONS)
    print(
        f"{case!s:52} {rows[0]['median_ms']:9.3f} {rows[1]['median_ms']:9.3f}   {ratio:5.2f} [{low:.2f}, {high:.2f}]"
        f"  {mib:>10}  {error_text}",
        flush=True,
    )
    return rows


def run_overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
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
            time_of(call, 50)
        times = {name: [] for name in calls}
        end = time.perf_counter() + 2 * arguments.seconds
        while time.perf_counter() < end:
            for name, call in calls.items():
                times[name].append(time_of(call, OVERHEAD_CALLS))
        best = {name: min(values) for name, values in times.items()}
        for name in IMPLEMENTATIONS:
            p20, median, p80 = quantiles(times[name])
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


def print_geometric_means(rows: list[dict[str, Any]]) -> None:
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two small shapes and few rounds: under a minute")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shapes", nargs="*", metavar="B,H,L,D", help="such as 2,8,512,64; empty: overhead only")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--rounds", type=int, help="at most so many rounds a case (default 15, with --quick 5)")
    parser.add_argument("--seconds", type=float, help="at most so long a case (default 1.5, with --quick 0.4)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--probe", action="store_true", help="repeat rounds in which the machine was busy with other work"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the subprocess that measures memory")
    parser.add_argument("--no-overhead", action="store_true", help="skip the per-call overhead")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (5 if arguments.quick else 15)
    arguments.seconds = arguments.seconds or (0.4 if arguments.quick else 1.5)
    arguments.no_memory = arguments.no_memory or arguments.quick
    if arguments.shapes is not None:
        arguments.shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shapes]
        if any(len(shape) != 4 for shape in arguments.shapes):
            parser.error("--shapes: expected B,H,L,D")
    else:
        arguments.shapes = QUICK_SHAPES if arguments.quick else SHAPES
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = machine()
    probe = Probe() if arguments.probe else None
    print(" | ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{'case':52} {'ours ms':>9} {'torch ms':>9}   torch/ours [quartiles]  MiB ours/torch  error ours/torch",
        flush=True,
    )
    cases = [
        Case(tuple(shape), mask, dtype, direction)
        for dtype in arguments.dtype
        for direction in DIRECTIONS
        for shape in arguments.shapes
        for mask in arguments.masks
    ]
    rows: list[dict[str, Any]] = []

    def record(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        if arguments.out:
            # At once: a run that is interrupted keeps what it measured.
            with arguments.out.open("a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in new)

    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with fresh_processes() as processes, progress(len(cases)) as advance:
        for case in cases:
            record(run_case(case, arguments, probe, processes))
            advance(str(case))
    if not arguments.no_overhead:
        record(run_overhead(arguments))
    print_geometric_means(rows)
    if any("median_ms" not in row for row in rows):
        sys.exit("some results are wrong; their speed is not reported")


if __name__ == "__main__":
    main()
