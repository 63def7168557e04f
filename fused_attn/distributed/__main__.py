"""The command line: ``python -m fused_attn.distributed plan``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn import measurement
from fused_attn.attention import checks, masks
from fused_attn.distributed import quantities
from fused_attn.distributed.cost import SIZES, Cost, Machine, Method, Seconds, Workload, cost, methods
from fused_attn.distributed.quantities import in_bandwidth, in_bytes, in_seconds
from fused_attn.distributed.rates import Rates, read_rows
from fused_attn.distributed.sequence import ROWS_OF_RANK

#: Bytes per second of the memory of a GPU, by a part of its name: NVIDIA's data sheets of the H100 SXM and the H200.
MEMORY_BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
#: Seconds of a message over (NVLink, InfiniBand) besides its bytes: what NCCL assumes of protocol Simple in a ring.
#: In its tuning table (src/graph/tuning.cc), baseLat + hwLat are 8.4 + 3.4 us and 8.4 + 9.6 us.
LATENCIES = (11.8e-6, 18e-6)


class Request(NamedTuple):
    """What is to be planned.

    limit: the bytes of a GPU that attention may take; None = any
    hidden: the width of the model, to plan its linear layers too; None = attention alone
    """

    workload: Workload
    machine: Machine
    rates: Rates
    gpus: int
    methods: list[Method]
    limit: float | None = None
    hidden: int | None = None

    @property
    def linear_seconds(self) -> float | None:
        """The time of the linear layers of a step; None if the model's width or the rate of products is not given.

        A layer has projections of queries, keys, values and outputs, and two layers of 4 times the width. A training
        step takes 6 operations for each parameter and token (Kaplan et al., "Scaling laws", 2020).
        """
        workload = self.workload
        if self.hidden is None or self.rates.matmul is None:
            return None
        heads = 2 * workload.head_dim * (workload.heads + workload.kv_heads)
        parameters = workload.layers * self.hidden * (heads + 8 * self.hidden)
        rows = max(map(workload.scores(self.gpus).query.rows, range(self.gpus)))
        return 6 * parameters * workload.batch * rows / self.rates.matmul


def main(argv: list[str] | None = None) -> int:
    """Runs the command that argv names (None = the arguments of the process); returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_attn.distributed", description="Attention over sequences that several GPUs share."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="predict the time, bytes and memory of a training step's attention, and the best method",
        description="Predicts, for a training step on many GPUs, what attention takes with each method of "
        "context_parallel_attention. Rates of kernels are measured ones. The other numbers are those of the command "
        "line. fused_attn/distributed/cost.py states the model.",
    )
    _add_options(plan)
    arguments = parser.parse_args(argv)
    try:
        request = _request(arguments)
        costs = plans(request)
        print(json.dumps(as_json(request, costs), indent=1) if arguments.json else as_text(request, costs))
    except ValueError as error:
        plan.error(str(error))
    return 0


def plans(request: Request) -> list[Cost]:
    """The costs of all methods, those that fit into memory first, and the fastest first."""
    costs = []
    with measurement.progress(len(request.methods)) as advance:
        for method in request.methods:
            costs.append(cost(request.workload, request.machine, request.rates, method))
            advance(f"planned {method}")
    return sorted(costs, key=lambda x: (not _fits(request, x), x.seconds.total))


def _fits(request: Request, cost: Cost) -> bool:
    return request.limit is None or cost.memory <= request.limit


