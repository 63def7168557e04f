"""Our Transformer classes give what torch.nn's give, and decode with a cache."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import TIGHT, added, assert_same, causal, padding, randn, twins
from torch import Tensor, nn

from fused_attn import nn as fused
from fused_attn.nn import attention as attention_module
from fused_attn.nn.cache import KVCache, LayerCache

N, S, T, E, H = 3, 5, 4, 8, 2
SIZES = {"d_model": E, "nhead": H, "dim_feedforward": 12, "dropout": 0.0}
SRC_PADDING, TGT_PADDING = padding(5, 2, 3, longest=S), padding(4, 2, 3, longest=T)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
LAYERS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "any activation": {"activation": F.silu, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "odd number of heads": {"nhead": 1, "batch_first": True, "layer_norm_eps": 1e-3},
}
ENCODER_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": SRC_PADDING},
    "float padding": {"src_key_padding_mask": added(SRC_PADDING)},
    "mask": {"src_mask": causal(S)},
    "masks of heads": {"src_mask": torch.randn(N * H, S, S, dtype=torch.float64)},
    "mask and padding": {"src_mask": causal(S), "src_key_padding_mask": SRC_PADDING},
    "hint": {"src_mask": causal(S), "is_causal": True},
    "hint and padding": {"src_mask": causal(S), "is_causal": True, "src_key_padding_mask": SRC_PADDING},
}
DECODER_MASKS = {
    "none": {},
    "causal": {"tgt_mask": CAUSAL},
    "hint": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "paddings": {"tgt_key_padding_mask": TGT_PADDING, "memory_key_padding_mask": SRC_PADDING},
    "hint and paddings": {
        "tgt_mask": CAUSAL,
        "tgt_is_causal": True,
        "tgt_key_padding_mask": TGT_PADDING,
        "memory_key_padding_mask": SRC_PADDING,
    },
    "causal and paddings": {
        "tgt_mask": causal(T),
        "tgt_key_padding_mask": TGT_PADDING,
        "memory_key_padding_mask": SRC_PADDING,
    },
    "memory mask": {"memory_mask": causal(T, S)},
    "memory hint": {"memory_mask": causal(T, S), "memory_is_causal": True},
    "wrong hint and padding": {
        "tgt_mask": torch.eye(T, dtype=torch.bool).logical_not(),
        "tgt_is_causal": True,
        "tgt_key_padding_mask": padding(4, 4, 4, longest=T),
    },
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested"
)


def named(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in cases.items()]


def sequences(batch_first: bool, *lengths: int) -> list[Tensor]:
    return [randn(*((N, length, E) if batch_first else (length, N, E))) for length in lengths]


@pytest.mark.quick
@pytest.mark.parametrize("options", named(LAYERS))
def test_encoder_layer_options(options: dict[str, Any]) -> None:
    ours, theirs = twins(fused.TransformerEncoderLayer, nn.TransformerEncoderLayer, **{**SIZES, **options})
    src = sequences(options.get("batch_first", False), S)[0]
    assert_same(ours, theirs, src, src_key_padding_mask=SRC_PADDING)


@pytest.mark.parametrize("masks", named(ENCODER_MASKS))
def test_encoder_layer_masks(masks: dict[str, Any]) -> None:
    ours, theirs = twins(fused.TransformerEncoderLayer, nn.TransformerEncoderLayer, **SIZES, batch_first=True)
    assert_same(ours, theirs, randn(N, S, E), **masks)


@pytest.mark.quick
@pytest.mark.parametrize("options", named(LAYERS))
def test_decoder_layer_options(options: dict[str, Any]) -> None:
    ours, theirs = twins(fused.TransformerDecoderLayer, nn.TransformerDecoderLayer, **{**SIZES, **options})
    assert_same(ours, theirs, *sequences(options.get("batch_first", False), T, S), tgt_mask=CAUSAL)


@pytest.mark.parametrize("masks", named(DECODER_MASKS))
def test_decoder_layer_masks(masks: dict[str, Any]) -> None:
    ours, theirs = twins(fused.TransformerDecoderLayer, nn.TransformerDecoderLayer, **SIZES, batch_first=True)
    assert_same(ours, theirs, *sequences(True, T, S), **masks)


def stacks(batch_first: bool = True, norm_first: bool = False) -> list[tuple[nn.Module, nn.Module]]:
    """An encoder and a decoder of two layers, each of our classes and of torch's."""
    pairs = []
    for name in ("Encoder", "Decoder"):

        def build(library: Any, name: str = name, **options: Any) -> nn.Module:
            layer = getattr(library, f"Transformer{name}Layer")(
                **SIZES, batch_first=batch_first, norm_first=norm_first, **options
            )
            return getattr(library, f"Transformer{name}")(layer, 2, nn.LayerNorm(E, **options))

        pairs.append(twins(lambda **o: build(fused, **o), lambda **o: build(nn, **o)))
    return pairs


