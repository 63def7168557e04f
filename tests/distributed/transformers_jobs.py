"""What the processes of `test_transformers.py` run."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import transformers
from jobs import mesh_of
from torch import Tensor

from fused_attn.distributed import unshard_sequence
from fused_attn.integrations import huggingface, huggingface_parallel

VOCAB = 50
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8, "pad_token_id": 0}


def new_model(name: str, settings: dict[str, Any]) -> Any:
    """A causal language model in float64, with the same weights at every call."""
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model = huggingface.enable(cls(cls.config_class(**settings)).double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def results_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, the logits and the gradients of all parameters, by name."""
    out = model(**inputs)
    out.loss.backward()
    grads = {f"d {name}": x.grad for name, x in model.named_parameters()}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def shared(name: str, settings: dict[str, Any], method: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`results_of` a model whose ranks share the sequences: the mean gradients, and the logits of all rows."""
    mesh = mesh_of((dist.get_world_size(),))
    model = huggingface_parallel.context_parallel(new_model(name, settings), mesh, method=method)
    found = results_of(model, inputs)
    for name, x in found.items():
        if name.startswith("d "):
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return {**found, "logits": unshard_sequence(found["logits"], mesh, 1)}


def trainer_losses(folder: str, rows: list[dict[str, Tensor]]) -> list[float]:
    """The losses of transformers' Trainer on a model with a window, and the loss of an evaluation.

    If there are several processes, accelerate gives them the same batches and shards the parameters over them.
    """
    model = new_model("MistralForCausalLM", SIZES | {"sliding_window": 10}).float()
    options: dict[str, Any] = {}
    if dist.is_initialized():
        from accelerate import ParallelismConfig

        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
        }
        options = {"fsdp": True, "parallelism_config": ParallelismConfig(cp_size=int(world))}
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, seed=0,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, prediction_loss_only=True, **options,
    )  # fmt: skip
    if options:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        # accelerate shards parameters on GPUs only. Here, processes of a CPU pass for such.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
    if options:
        huggingface_parallel.attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]
