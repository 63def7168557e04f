"""transformers models on the fused kernel against the same models on transformers' eager attention."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import io
import pathlib
import re
import types
import warnings

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")

import models  # noqa: E402
from models import BATCH, BY_ID, CASES, LENGTH, SOURCE_LENGTH, Case, results  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from fused_attn.backends import cpu  # noqa: E402
from fused_attn.integrations import huggingface, huggingface_masks  # noqa: E402
from fused_attn.integrations.huggingface_models import INTERFACE  # noqa: E402

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
MODEL_FILES = sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
SIDES = [
    pytest.param(case, side, id=f"{case.id}-{side}" if side else case.id)
    for case in CASES
    for side in ((None,) if case.kind == "image" else ("left", "right"))
]
GENERATING = [case for case in CASES if case.kind in ("decoder", "both", "audio")]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, because a model calls hundreds of tiny kernels. Eager attention computes its softmax in float64."""
    transformers.utils.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.nn.functional, "softmax", models.exact_softmax(torch.nn.functional.softmax))
    yield
    torch.set_num_threads(threads)


def eager(case: Case, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return case.build(dtype, attn_implementation="eager")


def fused(case: Case, dtype: torch.dtype = torch.float32, backend: str | None = None) -> torch.nn.Module:
    return huggingface.enable(case.build(dtype), backend)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A list that gets the arguments of every call of `fused_attention`."""
    seen = []

    def spy(query, key, value, **options):
        seen.append({"query": query, "key": key, **options})
        return fused_attention(query, key, value, **options)

    fused_attention = huggingface.fused_attention
    monkeypatch.setattr(huggingface, "fused_attention", spy)
    return seen


# ---- The matrix: outputs, every parameter's gradient, and tokens


@pytest.mark.parametrize(("case", "side"), SIDES)
def test_equals_eager_in_float64(case: Case, side: str | None, backend: str) -> None:
    inputs = case.inputs(side, torch.float64)
    expected = results(eager(case, torch.float64), case, inputs)
    found = results(fused(case, torch.float64, backend), case, inputs)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0.0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("case", "side"), SIDES)
def test_float32_is_as_exact_as_eager(case: Case, side: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernel runs once for each attention layer, and is about as exact as eager attention."""
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    kernel_calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: (kernel_calls.append(args[0]), forward(*args))[1])
    three = eager(case, torch.float64), eager(case), fused(case, backend="cpu")
    assert_no_worse(case, side, three, contextlib.nullcontext())
    assert len(kernel_calls) == SEEDS * case.calls


SEEDS = 6


def assert_no_worse(case: Case, side: str | None, three: tuple[torch.nn.Module, ...], mode) -> None:
    """Asserts that our error is at most 1.5 times that of eager attention.

    three: the model in float64, the model on eager attention, and the model on ours. The errors are compared over
    several inputs, because for one input it is chance which of the two is smaller. All gradients are compared as one
    vector, because some of them, such as those of a bias of keys, consist of rounding errors alone.
    """
    squares = {}
    for seed in range(SEEDS):
        exact = results(three[0], case, case.inputs(side, torch.float64, seed))
        with mode:
            found = [results(model, case, case.inputs(side, seed=seed)) for model in three[1:]]
        for what in ("outputs", "gradients"):
            names = [name for name in exact if name.startswith("d ") == (what == "gradients")]
            truth = torch.cat([exact[name].flatten() for name in names])
            errors = [torch.cat([values[name].flatten() for name in names]) - truth for values in found]
            squares.setdefault(what, []).append([error.square().sum() / truth.square().sum() for error in errors])
    for what, pairs in squares.items():
        theirs, ours = torch.tensor(pairs).sum(0).sqrt()
        assert ours <= 1.5 * theirs, what


