"""``python -m fused_attn tune``: measures tile sizes on a GPU of this machine, and stores those that beat `configs`.

Each candidate first has to compile, run, and give the same results as the package's own configuration. Candidates that
do are timed in rounds. Every second round has the reverse order, and the L2 cache is overwritten before each launch.
The median of a candidate counts. A candidate that is less than 2 % faster than the package's own configuration is not
stored, because a GPU's clock rate alone causes such differences.

In this file, `table` is the package's own configuration for a workload, unless it is a `tuned.Table`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends.triton import backend, configs, tuned
from fused_attn.backends.triton.configs import Config
from fused_attn.measurement import GpuTimer, progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = ("bfloat16",)
DEFAULT_HEAD_DIMS = (64, 128)
PLAIN = "plain"
#: The most frequent problems of training first, because --minutes may not suffice for all.
DEFAULT_FEATURES = ("causal", "padding", "causal+padding", PLAIN, "bias", "relative_bias", "dropout")

#: The size of all workloads. It has enough programs to occupy the largest GPU, and fits into the memory of a small one
#: (a bias of float32 takes 256 MiB).
BATCH, HEADS, LENGTH = 4, 16, 2048
WINDOW = 256

#: A candidate is timed in ROUNDS rounds. After SCREENING_ROUNDS, those that take more than NEAR times the fastest
#: candidate's time are dropped.
ROUNDS, SCREENING_ROUNDS = 21, 3
NEAR = 1.15
#: The winner is stored if its time is below this part of the time of the package's own configuration.
WORTH_A_ROW = 0.98


class Workload(NamedTuple):
    """A kernel, and the properties of the problem that it is measured on. It becomes one row of the stored table."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    features: tuple[str, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {dtype} head dim {self.head_dim} {'+'.join(self.features) or PLAIN}"

    def problem(self, device: torch.device | str) -> AttentionProblem:
        """The problem. Each call returns a new object, so that the launcher, which caches a plan for each object, makes
        a new plan for each configuration.
        """
        band = Band()
        if "causal" in self.features:
            band = Band(right=0)
        elif "window" in self.features:
            band = Band(left=WINDOW, right=0)
        on_cpu = AttentionProblem(
            batch=BATCH,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            seqlen_q=LENGTH,
            seqlen_k=LENGTH,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=self.dtype,
            device=torch.device("cpu"),
            scale=self.head_dim**-0.5,
            softcap=30.0 if "softcap" in self.features else 0.0,
            dropout_p=0.1 if "dropout" in self.features else 0.0,
            band=band,
            is_packed="varlen" in self.features,
            has_mask="mask" in self.features,
            has_key_padding="padding" in self.features,
            has_bias="bias" in self.features,
            has_relative_bias="relative_bias" in self.features,
        )
        return on_cpu.on(device)  # The device can also be the name of an architecture, such as "sm_90".


class Outcome(NamedTuple):
    """The measurements of one workload.

    table: the package's own configuration
    best: the fastest configuration, or `table` if none is fast enough to be stored
    ms, baseline_ms: the medians of `best` and `table`
    dropped: why a configuration does not run or gives wrong results
    """

    workload: Workload
    table: Config
    best: Config
    ms: float
    baseline_ms: float
    dropped: dict[Config, str]

    def __str__(self) -> str:
        lines = [f"{self.workload}: {describe(self.table)} takes {self.baseline_ms:.3f} ms"]
        if self.best == self.table:
            lines[0] += ", nothing is worth replacing it"
        else:
            lines[0] += f", {describe(self.best)} {self.ms:.3f} ms ({self.ms / self.baseline_ms - 1.0:+.1%})"
        lines += [f"  dropped {describe(config)}: {reason}" for config, reason in self.dropped.items()]
        return "\n".join(lines)


class Failure(NamedTuple):
    """A workload for which the package's own configuration does not run, so that nothing can be compared."""

    workload: Workload
    table: Config
    reason: str

    def __str__(self) -> str:
        return f"{self.workload}: the package's own {describe(self.table)} FAILS, please report it: {self.reason}"


class Runner(Protocol):
    """The part of the measurement that needs a GPU. Tests replace it."""

    def results(self, workload: Workload, config: Config) -> list[Tensor]:
        """The tensors that the workload's kernel computes with `config`.

        Raises:
            Exception: of any type, if the kernel does not compile or cannot be launched
        """

    def times(self, workload: Workload, order: Sequence[Config]) -> list[float]:
        """The milliseconds of one launch of each configuration, timed in this order.

        `results` has to be called for each of the configurations before.
        """


