"""Span corruption with T5 (Raffel et al., 2020, section 3.1.4): text to text, the decoder restores what was cut out.

    pip install -e .[examples]
    python examples/pretrain_t5.py

15 % of the tokens are cut out in spans of 3 on average. The encoder sees a sentinel in place of each span, the decoder
writes each sentinel and its span. T5's relative position bias trains through `fused_attention(relative_bias=...)`.
"""

from __future__ import annotations

import itertools
import random

from pretraining_utils import SIZE, Batch, batches, encode, parse_arguments, passages, train_on_both, train_tokenizer
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

NOISE, SPAN_LENGTH = 0.15, 3
SENTINELS = [f"<extra_id_{n}>" for n in range(24)]


def corrupt(ids: list[int], sentinels: list[int], end: int, choice: random.Random) -> tuple[list[int], list[int]]:
    """(what the encoder reads, what the decoder writes). No two spans touch, or one sentinel would stand for both."""
    num_noise = max(1, round(len(ids) * NOISE))
    num_spans = min(max(1, round(num_noise / SPAN_LENGTH)), len(ids) - num_noise, len(sentinels) - 1)
    spans = _split(num_noise, num_spans, choice)
    kept = _split(len(ids) - num_noise, num_spans, choice)
    source, target, position = [], [], 0
    for sentinel, keep, span in zip(sentinels, kept, spans, strict=False):
        source += [*ids[position : position + keep], sentinel]
        target += [sentinel, *ids[position + keep : position + keep + span]]
        position += keep + span
    return [*source, end], [*target, sentinels[num_spans], end]


def _split(total: int, parts: int, choice: random.Random) -> list[int]:
    """`parts` numbers above 0, each way to choose them equally likely, that add up to `total`."""
    cuts = [0, *sorted(choice.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in itertools.pairwise(cuts)]


class SpanCorruption:
    """A collator that corrupts a passage in another way each time that it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: T5ForConditionalGeneration, seed: int):
        self.pad = DataCollatorForSeq2Seq(tokenizer, model)
        self.sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
        self.end = tokenizer.eos_token_id
        self.choice = random.Random(seed)

    def __call__(self, rows: list[dict]) -> Batch:
        pairs = (corrupt(row["input_ids"], self.sentinels, self.end, self.choice) for row in rows)
        return self.pad([{"input_ids": source, "labels": target} for source, target in pairs])


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_arguments(__doc__.splitlines()[0], steps=100, argv=argv)
    texts = [text for _, text in passages()]
    tokenizer = train_tokenizer(texts, *SENTINELS)
    rows = [{"input_ids": encode(tokenizer, text)[1:-1]} for text in texts]
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=SIZE["hidden_size"], d_ff=SIZE["intermediate_size"],
            d_kv=SIZE["hidden_size"] // SIZE["num_attention_heads"], num_layers=SIZE["num_hidden_layers"],
            num_heads=SIZE["num_attention_heads"], pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            # T5 1.1's. The kink of the first T5's ReLU turns one rounding into another loss curve: eager attention from
            # weights one unit in the last place away then ends up to 5e-4 from itself, and with this 3e-7.
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,  # one rate for all, and that of attention has to be 0
        )
    )  # fmt: skip
    return train_on_both(
        model, lambda: batches(rows, SpanCorruption(tokenizer, model, args.seed), args.steps, args.seed), args
    )[1]


if __name__ == "__main__":
    main()
