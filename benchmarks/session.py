"""What the commands that measure share: options, the time limit, and the file of rows."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import machine
from benchmarks.inputs import DTYPES
from benchmarks.rows import Row, append, drop_cut_line, read, select
from fused_attn.measurement import progress

Step = TypeVar("Step")

#: The dtypes of --dtype. Not float64, in which the yardsticks are computed.
MEASURED = [name for name in DTYPES if name != "float64"]

#: The fields in which a row must equal this run so that --resume leaves its case out.
SAME_RUN = ("device", "cores", "threads", "isa", "torch", "commit", "quick")


def add_arguments(parser: argparse.ArgumentParser, quick: str, is_timed: bool = True) -> None:
    """Adds the common options.

    Args:
        quick: what --quick measures, for its help.
        is_timed: the command measures time, and not only memory.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{quick}; takes less than a minute")
    parser.add_argument("--dtype", nargs="+", choices=MEASURED, help="dtypes (float32 on a CPU, bfloat16 on a GPU)")
    if is_timed:
        parser.add_argument("--rounds", type=whole, help="rounds for each case, at most")
        parser.add_argument("--seconds", type=duration, help="time for each case, roughly")
    parser.add_argument("--threads", type=whole, help="CPU threads (torch's choice)")
    parser.add_argument("--minutes", type=duration, help="time after which no other case is begun (no limit)")
    parser.add_argument("--resume", action="store_true",
                        help="leave out what --out has rows of, by the same commit, machine and --quick")  # fmt: skip
    parser.add_argument("--commit", help="the commit that rows name, where the source tree has no git history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one row per case and implementation")


def whole(text: str) -> int:
    """A whole number of at least 1, for the argument ``type`` of argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def duration(text: str) -> float:
    """A number of at least 0, for the argument ``type`` of argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def limits(arguments: argparse.Namespace, quick: tuple[int, float], full: tuple[int, float]) -> tuple[int, float]:
    """--rounds and --seconds. An option that is not given has its number of `quick` or `full`, by --quick."""
    rounds, seconds = quick if arguments.quick else full
    return (
        rounds if arguments.rounds is None else arguments.rounds,
        seconds if arguments.seconds is None else arguments.seconds,
    )


def refuse(arguments: argparse.Namespace, **reasons: str) -> None:
    """Ends the command if one of these common options is given, which the command does not have for these reasons."""
    for name, reason in reasons.items():
        if getattr(arguments, name) is not None:
            raise SystemExit(f"--{name}: expected no such option, because {reason}, got {getattr(arguments, name)}")


def _device(name: str) -> torch.device:
    """The device of this name. Ends the command if this machine cannot measure it."""
    gpus = torch.cuda.device_count()
    try:
        found: torch.device | None = torch.device(name)
    except RuntimeError:  # no name of a device
        found = None
    if found is None or not (found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < gpus)):
        raise SystemExit(f"--device: expected cpu or one of the {gpus} GPUs of this machine, got {name!r}")
    return found


def _check_out(path: Path) -> None:
    """Ends the command if the file cannot be written. Makes its folder, and no file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise SystemExit(f"--out: expected a file that can be written, got {path}: {error}") from None


class Session:
    """One run of a command.

    rows: the rows of this run
    earlier: with --resume, the rows that --out had before this run, of the same commit, machine and --quick
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.is_quick, self._out = _device(arguments.device), arguments.quick, arguments.out
        if arguments.resume and self._out is None:
            raise SystemExit("--resume: expected --out FILE.jsonl, whose cases are left out, got no --out")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and streams are those of the current device
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.dtypes = arguments.dtype or (["bfloat16"] if self.device.type == "cuda" else ["float32"])
        self.rows: list[Row] = []
        self._about = machine.about(self.device, arguments.commit) | ({"quick": True} if arguments.quick else {})
        if self._out is not None:
            _check_out(self._out)
            drop_cut_line(self._out)
        same = {name: self._about.get(name) for name in SAME_RUN}
        self.earlier = select(read(self._out), **same) if arguments.resume and self._out.exists() else []
        self._end = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
        print(" | ".join(f"{name} {value}" for name, value in self._about.items()), flush=True)

    def steps(self, todo: Iterable[Step], label: Callable[[Step], str] = str) -> Iterator[Step]:
        """Yields the steps under a progress bar, which shows their labels. Stops when the time is up."""
        todo = list(todo)
        with progress(len(todo)) as advance:
            for number, step in enumerate(todo):
                if time.monotonic() >= self._end:
                    print(f"time is up: {len(todo) - number} of {len(todo)} not run", flush=True)
                    return
                yield step
                advance(label(step))

    def record(self, rows: list[Row], text: str) -> None:
        """Stores the rows of a case at once, so that an interrupted run keeps them, and prints a text about them."""
        rows = [self._about | row for row in rows]
        self.rows += rows
        if self._out is not None:
            append(self._out, rows)
        print(text, flush=True)