@pytest.mark.parametrize("masks", named(ENCODER_MASKS))
def test_encoder_masks(masks: dict[str, Any]) -> None:
    ours, theirs = stacks()[0]
    masks = {name.replace("src_mask", "mask"): value for name, value in masks.items()}
    assert_same(ours, theirs, randn(N, S, E), **masks)


@pytest.mark.parametrize("masks", named(DECODER_MASKS))
def test_decoder_masks(masks: dict[str, Any]) -> None:
    ours, theirs = stacks(norm_first=True)[1]
    assert_same(ours, theirs, *sequences(True, T, S), **masks)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_transformer_equals_torch(batch_first: bool) -> None:
    options = {**SIZES, "num_encoder_layers": 2, "num_decoder_layers": 1, "batch_first": batch_first}
    ours, theirs = twins(fused.Transformer, nn.Transformer, **options)
    masks = {
        "tgt_mask": CAUSAL,
        "src_key_padding_mask": SRC_PADDING,
        "tgt_key_padding_mask": TGT_PADDING,
        "memory_key_padding_mask": SRC_PADDING,
    }
    assert_same(ours, theirs, *sequences(batch_first, S, T), **masks)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("shapes", "arguments"),
    [
        (((S, N, E), (T, N + 1, E)), {}),
        (((S, N, E + 1), (T, N, E)), {}),
        (((S, N, E), (T, N, E)), {"tgt_is_causal": True}),
        (((S, N, E), (T, N, E)), {"src_is_causal": True}),
        (((S, N, E), (T, N, E)), {"tgt_mask": causal(T + 1)}),
        (((S, N, E), (T, N, E)), {"src_mask": causal(S), "tgt_mask": causal(S)}),
    ],
    ids=["batch sizes", "features", "tgt hint alone", "src hint alone", "mask of another size", "mask of src"],
)
def test_transformer_raises_where_torch_does(shapes: Any, arguments: Any) -> None:
    sizes = {**SIZES, "num_encoder_layers": 1, "num_decoder_layers": 1}
    for library in (nn, fused):
        with pytest.raises(RuntimeError):
            library.Transformer(**sizes)(*(torch.randn(*shape) for shape in shapes), **arguments)


