"""Attention in parts: merged parts are the whole, with all masks, biases and dropout bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_attn import fused_attention, fused_attention_varlen
from fused_attn.attention.inputs import Gradients, Wanted
from fused_attn.partial import PackedRows, attention_partial, attention_partial_backward, join_sinks, merge

CUTS = ((0, 12), (12, 39), (39, 53))  # 39: within a group of four keys, which dropout draws at once

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window and softcap": {"window_size": (11, 4), "softcap": 2.0},
    "relative bias": {"is_causal": True, "relative_bias": (4, 105)},
    "shared relative bias": {"relative_bias": (105,)},
    "padding": {"key_padding_mask": (2, 53)},
    "large logits": {"is_causal": True, "scale": 4.0},  # kernels correct the rounding of a large lse of whole rows
    "dropout": {"dropout_p": 0.4, "dropout_seed": 11, "is_causal": True},
}


def problem(case: str, generator: torch.Generator):
    """(query, key, value, options of the whole call). All keys of the second part are padding in batch entry 1."""
    query, key, value = (
        torch.randn(2, heads, 53, 16, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    options = {"enable_gqa": True, **CASES[case]}
    if "relative_bias" in options:
        shape = options["relative_bias"]
        options["relative_bias"] = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    if "key_padding_mask" in options:
        padding = torch.rand(2, 53, generator=generator) < 0.3
        padding[1, slice(*CUTS[1])] = True
        options["key_padding_mask"] = padding
    return query, key, value, options


def options_of_part(options: dict, queries: tuple[int, int], keys: tuple[int, int]) -> dict:
    part = {**options, "query_offset": queries[0], "key_offset": keys[0]}
    if "key_padding_mask" in options:
        part["key_padding_mask"] = options["key_padding_mask"][:, slice(*keys)]
    return part


def in_parts(query, key, value, options, backend=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of all queries, computed by one call for each pair of cuts."""
    rows = []
    for queries in CUTS:
        parts = [
            attention_partial(
                query[:, :, slice(*queries)], key[:, :, slice(*keys)], value[:, :, slice(*keys)],
                backend=backend, **options_of_part(options, queries, keys),
            )
            for keys in CUTS
        ]  # fmt: skip
        rows.append(merge(*zip(*parts, strict=True)))
    out, lse = zip(*rows, strict=True)
    return torch.cat(out, 2), torch.cat(lse, 2)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_merged_parts_are_the_whole(case: str, backend: str, generator: torch.Generator) -> None:
    query, key, value, options = problem(case, generator)
    whole, whole_lse = fused_attention(query, key, value, return_lse=True, backend=backend, **options)
    out, lse = in_parts(query, key, value, options, backend)
    close(out, whole)
    close(lse, whole_lse)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    inputs = [query, key, value, *([options["relative_bias"]] if "relative_bias" in options else [])]
    expected = torch.autograd.grad((whole * weight).sum() + whole_lse.sum(), inputs)
    found = torch.autograd.grad((out * weight).sum() + lse.sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_backward_of_the_parts_adds_up(case: str, backend: str, generator: torch.Generator) -> None:
    query, key, value, options = problem(case, generator)
    whole, whole_lse = fused_attention(query, key, value, return_lse=True, backend=backend, **options)
    dout = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    dlse = torch.randn(whole_lse.shape, dtype=torch.float64, generator=generator)
    bias = options.get("relative_bias")
    inputs = [x for x in (query, key, value, bias) if x is not None]
    expected = torch.autograd.grad((whole * dout).sum() + (whole_lse * dlse).sum(), inputs)
    sums = [torch.zeros_like(x) for x in inputs]
    for queries, keys in itertools.product(CUTS, CUTS):
        rows, columns = slice(*queries), slice(*keys)
        attention_partial_backward(
            dout[:, :, rows], query[:, :, rows], key[:, :, columns], value[:, :, columns],
            whole[:, :, rows].detach(), whole_lse[:, :, rows].detach(), dlse=dlse[:, :, rows], backend=backend,
            into=Gradients(
                sums[0][:, :, rows], sums[1][:, :, columns], sums[2][:, :, columns],
                relative_bias=None if bias is None else sums[3],
            ),
            **options_of_part(options, queries, keys),
        )  # fmt: skip
    for a, b in zip(sums, expected, strict=True):
        close(a, b)


def test_sinks_join_once(backend: str, generator: torch.Generator) -> None:
    query, key, value, options = problem("causal", generator)
    sinks = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    whole, whole_lse = fused_attention(query, key, value, sinks=sinks, return_lse=True, backend=backend, **options)
    out, lse = join_sinks(*in_parts(query, key, value, options, backend), sinks)
    close(out, whole)
    close(lse, whole_lse)
    (expected,) = torch.autograd.grad(whole.square().sum() + whole_lse.sum(), sinks)
    (found,) = torch.autograd.grad(out.square().sum() + lse.sum(), sinks)
    close(found, expected)


@pytest.mark.quick
def test_dropout_of_a_part_is_that_of_the_whole(backend: str) -> None:
    """With one-hot values, the outputs are the weights. Batch entries, heads, queries and keys begin anywhere."""
    whole = torch.zeros(3, 4, 30, 1, dtype=torch.float64)
    keys, values = torch.zeros(3, 4, 45, 1, dtype=torch.float64), torch.eye(45, dtype=torch.float64)
    drops = {"dropout_p": 0.5, "dropout_seed": 3, "backend": backend}
    bits = fused_attention(whole, keys, values.expand(3, 4, -1, -1), **drops) != 0
    part, _ = attention_partial(
        whole[1:, 2:, 7:20], keys[1:, 2:, 9:], values[9:].expand(2, 2, -1, -1),
        batch_offset=1, head_offset=2, query_offset=7, key_offset=9, **drops,
    )  # fmt: skip
    assert torch.equal(part[..., 9:] != 0, bits[1:, 2:, 7:20, 9:])


def test_operator_keeps_the_offsets(generator: torch.Generator) -> None:
    """torch.compile and dispatch modes see a registered operator, which gets the offsets as numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value, options = problem("dropout", generator)
    call = {**options, "query_offset": 8, "key_offset": 4}
    expected, _ = attention_partial(query, key, value, **call)
    with FlopCounterMode(display=False):
        found, _ = attention_partial(query, key, value, **call)
    assert torch.equal(found, expected)


def test_half_precision_returns_float32(generator: torch.Generator) -> None:
    query = torch.randn(1, 2, 8, 16, generator=generator).bfloat16()
    out, lse = attention_partial(query, query, query)
    assert out.dtype == lse.dtype == torch.float32
    grads = attention_partial_backward(out, query, query, query, out, lse)
    assert {x.dtype for x in grads if x is not None} == {torch.float32}


def test_a_part_without_scores_uses_no_column(backend: str) -> None:
    """The columns of a part that is empty on one side may begin behind the last one."""
    x, bias = torch.randn(1, 2, 4, 8), torch.randn(3)
    out, lse = attention_partial(
        x[:, :, :0], x[:, :, :0], x[:, :, :0], relative_bias=bias, seqlen_q=4, backend=backend
    )  # fmt: skip
    assert out.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)


def test_rows_without_keys(generator: torch.Generator) -> None:
    outs, lses = torch.zeros(2, 1, 1, 2, 4), torch.full((2, 1, 1, 2), float("-inf"))
    lses[0, 0, 0, 1] = 3.0
    outs[0, 0, 0, 1] = 5.0
    leaves = outs.requires_grad_(), lses.requires_grad_()
    out, lse = merge(list(leaves[0]), list(leaves[1]))
    assert lse[0, 0].tolist() == [float("-inf"), 3.0]
    assert out[0, 0].tolist() == [[0.0] * 4, [5.0] * 4]
    grads = torch.autograd.grad(out.sum() + lse[0, 0, 1], leaves)
    assert all(grad.isfinite().all() for grad in grads)
    out, lse = join_sinks(out.detach(), lse.detach(), torch.tensor([3.0]))
    assert lse[0, 0, 0] == float("-inf")
    assert out[0, 0].tolist() == [[0.0] * 4, [2.5] * 4]


def test_keys_within_a_group_of_dropout(backend: str, generator: torch.Generator) -> None:
    """Hidden keys are put in front of such a part. Masks and their gradients are those of the true keys."""
    query, key, value, options = problem("dropout", generator)
    bias = torch.randn(1, 4, 53, 53, dtype=torch.float64, generator=generator, requires_grad=True)
    row_bias = torch.randn(53, 1, dtype=torch.float64, generator=generator, requires_grad=True)
    padding = torch.randn(2, 53, dtype=torch.float64, generator=generator, requires_grad=True)
    for mask in (bias, row_bias):
        masks = {"attn_mask": mask, "key_padding_mask": padding}
        whole, whole_lse = fused_attention(query, key, value, return_lse=True, backend=backend, **options, **masks)
        dout = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
        expected = torch.autograd.grad(whole, (key, value, mask, padding), dout)
        sums = [torch.zeros_like(x) for x in (key, value, mask, padding)]
        for keys in CUTS:
            columns, is_dense = slice(*keys), mask is bias
            own = mask[..., columns] if is_dense else mask
            attention_partial_backward(
                dout, query, key[:, :, columns], value[:, :, columns], whole.detach(), whole_lse.detach(),
                into=Gradients(
                    key=sums[0][:, :, columns], value=sums[1][:, :, columns], key_bias=sums[3][:, columns],
                    bias=sums[2][..., columns] if is_dense else sums[2][None, None],
                ),
                attn_mask=own, key_padding_mask=padding[:, columns], key_offset=keys[0], backend=backend, **options,
            )  # fmt: skip
        for a, b in zip(sums, expected, strict=True):
            close(a, b)


def test_packed_rows_of_a_part(backend: str, generator: torch.Generator) -> None:
    """The last documents of a packed batch, in a call of their own."""
    offsets = torch.tensor([0, 9, 9, 30, 44], dtype=torch.int32)
    query, key, value = torch.randn(3, 44, 2, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(2, 41, dtype=torch.float64, generator=generator, requires_grad=True)
    options = {"is_causal": True, "dropout_p": 0.3, "dropout_seed": 7, "backend": backend, "relative_bias": bias}
    out, lse = fused_attention_varlen(query, key, value, offsets, offsets, 21, 21, return_lse=True, **options)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    dout[:9] = 0.0  # the other documents
    expected = torch.autograd.grad(out, (query, key, value, bias), dout)
    packed = PackedRows(offsets[2:] - 9, offsets[2:] - 9, 21, 21)
    part = [x[9:].transpose(0, 1)[None] for x in (query, key, value)]
    more = {**options, "packed": packed, "batch_offset": 2, "seqlen_q": 21}
    part_out, part_lse = attention_partial(*part, **more)
    close(part_out[0].transpose(0, 1), out[9:])
    close(part_lse[0], lse[:, 9:])
    found = attention_partial_backward(dout[9:].transpose(0, 1)[None], *part, part_out, part_lse, **more)
    for dx, x in zip((found.query, found.key, found.value), expected, strict=False):
        close(dx[0].transpose(0, 1), x[9:])
    close(found.relative_bias, expected[3])


def test_wanted_gradients(backend: str, generator: torch.Generator) -> None:
    query, key, value, options = problem("relative bias", generator)
    out, lse = attention_partial(query, key, value, backend=backend, **options)
    call = (torch.ones_like(out), query, key, value, out.detach(), lse.detach())
    everything = attention_partial_backward(*call, backend=backend, **options)
    some = attention_partial_backward(*call, backend=backend, wanted=Wanted(key=True, sinks=True), **options)
    assert [x is None for x in some] == [name != "key" for name in Gradients._fields]
    close(some.key, everything.key)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_offset": 4}, "query_offset: expected 0 with packed rows"),
        ({"key_padding_mask": torch.zeros(1, 3)}, "key_padding_mask: expected None with packed rows"),
        ({"offsets": [0, 2]}, "cu_seqlens_q: expected offsets that rise from 0 to the number of rows, 3"),
        ({"batch": 2}, "query: expected one batch entry with packed rows, got 2"),
    ],
)
def test_errors_of_packed_rows(options: dict, message: str) -> None:
    x = torch.zeros(options.pop("batch", 1), 2, 3, 8)
    offsets = torch.tensor(options.pop("offsets", [0, 3]), dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        attention_partial(x, x, x, packed=PackedRows(offsets, offsets, 3, 3), **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_offset": -1}, "query_offset: expected an int from 0 to 1073741823, got -1"),
        ({"batch_offset": 2**30}, "batch_offset: expected an int from 0 to 1073741823, got 1073741824"),
        ({"key_offset": 1.5}, "key_offset: expected an int from 0 to 1073741823, got 1.5"),
        ({"dropout_p": 0.5}, "dropout_seed: expected a seed, which all parts share, got None"),
        ({"relative_bias": torch.zeros(4)}, "seqlen_q: expected an int, as relative_bias has an even number"),
        ({"relative_bias": torch.zeros(5), "key_offset": 3}, "relative_bias: expected the L \\+ S - 1 columns"),
        ({"sinks": torch.zeros(2)}, "attention_partial: expected options among .*, got sinks"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        attention_partial(x, x, x, **options)


def test_merge_errors() -> None:
    with pytest.raises(ValueError, match="lses: expected one for each of the outs"):
        merge([torch.zeros(1, 1, 1, 1)], [])
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="lse: expected shape \\(1, 2, 3\\), got shape \\(1, 2\\)"):
        attention_partial_backward(x, x, x, x, x, torch.zeros(1, 2))
    lse = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"outs\[1\]: expected shape \(1, 2, 3, 8\), got shape \(1, 1, 3, 8\)"):
        merge([x, x[:, :1]], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[1\]: expected shape \(1, 2, 3\), got shape \(1, 1, 3\)"):
        merge([x, x], [lse, lse[:, :1]])
    with pytest.raises(ValueError, match=r"sinks: expected shape \(2,\), got shape \(1,\)"):
        join_sinks(x, lse, torch.zeros(1))


def test_results_of_packed_rows(generator: torch.Generator) -> None:
    """They are merged with lse.t(). The errors say so, also where a wrong result would have the right shape."""
    query, key, value = torch.randn(3, 7, 2, 8, generator=generator).unbind()
    offsets, sinks = torch.tensor([0, 3, 7], dtype=torch.int32), torch.randn(2, generator=generator)
    lengths = offsets, offsets, 4, 4
    out, lse = fused_attention_varlen(query, key, value, *lengths, return_lse=True)
    with pytest.raises(ValueError, match=r"lses\[0\]: .* got shape \(2, 7\) \(of packed rows, pass lse.t\(\)\)"):
        merge([out], [lse])
    merged, merged_lse = merge([out], [lse.t()])
    torch.testing.assert_close(merged, out)
    for rows in (slice(None), slice(2)):  # two rows of two heads
        with pytest.raises(ValueError, match=r"out: .* \(of packed rows, pass out.transpose\(0, 1\)\[None\]"):
            join_sinks(merged[rows], merged_lse[rows], sinks)
    out = merged.transpose(0, 1)[None]
    with pytest.raises(ValueError, match=r"lse: .* \(pass lse as \(1, H, total\), too\)"):
        join_sinks(out, merged_lse[None], sinks)
    joined, joined_lse = join_sinks(out, merged_lse.t()[None], sinks)
    wanted, wanted_lse = fused_attention_varlen(query, key, value, *lengths, sinks=sinks, return_lse=True)
    torch.testing.assert_close(joined[0].transpose(0, 1), wanted)
    torch.testing.assert_close(joined_lse[0], wanted_lse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wanted": (True,)}, "wanted: expected None or Wanted, got tuple"),
        ({"into": 3}, "into: expected None or Gradients, got int"),
        ({"into": Gradients(key=torch.zeros(3, 2, 3, 8))}, r"into\.key: expected shape \(1, 2, 3, 8\), got shape"),
        (
            {"into": Gradients(relative_bias=torch.zeros(5)), "relative_bias": torch.zeros(2, 5)},
            r"into\.relative_bias: expected shape \(2, 5\), got shape \(5,\)",
        ),
    ],
)
def test_errors_of_backward(options: dict, message: str) -> None:
    """A flag or a sum that does not fit must not be dropped or broadcast."""
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        attention_partial_backward(x, x, x, x, x, torch.zeros(1, 2, 3), **options)


def test_backward_of_a_floating_point_padding_mask(backend: str, generator: torch.Generator) -> None:
    query, key, value, options = problem("causal", generator)
    padding = torch.randn(2, 53, dtype=torch.float64, generator=generator, requires_grad=True)
    out, lse = attention_partial(query, key, value, key_padding_mask=padding, backend=backend, **options)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(out, padding, dout)
    found = attention_partial_backward(
        dout, query, key, value, out.detach(), lse.detach(), key_padding_mask=padding, backend=backend, **options
    )
    close(found.key_bias, expected)
