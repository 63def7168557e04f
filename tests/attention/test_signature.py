"""`signature.read` returns the shapes and dtypes that Python sees, and None where only Python can tell them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.bias import causal_upper_left

from fused_attn import fused_attention
from fused_attn.attention import checks, signature

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(signature._C is None, reason="the native kernels are not built"),
]

QUERY = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 1, 3, 4), (1,) * 8], ids=str)
def test_tells_shape_and_dtype(dtype, shape):
    tensors = [QUERY, torch.zeros(shape, dtype=dtype), QUERY.mT, None, torch.nn.Parameter(QUERY[0]), None]
    expected = [checks.optional_meta("x", x) for x in tensors]
    assert signature.metas(signature.read(*tensors)) == expected


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        1.0,
        QUERY.to("meta"),
        QUERY.to_sparse(),
        torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)]),
        QUERY.to(torch.complex64),
        QUERY.long(),
        QUERY.as_subclass(type("Subclass", (torch.Tensor,), {})),
        torch.zeros((1,) * 9),
        causal_upper_left(3, 3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_leaves_other_tensors_to_python(tensor):
    assert signature.read(QUERY, QUERY, tensor) is None
    assert tensor is None or signature.read(QUERY, QUERY, QUERY, tensor) is None


def test_a_call_is_the_same_without_it(monkeypatch):
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 5, 5, requires_grad=True)
    padding = torch.arange(5).expand(2, 5) > 2

    def results():
        out, lse = fused_attention(query, key, value, bias, key_padding_mask=padding, return_lse=True)
        return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, bias))

    with_signature = results()
    monkeypatch.setattr(signature, "read", lambda *tensors: None)
    for x, y in zip(results(), with_signature, strict=True):
        assert torch.equal(x, y)
