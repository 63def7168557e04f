"""`t5_relative_bias` and `alibi_bias` give what plain loops and the formula of Hugging Face's T5 give."""

from __future__ import annotations

import math

import pytest
import torch

import fused_attn


def hf_bucket(distance: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    """A copy of the computation in `T5Attention._relative_position_bucket` of transformers 4.x."""
    buckets = 0
    if bidirectional:
        num_buckets //= 2
        buckets += (distance > 0).to(torch.long) * num_buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    max_exact = num_buckets // 2
    is_small = distance < max_exact
    if_large = max_exact + (
        torch.log(distance.float() / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact)
    ).to(torch.long)
    if_large = torch.min(if_large, torch.full_like(if_large, num_buckets - 1))
    buckets += torch.where(is_small, distance, if_large)
    return buckets


def dense(vector: torch.Tensor, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """Turns a relative bias (H, L + S - 1) into a dense bias (H, L, S) by two loops."""
    out = torch.empty(vector.shape[0], seqlen_q, seqlen_k, dtype=vector.dtype)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            out[:, i, j] = vector[:, j - i + seqlen_q - 1]
    return out


@pytest.mark.quick
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "num_buckets", "max_distance"),
    [(7, 5, 32, 128), (1, 60, 32, 128), (60, 1, 8, 16), (300, 280, 32, 128), (50, 50, 16, 20)],
)
def test_t5(seqlen_q, seqlen_k, num_buckets, max_distance, bidirectional, generator) -> None:
    table = torch.randn(num_buckets, 3, generator=generator, requires_grad=True)
    bias = fused_attn.t5_relative_bias(table, seqlen_q, seqlen_k, bidirectional, max_distance)
    assert bias.shape == (3, seqlen_q + seqlen_k - 1)
    distance = torch.arange(seqlen_k)[None, :] - torch.arange(seqlen_q)[:, None]
    expected = table[hf_bucket(distance, bidirectional, num_buckets, max_distance)].permute(2, 0, 1)  # (H, L, S)
    rows = torch.arange(seqlen_q)[:, None]
    gathered = bias[:, torch.arange(seqlen_k)[None, :] - rows + seqlen_q - 1]
    assert torch.equal(gathered, expected)
    weight = torch.randn(expected.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(gathered, table, weight), torch.autograd.grad(expected, table, weight), rtol=1e-4, atol=1e-4
    )


@pytest.mark.quick
def test_t5_buckets_by_hand() -> None:
    """The 8 buckets for distances of 16 at most, by hand.

    Each side has 4 buckets: distance 0, distance 1, distances 2 to 5, and all larger distances.
    """
    table = torch.arange(8.0)[:, None]
    bias = fused_attn.t5_relative_bias(table, 9, 9, max_distance=16)[0].int().tolist()
    #       -8 -7 -6 -5 -4 -3 -2 -1  0  1  2  3  4  5  6  7  8
    assert bias == [3, 3, 3, 2, 2, 2, 2, 1, 0, 5, 6, 6, 6, 6, 7, 7, 7]


@pytest.mark.quick
def test_alibi(generator: torch.Generator) -> None:
    slopes = torch.tensor([0.5, 0.25])
    matrix = dense(fused_attn.alibi_bias(slopes, 4, 6), 4, 6)
    for h in range(2):
        for i in range(4):
            for j in range(6):
                assert matrix[h, i, j] == -slopes[h] * abs(j - i)


@pytest.mark.quick
@pytest.mark.parametrize("is_causal", [False, True])
def test_same_as_a_dense_mask(backend: str, is_causal: bool, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (9, 14, 14))
    vector = torch.randn(3, 22, generator=generator)
    ours = fused_attn.fused_attention(query, key, value, relative_bias=vector, is_causal=is_causal, backend=backend)
    mask = dense(vector, 9, 14)
    if is_causal:
        mask = mask.masked_fill(torch.ones(9, 14, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_attn.t5_relative_bias(torch.zeros(32), 3, 3), r"table: expected shape \(num_buckets, H\), got"),
        (lambda: fused_attn.alibi_bias(torch.zeros(2, 2), 3, 3), r"slopes: expected shape \(H,\), got"),
        (
            lambda: fused_attn.alibi_bias(torch.arange(2), 3, 3),
            r"slopes: expected a floating-point tensor, got torch\.int64",
        ),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