# ---- Arguments


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``plan`` to its parser."""
    add = parser.add_argument
    add("--gpus", type=quantities.count, required=True, metavar="N", help="how many GPUs share each sequence")
    add("--tokens", type=quantities.count, required=True, metavar="N", help="length of a sequence: 128K, 4M (K = 1024)")
    add("--batch", type=quantities.count, default=1, metavar="N", help="sequences in a step (default: %(default)s)")
    model = parser.add_argument_group("model; the defaults are those of Llama 3 8B")
    model.add_argument("--heads", type=quantities.count, default=32, metavar="N", help="query heads (%(default)s)")
    model.add_argument("--kv-heads", type=quantities.count, default=8, metavar="N", help="key heads (%(default)s)")
    model.add_argument("--head-dim", type=quantities.count, default=128, metavar="N", help="(%(default)s)")
    model.add_argument("--layers", type=quantities.count, default=32, metavar="N", help="(%(default)s)")
    model.add_argument(
        "--hidden", type=quantities.count, metavar="N", help="width: also plan the time of linear layers"
    )
    model.add_argument("--dtype", choices=SIZES, default="bfloat16", help="(%(default)s)")
    model.add_argument("--no-causal", action="store_true", help="every query sees every key; default: causal")
    model.add_argument(
        "--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="window_size of fused_attention; -1 = unbounded"
    )
    add(
        "--method",
        default="auto",
        help="auto (all), ring, ulysses, or a nesting such as 128x8: a ring of 128 groups that divide the heads by 8",
    )
    kernels = parser.add_argument_group("rates of kernels, from measured rows or given")
    kernels.add_argument("--device", default="H100", metavar="NAME", help="a part of its name (%(default)s)")
    kernels.add_argument(
        "--rows", type=Path, nargs="+", default=[], metavar="FILE",
        help="files of rows of `python -m benchmarks attention`; default: benchmarks/results of the clone",
    )  # fmt: skip
    kernels.add_argument(
        "--tflops", type=float, nargs=2, metavar=("FORWARD", "BACKWARD"), help="on visible scores, in place of rows"
    )
    kernels.add_argument("--matmul-tflops", type=float, metavar="N", help="of a matrix product, in place of rows")
    links = parser.add_argument_group("machine; the defaults are the peaks of NVIDIA's data sheets, see docs")
    links.add_argument("--gpus-per-node", type=quantities.count, default=8, metavar="N", help="(%(default)s)")
    links.add_argument(
        "--nvlink", type=quantities.bandwidth, default="450GB/s", metavar="BANDWIDTH",
        help="of a GPU to those of its node, in one direction (%(default)s)",
    )  # fmt: skip
    links.add_argument(
        "--infiniband", type=quantities.bandwidth, default="400Gb/s", metavar="BANDWIDTH",
        help="of a GPU to those of other nodes, in one direction (%(default)s)",
    )  # fmt: skip
    links.add_argument(
        "--latency", type=quantities.duration, nargs=2, default=LATENCIES, metavar=("NVLINK", "INFINIBAND"),
        help=f"of a message, such as 12us 18us (default: {' '.join(map(in_seconds, LATENCIES))})",
    )  # fmt: skip
    links.add_argument(
        "--memory-bandwidth", type=quantities.bandwidth, metavar="BANDWIDTH",
        help="of the GPU's memory; default: that of --device, if the command knows it",
    )  # fmt: skip
    links.add_argument(
        "--memory", type=quantities.size, metavar="SIZE", help="methods that take more lose; default: any"
    )
    add("--json", action="store_true", help="print everything as JSON")


def _request(arguments: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises ValueError if they do not fit together."""
    if arguments.heads % arguments.kv_heads:
        raise checks.fail("--kv-heads", f"a divisor of the {arguments.heads} heads", arguments.kv_heads)
    if arguments.tokens < ROWS_OF_RANK * arguments.gpus:
        expected = f"at least {ROWS_OF_RANK} for each of the {arguments.gpus} GPUs"
        raise checks.fail("--tokens", expected, arguments.tokens)
    window = None if arguments.window is None else tuple(arguments.window)
    workload = Workload(
        arguments.tokens,
        arguments.batch,
        arguments.heads,
        arguments.kv_heads,
        arguments.head_dim,
        arguments.layers,
        arguments.dtype,
        masks.band_of(not arguments.no_causal, checks.check_window(window)),
    )
    machine = Machine(
        arguments.gpus_per_node,
        _positive("--nvlink", arguments.nvlink),
        _positive("--infiniband", arguments.infiniband),
        arguments.latency[0],
        arguments.latency[1],
        _positive("--memory-bandwidth", _memory_bandwidth(arguments)),
    )
    rates = _rates(arguments)
    if arguments.hidden is not None and rates.matmul is None:
        raise checks.fail("--hidden", "--matmul-tflops with --tflops", "no rate of a matrix product")
    found = _chosen_methods(arguments.method, workload, arguments.gpus)
    return Request(workload, machine, rates, arguments.gpus, found, arguments.memory, arguments.hidden)


