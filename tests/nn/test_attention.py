"""FusedMultiheadAttention gives what torch.nn.MultiheadAttention gives, and has options that torch's module has not."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from parity import TIGHT, added, assert_same, causal, outcome, padding, randn, twins
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.relative_bias import alibi_bias, t5_relative_bias
from fused_attn.nn import FusedMultiheadAttention, RotaryEmbedding, T5RelativeBias
from fused_attn.nn import attention as attention_module
from fused_attn.nn.cache import CrossAttentionCache, KVCache, SelfAttentionCache

N, L, S, E, H = 3, 4, 5, 8, 2


class Case(NamedTuple):
    """options: the arguments of the constructor. call: a function that makes the arguments of forward in the test."""

    id: str
    call: Callable[[], tuple[Any, ...]]
    arguments: Callable[[], dict[str, Any]] = dict
    options: dict[str, Any] = {}  # noqa: RUF012


def self_attention(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (randn(*shape),) * 3


def memory(query: tuple[int, ...], key: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    def build() -> tuple[Tensor, ...]:
        keys = randn(*key)
        return randn(*query), keys, keys

    return build


def distinct(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(randn(*shape) for shape in shapes)


SELF = self_attention(N, L, E)
CROSS = memory((N, L, E), (N, S, E))
FIRST = {"batch_first": True}
APPENDED = {"add_bias_kv": True, "add_zero_attn": True, **FIRST}
PADDING = padding(5, 2, 3, longest=S)


def some_mask(*shape: int) -> Tensor:
    """A random bool mask in which every query sees a key."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0] = False
    return mask


CASES = [
    Case("self", self_attention(L, N, E)),
    Case("self, batch first", SELF, options=FIRST),
    Case("memory", memory((L, N, E), (S, N, E))),
    Case("memory, batch first", CROSS, options=FIRST),
    Case("three tensors", distinct((N, L, E), (N, S, E), (N, S, E)), options=FIRST),
    Case("query is key, other value", lambda: (x := randn(N, L, E), x, randn(N, L, E)), options=FIRST),
    Case("strided input", lambda: (randn(N, E, L).transpose(1, 2),) * 3, options=FIRST),
    Case("no bias", CROSS, options={"bias": False, **FIRST}),
    Case("one head", SELF, options={"num_heads": 1, **FIRST}),
    Case("head dim 1", SELF, options={"num_heads": E, **FIRST}),
    Case("kdim and vdim", distinct((L, N, E), (S, N, 3), (S, N, 7)), options={"kdim": 3, "vdim": 7}),
    Case("kdim, no bias", distinct((L, N, E), (S, N, 3), (S, N, E)), options={"kdim": 3, "bias": False}),
    Case(
        "kdim and appended rows",
        distinct((N, L, E), (N, S, 3), (N, S, 7)),
        lambda: {"key_padding_mask": PADDING},
        {"kdim": 3, "vdim": 7, **APPENDED},
    ),
    Case("unbatched", self_attention(L, E)),
    Case("unbatched ignores batch_first", memory((L, E), (S, E)), options=FIRST),
    Case(
        "unbatched, padding and (H, L, S) mask",
        memory((L, E), (S, E)),
        lambda: {"key_padding_mask": PADDING[1], "attn_mask": some_mask(H, L, S)},
    ),
    Case("unbatched, appended rows", memory((L, E), (S, E)), options=APPENDED),
    Case("empty batch", memory((0, L, E), (0, S, E)), options=FIRST),
    Case("bool padding", CROSS, lambda: {"key_padding_mask": PADDING}, FIRST),
    Case("float padding", CROSS, lambda: {"key_padding_mask": randn(N, S, requires_grad=False)}, FIRST),
    Case("float padding of -inf", CROSS, lambda: {"key_padding_mask": added(PADDING)}, FIRST),
    Case("bool (L, S) mask", CROSS, lambda: {"attn_mask": some_mask(L, S)}, FIRST),
    Case("bool (N * H, L, S) mask", CROSS, lambda: {"attn_mask": some_mask(N * H, L, S)}, FIRST),
    Case("float (L, S) mask", CROSS, lambda: {"attn_mask": randn(L, S)}, FIRST),
    Case("float (N * H, L, S) mask", CROSS, lambda: {"attn_mask": randn(N * H, L, S)}, FIRST),
    Case(
        "bool padding and bool mask",
        SELF,
        lambda: {"key_padding_mask": padding(4, 2, 3, longest=L), "attn_mask": causal(L)},
        FIRST,
    ),
    Case(
        "bool padding and float mask",
        CROSS,
        lambda: {"key_padding_mask": PADDING, "attn_mask": randn(N * H, L, S)},
        FIRST,
    ),
    Case(
        "float padding and bool mask",
        CROSS,
        lambda: {"key_padding_mask": added(PADDING), "attn_mask": causal(L, S)},
        FIRST,
    ),
    Case("add_bias_kv", CROSS, options={"add_bias_kv": True, **FIRST}),
    Case("add_zero_attn", memory((L, N, E), (S, N, E)), options={"add_zero_attn": True}),
    Case(
        "appended rows, bool masks",
        CROSS,
        lambda: {"key_padding_mask": PADDING, "attn_mask": some_mask(N * H, L, S)},
        APPENDED,
    ),
    Case(
        "appended rows, float masks",
        CROSS,
        lambda: {"key_padding_mask": added(PADDING), "attn_mask": randn(L, S)},
        APPENDED,
    ),
    Case("hint, bool mask", SELF, lambda: {"attn_mask": causal(L), "is_causal": True}, FIRST),
    Case("hint, float mask", CROSS, lambda: {"attn_mask": added(causal(L, S)), "is_causal": True}, FIRST),
    Case("wrong hint", CROSS, lambda: {"attn_mask": some_mask(L, S), "is_causal": True}, FIRST),
    Case(
        "wrong hint with padding",
        CROSS,
        lambda: {"attn_mask": some_mask(L, S), "is_causal": True, "key_padding_mask": PADDING},
        FIRST,
    ),
    Case("hint, appended rows", CROSS, lambda: {"attn_mask": causal(L, S), "is_causal": True}, APPENDED),
    Case(
        "hint, more queries than keys",
        memory((N, S, E), (N, 2, E)),
        lambda: {"attn_mask": causal(S, 2), "is_causal": True},
        APPENDED,
    ),
]
WEIGHTS = {
    "output alone": {"need_weights": False},
    "mean weights": {},
    "weights of heads": {"average_attn_weights": False},
}
QUICK = {"self, batch first", "bool padding and bool mask", "appended rows, float masks", "wrong hint"}