@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.id)
def test_generates_the_same_tokens(case: Case, backend: str) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = {k: v for k, v in case.inputs("left", dtype).items() if not k.startswith("decoder")}
    pair = eager(case, dtype), fused(case, dtype, backend)
    for options in (
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        if case.id == "umt5" and options == {"use_cache": False} and VERSION < (5, 23):
            continue  # up to 5.17, its decoder is not causal with "sdpa" either
        expected, found = (
            model.generate(
                **inputs, **options, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            for model in pair
        )
        assert torch.equal(found.sequences, expected.sequences), options
        # Logits are compared as well, because equal tokens would hide small errors.
        atol = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0.0, atol=atol)


@pytest.mark.parametrize("case", [case for case in CASES if case.id != "gpt-1"], ids=lambda case: case.id)
def test_by_name_alone(case: Case) -> None:
    """The kernel is chosen by `attn_implementation=...`, as in `from_pretrained`. T5's bias is then a dense bias."""
    inputs = case.inputs(None if case.kind == "image" else "left", torch.float64)
    expected = results(eager(case, torch.float64), case, inputs)
    found = results(case.build(torch.float64, attn_implementation="fused_attn.reference"), case, inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0.0, atol=1e-9)


# GPT-1 has no cache, and transformers offers no assisted decoding without one.
ASSISTED = [case for case in GENERATING if case.kind in ("decoder", "both") and case.id != "gpt-1"]


@pytest.mark.parametrize("case", ASSISTED, ids=lambda case: case.id)
def test_assisted_decoding_gives_the_same_tokens(case: Case, backend: str) -> None:
    """The model reads several drafted tokens at once, and crops the cache behind the accepted ones."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = {name: x[:1] for name, x in case.inputs(None, dtype).items() if not name.startswith("decoder")}
    plain, model = eager(case, dtype), fused(case, dtype, backend)
    expected = plain.generate(**inputs, max_new_tokens=9, do_sample=False)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": fused(case, dtype, backend)}):
        if case.id == "bart" and "prompt_lookup_num_tokens" in options and VERSION < (5, 18):
            continue  # 5.17 stops after one token, with eager attention, too
        assert torch.equal(model.generate(**inputs, **options, max_new_tokens=9, do_sample=False), expected), options


@torch.no_grad()
def test_a_static_cache_tells_its_lengths(calls: list[dict]) -> None:
    """Steps with a static cache and no padding: the kernel gets a length for each sequence, and no mask of all keys."""
    case = BY_ID["llama"]
    model, tokens = fused(case), case.inputs(None)["input_ids"]
    full = model(tokens).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 5)
    logits, start = [], 0
    for count in (2, 1, 3, tokens.shape[1] - 6):
        calls.clear()
        logits.append(model(tokens[:, start : start + count], past_key_values=cache, use_cache=True).logits)
        for call in calls if start else ():
            assert call.get("key_padding_mask") is None
            assert call["key_lengths"].tolist() == [start + count] * len(tokens)
            assert call.get("attn_mask") is None
            assert call.get("diagonal_alignment", "upper_left") == ("upper_left" if count == 1 else "lower_right")
        start += count
    torch.testing.assert_close(torch.cat(logits, dim=1), full)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma-2", "gpt-oss"])
@torch.no_grad()
def test_sliding_caches_reach_the_kernel(name: str, kind: str, calls: list[dict], backend: str) -> None:
    """transformers' caches of sliding layers forget rows, or overwrite them. The kernel reads only rows that are left,
    and the logits are those without a cache, before and after the caches wrap around."""
    case = BY_ID[name]
    model = fused(case, torch.float64, backend)
    generator = torch.Generator().manual_seed(0)
    tokens, window = torch.randint(3, models.VOCAB, (BATCH, 17), generator=generator), case.settings["sliding_window"]
    full = model(tokens, use_cache=False).logits
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    else:
        cache = transformers.DynamicCache(config=model.config)
    logits, start = [], 0
    for count in (2, 1, 1, 1, 1, 3, 1, 6, 1):
        calls.clear()
        logits.append(model(tokens[:, start : start + count], past_key_values=cache, use_cache=True).logits)
        start += count
        kinds = [type(layer).__name__ for layer in cache.layers]
        assert len(calls) == len(kinds) and any("Sliding" in kind for kind in kinds)
        for call, layer in zip(calls, kinds, strict=True):
            if "Sliding" in layer:
                assert call["key"].shape[2] <= window + count - 1
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=0.0, atol=1e-9)


@pytest.mark.skipif(VERSION < (5, 23), reason="earlier versions check the name of the attention elsewhere")
def test_transformers_refuses_continuous_batching() -> None:
    """transformers allows only names of its own attention there, so nothing can reach our attention function."""
    model = fused(BY_ID["llama"])
    inputs = BY_ID["llama"].inputs(None)["input_ids"].tolist()
    with pytest.raises(ValueError, match="Implementation fused_attn is not supported for continuous batching"):
        model.generate_batch(inputs, generation_config=model.generation_config)


# ---- Masks


@pytest.mark.parametrize(("case", "side"), [p for p in SIDES if p.values[1] == "left"])
def test_masks_take_memory_linear_in_the_length(case: Case, side: str, calls: list[dict]) -> None:
    fused(case)(**case.inputs(side))
    assert len(calls) == case.calls
    for call in calls:
        seqlen_q, seqlen_k = call["query"].shape[2], call["key"].shape[2]
        tensors = [x for name, x in call.items() if isinstance(x, Tensor) and name not in ("query", "key", "sinks")]
        for x in tensors:
            assert x.numel() <= max(BATCH, call["query"].shape[1]) * (seqlen_q + seqlen_k)
        is_padded = case.kind != "audio" or call["is_causal"]
        assert is_padded == (call.get("key_padding_mask") is not None)


def test_rows_that_see_nothing_stay_finite() -> None:
    """With left padding and a causal mask, some queries see no key. Their output is not used, but must not be NaN."""
    for name in ("llama", "gpt-1", "modernbert", "t5"):
        model = fused(BY_ID[name])
        out = model(**BY_ID[name].inputs("left"))
        assert out.logits.isfinite().all()
        out.logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma-2", "gpt-oss"])
def test_a_prompt_in_pieces(name: str) -> None:
    """Several queries after a cache need a dense mask, because neither kind of causal mask describes what they see."""
    case = BY_ID[name]
    inputs = case.inputs("left", torch.float64)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = []
    for model in (eager(case, torch.float64), fused(case, torch.float64, "reference")):
        first = model(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = model(tokens[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        logits.append(torch.cat((first.logits, second.logits), dim=1)[mask.bool()])
    torch.testing.assert_close(*logits, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "bert-cls", "t5"])
def test_a_mask_of_the_caller(name: str, kind: str) -> None:
    case = BY_ID[name]
    inputs = case.inputs("right", torch.float64)
    length = inputs["input_ids"].shape[1]
    sees = torch.rand(BATCH, 1, length, length, generator=torch.Generator().manual_seed(0)) < 0.6
    sees |= torch.eye(length, dtype=torch.bool)
    added = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    outputs = []
    for build, mask in ((eager, added), (fused, sees if kind == "bool" else added)):
        model = build(case, torch.float64)
        model = model.encoder if name == "t5" else model.base_model
        outputs.append(model(inputs["input_ids"], mask).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=0.0, atol=1e-9)


T5GEMMA = models.DECODER | {"sliding_window": 4, "query_pre_attn_scalar": 8}


@pytest.mark.parametrize(
    "case",
    [
        # Makes a mask with a window, but does not pass the window to its attention function.
        Case(
            "phimoe", "PhimoeForCausalLM", "PhimoeConfig",
            models.DECODER | {"sliding_window": 4, "num_local_experts": 2, "experts_implementation": "eager"},
            "decoder",
        ),
        # Shortens its masks in the last of four dimensions.
        Case(
            "pix2struct", "Pix2StructTextModel", "Pix2StructTextConfig",
            models.SMALL | {"hidden_size": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
                            "initializer_range": 0.02}, "decoder",
        ),
        # The attention of its decoder has no attribute is_causal = True.
        Case("nllb-moe", "NllbMoeForConditionalGeneration", "NllbMoeConfig",
             models.BOTH | {"num_experts": 2, "encoder_sparse_step": 3, "decoder_sparse_step": 3}, "both"),
        # Its windows reach to both sides, and as far as the configuration says. Other models reach one key less.
        Case("t5gemma", "T5GemmaForConditionalGeneration", "T5GemmaConfig",
             {"encoder": T5GEMMA, "decoder": T5GEMMA, "vocab_size": models.VOCAB}, "both"),
        Case("mistral-not-causal", "MistralModel", "MistralConfig",
             models.DECODER | {"sliding_window": 4, "is_causal": False}, "encoder", logits=("last_hidden_state",)),
        Case("gemma-2-not-causal", "Gemma2Model", "Gemma2Config",
             models.DECODER | {"sliding_window": 4, "is_causal": False}, "encoder", logits=("last_hidden_state",)),
        # Its file also has another kind of attention, which cannot read these masks.
        Case("longt5", "LongT5ForConditionalGeneration", "LongT5Config",
             models.T5 | {"local_radius": 3}, "both"),
    ],
    ids=lambda case: case.id,
)  # fmt: skip
@pytest.mark.parametrize("side", [None, "left"])
def test_models_that_treat_masks_otherwise(case: Case, side: str | None) -> None:
    inputs = case.inputs(side, torch.float64)
    if side is None:  # without padding, many masks are not made
        inputs = {name: x for name, x in inputs.items() if not name.endswith("attention_mask")}
    expected = results(eager(case, torch.float64), case, inputs)
    found = results(fused(case, torch.float64, "reference"), case, inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0.0, atol=1e-9)


def test_a_decoder_without_tokens_is_causal() -> None:
    """Informer's decoder has no tokens. It makes a causal mask, but its layers do not say that they are causal."""
    outputs = []
    for name in ("eager", "fused_attn.reference"):
        torch.manual_seed(0)
        config = transformers.InformerConfig(
            prediction_length=4, context_length=8, lags_sequence=[1], d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            num_time_features=1, distil=False, attention_type="full", attn_implementation=name,
        )  # fmt: skip
        model = transformers.InformerModel(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn(parameter.shape)
        out = model(
            past_values=torch.randn(2, 9), past_time_features=torch.randn(2, 9, 1), past_observed_mask=torch.ones(2, 9),
            future_values=torch.randn(2, 4), future_time_features=torch.randn(2, 4, 1),
        )  # fmt: skip
        outputs.append(out[0])
    torch.testing.assert_close(*outputs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("side", [None, "left"])
def test_rows_that_a_model_cuts_out_of_its_masks(side: str | None) -> None:
    """Gemma 4 computes its last layers only for the rows in `logits_to_keep`, so it selects rows of a mask."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    case = Case(
        "gemma-4", "Gemma4ForCausalLM", "Gemma4TextConfig",
        models.DECODER | {"sliding_window": 64, "num_kv_shared_layers": 2, "num_hidden_layers": 4,
                          "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8,
                          "vocab_size_per_layer_input": models.VOCAB, "hidden_size_per_layer_input": 8}, "decoder",
    )  # fmt: skip
    inputs = case.inputs(side)
    if side is None:
        del inputs["attention_mask"]
    expected, found = (
        model(**inputs, logits_to_keep=3).logits for model in (eager(case), fused(case, backend="reference"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(VERSION < (5, 23), reason="in earlier versions, Doge misreads the masks of sdpa, too")
@torch.no_grad()
def test_a_static_cache_of_a_model_that_lays_its_own_mask_over_ours() -> None:
    settings = {name: value for name, value in models.DECODER.items() if name != "head_dim"} | {"keep_window_size": 3}
    case = Case("doge", "DogeForCausalLM", "DogeConfig", settings, "decoder")
    tokens, logits = case.inputs(None)["input_ids"], []
    for model in (case.build(attn_implementation="sdpa"), fused(case)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        parts = (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7])
        logits.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(VERSION < (5, 23), reason="in earlier versions, Doge misreads the masks of sdpa, too")
@torch.no_grad()
def test_packed_positions_of_a_model_that_lays_its_own_mask_over_ours() -> None:
    settings = {name: value for name, value in models.DECODER.items() if name != "head_dim"} | {"keep_window_size": 3}
    case = Case("doge", "DogeForCausalLM", "DogeConfig", settings, "decoder")
    positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5))).expand(BATCH, -1)
    tokens = case.inputs(None)["input_ids"]
    logits = [
        model(tokens, position_ids=positions, use_cache=False).logits
        for model in (case.build(attn_implementation="sdpa"), fused(case))
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_masks_of_three_dimensions_are_nobodys() -> None:
    mask = torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool).tril()
    for name in ("mistral", "bert-cls"):
        model = fused(BY_ID[name]).base_model
        with pytest.raises(ValueError, match=r"attention_mask: expected \(B, S\) or \(B, 1, L, S\), got \(2, 9, 9\)"):
            model(BY_ID[name].inputs(None)["input_ids"], attention_mask=mask)


def test_chunks_are_not_taken_for_windows() -> None:
    case = Case(
        "llama-4", "Llama4ForCausalLM", "Llama4TextConfig",
        models.DECODER | {"attention_chunk_size": 4, "intermediate_size_mlp": 40, "num_local_experts": 2,
                          "experts_implementation": "eager", "sliding_window": 4}, "decoder",
    )  # fmt: skip
    inputs = case.inputs("left", torch.float32)
    expected = results(eager(case), case, inputs)
    found = results(fused(case, backend="reference"), case, inputs)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


# ---- Packed sequences


@pytest.mark.parametrize("name", ["llama", "mistral", "bert-cls", "modernbert"])
def test_packed_sequences(name: str) -> None:
    """Two sequences in one row with cu_seq_lens give what each sequence gives alone."""
    case = BY_ID[name]
    model = fused(case, torch.float64)
    backbone = model.base_model
    tokens = case.inputs(None)["input_ids"]
    alone = [backbone(tokens[:1]), backbone(tokens[1:, :6])]
    offsets = torch.tensor([0, LENGTH, LENGTH + 6], dtype=torch.int32)
    packed = backbone(
        torch.cat((tokens[:1], tokens[1:, :6]), dim=1),
        position_ids=torch.cat((torch.arange(LENGTH), torch.arange(6)))[None],
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=LENGTH,
        max_length_k=LENGTH,
    )
    expected = torch.cat([out.last_hidden_state for out in alone], dim=1)
    torch.testing.assert_close(packed.last_hidden_state, expected, rtol=0.0, atol=1e-9)


def packed_call(case: Case, prepare=lambda model: model, **kwargs) -> Tensor:
    """The hidden states of two sequences in one row."""
    offsets = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
    positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5)))[None]
    packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    model = prepare(fused(case, torch.float64).base_model)
    tokens = case.inputs(None)["input_ids"][:1]
    return model(tokens, position_ids=positions, **packing, **kwargs).last_hidden_state


PHIMOE = Case(
    "phimoe", "PhimoeForCausalLM", "PhimoeConfig",
    models.DECODER | {"sliding_window": 3, "num_local_experts": 2, "experts_implementation": "eager"}, "decoder",
)  # fmt: skip


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("case", [BY_ID["llama"], BY_ID["mistral"], PHIMOE], ids=lambda case: case.id)
@torch.no_grad()
def test_packed_sequences_with_positions(case: Case, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask shows whether there is a window. Phimoe's layers do not pass their window."""
    windows = []
    varlen = huggingface.fused_attention_varlen
    monkeypatch.setattr(
        huggingface,
        "fused_attention_varlen",
        lambda *args, **options: (windows.append(options.get("window_size")), varlen(*args, **options))[1],
    )
    model = fused(case, torch.float64).base_model
    tokens = case.inputs(None)["input_ids"][:1]
    alone = torch.cat([model(part).last_hidden_state for part in (tokens[:, :5], tokens[:, 5:])], dim=1)
    torch.testing.assert_close(packed_call(case, use_cache=use_cache), alone, rtol=0.0, atol=1e-9)
    window = case.settings.get("sliding_window")
    assert windows == 2 * [None if window is None else (window - 1, 0)]


@torch.no_grad()
def test_packed_sequences_while_torch_compiles() -> None:
    """Compiled code cannot see what a mask function consists of, so the mask stays dense."""
    case = dataclasses.replace(BY_ID["mistral"], settings=BY_ID["mistral"].settings | {"num_hidden_layers": 1})
    expected = packed_call(case, use_cache=False)
    found = packed_call(case, lambda m: torch.compile(m, fullgraph=True, backend="eager"), use_cache=False)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)


GEMMA3 = {
    "text_config": models.DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 8,
                                     "layer_types": ["sliding_attention", "full_attention"]},
    "vision_config": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
                      "image_size": 16, "patch_size": 4},
    "image_token_index": 90, "boi_token_index": 88, "eoi_token_index": 89, "mm_tokens_per_image": 4,
}  # fmt: skip


