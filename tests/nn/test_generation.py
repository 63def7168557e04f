"""generate() against plain Python, and the replay of its step against ordinary steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import replay
from fused_attn.nn.generation import Search, sampling_probabilities
from fused_attn.nn.seq2seq import Seq2SeqTransformer
from tests.nn.recorded_graph import record
from tests.nn.test_seq2seq import EOS, PAD, SOS, SRC, TGT_VOCAB, VARIANTS, make_model

STOP = 7


def next_log_probs(model, row: Tensor, target: list[int], penalty: float = 1.0) -> Tensor:
    """The log-probabilities of the token after one target, computed from the start."""
    logits = model(row[None], torch.tensor([target]))[0, -1].detach()
    for token in set(target):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits[[PAD, SOS]] = -math.inf
    return logits.log_softmax(-1)


def slow_greedy(model, row, prefix, count, penalty, stops) -> tuple[list[int], list[float]]:
    """(tokens after <sos>, log-probabilities of the new ones) for one source."""
    target, log_probs = [SOS, *prefix], []
    for _ in range(count):
        scores = next_log_probs(model, row, target, penalty)
        target.append(int(scores.argmax()))
        log_probs.append(scores.max().item())
        if target[-1] in stops:
            break
    return target[1:], log_probs


def slow_beams(model, row, prefix, count, beams, penalty, stops, length_penalty) -> list[tuple[float, list[int]]]:
    """[(score, tokens after <sos>)] for one source, best first: ended hypotheses, then open ones."""
    opened, ended, step = [(0.0, [SOS, *prefix])], [], 0
    for step in range(1, count + 1):
        candidates = [
            (score + x, [*target, token])
            for score, target in opened
            for token, x in enumerate(next_log_probs(model, row, target, penalty).tolist())
        ]
        candidates = sorted(candidates, reverse=True)[: beams * (1 + len(stops))]
        ended += [(score / step**length_penalty, target) for score, target in candidates if target[-1] in stops]
        ended = sorted(ended, reverse=True)[:beams]
        opened = [candidate for candidate in candidates if candidate[1][-1] not in stops][:beams]
        if len(ended) == beams and ended[-1][0] >= opened[0][0] / step**length_penalty:
            break
    opened = [(score / step**length_penalty, target) for score, target in opened]
    return [(score, target[1:]) for score, target in ended + opened]


def without_padding(row: Tensor) -> list[int]:
    return [token for token in row.tolist() if token != PAD]


PREFIXES = [[5, 3], [4], [], [8, 8], [6], [3, 4]]


def padded(prefixes: list[list[int]]) -> Tensor:
    width = max(map(len, prefixes))
    return torch.tensor([prefix + [PAD] * (width - len(prefix)) for prefix in prefixes])


@pytest.mark.parametrize("count", [1, 2])
def test_more_beams_than_targets(count):
    """Three tokens may be generated, so three targets are possible with one new token, and seven with two."""
    model, beams = make_model(seed=3, tgt_vocab_size=5), 9
    targets = [target for n in range(1, count + 1) for target in itertools.product((EOS, 3, 4), repeat=n)]
    targets = [x for x in targets if EOS not in x[:-1] and (len(x) == count or x[-1] == EOS)]
    found = model.generate(SRC[:2], count, num_beams=beams, num_return_sequences=beams, return_scores=True)
    assert found.log_probs.isfinite().all()
    for rows, scores in zip(found.tokens.split(beams), found.scores.split(beams), strict=True):
        rows = [tuple(without_padding(row)) for row in rows]
        assert sorted(rows[: len(targets)]) == sorted(targets)
        assert not any(rows[len(targets) :])
        assert scores[: len(targets)].isfinite().all() and (scores[len(targets) :] == -math.inf).all()


@pytest.mark.parametrize("has_prefix", [False, True], ids=["no-prefix", "prefix"])
@pytest.mark.parametrize("penalty", [1.0, 1.7], ids=str)
def test_greedy_with_everything_equals_a_slow_loop(has_prefix, penalty):
    model = make_model(seed=3)
    prefixes = PREFIXES if has_prefix else [[]] * len(SRC)
    options = {"prefix": padded(PREFIXES)} if has_prefix else {}
    found = model.generate(
        SRC, 9, stop_ids=[STOP], repetition_penalty=penalty, return_scores=True, cuda_graph=False, **options
    )
    for n, row in enumerate(SRC):
        tokens, log_probs = slow_greedy(model, row[row != PAD], prefixes[n], 9, penalty, (EOS, STOP))
        assert without_padding(found.tokens[n]) == tokens
        own = found.log_probs[n, len(prefixes[n]) : len(tokens)]
        torch.testing.assert_close(own, torch.tensor(log_probs, dtype=torch.float64))
        torch.testing.assert_close(found.scores[n].item(), sum(log_probs))


@pytest.mark.parametrize("has_prefix", [False, True], ids=["no-prefix", "prefix"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "samples"])
def test_min_new_tokens(options, has_prefix) -> None:
    model = make_model(seed=3)
    prefixes = PREFIXES if has_prefix else [[]] * len(SRC)
    prefix = padded(PREFIXES) if has_prefix else None
    stops = list(range(3, 8))  # without a least length, most targets would have one new token
    for least in (0, 3, 7):
        torch.manual_seed(0)
        found = model.generate(SRC, 7, prefix=prefix, stop_ids=stops, min_new_tokens=least, **options)
        new = [without_padding(row)[len(given) :] for row, given in zip(found, prefixes, strict=True)]
        assert all(token not in (EOS, *stops) for tokens in new for token in tokens[:least])
        assert all(len(tokens) > least or len(tokens) == 7 for tokens in new)
    assert least == 7 and all(tokens == [8] * 7 for tokens in new)  # the only token that ends nothing


@pytest.mark.parametrize("num_beams", [1, 3])
def test_logits_processor_gets_the_tokens_so_far(num_beams) -> None:
    """A processor in the form of those of Hugging Face: no token may follow itself."""
    model = make_model(seed=2)
    calls = []

    def processor(tokens: Tensor, logits: Tensor) -> Tensor:
        calls.append(tokens.clone())
        newest = tokens.gather(1, (tokens != PAD).sum(1, keepdim=True) - 1)
        return logits.scatter(1, newest, -math.inf)

    found = model.generate(
        SRC, 6, prefix=padded(PREFIXES), num_beams=num_beams, logits_processor=processor, return_scores=True
    )
    starts = torch.cat((torch.full((len(SRC), 1), SOS), padded(PREFIXES)), dim=1)
    assert torch.equal(calls[0], starts.repeat_interleave(num_beams, 0))
    assert len(calls) == 6
    for row, prefix in zip(found.tokens, PREFIXES, strict=True):
        tokens = [SOS, *without_padding(row)]
        assert all(tokens[i] != tokens[i - 1] for i in range(1 + len(prefix), len(tokens)))
    assert found.scores.isfinite().all()
    unchanged = model.generate(SRC, 6, num_beams=num_beams, logits_processor=lambda tokens, logits: logits)
    assert torch.equal(unchanged, model.generate(SRC, 6, num_beams=num_beams))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "samples"])
def test_logits_that_are_no_numbers_are_refused(options) -> None:
    """float16 can overflow. Tokens of such logits would be arbitrary, and pad_id among them."""
    model = make_model()

    def spoil(module, args, out: Tensor) -> Tensor:
        rows = len(out) // len(SRC)
        return out.index_fill(0, torch.arange(2 * rows, 3 * rows), math.nan)

    model.generator.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"^generate: expected logits that are finite, .* for the sources \[2\]"):
        model.generate(SRC, 4, **options)


def test_a_row_that_has_ended_may_have_any_logits() -> None:
    model = make_model(seed=2)
    expected = model.generate(SRC, 6, stop_ids=[STOP])
    has_ended = torch.zeros(len(SRC), dtype=torch.bool)
    assert (expected[:, -1] == PAD).any() and (expected[:, -1] != PAD).any()

    def note(new: Tensor) -> None:
        has_ended.logical_or_((new == EOS) | (new == STOP))

    model.generator.register_forward_hook(lambda module, args, out: out.masked_fill(has_ended[:, None], math.nan))
    assert torch.equal(model.generate(SRC, 6, stop_ids=[STOP], on_tokens=note), expected)


def test_on_tokens_ends_a_generation() -> None:
    model, calls = make_model(), []
    found = model.generate(SRC, 9, on_tokens=lambda new: calls.append(new) or len(calls) == 3)
    assert len(calls) == 3 and torch.equal(found, torch.stack(calls, dim=1))


def test_stop_ids_may_be_a_tensor() -> None:
    model = make_model(seed=2)
    expected = model.generate(SRC, 9, stop_ids=[STOP, 5])
    assert torch.equal(model.generate(SRC, 9, stop_ids=torch.tensor([STOP, 5])), expected)


@pytest.mark.parametrize(
    ("beams", "penalty", "length_penalty", "has_prefix", "stops"),
    [(3, 1.0, 1.0, False, ()), (4, 1.5, 0.0, True, (STOP,)), (2, 0.8, -0.5, True, ()), (5, 1.0, 1.0, False, (STOP, 5))],
    ids=str,
)
def test_all_beams_with_everything_equal_a_slow_search(beams, penalty, length_penalty, has_prefix, stops):
    model = make_model(seed=4)
    prefixes = PREFIXES if has_prefix else [[]] * len(SRC)
    found = model.generate(
        SRC, 7, num_beams=beams, num_return_sequences=beams, stop_ids=stops, repetition_penalty=penalty,
        length_penalty=length_penalty, return_scores=True, prefix=padded(PREFIXES) if has_prefix else None,
    )  # fmt: skip
    assert found.tokens.shape[0] == len(SRC) * beams
    for n, row in enumerate(SRC):
        expected = slow_beams(model, row[row != PAD], prefixes[n], 7, beams, penalty, (EOS, *stops), length_penalty)
        for r in range(beams):
            score, tokens = expected[r]
            assert without_padding(found.tokens[n * beams + r]) == tokens
            torch.testing.assert_close(found.scores[n * beams + r].item(), score)
            new = len(tokens) - len(prefixes[n])
            total = found.log_probs[n * beams + r].sum().item()
            torch.testing.assert_close(total / new**length_penalty, score)


def test_samples_with_the_same_numbers_equal_a_slow_loop():
    model = make_model(seed=3)
    generator = torch.Generator().manual_seed(5)
    options = {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.3}
    found = model.generate(SRC[:2], 6, do_sample=True, num_return_sequences=3, generator=generator, **options)
    generator.manual_seed(5)
    targets, ended = [[SOS] for _ in range(6)], [False] * 6
    for _ in range(6):
        numbers = torch.empty(6, TGT_VOCAB, dtype=torch.float64).exponential_(1.0, generator=generator)
        for n, target in enumerate(targets):
            row = SRC[n // 3]
            x = (next_log_probs(model, row[row != PAD], target, 1.3) / 1.5).softmax(-1)
            x = torch.where(x < x.topk(4).values[-1], 0.0, x)
            x = x / x.sum()
            likelier = torch.tensor([x[x > y].sum() for y in x])
            x = torch.where(likelier < 0.9, x, 0.0)
            token = int((x / x.sum() / numbers[n]).argmax())
            if not ended[n]:
                target.append(token)
                ended[n] |= token == EOS
        if all(ended):
            break
    assert [without_padding(row) for row in found] == [target[1:] for target in targets]


def test_tokens_arrive_one_step_at_a_time():
    model, steps = make_model(seed=3), []
    tokens = model.generate(SRC, 8, on_tokens=steps.append)
    assert torch.equal(torch.stack(steps, dim=1), tokens)


def test_long_targets_enlarge_the_cache(monkeypatch):
    monkeypatch.setattr("fused_attn.nn.generation.FIRST_CAPACITY", 2)
    model = make_model(seed=3)
    expected = make_model(seed=3, backend="reference")
    for options in ({}, {"num_beams": 3}, {"prefix": padded(PREFIXES)}):
        assert torch.equal(model.generate(SRC, 20, **options), expected.generate(SRC, 20, **options))


# ---- replay


def state_of(search: Search) -> list[Tensor]:
    """Every tensor that a step writes."""
    found = [x for x in vars(search).values() if isinstance(x, Tensor)]
    for layer in search.cache.layers:
        found += layer.self_attention._rows
    return found


def replaying(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes generate() capture its steps with the recorder. Each capture and each replay adds an entry to the list."""
    events: list[str] = []

    def capture(step, device, generator):
        numbers = generator and generator.get_state()
        replays = record(step, state_of(step.__self__))
        if generator is not None:
            generator.set_state(numbers)  # a capture draws no numbers
        events.append("capture")
        return lambda: (events.append("replay"), replays())

    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(replay, "why_not", lambda device, model: "" if model is not None else "no cache")
    return events


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_a_replayed_step_gives_the_tokens_of_ordinary_steps(options, changes, monkeypatch):
    model = make_model(seed=3, **changes)
    src = SRC.clamp(max=TGT_VOCAB - 1)
    with torch.no_grad():
        model.generator.bias[EOS] -= 3.0  # longer targets
    expected = model.generate(src, 14, return_scores=True, repetition_penalty=1.2, cuda_graph=False, **options)
    events = replaying(monkeypatch)
    found = model.generate(src, 14, return_scores=True, repetition_penalty=1.2, cuda_graph=True, **options)
    assert events[:2] == ["capture", "replay"] and events.count("capture") == 1 and len(events) > 6
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_replayed_step_draws_new_numbers(monkeypatch):
    model = make_model(seed=3)
    options = {"do_sample": True, "temperature": 3.0, "prefix": padded(PREFIXES)}
    expected = model.generate(SRC, 12, generator=torch.Generator().manual_seed(1), **options)
    events = replaying(monkeypatch)
    assert torch.equal(model.generate(SRC, 12, generator=torch.Generator().manual_seed(1), **options), expected)
    assert "replay" in events