def pair(**options: Any) -> tuple[FusedMultiheadAttention, nn.MultiheadAttention]:
    options = {"embed_dim": E, "num_heads": H, **options}
    return twins(FusedMultiheadAttention, nn.MultiheadAttention, **options)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [pytest.param(value, id=key) for key, value in WEIGHTS.items()])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=[pytest.mark.quick] if c.id in QUICK else []) for c in CASES]
)
def test_equals_torch(case: Case, weights: dict[str, bool]) -> None:
    ours, theirs = pair(**case.options)
    assert_same(ours, theirs, *case.call(), **case.arguments(), **weights)


@pytest.mark.parametrize("is_grad_enabled", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("mask", ["none", "padding", "mask"])
def test_equals_torch_in_eval_mode(mask: str, is_grad_enabled: bool) -> None:
    """Without gradients, torch's module uses its fast inference path."""
    ours, theirs = pair(dropout=0.5, **FIRST)
    ours.eval(), theirs.eval()
    masks = {"padding": {"key_padding_mask": padding(4, 2, 3, longest=L)}, "mask": {"attn_mask": causal(L)}}
    masks = masks.get(mask, {})
    x = randn(N, L, E, requires_grad=False)
    with torch.set_grad_enabled(is_grad_enabled):
        for mine, reference in zip(ours(x, x, x, **masks), theirs(x, x, x, **masks), strict=True):
            torch.testing.assert_close(mine, reference, **TIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 3, "vdim": 7},
        {"add_bias_kv": True},
        {"num_kv_heads": H},
    ],
    ids=["plain", "no bias", "kdim and vdim", "add_bias_kv", "as many kv heads as heads"],
)
def test_state_dict_loads_both_ways(options: dict[str, Any]) -> None:
    ours = FusedMultiheadAttention(E, H, **options)
    theirs = nn.MultiheadAttention(E, H, **{k: v for k, v in options.items() if k != "num_kv_heads"})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_same_seed_gives_the_initial_weights_of_torch() -> None:
    modules = []
    for cls in (FusedMultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        modules.append(cls(E, H, add_bias_kv=True))
    for mine, reference in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(mine, reference)


# ---- queries that may attend to nothing


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["padding", "mask", "float mask", "both"])
def test_empty_rows_equal_torch_without_weights(kind: str) -> None:
    """torch without weights returns 0 before the projection for a query that sees no key, with gradients of 0."""
    ours, theirs = pair(**FIRST)
    assert_same(ours, theirs, *CROSS(), **empty_rows(kind), need_weights=False)