@torch.no_grad()
def test_packed_sequences_with_an_image() -> None:
    """The tokens of an image see one another, although the rest of the sequence is causal."""
    case = Case("gemma-3", "Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3, "decoder")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 80, (1, 15), generator=generator)
    tokens[:, 2:6] = 90
    images = torch.randn(1, 3, 16, 16, generator=generator)
    inputs = {"pixel_values": images, "token_type_ids": (tokens == 90).long(), "use_cache": False}
    model, expected = fused(case), eager(case)(tokens, **inputs).logits
    for ends in ([15], [9, 15]):
        offsets = torch.tensor([0, *ends], dtype=torch.int32)
        packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 15, "max_length_k": 15}
        found = model(tokens, **inputs, **packing).logits
        torch.testing.assert_close(found[:, : ends[0]], expected[:, : ends[0]], rtol=1e-4, atol=1e-4)
    alone = eager(case)(tokens[:, 9:], use_cache=False).logits
    torch.testing.assert_close(found[:, 9:], alone, rtol=1e-4, atol=1e-4)


def test_packed_sequences_take_no_chunks() -> None:
    settings = {"attention_chunk_size": 4, "intermediate_size_mlp": 40, "num_local_experts": 2}
    case = Case("llama-4", "Llama4ForCausalLM", "Llama4TextConfig", models.DECODER | settings, "decoder")
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected None for chunked attention in Llama4TextAttention"):
        packed_call(case, use_cache=False)


