"""`skip_padded_queries`: padded rows of self-attention are not computed, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fused_attn import FusedMultiheadAttention, Seq2SeqTransformer, convert_attention

LENGTHS = torch.tensor([40, 23, 1])
PADDING = {
    "right": torch.arange(40) >= LENGTHS[:, None],
    "left": torch.arange(40) < 40 - LENGTHS[:, None],
    "scattered": torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) < 0.4,
}


def modules(**options) -> tuple[FusedMultiheadAttention, FusedMultiheadAttention]:
    """Two modules with equal parameters: one computes all queries, the other one skips the padded ones."""
    torch.manual_seed(0)
    plain = FusedMultiheadAttention(16, 4, batch_first=True, dtype=torch.float64, **options)
    nn.init.normal_(plain.out_proj.bias)
    skipping = copy.deepcopy(plain)
    skipping.skip_padded_queries = True
    return plain, skipping


def x() -> torch.Tensor:
    return torch.randn(3, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("options", ({}, {"num_kv_heads": 2, "rotary": True}, {"add_bias_kv": True}), ids=str)
def test_only_padded_rows_change(side, is_causal, options):
    padding, results = PADDING[side], []
    for module in modules(**options):
        tokens = x().requires_grad_()
        out, _ = module(tokens, tokens, tokens, padding, need_weights=False, is_causal=is_causal)
        out.masked_fill(padding[..., None], 0.0).square().sum().backward()
        results.append((out.detach(), tokens.grad, *(parameter.grad for parameter in module.parameters())))
    (expected, *expected_grads), (out, *grads) = results
    torch.testing.assert_close(out[~padding], expected[~padding])
    bias = modules(**options)[1].out_proj.bias
    torch.testing.assert_close(out[padding], bias.expand_as(out[padding]))
    # All earlier keys of a padded row may be padding, too. The row that add_bias_kv appends is no padding.
    sees_no_key = is_causal and side == "left" and not options.get("add_bias_kv")
    assert torch.allclose(expected[padding], out[padding]) == sees_no_key
    torch.testing.assert_close(grads, expected_grads)


def test_without_gradients():
    _, skipping = modules()
    tokens, padding = x(), PADDING["right"]
    with torch.no_grad():  # Small modules without gradients have a native call, which computes all rows.
        out, _ = skipping.eval()(tokens, tokens, tokens, padding, need_weights=False)
    torch.testing.assert_close(out[padding], skipping.out_proj.bias.expand_as(out[padding]))


@pytest.mark.parametrize(
    "arguments",
    (
        {"attn_mask": torch.zeros(40, 40, dtype=torch.float64)},
        {"need_weights": True},
        {"key_padding_mask": None},
    ),
    ids=("mask of numbers", "weights", "no padding"),
)
def test_calls_that_compute_all_rows(arguments):
    tokens = x()
    arguments = {"key_padding_mask": PADDING["right"], "need_weights": False} | arguments
    torch.testing.assert_close(*(module(tokens, tokens, tokens, **arguments) for module in modules()))


def test_cross_attention_computes_all_rows():
    torch.testing.assert_close(*(module(x(), x(), x(), PADDING["right"], False) for module in modules()))


@pytest.mark.parametrize("form", ("own values", "padding of numbers"))
def test_forms_of_self_attention(form):
    """DETR adds positions to queries and keys, but not to values. torch's layers turn bool padding into 0 and -inf."""
    rows, padding = x(), PADDING["right"]
    values = rows + 1.0 if form == "own values" else rows
    numbers = torch.zeros(3, 40, dtype=torch.float64).masked_fill(padding, float("-inf"))
    given = numbers if form == "padding of numbers" else padding
    plain, skipping = (module(rows, rows, values, given, False)[0] for module in modules())
    torch.testing.assert_close(skipping[~padding], plain[~padding])
    torch.testing.assert_close(skipping[padding], modules()[1].out_proj.bias.expand_as(skipping[padding]))