def _positive(option: str, value: float) -> float:
    if not 0 < value < math.inf:  # float() also reads "nan" and "inf"
        raise checks.fail(option, "a finite number above 0", value)
    return value


def _memory_bandwidth(arguments: argparse.Namespace) -> float:
    if arguments.memory_bandwidth is not None:
        return arguments.memory_bandwidth
    for name, bandwidth in MEMORY_BANDWIDTHS.items():
        if name in arguments.device.upper():
            return bandwidth
    known = ", ".join(MEMORY_BANDWIDTHS)
    raise checks.fail("--memory-bandwidth", f"one for a device other than {known}", "none")


def _rates(arguments: argparse.Namespace) -> Rates:
    matmul = None if arguments.matmul_tflops is None else _positive("--matmul-tflops", arguments.matmul_tflops) * 1e12
    if arguments.tflops is not None:
        forward, backward = (_positive("--tflops", x) * 1e12 for x in arguments.tflops)
        return Rates.constant(forward, backward, matmul)
    rates = Rates.of_rows(read_rows(arguments.rows), arguments.device, arguments.dtype, arguments.head_dim)
    return rates if matmul is None else rates._replace(matmul=matmul)


def _chosen_methods(name: str, workload: Workload, gpus: int) -> list[Method]:
    """The methods that ``--method`` names."""
    if name == "auto":
        return methods(workload, gpus)
    if name == "ring":
        return [Method(gpus, 1)]
    numbers = (1, gpus) if name == "ulysses" else tuple(map(int, name.split("x"))) if _is_nesting(name) else None
    if numbers is None:
        raise checks.fail("--method", "auto, ring, ulysses, or a nesting such as 128x8", repr(name))
    method = Method(*numbers)
    if method.ring * method.ulysses != gpus:
        raise checks.fail("--method", f"a nesting of {gpus} GPUs", name)
    if workload.heads % method.ulysses:
        raise checks.fail(
            "--heads", f"a multiple of the {method.ulysses} GPUs that divide them with --method {name}", workload.heads
        )
    return [method]


def _is_nesting(name: str) -> bool:
    parts = name.split("x")
    return len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts)


# ---- Output


def as_json(request: Request, costs: list[Cost]) -> dict[str, Any]:
    """What ``--json`` prints. Bytes and seconds of a step, for one GPU."""

    def seconds(x: Seconds) -> dict[str, float]:
        return x._asdict() | {"total": x.total}

    return {
        "gpus": request.gpus,
        "workload": request.workload._asdict() | {"band": request.workload.band._asdict()},
        "machine": request.machine._asdict(),
        "rates": request.rates.source,
        "linear_seconds": request.linear_seconds,
        "methods": [
            {
                "method": str(x.method),
                "ring": x.method.ring,
                "ulysses": x.method.ulysses,
                "forward": seconds(x.forward),
                "backward": seconds(x.backward),
                "seconds": x.seconds.total,
                "sent_forward_bytes": x.sent_forward,
                "sent_backward_bytes": x.sent_backward,
                "saved_bytes": x.saved,
                "buffer_bytes": x.buffers,
                "fits": _fits(request, x),
            }
            for x in costs
        ],
        "reason": reason(request, costs),
    }


