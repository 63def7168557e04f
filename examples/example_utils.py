"""What the training examples share: arguments, the schedule of the learning rate, and the progress bar."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fused_attn
from fused_attn.backends.dispatch import BACKEND_NAMES


@contextlib.contextmanager
def packages_of(extras: str) -> Iterator[None]:
    """Names the command that installs these extras, such as "examples,lightning", if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"the example needs more packages ({error}): pip install -e '.[{extras}]'") from error


with packages_of("examples"):
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def argument_parser(description: str, minutes: float, quick: dict[str, float], output: str) -> argparse.ArgumentParser:
    """A parser with the common arguments.

    Args:
        minutes: the default of --minutes.
        quick: the arguments that --quick sets, with their values.
        output: the default of --output.
    """
    parser = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, arguments in {
        "--minutes": {"type": positive_float, "default": minutes, "help": "time for the whole run (%(default)s)"},
        "--quick": quick_option(**quick),
        "--backend": {"choices": BACKEND_NAMES, "help": "attention backend (the fastest that can run)"},
        "--device": {"type": usable_device, "default": device, "help": "cpu, cuda, cuda:1, ... (%(default)s)"},
        # A thread that waits for another one keeps its core busy. Two threads were slower than one where other programs
        # used the cores.
        "--threads": {"type": positive_int, "help": "CPU threads (torch's choice); 1 is best on a busy machine"},
        "--seed": {"type": int, "default": 0, "help": "seed of weights, batches and dropout (%(default)s)"},
        "--output": {"type": Path, "default": Path(output), "help": "folder for the results (%(default)s)"},
    }.items():
        parser.add_argument(name, **arguments)
    return parser


def quick_option(**values: float) -> dict:
    """The keywords of ``add_argument`` for --quick, which sets these other arguments, such as ``minutes=0.2``."""

    class SetOthers(argparse.Action):
        def __call__(self, parser, namespace, *_) -> None:
            vars(namespace).update(values)

    others = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in values.items())
    text = f"a short run that shows that all works: the same as {others}"
    return {"action": SetOthers, "nargs": 0, "default": argparse.SUPPRESS, "help": text}


def usable_device(text: str) -> str:
    """The type of --device: the name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {text} ({why})") from None
    return text


def make_folder(path: Path) -> None:
    """Makes the folder of --output. Ends the program if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--output: expected a folder, got {path}: {error}") from None


def positive_float(text: str) -> float:
    """The type of options that measure something, such as --minutes."""
    value = float(text)
    if not value > 0.0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def positive_int(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text}")
    return int(text)


def set_up(args: argparse.Namespace) -> None:
    """Sets threads and seed, makes the output folder, and fills in the name of the backend if the user gave none."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    make_folder(args.output)
    sample = torch.zeros(1, 1, 2, 16, device=args.device)
    args.backend = fused_attn.explain(sample, sample, sample, is_causal=True, backend=args.backend).chosen


def learning_rate(peak: float, done: float, warm_up: float = 0.04) -> float:
    """The learning rate when the fraction `done` of the time is over.

    The rate rises in a straight line from 0 to the peak, and then falls in a straight line to 0. The schedule counts
    time and not steps, so the rate reaches 0 at the end of the run on a fast machine and on a slow one.

    Args:
        warm_up: the fraction of the time in which the rate rises.
    """
    return peak * max(0.0, min(done / warm_up, (1.0 - done) / (1.0 - warm_up)))


class Stopwatch:
    """Counts seconds from `already_spent`, which is the time that a resumed run took before."""

    def __init__(self, already_spent: float = 0.0):
        self._zero = time.monotonic() - already_spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._zero


def progress_bar() -> Progress:
    """A progress bar with the elapsed time and a text behind it."""
    return Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
