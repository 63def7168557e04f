"""Which blocks of the scores a rank computes, and which keys it needs for them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from fused_attn.attention.dropout import GROUP
from fused_attn.attention.problem import UNBOUNDED, Band
from fused_attn.distributed.sequence import Segment, Sharding


class Block(NamedTuple):
    """Scores that one call of a kernel computes: some queries of a rank, and some keys of a rank.

    query_rows, key_rows: the rows in the shards of the two ranks
    query_offset, key_offset: the positions of the first query and the first key in the whole sequences
    """

    query_rows: slice
    key_rows: slice
    query_offset: int
    key_offset: int


class Positions(NamedTuple):
    """What decides which blocks there are.

    query, key: how the two sequences are sharded
    band: the visible diagonals
    are_needed: the scores depend on positions not by the band alone, but also by a relative bias or dropout
    """

    query: Sharding
    key: Sharding
    band: Band
    are_needed: bool


def blocks(positions: Positions, query_rank: int, key_rank: int) -> list[Block]:
    """The blocks of the queries of one rank and the keys of another, without those that the band hides."""
    found = []
    are_whole = True
    queries, keys = positions.query.segments(query_rank), positions.key.segments(key_rank)
    for query in queries:
        for key in keys:
            visible = _visible_keys(query, key, positions.band)
            if visible is None:
                continue
            are_whole = are_whole and _is_whole(query, visible, positions.band)
            found.append((query, visible))
    if are_whole and not positions.are_needed and len(found) > 1:
        merged = _as_one(found)
        if merged is not None:
            return [merged]
    return [
        Block(slice(q.at, q.at + q.end - q.begin), slice(k.at, k.at + k.end - k.begin), q.begin, k.begin)
        for q, k in found
    ]


def needed_keys(positions: Positions, query_rank: int, key_rank: int) -> slice:
    """The rows in the shard of key_rank that query_rank needs; empty if the band hides all of them."""
    rows = [block.key_rows for block in blocks(positions, query_rank, key_rank)]
    if not rows:
        return slice(0, 0)
    return slice(min(x.start for x in rows), max(x.stop for x in rows))


def _visible_keys(query: Segment, key: Segment, band: Band) -> Segment | None:
    """The keys of a segment that at least one query of the other segment sees; None if there are none."""
    begin, end = key.begin, key.end
    if band.left != UNBOUNDED:
        first = query.begin + band.offset - band.left
        if first >= end:
            return None
        begin = max(begin, begin + (first - begin) // GROUP * GROUP)  # see Sharding.segments
    if band.right != UNBOUNDED:
        end = min(end, query.end + band.offset + band.right)
    return Segment(begin, end, key.at + begin - key.begin) if begin < end else None


def _is_whole(query: Segment, key: Segment, band: Band) -> bool:
    """Whether every query of the segment sees every key of the other one."""
    nearest, farthest = key.begin - (query.end - 1) - band.offset, (key.end - 1) - query.begin - band.offset
    return (band.left == UNBOUNDED or nearest >= -band.left) and (band.right == UNBOUNDED or farthest <= band.right)


def _as_one(found: list[tuple[Segment, Segment]]) -> Block | None:
    """One block for pairs of whole segments whose rows lie side by side in both shards; None if there is none.

    There may be a gap between the positions of two segments. The block closes the gap, so its rows get positions
    between the first and the last true one. As the band hides nothing between the first and the last query and key, the
    band hides nothing in the block either.
    """
    queries, keys = sorted({q for q, _ in found}), sorted({k for _, k in found})
    if len(found) != len(queries) * len(keys):
        return None
    for side in (queries, keys):
        if any(a.at + a.end - a.begin != b.at for a, b in itertools.pairwise(side)):
            return None
    query_rows, key_rows = (slice(side[0].at, side[-1].at + side[-1].end - side[-1].begin) for side in (queries, keys))
    return Block(query_rows, key_rows, queries[0].begin, keys[0].begin)
