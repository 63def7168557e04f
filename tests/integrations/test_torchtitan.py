"""The attention for torchtitan: packed documents, and an out_transform that gets a differentiable lse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_attn import fused_attention
from fused_attn.integrations.torchtitan import VarlenAttention

LENGTHS = (4, 1, 7)


def metadata() -> SimpleNamespace:
    offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return SimpleNamespace(cu_seq_q=offsets, cu_seq_k=offsets, max_q=max(LENGTHS), max_k=max(LENGTHS))


def sinks_outside(sinks: torch.Tensor):
    """torchtitan applies sinks to the results: out (T, N, H) and lse (T, N)."""
    return lambda out, lse: out * torch.sigmoid(lse - sinks).unsqueeze(-1)


@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (-1, -1)], ids=str)
def test_documents_with_sinks_by_out_transform(window, generator: torch.Generator) -> None:
    attention = VarlenAttention.Config(window_size=window).build()
    shapes = [(sum(LENGTHS), 4, 16), (sum(LENGTHS), 2, 16), (sum(LENGTHS), 2, 16), (4,)]
    leaves = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    query, key, value, sinks = leaves
    out = attention(query, key, value, attention_masks=metadata(), enable_gqa=True, out_transform=sinks_outside(sinks))
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    expected = torch.cat(
        [
            fused_attention(*(x.transpose(0, 1)[None] for x in part), sinks=sinks, window_size=window, enable_gqa=True)[
                0
            ].transpose(0, 1)
            for part in parts
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(out.cos().sum(), leaves), torch.autograd.grad(expected.cos().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_checkpoint_and_compile_without_graph_breaks(generator: torch.Generator) -> None:
    attention = VarlenAttention()
    x = torch.randn(sum(LENGTHS), 2, 16, generator=generator).requires_grad_()
    masks = metadata()

    def step(x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, attention_masks=masks)

    expected = torch.autograd.grad(step(x).cos().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.cos().sum(), x)[0], expected)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(compiled.cos().sum(), x)[0], expected)


def test_other_masks_are_refused() -> None:
    x = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"attention_masks: expected an object with cu_seq_q, .*, got dict"):
        VarlenAttention()(x, x, x, attention_masks={})
