"""Masked language modelling with RoBERTa (Liu et al., 2019): other tokens are masked each time that a passage comes.

pip install -e .[examples]
python examples/pretrain_roberta.py
"""

from __future__ import annotations

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
from transformers import DataCollatorForLanguageModeling, RobertaConfig, RobertaForMaskedLM


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_arguments(__doc__.splitlines()[0], steps=100, argv=argv)
    texts = [text for _, text in passages()]
    tokenizer = train_tokenizer(texts)
    rows = [{"input_ids": encode(tokenizer, text)} for text in texts]
    model = RobertaForMaskedLM(
        RobertaConfig(
            **SIZE, vocab_size=len(tokenizer), attention_probs_dropout_prob=0.0, type_vocab_size=1,
            max_position_embeddings=MAX_LENGTH + 1,  # RoBERTa counts positions from pad_token_id + 1
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return train_on_both(model, lambda: batches(rows, collate, args.steps, args.seed), args)[1]


if __name__ == "__main__":
    main()
