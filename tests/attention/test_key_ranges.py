"""`key_ranges_of` finds the runs of a mask, and calls with `key_ranges` work wherever calls with a mask do."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fused_attn
from fused_attn import fused_attention, key_ranges_of, key_ranges_of_segments
from fused_attn.attention.masks import visible_in_ranges

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 40, 70), (1, 1), (4, 0), (0, 4), (2, 0, 3)])
@pytest.mark.parametrize("visible", [0.0, 0.3, 0.9, 1.0])
def test_ranges_of_a_mask_are_the_mask(shape: tuple[int, ...], visible: float):
    mask = torch.rand(shape) < visible
    ranges = key_ranges_of(mask)
    assert ranges.dtype == torch.int32
    assert ranges.shape[:-2] == shape[:-1]
    assert ranges.shape[-2] >= 1
    assert torch.equal(visible_in_ranges(ranges, shape[-1]), mask)


def test_there_are_as_many_ranges_as_the_row_with_most_runs():
    mask = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert key_ranges_of(mask).tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[0, 5], [0, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
    ]


def test_ranges_may_be_negated_lazily():
    """The sign of such a tensor is a flag, which kernels do not see."""
    query, ranges = torch.randn(1, 2, 6, 8), torch.tensor([0, 3]).expand(6, 1, 2).int()
    expected = fused_attention(query, query, query, key_ranges=ranges)
    assert torch.equal(fused_attention(query, query, query, key_ranges=torch._neg_view(-ranges)), expected)


@pytest.mark.parametrize("shape", [(9,), (3, 40), (2, 3, 5), (1,), (0,), (4, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_segments_are_runs_of_equal_ids(shape: tuple[int, ...], dtype: torch.dtype):
    is_new = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.4
    segment = is_new.cumsum(-1)  # no id returns
    ranges = key_ranges_of_segments((segment % 2).to(dtype))  # neighbours differ, and ids return
    assert ranges.dtype == torch.int32
    assert ranges.shape == (*shape, 1, 2)
    visible = visible_in_ranges(ranges, shape[-1])
    assert torch.equal(visible, segment[..., :, None] == segment[..., None, :])


def test_segments_are_transformed_and_traced():
    ids = torch.tensor([[4, 4, 2], [1, 1, 1]])
    assert torch.equal(torch.func.vmap(key_ranges_of_segments)(ids), key_ranges_of_segments(ids))
    compiled = torch.compile(key_ranges_of_segments, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), key_ranges_of_segments(ids))
    traced = torch.fx.symbolic_trace(lambda ids: key_ranges_of_segments(ids) + 0)
    assert torch.equal(traced(ids), key_ranges_of_segments(ids))
    assert key_ranges_of_segments(ids.to("meta")).shape == (2, 3, 1, 2)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1], TypeError, "segment_ids: expected a tensor, got list"),
        (torch.ones(2), TypeError, r"segment_ids: expected integers, got torch\.float32"),
        (
            torch.ones(2, 2).int().to_sparse(),
            ValueError,
            "segment_ids: expected a dense tensor, got a nested or sparse",
        ),
        (torch.tensor(1), ValueError, r"segment_ids: expected shape \(\.\.\., L\), got a tensor without dimensions"),
    ],
)
def test_what_are_no_segments_is_refused(ids, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^{message}"):
        key_ranges_of_segments(ids)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[True]], TypeError, r"mask: expected a tensor, got list"),
        (torch.ones(2, 2), TypeError, r"mask: expected dtype torch\.bool, got torch\.float32"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"mask: expected shape \(\.\.\., L, S\), got shape \(2,\)"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^{message}"):
        key_ranges_of(mask)


def tensors() -> tuple[list[Tensor], Tensor, Tensor]:
    """query, key and value; a mask; and its ranges."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=generator) for n in (40, 150, 150))
    mask = torch.rand(2, 1, 40, 150, generator=generator) < 0.9
    return [query, key, value], mask, key_ranges_of(mask)


def test_ranges_have_the_bits_of_the_mask(backend: str):
    leaves, mask, ranges = tensors()
    leaves = [x.requires_grad_() for x in leaves]
    results = []
    for masks in ({"attn_mask": mask}, {"key_ranges": ranges}, {"attn_mask": mask, "key_ranges": ranges}):
        out = fused_attention(*leaves, **masks, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_the_last_dimensions_may_have_any_strides():
    leaves, _, ranges = tensors()
    expected = fused_attention(*leaves, key_ranges=ranges)
    swapped = ranges.transpose(-1, -2).contiguous().transpose(-1, -2)
    reversed_rows = ranges.flip(2).flip(2)
    every_second = torch.stack([ranges, ranges], -2).flatten(-3, -2)[..., ::2, :]
    for other in (swapped, reversed_rows, every_second):
        assert torch.equal(fused_attention(*leaves, key_ranges=other), expected)


def test_more_batch_dimensions():
    leaves, _, ranges = tensors()
    expected = fused_attention(*leaves, key_ranges=ranges)
    out = fused_attention(*(x[:, None] for x in leaves), key_ranges=ranges[:, None])
    assert torch.equal(out[:, 0], expected)
    first = fused_attention(*(x[0, 0] for x in leaves), key_ranges=ranges[0, 0])  # (L, D)
    torch.testing.assert_close(first, expected[0, 0])


def test_compiled_calls():
    leaves, _, ranges = tensors()
    compiled = torch.compile(fused_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, key_ranges=ranges), fused_attention(*leaves, key_ranges=ranges))


def test_torch_func():
    (query, key, value), mask, ranges = tensors()

    def loss(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, name: str) -> Tensor:
        return fused_attention(query, key, value, **{name: masks}).square().sum()

    found = [
        vmap(grad(functools.partial(loss, name=name)))(query, key, value, masks)
        for name, masks in (("attn_mask", mask), ("key_ranges", ranges))
    ]
    assert torch.equal(*found)


def test_second_derivatives():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, n, 4, dtype=torch.float64, generator=generator).requires_grad_() for n in (3, 5, 5)]
    ranges = torch.tensor([[[0, 2], [4, 5]], [[1, 5], [0, 0]], [[3, 3], [2, 4]]]).int()
    assert torch.autograd.gradgradcheck(functools.partial(fused_attention, key_ranges=ranges), leaves)


def test_explain_names_the_ranges():
    leaves, _, ranges = tensors()
    assert f"num_ranges={ranges.shape[-2]}" in str(fused_attn.explain(*leaves, key_ranges=ranges))


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(8, 2, 4), torch.tensor([0, 3, 8])).transpose(1, 2)
    with pytest.raises(ValueError, match="key_ranges: expected None with nested tensors"):
        fused_attention(nested, nested, nested, key_ranges=torch.zeros(1, 1, 2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["attn_mask", "key_ranges"])
def test_compiled_calls_whose_query_has_a_symbolic_length(name: str) -> None:
    """The length of the mask is a number, as in a program that has made one mask."""
    (query, key, value), mask, ranges = tensors()
    masks = {"attn_mask": mask, "key_ranges": ranges}[name]
    torch._dynamo.reset()
    query = query.detach()
    torch._dynamo.maybe_mark_dynamic(query, 2)
    compiled = torch.compile(fused_attention, fullgraph=True, backend="eager")
    expected = fused_attention(query, key, value, **{name: masks})
    assert torch.equal(compiled(query, key, value, **{name: masks}), expected)
