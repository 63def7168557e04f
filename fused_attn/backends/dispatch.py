"""Which backend runs a problem, and why the others cannot."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import cpu, cuda, reference
from fused_attn.backends.base import Backend
from fused_attn.backends.triton import backend as triton

BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)

BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)


class Preference(NamedTuple):
    """The order in which backends are asked, for problems that meet all conditions.

    min_capability: the lowest compute capability of the GPU; None = any device
    min_seqlen_q: the smallest number of queries
    min_tiles: the smallest number of tiles, each of 128 queries of one head
    is_split: the CUDA kernels divide the keys among programs
    """

    min_capability: tuple[int, int] | None
    min_seqlen_q: int
    min_tiles: int
    order: tuple[Backend, ...]
    reason: str
    is_split: bool = False


#: The first row that fits decides, for every feature alike: a backend that lacks a feature says so, and the next is
#: asked.
PREFERENCES = (
    Preference(
        cuda.MIN_CAPABILITY,
        129,
        0,
        (cpu, cuda, triton, reference),
        "the CUDA kernels choose registers and the order of instructions by hand, which Triton's compiler does not",
    ),
    Preference(
        cuda.MIN_CAPABILITY,
        64,
        132,
        (cpu, cuda, triton, reference),
        "a head has one tile of queries, and the heads alone occupy the multiprocessors: an H100 has 132",
    ),
    Preference(
        cuda.MIN_CAPABILITY,
        0,
        0,
        (cpu, cuda, triton, reference),
        "the CUDA kernels divide the keys of a head, too, and decide by hand how many loads are on their way",
        is_split=True,
    ),
    Preference(
        None,
        0,
        0,
        (cpu, triton, cuda, reference),
        "with up to 128 queries, keys are divided among programs, which CUDA kernels do for few queries only",
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
    if problem.num_splits and row.min_tiles:
        return False  # A fixed cut promises results that do not depend on the batch, so neither may the backend.
    tiles = problem.batch * problem.num_heads * -(-problem.seqlen_q // 128)
    if problem.seqlen_q < row.min_seqlen_q or tiles < row.min_tiles:
        return False
    if row.min_capability is not None and (problem.capability or (0, 0)) < row.min_capability:
        return False
    return not row.is_split or cuda.num_splits(problem) > 0


def explain(problem: AttentionProblem, backend: str | None) -> Explanation:
    return Explanation(
        problem,
        _select(problem, backend).name,
        {candidate.name: candidate.unsupported_reasons(problem) for candidate in preferred(problem)},
    )
