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


def test_generate_is_refused(shared_llama) -> None:
    with pytest.raises(ValueError, match="expected no such argument in a model whose ranks share the sequence"):
        shared_llama.generate(TOKENS, max_new_tokens=2)


def test_accelerate_must_know_of_the_ranks() -> None:
    pytest.importorskip("accelerate", reason="pip install -e .[test]")
    for config in (None, SimpleNamespace(cp_enabled=False)):
        with pytest.raises(ValueError, match=r"trainer: expected one with ParallelismConfig\(cp_size=2\)"):
            huggingface_parallel.attach(SimpleNamespace(parallelism_config=config))
    with pytest.raises(ValueError, match="with the method _prepare_cp, got a version without"):
        huggingface_parallel.attach(SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True)))
