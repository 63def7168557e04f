"""`FlopCounterMode` counts the operations of attention, and torch's profiler shows its events, on all paths."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import runnable_backends
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import FusedMultiheadAttention, fused_attention, fused_attention_varlen
from fused_attn.nn import StaticSelfAttentionCache

BATCH, HEADS, SEQLEN_Q, SEQLEN_K, HEAD_DIM = 2, 4, 7, 9, 8
#: The reference backend consists of torch's operators, so torch counts its matrix products.
KERNELS = [name for name in runnable_backends() if name != "reference"]


@pytest.fixture
def leaves(generator: torch.Generator) -> list[Tensor]:
    lengths = (SEQLEN_Q, SEQLEN_K, SEQLEN_K)
    return [torch.randn(BATCH, HEADS, length, HEAD_DIM, generator=generator, requires_grad=True) for length in lengths]


def count(function: Callable, *args) -> dict[str, int]:
    with FlopCounterMode(display=False) as mode:
        function(*args)
    return {str(operator): flops for operator, flops in mode.get_flop_counts()["Global"].items()}


def step(function: Callable) -> Callable:
    return lambda *args: function(*args).sum().backward()


def attend(backend: str, **options) -> Callable:
    return lambda *args: fused_attention(*args, backend=backend, **options)


# ---- FlopCounterMode


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
def test_as_many_as_torch_counts(kernel: str, leaves: list[Tensor]) -> None:
    """Without a mask, our count is torch's count for SDPA.

    On the CPU, SDPA has to run its version of plain products.
    """
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = sum(count(step(F.scaled_dot_product_attention), *leaves).values())
    ours = count(step(attend(kernel)), *leaves)
    forward, backward = ours["fused_attn.attention"], ours["fused_attn.attention_backward"]
    product = 2 * BATCH * HEADS * SEQLEN_Q * SEQLEN_K * HEAD_DIM
    assert (forward, backward) == (2 * product, 5 * product)
    assert theirs == 6 * product, "torch keeps the scores, which fused kernels compute twice"


def visible(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    return sum(
        (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k))
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("options", "band"),
    [
        ({"is_causal": True}, (-1, 0)),
        ({"window_size": (2, 1)}, (2, 1)),
        ({"window_size": (3, -1)}, (3, -1)),
        ({"window_size": (3, 50), "is_causal": True}, (3, 0)),
    ],
    ids=str,
)
def test_only_visible_scores_count(options: dict, band: tuple[int, int], kernel: str, leaves: list[Tensor]) -> None:
    scores = BATCH * HEADS * visible(SEQLEN_Q, SEQLEN_K, *band)
    ours = count(step(attend(kernel, **options)), *leaves)
    assert ours == {
        "fused_attn.attention": 4 * scores * HEAD_DIM,
        "fused_attn.attention_backward": 10 * scores * HEAD_DIM,
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_trace_counts_the_lengths_that_it_runs_with(kernel: str) -> None:
    traced = torch.jit.trace(lambda x: attend(kernel)(x, x, x), torch.randn(1, 2, 5, 8))
    x = torch.randn(1, 2, 9, 8)
    assert count(traced, x) == count(attend(kernel), x, x, x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_wanted_gradients_count(kernel: str, leaves: list[Tensor]) -> None:
    query, key, value = leaves
    product = 2 * BATCH * HEADS * SEQLEN_Q * SEQLEN_K * HEAD_DIM
    for inputs, products in (((query, key.detach(), value.detach()), 3), ((query.detach(), key.detach(), value), 2)):
        assert count(step(attend(kernel)), *inputs)["fused_attn.attention_backward"] == products * product


@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_heads_and_packed_sequences(kernel: str, generator: torch.Generator) -> None:
    """The count is the sum over the sequences, and key heads shared by several query heads do not lower it."""
    lengths_q, lengths_k = (3, 0, 6), (5, 2, 4)
    offsets = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    rows = [
        torch.randn(sum(lengths), heads, dim, generator=generator)
        for lengths, heads, dim in ((lengths_q, 4, 8), (lengths_k, 2, 8), (lengths_k, 2, 6))
    ]
    ours = count(
        lambda *args: fused_attention_varlen(*args, *offsets, 6, 5, is_causal=True, enable_gqa=True, backend=kernel),
        *rows,
    )
    scores = sum(visible(*lengths, -1, 0) for lengths in zip(lengths_q, lengths_k, strict=True))
    assert ours == {"fused_attn.attention": 2 * 4 * scores * (8 + 6)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_half_a_step(what: str, kernel: str, leaves: list[Tensor]) -> None:
    product = 2 * BATCH * HEADS * SEQLEN_Q * SEQLEN_K * HEAD_DIM
    if what == "forward":
        assert count(attend(kernel), *leaves) == {"fused_attn.attention": 2 * product}
    else:
        loss = attend(kernel)(*leaves).sum()
        assert count(loss.backward) == {"fused_attn.attention_backward": 5 * product}


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_and_transformed(kernel: str, leaves: list[Tensor]) -> None:
    expected = count(step(attend(kernel)), *leaves)
    torch.compiler.reset()
    compiled = torch.compile(attend(kernel), backend="aot_eager")
    step(compiled)(*leaves)
    assert count(step(compiled), *leaves) == expected
    gradient = torch.func.grad(lambda *args: attend(kernel)(*args).sum(), argnums=(0, 1, 2))
    assert count(gradient, *(x.detach() for x in leaves)) == expected


def test_a_small_module(generator: torch.Generator) -> None:
    module, x = FusedMultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        ours = count(lambda: module(x, x, x, need_weights=False))
    assert ours["fused_attn.attention"] == 4 * 2 * 2 * 5 * 5 * 8
    assert ours["aten.addmm"] == 2 * 10 * 16 * (48 + 16)


def test_tensors_without_contents() -> None:
    """The offsets of fake tensors cannot be read, so all sequences count as if they had the largest length."""
    rows, offsets = torch.randn(9, 2, 8, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    ours = count(lambda: fused_attention_varlen(rows, rows, rows, offsets, offsets, 6, 6))
    assert sum(ours.values()) in (2 * 2 * 2 * 6 * 6 * 16, 2 * 2 * 2 * 9 * 9 * 8)  # a kernel's, or the reference's


@pytest.mark.parametrize("first", ["fused_attn", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = f"""
import {first}, torch, sys
import fused_attn
assert {first != "fused_attn"} or "triton" not in sys.modules, "half a second for a counter that nobody asked for"
from torch.utils.flop_counter import flop_registry
assert {{torch.ops.fused_attn.attention, torch.ops.fused_attn.attention_backward}} <= set(flop_registry)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- torch.profiler