@pytest.mark.parametrize("kind", ["padding", "mask", "float mask", "both"])
def test_empty_rows_have_zero_weights(kind: str) -> None:
    ours, _ = pair(**FIRST)
    arguments = empty_rows(kind)
    results = outcome(ours, *(inputs := CROSS()), **arguments)
    assert all(x.isfinite().all() for x in results.values())
    out, weights = ours(*inputs, **arguments, average_attn_weights=False)
    is_empty = weights.sum(-1) == 0  # (N, H, L)
    assert is_empty.any() and not is_empty.all()
    torch.testing.assert_close(weights.sum(-1)[~is_empty], torch.ones((~is_empty).sum(), dtype=torch.float64))
    rows = out[is_empty.all(1)]
    torch.testing.assert_close(rows, ours.out_proj.bias.expand_as(rows), **TIGHT)


def empty_rows(kind: str) -> dict[str, Tensor]:
    all_padded, rows = padding(5, 0, 3, longest=S), causal(L, S)
    rows[1] = True
    return {
        "padding": {"key_padding_mask": all_padded},
        "mask": {"attn_mask": rows},
        "float mask": {"attn_mask": added(rows)},
        "both": {"key_padding_mask": all_padded, "attn_mask": rows},
    }[kind]


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_padded_keys_may_hold_nan(need_weights: bool) -> None:
    ours, _ = pair(**FIRST)
    query, keys, _ = CROSS()
    reference = outcome(ours, query, keys, keys, key_padding_mask=PADDING, need_weights=need_weights)
    with torch.no_grad():
        keys[PADDING] = float("nan")
    results = outcome(ours, query, keys, keys, key_padding_mask=PADDING, need_weights=need_weights)
    for name in ("output 0", *(["output 1"] if need_weights else []), "dinput 0", "dout_proj.weight"):
        torch.testing.assert_close(results[name], reference[name], **TIGHT)