@pytest.mark.parametrize("name", ["bert-cls", "llama", "mistral"])
def test_packed_sequences_take_no_padding(name: str) -> None:
    padding = torch.ones(1, LENGTH, dtype=torch.long)
    padding[0, -4:] = 0
    with pytest.raises(ValueError, match="attention_mask: expected no padding and no additive mask with cu_seq_lens_q"):
        packed_call(BY_ID[name], attention_mask=padding)


@pytest.mark.parametrize("case", [BY_ID["llama"], BY_ID["mistral"], PHIMOE], ids=lambda case: case.id)
def test_packed_sequences_by_positions_alone(case: Case, calls: list[dict]) -> None:
    """Each row has sequences of its own. Their mask takes O(B L) memory."""
    tokens = case.inputs(None)["input_ids"]
    lengths = ([5, LENGTH - 5], [2, 1, LENGTH - 3])[:BATCH]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    expected, found = (
        model(tokens, position_ids=positions, use_cache=False).logits
        for model in (eager(case, torch.float64), fused(case, torch.float64))
    )
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)
    window = case.settings.get("sliding_window")
    band = {"is_causal": True} if window is None else {"window_size": (window - 1, 0)}
    for call in calls:
        assert call["key_ranges"].shape == (BATCH, 1, LENGTH, 1, 2)
        assert call["key_ranges"].untyped_storage().nbytes() == BATCH * LENGTH * 2 * 4
        assert call.keys() & {"attn_mask", "is_causal", "window_size"} == band.keys()
        assert band.items() <= call.items()
    assert calls


