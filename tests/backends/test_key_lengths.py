"""Lengths of keys on the device, keys in pages, and a fixed number of splits: what the curated cases do not show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fused_attn import explain, fused_attention, fused_attention_paged
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import Scalars
from fused_attn.backends import dispatch

pytestmark = pytest.mark.quick

LENGTHS = torch.tensor([1500, 700, 1, 0], dtype=torch.int32)


def contiguous(seqlen_q: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 4, seqlen_q, 64), (4, 2, 1500, 64), (4, 2, 1500, 48)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def paged(seqlen_q: int, page_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The arguments of `fused_attention_paged` for the same numbers as `contiguous`."""
    query, *rows = contiguous(seqlen_q, dtype)
    columns = -(-1500 // page_size)
    table = torch.randperm(4 * columns, generator=torch.Generator().manual_seed(1)).int().view(4, columns)
    pages = []
    for x in rows:
        padded = torch.nn.functional.pad(x, (0, 0, 0, columns * page_size - 1500), value=float("nan"))
        by_page = padded.unflatten(2, (columns, page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        pages.append(torch.empty_like(by_page).index_copy_(0, table.flatten().long(), by_page))
    return query, *pages, table, LENGTHS


@pytest.mark.parametrize("page_size", [1, 16, 100])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_pages_give_the_rows_of_contiguous_keys(seqlen_q: int, page_size: int, backend: str) -> None:
    query, key, value = contiguous(seqlen_q)
    expected = fused_attention(
        query, key, value, causal_lower_right(seqlen_q, 1500), key_lengths=LENGTHS, enable_gqa=True,
        num_splits=4, backend=backend,
    )  # fmt: skip
    found = fused_attention_paged(*paged(seqlen_q, page_size), is_causal=True, num_splits=4, backend=backend)
    if backend == "cpu":  # the same kernel reads the same rows in the same order
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_the_other_entries(dtype: torch.dtype, backend: str) -> None:
    """With num_splits. Entries run alone, in pairs, in another order, and beside a longer one."""
    if backend == "reference":
        pytest.skip("the reference multiplies matrices by torch, whose bits depend on the size of the batch")
    query, key, value = contiguous(1, dtype)
    pages = paged(1, 16, dtype)

    def rows(entries: list[int], longest: int = 1500) -> Tensor:
        return fused_attention(
            query[entries], key[entries, :, :longest], value[entries, :, :longest], enable_gqa=True,
            key_lengths=LENGTHS[entries], num_splits=5, backend=backend,
        )  # fmt: skip

    def rows_of_pages(entries: list[int], longest: int = 1500) -> Tensor:
        table = pages[3][entries, : -(-longest // 16)]
        return fused_attention_paged(
            pages[0][entries], *pages[1:3], table, LENGTHS[entries], num_splits=5, backend=backend
        )

    for function in (rows, rows_of_pages):
        together = function([0, 1, 2, 3])
        for entries in ([0], [1], [2], [3], [1, 2], [3, 1, 0]):
            longest = int(LENGTHS[entries].max())
            assert torch.equal(function(entries), together[entries])
            assert torch.equal(function(entries, longest), together[entries])
    # Among 9 queries, those of the second entry see more keys than those of the first can have.
    query, *others = paged(9, 16, dtype)
    table, lengths = others[2][:2], torch.tensor([60, 300], dtype=torch.int32)
    causal = [
        fused_attention_paged(
            query[:count], *others[:2], table[:count, :columns], lengths[:count], is_causal=True, num_splits=3,
            backend=backend,
        )
        for count, columns in ((2, 19), (1, 4))
    ]  # fmt: skip
    assert torch.equal(causal[0][:1], causal[1])
    many = [1] + [0] * 70  # so many entries that the default cuts nothing
    assert torch.equal(rows(many)[:1], rows([1]))


@pytest.mark.parametrize("num_splits", [None, 2])
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_the_backend_does_not_depend_on_the_batch(kv_heads: int, num_splits: int | None) -> None:
    def chosen(batch: int) -> tuple[str, ...]:
        query, key = (torch.empty(batch, heads, 30, 64, dtype=torch.bfloat16) for heads in (32, kv_heads))
        problem = explain(query, key, key, num_splits=num_splits, enable_gqa=True).problem.on("sm_90")
        return tuple(backend.name for backend in dispatch.preferred(problem))

    assert chosen(1) == chosen(64)


@pytest.mark.parametrize("lengths", [(1501, 0, 0, 0), (0, 0, 0, -1)])
def test_lengths_that_do_not_fit_are_refused(lengths: tuple[int, ...], backend: str) -> None:
    with pytest.raises(ValueError, match="key_lengths: expected lengths from 0 to 1500, the number of keys, got"):
        fused_attention(
            *contiguous(1), enable_gqa=True, key_lengths=torch.tensor(lengths, dtype=torch.int32), backend=backend
        )


@pytest.mark.parametrize("number", [-1, 4 * 94, 2**31 - 1])
def test_a_page_that_does_not_exist_is_refused(number: int, backend: str) -> None:
    arguments = paged(1, 16)
    table = arguments[3].clone()
    table[1, 44] = number  # behind the 700 keys of entry 1
    expected = fused_attention_paged(*arguments, backend=backend)
    assert torch.equal(fused_attention_paged(*arguments[:3], table, LENGTHS, backend=backend), expected)
    table[1, 43] = number
    with pytest.raises(ValueError, match="block_table: expected numbers of pages from 0 to 375, got"):
        fused_attention_paged(*arguments[:3], table, LENGTHS, backend=backend)


def test_strided_lengths_and_tables(backend: str) -> None:
    arguments = paged(1, 16)
    expected = fused_attention_paged(*arguments, backend=backend)
    table = arguments[3].T.contiguous().T
    lengths = torch.stack([LENGTHS, LENGTHS], 1)[:, 0]
    assert table.stride(1) != 1 and lengths.stride(0) != 1
    assert torch.equal(fused_attention_paged(*arguments[:3], table, lengths, backend=backend), expected)


def test_lse_of_a_decoding_call(backend: str) -> None:
    out, lse = fused_attention_paged(*paged(1, 16), sinks=torch.ones(4), return_lse=True, backend=backend)
    query, key, value = contiguous(1)
    expected_out, expected = fused_attention(
        query, key, value, enable_gqa=True, key_lengths=LENGTHS, sinks=torch.ones(4), return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected)
    assert (lse[3] == float("-inf")).all()


@pytest.mark.parametrize("batch_shape", [(), (2, 2)], ids=str)
def test_lengths_have_the_batch_dimensions_of_the_inputs(batch_shape: tuple[int, ...], backend: str) -> None:
    query, key = torch.randn(*batch_shape, 2, 3, 8), torch.randn(*batch_shape, 2, 5, 8)
    lengths = torch.full(batch_shape, 4, dtype=torch.int32)
    out = fused_attention(query, key, key, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(out, fused_attention(query, key[..., :4, :], key[..., :4, :], backend=backend))


def test_inputs_that_require_a_gradient_are_refused() -> None:
    query, *others = paged(1, 16)
    with pytest.raises(ValueError, match=r"query: expected a tensor without gradient, because fused_attention_paged"):
        fused_attention_paged(query.requires_grad_(), *others)
    with torch.no_grad():
        fused_attention_paged(query, *others)
    query.requires_grad_(False)
    with pytest.raises(ValueError, match="sinks: expected a tensor without gradient"):
        fused_attention_paged(query, *others, sinks=torch.ones(4, requires_grad=True))


def test_the_operator_has_no_gradient_of_pages(backend: str) -> None:
    query, key, value, table, lengths = paged(1, 16)
    inputs = Inputs(query.requires_grad_(), key, value, key_lengths=lengths, block_table=table)
    out, _, _ = torch.ops.fused_attn.attention(*inputs, *Scalars(1, 94 * 16, 0.3), backend, False)
    with pytest.raises(NotImplementedError, match="fused_attention_paged has no gradients"):
        out.sum().backward()


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_compiled(is_dynamic: bool, backend: str) -> None:
    torch.compiler.reset()
    lengths = LENGTHS

    def step(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        return fused_attention(query, key, value, enable_gqa=True, key_lengths=lengths, backend=backend)

    def paged_step(*arguments: Tensor, **packed) -> Tensor:
        return fused_attention_paged(*arguments, is_causal=True, num_splits=3, backend=backend, **packed)

    compiled = torch.compile(paged_step, backend="aot_eager", fullgraph=True, dynamic=is_dynamic)
    assert torch.equal(compiled(*paged(2, 16)), paged_step(*paged(2, 16)))

    def packed_step(query: Tensor, *others: Tensor) -> Tensor:
        cu_seqlens = torch.arange(0, query.shape[0] + 1, 2, dtype=torch.int32)
        return paged_step(query, *others, cu_seqlens_q=cu_seqlens, max_seqlen_q=2)

    query, *others = paged(2, 16)
    query = query.transpose(1, 2).flatten(0, 1)  # packed
    compiled = torch.compile(packed_step, backend="aot_eager", fullgraph=True, dynamic=is_dynamic)
    assert torch.equal(compiled(query, *others), packed_step(query, *others))
    if not is_dynamic:
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*contiguous(2), lengths), step(*contiguous(2), lengths))


def test_vmap(backend: str) -> None:
    query, key, value = (torch.randn(3, 2, 2, n, 8) for n in (1, 5, 5))
    lengths = torch.tensor([[1, 5], [0, 2], [3, 3]], dtype=torch.int32)

    def call(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        return fused_attention(query, key, value, key_lengths=lengths, backend=backend)

    expected = torch.stack([call(*entry) for entry in zip(query, key, value, lengths, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(query, key, value, lengths), expected)
    grads = torch.func.vmap(torch.func.grad(lambda *x: call(*x).square().sum()))(query, key, value, lengths)
    assert grads.shape == query.shape and grads.isfinite().all()


def test_the_problem_names_lengths_pages_and_splits() -> None:
    query, key, value = contiguous(1)
    mask = causal_lower_right(1, 1500)
    text = str(explain(query, key, value, mask, enable_gqa=True, key_lengths=LENGTHS, num_splits=3))
    assert "key_lengths" in text and "num_splits=3" in text and "offset=0, from the end)" in text
