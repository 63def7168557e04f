"""Masked language modelling and next-sentence prediction with BERT (Devlin et al., 2019).

    pip install -e .[examples]
    python examples/pretrain_bert.py

15 % of the tokens are to be predicted; of these 80 % show [MASK], 10 % another token and 10 % themselves. As in the
paper a pair is masked once, before training. Half of the pairs are paragraphs that follow one another, which the head
on the [CLS] token has to tell from the other half.
"""

from __future__ import annotations

import itertools
import random

from pretraining_utils import (
    MAX_LENGTH,
    SIZE,
    batches,
    encode,
    parse_arguments,
    passages,
    train_on_both,
    train_tokenizer,
)
from transformers import (
    BertConfig,
    BertForPreTraining,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)


def sentence_pairs(paragraphs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict]:
    """[CLS] A [SEP] B [SEP], with next_sentence_label 0 where B follows A in the text and 1 where it is any other."""
    choice = random.Random(seed)
    pairs = []
    for (topic, first), (next_topic, second) in itertools.pairwise(paragraphs):
        if topic != next_topic:
            continue
        is_random = choice.random() < 0.5
        if is_random:
            second = choice.choice(paragraphs)[1]
        a = encode(tokenizer, first, MAX_LENGTH // 2)
        b = encode(tokenizer, second, MAX_LENGTH // 2 + 1)[1:]
        pairs.append(
            {
                "input_ids": a + b,
                "token_type_ids": [0] * len(a) + [1] * len(b),
                "next_sentence_label": int(is_random),
            }
        )
    return pairs


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_arguments(__doc__.splitlines()[0], steps=100, argv=argv)
    paragraphs = passages()
    tokenizer = train_tokenizer([text for _, text in paragraphs])
    mask = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.15, mask_replace_prob=0.8, random_replace_prob=0.1
    )
    rows = []
    for pair in sentence_pairs(paragraphs, tokenizer, args.seed):
        masked = mask([{"input_ids": pair["input_ids"]}])
        rows.append(pair | {name: masked[name][0].tolist() for name in ("input_ids", "labels")})
    model = BertForPreTraining(
        BertConfig(
            **SIZE, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    pad = DataCollatorForTokenClassification(tokenizer)  # pads labels with -100, which counts for nothing
    return train_on_both(model, lambda: batches(rows, pad, args.steps, args.seed), args)[1]


if __name__ == "__main__":
    main()
