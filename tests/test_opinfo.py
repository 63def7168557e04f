"""The samples with which PyTorch tests scaled_dot_product_attention give the same results with fused_attention."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fused_attn

pytest.importorskip("expecttest", reason="torch's samples need the Python package expecttest")

from torch.testing._internal.common_methods_invocations import op_db

OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(sample, dtype: torch.dtype, backend: str) -> None:
    """Compares fused_attention with the oracle in the dtype of the sample, and the oracle with torch in float64."""
    tensors = dict(zip(("query", "key", "value"), (sample.input, *sample.args), strict=True))
    options = dict(sample.kwargs)
    if isinstance(options.get("attn_mask"), Tensor):
        tensors["attn_mask"] = options.pop("attn_mask")
    if options.get("dropout_p"):
        # Dropout uses other random bits than torch's, so torch's result cannot be compared.
        options["dropout_seed"] = 5
    names = tuple(name for name, x in tensors.items() if x.requires_grad)
    dout = torch.randn_like(sample.input[..., :1].expand(*sample.input.shape[:-1], sample.args[1].shape[-1]))
    if len(sample.args[0].shape) > dout.dim():
        dout = dout.expand(*sample.args[0].shape[:-2], *dout.shape[-2:])
    asked = options | {"return_max": True}
    expected = oracle.expected(oracle.attention, tensors, asked, names, dout, None)
    call = functools.partial(fused_attn.fused_attention, backend=backend, return_lse=True)
    oracle.assert_close(oracle.evaluate(call, tensors, asked, names, dout, None), expected)
    if not options.get("dropout_p"):
        wide = {name: x.detach().double().requires_grad_() if x.requires_grad else x for name, x in tensors.items()}
        theirs = scaled_dot_product_attention(**wide, **options)
        grads = torch.autograd.grad(theirs, [wide[name] for name in names], dout.double())
        torch.testing.assert_close(expected.truth.out, theirs)
        torch.testing.assert_close(list(expected.truth.grads.values()), list(grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_samples(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        check(sample, dtype, backend)
        count += 1
    assert count > 20


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_samples(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for sample in itertools.islice(OP.sample_inputs("cpu", dtype, requires_grad=True), 5):
        check(sample, dtype, backend)


@pytest.mark.quick
def test_positional_arguments_are_those_of_torch(backend: str, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.rand(5, 5, generator=generator) < 0.8
    torch.testing.assert_close(
        fused_attn.fused_attention(query, key, value, mask, 0.0, False, scale=0.5, enable_gqa=False, backend=backend),
        scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.5, enable_gqa=False),
    )
