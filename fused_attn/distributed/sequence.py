"""Which rows of a sequence each rank holds.

With W ranks, a sequence is cut into 2 W chunks, and rank r holds the chunks r and 2 W - 1 - r. Under a causal mask,
late queries see more keys than early ones. A rank with an early and a late chunk has as much work as every other rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fused_attn.attention import checks
from fused_attn.attention.dropout import GROUP
from fused_attn.attention.masks import Positions

#: All ranks hold equally many rows if the length is a multiple of this number for each rank. A rank holds two chunks,
#: of which each begins at a multiple of `GROUP` rows.
ROWS_OF_RANK = 2 * GROUP


class Segment(NamedTuple):
    """Rows of the whole sequence that a rank holds side by side.

    begin, end: positions in the whole sequence
    at: the index of the first row in the shard of the rank
    """

    begin: int
    end: int
    at: int


class Sharding(NamedTuple):
    """How a sequence of `length` rows is divided among `world` ranks. The last chunks can be shorter than `chunk`."""

    length: int
    world: int
    chunk: int

    @classmethod
    def of(cls, length: int, world: int) -> Sharding:
        # Chunks begin at multiples of GROUP, so that the keys that share a call of Philox stay together.
        return cls(length, world, -(-length // (2 * world * GROUP)) * GROUP)

    def of_groups(self, size: int) -> Sharding:
        """The sharding among groups of `size` neighbouring ranks. A group holds all rows of its ranks."""
        return Sharding(self.length, self.world // size, self.chunk * size)

    def segments(self, rank: int) -> list[Segment]:
        """The rows of a rank, in ascending order. Neighbouring chunks are one segment; empty chunks are left out."""
        found: list[Segment] = []
        for number in (rank, 2 * self.world - 1 - rank):
            begin, end = (min(edge * self.chunk, self.length) for edge in (number, number + 1))
            if begin == end:
                continue
            if found and found[-1].end == begin:
                found[-1] = found[-1]._replace(end=end)
            else:
                found.append(Segment(begin, end, sum(x.end - x.begin for x in found)))
        return found

    @functools.lru_cache(maxsize=1024)  # noqa: B019  # the shardings of a program are few, and small
    def rows(self, rank: int) -> int:
        """The number of rows that the rank holds."""
        return sum(segment.end - segment.begin for segment in self.segments(rank))


def group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The process group of a mesh; of all its ranks in row-major order if the mesh has two dimensions."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.ndim != 2:
        raise checks.fail("mesh", "one or two dimensions", f"{mesh.ndim}")
    if mesh.mesh.flatten().tolist() == list(range(dist.get_world_size())):
        return dist.distributed_c10d._get_default_group()
    if mesh.mesh_dim_names is None:
        raise checks.fail("mesh", "mesh_dim_names, as its two dimensions are a part of all ranks", "none")
    return mesh._flatten().get_group()


def shard_sequence(x: Tensor, mesh: DeviceMesh | dist.ProcessGroup, dim: int) -> Tensor:
    """The rows of a whole tensor that this rank holds; see the head of this module.

    Args:
        x: the whole tensor, the same on all ranks. For padding masks, dim is that of the keys.
        mesh: the ranks that share the sequence.
        dim: the dimension of the sequence, 2 for (B, H, L, D).

    Returns:
        A copy of the rows of this rank. Gradients flow to the rows of x that the rank holds.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_dim(x, dim)
    group = group_of(mesh)
    sharding = Sharding.of(x.shape[dim], dist.get_world_size(group))
    parts = [x.narrow(dim, begin, end - begin) for begin, end, _ in sharding.segments(dist.get_rank(group))]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


@torch.no_grad()
def unshard_sequence(x: Tensor, mesh: DeviceMesh | dist.ProcessGroup, dim: int) -> Tensor:
    """The whole tensor, from the shards of all ranks. No gradient flows through this function.

    Args:
        x: the shard of this rank, as `shard_sequence` makes it.
        mesh: the ranks that share the sequence.
        dim: the dimension of the sequence.

    Raises:
        TypeError: x is no tensor, dim is no int, or mesh is no mesh.
        ValueError: the shards have other lengths than `shard_sequence` gives them, or x has no such dimension.
    """
    _check_dim(x, dim)
    group = group_of(mesh)
    dim %= x.dim()
    (sharding,) = shardings_of({"x": x.shape[dim]}, group, x.device)
    longest = max(map(sharding.rows, range(sharding.world)))
    # Collectives want tensors of one shape, so each shard is filled up to the longest one.
    filled = x.new_zeros(*x.shape[:dim], longest, *x.shape[dim + 1 :])
    filled.narrow(dim, 0, x.shape[dim]).copy_(x)
    shards = [torch.empty_like(filled) for _ in range(sharding.world)]
    dist.all_gather(shards, filled, group=group)
    placed = [
        (begin, shard.narrow(dim, at, end - begin))
        for rank, shard in enumerate(shards)
        for begin, end, at in sharding.segments(rank)
    ]
    return torch.cat([part for _, part in sorted(placed, key=lambda pair: pair[0])], dim) if placed else x.clone()


def _check_dim(x: Tensor, dim: int) -> None:
    """Raises TypeError or ValueError unless x is a tensor that has the dimension."""
    checks.check_tensor("x", x)
    checks.check_integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise checks.fail("dim", f"a dimension of x, whose shape is {tuple(x.shape)}", dim)


