"""Numerical self-check of every backend that can run here: ``python -m fused_attn check``.

The rule is that of `tolerance`, as in the tests. The truth is the reference formula in float64, and eager attention is
the formula in the dtype under test.

The cases are not those of the tests: those are many, include lengths and values for which a check would take minutes,
and need the tests' own oracle.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn import tolerance
from fused_attn.api import explain, fused_attention, fused_attention_paged, fused_attention_varlen
from fused_attn.backends import cpu, dispatch, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call to check.

    kwargs: makes the arguments besides query, key and value
    is_packed: the rows of the batch are packed, as three sequences, one of which has no queries; over pages, the
        queries are packed, as one sequence with few of them and one with many
    page_size: keys and values lie in pages of this size; 0 = they do not
    has_dlse: the loss depends on the lse, too
    has_gradients: gradients are checked. Those of one query are differences of nearly equal numbers, and calls of one
        query have no gradients where they matter, which is in decoding.
    """

    name: str
    kwargs: Callable[[torch.device], dict[str, Any]] = field(default=lambda device: {})
    num_kv_heads: int = 4
    seqlen_q: int = 93
    seqlen_k: int = 130
    head_dim: int = 64
    value_dim: int | None = None  # None = head_dim
    is_packed: bool = False
    page_size: int = 0
    has_dlse: bool = False
    has_gradients: bool = True


def _padding(device: torch.device) -> Tensor:
    """(2, 130) bool, True = padding: the last keys of one batch entry, and every third key of the other."""
    position = torch.arange(130, device=device)
    return torch.stack([position >= 57, position % 3 == 0])


def _ranges(device: torch.device) -> Tensor:
    """(93, 2, 2) int32: each query sees the first 20 keys, and some keys behind its own position."""
    begin = torch.arange(93, device=device)
    zero = torch.zeros_like(begin)
    return torch.stack([torch.stack([zero, zero + 20], -1), torch.stack([begin, begin + 35], -1)], 1).int()


CASES = (
    Case("plain"),
    Case("causal", lambda device: {"is_causal": True}),
    Case("padding", lambda device: {"key_padding_mask": _padding(device)}),
    Case("causal + padding", lambda device: {"is_causal": True, "key_padding_mask": _padding(device)}),
    Case(
        "empty rows",
        lambda device: {"key_padding_mask": _padding(device) | (torch.arange(2, device=device) == 0)[:, None]},
    ),
    Case("window", lambda device: {"window_size": (17, 5)}),
    Case("bool mask", lambda device: {"attn_mask": _random(2, 1, 93, 130, device=device) > 0}),
    Case("ranges of keys", lambda device: {"key_ranges": _ranges(device)}),
    Case("bias", lambda device: {"attn_mask": _random(1, 4, 93, 130, device=device)}),
    Case("relative bias", lambda device: {"relative_bias": _random(4, 222, device=device)}),
    Case("float padding", lambda device: {"key_padding_mask": _random(2, 130, device=device)}),
    Case("negative scale", lambda device: {"scale": -0.1}),
    Case("softcap + sinks", lambda device: {"softcap": 5.0, "sinks": _random(4, device=device)}),
    Case("dropout", lambda device: {"dropout_p": 0.2, "dropout_seed": 7}),
    Case("GQA", lambda device: {"enable_gqa": True, "is_causal": True}, num_kv_heads=2),
    Case("gradient of lse", has_dlse=True),
    Case("long", lambda device: {"is_causal": True}, seqlen_q=333, seqlen_k=590),
    Case("head dim 40", head_dim=40),
    Case("head dim 96", lambda device: {"is_causal": True}, head_dim=96),
    Case("head dim 128", lambda device: {"is_causal": True}, head_dim=128),
    Case("head dim 256", head_dim=256),
    Case("head dim 512", head_dim=512),
    Case("value dim 80", value_dim=80),
    Case("packed", lambda device: {"is_causal": True}, is_packed=True),
    Case(
        "packed, lower right",
        lambda device: {"is_causal": True, "diagonal_alignment": "lower_right"},
        is_packed=True,
    ),
    Case("packed + dropout", lambda device: {"dropout_p": 0.2, "dropout_seed": 7}, is_packed=True),
    Case("one query", lambda device: {"key_padding_mask": _padding(device)}, seqlen_q=1),
    Case("one of many keys", seqlen_q=1, seqlen_k=4096, has_gradients=False),
    Case("pages", lambda device: {"is_causal": True}, num_kv_heads=2, page_size=16, has_gradients=False),
    Case("pages of 12", lambda device: {"is_causal": True}, page_size=12, has_gradients=False),
    Case("one query over pages", seqlen_q=1, seqlen_k=1000, page_size=64, has_gradients=False),
    Case("packed over pages", num_kv_heads=2, is_packed=True, page_size=16, has_gradients=False),
)