def test_layers_of_other_classes():
    class Layer(nn.TransformerEncoderLayer):
        pass

    layer = Layer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    expected = convert_attention(copy.deepcopy(layer))(x(), src_key_padding_mask=PADDING["left"])
    out = convert_attention(layer, skip_padded_queries=True)(x(), src_key_padding_mask=PADDING["left"])
    torch.testing.assert_close(out[~PADDING["left"]], expected[~PADDING["left"]])
    assert not torch.allclose(out, expected)


def test_a_module_that_was_pickled_before_there_was_the_option():
    module, _ = modules()
    del module.__dict__["skip_padded_queries"]
    assert not copy.deepcopy(module).skip_padded_queries


@pytest.mark.parametrize("is_causal", (False, True))
def test_bool_masks(is_causal):
    """Layers of torch pass the causal mask as a tensor, and is_causal as a hint."""
    tokens, padding = x(), PADDING["right"]
    mask = torch.ones(40, 40, dtype=torch.bool).triu(1)  # True = may not attend
    plain, skipping = (m(tokens, tokens, tokens, padding, False, mask, is_causal=is_causal)[0] for m in modules())
    torch.testing.assert_close(skipping[~padding], plain[~padding])
    torch.testing.assert_close(skipping[padding], modules()[1].out_proj.bias.expand_as(skipping[padding]))


@pytest.mark.parametrize("bias", (causal_upper_left, causal_lower_right))
def test_causal_biases(bias):
    tokens, padding = x(), PADDING["right"]
    plain, skipping = (m(tokens, tokens, tokens, padding, False, bias(40, 40))[0] for m in modules())
    torch.testing.assert_close(skipping[~padding], plain[~padding])
    torch.testing.assert_close(skipping[padding], modules()[1].out_proj.bias.expand_as(skipping[padding]))


def test_without_a_batch():
    _, skipping = modules()
    tokens, padding = x()[1], PADDING["right"][1]
    out, _ = skipping(tokens, tokens, tokens, padding, need_weights=False)
    torch.testing.assert_close(out[padding], skipping.out_proj.bias.expand(17, 16))


@pytest.mark.parametrize("is_training", (True, False))
def test_whole_models(is_training):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(is_training)
    expected = convert_attention(copy.deepcopy(encoder))(x(), src_key_padding_mask=PADDING["left"])
    converted = convert_attention(encoder, skip_padded_queries=True)
    out = converted(x(), src_key_padding_mask=PADDING["left"])
    assert converted.layers[1].self_attn.skip_padded_queries
    torch.testing.assert_close(out[~PADDING["left"]], expected[~PADDING["left"]])
    assert not torch.allclose(out, expected)


def test_seq2seq():
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dropout": 0.0}
    torch.manual_seed(0)
    plain = Seq2SeqTransformer(30, 30, **sizes, dtype=torch.float64)
    skipping = Seq2SeqTransformer(30, 30, **sizes, dtype=torch.float64, skip_padded_queries=True)
    skipping.load_state_dict(plain.state_dict())
    source = torch.randint(3, 30, (3, 40)).masked_fill(PADDING["right"], 0)
    target = torch.randint(3, 30, (3, 40)).masked_fill(PADDING["right"], 0)
    losses = []
    for model in (plain, skipping):
        logits = model(source, target)
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=0)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for expected, parameter in zip(plain.parameters(), skipping.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    tokens = [model.eval().generate(source, max_new_tokens=6) for model in (plain, skipping)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ("constructor", "from_torch", "convert_attention"))
def test_a_flag_must_be_a_bool(name):
    calls = {
        "constructor": lambda: FusedMultiheadAttention(16, 4, skip_padded_queries=1),
        "from_torch": lambda: FusedMultiheadAttention.from_torch(nn.MultiheadAttention(16, 4), skip_padded_queries=1),
        "convert_attention": lambda: convert_attention(nn.MultiheadAttention(16, 4), skip_padded_queries=1),
    }
    with pytest.raises(TypeError, match="skip_padded_queries: expected a bool, got int 1"):
        calls[name]()
