"""`fused_attention` of DTensors: the ranks of a mesh share batch entries and heads.

Each rank runs the kernel on its own entries and heads, so attention itself needs no messages. Only tensors that are
placed otherwise are redistributed first. Dropout counts batch entries and heads of the whole tensors, so the entries
that it drops do not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fused_attn import planning
from fused_attn.attention import checks, dropout
from fused_attn.attention.causal_bias import causal_bias
from fused_attn.partial import PartialOptions, check_rank_4, results

_BATCH, _HEADS = 0, 1
_REFUSED = {
    2: "the sequence; for a shared sequence use fused_attn.distributed.context_parallel_attention on local tensors",
    3: "the head dim",
}


class _Sharing(NamedTuple):
    """What the ranks of each dimension of a mesh share: `_BATCH`, `_HEADS`, or None if they all compute the same."""

    mesh: DeviceMesh
    shared: tuple[int | None, ...]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> _Sharing:
        """The sharing that query, key and value ask for. Where they differ, the first of them decides."""
        for name, x in tensors.items():
            if not isinstance(x, DTensor):
                raise checks.fail(name, "a DTensor, as query, key or value is one", type(x).__name__)
        check_rank_4(**tensors)
        given: dict[str, Any] = tensors
        mesh = given["query"].device_mesh
        shared: list[int | None] = [None] * mesh.ndim
        for name, x in given.items():
            if x.device_mesh != mesh:
                raise checks.fail(name, f"the mesh of query, {mesh}", x.device_mesh)
            for number, placement in enumerate(x.placements):
                if isinstance(placement, (Replicate, Partial)):
                    continue
                dim = placement.dim if type(placement) is Shard else -1
                if dim not in (_BATCH, _HEADS):
                    raise checks.fail(
                        name, "shards of the batch (dimension 0) or of the heads (dimension 1)",
                        f"{placement}, shards of {_REFUSED.get(dim, 'another kind')}",
                    )  # fmt: skip
                if shared[number] is None:
                    shared[number] = dim
        return cls(mesh, tuple(shared))

    def ranks(self, what: int) -> int:
        """The number of ranks that share the batch or the heads."""
        count = 1
        for number, shared in enumerate(self.shared):
            count *= self.mesh.size(number) if shared == what else 1
        return count

    def part(self, what: int, size: int) -> tuple[int, int]:
        """(the first, the last + 1) of the batch entries or heads of this rank, as DTensor cuts tensors."""
        begin, end = 0, size
        for number, shared in enumerate(self.shared):
            if shared == what:
                step = -(-(end - begin) // self.mesh.size(number))
                rank = self.mesh.get_local_rank(number)
                begin, end = min(begin + rank * step, end), min(begin + (rank + 1) * step, end)
        return begin, end

    def placements(self, dims: dict[int, int], is_gradient: bool = False) -> list[Placement]:
        """The placements of a tensor, or of its gradient.

        Ranks that share what the tensor does not have each compute a summand of its gradient.

        dims: the dimension of the tensor that counts batch entries (`_BATCH`) or heads (`_HEADS`), if it has one
        """
        found: list[Placement] = []
        for shared in self.shared:
            if shared in dims:
                found.append(Shard(dims[shared]))
            else:
                found.append(Partial() if is_gradient and shared is not None else Replicate())
        return found

    def local(self, name: str, x: Any, dims: dict[int, int]) -> Any:
        """The part of x that this rank needs. Its gradient is a DTensor if x is one.

        A tensor that is no DTensor is the same on all ranks. Its gradient is the sum over all ranks.
        """
        if x is None:
            return None
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        elif x.device_mesh != self.mesh:
            raise checks.fail(name, f"the mesh of query, {self.mesh}", x.device_mesh)
        x = x.redistribute(placements=self.placements(dims))
        return x.to_local(grad_placements=self.placements(dims, is_gradient=True))

    def whole(self, x: Tensor, batch: int, num_heads: int) -> DTensor:
        """The DTensor (B, H, ...) of which this rank has computed x."""
        placements = self.placements({_BATCH: 0, _HEADS: 1})
        if batch % self.ranks(_BATCH) == 0:
            return DTensor.from_local(x, self.mesh, placements, run_check=False)
        # Shards of different sizes do not tell the shape of the whole tensor.
        whole = torch.empty(batch, num_heads, *x.shape[2:], device="meta")
        return DTensor.from_local(
            x.contiguous(), self.mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: Tensor | None,
    diagonal_alignment: str,
    return_lse: bool,
    return_max: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """`fused_attention` of DTensors, with the same arguments. The results are DTensors, placed as the query is.

    - query, key and value are DTensors (B, heads, rows, columns) on one mesh, replicated or sharded by batch and heads.
    - The other tensors are DTensors of the same mesh, or plain tensors that are the same on all ranks. The gradient of
      a plain tensor is the whole one, on every rank.
    - key_lengths, key_ranges and a lower-right diagonal_alignment are refused.
    - Without a dropout_seed, the first rank of the mesh draws one for all.

    Raises:
        TypeError, ValueError: as `fused_attention`; also for shards of the sequence or of the head dim, and if the
            ranks that share the heads do not divide their number.
    """
    checks.check_flags(return_lse=return_lse, return_max=return_max)
    for name in ("key_lengths", "key_ranges"):
        if options.pop(name) is not None:
            expected = "None with DTensors, which key_padding_mask and attn_mask can mask"
            raise checks.fail(name, expected, "a tensor")
    checks.check_diagonal_alignment(diagonal_alignment)
    if diagonal_alignment != checks.UPPER_LEFT:
        expected = f"{checks.UPPER_LEFT!r} with DTensors, or causal_lower_right(L, S) as attn_mask"
        raise checks.fail("diagonal_alignment", expected, repr(diagonal_alignment))
    given = PartialOptions(**options)
    sharing = _Sharing.of({"query": query, "key": key, "value": value})
    _check_whole(query, key, value, sinks, given)
    batch, num_heads = query.shape[:2]
    if num_heads % (ranks := sharing.ranks(_HEADS)):
        raise checks.fail("query", f"a number of heads that {ranks} ranks can share equally", f"{num_heads} heads")
    masked: dict[str, Any] = {
        "key_padding_mask": sharing.local("key_padding_mask", given.key_padding_mask, {_BATCH: 0})
    }
    if given.attn_mask is not None and causal_bias(given.attn_mask) is None:
        masked["attn_mask"] = sharing.local("attn_mask", given.attn_mask, _dims_of_mask(given.attn_mask))
    if given.relative_bias is not None:
        has_heads = given.relative_bias.dim() == 2 and given.relative_bias.shape[0] == num_heads
        masked["relative_bias"] = sharing.local("relative_bias", given.relative_bias, {_HEADS: 0} if has_heads else {})
    seed = given.dropout_seed
    if given.dropout_p and seed is None:
        mesh = sharing.mesh
        seed = dropout.draw_seed(query.device, [mesh.get_group(number) for number in range(mesh.ndim)])
    own = replace(
        given, **masked, dropout_seed=seed.to_local() if isinstance(seed, DTensor) else seed,
        batch_offset=sharing.part(_BATCH, batch)[0], head_offset=sharing.part(_HEADS, num_heads)[0],
        seqlen_q=query.shape[2],
    )  # fmt: skip
    found = results(
        sharing.local("query", query, {_BATCH: 0, _HEADS: 1}),
        _local_keys(sharing, "key", key, num_heads),
        _local_keys(sharing, "value", value, num_heads),
        own, sharing.local("sinks", sinks, {_HEADS: 0}), return_max,
    )  # fmt: skip
    out, lse, row_max = (None if x is None else sharing.whole(x, batch, num_heads) for x in found)
    asked: list[Any] = [x for x, is_asked in ((out, True), (lse, return_lse), (row_max, return_max)) if is_asked]
    return asked[0] if len(asked) == 1 else tuple(asked)


def _check_whole(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: PartialOptions) -> None:
    """Raises the errors of `fused_attention`, whose messages speak of the whole shapes and not of those of a rank."""
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] != query.shape[0]:
            raise checks.fail(name, f"the batch of query, {query.shape[0]}", f"shape {tuple(x.shape)}")
    tensors = planning.tensors_of(
        query, key, value, attn_mask=options.attn_mask, relative_bias=options.relative_bias, sinks=sinks,
        key_padding_mask=options.key_padding_mask,
    )  # fmt: skip
    planning.plan(torch.compiler.is_compiling(), tensors, options.of_call(), options.backend)


def _dims_of_mask(mask: Tensor) -> dict[int, int]:
    """The dimensions of an attn_mask, broadcastable to (B, H, L, S), that count batch entries and heads."""
    dims = {_BATCH: mask.dim() - 4, _HEADS: mask.dim() - 3}
    return {what: dim for what, dim in dims.items() if dim >= 0 and mask.shape[dim] > 1}


def _local_keys(sharing: _Sharing, name: str, x: Tensor, num_heads: int) -> Tensor:
    """The heads of keys or values (B, Hkv, S, columns) that the query heads of this rank read."""
    if x.shape[1] % sharing.ranks(_HEADS) == 0:
        return sharing.local(name, x, {_BATCH: 0, _HEADS: 1})
    # Fewer heads than ranks, as in multi-query attention. Each rank takes its heads of the whole tensor.
    whole = sharing.local(name, x, {_BATCH: 0})
    begin, end = sharing.part(_HEADS, num_heads)
    group = num_heads // x.shape[1]
    first, last = begin // group, (end - 1) // group
    if first == last:
        return whole.narrow(1, first, 1)
    return whole.repeat_interleave(group, dim=1)[:, begin:end]
