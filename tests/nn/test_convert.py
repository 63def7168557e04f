"""convert_attention puts the fused kernel into models that are built of torch.nn's modules."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import TIGHT, added, assert_same, causal, padding, randn
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fused_attn import nn as fused
from fused_attn.nn import FusedMultiheadAttention, convert_attention
from fused_attn.nn import attention as attention_module

N, S, E, H = 3, 5, 8, 2
SIZES = {"d_model": E, "nhead": H, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
PADDING = padding(5, 2, 3, longest=S)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Support for mismatched")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A list that gets the keyword arguments of each call of the fused kernel."""
    seen, run = [], attention_module.fused_attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return run(*args, **kwargs)

    # The native call for small modules does not call `fused_attention`, so it is switched off. For larger ones,
    # `native_attention` calls that.
    monkeypatch.setattr(attention_module.native_attention, "is_small", lambda *args: False)
    monkeypatch.setattr(attention_module, "fused_attention", counting)
    monkeypatch.setattr(attention_module.native_attention, "fused_attention", counting)
    return seen


def encoder(num_layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**SIZES, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=not options)


class Model(nn.Module):
    """A model that has attention in every place where a module can be registered."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(E, H, kdim=3, vdim=7) for _ in range(2))
        self.by_name = nn.ModuleDict({"a": nn.Sequential(nn.MultiheadAttention(E, H, add_bias_kv=True))})
        self.alias = self.attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + self.alias(x, x, x, attn_mask=causal(S))[0]


@pytest.mark.quick
def test_every_attention_is_replaced_and_nothing_else() -> None:
    model = Model()
    before = {name: type(module) for name, module in model.named_modules()}
    assert convert_attention(model, backend="reference") is model
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    for name, cls in before.items():
        expected = FusedMultiheadAttention if cls is nn.MultiheadAttention else cls
        assert type(after[name]) is expected, name
    assert model.alias is model.attention
    assert model.attention.backend == "reference"


@pytest.mark.quick
def test_parameters_stay_the_same_objects() -> None:
    model = Model()
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    model.attention.in_proj_bias.requires_grad_(False)
    model.eval()
    model.blocks.train()
    convert_attention(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    model.load_state_dict(state, strict=True)
    assert not model.attention.in_proj_bias.requires_grad
    assert not model.attention.training and model.blocks[0].training


def test_results_and_gradients_stay_the_same() -> None:
    model = Model()
    converted = convert_attention(copy.deepcopy(model))
    assert_same(converted, model, randn(N, S, E))


def test_an_optimizer_made_before_still_trains() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.attention.parameters(), lr=0.1)
    convert_attention(model)
    before = model.attention.in_proj_weight.detach().clone()
    model(randn(N, S, E)).cos().sum().backward()
    optimizer.step()
    assert not torch.equal(model.attention.in_proj_weight, before)


def test_hooks_and_their_handles_survive() -> None:
    model, seen = Model(), []
    handle = model.attention.register_forward_hook(lambda *_: seen.append("hook"))
    convert_attention(model)
    x = randn(N, S, E)
    model(x)
    assert seen == ["hook", "hook"]
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_the_model_may_be_an_attention_itself() -> None:
    module = nn.MultiheadAttention(E, H, bias=False, dtype=torch.float64).eval()
    converted = convert_attention(module)
    assert type(converted) is FusedMultiheadAttention and not converted.training
    assert converted.in_proj_weight is module.in_proj_weight
    assert_same(converted, module, *(randn(S, N, E),) * 3)
    assert convert_attention(converted) is converted, "a second conversion is no change"
    with pytest.raises(TypeError, match="module"):
        FusedMultiheadAttention.from_torch(nn.Linear(2, 2))


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnName(nn.MultiheadAttention):
    pass


def test_a_model_without_attention_is_returned_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(E, E))
    with pytest.warns(UserWarning, match=r"Sequential holds no torch\.nn\.MultiheadAttention, so nothing") as record:
        assert convert_attention(model) is model
    assert record[0].filename == __file__


def test_a_second_conversion_is_silent() -> None:
    model = convert_attention(nn.ModuleList([nn.MultiheadAttention(E, H)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_attention(model)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"skip_padded_queries": True}])
def test_options_that_change_nothing_are_told(options: dict[str, Any]) -> None:
    """A model whose attention is fused already keeps the options of that."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2, batch_first=True))
    convert_attention(model)
    with pytest.warns(UserWarning, match=r"are for new modules. These are fused already.*: 0$"):
        convert_attention(model, **options)
    assert model[0].backend is None and not model[0].skip_padded_queries
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_attention(
            convert_attention(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), **options), **options
        )


