"""Offsets of packed sequences are not read before a kernel reads them. Wrong ones may cost rows, and nothing else."""

from __future__ import annotations

import pytest
import torch
from kernels import Kernels

import fused_attn
from fused_attn.attention import checks
from fused_attn.backends.cuda import hardware

#: Offsets of queries and keys, rows of queries and keys, and the lengths of the longest sequences.
OFFSETS = {
    "lengths-of-queries": ([0, 600, 130, 300], [0, 600, 730, 900], 600, 900, 600, 600),
    "lengths-of-keys": ([0, 300, 400, 500], [0, 1000, 500, 1500], 500, 1500, 300, 1000),
    "lengths": ([0, 300, 100, 100], [0, 1000, 500, 500], 500, 2000, 300, 1000),
    "queries-beyond": ([0, 300, 900], [0, 300, 400], 400, 400, 600, 300),
    "keys-beyond": ([0, 300, 400], [0, 300, 900], 400, 400, 300, 600),
    "negative": ([-100, 300, 400], [0, -300, 400], 400, 400, 300, 600),
    "extreme": ([0, 2**31 - 1, 400], [-(2**31), 300, 400], 400, 400, 300, 600),
    "longer-than-said": ([0, 130, 150], [0, 300, 310], 150, 310, 70, 140),
}


def gradients(case: str, device: str, head_dim: int) -> tuple[torch.Tensor, ...]:
    offsets_q, offsets_k, rows_q, rows_k, *longest = OFFSETS[case]
    leaves = [
        torch.randn(rows, 2, head_dim, dtype=torch.float16, device=device, requires_grad=True)
        for rows in (rows_q, rows_k, rows_k)
    ]
    offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in (offsets_q, offsets_k))
    out = fused_attn.fused_attention_varlen(*leaves, *offsets, *longest, backend="cuda")
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", OFFSETS)
def test_wrong_offsets(case: str, architecture: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation finds accesses outside of tensors and workspace, and blocks that wait for ever.

    Two sequences may write the same rows here, which would be a race.
    """
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *_: None)
    with kernels.running(architecture, seed=len(case), race_detection=False):
        results = gradients(case, "cpu", 64)
    assert [x.shape[0] for x in results] == [*OFFSETS[case][2:3] * 2, *OFFSETS[case][3:4] * 2]
    # Rows that a kernel leaves out are 0. On sm_80, sequences that overlap may read row statistics that nobody wrote.
    assert all(x.isfinite().all() for x in results[: 2 if architecture == 80 else 4])


def test_few_queries(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for decoding, whose sequences have few queries."""
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *_: None)
    query = torch.randn(4, 2, 64, dtype=torch.float16)
    key, value = (torch.randn(400, 2, 64, dtype=torch.float16) for _ in range(2))
    for offsets_q in ([0, 3, 1, 9], [0, -1, 2, 4], [2, 1, 0, 2]):
        offsets = (torch.tensor(x, dtype=torch.int32) for x in (offsets_q, [0, 300, 200, 900]))
        with kernels.running(80, race_detection=False):
            out = fused_attn.fused_attention_varlen(query, key, value, *offsets, 3, 300, backend="cuda")
        assert out.shape == query.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(hardware.module is None, reason="fused_attn._cuda has not been built")
@pytest.mark.parametrize("case", OFFSETS)
def test_wrong_offsets_on_a_gpu(case: str) -> None:
    """The next call is right: nothing hangs, and the process has lost nothing."""
    gradients(case, "cuda", 64)
    torch.cuda.synchronize()
    x = torch.randn(300, 2, 64, dtype=torch.float16, device="cuda")
    offsets = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    out, expected = (
        fused_attn.fused_attention_varlen(x, x, x, offsets, offsets, 200, 200, backend=backend)
        for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
