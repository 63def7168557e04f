"""What the processes of `test_models.py` run: training by each of torch's ways to share a model, and checkpoints."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import mesh_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_attn import FusedMultiheadAttention, Transformer
from fused_attn.distributed import tensor_parallel_plan

BATCH, LENGTH, WIDTH, STEPS = 4, 6, 32, 3


def new_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(WIDTH, 4, 1, 1, 64, dropout=0.0, batch_first=True)


def train(kind: str, options: tuple[str, ...] = ()) -> list[float]:
    """The losses of a few steps on one batch. kind: how the ranks share the model and the batch, see `shared`."""
    model = new_model()
    layers = [*model.encoder.layers, *model.decoder.layers]
    if "checkpoint" in options:
        model.encoder.layers = nn.ModuleList(map(checkpoint_wrapper, model.encoder.layers))
        model.decoder.layers = nn.ModuleList(map(checkpoint_wrapper, model.decoder.layers))
    model, rank, ranks = shared(kind, model, is_mixed="mixed" in options)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="mixed" in options and "fsdp" not in kind)
    if "compile" in options:
        for layer in layers:
            layer.compile(backend="aot_eager", dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    src, tgt, goal = (torch.randn(BATCH, LENGTH, WIDTH, generator=generator) for _ in range(3))
    is_padding = torch.arange(LENGTH) >= torch.tensor([6, 4, 5, 3])[:, None]
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    losses = []
    for _ in range(STEPS):
        with autocast:
            out = model(
                src[rows], tgt[rows], tgt_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH),
                src_key_padding_mask=is_padding[rows], memory_key_padding_mask=is_padding[rows],
            )  # fmt: skip
        loss = (out.float() - goal[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        if kind != "alone":
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        losses.append(whole.item())
    return losses


def shared(kind: str, model: nn.Module, is_mixed: bool) -> tuple[nn.Module, int, int]:
    """(the model, the rank of this process among those that share the batch, the number of these)."""
    if kind == "alone":
        return model, 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model), rank, world
    if kind == "tp":
        return parallelize_module(model, mesh_of((world,)), tensor_parallel_plan(model)), 0, 1
    if kind == "fsdp":
        mesh = mesh_of((world,))
    elif kind == "hsdp":  # two copies of the model, each of which two ranks share
        mesh = mesh_of((2, world // 2), ("copies", "shards"))
    else:
        both = mesh_of((2, world // 2), ("data", "heads"))
        model, mesh = parallelize_module(model, both["heads"], tensor_parallel_plan(model)), both["data"]
    if kind == "ddp and tp":
        return DistributedDataParallel(model, device_mesh=mesh), mesh.get_local_rank(), mesh.size()
    # Layers hand bfloat16 to each other. The output of the model is float32.
    policies = [MixedPrecisionPolicy()] * 2
    if is_mixed:
        policies = [MixedPrecisionPolicy(torch.bfloat16, output_dtype=x) for x in (None, torch.float32)]
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        fully_shard(layer, mesh=mesh, mp_policy=policies[0])
    rank = rank if kind == "hsdp" else mesh.get_local_rank()
    return fully_shard(model, mesh=mesh, mp_policy=policies[1]), rank, mesh.size()


def checkpoints(folder: str) -> list[Tensor]:
    """The outputs of a module, of a shared one with its checkpoint, and of a third one with the checkpoint of that."""
    mesh, x = mesh_of((dist.get_world_size(),)), torch.ones(2, 5, WIDTH).cumsum(1)
    first, second, third = new_model(), new_model(), new_model()
    with torch.no_grad():
        for model in (second, third):
            for parameter in model.parameters():
                parameter.zero_()
    parallelize_module(second, mesh, tensor_parallel_plan(second))
    models = [first, second, third]
    for number, (source, target) in enumerate(itertools.pairwise(models)):
        dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=f"{folder}/{number}")
        state = {"model": get_model_state_dict(target)}
        dcp.load(state, checkpoint_id=f"{folder}/{number}")
        set_model_state_dict(target, state["model"])
    return [model(x, x).detach() for model in models]


def attention_error(options: dict) -> None:
    module = FusedMultiheadAttention(WIDTH, options.pop("num_heads", 4), batch_first=True, **options)
    parallelize_module(module, mesh_of((dist.get_world_size(),)), tensor_parallel_plan(module))
    x = torch.ones(1, 3, WIDTH)
    module(x, x, x)


def parallel_attention(options: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(out, the gradient of x and of the biases) by name, of a module and of a module with shared heads."""
    found = []
    for is_shared in (False, True):
        torch.manual_seed(0)
        module = FusedMultiheadAttention(WIDTH, 4, batch_first=True, **options)
        x = torch.randn(2, 5, WIDTH).requires_grad_()
        if is_shared:
            parallelize_module(module, mesh_of((dist.get_world_size(),)), tensor_parallel_plan(module))
        mask = torch.ones(8, 5, 5, dtype=torch.bool).triu(1)  # (N * H, L, S)
        memory = x[..., : module.kdim]
        out, _ = module(x, *((x, x) if module.kdim == WIDTH else (memory, memory)), need_weights=False, attn_mask=mask)
        out.cos().sum().backward()
        grads = {f"d{name}": module.get_parameter(name).grad for name in ("in_proj_bias", "out_proj.bias")}
        full = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in grads.items()}
        found.append({"out": out.detach(), "dx": x.grad, **full})
    return found[0], found[1]
