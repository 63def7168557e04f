"""The general CUDA kernels, executed, at the limits: softcaps and biases of any size, rows without keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from kernels import Kernels
from torch import Tensor

import fused_attn
from fused_attn.attention.inputs import Inputs, Saved, Shapes, Wanted
from fused_attn.attention.problem import AttentionProblem, Scalars
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware

INF = float("inf")


@pytest.fixture(autouse=True, params=(80, 90), ids=lambda architecture: f"sm_{architecture}")
def running(kernels: Kernels, request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.running(request.param):
        yield


def make_inputs(length: int = 40, keys: int = 72) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, 2, rows, 64, generator=generator).bfloat16().requires_grad_() for rows in (length, keys, keys)
    )


@pytest.mark.parametrize("softcap", [1.2e-38, 1e-3, 1e5, 1e8, 1e35])
def test_any_softcap(softcap: float) -> None:
    """A tanh with a fixed absolute error would be multiplied by the softcap. Scores / 1.2e-38 may be infinite.

    A smaller softcap is refused (tests/test_errors.py).
    """
    inputs = make_inputs()
    results = []
    for backend in ("cuda", "reference"):
        out, lse = fused_attn.fused_attention(*inputs, softcap=softcap, backend=backend, return_lse=True)
        # In the reference, scores / 1.2e-38 are infinite, and their gradients NaN.
        grads = torch.autograd.grad(out.float().square().sum(), inputs) if softcap > 1e-30 else ()
        results.append((out, lse, *grads))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_hidden_by_the_smallest_number(dtype: torch.dtype) -> None:
    """Masks of other libraries: a row that they hide wholly sees all keys alike, and breaks no gradient."""
    query, key, value = inputs = make_inputs()
    bias = torch.zeros(1, 1, 40, 72)
    bias[..., 60:] = torch.finfo(dtype).min
    bias[:, :, 5] = torch.finfo(dtype).min
    bias = bias.to(dtype)
    out = fused_attn.fused_attention(query, key, value, attn_mask=bias, backend="cuda")
    torch.testing.assert_close(out[:, :, 5], value.float().mean(2).bfloat16(), rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[2][:, :, 60:].any()


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("options", [{"dropout_p": 0.1, "dropout_seed": 3}, {"softcap": 5.0}], ids=str)
def test_every_feature_runs_in_the_fused_backward(options: dict, head_dim: int, kernels: Kernels) -> None:
    """On Hopper, for head dims up to 128 and several blocks of keys: only the fused kernel adds tiles of dquery by bulk
    copies.
    """
    leaves = [torch.zeros(1, 1, rows, head_dim).half().requires_grad_() for rows in (8, 130, 130)]
    out = fused_attn.fused_attention(*leaves, backend="cuda", **options)
    torch.autograd.grad(out, leaves, out)
    assert (kernels.statistics.tma_stores > 0) == (hardware.device_architecture(None) == 90)


@pytest.mark.parametrize("huge", [-1e8, -1e9, -1e30, 1e9])
def test_rows_with_a_huge_bias_for_every_key(huge: float) -> None:
    """They have no gradient. A float of this size would make probs of 2^64, and NaN in the gradients of all keys."""
    inputs = make_inputs()
    bias = torch.zeros(1, 1, 40, 72)
    bias[:, :, 5] = huge
    bias[:, :, 9, 20:] = -abs(huge)
    dout = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for backend in ("cuda", "reference"):
        leaves = [*inputs, bias.clone().requires_grad_()]
        out = fused_attn.fused_attention(*leaves, backend=backend)
        if backend == "reference":
            dout[:, :, 5] = 0.0
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert not results[0][1][:, :, 5].any()


def test_huge_scores_have_finite_gradients() -> None:
    query, key, value = make_inputs()
    query.data[:, :, 7:] *= 1e9
    out = fused_attn.fused_attention(query, key, value, backend="cuda")
    grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, 7:].any() and grads[0][:, :, :7].any()


def test_sinks_beside_no_key_at_all() -> None:
    query, key, value = make_inputs(keys=0)
    sinks = torch.tensor([0.5, 2.0], requires_grad=True)
    out, lse = fused_attn.fused_attention(query, key, value, sinks=sinks, backend="cuda", return_lse=True)
    assert not out.any()
    assert (lse == -INF).all()
    assert not torch.autograd.grad(out.float().sum() + lse.nan_to_num(neginf=0.0).sum(), sinks)[0].any()


def test_packed_sequences_without_keys_beside_rows_of_keys() -> None:
    """On a GPU nobody reads the offsets, so that the backend can get sequences without keys, and a tensor of keys."""
    query, key = torch.randn(20, 2, 64).bfloat16(), torch.randn(8, 2, 64).bfloat16()
    offsets = {"cu_seqlens_q": torch.tensor([0, 10, 20], dtype=torch.int32), "cu_seqlens_k": torch.zeros(3).int()}
    inputs = Inputs(query, key, key, **offsets)
    shapes = Shapes(*(None if x is None else x.shape for x in inputs))
    problem = AttentionProblem.of(
        shapes, query.dtype, query.device, Scalars(max_seqlen_q=10, max_seqlen_k=0, scale=1.0)
    )
    out, lse, _ = cuda.forward(problem, inputs, needs_lse=True, needs_max=False)
    assert not out.any()
    assert (lse == -INF).all()


@pytest.mark.parametrize("lengths", [(300, 70), (300, *[2] * 12)], ids=["two", "one-long"])
def test_packed_sequences_of_unequal_lengths_with_a_mask(lengths: tuple[int, ...]) -> None:
    """The short sequences have fewer blocks of keys than the long one. Nobody waits for the blocks that are missing."""
    longest, ends = max(lengths), list(accumulate(lengths))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(lengths), 2, 96, generator=generator).half() for _ in range(4)]
    mask = torch.rand(len(lengths), 1, longest, longest, generator=generator) < 0.9
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    inputs = Inputs(*rows[:3], mask=mask, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    shapes = Shapes(*(None if x is None else x.shape for x in inputs))
    scalars = Scalars(max_seqlen_q=longest, max_seqlen_k=longest, scale=0.1)
    problem = AttentionProblem.of(shapes, torch.float16, rows[0].device, scalars)
    out, lse, _ = cuda.forward(problem, inputs, needs_lse=True, needs_max=False)
    wanted = Wanted(query=True, key=True, value=True)
    grads = cuda.backward(problem, inputs, Saved(out, lse, dout=rows[3]), wanted)
    for end, length, visible in zip(ends, lengths, mask, strict=True):
        part = slice(end - length, end)
        leaves = [x[part].transpose(0, 1)[None].float().requires_grad_() for x in rows[:3]]
        expected = fused_attn.fused_attention(
            *leaves, visible[None, :, :length, :length], scale=0.1, backend="reference"
        )
        torch.testing.assert_close(out[part].transpose(0, 1)[None].float(), expected, rtol=1e-2, atol=1e-2)
        of_part = torch.autograd.grad(expected, leaves, rows[3][part].transpose(0, 1)[None].float())
        for found, grad in zip(grads[:3], of_part, strict=True):
            torch.testing.assert_close(found[part].transpose(0, 1)[None].float(), grad, rtol=2e-2, atol=2e-2)
