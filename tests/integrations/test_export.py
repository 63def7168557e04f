"""Exported programs without operators of this package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fused_attn import TransformerEncoder, TransformerEncoderLayer, fused_attention
from fused_attn.integrations.export import decompose


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = TransformerEncoder(TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        return self.encoder(x, is_causal=True, src_key_padding_mask=is_padding)


class Attention(nn.Module):
    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return fused_attention(x, x, x, relative_bias=bias, softcap=2.0, window_size=(3, 1), return_max=True)


def operators(program) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
def test_a_program_of_dynamic_shapes() -> None:
    model, x = Encoder().eval(), torch.randn(2, 6, 16)
    batch, length = Dim("batch"), Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    exported = torch.export.export(model, (x, torch.zeros(2, 6, dtype=torch.bool)), dynamic_shapes=shapes)
    program = decompose(exported)
    assert "fused_attn" in operators(exported) and "fused_attn" not in operators(program)
    for lengths in ([6, 4], [9, 2, 5]):
        is_padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        x = torch.randn(*is_padding.shape, 16)
        torch.testing.assert_close(program.module()(x, is_padding), model(x, is_padding))


def test_all_results_of_a_call() -> None:
    arguments = torch.randn(1, 2, 6, 8), torch.randn(2, 11)
    program = decompose(torch.export.export(Attention(), arguments))
    assert "fused_attn" not in operators(program)
    torch.testing.assert_close(program.module()(*arguments), Attention()(*arguments))


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"program: expected a torch\.export\.ExportedProgram, got Encoder"):
        decompose(Encoder())