def test_attention_of_other_classes_and_with_a_forward_of_its_own_is_left_alone() -> None:
    model = nn.ModuleDict({"own": OwnForward(E, H), "named": OwnName(E, H), "plain": nn.MultiheadAttention(E, H)})
    model["patched"] = nn.MultiheadAttention(E, H)
    model["patched"].forward = lambda *args, **kwargs: "patched"
    parametrised = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(E, H), "in_proj_weight")
    model["parametrised"] = parametrised
    message = r"own \(OwnForward\), named \(OwnName\), patched \(MultiheadAttention\), parametrised \(Parametrized"
    with pytest.warns(UserWarning, match=message) as record:
        convert_attention(model)
    assert record[0].filename == __file__
    assert type(model["own"]) is OwnForward and model["parametrised"] is parametrised
    assert type(model["named"]) is OwnName and model["patched"]() == "patched"
    assert type(model["plain"]) is FusedMultiheadAttention


def test_attention_that_torch_compile_wraps_is_left_alone() -> None:
    """The compiled function would go on calling torch's module, which eval() would no longer reach."""
    model = nn.Sequential(torch.compile(nn.MultiheadAttention(E, H, dropout=0.5), backend="eager"))
    with pytest.warns(UserWarning, match=r"left alone.* compiled .*: 0\._orig_mod \(MultiheadAttention\)"):
        convert_attention(model)
    assert type(model[0]._orig_mod) is nn.MultiheadAttention
    x = torch.randn(5, 2, E)
    model.eval()
    assert torch.equal(model[0](x, x, x)[0], model[0](x, x, x)[0])


def test_a_module_that_was_compiled_calls_the_fused_kernel(calls: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    model[0].compile(backend="eager")
    x = torch.randn(S, N, E)
    convert_attention(model)[0](x, x, x)
    assert len(calls) == 1


def test_bad_arguments_raise() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        convert_attention(3)
    for convert in (convert_attention, FusedMultiheadAttention.from_torch):
        with pytest.raises(ValueError, match=r"backend: expected None or one of .*, got 'nope'"):
            convert(nn.MultiheadAttention(E, H), backend="nope")


def test_from_torch_refuses_what_it_would_drop() -> None:
    for module in (OwnForward(E, H), nn.MultiheadAttention(E, H)):
        if type(module) is nn.MultiheadAttention:
            module.forward = functools.partial(module.forward, need_weights=False)
        with pytest.raises(ValueError, match=r"module: expected the forward of .*, got a forward of its own"):
            FusedMultiheadAttention.from_torch(module)
    module = torch.nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(E, H), "in_proj_weight")
    with pytest.raises(ValueError, match=r"module: expected no parametrisation, .*, got one of in_proj_weight"):
        FusedMultiheadAttention.from_torch(module)


# ---- torch's encoder and decoder layers


@pytest.mark.quick
@pytest.mark.parametrize(
    "masks", [{}, {"src_key_padding_mask": PADDING}, {"mask": causal(S)}], ids=["no mask", "padding", "mask"]
)
@pytest.mark.parametrize("mode", ["train", "eval", "eval, no_grad", "eval, inference_mode"])
def test_encoder_reaches_the_fused_kernel_in_every_mode(mode: str, masks: Any, calls: list[dict[str, Any]]) -> None:
    model = encoder()
    src = randn(N, S, E, requires_grad=False)
    expected = model(src, **masks)  # in training mode, torch computes the rows of padding as well
    convert_attention(model)
    model.train(mode == "train")
    with torch.inference_mode("inference_mode" in mode), torch.set_grad_enabled("no_grad" not in mode):
        out = model(src, **masks)
    assert len(calls) == 2
    torch.testing.assert_close(out, expected, **TIGHT)
    if "src_key_padding_mask" in masks:
        assert all(call["key_padding_mask"].dtype == torch.bool for call in calls), "padding: expected no float mask"


def test_a_single_layer_reaches_the_fused_kernel_without_gradients(calls: list[dict[str, Any]]) -> None:
    layer = convert_attention(nn.TransformerEncoderLayer(**SIZES)).eval()
    with torch.no_grad():
        layer(torch.randn(N, S, E))
    assert len(calls) == 1
    assert torch.backends.mha.get_fastpath_enabled(), "the global switch is the user's"


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass of torch's layer that inherits its forward and its fast inference path."""


class OwnEncoder(nn.TransformerEncoder):
    pass


@pytest.mark.parametrize("activation", [F.relu, "gelu"])
def test_inference_path_of_subclasses_is_off(activation: Any, calls: list[dict[str, Any]]) -> None:
    layer = OwnLayer(**SIZES, activation=activation, dtype=torch.float64)
    model = OwnEncoder(layer, 2, enable_nested_tensor=True)
    src = randn(N, S, E, requires_grad=False)
    expected = model(src, src_key_padding_mask=PADDING)
    convert_attention(model).eval()
    assert type(model) is OwnEncoder and type(model.layers[0]) is OwnLayer
    with torch.no_grad():
        out = model(src, src_key_padding_mask=PADDING)
    assert len(calls) == 2
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"num_kv_heads": 1}], ids=["plain", "rotary", "gqa"])
def test_layers_of_torch_call_a_fused_attention_in_every_mode(options: Any, calls: list[dict[str, Any]]) -> None:
    layer = nn.TransformerEncoderLayer(**SIZES, dtype=torch.float64)
    layer.self_attn = FusedMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
    src = randn(N, S, E, requires_grad=False)
    model = nn.TransformerEncoder(layer, 2)
    for module in (layer, model):
        expected = module.train()(src, src_key_padding_mask=PADDING)
        if module is model:
            expected = expected.masked_fill(PADDING[..., None], 0.0)  # torch's inference path returns 0 for padding
        calls.clear()
        with torch.no_grad():
            out = module.eval()(src, src_key_padding_mask=PADDING)
        assert len(calls) == len(getattr(module, "layers", [module]))
        torch.testing.assert_close(out, expected, **TIGHT)


