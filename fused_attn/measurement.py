"""Compares the speed of calls. The module has a timer for the CPU, a timer for GPUs, and a progress bar.

The benchmarks and `fused_attn.backends.triton.tune` measure with this module. Each round runs all calls of a
comparison. Every second round has the reverse order. So a slow moment of the machine affects all calls alike, and
ratios can be taken within a round.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

#: Seconds. In a round on the CPU, a short call is repeated for this time, so that reading the clock hardly counts.
SHORTEST_ROUND = 2e-3
WARM_UP_CALLS = 3
#: Seconds. A call whose first run takes longer than this gets no further warm-up runs.
WARM_UP_WORTH = 10 * SHORTEST_ROUND
#: FLUSHES: how often the L2 cache is overwritten before a call for which `GpuTimer.first` has not been called.
#: MOST_FLUSHES: the largest number for other calls.
FLUSHES, MOST_FLUSHES = 4, 50


class CallError(Exception):
    """A measured call has raised an error, which is the cause of this one. The argument is the name of the call."""


class Timer(Protocol):
    """A way of timing calls. kind: its name in the results."""

    kind: str

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
        """Warms the calls up. Returns an estimate of the seconds that each call takes in a round."""

    def round(self, calls: Mapping[Name, Call], order: Sequence[Name]) -> dict[Name, float]:
        """Runs the calls in this order. Returns the seconds of one run of each call."""


def measure(
    calls: Mapping[Name, Call], timer: Timer, rounds: int, seconds: float, least: int = 3
) -> dict[Name, list[float]]:
    """The seconds of each call, with one entry for each round.

    Args:
        rounds: the largest number of rounds.
        seconds: the time for all rounds together. If `rounds` would take longer, there are fewer.
        least: the smallest number of rounds. If one round takes 4 seconds or more, two are enough.

    Raises:
        CallError: one of the calls has raised an error.
    """
    if not calls:
        return {}
    one_round = sum(max(SHORTEST_ROUND, first) for first in timer.first(calls).values())
    rounds = max(least if one_round < 4.0 else min(2, least), min(rounds, int(seconds / one_round)))
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name, value in timer.round(calls, order).items():
            times[name].append(value)
    return times


class CpuTimer:
    """Reads the wall clock before and after a loop of calls."""

    kind = "wall clock"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._repeats: dict[Hashable, int] = {}

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
        """See `Timer.first`. Also determines how often `round` repeats each call."""
        first = {}
        for name, call in calls.items():
            with _blamed(name):
                first[name] = self.seconds(call, 1)
                if first[name] < WARM_UP_WORTH:  # a first call may take several times as long as later ones
                    first[name] = min(self.seconds(call, 1) for _ in range(WARM_UP_CALLS))
            self._repeats[name] = max(1, math.ceil(SHORTEST_ROUND / max(first[name], 1e-9)))
        return first

    def round(self, calls: Mapping[Name, Call], order: Sequence[Name]) -> dict[Name, float]:
        """See `Timer.round`. A short call is repeated, and the mean of its times is returned."""
        seconds = {}
        for name in order:
            with _blamed(name):
                seconds[name] = self.seconds(calls[name], self._repeats[name])
        return seconds

    def seconds(self, call: Call, repeats: int) -> float:
        """The seconds of one call, as a mean of `repeats` calls."""
        start = self._clock()
        for _ in range(repeats):
            call()
        return (self._clock() - start) / repeats


class GpuTimer:
    """Records CUDA events before and after each call.

    Before each call, memory larger than the L2 cache is overwritten, so that the call starts with a cold cache. This is
    repeated until the host has launched the call. So the GPU never waits for the host between the events.
    """

    kind = "events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)
        self._flushes: dict[Hashable, int] = {}

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
        """See `Timer.first`. Also determines how often `round` overwrites the cache before each call."""
        flush = self._seconds_of_a_flush()
        seconds = {}
        for name, call in calls.items():
            with _blamed(name):
                for _ in range(WARM_UP_CALLS):
                    call()
                torch.cuda.synchronize(self._device)
                start = time.perf_counter()
                call()
                launching = time.perf_counter() - start
                torch.cuda.synchronize(self._device)
            self._flushes[name] = min(MOST_FLUSHES, 1 + math.ceil(1.5 * launching / flush))
            seconds[name] = time.perf_counter() - start + self._flushes[name] * flush
        return seconds

    def round(self, calls: Mapping[Name, Call], order: Sequence[Name]) -> dict[Name, float]:
        """See `Timer.round`. The times are those between two CUDA events around each call."""
        events = {}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self._flushes.get(name, FLUSHES)):
                self._scratch.zero_()
            with _blamed(name):
                start.record()
                calls[name]()
                end.record()
            events[name] = (start, end)
        torch.cuda.synchronize(self._device)
        return {name: start.elapsed_time(end) * 1e-3 for name, (start, end) in events.items()}

    def _seconds_of_a_flush(self) -> float:
        """The seconds in which the L2 cache is overwritten once."""
        self._scratch.zero_()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(10):
            self._scratch.zero_()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / 10


@contextlib.contextmanager
def _blamed(name: Hashable) -> Iterator[None]:
    """Turns an error into a `CallError` with this name. KeyboardInterrupt passes, because it is not an Exception."""
    try:
        yield
    except Exception as error:
        raise CallError(name) from error


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar if rich is installed and the output is a terminal. Otherwise it shows nothing.

    It yields a function, which the caller calls after each of the `total` steps, with a text for the bar. Lines that
    are printed in the meantime appear above the bar.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