def test_same_seed_gives_the_initial_weights_of_torch() -> None:
    models = []
    for library in (nn, fused):
        torch.manual_seed(5)
        models.append(library.Transformer(**SIZES, num_encoder_layers=2, num_decoder_layers=2))
    theirs, ours = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- inference


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A list that gets the keyword arguments of each call of the kernel."""
    calls, run = [], attention_module.fused_attention

    def counting(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, **kwargs: Any) -> Any:
        calls.append({"attn_mask": attn_mask, **kwargs})
        return run(query, key, value, attn_mask, **kwargs)

    # The native call for small modules does not call `fused_attention`, so it is switched off. For larger ones,
    # `native_attention` calls that.
    monkeypatch.setattr(attention_module.native_attention, "is_small", lambda *args: False)
    monkeypatch.setattr(attention_module, "fused_attention", counting)
    monkeypatch.setattr(attention_module.native_attention, "fused_attention", counting)
    return calls


@pytest.mark.quick
@pytest.mark.parametrize("is_inference", [False, True], ids=["no_grad", "inference_mode"])
def test_inference_equals_torch_in_training_mode(is_inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference gives what torch gives in training mode, rows of padding included.

    torch's inference path uses nested tensors, and returns 0 for rows of padding. Ours has no such path.
    """
    ours, theirs = stacks()[0]
    src = randn(N, S, E, requires_grad=False)
    expected = theirs(src, src_key_padding_mask=SRC_PADDING)
    calls = counted_calls(monkeypatch)
    with warnings.catch_warnings(), torch.inference_mode(is_inference), torch.no_grad():
        warnings.simplefilter("error")
        out = ours.eval()(src, src_key_padding_mask=SRC_PADDING)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert len(calls) == 2
    assert all(call["key_padding_mask"] is SRC_PADDING for call in calls)


def test_dropout_is_off_in_eval_mode() -> None:
    model = fused.Transformer(**{**SIZES, "dropout": 0.5}, num_encoder_layers=1, num_decoder_layers=1)
    src, tgt = torch.randn(S, N, E), torch.randn(T, N, E)
    assert not torch.equal(model(src, tgt), model(src, tgt))
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


@pytest.mark.parametrize("hint", [None, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_causal_masks_cost_no_memory_in_a_stack(hint: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _), (ours, _) = stacks()
    mask = causal(T) if dtype == torch.bool else CAUSAL
    tgt, memory = sequences(True, T, S)
    for padded in (None, TGT_PADDING):
        calls = counted_calls(monkeypatch)
        ours(tgt, memory, tgt_mask=mask, tgt_is_causal=hint, tgt_key_padding_mask=padded)
        for call in calls[::2]:  # the calls between are those that attend to the memory
            assert call["is_causal"] and call["attn_mask"] is None


def test_learnable_masks_get_their_gradient_though_they_look_causal() -> None:
    (_, _), (ours, _) = stacks()
    mask = CAUSAL.clone().requires_grad_()
    ours(*sequences(True, T, S), tgt_mask=mask, tgt_key_padding_mask=TGT_PADDING).cos().sum().backward()
    assert mask.grad is not None and mask.grad.isfinite().all()


# ---- what a stack is made of


@pytest.mark.filterwarnings("error")
def test_stacks_take_layers_of_torch() -> None:
    layers = nn.TransformerEncoderLayer(**SIZES), nn.TransformerDecoderLayer(**SIZES)
    encoder = fused.TransformerEncoder(layers[0], 2, backend="reference")
    decoder = fused.TransformerDecoder(layers[1], 2, backend="reference")
    for stack, count in ((encoder, 2), (decoder, 4)):
        attention = [m for m in stack.modules() if isinstance(m, nn.MultiheadAttention)]
        assert len(attention) == count
        assert all(isinstance(m, fused.FusedMultiheadAttention) and m.backend == "reference" for m in attention)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in layers), "the prototypes were changed"
    memory = encoder(torch.randn(S, N, E))
    assert decoder(torch.randn(T, N, E), memory).shape == (T, N, E)


def test_backend_reaches_every_layer() -> None:
    model = fused.Transformer(**SIZES, num_encoder_layers=2, num_decoder_layers=2, backend="reference")
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attention) == 6 and all(m.backend == "reference" for m in attention)
    layer = fused.TransformerEncoderLayer(**SIZES, backend="reference")
    assert fused.TransformerEncoder(layer, 1).layers[0].self_attn.backend == "reference"


