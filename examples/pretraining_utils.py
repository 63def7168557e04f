"""What pretrain.py and finetune_bert.py share: a text, a tokenizer, training, and the comparison with eager attention.

The text is the documentation of the Python language, which every Python has (pydoc_data.topics): half a megabyte of
English prose and code in about 80 topics. The models are those of Hugging Face transformers, small and with random
weights.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics

import torch
from example_utils import packages_of, positive_int, quick_option, usable_device
from torch import Tensor, nn

from fused_attn.backends.dispatch import BACKEND_NAMES

with packages_of("examples"):
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from fused_attn.integrations import huggingface

PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
#: The tokens of a passage, at most.
MAX_LENGTH = 128
PEAK_LEARNING_RATE = 2e-3
BATCH_SIZE = 16

#: The sizes of every model. The models have no dropout in attention, because eager attention would drop other weights
#: than ours, and the losses would differ.
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}

Batch = dict[str, Tensor]


def argument_parser(description: str, steps: int, quick: int) -> argparse.ArgumentParser:
    """A parser with the arguments that both scripts have. quick: what --quick sets --steps to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=positive_int, default=steps, help="training steps (%(default)s)")
    parser.add_argument("--quick", **quick_option(steps=quick))
    parser.add_argument("--backend", choices=BACKEND_NAMES, help="attention backend (the fastest that can run)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="cpu, cuda, cuda:1, ... (%(default)s)")
    # In models as small as these, a second thread costs more time than it saves.
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and dropout (%(default)s)")
    return parser


def set_up(args: argparse.Namespace) -> argparse.Namespace:
    """Sets threads and seed; returns the arguments."""
    torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    return args


def passages() -> list[tuple[str, str]]:
    """(topic, paragraph) pairs in the order of the text, without paragraphs of fewer than eight words."""
    return [
        (topic, " ".join(paragraph.split()))
        for topic, text in sorted(topics.items())
        for paragraph in re.split(r"\n\s*\n", text)
        if len(re.findall(r"[A-Za-z]+", paragraph)) >= 8
    ]


def train_tokenizer(texts: list[str], *more_special_tokens: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with 2,000 tokens, learned from these texts: byte-pair encoding (Sennrich et al., 2016) of bytes, as
    in GPT-2. The same texts give the same tokens. WordPiece would not: its trainer breaks ties in the order of a hash
    table, which is another one in each call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, CLS, SEP, MASK, *more_special_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, cls_token=CLS, sep_token=SEP, mask_token=MASK,
        bos_token=CLS, eos_token=SEP, extra_special_tokens=list(more_special_tokens),
    )  # fmt: skip


def encode(tokenizer: transformers.PreTrainedTokenizerFast, text: str, max_length: int = MAX_LENGTH) -> list[int]:
    """The token ids of [CLS] text [SEP]. The text is cut so that there are at most `max_length` ids."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: max_length - 2]
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def batches(rows: list[dict], collate: Callable[[list[dict]], Batch], steps: int, seed: int) -> Iterable[Batch]:
    """Yields a random batch for each step. A batch is padded to its longest row, so every batch has another padding
    mask."""
    order = random.Random(seed)
    for _ in range(steps):
        yield collate([copy.copy(row) for row in order.sample(rows, BATCH_SIZE)])


def train(model: nn.Module, make_batches: Callable[[], Iterable[Batch]], args: argparse.Namespace) -> list[float]:
    """Trains a model, and returns the loss of every step."""
    transformers.set_seed(args.seed)  # Our attention and eager attention train on the same batches and dropout.
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    losses = []
    for step, batch in enumerate(make_batches()):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((step + 1) / 10, 1.0 - step / args.steps)
        optimizer.zero_grad()
        loss = model(**{name: x.to(args.device) for name, x in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrained_models(model: nn.Module) -> list[transformers.PreTrainedModel]:
    """The model and the models inside it, each of which has an attention setting of its own. T5 has three."""
    return [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]


def check_attention(model: nn.Module, name: str) -> None:
    """Raises SystemExit if `model`, or a model inside it, is set to another attention than `name`."""
    others = {type(each).__name__: each.config._attn_implementation for each in pretrained_models(model)}
    others = {cls: found for cls, found in others.items() if found != name}
    if others:
        raise SystemExit(f"the attention of every model should be {name!r}, but there are {others}")


def train_on_both(
    model: nn.Module, make_batches: Callable[[], Iterable[Batch]], args: argparse.Namespace
) -> tuple[nn.Module, list[float]]:
    """Trains the model with fused attention, and a copy of the model with eager attention.

    Returns:
        The model that was trained with fused attention, and its loss at every step.

    Raises:
        SystemExit: at some step the two losses differ by more than rounding explains, or a model is set to another
            attention than it should be.
    """
    eager = copy.deepcopy(model)
    # Up to transformers 5.17, T5 does not pass the setting on to its encoder and decoder, so each model is set.
    for module in reversed(pretrained_models(eager)):
        module.set_attn_implementation("eager")
    huggingface.enable(model, args.backend)
    check_attention(eager, "eager")
    check_attention(model, huggingface.NAME if args.backend is None else f"{huggingface.NAME}.{args.backend}")
    curves, seconds = [], []
    for each in (model, eager):
        start = time.monotonic()
        curves.append(train(each, make_batches, args))
        seconds.append(time.monotonic() - start)
    ours, theirs = curves
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    ends = min(5, len(ours))
    before, after = sum(ours[:ends]) / ends, sum(ours[-ends:]) / ends
    print(
        f"{type(model).__name__}: loss {before:.3f} -> {after:.3f} in {args.steps} steps; largest relative difference "
        f"from eager attention in any step {difference:.0e}; {seconds[0]:.0f} s, eager {seconds[1]:.0f} s"
    )
    # The two kernels round differently, and training amplifies the difference, in our runs to less than 1e-6. The
    # comparison is written so that NaN fails.
    if not all(abs(a - b) <= 1e-4 * b for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"the loss curves differ: {ours}, eager {theirs}")
    return model, ours
