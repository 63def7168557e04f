"""`context_parallel_attention`: the attention of a sequence that several ranks share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fused_attn import modes, partial, planning
from fused_attn.attention import checks, dropout, masks
from fused_attn.attention.problem import Band
from fused_attn.distributed import ulysses
from fused_attn.distributed.blocks import Documents, SharedScores
from fused_attn.distributed.exchange import SumGradient
from fused_attn.distributed.ring import Ring, RingAttention
from fused_attn.distributed.sequence import CHECKED, Sharding, failing_together, group_of, shardings_of
from fused_attn.distributed.traffic import cheapest_method
from fused_attn.partial import PartialOptions

METHODS = ("auto", "ring", "ulysses")
#: `cheapest_method` takes time, because it counts the blocks of all pairs of ranks. All layers of a model ask the same.
_cheapest_method = functools.lru_cache(maxsize=256)(cheapest_method)
#: Options of `attention_partial` that a shared sequence does not take: name -> the reason.
_REFUSED = {
    "attn_mask": "because no rank holds whole rows of scores; is_causal, window_size and relative_bias take no mask",
    **dict.fromkeys(
        ("query_offset", "key_offset", "batch_offset", "head_offset", "seqlen_q", "packed"),
        "because the shards say where their rows stand",
    ),
}
#: The same for packed sequences.
_REFUSED_PACKED = {
    **_REFUSED,
    "key_padding_mask": "because packed sequences have no padding",
    "num_splits": "because the keys of packed sequences are not split",
}


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
        mesh: the ranks that share the sequence. In a mesh of two dimensions, the first one is a ring of groups, and the
            second one is the ranks of a group, which divide the heads among them ("ulysses").
        method: how the ranks of a mesh of one dimension work together.

            - ``"ring"``: keys and values travel between the ranks. A rank gets only keys that its queries see.
            - ``"ulysses"``: each rank gets all rows of some heads. The number of ranks must divide H.
            - ``"auto"``: the method of these two that sends fewer bytes.
        seqlens: (L, S) of the whole sequences. If seqlens is None, the ranks first compare the lengths of their shards
            and their options. The comparison is a small collective, for which the host waits.
        sinks: (H,), see `fused_attention`.
        return_lse: also return lse (B, H, L of this rank).
        options: dropout_p, dropout_seed, is_causal, scale, enable_gqa, window_size, softcap, num_splits and backend of
            `fused_attention`; key_padding_mask (B, S of this rank), sharded like the keys; the whole relative_bias.
            Without dropout_seed, the first rank draws a seed for all. The ranks do not compare a dropout_seed on a GPU,
            for which the host would wait.

    Every rank holds relative_bias and sinks, and every rank gets their whole gradient: the sum over the ranks. A
    wrapper that adds up the gradients of parameters over the same ranks must not add up these two once more.

    Returns:
        out (B, H, L of this rank, Dv), and with return_lse also lse.

    Raises:
        TypeError, ValueError: an argument does not fit. Without seqlens, shards or options that differ between the
            ranks raise on all of them. So does an argument that is wrong on one rank only.
        RuntimeError: a rank has ended, or does not answer within the time limit of the process group.
    """
    with failing_together(mesh, query, number=2) if seqlens is None else contextlib.nullcontext():
        chosen = _options("context_parallel_attention", method, options)
        checks.check_flag("return_lse", return_lse)
        if seqlens is not None:
            _check_seqlens(seqlens)
        partial.check_rank_4(query, key, value)
        query, key, value = modes.autocast(query, key, value)
        _check_own(query, key, value, sinks, chosen)
    group = group_of(mesh)
    if seqlens is None and dist.get_world_size(group) == 1:
        seqlens = query.shape[2], key.shape[2]
    described = _described(query, key, value, sinks, method, chosen) if seqlens is None else None
    sharded_q, sharded_k = _shardings(group, query, key, seqlens, described)
    _check_whole(query, key, value, sinks, chosen, (sharded_q.length, sharded_k.length))
    scores = SharedScores(
        sharded_q, sharded_k, _band(chosen), needs_positions=chosen.relative_bias is not None or chosen.dropout_p > 0.0
    )
    chosen = replace(chosen, seqlen_q=sharded_q.length)
    out, lse = _shared(mesh, group, method, scores, query, key, value, sinks, chosen)
    return (out, lse) if return_lse else out


