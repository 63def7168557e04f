"""Messages between ranks: point to point, all to all, and sums. Every byte that a rank sends is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """How many bytes this rank has sent, without the small messages that agree on lengths."""

    sent_bytes: int = 0


_counters: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the bytes that this rank sends inside of the ``with`` block, those of backward calls included.

    >>> from fused_attn.distributed import count_traffic
    >>> with count_traffic() as traffic:
    ...     pass
    >>> traffic.sent_bytes
    0
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def _count(tensors: Sequence[Tensor]) -> None:
    for traffic in _counters:
        traffic.sent_bytes += sum(x.numel() * x.element_size() for x in tensors)


class Exchange:
    """Tensors on their way to one rank, and tensors on their way from another. `wait` returns the received tensors.

    Args:
        group: the process group.
        to_rank: the rank of the group that gets `sent`.
        sent: contiguous tensors. Empty ones are not sent.
        from_rank: the rank of the group that sends `received`.
        received: contiguous tensors to be filled, in the order in which from_rank sends them.
    """

    def __init__(
        self, group: dist.ProcessGroup, to_rank: int, sent: Sequence[Tensor], from_rank: int, received: Sequence[Tensor]
    ):
        sent = [x for x in sent if x.numel()]
        _count(sent)
        self._sent = sent  # The memory must live until the messages have left.
        self._received = received
        target, source = dist.get_global_rank(group, to_rank), dist.get_global_rank(group, from_rank)
        messages = [dist.P2POp(dist.isend, x, target, group) for x in sent]
        messages += [dist.P2POp(dist.irecv, x, source, group) for x in received if x.numel()]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Sequence[Tensor]:
        """The received tensors, when they are there."""
        for work in self._works:
            work.wait()
        return self._received


def all_to_all(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Sends ``pieces[r]`` to rank r, and returns what the ranks have sent to this one.

    shapes: the shape of the tensor that comes from each rank
    """
    own = dist.get_rank(group)
    _count([x for rank, x in enumerate(pieces) if rank != own])
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    received = pieces[0].new_empty(sum(sizes))
    dist.all_to_all_single(
        received, torch.cat([x.flatten() for x in pieces]), sizes, [x.numel() for x in pieces], group=group
    )
    return [x.view(tuple(shape)) for x, shape in zip(received.split(sizes), shapes, strict=True)]


def ordered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over all ranks. The order of the additions is that of the ranks, so all ranks get the same bits."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    _count([x] * (len(parts) - 1))
    dist.all_gather(parts, x.contiguous(), group=group)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def refuse_second_derivatives() -> None:
    """Raises in a backward whose gradients must be differentiable themselves. Such gradients would lack a part."""
    if torch.is_grad_enabled():  # in backward, only with create_graph
        raise RuntimeError("context_parallel_attention: expected no create_graph, as there are no second derivatives")


class SumGradient(torch.autograd.Function):
    """The identity, for a tensor that all ranks hold. Its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        refuse_second_derivatives()
        return ordered_sum(dx, ctx.group), None
