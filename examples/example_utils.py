"""What the training examples share: their common arguments, the schedule over time and the progress bar."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import fused_attn
from fused_attn.backends.dispatch import BACKEND_NAMES


def argument_parser(description: str, minutes: float, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every example has."""
    parser = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, arguments in {
        "--minutes": {"type": positive_float, "default": minutes, "help": "time for the whole run (%(default)s)"},
        "--backend": {"choices": BACKEND_NAMES, "help": "attention backend (the fastest that can run)"},
        "--device": {"default": device, "help": "cpu, cuda, cuda:1, ... (%(default)s)"},
        # Threads that wait for each other spin: two were slower than one where other programs used the cores.
        "--threads": {"type": int, "help": "CPU threads (torch's choice); 1 is best on a busy machine"},
        "--seed": {"type": int, "default": 0, "help": "seed of weights, batches and dropout (%(default)s)"},
        "--output": {"type": Path, "default": Path(output), "help": "folder for the results (%(default)s)"},
    }.items():
        parser.add_argument(name, **arguments)
    return parser


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0.0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def set_up(args: argparse.Namespace) -> None:
    """Threads, seed, output folder and, where none is given, the name of the backend."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    sample = torch.zeros(1, 1, 2, 16, device=args.device)
    args.backend = fused_attn.explain(sample, sample, sample, is_causal=True, backend=args.backend).chosen


def learning_rate(peak: float, done: float, warm_up: float = 0.04) -> float:
    """The rate when the fraction `done` of the time is over: up to the peak, then down to 0, in straight lines.

    A schedule over time rather than steps ends well for any number of minutes and on any machine.
    """
    return peak * max(0.0, min(done / warm_up, (1.0 - done) / (1.0 - warm_up)))


class Stopwatch:
    """Seconds so far, those before a resume included."""

    def __init__(self, already_spent: float = 0.0):
        self._zero = time.monotonic() - already_spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._zero


def progress_bar() -> Progress:
    """A bar with a text behind it."""
    return Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
