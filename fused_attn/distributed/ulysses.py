"""From shards of the sequence to shards of the heads, and back: each rank gets all rows of some of the heads.

The scheme is that of Jacobs et al., "DeepSpeed Ulysses", 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_attn.distributed.exchange import all_to_all, refuse_second_derivatives
from fused_attn.distributed.sequence import Segment, Sharding


class Rows(NamedTuple):
    """The rows that the ranks of a group hold together.

    shards: the segments of each rank of the group
    """

    shards: list[list[Segment]]

    @classmethod
    def of(cls, sharding: Sharding, ranks: list[int]) -> Rows:
        """ranks: the ranks of the group, as numbers among all ranks of the sharding."""
        return cls([sharding.segments(rank) for rank in ranks])

    def counts(self) -> list[int]:
        """The number of rows of each rank."""
        return [sum(x.end - x.begin for x in shard) for shard in self.shards]

    def pieces(self) -> list[tuple[int, Segment]]:
        """Pairs (rank in the group, segment), in ascending order of positions."""
        found = [(rank, segment) for rank, shard in enumerate(self.shards) for segment in shard]
        return sorted(found, key=lambda pair: pair[1].begin)


class SwapShards(torch.autograd.Function):
    """``apply(x, rows, group, to_heads)``: exchanges the shards of x (B, heads, rows, columns) within a group.

    to_heads: True: from some rows of all heads to all rows of some heads. False: the way back
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Rows, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.rows, ctx.group, ctx.to_heads = rows, group, to_heads
        return (_to_heads if to_heads else _to_rows)(x, rows, group)

    @staticmethod
    def backward(ctx, dx: Tensor):
        refuse_second_derivatives()
        return (_to_rows if ctx.to_heads else _to_heads)(dx, ctx.rows, ctx.group), None, None, None


def _to_heads(x: Tensor, rows: Rows, group: dist.ProcessGroup) -> Tensor:
    batch, heads, _, columns = x.shape
    heads //= dist.get_world_size(group)
    shapes = [(batch, heads, count, columns) for count in rows.counts()]
    received = all_to_all([part.contiguous() for part in x.split(heads, 1)], shapes, group)
    pieces = [received[rank].narrow(2, at, end - begin) for rank, (begin, end, at) in rows.pieces()]
    return torch.cat(pieces, 2) if pieces else received[0]


def _to_rows(x: Tensor, rows: Rows, group: dist.ProcessGroup) -> Tensor:
    batch, heads, _, columns = x.shape
    of_ranks: list[list[Tensor]] = [[] for _ in rows.shards]
    start = 0
    for rank, (begin, end, _) in rows.pieces():  # segments of a rank are in ascending order, too
        of_ranks[rank].append(x.narrow(2, start, end - begin))
        start += end - begin
    pieces = [torch.cat(parts, 2) if parts else x.narrow(2, 0, 0) for parts in of_ranks]
    own = rows.counts()[dist.get_rank(group)]
    shapes = [(batch, heads, own, columns)] * len(pieces)
    return torch.cat(all_to_all([piece.contiguous() for piece in pieces], shapes, group), 1)


def repeats(num_heads: int, num_kv_heads: int, world: int) -> int:
    """How often each key head is repeated, so that the heads can be divided among `world` ranks."""
    factor = world // math.gcd(num_kv_heads, world)
    return factor if num_heads % (num_kv_heads * factor) == 0 else num_heads // num_kv_heads


def gather_rows(x: Tensor, rows: Rows, group: dist.ProcessGroup) -> Tensor:
    """(B, rows of the group) from the shard (B, rows of this rank), without gradient. For key padding masks."""
    shapes = [(x.shape[0], count) for count in rows.counts()]
    received = all_to_all([x.contiguous()] * len(shapes), shapes, group)
    pieces = [received[rank].narrow(1, at, end - begin) for rank, (begin, end, at) in rows.pieces()]
    return torch.cat(pieces, 1) if pieces else received[0]
