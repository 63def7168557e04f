"""The dropout of attention weights that a caller sees: the native kernel drops what the attention kernels drop."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from fused_attn.attention import dropout
from fused_attn.backends import cpu
from fused_attn.nn import FusedMultiheadAttention, weights_dropout
from tests.nn.native_calls import count_calls

_C = cpu._C
pytestmark = pytest.mark.skipif(_C is None, reason="the native extension is not built")

SEED = torch.tensor(0x299F31D0A4093822)


def factors(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies weights of this shape by: 0, or 1 / (1 - p)."""
    return weights_dropout._survivors(torch.Size(shape), SEED, p).to(dtype) * dropout.scale(p)


@pytest.mark.parametrize("isa", [] if _C is None else _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 65, 67), (1, 2, 64, 128), (3, 1, 5, 200)], ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_the_kernel_multiplies_by_the_factors(isa, dtype, shape, p):
    before = _C.cpu_isa()
    _C.select_cpu_isa(isa)
    try:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        outs = [torch.full_like(x, float("nan")) for _ in range(2)]
        for threads, out in enumerate(outs, start=1):
            _C.weights_dropout(x, out, SEED, p, threads)
    finally:
        _C.select_cpu_isa(before)
    lanes = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (x.to(lanes) * factors(shape, p, lanes)).to(dtype)
    torch.testing.assert_close(outs[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(outs[1], expected, rtol=0, atol=0)


def test_gradients_of_first_and_second_order():
    x = torch.randn(1, 2, 9, 11, dtype=torch.float64, requires_grad=True)
    weights = factors(x.shape, 0.4, x.dtype)
    (grad,) = torch.autograd.grad((weights_dropout.drop_weights(x, SEED, 0.4) ** 2).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 2 * x * weights**2)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], 2 * weights**2)


def test_no_weights_at_all():
    assert weights_dropout.drop_weights(torch.empty(2, 2, 0, 3), SEED, 0.4).shape == (2, 2, 0, 3)


def test_under_vmap_plain_pytorch_drops_the_same_weights():
    x = torch.randn(3, 1, 2, 9, 11)
    out = torch.vmap(lambda weights: weights_dropout.drop_weights(weights, SEED, 0.4))(x)
    torch.testing.assert_close(out, x * factors((1, 2, 9, 11), 0.4, x.dtype))


def test_a_module_that_returns_weights_calls_the_kernel(monkeypatch):
    calls = count_calls(monkeypatch, weights_dropout, "weights_dropout")
    module = FusedMultiheadAttention(32, 4, dropout=0.3, batch_first=True)
    x = torch.randn(2, 10, 32, requires_grad=True)
    out, weights = module(x, x, x, average_attn_weights=False)
    (out.sum() + weights.sum()).backward()
    assert calls == ["weights_dropout"] * 2
    assert 0.1 < (weights == 0).double().mean() < 0.5


@pytest.mark.timing
def test_weights_with_dropout_take_little_longer_than_without():
    # In plain PyTorch, the random numbers took 3 to 8 times as long as all the rest.
    module = FusedMultiheadAttention(256, 8, dropout=0.1, batch_first=True)
    x = torch.randn(4, 256, 256)
    times = {}
    for is_training in (False, True):
        module.train(is_training)
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            with torch.no_grad():
                module(x, x, x)
            best = min(best, time.perf_counter() - start)
        times[is_training] = best
    assert times[True] < 2.5 * times[False]
