"""transformers models whose sequences are shared by two processes, against one process in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import Team

transformers = pytest.importorskip("transformers", reason="pip install -e .[huggingface]")
import transformers_jobs as jobs  # noqa: E402

from fused_attn.integrations import huggingface_parallel  # noqa: E402

# id: (name of the model, settings)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": jobs.VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    **{x.lower(): (f"{x}ForCausalLM", jobs.SIZES) for x in ("Llama", "Qwen2", "Qwen3", "Gemma", "Olmo2", "Phi3")},
    "mistral, a window": ("MistralForCausalLM", jobs.SIZES | {"sliding_window": 20}),
    "gemma 2, a window in some layers and softcap": (
        "Gemma2ForCausalLM",
        jobs.SIZES | {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gpt-oss, sinks and experts": (
        "GptOssForCausalLM", jobs.SIZES | {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"], "experts_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    with Team(2, tmp_path_factory.mktemp("team") / "store") as team:
        yield team


def batch(length: int, side: str | None) -> dict[str, torch.Tensor]:
    """Tokens and labels of two sequences. side: where the first one has padding."""
    tokens = torch.randint(3, jobs.VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[1, : length // 2] = -100  # so the ranks have different numbers of labels
    if side is None:
        return {"input_ids": tokens, "labels": labels}
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return {"input_ids": tokens, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


@pytest.mark.parametrize("model", MODELS)
def test_results_are_those_of_one_process(team, model: str) -> None:
    name, settings = MODELS[model]
    sides = (None, "right") if model in ("llama", "mistral, a window") else ("left",)
    for method, side in zip(("ring", "ulysses"), sides, strict=False):
        inputs = batch(29, side)
        expected = jobs.results_of(jobs.new_model(name, settings), inputs)
        for found in team.run(jobs.shared, name, settings, method, inputs):
            assert found.keys() == expected.keys()
            for key, x in expected.items():
                # transformers computes the loss, and so the gradients, from logits that are rounded to float32.
                tolerance = 1e-10 if key == "logits" else 1e-5
                torch.testing.assert_close(found[key], x, rtol=tolerance, atol=tolerance, msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_trainer_with_context_parallelism_of_accelerate(team, tmp_path) -> None:
    """Windows and padding, which accelerate's own context parallelism refuses."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it; pip install -e .[test]")
    rows = []
    for row in range(8):
        inputs = batch(22, "right" if row % 2 else None)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        rows.append({name: x[0].roll(row) if name == "input_ids" else x[0] for name, x in inputs.items()})
        rows[-1]["labels"] = rows[-1]["input_ids"].masked_fill(rows[-1]["attention_mask"] == 0, -100)
    expected = jobs.trainer_losses(str(tmp_path), rows)
    assert len(expected) == 5 and expected[-1] < expected[0]
    for losses in team.run(jobs.trainer_losses, str(tmp_path), rows):
        assert losses == pytest.approx(expected, rel=1e-4)


def test_another_attention_ends_the_sharing(team) -> None:
    """Then each process computes the whole batch. Another call of context_parallel replaces an earlier one."""
    inputs = batch(29, "right")
    expected = jobs.results_of(jobs.new_model("LlamaForCausalLM", jobs.SIZES), inputs)["loss"].item()
    for rank, found in enumerate(team.run(jobs.switched, inputs)):
        for name, (loss, rows) in found.items():
            assert loss == pytest.approx(expected, rel=1e-6), name
            is_shared = name.startswith("shared") or name == "copied"
            assert rows == ((13, 16)[rank] if is_shared else 29), name


def test_given_number_of_labels_divides_as_in_one_process(team) -> None:
    """Such as the labels of all batches whose gradients are accumulated."""
    for count in (torch.tensor(100), 100):
        inputs = batch(29, None) | {"num_items_in_batch": count}
        expected = jobs.results_of(jobs.new_model("LlamaForCausalLM", jobs.SIZES), inputs)
        for loss, grad in team.run(jobs.counted, inputs):
            torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=0.0)
            torch.testing.assert_close(grad, expected["d model.norm.weight"], rtol=1e-5, atol=1e-7)


def test_lengths_that_differ_between_forward_passes_with_checkpointing(team) -> None:
    """Backward computes layers again when the newest call had another length."""
    tokens = [batch(length, None)["input_ids"] for length in (40, 33, 24)]
    expected = jobs.checkpointed(tokens)
    for found in team.run(jobs.checkpointed, tokens):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", jobs.WRONG_CALLS)