def shard_batch(
    batch: Mapping[str, Any], mesh: DeviceMesh | dist.ProcessGroup, dim: int | Mapping[str, int] = 1
) -> dict[str, Any]:
    """The rows of this rank of each tensor of a batch. Entries that are no tensors are returned as they are.

    Args:
        batch: whole tensors by name, the same on all ranks.
        mesh: the ranks that share the sequence.
        dim: the dimension of the sequence, such as 1 for tokens (B, L) and 0 for packed tokens (total,). An int counts
            for all tensors. A mapping has the dimension of each tensor by name. A tensor that the mapping does not name
            stays whole on every rank.

    Packed rows are sharded like other rows, so a document may lie on several ranks. cu_seqlens are no rows: pass the
    offsets of all documents to `context_parallel_attention_varlen`.
    """
    return _each(shard_sequence, batch, mesh, dim)


def unshard_batch(
    batch: Mapping[str, Any], mesh: DeviceMesh | dist.ProcessGroup, dim: int | Mapping[str, int] = 1
) -> dict[str, Any]:
    """The whole batch of which `shard_batch` gave each rank its rows. No gradient flows through this function."""
    return _each(unshard_sequence, batch, mesh, dim)


def _each(
    function: Callable[..., Tensor], batch: Mapping[str, Any], mesh: DeviceMesh | dist.ProcessGroup,
    dim: int | Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    if not isinstance(batch, Mapping):
        raise checks.wrong_type("batch", "a mapping from names to tensors", batch)
    dims = dim if isinstance(dim, Mapping) else {name: dim for name, x in batch.items() if isinstance(x, Tensor)}
    if unknown := [name for name in dims if not isinstance(batch.get(name), Tensor)]:
        raise checks.fail("dim", f"names of tensors among {', '.join(batch)}", ", ".join(unknown))
    return {name: function(x, mesh, dims[name]) if name in dims else x for name, x in batch.items()}


def shard_positions(
    mesh: DeviceMesh | dist.ProcessGroup, *, seqlen: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The positions of the rows of this rank, (rows,) int64, as rotary embeddings need them.

    Args:
        mesh: the ranks that share the sequence.
        seqlen: the length of the whole sequence, whose positions count from 0.
        cu_seqlens: instead of seqlen, the offsets of packed documents, the same on all ranks. Positions count from the
            first row of each document. The result is on the device of cu_seqlens.

    Raises:
        TypeError: seqlen is no int, or cu_seqlens is no tensor.
        ValueError: both or none of seqlen and cu_seqlens are given.
    """
    if seqlen is not None and cu_seqlens is None:
        checks.check_seqlen("seqlen", seqlen)
        return shard_sequence(torch.arange(seqlen), mesh, 0)
    if seqlen is None and cu_seqlens is not None:
        checks.check_tensor("cu_seqlens", cu_seqlens)
        return shard_sequence(Positions.of_packed(cu_seqlens, int(cu_seqlens[-1])).position, mesh, 0)
    raise checks.fail("seqlen", "either seqlen or cu_seqlens", "none" if seqlen is None else "both")


#: What ranks describe whose own arguments have passed their checks; see `failing_together`.
CHECKED = {"arguments": "no error"}


def shardings_of(
    lengths: dict[str, int], group: dist.ProcessGroup, device: torch.device, described: Mapping[str, Any] | None = None
) -> list[Sharding]:
    """The `Sharding` of each named tensor, from the lengths of all shards. The host waits for a small collective.

    described: what else must be the same on all ranks: name of an argument -> value that can be printed

    Raises:
        ValueError: on every rank alike, if the shards of a tensor are not those of `shard_sequence`, or if the
            other arguments differ.
    """
    world = dist.get_world_size(group)
    described = described or {}
    own = torch.tensor([*lengths.values(), _fingerprint(described)], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own, group=group)
    *rows_of_ranks, fingerprints = torch.stack(gathered).t().tolist()  # (tensors, ranks)
    if len(set(fingerprints)) > 1:
        raise _of_different_ranks(described, group)
    found = []
    for name, rows in zip(lengths, rows_of_ranks, strict=True):
        sharding = Sharding.of(sum(rows), world)
        expected = [sharding.rows(rank) for rank in range(world)]
        if expected != list(rows):
            raise checks.fail(name, f"shards as shard_sequence makes them, of {expected} rows", f"{list(rows)}")
        found.append(sharding)
    return found


@contextlib.contextmanager
def failing_together(mesh: DeviceMesh | dist.ProcessGroup, tensor: Any, number: int) -> Iterator[None]:
    """While ranks check their own arguments: what one rank raises, all ranks raise in `shardings_of`.

    If there are several ranks, all of them must call `shardings_of` afterwards, with `number` lengths, and with
    `CHECKED` in what they describe. A rank whose check fails takes part in this call before the rank raises.

    tensor: its device is that of the collective; anything that is no tensor counts as one on the CPU
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        try:
            group = group_of(mesh)
        except (TypeError, ValueError):
            raise error from None  # without a group, no other rank waits
        if dist.get_world_size(group) > 1:
            device = tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")
            described = {"arguments": f"{type(error).__name__}: {error}"}
            # If all ranks have failed alike, this call returns, and each rank raises its own error.
            shardings_of({f"length {n}": 0 for n in range(number)}, group, device, described)
        raise


def _fingerprint(described: Mapping[str, Any]) -> int:
    """A number of 63 bits that differs for nearly all different descriptions."""
    return int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:8], "big") >> 1


def _of_different_ranks(described: Mapping[str, Any], group: dist.ProcessGroup) -> ValueError:
    """The error that names the first argument that is not the same on all ranks. All ranks must call this function."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, {name: repr(x) for name, x in described.items()}, group=group)
    names = dict.fromkeys(name for x in gathered for name in x)  # ranks that call other functions have other names
    name = next(name for name in names if len({x.get(name) for x in gathered}) > 1)
    values = ", ".join(f"{x.get(name, 'no such argument')} on rank {rank}" for rank, x in enumerate(gathered))
    return checks.fail(name, "the same on all ranks", values)