def test_a_larger_cache_is_captured_again(monkeypatch):
    monkeypatch.setattr("fused_attn.nn.generation.FIRST_CAPACITY", 8)
    model = make_model(seed=3)
    with torch.no_grad():
        model.generator.bias[EOS] -= 1e4
    expected = model.generate(SRC, 24)
    events = replaying(monkeypatch)
    assert torch.equal(model.generate(SRC, 24), expected)
    assert events.count("capture") == 3  # for 9, 18 and 25 rows


def test_the_host_does_the_same_for_every_replayed_token(monkeypatch):
    """The number of Python calls of a replayed step does not depend on the step."""
    calls = []
    monkeypatch.setattr(replay, "why_not", lambda device, model: "")
    monkeypatch.setattr(replay, "capture", lambda step, device, generator: lambda: calls.append(1))
    step = replay.Replayed(lambda: calls.append(0), torch.device("cpu"), None, None, nn.Identity())
    for count in range(10):
        step(remaining=10 - count)
    assert calls == [0, 0, *[1] * 8]


def test_a_failed_capture_warns_and_goes_on(monkeypatch):
    def fail(step, device, generator):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "why_not", lambda device, model: "")
    monkeypatch.setattr(replay, "capture", fail)
    model = make_model(seed=3)
    with torch.no_grad():
        model.generator.bias[EOS] -= 1e4
    expected = model.generate(SRC, 12, cuda_graph=False)
    with pytest.warns(UserWarning, match="the step is not replayed, because its capture failed: operation not"):
        found = model.generate(SRC, 12)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="not permitted"):
        model.generate(SRC, 12, cuda_graph=True)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_no_stream_behind(fails, monkeypatch):
    """The stream is one of the model's device, and the current stream is as before even if the capture fails."""
    events = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def capture_begin(self, **options):
            events.append(("begin", options))

        def capture_end(self):
            events.append("end")
            if fails:
                raise RuntimeError("the capture is invalid")

        def replay(self):
            events.append("replay")

    @contextlib.contextmanager
    def within(what):
        events.append(("enter", what.device if isinstance(what, Stream) else what))
        try:
            yield
        finally:
            events.append("exit")

    for name, fake in {"Stream": Stream, "CUDAGraph": Graph, "device": within, "stream": within}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(replay, "_streams", {})
    device = torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="invalid") if fails else contextlib.nullcontext():
        replay.capture(lambda: events.append("step"), device, None)()
    assert events == [
        *(
            ("enter", device),
            "wait",
            ("enter", device),
            ("begin", {"capture_error_mode": "thread_local"}),
            "step",
            "end",
        ),
        *(["exit", "exit"] if fails else ["exit", "wait", "exit", "replay"]),
    ]
    assert not replay._one_capture.locked()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_capture_without_memory_is_tried_again(failures, monkeypatch):
    """A capture cannot use the memory that torch has cached, so that memory is given back."""
    events = []

    def attempt(*arguments):
        events.append(arguments)
        if events.count(arguments) <= failures:
            raise torch.OutOfMemoryError("no memory")
        return "graph"

    monkeypatch.setattr(replay, "_capture", attempt)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    if failures == 1:
        assert replay.capture("step", "device", None) == "graph"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            replay.capture("step", "device", None)
    assert events == [("step", "device", None), "empty", ("step", "device", None)]


