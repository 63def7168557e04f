"""Rows of packed tensors that belong to no sequence: the preparation kernel clears them alone (unowned_rows.h)."""

from __future__ import annotations

import cases
import pytest
import torch
from kernels import Kernels, running_both_kinds

import fused_attn
from fused_attn.attention import checks

#: Lengths of the sequences (queries, keys).
SEQUENCES = {
    "large": ((70, 0, 5), (40, 3, 33)),
    "without-keys": ((70, 30, 5, 0, 1), (140, 0, 3, 0, 0)),
    "without-queries": ((0, 0, 70, 0), (40, 0, 150, 3)),
    "decode": ((1, 0, 3, 1), (40, 3, 33, 270)),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", SEQUENCES)
def test_are_clear(name: str, head_dim: int, architecture: int, kernels: Kernels) -> None:
    lengths_q, lengths_k = SEQUENCES[name]
    with kernels.running(architecture):
        cases.check_strays(torch.bfloat16, "cuda", lengths_q=lengths_q, lengths_k=lengths_k, head_dim=head_dim)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("options", [{}, {"needs_max": True}], ids=["", "max"])
def test_are_clear_after_both_kinds_of_kernels(options: dict, architecture: int, kernels: Kernels) -> None:
    both = running_both_kinds() if not options else kernels.running(architecture)
    with kernels.running(architecture), both:
        cases.check_strays(torch.float16, "cuda", lengths_q=(70, 0, 2, 1), lengths_k=(40, 3, 33, 5), **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
def test_more_rows_than_the_warps_look_at_in_one_pass(
    architecture: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 blocks of threads look at 65536 rows in a pass."""
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *args: None)
    begin, total = 65_500, 65_700
    offsets = torch.tensor([begin, begin + 100, begin + 103]).int()
    rows = torch.randn(3, total, 1, 64, dtype=torch.float16)
    with kernels.running(architecture):
        out, lse = fused_attn.fused_attention_varlen(*rows, offsets, offsets, 100, 100, return_lse=True, backend="cuda")
        own = offsets - begin
        expected, expected_lse = fused_attn.fused_attention_varlen(
            *rows[:, begin : begin + 103], own, own, 100, 100, return_lse=True, backend="cuda"
        )
    stray = torch.ones(total, dtype=torch.bool)
    stray[begin : begin + 103] = False
    assert (out[stray] == 0).all() and (lse[:, stray] == -torch.inf).all()
    torch.testing.assert_close(out[~stray], expected)
    torch.testing.assert_close(lse[:, ~stray], expected_lse)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
def test_rows_behind_the_longest_length_belong_to_no_sequence(
    architecture: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on a GPU are not checked, so offsets may name longer sequences than max_seqlen."""
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *args: None)
    offsets = torch.tensor([0, 50, 90]).int()
    leaves = [torch.randn(90, 2, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    with kernels.running(architecture):
        out = fused_attn.fused_attention_varlen(*leaves, offsets, offsets, 40, 40, backend="cuda")
        gradients = torch.autograd.grad(out.sum(), leaves)
    for x in (out, *gradients):
        assert (x[40:50] == 0).all()
        assert x[:40].isfinite().all() and x[50:].isfinite().all()
    assert out[39].count_nonzero() and out[50].count_nonzero()


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all tensors that have been filled."""
    shapes = []

    def recording(fill):
        def recorded(x: torch.Tensor, *args) -> torch.Tensor:
            shapes.append(x.shape)
            return fill(x, *args)

        return recorded

    for name in ("fill_", "zero_"):
        monkeypatch.setattr(torch.Tensor, name, recording(getattr(torch.Tensor, name)))
    return shapes


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("lengths", [(300, 40), (3, 1)], ids=["large", "decode"])
def test_no_tensor_is_filled(
    lengths: tuple[int, int], architecture: int, kernels: Kernels, fills: list[torch.Size]
) -> None:
    offsets = torch.tensor([0, lengths[0], sum(lengths)]).int()
    leaves = [torch.randn(sum(lengths), 2, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    with kernels.running(architecture):
        out = fused_attn.fused_attention_varlen(*leaves, offsets, offsets, *[max(lengths)] * 2, backend="cuda")
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not fills


@pytest.mark.parametrize("architecture", [80, 90])
def test_no_tensor_is_filled_for_lengths(architecture: int, kernels: Kernels, fills: list[torch.Size]) -> None:
    lengths = torch.tensor([100, 200]).int()
    leaves = [torch.randn(2, 2, 200, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    with kernels.running(architecture):
        out = fused_attn.fused_attention(*leaves, key_lengths=lengths, backend="cuda")
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not fills


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_behind_the_length_of_their_batch_entry(head_dim: int, architecture: int, kernels: Kernels) -> None:
    lengths = torch.tensor([0, 300, 131, -5, 999, 1]).int()
    shapes = ((6, 4, 20, head_dim), *[(6, 2, 300, head_dim)] * 2)
    leaves = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with kernels.running(architecture):
        out = fused_attn.fused_attention(*leaves, key_lengths=lengths, enable_gqa=True, backend="cuda")
        _, dkey, dvalue = torch.autograd.grad(out, leaves, torch.randn_like(out))
    for entry, length in enumerate(lengths.clamp(0, 300).tolist()):
        for x in (dkey, dvalue):
            assert (x[entry, :, length:] == 0).all()
            assert (x[entry, :, :length] != 0).any(-1).all()
