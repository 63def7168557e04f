"""Modules refuse wrong arguments with a message that names the argument, what was expected, and what was passed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import FusedMultiheadAttention, Seq2SeqTransformer, Transformer, TransformerDecoder, TransformerEncoder
from fused_attn.nn import RotaryEmbedding, T5RelativeBias
from fused_attn.nn.cache import LayerCache
from fused_attn.nn.self_attention_cache import SelfAttentionCache

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


def test_a_bias_of_other_heads_is_found_by_the_constructor() -> None:
    message = "relative_bias: expected a T5RelativeBias with num_heads=2, got one with num_heads=8"
    with pytest.raises(ValueError, match=message):  # the first argument of T5RelativeBias is num_buckets
        FusedMultiheadAttention(16, 2, relative_bias=T5RelativeBias(4))


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
        ({"activation": "swish"}, ValueError, "activation: expected 'relu', 'gelu' or a callable, got 'swish'"),
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
    for stack, name, layer, padding in (
        (TransformerEncoder, "encoder_layer", nn.Linear(3, 3), "src_key_padding_mask, got .*Linear"),
        (TransformerDecoder, "decoder_layer", encoder_layer, "memory_key_padding_mask, got .*EncoderLayer"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a module whose forward takes {padding}"):
            stack(layer, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": torch.zeros(2, 7, 8)}, r"memory: expected 16 features, got shape \(2, 7, 8\)"),
        ({"memory": torch.zeros(3, 7, 16)}, "memory: expected the batch size of tgt, 2, got 3"),
        ({"memory_mask": torch.zeros(5, 6)}, r"memory_mask: expected shape \(5, 7\) or"),
        ({"memory_key_padding_mask": torch.zeros(2, 6)}, r"memory_key_padding_mask: expected shape \(2, 7\), got"),
    ],
)
def test_errors_of_a_decoder_layer_name_its_arguments(options, message) -> None:
    layer = fused_attn.TransformerDecoderLayer(**LAYER, batch_first=True)
    with pytest.raises((RuntimeError, AssertionError), match=f"^{message}"):
        layer(**{"tgt": torch.zeros(2, 5, 16), "memory": torch.zeros(2, 7, 16)} | options)


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "message"),
    [
        ((8, math.inf), {}, ValueError, "base: expected a positive, finite number, got inf"),
        ((8,), {"x": torch.zeros(3, 8, dtype=torch.int64)}, ValueError, "x: expected a floating-point tensor"),
        ((8,), {"x": torch.zeros(3, 8), "seq_dim": 7}, ValueError, "seq_dim: expected a dimension of x before the"),
        ((8,), {"x": torch.zeros(3, 8), "seq_dim": -1}, ValueError, "seq_dim: expected a dimension of x before the"),
    ],
)
def test_errors_of_rotary_embeddings(arguments, options, exception, message) -> None:
    with pytest.raises(exception, match=message):
        RotaryEmbedding(*arguments)(**options)


def test_a_given_cache_has_a_length_of_its_own() -> None:
    with pytest.raises(ValueError, match="max_length: expected None beside self_attention"):
        LayerCache(4, self_attention=SelfAttentionCache(8))


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
                (
                    "query",
                    (X.int(), memory, memory),
                    r".*torch\.float32, as embeddings or features have, got torch\.int32",
                ),
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
    ("of_module", "of_input", "kept"),
    [("float64", "float32", "float64"), ("float32", "float64", "float64"), ("float32", "int32", "int32")],
)
def test_inputs_that_autocast_does_not_cast(of_module, of_input, kept) -> None:
    module = FusedMultiheadAttention(16, 2, batch_first=True, dtype=getattr(torch, of_module))
    x = X.to(getattr(torch, of_input))
    message = (
        rf"the dtype of the module, torch\.{of_module}, since autocast casts no torch\.{kept}, got torch\.{of_input}"
    )
    for name, inputs in (("query", (x, x, x)), ("value", (X.to(module.out_proj.weight.dtype),) * 2 + (x,))):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=f"^{name}: .*{message}"):
            module(*inputs, need_weights=False)


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
            r"attn_mask: expected shape \(L, S\) = \(2, 2\), got \(5, 5\)",
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
            "memory: expected the batch size of tgt, 5, got 7",
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


#: The flags of each module.
FLAGS = {
    FusedMultiheadAttention: ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "skip_padded_queries"),
    fused_attn.TransformerEncoderLayer: ("batch_first", "norm_first", "bias"),
    fused_attn.TransformerDecoderLayer: ("batch_first", "norm_first", "bias"),
    Transformer: ("batch_first", "norm_first", "bias"),
    Seq2SeqTransformer: ("norm_first", "share_embeddings", "tie_generator", "skip_padded_queries"),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in FLAGS.items() for name in names])
def test_flags_of_constructors_are_bools(module, name) -> None:
    for value, described in (("no", "str 'no'"), (1, "int 1"), (None, "NoneType None")):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got {described}"):
            module(**arguments_of(module) | {name: value})
    if module is not Transformer:  # six layers take long
        few = {"num_encoder_layers": 1, "num_decoder_layers": 1} if module is Seq2SeqTransformer else {}
        module(**arguments_of(module) | few | {name: np.bool_(True)})


#: The ints of each module.
SIZES = {
    FusedMultiheadAttention: ("embed_dim", "num_heads", "kdim", "vdim", "num_kv_heads"),
    fused_attn.TransformerEncoderLayer: ("d_model", "nhead", "dim_feedforward"),
    fused_attn.TransformerDecoderLayer: ("d_model", "nhead", "dim_feedforward"),
    Transformer: ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward"),
    Seq2SeqTransformer: (
        *("src_vocab_size", "tgt_vocab_size", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers"),
        *("dim_feedforward", "max_len", "pad_id", "sos_id", "eos_id", "num_kv_heads"),
    ),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SIZES.items() for name in names])
def test_sizes_of_constructors_are_ints(module, name) -> None:
    for value, described in (("a", "str 'a'"), (2.5, r"float 2\.5"), (True, "bool True")):
        with pytest.raises(TypeError, match=f"^{name}: expected .*an int, got {described}"):
            module(**arguments_of(module) | {name: value})


def test_sizes_may_be_ints_of_numpy() -> None:
    module = FusedMultiheadAttention(np.int64(16), np.int64(2), num_kv_heads=np.int64(1), batch_first=np.bool_(True))
    assert module(X, X, X)[0].shape == X.shape


OPTIONS = {
    "rotary-str": (lambda: FusedMultiheadAttention(16, 2, rotary="a"), TypeError, "rotary: expected None, a bool or"),
    "rotary-list": (lambda: FusedMultiheadAttention(16, 2, rotary=[]), TypeError, "rotary: expected .*, got list"),
    "rotary-zero": (lambda: FusedMultiheadAttention(16, 2, rotary=0.0), ValueError, "rotary: expected .*, got 0.0"),
    "rotary-nan": (
        lambda: FusedMultiheadAttention(16, 2, rotary=float("nan")),
        ValueError,
        "rotary: expected .*, got nan",
    ),
    "rotary-odd": (
        lambda: FusedMultiheadAttention(6, 2, rotary=True),
        ValueError,
        "rotary: expected None with head_dim=3, .* got True",
    ),
    "head-dim": (lambda: fused_attn.nn.RotaryEmbedding("a"), TypeError, "head_dim: expected an int, got str 'a'"),
    "base": (lambda: fused_attn.nn.RotaryEmbedding(4, "x"), TypeError, "base: expected a number, got str 'x'"),
    "rotated": (lambda: fused_attn.nn.RotaryEmbedding(4)([1]), TypeError, "x: expected a tensor, got list"),
    "buckets": (lambda: fused_attn.nn.T5RelativeBias("a"), TypeError, "num_buckets: expected an int, got str 'a'"),
    "bias-heads": (lambda: fused_attn.nn.T5RelativeBias(8, True), TypeError, "num_heads: expected an int, got bool"),
    "bidirectional": (
        lambda: fused_attn.nn.T5RelativeBias(8, 2, bidirectional="x"),
        TypeError,
        "bidirectional: expected a bool, got str 'x'",
    ),
    "distance": (
        lambda: fused_attn.nn.T5RelativeBias(8, 2, max_distance="x"),
        TypeError,
        "max_distance: expected an int, got str 'x'",
    ),
    "t5-length": (
        lambda: fused_attn.t5_relative_bias(torch.zeros(32, 2), "a", 3),
        TypeError,
        "seqlen_q: expected an int, got str 'a'",
    ),
    "alibi-length": (
        lambda: fused_attn.alibi_bias(torch.zeros(2), 3, 2.5),
        TypeError,
        r"seqlen_k: expected an int, got float 2\.5",
    ),
    "encoder-layer": (
        lambda: TransformerEncoder(3, 1),
        TypeError,
        r"encoder_layer: expected a torch\.nn\.Module, got int 3",
    ),
    "decoder-layer": (lambda: TransformerDecoder(None, 1), TypeError, r"decoder_layer: expected .*, got NoneType"),
    "num-layers": (
        lambda: TransformerEncoder(fused_attn.TransformerEncoderLayer(16, 2), True),
        TypeError,
        "num_layers: expected an int, got bool True",
    ),
    "norm": (
        lambda: TransformerEncoder(fused_attn.TransformerEncoderLayer(16, 2), 1, "layer"),
        TypeError,
        r"norm: expected None or a torch\.nn\.Module, got str 'layer'",
    ),
    "custom-encoder": (
        lambda: Transformer(16, 2, custom_encoder=3),
        TypeError,
        r"custom_encoder: expected None or a torch\.nn\.Module, got int 3",
    ),
    "nested": (
        lambda: TransformerEncoder(fused_attn.TransformerEncoderLayer(16, 2), 1, enable_nested_tensor="no"),
        TypeError,
        "enable_nested_tensor: expected a bool, got str 'no'",
    ),
    "epsilon": (
        lambda: fused_attn.TransformerEncoderLayer(16, 2, layer_norm_eps="x"),
        TypeError,
        "layer_norm_eps: expected a number, got str 'x'",
    ),
    "activation": (
        lambda: fused_attn.TransformerEncoderLayer(16, 2, activation=3),
        TypeError,
        "activation: expected a name or a callable, got int 3",
    ),
    "max-len": (lambda: Seq2SeqTransformer(**SEQ2SEQ, max_len=0), ValueError, "max_len: expected at least 1, got 0"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_wrong_types_are_told(name) -> None:
    function, exception, message = OPTIONS[name]
    with pytest.raises(exception, match=f"^{message}"):
        function()


def called(module, *inputs):
    return lambda **options: module(*inputs, **options)


def modules_and_arguments():
    """For each module: a call of it, its masks, and its flags in forward."""
    encoder_layer = fused_attn.TransformerEncoderLayer(**LAYER, batch_first=True)
    decoder_layer = fused_attn.TransformerDecoderLayer(**LAYER, batch_first=True)
    few = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    of_tgt = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    transformer = Transformer(**LAYER, **few, batch_first=True)
    return {
        "attention": (
            called(FusedMultiheadAttention(16, 2, batch_first=True), X, X, X),
            ("attn_mask", "key_padding_mask"),
            ("need_weights", "average_attn_weights", "is_causal"),
        ),
        "encoder-layer": (called(encoder_layer, X), ("src_mask", "src_key_padding_mask"), ("is_causal",)),
        "encoder": (
            called(TransformerEncoder(encoder_layer, 1), X),
            ("mask", "src_key_padding_mask"),
            ("is_causal",),
        ),
        "decoder-layer": (called(decoder_layer, X, Y), of_tgt, ("tgt_is_causal", "memory_is_causal")),
        "decoder": (
            called(TransformerDecoder(decoder_layer, 1), X, Y),
            of_tgt,
            ("tgt_is_causal", "memory_is_causal"),
        ),
        "transformer": (
            called(transformer, X, Y),
            ("src_mask", "src_key_padding_mask", *of_tgt),
            ("src_is_causal", "tgt_is_causal", "memory_is_causal"),
        ),
    }


@pytest.mark.parametrize("name", modules_and_arguments())
@pytest.mark.parametrize("has_gradients", [True, False])
def test_masks_and_flags_of_a_call_are_named(name, has_gradients) -> None:
    """Without gradients, small inputs take the native call."""
    function, masks, flags = modules_and_arguments()[name]
    with torch.set_grad_enabled(has_gradients):
        function()
        for mask in masks:
            with pytest.raises(TypeError, match=f"^{mask}: expected a tensor, got list"):
                function(**{mask: [1]})
        for flag in flags:
            for value, described in (("no", "str 'no'"), (0, "int 0")):
                with pytest.raises(TypeError, match=f"^{flag}: expected a bool, got {described}"):
                    function(**{flag: value})


def test_inputs_that_are_no_tensors_are_named() -> None:
    encoder_layer = fused_attn.TransformerEncoderLayer(**LAYER, batch_first=True)
    decoder_layer = fused_attn.TransformerDecoderLayer(**LAYER, batch_first=True)
    decoder = TransformerDecoder(decoder_layer, 1)
    seq2seq = Seq2SeqTransformer(**SEQ2SEQ, num_encoder_layers=1, num_decoder_layers=1)
    tokens = torch.ones(2, 3, dtype=torch.int64)
    memory = torch.zeros(2, 3, 16)
    for name, function in (
        ("src", lambda: encoder_layer([1])),
        ("src", lambda: TransformerEncoder(encoder_layer, 1)([1])),
        ("tgt", lambda: decoder_layer([1], X)),
        ("memory", lambda: decoder_layer(X, [1])),
        ("tgt", lambda: decoder([1], X)),
        ("memory", lambda: decoder(X, [1])),
        ("src", lambda: Transformer(16, 2, 1, 1)([1], X)),
        ("tgt", lambda: Transformer(16, 2, 1, 1)(X, [1])),
        ("src", lambda: seq2seq([[3]], tokens)),
        ("tgt", lambda: seq2seq(tokens, [[3]])),
        ("src", lambda: seq2seq.encode([[3]])),
        ("memory", lambda: seq2seq.decode(tokens, [1])),
        ("memory_key_padding_mask", lambda: seq2seq.decode(tokens, memory, [1])),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
            function()
    with pytest.raises(TypeError, match=r"^cache: expected a KVCache, got int"):
        seq2seq.decode(tokens, memory, cache=3)


GENERATE = {
    "do_sample": ("no", TypeError, "a bool, got str 'no'"),
    "return_scores": ("a", TypeError, "a bool, got str 'a'"),
    "progress": (3, TypeError, "a bool, got int 3"),
    "cuda_graph": ("x", TypeError, "a bool, got str 'x'"),
    "generator": (3, TypeError, r"None or a torch\.Generator, got int 3"),
    "on_tokens": (3, TypeError, "None or a callable, got int 3"),
    "logits_processor": (3, TypeError, "None or a callable, got int 3"),
    "prefix": ([1], TypeError, "a tensor, got list"),
    "min_new_tokens": (1.0, TypeError, r"an int, got float 1\.0"),
    "max_new_tokens": (True, TypeError, "an int, got bool True"),
    "num_beams": (True, TypeError, "an int, got bool True"),
    "num_return_sequences": ("a", TypeError, "an int, got str 'a'"),
    "top_k": (True, TypeError, "an int, got bool True"),
    "top_p": ("x", TypeError, "a number, got str 'x'"),
    "temperature": ("x", TypeError, "a number, got str 'x'"),
    "repetition_penalty": ("a", TypeError, "a number, got str 'a'"),
    "length_penalty": ("x", TypeError, "a number, got str 'x'"),
    "stop_ids": (2.5, TypeError, r"an int or a sequence of ints, got float 2\.5"),
}
SAME_NAME = {
    "length_penalty": (0.5, ValueError, r"1\.0 without beams \(num_beams=1\), got 0\.5"),
    "stop_ids": ("ab", TypeError, "an int or a sequence of ints, got str 'ab'"),
    "src": ([[3]], TypeError, "a tensor, got list"),
}


@pytest.mark.parametrize(("name", "case"), [*GENERATE.items(), *SAME_NAME.items()])
def test_arguments_of_generate_are_named(name, case) -> None:
    value, exception, message = case
    model = Seq2SeqTransformer(**SEQ2SEQ, num_encoder_layers=1, num_decoder_layers=1)
    arguments = {"src": torch.full((2, 3), 5), "max_new_tokens": 2} | {name: value}
    with pytest.raises(exception, match=f"^{name}: expected {message}"):
        model.generate(**arguments)


def test_generate_takes_numbers_of_numpy() -> None:
    model = Seq2SeqTransformer(**SEQ2SEQ, num_encoder_layers=1, num_decoder_layers=1)
    src = torch.full((2, 3), 5)
    plain = model.generate(src, 3, num_beams=2, stop_ids=7, length_penalty=0.5)
    numbers = {"num_beams": np.int64(2), "stop_ids": np.int64(7), "length_penalty": np.float32(0.5)}
    assert torch.equal(model.generate(src, np.int64(3), **numbers), plain)


ROWS = torch.zeros(1, 2, 3, 4)
CACHES = {
    "layers": (lambda: fused_attn.KVCache(True), TypeError, "num_layers: expected an int, got bool True"),
    "length": (lambda: fused_attn.KVCache(1, "a"), TypeError, "max_length: expected an int, got str 'a'"),
    "crop": (lambda: fused_attn.KVCache(1).crop(True), TypeError, "length: expected an int, got bool"),
    "window": (lambda: fused_attn.nn.SlidingKVCache(1, True), TypeError, "window: expected an int, got bool True"),
    "include": (
        lambda: fused_attn.KVCache(1).reorder(torch.tensor([0]), include_cross_attention="no"),
        TypeError,
        "include_cross_attention: expected a bool, got str 'no'",
    ),
    "part": (lambda: fused_attn.nn.LayerCache(self_attention=3), TypeError, "self_attention: expected .*, got int 3"),
    "key": (lambda: fused_attn.nn.SelfAttentionCache().append([1], ROWS), TypeError, "key: expected a tensor, got"),
    "value": (lambda: fused_attn.nn.SelfAttentionCache().update(ROWS, [1]), TypeError, "value: expected a tensor"),
    "memory-key": (lambda: fused_attn.nn.CrossAttentionCache().update([1], ROWS), TypeError, "key: expected a tensor"),
    "indices": (
        lambda: fused_attn.nn.SelfAttentionCache().reorder([0]),
        TypeError,
        r"indices: expected a tensor of shape \(B,\), got list",
    ),
    "static-indices": (
        lambda: fused_attn.nn.StaticSelfAttentionCache(4).reorder([0]),
        TypeError,
        r"indices: expected a tensor of shape \(B,\), got list",
    ),
    "sequences": (
        lambda: fused_attn.PagedKVCache(4, 4, 2, 4).append(3, ROWS, ROWS),
        TypeError,
        "sequences: expected a list of ints, got 3",
    ),
    "table": (
        lambda: fused_attn.PagedKVCache(4, 4, 2, 4).table(3),
        TypeError,
        "sequences: expected a list of ints, got 3",
    ),
    "sequence": (
        lambda: fused_attn.PagedKVCache(4, 4, 2, 4).length([0]),
        TypeError,
        "sequence: expected an int, got list",
    ),
    "paged-indices": (
        lambda: fused_attn.PagedKVCache(4, 4, 2, 4).reorder([], 3),
        TypeError,
        "indices: expected a list of ints, got int 3",
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_arguments_of_caches_are_named(name) -> None:
    function, exception, message = CACHES[name]
    with pytest.raises(exception, match=f"^{message}"):
        function()


@pytest.mark.parametrize("rows", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize("cache", [fused_attn.nn.SelfAttentionCache, lambda: fused_attn.nn.StaticSelfAttentionCache(8)])
@pytest.mark.parametrize(
    ("wrong", "exception", "message"),
    [
        (lambda bias: bias[:1], ValueError, r"expected shape .*, got shape \(1, "),
        (lambda bias: torch.nn.functional.pad(bias, (0, 2)), ValueError, r"expected shape .*, got shape \(2, "),
        (lambda bias: bias.long(), TypeError, "expected a floating-point"),
        (lambda bias: 0, TypeError, "expected a torch.Tensor, got int 0"),
    ],
    ids=["heads", "columns", "dtype", "number"],
)
def test_a_relative_bias_that_does_not_fit_is_told(rows, cache, wrong, exception, message) -> None:
    """With rows in the cache, the bias is cut to the columns of the call, which would hide a wrong number of them."""
    bias = [lambda bias: bias]

    def relative_bias(seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return bias[0](torch.zeros(2, seqlen_q + seqlen_k - 1))

    module = FusedMultiheadAttention(4, 2, batch_first=True, relative_bias=relative_bias)
    kept, x = cache(), torch.zeros(1, 2, 4)
    with torch.no_grad():
        if rows:
            module(x, x, x, need_weights=False, cache=kept)
        bias[0] = wrong
        with pytest.raises(exception, match=f"^relative_bias: {message}"):
            module(x, x, x, need_weights=False, cache=kept)


def test_rows_of_pages_are_tensors() -> None:
    cache = fused_attn.PagedKVCache(4, 4, 2, 4)
    sequence = cache.add()
    with pytest.raises(TypeError, match=r"^key: expected a tensor, got list"):
        cache.append([sequence], [1], ROWS)
    with pytest.raises(TypeError, match=r"^length: expected an int, got str 'a'"):
        cache.crop(sequence, "a")


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"add_bias_kv": True}, {"rotary": True}, {"dropout": 0.5}]
)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
def test_weights_of_meta_tensors_have_shapes(options, mask) -> None:
    module = FusedMultiheadAttention(16, 2, batch_first=True, device="meta", **options)
    x = X.to("meta")
    padding = None if mask is None else torch.zeros(2, 5, dtype=mask, device="meta")
    for is_averaged in (True, False):
        out, weights = module(x, x, x, key_padding_mask=padding, average_attn_weights=is_averaged)
        keys = 6 if "add_bias_kv" in options else 5
        assert out.is_meta
        assert out.shape == x.shape
        assert weights.shape == ((2, 5, keys) if is_averaged else (2, 2, 5, keys))


@pytest.mark.parametrize("name", ["mask", "tgt_mask of a decoder", "src_mask", "tgt_mask"])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_a_mask_of_integers_is_refused_by_a_stack_as_by_a_layer(name: str, is_causal: bool | None) -> None:
    x, mask = torch.randn(3, 1, 8), torch.ones(3, 3).triu(1).long()
    argument = name.split()[0]
    options = {argument: mask, argument.replace("mask", "is_causal"): is_causal}
    if name == "mask":
        model, inputs = TransformerEncoder(fused_attn.TransformerEncoderLayer(8, 2, 16), 2), (x,)
    elif name.endswith("decoder"):
        model, inputs = TransformerDecoder(fused_attn.TransformerDecoderLayer(8, 2, 16), 2), (x, x)
    else:
        model, inputs = Transformer(8, 2, 1, 1, 16), (x, x)
    with pytest.raises(AssertionError, match=rf"^{argument}: expected bool or floating point, got torch\.int64"):
        model(*inputs, **options)
