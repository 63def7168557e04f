"""Attention whose queries stay on their ranks, while keys and values travel.

There are as many steps as ranks. In step t, rank r computes with the keys of rank r - t, while those of rank r - t - 1
are on their way. A rank gets only the keys that its queries see. In backward, the keys travel again, and the gradients
that a rank has computed for the keys of another one travel back. All sums have a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_attn import partial
from fused_attn.attention.inputs import Gradients
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.distributed.blocks import Block, Positions, blocks, needed_keys
from fused_attn.distributed.exchange import Exchange, refuse_second_derivatives


class Ring(NamedTuple):
    """What the steps of a call share.

    options: those of `partial.attention_partial` that hold for all blocks
    """

    group: dist.ProcessGroup
    positions: Positions
    options: dict[str, Any]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def source(self, step: int) -> int:
        """The rank whose keys this rank computes with in a step."""
        return (self.rank - step) % self.positions.key.world

    def target(self, step: int) -> int:
        """The rank that computes with the keys of this rank in a step."""
        return (self.rank + step) % self.positions.key.world


class Keys(NamedTuple):
    """Keys of one rank that another rank computes with.

    rows: which rows of the shard
    tensors: key, value, and key padding if there is any
    """

    rows: slice
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], rows: slice) -> Keys:
        key, value, *padding = tensors
        return cls(rows, (key[:, :, rows], value[:, :, rows], *(x[:, rows] for x in padding)))

    def rows_of(self, block: Block) -> slice:
        """The rows of a block in `tensors`."""
        return slice(block.key_rows.start - self.rows.start, block.key_rows.stop - self.rows.start)

    def block(self, block: Block) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(key, value, further options) of a block."""
        key, value, *padding = Keys.of(self.tensors, self.rows_of(block)).tensors
        return key, value, {"key_padding_mask": padding[0]} if padding else {}


class KeysOnTheWay:
    """The keys of step after step: `next` waits for those of the current step, and sends for those of the next one."""

    def __init__(self, ring: Ring, tensors: tuple[Tensor, ...]):
        self.ring, self.tensors, self.step = ring, tensors, 0
        self.current = Keys.of(tensors, slice(0, tensors[0].shape[2]))

    def __iter__(self):
        """Pairs (rank that owns the keys, `Keys`)."""
        for step in range(self.ring.positions.key.world):
            arriving = self._start(step + 1)
            yield self.ring.source(step), self.current
            if arriving is not None:
                rows, exchange = arriving
                self.current = Keys(rows, tuple(exchange.wait()))

    def _start(self, step: int) -> tuple[slice, Exchange] | None:
        """The exchange of the keys of a step; None after the last step."""
        ring = self.ring
        if step == ring.positions.key.world:
            return None
        target, source = ring.target(step), ring.source(step)
        sent = Keys.of(self.tensors, needed_keys(ring.positions, target, ring.rank)).tensors
        rows = needed_keys(ring.positions, ring.rank, source)
        dim_of_rows = (2, 2, 1)
        received = [
            x.new_empty(*x.shape[:dim], rows.stop - rows.start, *x.shape[dim + 1 :])
            for x, dim in zip(self.tensors, dim_of_rows, strict=False)
        ]
        return rows, Exchange(ring.group, target, [x.contiguous() for x in sent], source, received)


