"""A call with nested tensors (layout=torch.jagged) gives what calls with the single sequences give."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, TransformerEncoderLayer, explain, fused_attention, t5_relative_bias
from fused_attn.attention import jagged

LENGTHS, OTHER_LENGTHS = (5, 1, 0, 9), (3, 4, 2, 7)
HEADS, HEAD_DIM, EMBED_DIM = 4, 8, 32

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested")


def nested(generator: torch.Generator, lengths: tuple[int, ...], *sizes: int, like: Tensor | None = None) -> Tensor:
    """A nested tensor (B, length, *sizes). Its attribute ``rows`` is the leaf that its values are made of.

    like: a nested tensor whose offsets the new one shares.
    """
    rows = torch.randn(sum(lengths), *sizes, generator=generator, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    x = torch.nested.nested_tensor_from_jagged(rows, offsets)
    x.rows = rows
    return x


def heads(x: Tensor) -> Tensor:
    """Turns (B, length, H, D) into (B, H, length, D), as attention wants it."""
    return x.transpose(1, 2)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window-softcap": {"window_size": (2, 1), "softcap": 3.0, "scale": 0.5},
    "relative-bias": {"relative_bias": True},
    "sinks": {"sinks": True},
    "gqa": {"enable_gqa": True},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_by_itself(name: str, backend: str, generator: torch.Generator) -> None:
    options = OPTIONS[name] | {"backend": backend}
    kv_heads = 2 if options.get("enable_gqa") else HEADS
    query = nested(generator, LENGTHS, HEADS, HEAD_DIM)
    key = nested(generator, OTHER_LENGTHS, kv_heads, HEAD_DIM)
    value = nested(generator, OTHER_LENGTHS, kv_heads, 6, like=key)
    table = torch.randn(8, HEADS, generator=generator, dtype=torch.float64, requires_grad=True)
    learned = [query.rows, key.rows, value.rows]
    if "sinks" in options:
        options["sinks"] = table[0]
        learned.append(table)
    if "relative_bias" in options:
        learned.append(table)

    def with_bias(seqlen_q: int, seqlen_k: int) -> dict:
        bias = {"relative_bias": t5_relative_bias(table, seqlen_q, seqlen_k)} if "relative_bias" in options else {}
        return options | bias

    out, lse = fused_attention(
        heads(query), heads(key), heads(value), return_lse=True, **with_bias(max(LENGTHS), max(OTHER_LENGTHS))
    )
    assert out.shape == (*heads(query).shape[:3], 6) and lse.shape == heads(query).shape[:3]

    singles = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
    expected = [
        fused_attention(*(x.transpose(0, 1)[None] for x in qkv), return_lse=True, **with_bias(len(qkv[0]), len(qkv[1])))
        for qkv in singles
    ]
    dout = torch.randn(sum(LENGTHS), HEADS, 6, generator=generator, dtype=torch.float64)
    found = out.transpose(1, 2).values(), lse.transpose(1, 2).values()
    expected = torch.cat([o[0].transpose(0, 1) for o, _ in expected]), torch.cat([x[0].t() for _, x in expected])
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((o * dout).sum() + x.sum(), learned, retain_graph=True) for o, x in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_the_result_has_the_lengths_of_the_query(generator: torch.Generator) -> None:
    """torch adds query and result, because they share one offsets tensor.

    It refuses to add other tensors of equal lengths.
    """
    query, key = nested(generator, LENGTHS, HEADS, HEAD_DIM), nested(generator, OTHER_LENGTHS, HEADS, HEAD_DIM)
    out = heads(query) + fused_attention(heads(query), heads(key), heads(key))
    assert [len(x) for x in out.transpose(1, 2).unbind()] == list(LENGTHS)


@pytest.mark.quick
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "num_kv_heads": 2},
        {"kdim": 6, "vdim": 10},
        {"relative_bias": lambda seqlen_q, seqlen_k: torch.arange(seqlen_q + seqlen_k - 1.0).double() / 9},
    ],
    ids=["plain", "gqa", "kdim-vdim", "relative-bias"],
)
def test_module(options: dict, is_causal: bool, backend: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    module = FusedMultiheadAttention(
        EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, backend=backend, **options
    )
    query = nested(generator, LENGTHS, EMBED_DIM)
    key = query
    if options.get("relative_bias") is None:
        key = nested(generator, OTHER_LENGTHS, options.get("kdim", EMBED_DIM))
    value = nested(generator, OTHER_LENGTHS, options["vdim"], like=key) if "vdim" in options else key
    out, weights = module(query, key, value, need_weights=False, is_causal=is_causal)
    assert weights is None and out.shape == query.shape

    expected = []
    for q, k, v in zip(query.unbind(), key.unbind(), value.unbind(), strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).triu(1) if is_causal else None
        if options.get("relative_bias"):
            # The table of biases is made for the longest sequence. A shorter sequence uses the middle of the table.
            bias = options["relative_bias"](max(LENGTHS), max(LENGTHS))
            distance = torch.arange(len(k)) - torch.arange(len(q))[:, None]
            bias = bias[distance + max(LENGTHS) - 1]
            mask = bias if mask is None else bias.masked_fill(mask, float("-inf"))
            module.relative_bias = None
        expected.append(module(q[None], k[None], v[None], need_weights=False, attn_mask=mask)[0][0])
    expected = torch.cat(expected)
    torch.testing.assert_close(out.values(), expected)
    inputs = [query.rows, key.rows, *module.parameters()]
    gradients = [torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (out.values(), expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.quick
@pytest.mark.parametrize("offsets_dtype", [torch.int64, torch.int32])
def test_key_and_value_made_separately(offsets_dtype: torch.dtype, generator: torch.Generator) -> None:
    """torch's SDPA takes them, too: their offsets are equal, although they are not one tensor."""
    query, key = (nested(generator, lengths, HEADS, HEAD_DIM) for lengths in (LENGTHS, OTHER_LENGTHS))
    value = nested(generator, OTHER_LENGTHS, HEADS, HEAD_DIM, like=key)
    other = torch.nested.nested_tensor_from_jagged(value.rows, key.offsets().to(offsets_dtype, copy=True))
    leaves = query.rows, key.rows, value.rows
    expected, found = (heads(fused_attention(heads(query), heads(key), heads(x))).values() for x in (value, other))
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*gradients)

    module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64)
    expected, found = (
        module(*(y.flatten(-2) for y in (query, key, x)), need_weights=False)[0].values() for x in (value, other)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_code_needs_the_offsets_of_key(compiler: str, generator: torch.Generator) -> None:
    """Nothing can be read in compiled code. The error says how to make the value, which works."""
    torch.compiler.reset()
    query, key, value = (nested(generator, LENGTHS, HEADS, HEAD_DIM).detach() for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return heads(fused_attention(heads(query), heads(key), heads(value)))

    compiled = torch.compile(attend, backend=compiler, fullgraph=True)
    advice = r"torch\.nested\.nested_tensor_from_jagged\(rows, key\.offsets\(\)\)"
    with pytest.raises(Exception, match=f"value: expected the offsets tensor of key.*{advice}"):
        compiled(query, key, value)
    shared = torch.nested.nested_tensor_from_jagged(value.values(), key.offsets())
    torch.testing.assert_close(compiled(query, key, shared).values(), attend(query, key, value).values())


def test_a_comparison_that_waits_warns_once(monkeypatch, generator: torch.Generator, recwarn) -> None:
    query, key, value = (nested(generator, LENGTHS, HEADS, HEAD_DIM) for _ in range(3))
    jagged.pack_all(query, key, value, length_dim=1)
    assert not recwarn, "a CPU does not wait"
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on a device
    jagged._warn_of_waiting.cache_clear()
    with pytest.warns(UserWarning, match="waits for the device.*nested_tensor_from_jagged"):
        jagged.pack_all(query, key, value, length_dim=1)
    jagged.pack_all(query, key, value, length_dim=1)
    assert not recwarn


def test_an_encoder_layer_trains_on_nested_tensors(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = nested(generator, LENGTHS, EMBED_DIM)
    out = layer(x).values()
    expected = torch.cat([layer(row[None])[0] for row in x.unbind()])
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str, backend: str, generator: torch.Generator) -> None:
    torch.compiler.reset()
    module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, backend=backend)

    def block(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False, is_causal=True)[0] + x

    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    for lengths in (LENGTHS, OTHER_LENGTHS):
        x = nested(generator, lengths, EMBED_DIM).detach()
        expected = block(x)
        found = compiled(x)
        torch.testing.assert_close(found.values(), expected.values())
        gradients = [
            torch.autograd.grad(y.values().square().sum(), list(module.parameters())) for y in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("sizes", [(HEADS,), ()], ids=["each-head", "all-heads"])
def test_compile_with_a_bias_from_outside(sizes: tuple, compiler: str, generator: torch.Generator) -> None:
    """Compiled code knows only the number of all rows, so the bias is made for that many rows."""
    torch.compiler.reset()

    def attend(x: Tensor, bias: Tensor) -> Tensor:
        return heads(fused_attention(heads(x), heads(x), heads(x), relative_bias=bias))

    compiled = torch.compile(attend, backend=compiler, fullgraph=True)
    for lengths in (LENGTHS, OTHER_LENGTHS):
        x = nested(generator, lengths, HEADS, HEAD_DIM)
        total, longest = sum(lengths), max(lengths)
        bias = torch.randn(*sizes, 2 * total - 1, generator=generator, dtype=torch.float64, requires_grad=True)
        found = compiled(x, bias)
        expected = attend(x, bias[..., total - longest : total + longest - 1])
        torch.testing.assert_close(found.values(), expected.values())
        gradients = [torch.autograd.grad(y.values().square().sum(), (x.rows, bias)) for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_autocast_and_dropout(generator: torch.Generator) -> None:
    rows = torch.randn(sum(LENGTHS), HEADS, HEAD_DIM, generator=generator)
    x = heads(torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, *LENGTHS]).cumsum(0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_attention(x, x, x).dtype == torch.bfloat16
    first, second, third = (
        fused_attention(x, x, x, dropout_p=0.5, dropout_seed=seed).transpose(1, 2).values() for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.quick
def test_errors(generator: torch.Generator) -> None:
    x = nested(generator, LENGTHS, HEADS, HEAD_DIM)
    other, three = nested(generator, OTHER_LENGTHS, HEADS, HEAD_DIM), nested(generator, (5, 9, 2), HEADS, HEAD_DIM)
    no_heads, dense = nested(generator, LENGTHS, HEAD_DIM), torch.randn(4, HEADS, 9, HEAD_DIM)
    mask = torch.ones(4, 9, dtype=torch.bool)
    strided = torch.nested.nested_tensor([torch.randn(2, HEADS, HEAD_DIM), torch.randn(3, HEADS, HEAD_DIM)])
    for error, words, arguments in (
        (TypeError, "key: expected a nested tensor.*got a dense one", (heads(x), dense, heads(x))),
        (TypeError, "query: expected.*layout=torch.jagged", (strided,) * 3),
        (ValueError, "query: expected lengths that differ in dimension 2", (x, x, x)),
        (ValueError, "value: expected sequences as long as those of key", (heads(x), heads(x), heads(other))),
        (ValueError, "key: expected as many sequences as query, 4, got 3", (heads(x), heads(three), heads(three))),
        (ValueError, "value: expected as many sequences as query, 4, got 3", (heads(x), heads(x), heads(three))),
        (ValueError, "query: expected a nested tensor .B, heads, length, head dim", (no_heads,) * 3),
        (ValueError, "attn_mask: expected None with nested tensors", (*(heads(x),) * 3, mask)),
    ):
        with pytest.raises(error, match=words):
            fused_attention(*arguments)
    with pytest.raises(ValueError, match="key_padding_mask: expected None with nested tensors"):
        fused_attention(heads(x), heads(x), heads(x), key_padding_mask=mask)


def test_the_advice_about_gaps_works(generator: torch.Generator) -> None:
    module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    start, lengths = torch.zeros(3, dtype=torch.long), torch.tensor([2, 3, 4])

    def attend(query: Tensor) -> Tensor:
        return heads(fused_attention(query, query, query))

    def attend_by_module(query: Tensor) -> Tensor:
        return module(query, query, query, need_weights=False)[0]

    for call, sizes, length_dim, advice in (
        (attend, (HEADS, HEAD_DIM), 2, "query.transpose(1, 2).contiguous().transpose(1, 2)"),
        (attend_by_module, (EMBED_DIM,), 1, "query.contiguous()"),
    ):
        padded = torch.randn(3, 5, *sizes, generator=generator)
        query = torch.nested.narrow(padded, 1, start, lengths, layout=torch.jagged).transpose(1, length_dim)
        with pytest.raises(ValueError, match=f"query: expected sequences that follow.*{re.escape(advice)}$"):
            call(query)
        found = call(eval(advice, {"query": query})).unbind()
        for out, row, length in zip(found, padded, lengths, strict=True):
            torch.testing.assert_close(out, call(row[None, :length].transpose(1, length_dim))[0])


def test_explain_takes_none(generator: torch.Generator) -> None:
    x = heads(nested(generator, LENGTHS, HEADS, HEAD_DIM))
    with pytest.raises(ValueError, match="query, key and value: expected dense tensors for explain, got nested ones"):
        explain(x, x, value=x)


def test_errors_of_the_module(generator: torch.Generator) -> None:
    x = nested(generator, LENGTHS, EMBED_DIM).detach()
    module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64)
    for words, options in {
        "need_weights: expected False": {},
        "key_padding_mask: expected None": {"need_weights": False, "key_padding_mask": torch.zeros(4, 9)},
        "attn_mask: expected None": {"need_weights": False, "attn_mask": torch.zeros(9, 9)},
    }.items():
        with pytest.raises(ValueError, match=words):
            module(x, x, x, **options)
    for options in ({"batch_first": False}, {"add_zero_attn": True}, {"rotary": True}):
        module = FusedMultiheadAttention(EMBED_DIM, HEADS, **{"batch_first": True} | options)
        with pytest.raises(ValueError, match=f"query: expected a dense tensor.*{next(iter(options))}"):
            module(x, x, x, need_weights=False)
    with pytest.raises(ValueError, match="value: expected sequences as long as those of key, got other lengths"):
        module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64)
        module(x, x, nested(generator, OTHER_LENGTHS, EMBED_DIM), need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 0)], ids=["some", "none"])
def test_strided_sequences_of_no_rows(lengths: tuple[int, ...], generator: torch.Generator) -> None:
    module = FusedMultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64)
    rows = [torch.randn(n, EMBED_DIM, dtype=torch.float64, generator=generator) for n in lengths]
    x = torch.nested.as_nested_tensor(rows)
    for row, out in zip(rows, module(x, x, x, need_weights=False)[0].unbind(), strict=True):
        torch.testing.assert_close(out, module(row, row, row)[0], rtol=0, atol=1e-12)


def test_convert_attention_takes_them_too(generator: torch.Generator) -> None:
    from fused_attn import convert_attention

    module = convert_attention(nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64))
    x = nested(generator, LENGTHS, EMBED_DIM)
    assert module(x, x, x, need_weights=False)[0].shape == x.shape