@torch.no_grad()
def test_sequences_of_the_callers_own_mask_may_return() -> None:
    """Equal ids see each other, also if other ids stand between them. So the ids are no sequences."""
    config = fused(BY_ID["llama"]).config
    ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2]])
    own = masking_utils.packed_sequence_mask_function(ids)
    mask = masking_utils.create_causal_mask(config, torch.zeros(1, 7, 32), None, None, and_mask_function=own)
    expected = (ids[:, :, None] == ids[:, None]).tril()[:, None]
    assert torch.equal(huggingface_masks.masks_of(None, mask, torch.zeros(1, 1, 7, 8), False)["attn_mask"], expected)


# ---- The bias of T5


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
def test_t5_has_one_bias_for_each_distance(name: str, calls: list[dict]) -> None:
    case = BY_ID[name]
    fused(case)(**case.inputs("left"))
    shapes = [None if call.get("relative_bias") is None else call["relative_bias"].shape for call in calls]
    heads = case.settings["num_heads"]
    encoder, decoder = (heads, 2 * SOURCE_LENGTH - 1), (heads, 2 * LENGTH - 1)
    assert shapes == [encoder, encoder, decoder, None, decoder, None]


def test_t5_goes_back_to_eager() -> None:
    case = BY_ID["t5"]
    inputs = case.inputs("left", torch.float64)
    expected = results(eager(case, torch.float64), case, inputs)
    model = fused(case, torch.float64, "reference")
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.set_attn_implementation("eager")
    found = results(model, case, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("name", ["t5", "gpt-1", "llama"])
def test_copies_and_pickles(name: str) -> None:
    case = BY_ID[name]
    model, inputs = fused(case), case.inputs("left")
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(next(m for m in other.modules() if "Attention" in type(m).__name__)).__mro__ == (
            type(next(m for m in model.modules() if "Attention" in type(m).__name__)).__mro__
        )
        assert torch.equal(other(**inputs).logits, expected)


# ---- Options of a call


@pytest.mark.parametrize("name", ["gpt-1", "bert-cls", "t5", "llama"])
def test_dropout_is_that_of_the_model(name: str, calls: list[dict]) -> None:
    case = BY_ID[name]
    model = fused(case)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.25
            elif isinstance(getattr(module, "dropout", None), torch.nn.Dropout):
                module.dropout.p = 0.25
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.25
            else:
                module.dropout = 0.25
    inputs = case.inputs("left")
    model.eval()(**inputs)
    assert {call["dropout_p"] for call in calls} == {0.0}
    calls.clear()
    model.train()(**inputs)
    assert {call["dropout_p"] for call in calls} == {0.25}


@pytest.mark.parametrize(
    ("name", "use_cache"), [("t5", True), ("llama", True), ("llama", False), ("bert-pretraining", False)]
)
def test_autocast(name: str, use_cache: bool) -> None:
    """Under autocast, keys and values have different dtypes, and T5's bias is float32."""
    case = BY_ID[name]
    three = eager(case, torch.float64), eager(case), fused(case)
    for model in three:
        model.config.use_cache = use_cache
    assert_no_worse(case, "left", three, torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert-cls", "t5", "llama"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    case = BY_ID[name]
    inputs = case.inputs("left", torch.float64)
    model = fused(case, torch.float64).train()
    expected = results(model, case, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = results(model, case, inputs)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0.0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace`:DeprecationWarning")
def test_jit_trace() -> None:
    """In a trace, the sizes of a tensor are tensors."""
    case = BY_ID["bert-cls"]
    model, inputs = fused(case), case.inputs("left")
    model.config.return_dict = False
    traced = torch.jit.trace(model, (inputs["input_ids"], inputs["attention_mask"]), check_trace=False, strict=False)
    other = case.inputs("left", seed=2)
    torch.testing.assert_close(traced(other["input_ids"], other["attention_mask"])[0], model(**other)[0])


# ---- Trainer


def test_trainer_with_dynamic_padding(tmp_path) -> None:
    """Each batch is padded to its own longest row. The losses are those of eager attention."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it; pip install -e .[test]")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    case = BY_ID["bert-cls"]
    words = Tokenizer(WordLevel({"[PAD]": 0, **{f"w{i}": i for i in range(1, models.VOCAB)}}, unk_token="[PAD]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(2, 20, (16,), generator=generator).tolist():
        ids = torch.randint(1, models.VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids[0] % 2})
    curves = []
    for model in (eager(case), fused(case)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 8 and curves[0][-1] != curves[0][0]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)


# ---- Refusals

OWN_ATTENTION = {
    "MPNetForMaskedLM": ("MPNetConfig", models.ENCODER),
    "BloomForCausalLM": ("BloomConfig", models.SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", models.ENCODER),
    "GPTNeoForCausalLM": ("GPTNeoConfig", models.SMALL | {"hidden_size": 32, "num_layers": 2, "num_heads": 4,
                          "attention_types": [[["global", "local"], 1]]}),
    "FalconForCausalLM": ("FalconConfig", models.ENCODER),
    # These classes use the attention interface for some of their attention, but not for all.
    "BigBirdPegasusForConditionalGeneration": ("BigBirdPegasusConfig", models.BOTH | {"max_position_embeddings": 64,
                                               "attention_type": "original_full"}),
    "GitForCausalLM": ("GitConfig", models.ENCODER | {"vision_config": {"hidden_size": 32, "intermediate_size": 40,
                       "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}}),
    "InformerModel": ("InformerConfig", {"prediction_length": 4, "context_length": 8, "lags_sequence": [1],
                      "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "attention_type": "prob"}),
    # This model appends columns of numbers to its masks.
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", models.ENCODER | {
        "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 4, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["moe"] * 2}),
    "Gemma4AudioModel": ("Gemma4AudioConfig", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_attention_of_their_own_are_refused(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config, settings = OWN_ATTENTION[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings, attn_implementation="eager"))
    with pytest.raises(ValueError, match=rf"{name}.*own attention"):
        huggingface.enable(torch.nn.ModuleDict({"one": BY_ID["bert-cls"].build(), "other": model}))
    assert model.config._attn_implementation == "eager"


#: Classes that compute a softmax of their own, in files that also make masks for the interface. Only other classes of
#: these files get these masks.
FOUND_HARMLESS = {
    "Apertus1p5VisionTokenizerAttnBlock", "ChameleonVQVAEEncoderAttnBlock", "ClapAudioSelfAttention",
    "ConditionalDetrMHAttentionMap",
    "DeepseekOcr2SamVisionAttention", "DetrMHAttentionMap", "EsmFold2RowAttentionPooling",
    "EvollaSequenceCompressorAttention", "Gemma3nAudioAttention", "LongT5LocalAttention",
    "LongT5TransientGlobalAttention", "MaskFormerDetrMHAttentionMap", "PegasusXGlobalLocalAttention",
    "PPDocLayoutV2MultiscaleDeformableAttention", "PPFormulaNetVisionAttention", "UnlimitedOcrSamVisionAttention",
}  # fmt: skip
REFUSED_CLASSES = {
    "BigBirdPegasusSelfAttention", "BigBirdPegasusBlockSparseAttention", "BigBirdPegasusEncoderAttention",
    "Gemma4AudioAttention", "GitSelfAttention", "InformerProbSparseAttention",
}  # fmt: skip


SAM_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
              "output_channels": 32, "mlp_dim": 40, "global_attn_indexes": [1], "window_size": 2}  # fmt: skip


def test_a_part_whose_file_uses_the_interface_elsewhere() -> None:
    """SAM's file uses the interface for the decoder, but the image encoder has attention of its own."""
    config = transformers.SamConfig(
        vision_config=SAM_VISION,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 4, "iou_head_hidden_dim": 16,
                             "attention_downsample_rate": 2},
        attn_implementation="eager",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model: expected.*SamVisionAttention, whose own attention"):
        huggingface.enable(transformers.SamVisionModel(config.vision_config))
    with pytest.warns(UserWarning, match="model: these classes keep attention of their own: SamVisionAttention"):
        huggingface.enable(transformers.SamModel(config))


def own_forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    """Attention by its formula, as a user may write it into a Llama."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    scores = query @ key.repeat_interleave(self.num_key_value_groups, 1).mT * self.scaling
    scores = scores if attention_mask is None else scores + attention_mask
    out = torch.softmax(scores, -1) @ value.repeat_interleave(self.num_key_value_groups, 1)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("layers", [slice(None), slice(1, 2)], ids=["all layers", "one layer"])
@pytest.mark.parametrize("how", ["a subclass", "a method of the instance"])
def test_a_replaced_forward_is_attention_of_its_own(how: str, layers: slice) -> None:
    model = eager(BY_ID["llama"])
    own_class = type("OwnAttention", (modeling_llama.LlamaAttention,), {"forward": own_forward})
    for layer in model.model.layers[layers]:
        if how == "a subclass":
            layer.self_attn.__class__ = own_class
        else:
            layer.self_attn.forward = types.MethodType(own_forward, layer.self_attn)
    name = "OwnAttention" if how == "a subclass" else "LlamaAttention"
    with pytest.raises(ValueError, match=f"model: expected.*got {name}, whose own attention"):
        huggingface.enable(model)
    assert model.config._attn_implementation == "eager"


def test_a_wrapped_forward_is_the_attention_that_it_wraps() -> None:
    """Such as the hooks of accelerate, and subclasses that call the forward of their class."""
    case = BY_ID["llama"]
    expected = results(fused(case), case, case.inputs(None))
    model = eager(case)

    class WithSuper(modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            torch.softmax(torch.zeros(3), -1)  # such as statistics
            return super().forward(*args, **kwargs)

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    first.__class__ = WithSuper
    second.forward = functools.update_wrapper(functools.partial(second.forward), second.forward)
    found = results(huggingface.enable(model), case, case.inputs(None))
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_attention_that_adds_our_masks_to_its_scores_raises() -> None:
    """Sizes of 1 would broadcast to wrong results."""
    numbers = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu"}
    padding = torch.ones(2, 6, dtype=torch.bool)
    for mask in (
        huggingface_masks.attention_mask_of(**numbers),
        huggingface_masks.attention_mask_of(**numbers, attention_mask=padding),
        huggingface_masks.attention_mask_of(**numbers | {"q_length": 1, "q_offset": torch.tensor(5)}),
    ):
        assert mask.ndim == 5
        with pytest.raises(RuntimeError, match="size of tensor"):
            torch.zeros(2, 4, 6, 6) + mask


@pytest.mark.parametrize("missing", ["cu_seq_lens_k", "max_length_q", "max_length_k"])
def test_missing_arguments_of_packed_sequences(missing: str) -> None:
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    del packed[missing]
    query = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=f"{missing}: expected an argument beside cu_seq_lens_q, got None"):
        huggingface.attention(torch.nn.Module(), query, query, query, None, **packed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_whole_models_give_no_warning(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fused(case)


def test_files_that_mix_the_interface_with_attention_of_their_own() -> None:
    """If this test finds a new class, try its model against eager attention before you add the class to the list."""
    found = set()
    for path in MODEL_FILES:
        text = path.read_text()
        if INTERFACE not in text or re.search(r"create_\w*mask\w*\(", text) is None:
            continue
        for body in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            name = re.match(r"\w+", body)[0]
            if "softmax(" in body and INTERFACE not in body and re.search("Attn|Attention", name):
                found.add(name)
    assert found >= REFUSED_CLASSES or VERSION < (5, 23)
    assert found <= REFUSED_CLASSES | FOUND_HARMLESS


def test_a_model_that_does_not_take_the_name_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # BERT takes the name before Llama does not, so `enable` has to undo its change of BERT.
    model = torch.nn.ModuleDict({"llama": BY_ID["llama"].build(), "bert": BY_ID["bert-cls"].build()})
    before = [m.config._attn_implementation for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="LlamaModel did not take the attention 'fused_attn'"):
        huggingface.enable(model)
    after = [m.config._attn_implementation for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert after == before


@pytest.mark.parametrize(
    "name",
    ["MPNetForMaskedLM", "BloomForCausalLM", "BigBirdPegasusForConditionalGeneration", "DeepseekV4ForCausalLM"],
)
def test_a_name_that_would_give_wrong_results_is_refused_when_the_model_runs(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config, settings = OWN_ATTENTION[name]
    config = getattr(transformers, config)(**settings, attn_implementation="fused_attn")
    model = getattr(transformers, name)(config)
    with pytest.raises(ValueError, match="has attention of its own"):
        model(torch.full((2, 5), 7), attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5]))


def test_a_file_that_only_puts_other_layers_together_is_not_refused(tmp_path, monkeypatch) -> None:
    """Configuration and model of a user often stand in two files. Neither names the attention interface."""
    package = tmp_path / "users_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (package / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("users_package.modeling_own")
    llama = BY_ID["llama"].build()
    model = huggingface.enable(module.OwnForCausalLM(module.OwnConfig(**models.DECODER)).eval())
    model.load_state_dict(llama.state_dict())
    inputs = BY_ID["llama"].inputs("left")
    torch.testing.assert_close(model(**inputs).logits, huggingface.enable(llama)(**inputs).logits)

    question = transformers.DPRQuestionEncoder(transformers.DPRConfig(**models.ENCODER)).eval()
    tokens = inputs["input_ids"]
    expected = question(tokens).pooler_output
    torch.testing.assert_close(huggingface.enable(question)(tokens).pooler_output, expected, rtol=1e-4, atol=1e-5)


def test_what_enable_takes() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        huggingface.enable("bert-base-uncased")
    with pytest.raises(TypeError, match=r"model: expected a transformers model.*got Linear"):
        huggingface.enable(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"backend: expected None or one of .*got 'tpu'"):
        huggingface.enable(BY_ID["llama"].build(), "tpu")
    model = BY_ID["llama"].build()
    holder = torch.nn.Sequential(model)
    assert huggingface.enable(holder) is holder and model.config._attn_implementation == "fused_attn"
    assert huggingface.enable(huggingface.enable(holder)) is holder  # a second call changes nothing


def test_what_a_call_cannot_have() -> None:
    case = BY_ID["llama"]
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        fused(case)(**case.inputs(None), output_attentions=True)
    module = torch.nn.Module()
    query = torch.randn(2, 2, 3, 8)
    for name, options in {
        "output_attentions": {"output_attentions": True},
        "cache": {"cache": object()},
        "indices": {"indices": torch.zeros(2, 3, 2, dtype=torch.long)},
        "block_indices": {"block_indices": torch.zeros(2, 3, 2, dtype=torch.long)},
        "sinks": {"sinks": torch.zeros(2, 2, 3, 1)},
        "attention_mask": {"attention_mask": torch.ones(2, 3)},
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            huggingface.attention(module, query, query, query, **{"attention_mask": None} | options)
    packed = torch.randn(1, 2, 3, 8)
    offsets = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3}
    for name, options in {
        "attention_mask": {"attention_mask": torch.zeros(1, 1, 3, 3)},
        "position_bias": {"attention_mask": None, "position_bias": torch.zeros(2, 5)},
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected (None|no padding and no additive mask) with cu_seq_l"):
            huggingface.attention(module, packed, packed, packed, **options, **offsets)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected None or a batch of one entry.*got 2 entries"):
        huggingface.attention(module, query, query, query, None, **offsets)


#: Keyword arguments of transformers' attention layers that have no meaning for a kernel that returns no weights.
HARMLESS = {"position_ids", "query", "value", "embed_dim", "deterministic", "has_relative_attention_bias"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention_weights_are_refused_or_absent(case: Case) -> None:
    """GPT-2 does not pass `output_attentions` to its attention function, so its weights are absent."""
    inputs = case.inputs(None)
    if case.id == "gpt-2":
        assert not fused(case)(**inputs, output_attentions=True).attentions
        return
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        fused(case)(**inputs, output_attentions=True)


def test_layers_pass_no_option_that_would_be_swallowed() -> None:
    """Reads the calls in all files of the installed transformers. Find out what a new name means before you list it."""
    passed = set()
    for path in MODEL_FILES:
        for call in re.findall(r" = attention_interface\((.*?)\n +\)", path.read_text(), re.DOTALL):
            passed |= set(re.findall(r"^ +(\w+)=", call, re.MULTILINE))
    known = set(inspect.signature(huggingface.attention).parameters) | {"output_attentions", "cache", "sliding_window"}
    assert "indices" in passed or VERSION < (5, 23)
    assert passed <= known | set(huggingface._REFUSED) | HARMLESS


def test_sparse_attention_is_refused() -> None:
    settings = models.ENCODER | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "index_topk": 3, "index_head_dim": 16,
        "index_n_heads": 2, "head_dim": 8, "first_k_dense_replace": 2,
    }  # fmt: skip
    if not hasattr(transformers, "DeepseekV32Config"):
        pytest.skip("this transformers has no DeepSeek V3.2")
    case = Case("deepseek-v3.2", "DeepseekV32ForCausalLM", "DeepseekV32Config", settings, "decoder")
    with pytest.raises(ValueError, match="indices: expected None"):
        fused(case)(**case.inputs(None))


def test_a_named_backend_never_falls_back() -> None:
    case = BY_ID["llama"]
    with pytest.raises(ValueError, match="backend='triton' cannot run"):
        fused(case, torch.float64, "triton")(**case.inputs("left", torch.float64))
