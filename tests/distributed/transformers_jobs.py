"""What the processes of `test_transformers.py` run."""

from __future__ import annotations

import copy
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


def shared_llama(**options: Any) -> Any:
    """A small Llama whose sequences all processes share."""
    mesh = mesh_of((dist.get_world_size(),))
    return huggingface_parallel.context_parallel(new_model("LlamaForCausalLM", SIZES), mesh, **options)


def switched(inputs: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
    """(the loss, the number of rows of the logits) of one model, after each step by name."""
    model, mesh, found = shared_llama(), mesh_of((dist.get_world_size(),)), {}

    def record(name: str, model: Any) -> None:
        with torch.no_grad():
            out = model(**inputs)
        found[name] = out.loss.item(), out.logits.shape[1]

    record("shared", model)
    record("copied", copy.deepcopy(model))
    for name in ("eager", "sdpa", huggingface.NAME):
        model.set_attn_implementation(name)
        record(name, model)
    record("shared again", huggingface_parallel.context_parallel(model, mesh, method="ulysses"))
    record("shared twice", huggingface_parallel.context_parallel(model, mesh))
    record("enabled", huggingface.enable(model))
    return found


def counted(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(the loss, a gradient) of a shared model that is told the number of labels. The gradient is the mean."""
    model = shared_llama()
    loss = model(**inputs).loss
    loss.backward()
    grad = model.model.norm.weight.grad
    dist.all_reduce(grad)
    return loss.detach(), grad / dist.get_world_size()


def checkpointed(tokens: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of the summed losses of several batches, with checkpointing; the mean of the ranks if shared."""
    model = shared_llama() if dist.is_initialized() else new_model("LlamaForCausalLM", SIZES)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sum(model(input_ids=x, labels=x).loss for x in tokens).backward()
    grads = {name: x.grad for name, x in model.named_parameters()}
    if dist.is_initialized():
        for x in grads.values():
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return grads


#: Calls of a shared model that must raise on all ranks: name -> a part of the message.
WRONG_CALLS = {
    "other tokens": "input_ids: expected the same on all ranks, got 'torch.int64 of shape (2, 29) and checksum ",
    "tokens in another order": "input_ids: expected the same on all ranks",
    "other lengths": "input_ids: expected the same on all ranks",
    "labels on one rank": "labels: expected the same on all ranks, got no such argument on rank 0, 'torch.int64 of",
    "another argument on one rank": "use_cache: expected the same on all ranks, got True on rank 0, no such argument",
    "positional on one rank": "positional arguments: expected the same on all ranks, got 1 on rank 0, 0 on rank 1",
    "one rank trains": "model.training: expected the same on all ranks, got False on rank 0, True on rank 1",
    "one rank wants gradients": "torch.is_grad_enabled(): expected the same on all ranks, got True on rank 0, False on",
    "a short batch": "input_ids: expected more than 8 tokens for 2 ranks, got 8",
}


def wrong_call(name: str) -> None:
    """A call of a model that the ranks share. Nobody may wait for another rank in vain."""
    model, is_first = shared_llama(), dist.get_rank() == 0
    tokens = torch.randint(3, VOCAB, (2, 29), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens}
    if name == "other tokens" and not is_first:
        inputs["input_ids"] = tokens.roll(1)
    elif name == "tokens in another order" and not is_first:
        inputs["input_ids"] = tokens.flip(0)
    elif name == "other lengths" and not is_first:
        inputs["input_ids"] = tokens[:, :20]
    elif name == "labels on one rank" and not is_first:
        inputs["labels"] = tokens
    elif name == "another argument on one rank" and is_first:
        inputs["use_cache"] = True
    elif name == "positional on one rank" and is_first:
        model(tokens)
    elif name == "one rank trains":
        model.train(not is_first)
    elif name == "a short batch":
        inputs["input_ids"] = tokens[:, :8]
    with torch.set_grad_enabled(is_first or name != "one rank wants gradients"):
        model(**inputs)


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
