"""How fast the kernels of one device are, from rows that ``python -m benchmarks attention`` has measured."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn.attention import checks

Row = dict[str, Any]
FORWARD, BACKWARD = "forward", "backward"
#: The rows of the clone that holds this package. An installed package has none.
ROWS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


class Rates(NamedTuple):
    """Operations per second of attention kernels, counted on visible scores, and of a large matrix product.

    points: {(direction, is_masked): pairs (length, rate) in ascending order of the length}. The length is that of the
        queries and of the keys of a measured call; is_masked: the call was causal.
    matmul: the rate of the matrix product; None if unknown
    source: what the numbers are, for the reader
    """

    points: dict[tuple[str, bool], list[tuple[int, float]]]
    matmul: float | None
    source: str

    @classmethod
    def constant(cls, forward: float, backward: float, matmul: float | None = None) -> Rates:
        """The same rate for all lengths and masks."""
        rates = {FORWARD: forward, BACKWARD: backward}
        points = {
            (direction, is_masked): [(1, rate)] for direction, rate in rates.items() for is_masked in (False, True)
        }
        return cls(points, matmul, f"given: {forward / 1e12:g} and {backward / 1e12:g} TFLOP/s forward and backward")

    @classmethod
    def of_rows(cls, rows: Iterable[Row], device: str, dtype: str, head_dim: int) -> Rates:
        """The newest rows about a device, a dtype and a head dim.

        Args:
            device: a part of the name of the device, such as "H100".

        Raises:
            ValueError: no rows fit, or rows of several devices do.
        """
        rows = [row for row in rows if _is_usable(row)]
        devices = sorted({row["device"] for row in rows if device.lower() in row["device"].lower()})
        if len(devices) != 1:
            known = ", ".join(sorted({row["device"] for row in rows})) or "no device at all"
            raise checks.fail("--device", f"a part of the name of one device with rows ({known})", repr(device))
        rows = [row for row in rows if row["device"] == devices[0]]
        for option, wanted, values in (
            ("--dtype", dtype, {row["dtype"] for row in rows}),
            ("--head-dim", head_dim, {row["shape"][3] for row in rows if row["dtype"] == dtype}),
        ):
            if wanted not in values:
                known = ", ".join(map(str, sorted(values)))
                raise checks.fail(option, f"one with measured rows of {devices[0]} ({known}), or --tflops", wanted)
        rows = [row for row in rows if row["dtype"] == dtype and row["shape"][3] == head_dim]
        rows.sort(key=lambda row: row["date"])
        found: dict[tuple[str, bool], dict[int, float]] = {}
        for row in rows:  # a newer row replaces an older one
            by_length = found.setdefault((row["direction"], row["mask"] == "causal"), {})
            by_length[row["shape"][2]] = row["effective_tflops"] * 1e12
        for direction in (FORWARD, BACKWARD):
            for is_masked in (False, True):
                if (direction, is_masked) not in found:
                    mask = "causal" if is_masked else "none"
                    raise checks.fail("--rows", f"rows of mask {mask!r}, {direction}", f"none of {devices[0]}")
        points = {key: sorted(by_length.items()) for key, by_length in found.items()}
        products = [row["matmul_tflops"] * 1e12 for row in rows if "matmul_tflops" in row]
        commits = ", ".join(dict.fromkeys(str(row["commit"])[:7] for row in rows))
        lengths = sorted({row["shape"][2] for row in rows})
        source = f"{devices[0]}, {dtype}, head dim {head_dim}, lengths {lengths[0]} to {lengths[-1]}, commit {commits}"
        return cls(points, products[-1] if products else None, source)

    def rate(self, direction: str, is_masked: bool, length: float) -> float:
        """The rate at a length.

        Between two measured lengths, the rate changes linearly with the logarithm of the length. Beyond the measured
        lengths, the rate is that of the nearest one.
        """
        points = self.points[direction, is_masked]
        at = bisect.bisect_left(points, (length, 0.0))
        if at == 0 or at == len(points):
            return points[min(at, len(points) - 1)][1]
        (low, low_rate), (high, high_rate) = points[at - 1 : at + 1]
        part = math.log(length / low) / math.log(high / low)
        return low_rate + part * (high_rate - low_rate)


def read_rows(paths: Sequence[Path] = ()) -> list[Row]:
    """The rows of these files of JSON lines; default: those of the clone.

    Raises:
        ValueError: a file cannot be read, or no path is given and the package stands in no clone.
    """
    if not paths:
        paths = sorted(ROWS.glob("*.jsonl"))
        if not paths:
            raise checks.fail(
                "--rows", "files of `python -m benchmarks attention`, or --tflops", "none, and the package has no rows"
            )
    rows = []
    for path in paths:
        try:
            rows += [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:  # ValueError: no text, or no JSON
            raise checks.fail("--rows", "a file of JSON lines", f"{path}: {error}") from error
        if strange := [row for row in rows if not isinstance(row, dict)]:
            raise checks.fail("--rows", "lines that are JSON objects", f"{path}: {strange[0]!r}")
    return rows


def _is_usable(row: Row) -> bool:
    """Whether the row is a right and timed one of what a user of fused_attn gets, with a band or without a mask."""
    return (
        row.get("benchmark") == "attention"
        and row.get("implementation") == "fused_attn"
        and row.get("mask") in ("none", "causal")
        and row.get("direction") in (FORWARD, BACKWARD)
        and row.get("is_right", False)
        and "effective_tflops" in row
    )
