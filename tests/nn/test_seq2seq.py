"""Seq2SeqTransformer against torch.nn.Transformer, against itself without a cache, and against exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn.nn.cache import KVCache
from fused_attn.nn.generation import sampling_probabilities
from fused_attn.nn.seq2seq import Seq2SeqTransformer, sinusoidal_positions

PAD, SOS, EOS = 0, 1, 2
SRC_VOCAB, TGT_VOCAB = 11, 9


def make_model(seed: int = 0, **changes) -> Seq2SeqTransformer:
    """A small float64 model in eval mode. Its weights are so large that different sources give different targets."""
    torch.manual_seed(seed)
    arguments = {
        "src_vocab_size": SRC_VOCAB,
        "tgt_vocab_size": TGT_VOCAB,
        "d_model": 16,
        "nhead": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dim_feedforward": 24,
        "max_len": 32,
        "dtype": torch.float64,
    }
    model = Seq2SeqTransformer(**{**arguments, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 2.0 + 0.1 * torch.randn_like(parameter))
    return model


def make_tokens(lengths: list[int], vocab: int, seed: int = 1, first: int | None = None) -> Tensor:
    """Random tokens (B, longest), padded to the longest length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=generator)
    if first is not None:
        tokens[:, 0] = first
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


SRC = make_tokens([5, 9, 1, 7, 3, 9], SRC_VOCAB)
TGT = make_tokens([4, 1, 6, 8, 2, 5], TGT_VOCAB, first=SOS)


def padded_to(tokens: Tensor, length: int) -> Tensor:
    return F.pad(tokens, (0, length - tokens.shape[1]), value=PAD)


def one_by_one(model: Seq2SeqTransformer, src: Tensor, max_new_tokens: int, **arguments) -> Tensor:
    """The results of generate() for each source alone, without padding."""
    rows = [model.generate(row[row != PAD][None], max_new_tokens, **arguments) for row in src]
    return torch.cat([padded_to(row, max(x.shape[1] for x in rows)) for row in rows])


class TorchSeq2Seq(nn.Module):
    """The same model, built of torch.nn's modules with dense masks."""

    def __init__(self, model: Seq2SeqTransformer, norm_first: bool):
        super().__init__()
        self.model = model
        common = {"batch_first": True, "norm_first": norm_first, "dropout": 0.0, "dtype": torch.float64}
        norm = (lambda: nn.LayerNorm(16, dtype=torch.float64)) if norm_first else lambda: None
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, **common), 2, norm(), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, **common), 2, norm())
        self.encoder.load_state_dict(model.encoder.state_dict(), strict=True)
        self.decoder.load_state_dict(model.decoder.state_dict(), strict=True)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        model = self.model
        positions = sinusoidal_positions(32, 16, dtype=torch.float64)
        x = model.src_embedding(src) * 4.0 + positions[: src.shape[1]]
        y = model.tgt_embedding(tgt) * 4.0 + positions[: tgt.shape[1]]
        memory = self.encoder(x, src_key_padding_mask=src == PAD)
        causal = torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1)
        y = self.decoder(
            y, memory, tgt_mask=causal, tgt_key_padding_mask=tgt == PAD, memory_key_padding_mask=src == PAD
        )
        return model.generator(y)


