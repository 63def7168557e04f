"""`key_ranges` of attention, layers and stacks: the results of the same mask as a dense tensor."""

import copy
import re

import pytest
import torch
from parity import TIGHT, outcome
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fused_attn import (
    FusedMultiheadAttention,
    KVCache,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    convert_attention,
    key_ranges_of,
    key_ranges_of_segments,
)

BATCH, HEADS, LENGTH, WIDTH = 3, 4, 9, 16
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2], [0] * 9])  # (N, L)
IS_PADDING = torch.arange(LENGTH) >= torch.tensor([[9], [7], [4]])


def dense(ranges: Tensor) -> Tensor:
    """The attn_mask (N * H, L, S) of `FusedMultiheadAttention` that hides what the ranges hide."""
    key = torch.arange(LENGTH)
    visible = ((key >= ranges[..., :1]) & (key < ranges[..., 1:])).any(-2)
    if ranges.dim() == 4:
        visible = visible[:, None]
    return visible.expand(BATCH, HEADS, LENGTH, LENGTH).flatten(0, 1).logical_not()


KINDS = ("shared", "each entry", "each head", "heads of all entries", "one head of each entry")


def ranges_of(kind: str) -> Tensor:
    of_entries = key_ranges_of_segments(DOCUMENTS)  # (N, L, 1, 2)
    if kind == "shared":
        return of_entries[0]
    if kind == "each entry":
        return of_entries
    if kind == "each head":
        return key_ranges_of(torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5)
    if kind == "one head of each entry":
        return ranges_of("each head")[:, :1]
    assert kind == "heads of all entries"
    return ranges_of("each head")[:1]


def x(seed: int, batch_first: bool = True) -> Tensor:
    rows = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows if batch_first else rows.transpose(0, 1).contiguous()).requires_grad_()


def attention(**options) -> FusedMultiheadAttention:
    torch.manual_seed(0)
    return FusedMultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **{"batch_first": True, **options})


def assert_same(module: nn.Module, args: tuple, with_ranges: dict, with_masks: dict) -> None:
    """Asserts that outputs and gradients are the same. The seed is, too, so that the same weights are dropped."""
    results = []
    for arguments in (with_ranges, with_masks):
        torch.manual_seed(7)
        results.append(outcome(module, *args, **arguments))
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("options", (
    {}, {"batch_first": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"num_kv_heads": 2, "rotary": True},
    {"dropout": 0.5}, {"skip_padded_queries": True},
), ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", (
    {"need_weights": False}, {"need_weights": True}, {"need_weights": True, "average_attn_weights": False},
    {"need_weights": False, "key_padding_mask": IS_PADDING},
), ids=("output", "weights", "weights of heads", "padding"))  # fmt: skip
def test_attention(options, kind, call):
    module, ranges = attention(**options), ranges_of(kind)
    if options.get("skip_padded_queries") and kind.startswith(("each head", "heads")):
        call = {**call, "key_padding_mask": IS_PADDING}
    rows = x(1, options.get("batch_first", True))
    assert_same(module, (rows, rows, rows), {**call, "key_ranges": ranges}, {**call, "attn_mask": dense(ranges)})


def test_both_the_diagonal_and_the_ranges_hide():
    ranges, rows = ranges_of("each entry"), x(1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    call = {"need_weights": False}
    masks = {**call, "attn_mask": dense(ranges) | causal}
    assert_same(attention(), (rows,) * 3, {**call, "is_causal": True, "key_ranges": ranges}, masks)
    assert_same(attention(), (rows,) * 3, {**call, "attn_mask": causal, "key_ranges": ranges}, masks)
    floating = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    for need_weights in (False, True):
        call = {"need_weights": need_weights}
        masks = {**call, "attn_mask": floating.masked_fill(dense(ranges), float("-inf"))}
        assert_same(attention(), (rows,) * 3, {**call, "attn_mask": floating, "key_ranges": ranges}, masks)


def test_without_a_batch():
    ranges, rows, module = ranges_of("shared"), x(1)[0], attention()
    out, weights = module(rows, rows, rows, key_ranges=ranges)
    expected = module(rows[None], rows[None], rows[None], key_ranges=ranges)
    torch.testing.assert_close((out[None], weights[None]), expected)


def test_inference_of_small_inputs_reads_the_ranges():
    # Without gradients, a native call computes the attention of small inputs. It knows no ranges.
    ranges, module = ranges_of("each entry"), attention().eval().float()
    rows = x(1).detach().float()
    with torch.no_grad():
        out, _ = module(rows, rows, rows, need_weights=False, key_ranges=ranges)
        expected, _ = module(rows, rows, rows, need_weights=False, attn_mask=dense(ranges))
        without, _ = module(rows, rows, rows, need_weights=False)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, without)


