"""`return_max`: what is returned in which order, and that the maximum has no gradient under any of PyTorch's modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import fused_attention
from fused_attn.attention import formula
from fused_attn.backends import cpu

pytestmark = pytest.mark.quick

OPTIONS = {"is_causal": True, "softcap": 2.0}


@pytest.fixture
def qkv(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, 2, 9, 8, generator=generator, requires_grad=True) for _ in range(3)]


def expected_max(query: Tensor, key: Tensor) -> Tensor:
    """The largest logit of each row of a call with `OPTIONS`."""
    scores = 2.0 * torch.tanh(query @ key.mT / 8**0.5 / 2.0)
    is_hidden = torch.ones(9, 9).triu(1).bool()
    return scores.masked_fill(is_hidden, float("-inf")).amax(-1).detach()


def test_what_is_returned(qkv: list[Tensor], backend: str) -> None:
    for is_grad_enabled in (True, False):
        with torch.set_grad_enabled(is_grad_enabled):
            out, lse = fused_attention(*qkv, **OPTIONS, return_lse=True, backend=backend)
            for return_lse in (True, False):
                first, *of_rows = fused_attention(
                    *qkv, **OPTIONS, return_lse=return_lse, return_max=True, backend=backend
                )
                torch.testing.assert_close(first, out)
                torch.testing.assert_close(of_rows, [*([lse] if return_lse else []), expected_max(*qkv[:2])])
                assert not of_rows[-1].requires_grad
                assert first.requires_grad == is_grad_enabled


@pytest.mark.parametrize("seqlen_q, num_splits", [(1, None), (1, 4), (3, 1), (70, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_logit_of_nan_is_the_largest(
    dtype: torch.dtype, seqlen_q: int, num_splits: int | None, backend: str, generator: torch.Generator
) -> None:
    """As in `torch.amax`. What watches the largest logit must not miss it. The LSE is NaN as well."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no kernel for float64")
    query = torch.randn(1, 2, seqlen_q, 16, generator=generator).to(dtype)
    key = torch.randn(1, 2, 520, 16, generator=generator).to(dtype)
    options = {"num_splits": num_splits, "return_lse": True, "return_max": True, "backend": backend}
    key[0, 0, 300] = torch.nan
    _, *of_rows = fused_attention(query, key, key, **options)
    for x in of_rows:
        assert x[0, 0].isnan().all() and x[0, 1].isfinite().all()
    query[0, 1, 0] = torch.nan  # all logits of a row
    _, *of_rows = fused_attention(query, key, key, **options)
    for x in of_rows:
        assert x[0, 1, 0].isnan() and x[0, 1, 1:].isfinite().all()


def test_gradients_do_not_change(qkv: list[Tensor], backend: str) -> None:
    plain = torch.autograd.grad(fused_attention(*qkv, **OPTIONS, backend=backend).sum(), qkv)
    out, row_max = fused_attention(*qkv, **OPTIONS, return_max=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), qkv), plain)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(row_max.sum(), qkv)


def test_double_backward(qkv: list[Tensor], backend: str) -> None:
    def second(**asked_for: bool) -> tuple[Tensor, ...]:
        results = fused_attention(*qkv, **OPTIONS, **asked_for, backend=backend)
        out = results if isinstance(results, Tensor) else results[0]
        (dquery,) = torch.autograd.grad(out.square().sum(), qkv[:1], create_graph=True)
        return torch.autograd.grad(dquery.square().sum(), qkv)

    torch.testing.assert_close(second(return_max=True), second())


def test_compile(qkv: list[Tensor], backend: str) -> None:
    def loss_and_max(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, row_max = fused_attention(*qkv, **OPTIONS, return_lse=True, return_max=True, backend=backend)
        return out.sum() + lse.sum(), row_max

    torch.compiler.reset()
    loss, row_max = torch.compile(loss_and_max, fullgraph=True, backend="aot_eager")(*qkv)
    assert not row_max.requires_grad
    torch.testing.assert_close(row_max, expected_max(*qkv[:2]))
    torch.testing.assert_close(torch.autograd.grad(loss, qkv), torch.autograd.grad(loss_and_max(*qkv)[0], qkv))


def test_func_grad(qkv: list[Tensor], backend: str) -> None:
    def loss(query: Tensor) -> tuple[Tensor, Tensor]:
        out, row_max = fused_attention(query, *qkv[1:], **OPTIONS, return_max=True, backend=backend)
        return out.sum() + row_max.sum(), row_max

    dquery, row_max = torch.func.grad(loss, has_aux=True)(qkv[0])
    plain = torch.autograd.grad(fused_attention(*qkv, **OPTIONS, backend=backend).sum(), qkv[0])
    torch.testing.assert_close((dquery, row_max), (*plain, expected_max(*qkv[:2])))


def test_jvp(qkv: list[Tensor], backend: str) -> None:
    def row_max(query: Tensor) -> Tensor:
        return fused_attention(query, *qkv[1:], **OPTIONS, return_max=True, backend=backend)[1]

    primal, tangent = torch.func.jvp(row_max, (qkv[0],), (torch.ones_like(qkv[0]),))
    torch.testing.assert_close(primal, expected_max(*qkv[:2]))
    assert not tangent.any()


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None)], ids=str)
def test_vmap(in_dims: tuple[int | None, ...], qkv: list[Tensor], backend: str) -> None:
    def attend(*qkv: Tensor) -> tuple[Tensor, ...]:
        return fused_attention(*qkv, **OPTIONS, return_max=True, backend=backend)

    batched = [x[None].repeat(3, 1, 1, 1, 1) * (1 if dim is None else torch.rand(3, 1, 1, 1, 1))
               for x, dim in zip(qkv, in_dims, strict=True)]  # fmt: skip
    given = [x[0] if dim is None else x for x, dim in zip(batched, in_dims, strict=True)]
    expected = [attend(*entry) for entry in zip(*batched, strict=True)]
    torch.testing.assert_close(
        torch.func.vmap(attend, in_dims)(*given), tuple(map(torch.stack, zip(*expected, strict=True)))
    )


def test_nested(backend: str, generator: torch.Generator) -> None:
    entries = [torch.randn(length, 2, 8, generator=generator) for length in (3, 7)]
    nested = torch.nested.nested_tensor(entries, layout=torch.jagged).transpose(1, 2)
    _, row_max = fused_attention(nested, nested, nested, return_max=True, backend=backend)
    for x, found in zip(entries, row_max.unbind(), strict=True):
        heads = x.transpose(0, 1)
        torch.testing.assert_close(found, (heads @ heads.mT / 8**0.5).amax(-1))


def test_the_maximum_is_computed_only_where_it_is_asked_for(qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forward(problem, inputs, needs_lse, needs_max):
        asked.append(needs_max)
        return formula.forward(problem, inputs)

    monkeypatch.setattr(cpu, "forward", forward)
    monkeypatch.setattr(cpu, "unsupported_reasons", lambda problem: [])
    fused_attn.planning.dense.clear()
    fused_attn.backends.dispatch.choose.cache_clear()
    fused_attention(*qkv)
    fused_attention(*qkv, return_lse=True)
    torch.func.grad(lambda query: fused_attention(query, *qkv[1:]).sum())(qkv[0])
    fused_attention(*qkv, return_max=True)
    assert asked == [False, False, False, True]
