"""Backward of packed sequences that differ much in length: programs are found by offsets (gradient_tile)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from kernels import Kernels
from torch import Tensor

import fused_attn
from fused_attn.attention import checks
from fused_attn.attention.inputs import Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends.cuda import splits as cuda_splits
from fused_attn.backends.cuda import workspace as cuda_workspace

#: The last rows belong to no sequence, and so do the first ones of "late".
LENGTHS = {
    "one-long": ([3, 0, 300, 1, 128, 7, 2, 0, 5, 127, 4, 1, 9], 0, 2),
    "late": ([2] * 40 + [290], 200, 0),
    "many": ([1, 0, 2] * 30 + [257], 1, 130),  # more than a warp looks at at a time
    "long-first": ([270, *[0] * 70, 1], 0, 0),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def gradients(backend: str, dtype: torch.dtype, rows: list[Tensor], sinks: Tensor, offsets: Tensor, **options) -> list:
    """Those of query, key, value and sinks. The rows that belong to a sequence have a gradient of out."""
    leaves = [x.to(dtype).requires_grad_() for x in (*rows[:3], sinks)]
    longest = int(offsets.diff().max())
    out, lse = fused_attn.fused_attention_varlen(
        *leaves[:3], offsets, offsets, longest, longest, sinks=leaves[3], enable_gqa=True, return_lse=True,
        backend=backend, **options,
    )  # fmt: skip
    own = slice(int(offsets[0]), int(offsets[-1]))
    loss = (out[own] * rows[3][own].to(dtype)).sum() + lse[:, own].sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])  # one kernel with tiles of 128 or 64 queries, and two kernels
@pytest.mark.parametrize("architecture", [80, 90])
def test_gradients(
    architecture: int, head_dim: int, name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_causal = name in ("late", "long-first")
    lengths, before, after = LENGTHS[name]
    total = before + sum(lengths)
    offsets = torch.tensor(list(accumulate(lengths, initial=before))).int()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(total + after, count, head_dim, generator=generator).half() for count in (2, 1, 1, 2)]
    sinks = torch.randn(2, generator=generator)
    # The offsets of tensors on a GPU are not checked.
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *args: None)
    with kernels.running(architecture):
        found = gradients("cuda", torch.float16, rows, sinks, offsets, is_causal=is_causal)
    own = [x[before:total] for x in rows]
    expected = gradients("reference", torch.float64, own, sinks, offsets - before, is_causal=is_causal)
    for x, y in zip(found, expected, strict=True):
        of_sequences = x if x is found[3] else x[before:total]
        torch.testing.assert_close(of_sequences.double(), y, rtol=0, atol=0.01 * y.abs().max().item())
        assert x.count_nonzero() == of_sequences.count_nonzero()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_bound_of_the_length_costs_nothing(architecture: int, head_dim: int, kernels: Kernels) -> None:
    """max_seqlen may be a bound, such as the number of all rows, which compiled nested tensors pass."""
    offsets = torch.arange(0, 641, 10).int()
    query = torch.randn(640, 1, head_dim).half().requires_grad_()

    def blocks(longest: int) -> int:
        with kernels.running(architecture):
            out = fused_attn.fused_attention_varlen(
                query, query, query, offsets, offsets, longest, longest, is_causal=True, backend="cuda"
            )
            before = kernels.statistics.blocks
            out.sum().backward()
            return kernels.statistics.blocks - before

    # Kernels with a program for each row block of `batch` times the longest would have millions.
    assert blocks(10**6) < 10_000


def test_workspace_follows_the_rows_of_all_sequences(kernels: Kernels) -> None:
    """It was 2.7 GB here: room for as many blocks of keys as 1024 sequences of 262144 keys have."""
    problem = AttentionProblem(
        batch=1024, num_heads=16, num_kv_heads=16, seqlen_q=262144, seqlen_k=262144, head_dim=64, value_dim=64,
        dtype=torch.bfloat16, device=torch.device("cpu"), scale=0.125, band=Band(), is_packed=True,
    )  # fmt: skip
    wanted = Wanted(key=True, value=True)
    with kernels.running(90):
        size = cuda_workspace.workspace_bytes(
            problem, 262144, 262144, 0, 0, cuda_splits.UNDIVIDED, cuda_splits.UNDIVIDED_GRADIENTS, wanted, None
        )
    row_statistics = 2 * 4 * 16 * (262144 + 1024 * 128)
    assert size - row_statistics < 16 * 2**20
