"""What the processes of `test_context_parallel.py` run to be compared with the plan of a step."""

from __future__ import annotations

import time
import weakref
from typing import Any

import jobs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fused_attn.distributed import context_parallel_attention, count_traffic
from fused_attn.distributed.cost import Workload


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were made while it is active and that still live."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Otherwise each process imports TorchDynamo, which takes seconds.

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self.known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def wait_until_only(self, kept: set[int]) -> None:
        """Waits until no other storage than these lives: a thread of gloo may hold a tensor after its message."""
        end = time.monotonic() + 60.0
        while not self.known <= kept:
            assert time.monotonic() < end, f"{len(self.known - kept)} tensors live that nothing keeps"
            time.sleep(0.0001)


def used(workload: Workload, mesh_shape: tuple[int, ...], method: str) -> dict[str, Any]:
    """The bytes that one layer sends in forward and in backward, that it saves, and that backward needs besides."""
    mesh, rank = jobs.mesh_of(mesh_shape), dist.get_rank()
    sharding = workload.scores(dist.get_world_size()).query
    query, key, value = (
        torch.randn(
            workload.batch, heads, sharding.rows(rank), workload.head_dim, dtype=getattr(torch, workload.dtype),
            requires_grad=True,
        )
        for heads in (workload.heads, workload.kv_heads, workload.kv_heads)
    )  # fmt: skip
    saved: dict[int, int] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    live = LiveBytes()
    with count_traffic() as traffic:
        with live, torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = context_parallel_attention(
                query, key, value, mesh=mesh, method=method, seqlens=(workload.tokens,) * 2, enable_gqa=True,
                is_causal=workload.band.right == 0, window_size=(workload.band.left, -1),
            )  # fmt: skip
        live.wait_until_only({*saved, out.untyped_storage()._cdata})
        forward, held = traffic.sent_bytes, live.now
        dout = torch.randn_like(out)
        live.peak = held
        with live:
            out.backward(dout)
    return {
        "forward": forward, "backward": traffic.sent_bytes - forward, "saved": sum(saved.values()),
        "buffers": live.peak - held,
    }  # fmt: skip