def test_wrong_calls_raise_on_all_ranks(team, name: str) -> None:
    for is_right, result in team.outcomes(jobs.wrong_call, name):
        assert not is_right
        assert "ValueError: " + jobs.WRONG_CALLS[name] in result[0]


# ---- Refusals


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("LlamaModel", {}, r"model: expected a causal language model .*, got LlamaModel of type 'llama'"),
        ("LlamaForSequenceClassification", {}, "model: expected a causal language model"),
        ("ModernBertDecoderForCausalLM", {}, "model: expected a causal language model .* of a type in"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "model: expected a rotary embedding that does not depend on the longest position, got 'dynamic'"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_shared(group, name: str, settings: dict, message: str) -> None:
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**jobs.SIZES | settings))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        huggingface_parallel.context_parallel(model, group)
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


TOKENS = torch.ones(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, r"input_ids: expected the tokens \(B, L\) of the whole batch, got None"),
        ({"input_ids": TOKENS, "cache": transformers.DynamicCache()}, "cache: expected no such argument"),
        ({"input_ids": TOKENS, "position_ids": torch.arange(8)[None] % 4}, "position_ids: .* got packed sequences"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 8, 8)}, "attention_mask: .* each of the 8 tokens"),
        ({"input_ids": TOKENS, "labels": TOKENS[:, 1:]}, "labels: expected a row for each of the 8 tokens"),
        ({"input_ids": TOKENS, "cu_seq_lens_q": torch.tensor([0, 8])}, "cu_seq_lens_q: expected one of the arguments"),
        ({"input_ids": TOKENS, "logits_to_keep": 1}, "logits_to_keep: expected no such argument"),
        ({"input_ids": TOKENS, "output_router_logits": True}, "output_router_logits: expected False"),
    ],
    ids=lambda x: None if isinstance(x, str) else ", ".join(x) or "nothing",
)
def test_inputs_that_cannot_be_shared(group, shared_llama, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_llama(**inputs)


@pytest.fixture(scope="module")
def shared_llama(group):
    return huggingface_parallel.context_parallel(jobs.new_model("LlamaForCausalLM", jobs.SIZES).float(), group)


def test_generate_needs_another_attention(group) -> None:
    model = huggingface_parallel.context_parallel(jobs.new_model("LlamaForCausalLM", jobs.SIZES).float(), group)
    with pytest.raises(ValueError, match=r'before generate\(\), call model.set_attn_implementation\("fused_attn"\)'):
        model.generate(TOKENS, max_new_tokens=2)
    model.set_attn_implementation("fused_attn")
    expected = jobs.new_model("LlamaForCausalLM", jobs.SIZES).float().generate(TOKENS, max_new_tokens=2)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=2), expected)


def test_router_logits_of_the_configuration(group) -> None:
    name, settings = MODELS["gpt-oss, sinks and experts"]
    model = jobs.new_model(name, settings | {"output_router_logits": True})
    huggingface_parallel.context_parallel(model, group)
    with pytest.raises(ValueError, match="output_router_logits: expected False"):
        model(input_ids=TOKENS, labels=TOKENS)
    model(input_ids=TOKENS, labels=TOKENS, output_router_logits=False)


def test_other_models_keep_a_shared_configuration(group) -> None:
    config = transformers.LlamaConfig(**jobs.SIZES, attn_implementation="sdpa")
    model, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    huggingface_parallel.context_parallel(model, group)
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    other(input_ids=TOKENS)
    model(input_ids=TOKENS)


def test_accelerate_must_know_of_the_ranks() -> None:
    pytest.importorskip("accelerate", reason="pip install -e .[test]")
    for config in (None, SimpleNamespace(cp_enabled=False)):
        with pytest.raises(ValueError, match=r"trainer: expected one with ParallelismConfig\(cp_size=2\)"):
            huggingface_parallel.attach(SimpleNamespace(parallelism_config=config))
    with pytest.raises(ValueError, match="with the method _prepare_cp, got a version without"):
        huggingface_parallel.attach(SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True)))
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True))
    trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"trainer: expected one with label_smoothing_factor=0, .* got 0.1"):
        huggingface_parallel.attach(trainer)
