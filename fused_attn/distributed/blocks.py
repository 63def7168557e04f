"""Which blocks of the scores a rank computes, and which keys it needs for them."""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch

from fused_attn.attention.dropout import GROUP
from fused_attn.attention.problem import UNBOUNDED, Band
from fused_attn.distributed.sequence import Segment, Sharding
from fused_attn.partial import PackedRows, PartialOptions

Offsets = tuple[int, ...]


class Documents(NamedTuple):
    """Documents that stand one after another in the whole sequences. No document sees another one.

    query, key: cu_seqlens of queries and of keys. Document n holds the rows offsets[n] : offsets[n + 1]
    """

    query: Offsets
    key: Offsets


class Block(NamedTuple):
    """Scores that one call of a kernel computes: some queries of a rank, and some keys of a rank.

    query_rows, key_rows: the rows in the shards of the two ranks
    query_offset, key_offset: the positions of the first query and the first key in the whole sequences, or in their
        document
    first_document: the number of the document, or of the first one in these rows
    documents: the offsets of several documents in these rows; None if all rows are of one document or sequence
    """

    query_rows: slice
    key_rows: slice
    query_offset: int
    key_offset: int
    first_document: int = 0
    documents: Documents | None = None

    def options(self, shared: PartialOptions, device: torch.device) -> PartialOptions:
        """The options of the block, from those that all blocks of a call share."""
        own = replace(
            shared, query_offset=self.query_offset, key_offset=self.key_offset, batch_offset=self.first_document
        )
        if self.documents is None:
            return own
        return replace(own, packed=_packed_rows(self.documents, device))


@functools.lru_cache(maxsize=256)
def _packed_rows(documents: Documents, device: torch.device) -> PackedRows:
    """The documents as tensors. Several layers and steps of a model ask for the same documents."""
    with torch.inference_mode(False):  # A training step may get the tensors that were made for a step of inference.
        cu_seqlens_q, cu_seqlens_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in documents)
    longest_q, longest_k = (max((end - begin for begin, end in itertools.pairwise(x)), default=0) for x in documents)
    return PackedRows(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)


class SharedScores(NamedTuple):
    """The scores of sequences that several ranks share: what decides which blocks there are.

    query, key: how the two sequences are sharded
    band: the visible diagonals
    needs_positions: besides the band, a relative bias or dropout depends on the positions of queries and keys
    documents: positions count from the first row of each document; None if a whole sequence is one document
    """

    query: Sharding
    key: Sharding
    band: Band
    needs_positions: bool
    documents: Documents | None = None

    def whole(self) -> Block:
        """The block of all scores."""
        return Block(slice(0, self.query.length), slice(0, self.key.length), 0, 0, documents=self.documents)


@functools.lru_cache(maxsize=4096)
def blocks(scores: SharedScores, query_rank: int, key_rank: int) -> tuple[Block, ...]:
    """The blocks of the queries of one rank and the keys of another. Blocks that the band hides are left out."""
    pairs = list(itertools.product(scores.query.segments(query_rank), scores.key.segments(key_rank)))
    if scores.documents is not None:
        found = (_blocks_of_documents(*pair, scores.documents, scores.band) for pair in pairs)
        return tuple(itertools.chain.from_iterable(found))
    visible = [(query, keys) for query, key in pairs if (keys := _visible_keys(query, key, scores.band))]
    if not scores.needs_positions and len(visible) > 1 and all(_is_whole(*pair, scores.band) for pair in visible):
        merged = _as_one(visible)
        if merged is not None:
            return (merged,)
    return tuple(Block(_rows(query), _rows(keys), query.begin, keys.begin) for query, keys in visible)


def needed_keys(scores: SharedScores, query_rank: int, key_rank: int) -> list[slice]:
    """The rows in the shard of key_rank that query_rank needs, in ascending order and without overlap."""
    found: list[slice] = []
    for rows in sorted((x.key_rows for x in blocks(scores, query_rank, key_rank)), key=lambda x: x.start):
        if found and rows.start <= found[-1].stop:
            found[-1] = slice(found[-1].start, max(found[-1].stop, rows.stop))
        else:
            found.append(rows)
    return found


def _rows(segment: Segment) -> slice:
    """The rows of a segment in its shard."""
    return slice(segment.at, segment.at + segment.end - segment.begin)


def _blocks_of_documents(query: Segment, key: Segment, documents: Documents, band: Band) -> list[Block]:
    """The blocks of two segments: one for a document that begins before a segment, and one for all other documents.

    Only the first document of a segment can begin before the segment. The queries of the other documents stand at the
    positions that the kernels for packed sequences assume.
    """
    numbers = [
        [bisect.bisect_right(offsets, row) - 1 for row in (segment.begin, segment.end - 1)]
        for segment, offsets in ((query, documents.query), (key, documents.key))
    ]
    both = range(max(first for first, _ in numbers), min(last for _, last in numbers) + 1)  # have rows in both segments
    found: list[Block | None] = []
    if both and (documents.query[both[0]] < query.begin or documents.key[both[0]] < key.begin):
        found.append(_block_of_document(query, key, documents, both[0], band))
        both = both[1:]
    if len(both) == 1:
        found.append(_block_of_document(query, key, documents, both[0], band))
    elif both:
        found.append(_block_of_packed(query, key, documents, both))
    return [block for block in found if block is not None]


def _block_of_document(query: Segment, key: Segment, documents: Documents, number: int, band: Band) -> Block | None:
    """The block of a single document; None if it is hidden."""
    own_query, own_key = (_part(x, y, number) for x, y in ((query, documents.query), (key, documents.key)))
    keys = _visible_keys(own_query, own_key, band) if own_query.begin < own_query.end else None
    if keys is None:
        return None
    return Block(_rows(own_query), _rows(keys), own_query.begin, keys.begin, number)


def _part(segment: Segment, offsets: Offsets, number: int) -> Segment:
    """The rows of a document in a segment, as positions in the document."""
    begin, end = max(segment.begin, offsets[number]), min(segment.end, offsets[number + 1])
    return Segment(begin - offsets[number], end - offsets[number], segment.at + begin - segment.begin)


def _block_of_packed(query: Segment, key: Segment, documents: Documents, numbers: range) -> Block | None:
    """The block of documents that begin in both segments; None if they have no queries or no keys."""
    rows, cut = [], []
    for segment, offsets in ((query, documents.query), (key, documents.key)):
        begin, end = offsets[numbers[0]], min(segment.end, offsets[numbers[-1] + 1])
        rows.append(_rows(Segment(begin, end, segment.at + begin - segment.begin)))
        cut.append(tuple(min(x, end) - begin for x in offsets[numbers[0] : numbers[-1] + 2]))
    if any(x.start == x.stop for x in rows):
        return None
    return Block(rows[0], rows[1], 0, 0, numbers[0], Documents(cut[0], cut[1]))


def _visible_keys(query: Segment, key: Segment, band: Band) -> Segment | None:
    """The keys of a segment that at least one query of the other segment sees; None if there are none."""
    begin, end = key.begin, key.end
    if band.left != UNBOUNDED:
        first = query.begin + band.offset - band.left
        if first >= end:
            return None
        begin = max(begin, first // GROUP * GROUP)  # see Sharding.of
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
