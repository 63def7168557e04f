"""What only a GPU can show, for any backend: no waiting, graphs, streams, and tensors of more than 2^31 elements."""

from __future__ import annotations

import cases
import oracle
import torch
from cases import Case

import fused_attn


def assert_same(actual: oracle.Result, expected: oracle.Result) -> None:
    for (name, x), (_, y) in zip(actual.items(), expected.items(), strict=True):
        assert torch.equal(x, y), name


def check_the_host_never_waits(case: Case, backend: str) -> None:
    """Torch raises an error if forward or backward make the host wait for the GPU."""
    inputs = case.make(torch.float16).on("cuda")
    expected = cases.run(inputs, backend)  # may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = cases.run(inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)


def rows_of(inputs: cases.Inputs) -> list[torch.Tensor]:
    """Query, keys and values, which may lie in pages, and the gradient of out, if there is one."""
    names = ("query", "key", "value", "key_pages", "value_pages")
    rows = [inputs.tensors[name] for name in names if name in inputs.tensors]
    assert len(rows) == 3
    return rows if inputs.dout is None else [*rows, inputs.dout]


def check_cuda_graph(case: Case, backend: str) -> None:
    """A replayed graph of forward and backward computes the results of the tensors' contents at that time."""
    inputs = case.make(torch.float16).on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cases.run(inputs, backend)  # may compile
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.run(inputs, backend)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in rows_of(inputs):
            x.normal_(generator=generator)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, cases.run(inputs, backend))


def check_streams(case: Case, backend: str) -> None:
    """Calls on several streams, which may run at the same time, give the results of a single call."""
    inputs = case.make(torch.bfloat16).on("cuda")
    expected = cases.run(inputs, backend)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(cases.run(inputs, backend))
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


def check_more_than_2_31_elements(backend: str) -> None:
    """In a query of 2.2e9 elements, a head gets the results that it gets in a call of its own. Needs 40 GiB."""
    heads, rows, columns, head_dim = 33, 2**20, 24, 64
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, dtype=torch.float16, device="cuda", generator=generator)

    query, dout, key, value = randn(rows), randn(rows), randn(columns), randn(columns)

    def run(first: int, last: int) -> list[torch.Tensor]:
        leaves = [x[:, first:last].detach().requires_grad_() for x in (query, key, value)]
        out, lse = fused_attn.fused_attention(*leaves, return_lse=True, backend=backend)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout[:, first:last])]

    whole = run(0, heads)
    for head in (0, heads // 2, heads - 1):
        for x, y in zip(whole, run(head, head + 1), strict=True):
            assert torch.equal(x[:, head : head + 1], y)
