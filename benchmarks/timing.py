"""Seconds per call. All implementations of a case run in turns, in reverse order every second round.

So a slow moment of the machine, or a clock that drops, meets all of them alike, and a ratio can be taken within a
round. The GPU's clock is read by events on its own stream, after the L2 cache has been overwritten.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], Any]

#: A round on the CPU repeats short calls until it has lasted so long: below, the clock's own cost shows.
SHORTEST_ROUND = 2e-3
#: Events take a microsecond or two; below this, launching many small kernels is most of what they would see.
WORTH_A_GRAPH = 0.2e-3
WARM_UP_CALLS = 3
WARM_UP_WORTH = 10 * SHORTEST_ROUND


class Timer(Protocol):
    """kind: how a row says what was timed."""

    kind: str

    def first(self, calls: dict[str, Call]) -> dict[str, float]:
        """Warms up; seconds of about one call of each."""

    def round(self, calls: dict[str, Call], order: list[str]) -> dict[str, float]:
        """Seconds per call of each, run in this order."""


class Measured(NamedTuple):
    """times: seconds per call by implementation, one entry a round; rejected: rounds that were thrown away."""

    times: dict[str, list[float]]
    rejected: int


class CallError(Exception):
    """A call that is measured has raised: its name, and what it raised as the cause."""


@contextlib.contextmanager
def _blamed(name: str) -> Iterator[None]:
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    try:
        yield
    except Exception as error:
        raise CallError(name) from error


def measure(
    calls: dict[str, Call],
    timer: Timer,
    rounds: int,
    seconds: float,
    is_quiet: Callable[[], bool] = lambda: True,
    least: int = 3,
) -> Measured:
    """Interleaved rounds: at most `rounds`, fewer if they take more than `seconds` together, never below `least`.

    is_quiet: asked before and after each round; rounds in which it says no are repeated.

    Raises:
        CallError: one of the calls raised.
    """
    if not calls:
        return Measured({}, 0)
    first = timer.first(calls)
    one_round = sum(max(SHORTEST_ROUND, seconds_of_one) for seconds_of_one in first.values())
    rounds = max(least if one_round < 4 else min(2, least), min(rounds, int(seconds / one_round)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    rejected = number = 0
    while number < rounds:
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        was_quiet = is_quiet()
        round_times = timer.round(calls, order)
        if not (was_quiet and is_quiet()):
            rejected += 1
            if rejected < 3 * rounds:  # a machine that is never quiet must still finish
                continue
        for name, value in round_times.items():
            times[name].append(value)
        number += 1
    return Measured(times, rejected)


def measure_those_that_can(
    calls: dict[str, Call], timer: Timer, rounds: int, seconds: float, drop: Callable[[str, Exception], None]
) -> Measured:
    """`measure`, without those that raise.

    Args:
        calls: loses those; where memory does not suffice for all at once its last ones, which are to be those that
            need most.
        drop: is told of each, and has to let go of what it holds for it: memory is what the others may lack.
    """
    while True:
        try:
            return measure(calls, timer, rounds, seconds)
        except CallError as failed:
            (name,), error = failed.args, failed.__cause__
            if isinstance(error, torch.OutOfMemoryError) and len(calls) > 1:
                name, error = list(calls)[-1], MemoryError("out of memory beside the others")
            del calls[name]
            drop(name, error.with_traceback(None))  # whose frames would hold what the call has made
            del error
        # Only here, where the exception is gone, does nothing refer to the call any more.
        gc.collect()
        if torch.cuda.is_available():
            # Fails on a device that is lost, which is for the caller to find out.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


class CpuTimer:
    kind = "wall clock"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._repeats: dict[str, int] = {}

    def first(self, calls: dict[str, Call]) -> dict[str, float]:
        first = {}
        for name, call in calls.items():
            with _blamed(name):
                first[name] = self.seconds(call, 1)
                if first[name] < WARM_UP_WORTH:  # a first call may take several times as long as the others
                    first[name] = min(self.seconds(call, 1) for _ in range(WARM_UP_CALLS))
        self._repeats = {name: max(1, math.ceil(SHORTEST_ROUND / max(s, 1e-9))) for name, s in first.items()}
        return first

    def round(self, calls: dict[str, Call], order: list[str]) -> dict[str, float]:
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
    """CUDA events around each call as a user makes it.

    Before each call memory several times the L2 cache is overwritten, as often as it takes for the host to have
    launched everything by the time that the GPU is done: so the call starts with a cold cache, and waiting for the host
    is no part of its time.
    """

    kind = "events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)
        self._flushes: dict[str, int] = {}

    def first(self, calls: dict[str, Call]) -> dict[str, float]:
        flush = self._wall(self._scratch.zero_)
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
            seconds[name] = time.perf_counter() - start
            self._flushes[name] = min(50, 1 + math.ceil(1.5 * launching / flush))
        return {name: value + self._flushes[name] * flush for name, value in seconds.items()}

    def round(self, calls: dict[str, Call], order: list[str]) -> dict[str, float]:
        events = {}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self._flushes[name]):
                self._scratch.zero_()
            with _blamed(name):  # outside of the clock, and the host is ahead of the device
                start.record()
                calls[name]()
                end.record()
            events[name] = (start, end)
        torch.cuda.synchronize(self._device)
        return {name: start.elapsed_time(end) * 1e-3 for name, (start, end) in events.items()}

    def _wall(self, call: Call) -> float:
        call()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / 10


class WallTimer(CpuTimer):
    """Host and GPU together, for loops in which one waits for the other."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def seconds(self, call: Call, repeats: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / repeats


def graph_of(make_call: Callable[[], Call], device: torch.device) -> Call:
    """A call that replays what the made one launches, without the host's part. Raises where it cannot be captured.

    make_call: runs on the stream of the capture, because a backward runs on that of its forward.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call = make_call()
        for _ in range(WARM_UP_CALLS):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
    torch.cuda.synchronize(device)

    def replay(_keep: Any = (call, results)) -> None:  # the graph reads and writes their memory
        graph.replay()

    return replay


def timer_for(device: torch.device) -> Timer:
    return GpuTimer(device) if device.type == "cuda" else CpuTimer()


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def times_of(seconds: list[float]) -> dict[str, float | int]:
    """The fields of a row."""
    p20, median, p80 = quantiles(seconds)
    return {"median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3, "rounds": len(seconds)}


class Probe:
    """A short piece of fixed work before and after a round: how fast the CPU was just then."""

    def __init__(self) -> None:
        self._a = torch.randn(256, 256)
        self._timer = CpuTimer()
        self._best = min(self._seconds() for _ in range(20))

    def _seconds(self) -> float:
        return self._timer.seconds(lambda: torch.mm(self._a, self._a), 3)

    def is_quiet(self) -> bool:
        return self._seconds() < 1.3 * self._best
