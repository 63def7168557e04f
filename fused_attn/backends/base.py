"""What every backend offers. Backends are siblings: none imports another."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_attn import profiling
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem


class Gradients(NamedTuple):
    """One entry per differentiable input; None where it was not wanted. Shapes are those of the inputs."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients a backward call is to compute, in the order of `Gradients`."""

    query: bool
    key: bool
    value: bool
    bias: bool
    relative_bias: bool
    sinks: bool


class Backend(Protocol):
    """query (B, H, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv) with any strides; packed problems have B = 1.

    ``seed`` is a 0-d int64 tensor when ``problem.dropout_p > 0``, else None.
    """

    name: str
    #: True when `forward` is itself differentiable PyTorch code; such a backend has no `backward`.
    is_composite: bool

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this backend cannot run the problem; empty when it can."""

    def forward(
        self,
        problem: AttentionProblem,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        mask: MaskSpec,
        needs_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(out (B, H, L, Dv) of the query's dtype, lse (B, H, L) of the accumulate dtype, or None if not needed)."""

    def backward(
        self,
        problem: AttentionProblem,
        wanted: Wanted,
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        mask: MaskSpec,
    ) -> Gradients: ...


def empty_like_layout(like: Tensor, columns: int) -> Tensor:
    """Uninitialised (B, heads, rows, columns) whose memory order follows `like`.

    So the result for a transposed (B, L, H, D) or (L, B, H, D) tensor lets the heads be merged without a copy. It is
    contiguous where the last stride of `like` is not 1.
    """
    if like.stride(3) != 1:
        return torch.empty((*like.shape[:3], columns), dtype=like.dtype, device=like.device)
    if like.shape[3] == columns:
        x = torch.empty_like(like)  # keeps the order of the dimensions, or of overlapping ones makes up another
        return x if x.stride(3) == 1 or columns == 1 else x.new_empty(like.shape)
    order = _memory_order(like.stride())
    return like.new_empty((*(like.shape[dim] for dim in order), columns)).permute(*map(order.index, range(3)), 3)


def clear_rows(lse: Tensor | None, *tensors: Tensor | None) -> None:
    """What a row that no packed sequence owns is to hold, since no kernel visits it: 0, and -inf in lse.

    All rows are written, because only the offsets say which ones have no owner, and to read those the host would have
    to wait for a GPU.
    """
    if lse is not None:
        lse.fill_(float("-inf"))
    for x in tensors:
        if x is not None:
            x.zero_()


def gradients(
    backend: Backend, problem: AttentionProblem, wanted: Wanted, dout: Tensor | None, dlse: Tensor | None, *inputs
) -> Gradients:
    """The backend's gradients, where either output may have none."""
    if dout is None and dlse is None:
        return Gradients()
    if dout is None:
        out = inputs[3]
        dout = torch.zeros_like(out)
    return profiling.named(backend).backward(problem, wanted, dout, dlse, *inputs)


def follow_layout(x: Tensor, like: Tensor) -> Tensor:
    """x (B, heads, rows, columns) with the strides that `empty_like_layout` would give it."""
    twin = torch.empty_strided(like.shape, like.stride(), device="meta")
    strides = empty_like_layout(twin, x.shape[3]).stride()
    order = _memory_order(strides)
    x = x.permute(*order, 3).contiguous().permute(*map(order.index, range(3)), 3)
    # Only the meaningless strides of dimensions of size 1 can still differ.
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _memory_order(strides: tuple[int, ...]) -> list[int]:
    """The dimensions before the last, outermost first."""
    return sorted(range(3), key=strides.__getitem__, reverse=True)
