"""float64 derivatives against finite differences: first ones of each backend, second ones of the reference formula."""

from __future__ import annotations

import functools

import cases
import pytest
import torch
from cases import Case
from torch.autograd import gradcheck, gradgradcheck

SMALL = {"batch": 2, "heads": 2, "seqlen_q": 4, "seqlen_k": 5, "head_dim": 3, "value_dim": 2}

GRADCHECK = [
    Case("plain", **SMALL, is_quick=True),
    Case("causal", **SMALL, options={"is_causal": True}),
    Case("window", **SMALL, options={"window_size": (1, 1)}),
    Case("float-mask", **SMALL, attn_mask=cases.float_mask("BHLS"), is_quick=True),
    Case("float-mask-broadcast", **SMALL, attn_mask=cases.float_mask("1H1S")),
    Case("bool-mask-empty-rows", **SMALL, attn_mask=cases.empty_rows_mask),
    Case("padding", **SMALL, key_padding_mask=cases.padding(3, 5)),
    Case("relative-bias", **SMALL, relative_bias=cases.per_head_bias, is_quick=True),
    Case("relative-bias-shared", **SMALL, relative_bias=cases.shared_bias),
    Case("sinks", **SMALL, sinks=cases.sink()),
    Case("softcap", **SMALL, options={"softcap": 1.5}),
    Case("dropout", **SMALL, options={"dropout_p": 0.4, "dropout_seed": 5}),
    Case("gqa", **(SMALL | {"heads": 4}), kv_heads=2),
    Case("scale", **SMALL, options={"scale": -0.7}),
    Case("rank-3", shapes=((2, 4, 3), (2, 5, 3), (2, 5, 2))),
    Case("varlen", heads=2, head_dim=3, lengths_q=(2, 0, 3), lengths_k=(3, 1, 2), options={"is_causal": True}),
    Case(
        "everything",
        **(SMALL | {"heads": 4}),
        kv_heads=2,
        attn_mask=cases.float_mask("BHLS"),
        sinks=cases.sink(),
        relative_bias=cases.per_head_bias,
        key_padding_mask=cases.padding(3, 5),
        options={"is_causal": True, "softcap": 2.0, "dropout_p": 0.2, "dropout_seed": 1},
    ),
]

PARAMETERS = [pytest.param(case, id=case.id, marks=[pytest.mark.quick] if case.is_quick else []) for case in GRADCHECK]


def _function(case: Case, backend: str):
    """The call as a function of its differentiated tensors alone, and those tensors.

    lse of a query that sees no key is -inf, so the function leaves it out.
    """
    inputs = case.make(torch.float64)
    leaves = [inputs.tensors[name].clone().requires_grad_() for name in inputs.differentiated]
    fixed = {name: x for name, x in inputs.tensors.items() if name not in inputs.differentiated}
    call = functools.partial(inputs.function, **fixed, **inputs.options, return_lse=True, backend=backend)

    def function(*differentiated):
        out, lse = call(**dict(zip(inputs.differentiated, differentiated, strict=True)))
        return out, torch.where(lse.isinf(), 0.0, lse)

    return function, leaves


@pytest.mark.parametrize("case", PARAMETERS)
def test_gradcheck(case: Case, backend: str) -> None:
    function, leaves = _function(case, backend)
    assert gradcheck(function, leaves, nondet_tol=0.0)


# The case "everything" is left out, because it takes half a minute and other cases check its parts.
@pytest.mark.parametrize("case", PARAMETERS[:-1])
def test_gradgradcheck(case: Case, backend: str) -> None:
    function, leaves = _function(case, backend)
    assert gradgradcheck(function, leaves)
