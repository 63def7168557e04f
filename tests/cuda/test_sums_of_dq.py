"""Backward of few queries with many keys on Hopper, executed: a tile of dq has several sums (DqTurn)."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from kernels import Kernels
from torch import Tensor

import fused_attn
from fused_attn.backends.cuda import hardware

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("poisoned")


def latents(name: str, **changes) -> Case:
    """100 queries with 900 keys, which are eight blocks."""
    sizes = {"heads": 2, "batch": 1, "seqlen_q": 100, "seqlen_k": 900, "head_dim": 64}
    return Case(name, **sizes | changes)


CASES = [
    *(latents(f"head-dim-{dim}", head_dim=dim, batch=2) for dim in (64, 96, 128)),
    *(latents(f"head-dim-{dim}", head_dim=dim, seqlen_q=200, seqlen_k=150) for dim in (8, 40, 72, 104)),
    latents("grouped", heads=4, kv_heads=1, seqlen_q=50),
    latents("one-query", seqlen_q=1),
    latents("causal-upper-left", options={"is_causal": True}),  # blocks of keys that no query sees
    latents("window", attn_mask=cases.lower_right, options={"window_size": (300, 0)}),
    latents("padding", batch=2, key_padding_mask=cases.padding(900, 33), edit=cases._nan_in_padding),
    latents("padding-scattered", key_padding_mask=cases.scattered_padding, edit=cases._nan_in_padding),
    latents("lengths", batch=2, key_lengths=(0, 650), edit=cases._nan_behind_lengths, attn_mask=cases.lower_right),
    latents("mask", attn_mask=cases.bool_mask("BHLS")),
    latents("mask-empty-rows", attn_mask=cases.empty_rows_mask),
    latents("bias", attn_mask=cases.float_mask("B1LS")),
    latents("dropout", options={"dropout_p": 0.3, "dropout_seed": 5}),
    Case("packed", heads=2, lengths_q=(100, 0, 30, 64), lengths_k=(900, 300, 1, 513), head_dim=64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, dtype: str, kernels: Kernels) -> None:
    with kernels.running(90, seed=len(case.id)):
        cases.check(case, DTYPES[dtype], "cuda")


def test_repeats_give_the_same_bits(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, rows, 64, generator=generator).half().requires_grad_() for rows in (100, 900, 900)]

    def gradients(seed: int, resident_blocks: int) -> tuple[Tensor, ...]:
        with kernels.running(90, seed, resident_blocks=resident_blocks):
            out = fused_attn.fused_attention(*leaves, backend="cuda")
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

    first = gradients(seed=1, resident_blocks=1)
    for resident_blocks in (3, 16):
        for x, y in zip(first, gradients(2, resident_blocks), strict=True):
            assert torch.equal(x, y)


def bytes_of_dq(
    kernels: Kernels, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, mask_entries: int = 0
) -> int:
    """The memory that backward takes for dq, beside that for dk and dv."""

    def workspace(wants_dquery: bool) -> int:
        return hardware.module.workspace_bytes(
            architecture=90, is_backward=True, batch=batch, batch_entries=batch, num_heads=heads,
            num_kv_heads=kv_heads, rows_q=queries, rows_k=keys, seqlen_q=queries, seqlen_k=keys, head_dim=dim,
            value_dim=dim, is_packed=False, has_key_padding=False, mask_entries=mask_entries, relative_bias_heads=0,
            decode_splits=0, large_splits=1, dq_splits=1, dk_splits=1, wants_dquery=wants_dquery, wants_dkey=True,
            wants_dvalue=True, dbias_shape=None, wants_dkey_bias=False, wants_drelative_bias=False,
        )  # fmt: skip

    with kernels.running(90):
        return workspace(True) - workspace(False)


@pytest.mark.parametrize(
    ("shape", "sums"),
    [
        ((1, 16, 16, 4096, 4096, 128), 1),
        ((1, 16, 16, 16384, 16384, 128), 1),
        ((2, 32, 32, 8192, 32768, 128), 1),
        ((8, 16, 16, 512, 16384, 128), 1),  # 24 heads with 8 tiles each run side by side
        ((1, 8, 8, 512, 16384, 128), 2),  # 17 blocks of keys of a head run at the same time, at 8 tiles of queries
        ((1, 8, 8, 128, 16384, 128), 8),
        ((1, 8, 1, 128, 16384, 128), 8),  # 128 blocks, at two tiles of each of 8 heads
        ((1, 1, 1, 64, 65536, 128), 32),  # never more
        ((1, 8, 8, 128, 512, 128), 2),  # four blocks
        ((1, 8, 8, 512, 16384, 64), 4),  # tiles of 128 queries
    ],
)
def test_number_of_sums(shape: tuple[int, ...], sums: int, kernels: Kernels) -> None:
    batch, heads, _, queries, _, dim = shape
    one_sum = batch * heads * -(-queries // 128) * 128 * dim * 4
    assert bytes_of_dq(kernels, *shape) // one_sum == sums


def test_several_sums_take_little_memory(kernels: Kernels) -> None:
    """A tile has several sums only if there are few tiles."""
    for batch in (1, 4, 64):
        for heads in (1, 8, 32):
            for queries in (1, 64, 200, 1024, 8192):
                sums = bytes_of_dq(kernels, batch, heads, heads, queries, 100000, 128)
                assert sums < batch * heads * -(-queries // 128) * 128 * 128 * 4 + 64 * 2**20
