"""The cases: what is computed, and how many floating-point operations that takes."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

DIRECTIONS = ("forward", "backward", "forward+backward")
#: Matrix products of a fused kernel: those over the head dim of queries and keys (scores, dquery, dkey), and those over
#: the head dim of values (output, dvalue, the gradient of the probs). Backward computes the scores again.
PRODUCTS = {"forward": (1, 1), "backward": (3, 2), "forward+backward": (4, 3)}

#: The masks, with their titles in tables and plots. The most useful mask is the first: a run that is cut short has then
#: measured what training does most.
MASKS = {
    "causal": "causal",
    "padded-random": "padded, random lengths",  # drawn uniformly from [1, L]
    "causal+padded-random": "causal + padded, random lengths",
    "none": "no mask",
    "padded": "half padded",  # the second half of every sequence is padding
    "causal+padded": "causal + half padded",
    "relative-bias": "relative bias with gradient",  # T5's, (H, L + S - 1)
    "bias": "bias with gradient",  # dense, (1, H, L, S)
    "window": "causal, window 1024",  # a query sees the last WINDOW keys
    "gqa": "causal, GQA",  # four query heads share a KV head
    "mla": "causal, head dims 192 and 128",  # values have fewer columns, as in DeepSeek's multi-head latent attention
    "varlen": "causal, packed",  # the lengths of the sequences are drawn uniformly from [1, L]
    "decode": "decode",  # one query for each sequence
    "latents": "512 queries",  # of each sequence, as of a Perceiver or of a part of a prompt
    "text": "77 keys",  # cross-attention of L tokens of an image to a text, as in Stable Diffusion
    "blocks": "half of the blocks",  # a dense bool mask (1, 1, L, S), random in blocks of BLOCK x BLOCK entries
    "shared-question": "answers to a shared question",  # key_ranges (L, 2, 2); see Case.segment_starts
    "softcap": "softcap",
    "sinks": "sinks with gradient",  # (H,)
    "dropout": "dropout 0.1",
}
#: Masks that are measured to be compared with "none", and therefore in fewer sizes (see `table`).
FEATURES = ("blocks", "shared-question", "softcap", "sinks", "dropout")
#: Masks whose queries, or keys, are so many, whatever the length is.
QUERIES = {"decode": 1, "latents": 512}
KEYS = {"text": 77}
#: Masks for which torch gets a dense bool mask.
DENSE_MASKS = ("blocks", "shared-question")
#: Masks with random lengths. A batch has at least LEAST_SEQUENCES, because the lengths of fewer would decide the time.
RANDOM_MASKS, LEAST_SEQUENCES = ("padded-random", "causal+padded-random", "varlen"), 4
CAUSAL_MASKS = ("causal", "causal+padded", "causal+padded-random", "window", "gqa", "mla", "varlen")
WINDOW, BLOCK, DROPOUT = 1024, 128, 0.1
#: The head dim of queries and keys with mask "mla". Values have two thirds of it.
MLA_HEAD_DIM = 192
#: Twice the standard deviation of the scores. With a far larger softcap, a kernel without one would be judged right.
SOFTCAP = 2.0


@dataclass(frozen=True)
class Case:
    """One attention problem.

    length: the number of queries and of keys, padding included, or of the longest packed sequence, unless the mask is
        one of QUERIES or KEYS
    """

    batch: int
    heads: int
    length: int
    head_dim: int
    mask: str
    dtype: str
    direction: str

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"mask: expected one of {', '.join(MASKS)}, got {self.mask!r}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        if self.mask == "gqa" and self.heads % 4:
            raise ValueError(f"heads: expected a multiple of 4 with mask gqa, got {self.heads}")

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.mask} {self.direction}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length, self.head_dim

    @property
    def value_dim(self) -> int:
        return value_dim_of(self.mask, self.head_dim)

    @property
    def kv_heads(self) -> int:
        return self.heads // 4 if self.mask == "gqa" else self.heads

    @property
    def seqlen_q(self) -> int:
        return min(QUERIES.get(self.mask, self.length), self.length)

    @property
    def seqlen_k(self) -> int:
        return min(KEYS.get(self.mask, self.length), self.length)

    @property
    def is_causal(self) -> bool:
        return self.mask in CAUSAL_MASKS

    @property
    def is_padded(self) -> bool:
        return "padded" in self.mask

    @property
    def is_packed(self) -> bool:
        return self.mask == "varlen"

    @property
    def window(self) -> int | None:
        """The number of keys that a query sees at most: the key at its own position and those before."""
        return WINDOW if self.mask == "window" else None

    @property
    def softcap(self) -> float:
        return SOFTCAP if self.mask == "softcap" else 0.0

    @property
    def dropout_p(self) -> float:
        return DROPOUT if self.mask == "dropout" else 0.0

    @functools.cached_property
    def visible_blocks(self) -> list[tuple[int, int]]:
        """The visible blocks of mask "blocks", as (block of queries, block of keys): half of all blocks.

        The blocks on the diagonal are visible, so that every query sees a key. The other visible blocks are random.
        """
        count = -(-self.length // BLOCK)
        others = [(row, column) for row, column in itertools.product(range(count), repeat=2) if row != column]
        drawn = random.Random(self.length).sample(others, max(0, count**2 // 2 - count))
        return [*((block, block) for block in range(count)), *drawn]

    @property
    def segment_starts(self) -> list[int]:
        """Where the question (0) and the answers of mask "shared-question" begin.

        A question of a quarter of the tokens stands first. Six answers of an eighth each follow. A token of an answer
        sees the question, and its own answer up to itself.
        """
        question, answer = max(1, self.length // 4), max(1, self.length // 8)
        return [0, *range(question, self.length, answer)]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of valid keys of each sequence."""
        if self.mask in ("padded", "causal+padded"):
            return (max(1, self.length // 2),) * self.batch
        if self.is_packed or self.is_padded:
            return uniform_lengths(self.batch, self.length)
        return (self.seqlen_k,) * self.batch

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """The number of queries of each sequence whose rows are computed. Padding hides keys, but its rows count."""
        return self.lengths if self.is_packed else (self.seqlen_q,) * self.batch

    @property
    def visible_scores(self) -> int:
        """The number of visible entries of the scores, in the whole batch and all heads. Entries that dropout drops are
        visible."""
        if self.mask == "blocks":
            sizes = [min(BLOCK, self.length - start) for start in range(0, self.length, BLOCK)]
            return self.batch * self.heads * sum(sizes[row] * sizes[column] for row, column in self.visible_blocks)
        if self.mask == "shared-question":
            question, *_ = ends = [*self.segment_starts[1:], self.length]
            own = sum(
                (end - start) * (end - start + 1) // 2 for start, end in zip(self.segment_starts, ends, strict=True)
            )
            return self.batch * self.heads * (own + question * (self.length - question))
        pairs = (
            _visible(rows, keys, self.is_causal, self.window)
            for rows, keys in zip(self.query_lengths, self.lengths, strict=True)
        )
        return self.heads * sum(pairs)

    @property
    def effective_flops(self) -> int:
        """The floating-point operations on visible scores. No implementation needs more."""
        return self._flops_of_score * self.visible_scores

    def fewest_bytes(self, itemsize: int) -> int:
        """The bytes that a forward must move: queries, valid keys and values are read once, the output is written."""
        rows, keys = sum(self.query_lengths), sum(self.lengths)
        return itemsize * (self.head_dim + self.value_dim) * (self.heads * rows + self.kv_heads * keys)

    @property
    def flops(self) -> float:
        """The floating-point operations by the usual formula: all scores, or half of them if causal."""
        keys = self.lengths if self.is_packed else (self.seqlen_k,) * self.batch
        scores = sum(rows * count for rows, count in zip(self.query_lengths, keys, strict=True))
        return self._flops_of_score * self.heads * scores * (0.5 if self.is_causal else 1.0)

    @property
    def _flops_of_score(self) -> int:
        of_queries, of_values = PRODUCTS[self.direction]
        return 2 * (of_queries * self.head_dim + of_values * self.value_dim)


def value_dim_of(mask: str, head_dim: int) -> int:
    return head_dim * 2 // 3 if mask == "mla" else head_dim


def uniform_lengths(batch: int, length: int) -> tuple[int, ...]:
    """Random lengths. [1, length] is cut into `batch` equal parts, and one length is drawn from each part, so that the
    mean varies little from batch to batch. The lengths are shuffled."""
    generator = random.Random(1000003 * batch + length)
    lengths = [1 + int((part + generator.random()) / batch * length) for part in range(batch)]
    generator.shuffle(lengths)
    return tuple(lengths)


@functools.lru_cache(maxsize=4096)
def _visible(rows: int, keys: int, is_causal: bool, window: int | None) -> int:
    if not is_causal:
        return rows * keys
    seen = (min(row + 1, keys) - max(0, row + 1 - (window or rows)) for row in range(rows))
    return sum(max(0, count) for count in seen)


class Scale(NamedTuple):
    """The sizes of the cases of a table.

    tokens: batch size times length
    width: heads times head_dim; with mask "mla", heads times the head dim of values
    gqa_heads: the number of query heads with mask "gqa", for every head_dim
    """

    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    gqa_heads: int


#: The convention of the FlashAttention papers.
GPU = Scale(16384, 2048, (512, 1024, 2048, 4096, 8192, 16384), (128, 64, 256), ("bfloat16", "float16"), 32)
GPU_QUICK = GPU._replace(lengths=(512, 2048, 8192), head_dims=(128, 64), dtypes=("bfloat16",))
CPU = Scale(2048, 512, (128, 512, 2048), (64, 128), ("float32", "bfloat16"), 8)
CPU_QUICK = CPU._replace(tokens=256, width=128, lengths=(64, 256), head_dims=(64,), dtypes=("float32",), gqa_heads=4)


def table(
    scale: Scale, masks: Iterable[str] = tuple(MASKS), directions: Iterable[str] = ("forward", "backward")
) -> Iterator[Case]:
    """All cases of a scale, the most useful first. The mask changes most slowly, the direction fastest.

    A mask in FEATURES, and masks "latents" and "text", have cases in the first dtype only, with head dims up to 128 and
    at most 8 sequences in a batch.
    """
    directions = tuple(directions)
    for mask in masks:
        for dtype in scale.dtypes:
            for head_dim in scale.head_dims if mask != "mla" else (MLA_HEAD_DIM,):
                heads = scale.gqa_heads if mask == "gqa" else max(1, scale.width // value_dim_of(mask, head_dim))
                for length in scale.lengths:
                    # A window over all keys hides nothing. A dense bias beyond 4096 keys needs gigabytes.
                    if (mask == "window" and length <= WINDOW) or (mask == "bias" and length > 4096):
                        continue
                    is_left_out = dtype != scale.dtypes[0] or head_dim > 128 or scale.tokens > 8 * length
                    if mask in (*FEATURES, "latents", "text") and is_left_out:
                        continue
                    least = LEAST_SEQUENCES if mask in RANDOM_MASKS else 1
                    batch = max(least, scale.tokens // length)
                    for direction in directions if mask != "decode" else ("forward",):
                        yield Case(batch, heads, length, head_dim, mask, dtype, direction)


class Fixed(NamedTuple):
    """A table with fixed shapes (B, H, L, D), of which --quick takes the first `quick` ones."""

    shapes: tuple[tuple[int, int, int, int], ...]
    masks: tuple[str, ...]
    directions: tuple[str, ...]
    quick: int

    def cases(self, dtypes: Iterable[str], masks: Iterable[str] = tuple(MASKS)) -> Iterator[Case]:
        chosen = [mask for mask in self.masks if mask in masks]
        for dtype, direction, shape, mask in itertools.product(dtypes, self.directions, self.shapes, chosen):
            yield Case(*shape, mask, dtype, direction)


#: The tables for a CPU.
FIXED = {
    "masks": Fixed(
        ((2, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 4, 8192, 64)),
        ("none", "causal", "padded", "causal+padded", "bias"), ("forward", "forward+backward"), 2,
    ),
    "short": Fixed(
        tuple((1, 8, length, 64) for length in (8, 16, 32, 64)), ("none", "causal"), ("forward", "forward+backward"), 1
    ),
    # Keys and values of the first shape fit into the cache of a CPU, those of the second do not.
    "decode": Fixed(((1, 8, 4096, 64), (1, 8, 65536, 64)), ("decode",), ("forward",), 1),
}  # fmt: skip
