"""Rows: results as dictionaries, one for each case and implementation, in JSON lines. README.md lists the fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: The fields that say where something was measured. Rows of a GPU have the first alone.
MACHINE = ("device", "isa", "cores", "threads")
#: The fields that say what was measured, and where. The other fields are results.
IDENTITY = (
    *MACHINE, "benchmark", "table", "mix", "module", "batch", "length", "d_model", "heads", "layers",
    "new_tokens", "shape", "seqlen_q", "kv_heads", "mask", "dtype", "direction", "implementation",
)  # fmt: skip


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def drop_cut_line(path: Path) -> None:
    """Removes a last line that is not complete, because the run that wrote it was stopped. The next row would become
    a part of that line.
    """
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        lines = text.splitlines(keepends=True)
        print(f"{path}: line {len(lines)} is cut off, and is removed", flush=True)
        path.write_text("".join(lines[:-1]))


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows without those that a later run has measured again on the same device."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(json.dumps(row.get(name)) for name in IDENTITY)
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def machine_of(row: Row) -> str:
    """The name of a machine: "NVIDIA H200", or "AMD EPYC (avx2, 1 of 2 cores)", where 1 is the number of threads."""
    device, isa, cores, threads = map(row.get, MACHINE)
    return device if isa is None else f"{device} ({isa}, {threads} of {cores} cores)"


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each machine, by its name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(machine_of(row), []).append(row)
    return found


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
