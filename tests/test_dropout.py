"""Dropout: every backend drops the documented entries, at the documented rate, and repeats them for the same seed."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import fused_attn
from fused_attn.attention import dropout

B, H, L, S = 2, 3, 70, 67


def kept(
    backend: str,
    p: float,
    seed: int | torch.Tensor | None,
    shape: tuple[int, ...] = (B, H, L, S),
    device: str = "cpu",
    **options,
) -> torch.Tensor:
    """Which weights a backend kept: (B, H, L, S) bool.

    With one-hot values, column j of the output is the weight of key j, which is zero if dropout dropped it.
    """
    batch, heads, rows, columns = shape
    query, key = (torch.zeros(batch, heads, length, 8, device=device) for length in (rows, columns))
    # The kernels take a head dim of 256 at most, so one call shows 256 keys.
    parts = [
        fused_attn.fused_attention(
            query, key, part.expand(batch, heads, -1, -1), dropout_p=p, dropout_seed=seed, backend=backend, **options
        )
        for part in torch.eye(columns, device=device).split(256, dim=1)
    ]
    return torch.cat(parts, dim=-1).cpu() != 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        # The known answers in the file kat_vectors of Random123, the library of Philox's authors.
        ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_known_answers(counter, seed, words) -> None:
    assert oracle.philox4x32_7(np.array(counter, dtype=np.uint32), seed).tolist() == list(words)
    signed = seed - 2**64 if seed >= 2**63 else seed
    ours = dropout.philox(tuple(torch.tensor(x) for x in counter), torch.tensor(signed))
    assert [int(word) for word in ours] == list(words)


def test_each_bit_of_seed_and_position_changes_each_random_bit() -> None:
    # With one round less, the bits of some words change with probability 0.33 or 0.67.
    count = 4096
    rng = np.random.default_rng(0)
    ranges = (1024, 8192, 64, 64)  # groups of keys, queries, heads and batch entries as calls have them
    counter = [torch.from_numpy(rng.integers(0, most, count)) for most in ranges]
    seed = torch.from_numpy(rng.integers(0, 2**63, count))
    words = dropout.philox(tuple(counter), seed)

    def changes(counter: list[torch.Tensor], seed: torch.Tensor) -> torch.Tensor:
        """How often each of the 128 bits changes: (128,) in [0, 1]."""
        flips = torch.stack([x ^ y for x, y in zip(words, dropout.philox(tuple(counter), seed), strict=True)])
        return (flips[:, None] >> torch.arange(32)[:, None] & 1).double().mean(-1).flatten()

    of_seed = [changes(counter, seed ^ 1 << bit) for bit in range(63)]
    of_counter = [
        changes([*counter[:i], counter[i] ^ 1 << bit, *counter[i + 1 :]], seed) for i in range(4) for bit in range(32)
    ]
    # A mean of 4096 fair bits has a standard deviation of 0.0078. The largest of 24000 means was 0.035 away from 0.5.
    assert (torch.stack(of_seed + of_counter) - 0.5).abs().max() < 6 * 0.5 / count**0.5


@pytest.mark.quick
@pytest.mark.parametrize("seed", [0, 1, 2**32, 123456789012345, 2**63 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_bits_are_the_documented_ones(backend: str, p: float, seed: int) -> None:
    expected = oracle.dropout_keep(seed, p, 0, B, H, L, S)
    assert torch.equal(kept(backend, p, seed), torch.from_numpy(expected))


def test_bits_of_long_rows(backend: str) -> None:
    expected = oracle.dropout_keep(77, 0.3, 0, 1, 1, 300, 700)
    assert torch.equal(kept(backend, 0.3, 77, (1, 1, 300, 700)), torch.from_numpy(expected))


@pytest.mark.quick
def test_bits_do_not_depend_on_the_rest_of_the_problem(backend: str) -> None:
    """A call with fewer heads, rows and keys drops the same entries as the whole call, whatever the tile sizes are."""
    whole = kept(backend, 0.4, 5, (3, 4, 200, 130))
    for shape in ((1, 1, 1, 1), (2, 3, 1, 130), (1, 4, 65, 64), (3, 2, 199, 3)):
        part = whole[tuple(slice(n) for n in shape)]
        assert torch.equal(kept(backend, 0.4, 5, shape), part), shape


def test_bits_do_not_depend_on_masks(backend: str) -> None:
    whole = kept(backend, 0.4, 5)
    ignored = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = kept(backend, 0.4, 5, key_padding_mask=ignored, is_causal=True)
    visible = ~ignored[:, None, None, :] & torch.ones(L, S, dtype=torch.bool).tril()
    assert torch.equal(masked, whole & visible)


def test_rate_and_mean() -> None:
    """The bounds: in 100 000 draws, the standard deviation of a rate is at most 0.0016, and of a correlation 0.0032."""
    for p in (0.05, 0.5, 0.9):
        keep = oracle.dropout_keep(3, p, 0, 1, 1, 100, 1000)
        assert abs(keep.mean() - (1 - p)) < 0.01
        # Neighbouring entries are independent along every axis: the correlation of their bits is as small as chance
        # makes it.
        centred = keep[0, 0] - keep.mean()
        variance = p * (1 - p)
        assert abs((centred[:, 1:] * centred[:, :-1]).mean() / variance) < 0.02
        assert abs((centred[1:] * centred[:-1]).mean() / variance) < 0.02


@pytest.mark.quick
@pytest.mark.parametrize("p", [1e-7, 0.1, 0.9999, 1 - 1e-7])
def test_the_factor_fits_the_rounded_probability(backend: str, p: float) -> None:
    """So dropout changes no mean. With p = 0.9999, the factor 1 / (1 - p) would be 7 % too large."""
    # The reference sums by torch's matrix product, which on some CPUs rounds float32 sums of 500 terms by 6e-6.
    dtype = torch.float64 if backend == "reference" else torch.float32
    query, value = torch.zeros(1, 2, 70, 8, dtype=dtype), torch.ones(1, 2, 500, 8, dtype=dtype)
    out = fused_attn.fused_attention(query, value, value, dropout_p=p, dropout_seed=6, backend=backend)
    threshold = {1e-7: 0, 0.1: 6554, 0.9999: 65529, 1 - 1e-7: 65535}[p]
    share = torch.from_numpy(oracle.dropout_keep(6, p, 0, 1, 2, 70, 500)).double().mean(-1, keepdim=True)
    torch.testing.assert_close(out.double(), (share * 65536 / (65536 - threshold)).expand_as(out), rtol=2e-6, atol=0)


@pytest.mark.quick
def test_expectation_is_the_output_without_dropout(backend: str, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 1, 8, 8, generator=generator) for _ in range(3))
    expected = fused_attn.fused_attention(query, key, value, backend=backend)
    many = fused_attn.fused_attention(
        query.expand(4000, 1, 8, 8),
        key.expand(4000, 1, 8, 8),
        value.expand(4000, 1, 8, 8),
        dropout_p=0.3,
        dropout_seed=1,
        backend=backend,
    )
    deviation = (many.mean(0) - expected[0]).abs()
    # 5 times the standard error of the mean. By chance, a larger error is very rare, and the seed of this test is
    # fixed.
    assert (deviation <= 5 * many.std(0) / 4000**0.5).all()


@pytest.mark.quick
def test_manual_seed_reproduces(backend: str, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(3))

    def call():
        return fused_attn.fused_attention(query, key, value, dropout_p=0.5, backend=backend)

    torch.manual_seed(0)
    first, second = call(), call()
    torch.manual_seed(0)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


@pytest.mark.quick
def test_no_dropout_leaves_the_generator_alone(generator: torch.Generator) -> None:
    x = torch.randn(1, 1, 4, 8, generator=generator)
    before = torch.get_rng_state()
    fused_attn.fused_attention(x, x, x)
    fused_attn.fused_attention(x, x, x, dropout_p=0.5, dropout_seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_may_be_a_tensor(backend: str) -> None:
    assert torch.equal(kept(backend, 0.5, torch.tensor(12)), kept(backend, 0.5, 12))


@pytest.mark.quick
def test_p_1_drops_everything(backend: str, generator: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator).requires_grad_() for _ in range(3))
    out = fused_attn.fused_attention(query, key, value, dropout_p=1.0, backend=backend)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert not out.any() and not any(grad.any() for grad in grads)


def test_packed_sequences_are_keyed_by_their_number(backend: str) -> None:
    """Sequence n of a packed call drops the same entries as batch entry n of a padded call."""
    lengths = (5, 9, 3)
    whole = kept(backend, 0.5, 6, (3, 2, 9, 9))
    offsets = torch.tensor([0, 5, 14, 17], dtype=torch.int32)
    value = torch.cat([torch.eye(9)[:n] for n in lengths])[:, None].expand(17, 2, 9)
    out = fused_attn.fused_attention_varlen(
        torch.zeros(17, 2, 8),
        torch.zeros(17, 2, 8),
        value,
        offsets,
        offsets,
        9,
        9,
        dropout_p=0.5,
        dropout_seed=6,
        backend=backend,
    )
    for n, length in enumerate(lengths):
        rows = out[offsets[n] : offsets[n + 1]].transpose(0, 1)  # (H, length, 9)
        assert torch.equal(rows[..., :length] != 0, whole[n, :, :length, :length])
