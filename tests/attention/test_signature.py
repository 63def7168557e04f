"""`signature.read` tells calls apart whose plans differ, and returns None where only Python can tell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_upper_left

from fused_attn import fused_attention, fused_attention_varlen, planning
from fused_attn.attention import signature

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(signature._C is None, reason="the native kernels are not built"),
]

QUERY = torch.zeros(1, 2, 3, 4)


def test_tells_all_arguments_apart():
    """No two of these differ in their shapes, dtypes, types or values alone and have one signature."""
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int32)
    shapes = ((), (0,), (1,), (3, 4), (4, 3), (2, 1, 3, 4), (1,) * 8)
    values = (None, False, True, 0, 1, -1, 2**63 - 1, 0.0, -0.0, 1.0, 0.5, float("inf"), "", "cpu", "cuda", "cpé")
    pairs = ((), (None,), ((),), (0, 1), (1, 0), (-1, 0), (0.0, 1), (0, True), ((0,), 1), (0, (1,)), ("c", "pu"))
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in dtypes]
    one = [(x,) for x in (*tensors, *values, *pairs)]
    rows = [*one, (), *itertools.product(values, values), (1, 2, 3), ((1, 2), 3), (1, (2, 3)), (QUERY, 1), (1, QUERY)]
    found = {signature.read(*row): row for row in rows}
    assert None not in found
    assert len(found) == len(rows)


def test_the_contents_and_the_strides_of_a_tensor_do_not_count():
    known = signature.read(QUERY, None, 0.5)
    for same in (torch.ones(1, 2, 3, 4), torch.zeros(4, 3, 2, 1).permute(3, 2, 1, 0), torch.nn.Parameter(QUERY)):
        assert signature.read(same, None, 0.5) == known


@pytest.mark.parametrize(
    ("argument", "same"),
    [
        (np.float64(0.5), 0.5),  # such as 1 / np.sqrt(head_dim)
        (type("Int", (int,), {})(1), 1),
        ([1, 0], (1, 0)),
        ([1, [2]], (1, (2,))),
    ],
    ids=("numpy", "subclass", "list", "nested list"),
)
def test_equal_values_of_other_types_have_the_same_plan(argument, same):
    assert signature.read(QUERY, argument) == signature.read(QUERY, same)
    assert signature.read(argument) is not None


@pytest.mark.parametrize(
    "argument",
    [
        2**63,
        "x" * 200,
        (0,) * 200,
        "\ud800" * 200,
        1j,
        np.bool_(True),
        np.int64(1),
        torch.float32,
        QUERY.to("meta"),
        QUERY.to_sparse(),
        torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)]),
        QUERY.to(torch.complex64),
        QUERY.long(),
        QUERY.as_subclass(type("Subclass", (torch.Tensor,), {})),
        torch.zeros((1,) * 127),
        causal_upper_left(3, 3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_leaves_other_arguments_to_python(argument):
    assert signature.read(argument) is None
    assert signature.read(QUERY, QUERY, argument) is None


def test_a_call_is_the_same_without_it(monkeypatch):
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 5, 5, requires_grad=True)
    padding = torch.arange(5).expand(2, 5) > 2

    def results():
        out, lse = fused_attention(query, key, value, bias, key_padding_mask=padding, return_lse=True)
        return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, bias))

    with_signature = results()
    monkeypatch.setattr(signature, "read", lambda *arguments: None)
    for x, y in zip(results(), with_signature, strict=True):
        assert torch.equal(x, y)


def test_a_wrong_type_does_not_find_the_plan_of_an_equal_value():
    fused_attention(QUERY, QUERY, QUERY, is_causal=True)
    with pytest.raises(TypeError, match="is_causal"):
        fused_attention(QUERY, QUERY, QUERY, is_causal=1)


@pytest.mark.parametrize("window", ((1.0, 0), (True, 0), [1, 0.0]), ids=str)
def test_a_wrong_window_does_not_find_the_plan_of_an_equal_one(window):
    rows, offsets = QUERY[0].transpose(0, 1), torch.tensor([0, 3], dtype=torch.int32)
    for call in (
        lambda size: fused_attention(QUERY, QUERY, QUERY, window_size=size),
        lambda size: fused_attention_varlen(rows, rows, rows, offsets, offsets, 3, 3, window_size=size),
    ):
        assert torch.equal(call((1, 0)), call([1, 0]))
        with pytest.raises(ValueError, match="window_size"):
            call(window)


def test_plans_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(planning, "CACHED_PLANS", 3)
    planner = planning.Planner(lambda: None)
    made = [object() for _ in range(5)]
    for i, plan in enumerate(made):
        planner.store(bytes([i]), plan)
        assert planner.by_signature[bytes([i])] is plan
        assert len(planner.by_signature) <= 3
