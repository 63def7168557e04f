"""What the processes of `test_sharded.py` run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jobs import mesh_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from fused_attn import fused_attention


def attention(
    mesh_shape: tuple[int, ...], placements: dict[str, list[Placement]], tensors: dict[str, Tensor],
    weights: tuple[Tensor, Tensor], options: dict[str, Any], is_compiled: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The whole out, lse and gradients by name, and the local shape of out."""
    mesh = mesh_of(mesh_shape)
    given = {
        name: distribute_tensor(x.detach(), mesh, placements[name]) if name in placements else x.detach().clone()
        for name, x in tensors.items()
    }
    for name, x in given.items():
        x.requires_grad_(tensors[name].requires_grad)
    function = (
        torch.compile(fused_attention, backend="aot_eager", fullgraph=True, dynamic=False)
        if is_compiled
        else fused_attention
    )
    out, lse = function(**given, return_lse=True, **options)
    assert isinstance(out, DTensor) and isinstance(lse, DTensor)
    replicated = [Replicate()] * mesh.ndim
    w, w_lse = (distribute_tensor(x, mesh, replicated) for x in weights)
    loss = (out * w).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * w_lse).sum()
    loss.full_tensor().backward()
    grads = {name: x.grad for name, x in given.items() if x.requires_grad}
    for name, grad in grads.items():
        assert isinstance(grad, DTensor) == (name in placements), name
    full = {f"d{name}": x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}
    local = torch.tensor(out.to_local().shape)
    return {"out": out.detach().full_tensor(), "lse": lse.detach().full_tensor(), **full, "local": local}


def seedless_dropout() -> Tensor:
    """The out of replicated tensors with dropout, on ranks whose generators differ."""
    torch.manual_seed(dist.get_rank())
    mesh = mesh_of((dist.get_world_size(),))
    x = distribute_tensor(torch.ones(1, 2, 8, 16), mesh, [Replicate()])
    return fused_attention(x, x, x, dropout_p=0.5).to_local()


def error_of(placements: list[Placement], heads: int) -> None:
    mesh = mesh_of((dist.get_world_size(),))
    x = distribute_tensor(torch.ones(2, heads, 8, 16), mesh, placements)
    fused_attention(x, x, x)
