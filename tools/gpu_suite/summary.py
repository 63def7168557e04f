"""The text with which the suite ends: all rows in a few lines, failed tests, and the verdict on each stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import rows
from benchmarks.conventions import OURS
from benchmarks.rows import Row, select
from benchmarks.summary import fastest_others, groups, mib_of
from tools.gpu_suite import reports
from tools.gpu_suite.suite import STOPPED

#: The verdict of a stage that was not begun.
NOT_RUN = "not run: the time is up"
#: What tells the size of a row of the benchmark "generation"; the first that a row has counts.
SIZES = ("new_tokens", "shape", "mix", "length")
#: A summary has this many lines about problems at most. Often only the end of an output is kept, and the whole summary
#: has to fit into it.
MOST_LINES = 24
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both", "bfloat16": "bf16", "float16": "fp16"}


class Outcome(NamedTuple):
    """What became of a stage."""

    stage: str
    verdict: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage:28} {self.verdict:44} {self.seconds:6.0f} s"


def of_run(out: Path, outcomes: list[Outcome], minutes: float | None) -> list[str]:
    """The lines of summary.txt. The most important ones are the last, because often only the end is kept.

    Args:
        out: the folder of the run.
        minutes: the time limit of the run.
    """
    path = out / "rows.jsonl"
    found = rows.newest(rows.read(path)) if path.exists() else []
    cut = [outcome.stage for outcome in outcomes if STOPPED in outcome.verdict or outcome.verdict == NOT_RUN]
    sections = {
        "attention by length: effective TFLOP/s, fastest other, our lead (* solves another problem); part of matmul or "
        "copy rate": attention_lines(found)[::-1],
        "memory beyond inputs and results": memory_lines(found),
        "modules": module_lines(found),
        "generation": generation_lines(found),
        "problems": problem_lines(found),
        "failed tests": reports.failures(out),
        "measured on": _device_lines(found),
        "stages": list(map(str, outcomes)),
        "time limit": [f"{minutes:g} minutes were asked for, too few for all of: {', '.join(cut)}"] if cut else [],
    }
    lines = ["", "==== summary"]
    for title, made in sections.items():
        lines += [f"-- {title}", *made] if made else []
    names = sorted(one.name for one in out.iterdir() if one.is_file())
    return [*lines, f"written: {', '.join(names)} in {out}"]


def attention_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each mask, dtype, head dim and direction, such as

        causal bf16 D128 fwd | 512: 412 torch 1.08x | 1024: 530 torch 1.10x | 71%

    For each length, a line has the rate of ours, the name of the fastest other implementation, and the time of the
    other one divided by ours. A * marks an implementation that computes less than the case. The last cell is the
    largest part of the device's matmul or copy rate that ours reaches.
    """
    lines = []
    for group in groups(select(rows, benchmark="attention"), ("mask", "dtype", "direction"), by_head_dim=True):
        first = group[0]
        cells = []
        for length in sorted({row["shape"][2] for row in group}):
            cells.append(f"{length}: {_cell([row for row in group if row['shape'][2] == length])}")
        if parts := [_part(row) for row in select(group, implementation=OURS) if "median_ms" in row]:
            cells.append(f"{100 * max(parts):.0f}%")
        label = f"{first['mask']} {_short(first['dtype'])} D{first['shape'][3]} {_short(first['direction'])}"
        lines.append(f"{label} | {' | '.join(cells)}")
    return lines


def _cell(rows: list[Row]) -> str:
    """The cell of one case, such as "412 torch 1.08x". The rate is in effective TFLOP/s, and in GB/s for decoding."""
    ours = select(rows, implementation=OURS)
    if not ours or "median_ms" not in ours[0]:
        return "wrong" if ours and ours[0].get("is_right") is False else "no time"
    text = f"{ours[0]['gb_per_s']:.0f}GB/s" if "gb_per_s" in ours[0] else f"{ours[0]['effective_tflops']:.3g}"
    for best in fastest_others(rows):
        text += f"{' *' if 'problem' in best else ' '}{best['implementation']} {best['over_ours']:.2f}x"
    return text


