"""Modules work with other tools: built on "meta", sharded, cast, checkpointed, with hooks, wrappers and adapters."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import TIGHT, added, causal, padding, randn
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.bias import causal_upper_left
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_attn import nn as fused
from fused_attn.nn import FusedMultiheadAttention, Seq2SeqTransformer, T5RelativeBias

N, S, T, E, H = 3, 5, 4, 8, 2
SIZES = {"d_model": E, "nhead": H, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
SRC_PADDING, TGT_PADDING = padding(5, 2, 3, longest=S), padding(4, 2, 3, longest=T)
SRC = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [4, 4, 5, 0, 0]])
TGT = torch.tensor([[1, 4, 5, 6], [1, 7, 0, 0], [1, 3, 8, 0]])
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor is True")


def seq2seq(**options: Any) -> Seq2SeqTransformer:
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 12, "dropout": 0.0, "max_len": 8}
    return Seq2SeqTransformer(10, 10, E, H, **{**sizes, **options})


def calls_of(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, Seq2SeqTransformer):
        return SRC, TGT
    if isinstance(module, T5RelativeBias):
        return T, S
    dtype = next(module.parameters()).dtype
    x, memory = (torch.randn(N, n, E, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (T, S))
    if isinstance(module, FusedMultiheadAttention):
        return (x,) * 3
    is_encoder = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
    return (x,) if is_encoder else (x, memory)


def run(module: nn.Module) -> Tensor:
    out = module(*calls_of(module))
    return out[0] if isinstance(out, tuple) else out


def stack(name: str) -> nn.Module:
    return getattr(fused, f"Transformer{name}")(getattr(fused, f"Transformer{name}Layer")(**SIZES), 2)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: FusedMultiheadAttention(E, H, batch_first=True, add_bias_kv=True),
    "grouped rotary attention": lambda: FusedMultiheadAttention(E, H, batch_first=True, num_kv_heads=1, rotary=True),
    "attention with a T5 bias": lambda: FusedMultiheadAttention(E, H, relative_bias=T5RelativeBias(8, H)),
    "T5 bias": lambda: T5RelativeBias(8, H),
    "encoder layer": lambda: fused.TransformerEncoderLayer(**SIZES),
    "decoder layer": lambda: fused.TransformerDecoderLayer(**SIZES),
    "encoder": lambda: stack("Encoder"),
    "decoder": lambda: stack("Decoder"),
    "transformer": lambda: fused.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1),
    **{
        f"seq2seq {name}": lambda options=options: seq2seq(**options)
        for name, options in {
            "sinusoidal": {},
            "learned": {"positional": "learned"},
            "rotary": {"positional": "rotary", "norm_first": True, "num_kv_heads": 1},
            "tied": {"share_embeddings": True, "tie_generator": True},
        }.items()
    },
}
EVERY_MODULE = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in MODULES.items()])


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


# ---- parameters and buffers that are filled after the constructor


@EVERY_MODULE
@pytest.mark.parametrize("way", ["to_empty", "assign", "copy", "pickle", "deepcopy on meta"])
def test_every_module_is_its_state_dict(build: Callable[[], nn.Module], way: str) -> None:
    module = filled(build)
    expected, state = run(module), module.state_dict()
    if way == "copy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        twin = on_meta(build)
        twin = copy.deepcopy(twin) if way == "deepcopy on meta" else twin
        if way != "assign":
            twin.to_empty(device="cpu")
            with torch.no_grad():
                for tensor in (*twin.parameters(), *twin.buffers()):
                    tensor.fill_(float("nan"))
        twin.load_state_dict(state, strict=True, assign=way == "assign")
    assert torch.equal(run(twin), expected)
    assert len(list(twin.parameters())) == len(list(module.parameters())), "a shared parameter was split"
    run(twin).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters() if parameter.requires_grad)


@EVERY_MODULE
def test_every_module_can_be_reset_after_meta(build: Callable[[], nn.Module]) -> None:
    """Each module that has parameters can fill them (reset_parameters), which FSDP2 calls after sharding."""
    twin = on_meta(build).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(float("nan"))
    for module in twin.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
    assert run(twin).isfinite().all()


def test_a_seq2seq_resets_attention_of_any_class() -> None:
    model = seq2seq(norm_first=True)
    model.encoder.layers[0].self_attn.relative_bias = T5RelativeBias(8, H)
    model.decoder.layers[0].multihead_attn = nn.MultiheadAttention(E, H, batch_first=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("first", ["meta", "inference_mode", "bfloat16", "vmap", "tracing"])
def test_positions_that_were_made_elsewhere_are_made_again(first: str) -> None:
    model = filled(seq2seq)
    expected = run(model)
    fresh = on_meta(seq2seq) if first == "meta" else copy.deepcopy(model)
    fresh._sinusoids = None
    if first == "meta":
        fresh(SRC.to("meta"), TGT.to("meta"))
        fresh.load_state_dict(model.state_dict(), assign=True)
    elif first == "inference_mode":
        with torch.inference_mode():
            run(fresh)
    elif first == "bfloat16":
        run(fresh.bfloat16())
        fresh = fresh.float()
        fresh.load_state_dict(model.state_dict())
    elif first == "vmap":
        torch.vmap(lambda src: fresh.encode(src)[0])(SRC[:, None])
    else:
        torch.fx.experimental.proxy_tensor.make_fx(
            lambda src: fresh.encode(src)[0], tracing_mode="fake", _allow_non_fake_inputs=True
        )(SRC)
    assert torch.equal(run(fresh), expected)
    run(fresh).sum().backward()


# ---- one dtype for parameters, another for the rest


@pytest.mark.parametrize("positional", ["sinusoidal", "learned", "rotary"])
def test_parameters_alone_in_another_dtype(positional: str) -> None:
    model = filled(lambda: seq2seq(positional=positional))
    expected = run(copy.deepcopy(model).bfloat16())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    out = run(model)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert model.generate(SRC, 3).shape[0] == N


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shards_layers", [False, True], ids=["whole", "per layer"])
@pytest.mark.parametrize("name", ["sinusoidal", "learned", "rotary", "tied"])
def test_fsdp2_from_meta(name: str, shards_layers: bool, dtype: torch.dtype | None, mesh: Any) -> None:
    build = MODULES[f"seq2seq {name}"]
    model, sharded = filled(build), on_meta(build)
    expected = run(model)
    expected.float().cos().sum().backward()
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    if shards_layers:
        for layer in (*sharded.encoder.layers, *sharded.decoder.layers):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    sharded.to_empty(device="cpu")
    state = {
        key: dist.tensor.distribute_tensor(value, mesh, [dist.tensor.Shard(0)])
        for key, value in model.state_dict().items()
    }
    sharded.load_state_dict(state, strict=True, assign=True)
    out = run(sharded)
    assert out.dtype == (dtype or torch.float32)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.1, "atol": 0.15}
    torch.testing.assert_close(out.float(), expected, **tolerance)
    out.float().cos().sum().backward()
    if dtype is None:
        for (key, mine), theirs in zip(sharded.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                mine.grad.full_tensor(), theirs.grad, **tolerance, msg=lambda m, k=key: f"{k} {m}"
            )


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("is_root_sharded", [False, True], ids=["layers", "whole"])
def test_fsdp2_generates(is_root_sharded: bool, num_beams: int, mesh: Any) -> None:
    model = filled(seq2seq)
    tokens = model.generate(SRC, 5, num_beams=num_beams)
    for layer in (*model.encoder.layers, *model.decoder.layers):
        fully_shard(layer, mesh=mesh)
    if is_root_sharded:
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "generate")
    assert torch.equal(model.generate(SRC, 5, num_beams=num_beams), tokens)


@pytest.mark.usefixtures("mesh")
def test_ddp_generates() -> None:
    """Also a layer in DDP generates. It does not say that it takes a cache, so each step computes all tokens again."""
    model = filled(seq2seq)
    tokens = model.generate(SRC, 5)
    wrapped = DistributedDataParallel(model)
    assert torch.equal(wrapped.module.generate(SRC, 5), tokens)
    model.decoder.layers[1] = DistributedDataParallel(model.decoder.layers[1])
    with pytest.warns(UserWarning, match="generate: each step"):
        assert torch.equal(model.generate(SRC, 5), tokens)


@pytest.mark.parametrize("mask", [causal(T), causal_upper_left(T, T), None], ids=["mask", "causal bias", "flag"])
def test_fsdp2_in_half_precision_around_the_attention_of_a_stack(mask: Tensor | None, mesh: Any) -> None:
    decoder = filled(lambda: stack("Decoder"))
    masks = {"tgt_mask": mask, "tgt_is_causal": None if mask is not None else True, "tgt_key_padding_mask": TGT_PADDING}
    tgt, memory = calls_of(decoder)
    expected = decoder(tgt, memory, tgt_mask=causal(T), tgt_key_padding_mask=TGT_PADDING)
    for module in reversed(list(decoder.modules())):  # inner modules come before outer ones
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerDecoderLayer)):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    out = decoder(tgt, memory, **masks)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.15)


# ---- the arguments that a stack passes to its layers


def decoder_calls() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of a decoder of ours, each with the arguments of torch's decoder that must give the same result."""
    return {
        "mask": ({"tgt_mask": causal(T)}, {"tgt_mask": causal(T)}),
        "mask and padding": (
            {"tgt_mask": causal(T), "tgt_key_padding_mask": TGT_PADDING},
            {"tgt_mask": causal(T), "tgt_key_padding_mask": TGT_PADDING},
        ),
        "float mask and padding": (
            {"tgt_mask": added(causal(T)), "tgt_key_padding_mask": TGT_PADDING},
            {"tgt_mask": added(causal(T)), "tgt_key_padding_mask": added(TGT_PADDING)},
        ),
        "causal bias": ({"tgt_mask": causal_upper_left(T, T)}, {"tgt_mask": causal(T)}),
        "causal bias and padding": (
            {"tgt_mask": causal_upper_left(T, T), "tgt_key_padding_mask": TGT_PADDING},
            {"tgt_mask": causal(T), "tgt_key_padding_mask": TGT_PADDING},
        ),
        "flag and padding": (
            {"tgt_is_causal": True, "tgt_key_padding_mask": TGT_PADDING},
            {"tgt_mask": causal(T), "tgt_key_padding_mask": TGT_PADDING},
        ),
        "no causal mask": ({"tgt_mask": causal(T).T}, {"tgt_mask": causal(T).T}),
    }


