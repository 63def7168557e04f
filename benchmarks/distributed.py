"""The planner's model against what processes do on this machine: ``python -m benchmarks distributed``.

Two and four processes, connected by gloo, share a sequence. They measure the kernels, a message between neighbours and
a sum in memory, all of them at the same time, as they are in a step. From these numbers, `fused_attn.distributed.cost`
predicts forward and backward of each method, which are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import session, timing
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES
from benchmarks.rows import Row, select
from benchmarks.session import Session
from fused_attn import fused_attention
from fused_attn.attention.masks import band_of
from fused_attn.distributed import context_parallel_attention
from fused_attn.distributed.cost import Machine, Method, Workload, cost, methods
from fused_attn.distributed.exchange import Exchange
from fused_attn.distributed.rates import BACKWARD, FORWARD, Rates

WORLDS = (2, 4)
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
LENGTH, QUICK_LENGTH, ROUNDS, QUICK_ROUNDS = 4096, 512, 10, 3
#: Bytes of a message that shows the latency.
SMALL = 64


class Kernel(NamedTuple):
    """A call that one process makes alone."""

    direction: str
    is_causal: bool
    heads: int
    length: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, quick=f"{QUICK_LENGTH} tokens, {QUICK_ROUNDS} rounds")
    parser.set_defaults(device="cpu")


def main(arguments: argparse.Namespace) -> int:
    session.refuse(arguments, threads="each process has one thread", seconds="--rounds sets the length of the run")
    found = Session(arguments)
    if found.device.type != "cpu":
        raise SystemExit(f"--device: expected cpu, because gloo joins the processes, got {arguments.device!r}")
    length = QUICK_LENGTH if found.is_quick else LENGTH
    rounds = arguments.rounds or (QUICK_ROUNDS if found.is_quick else ROUNDS)
    for dtype in found.dtypes:
        workload = Workload(length, 1, HEADS, KV_HEADS, HEAD_DIM, 1, dtype, band_of(True, (-1, -1)))
        done = {row["processes"] for row in select(found.earlier, benchmark="distributed", dtype=dtype)}
        for world in found.steps([world for world in WORLDS if world not in done], "{} processes".format):
            rows = rows_of(workload, world, measure(workload, world, rounds))
            found.record(rows, "\n".join(map(_line, rows)))
    return 0


def measure(workload: Workload, world: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round by the names of `_Process.calls`. The slowest process counts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (world, Path(folder), workload, rounds), nprocs=world)
        return json.loads((Path(folder) / "times").read_text())


def rows_of(workload: Workload, world: int, times: dict[str, list[float]]) -> list[Row]:
    """Rows with the measured and the predicted time of each method and direction."""
    # The 20th percentile, of what is measured and of what is predicted from: other processes disturb it least.
    seconds = {name: timing.quantiles(own)[0] for name, own in times.items()}
    points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for kernel in sorted(kernels(workload, world), key=lambda x: x.length):
        scores = kernel.length * (kernel.length + 1) // 2 if kernel.is_causal else kernel.length**2
        operations = 4 * workload.batch * kernel.heads * workload.head_dim * scores
        operations *= 2.5 if kernel.direction == BACKWARD else 1
        rate = operations / seconds[_name(kernel)]
        points.setdefault((kernel.direction, kernel.is_causal), []).append((kernel.length, rate))
    latency = seconds["small message"]
    bandwidth = _message_bytes(workload, world) / max(seconds["message"] - latency, 1e-9)
    memory_bandwidth = 8 * _elements(workload, world) / seconds["sum"]
    # In one node all links are alike. gloo and the kernels take the same cores, so messages cannot hide behind kernels.
    machine = Machine(world, bandwidth, bandwidth, latency, latency, memory_bandwidth, overlaps=False)
    rates = Rates(points, None, "measured in this run")
    rows = []
    for method in methods(workload, world):
        planned = cost(workload, machine, rates, method)
        for direction, own in ((FORWARD, planned.forward), (BACKWARD, planned.backward)):
            low, median, high = (1e3 * x for x in timing.quantiles(times[_name(method, direction)]))
            rows.append(
                {
                    "benchmark": "distributed", "table": str(method), "threads": 1, "processes": world,
                    "shape": [workload.batch, workload.heads, workload.tokens, workload.head_dim],
                    "kv_heads": workload.kv_heads, "mask": "causal", "dtype": workload.dtype, "direction": direction,
                    "implementation": OURS, "median_ms": median, "p20_ms": low, "p80_ms": high,
                    "rounds": len(times["sum"]), "predicted_ms": 1e3 * own.total,
                    "predicted_parts_ms": {name: 1e3 * x for name, x in own._asdict().items()},
                    "message_gb_per_s": bandwidth / 1e9, "latency_us": 1e6 * latency,
                    "sum_gb_per_s": memory_bandwidth / 1e9,
                }
            )  # fmt: skip
    return rows


def kernels(workload: Workload, world: int) -> list[Kernel]:
    """The calls of one process that show the rates: blocks of the ring, and whole sequences of some heads."""
    chunk = workload.tokens // (2 * world)
    shapes = (
        (False, workload.heads, chunk),
        (True, workload.heads, chunk),
        (True, workload.heads // world, workload.tokens),
    )
    return [Kernel(direction, *shape) for shape in shapes for direction in (FORWARD, BACKWARD)]


def _name(*parts: object) -> str:
    return " ".join(" ".join(map(str, x)) if isinstance(x, Kernel) else str(x) for x in parts)


def _line(row: Row) -> str:
    ratio = row["predicted_ms"] / row["p20_ms"]
    return (
        f"{row['processes']} processes, {row['table']:<20} {row['direction']:<9} predicted {row['predicted_ms']:8.2f} "
        f"ms, measured {row['p20_ms']:8.2f} ms (median {row['median_ms']:.2f}): {ratio:.2f}"
    )


def _elements(workload: Workload, world: int) -> int:
    """The elements of the queries of a process."""
    return workload.batch * workload.heads * workload.tokens // world * workload.head_dim


def _message_bytes(workload: Workload, world: int) -> int:
    """The keys and values of a process."""
    return 2 * workload.size * _elements(workload, world) * workload.kv_heads // workload.heads


def _run(rank: int, world: int, folder: Path, workload: Workload, rounds: int) -> None:
    """What each process runs. The first one writes the times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    process = _Process(rank, world, workload)
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, call in list(process.calls.items())[:: 1 if number % 2 else -1]:
            for part, seconds in call().items():
                slowest = torch.tensor(seconds, dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if number:  # the first round warms up
                    times.setdefault(f"{name}{part}", []).append(slowest.item())
    if rank == 0:
        (folder / "times").write_text(json.dumps(times))
    dist.destroy_process_group()


class _Process:
    """The calls of one process. Each returns {"": seconds}, or {" forward": seconds, " backward": seconds}."""

    def __init__(self, rank: int, world: int, workload: Workload) -> None:
        self.rank, self.world, self.workload = rank, world, workload
        element = torch.randn(_elements(workload, world))
        large, small = (torch.zeros(size, dtype=torch.uint8) for size in (_message_bytes(workload, world), SMALL))
        self.calls: dict[str, Callable[[], dict[str, float]]] = {
            "sum": lambda: {"": self.seconds(lambda: element.mul_(1.0))},
            "message": functools.partial(self.message, large),
            "small message": functools.partial(self.message, small),
        }
        self.calls |= {_name(x): functools.partial(self.kernel, x) for x in kernels(workload, world)}
        self.calls |= {_name(x): functools.partial(self.method, x) for x in methods(workload, world)}
        shapes = {x: x if min(x) > 1 else (world,) for x in methods(workload, world)}
        self.meshes = {x: DeviceMesh("cpu", torch.arange(world).view(shape)) for x, shape in shapes.items()}

    def seconds(self, call: Callable[[], object]) -> float:
        """The seconds of a call that all processes begin together."""
        dist.barrier()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def message(self, sent: Tensor) -> dict[str, float]:
        """Every process sends to the next one."""
        received = torch.empty_like(sent)
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        group = dist.group.WORLD
        return {"": self.seconds(lambda: Exchange(group, after, [sent], before, [received]).wait())}

    def tensors(self, heads: int, kv_heads: int, length: int) -> list[Tensor]:
        dtype = DTYPES[self.workload.dtype]
        shapes = [(self.workload.batch, count, length, self.workload.head_dim) for count in (heads, kv_heads, kv_heads)]
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

    def kernel(self, kernel: Kernel) -> dict[str, float]:
        kv_heads = max(1, kernel.heads * self.workload.kv_heads // self.workload.heads)
        tensors = self.tensors(kernel.heads, kv_heads, kernel.length)
        call = functools.partial(fused_attention, *tensors, is_causal=kernel.is_causal, enable_gqa=True)
        if kernel.direction == FORWARD:
            return {"": self.seconds(call)}
        out = call()
        dout = torch.ones_like(out)
        return {"": self.seconds(lambda: torch.autograd.grad(out, tensors, dout))}

    def method(self, method: Method) -> dict[str, float]:
        workload, mesh = self.workload, self.meshes[method]
        rows = workload.scores(self.world).query.rows(self.rank)
        tensors = self.tensors(workload.heads, workload.kv_heads, rows)
        outs: list[Tensor] = []

        def forward() -> None:
            name = "ring" if method.ulysses == 1 else "ulysses"
            outs.append(
                context_parallel_attention(
                    *tensors, mesh=mesh, method=name, seqlens=(workload.tokens,) * 2, is_causal=True, enable_gqa=True
                )
            )

        dout = torch.ones(workload.batch, workload.heads, rows, workload.head_dim).to(DTYPES[workload.dtype])
        return {
            f" {FORWARD}": self.seconds(forward),
            f" {BACKWARD}": self.seconds(lambda: torch.autograd.grad(outs[0], tensors, dout)),
        }