def _part(row: Row) -> float:
    """The part of the device's copy rate (decoding) or matmul rate (other cases) that a row reaches."""
    return row["gb_per_s"] / row["copy_gb_per_s"] if "gb_per_s" in row else row["matmul_fraction"]


def memory_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each mask, dtype and direction: the memory of each implementation at the longest length."""
    lines = []
    for group in groups(select(rows, benchmark="memory"), ("mask", "dtype", "direction")):
        last = {row["implementation"]: row for row in group if "extra_mib" in row}
        cells = [f"{name} {mib_of(row):.1f} at {row['shape'][2]}" for name, row in last.items()]
        label = f"{group[0]['mask']} {_short(group[0]['dtype'])} {_short(group[0]['direction'])}"
        lines.append(f"{label} MiB | {' | '.join(cells) or 'none'}")
    return lines


def module_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each module and dtype: tokens per second and peak memory of each implementation."""
    lines = []
    for group in groups(select(rows, benchmark="modules"), ("module", "dtype")):
        cells = [
            f"{row['implementation']} {row['tokens_per_s']:.0f}"
            + (f" ({row['peak_mib']:.0f} MiB)" if "peak_mib" in row else "")
            for row in group
            if "tokens_per_s" in row
        ]
        lines.append(f"{group[0]['module']} {_short(group[0]['dtype'])} tokens/s | {' | '.join(cells) or 'no time'}")
    return lines


def generation_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each table of generation, dtype and size: the time of each implementation."""
    lines = []
    found = [row | {"size": str(next(row[name] for name in SIZES if name in row)) + _grouped(row)}
             for row in select(rows, benchmark="generation")]  # fmt: skip
    for group in groups(found, ("table", "dtype", "size")):
        cells = [f"{row['implementation']} {row['median_ms']:.3f}" for row in group if "median_ms" in row]
        label = f"{group[0]['table']} {group[0]['size']} {_short(group[0]['dtype'])}"
        lines.append(f"{label} ms | {' | '.join(cells) or 'no time'}")
    return lines


def _grouped(row: Row) -> str:
    """The text " Hkv8" if there are fewer heads of keys than of queries."""
    return f" Hkv{row['kv_heads']}" if row["table"] == "cache" and row["kv_heads"] != row["shape"][1] else ""


def problem_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each row that is wrong or has failed, and for each case that ours cannot compute. What another
    implementation cannot compute is one line for each reason, with the number of cases."""
    lines = []
    cannot: Counter[tuple[str, str]] = Counter()
    for row in rows:
        fields = ("benchmark", "module", "shape", "mask", "dtype", "direction")
        case = " ".join(str(row[name]) for name in fields if name in row)
        if row.get("is_right") is False:
            lines.append(f"WRONG: {row['implementation']} {case}: error {row['error']:.1e} > {row['allowed']:.1e}")
        elif "failed" in row:
            lines.append(f"FAILED: {row['implementation']} {case}: {row['failed'][:90]}")
        elif "cannot" in row and row["implementation"] == OURS:
            lines.append(f"OURS CANNOT: {case}: {row['cannot']}")
        elif "cannot" in row:
            cannot[row["implementation"], row["cannot"][:90]] += 1
    lines += [f"cannot: {name} in {count} cases: {why}" for (name, why), count in cannot.items()]
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES} more"]


def _device_lines(rows: list[Row]) -> list[str]:
    """The device and the versions of the newest row, and the matmul rate for each dtype."""
    if not rows:
        return []
    newest = max(rows, key=lambda row: row["date"])
    about = ("device", "driver", "cuda", "torch", "triton", "python", "commit", "date")
    rates = {row["dtype"]: row["matmul_tflops"] for row in rows if "matmul_tflops" in row}
    return [
        ", ".join(f"{name} {newest[name]}" for name in about if name in newest),
        *(f"{dtype} matmul {rate:.3g} TFLOP/s" for dtype, rate in rates.items()),
    ]


def _short(word: str) -> str:
    return SHORT.get(word, word)
