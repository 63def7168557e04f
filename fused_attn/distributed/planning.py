"""How many bytes each method sends, and which one is cheapest."""

from __future__ import annotations

from collections.abc import Sequence

from fused_attn.distributed.blocks import Positions, needed_keys
from fused_attn.distributed.ulysses import repeats


def ring_elements(positions: Positions, key: Sequence[int], value: Sequence[int]) -> list[int]:
    """How many elements of keys and values each rank of a ring sends in forward.

    key, value: the shapes (B, Hkv, rows, columns) of shards, whose rows do not matter
    """
    world = positions.key.world
    row = key[0] * (key[1] * key[3] + value[1] * value[3])
    sent = []
    for owner in range(world):
        needed = (rows for rank in range(world) if rank != owner for rows in needed_keys(positions, rank, owner))
        sent.append(row * sum(rows.stop - rows.start for rows in needed))
    return sent


def ulysses_elements(positions: Positions, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> list[int]:
    """How many elements of queries, keys, values and outputs each rank sends in forward, when heads are divided."""
    world, (batch, num_heads, _, head_dim), value_dim = positions.key.world, query, value[3]
    kv_heads = key[1] if key[1] % world == 0 else key[1] * repeats(num_heads, key[1], world)
    sent = []
    for rank in range(world):
        rows_q, rows_k = positions.query.rows(rank), positions.key.rows(rank)
        inwards = (rows_q * num_heads * head_dim + rows_k * kv_heads * (head_dim + value_dim)) * (world - 1) // world
        outwards = (positions.query.length - rows_q) * num_heads // world * value_dim
        sent.append(batch * (inwards + outwards))
    return sent


def cheapest_method(positions: Positions, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> str:
    """ "ring" or "ulysses": the one whose busiest rank sends fewer elements."""
    if query[1] % positions.key.world != 0:
        return "ring"
    ring = max(ring_elements(positions, key, value))
    return "ring" if ring <= max(ulysses_elements(positions, query, key, value)) else "ulysses"