def as_text(request: Request, costs: list[Cost]) -> str:
    """The table and what it is about."""
    workload, machine = request.workload, request.machine
    mask = "causal" if workload.band.right == 0 else "not causal"
    if workload.band.left >= 0 or workload.band.right > 0:
        mask += f", window ({workload.band.left}, {workload.band.right})"
    lines = [
        f"{request.gpus} GPUs, {machine.gpus_per_node} a node; {workload.batch} x {workload.tokens} tokens, {mask}",
        f"{workload.layers} layers, {workload.heads} heads, {workload.kv_heads} key heads, head dim "
        f"{workload.head_dim}, {workload.dtype}",
        f"kernels: {request.rates.source}",
        f"links of a GPU, each direction: NVLink {in_bandwidth(machine.nvlink)} + "
        f"{in_seconds(machine.nvlink_latency)}, InfiniBand {in_bandwidth(machine.infiniband)} + "
        f"{in_seconds(machine.infiniband_latency)}; memory {in_bandwidth(machine.memory_bandwidth)}",
        "",
        "Attention of a step (forward and backward, all layers) on the slowest GPU:",
    ]
    lines += _columns([HEADER, *(_cells(request, x) for x in costs)])
    if (uneven := _uneven(request)) is not None:
        lines += ["", uneven]
    linear = request.linear_seconds
    if linear is not None:
        share = costs[0].seconds.total / (costs[0].seconds.total + linear)
        lines += [
            "",
            f"Linear layers take {in_seconds(linear)} more, so attention is {share:.0%} of a step.",
        ]
    return "\n".join([*lines, "", reason(request, costs)])


HEADER = ("method", "time", "kernels", "copies", "exposed communication", "sent", "saved", "buffers")


def _cells(request: Request, cost: Cost) -> tuple[str, ...]:
    """The cells of a method in the table."""
    return (
        str(cost.method) + ("" if _fits(request, cost) else " (too large)"),
        *map(in_seconds, (cost.seconds.total, *cost.seconds)),
        *map(in_bytes, (cost.sent_forward + cost.sent_backward, cost.saved, cost.buffers)),
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines whose cells stand below one another. The first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _uneven(request: Request) -> str | None:
    """A sentence if some ranks hold fewer rows than others."""
    sharding = request.workload.scores(request.gpus).query
    rows = [sharding.rows(rank) for rank in range(request.gpus)]
    if min(rows) == max(rows):
        return None
    return (
        f"--tokens: {request.workload.tokens} is no multiple of {ROWS_OF_RANK * request.gpus} ({ROWS_OF_RANK} a GPU), "
        f"so the GPUs hold {min(rows)} to {max(rows)} rows."
    )


def reason(request: Request, costs: list[Cost]) -> str:
    """A sentence about the best method, and what the next one takes more of."""
    best = costs[0]
    took = f"{best.method}: {in_seconds(best.seconds.total)}, {in_bytes(best.memory)} a GPU"
    if not _fits(request, best):
        return f"No method fits into --memory {in_bytes(request.limit or 0)}. The fastest is {took}."
    others = [x for x in costs[1:] if _fits(request, x)]
    excluded = len(costs) - 1 - len(others)
    tail = f" {excluded} do not fit into --memory." if excluded else ""
    if not others:
        return f"{'The only method that fits' if excluded else 'Planned'} is {took}.{tail}"
    second = others[0]
    more = second.seconds.total - best.seconds.total
    parts = {
        name.replace("exposed", "exposed communication"): theirs - own
        for name, theirs, own in zip(Seconds._fields, second.seconds, best.seconds, strict=True)
    }
    main_part = max(parts, key=lambda name: parts[name])
    return (
        f"The best is {took}. Next is {second.method}, which takes {in_seconds(more)} more "
        f"({more / best.seconds.total:.1%}), mainly in {main_part}: {in_seconds(parts[main_part])} more.{tail}"
    )


if __name__ == "__main__":
    sys.exit(main())