class RingAttention(torch.autograd.Function):
    """``apply(ring, query, key, value, padding, relative_bias, sinks)`` -> (out, lse) of the queries of this rank.

    query:         (B, H, L of this rank, D)
    key, value:    (B, Hkv, S of this rank, D or Dv)
    padding:       (B, S of this rank), a key padding mask without gradient, or None
    relative_bias: (H or 1, columns) or (columns), the whole one, or None. Its gradient is the part of this rank
    sinks:         (H,) or None. Its gradient is the part of this rank
    """

    @staticmethod
    def forward(ctx, ring: Ring, query, key, value, padding, relative_bias, sinks):
        tensors = (key, value) if padding is None else (key, value, padding)
        options = ring.options if relative_bias is None else ring.options | {"relative_bias": relative_bias}
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.zeros(*query.shape[:3], value.shape[3], dtype=sums, device=query.device)
        lse = torch.full(query.shape[:3], float("-inf"), dtype=sums, device=query.device)
        for owner, keys in KeysOnTheWay(ring, tensors):
            for block in blocks(ring.positions, ring.rank, owner):
                key_part, value_part, more = keys.block(block)
                part = partial.attention_partial(
                    query[:, :, block.query_rows], key_part, value_part,
                    query_offset=block.query_offset, key_offset=block.key_offset, **options, **more,
                )  # fmt: skip
                _add(out[:, :, block.query_rows], lse[:, :, block.query_rows], *part)
        if sinks is not None:
            out, lse = partial.join_sinks(out, lse, sinks)
        result = empty_like_layout(query, value.shape[3]).copy_(out)
        ctx.ring, ctx.options = ring, options
        ctx.save_for_backward(query, key, value, padding, relative_bias, sinks, result, lse)
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        refuse_second_derivatives()
        query, key, value, padding, relative_bias, sinks, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        if dout is None and dlse is None:
            return None, None, None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        tensors = (key, value) if padding is None else (key, value, padding)

        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=lse.dtype, device=x.device)

        dquery, dkey, dvalue = map(zeros, (query, key, value))
        dbias = None if relative_bias is None else zeros(relative_bias)
        returning: list[tuple[slice, Exchange]] = []
        for step, (owner, keys) in enumerate(KeysOnTheWay(ring, tensors)):
            dkeys = (dkey, dvalue) if step == 0 else tuple(map(zeros, keys.tensors[:2]))
            for block in blocks(ring.positions, ring.rank, owner):
                key_part, value_part, more = keys.block(block)
                rows, key_rows = block.query_rows, keys.rows_of(block)
                into = Gradients(
                    dquery[:, :, rows], dkeys[0][:, :, key_rows], dkeys[1][:, :, key_rows], relative_bias=dbias
                )
                partial.attention_partial_backward(
                    dout[:, :, rows], query[:, :, rows], key_part, value_part, out[:, :, rows], lse[:, :, rows],
                    dlse=None if dlse is None else dlse[:, :, rows], into=into,
                    query_offset=block.query_offset, key_offset=block.key_offset, **ctx.options, **more,
                )  # fmt: skip
            if step > 0:
                target = ring.target(step)
                rows = needed_keys(ring.positions, target, ring.rank)
                received = [x[:, :, rows].new_empty(x[:, :, rows].shape) for x in (dkey, dvalue)]
                returning.append((rows, Exchange(ring.group, owner, dkeys, target, received)))
            # The gradients that come back are added one step later, so that they travel during the computation.
            is_last = step == ring.positions.key.world - 1
            while len(returning) > (0 if is_last else 1):
                rows, exchange = returning.pop(0)
                for x, part in zip((dkey, dvalue), exchange.wait(), strict=True):
                    x[:, :, rows] += part
        dsinks = None
        if sinks is not None:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            delta = delta if dlse is None else delta - dlse
            weight = torch.exp((sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == float("-inf"), float("-inf")))
            dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        return (
            None,
            *(dx.to(x.dtype) for dx, x in ((dquery, query), (dkey, key), (dvalue, value))),
            None,
            None if dbias is None else dbias.to(relative_bias.dtype),
            dsinks,
        )


def _add(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Adds a part to the sums (out, lse) of its queries, in place. The result is that of `partial.merge`."""
    joined = torch.logaddexp(lse, part_lse)
    finite = joined.masked_fill(joined == float("-inf"), 0.0)
    out *= torch.exp(lse - finite).unsqueeze(-1)
    out += part_out * torch.exp(part_lse - finite).unsqueeze(-1)
    lse.copy_(joined)