# ---- dropout


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"add_bias_kv": True}], ids=["plain", "gqa", "bias_kv"])
def test_weights_are_those_that_dropout_left(options: dict[str, Any]) -> None:
    """The returned weights times the values are the output, so dropout drops the same weights in both."""
    torch.manual_seed(0)
    ours = FusedMultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64, **options)
    x = randn(N, 16, E)
    out, weights = ours(x, x, x, attn_mask=causal(16), average_attn_weights=False)
    heads = ours.num_kv_heads
    rows = slice(-heads * ours.head_dim, None)
    value = nn.functional.linear(x, ours.in_proj_weight[rows], ours.in_proj_bias[rows])
    if ours.bias_v is not None:
        value = torch.cat((value, ours.bias_v.expand(N, 1, E)), dim=1)
    value = value.unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(H // heads, dim=1)
    expected = ours.out_proj((weights @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(out, expected, **TIGHT)
    dropped = (weights == 0).double().mean() - (0 if "add_bias_kv" in options else 15 / 32)
    assert dropped > 0.1

    # Compares the kernel's gradients with those that autograd computes through weights times values.
    names = dict(ours.named_parameters())
    for fused, through_weights in zip(
        *(torch.autograd.grad(y.cos().sum(), names.values(), retain_graph=True) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(fused, through_weights, **TIGHT)


def test_dropout_follows_torch_seed_and_training_mode() -> None:
    ours = FusedMultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, N, E)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(x, x, x)[1]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    ours.eval()
    torch.testing.assert_close(run(1).sum(-1), torch.ones(N, L))


def test_output_does_not_depend_on_need_weights() -> None:
    ours = FusedMultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, N, E)
    outputs = []
    for need_weights in (True, False):
        torch.manual_seed(0)
        outputs.append(ours(x, x, x, need_weights=need_weights)[0])
    assert torch.equal(*outputs)


# ---- what reaches the kernel


class Recorder:
    """Replaces `fused_attention`, calls it, and keeps the arguments and the results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._call = attention_module.fused_attention
        # The native call for small modules does not call `fused_attention`, so it is switched off.
        monkeypatch.setattr(attention_module.native_attention, "is_small", lambda *args: False)
        monkeypatch.setattr(attention_module, "fused_attention", self)
        monkeypatch.setattr(attention_module.native_attention, "fused_attention", self)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **kwargs: Any) -> Any:
        self.query, self.key, self.value, self.attn_mask, self.kwargs = query, key, value, attn_mask, kwargs
        result = self._call(query, key, value, attn_mask, **kwargs)
        if isinstance(result, tuple):
            return result
        # The output has the memory order of the query. Only kernels promise this, not the reference.
        self.result = empty_like_layout(query, value.shape[-1]).copy_(result)
        return self.result


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_heads_are_split_and_merged_without_copies(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Recorder(monkeypatch)
    ours = FusedMultiheadAttention(E, H, batch_first=batch_first)
    merged = []
    ours.out_proj.register_forward_pre_hook(lambda module, inputs: merged.append(inputs[0]))
    x, keys = torch.randn(2, N, L, E)
    ours(x, x, x, need_weights=False)
    storages = {t.untyped_storage().data_ptr() for t in (call.query, call.key, call.value)}
    assert len(storages) == 1, "self-attention: expected one packed projection"
    assert merged[0].data_ptr() == call.result.data_ptr()
    ours(x, keys, keys, need_weights=False)
    assert call.key.untyped_storage().data_ptr() == call.value.untyped_storage().data_ptr()


def test_masks_that_cost_nothing_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Recorder(monkeypatch)
    ours = FusedMultiheadAttention(E, H, batch_first=True)
    x, padded = torch.randn(N, L, E), padding(4, 2, 3, longest=L)
    ours(x, x, x, key_padding_mask=padded)
    assert call.kwargs["key_padding_mask"] is padded
    ours(x, x, x, attn_mask=causal(L), is_causal=True, need_weights=False)
    assert call.attn_mask is None and call.kwargs["is_causal"]
    bias = causal_upper_left(L, L)
    ours(x, x, x, attn_mask=bias, key_padding_mask=padded, is_causal=True)
    assert call.attn_mask is bias


@pytest.mark.parametrize("options", [{}, APPENDED], ids=["plain", "appended rows"])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_causal_bias_objects_mean_the_mask_that_they_describe(bias: Any, options: Any, need_weights: bool) -> None:
    options = {**FIRST, **options}
    ours, theirs = pair(**options)
    x = CROSS()
    dense = causal(L, S) if bias is causal_upper_left else torch.ones(L, S, dtype=torch.bool).triu(1 + S - L)
    arguments = {"key_padding_mask": padding(5, 2, 3, longest=S), "need_weights": need_weights}
    expected = outcome(theirs, *x, attn_mask=dense, **arguments)
    for name, mine in outcome(ours, *x, attn_mask=bias(L, S), **arguments).items():
        if mine is not None:
            torch.testing.assert_close(mine, expected[name], **TIGHT)


# ---- errors


@pytest.mark.parametrize(
    ("shapes", "arguments", "error", "name"),
    [
        (((L, N, E),) * 3, {"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, AssertionError, "attn_mask"),
        (((L, N, E),) * 3, {"key_padding_mask": torch.zeros(N, L, dtype=torch.int64)}, AssertionError, "key_padding"),
        (((L, N, E),) * 3, {"attn_mask": torch.zeros(L, S)}, RuntimeError, "attn_mask"),
        (((L, N, E),) * 3, {"attn_mask": torch.zeros(N, L, L)}, RuntimeError, "attn_mask"),
        (((L, N, E),) * 3, {"attn_mask": torch.zeros(N, H, L, L)}, AssertionError, "attn_mask"),
        (((L, N, E),) * 3, {"key_padding_mask": torch.zeros(N, S)}, AssertionError, "key_padding_mask"),
        (((L, N, E),) * 3, {"key_padding_mask": torch.zeros(L)}, AssertionError, "key_padding_mask"),
        (((L, E),) * 3, {"key_padding_mask": torch.zeros(1, L)}, AssertionError, "key_padding_mask"),
        (((L, N, E), (S, N, E), (L, N, E)), {}, AssertionError, "value"),
        (((L, N, E), (L, E), (L, E)), {}, AssertionError, "key"),
        (((L, N, E), (S, N + 1, E), (S, N + 1, E)), {}, RuntimeError, "key"),
        (((L, N, E + 1),) * 3, {}, (AssertionError, RuntimeError), "query"),
        (((L, N, E, 1),) * 3, {}, AssertionError, "query"),
    ],
)
def test_bad_inputs_raise_as_torch_does(shapes: Any, arguments: Any, error: Any, name: str) -> None:
    for module in pair()[::-1]:
        with pytest.raises(error) as info:
            module(*(randn(*shape) for shape in shapes), need_weights=True, **arguments)
    assert name in str(info.value) and "expected" in str(info.value)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads: expected None or an int, got float"),
        ({"backend": "nope"}, ValueError, "backend: expected None or one of .*, got 'nope'"),
        ({"rotary": "yes"}, TypeError, "rotary"),
        ({"rotary": -1.0}, ValueError, "base"),
        ({"rotary": True, "num_heads": 8}, ValueError, "head_dim"),
        ({"relative_bias": torch.zeros(H, 3)}, TypeError, "relative_bias"),
        ({"relative_bias": T5RelativeBias(8, H), "add_zero_attn": True}, ValueError, "relative_bias"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 3}, AssertionError, "num_heads"),
    ],
)
def test_bad_options_raise(options: Any, error: Any, name: str) -> None:
    with pytest.raises(error, match=name):
        FusedMultiheadAttention(**{"embed_dim": E, "num_heads": H, **options})


def test_arguments_that_are_no_tensors_raise() -> None:
    x = torch.randn(L, N, E)
    for name in ("query", "key", "value"):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got NoneType"):
            FusedMultiheadAttention(E, H)(**{"query": x, "key": x, "value": x, name: None})


# ---- grouped-query attention, rotary embedding, relative bias


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": E, "vdim": 3}, {"add_bias_kv": True}])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_query_attention_equals_repeated_projections(num_kv_heads: int, options: dict[str, Any]) -> None:
    heads, head_dim = 4, E // 4
    kwargs = {"batch_first": True, "dtype": torch.float64, **options}
    ours = FusedMultiheadAttention(E, heads, num_kv_heads=num_kv_heads, **kwargs)
    theirs = nn.MultiheadAttention(E, heads, **kwargs)

    def repeated(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (num_kv_heads, head_dim)).repeat_interleave(heads // num_kv_heads, dim=0).flatten(0, 1)

    state = ours.state_dict()
    sizes = (E, num_kv_heads * head_dim, num_kv_heads * head_dim)
    for name in ("in_proj_weight", "in_proj_bias"):
        if name in state:
            assert state[name].shape[0] == sum(sizes)
            query, key, value = state[name].split(sizes)
            state[name] = torch.cat((query, repeated(key), repeated(value)))
    for name in ("k_proj_weight", "v_proj_weight"):
        if name in state:
            state[name] = repeated(state[name])
    for name in ("bias_k", "bias_v"):
        if name in state:
            state[name] = repeated(state[name].flatten()).view(1, 1, E)
    theirs.load_state_dict(state, strict=True)
    query, key, value = randn(N, L, E), randn(N, S, E), randn(N, S, options.get("vdim", E))
    for mine, reference in zip(
        ours(query, key, value, key_padding_mask=PADDING),
        theirs(query, key, value, key_padding_mask=PADDING),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, **TIGHT)


def test_rotary_embedding_turns_pairs_of_columns() -> None:
    x = randn(2, 3, 6, 4)
    turned = RotaryEmbedding(4, base=100.0)(x, offset=5)
    for n in range(6):
        for column in range(2):
            angle = (5 + n) * 100.0 ** (-2 * column / 4)
            a, b = x[..., n, column], x[..., n, column + 2]
            expected = a * math.cos(angle) - b * math.sin(angle)
            torch.testing.assert_close(turned[..., n, column], expected, **TIGHT)
            expected = b * math.cos(angle) + a * math.sin(angle)
            torch.testing.assert_close(turned[..., n, column + 2], expected, **TIGHT)
    torch.testing.assert_close(RotaryEmbedding(4)(x.transpose(0, 2), seq_dim=0).transpose(0, 2), RotaryEmbedding(4)(x))


def test_rotary_embedding_of_no_rows() -> None:
    for shape in ((2, 3, 0, 4), (0, 3, 5, 4)):
        assert RotaryEmbedding(4)(randn(*shape)).shape == shape
    positions = torch.tensor([7, 2])
    assert RotaryEmbedding(4)(randn(2, 0, 3, 4), seq_dim=1, offset=positions).shape == (2, 0, 3, 4)
    assert RotaryEmbedding(4)(randn(0, 2, 3, 4), seq_dim=0, offset=positions).shape == (0, 2, 3, 4)


@pytest.mark.parametrize("options", [{"rotary": True}, {"rotary": 50.0, "num_kv_heads": 1}], ids=["plain", "gqa"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_rotary_attention_equals_the_formula(options: dict[str, Any], batch_first: bool) -> None:
    ours = FusedMultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64, **options)
    x = randn(N, L, E)
    out, weights = ours(*(x if batch_first else x.transpose(0, 1),) * 3, average_attn_weights=False)
    kv_dim = ours.num_kv_heads * ours.head_dim
    q, k, v = (
        y.unflatten(-1, (-1, ours.head_dim)).transpose(1, 2)
        for y in nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).split((E, kv_dim, kv_dim), -1)
    )
    turn = RotaryEmbedding(ours.head_dim, ours.rotary.base)
    k, v = (y.repeat_interleave(H // ours.num_kv_heads, dim=1) for y in (turn(k), v))
    expected_weights = (turn(q) @ k.mT / math.sqrt(ours.head_dim)).softmax(-1)
    expected = ours.out_proj((expected_weights @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(weights, expected_weights, **TIGHT)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected, **TIGHT)


def test_rotary_embedding_keeps_the_precision_of_large_positions_in_a_half_model() -> None:
    ours = FusedMultiheadAttention(E, H, rotary=True).to(torch.bfloat16)
    x = torch.ones(1, 1, 1, ours.head_dim)
    exact = ours.rotary(x, offset=4097)
    torch.testing.assert_close(ours.rotary(x.bfloat16(), offset=4097), exact.bfloat16(), rtol=0, atol=0)


def random_t5_bias(**options: Any) -> T5RelativeBias:
    bias = T5RelativeBias(8, H, max_distance=6, dtype=torch.float64, **options)
    nn.init.normal_(bias.weight)
    return bias


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_relative_bias_equals_a_dense_mask(bidirectional: bool) -> None:
    bias = random_t5_bias(bidirectional=bidirectional)
    ours, theirs = pair(**FIRST)
    ours.relative_bias = bias
    x = CROSS()
    distance = torch.arange(S) - torch.arange(L)[:, None]
    dense = bias(L, S)[:, distance + L - 1]  # (H, L, S)
    results = ours(*x, key_padding_mask=PADDING, average_attn_weights=False)
    expected = theirs(*x, attn_mask=dense.repeat(N, 1, 1), key_padding_mask=added(PADDING), average_attn_weights=False)
    for mine, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, reference, **TIGHT)
    grads = [torch.autograd.grad(y[0].cos().sum() + y[1].sin().sum(), bias.weight)[0] for y in (results, expected)]
    torch.testing.assert_close(*grads, **TIGHT)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (torch.zeros(1, H), {}, ValueError, "table: expected at least 4 buckets with bidirectional=True, got 1"),
        (torch.zeros(3, H), {}, ValueError, "table: expected at least 4 buckets with bidirectional=True, got 3"),
        (torch.zeros(1, H), {"bidirectional": False}, ValueError, "at least 2 buckets with bidirectional=False, got 1"),
        (torch.zeros(32, H), {"max_distance": 8}, ValueError, "max_distance: expected more than 8, .*, got 8"),
        ([[0.0]], {}, TypeError, "table: expected a tensor, got list"),
    ],
)
def test_bad_tables_of_t5_raise(table: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        t5_relative_bias(table, 5, 6, **options)
    if isinstance(table, Tensor):
        with pytest.raises(error, match=message.replace("table", "num_buckets")):
            T5RelativeBias(*table.shape, **options)


def test_the_smallest_tables_of_t5_and_empty_biases() -> None:
    for num_buckets, bidirectional in ((4, True), (5, True), (2, False), (3, False)):
        bias = t5_relative_bias(torch.randn(num_buckets, H), 9, 7, bidirectional, max_distance=2)
        assert bias.shape == (H, 15)
    assert t5_relative_bias(torch.randn(32, H), 0, 0).shape == alibi_bias(torch.ones(H), 0, 0).shape == (H, 0)
    with pytest.raises(TypeError, match="slopes: expected a tensor, got float"):
        alibi_bias(0.5, 2, 2)
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        T5RelativeBias(32, 0)
    with pytest.raises(ValueError, match="num_buckets: expected at least 4"):
        T5RelativeBias(0, H)


def test_relative_bias_is_a_submodule_and_any_callable() -> None:
    shared = T5RelativeBias(8, H)
    module = FusedMultiheadAttention(E, H, relative_bias=shared)
    assert "relative_bias.weight" in module.state_dict()
    x = torch.randn(L, N, E)
    plain = FusedMultiheadAttention(E, H, relative_bias=lambda seqlen_q, seqlen_k: torch.zeros(seqlen_q + seqlen_k - 1))
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "relative_bias.weight"}, strict=True)
    for mine, reference in zip(module(x, x, x), plain(x, x, x), strict=True):
        torch.testing.assert_close(mine, reference)


# ---- caches


@pytest.mark.quick
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (3, 1, 1), (2, 3)], ids=["by one", "prefill", "in chunks"])
@pytest.mark.parametrize("kind", ["plain", "rotary and gqa", "relative bias", "sequence first", "padding"])
def test_cached_self_attention_equals_causal_attention(kind: str, chunks: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"batch_first": kind != "sequence first"}
    if kind == "rotary and gqa":
        options |= {"rotary": True, "num_kv_heads": 1}
    if kind == "relative bias":
        options["relative_bias"] = random_t5_bias(bidirectional=False)
    ours = FusedMultiheadAttention(E, H, dtype=torch.float64, **options).eval()
    x = randn(N, 5, E, requires_grad=False)
    seq_dim = 1 if options["batch_first"] else 0
    x = x if options["batch_first"] else x.transpose(0, 1)
    left_padded = padding(0, 2, 1, longest=5).logical_not() if kind == "padding" else None
    if left_padded is not None:
        left_padded[0] = False
    expected, expected_weights = ours(x, x, x, attn_mask=causal(5), key_padding_mask=left_padded)
    cache, start, outputs = SelfAttentionCache(), 0, []
    for rows in chunks:
        new = x.narrow(seq_dim, start, rows)
        so_far = None if left_padded is None else left_padded[:, : start + rows]
        out, weights = ours(new, new, new, key_padding_mask=so_far, cache=cache)
        torch.testing.assert_close(weights, expected_weights[:, start : start + rows, : start + rows], **TIGHT)
        outputs.append(out)
        start += rows
    assert cache.length == 5
    torch.testing.assert_close(torch.cat(outputs, dim=seq_dim), expected, **TIGHT)


def test_static_cache_projects_the_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"kdim": 3, "vdim": 7}):
        ours = FusedMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
        key, value = randn(N, S, options.get("kdim", E)), randn(N, S, options.get("vdim", E))
        queries = [randn(N, L, E) for _ in range(2)]
        expected = [ours(query, key, value, key_padding_mask=PADDING)[0] for query in queries]
        cache = CrossAttentionCache()
        torch.testing.assert_close(ours(queries[0], key, value, PADDING, cache=cache)[0], expected[0], **TIGHT)
        stored = cache.get()
        with torch.no_grad():
            for weight in (ours.k_proj_weight, ours.v_proj_weight) if options else (ours.in_proj_weight[E:],):
                weight.fill_(float("nan"))
        out, _ = ours(queries[1], key, value, PADDING, cache=cache)
        torch.testing.assert_close(out, expected[1], **TIGHT)
        assert cache.get() is stored
        with pytest.raises(ValueError, match="memory: expected the one"):
            ours(queries[1], key + 1, value, PADDING, cache=cache)


def test_caches_that_do_not_fit_raise() -> None:
    x = torch.randn(N, L, E)
    with pytest.raises(TypeError, match=r"cache: expected a layer's cache such as .*, got KVCache"):
        FusedMultiheadAttention(E, H, batch_first=True)(x, x, x, cache=KVCache(1))
    with pytest.raises(ValueError, match="cache"):
        FusedMultiheadAttention(E, H, batch_first=True, add_zero_attn=True)(x, x, x, cache=SelfAttentionCache())
    with pytest.raises(ValueError, match="cache"):
        FusedMultiheadAttention(E, H, batch_first=True, rotary=True)(x, x, x, cache=CrossAttentionCache())
    with pytest.raises(ValueError, match="attn_mask"):
        FusedMultiheadAttention(E, H, batch_first=True)(x, x, x, attn_mask=causal(L), cache=SelfAttentionCache())


# ---- dtypes, devices, copies, hooks, compilation


def test_sizes_and_device_arguments() -> None:
    ours = FusedMultiheadAttention(E, H, device="meta", dtype=torch.bfloat16, num_kv_heads=1)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in ours.parameters())
    assert ours.in_proj_weight.shape == (E + 2 * E // H, E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    ours, _ = pair(**FIRST)
    x = randn(N, L, E, requires_grad=False)
    expected = ours(x, x, x, attn_mask=causal(L))
    results = ours.to(dtype)(*(x.to(dtype),) * 3, attn_mask=causal(L))
    for mine, reference in zip(results, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), reference, rtol=0.05, atol=0.05)


def test_autocast_dtypes_equal_torch() -> None:
    x = torch.randn(N, L, E)
    for options in (FIRST, APPENDED):
        ours, theirs = FusedMultiheadAttention(E, H, **options), nn.MultiheadAttention(E, H, **options)
        ours.load_state_dict(theirs.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            results, expected = ours(x, x, x), theirs(x, x, x)
        for mine, reference in zip(results, expected, strict=True):
            assert mine.dtype == reference.dtype
            torch.testing.assert_close(mine, reference, rtol=0.05, atol=0.05)
        results[0].sum().backward()
        assert ours.in_proj_weight.grad.dtype == torch.float32


def test_copies_and_pickles() -> None:
    ours = FusedMultiheadAttention(
        E, H, 0.1, num_kv_heads=1, rotary=True, relative_bias=T5RelativeBias(8, H), backend="reference"
    ).eval()
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert (twin.backend, twin.rotary.base, twin.num_kv_heads) == ("reference", 10000.0, 1)
        for mine, reference in zip(twin(x, x, x), expected, strict=True):
            assert torch.equal(mine, reference)


def test_backend_is_passed_on() -> None:
    x = torch.randn(L, N, E)
    ours = FusedMultiheadAttention(E, H)
    ours.backend = "no such backend"
    with pytest.raises((ValueError, RuntimeError), match="no such backend"):
        ours(x, x, x)


def test_hooks_run() -> None:
    ours, seen = FusedMultiheadAttention(E, H), []
    ours.register_forward_hook(lambda *_: seen.append("module"))
    ours.out_proj.register_forward_hook(lambda *_: seen.append("out_proj"))
    x = torch.randn(L, N, E)
    with torch.no_grad():
        ours.eval()(x, x, x)
    assert seen == ["out_proj", "module"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding and hint", "weights and dropout-free masks", "new options"])
def test_compiles_to_one_graph(kind: str) -> None:
    new = {"rotary": True, "num_kv_heads": 1, "relative_bias": T5RelativeBias(8, H)} if kind == "new options" else {}
    ours = FusedMultiheadAttention(E, H, batch_first=True, **new)
    arguments: dict[str, Any] = {
        "padding and hint": {
            "key_padding_mask": padding(4, 2, 3, longest=L), "attn_mask": causal(L), "is_causal": True,
            "need_weights": False,
        },
        "weights and dropout-free masks": {"attn_mask": causal(L)},
        "new options": {"key_padding_mask": padding(4, 2, 3, longest=L)},
    }[kind]  # fmt: skip
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, L, E)
    grads = []
    for module in (ours, compiled):
        ours.zero_grad()
        out, weights = module(x, x, x, **arguments)
        (out.cos().sum() + (0 if weights is None else weights.sin().sum())).backward()
        grads.append([out.detach(), *(p.grad.clone() for p in ours.parameters())])
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)
