"""Processes that run the same function, connected by gloo.

An import of torch takes seconds. So one server imports torch, once for all tests, and each process is a fork of the
server. The processes of a `Team` stay and take one job after another.
"""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds. On a busy machine, a process may reach a collective much later than another one.
TIMEOUT = 300.0

#: What the server imports for all processes.
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "fused_attn.distributed",
)
multiprocessing.set_forkserver_preload(list(PRELOADED))


def _serve(rank: int, world: int, store: str, pipe, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            result = function(*arguments)
        except BaseException as error:
            error.__traceback__ = None
            result = (f"{type(error).__name__}: {error}", traceback.format_exc())
            pipe.send((False, result))
        else:
            pipe.send((True, result))
    dist.destroy_process_group()


class Team:
    """world processes. Use as a context manager.

    Args:
        store: a file that does not exist, where the processes meet.
        timeout: seconds after which a collective that waits for another rank fails.
    """

    def __init__(self, world: int, store: Path, timeout: float = TIMEOUT):
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [own for own, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, str(store), theirs, timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(10)
            process.kill()

    def outcomes(self, function: Callable, *arguments: Any) -> list[tuple[bool, Any]]:
        """For each rank: (True, the result of function(*arguments)), or (False, (the error, its traceback))."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            while not pipe.poll(1.0):
                if not process.is_alive():
                    break
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append((False, ("the process has ended", "")))
        return found

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        """The results of function(*arguments), one for each rank. Raises if a rank fails."""
        outcomes = self.outcomes(function, *arguments)
        for rank, (is_right, result) in enumerate(outcomes):
            assert is_right, f"rank {rank}: {result[1]}"
        return [result for _, result in outcomes]
