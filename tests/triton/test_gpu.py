"""Tests of the Triton kernels that need a GPU. test_kernels.py has the other ones, and runs on a GPU too."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import CASES, Case

import fused_attn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: Cases that together use all kernels and all kinds of masks.
MIXED = [
    Case("long-causal", seqlen_q=256, seqlen_k=256, head_dim=64, options={"is_causal": True}),
    *(
        case
        for case in CASES
        if case.id
        in ("softcap-with-everything", "padding-causal", "mqa-8-1-decode", "relative-bias-t5", "varlen-dropout")
    ),
]
EVERY_MIX = pytest.mark.parametrize("case", MIXED, ids=lambda case: case.id)


def assert_same(actual: oracle.Result, expected: oracle.Result) -> None:
    for (name, x), (_, y) in zip(actual.items(), expected.items(), strict=True):
        assert torch.equal(x, y), name


@EVERY_MIX
def test_the_host_never_waits(case: Case) -> None:
    """Torch raises an error if forward or backward make the host wait for the GPU."""
    inputs = case.make(torch.float16).on("cuda")
    expected = cases.run(inputs, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = cases.run(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)


@EVERY_MIX
def test_cuda_graph(case: Case, poisoned: None) -> None:
    """A replayed graph of forward and backward computes the results of the tensors' contents at that time."""
    inputs = case.make(torch.float16).on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cases.run(inputs, "triton")  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.run(inputs, "triton")
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in (inputs.tensors["query"], inputs.tensors["key"], inputs.tensors["value"], inputs.dout):
            x.normal_(generator=generator)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, cases.run(inputs, "triton"))


@EVERY_MIX
def test_streams(case: Case) -> None:
    """Calls on several streams, which may run at the same time, give the results of a single call."""
    inputs = case.make(torch.bfloat16).on("cuda")
    expected = cases.run(inputs, "triton")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(cases.run(inputs, "triton"))
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


def test_more_than_2_31_elements() -> None:
    """In a query of 2.2e9 elements, a head gets the results that it gets in a call of its own."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB on the GPU")
    heads, rows, columns, head_dim = 33, 2**20, 24, 64
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device="cuda", generator=generator)

    query, dout = randn(1, heads, rows, head_dim), randn(1, heads, rows, head_dim)
    key, value = randn(1, heads, columns, head_dim), randn(1, heads, columns, head_dim)

    def run(first: int, last: int) -> list[torch.Tensor]:
        leaves = [x[:, first:last].detach().requires_grad_() for x in (query, key, value)]
        out, lse = fused_attn.fused_attention(*leaves, return_lse=True, backend="triton")
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout[:, first:last])]

    whole = run(0, heads)
    for head in (0, heads // 2, heads - 1):
        for x, y in zip(whole, run(head, head + 1), strict=True):
            assert torch.equal(x[:, head : head + 1], y)
