"""What the commands that measure share: their options, the time limit, and the file of rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import machine
from benchmarks.inputs import DTYPES
from benchmarks.rows import Row, Writer, read
from fused_attn.measurement import progress

Step = TypeVar("Step")


def add_arguments(parser: argparse.ArgumentParser, quick: str, is_timed: bool = True) -> None:
    """quick: what --quick leaves."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: about a minute")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    if is_timed:
        parser.add_argument("--rounds", type=int, help="at most so many rounds a case")
        parser.add_argument("--seconds", type=float, help="at most so long a case")
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has rows of")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")


class Session:
    """One run of a command. earlier: the rows of --out that --resume does not measure again."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.is_quick = torch.device(arguments.device), arguments.quick
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.dtypes = arguments.dtype or (["bfloat16"] if self.device.type == "cuda" else ["float32"])
        out = arguments.out
        self.earlier: list[Row] = read(out) if arguments.resume and out is not None and out.exists() else []
        self._writer = Writer(out, machine.about(self.device, arguments.commit))
        self._end = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
        print(" | ".join(f"{name} {value}" for name, value in self._writer.about.items()), flush=True)

    @property
    def rows(self) -> list[Row]:
        """The rows of this run."""
        return self._writer.rows

    def steps(self, todo: Iterable[Step], label: Callable[[Step], str] = str) -> Iterator[Step]:
        """The steps one after the other, until the time is up."""
        todo = list(todo)
        with progress(len(todo)) as advance:
            for number, step in enumerate(todo):
                if time.monotonic() >= self._end:
                    print(f"time is up: {len(todo) - number} of {len(todo)} not run", flush=True)
                    return
                yield step
                advance(label(step))

    def record(self, rows: list[Row], text: str) -> None:
        self._writer.record(rows)
        print(text, flush=True)