def handled(seen: list[str]) -> Callable[..., Any]:
    """A hook that copies every tensor argument, as tools do, and checks that the mask agrees with is_causal."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def handle(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            assert type(x) in (Tensor, nn.Parameter), type(x)
            assert repr(x) and x.detach().shape == x.shape
            return x.to("cpu", copy=True).contiguous().clone()

        name = "src_mask" if "src_mask" in kwargs else "tgt_mask"
        flag = kwargs["is_causal" if name == "src_mask" else "tgt_is_causal"]
        mask = kwargs[name]
        if flag and mask is not None:
            hidden = mask if mask.dtype == torch.bool else mask.isinf()
            assert torch.equal(hidden, causal(mask.shape[0]))
        seen.append(type(module).__name__)
        return tuple(handle(x) for x in args), {name: handle(x) for name, x in kwargs.items()}

    return hook


@pytest.mark.parametrize("name", decoder_calls())
def test_layers_of_a_decoder_receive_tensors_that_hooks_can_handle(name: str) -> None:
    given, meant = decoder_calls()[name]
    decoder, seen = stack("Decoder").double(), []
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 2).double()
    theirs.load_state_dict(decoder.state_dict())
    for layer in decoder.layers:
        layer.register_forward_pre_hook(handled(seen), with_kwargs=True)
    tgt, memory = randn(N, T, E), randn(N, S, E)
    torch.testing.assert_close(decoder(tgt, memory, **given), theirs(tgt, memory, **meant), **TIGHT)
    assert len(seen) == 2


@pytest.mark.parametrize("name", decoder_calls())
def test_layers_of_an_encoder_receive_tensors_that_hooks_can_handle(name: str) -> None:
    names = {"tgt_mask": "mask", "tgt_is_causal": "is_causal", "tgt_key_padding_mask": "src_key_padding_mask"}
    given, meant = ({names[key]: value for key, value in call.items()} for call in decoder_calls()[name])
    encoder, seen = stack("Encoder").double(), []
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2).double()
    theirs.load_state_dict(encoder.state_dict())
    for layer in encoder.layers:
        layer.register_forward_pre_hook(handled(seen), with_kwargs=True)
    src = randn(N, T, E)
    torch.testing.assert_close(encoder(src, **given), theirs(src, **meant), **TIGHT)
    assert len(seen) == 2


def test_layers_of_a_seq2seq_receive_tensors_that_hooks_can_handle() -> None:
    model, seen = filled(seq2seq), []
    expected = run(model), model.generate(SRC, 4)
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.register_forward_pre_hook(handled(seen), with_kwargs=True)
    torch.testing.assert_close(run(model), expected[0])
    assert len(seen) == 4
    assert torch.equal(model.generate(SRC, 4), expected[1])


class Checkpointed(fused.TransformerDecoderLayer):
    def forward(self, tgt, memory, *args, **kwargs):
        arguments = dict(zip(("tgt_mask", "memory_mask"), args, strict=False)) | kwargs
        keys = [key for key in arguments if key != "cache"]

        def layer(tgt, memory, *values):
            return super(Checkpointed, self).forward(tgt, memory, **dict(zip(keys, values, strict=True)))

        return checkpoint(layer, tgt, memory, *(arguments[key] for key in keys), use_reentrant=True)


@pytest.mark.parametrize("name", decoder_calls())
@pytest.mark.parametrize("way", ["subclass", "reentrant", "not reentrant", "attention"])
def test_checkpoints_in_a_decoder_change_nothing(way: str, name: str) -> None:
    given, _ = decoder_calls()[name]
    decoder = stack("Decoder").double()
    theirs = copy.deepcopy(decoder)
    if way == "subclass":
        for layer in decoder.layers:
            layer.__class__ = Checkpointed
    elif way == "attention":
        for layer in decoder.layers:
            layer.self_attn = checkpoint_wrapper(layer.self_attn, CheckpointImpl.REENTRANT)
    else:
        implementation = CheckpointImpl.REENTRANT if way == "reentrant" else CheckpointImpl.NO_REENTRANT
        decoder.layers = nn.ModuleList(checkpoint_wrapper(layer, implementation) for layer in decoder.layers)
    tgt, memory = randn(N, T, E), randn(N, S, E)
    outcomes = []
    for model in (decoder, theirs):
        model.zero_grad()
        tgt.grad = memory.grad = None
        out = model(tgt, memory, **given)
        out.cos().sum().backward()
        outcomes.append([out, tgt.grad, memory.grad, *(parameter.grad for parameter in model.parameters())])
    for mine, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, expected, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"num_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("padded", [None, TGT_PADDING], ids=["whole", "padded"])
def test_the_flag_without_a_mask_is_the_causal_mask(options: dict[str, Any], padded: Tensor | None) -> None:
    module = FusedMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
    x = randn(N, T, E)
    arguments = {"key_padding_mask": padded, "need_weights": False}
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            expected = module(x, x, x, attn_mask=causal(T), **arguments)[0]
            torch.testing.assert_close(module(x, x, x, is_causal=True, **arguments)[0], expected, **TIGHT)


def test_a_mask_for_appended_rows_is_made_where_the_keys_are() -> None:
    """The mask is not made on the device of out_proj's weights, because they may be offloaded."""
    module = FusedMultiheadAttention(E, H, batch_first=True, add_zero_attn=True)
    x = torch.randn(N, T, E)
    expected = module(x, x, x, attn_mask=causal(T), need_weights=False)[0]
    weight, bias = module.out_proj.weight, module.out_proj.bias
    module.out_proj.forward = lambda x: nn.functional.linear(x, weight, bias)
    module.out_proj.to_empty(device="meta")
    weight, bias = weight.detach(), bias.detach()
    out = module(x, x, x, attn_mask=causal_upper_left(T, T), need_weights=False)[0]
    torch.testing.assert_close(out, expected)