@pytest.mark.quick
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_logits_and_gradients_equal_torch(norm_first):
    model = make_model(norm_first=norm_first, dropout=0.0).train()
    other = TorchSeq2Seq(model, norm_first).train()
    is_token = TGT != PAD
    logits = [module(SRC, TGT)[is_token] for module in (model, other)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-10)
    losses = [x.log_softmax(-1)[:, 3].sum() for x in logits]
    gradients = torch.autograd.grad(losses[0], list(model.encoder.parameters()) + list(model.decoder.parameters()))
    expected = torch.autograd.grad(losses[1], list(other.encoder.parameters()) + list(other.decoder.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.quick
def test_padding_changes_nothing():
    model = make_model()
    logits = model(SRC, TGT)
    wider = model(padded_to(SRC, 14), padded_to(TGT, 12))
    is_token = TGT != PAD
    torch.testing.assert_close(wider[:, : TGT.shape[1]][is_token], logits[is_token])
    for n in range(len(SRC)):
        src, tgt = SRC[n][SRC[n] != PAD], TGT[n][TGT[n] != PAD]
        torch.testing.assert_close(model(src[None], tgt[None])[0], logits[n, : len(tgt)])


def test_logits_do_not_see_later_tokens():
    model = make_model()
    tgt = make_tokens([8] * len(SRC), TGT_VOCAB, first=SOS)
    logits = model(SRC, tgt)
    for t in range(1, 8):
        changed = tgt.clone()
        changed[:, t:] = make_tokens([8 - t] * len(SRC), TGT_VOCAB, seed=t)
        torch.testing.assert_close(model(SRC, changed)[:, :t], logits[:, :t])


VARIANTS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "gqa": {"num_kv_heads": 2},
    "learned": {"positional": "learned"},
    "rotary": {"positional": "rotary"},
    "reference": {"backend": "reference"},
    "shared": {"src_vocab_size": TGT_VOCAB, "share_embeddings": True, "tie_generator": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_cached_steps_equal_full_recomputation(changes):
    model = make_model(**changes)
    src = SRC.clamp(max=TGT_VOCAB - 1)
    tgt = make_tokens([8] * len(src), TGT_VOCAB, first=SOS)
    memory, padding = model.encode(src)
    full = model.decode(tgt, memory, padding)
    for steps in ((1,) * 8, (3, 1, 4)):
        cache = KVCache(2)
        with torch.no_grad():
            logits = [model.decode(part, memory, padding, cache=cache) for part in tgt.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), full)
        assert cache.length == 8


def test_gradients_through_cached_steps_equal_full_recomputation():
    model = make_model()
    tgt = make_tokens([5] * len(SRC), TGT_VOCAB, first=SOS)
    memory, padding = model.encode(SRC)
    cache = KVCache(2)
    steps = torch.cat([model.decode(token, memory, padding, cache=cache) for token in tgt.split(1, dim=1)], dim=1)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x.cos().sum(), parameters, retain_graph=True) for x in (steps, model(SRC, tgt))]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def naive_greedy(model: Seq2SeqTransformer, src: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy decoding without a cache: each step computes all tokens again."""
    tgt = torch.full((len(src), 1), SOS)
    ended = torch.zeros(len(src), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = model(src, tgt)[:, -1]
        logits[:, [PAD, SOS]] = -math.inf
        newest = logits.argmax(-1).masked_fill(ended, PAD)
        tgt = torch.cat((tgt, newest[:, None]), dim=1)
        ended |= newest == EOS
        if ended.all():
            break
    return tgt[:, 1:]


def assert_well_formed(tokens: Tensor, max_new_tokens: int) -> None:
    """Asserts that targets have no special token before <eos>, and only padding after it."""
    assert tokens.shape[1] <= max_new_tokens
    for row in tokens.tolist():
        body = row[: row.index(EOS)] if EOS in row else row
        assert all(token > EOS for token in body)
        assert all(token == PAD for token in row[len(body) + 1 :])
    # ... and the last column is not padding in all rows
    assert (tokens[:, -1] != PAD).any()


@pytest.mark.quick
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_greedy(changes):
    model = make_model(seed=3, **changes)
    src = SRC.clamp(max=TGT_VOCAB - 1)
    tokens = model.generate(src, 12)
    assert_well_formed(tokens, 12)
    assert torch.equal(tokens, naive_greedy(model, src, 12))
    assert torch.equal(tokens, one_by_one(model, src, 12))


def test_an_embedding_that_an_adapter_wraps():
    model = make_model()
    expected = model.generate(SRC, max_new_tokens=8)
    model.tgt_embedding = nn.Sequential(model.tgt_embedding, nn.Identity())
    assert torch.equal(model.generate(SRC, max_new_tokens=8), expected)
    with pytest.raises(ValueError, match=r"tgt: expected tokens in \[0, \d+\), got 0 to 1000"):
        model(SRC, torch.tensor([[0, 1000]]).expand(len(SRC), 2))


def test_the_greedy_cases_end_at_different_lengths():
    lengths = {
        length
        for changes in VARIANTS.values()
        for length in (make_model(seed=3, **changes).generate(SRC.clamp(max=TGT_VOCAB - 1), 12) != PAD).sum(1).tolist()
    }
    assert len(lengths) >= 4, lengths


def naive_beam(
    model: Seq2SeqTransformer, src: Tensor, max_new_tokens: int, num_beams: int, penalty: float
) -> list[int]:
    """Beam search for one source with plain lists. Each step computes the score of each hypothesis from the start."""
    live, ended = [(0.0, [SOS])], []
    for step in range(1, max_new_tokens + 1):
        candidates = []
        for log_p, hypothesis in live:
            logits = model(src[None], torch.tensor([hypothesis]))[0, -1]
            logits[[PAD, SOS]] = -math.inf
            candidates += [(log_p + x, [*hypothesis, token]) for token, x in enumerate(logits.log_softmax(-1).tolist())]
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        ended += [(log_p / step**penalty, hypothesis) for log_p, hypothesis in candidates if hypothesis[-1] == EOS]
        ended = sorted(ended, reverse=True)[:num_beams]
        live = [candidate for candidate in candidates if candidate[1][-1] != EOS][:num_beams]
        if len(ended) == num_beams and ended[-1][0] >= live[0][0] / step**penalty:
            break
    return max(ended or live)[1][1:]


@pytest.mark.quick
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5], ids=str)
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search(num_beams, length_penalty):
    for seed in (3, 4):
        model = make_model(seed=seed)
        tokens = model.generate(SRC, 10, num_beams=num_beams, length_penalty=length_penalty)
        assert_well_formed(tokens, 10)
        assert torch.equal(tokens, one_by_one(model, SRC, 10, num_beams=num_beams, length_penalty=length_penalty))
        for n, row in enumerate(SRC):
            expected = naive_beam(model, row[row != PAD], 10, num_beams, length_penalty)
            assert [token for token in tokens[n].tolist() if token != PAD] == expected


def test_wide_beam_finds_the_best_of_all_targets():
    model = make_model(seed=5, tgt_vocab_size=6)  # three tokens are not special
    scores = {}
    for length in range(4):
        for body in itertools.product((3, 4, 5), repeat=length):
            tgt = torch.tensor([[SOS, *body, EOS]])
            logits = model(SRC[:1], tgt[:, :-1])
            logits[..., [PAD, SOS]] = -math.inf
            log_p = logits.log_softmax(-1)[0].gather(1, tgt[0, 1:, None]).sum().item()
            scores[(*body, EOS)] = log_p / (length + 1) ** 0.7
    best = max(scores, key=scores.get)
    assert model.generate(SRC[:1], 4, num_beams=40, length_penalty=0.7).tolist() == [list(best)]


def test_beam_search_returns_an_unfinished_hypothesis_where_none_ends():
    model = make_model()
    with torch.no_grad():
        model.generator.bias[EOS] = -1e4
    tokens = model.generate(SRC, 5, num_beams=3)
    assert tokens.shape == (len(SRC), 5) and (tokens > EOS).all()


@pytest.mark.parametrize(
    "choice",
    [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"temperature": 1e-60}],
    ids=lambda x: next(iter(x)),
)
def test_sampling_from_one_token_is_greedy(choice):
    model = make_model(seed=3)
    assert torch.equal(model.generate(SRC, 12, do_sample=True, **choice), model.generate(SRC, 12))


def test_sampling_is_reproducible_and_well_formed():
    model = make_model(seed=3)
    draws = [
        model.generate(SRC, 12, do_sample=True, temperature=3.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])
    for tokens in draws:
        assert_well_formed(tokens, 12)


def test_sampled_frequencies():
    model = make_model()
    count = 20_000
    src = SRC[:1].expand(count, -1)
    first = model.generate(src, 1, do_sample=True, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, 0]
    logits = model(SRC[:1], torch.tensor([[SOS]]))[0, 0]
    logits[[PAD, SOS]] = -math.inf
    torch.testing.assert_close(
        first.bincount(minlength=TGT_VOCAB).double() / count, (logits / 2.0).softmax(-1), atol=0.015, rtol=0.0
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1.0, None, None), [0.5, 0.3, 0.2]),
        ((1.0, 2, None), [0.625, 0.375, 0.0]),
        ((1.0, 9, None), [0.5, 0.3, 0.2]),
        ((1.0, None, 0.5), [1.0, 0.0, 0.0]),
        ((1.0, None, 0.6), [0.625, 0.375, 0.0]),
        ((1.0, None, 1.0), [0.5, 0.3, 0.2]),
        ((1.0, 2, 0.6), [1.0, 0.0, 0.0]),
        ((0.5, None, None), [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
    ],
    ids=str,
)
def test_sampling_probabilities(arguments, expected):
    order = torch.tensor([1, 2, 0])
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    probabilities = sampling_probabilities(torch.stack((logits, logits[order])), *arguments)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(probabilities, torch.stack((expected, expected[order])))


def test_generation_turns_dropout_off_and_modes_back():
    model = make_model(dropout=0.5, seed=3)
    expected = model.generate(SRC, 12)
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate(SRC, 12), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError):
        model.generate(SRC.clamp(min=SRC_VOCAB), 12)
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_reproducible():
    model = make_model(dropout=0.3).train()
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        logits.append(model(SRC, TGT))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_an_empty_source_and_an_empty_batch():
    model = make_model()
    src = SRC.clone()
    src[2] = PAD
    assert model(src, TGT)[TGT != PAD].isfinite().all()
    assert torch.equal(model.generate(src, 6)[[0, 1]], model.generate(SRC, 6)[[0, 1]])
    for num_beams in (1, 2):
        assert model.generate(SRC[:0], 6, num_beams=num_beams).shape == (0, 0)
        nothing, one = (model.generate(x, 6, num_beams=num_beams, return_scores=True) for x in (SRC[:0], SRC[:1]))
        assert [x.dtype for x in nothing] == [x.dtype for x in one]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_other_dtypes(dtype, tolerance):
    model = make_model(seed=3, dtype=dtype)
    logits = model(SRC, TGT)
    assert logits.dtype == dtype
    expected = make_model()
    expected.load_state_dict(model.state_dict())
    is_token = TGT != PAD
    exact = expected(SRC, TGT)[is_token]
    assert (logits.double()[is_token] - exact).norm() < tolerance * exact.norm()
    for num_beams in (1, 3):
        assert_well_formed(model.generate(SRC, 8, num_beams=num_beams), 8)


def test_shared_and_tied_weights_stay_one_tensor():
    model = make_model(**VARIANTS["shared"])
    assert model.src_embedding.weight is model.tgt_embedding.weight is model.generator.weight
    other = make_model(seed=1, **VARIANTS["shared"])
    other.reset_parameters()
    assert not other.tgt_embedding.weight[PAD].any(), "the generator has not overwritten it"
    assert other.src_embedding.weight is other.tgt_embedding.weight is other.generator.weight
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(SRC.clamp(max=8), TGT), model(SRC.clamp(max=8), TGT))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_generator": True}, {"positional": "learned"}, {"num_kv_heads": 1}], ids=str
)
def test_a_model_made_on_the_meta_device_can_be_filled(changes):
    model = make_model(**changes)
    empty = make_model(device="meta", **changes).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(float("nan"))
    torch.manual_seed(1)
    model.reset_parameters()
    torch.manual_seed(1)
    empty.reset_parameters()
    assert torch.equal(empty.eval()(SRC, TGT), model.eval()(SRC, TGT))
    assert (empty.generator.weight is empty.tgt_embedding.weight) == ("tie_generator" in changes)


def test_state_dict_is_independent_of_max_len():
    model, longer = make_model(seed=0), make_model(seed=1, max_len=64)
    longer.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(longer(SRC, TGT), model(SRC, TGT), rtol=0.0, atol=0.0)


def test_sinusoidal_positions():
    table = sinusoidal_positions(100, 7, dtype=torch.float64)
    assert table.shape == (100, 7)
    for column, function in ((0, math.sin), (1, math.cos), (4, math.sin), (5, math.cos)):
        rate = 10000.0 ** -(column // 2 * 2 / 7)
        assert table[83, column].item() == pytest.approx(function(83 * rate), abs=1e-12)


@pytest.mark.quick
def test_it_learns_to_reverse():
    torch.manual_seed(0)
    model = Seq2SeqTransformer(13, 13, 32, 4, 1, 1, 64, dropout=0.0, norm_first=True, max_len=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    src = make_tokens([1 + n % 6 for n in range(64)], 13)
    tgt = torch.full((64, 8), PAD)
    for n, row in enumerate(src):
        body = row[row != PAD].flip(0)
        tgt[n, : len(body) + 2] = torch.cat((torch.tensor([SOS]), body, torch.tensor([EOS])))
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()
        optimizer.step()
    for num_beams in (1, 3):
        assert torch.equal(model.generate(src, 7, num_beams=num_beams), tgt[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"src_vocab_size": 0}, "src_vocab_size: expected at least 1, got 0"),
        ({"eos_id": TGT_VOCAB}, r"eos_id: expected a token in \[0, 9\), got 9"),
        ({"pad_id": 10}, r"pad_id: expected a token in \[0, 9\), got 10"),
        ({"sos_id": PAD}, r"expected three different tokens, got \(0, 0, 2\)"),
        ({"share_embeddings": True}, "share_embeddings: expected vocabularies of one size, got 11 and 9"),
        ({"positional": "alibi"}, "positional: expected one of .*, got 'alibi'"),
        ({"max_len": 0}, "max_len: expected at least 1, got 0"),
        ({"num_encoder_layers": 0}, "num_encoder_layers: expected at least 1, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers: expected at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 to max_len=32, got 0"),
        ({"max_new_tokens": 33}, "max_new_tokens: expected 1 to max_len=32, got 33"),
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: expected 1 with do_sample=True, got 2"),
        ({"temperature": 0.5}, "temperature: expected 1.0 with do_sample=False, got 0.5"),
        ({"top_k": 3}, "top_k: expected None with do_sample=False, got 3"),
        ({"top_p": 0.5}, "top_p: expected None with do_sample=False, got 0.5"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"do_sample": True, "temperature": math.inf}, "temperature: expected a finite number > 0, got inf"),
        ({"do_sample": True, "top_k": 0}, "top_k: expected None or at least 1, got 0"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty: expected a finite number, got nan"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p: expected None or a number in \(0, 1\], got 1.5"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors_of_generate(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(SRC, **{"max_new_tokens": 4, **arguments})


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams", "top_k"])
def test_counts_that_are_no_ints_raise(name):
    with pytest.raises(TypeError, match=f"{name}: expected an int, got float"):
        make_model().generate(SRC, **{"max_new_tokens": 4, "do_sample": True, name: 2.5})


@pytest.mark.parametrize(
    ("src", "tgt", "error", "message"),
    [
        (SRC.double(), TGT, TypeError, "src: expected int64 or int32 tokens, got torch.float64"),
        (SRC, TGT[0], ValueError, r"tgt: expected shape \(B, L\), got \(8,\)"),
        (SRC[0], TGT[0], ValueError, r"src: expected shape \(B, L\), got"),
        (SRC, TGT[:2], ValueError, r"tgt: expected the batch size of src, 6, got shape \(2, 8\)"),
        (SRC + 1, TGT, ValueError, r"src: expected tokens in \[0, 11\), got 1 to 11"),
        (SRC, TGT - 1, ValueError, r"tgt: expected tokens in \[0, 9\), got -1 to 7"),
        (padded_to(SRC, 33), TGT, ValueError, "src: expected at most max_len=32 tokens, got 33"),
    ],
    ids=["dtype", "rank", "both-ranks", "batch", "too-high", "too-low", "too-long"],
)
def test_errors_of_forward(src, tgt, error, message):
    with pytest.raises(error, match=message):
        make_model()(src, tgt)


def test_error_of_a_cache_that_is_full():
    model = make_model(max_len=4)
    memory, padding = model.encode(SRC[:, :4])
    cache = KVCache(2)
    model.decode(TGT[:, :3], memory, padding, cache=cache)
    with pytest.raises(ValueError, match="tgt: expected at most max_len=4 tokens, got 5"):
        model.decode(TGT[:, 3:5], memory, padding, cache=cache)