def events(function: Callable, *args) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function(*args)
    return sorted({event.name for event in found.events() if event.name.startswith("fused_attn::")})


def named(*steps: str, backend: str) -> list[str]:
    return sorted(f"fused_attn::{step}[{backend}]" for step in steps)


@pytest.mark.quick
def test_events(backend: str, leaves: list[Tensor]) -> None:
    steps = ("forward",) if backend == "reference" else ("forward", "backward")  # the reference uses autograd
    assert events(step(attend(backend)), *leaves) == named(*steps, backend=backend)
    with torch.no_grad():
        assert events(attend(backend), *leaves) == named("forward", backend=backend)


@pytest.mark.parametrize("kernel", KERNELS)
def test_events_of_other_paths(kernel: str, leaves: list[Tensor]) -> None:
    both = set(named("forward", "backward", backend=kernel))
    loss = attend(kernel)(*leaves).sum()
    assert events(loss.backward) == named("backward", backend=kernel)
    torch.compiler.reset()
    compiled = torch.compile(attend(kernel), backend="aot_eager")
    step(compiled)(*leaves)
    assert both <= set(events(step(compiled), *leaves))
    gradient = torch.func.grad(lambda *args: attend(kernel)(*args).sum())
    assert both <= set(events(gradient, *(x.detach() for x in leaves)))
    rows, offsets = torch.randn(9, 2, 8, requires_grad=True), torch.tensor([0, 4, 9]).int()
    packed = step(lambda *args: fused_attention_varlen(*args, offsets, offsets, 5, 5, backend=kernel))
    assert both <= set(events(packed, rows, rows, rows))


@pytest.mark.skipif("cpu" not in KERNELS, reason="the native kernels are not built")
def test_events_of_a_small_module(generator: torch.Generator) -> None:
    module, x = FusedMultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        found = events(lambda: module(x, x, x, need_weights=False))
    assert found == ["fused_attn::self_attention[cpu]"]
    cache = StaticSelfAttentionCache(4)
    row = x[:, :1]
    with torch.no_grad():
        module(row, row, row, need_weights=False, cache=cache)  # the first call makes the buffers
        found = events(lambda: module(row, row, row, need_weights=False, cache=cache))
    assert found == ["fused_attn::attention_step[cpu]"]
