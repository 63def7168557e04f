"""Results as JSON lines. Each is written at once, so that an interrupted run keeps what it has measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: The fields that tell what a row is about; the others are what was found.
IDENTITY = (
    "device", "threads", "benchmark", "table", "module", "batch", "length", "d_model", "heads", "layers", "new_tokens",
    "shape", "seqlen_q", "kv_heads", "mask", "dtype", "direction", "implementation",
)  # fmt: skip


class Writer:
    """rows: all that was recorded; out: the file that they are appended to, or None."""

    def __init__(self, out: Path | None, about: Row) -> None:
        self.out, self.about, self.rows = out, about, []
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

    def record(self, new: Iterable[Row]) -> None:
        new = [self.about | row for row in new]
        self.rows.extend(new)
        if self.out is not None:
            with self.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same measurement in different runs on one device, the newest one."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(json.dumps(row.get(name)) for name in IDENTITY)
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
