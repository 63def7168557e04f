"""Every backend computes every case in every dtype like the oracle: output, lse and all gradients."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import CASES, Case

import fused_attn

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            id=f"{case.id}-{NAMES[dtype]}",
            marks=[pytest.mark.quick] if case.is_quick and dtype in (torch.float32, torch.bfloat16) else [],
        )
        for case in CASES
        for dtype in case.dtypes
    ],
)
def test_case(case: Case, dtype: torch.dtype, backend: str) -> None:
    cases.check(case, dtype, backend)


@pytest.mark.parametrize("case", cases.LOGITS_BEYOND_MILLIONS, ids=lambda case: case.id)
def test_huge_logits(case: Case, backend: str) -> None:
    cases.check(case, torch.float32, backend)


def test_hand_computed(backend: str) -> None:
    """Two queries, two keys, scale 1: softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2)."""
    log3 = torch.tensor(3.0, dtype=torch.float64).log().item()
    query = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[[0.0], [log3]]]], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([[[[8.0, 0.0], [0.0, 4.0]]]], dtype=torch.float64, requires_grad=True)
    out, lse = fused_attn.fused_attention(query, key, value, scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(out.tolist(), [[[[2.0, 3.0], [4.0, 2.0]]]], rtol=0, atol=1e-13)
    torch.testing.assert_close(lse.exp().tolist(), [[[4.0, 2.0]]], rtol=0, atol=1e-13)

    # The loss is out[0, 0], so dv = the weights of row 0, dp = (8, 0) and ds = p * (dp - 2) = (3/2, -3/2).
    dout = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    dquery, dkey, dvalue = torch.autograd.grad(out, (query, key, value), dout)
    torch.testing.assert_close(dvalue.tolist(), [[[[0.25, 0.0], [0.75, 0.0]]]], rtol=0, atol=1e-13)
    torch.testing.assert_close(dquery.tolist(), [[[[-1.5 * log3], [0.0]]]], rtol=0, atol=1e-13)
    torch.testing.assert_close(dkey.tolist(), [[[[1.5], [-1.5]]]], rtol=0, atol=1e-13)


@pytest.mark.quick
def test_backend_chosen_by_default_is_the_first_that_runs(backend: str, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    default = fused_attn.fused_attention(query, key, value)
    explanation = fused_attn.explain(query, key, value)
    torch.testing.assert_close(
        fused_attn.fused_attention(query, key, value, backend=explanation.chosen), default, rtol=0, atol=0
    )
    assert fused_attn.explain(query, key, value, backend=backend).chosen == backend
    assert backend in str(explanation)


@pytest.mark.quick
def test_inputs_are_not_changed(backend: str) -> None:
    case = next(case for case in CASES if case.id == "softcap-with-everything")
    inputs = case.make(torch.float32)
    before = {name: x.clone() for name, x in inputs.tensors.items()}
    cases.run(inputs, backend)
    for name, x in inputs.tensors.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.quick
def test_no_grad_and_grad_agree(backend: str) -> None:
    """A call under no_grad takes another way through the library than a call with gradients, with the same result."""
    case = next(case for case in CASES if case.id == "padding-causal")
    inputs = case.make(torch.float32)
    with torch.no_grad():
        out, lse = inputs.function(**inputs.tensors, **inputs.options, return_lse=True, backend=backend)
    result = cases.run(inputs, backend)
    assert torch.equal(out, result.out) and torch.equal(lse, result.lse)
    assert torch.equal(inputs.function(**inputs.tensors, **inputs.options, backend=backend), out)


@pytest.mark.quick
def test_the_rule_notices_an_error() -> None:
    """`oracle.assert_close` fails, and names the result, if one result is wrong by 100 times the allowed error."""
    case = next(case for case in CASES if case.id == "softcap-with-everything")
    expected = cases.expected(case, torch.float32)
    oracle.assert_close(expected.eager, expected)
    for name, _ in expected.eager.items():
        moved = {n: x.clone() for n, x in expected.eager.items()}
        moved[name].view(-1)[3] += 1e-3
        grads = {n: moved[f"d{n}"] for n in expected.eager.grads}
        with pytest.raises(AssertionError, match=f"{name}: max error"):
            oracle.assert_close(oracle.Result(moved["out"], moved["lse"], grads), expected)
