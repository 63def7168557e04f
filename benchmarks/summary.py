"""Rows in a few lines of text, with which a run of the suite ends."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from benchmarks.conventions import OURS
from benchmarks.rows import Row, select

#: Of less than this a process needs more by itself, so that nothing can be seen.
VISIBLE_MIB = 1.0
#: At most so many lines of problems, because all of the summary has to fit into the end of an output.
MOST_LINES = 24
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both", "bfloat16": "bf16", "float16": "fp16"}


def attention_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each mask, dtype, head dim and direction.

    At each length a line has our rate, the fastest other one and our lead. (* solves another problem.) The line ends
    with the largest part of the device's rate that ours reached.
    """
    rows = select(rows, benchmark="attention")
    lines = []
    for group in groups(rows, ("mask", "dtype", "direction"), by_head_dim=True):
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
    """ "412 torch 1.08x": effective TFLOP/s, or GB/s of decoding."""
    timed = {row["implementation"]: row for row in rows if "median_ms" in row}
    if OURS not in timed:
        ours = select(rows, implementation=OURS)
        return "wrong" if ours and ours[0].get("is_right") is False else "no time"
    ours = timed[OURS]
    text = f"{ours['gb_per_s']:.0f}GB/s" if "gb_per_s" in ours else f"{ours['effective_tflops']:.3g}"
    for best in fastest_others(rows):
        text += f"{' *' if 'problem' in best else ' '}{best['implementation']} {best['over_ours']:.2f}x"
    return text


def fastest_others(rows: Iterable[Row]) -> list[Row]:
    """Of one case: the implementation that trails ours least, and the one among those that solve another problem.

    By the ratio within a round, because rows may stem from several runs, between which a device's clock changes.
    """
    others = [row for row in rows if "over_ours" in row and not row["implementation"].startswith(OURS)]
    found = []
    for is_other_problem in (False, True):
        same = [row for row in others if ("problem" in row) == is_other_problem]
        if same:
            found.append(min(same, key=lambda row: row["over_ours"]))
    return found


def ratio_lines(rows: Iterable[Row]) -> list[str]:
    """Of each table with torch's times: the geometric mean over its sizes of torch's time / ours."""
    lines = []
    rows = [row for row in select(rows, implementation="torch") if "over_ours" in row]
    for group in groups(rows, ("benchmark", "dtype", "direction")):
        cells = [
            f"{own[0]['mask']} {statistics.geometric_mean([row['over_ours'] for row in own]):.2f}"
            for own in groups(group, ("mask",))
        ]
        first = group[0]
        lines.append(f"torch / ours, {first['benchmark']} {first['dtype']} {first['direction']}: {', '.join(cells)}")
    return lines


def _part(row: Row) -> float:
    return row["gb_per_s"] / row["copy_gb_per_s"] if "gb_per_s" in row else row["matmul_fraction"]


def problem_lines(rows: Iterable[Row]) -> list[str]:
    """What was wrong or failed, and what ours could not do; what rivals could not, in one line each."""
    lines = []
    cannot: dict[tuple[str, str], int] = {}
    for row in rows:
        place = " ".join(
            str(row[name]) for name in ("benchmark", "module", "shape", "mask", "dtype", "direction") if name in row
        )
        if row.get("is_right") is False:
            lines.append(f"WRONG: {row['implementation']} {place}: error {row['error']:.1e} > {row['allowed']:.1e}")
        elif "failed" in row:
            lines.append(f"FAILED: {row['implementation']} {place}: {row['failed'][:90]}")
        elif "cannot" in row and row["implementation"] == OURS:
            lines.append(f"OURS CANNOT: {place}: {row['cannot']}")
        elif "cannot" in row:
            key = row["implementation"], row["cannot"][:90]
            cannot[key] = cannot.get(key, 0) + 1
    lines += [f"cannot: {name} in {count} cases: {why}" for (name, why), count in cannot.items()]
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES} more"]


def module_lines(rows: Iterable[Row]) -> list[str]:
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


def memory_lines(rows: Iterable[Row]) -> list[str]:
    lines = []
    for group in groups(select(rows, benchmark="memory"), ("mask", "dtype", "direction")):
        cells = []
        for name in dict.fromkeys(row["implementation"] for row in group):
            own = select(group, implementation=name)
            sizes = [row for row in own if "extra_mib" in row]
            if sizes:
                cells.append(f"{name} {mib_of(sizes[-1]):.1f} at {sizes[-1]['shape'][2]}")
        first = group[0]
        lines.append(
            f"{first['mask']} {_short(first['dtype'])} {_short(first['direction'])} MiB | {' | '.join(cells) or 'none'}"
        )
    return lines


def mib_of(row: Row) -> float:
    """What a call takes: during it, and for what was made for it beforehand."""
    return row["extra_mib"] + row.get("held_mib", 0.0)


def growth_exponent(lengths: list[int], extra: list[float]) -> float | None:
    """Slope of log(memory) over log(length), by least squares; None unless two lengths have memory to speak of."""
    points = [(math.log(n), math.log(m)) for n, m in zip(lengths, extra, strict=True) if m >= VISIBLE_MIB]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def groups(rows: list[Row], names: tuple[str, ...], by_head_dim: bool = False) -> list[list[Row]]:
    """Rows that agree in these fields, in the order of their first ones."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names) + ((row["shape"][3],) if by_head_dim else ())
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _short(word: str) -> str:
    return SHORT.get(word, word)
