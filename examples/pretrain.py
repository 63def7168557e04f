"""Pre-train a small BERT, GPT-2, RoBERTa or T5 of Hugging Face transformers, with the loss that its paper trains on.

    pip install -e .[examples]
    python examples/pretrain.py --model bert

- bert: masked words and next-sentence prediction (Devlin et al., 2019). A pair of paragraphs is masked once, before
  training. Half of the pairs follow one another in the text; the head on the [CLS] token learns which half.
- gpt: every token predicts the next one.
- roberta: masked words (Liu et al., 2019). Other tokens are masked each time that a passage comes.
- t5: span corruption (Raffel et al., 2020, section 3.1.4). 15 % of the tokens are cut out in spans of 3 on average. The
  encoder sees a sentinel in place of each span; the decoder writes each sentinel and its span. T5's relative position
  bias trains through `fused_attention(relative_bias=...)`.

Each model trains twice, on the fused kernel and on eager attention, and the losses of all steps are compared.
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

#: A model, and a function that makes its batches: the same ones each time.
Training = tuple[nn.Module, Callable[[], Iterable[Batch]]]

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
    pad = DataCollatorForTokenClassification(tokenizer)  # pads labels with -100, which counts for nothing
    return BertForPreTraining(config), lambda: batches(rows, pad, args.steps, args.seed)


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
        max_position_embeddings=MAX_LENGTH + 1,  # RoBERTa counts positions from pad_token_id + 1
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return RobertaForMaskedLM(config), lambda: batches(rows, collate, args.steps, args.seed)


def t5(args: argparse.Namespace) -> Training:
    tokenizer, rows = _encoded_passages(*SENTINELS)
    rows = [{"input_ids": row["input_ids"][1:-1]} for row in rows]  # without [CLS] and [SEP]
    config = T5Config(
        vocab_size=len(tokenizer), d_model=SIZE["hidden_size"], d_ff=SIZE["intermediate_size"],
        d_kv=SIZE["hidden_size"] // SIZE["num_attention_heads"], num_layers=SIZE["num_hidden_layers"],
        num_heads=SIZE["num_attention_heads"], pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        # The activation of T5 1.1. The first T5 has ReLU, whose kink makes a curve sensitive to rounding: two runs of
        # eager attention whose weights differ in the last place end up to 5e-4 apart, and with this activation 3e-7.
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # one rate for all, and that of attention has to be 0
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return model, lambda: batches(rows, SpanCorruption(tokenizer, model, args.seed), args.steps, args.seed)


class SpanCorruption:
    """A collator that corrupts a passage in another way each time that the passage comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: T5ForConditionalGeneration, seed: int):
        self.pad = DataCollatorForSeq2Seq(tokenizer, model)
        self.sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
        self.end = tokenizer.eos_token_id
        self.choice = random.Random(seed)

    def __call__(self, rows: list[dict]) -> Batch:
        pairs = (corrupt(row["input_ids"], self.sentinels, self.end, self.choice) for row in rows)
        return self.pad([{"input_ids": source, "labels": target} for source, target in pairs])


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
    """`parts` numbers above 0 that add up to `total`; each such choice is equally likely."""
    cuts = [0, *sorted(choice.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in itertools.pairwise(cuts)]


def _encoded_passages(*special_tokens: str) -> tuple[PreTrainedTokenizerFast, list[dict]]:
    texts = [text for _, text in passages()]
    tokenizer = train_tokenizer(texts, *special_tokens)
    return tokenizer, [{"input_ids": encode(tokenizer, text)} for text in texts]


MODELS = {"bert": bert, "gpt": gpt, "roberta": roberta, "t5": t5}


def main(argv: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    parser = argument_parser(__doc__.splitlines()[0], steps=100)
    parser.add_argument("--model", choices=MODELS, default="bert", help="what to pre-train (%(default)s)")
    args = set_up(parser.parse_args(argv))
    return train_on_both(*MODELS[args.model](args), args)[1]


if __name__ == "__main__":
    main()