class MaskReader(nn.TransformerEncoderLayer):
    """A layer by a user, which expects float masks, because torch's stack passes float masks."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        assert src_key_padding_mask.is_floating_point()
        return src + src_key_padding_mask.isinf()[..., None]


def test_layers_of_other_classes_get_the_masks_of_torch() -> None:
    encoder = fused.TransformerEncoder(MaskReader(**SIZES, batch_first=True), 2).eval()
    src = torch.zeros(N, S, E)
    with torch.no_grad():
        out = encoder(src, src_key_padding_mask=SRC_PADDING)
    assert torch.equal(out, 2.0 * SRC_PADDING[..., None].expand(N, S, E))
    layer = nn.TransformerDecoderLayer(**SIZES)
    layer.__class__ = type("Own", (nn.TransformerDecoderLayer,), {})
    with pytest.raises(ValueError, match="cache"):
        fused.TransformerDecoder(layer, 1)(torch.randn(T, N, E), torch.randn(S, N, E), cache=KVCache(1))


def test_custom_stacks_are_used_as_they_are() -> None:
    encoder, decoder = nn.Identity(), nn.Identity()
    model = fused.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder and model.decoder is decoder


def test_copies_and_pickles() -> None:
    model = fused.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1, backend="reference").eval()
    src, tgt = torch.randn(S, N, E), torch.randn(T, N, E)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(src, tgt), model(src, tgt))


@pytest.mark.quick
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("activation", [F.silu, nn.Tanh()], ids=["function", "module"])
def test_copies_keep_their_activation(activation: Any, copied: Any) -> None:
    """torch's decoder layer puts relu in the place of a module."""
    x = torch.randn(2, 5, 16)
    for layer, arguments in (
        (fused.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True), (x,)),
        (fused.TransformerDecoderLayer(16, 2, 32, 0.0, activation, batch_first=True), (x, x)),
    ):
        expected = layer(*arguments)
        assert torch.equal(copied(layer)(*arguments), expected)
        assert torch.equal(copied(copied(layer))(*arguments), expected)


def test_the_layers_of_a_stack_keep_their_activation() -> None:
    model = fused.Transformer(16, 2, 2, 2, 32, 0.0, nn.Tanh())
    assert all(isinstance(layer.activation, nn.Tanh) for layer in (*model.encoder.layers, *model.decoder.layers))
    seq2seq = fused.Seq2SeqTransformer(9, 9, 16, 2, 2, 2, 32, 0.0, nn.Tanh(), pad_id=0, sos_id=1, eos_id=2)
    assert all(isinstance(layer.activation, nn.Tanh) for layer in seq2seq.decoder.layers)


# ---- caches


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 1, 1), (1, 3)], ids=["by one", "prefill", "in chunks"])
@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"norm_first": True}], ids=["batch first", "norm and sequence first"]
)
def test_decoding_with_a_cache_equals_the_whole_sequence(options: dict[str, Any], chunks: tuple[int, ...]) -> None:
    layer = fused.TransformerDecoderLayer(**SIZES, **options, dtype=torch.float64)
    decoder = fused.TransformerDecoder(layer, 2, nn.LayerNorm(E, dtype=torch.float64)).eval()
    batch_first = options.get("batch_first", False)
    tgt, memory = sequences(batch_first, T, S)
    expected = decoder(tgt, memory, tgt_mask=CAUSAL, memory_key_padding_mask=SRC_PADDING)
    cache, seq_dim, start, outputs = KVCache(2), 1 if batch_first else 0, 0, []
    with torch.no_grad():
        for rows in chunks:
            new = tgt.narrow(seq_dim, start, rows)
            outputs.append(decoder(new, memory, memory_key_padding_mask=SRC_PADDING, cache=cache))
            start += rows
    torch.testing.assert_close(torch.cat(outputs, dim=seq_dim), expected, **TIGHT)
    assert cache.length == T