# ---- modules of others inside of our modules


class TorchSignatures(fused.TransformerDecoderLayer):
    """A layer written for torch's stack: its methods have no argument for a cache."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x = self.self_attn(
            x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal, need_weights=False
        )[0]
        return self.dropout1(x)

    def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
        x = self.multihead_attn(
            x, mem, mem, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal, need_weights=False
        )[0]
        return self.dropout2(x)


class OwnCrossAttention(fused.TransformerDecoderLayer):
    _mha_block = TorchSignatures._mha_block


class Adapter(nn.Module):
    """A wrapper around an attention module, as adapters are. It passes all arguments on, and has some attributes."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.batch_first = base, base.batch_first

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base(query, *args, **kwargs)


def _torch_attention(layer: nn.Module, name: str) -> nn.Module:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    attention.load_state_dict(getattr(layer, name).state_dict())
    setattr(layer, name, attention)
    return layer


def _of_class(layer: nn.Module, cls: type) -> nn.Module:
    layer.__class__ = cls
    return layer


def _torch_layer(layer: nn.Module) -> nn.Module:
    theirs = nn.TransformerDecoderLayer(**SIZES)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def _adapted(layer: nn.Module) -> nn.Module:
    layer.self_attn, layer.multihead_attn = Adapter(layer.self_attn), Adapter(layer.multihead_attn)
    return layer


