"""How calls are compared in speed: two clocks, rounds in turns, and a progress bar.

The benchmarks and `fused_attn.backends.triton.tune` measure with this module. All calls of a comparison run in turns,
in reverse order every second round. A slow moment of the machine then meets all of them alike, and a ratio can be taken
within a round.
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

#: Seconds. A round on the CPU repeats short calls for this time: in less, the clock's own cost shows.
SHORTEST_ROUND = 2e-3
WARM_UP_CALLS = 3
#: Seconds of a first call above which it is not worth a warm-up.
WARM_UP_WORTH = 10 * SHORTEST_ROUND
#: How often the L2 cache is overwritten before a call whose launching has not been timed, and at most.
FLUSHES, MOST_FLUSHES = 4, 50


class CallError(Exception):
    """A measured call has raised. The argument is its name; the cause is what it raised."""


class Timer(Protocol):
    """kind: how a result says what was timed."""

    kind: str

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
        """Warms up; seconds that one round of each call will take."""

    def round(self, calls: Mapping[Name, Call], order: Sequence[Name]) -> dict[Name, float]:
        """Seconds per call of each, run in this order."""


def measure(
    calls: Mapping[Name, Call], timer: Timer, rounds: int, seconds: float, least: int = 3
) -> dict[Name, list[float]]:
    """Seconds per call, one entry a round: at most `rounds`, fewer if they take more than `seconds` together.

    Args:
        least: so many rounds at any rate; of calls that take seconds, two.

    Raises:
        CallError: one of the calls raised.
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
    """The wall clock around a loop of calls."""

    kind = "wall clock"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._repeats: dict[Hashable, int] = {}

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
        first = {}
        for name, call in calls.items():
            with _blamed(name):
                first[name] = self.seconds(call, 1)
                if first[name] < WARM_UP_WORTH:  # a first call may take several times as long as the others
                    first[name] = min(self.seconds(call, 1) for _ in range(WARM_UP_CALLS))
            self._repeats[name] = max(1, math.ceil(SHORTEST_ROUND / max(first[name], 1e-9)))
        return first

    def round(self, calls: Mapping[Name, Call], order: Sequence[Name]) -> dict[Name, float]:
        seconds = {}
        for name in order:
            with _blamed(name):
                seconds[name] = self.seconds(calls[name], self._repeats[name])
        return seconds

    def seconds(self, call: Call, repeats: int) -> float:
        start = self._clock()
        for _ in range(repeats):
            call()
        return (self._clock() - start) / repeats


class GpuTimer:
    """CUDA events around each call.

    Before each call, memory larger than the L2 cache is overwritten, so the call starts with a cold cache. This is done
    as often as the host needs to launch the call, so the time of launching is no part of the result.
    """

    kind = "events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)
        self._flushes: dict[Hashable, int] = {}

    def first(self, calls: Mapping[Name, Call]) -> dict[Name, float]:
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
        self._scratch.zero_()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(10):
            self._scratch.zero_()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / 10


@contextlib.contextmanager
def _blamed(name: Hashable) -> Iterator[None]:
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    try:
        yield
    except Exception as error:
        raise CallError(name) from error


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar where rich is installed and the output is a terminal; otherwise nothing.

    The function that it yields is called after each of the `total` steps, with a text to show. What is printed
    meanwhile stands above the bar.
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
