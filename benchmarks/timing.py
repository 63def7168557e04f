"""Seconds per call, with `fused_attn.measurement`. This file adds what only the benchmarks need."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.conventions import OURS
from benchmarks.rows import Row
from fused_attn.measurement import WARM_UP_CALLS, Call, CallError, CpuTimer, GpuTimer, Timer, measure

#: Seconds. Of shorter calls, CUDA events mostly measure how the host launches small kernels, so a CUDA graph is timed.
WORTH_A_GRAPH = 0.2e-3


def measure_those_that_can(
    calls: dict[str, Call], timer: Timer, rounds: int, seconds: float, drop: Callable[[str, Exception], None]
) -> dict[str, list[float]]:
    """Measures the calls that do not raise.

    A call that raises is removed, and all others are measured again. If the memory does not suffice for all calls, the
    last one is removed, so the call that needs the most memory should be the last.

    Args:
        calls: the calls that raise are deleted from it.
        drop: gets the name and the exception of each removed call. It must delete its references to the call, because
            the other calls may need the memory.
    """
    while True:
        try:
            return measure(calls, timer, rounds, seconds)
        except CallError as failed:
            (name,), error = failed.args, failed.__cause__
            if isinstance(error, torch.OutOfMemoryError) and len(calls) > 1:
                name, error = list(calls)[-1], MemoryError("out of memory beside the others")
            del calls[name]
            drop(name, error.with_traceback(None))  # The frames of a traceback would keep the tensors of the call.
            del error
        # After the except clause, no exception refers to the call any more, and its memory can be freed.
        gc.collect()
        if torch.cuda.is_available():
            # torch raises if the device no longer answers. The next measurement reports that.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


class WallTimer(CpuTimer):
    """The wall time until the GPU has finished, for calls in which the GPU waits for the host."""

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


class HostTimer(CpuTimer):
    """The time in which the host launches the kernels of a call, while the GPU computes.

    The GPU is idle when the first of the repeated calls comes. The calls have to be so small that their launches do not
    fill the queue of the GPU, because the host would then wait.
    """

    kind = "host"

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._device = device

    def seconds(self, call: Call, repeats: int) -> float:
        torch.cuda.synchronize(self._device)
        seconds = super().seconds(call, repeats)
        torch.cuda.synchronize(self._device)
        return seconds


class WarmTimer(CpuTimer):
    """Makes each call once before the clock starts.

    Some calls that take turns read the same memory, and others read copies of it. Without the call before, those of the
    same memory would find it in the caches, and those of the copies would not.
    """

    kind = "wall clock, warm"

    def seconds(self, call: Call, repeats: int) -> float:
        call()
        return super().seconds(call, repeats)


def timer_for(device: torch.device, waits: bool = False) -> Timer:
    """The timer for a device. waits: in the calls, host and GPU wait for each other."""
    if device.type != "cuda":
        return CpuTimer()
    return WallTimer(device) if waits else GpuTimer(device)


def graph_of(make_call: Callable[[], Call], device: torch.device) -> Call:
    """A call that replays the kernels of another call as a CUDA graph, so that the host launches once and not often.

    Args:
        make_call: makes the call to capture. It runs on the stream of the capture, because a backward runs on the
            stream of its forward.

    Raises:
        Exception: of any class, if the call cannot be captured.
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

    def replay(_keep: Any = (call, results)) -> None:  # The graph reads and writes the memory of these tensors.
        graph.replay()

    return replay


def quantiles(values: list[float], parts: tuple[float, ...] = (0.2, 0.5, 0.8)) -> list[float]:
    """By default the 20th percentile, the median and the 80th percentile."""
    return np.quantile(values, parts).tolist()


def times_of(seconds: list[float]) -> Row:
    """The fields of a row about the time of a call."""
    p20, median, p80 = quantiles(seconds)
    return {"median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3, "rounds": len(seconds)}


def fields_of(times: dict[str, list[float]], ours: str = OURS) -> dict[str, Row]:
    """The fields of a row about time, by name. All but ours have the ratios of their time to ours in the same round."""
    fields = {name: times_of(seconds) for name, seconds in times.items()}
    for name in fields.keys() - {ours} if ours in times else ():
        ratios = [theirs / own for theirs, own in zip(times[name], times[ours], strict=True)]
        low, ratio, high = quantiles(ratios, (0.25, 0.5, 0.75))
        fields[name] |= {"over_ours": ratio, "over_ours_q1": low, "over_ours_q3": high}
    return fields
