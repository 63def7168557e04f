"""Generates targets token by token: greedily, by sampling, or by beam search.

A step is a function without arguments or results. It reads the newest tokens from tensors of a `Search`, and writes the
next tokens into these tensors, in place. It reads no number from the host, and all its shapes are fixed. So a GPU can
replay a captured step, see `fused_attn.nn.replay`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fused_attn.attention import checks
from fused_attn.measurement import progress as progress_bar
from fused_attn.nn import native_linear
from fused_attn.nn.cache import StaticKVCache
from fused_attn.nn.replay import EndWatch, Replayed

MINUS_INF = float("-inf")

#: Rows of the first buffers of the cache. They double when they are full, so a large max_new_tokens costs no memory as
#: long as targets are short.
FIRST_CAPACITY = 128


class Model(Protocol):
    """What a generation asks of a model, which is a `torch.nn.Module`; `Seq2SeqTransformer` has all of this."""

    pad_id: int
    sos_id: int
    eos_id: int
    max_len: int
    decoder: Any
    generator: Any

    @property
    def tgt_vocab_size(self) -> int:
        """The number of target tokens."""

    @property
    def takes_cache(self) -> bool:
        """Whether `decode_hidden` takes a cache."""

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """(memory (B, S, E), its padding (B, S) bool) of source tokens (B, S)."""

    def decode_hidden(
        self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor | None, *, cache: StaticKVCache | None = None
    ) -> Tensor:
        """The output (B, T, E) of the decoder for target tokens (B, T)."""

    def recorded_step(
        self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor | None, cache: StaticKVCache
    ) -> Callable[[Tensor], Tensor] | None:
        """A function that takes the place of `decode_hidden` for one token of each row, if there is one."""


class Settings(NamedTuple):
    """The arguments of `Seq2SeqTransformer.generate` that say how a token is chosen, and when a target ends."""

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_ids: tuple[int, ...] = ()
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    generator: torch.Generator | None = None


class Generation(NamedTuple):
    """What `Seq2SeqTransformer.generate` returns with ``return_scores=True``. R is ``num_return_sequences``.

    Probabilities are those of the model, without the tokens that cannot be chosen, after the repetition penalty and
    logits_processor, and before temperature, top_k and top_p.

    tokens: (B * R, N) int64. The R targets of a source follow one another
    scores: (B * R,), the sum of the log-probabilities of the new tokens; for beam search divided by
        ``n ** length_penalty``
    log_probs: (B * R, N), the log-probability of each token; 0 for padding and for tokens of the prefix
    """

    tokens: Tensor
    scores: Tensor
    log_probs: Tensor


class Search:
    """The state of a generation, with one row for each target or hypothesis. T is 1 + prefix + max_new_tokens.

    tokens: (rows, T) int64, from ``sos_id`` on
    log_probs: (rows, T), the log-probability of each token
    position: (rows,) int64, the index of the newest token in its row
    has_ended: (rows,) bool
    is_invalid: (rows,) bool, whether log-probabilities were NaN before the row ended
    seen: (rows, V) bool, the tokens of the row so far, for the repetition penalty; else None
    """

    def __init__(self, model: Model, src: Tensor, prefix: Tensor | None, settings: Settings):
        self.model, self.settings = model, settings
        memory, padding = model.encode(src)
        batch, device = memory.shape[0], memory.device
        self.batch, self.device = batch, device
        self.repeats = max(settings.num_beams, settings.num_return_sequences if settings.do_sample else 1)
        self.memory, self.padding = (x.repeat_interleave(self.repeats, dim=0) for x in (memory, padding))
        starts = torch.full((batch, 1), model.sos_id, dtype=torch.int64, device=device)
        if prefix is not None:
            starts = torch.cat((starts, prefix.to(torch.int64)), dim=1)
        starts = starts.repeat_interleave(self.repeats, dim=0)
        rows, self.first = starts.shape
        self.tokens = starts.new_full((rows, self.first + settings.max_new_tokens), model.pad_id)
        self.tokens[:, : self.first] = starts
        self.position = (starts != model.pad_id).sum(dim=1) - 1
        self.start = self.position.clone()
        self.float_dtype = torch.promote_types(memory.dtype, torch.float32)
        self.log_probs = torch.zeros(self.tokens.shape, dtype=self.float_dtype, device=device)
        self.has_ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.is_invalid = torch.zeros_like(self.has_ended)
        vocab = model.tgt_vocab_size
        self.is_stop = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.is_stop[torch.tensor([model.eos_id, *settings.stop_ids], device=device)] = True
        self.is_excluded = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.is_excluded[torch.tensor([model.pad_id, model.sos_id], device=device)] = True
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device).scatter_(1, starts, True)
        self.cache: StaticKVCache | None = None
        #: Computes the output of the decoder (rows, 1, E) for the newest tokens (rows, 1), with the cache, if a step
        #: could be recorded.
        self.recorded_step: Callable[[Tensor], Tensor] | None = None
        self.may_record = True  # a step can be recorded once for each size of the cache

    def start_cache(self, num_layers: int) -> None:
        """Makes a cache and fills it with the prefix. Without a cache, each step computes all tokens again."""
        total = self.tokens.shape[1]
        self.cache = StaticKVCache(num_layers, min(total, self.first + FIRST_CAPACITY))
        if self.first > 1:
            earlier = self.tokens[:, : self.first - 1]
            self.model.decode_hidden(earlier, self.memory, self.padding, cache=self.cache)
        # Rows of shorter prefixes hold padding behind their tokens. After this crop, the host counts no rows any more,
        # so a capture that fails halfway leaves no wrong count.
        self.cache.crop(self.position)

    def reserve(self, length: int) -> bool:
        """Makes room for `length` tokens in the cache. True = the buffers are new: the step must be captured again."""
        if self.cache is None or length <= (capacity := self.cache.max_length):
            return False
        self.cache.reserve(min(2 * capacity, self.tokens.shape[1]))
        self.recorded_step, self.may_record = None, True
        return True

    def step(self) -> None:
        """Appends a token to each row that has not ended."""
        log_probs = self._next_log_probs()
        if self.settings.do_sample:
            settings = self.settings
            probabilities = sampling_probabilities(log_probs, settings.temperature, settings.top_k, settings.top_p)
            token = _draw(probabilities, settings.generator)
        else:
            token = log_probs.max(dim=-1).indices  # on a CPU, argmax takes four times as long
        log_prob = log_probs.gather(1, token[:, None])[:, 0].masked_fill(self.has_ended, 0.0)
        self._append(token.masked_fill(self.has_ended, self.model.pad_id), log_prob)
        self.has_ended.logical_or_(self.is_stop[token] | self.is_invalid)

    def is_done(self) -> Tensor:
        """() bool: whether no step can change the result."""
        return self.has_ended.all()

    def newest(self) -> Tensor:
        """(rows,) int64: the tokens of the last step; pad_id for rows that had ended before."""
        return self.tokens.gather(1, self.position[:, None])[:, 0]

    def result(self) -> Generation:
        """The targets so far. Raises ValueError if a log-probability was NaN."""
        self._check_numbers()
        is_new = torch.arange(self.tokens.shape[1], device=self.device) > self.start[:, None]
        scores = self.log_probs.masked_fill(~is_new, 0.0).sum(dim=1)
        return Generation(*_trimmed(self.tokens, self.log_probs, self.model.pad_id, scores))

    def _next_log_probs(self) -> Tensor:
        """(rows, V): the log-probabilities of the next token of each row, at least float32."""
        if self.cache is None:
            hidden = self.model.decode_hidden(self._tokens_so_far(), self.memory, self.padding)
            hidden = hidden[torch.arange(hidden.shape[0], device=self.device), self.position]
        else:
            hidden = self._decode_newest(self.tokens.gather(1, self.position[:, None]), self.cache)[:, 0]
        logits = native_linear.call(self.model.generator, hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(self.is_excluded, MINUS_INF)
        if self.seen is not None:
            penalty = self.settings.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.settings.logits_processor is not None:
            logits = _processed(self.settings.logits_processor, self._tokens_so_far(), logits)
        if self.settings.min_new_tokens > 0:
            is_short = self.position - self.start < self.settings.min_new_tokens
            logits = logits.masked_fill(is_short[:, None] & self.is_stop, MINUS_INF)
        log_probs = logits.log_softmax(dim=-1)
        # One NaN, one +inf, or -inf for all tokens makes all of a row NaN.
        self.is_invalid.logical_or_(log_probs[:, 0].isnan() & ~self.has_ended)
        return log_probs

    def _check_numbers(self) -> None:
        """Raises ValueError if the log-probabilities of a row were NaN. Its tokens would be arbitrary."""
        if self.is_invalid.any():
            sources = (self.is_invalid.view(self.batch, -1).any(dim=1).nonzero()[:, 0]).tolist()
            expected = "logits that are finite, or -inf for some of the tokens"
            raise checks.fail("generate", expected, f"NaN, inf or no possible token for the sources {sources}")

    def _tokens_so_far(self) -> Tensor:
        """(rows, n) int64: the tokens of all rows. The host reads n, the length of the longest row."""
        return self.tokens[:, : int(self.position.max()) + 1]

    def _decode_newest(self, newest: Tensor, cache: StaticKVCache) -> Tensor:
        """The output (rows, 1, E) of the decoder for the newest token (rows, 1) of each row."""
        if self.recorded_step is not None:
            return self.recorded_step(newest)
        hidden = self.model.decode_hidden(newest, self.memory, self.padding, cache=cache)
        if self.may_record:  # that step has filled the caches
            self.recorded_step = self.model.recorded_step(newest, self.memory, self.padding, cache)
            self.may_record = False
        return hidden

    def _append(self, token: Tensor, log_prob: Tensor) -> None:
        """Appends a token (rows,), and its log-probability, to each row."""
        self.position.add_(1)
        column = self.position[:, None]
        self.tokens.scatter_(1, column, token[:, None])
        self.log_probs.scatter_(1, column, log_prob[:, None].to(self.log_probs.dtype))
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)


class BeamSearch(Search):
    """Beam search. The rows are the K open hypotheses of each source, best first; K is ``num_beams``.

    open_score:   (B, K), the log-probabilities of the open hypotheses
    ended_tokens: (B, K, T), the best ended hypotheses, best first
    ended_probs:  (B, K, T), the log-probabilities of their tokens
    ended_scores: (B, K), their scores; -inf = there is no such hypothesis yet
    count:        () float, the number of new tokens
    is_finished:  (B, 1) bool: no open hypothesis scores better than the ended ones
    """

    def __init__(self, model: Model, src: Tensor, prefix: Tensor | None, settings: Settings):
        super().__init__(model, src, prefix, settings)
        batch, beams, device = self.batch, settings.num_beams, self.device
        # All beams of a source begin as the same hypothesis, so only one of them may count.
        self.open_score = torch.full((batch, beams), MINUS_INF, dtype=self.float_dtype, device=device)
        self.open_score[:, 0] = 0.0
        self.ended_tokens = self.tokens.view(batch, beams, -1).clone()
        self.ended_probs = self.log_probs.view(batch, beams, -1).clone()
        self.ended_scores = torch.full_like(self.open_score, MINUS_INF)
        self.count = torch.zeros((), dtype=self.float_dtype, device=device)
        self.is_finished = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        self.first_row = torch.arange(batch, device=device)[:, None] * beams

    def step(self) -> None:
        """Extends the open hypotheses by a token, and keeps the best open and the best ended ones."""
        beams = self.settings.num_beams
        log_probs = self._next_log_probs()
        vocab = log_probs.shape[1]
        self.count.add_(1)
        length_factor = self.count**self.settings.length_penalty
        total = self.open_score[:, :, None] + log_probs.view(-1, beams, vocab)  # (B, K, V)
        # At most one token in each beam for each stop token ends a hypothesis. So, of so many, at least K go on.
        candidates = min(beams * (1 + self._num_stops), beams * vocab)
        score, index = total.flatten(1).topk(candidates)
        beam, token = index // vocab, index % vocab
        ends = self.is_stop[token]
        tokens, probs = (self._of_beams(x, beam) for x in (self.tokens, self.log_probs))
        column = self._of_beams(self.position[:, None], beam) + 1
        tokens = tokens.scatter(2, column, token[:, :, None])
        own = score - self.open_score.gather(1, beam)
        probs = probs.scatter(2, column, own[:, :, None].to(probs.dtype))

        ended_score = (score / length_factor).masked_fill(~ends | self.is_finished, MINUS_INF)
        scores, best = torch.cat((self.ended_scores, ended_score), dim=1).topk(beams)
        self.ended_tokens.copy_(_select(torch.cat((self.ended_tokens, tokens), dim=1), best))
        self.ended_probs.copy_(_select(torch.cat((self.ended_probs, probs), dim=1), best))
        self.ended_scores.copy_(scores)

        scores, best = score.masked_fill(ends, MINUS_INF).topk(beams)
        self.open_score.copy_(scores)
        self.tokens.copy_(_select(tokens, best).flatten(0, 1))
        self.log_probs.copy_(_select(probs, best).flatten(0, 1))
        self.position.add_(1)
        rows = (self.first_row + beam.gather(1, best)).flatten()
        if self.cache is not None:
            self.cache.reorder(rows, include_cross_attention=False)
        if self.seen is not None:
            self.seen.copy_(self.seen.index_select(0, rows).scatter(1, self.newest()[:, None], True))
        self.is_finished.logical_or_(self.ended_scores[:, -1:] >= self.open_score[:, :1] / length_factor)

    def is_done(self) -> Tensor:
        return self.is_finished.all()

    def result(self) -> Generation:
        """The best hypotheses of each source, ended ones before open ones. Raises ValueError as `Search.result`."""
        self._check_numbers()
        count = self.settings.num_return_sequences
        length_factor = self.count**self.settings.length_penalty
        has_ended = self.ended_scores > MINUS_INF  # these come first
        # Ended hypotheses, then the open ones: the first `count` of them.
        order = torch.cat((~has_ended, torch.zeros_like(has_ended)), dim=1).sort(dim=1, stable=True).indices[:, :count]
        shape = self.ended_tokens.shape
        tokens, probs, scores = (
            torch.cat((ended, opened.view(ended.shape)), dim=1)
            for ended, opened in (
                (self.ended_tokens, self.tokens),
                (self.ended_probs, self.log_probs),
                (self.ended_scores, self.open_score / length_factor),
            )
        )
        tokens, probs = (_select(x, order).view(-1, shape[2]) for x in (tokens, probs))
        scores = scores.gather(1, order).flatten()
        # If there are fewer targets than beams, some beams hold what has the probability 0, such as pad_id.
        is_missing = (scores == MINUS_INF)[:, None]
        tokens, probs = tokens.masked_fill(is_missing, self.model.pad_id), probs.masked_fill(is_missing, 0.0)
        return Generation(*_trimmed(tokens, probs, self.model.pad_id, scores))

    @property
    def _num_stops(self) -> int:
        """The number of tokens that end a hypothesis."""
        return len({self.model.eos_id, *self.settings.stop_ids})

    def _of_beams(self, x: Tensor, beam: Tensor) -> Tensor:
        """From x (B * K, n) the rows of the beams (B, C); returns (B, C, n)."""
        return _select(x.view(self.batch, -1, x.shape[1]), beam)


def generate(
    model: Any,
    src: Tensor,
    prefix: Tensor | None,
    settings: Settings,
    *,
    on_tokens: Callable[[Tensor], bool | None] | None,
    progress: bool,
    cuda_graph: bool | None,
) -> Generation:
    """Generates targets for sources. The arguments are those of `Seq2SeqTransformer.generate`.

    model: a `torch.nn.Module` that is a `Model`
    """
    search = (BeamSearch if settings.num_beams > 1 else Search)(model, src, prefix, settings)
    if model.takes_cache:
        search.start_cache(len(model.decoder.layers))
    if settings.logits_processor is not None:
        cuda_graph = False  # the tokens that the function gets become longer, and it may read numbers on the host
    step = Replayed(
        search.step, search.device, settings.generator, cuda_graph, model if search.cache is not None else None
    )
    watch = EndWatch(search.is_done, search.device)
    with progress_bar(settings.max_new_tokens) if progress else contextlib.nullcontext(lambda text: None) as advance:
        for count in range(settings.max_new_tokens):
            if search.reserve(search.first + count):
                step.forget()
            step(remaining=settings.max_new_tokens - count)
            is_enough = on_tokens is not None and on_tokens(search.newest()) is True
            advance(f"{count + 1} tokens")
            if is_enough:
                break
            if watch.has_ended():
                break
    return search.result()


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities (B, V) to draw from.

    Tokens that top_k excludes have the probability 0, and so have those that top_p then excludes. The likeliest token
    always stays.

    >>> import torch
    >>> from fused_attn.nn.generation import sampling_probabilities
    >>> sampling_probabilities(torch.tensor([[0.0, 0.0, -1.0]]), temperature=1.0, top_k=2, top_p=None)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    # The largest logit becomes 0 and stays 0, however small the temperature is. The softmax of nothing but -inf is NaN.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, MINUS_INF)
    probabilities = logits.softmax(dim=-1)
    if top_p is None or top_p == 1.0:  # sums of float32 reach 1 before the unlikeliest tokens
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # the sum over the likelier tokens
    likeliest = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, likeliest / likeliest.sum(dim=-1, keepdim=True))


def _processed(processor: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, logits: Tensor) -> Tensor:
    """The logits (rows, V) that the processor returns. Raises TypeError or ValueError if these are no such tensor."""
    processed = processor(tokens, logits)
    expected = f"a function that returns logits {tuple(logits.shape)} of dtype {logits.dtype}"
    if not isinstance(processed, Tensor):
        raise checks.wrong_type("logits_processor", expected, processed)
    if processed.shape != logits.shape or processed.dtype != logits.dtype:
        raise checks.fail("logits_processor", expected, f"shape {tuple(processed.shape)} of dtype {processed.dtype}")
    return processed


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token (rows,) for each row of probabilities (rows, V).

    The smallest of exponential numbers with these rates is a token with these probabilities. `torch.multinomial` does
    the same, but it first reads on the host whether the probabilities are valid.
    """
    numbers = torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    return (probabilities / numbers).argmax(dim=-1)


