"""Fine-tune BERT with a classification head: from which topic of Python's documentation is a paragraph?

    pip install -e '.[examples]'
    python examples/finetune_bert.py

First BERT is pre-trained on masked words. Then a head on the [CLS] token learns to tell the ten topics with the most
paragraphs apart. A fifth of the paragraphs is held out. Both trainings run twice, with fused attention and with eager
attention, and the losses of all steps are compared.
"""

from __future__ import annotations

import random
from collections import Counter

import torch
from pretraining_utils import (
    BATCH_SIZE,
    MAX_LENGTH,
    SIZE,
    argument_parser,
    batches,
    encode,
    passages,
    set_up,
    train_on_both,
    train_tokenizer,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
)

NUM_TOPICS = 10


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, rows: list[dict], collate: DataCollatorWithPadding) -> float:
    """The fraction of the rows whose topic the model predicts."""
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collate(rows[start : start + BATCH_SIZE]).to(model.device)
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(rows)


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the script, and returns the loss of every step of the fine-tuning."""
    args = set_up(argument_parser(__doc__.splitlines()[0], steps=150, quick=30).parse_args(argv))
    paragraphs = passages()
    tokenizer = train_tokenizer([text for _, text in paragraphs])
    config = BertConfig(
        **SIZE, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, attention_probs_dropout_prob=0.0,
        num_labels=NUM_TOPICS, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    rows = [{"input_ids": encode(tokenizer, text)} for _, text in paragraphs]
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    pretrained, _ = train_on_both(BertForMaskedLM(config), lambda: batches(rows, mask, args.steps, args.seed), args)

    topics = [topic for topic, _ in Counter(topic for topic, _ in paragraphs).most_common(NUM_TOPICS)]
    labelled = [
        row | {"labels": topics.index(topic)}
        for row, (topic, _) in zip(rows, paragraphs, strict=True)
        if topic in topics
    ]
    random.Random(0).shuffle(labelled)
    held_out, labelled = labelled[: len(labelled) // 5], labelled[len(labelled) // 5 :]
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(pretrained.bert.state_dict(), strict=False)  # The pooler was not pre-trained.
    pad = DataCollatorWithPadding(tokenizer)
    model, losses = train_on_both(model, lambda: batches(labelled, pad, args.steps, args.seed), args)
    most_common = max(Counter(row["labels"] for row in held_out).values()) / len(held_out)
    print(
        f"{accuracy(model, held_out, pad):.1%} of {len(held_out)} held-out paragraphs right "
        f"({most_common:.1%} if every answer were the commonest topic)"
    )
    return losses


if __name__ == "__main__":
    main()