class OwnAttention(nn.TransformerEncoderLayer):
    """A layer whose constructor makes the attention module."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.self_attn = FusedMultiheadAttention(E, H, batch_first=True, rotary=True, dtype=torch.float64)


def _assigned(model: nn.TransformerEncoder, attention: nn.Module) -> nn.Module:
    model.layers[1].self_attn = attention
    return model


def _set_by_name(model: nn.TransformerEncoder, attention: nn.Module) -> nn.Module:
    model.set_submodule("layers.1.self_attn", attention)
    return model


def _wrapped(model: nn.TransformerEncoder, attention: nn.Module) -> nn.Module:
    model.layers[1].self_attn = checkpoint_wrapper(attention)
    return model


def _own_layer(model: nn.TransformerEncoder, attention: nn.Module) -> nn.Module:
    model.layers[1] = OwnAttention(**SIZES, dtype=torch.float64)
    return model


def _pickled(model: nn.TransformerEncoder, attention: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(copy.deepcopy(_assigned(model, attention))))


@pytest.mark.parametrize("swap", [_assigned, _set_by_name, _wrapped, _own_layer, _pickled])
@pytest.mark.parametrize(
    "options", [{"rotary": True}, {"num_kv_heads": 1}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("hidden", [PADDING, padding(5, 0, 3, longest=S)], ids=["padding", "an empty sequence"])
def test_attention_that_is_swapped_into_a_stack_of_torch(swap: Any, options: Any, hidden: Tensor) -> None:
    """Our attention in layers of a torch stack gives the same results.

    torch decides in the constructors that a stack uses nested tensors, and that a layer reads the weights of its
    attention directly. Both must not happen with our module.
    """
    model = encoder()
    assert model.use_nested_tensor
    attention = FusedMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
    model = swap(model, attention)
    src = randn(N, S, E, requires_grad=False)
    for masks in ({}, {"src_key_padding_mask": hidden}):
        expected = model.train()(src, **masks)
        expected = expected.masked_fill(masks.get("src_key_padding_mask", torch.zeros(N, S).bool())[..., None], 0.0)
        with torch.no_grad():
            out = model.eval()(src, **masks)
        torch.testing.assert_close(out, expected, **TIGHT)
    assert list(model.layers[0]._forward_pre_hooks) == [], "layers with torch's attention are left alone"


def test_a_stack_of_torch_takes_our_layers() -> None:
    model = nn.TransformerEncoder(fused.TransformerEncoderLayer(**SIZES, dtype=torch.float64), 2)
    assert not model.layers[0]._forward_pre_hooks, "they have no path to be kept off"
    src = randn(N, S, E, requires_grad=False)
    expected = model(src, src_key_padding_mask=PADDING).masked_fill(PADDING[..., None], 0.0)
    with torch.no_grad():
        out = model.eval()(src, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"kdim": 3}, {"vdim": 3}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_attributes_tell_tools_what_those_of_torch_tell(options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(E, H, **options)
    converted = FusedMultiheadAttention.from_torch(module)
    twins = [converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    for twin in (*twins, FusedMultiheadAttention(E, H, **options)):
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float)) or value is None:
                assert getattr(twin, name) == value, name
    converted._reset_parameters()
    assert all(weight.std() > 0.1 for weight in converted.parameters() if weight.dim() > 1)


def test_layers_whose_attention_is_left_alone_stay_as_they_are() -> None:
    model = encoder(1)
    model.layers[0].self_attn = OwnForward(E, H, batch_first=True)
    with pytest.warns(UserWarning, match="layers.0.self_attn"):
        convert_attention(model)
    assert type(model) is nn.TransformerEncoder and type(model.layers[0]) is nn.TransformerEncoderLayer
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


def test_a_whole_transformer_equals_torch(calls: list[dict[str, Any]]) -> None:
    model = nn.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=2, dtype=torch.float64)
    converted = convert_attention(copy.deepcopy(model))
    assert type(converted.encoder) is fused.TransformerEncoder
    assert type(converted.decoder.layers[1]) is fused.TransformerDecoderLayer
    masks = {
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
        "tgt_key_padding_mask": PADDING,
        "tgt_mask": added(causal(S)),
    }
    assert_same(converted, model, randn(N, S, E), randn(N, S, E), **masks)
    assert len(calls) == 1 + 2 * 2
    model.load_state_dict(converted.state_dict(), strict=True)


def test_converted_models_can_be_copied_and_pickled() -> None:
    model = convert_attention(encoder()).eval()
    src = randn(N, S, E)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(src), model(src))