LAYER = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 24, "batch_first": True, "dtype": torch.float64}


@pytest.mark.parametrize("is_training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("norm_first", (False, True), ids=("post-norm", "pre-norm"))
@pytest.mark.parametrize("in_stack", (False, True), ids=("layer", "stack"))
def test_encoder(in_stack, norm_first, is_training):
    torch.manual_seed(0)
    module = TransformerEncoderLayer(**LAYER, norm_first=norm_first)
    mask = "src_mask"
    if in_stack:
        module, mask = TransformerEncoder(module, 2), "mask"
    ranges = ranges_of("each entry")
    padding = {"src_key_padding_mask": IS_PADDING}
    with_masks = {mask: dense(ranges), **padding}
    assert_same(module.train(is_training), (x(1),), {"src_key_ranges": ranges, **padding}, with_masks)


@pytest.mark.parametrize("is_training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("in_stack", (False, True), ids=("layer", "stack"))
def test_decoder(in_stack, is_training):
    torch.manual_seed(0)
    module = TransformerDecoderLayer(**LAYER)
    if in_stack:
        module = TransformerDecoder(module, 2)
    own, cross = ranges_of("each entry"), ranges_of("each head")
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with_ranges = {"tgt_key_ranges": own, "memory_key_ranges": cross, "tgt_is_causal": True}
    with_masks = {"tgt_mask": dense(own) | causal, "memory_mask": dense(cross), "tgt_is_causal": False}
    assert_same(module.train(is_training), (x(1), x(2)), with_ranges, with_masks)


@pytest.mark.parametrize("names", (("src",), ("tgt",), ("memory",), ("src", "tgt", "memory")), ids="+".join)
def test_transformer(names):
    torch.manual_seed(0)
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = Transformer(**LAYER, **sizes)
    ranges = {name: ranges_of("each head")[:, 0].roll(i, 0) for i, name in enumerate(names)}
    with_ranges = {f"{name}_key_ranges": each for name, each in ranges.items()}
    with_masks = {f"{name}_mask": dense(each) for name, each in ranges.items()}
    assert_same(model, (x(1), x(2)), with_ranges, with_masks)


def test_layers_without_gradients_read_the_ranges():
    # Without gradients, native calls compute the blocks of plain layers. They know no ranges.
    ranges, rows, memory = ranges_of("each entry"), x(1).detach().float(), x(2).detach().float()
    encoder = TransformerEncoderLayer(**LAYER).float().eval()
    decoder = TransformerDecoderLayer(**LAYER).float().eval()
    mask = dense(ranges)
    with torch.no_grad():
        torch.testing.assert_close(encoder(rows, src_key_ranges=ranges), encoder(rows, src_mask=mask))
        out = decoder(rows, memory, tgt_key_ranges=ranges, memory_key_ranges=ranges)
        torch.testing.assert_close(out, decoder(rows, memory, tgt_mask=mask, memory_mask=mask))
        assert not torch.allclose(out, decoder(rows, memory, tgt_key_ranges=ranges))
        assert not torch.allclose(out, decoder(rows, memory, memory_key_ranges=ranges))


def test_converted_and_wrapped_layers():
    ranges, rows = ranges_of("each entry"), x(1)
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER, dropout=0.0), 2, enable_nested_tensor=False)
    expected = model(rows, mask=dense(ranges))
    converted = convert_attention(copy.deepcopy(model))
    torch.testing.assert_close(converted(rows, src_key_ranges=ranges), expected)
    for i, layer in enumerate(converted.layers):
        converted.layers[i] = checkpoint_wrapper(layer)
    torch.testing.assert_close(converted(rows, src_key_ranges=ranges), expected)