def _wrapped_attention(layer: nn.Module) -> nn.Module:
    layer.self_attn = checkpoint_wrapper(layer.self_attn)
    layer.multihead_attn = torch.compile(layer.multihead_attn, backend="eager")
    return layer


def _offloaded(layer: nn.Module) -> nn.Module:
    """Offloads as accelerate does: the instance gets another forward, which keeps the signature of the old one."""
    layer.forward = functools.update_wrapper(
        functools.partial(lambda f, *a, **k: f(*a, **k), layer.forward), layer.forward
    )
    return layer


WRAPS = pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(checkpoint_wrapper, id="checkpoint"),
        pytest.param(lambda m: torch.compile(m, backend="eager"), id="compile", marks=pytest.mark.slow),
    ],
)

#: Changes of a decoder layer, each with whether the changed layer still takes a cache.
LAYERS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "torch's cross-attention": (lambda layer: _torch_attention(layer, "multihead_attn"), True),
    "torch's self-attention": (lambda layer: _torch_attention(layer, "self_attn"), False),
    "torch's layer": (_torch_layer, False),
    "torch's signatures": (lambda layer: _of_class(layer, TorchSignatures), False),
    "torch's signatures of cross-attention": (lambda layer: _of_class(layer, OwnCrossAttention), True),
    "torch's signatures and self-attention": (
        lambda layer: _of_class(_torch_attention(layer, "self_attn"), TorchSignatures),
        False,
    ),
    "adapters": (_adapted, False),
    "checkpoint": (checkpoint_wrapper, True),
    "reentrant checkpoint": (lambda layer: checkpoint_wrapper(layer, CheckpointImpl.REENTRANT), True),
    "checkpoint of a foreign attention": (
        lambda layer: checkpoint_wrapper(_torch_attention(layer, "multihead_attn")),
        True,
    ),
    "compiled": (lambda layer: torch.compile(layer, backend="eager"), True),
    "wrapped attention": (_wrapped_attention, True),
    "replaced forward": (_offloaded, True),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("compiled", "wrapped attention") else ()) for n in LAYERS],
)
def test_a_seq2seq_works_with_what_torch_accepts_for_a_layer(name: str) -> None:
    torch._dynamo.reset()
    change, takes_cache = LAYERS[name]
    model = filled(seq2seq)
    expected = run(model)
    tokens = {num_beams: model.generate(SRC, 5, num_beams=num_beams) for num_beams in (1, 2)}
    model.decoder.layers[1] = change(model.decoder.layers[1])
    torch.testing.assert_close(run(model.train()), expected)
    torch.testing.assert_close(run(model.eval()), expected)
    assert model.decoder.takes_cache == takes_cache
    for num_beams in tokens:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(model.generate(SRC, 5, num_beams=num_beams), tokens[num_beams])
        files = [warning.filename for warning in caught if "generate:" in str(warning.message)]
        assert files == ([] if takes_cache else [__file__])
    if not takes_cache:
        with pytest.raises(ValueError, match="cache: expected None, since a layer"):
            model.decode(TGT, *model.encode(SRC), cache=fused.KVCache(2))


