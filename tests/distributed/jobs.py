"""What the processes of `test_context_parallel.py` run."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fused_attn import fused_attention
from fused_attn.distributed import (
    context_parallel_attention,
    context_parallel_attention_varlen,
    count_traffic,
    shard_batch,
    shard_positions,
    shard_sequence,
    unshard_batch,
)

SEQUENCE_DIM = {"query": 2, "key": 2, "value": 2, "key_padding_mask": 1}


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all processes."""
    return DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(shape), mesh_dim_names=names)


def attention(
    mesh_shape: tuple[int, ...], method: str, tensors: dict[str, Tensor], weights: tuple[Tensor, Tensor],
    options: dict[str, Any], knows_lengths: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The shards of out, lse and all gradients of this rank, by name, and the bytes that it has sent."""
    mesh = mesh_of(mesh_shape)
    shards = {
        name: shard_sequence(x.detach(), mesh, SEQUENCE_DIM[name]) if name in SEQUENCE_DIM else x.detach().clone()
        for name, x in tensors.items()
    }
    for name, x in shards.items():
        x.requires_grad_(tensors[name].requires_grad)
    seqlens = (tensors["query"].shape[2], tensors["key"].shape[2]) if knows_lengths else None
    with count_traffic() as traffic:
        out, lse = context_parallel_attention(
            **shards, mesh=mesh, method=method, seqlens=seqlens, return_lse=True, **options
        )
        forward_bytes = traffic.sent_bytes
        w, w_lse = (shard_sequence(x, mesh, 2) for x in weights)
        loss = (out.to(w.dtype) * w).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * w_lse).sum()
        loss.backward()
    grads = {f"d{name}": x.grad for name, x in shards.items() if x.requires_grad}
    return {"out": out.detach(), "lse": lse.detach(), **grads, "bytes": forward_bytes}


def packed_attention(
    mesh_shape: tuple[int, ...], method: str, tensors: dict[str, Tensor], weights: tuple[Tensor, Tensor],
    offsets: tuple[Tensor, Tensor, int, int], options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """As `attention`, for packed rows. All shards are returned with their rows in dimension 0."""
    mesh = mesh_of(mesh_shape)
    rows = ("query", "key", "value")
    shards = {name: shard_sequence(x.detach(), mesh, 0) if name in rows else x.clone() for name, x in tensors.items()}
    for x in shards.values():
        x.requires_grad_()
    out, lse = context_parallel_attention_varlen(
        shards["query"], shards["key"], shards["value"], *offsets, mesh=mesh, method=method, return_lse=True,
        **{name: x for name, x in shards.items() if name not in rows}, **options,
    )  # fmt: skip
    w, w_lse = shard_sequence(weights[0], mesh, 0), shard_sequence(weights[1], mesh, 1)
    ((out * w).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * w_lse).sum()).backward()
    return {"out": out.detach(), "lse": lse.detach().t(), **{f"d{name}": x.grad for name, x in shards.items()}}


def wanted_gradients(method: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The gradients of a call in which only the named tensors require one, and the bytes of forward and backward."""
    mesh = mesh_of((dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, 2, 32, 16, generator=generator) for name in ("query", "key", "value")}
    shards = {name: shard_sequence(x, mesh, 2).requires_grad_(name in names) for name, x in tensors.items()}
    with count_traffic() as traffic:
        out = context_parallel_attention(**shards, mesh=mesh, method=method, is_causal=True)
        forward_bytes = traffic.sent_bytes
        out.sum().backward()
    grads = {name: x.grad for name, x in shards.items()}
    return {**grads, "forward": forward_bytes, "backward": traffic.sent_bytes - forward_bytes}


def under_autocast(mesh_shape: tuple[int, ...], method: str) -> list[tuple[Tensor, Tensor]]:
    """(a result under autocast, the result for inputs that have its dtype): out and gradients, dense and packed."""
    mesh = mesh_of(mesh_shape)
    query, key, value = torch.randn(3, 1, 12, 16, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    offsets = (*(torch.tensor([0, 16 * dist.get_world_size()], dtype=torch.int32),) * 2, *(64,) * 2)

    def results(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        dense = context_parallel_attention(*leaves, mesh=mesh, method=method, is_causal=True)
        rows = (x.squeeze(0).transpose(0, 1) for x in leaves)
        packed = context_parallel_attention_varlen(*rows, *offsets, mesh=mesh, method=method, is_causal=True)
        gradients = torch.autograd.grad(dense.float().sin().sum() + packed.float().cos().sum(), leaves)
        return [dense.detach(), packed.detach(), *(x.bfloat16() for x in gradients)]

    with torch.autocast("cpu", torch.bfloat16):  # rotary embeddings often leave query and key in float32
        found = results((query, key, value.bfloat16()))
    return list(zip(found, results((query.bfloat16(), key.bfloat16(), value.bfloat16())), strict=True))


def batch_there_and_back(batch: dict[str, Any], dims: dict[str, int], cu_seqlens: Tensor) -> tuple[dict, dict, Tensor]:
    """(the shard of a batch, the whole batch again, the positions of the rows of this rank)."""
    mesh = mesh_of((dist.get_world_size(),))
    shard = shard_batch(batch, mesh, dims)
    return shard, unshard_batch(shard, mesh, dims), shard_positions(mesh, cu_seqlens=cu_seqlens)


def options_differ() -> None:
    """A call whose ranks have different options."""
    x = torch.randn(1, 2, 8, 16)
    context_parallel_attention(x, x, x, mesh=mesh_of((dist.get_world_size(),)), is_causal=dist.get_rank() == 0)


def warm_up() -> None:
    """A call of all ranks, so that the connections between them stand."""
    x = torch.randn(1, 2, 32, 16)
    context_parallel_attention(x, x, x, mesh=mesh_of((dist.get_world_size(),)), method="ring")


def one_rank_dies() -> None:
    """Rank 1 ends while the others compute."""
    if dist.get_rank() == 1:
        os._exit(1)
    warm_up()


#: Calls that must raise although each rank alone could compute something: name -> a part of the message.
WRONG_CALLS = {
    "sinks of other heads": "sinks: expected shape",
    "relative bias of other heads": "relative_bias: expected shape",
    "groups without enable_gqa": "enable_gqa",
    "gradient of a padding mask": "key_padding_mask: expected a mask that requires no gradient",
    "lengths of DTensors": "key_lengths: expected None with DTensors",
    "alignment of DTensors": "diagonal_alignment: expected 'upper_left' with DTensors, or causal_lower_right",
    "second derivative": "there are no second derivatives",
    "offsets of fewer rows": "query: expected 15 rows on all ranks together, got 16",
    "other offsets": "cu_seqlens_q: expected the same on all ranks, got ",
    "sinks of one rank": "sinks: expected the same on all ranks, got ",
    "gradient of one rank's bias": "relative_bias.requires_grad: expected the same on all ranks, got ",
    "sinks as a list": "sinks: expected a",
    "padding as a list": "key_padding_mask: expected a",
    "padding of the whole sequence": "key_padding_mask: expected shape (B, S of this rank) = (1, 8)",
    "padding of other rows on one rank": (
        "arguments: expected the same on all ranks, got 'no error' on rank 0, 'ValueError: key_padding_mask: expected "
        "shape (B, S of this rank) = (1, 8), as shard_sequence(mask, mesh, 1) has, got shape (1, 7)' on rank 1"
    ),
    "backend of another machine on one rank": "on rank 0, \"ValueError: backend='cuda' cannot run ",
    "padding of another dtype on one rank": "key_padding_mask: expected the same on all ranks, got 'a mask of torch",
    "option on one rank that is none": "got 'no error' on rank 0, 'ValueError: softcap: expected ",
    "seeds in tensors": "dropout_seed: expected the same on all ranks, got 0 on rank 0, 1 on rank 1",
    "packed rows without heads on one rank": "arguments: expected the same on all ranks, got 'no error' on rank 0, ",
    "padding of packed rows": "key_padding_mask: expected None for a shared sequence, because packed sequences have no",
}


def wrong_call(name: str) -> None:
    mesh, query, key = mesh_of((dist.get_world_size(),)), torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    rank = dist.get_rank()
    if name == "sinks of other heads":
        context_parallel_attention(query, query, query, mesh=mesh, method="ring", sinks=torch.zeros(1))
    elif name == "relative bias of other heads":
        bias = torch.zeros(8, 31)
        context_parallel_attention(query, query, query, mesh=mesh, method="ulysses", relative_bias=bias)
    elif name == "sinks of one rank":
        sinks = torch.zeros(4) if dist.get_rank() == 0 else None
        context_parallel_attention(query, query, query, mesh=mesh, method="ring", sinks=sinks)
    elif name == "sinks as a list":
        context_parallel_attention(query, query, query, mesh=mesh, sinks=[0.0] * 4)
    elif name == "padding as a list":
        context_parallel_attention(query, query, query, mesh=mesh, key_padding_mask=[[False] * 8])
    elif name == "padding of the whole sequence":
        padding = torch.zeros(1, 8 * dist.get_world_size(), dtype=torch.bool)
        context_parallel_attention(query, query, query, mesh=mesh, key_padding_mask=padding)
    elif name == "padding of other rows on one rank":
        padding = torch.zeros(1, 8 - rank, dtype=torch.bool)
        context_parallel_attention(query, query, query, mesh=mesh, key_padding_mask=padding)
    elif name == "padding of another dtype on one rank":
        padding = torch.zeros(1, 8, dtype=torch.int32 if rank else torch.bool)
        context_parallel_attention(query, query, query, mesh=mesh, key_padding_mask=padding)
    elif name == "backend of another machine on one rank":
        context_parallel_attention(query, query, query, mesh=mesh, backend="cuda" if rank else "reference")
    elif name == "option on one rank that is none":
        context_parallel_attention(query, query, query, mesh=mesh, softcap=-1.0 if rank else 1.0, backend="reference")
    elif name == "seeds in tensors":
        context_parallel_attention(query, query, query, mesh=mesh, dropout_p=0.1, dropout_seed=torch.tensor(rank))
    elif name == "packed rows without heads on one rank":
        offsets, rows = torch.tensor([0, 16], dtype=torch.int32), query[0].transpose(0, 1)
        rows = rows[:, 0] if rank else rows
        context_parallel_attention_varlen(rows, rows, rows, offsets, offsets, 16, 16, mesh=mesh)
    elif name == "gradient of one rank's bias":
        bias = torch.zeros(16 * dist.get_world_size() - 1, requires_grad=dist.get_rank() == 0)
        context_parallel_attention(query, query, query, mesh=mesh, method="ring", relative_bias=bias)
    elif name == "groups without enable_gqa":
        context_parallel_attention(query, key, key, mesh=mesh, method="ulysses")
    elif name == "gradient of a padding mask":
        padding = torch.zeros(1, 8, requires_grad=True)
        context_parallel_attention(query, query, query, mesh=mesh, method="ring", key_padding_mask=padding)
    elif name == "lengths of DTensors":
        x = distribute_tensor(query, mesh, [Shard(1)])
        fused_attention(x, x, x, key_lengths=torch.tensor([3], dtype=torch.int32))
    elif name == "alignment of DTensors":
        x = distribute_tensor(query, mesh, [Shard(1)])
        fused_attention(x, x, x, is_causal=True, diagonal_alignment="lower_right")
    elif name == "second derivative":
        query.requires_grad_()
        out = context_parallel_attention(query, query, query, mesh=mesh, method="ring")
        (dquery,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        dquery.sum().backward()
    elif name in ("offsets of fewer rows", "other offsets", "padding of packed rows"):
        middle = 3 + dist.get_rank() if name == "other offsets" else 3
        offsets = torch.tensor([0, middle, 15 if name == "offsets of fewer rows" else 16], dtype=torch.int32)
        padding = {"key_padding_mask": torch.zeros(1, 8, dtype=torch.bool)} if name == "padding of packed rows" else {}
        rows = query[0].transpose(0, 1)
        context_parallel_attention_varlen(rows, rows, rows, offsets, offsets, 16, 16, mesh=mesh, **padding)
