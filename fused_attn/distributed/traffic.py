"""How many elements of tensors each method sends, and which method is cheapest."""

from __future__ import annotations

from collections.abc import Sequence

from fused_attn.distributed.blocks import SharedScores, needed_keys
from fused_attn.distributed.ulysses import repeats


def ring_elements(scores: SharedScores, key: Sequence[int], value: Sequence[int]) -> list[int]:
    """How many elements of keys and values each rank of a ring sends in forward.

    key, value: the shapes (B, Hkv, rows, columns) of shards. The number of rows is not read
    """
    world = scores.key.world
    row = key[0] * (key[1] * key[3] + value[1] * value[3])
    sent = []
    for owner in range(world):
        needed = (rows for rank in range(world) if rank != owner for rows in needed_keys(scores, rank, owner))
        sent.append(row * sum(rows.stop - rows.start for rows in needed))
    return sent


def ring_rows(scores: SharedScores, rank: int, step: int) -> tuple[int, int]:
    """How many rows of keys a rank (sends, gets) for a step of the ring. Their gradients travel the other way."""
    world = scores.key.world
    pairs = ((rank + step) % world, rank), (rank, (rank - step) % world)
    sent, received = (sum(x.stop - x.start for x in needed_keys(scores, *pair)) for pair in pairs)
    return sent, received


def ulysses_elements(
    scores: SharedScores, query: Sequence[int], key: Sequence[int], value: Sequence[int], size: int | None = None,
    is_backward: bool = False,
) -> list[int]:  # fmt: skip
    """How many elements of queries, keys, values and outputs each rank sends, when heads are divided.

    size: how many neighbouring ranks divide the heads among them; default: all
    is_backward: count the gradients, which travel the other way
    """
    size = scores.key.world if size is None else size
    (batch, num_heads, _, head_dim), value_dim = query, value[3]
    kv_heads = divided_kv_heads(num_heads, key[1], size)
    grouped_q, grouped_k = scores.query.of_groups(size), scores.key.of_groups(size)
    sent = []
    for rank in range(scores.key.world):
        rows_q, rows_k = scores.query.rows(rank), scores.key.rows(rank)
        other_q, other_k = grouped_q.rows(rank // size) - rows_q, grouped_k.rows(rank // size) - rows_k
        queries_out, keys_out = (x * (size - 1) // size for x in (rows_q * num_heads, rows_k * kv_heads))
        queries_back, keys_back = other_q * num_heads // size, other_k * kv_heads // size
        columns = head_dim + value_dim
        if is_backward:
            elements = queries_out * value_dim + queries_back * head_dim + keys_back * columns
        else:
            elements = queries_out * head_dim + keys_out * columns + queries_back * value_dim
        sent.append(batch * elements)
    return sent


def divided_kv_heads(num_heads: int, num_kv_heads: int, size: int) -> int:
    """The number of key heads that `size` ranks divide: repeated ones if there are too few."""
    return num_kv_heads if num_kv_heads % size == 0 else num_kv_heads * repeats(num_heads, num_kv_heads, size)


def cheapest_method(scores: SharedScores, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> str:
    """ "ring" or "ulysses": the one whose busiest rank sends fewer elements."""
    if query[1] % scores.key.world != 0:
        return "ring"
    ring = max(ring_elements(scores, key, value))
    return "ring" if ring <= max(ulysses_elements(scores, query, key, value)) else "ulysses"
