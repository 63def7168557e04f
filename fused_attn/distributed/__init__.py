"""Attention over sequences that several processes share, with the results of one process.

sequence.py   which rows of a sequence each rank holds; shards of tensors and batches
blocks.py     which blocks of the scores a rank computes, and which keys it needs from which rank
exchange.py   messages between ranks, and how many bytes they have
ring.py       the queries stay, the keys and values travel
ulysses.py    each rank gets all rows of some of the heads
traffic.py    how many elements each method sends, and which method sends fewest
cost.py       what a training step costs on many GPUs: time, bytes and memory
rates.py      how fast kernels are, from measured rows
__main__.py   ``python -m fused_attn.distributed plan``, with numbers such as 450GB/s in quantities.py
attention.py  `context_parallel_attention` and `context_parallel_attention_varlen`
tensor_parallel.py  attention and Transformer layers whose heads several processes share
"""

from fused_attn.distributed.attention import context_parallel_attention, context_parallel_attention_varlen
from fused_attn.distributed.exchange import count_traffic
from fused_attn.distributed.sequence import (
    shard_batch,
    shard_positions,
    shard_sequence,
    unshard_batch,
    unshard_sequence,
)
from fused_attn.distributed.tensor_parallel import AttentionParallel, tensor_parallel_plan

__all__ = [
    "AttentionParallel",
    "context_parallel_attention",
    "context_parallel_attention_varlen",
    "count_traffic",
    "shard_batch",
    "shard_positions",
    "shard_sequence",
    "tensor_parallel_plan",
    "unshard_batch",
    "unshard_sequence",
]
