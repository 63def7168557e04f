"""`context_parallel_attention`: the attention of a sequence that several ranks share."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fused_attn import planning
from fused_attn.attention import checks, dropout, masks
from fused_attn.distributed import ulysses
from fused_attn.distributed.blocks import Positions
from fused_attn.distributed.exchange import SumGradient
from fused_attn.distributed.planning import cheapest_method
from fused_attn.distributed.ring import Ring, RingAttention
from fused_attn.distributed.sequence import Sharding, group_of, shardings_of
from fused_attn.partial import PartialOptions, attend

METHODS = ("auto", "ring", "ulysses")


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | dist.ProcessGroup,
    method: str = "auto",
    seqlens: tuple[int, int] | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_attention` of a sequence whose rows are shared by the ranks of a mesh. Differentiable.

    The result is that of one process with the whole sequence, up to rounding. The same entries are dropped. For a given
    mesh and method, repeated calls give the same bits.

    Args:
        query: (B, H, L of this rank, D), the shard that `shard_sequence` makes.
        key: (B, Hkv, S of this rank, D), likewise.
        value: (B, Hkv, S of this rank, Dv), likewise.
        mesh: the ranks that share the sequence, with one dimension; or with two, for a ring (first dimension) of groups
            that divide the heads among them (second dimension, "ulysses").
        method: how the ranks of a mesh of one dimension work together.

            - ``"ring"``: keys and values travel between the ranks. A rank gets only keys that its queries see.
            - ``"ulysses"``: each rank gets all rows of some heads. The number of ranks must divide H.
            - ``"auto"``: the one of the two that sends fewer bytes.
        seqlens: (L, S) of the whole sequences. Without them, the ranks compare the lengths of their shards and their
            options first, by a small collective that the host waits for.
        sinks: (H,), see `fused_attention`.
        return_lse: also return lse (B, H, L of this rank).
        options: dropout_p, dropout_seed, is_causal, scale, enable_gqa, window_size, softcap and backend of
            `fused_attention`; key_padding_mask (B, S of this rank), sharded like the keys; the whole relative_bias.
            Without dropout_seed, the first rank draws a seed for all.

    Every rank holds relative_bias and sinks, and every rank gets their whole gradient: the sum over the ranks. A
    wrapper that adds up the gradients of parameters over the same ranks must not add up these two once more.

    Returns:
        out (B, H, L of this rank, Dv), and with return_lse also lse.

    Raises:
        TypeError, ValueError: an argument does not fit. Without seqlens, shards or options that differ between the
            ranks raise on all of them.
        RuntimeError: a rank has ended, or does not answer within the time limit of the process group.
    """
    if method not in METHODS:
        raise checks.fail("method", f"one of {METHODS}", repr(method))
    for name in ("attn_mask", "query_offset", "key_offset", "batch_offset", "head_offset", "seqlen_q"):
        if options.get(name) is not None:
            raise checks.fail(
                name, "no such option for a shared sequence; see the documentation for those there are", "one"
            )
    chosen = PartialOptions.of("context_parallel_attention", options)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise checks.fail(name, "a tensor (B, heads, rows, columns)", getattr(x, "shape", type(x).__name__))
    padding = chosen.key_padding_mask
    if padding is not None and padding.requires_grad:
        raise checks.fail("key_padding_mask", "a mask that requires no gradient", "one that does")
    group = group_of(mesh)
    world = dist.get_world_size(group)
    if seqlens is None:
        described = (
            query.shape[:2],
            key.shape[:2],
            query.shape[3],
            value.shape[3],
            query.dtype,
            method,
            *_plain(chosen),
        )
        sharded_q, sharded_k = shardings_of(
            {"query": query.shape[2], "key": key.shape[2]}, group, query.device, _fingerprint(described)
        )
    else:
        sharded_q, sharded_k = (Sharding.of(length, world) for length in seqlens)
        _check_rows("query", query, sharded_q, dist.get_rank(group))
        _check_rows("key", key, sharded_k, dist.get_rank(group))
    _check_whole(query, key, value, sinks, chosen, (sharded_q.length, sharded_k.length))
    band = masks.band_of(chosen.is_causal, checks.check_window(chosen.window_size))
    positions = Positions(
        sharded_q, sharded_k, band, are_needed=chosen.relative_bias is not None or chosen.dropout_p > 0.0
    )
    if chosen.dropout_p and chosen.dropout_seed is None:
        chosen = replace(chosen, dropout_seed=_shared_seed(query.device, group))
    if isinstance(mesh, DeviceMesh) and mesh.ndim == 2:
        parts = _Parts(mesh.get_group(0), mesh.get_group(1))
    else:
        if method == "auto":
            method = cheapest_method(positions, query.shape, key.shape, value.shape)
        parts = _Parts(group, None) if method == "ring" else _Parts(None, group)
    relative_bias = None if chosen.relative_bias is None else SumGradient.apply(chosen.relative_bias, group)
    sinks = None if sinks is None else SumGradient.apply(sinks, group)
    out, lse = _attend(parts, positions, query, key, value, sinks, replace(chosen, relative_bias=relative_bias))
    return (out, lse) if return_lse else out