def main(arguments: argparse.Namespace) -> int:
    """Runs the command with the options that `fused_attn.__main__` has parsed, and returns its exit code.

    Raises:
        ValueError: the value of an option is not allowed. The message names the option.
    """
    if arguments.clear:
        return _clear()
    chosen = {
        "kernels": arguments.kernel,
        "dtypes": arguments.dtype,
        "head_dims": arguments.head_dim,
        "features": arguments.features,
    }
    selected = workloads(**{name: values for name, values in chosen.items() if values is not None})
    has_gpu = torch.cuda.is_available()
    device: Any = arguments.device or ("cuda" if has_gpu or not arguments.dry_run else "sm_90")
    if not arguments.dry_run and not has_gpu:
        print("torch sees no GPU on this machine; --dry-run lists what would be measured on one", file=sys.stderr)
        return 1
    if not arguments.dry_run or device.startswith("cuda"):
        device = _gpu(device)
    for workload in selected:
        if reasons := backend.unsupported_reasons(workload.problem(device)):
            print(f"{workload} cannot run: {'; '.join(reasons)}", file=sys.stderr)
            return 1
    to_try = {workload: candidates(workload, device) for workload in selected}
    if arguments.dry_run:
        print(listing(to_try))
        return 0
    path = tuned.path_of(torch.cuda.get_device_name(device))
    try:
        return run(to_try, GpuRunner(device), path, about(device), arguments.minutes)
    except KeyboardInterrupt:
        print(f"stopped; what had been measured is in {path}", file=sys.stderr)
        return 130


def _gpu(device: str) -> torch.device:
    """The device "cuda" (the current GPU) or "cuda:N" as a torch.device with its index.

    Raises:
        ValueError: this machine has no such GPU
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    count = torch.cuda.device_count()
    index = int(match[1]) if match and match[1] else torch.cuda.current_device() if count > 0 else 0
    if match is None or index >= count:
        expected = "a GPU of this machine, such as cuda:0, or with --dry-run an architecture, such as sm_90"
        raise ValueError(f"--device: expected {expected}, got {device}")
    return torch.device("cuda", index)


def _clear() -> int:
    """Deletes the stored tables of this machine's GPU, or all of them if torch sees no GPU. Returns the exit code."""
    for path in tuned.stored(torch.cuda.get_device_name() if torch.cuda.is_available() else None):
        path.unlink()
        print(f"deleted {path}")
    return 0


def workloads(
    kernels: Iterable[str] | None = None,
    dtypes: Iterable[str] = DEFAULT_DTYPES,
    head_dims: Iterable[int] = DEFAULT_HEAD_DIMS,
    features: Iterable[str] = DEFAULT_FEATURES,
) -> list[Workload]:
    """All combinations of the arguments, in the order of `features`. Kernel "bias" needs features with a bias.

    features: names joined by "+", such as "causal+padding"

    Raises:
        ValueError: an argument has a value that does not exist. The message names the option of the command line.
    """
    kernels = configs.KERNELS if kernels is None else tuple(kernels)
    for kernel in kernels:
        if kernel not in configs.KERNELS:
            raise ValueError(f"--kernel: expected some of {', '.join(configs.KERNELS)}, got {kernel}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: expected some of {', '.join(DTYPES)}, got {dtype}")
    limit = min(backend.max_head_dim(DTYPES[dtype]) for dtype in dtypes)
    for head_dim in head_dims:
        if not 1 <= head_dim <= limit:
            raise ValueError(f"--head-dim: expected a number from 1 to {limit} for {', '.join(dtypes)}, got {head_dim}")
    selected = [
        Workload(kernel, DTYPES[dtype], head_dim, names)
        for names, dtype, head_dim, kernel in itertools.product(map(_parse, features), dtypes, head_dims, kernels)
        if kernel != "bias" or "bias" in names or "relative_bias" in names
    ]
    if not selected:
        raise ValueError("--kernel, --features: kernel bias is for features with bias or relative_bias only")
    return selected


def _parse(features: str) -> tuple[str, ...]:
    """ "causal+padding" -> ("causal", "padding")"""
    names = [] if features == PLAIN else features.split("+")
    for name in names:
        if name not in tuned.FEATURES:
            expected = ", ".join((PLAIN, *tuned.FEATURES))
            raise ValueError(f"--features: expected some of {expected}, joined by +, got {features}")
    for one, other in (("causal", "window"), ("varlen", "padding"), ("varlen", "mask"), ("varlen", "bias")):
        if one in names and other in names:
            raise ValueError(f"--features: {one} and {other} do not occur together, got {features}")
    return tuple(name for name in tuned.FEATURES if name in names)


def candidates(workload: Workload, device: torch.device | str) -> list[Config]:
    """The package's own configuration of a workload, then the others that are tried."""
    problem = workload.problem(device)
    table = configs.choose(workload.kernel, problem)
    return [table, *(config for config in configs.candidates(workload.kernel, problem) if config != table)]


