"""Seconds per call: beside `fused_attn.measurement`, what only the benchmarks need."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.conventions import OURS
from benchmarks.rows import Row
from fused_attn.measurement import WARM_UP_CALLS, Call, CallError, CpuTimer, GpuTimer, Timer, measure

#: Seconds. Events cost a microsecond or two; of shorter calls they would mostly see the launching of small kernels.
WORTH_A_GRAPH = 0.2e-3


def measure_those_that_can(
    calls: dict[str, Call], timer: Timer, rounds: int, seconds: float, drop: Callable[[str, Exception], None]
) -> dict[str, list[float]]:
    """`measure`, without those that raise.

    Args:
        calls: loses those that raise. Where memory does not suffice for all at once, `calls` loses its last entry:
            that is to be the one that needs most.
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


class WallTimer(CpuTimer):
    """Host and GPU together, for loops in which one waits for the other."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def seconds(self, call: Call, repeats: int) -> float:
        def all_of_them() -> None:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize(self._device)

        torch.cuda.synchronize(self._device)
        return super().seconds(all_of_them, 1) / repeats


def timer_for(device: torch.device, waits: bool = False) -> Timer:
    """waits: for calls in which the host waits for the device."""
    if device.type != "cuda":
        return CpuTimer()
    return WallTimer(device) if waits else GpuTimer(device)


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


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def times_of(seconds: list[float]) -> Row:
    """The fields of a row."""
    p20, median, p80 = quantiles(seconds)
    return {"median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3, "rounds": len(seconds)}


def fields_of(times: dict[str, list[float]], ours: str = OURS) -> dict[str, Row]:
    """By name, the fields of a row: times, and of the others the median ratio of their time to ours in a round."""
    fields = {name: times_of(seconds) for name, seconds in times.items()}
    for name in fields.keys() - {ours} if ours in times else ():
        ratios = [theirs / own for theirs, own in zip(times[name], times[ours], strict=True)]
        low, ratio, high = quartiles(ratios)
        fields[name] |= {"over_ours": ratio, "over_ours_q1": low, "over_ours_q3": high}
    return fields