def _select(hypotheses: Tensor, index: Tensor) -> Tensor:
    """From hypotheses (B, N, length) those with the numbers index (B, K); returns (B, K, length)."""
    return hypotheses.gather(1, index[:, :, None].expand(-1, -1, hypotheses.shape[2]))


def _trimmed(tokens: Tensor, log_probs: Tensor, pad_id: int, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, scores, log_probs) without sos_id, and without the columns that hold only padding."""
    end = 1 + int((tokens[:, 1:] != pad_id).sum(dim=1).amax())
    return tokens[:, 1:end], scores, log_probs[:, 1:end]


def checked_stop_ids(stop_ids: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """The stop tokens as a tuple. Raises TypeError unless they are ints."""
    expected = "an int or a sequence of ints"
    if isinstance(stop_ids, Tensor):
        stop_ids = stop_ids.tolist()
    if isinstance(stop_ids, (str, bytes)) or not isinstance(stop_ids, Iterable):
        checks.check_integer("stop_ids", stop_ids, expected)  # type: ignore[arg-type]
        return (stop_ids,)  # type: ignore[return-value]
    tokens = tuple(stop_ids)
    for token in tokens:
        checks.check_integer("stop_ids", token, expected)
    return tokens


def check(
    model: Model,
    src: Tensor,
    prefix: Tensor | None,
    settings: Settings,
    on_tokens: Callable[[Tensor], bool | None] | None,
    progress: bool,
    cuda_graph: bool | None,
) -> None:
    """Raises TypeError or ValueError for arguments of `Seq2SeqTransformer.generate` that do not fit."""
    _check_types(src, prefix, settings, on_tokens, progress, cuda_graph)
    if not 1 <= settings.max_new_tokens <= model.max_len:
        raise checks.fail("max_new_tokens", f"1 to max_len={model.max_len}", settings.max_new_tokens)
    if not 0 <= settings.min_new_tokens <= settings.max_new_tokens:
        raise checks.fail("min_new_tokens", f"0 to max_new_tokens={settings.max_new_tokens}", settings.min_new_tokens)
    if settings.logits_processor is not None and cuda_graph:
        raise checks.fail("cuda_graph", "None or False with a logits_processor", cuda_graph)
    for name in ("num_beams", "num_return_sequences"):
        if (count := getattr(settings, name)) < 1:
            raise checks.fail(name, "at least 1", count)
    if settings.do_sample and settings.num_beams > 1:
        raise checks.fail("num_beams", "1 with do_sample=True", settings.num_beams)
    if settings.num_beams == 1 and settings.length_penalty != 1.0:
        raise checks.fail("length_penalty", "1.0 without beams (num_beams=1)", settings.length_penalty)
    if not settings.do_sample:
        for name, default in (("temperature", 1.0), ("top_k", None), ("top_p", None)):
            if (value := getattr(settings, name)) != default:
                raise checks.fail(name, f"{default} with do_sample=False", value)
        if settings.num_return_sequences > settings.num_beams:
            expected = f"at most num_beams={settings.num_beams} with do_sample=False"
            raise checks.fail("num_return_sequences", expected, settings.num_return_sequences)
    if not (settings.temperature > 0.0 and math.isfinite(settings.temperature)):
        raise checks.fail("temperature", "a finite number > 0", settings.temperature)
    if settings.top_k is not None and settings.top_k < 1:
        raise checks.fail("top_k", "None or at least 1", settings.top_k)
    if settings.top_p is not None and not 0.0 < settings.top_p <= 1.0:
        raise checks.fail("top_p", "None or a number in (0, 1]", settings.top_p)
    if not (settings.repetition_penalty > 0.0 and math.isfinite(settings.repetition_penalty)):
        raise checks.fail("repetition_penalty", "a finite number > 0", settings.repetition_penalty)
    if not math.isfinite(settings.length_penalty):
        raise checks.fail("length_penalty", "a finite number", settings.length_penalty)
    vocab = model.tgt_vocab_size
    for token in settings.stop_ids:
        if not 0 <= token < vocab or token in (model.pad_id, model.sos_id):
            raise checks.fail("stop_ids", f"tokens in [0, {vocab}) without pad_id and sos_id", token)
    if on_tokens is not None and settings.num_beams > 1:
        raise checks.fail("on_tokens", "None with num_beams > 1, whose hypotheses change later", "a callback")
    if prefix is not None:
        _check_prefix(model, src, prefix, settings)


def _check_types(
    src: Tensor,
    prefix: Tensor | None,
    settings: Settings,
    on_tokens: Callable[[Tensor], bool | None] | None,
    progress: bool,
    cuda_graph: bool | None,
) -> None:
    """Raises TypeError if an argument of `Seq2SeqTransformer.generate` has the wrong type."""
    checks.check_tensor("src", src)
    checks.check_tensors(prefix=prefix)
    for name in ("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences"):
        checks.check_integer(name, getattr(settings, name))
    for name in ("temperature", "repetition_penalty", "length_penalty"):
        checks.check_number(name, getattr(settings, name))
    if settings.top_k is not None:
        checks.check_integer("top_k", settings.top_k)
    if settings.top_p is not None:
        checks.check_number("top_p", settings.top_p)
    checks.check_flags(do_sample=settings.do_sample, progress=progress)
    if cuda_graph is not None:
        checks.check_flag("cuda_graph", cuda_graph)
    if settings.generator is not None and not isinstance(settings.generator, torch.Generator):
        raise checks.wrong_type("generator", "None or a torch.Generator", settings.generator)
    for name, function in (("on_tokens", on_tokens), ("logits_processor", settings.logits_processor)):
        if function is not None and not callable(function):
            raise checks.wrong_type(name, "None or a callable", function)


def _check_prefix(model: Model, src: Tensor, prefix: Tensor, settings: Settings) -> None:
    """Raises TypeError or ValueError if the prefix does not fit."""
    if prefix.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"prefix: expected int64 or int32 tokens, got {prefix.dtype}")
    if prefix.dim() != 2 or prefix.shape[0] != src.shape[0]:
        raise checks.fail("prefix", f"shape (B, P) with B = {src.shape[0]}", tuple(prefix.shape))
    vocab = model.tgt_vocab_size
    if prefix.numel():
        least, greatest = (x.item() for x in prefix.aminmax())
        if not 0 <= least <= greatest < vocab:
            raise checks.fail("prefix", f"tokens in [0, {vocab})", f"{least} to {greatest}")
    most = model.max_len - settings.max_new_tokens
    if prefix.shape[1] > most:
        raise checks.fail("prefix", f"at most max_len - max_new_tokens = {most} tokens", prefix.shape[1])
    is_padding = prefix == model.pad_id
    if (is_padding[:, :-1] & ~is_padding[:, 1:]).any():
        raise checks.fail("prefix", "padding behind the tokens", "padding before a token")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts every submodule into eval mode, and afterwards back into the mode that it had.

    The mode belongs to the modules: where several threads use one model, the first that ends sets the mode for all.
    """
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
