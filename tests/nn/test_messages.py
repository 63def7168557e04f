"""Modules refuse wrong arguments with a message that names the argument, what was expected, and what was passed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import FusedMultiheadAttention, Seq2SeqTransformer, Transformer, TransformerDecoder, TransformerEncoder

pytestmark = pytest.mark.quick

X, Y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
IS_PADDING = torch.zeros(2, 5, dtype=torch.bool)

ATTENTION = {"embed_dim": 16, "num_heads": 2}
LAYER = {"d_model": 16, "nhead": 2}
SEQ2SEQ = {"src_vocab_size": 20, "tgt_vocab_size": 20} | LAYER
LAYERS = (fused_attn.TransformerEncoderLayer, fused_attn.TransformerDecoderLayer, Transformer, Seq2SeqTransformer)


def arguments_of(module: type) -> dict:
    return ATTENTION if module is FusedMultiheadAttention else SEQ2SEQ if module is Seq2SeqTransformer else LAYER


@pytest.mark.parametrize("module", [FusedMultiheadAttention, *LAYERS])
@pytest.mark.parametrize(
    ("dropout", "exception", "message"),
    [
        (1.5, ValueError, r"dropout: expected a probability in \[0, 1\], got 1\.5"),
        (-0.1, ValueError, r"dropout: expected a probability in \[0, 1\], got -0\.1"),
        (float("nan"), ValueError, r"dropout: expected a probability in \[0, 1\], got nan"),
        ("0.1", TypeError, r"dropout: expected a number, got str '0\.1'"),
    ],
)
def test_dropout_is_checked_by_the_constructor(module, dropout, exception, message) -> None:
    with pytest.raises(exception, match=message):
        module(**arguments_of(module) | {"dropout": dropout})


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim: expected at least 1, got 0"),
        ({"embed_dim": -16}, ValueError, "embed_dim: expected at least 1, got -16"),
        ({"num_heads": -2}, ValueError, "num_heads: expected at least 1, got -2"),
        ({"num_heads": 2.0}, TypeError, r"num_heads: expected an int, got float 2\.0"),
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of embed_dim=16, got 3"),
        ({"num_heads": 3}, AssertionError, "num_heads: expected a divisor"),  # the exception of torch.nn
        ({"kdim": -1}, ValueError, "kdim: expected at least 0, got -1"),
        ({"vdim": 8.0}, TypeError, "vdim: expected an int, got float"),
    ],
)
def test_sizes_of_attention(change, exception, message) -> None:
    with pytest.raises(exception, match=message):
        FusedMultiheadAttention(**ATTENTION | change)


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model: expected at least 1, got 0"),
        ({"nhead": 0}, ValueError, "nhead: expected at least 1, got 0"),
        ({"nhead": 3}, ValueError, "nhead: expected a divisor of d_model=16, got 3"),
        ({"nhead": 3}, AssertionError, "nhead: expected a divisor"),
        ({"dim_feedforward": -1}, ValueError, "dim_feedforward: expected at least 0, got -1"),
        ({"dim_feedforward": 8.0}, TypeError, "dim_feedforward: expected an int, got float"),
    ],
)
def test_sizes_of_layers(module, change, exception, message) -> None:
    with pytest.raises(exception, match=message):
        module(**arguments_of(module) | change)


def test_other_arguments_of_layers_and_stacks() -> None:
    encoder_layer, decoder_layer = (
        fused_attn.TransformerEncoderLayer(**LAYER),
        fused_attn.TransformerDecoderLayer(**LAYER),
    )
    with pytest.raises(ValueError, match=r"layer_norm_eps: expected a number >= 0, got -1\.0"):
        fused_attn.TransformerEncoderLayer(**LAYER, layer_norm_eps=-1.0)
    for stack, layer in ((TransformerEncoder, encoder_layer), (TransformerDecoder, decoder_layer)):
        with pytest.raises(ValueError, match="num_layers: expected at least 0, got -1"):
            stack(layer, -1)
    for name in ("num_encoder_layers", "num_decoder_layers"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
            Transformer(**LAYER, **{name: -1})


def test_a_dropout_that_torch_let_pass_is_found_when_converted() -> None:
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\], got 1\.5"):
        fused_attn.convert_attention(nn.MultiheadAttention(16, 2, dropout=1.5))


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 8}, {"num_kv_heads": 1}])
def test_inputs_that_the_projections_do_not_take(options) -> None:
    """The message is the same without gradients, where small inputs take the native call."""
    module = FusedMultiheadAttention(16, 2, batch_first=True, **options)
    memory = Y[..., : module.kdim]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for name, inputs, message in (
                (
                    "query",
                    (X.bfloat16(), memory, memory),
                    r"the dtype of the module, torch\.float32.*, got torch\.bfloat16",
                ),
                ("query", (X.int(), memory, memory), r"the dtype of the module, torch\.float32.*, got torch\.int32"),
                ("key", (X, memory.half(), memory), r"the dtype of the module, torch\.float32.*, got torch\.float16"),
                ("value", (X, memory, memory.double()), r"the dtype of the module.*, got torch\.float64"),
                ("query", (X.to("meta"), memory, memory), r"the device of the module, cpu, got meta"),
                ("query", (X.to_sparse(), memory, memory), r"a dense tensor, got layout torch\.sparse_coo"),
                ("key", (X, *(memory[..., :4],) * 2), r"\d+ features, got shape \(2, 7, 4\)"),
            ):
                with pytest.raises(RuntimeError, match=f"^{name}: expected {message}"):
                    module(*inputs, need_weights=False)


def test_self_attention_in_another_dtype_than_the_module() -> None:
    module = FusedMultiheadAttention(16, 2, batch_first=True)
    nested = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    for x in (X, nested):
        x = x.bfloat16()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"^query: .*, got torch\.bfloat16"):
                module(x, x, x, need_weights=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FusedMultiheadAttention(16, 2)(X, Y, Y), "key: expected the batch size of query, 5, got 7"),
        (
            lambda: FusedMultiheadAttention(16, 2)(X, X, X, key_padding_mask=IS_PADDING),
            r"key_padding_mask: expected shape \(N, S\) = \(5, 2\), got \(2, 5\)",
        ),
        (
            lambda: FusedMultiheadAttention(16, 2)(X, X, X, attn_mask=torch.zeros(5, 5)),
            r"attn_mask: expected shape \(2, 2\), got \(5, 5\)",
        ),
        (lambda: Transformer(**LAYER)(X, Y), "tgt: expected the batch size of src, 5, got 7"),
        (
            lambda: TransformerEncoder(fused_attn.TransformerEncoderLayer(**LAYER), 1)(
                X, src_key_padding_mask=IS_PADDING
            ),
            r"key_padding_mask: expected shape \(N, S\) = \(5, 2\), got \(2, 5\)",
        ),
        (
            lambda: fused_attn.TransformerDecoderLayer(**LAYER)(X, Y),
            "key: expected the batch size of query, 5, got 7",
        ),
        (
            lambda: TransformerDecoder(fused_attn.TransformerDecoderLayer(**LAYER), 1)(
                X, Y, cache=fused_attn.KVCache(1)
            ),
            "memory: expected the batch size of tgt, 5, got 7",
        ),
    ],
)
def test_a_forgotten_batch_first(call, message) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=rf"{message}; batch_first=False means inputs \(L, N, E\)"):
        call()