@dataclass(frozen=True)
class Result:
    """The verdict on one case, dtype and backend.

    measure: the worst of all results of the call; None if the call has failed
    failure: the error that the call has raised
    """

    backend: str
    dtype: torch.dtype
    case: str
    measure: tolerance.Measure | None
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is at most the allowed one."""
        return self.measure is not None and self.measure.is_right

    def __str__(self) -> str:
        verdict = "ok" if self.is_right else "WRONG"
        dtype = str(self.dtype).removeprefix("torch.")
        if self.measure is None:
            return f"{self.backend:<18} {dtype:<9} {self.case:<18} failed: {self.failure}  {verdict}"
        figures = f"error {self.measure.error:8.1e}  allowed {self.measure.allowed:8.1e}"
        return f"{self.backend:<18} {dtype:<9} {self.case:<18} {figures}  {verdict}"


class Job(NamedTuple):
    """One case in one dtype, on all backends that can run it on a device of this type."""

    device: str
    dtype: torch.dtype
    case: str


def jobs() -> list[Job]:
    """All jobs of this machine."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [Job(device, dtype, case.name) for device in devices for dtype in DTYPES for case in CASES]


def num_processes() -> int:
    """How many processes share the jobs of the GPU. Most of their time goes into compiling Triton kernels."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def run(chosen: list[Job], processes: int) -> Iterator[list[Result]]:
    """The results of the jobs: first those for the CPU, then those for GPUs, both in order.

    processes: how many processes share the jobs for GPUs. A fault of a kernel then ends its own process. They begin at
        once, and compile while this process runs the jobs for the CPU.
    """
    on_cpu = [job for job in chosen if job.device == "cpu"]
    on_gpu = [job for job in chosen if job.device != "cpu"]
    if processes == 1 or not on_gpu:
        yield from map(results_of, [*on_cpu, *on_gpu])
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not work in forked processes
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        futures: list[Future[list[Result]]] = [pool.submit(results_of, job) for job in on_gpu]
        yield from map(results_of, on_cpu)
        for job, future in zip(on_gpu, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool as error:
                yield [Result(job.device, job.dtype, job.case, None, f"a process has ended abruptly: {error}")]


def results_of(job: Job) -> list[Result]:
    """One result for each backend that can run the job.

    The CPU backend counts once for every instruction set of this CPU.
    """
    device, dtype = torch.device(job.device), job.dtype
    case = next(case for case in CASES if case.name == job.case)
    inputs = _inputs(case, device, dtype)
    problem = replace(
        explain(*inputs, **{"enable_gqa": True} | case.kwargs(device)).problem, is_packed=case.is_packed,
        page_size=case.page_size, has_key_lengths=case.page_size > 0,
    )  # fmt: skip
    reasons = dispatch.explain(problem, None).reasons
    runnable = [name for name, why_not in reasons.items() if not why_not and name != reference.name]
    if not runnable:
        return []
    with _one_thread():
        exact = _evaluate(case, [x.double() for x in inputs], reference.name, dtype)
        eager = _evaluate(case, inputs, reference.name, dtype)
        noise = _noise(case, inputs, exact)
    results = []
    for label, backend in _variants(runnable):
        try:
            ours = _evaluate(case, inputs, backend, dtype)
        except Exception as error:  # The check goes on whatever a kernel or its compiler raises.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            results.append(Result(label, dtype, case.name, None, reason))
        else:
            with _one_thread():
                results.append(_judge(label, dtype, case.name, ours, eager, exact, noise))
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within this context, torch computes on one thread.

    The tensors of the cases are small. On a busy machine, torch's threads would wait for one another most of the time.
    And between torch's operations, the threads of torch would take processors from those of the CPU kernels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _variants(runnable: list[str]) -> Iterator[tuple[str, str]]:
    """(label, backend name) of the backends.

    For the CPU backend, there is an entry for every instruction set. It is selected until the next entry is asked for.
    """
    for backend in runnable:
        if backend == cpu.name:
            in_use = cpu._C.cpu_isa()
            for isa in cpu._C.cpu_isas():
                cpu._C.select_cpu_isa(isa)
                try:
                    yield f"cpu {isa}", cpu.name
                finally:
                    cpu._C.select_cpu_isa(in_use)
        else:
            yield backend, backend


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value."""
    shapes = (
        (2, 4, case.seqlen_q, case.head_dim),
        (2, case.num_kv_heads, case.seqlen_k, case.head_dim),
        (2, case.num_kv_heads, case.seqlen_k, case.value_dim or case.head_dim),
    )
    return [_random(*shape, device=device, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def _evaluate(case: Case, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All results of a backend by name, converted to float64.

    ``out`` is from a call without gradients and without lse, for which some backends have other kernels. If the case
    has gradients, there are also ``out with gradients``, ``lse``, ``dquery``, ``dkey``, ``dvalue``, and the gradients
    of floating-point masks and sinks.

    dtype: the dtype under test. Masks are rounded to it, also if the inputs are float64 because the truth is computed.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in zip(("query", "key", "value"), inputs, strict=True)}
    kwargs = case.kwargs(inputs[0].device)
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            kwargs[name] = leaves[name] = x.to(dtype).to(inputs[0].dtype).requires_grad_()
    function: Callable[..., Any] = _packed_attention if case.is_packed else fused_attention
    if case.page_size:
        function = functools.partial(_paged_attention, case)
    attention = functools.partial(function, *list(leaves.values())[:3], **kwargs, backend=backend)
    with torch.no_grad():
        results = {"out": attention()}
    if case.has_gradients:
        results |= _with_gradients(case, attention, leaves)
    return {name: x.detach().double() for name, x in results.items()}


def _with_gradients(case: Case, attention: Callable[..., Any], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse and the gradients of the leaves, from one call. Empty rows get the lse 0 in place of -inf."""
    out, lse = attention(return_lse=True)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    outputs, douts = [out], [_dout(out)]
    if case.has_dlse:
        outputs.append(lse)
        douts.append(_dlse(lse))
    grads = torch.autograd.grad(outputs, list(leaves.values()), douts)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out with gradients": out, "lse": lse, **named}


def _dout(out: Tensor) -> Tensor:
    """The gradient of the loss by the output."""
    return _random(*out.shape, device=out.device, seed=3).to(out.dtype)


def _dlse(lse: Tensor) -> Tensor:
    """The gradient of the loss by the lse, in cases that have one."""
    return _random(*lse.shape, device=lse.device, seed=4).to(lse.dtype)


def _noise(case: Case, inputs: list[Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The noise of each result of `_evaluate`. `tolerance.noise` says what noise is.

    Scores and gradients of probs are taken between all rows of a head, over the whole batch, because in packed calls,
    the rows of batch entries meet. Masks are ignored.
    """
    query, key, value = (x.double() for x in inputs)
    kwargs = case.kwargs(query.device)
    scale = kwargs.get("scale", 1.0 / math.sqrt(case.head_dim))
    dout = _dout(exact["out"])
    rows_of_dout = dout.view(query.shape[0], -1, *dout.shape[1:]).transpose(1, 2) if case.is_packed else dout
    noise = tolerance.noise(
        inputs[0].dtype,
        exact,
        {"query": query, "key": key, "value": value},
        dout,
        _dlse(exact["lse"]) if case.has_dlse else None,
        scale=scale,
        dropout_p=kwargs.get("dropout_p", 0.0),
        largest_score=abs(scale) * _largest_product(query, key),
        largest_weight_grad=_largest_product(rows_of_dout, value),
    )
    return noise | {"out with gradients": noise["out"]}


def _largest_product(rows: Tensor, columns: Tensor) -> float:
    """The largest magnitude of <row, column>, for all rows and columns of a head: (B, H, L, D) and (B, Hkv, S, D)."""
    columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], 1)
    return tolerance.largest(torch.einsum("bhld,chsd->hblcs", rows, columns))


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """`fused_attention_varlen` of the rows of (B, H, L, D) tensors, which are divided into three sequences."""
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * L, H, D)
    total_q, total_k = query.shape[0], key.shape[0]
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor(x, dtype=torch.int32, device=query.device)
        for x in ([0, total_q // 5, total_q // 5, total_q], [0, total_k // 3, total_k // 2, total_k])
    )
    return fused_attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, total_q, total_k, **kwargs)