def measure(
    workload: Workload,
    to_try: Sequence[Config],
    runner: Runner,
    is_time_up: Callable[[], bool] = lambda: False,
    advance: Callable[[], None] = lambda: None,
) -> Outcome | Failure | None:
    """Compares configurations by their results and times. None if the time is up before the end.

    to_try: configurations; the first is the package's own
    advance: is called after each configuration whose results are known, for a progress bar
    """
    table = to_try[0]
    try:
        truth = runner.results(workload, table)
    except Exception as error:
        return Failure(workload, table, _reason(error))
    advance()
    dropped = {}
    for config in to_try[1:]:
        if is_time_up():
            return None
        # Compilers and drivers raise exceptions of many types. KeyboardInterrupt is none of them and ends the command.
        try:
            found = runner.results(workload, config)
        except Exception as error:
            dropped[config] = _reason(error)
        else:
            if (difference := _difference(found, truth, workload.dtype)) is not None:
                dropped[config] = difference
        advance()

    running = [config for config in to_try if config not in dropped]
    times: dict[Config, list[float]] = {config: [] for config in running}
    for index in range(ROUNDS):
        if is_time_up():
            return None
        if index == SCREENING_ROUNDS:
            limit = NEAR * min(map(statistics.median, times.values()))
            running = [c for c in running if c == table or statistics.median(times[c]) <= limit]
        order = running if index % 2 == 0 else running[::-1]
        for config, ms in zip(order, runner.times(workload, order), strict=True):
            times[config].append(ms)
    medians = {config: statistics.median(times[config]) for config in running}
    best = min(medians, key=medians.__getitem__)
    if not medians[best] < WORTH_A_ROW * medians[table]:
        best = table
    return Outcome(workload, table, best, medians[best], medians[table], dropped)