def test_compiled():
    ranges, rows = ranges_of("each entry"), x(1)
    encoder = TransformerEncoder(TransformerEncoderLayer(**LAYER, dropout=0.0), 1)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, src_key_ranges=ranges), encoder(rows, src_key_ranges=ranges))


FX = {
    "attention": lambda: (attention(), 3, ("key_ranges",)),
    "encoder layer": lambda: (TransformerEncoderLayer(**LAYER, dropout=0.0), 1, ("src_key_ranges",)),
    "encoder": lambda: (TransformerEncoder(TransformerEncoderLayer(**LAYER, dropout=0.0), 1), 1, ("src_key_ranges",)),
    "decoder layer": lambda: (
        TransformerDecoderLayer(**LAYER, dropout=0.0), 2, ("tgt_key_ranges", "memory_key_ranges")
    ),
    "decoder": lambda: (
        TransformerDecoder(TransformerDecoderLayer(**LAYER, dropout=0.0), 1), 2, ("tgt_key_ranges", "memory_key_ranges")
    ),
    "transformer": lambda: (
        Transformer(**LAYER, num_encoder_layers=1, num_decoder_layers=1, dropout=0.0), 2,
        ("src_key_ranges", "tgt_key_ranges", "memory_key_ranges"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FX)
def test_traced_by_fx(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.inputs, self.names = FX[kind]()

        def forward(self, rows, ranges):
            out = self.model(*(rows,) * self.inputs, **dict.fromkeys(self.names, ranges))
            return out[0] if kind == "attention" else out

    model, rows, ranges = Model(), x(1), ranges_of("each entry")
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(rows, ranges), model(rows, ranges))
    every_key = torch.tensor([0, LENGTH], dtype=torch.int32).expand(BATCH, LENGTH, 1, 2)
    assert not torch.allclose(traced(rows, ranges), traced(rows, every_key))


@pytest.mark.parametrize("has_gradients", (True, False))
def test_a_memory_in_a_cache(has_gradients):
    # Without gradients, a native call computes a step of decoding. It knows no ranges.
    ranges, memory, rows = ranges_of("each entry"), x(2).detach().float(), x(1).detach().float()
    decoder = TransformerDecoder(TransformerDecoderLayer(**LAYER), 2).float().eval()
    with torch.set_grad_enabled(has_gradients):
        expected = decoder(rows, memory, tgt_is_causal=True, memory_key_ranges=ranges)
        cache = KVCache(2)
        steps = [
            decoder(row, memory, memory_key_ranges=ranges[:, i : i + 1], cache=cache)
            for i, row in enumerate(rows.split(1, dim=1))
        ]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected)
        attention, cross = decoder.layers[0].multihead_attn, cache.layers[0].cross_attention
        query, part = rows[:, :1].contiguous(), ranges[:, :1]
        out, _ = attention(query, memory, memory, need_weights=False, key_ranges=part, cache=cross)
        torch.testing.assert_close(out, attention(query, memory, memory, need_weights=False, key_ranges=part)[0])


class OtherAttention(nn.MultiheadAttention):
    """An attention without ranges."""


def test_errors():
    ranges, rows, module = ranges_of("each entry"), x(1), attention()
    shapes = "(L, R, 2), (N, L, R, 2) or (N, H, L, R, 2)"
    for wrong in (ranges[:2], ranges[:, :5], ranges[..., :1], ranges[:, :, :0], ranges[0, 0], ranges[None, None]):
        with pytest.raises(ValueError, match=re.escape(f"key_ranges: expected shape {shapes} with L = 9, N = 3 or 1")):
            module(rows, rows, rows, key_ranges=wrong)
    with pytest.raises(TypeError, match=r"key_ranges: expected dtype torch\.int32"):
        module(rows, rows, rows, key_ranges=ranges.long())
    with pytest.raises(TypeError, match="key_ranges: expected a tensor, got list"):
        module(rows, rows, rows, key_ranges=[[0, 1]])
    nested = torch.nested.nested_tensor(list(rows.detach().unbind()), layout=torch.jagged)
    with pytest.raises(ValueError, match="key_ranges: expected None with nested tensors"):
        module(nested, nested, nested, need_weights=False, key_ranges=ranges)
    with pytest.raises(ValueError, match="src_key_ranges: expected None with nested tensors"):
        TransformerEncoderLayer(**LAYER)(nested, src_key_ranges=ranges)

    decoder = TransformerDecoder(TransformerDecoderLayer(**LAYER), 1)
    with pytest.raises(ValueError, match="tgt_key_ranges: expected None with a cache"):
        decoder(rows, rows, tgt_key_ranges=ranges, cache=KVCache(1))
    cache = KVCache(1).layers[0].self_attention
    with pytest.raises(ValueError, match="key_ranges: expected None with a self-attention cache"):
        module(rows, rows, rows, need_weights=False, key_ranges=ranges, cache=cache)
    for name in ("tgt_key_ranges", "memory_key_ranges"):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor"):
            decoder(rows, rows, **{name: 3})
        with pytest.raises(ValueError, match=rf"{name}: expected shape .*; batch_first=True means inputs \(N, L, E\)"):
            decoder(rows, rows, **{name: ranges[:, :5]})
    encoder = TransformerEncoder(TransformerEncoderLayer(**LAYER), 1)
    with pytest.raises(TypeError, match="src_key_ranges: expected a tensor"):
        encoder(rows, src_key_ranges=3)
    with pytest.raises(TypeError, match=r"src_key_ranges: expected dtype torch\.int32, got torch\.int64"):
        encoder(rows, src_key_ranges=ranges.long())
    with pytest.raises(ValueError, match="src_key_ranges: expected the device of the queries, cpu, got meta"):
        encoder(rows, src_key_ranges=ranges.to("meta"))


class OtherForward(TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


class OtherBlock(TransformerEncoderLayer):
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


class ForeignLayer(nn.Module):
    """A layer that takes ranges, but not is_causal=True without a mask."""

    takes_key_ranges = True

    def __init__(self, layer: TransformerEncoderLayer):
        super().__init__()
        self.layer, self.self_attn = layer, layer.self_attn

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class OtherSignature(FusedMultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, is_causal=False):
        return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal=is_causal)


class AnyKeyword(TransformerEncoderLayer):
    def forward(self, src, **options):
        return super().forward(src, **options)


def test_layers_that_take_no_ranges():
    ranges, rows = ranges_of("each entry"), x(1)
    foreign, other = TransformerEncoderLayer(**LAYER), TransformerEncoderLayer(**LAYER)
    foreign.self_attn = OtherAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    other.self_attn = OtherSignature(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    for layer in (foreign, other, OtherForward(**LAYER), OtherBlock(**LAYER)):
        encoder = TransformerEncoder(TransformerEncoderLayer(**LAYER), 2)
        encoder.layers[1] = layer
        message = f"src_key_ranges: expected None, since layer 1, a {type(layer).__name__}, or a part of it takes none"
        for call in (encoder, Transformer(**LAYER, num_decoder_layers=1, custom_encoder=encoder)):
            arguments = (rows,) if call is encoder else (rows, rows)
            with pytest.raises(ValueError, match=message):
                call(*arguments, src_key_ranges=ranges)
    with pytest.raises(ValueError, match=r"src_key_ranges: expected None, since .*_sa_block or OtherAttention takes"):
        foreign(rows, src_key_ranges=ranges)


@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"mask": torch.ones(LENGTH, LENGTH).triu(1).bool()}])
def test_layers_that_read_no_flag_take_ranges(masks: dict):
    """They get ranges beside the causal mask itself."""
    ranges, rows = ranges_of("each entry"), x(1)
    encoder = TransformerEncoder(TransformerEncoderLayer(**LAYER, dropout=0.0), 2)
    expected = encoder(rows, src_key_ranges=ranges, **masks)
    any_keyword = AnyKeyword(**LAYER, dropout=0.0)
    any_keyword.load_state_dict(encoder.layers[1].state_dict())
    for layer in (any_keyword, ForeignLayer(encoder.layers[1])):
        encoder.layers[1] = layer
        assert not getattr(layer, "takes_is_causal", False)
        torch.testing.assert_close(encoder(rows, src_key_ranges=ranges, **masks), expected)


