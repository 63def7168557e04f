"""Pre-train a small BERT, GPT-2, RoBERTa or T5 of Hugging Face transformers, on the task of its paper.

    pip install -e '.[examples]'
    python examples/pretrain.py --model bert

- bert: masked words and next-sentence prediction (Devlin et al., 2019). The model sees two paragraphs. In half of the
  pairs the second one follows the first one in the text, and the head on the [CLS] token learns to tell these pairs.
  The masked words of a pair are drawn once, before training.
- gpt: the next token.
- roberta: masked words (Liu et al., 2019). They are drawn anew each time that a passage is in a batch.
- t5: span corruption (Raffel et al., 2020, section 3.1.4). 15 % of the tokens are cut out, in spans of 3 tokens on
  average. The encoder sees a sentinel token in place of each span. The decoder learns to write each sentinel and its
  span. T5's relative position bias trains through `fused_attention(relative_bias=...)`.

Each model trains twice, with fused attention and with eager attention, and the losses of all steps are compared.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterable

from pretraining_utils import (
    MAX_LENGTH,
    SIZE,
    Batch,
    argument_parser,
    batches,
    encode,
    passages,
    set_up,
    train_on_both,
    train_tokenizer,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

#: A model, and a function that makes its batches. Each call of the function makes the same batches.
Training = tuple[nn.Module, Callable[[], Iterable[Batch]]]

#: T5: the fraction of the tokens that is cut out, and the mean length of a span.
NOISE, SPAN_LENGTH = 0.15, 3
SENTINELS = [f"<extra_id_{n}>" for n in range(24)]


def bert(args: argparse.Namespace) -> Training:
    paragraphs = passages()
    tokenizer = train_tokenizer([text for _, text in paragraphs])
    mask = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.15, mask_replace_prob=0.8, random_replace_prob=0.1
    )
    rows = []
    for pair in sentence_pairs(paragraphs, tokenizer, args.seed):
        masked = mask([{"input_ids": pair["input_ids"]}])
        rows.append(pair | {name: masked[name][0].tolist() for name in ("input_ids", "labels")})
    config = BertConfig(
        **SIZE, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pad = DataCollatorForTokenClassification(tokenizer)  # The label of padding is -100, which the loss ignores.
    return BertForPreTraining(config), lambda: batches(rows, pad, args.steps, args.seed)


def sentence_pairs(paragraphs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict]:
    """Pairs of paragraphs as [CLS] A [SEP] B [SEP]. The next_sentence_label of a pair is 0 if B follows A in the text,
    and 1 if B is a random paragraph."""
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
        segments = [0] * len(a) + [1] * len(b)
        pairs.append({"input_ids": a + b, "token_type_ids": segments, "next_sentence_label": int(is_random)})
    return pairs


def gpt(args: argparse.Namespace) -> Training:
    tokenizer, rows = _encoded_passages()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=MAX_LENGTH, n_embd=SIZE["hidden_size"],
        n_layer=SIZE["num_hidden_layers"], n_head=SIZE["num_attention_heads"], attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return GPT2LMHeadModel(config), lambda: batches(rows, collate, args.steps, args.seed)


def roberta(args: argparse.Namespace) -> Training:
    tokenizer, rows = _encoded_passages()
    config = RobertaConfig(
        **SIZE, vocab_size=len(tokenizer), attention_probs_dropout_prob=0.0, type_vocab_size=1,
        max_position_embeddings=MAX_LENGTH + 1,  # RoBERTa counts positions from pad_token_id + 1, which is 1.
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return RobertaForMaskedLM(config), lambda: batches(rows, collate, args.steps, args.seed)


def t5(args: argparse.Namespace) -> Training:
    tokenizer, rows = _encoded_passages(*SENTINELS)
    rows = [{"input_ids": row["input_ids"][1:-1]} for row in rows]  # T5 has no [CLS] and [SEP].
    config = T5Config(
        vocab_size=len(tokenizer), d_model=SIZE["hidden_size"], d_ff=SIZE["intermediate_size"],
        d_kv=SIZE["hidden_size"] // SIZE["num_attention_heads"], num_layers=SIZE["num_hidden_layers"],
        num_heads=SIZE["num_attention_heads"], pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        # This is the activation of T5 1.1. The first T5 has ReLU, whose kink amplifies rounding errors: two runs with
        # eager attention, whose first weights differ in the last bit, had losses 5e-4 apart. With this activation the
        # losses were 3e-7 apart.
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # T5 has one rate for all dropout, and attention must have none (see SIZE).
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return model, lambda: batches(rows, SpanCorruption(tokenizer, model, args.seed), args.steps, args.seed)


class SpanCorruption:
    """A collator, which makes a batch of passages. It cuts out other spans each time that a passage is in a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: T5ForConditionalGeneration, seed: int):
        self.pad = DataCollatorForSeq2Seq(tokenizer, model)
        self.sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
        self.end = tokenizer.eos_token_id
        self.choice = random.Random(seed)

    def __call__(self, rows: list[dict]) -> Batch:
        pairs = (corrupt(row["input_ids"], self.sentinels, self.end, self.choice) for row in rows)
        return self.pad([{"input_ids": source, "labels": target} for source, target in pairs])


def corrupt(ids: list[int], sentinels: list[int], end: int, choice: random.Random) -> tuple[list[int], list[int]]:
    """Cuts random spans out of a passage.

    For example, the passage a b c d e f may become a b <0> f <end> for the encoder, and <0> c d e <1> <end> for the
    decoder. Between two spans at least one token stays, so that every span has a sentinel of its own.

    Args:
        ids: the tokens of the passage.
        sentinels: the tokens that may stand for a span.
        end: the token at the end of both results.

    Returns:
        What the encoder reads, and what the decoder learns to write.
    """
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
    """Random numbers above 0 that add up to `total`: `parts` of them, every choice with the same probability."""
    cuts = [0, *sorted(choice.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in itertools.pairwise(cuts)]


def _encoded_passages(*special_tokens: str) -> tuple[PreTrainedTokenizerFast, list[dict]]:
    """A tokenizer, which also knows the special tokens, and the token ids of all passages."""
    texts = [text for _, text in passages()]
    tokenizer = train_tokenizer(texts, *special_tokens)
    return tokenizer, [{"input_ids": encode(tokenizer, text)} for text in texts]


MODELS = {"bert": bert, "gpt": gpt, "roberta": roberta, "t5": t5}


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the script, and returns the loss of every step with fused attention."""
    parser = argument_parser(__doc__.splitlines()[0], steps=100, quick=20)
    parser.add_argument("--model", choices=MODELS, default="bert", help="what to pre-train (%(default)s)")
    args = set_up(parser.parse_args(argv))
    return train_on_both(*MODELS[args.model](args), args)[1]


if __name__ == "__main__":
    main()
