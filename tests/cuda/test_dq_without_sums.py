"""Backward of at most one block of keys on Hopper, executed: the fused kernel writes dq itself, without sums."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from kernels import Kernels, dividing_gradients
from test_sums_of_dq import bytes_of_dq
from torch import Tensor

import fused_attn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("poisoned")


def one_block(name: str, **changes) -> Case:
    """197 queries of each of two heads with 100 keys: several tiles of queries, of which the last one is not full."""
    sizes = {"heads": 2, "batch": 2, "seqlen_q": 197, "seqlen_k": 100, "head_dim": 64}
    return Case(name, **sizes | changes)


def hidden_tiles(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A mask that hides all keys from the queries before 130 and from 192 on, which are whole tiles."""
    query = torch.arange(case.seqlen_q)[:, None]
    return ((query >= 130) & (query < 192)).expand(case.seqlen_q, case.seqlen_k)


def ranges_of_late_queries(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Ranges (L, 1, 2) that show no key to the queries before 130, and all keys to the others."""
    query = torch.arange(case.seqlen_q)[:, None, None]
    return torch.where(query < 130, 0, torch.tensor([0, case.seqlen_k])).int()


CASES = [
    *(one_block(f"head-dim-{dim}", head_dim=dim) for dim in (64, 96, 128, 8, 40, 72, 104)),
    *(one_block(f"whole-block-{dim}", seqlen_q=128, seqlen_k=128, head_dim=dim) for dim in (64, 128)),
    *(one_block(f"windows-{dim}", batch=5, seqlen_q=49, seqlen_k=49, head_dim=dim) for dim in (32, 128)),
    one_block("grouped", heads=4, kv_heads=1),
    one_block("one-query", seqlen_q=1),
    one_block("one-key", seqlen_k=1),
    one_block("layout", query_layout="blhd", kv_layout="blhd", dout_layout="blhd"),
    one_block("causal-upper-left", options={"is_causal": True}),
    one_block("causal-at-the-end", attn_mask=cases.lower_right),  # the first 97 queries see no key
    one_block("window", options={"window_size": (10, 3)}),  # the last queries see no key
    # The last query is a tile of its own, and sees no key.
    one_block("window-of-no-key", seqlen_q=129, seqlen_k=128, options={"window_size": (0, -1)}),
    one_block("window-at-the-end", head_dim=128, attn_mask=cases.lower_right, options={"window_size": (20, 0)}),
    one_block("padding", key_padding_mask=cases.padding(100, 0), edit=cases._nan_in_padding),
    one_block("padding-of-all", head_dim=128, key_padding_mask=cases.padding(0, 33), edit=cases._nan_in_padding),
    one_block("lengths", key_lengths=(0, 65), edit=cases._nan_behind_lengths),
    one_block("mask", attn_mask=cases.bool_mask("BHLS")),
    one_block("mask-of-tiles", attn_mask=hidden_tiles),
    one_block("mask-of-tiles-128", head_dim=128, attn_mask=hidden_tiles),
    one_block("ranges", key_ranges=cases.random_ranges("BHL", 2)),
    one_block("ranges-of-late-queries", key_ranges=ranges_of_late_queries),
    one_block("narrow-values", head_dim=128, value_dim=32, key_padding_mask=cases.padding(100, 0)),
    one_block("bias", attn_mask=cases.float_mask("B1LS")),
    one_block("empty-split", seqlen_q=250, head_dim=128),
    one_block("relative-bias", relative_bias=cases.per_head_bias, options={"softcap": 2.0}),
    one_block("dropout", options={"dropout_p": 0.3, "dropout_seed": 5}),
    Case("packed", heads=2, kv_heads=1, lengths_q=(100, 0, 30, 264), lengths_k=(90, 60, 0, 128), head_dim=64),
    Case("packed-128", heads=2, lengths_q=(100, 3, 30, 264), lengths_k=(90, 60, 0, 1), head_dim=128),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, dtype: str, kernels: Kernels) -> None:
    with kernels.running(90, seed=len(case.id)):
        cases.check(case, DTYPES[dtype], "cuda")


@pytest.mark.parametrize("name", ["grouped", "causal-at-the-end", "mask-of-tiles", "packed", "empty-split"])
def test_programs_that_share_the_queries(name: str, kernels: Kernels) -> None:
    case = next(case for case in CASES if case.id == name)
    with kernels.running(90), dividing_gradients(dq=1, dk=3):
        cases.check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("wanted", ["q", "kv", "k"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_some_gradients_only(head_dim: int, wanted: str, kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, rows, head_dim, generator=generator).half().requires_grad_() for rows in (200, 90, 90)]

    padding = torch.arange(90)[None] >= 70

    def gradients(names: str) -> dict[str, Tensor]:
        with kernels.running(90):
            out = fused_attn.fused_attention(*leaves, key_padding_mask=padding, window_size=(50, 50), backend="cuda")
            inputs = [leaves["qkv".index(name)] for name in names]
            return dict(zip(names, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True))

    complete = gradients("qkv")
    for name, gradient in gradients(wanted).items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, complete[name])


def test_no_memory_and_no_launch_for_dq(kernels: Kernels) -> None:
    """Sums would take twice the memory of the queries at 128 keys, and 10 times at 49 with head dim 32."""
    assert bytes_of_dq(kernels, 64, 4, 4, 49, 49, 32) == 0
    assert bytes_of_dq(kernels, 4, 8, 8, 4096, 128, 128) == 0
    assert bytes_of_dq(kernels, 4, 8, 8, 4096, 128, 128, mask_entries=32) == 0
    assert bytes_of_dq(kernels, 4, 8, 8, 4096, 129, 128) >= 4 * 8 * 4096 * 128 * 4

    def launches(keys: int) -> int:
        query, key = (torch.ones(1, 1, rows, 64).half().requires_grad_() for rows in (40, keys))
        with kernels.running(90):
            out = fused_attn.fused_attention(query, key, key, backend="cuda")
            forward = kernels.statistics.launches
            out.backward(torch.ones_like(out))
            return kernels.statistics.launches - forward

    assert (launches(128), launches(129)) == (2, 3)
