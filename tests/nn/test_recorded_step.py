"""A generation on a CPU records its step as a list of native calls, which must give what the model's modules give."""

from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_attn.backends import cpu
from fused_attn.nn import (
    FusedMultiheadAttention,
    Seq2SeqTransformer,
    StaticKVCache,
    TransformerDecoder,
    TransformerDecoderLayer,
    generation,
    native_layer,
)

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

SRC = torch.tensor([[4, 5, 6, 7, 8], [9, 4, 0, 0, 0], [5, 5, 9, 8, 0]])


class Model(Seq2SeqTransformer):
    """A model that counts the steps of its modules."""

    steps = 0

    def decode_hidden(self, tgt: Tensor, *args, **options) -> Tensor:
        self.steps += 1
        return super().decode_hidden(tgt, *args, **options)


def make_model(kind: type = Seq2SeqTransformer, seed: int = 0, **options) -> Seq2SeqTransformer:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": 48}
    model = kind(12, 30, **(sizes | options)).eval()
    with torch.no_grad():
        model.generator.bias[model.eos_id] -= 2.0  # longer targets
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets "record" whenever a step is recorded, and "run" whenever a recorded one runs."""
    events: list[str] = []
    record, run = native_layer.record, native_layer.RecordedStep.run

    def counted_record(*args) -> native_layer.RecordedStep | None:
        step = record(*args)
        if step is not None:
            events.append("record")
        return step

    def counted_run(step: native_layer.RecordedStep, tgt: Tensor) -> Tensor:
        events.append("run")
        return run(step, tgt)

    monkeypatch.setattr(native_layer, "record", counted_record)
    monkeypatch.setattr(native_layer.RecordedStep, "run", counted_run)
    return events


def generate_without_recording(model: Seq2SeqTransformer, *args, **options) -> generation.Generation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_layer, "record", lambda *args: None)
        return model.generate(*args, return_scores=True, **options)


MODELS = {
    "plain": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": F.silu},
    "learned positions": {"positional": "learned"},
    "shared keys": {"num_kv_heads": 2},
    "one layer": {"num_decoder_layers": 1},
}
SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sample": {"do_sample": True, "top_k": 5},
    "prefix": {"prefix": torch.tensor([[3, 4], [5, 0], [0, 0]])},
    "penalty": {"repetition_penalty": 1.3, "num_return_sequences": 1},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_what_the_modules_give(name: str, search: str, runs: list[str]) -> None:
    model = make_model(**MODELS[name]).double()
    torch.manual_seed(1)
    expected = generate_without_recording(model, SRC, 12, **SEARCHES[search])
    assert not runs
    torch.manual_seed(1)
    found = model.generate(SRC, 12, return_scores=True, **SEARCHES[search])
    assert runs.count("record") == 1 and runs.count("run") >= 3
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, runs: list[str]) -> None:
    model = make_model().to(dtype)
    expected = generate_without_recording(model, SRC, 8)
    found = model.generate(SRC, 8, return_scores=True)
    assert "run" in runs
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.log_probs[:, 0], expected.log_probs[:, 0], rtol=tolerance, atol=tolerance)


def test_it_is_recorded_again_when_the_cache_grows(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "FIRST_CAPACITY", 4)
    model = make_model()
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    expected = generate_without_recording(model, SRC, 20)
    found = model.generate(SRC, 20, return_scores=True)
    assert runs.count("record") == 3  # with room for 5, 10 and 20 tokens
    assert torch.equal(found.tokens, expected.tokens)


def test_a_step_after_the_first_one_calls_no_module_of_the_decoder(runs: list[str]) -> None:
    model = make_model(Model)
    model.generate(SRC, 10)
    assert not runs and model.steps >= 9, "a model with a decode_hidden of its own must be asked in every step"
    calls: list[str] = []
    code = TransformerDecoder.forward.__code__
    sys.setprofile(lambda frame, event, _: calls.append(event) if frame.f_code is code and event == "call" else None)
    try:
        make_model().generate(SRC, 10)
    finally:
        sys.setprofile(None)
    assert len(calls) == 1 and "run" in runs


class OtherLayer(TransformerDecoderLayer):
    pass


class OtherAttention(nn.Module):
    takes_cache = True


def with_hook(model: Seq2SeqTransformer, module: nn.Module) -> None:
    module.register_forward_hook(lambda module, arguments, out: None)


def with_other_layer(model: Seq2SeqTransformer) -> None:
    model.decoder.layers[1].__class__ = OtherLayer


def with_own_block(model: Seq2SeqTransformer) -> None:
    layer = model.decoder.layers[0]
    layer._ff_block = lambda x: 2 * type(layer)._ff_block(layer, x)


def with_own_decode(model: Seq2SeqTransformer) -> None:
    decode = model.decode_hidden
    model.decode_hidden = lambda *args, **options: 2 * decode(*args, **options)


def with_adapter(model: Seq2SeqTransformer) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True)

    model.decoder.layers[1].linear1.__class__ = Adapter


CHANGES = {
    "hook on the decoder": lambda model: with_hook(model, model.decoder),
    "hook on a layer": lambda model: with_hook(model, model.decoder.layers[1]),
    "hook on an attention": lambda model: with_hook(model, model.decoder.layers[0].multihead_attn),
    "hook on a projection": lambda model: with_hook(model, model.decoder.layers[0].self_attn.out_proj),
    "hook on a norm": lambda model: with_hook(model, model.decoder.layers[0].norm3),
    "hook on a dropout": lambda model: with_hook(model, model.decoder.layers[0].dropout3),
    "hook on a linear layer": lambda model: with_hook(model, model.decoder.layers[1].linear2),
    "another class of a layer": with_other_layer,
    "a block of its own": with_own_block,
    "a decode_hidden of its own": with_own_decode,
    "an adapter": with_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_modules_are_called_in_every_step(change: str, runs: list[str]) -> None:
    model = make_model().double()
    CHANGES[change](model)
    expected = generate_without_recording(model, SRC, 8)
    found = model.generate(SRC, 8, return_scores=True)
    assert not runs
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Seq2SeqTransformer, "decode_hidden"), (TransformerDecoder, "forward"), (TransformerDecoderLayer, "forward"),
        (TransformerDecoderLayer, "_mha_block"), (FusedMultiheadAttention, "forward"), (nn.LayerNorm, "forward"),
    ],
)  # fmt: skip
def test_a_patch_of_a_class_is_called_in_every_step(kind, name, runs: list[str], monkeypatch) -> None:
    model, method, calls = make_model(), getattr(kind, name), []
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    monkeypatch.setattr(kind, name, lambda self, *args, **options: calls.append(1) or method(self, *args, **options))
    model.generate(SRC, 9)
    assert len(calls) >= 9 and not runs


@pytest.mark.parametrize("has_hook", [False, True])
def test_the_cache_is_freed_when_the_generation_ends(has_hook: bool, monkeypatch) -> None:
    model = make_model()
    if has_hook:
        with_hook(model, model.decoder.layers[0].norm1)
    caches: list[weakref.ref] = []
    start = generation.Search.start_cache

    def start_cache(self, num_layers: int) -> None:
        start(self, num_layers)
        caches.append(weakref.ref(self.cache))

    monkeypatch.setattr(generation.Search, "start_cache", start_cache)
    gc.collect()
    gc.disable()
    try:
        model.generate(SRC, 5)
        assert caches[0]() is None
    finally:
        gc.enable()


def test_a_hook_runs_in_every_step(runs: list[str]) -> None:
    model = make_model()
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    shapes: list[torch.Size] = []
    model.decoder.layers[1].norm2.register_forward_hook(lambda module, arguments, out: shapes.append(out.shape))
    model.generate(SRC, 9)
    assert len(shapes) == 9 and not runs


def test_hooks_on_embedding_and_generator_run_in_every_step(runs: list[str]) -> None:
    """The recorded step is that of the decoder alone."""
    model = make_model()
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    seen: list[str] = []
    for module, name in ((model.tgt_embedding, "embedding"), (model.generator, "generator")):
        module.register_forward_hook(lambda module, arguments, out, name=name: seen.append(name))
    model.generate(SRC, 9)
    assert seen.count("embedding") == 9 and seen.count("generator") == 9 and runs.count("run") == 8


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_of_every_step(runs: list[str]) -> None:
    model = make_model()
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    with Operators() as mode:
        model.generate(SRC, 6)
    assert not runs
    assert sum("fused_attn" in name for name in mode.names) >= 6 * 2 * 2  # steps, layers, attentions


def test_a_step_in_a_mode_after_recorded_ones(runs: list[str]) -> None:
    """A mode that begins in a callback sees the steps that follow."""
    model = make_model().double()
    expected = generate_without_recording(model, SRC, 8)
    modes: list[Operators] = []

    def on_tokens(tokens: Tensor) -> None:
        if len(modes) == 0 and runs.count("run") == 3:
            modes.append(Operators())
            modes[0].__enter__()

    try:
        found = model.generate(SRC, 8, return_scores=True, on_tokens=on_tokens)
    finally:
        modes[0].__exit__(None, None, None)
    assert runs.count("run") == 3 and any("fused_attn" in name for name in modes[0].names)
    assert torch.equal(found.tokens, expected.tokens)


def test_a_profile_shows_the_calls_of_every_step(runs: list[str]) -> None:
    model = make_model()
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -math.inf
    with torch.profiler.profile() as profile:
        model.generate(SRC, 6)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fused_attn::attention_step[cpu]"] == 5 * 2 * 2


def test_the_number_of_threads_may_change_between_steps(runs: list[str]) -> None:
    model = make_model().double()
    before = torch.get_num_threads()
    expected = generate_without_recording(model, SRC, 8)
    counts: Iterator[int] = iter([1, 2] * 10)
    try:
        found = model.generate(SRC, 8, return_scores=True, on_tokens=lambda tokens: torch.set_num_threads(next(counts)))
    finally:
        torch.set_num_threads(before)
    assert "run" in runs and torch.equal(found.tokens, expected.tokens)


def test_weights_that_are_changed_in_place_count_at_once(runs: list[str]) -> None:
    model = make_model().double()

    def change(tokens: Tensor) -> None:
        model.decoder.layers[0].linear1.weight.mul_(1.5)

    state = {name: x.clone() for name, x in model.state_dict().items()}
    expected = generate_without_recording(model, SRC, 8, on_tokens=change)
    model.load_state_dict(state)
    found = model.generate(SRC, 8, return_scores=True, on_tokens=change)
    assert "run" in runs and torch.equal(found.tokens, expected.tokens)


# ---- TransformerDecoder.recorded_step itself


@torch.no_grad()
def test_a_decoder_step_by_hand() -> None:
    torch.manual_seed(0)
    layer = TransformerDecoderLayer(32, 4, 48, batch_first=False, dtype=torch.float64)
    decoder = TransformerDecoder(layer, 2, nn.LayerNorm(32, dtype=torch.float64)).eval()
    rows, memory = torch.randn(6, 1, 3, 32, dtype=torch.float64), torch.randn(5, 3, 32, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [4]])
    outs, caches = [], [StaticKVCache(2, 8) for _ in range(2)]
    options = {"memory_key_padding_mask": padding}
    for cache in caches:
        decoder(rows[0], memory, cache=cache, **options)
    step = decoder.recorded_step(rows[0], memory, padding, caches[0])
    assert step is not None
    for row in rows[1:]:
        outs.append(step(row).clone())
        torch.testing.assert_close(outs[-1], decoder(row, memory, cache=caches[1], **options))
    assert caches[0].position.tolist() == [6, 6, 6]


def test_no_step_is_recorded_with_gradients() -> None:
    decoder = TransformerDecoder(TransformerDecoderLayer(32, 4, 48, batch_first=True), 1).eval()
    row, memory, cache = torch.randn(2, 1, 32), torch.randn(2, 5, 32), StaticKVCache(1, 8)
    with torch.no_grad():
        decoder(row, memory, cache=cache)
        assert decoder.recorded_step(row, memory, None, cache) is not None
    assert decoder.recorded_step(row, memory, None, cache) is None


@torch.no_grad()
def test_no_step_is_recorded_before_the_first_one() -> None:
    decoder = TransformerDecoder(TransformerDecoderLayer(32, 4, 48, batch_first=True), 1).eval()
    assert decoder.recorded_step(torch.randn(2, 1, 32), torch.randn(2, 5, 32), None, StaticKVCache(1, 8)) is None


class Pair:
    """A decoder with two caches that hold the same rows. A step is recorded with the second one."""

    def __init__(self, rows: Tensor, batch: int = 4):
        torch.manual_seed(0)
        layer = TransformerDecoderLayer(32, 4, 48, batch_first=True)
        self.decoder = TransformerDecoder(layer, 2, nn.LayerNorm(32)).eval()
        self.memory = torch.randn(batch, 5, 32)
        self.own, self.recorded = StaticKVCache(2, 8), StaticKVCache(2, 8)
        for cache in (self.own, self.recorded):
            self.decoder(rows, self.memory, cache=cache)
        self.step = self.decoder.recorded_step(rows, self.memory, None, self.recorded)

    def forward(self, row: Tensor) -> Tensor:
        return self.decoder(row, self.memory, cache=self.own)


@torch.no_grad()
def test_a_row_with_other_strides_is_read_in_every_step() -> None:
    pair = Pair(torch.randn(32, 4).t()[:, None])
    for row in torch.randn(3, 4, 1, 32):
        torch.testing.assert_close(pair.step(row), pair.forward(row))


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda c: c.reorder(torch.tensor([1, 0, 3, 2])), lambda c: c.reserve(16)])
def test_a_step_whose_buffers_were_replaced_calls_forward_and_warns_once(change: Callable[[Any], None]) -> None:
    pair = Pair(torch.randn(4, 1, 32))
    change(pair.own)
    change(pair.recorded)
    rows = torch.randn(2, 4, 1, 32)
    with pytest.warns(UserWarning, match="record the step again"):
        torch.testing.assert_close(pair.step(rows[0]), pair.forward(rows[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(pair.step(rows[1]), pair.forward(rows[1]))
    assert pair.recorded.position.tolist() == [3] * 4


def test_a_recorded_step_does_what_forward_does_with_gradients_and_modes() -> None:
    with torch.no_grad():
        pair = Pair(torch.randn(4, 1, 32))
    with pytest.raises(ValueError, match="gradient"):
        pair.forward(torch.randn(4, 1, 32).requires_grad_())
    with pytest.raises(ValueError, match="gradient"):
        pair.step(torch.randn(4, 1, 32).requires_grad_())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair.step(torch.randn(4, 1, 32))
    assert counter.get_total_flops() > 0
    for call in (pair.forward, pair.step):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match=r"got torch\.bfloat16"),
        ):
            call(torch.randn(4, 1, 32))


def test_a_step_recorded_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        pair = Pair(torch.randn(4, 1, 32))
    row = torch.randn(4, 1, 32)
    outcomes = []
    for call in (pair.forward, pair.step):
        try:
            with torch.no_grad():
                outcomes.append(call(row))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])


@torch.no_grad()
@pytest.mark.parametrize("row", [torch.randn(1, 1, 32), torch.randn(4, 1, 32).double(), torch.randn(32)])
def test_a_row_of_another_kind_is_refused_as_by_forward(row: Tensor) -> None:
    pair = Pair(torch.randn(4, 1, 32))
    errors = []
    for call in (pair.forward, pair.step):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as caught:
            call(row)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@torch.no_grad()
def test_a_failed_step_leaves_the_cache_as_it_was() -> None:
    pair = Pair(torch.randn(4, 1, 32))
    row = torch.randn(4, 1, 32)
    handle = pair.decoder.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.step(row)
    handle.remove()
    torch.testing.assert_close(pair.step(row), pair.forward(row))
    assert pair.recorded.position.tolist() == [2] * 4


@torch.no_grad()
def test_a_cache_of_another_decoder_is_refused() -> None:
    pair = Pair(torch.randn(4, 1, 32))
    row = torch.randn(4, 1, 32)
    with pytest.raises(TypeError, match="cache: expected a KVCache, got NoneType"):
        pair.decoder.recorded_step(row, pair.memory, None, None)
    with pytest.raises(ValueError, match="cache: expected one for 2 layers, got one for 3"):
        pair.decoder.recorded_step(row, pair.memory, None, StaticKVCache(3, 8))


@torch.no_grad()
def test_tokens_of_another_batch_than_the_cache_are_refused() -> None:
    model = Seq2SeqTransformer(20, 20, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1).eval()
    tokens, memory, cache = torch.randint(4, 20, (4, 1)), torch.randn(4, 5, 32), StaticKVCache(1, 8)
    model.decode(tokens, memory, None, cache=cache)
    with pytest.raises(ValueError, match="tgt: expected the batch size of the cache, 4, got 1"):
        model.decode(tokens[:1], memory, None, cache=cache)


@torch.no_grad()
def test_a_full_cache_is_refused_by_the_recorded_step_as_by_forward() -> None:
    decoder = TransformerDecoder(TransformerDecoderLayer(32, 4, 48, batch_first=True), 1).eval()
    row, memory, cache = torch.randn(2, 1, 32), torch.randn(2, 5, 32), StaticKVCache(1, 3)
    decoder(row, memory, cache=cache)
    step = decoder.recorded_step(row, memory, None, cache)
    step(row)
    step(row)
    with pytest.raises(ValueError, match="cache"):
        step(row)
