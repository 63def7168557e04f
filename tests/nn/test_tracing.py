"""In a graph of `torch.fx.symbolic_trace`, our modules are leaves, as torch's are, and our functions are nodes."""

from __future__ import annotations

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import fused_attn
from fused_attn import (
    FusedMultiheadAttention,
    Seq2SeqTransformer,
    alibi_bias,
    convert_attention,
    fused_attention,
    fused_attention_varlen,
    t5_relative_bias,
)
from fused_attn.nn import T5RelativeBias

pytestmark = pytest.mark.quick


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        return self.norm(x + self.attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0])


class Stacks(nn.Module):
    """A model with every layer and every stack of `torch.nn` that contains attention. `library` has the classes."""

    def __init__(self, library) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        self.encoder = library.TransformerEncoder(library.TransformerEncoderLayer(8, 2, 16, **options), 1)
        self.layer = library.TransformerEncoderLayer(8, 2, 16, **options)
        self.decoder = library.TransformerDecoder(library.TransformerDecoderLayer(8, 2, 16, **options), 1)
        self.decoder_layer = library.TransformerDecoderLayer(8, 2, 16, **options)
        self.transformer = library.Transformer(8, 2, 1, 1, 16, **options)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        memory = self.layer(self.encoder(x, src_key_padding_mask=ignored))
        y = self.decoder_layer(self.decoder(x, memory, memory_key_padding_mask=ignored), memory)
        return self.transformer(y, tgt=x, src_key_padding_mask=ignored)


def targets(graph: torch.fx.GraphModule, op: str) -> list:
    return [node.target for node in graph.graph.nodes if node.op == op]


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])


def test_a_converted_model() -> None:
    model = convert_attention(Block())
    graph = torch.fx.symbolic_trace(model)
    assert targets(graph, "call_module") == ["attention", "norm"]
    x, ignored = batch()
    assert torch.equal(graph(x, ignored), model(x, ignored)) and torch.equal(graph(x), model(x))
    assert torch.fx.symbolic_trace(graph).code == graph.code


def test_the_same_nodes_as_torch() -> None:
    model = Stacks(fused_attn)
    graph, theirs = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(Stacks(nn))
    assert targets(graph, "call_module") == targets(theirs, "call_module")
    x, ignored = batch()
    assert torch.equal(graph(x, ignored), model(x, ignored))


def test_tokens() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Seq2SeqTransformer(11, 12, 8, 2, 1, 1, 16, dropout=0.0)

        def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
            return self.model(src, tgt).log_softmax(-1)

    model = Logits()
    graph = torch.fx.symbolic_trace(model)
    src, tgt = torch.randint(3, 11, (2, 5)), torch.randint(3, 12, (2, 4))
    assert torch.equal(graph(src, tgt), model(src, tgt))


def test_a_subclass_is_traced_through_and_so_refused() -> None:
    """Its forward does more than ours. If our class made a leaf, the graph would run the additional work twice."""

    class Doubled(FusedMultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return 2 * super().forward(query, key, value, need_weights=False)[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Doubled(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)

    model = Model()
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)


def test_hooks_do_not_run_twice() -> None:
    model = convert_attention(Block())
    model.attention.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)


def test_functions() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.slopes = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.rand(2))

        def forward(self, query: Tensor, key: Tensor, ignored: Tensor) -> Tensor:
            sizes = query.shape[2], key.size(2)
            bias = t5_relative_bias(self.table, *sizes) + alibi_bias(self.slopes, *sizes)
            out, lse = fused_attention(
                query, key, key, is_causal=True, key_padding_mask=ignored, relative_bias=bias, return_lse=True
            )
            return out * lse.unsqueeze(-1)

    model = Biased()
    graph = torch.fx.symbolic_trace(model)
    assert {fused_attention, t5_relative_bias, alibi_bias} <= set(targets(graph, "call_function"))
    for length in (5, 8):
        args = torch.randn(2, 2, 5, 8), torch.randn(2, 2, length, 8), torch.zeros(2, length, dtype=torch.bool)
        assert torch.equal(graph(*args), model(*args))


def test_a_mask_alone_is_traced() -> None:
    x = torch.randn(1, 1, 4, 8)
    graph = torch.fx.symbolic_trace(lambda mask: fused_attention(x, x, x, mask))
    mask = torch.randn(4, 4)
    assert torch.equal(graph(mask), fused_attention(x, x, x, mask))


def test_packed_sequences() -> None:
    def function(rows: Tensor, offsets: Tensor) -> Tensor:
        return fused_attention_varlen(rows, rows, rows, offsets, offsets, 3, 3)

    graph = torch.fx.symbolic_trace(function)
    assert targets(graph, "call_function") == [fused_attention_varlen]
    rows, offsets = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(graph(rows, offsets), function(rows, offsets))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_traces_a_relative_bias() -> None:
    """The trace is for the lengths of its example. Others raise an error."""

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            bias = T5RelativeBias(num_heads=2)
            nn.init.normal_(bias.weight)
            self.attention = FusedMultiheadAttention(8, 2, batch_first=True, relative_bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    module, x = SelfAttention(), torch.randn(2, 5, 8)
    traced = torch.jit.trace(module, x)
    y = torch.randn(3, 5, 8)
    torch.testing.assert_close(traced(y), module(y))
    with pytest.raises(RuntimeError, match="relative_bias: expected shape"):
        traced(torch.randn(2, 7, 8))
