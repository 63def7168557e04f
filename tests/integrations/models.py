"""Tiny transformers models with random weights, in which the tests use the fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

VOCAB, BATCH, LENGTH, SOURCE_LENGTH, PADDING = 96, 2, 9, 11, 4
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The names that most model families give to sizes, ...
ENCODER = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
ENCODER |= {"max_position_embeddings": 64}
# ... the additional ones of decoders with grouped queries, ...
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
# ... and those of encoder-decoders.
BOTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
BOTH |= SMALL | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
T5 = SMALL | {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}


@dataclass(frozen=True)
class Case:
    """A model and its inputs. calls: how many calls of the attention kernel one forward pass makes."""

    id: str
    model: str
    config: str
    settings: dict
    kind: str  # of inputs: "encoder", "decoder", "both", "image" or "audio"
    calls: int = 2
    logits: tuple[str, ...] = ("logits",)

    def build(self, dtype: torch.dtype = torch.float32, **kwargs) -> torch.nn.Module:
        """The model, with the same weights at every call.

        None is near zero, because such a weight would hide errors.
        """
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings, **kwargs)
        for sub in (config, *(getattr(config, name) for name in config.sub_configs)):
            for name in vars(sub):
                if "dropout" in name or name.endswith("pdrop"):
                    setattr(sub, name, 0.0)
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
        return model.to(dtype).eval()

    def inputs(self, side: str | None, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
        """The arguments of the model. side: where the first batch entry has padding, "left", "right" or None."""
        generator = torch.Generator().manual_seed(seed)

        def tokens(length: int) -> Tensor:
            return torch.randint(3, VOCAB, (BATCH, length), generator=generator)

        def mask(length: int, padding: int = PADDING) -> Tensor:
            mask = torch.ones(BATCH, length, dtype=torch.long)
            if side == "left":
                mask[0, :padding] = 0
            elif side == "right":
                mask[0, -padding:] = 0
            return mask

        if self.kind == "image":
            return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator).to(dtype)}
        if self.kind == "audio":
            features = torch.randn(BATCH, 8, 2 * SOURCE_LENGTH, generator=generator).to(dtype)
            return {"input_features": features, "decoder_input_ids": tokens(LENGTH), "decoder_attention_mask": mask(9)}
        if self.kind == "both":
            source = {"input_ids": tokens(SOURCE_LENGTH), "attention_mask": mask(SOURCE_LENGTH)}
            return source | {"decoder_input_ids": tokens(LENGTH), "decoder_attention_mask": mask(LENGTH, padding=2)}
        return {"input_ids": tokens(LENGTH), "attention_mask": mask(LENGTH)}


CASES = [
    Case(
        "gpt-1", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "decoder",
    ),
    Case(
        "gpt-2", "GPT2LMHeadModel", "GPT2Config",
        SMALL | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "decoder",
    ),
    Case(
        "bert-pretraining", "BertForPreTraining", "BertConfig", ENCODER, "encoder",
        logits=("prediction_logits", "seq_relationship_logits"),
    ),
    Case("bert-cls", "BertForSequenceClassification", "BertConfig", ENCODER, "encoder"),
    Case("roberta", "RobertaForMaskedLM", "RobertaConfig", ENCODER, "encoder"),
    Case("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", ENCODER | {"num_hidden_layers": 3,
         "local_attention": 6, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2}, "encoder", 3),
    Case("t5", "T5ForConditionalGeneration", "T5Config", T5, "both", 6),
    Case("mt5", "MT5ForConditionalGeneration", "MT5Config", T5, "both", 6),
    Case("umt5", "UMT5ForConditionalGeneration", "UMT5Config", T5, "both", 6),
    Case("bart", "BartForConditionalGeneration", "BartConfig", BOTH | {"max_position_embeddings": 64}, "both", 6),
    Case("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, "decoder"),
    Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER, "decoder"),
    Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", DECODER, "decoder"),
    Case("mistral", "MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 4}, "decoder"),
    Case("gemma-2", "Gemma2ForCausalLM", "Gemma2Config", DECODER | {"sliding_window": 4,
         "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, "decoder"),
    Case("gpt-oss", "GptOssForCausalLM", "GptOssConfig", DECODER | {"sliding_window": 4, "num_local_experts": 2,
         "num_experts_per_tok": 1, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "experts_implementation": "eager"}, "decoder"),
    # Queries and keys have 8 + 4 columns in each head, values have 8, and keys are expanded from a latent vector. The
    # layers have no experts.
    Case("deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", ENCODER | {"num_key_value_heads": 4,
         "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
         "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "decoder"),
    Case("vit", "ViTForImageClassification", "ViTConfig", {"hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16, "patch_size": 4}, "image"),
    Case("whisper", "WhisperForConditionalGeneration", "WhisperConfig", BOTH | {"num_mel_bins": 8,
         "max_source_positions": SOURCE_LENGTH, "max_target_positions": 64}, "audio", 6),
]  # fmt: skip

BY_ID = {case.id: case for case in CASES}


def results(model: torch.nn.Module, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradient of every parameter. The loss is a sum that leaves out the rows of padding."""
    model.zero_grad()
    out = model(**inputs)
    found = {}
    loss = 0.0
    for name in case.logits:
        logits = out[name]
        mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
        if mask is not None and logits.ndim == 3:
            logits = logits * mask[..., None]
        found[name] = logits.detach()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        loss = loss + (logits * weights.to(logits.dtype)).sum()
    loss.backward()
    found |= {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


def exact_softmax(function: Callable) -> Callable:
    """A version of the softmax `function` that keeps float64, where eager attention asks for float32."""

    def softmax(x: Tensor, *args, dtype=None, **kwargs) -> Tensor:
        return function(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    return softmax