@pytest.mark.parametrize("which", ["encoder", "decoder"])
@WRAPS
def test_a_seq2seq_works_with_wrapped_stacks(which: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    model = filled(seq2seq)
    expected, tokens = run(model), model.generate(SRC, 5)
    setattr(model, which, wrap(getattr(model, which)))
    torch.testing.assert_close(run(model), expected)
    assert torch.equal(model.generate(SRC, 5), tokens)


def test_a_seq2seq_works_with_stacks_of_torch() -> None:
    model = filled(seq2seq)
    expected, tokens = run(model), model.generate(SRC, 5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 2)
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    model.encoder, model.decoder = encoder, decoder
    torch.testing.assert_close(run(model), expected)
    with pytest.warns(UserWarning, match="generate: each step"):
        assert torch.equal(model.generate(SRC, 5), tokens)


@WRAPS
@pytest.mark.parametrize(
    "masks", [{}, {"src_key_padding_mask": SRC_PADDING}, {"mask": causal(S), "src_key_padding_mask": SRC_PADDING}]
)
def test_wrapped_layers_of_an_encoder(wrap: Callable[[nn.Module], nn.Module], masks: dict[str, Any]) -> None:
    torch._dynamo.reset()
    encoder = stack("Encoder").double()
    theirs = copy.deepcopy(encoder)
    encoder.layers = nn.ModuleList(wrap(layer) for layer in encoder.layers)
    src = randn(N, S, E)
    torch.testing.assert_close(encoder(src, **masks), theirs(src, **masks), **TIGHT)


def test_an_adapter_that_merges_its_weights_for_a_call() -> None:
    """The module works under an adapter such as peft's LoRA for MultiheadAttention.

    The adapter reads the packed weights, and puts a plain tensor into their place for the time of a call.
    """
    module = FusedMultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    assert module._qkv_same_embed_dim
    delta = torch.randn(3 * E, E, dtype=torch.float64, requires_grad=True)
    weight, x = module.in_proj_weight, randn(N, T, E)
    with torch.no_grad():
        weight.add_(delta)
        expected = module(x, x, x, need_weights=False)[0]
        weight.sub_(delta)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            del module.in_proj_weight
            module.in_proj_weight = weight.detach() + delta
            out = module(x, x, x, need_weights=False)[0]
            del module.in_proj_weight
            module.register_parameter("in_proj_weight", weight)
        torch.testing.assert_close(out, expected, **TIGHT)
    out.sum().backward()
    assert delta.grad.abs().max() > 0
