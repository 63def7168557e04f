"""Packed tensors with rows that belong to no sequence, as a buffer of a fixed size has them, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch

from fused_attn import fused_attention, fused_attention_varlen
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import Scalars

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poisoned")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": (9, 0), "dropout_p": 0.3}, {"needs_max": True}], ids=["plain", "window-dropout", "max"]
)
def test_strays(dtype: torch.dtype, options: dict, backend: str) -> None:
    cases.check_strays(dtype, backend, **options)


def test_sequences_that_are_none_at_all(backend: str) -> None:
    query, offsets = torch.full((5, 2, 8), float("nan")).requires_grad_(), torch.zeros(1, dtype=torch.int32)
    out, lse, row_max = torch.ops.fused_attn.attention(
        *Inputs(query, query, query, cu_seqlens_q=offsets, cu_seqlens_k=offsets), *Scalars(5, 5, 0.3), backend, True
    )
    (dquery,) = torch.autograd.grad(out, query, torch.full_like(out, float("nan")))
    assert (out == 0).all() and (lse == float("-inf")).all() and torch.equal(row_max, lse) and (dquery == 0).all()


@pytest.mark.parametrize("names", ["q", "kv", "qkv"])
def test_heads_may_overlap(names: str, backend: str) -> None:
    """The elements of a head lie one behind those of the head before."""
    offsets = torch.tensor([0, 9, 20]).int()

    def run(make: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        rows = torch.randn(200, generator=torch.Generator().manual_seed(0)).as_strided((20, 4, 8), (4, 1, 1))
        query, keys = (make(rows) if name in names else rows.contiguous() for name in ("q", "kv"))
        leaves = [x.detach().requires_grad_() for x in (query, keys, keys)]
        out = fused_attention_varlen(*leaves, offsets, offsets, 11, 11, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for found, expected in zip(run(lambda x: x), run(torch.Tensor.contiguous), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("head_dim", [8, 64])
def test_gradients_of_long_and_short_sequences(head_dim: int, backend: str) -> None:
    """They are those of the sequences alone, whatever multiple of a vector a length is not."""
    lengths = [3, 0, 17, 1, 130, 16, 15, 64, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    query, key, value, dout = torch.randn(4, sum(lengths), 2, head_dim, generator=generator)
    sinks = torch.tensor([0.5, -1.0])

    def gradients(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value, sinks)]
        return torch.autograd.grad(call(*leaves), leaves, dout)

    def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return fused_attention_varlen(
            query, key, value, offsets, offsets, 130, 130, is_causal=True, sinks=sinks, backend=backend
        )

    def one_by_one(*tensors: torch.Tensor) -> torch.Tensor:
        *rows, sinks = tensors
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in rows), strict=True)
        outs = [fused_attention(*x, is_causal=True, sinks=sinks, backend="reference") for x in sequences]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    for found, expected in zip(gradients(packed), gradients(one_by_one), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_trains(backend: str) -> None:
    """The gradients of a layer are right although attention gets rows that belong to no sequence.

    The projections around attention compute with these rows, so a NaN in them would reach the gradients.
    """
    torch.manual_seed(0)
    projection = torch.nn.Linear(8, 8, bias=False)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)

    def layer(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        heads = projection(x).unflatten(1, (2, 4))
        return fused_attention_varlen(heads, heads, heads, cu_seqlens, cu_seqlens, 5, 5, backend=backend).flatten(1)

    rows = torch.randn(9, 8)
    (expected,) = torch.autograd.grad(layer(rows, offsets).square().sum(), projection.weight)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = compiled(torch.cat([rows, torch.randn(7, 8)]), offsets)
    (found,) = torch.autograd.grad(out.square().sum(), projection.weight)
    torch.testing.assert_close(found, expected)


def test_an_eager_call_on_the_cpu_refuses_them(backend: str) -> None:
    rows, offsets = torch.randn(9, 2, 8), torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected offsets that rise from 0 to the number of rows, 9"):
        fused_attention_varlen(rows, rows, rows, offsets, offsets, 5, 5, backend=backend)