def test_stacks_that_take_no_ranges():
    ranges, rows = ranges_of("each entry"), x(1)
    stack = nn.TransformerEncoder(TransformerEncoderLayer(**LAYER), 1, enable_nested_tensor=False)
    model = Transformer(**LAYER, num_decoder_layers=1, custom_encoder=stack)
    with pytest.raises(ValueError, match="src_key_ranges: expected None, since TransformerEncoder takes none"):
        model(rows, rows, src_key_ranges=ranges)
    model = Transformer(**LAYER, num_encoder_layers=1, custom_decoder=nn.Identity())
    with pytest.raises(ValueError, match="memory_key_ranges: expected None, since Identity takes none"):
        model(rows, rows, memory_key_ranges=ranges)
    for part in ("self_attn", "multihead_attn"):
        decoder = TransformerDecoder(TransformerDecoderLayer(**LAYER), 1)
        setattr(decoder.layers[0], part, OtherAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64))
        for name in ("tgt_key_ranges", "memory_key_ranges"):
            with pytest.raises(ValueError, match=f"{name}: expected None, since layer 0, a TransformerDecoderLayer"):
                decoder(rows, rows, **{name: ranges})


def test_transformer_checks_and_passes_all_arguments():
    model, rows = Transformer(**LAYER, num_encoder_layers=1, num_decoder_layers=1, dropout=0.0), x(1)
    for arguments, name in (((rows[..., :8], rows), "src"), ((rows, rows[..., :8]), "tgt")):
        with pytest.raises(RuntimeError, match=rf"{name}: expected d_model=16 features, got shape \(3, 9, 8\)"):
            model(*arguments)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    nothing = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    # The hint is believed, and the mask is not read.
    hinted = model(rows, rows, memory_mask=nothing, memory_is_causal=True)
    torch.testing.assert_close(hinted, model(rows, rows, memory_mask=causal))


