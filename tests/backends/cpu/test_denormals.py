"""Denormal numbers: results that would be denormal are zero in the C++ kernels, and only there."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_attn

_C = pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only the x86 kernels flush denormal results")


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.select_cpu_isa(request.param)
    yield request.param
    _C.select_cpu_isa(before)


def random_inputs(queries: int, keys: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 8, queries, 64, generator=generator),
        torch.randn(1, 8, keys, 64, generator=generator),
        torch.randn(1, 8, keys, 64, generator=generator),
    )


@on_x86
@pytest.mark.timing
def test_a_peaked_softmax_is_as_fast_as_a_flat_one(isa: str) -> None:
    """With denormal results, the peaked one took 10 times as long with AVX-512, and 9 times with AMX."""
    inputs = [x.requires_grad_() for x in random_inputs(512)]
    dout = torch.ones(1, 8, 512, 64)

    def seconds(scale: float) -> float:
        start = time.perf_counter()
        out = fused_attn.fused_attention(*inputs, scale=scale, backend="cpu")
        torch.autograd.grad(out, inputs, dout)
        return time.perf_counter() - start

    pairs = [(seconds(4.0), seconds(0.125)) for _ in range(7)]
    peaked, flat = (min(times) for times in zip(*pairs, strict=True))
    assert peaked < 4 * flat


@on_x86
@pytest.mark.parametrize("queries", [1, 100])
def test_a_denormal_result_is_zero(queries: int, isa: str) -> None:
    query, key, value = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    value[0, 0, 0] = 2.0**-126
    assert not fused_attn.fused_attention(query, key, value, backend="cpu").any()  # the mean is 2^-128


@pytest.mark.parametrize("queries", [1, 100])
def test_denormal_inputs_keep_their_value(queries: int, isa: str) -> None:
    query, key, value = random_inputs(queries, keys=100)
    query, key = query * 1e-39, key * 1e37
    assert query.abs().max() < 2.0**-126
    out, lse = fused_attn.fused_attention(query, key, value, scale=30.0, return_lse=True, backend="cpu")
    logits = query.double() @ key.double().mT * 30.0
    assert logits.std() > 1
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())
    torch.testing.assert_close(out, (logits.softmax(-1) @ value.double()).float())


@pytest.mark.parametrize("queries", [1, 100])
def test_outputs_of_1e_31_are_exact(queries: int, isa: str) -> None:
    """With values of 1e-35, terms of the sums are zero, and the largest error is 2e-3 of the largest output."""
    query, key, value = random_inputs(queries, keys=70)
    out = fused_attn.fused_attention(query, key, value * 1e-31, backend="cpu")
    expected = fused_attn.fused_attention(query.double(), key.double(), value.double() * 1e-31, backend="reference")
    assert (out - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 512])
def test_torch_keeps_denormal_results(queries: int, threads: int, isa: str) -> None:
    """The kernels run on torch's threads, and leave the control register of each as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [x.requires_grad_() for x in random_inputs(queries)]
        fused_attn.fused_attention(*inputs, backend="cpu").sum().backward()
        with torch.no_grad():
            fused_attn.fused_attention(*inputs, backend="cpu")
        assert (torch.full((1 << 20,), 1e-38) * 0.5).all()
    finally:
        torch.set_num_threads(before)


def test_torchs_own_setting_stays(isa: str) -> None:
    assert torch.set_flush_denormal(True)
    try:
        fused_attn.fused_attention(*random_inputs(100), backend="cpu")
        assert not (torch.tensor(1e-38) * 0.5).item()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("queries", [1, 100])
def test_large_values_under_rising_scores(queries: int, isa: str) -> None:
    """The sums of a row refer to one of its first scores. Later ones may be far larger, and no sum overflows."""
    _, _, value = random_inputs(queries, keys=300)
    value = value * 1e30
    query = torch.ones(1, 8, queries, 8)
    for rise in (5.0, 20.0, 40.0, 200.0):
        key = torch.linspace(0, rise / 8, 300)[:, None].expand(1, 8, 300, 8)
        out = fused_attn.fused_attention(query, key, value, scale=1.0, backend="cpu")
        exact = (query.double() @ key.double().mT).softmax(-1) @ value.double()
        torch.testing.assert_close(out.double() / 1e30, exact / 1e30, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.float32, 1e36), (torch.float32, 3e38), (torch.float16, 3e38), (torch.float64, 1e308)],
    ids=str,
)
def test_a_huge_softcap_changes_no_score(dtype: torch.dtype, softcap: float) -> None:
    # score / softcap would be denormal, and would count as 0.
    query, key, value = torch.randn(3, 1, 2, 70, 64, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
    out = fused_attn.fused_attention(query, key, value, softcap=softcap, backend="cpu")
    expected = fused_attn.fused_attention(query, key, value, backend="cpu")
    torch.testing.assert_close(out, expected)
