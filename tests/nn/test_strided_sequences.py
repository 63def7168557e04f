"""Nested tensors with layout=torch.strided: what torch computes in its fast path, and also what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_attn as fused
from fused_attn import FusedMultiheadAttention, convert_attention
from fused_attn.nn import KVCache

E, HEADS, LENGTHS = 16, 4, (5, 2, 0, 3)
SIZES = {"d_model": E, "nhead": HEADS, "dim_feedforward": 24, "batch_first": True, "dtype": torch.float64}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:enable_nested_tensor is True")


def rows_of(generator: torch.Generator, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Sequences (length, E) that require gradients."""
    return [torch.randn(n, E, generator=generator, dtype=torch.float64, requires_grad=True) for n in lengths]


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows)


@pytest.mark.quick
@pytest.mark.parametrize("average", [True, False])
def test_weights_are_those_of_torch(average: bool, generator: torch.Generator) -> None:
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64).eval()
    x = nested(rows_of(generator, (5, 2)))
    with torch.no_grad():
        expected = module(x, x, x, average_attn_weights=average)
        found = FusedMultiheadAttention.from_torch(module)(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(found[0].unbind(), expected[0].unbind())
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"rotary": True}], ids=str)
def test_weights_of_each_sequence(options: dict, generator: torch.Generator) -> None:
    """Each sequence has the weights of a call of its own, and zeros around them."""
    module = FusedMultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64, **options)
    rows = rows_of(generator)
    x = nested(rows)
    _, weights = module(x, x, x, average_attn_weights=False, is_causal=True)
    appended = module._num_appended
    longest = max(LENGTHS)
    expected = torch.zeros(len(rows), HEADS, longest, longest + appended, dtype=torch.float64)
    for i, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        alone = module(row, row, row, average_attn_weights=False, is_causal=True)[1]
        expected[i, :, :length, :length] = alone[..., :length]
        expected[i, :, :length, longest:] = alone[..., length:]
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(
        torch.autograd.grad(weights.square().sum(), rows[0]), torch.autograd.grad(expected.square().sum(), rows[0])
    )


def encoder(layer_options: dict | None = None, norm: nn.Module | None = None) -> fused.TransformerEncoder:
    layer = fused.TransformerEncoderLayer(**SIZES, **{"dropout": 0.0} | (layer_options or {}))
    return fused.TransformerEncoder(layer, 2, norm)


@pytest.mark.quick
def test_a_converted_encoder_gives_what_torch_gives(generator: torch.Generator) -> None:
    norm = nn.LayerNorm(E, dtype=torch.float64)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2, norm).eval()
    x = nested(rows_of(generator, (5, 2)))
    with torch.no_grad():
        expected = model(x)
        found = convert_attention(copy.deepcopy(model))(x)
    assert found.is_nested and found.layout == torch.strided
    torch.testing.assert_close(found.unbind(), expected.unbind())


@pytest.mark.parametrize("is_causal", [None, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False}], ids=["plain", "norm-first", "no-bias"]
)
def test_an_encoder_trains(options: dict, is_causal: bool | None, generator: torch.Generator) -> None:
    model = encoder(options, nn.LayerNorm(E, dtype=torch.float64)).train()
    rows = rows_of(generator)
    found = list(model(nested(rows), is_causal=is_causal).unbind())
    expected = [model(row[None], is_causal=is_causal)[0] for row in rows]
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(list(model.eval()(nested(rows), is_causal=is_causal).unbind()), expected)
    leaves = [*rows, *model.parameters()]
    gradients = [torch.autograd.grad(torch.cat(x).square().sum(), leaves) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_an_encoder_drops_elements_in_training(generator: torch.Generator) -> None:
    model, x = encoder({"dropout": 0.5}), nested(rows_of(generator))
    first, second = (torch.cat(list(model(x).unbind())) for _ in range(2))
    assert not torch.equal(first, second)


def test_layers_that_read_masks_get_the_causal_mask(generator: torch.Generator) -> None:
    class Layer(fused.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            return super().forward(src, src_mask, src_key_padding_mask)

    model, rows = fused.TransformerEncoder(Layer(**SIZES), 2).eval(), rows_of(generator)
    assert not model.layers[0].takes_is_causal
    found = model(nested(rows), is_causal=True).unbind()
    for out, row in zip(found, rows, strict=True):
        torch.testing.assert_close(out, model(row[None], is_causal=True)[0])


def test_a_forward_of_a_subclass_runs_once(generator: torch.Generator) -> None:
    class Doubled(fused.TransformerEncoder):
        def forward(self, src, *args, **kwargs):
            return super().forward(src, *args, **kwargs) * 2.0

    model, x = Doubled(fused.TransformerEncoderLayer(**SIZES), 1).eval(), nested(rows_of(generator))
    expected = [2.0 * out for out in fused.TransformerEncoder.forward(model, x).unbind()]
    torch.testing.assert_close(list(model(x).unbind()), expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.zeros(5, 5, dtype=torch.bool)},
        {"src_key_padding_mask": torch.zeros(4, 5, dtype=torch.bool)},
        {"src_key_ranges": torch.zeros(5, 1, 2, dtype=torch.int32)},
        {"cache": KVCache(2)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_encoder_names_what_does_not_go_along(options: dict, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected None with a nested tensor, got a "):
        encoder()(nested(rows_of(generator)), **options)


def test_other_layouts_and_modules_name_the_input(generator: torch.Generator) -> None:
    x, dense = nested(rows_of(generator)), torch.randn(len(LENGTHS), 5, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="src: expected a dense tensor in layers with batch_first=False, got a nested"):
        fused.TransformerEncoder(fused.TransformerEncoderLayer(E, HEADS, 24), 2)(x.float())
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(**SIZES), 2)
    model = fused.Transformer(**{"num_encoder_layers": 1, "num_decoder_layers": 1} | SIZES)
    expected = "expected a dense tensor, or a nested one with layout=torch.jagged, got one with layout=torch.strided"
    for module, name, inputs in (
        (decoder, "tgt", (x, x)),
        (decoder, "memory", (dense, x)),
        (model, "src", (x, x)),
        (model, "tgt", (dense, x)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: {expected}$"):
            module(*inputs)


@pytest.mark.parametrize("lengths", [(0, 0), (4,)], ids=["no-rows", "one-sequence"])
def test_an_encoder_takes_few_sequences(lengths: tuple[int, ...], generator: torch.Generator) -> None:
    model, rows = encoder(), rows_of(generator, lengths)
    for out, row in zip(model(nested(rows)).unbind(), rows, strict=True):
        torch.testing.assert_close(out, model(row[None])[0])