def test_one_block_of_a_decoder_takes_ranges():
    ranges, rows = ranges_of("each entry"), x(1)
    layer = TransformerDecoderLayer(**LAYER, dropout=0.0)
    layer.multihead_attn = OtherAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    torch.testing.assert_close(layer(rows, rows, tgt_key_ranges=ranges), layer(rows, rows, tgt_mask=dense(ranges)))
    with pytest.raises(ValueError, match="memory_key_ranges: expected None"):
        layer(rows, rows, memory_key_ranges=ranges)


@pytest.mark.parametrize("options", ({}, {"add_bias_kv": True, "add_zero_attn": True}), ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_calls_take_other_lengths(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention(**options)

        def forward(self, rows, ids):
            ranges = key_ranges_of_segments(ids)
            return self.attention(rows, rows, rows, need_weights=False, key_ranges=ranges)[0]

    model, rows = Model().eval(), x(1).detach()
    traced = torch.jit.trace(model, (rows, DOCUMENTS), check_trace=False)
    for length in (9, 5):
        part, ids = rows[:, :length], DOCUMENTS[:, :length]
        torch.testing.assert_close(traced(part, ids), model(part, ids))
    exported = torch.export.export(
        model,
        (rows, DOCUMENTS),
        dynamic_shapes=({1: torch.export.Dim("L", max=64)}, {1: torch.export.Dim("L", max=64)}),
    ).module()
    torch.testing.assert_close(exported(rows[:, :5], DOCUMENTS[:, :5]), model(rows[:, :5], DOCUMENTS[:, :5]))