def _paged_attention(
    case: Case, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor | tuple[Tensor, ...]:
    """`fused_attention_paged` of (B, H, L, D) tensors, whose keys and values are put into pages. The last pages are not
    full.
    """
    batch, _, seqlen_k, _ = key.shape
    columns = -(-seqlen_k // case.page_size)
    behind = columns * case.page_size - seqlen_k
    pages = (
        torch.nn.functional.pad(x, (0, 0, 0, behind), value=float("nan")).unflatten(2, (columns, case.page_size))
        for x in (key, value)
    )  # (B, Hkv, columns, page_size, D)
    key_pages, value_pages = (x.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous() for x in pages)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    block_table = torch.arange(batch * columns, **integers).view(batch, columns)
    lengths = torch.full((batch,), seqlen_k, **integers)
    if case.is_packed:
        query = query.transpose(1, 2).flatten(0, 1)  # (B * L, H, D)
        total = query.shape[0]
        kwargs |= {"cu_seqlens_q": torch.tensor([0, 3, total], **integers), "max_seqlen_q": total}
    return fused_attention_paged(query, key_pages, value_pages, block_table, lengths, **kwargs)


def _judge(
    label: str,
    dtype: torch.dtype,
    case: str,
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    noise: dict[str, float],
) -> Result:
    """The result of a case: the worst measure of all tensors, which is the one with the largest error / allowed."""
    measures: list[tolerance.Measure] = []
    for name, truth in exact.items():
        stored = torch.float32 if name == "lse" and dtype != torch.float64 else dtype
        floor = tolerance.floor(dtype, stored, tolerance.largest(truth), noise[name])
        measures += tolerance.measures((ours[name] - truth).abs(), (eager[name] - truth).abs(), floor)
    worst = max(measures, key=lambda m: m.error / m.allowed if m.error == m.error else float("inf"))
    return Result(label, dtype, case, worst)


def _random(*shape: int, device: torch.device, seed: int = 11) -> Tensor:
    """Normally distributed float64 numbers, the same on every device. The seed determines them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
