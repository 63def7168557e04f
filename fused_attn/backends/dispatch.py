"""Which backend runs a problem, and why the others cannot."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import cpu, reference
from fused_attn.backends.base import Backend
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import splits
from fused_attn.backends.triton import backend as triton

BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)

BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)


class Preference(NamedTuple):
    """The order in which backends are asked, for problems of a kind.

    fills_no_tile: whether the kind is that of `_fills_no_tile`; otherwise, all problems are of this kind
    """

    fills_no_tile: bool
    order: tuple[Backend, ...]
    reason: str


#: The first row that fits decides, for every feature alike: a backend that lacks a feature says so, and the next is
#: asked.
PREFERENCES = (
    Preference(
        True,
        (cpu, triton, cuda, reference),
        "the heads of a head group share a tile in the Triton kernels, and read the keys once. The large CUDA kernels "
        "have a tile for each head, and at most a quarter of its rows would be queries",
    ),
    Preference(
        False,
        (cpu, cuda, triton, reference),
        "the CUDA kernels choose registers and the order of instructions by hand, which Triton's compiler does not",
    ),
)


@dataclass(frozen=True)
class Explanation:
    """``print(explain(...))``: the problem, the backend that runs it, and why each other one does not."""

    problem: AttentionProblem
    chosen: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for backend, reasons in self.reasons.items():
            verdict = "runs" if backend == self.chosen else "; ".join(reasons) or f"not needed, {self.chosen} runs"
            lines.append(f"  {backend:<10} {verdict}")
        return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def choose(problem: AttentionProblem, backend: str | None) -> Backend:
    """The named backend, or the first that can run the problem; warns if the one that should come first is missing.

    The cache keeps the answer for each problem, so that a warning costs later calls nothing.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run the problem (with all its reasons).
    """
    chosen = _select(problem, backend)
    if backend is not None or problem.device.type == "meta":
        return chosen
    if chosen is reference:
        kernels = (cpu,) if problem.device.type == "cpu" else (triton, cuda)
        _warn_of_reference(tuple((kernel.name, kernel.unsupported_reasons(problem)[0]) for kernel in kernels))
    elif chosen is triton and _comes_before(cuda, triton, problem):
        reason = cuda.build_reason(problem)
        if cuda.unsupported_reasons(problem) == [reason]:
            _warn_of_triton(reason)
    elif chosen is cpu and (reason := cpu.build_reason()) is not None:
        _warn_of_instruction_set(reason)
    return chosen


def _comes_before(first: Backend, second: Backend, problem: AttentionProblem) -> bool:
    order = preferred(problem)
    return order.index(first) < order.index(second)


@functools.cache
def _warn_of_triton(reason: str) -> None:
    """Warns once for each reason why the installation lacks CUDA kernels."""
    warnings.warn(
        "fused_attention runs on the Triton kernels. The CUDA kernels, which come first for this call, cannot run: "
        + reason,
        stacklevel=2,
    )


@functools.cache
def _warn_of_instruction_set(reason: str) -> None:
    """Warns once for each reason why the CPU kernels are slower than this machine allows."""
    warnings.warn(f"fused_attention is slower than this machine allows: {reason}", stacklevel=2)


@functools.cache
def _warn_of_reference(reasons: tuple[tuple[str, str], ...]) -> None:
    """Warns once for each set of reasons. A reason is (name of a backend, why it cannot run)."""
    warnings.warn(
        "fused_attention runs on the PyTorch reference, which is slow and stores every score, because no kernel can:\n"
        + "\n".join(f"  - {backend}: {reason}" for backend, reason in reasons),
        stacklevel=2,
    )


def _select(problem: AttentionProblem, backend: str | None) -> Backend:
    if backend is None:
        return next(candidate for candidate in preferred(problem) if not candidate.unsupported_reasons(problem))
    for candidate in BACKENDS:
        if candidate.name == backend:
            if reasons := candidate.unsupported_reasons(problem):
                raise ValueError(
                    f"backend={backend!r} cannot run {problem}:\n" + "\n".join(f"  - {reason}" for reason in reasons)
                )
            return candidate
    raise ValueError(f"backend: expected None or one of {BACKEND_NAMES}, got {backend!r}")


def preferred(problem: AttentionProblem) -> tuple[Backend, ...]:
    """All backends, in the order in which they are asked for this problem."""
    return next(row.order for row in PREFERENCES if _fits(row, problem))


def _fits(row: Preference, problem: AttentionProblem) -> bool:
    return not row.fills_no_tile or _fills_no_tile(problem)


def _fills_no_tile(problem: AttentionProblem) -> bool:
    """Whether the queries of a head group fit into one tile, fill at most a quarter of a tile for each head, and are
    too many for the decode kernels of CUDA.
    """
    rows = problem.seqlen_q * problem.group_size
    has_few = 4 * problem.seqlen_q <= splits.LARGE_TILE_ROWS and problem.num_heads >= 4 * problem.num_kv_heads
    return has_few and rows <= splits.LARGE_TILE_ROWS and not splits.decode_tiles(problem)


def explain(problem: AttentionProblem, backend: str | None) -> Explanation:
    return Explanation(
        problem,
        _select(problem, backend).name,
        {candidate.name: candidate.unsupported_reasons(problem) for candidate in preferred(problem)},
    )
