"""Results: one JSON object a line, written at once, so that a run that is interrupted keeps what it measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