def _difference(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why the tensors `found` differ too much from `truth`, or None if they do not.

    Other tiles change the order of sums. This changes a result by some units of rounding of its dtype and of float32,
    the dtype of sums.
    """
    allowed = 4.0 * torch.finfo(dtype).eps + 256.0 * torch.finfo(torch.float32).eps
    for ours, theirs in zip(found, truth, strict=True):
        # `ours == theirs` includes -inf, which is the LSE of an empty row.
        size = theirs[theirs.isfinite()].abs().max().item()
        error = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item()
        # `error > allowed * size` would be False if the error is NaN.
        if not error <= allowed * size:
            return f"wrong result, off by {error:.1e} where {allowed * size:.1e} is allowed"
    return None


def with_outcome(table: tuned.Table, outcome: Outcome) -> tuned.Table:
    """The stored table with the row of this outcome instead of an earlier row for the same problems.

    There is no row for them if the package's own configuration won.
    """
    workload = outcome.workload
    key = tuned.Key(
        workload.kernel,
        workload.dtype.itemsize,
        configs.padded_head_dim(workload.head_dim),
        workload.features,
        outcome.table,
    )
    rows = {other: row for other, row in table.rows.items() if other != key}
    if outcome.best != outcome.table:
        rows[key] = tuned.Row(outcome.best, outcome.ms, outcome.baseline_ms)
    return tuned.Table(table.about, rows)


def describe(config: Config) -> str:
    """For example "block_m=128 block_n=64 num_warps=4 num_stages=3"."""
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


def _reason(error: Exception) -> str:
    """The type of an error, and the first line of its message."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def run(
    to_try: dict[Workload, list[Config]],
    runner: Runner,
    path: Path,
    about: dict[str, object],
    minutes: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measures all workloads, prints their outcomes and returns the exit code: 1 if one failed.

    The table is stored after each workload, so that nothing is lost if the user interrupts the command.
    """
    end = clock() + 60.0 * minutes
    table = tuned.Table(about, _stored_rows(path))
    measured = failed = 0
    with progress(sum(map(len, to_try.values()))) as advance:
        for workload, configurations in to_try.items():
            outcome = measure(workload, configurations, runner, lambda: clock() >= end, partial(advance, str(workload)))
            if outcome is None:
                print(f"{minutes:g} minutes are over; --minutes gives more")
                break
            print(outcome, flush=True)
            measured += 1
            if isinstance(outcome, Failure):
                failed += 1
            else:
                table = with_outcome(table, outcome)
                tuned.save(path, table)
    print(f"{measured} of {len(to_try)} measured, {len(table.rows)} faster configurations stored in {path}")
    return 1 if failed else 0


def _stored_rows(path: Path) -> dict[tuned.Key, tuned.Row]:
    """The rows of an earlier run, or none if there is no file or a damaged one."""
    try:
        return tuned.load(path).rows
    except (OSError, ValueError):
        return {}


def listing(to_try: dict[Workload, list[Config]]) -> str:
    """What --dry-run prints: the workloads and the numbers of their configurations."""
    lines = [f"{workload}: {describe(tries[0])}, {len(tries) - 1} others" for workload, tries in to_try.items()]
    return "\n".join([*lines, f"{len(to_try)} to measure, {sum(map(len, to_try.values()))} configurations in all"])


class GpuRunner:
    """The `Runner` that launches kernels on a GPU and times them with CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timer = GpuTimer(device)
        self._workload: Workload | None = None
        self._inputs: _Inputs | None = None
        self._calls: dict[Config, Callable[[], list[Tensor]]] = {}

    def results(self, workload: Workload, config: Config) -> list[Tensor]:
        if workload != self._workload:
            self._inputs, self._calls = None, {}  # frees the memory of the last workload before the next one needs it
            self._workload, self._inputs = workload, _Inputs(workload, self._device)
        given = self._inputs
        assert given is not None, "made for the workload"
        # The first call with each variant plans and compiles. A floating-point padding mask is a bias for the kernel,
        # which needs more registers and shared memory than a bool mask. A configuration has to run with both.
        call = given.call(config)
        found: list[Tensor] = []
        for inputs in given.variants:
            found += call(inputs)
        torch.cuda.synchronize(self._device)
        self._calls[config] = lambda: call(given.variants[0])
        return [x.float() for x in found]

    def times(self, workload: Workload, order: Sequence[Config]) -> list[float]:
        seconds = self._timer.round(self._calls, order)
        return [1e3 * seconds[config] for config in order]


class _Inputs:
    """The tensors of a workload, with the outputs of the forward kernel for measurements of backward kernels.

    variants: first the inputs that are timed, then others that the same configuration has to be able to run
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        from fused_attn.backends.triton import launcher

        self._workload, self._device, self._launcher = workload, device, launcher
        self._generator = torch.Generator(device).manual_seed(0)
        problem = workload.problem(device)
        # With padding or packed sequences, about half of the positions exist, so that kernels that skip the others
        # show it in their time.
        lengths = torch.tensor([LENGTH * (batch + 1) // (BATCH + 1) for batch in range(BATCH)], device=device)
        shape: tuple[int, ...] = (BATCH, HEADS, LENGTH, workload.head_dim)
        cu_seqlens = None
        if problem.is_packed:
            shape = (int(lengths.sum()), HEADS, workload.head_dim)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        query, key, value, self._dout = (self._randn(*shape).to(workload.dtype) for _ in range(4))
        inputs = Inputs(
            query,
            key,
            value,
            # float32, because parameters have this dtype under mixed precision, and it needs most registers.
            bias=self._randn(1, HEADS, LENGTH, LENGTH) if problem.has_bias else None,
            relative_bias=self._randn(HEADS, 2 * LENGTH - 1) if problem.has_relative_bias else None,
            seed=torch.zeros((), dtype=torch.int64, device=device) if problem.dropout_p else None,
            mask=self._randn(BATCH, 1, LENGTH, LENGTH) < 1.0 if problem.has_mask else None,
            key_padding=torch.arange(LENGTH, device=device) >= lengths[:, None] if problem.has_key_padding else None,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
        )
        self.variants = [inputs]
        if problem.has_key_padding and not problem.has_bias:
            self.variants.append(inputs._replace(key_bias=self._randn(BATCH, LENGTH)))
        self._outputs = {
            id(inputs): self._launcher.forward(problem, inputs, True, False)[:2] for inputs in self.variants
        }

    def call(self, config: Config) -> Callable[[Inputs], list[Tensor]]:
        """A function that runs the workload's kernel with `config`.

        Other kernels that the call needs run with the configurations that `tuned.choose` gives them.
        """
        problem = self._workload.problem(self._device)
        kernel, features = self._workload.kernel, self._workload.features
        wanted = Wanted(
            query=kernel == "dq",
            key=kernel == "dkdv",
            value=kernel == "dkdv",
            bias=kernel == "bias" and "bias" in features,
            relative_bias=kernel == "bias" and "relative_bias" in features,
        )

        def run(inputs: Inputs) -> list[Tensor]:
            with tuned.forced(kernel, config):
                if kernel == "forward":
                    return list(self._launcher.forward(problem, inputs, True, False)[:2])
                saved = Saved(*self._outputs[id(inputs)], self._dout)
                grads = self._launcher.backward(problem, inputs, saved, wanted)
                return [x for x in grads if x is not None]

        return run

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device)


def about(device: torch.device) -> dict[str, object]:
    """What a stored table says about its measurement: GPU, driver, versions and date."""
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "driver": _driver(),
        "versions": {**tuned.versions(), "torch": torch.__version__, "CUDA of torch": torch.version.cuda},
        "date": datetime.date.today().isoformat(),
    }


def _driver() -> str:
    """The version of the GPU's driver, or "unknown". torch only knows the version of CUDA that the driver offers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
