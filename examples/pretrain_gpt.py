"""Causal language modelling with GPT-2: every token predicts the next one.

pip install -e .[examples]
python examples/pretrain_gpt.py
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
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_arguments(__doc__.splitlines()[0], steps=100, argv=argv)
    texts = [text for _, text in passages()]
    tokenizer = train_tokenizer(texts)
    rows = [{"input_ids": encode(tokenizer, text)} for text in texts]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=MAX_LENGTH, n_embd=SIZE["hidden_size"],
            n_layer=SIZE["num_hidden_layers"], n_head=SIZE["num_attention_heads"], attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return train_on_both(model, lambda: batches(rows, collate, args.steps, args.seed), args)[1]


if __name__ == "__main__":
    main()
