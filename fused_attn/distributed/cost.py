"""What a training step costs in attention, when several GPUs share each sequence: time, bytes and memory.

The model follows `context_parallel_attention`, block by block and message by message. Sizes are those of the glossary
(B, H, Hkv, L = S, D), and s is the size of an element in bytes. Per layer, on the slowest GPU:

**Kernels.** A block of scores with v visible entries takes ``4 B H D v / rate`` seconds in forward. Backward has 2.5
times as many operations, five products in place of two (Dao, "FlashAttention-2", 2023). The rate is a measured one
(`rates.py`) at the length sqrt(queries * keys) of the block: that of calls without a mask if all entries are visible,
else that of causal calls.

**Copies.** Sums over blocks and the rearrangement of shards read and write ``bytes / memory bandwidth`` seconds. With e
elements of the queries of a block and f elements of its keys and values, `ring.py` reads and writes

    forward, each block        (32 + s) e bytes to merge a part with the float32 sum
    forward, once              8 e + s e for the sum and its rounding
    backward, each block       12 (e + f) to add the gradients, and (s + 4) (e + f) if they are not float32
    backward, each step        16 f for the zeros before, and for the addition of, gradients that travel
    backward, once             (8 + s) (e + f)

and `ulysses.py` copies each of the tensors that it exchanges three times, that is 6 s bytes for each element.

**Messages.** A message takes ``latency + bytes / bandwidth`` (Hockney, "The communication challenge for MPP", 1994), by
NVLink within a node and by InfiniBand between nodes. Both directions work at the same time.

- ring: in step t, the kernels run while the keys of step t + 1 arrive and the gradients of the keys of step t - 1 leave
  (s and 4 bytes an element). What takes longer than the kernels is exposed. The gradients of the last step are exposed.
- ulysses: query, key, value, out and lse in forward, dout, dquery, dkey and dvalue in backward. Everything is exposed.
  The bytes to GPUs of the same node and those to other nodes travel at the same time.

**Memory.** Saved: query, key, value, out (s) and lse (4 bytes), for all layers. Buffers, in the backward of one layer:
the float32 sums of the ring; keys of two steps and gradients of two steps that travel; the gradients of a block and
their float32 copies; the pieces that are exchanged. Gradients that `context_parallel_attention` gets, the memory that a
kernel takes for itself, weights and other activations are not counted.

**Left out**: the time in which the host launches kernels; multiprocessors that NCCL takes from the kernels; jitter;
other traffic on the links.

In a long ring, only some ranks are computed, which stand for all: the first and the last ones, and some between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fused_attn.attention.problem import UNBOUNDED, Band
from fused_attn.distributed.blocks import Block, SharedScores, blocks
from fused_attn.distributed.rates import BACKWARD, FORWARD, Rates
from fused_attn.distributed.sequence import Sharding
from fused_attn.distributed.traffic import divided_kv_heads, ring_rows, ulysses_elements

#: The size of an element of sums and of lse, in bytes.
SUM = 4
#: The operations of backward in those of forward.
BACKWARD_OPERATIONS = 2.5
#: In rings with at most this many ranks, all ranks are computed.
SMALL_RING = 16
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Workload(NamedTuple):
    """The attention of a training step.

    tokens: the length of each sequence
    batch: how many sequences the GPUs work on together
    layers: how many times attention runs in the step
    band: the visible diagonals
    """

    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    dtype: str
    band: Band

    @property
    def size(self) -> int:
        """The size of an element in bytes."""
        return SIZES[self.dtype]

    def scores(self, gpus: int) -> SharedScores:
        """The scores of the sequence, if `gpus` ranks share it."""
        sharding = Sharding.of(self.tokens, gpus)
        return SharedScores(sharding, sharding, self.band, needs_positions=False)


class Machine(NamedTuple):
    """GPUs and their links. Bandwidths are bytes per second, of each GPU and in each direction; latencies are seconds.

    overlaps: messages travel while kernels run. On CPUs, both take the same cores.
    """

    gpus_per_node: int
    nvlink: float
    infiniband: float
    nvlink_latency: float
    infiniband_latency: float
    memory_bandwidth: float
    overlaps: bool = True

    def message_seconds(self, size: float, is_within_node: bool, count: int = 1) -> float:
        """The seconds of `count` messages that have `size` bytes together; 0 without bytes."""
        if size == 0:
            return 0.0
        if is_within_node:
            return count * self.nvlink_latency + size / self.nvlink
        return count * self.infiniband_latency + size / self.infiniband


class Method(NamedTuple):
    """A ring of `ring` groups of `ulysses` neighbouring ranks, each of which divides the heads."""

    ring: int
    ulysses: int

    def __str__(self) -> str:
        if self.ulysses == 1:
            return f"ring {self.ring}"
        return f"ulysses {self.ulysses}" if self.ring == 1 else f"ring {self.ring} x ulysses {self.ulysses}"


class Seconds(NamedTuple):
    """Time of the slowest GPU. exposed: communication that no computation hides"""

    kernels: float = 0.0
    copies: float = 0.0
    exposed: float = 0.0

    @property
    def total(self) -> float:
        return self.kernels + self.copies + self.exposed

    def __add__(self, other: tuple) -> Seconds:
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Seconds:
        return Seconds(*(x * count for x in self))


class Step(NamedTuple):
    """What a rank does in one step of a ring.

    forward, backward: its computation
    keys: the seconds of the message with the keys of this step
    gradients: the seconds of the message with their gradients
    """

    forward: Seconds
    backward: Seconds
    keys: float
    gradients: float


class Cost(NamedTuple):
    """What attention costs in one step, over all layers.

    forward, backward: time
    sent_forward, sent_backward: bytes that a GPU sends; the largest number of all ranks that were looked at
    saved, buffers: bytes of memory, see the head of this module
    """

    method: Method
    forward: Seconds
    backward: Seconds
    sent_forward: int
    sent_backward: int
    saved: int
    buffers: int

    @property
    def seconds(self) -> Seconds:
        return self.forward + self.backward

    @property
    def memory(self) -> int:
        return self.saved + self.buffers


def methods(workload: Workload, gpus: int) -> list[Method]:
    """All ways in which the GPUs can work together: a ring, heads divided, and both nested."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0 and workload.heads % size == 0]
    return [Method(gpus // size, size) for size in sizes]


def cost(workload: Workload, machine: Machine, rates: Rates, method: Method) -> Cost:
    """The cost of a step with one method."""
    return _Model(workload, machine, rates, method).cost()


def visible_scores(block: Block, band: Band) -> int:
    """How many scores of a block the band leaves visible."""
    rows, keys = (x.stop - x.start for x in (block.query_rows, block.key_rows))
    # Query i of the block stands at key i + shift of the block.
    shift = block.query_offset + band.offset - block.key_offset
    right = rows * keys if band.right == UNBOUNDED else _up_to(shift + band.right, rows, keys)
    return right - (0 if band.left == UNBOUNDED else _up_to(shift - band.left - 1, rows, keys))


def _up_to(diagonal: int, rows: int, keys: int) -> int:
    """The number of entries (i, j) of a block with j - i <= diagonal."""

    def entries(row: int) -> int:
        """The entries of the rows up to `row`. Row k has k entries, but at most `keys` and at least 0."""
        corner = min(max(row, 0), keys)
        return corner * (corner + 1) // 2 + max(row - keys, 0) * keys

    return entries(rows + diagonal) - entries(diagonal)


class _Model:
    """The cost of one method. Everything but `cost` is about one layer."""

    def __init__(self, workload: Workload, machine: Machine, rates: Rates, method: Method):
        self.workload, self.machine, self.rates, self.method = workload, machine, rates, method
        group = method.ulysses
        self.shards = workload.scores(method.ring * group)
        self.scores = self.shards._replace(
            query=self.shards.query.of_groups(group), key=self.shards.key.of_groups(group)
        )
        self.heads = workload.heads // group
        kv_heads = divided_kv_heads(workload.heads, workload.kv_heads, group) // group
        #: The elements of a row of queries, and of a row of keys and values together, in all heads of one rank.
        self.query_row = workload.batch * self.heads * workload.head_dim
        self.key_row = 2 * workload.batch * kv_heads * workload.head_dim
        self.found: dict[tuple[int, int], tuple[Block, ...]] = {}
        #: For each rank that is looked at, the rows of keys that it (sends, gets) in each step.
        self.travelling = {
            rank: [(0, 0)] + [ring_rows(self.scores, rank, step) for step in range(1, method.ring)]
            for rank in self.ranks()
        }

    def cost(self) -> Cost:
        layers = self.workload.layers
        forward, backward = self.ring_seconds()
        swaps = [self.swap_bytes(is_backward) for is_backward in (False, True)]
        sent = [max(own) for own in zip(*(self.sent_bytes(rank, swaps) for rank in self.ranks()), strict=True)]
        return Cost(
            self.method,
            (forward + self.swap_seconds(False, swaps[False])).times(layers),
            (backward + self.swap_seconds(True, swaps[True])).times(layers),
            sent[0] * layers,
            sent[1] * layers,
            max(map(self.saved_bytes, self.ranks())) * layers,
            max(map(self.buffer_bytes, self.ranks())),
        )

    def ranks(self) -> Sequence[int]:
        """The ranks of the ring that are looked at."""
        count = self.method.ring
        if count <= SMALL_RING:
            return range(count)
        return sorted({0, 1, count // 4, count // 2 - 1, count // 2, 3 * count // 4, count - 2, count - 1})

    def blocks(self, rank: int, number: int) -> tuple[Block, ...]:
        """The blocks that a rank of the ring computes in the step of this number."""
        source = (rank - number) % self.method.ring
        if (rank, source) not in self.found:
            self.found[rank, source] = blocks(self.scores, rank, source)
        return self.found[rank, source]

    # ---- Bytes

    def swap_bytes(self, is_backward: bool) -> list[int]:
        """What each rank of the mesh sends when shards of the sequence become shards of heads, and back."""
        workload, group = self.workload, self.method.ulysses
        query, key = ((workload.batch, heads, 0, workload.head_dim) for heads in (workload.heads, workload.kv_heads))
        elements = ulysses_elements(self.shards, query, key, key, group, is_backward)
        sent = [workload.size * x for x in elements]
        if not is_backward:  # lse
            for rank in range(len(sent)):
                others = self.scores.query.rows(rank // group) - self.shards.query.rows(rank)
                sent[rank] += SUM * workload.batch * self.heads * others
        return sent

    def sent_bytes(self, rank: int, swaps: Sequence[Sequence[int]]) -> tuple[int, int]:
        """What the busiest member of a group sends in (forward, backward).

        rank: the number of the group in the ring
        swaps: `swap_bytes` of forward and of backward
        """
        steps = self.travelling[rank]
        keys = self.workload.size * self.key_row * sum(sent for sent, _ in steps)
        gradients = SUM * self.key_row * sum(received for _, received in steps)
        members = slice(rank * self.method.ulysses, (rank + 1) * self.method.ulysses)
        return keys + max(swaps[False][members]), keys + gradients + max(swaps[True][members])

    # ---- Memory

    def saved_bytes(self, rank: int) -> int:
        """What a rank saves for backward."""
        rows_q, rows_k = self.scores.query.rows(rank), self.scores.key.rows(rank)
        tensors = (2 * rows_q * self.query_row + rows_k * self.key_row) * self.workload.size
        return tensors + SUM * self.workload.batch * self.heads * rows_q

    def buffer_bytes(self, rank: int) -> int:
        """What a rank needs beside the saved tensors while it computes a layer. The most is needed in backward."""
        size = self.workload.size
        rows_k = self.scores.key.rows(rank)
        e, f = self.scores.query.rows(rank) * self.query_row, rows_k * self.key_row
        # The exchange of dout takes memory for the pieces that are sent and for those that arrive.
        members = range(rank * self.method.ulysses, (rank + 1) * self.method.ulysses)
        swap = size * (2 * max(map(self.shards.query.rows, members)) * self.query_row * self.method.ulysses + e)
        if self.method.ring == 1:
            return max(swap, size * (2 * e + f))  # dout, dquery, dkey and dvalue
        most = 0
        travelling = [(0, 0), (0, 0), *self.travelling[rank], (0, 0)]
        for number in range(self.method.ring):
            *earlier, (sent, received), (next_sent, next_received) = travelling[number : number + 4]
            copies = sum(x for x in (sent, next_sent) if x < rows_k)  # a part of a tensor is copied to be sent
            keys = size * (received + next_received + copies)
            gradients = SUM * (received + sum(map(sum, earlier)))
            results = max(
                (
                    (x.query_rows.stop - x.query_rows.start) * self.query_row
                    + (x.key_rows.stop - x.key_rows.start) * self.key_row
                    for x in self.blocks(rank, number)
                ),
                default=0,
            )
            results *= size + SUM * (size != SUM)
            most = max(most, (keys + gradients) * self.key_row + max(results, SUM * sent * self.key_row))
        if self.method.ulysses == 1:
            return SUM * (e + f) + most
        return max(swap, SUM * (e + f) + size * e + most)

    # ---- Time

    def ring_seconds(self) -> tuple[Seconds, Seconds]:
        """(forward, backward) of the attention of shards of heads. The slowest rank decides each step."""
        steps = [[self.step(rank, number) for rank in self.ranks()] for number in range(self.method.ring)]
        forward, backward = (Seconds(), Seconds()) if len(steps) == 1 else self.sums_seconds()
        for number, ranks in enumerate(steps):
            arriving = max((x.keys for x in steps[number + 1]), default=0.0) if number + 1 < len(steps) else 0.0
            leaving = max(x.gradients for x in steps[number - 1]) if number else 0.0
            forward += self.with_messages(max((x.forward for x in ranks), key=lambda x: x.total), arriving)
            backward += self.with_messages(max((x.backward for x in ranks), key=lambda x: x.total), arriving + leaving)
        return forward, backward + Seconds(exposed=max(x.gradients for x in steps[-1]))

    def with_messages(self, computation: Seconds, messages: float) -> Seconds:
        """The time of a computation while messages of so many seconds travel."""
        hidden = computation.total if self.machine.overlaps else 0.0
        return computation._replace(exposed=max(0.0, messages - hidden))

    def step(self, rank: int, number: int) -> Step:
        """What a rank of the ring does in the step of this number."""
        world, size = self.method.ring, self.workload.size
        kernels, copied = [0.0, 0.0], [0, 0]
        for block in self.blocks(rank, number):
            rows, keys = (x.stop - x.start for x in (block.query_rows, block.key_rows))
            visible = visible_scores(block, self.workload.band)
            operations = 4 * self.workload.batch * self.heads * self.workload.head_dim * visible
            length, is_masked = math.sqrt(rows * keys), visible < rows * keys
            kernels[0] += operations / self.rates.rate(FORWARD, is_masked, length)
            kernels[1] += BACKWARD_OPERATIONS * operations / self.rates.rate(BACKWARD, is_masked, length)
            e, f = rows * self.query_row, keys * self.key_row
            copied[0] += (32 + size) * e
            copied[1] += (12 + (size + SUM) * (size != SUM)) * (e + f)
        if world == 1:  # the kernel is called directly
            return Step(Seconds(kernels[0]), Seconds(kernels[1]), 0.0, 0.0)
        travelling = self.key_row * max(self.travelling[rank][number])
        is_within = all(self.are_together(rank, (rank + way * number) % world) for way in (-1, 1))
        forward, backward = (
            Seconds(seconds, count / self.machine.memory_bandwidth)
            for seconds, count in zip(kernels, (copied[0], copied[1] + 16 * travelling), strict=True)
        )
        messages = (self.machine.message_seconds(x * travelling, is_within) for x in (size, SUM))
        return Step(forward, backward, *messages)

    def are_together(self, first: int, second: int) -> bool:
        """Whether all messages between two groups of the ring stay within nodes."""
        group, node = self.method.ulysses, self.machine.gpus_per_node
        return all((first * group + x) // node == (second * group + x) // node for x in (0, group - 1))

    def sums_seconds(self) -> tuple[Seconds, Seconds]:
        """(forward, backward) of the float32 sums of a ring: zeros before, rounding after."""
        e, f = self.largest_shards()
        size, bandwidth = self.workload.size, self.machine.memory_bandwidth
        return (
            Seconds(copies=(2 * SUM + size) * e / bandwidth),
            Seconds(copies=(2 * SUM + size) * (e + f) / bandwidth),
        )

    def swap_seconds(self, is_backward: bool, sent: Sequence[int]) -> Seconds:
        """The exchanges of shards of the sequence for shards of heads, and back.

        sent: `swap_bytes`
        """
        group, node = self.method.ulysses, self.machine.gpus_per_node
        if group == 1:
            return Seconds()
        # The share of its bytes that a rank sends within its node. The rank with the smallest share decides.
        numbers = ((rank, range(rank - rank % group, rank - rank % group + group)) for rank in range(len(sent)))
        part = min(sum(x // node == rank // node for x in others) - 1 for rank, others in numbers) / (group - 1)
        tensors = 4 if is_backward else 5
        seconds = max(
            self.machine.message_seconds(max(sent) * share, is_within, tensors)
            for share, is_within in ((part, True), (1 - part, False))
        )
        e, f = self.largest_shards()
        return Seconds(copies=6 * self.workload.size * (2 * e + f) / self.machine.memory_bandwidth, exposed=seconds)

    def largest_shards(self) -> tuple[int, int]:
        """The elements of queries, and of keys and values together, of the fullest rank."""
        rows_q, rows_k = (max(map(x.rows, self.ranks())) for x in (self.scores.query, self.scores.key))
        return rows_q * self.query_row, rows_k * self.key_row