class _Parts(NamedTuple):
    """ring: the group around which keys travel; ulysses: the group that divides the heads. None = a group of one."""

    ring: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None


def _attend(
    parts: _Parts, positions: Positions, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None,
    options: PartialOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of the rows of this rank: shards of heads around, attention, and back."""
    if parts.ulysses is None:
        return _around(parts.ring, positions, query, key, value, sinks, options)
    world, rank = dist.get_world_size(parts.ulysses), dist.get_rank(parts.ulysses)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads % world != 0:
        raise checks.fail("mesh", f"a number of ranks that divides the {num_heads} heads", f"{world} ranks")
    if num_kv_heads % world != 0:
        repeat = ulysses.repeats(num_heads, num_kv_heads, world)
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    first = 0 if parts.ring is None else dist.get_rank(parts.ring) * world
    ranks = list(range(first, first + world))
    rows_q, rows_k = (ulysses.Rows.of(x, ranks) for x in (positions.query, positions.key))
    query = ulysses.SwapShards.apply(query, rows_q, parts.ulysses, True)
    key = ulysses.SwapShards.apply(key, rows_k, parts.ulysses, True)
    value = ulysses.SwapShards.apply(value, rows_k, parts.ulysses, True)
    padding = options.key_padding_mask
    heads = slice(rank * (num_heads // world), (rank + 1) * (num_heads // world))
    bias = options.relative_bias
    options = replace(
        options,
        key_padding_mask=None if padding is None else ulysses.gather_rows(padding, rows_k, parts.ulysses),
        relative_bias=bias if bias is None or bias.dim() == 1 or bias.shape[0] == 1 else bias[heads],
        head_offset=heads.start,
    )
    grouped = positions._replace(query=positions.query.of_groups(world), key=positions.key.of_groups(world))
    out, lse = _around(parts.ring, grouped, query, key, value, None if sinks is None else sinks[heads], options)
    out = ulysses.SwapShards.apply(out, rows_q, parts.ulysses, False)
    lse = ulysses.SwapShards.apply(lse.unsqueeze(-1), rows_q, parts.ulysses, False).squeeze(-1)
    return out, lse


def _around(
    group: dist.ProcessGroup | None, positions: Positions, query: Tensor, key: Tensor, value: Tensor,
    sinks: Tensor | None, options: PartialOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse), with keys that travel around the group. A group of one calls the kernel directly."""
    options = replace(options, seqlen_q=positions.query.length)
    if group is None or positions.key.world == 1:
        return attend(query, key, value, options, sinks)
    padding, bias = options.key_padding_mask, options.relative_bias
    shared = {name: x for name, x in vars(options).items() if name not in ("key_padding_mask", "relative_bias")}
    shared = {name: x for name, x in shared.items() if name not in ("query_offset", "key_offset")}
    return RingAttention.apply(Ring(group, positions, shared), query, key, value, padding, bias, sinks)


def _check_whole(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: PartialOptions, seqlens: tuple[int, int]
) -> None:
    """Raises the errors that `fused_attention` raises for the whole tensors. Nothing has been sent yet.

    seqlens: (L, S) of the whole sequences
    """

    def whole(x: Tensor | None, *shape: int) -> Any:
        return None if x is None else torch.empty(shape or x.shape, dtype=x.dtype, device="meta")

    (batch, heads, _, head_dim), (_, kv_heads, _, value_dim) = query.shape, value.shape
    rows_q, rows_k = seqlens
    planning.plan(
        True,  # plans without the choice of a backend, which the meta device would not have
        None,
        (
            whole(query, batch, heads, rows_q, head_dim),
            whole(key, batch, key.shape[1], rows_k, key.shape[3]),
            whole(value, value.shape[0], kv_heads, rows_k, value_dim),
            None,
            whole(options.relative_bias),
            whole(sinks),
            whole(options.key_padding_mask, batch, rows_k),
            None,
        ),
        tuple(getattr(options, name) for name in planning.Options._fields),
        options.backend,
    )


def _plain(options: PartialOptions) -> list:
    """The options that must be the same on all ranks, as values that can be printed."""
    return [
        (name, tuple(x.shape) if isinstance(x, Tensor) else x)
        for name, x in sorted(vars(options).items())
        if name not in ("key_padding_mask", "dropout_seed", "backend")
    ] + [options.key_padding_mask is None, options.dropout_seed is None]


def _fingerprint(described: tuple) -> int:
    """A number of 63 bits that differs for nearly all different descriptions."""
    return int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:8], "big") >> 1


def _check_rows(name: str, x: Tensor, sharding: Sharding, rank: int) -> None:
    if x.shape[2] != sharding.rows(rank):
        raise checks.fail(name, f"the {sharding.rows(rank)} rows of rank {rank} of {sharding.length}", f"{x.shape[2]}")


def _shared_seed(device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """A seed that the first rank draws for all."""
    seed = dropout.draw_seed(device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return seed