def test_what_is_not_captured():
    device = torch.device("cpu")
    assert "no CUDA graphs" in replay.why_not(device, nn.Linear(1, 1))
    cuda = torch.device("cuda:0")
    assert "takes no cache" in replay.why_not(cuda, None)
    assert "sharded, quantised or on another device" in replay.why_not(cuda, nn.Linear(1, 1))
    hooked = nn.Identity()
    assert replay.why_not(cuda, hooked) == ""
    hooked.register_forward_hook(lambda *_: None)
    assert "Identity has hooks" in replay.why_not(cuda, hooked)
    with pytest.raises(ValueError, match="cuda_graph: expected None or False, since the model is on cpu"):
        make_model().generate(SRC, 4, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sampled"])
def test_a_cuda_graph_gives_the_tokens_of_ordinary_steps(options):
    model = make_model(seed=3, dtype=torch.float32).cuda()
    with torch.no_grad():
        model.generator.bias[EOS] -= 3.0
    found = []
    for cuda_graph in (False, True):
        drawn = {"generator": torch.Generator("cuda").manual_seed(0)} if "do_sample" in options else {}
        found.append(model.generate(SRC.cuda(), 14, cuda_graph=cuda_graph, **options, **drawn))
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.timing
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_spends_30_microseconds_on_a_replayed_token(monkeypatch):
    """The time of a replay and of the question whether all targets have ended, without the time of waiting."""
    model = Seq2SeqTransformer(1000, 1000, 256, 4, 2, 2, 512, dtype=torch.bfloat16, device="cuda").eval()
    with torch.no_grad():
        model.generator.bias[EOS] = -1e4
    seconds: list[float] = []

    def timed(method):
        def call(*args, **kwargs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    monkeypatch.setattr(replay.Replayed, "__call__", timed(replay.Replayed.__call__))
    monkeypatch.setattr(replay.EndWatch, "has_ended", timed(replay.EndWatch.has_ended))
    model.generate(SRC.cuda(), 100)
    replays, questions = sorted(seconds[20::2]), sorted(seconds[21::2])
    assert replays[len(replays) // 2] + questions[len(questions) // 2] < 30e-6


# ---- wrapped and compiled layers


@pytest.mark.parametrize("part", ["layers", "decoder"])
def test_compiled_layers_generate_and_compile_once(part):
    torch._dynamo.reset()
    model = make_model(seed=3)
    with torch.no_grad():
        model.generator.bias[EOS] -= 1e4
    expected = model.generate(SRC, 16)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    modules = model.decoder.layers if part == "layers" else [model.decoder]
    for module in modules:
        module.compile(backend=backend, dynamic=False)
    model.generate(SRC, 3)
    count = len(compiled)
    assert torch.equal(model.generate(SRC, 16), expected)
    assert count and len(compiled) - count <= count, "longer targets need no more graphs"


def test_checkpointed_layers_generate():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model(seed=3)
    expected = model.generate(SRC, 8)
    for n, layer in enumerate(model.decoder.layers):
        model.decoder.layers[n] = checkpoint_wrapper(layer)
    assert model.takes_cache
    assert torch.equal(model.generate(SRC, 8), expected)


def test_stop_ids_that_end_targets_anyway_change_no_beam_search() -> None:
    generator = torch.Generator().manual_seed(0)
    model = make_model(dtype=torch.float64).eval()
    for parameter in model.parameters():  # a model whose targets end at different steps
        parameter.data.normal_(std=0.4, generator=generator)
    expected = model.generate(SRC, 8, num_beams=3)
    for stop_ids in (EOS, [EOS, EOS, EOS]):
        assert torch.equal(model.generate(SRC, 8, num_beams=3, stop_ids=stop_ids), expected)


def test_top_p_of_1_keeps_all_tokens() -> None:
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(sampling_probabilities(logits, 1.0, None, 1.0), sampling_probabilities(logits, 1.0, None, None))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences: expected at most num_beams=1 with do_sample"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences: expected at least 1, got 0"),
        ({"num_return_sequences": 1.0}, TypeError, "num_return_sequences: expected an int, got float"),
        ({"min_new_tokens": 5}, ValueError, "min_new_tokens: expected 0 to max_new_tokens=4, got 5"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens: expected 0 to max_new_tokens=4, got -1"),
        (
            {"logits_processor": lambda tokens, logits: None},
            TypeError,
            r"logits_processor: expected a function that returns logits \(6, 9\) of dtype torch.float64, got NoneType",
        ),
        (
            {"logits_processor": lambda tokens, logits: logits[:1]},
            ValueError,
            r"logits_processor: .* got shape \(1, 9\) of dtype torch.float64",
        ),
        (
            {"logits_processor": lambda tokens, logits: logits, "cuda_graph": True},
            ValueError,
            "cuda_graph: expected None or False with a logits_processor, got True",
        ),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: expected a finite number > 0, got 0.0"),
        ({"stop_ids": 9}, ValueError, r"stop_ids: expected tokens in \[0, 9\) without pad_id and sos_id, got 9"),
        ({"stop_ids": [SOS]}, ValueError, "stop_ids: expected tokens in"),
        ({"stop_ids": ["a"]}, TypeError, "stop_ids: expected an int or a sequence of ints, got str"),
        ({"on_tokens": print, "num_beams": 2}, ValueError, "on_tokens: expected None with num_beams > 1"),
        ({"prefix": torch.ones(6, 2)}, TypeError, "prefix: expected int64 or int32 tokens, got torch.float32"),
        ({"prefix": SRC[:2]}, ValueError, r"prefix: expected shape \(B, P\) with B = 6, got \(2, 9\)"),
        ({"prefix": torch.ones(6, 29).int()}, ValueError, "prefix: expected at most max_len - max_new_tokens = 28"),
        ({"prefix": torch.tensor([[3, 9]] * 6)}, ValueError, r"prefix: expected tokens in \[0, 9\), got 3 to 9"),
        ({"prefix": torch.tensor([[PAD, 3]] * 6)}, ValueError, "prefix: expected padding behind the tokens"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        make_model().generate(SRC, 4, **arguments)


def test_the_host_waits_for_an_earlier_step_alone(monkeypatch):
    """On a GPU, the end is noticed STEPS_AHEAD steps later, and each step waits for the one so many steps before.

    The GPU need not be the current device.
    """
    events, devices = [], set()
    device = torch.device("cuda", 1)

    class Event:
        def __init__(self):
            self.step = None

        def record(self, stream=None):
            devices.add(stream)
            self.step = step

        def synchronize(self):
            events.append(step - self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    watch = replay.EndWatch(lambda: torch.tensor(step >= 10), device)
    for step in range(30):  # noqa: B007
        if watch.has_ended():
            break
    assert step == 10 + replay.STEPS_AHEAD
    assert set(events) == {replay.STEPS_AHEAD}
    assert devices == {device}


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_of_options(seed, monkeypatch):
    """Random models and options: a replayed batch gives what each source alone gives in ordinary steps."""
    draw = random.Random(seed)
    positional = draw.choice(["sinusoidal", "learned", "rotary"])
    model = make_model(seed, positional=positional, norm_first=draw.random() < 0.5, num_kv_heads=draw.choice([1, 2, 4]))
    with torch.no_grad():
        model.generator.bias[EOS] -= draw.choice([0, 1, 3])
    options = {"return_scores": True, "repetition_penalty": draw.choice([1.0, 1.3, 0.9])}
    if draw.random() < 0.6:
        options |= {"num_beams": draw.choice([2, 3, 5]), "length_penalty": draw.choice([0.0, 1.0, 0.7])}
    if draw.random() < 0.5:
        options["stop_ids"] = [draw.choice([4, 5, 6])]
    prefix = padded(PREFIXES) if draw.random() < 0.5 else None
    count = draw.choice([3, 9, 14])
    alone = [
        model.generate(row[row != PAD][None], count, prefix=part, **options)
        for row, part in zip(SRC, [None] * len(SRC) if prefix is None else map(unpadded, prefix), strict=True)
    ]
    replaying(monkeypatch)
    found = model.generate(SRC, count, prefix=prefix, **options)
    for n, one in enumerate(alone):
        assert without_padding(found.tokens[n]) == without_padding(one.tokens[0])
        torch.testing.assert_close(found.scores[n], one.scores[0])


def unpadded(prefix: Tensor) -> Tensor:
    return prefix[prefix != PAD][None]
