"""Attention whose queries stay on their ranks, while keys and values travel.

There are as many steps as ranks. In step t, rank r computes with the keys of rank r - t, while the keys of rank
r - t - 1 are on their way. A rank gets only the keys that its queries see. In backward, the keys travel again. A rank
then computes gradients for the keys of other ranks, and sends each gradient back to the rank that owns the keys. All
sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_attn import partial
from fused_attn.attention import formula
from fused_attn.attention.inputs import Gradients, Saved, Wanted
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.distributed.blocks import Block, SharedScores, blocks, needed_keys
from fused_attn.distributed.exchange import Exchange, refuse_second_derivatives
from fused_attn.partial import PartialOptions


class Ring(NamedTuple):
    """What the steps of a call share.

    options: the options that all blocks share, without relative_bias and key_padding_mask
    """

    group: dist.ProcessGroup
    scores: SharedScores
    options: PartialOptions

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def source(self, step: int) -> int:
        """The rank whose keys this rank computes with in a step."""
        return (self.rank - step) % self.scores.key.world

    def target(self, step: int) -> int:
        """The rank that computes with the keys of this rank in a step."""
        return (self.rank + step) % self.scores.key.world


class Keys(NamedTuple):
    """Keys of one rank that another rank computes with.

    rows: which rows of the shard, in ascending order
    tensors: key, value, and key padding if there is any, with these rows one after another
    """

    rows: list[slice]
    tensors: tuple[Tensor, ...]

    def rows_of(self, block: Block) -> slice:
        """The rows of a block in `tensors`. The block lies in one of the slices `rows`."""
        wanted, start = block.key_rows, 0
        for rows in self.rows:
            if rows.start <= wanted.start and wanted.stop <= rows.stop:
                break
            start += rows.stop - rows.start
        return slice(start + wanted.start - rows.start, start + wanted.stop - rows.start)

    def block(self, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """(key, value, key padding) of a block."""
        rows = self.rows_of(block)
        key, value, *padding = self.tensors
        return key[:, :, rows], value[:, :, rows], padding[0][:, rows] if padding else None


def _dim_of_rows(x: Tensor) -> int:
    """2 for keys and values (B, Hkv, S, columns), 1 for padding (B, S)."""
    return 2 if x.dim() == 4 else 1


def _take(x: Tensor, rows: list[slice]) -> Tensor:
    """The given rows one after another: contiguous, or a view if there is one slice."""
    dim = _dim_of_rows(x)
    parts = [x.narrow(dim, part.start, part.stop - part.start) for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def _empty(x: Tensor, rows: list[slice]) -> Tensor:
    """Uninitialised memory for as many rows as there are in the slices."""
    shape = list(x.shape)
    shape[_dim_of_rows(x)] = sum(part.stop - part.start for part in rows)
    return x.new_empty(shape)


class KeysOnTheWay:
    """Iterates over the keys of all steps. The keys of the next step travel while the caller uses the current ones."""

    def __init__(self, ring: Ring, tensors: tuple[Tensor, ...]):
        self.ring, self.tensors = ring, tensors
        self.current = Keys([slice(0, tensors[0].shape[2])], tensors)

    def __iter__(self) -> Iterator[tuple[int, Keys]]:
        """Pairs (rank that owns the keys, `Keys`)."""
        for step in range(self.ring.scores.key.world):
            arriving = self._start(step + 1)
            yield self.ring.source(step), self.current
            if arriving is not None:
                rows, exchange = arriving
                self.current = Keys(rows, tuple(exchange.wait()))

    def _start(self, step: int) -> tuple[list[slice], Exchange] | None:
        """The exchange of the keys of a step; None after the last step."""
        ring = self.ring
        if step == ring.scores.key.world:
            return None
        target, source = ring.target(step), ring.source(step)
        leaving = needed_keys(ring.scores, target, ring.rank)
        rows = needed_keys(ring.scores, ring.rank, source)
        sent = [_take(x, leaving).contiguous() for x in self.tensors]
        return rows, Exchange(ring.group, target, sent, source, [_empty(x, rows) for x in self.tensors])


class RingAttention(torch.autograd.Function):
    """``apply(ring, query, key, value, padding, relative_bias, sinks)`` -> (out, lse) of the queries of this rank.

    query:         (B, H, L of this rank, D)
    key, value:    (B, Hkv, S of this rank, D or Dv)
    padding:       (B, S of this rank), a key padding mask without gradient, or None
    relative_bias: (H or 1, columns) or (columns), the whole one, or None. Its gradient is the summand of this rank
    sinks:         (H,) or None. Their gradient is the summand of this rank
    """

    @staticmethod
    def forward(ctx, ring: Ring, query, key, value, padding, relative_bias, sinks):
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.zeros(*query.shape[:3], value.shape[3], dtype=sums, device=query.device)
        lse = torch.full(query.shape[:3], float("-inf"), dtype=sums, device=query.device)
        shared = replace(ring.options, relative_bias=relative_bias)
        for owner, keys in KeysOnTheWay(ring, (key, value) if padding is None else (key, value, padding)):
            for block in blocks(ring.scores, ring.rank, owner):
                rows = block.query_rows
                key_part, value_part, padding_part = keys.block(block)
                options = replace(block.options(shared, query.device), key_padding_mask=padding_part)
                part = partial.attend(query[:, :, rows], key_part, value_part, options)
                sum_ = out[:, :, rows], lse[:, :, rows]
                for x, joined in zip(sum_, partial.merge(*zip(sum_, part, strict=True)), strict=True):
                    x.copy_(joined)
        if sinks is not None:
            out, lse = partial.join_sinks(out, lse, sinks)
        result = empty_like_layout(query, value.shape[3]).copy_(out)
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, padding, relative_bias, sinks, result, lse)
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        refuse_second_derivatives()
        _, needs_query, needs_key, needs_value, _, needs_bias, needs_sinks = ctx.needs_input_grad
        wanted = Wanted(query=needs_query, key=needs_key, value=needs_value, relative_bias=needs_bias)
        query, key, value, padding, relative_bias, sinks, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        saved = Saved(out, lse, dout, dlse)
        sums = Gradients()
        if any(wanted):
            sums = _backward_around(ctx.ring, (query, key, value, padding, relative_bias), saved, wanted)
        dsinks = None
        if needs_sinks:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            dsinks = formula.dsinks(sinks.to(lse.dtype), lse, delta if dlse is None else delta - dlse)
        given = (query, key, value, relative_bias, sinks)
        found = (sums.query, sums.key, sums.value, sums.relative_bias, dsinks)
        dquery, dkey, dvalue, dbias, dsinks = (
            None if dx is None else dx.to(x.dtype) for dx, x in zip(found, given, strict=True)
        )
        return None, dquery, dkey, dvalue, None, dbias, dsinks


def _backward_around(ring: Ring, tensors: tuple[Tensor, ...], saved: Saved, wanted: Wanted) -> Gradients:
    """The wanted gradients, in the dtype of lse: of the rows of this rank, and its summand for the relative bias.

    tensors: query, key, value, padding, relative_bias, as in `RingAttention`
    """
    query, key, value, padding, relative_bias = tensors
    assert saved.lse is not None, "forward has saved it"
    sums = saved.lse.dtype

    def zeros(x: Tensor, is_wanted: bool) -> Tensor | None:
        return torch.zeros(x.shape, dtype=sums, device=x.device) if is_wanted else None

    def of(x: Tensor | None, rows: slice) -> Tensor | None:
        return None if x is None else x[:, :, rows]

    dquery, dkey, dvalue = zeros(query, wanted.query), zeros(key, wanted.key), zeros(value, wanted.value)
    dbias = zeros(relative_bias, wanted.relative_bias)
    shared = replace(ring.options, relative_bias=relative_bias)
    returning: list[tuple[list[slice], Exchange]] = []
    for step, (owner, keys) in enumerate(
        KeysOnTheWay(ring, (key, value) if padding is None else (key, value, padding))
    ):
        if step == 0:
            dkey_part, dvalue_part = dkey, dvalue
        else:
            dkey_part, dvalue_part = zeros(keys.tensors[0], wanted.key), zeros(keys.tensors[1], wanted.value)
        for block in blocks(ring.scores, ring.rank, owner):
            rows, key_rows = block.query_rows, keys.rows_of(block)
            key_part, value_part, padding_part = keys.block(block)
            options = replace(block.options(shared, query.device), key_padding_mask=padding_part)
            into = Gradients(of(dquery, rows), of(dkey_part, key_rows), of(dvalue_part, key_rows), relative_bias=dbias)
            of_rows = Saved(*(of(x, rows) for x in saved))
            partial.backward(query[:, :, rows], key_part, value_part, of_rows, options, wanted, into)
        if step > 0:
            target = ring.target(step)
            leaving = [x for x in (dkey_part, dvalue_part) if x is not None]
            pieces = needed_keys(ring.scores, target, ring.rank)
            received = [_empty(x, pieces) for x in (dkey, dvalue) if x is not None]
            returning.append((pieces, Exchange(ring.group, owner, leaving, target, received)))
        # The gradients that come back are added one step later, so that they travel during the computation.
        is_last = step == ring.scores.key.world - 1
        while len(returning) > (0 if is_last else 1):
            pieces, exchange = returning.pop(0)
            for x, part in zip((x for x in (dkey, dvalue) if x is not None), exchange.wait(), strict=True):
                _add_rows(x, pieces, part)
    return Gradients(dquery, dkey, dvalue, relative_bias=dbias)


def _add_rows(x: Tensor, rows: list[slice], part: Tensor) -> None:
    """Adds what `_take` would take from x, in place. Both are (B, Hkv, rows, columns)."""
    start = 0
    for piece in rows:
        length = piece.stop - piece.start
        x[:, :, piece] += part[:, :, start : start + length]
        start += length
