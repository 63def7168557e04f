"""What the commands and their pages derive from rows: ratios, groups of rows, memory and its growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from benchmarks.conventions import OURS
from benchmarks.rows import Row, select

#: A process uses about this much memory by itself, so smaller measured amounts say nothing about a call.
VISIBLE_MIB = 1.0


def fastest_others(rows: Iterable[Row]) -> list[Row]:
    """The fastest implementation of a case besides ours: first the fastest that computes the case itself, then the
    fastest that computes less than the case. Either may be missing.

    Args:
        rows: the rows of one case. They may come from several runs, between which the clock of a device changes, so the
            ratios to ours are compared and not the times.
    """
    others = [row for row in rows if "over_ours" in row and not row["implementation"].startswith(OURS)]
    found = []
    for has_problem in (False, True):
        same = [row for row in others if ("problem" in row) == has_problem]
        found += [min(same, key=lambda row: row["over_ours"])] if same else []
    return found


def ratio_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each table, dtype and direction: for each mask, the geometric mean over all sizes of torch's time
    divided by ours."""
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


def mib_of(row: Row) -> float:
    """The memory that a call needs: during the call, and for masks or biases that were made for the call before."""
    return row["extra_mib"] + row.get("held_mib", 0.0)


def growth_exponent(rows: list[Row]) -> float | None:
    """The exponent e in: memory grows like length to the power of e. For quadratic growth, e is 2.

    It is the slope of log(memory) over log(length) by least squares, and None if fewer than two rows have at least
    VISIBLE_MIB.
    """
    sizes = [(row["shape"][2], mib_of(row)) for row in rows]
    points = [(math.log(length), math.log(mib)) for length, mib in sizes if mib >= VISIBLE_MIB]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def groups(rows: Iterable[Row], names: tuple[str, ...], by_head_dim: bool = False) -> list[list[Row]]:
    """The rows in groups that have the same values of these fields. Groups and rows keep their order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in names) + ((row["shape"][3],) if by_head_dim else ())
        groups.setdefault(key, []).append(row)
    return list(groups.values())