def context_parallel_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mesh: DeviceMesh | dist.ProcessGroup,
    method: str = "auto",
    compare_ranks: bool = True,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_attention_varlen` of packed sequences whose rows are shared by the ranks of a mesh. Differentiable.

    The result is that of one process with all rows, as for `context_parallel_attention`. A sequence may lie on several
    ranks. With ``method="ring"``, a rank gets only the keys of sequences of which it has queries.

    Args:
        query: (rows of this rank, H, D), the shard that `shard_sequence` makes of all packed rows.
        key: (rows of this rank, Hkv, D), likewise.
        value: (rows of this rank, Hkv, Dv), likewise.
        cu_seqlens_q: (num_sequences + 1,) int32, the offsets in all packed rows, the same on all ranks. The host reads
            the offsets. If they are on the CPU, the host need not wait for a GPU.
        cu_seqlens_k: (num_sequences + 1,) int32, likewise for keys and values.
        max_seqlen_q: at least the longest query sequence.
        max_seqlen_k: at least the longest key sequence.
        mesh: as in `context_parallel_attention`; likewise method.
        compare_ranks: whether the ranks first compare their offsets, options and shapes. The comparison is a small
            collective, for which the host waits. Without the comparison, ranks that differ wait for each other in
            vain, or get wrong results.
        sinks: (H,), see `fused_attention`.
        return_lse: also return lse (H, rows of this rank).
        options: dropout_p, dropout_seed, is_causal, scale, enable_gqa, window_size, softcap, backend and the whole
            relative_bias of `fused_attention_varlen`. Causal masks and windows are aligned to the
            upper left of each sequence. Without dropout_seed, the first rank draws a seed for all.

    Every rank gets the whole gradients of relative_bias and sinks, as in `context_parallel_attention`.

    Returns:
        out (rows of this rank, H, Dv), and with return_lse also lse.

    Raises:
        TypeError, ValueError: an argument does not fit. With compare_ranks, shards, offsets or options that differ
            between the ranks raise on all of them. So does an argument that is wrong on one rank only.
        RuntimeError: a rank has ended, or does not answer within the time limit of the process group.
    """
    checks.check_flag("compare_ranks", compare_ranks)
    with failing_together(mesh, query, number=2) if compare_ranks else contextlib.nullcontext():
        chosen = _options("context_parallel_attention_varlen", method, options, _REFUSED_PACKED)
        checks.check_flag("return_lse", return_lse)
        query, key, value = modes.autocast(query, key, value)
        documents = _documents(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, chosen)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, heads, rows, columns)
        _check_own(query, key, value, sinks, chosen)
    group = group_of(mesh)
    described = None
    if compare_ranks and dist.get_world_size(group) > 1:
        described = {
            **_described(query, key, value, sinks, method, chosen), "cu_seqlens_q": documents.query,
            "cu_seqlens_k": documents.key, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
        }  # fmt: skip
    seqlens = documents.query[-1], documents.key[-1]
    sharded_q, sharded_k = _shardings(group, query, key, seqlens, described)
    scores = SharedScores(sharded_q, sharded_k, _band(chosen), needs_positions=True, documents=documents)
    chosen = replace(chosen, seqlen_q=max_seqlen_q)
    out, lse = _shared(mesh, group, method, scores, query, key, value, sinks, chosen)
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _options(function: str, method: str, options: dict[str, Any], refused: dict[str, str] = _REFUSED) -> PartialOptions:
    """The checked options of a call.

    function: its name, for the error
    refused: the options that it does not take: name -> the reason
    """
    if method not in METHODS:
        raise checks.fail("method", f"one of {METHODS}", repr(method))
    for name, reason in refused.items():
        if (given := options.get(name)) is not None:
            raise checks.fail(name, f"None for a shared sequence, {reason}", _shape_or_value(given))
    chosen = PartialOptions.of(function, options, refused)
    if chosen.dropout_seed is not None:
        checks.check_dropout_seed(chosen.dropout_seed)
    return chosen


def _check_seqlens(seqlens: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless seqlens is (L, S)."""
    if not isinstance(seqlens, Sequence) or len(seqlens) != 2:
        raise checks.fail("seqlens", "(L, S), the lengths of the whole sequences", repr(seqlens))
    for length in seqlens:
        checks.check_seqlen("seqlens", length)


def _band(options: PartialOptions) -> Band:
    return masks.band_of(options.is_causal, checks.check_window(options.window_size))


def _shared(
    mesh: DeviceMesh | dist.ProcessGroup, group: dist.ProcessGroup, method: str, scores: SharedScores,
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: PartialOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes (out, lse) from checked arguments. group: the group of all ranks of the mesh."""
    if options.dropout_p and options.dropout_seed is None:
        options = replace(options, dropout_seed=dropout.draw_seed(query.device, [group]))
    if isinstance(mesh, DeviceMesh) and mesh.ndim == 2:
        parts = _Parts(mesh.get_group(0), mesh.get_group(1))
    else:
        if method == "auto":
            method = _cheapest_method(scores, query.shape, key.shape, value.shape)
        parts = _Parts(group, None) if method == "ring" else _Parts(None, group)
    if options.relative_bias is not None:
        options = replace(options, relative_bias=SumGradient.apply(options.relative_bias, group))
    sinks = None if sinks is None else SumGradient.apply(sinks, group)
    return _attend(parts, scores, query, key, value, sinks, options)


class _Parts(NamedTuple):
    """ring: the group around which keys travel; ulysses: the group that divides the heads. None = a group of one."""

    ring: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None


def _attend(
    parts: _Parts, scores: SharedScores, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None,
    options: PartialOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of the rows of this rank. Ranks that divide the heads exchange their shards before and afterwards."""
    if parts.ulysses is None:
        return _around(parts.ring, scores, query, key, value, sinks, options)
    world, rank = dist.get_world_size(parts.ulysses), dist.get_rank(parts.ulysses)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads % world != 0:
        raise checks.fail("mesh", f"a number of ranks that divides the {num_heads} heads", f"{world} ranks")
    if num_kv_heads % world != 0:
        repeat = ulysses.repeats(num_heads, num_kv_heads, world)
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    first = 0 if parts.ring is None else dist.get_rank(parts.ring) * world
    ranks = list(range(first, first + world))
    rows_q, rows_k = (ulysses.Rows.of(x, ranks) for x in (scores.query, scores.key))
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
    grouped = scores._replace(query=scores.query.of_groups(world), key=scores.key.of_groups(world))
    out, lse = _around(parts.ring, grouped, query, key, value, None if sinks is None else sinks[heads], options)
    out = ulysses.SwapShards.apply(out, rows_q, parts.ulysses, False)
    lse = ulysses.SwapShards.apply(lse.unsqueeze(-1), rows_q, parts.ulysses, False).squeeze(-1)
    return out, lse


def _around(
    group: dist.ProcessGroup | None, scores: SharedScores, query: Tensor, key: Tensor, value: Tensor,
    sinks: Tensor | None, options: PartialOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) by a ring: the keys travel around the group. A group of one rank calls the kernel directly."""
    if group is None or scores.key.world == 1:
        return partial.attend(query, key, value, scores.whole().options(options, query.device), sinks)
    padding, bias = options.key_padding_mask, options.relative_bias
    ring = Ring(group, scores, replace(options, key_padding_mask=None, relative_bias=None))
    return RingAttention.apply(ring, query, key, value, padding, bias, sinks)


def _check_own(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: PartialOptions) -> None:
    """Raises the errors that only this rank can know of: about its own rows, and about the kernels of its machine.

    The tensors are (B, heads, rows of this rank, columns).
    """
    padding, bias = options.key_padding_mask, options.relative_bias
    for name, x in (("key_padding_mask", padding), ("relative_bias", bias), ("sinks", sinks)):
        checks.optional_meta(name, x)
    if padding is not None and padding.requires_grad:
        raise checks.fail("key_padding_mask", "a mask that requires no gradient", "one that does")
    if padding is not None and padding.shape != (query.shape[0], key.shape[2]):
        expected = f"shape (B, S of this rank) = {(query.shape[0], key.shape[2])}, as shard_sequence(mask, mesh, 1) has"
        raise checks.fail("key_padding_mask", expected, f"shape {tuple(padding.shape)}")
    if options.backend is not None:
        # Whether a backend runs depends on dtype, device and head dims, which all blocks of scores share.
        tensors = planning.tensors_of(query, key, value, sinks=sinks, key_padding_mask=padding)
        planning.plan(torch.compiler.is_compiling(), tensors, options.of_call(), options.backend)


def _check_whole(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: PartialOptions, seqlens: tuple[int, int]
) -> None:
    """Raises the errors that `fused_attention` raises for the whole tensors. Nothing has been sent yet.

    seqlens: (L, S) of the whole sequences
    """

    (batch, heads, _, head_dim), (_, kv_heads, _, value_dim) = query.shape, value.shape
    rows_q, rows_k = seqlens
    bias, padding = options.relative_bias, options.key_padding_mask

    def whole(x: Tensor | None, *shape: int) -> Tensor | None:
        """A tensor of this shape on the meta device, for which no kernel is chosen."""
        return None if x is None else torch.empty(shape, dtype=x.dtype, device="meta")

    tensors = planning.tensors_of(
        whole(query, batch, heads, rows_q, head_dim),  # type: ignore[arg-type]
        whole(key, batch, key.shape[1], rows_k, key.shape[3]),  # type: ignore[arg-type]
        whole(value, value.shape[0], kv_heads, rows_k, value_dim),  # type: ignore[arg-type]
        relative_bias=whole(bias, *getattr(bias, "shape", ())),
        sinks=whole(sinks, *getattr(sinks, "shape", ())),
        key_padding_mask=whole(padding, batch, rows_k),
    )
    planning.plan(False, tensors, options.of_call(), None)


def _documents(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, sinks: Tensor | None, options: PartialOptions,
) -> Documents:  # fmt: skip
    """The offsets of packed sequences. Raises the errors that `fused_attention_varlen` raises for all rows."""
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, x in offsets.items():
        checks.meta(name, x)
    # The plan reads no contents, so offsets on the CPU need not be copied.
    of_q, of_k = (torch.empty_like(x, device=query.device) for x in offsets.values())
    tensors = (query, key, value, of_q, of_k, options.relative_bias, sinks)
    planning.plan_of_packed(False, tensors, (max_seqlen_q, max_seqlen_k), options.of_call(), None)
    found = []
    for (name, x), longest in zip(offsets.items(), (max_seqlen_q, max_seqlen_k), strict=True):
        read = x.cpu()
        checks.check_cu_seqlens_values(name, read, int(read[-1]), longest)
        found.append(tuple(read.tolist()))
    return Documents(*found)


def _described(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, method: str, options: PartialOptions
) -> dict[str, Any]:
    """What must be the same on all ranks: name of an argument -> value that can be printed."""
    described: dict[str, Any] = {**CHECKED, "method": method}
    for name, x in (("query", query), ("key", key), ("value", value)):
        described[name] = f"{x.dtype} of {x.shape[0]} batch entries, {x.shape[1]} heads and head dim {x.shape[3]}"
    for name, option in vars(options).items():
        if name == "key_padding_mask":
            described[name] = "None" if option is None else f"a mask of {option.dtype} on {option.device.type}"
        elif name == "dropout_seed" and isinstance(option, Tensor) and option.device.type == "cpu":
            described[name] = int(option)  # the host need not wait for a tensor on the CPU
        elif name != "backend":
            described[name] = _shape_or_value(option)
    described["sinks"] = _shape_or_value(sinks)
    # All ranks add up the gradients of these tensors. A rank without such a gradient would let the others wait.
    summed: dict[str, Tensor | None]
    summed = {"query": query, "key": key, "value": value, "sinks": sinks, "relative_bias": options.relative_bias}
    for name, tensor in summed.items():
        is_required = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        described[f"{name}.requires_grad"] = is_required
    return described


def _shape_or_value(x: Any) -> Any:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x


def _shardings(
    group: dist.ProcessGroup,
    query: Tensor,
    key: Tensor,
    seqlens: tuple[int, int] | None,
    described: dict[str, Any] | None,
) -> list[Sharding]:
    """The shardings of queries and keys (B, heads, rows of this rank, columns).

    seqlens: (L, S) of the whole sequences; None = the sums over the ranks
    described: what the ranks compare; None = they compare nothing, and seqlens are given
    """
    if described is not None:
        lengths = {"query": query.shape[2], "key": key.shape[2]}
        found = shardings_of(lengths, group, query.device, described)
        for name, sharding, length in zip(lengths, found, seqlens or (), strict=False):
            if sharding.length != length:
                raise checks.fail(name, f"{length} rows on all ranks together", sharding.length)
        return found
    assert seqlens is not None, "the ranks compare nothing"
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    found = [Sharding.of(length, world) for length in seqlens]
    for name, x, sharding in zip(("query", "key"), (query, key), found, strict=True):
        if x.shape[2] != (rows := sharding.rows(rank)):
            raise checks.fail(name, f"the {rows} rows of rank {rank} of {sharding.length}", x.shape[2])
    return found