def test_a_layer_alone_takes_the_cache_of_a_layer() -> None:
    layer = fused.TransformerDecoderLayer(**SIZES, batch_first=True, dtype=torch.float64).eval()
    tgt, memory = sequences(True, T, S)
    expected = layer(tgt, memory, tgt_mask=causal(T), tgt_is_causal=True)
    cache = LayerCache()
    out = [layer(tgt[:, t : t + 1], memory, cache=cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(out, dim=1), expected, **TIGHT)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_a_cache_serves_one_memory_and_survives_errors(norm_first: bool) -> None:
    layer = fused.TransformerDecoderLayer(**SIZES, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    decoder = fused.TransformerDecoder(layer, 2)
    tgt, memory = randn(N, T, E), randn(N, S, E)
    cache = KVCache(2)
    first = decoder(tgt[:, :1], memory, cache=cache)
    for arguments, error, message in (
        ({"memory": memory + 1.0}, ValueError, "memory: expected the one that the cache was filled with"),
        ({"memory": memory[:, 1:]}, ValueError, "memory: expected batch size 3 and length 5"),
        ({"memory": memory[1:]}, RuntimeError, "memory: expected the batch size of tgt, 3, got 2"),
        ({"memory": memory[0]}, AssertionError, "memory: expected 3 dimensions"),
        ({"memory_key_padding_mask": SRC_PADDING[:, 1:]}, AssertionError, "memory_key_padding_mask: expected shape"),
    ):
        with pytest.raises(error, match=message):
            decoder(tgt[:, 1:], **{"memory": memory, **arguments}, cache=cache)
        assert [layer.self_attention.length for layer in cache.layers] == [1, 1]
    rest = decoder(tgt[:, 1:], memory.clone(), cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), decoder(tgt, memory, tgt_mask=CAUSAL), **TIGHT)


def test_caches_of_another_kind_raise() -> None:
    layer = fused.TransformerDecoderLayer(**SIZES)
    x = torch.randn(1, N, E)
    with pytest.raises(TypeError, match="cache: expected a KVCache, got LayerCache"):
        fused.TransformerDecoder(layer, 2)(x, x, cache=LayerCache())
    with pytest.raises(TypeError, match=r"cache: expected a layer's cache such as .*, got KVCache"):
        layer(x, x, cache=KVCache(1))


def test_an_encoder_takes_jagged_tensors() -> None:
    encoder = fused.TransformerEncoder(fused.TransformerEncoderLayer(**SIZES, batch_first=True), 2)
    rows = [torch.randn(length, E) for length in (5, 9, 2)]
    src = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for is_causal in (False, True):
        out = encoder(src, is_causal=is_causal)
        for found, row in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(found, encoder(row[None], is_causal=is_causal)[0])


def test_a_cache_for_another_number_of_layers_raises() -> None:
    decoder = fused.TransformerDecoder(fused.TransformerDecoderLayer(**SIZES), 2)
    with pytest.raises(ValueError, match="cache: expected one for 2 layers, got one for 3"):
        decoder(torch.randn(1, N, E), torch.randn(S, N, E), cache=KVCache(3))


# ---- compilation and training


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    model = fused.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)
    src, tgt = torch.randn(N, S, E), torch.randn(N, T, E)
    masks = {
        "tgt_mask": causal(T),
        "src_key_padding_mask": SRC_PADDING,
        "tgt_key_padding_mask": TGT_PADDING,
        "memory_key_padding_mask": SRC_PADDING,
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(src, tgt, **masks)
        out.cos().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_training_reduces_the_loss_as_in_torch() -> None:
    ours, theirs = twins(
        fused.Transformer, nn.Transformer, **SIZES, num_encoder_layers=1, num_decoder_layers=1, batch_first=True
    )
    src, tgt = (x.detach() for x in sequences(True, S, T))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.mse_loss(model(src, tgt, tgt_mask=CAUSAL, src_key_padding_mask=SRC_PADDING), tgt)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
