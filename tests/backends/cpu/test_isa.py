"""The C++ kernels of every instruction set that this build contains and that this machine can run."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import CASES
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import fused_attn

pytestmark = pytest.mark.usefixtures("poisoned")

_C = pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)

PREFIXES = ("head-dim-", "gqa-", "length-1", "lse-", "padding-nan", "dropout-", "varlen-c")
SUBSET = [
    case
    for case in CASES
    if case.is_quick or (case.id.startswith(PREFIXES) and case.seqlen_q * case.seqlen_k < 100_000)
]


# As few queries as decode_forward.h computes, up to its limit, and so many keys that it divides them into splits.
EVERYTHING = {
    "attn_mask": cases.float_mask("BHLS"),
    "key_padding_mask": cases.scattered_padding,
    "relative_bias": cases.per_head_bias,
    "sinks": cases.sink(),
    "options": {"softcap": 3.0, "window_size": (-1, 500)},
}
FEW_QUERIES = [
    cases.Case(f"few-queries-{seqlen_q}-{name}", heads=4, seqlen_q=seqlen_q, seqlen_k=1100, **sizes, **features)
    for seqlen_q in (1, 3, 6)
    for name, sizes, features in (
        ("everything", {"kv_heads": 2, "head_dim": 20, "value_dim": 36}, EVERYTHING),
        ("mask-per-head", {"kv_heads": 2, "head_dim": 64}, {"attn_mask": cases.bool_mask("BHLS", 0.4)}),
        ("lower-right", {"head_dim": 64, "value_dim": 80}, {"attn_mask": cases.lower_right}),
        ("wide", {"kv_heads": 2, "head_dim": 512, "value_dim": 320}, {}),
        (
            "far-below-its-sink",
            {"head_dim": 72},
            {"attn_mask": cases.float_mask("BHLS", offset=-1e4), "sinks": cases.sink(200.0)},
        ),
    )
] + [
    cases.Case(
        "few-queries-varlen", heads=4, kv_heads=1, head_dim=40, lengths_q=(1, 0, 3, 6), lengths_k=(1030, 7, 0, 520),
        options={"return_max": True},
    ),
    cases.Case(
        "few-queries-max-and-key-bias", heads=4, kv_heads=2, seqlen_q=3, seqlen_k=1100, head_dim=64,
        key_padding_mask=cases.float_padding, attn_mask=cases.empty_rows_mask, sinks=cases.sink(20.0),
        options={"return_max": True, "softcap": 5.0},
    ),
]  # fmt: skip

# Few queries that decode_backward.h computes: all of them with AVX-512, and those with up to two queries with any
# instruction set. There are up to nine blocks of keys, and windows whose keys do not fill a vector.
FEW_QUERIES_BACKWARD = [
    cases.Case(f"few-queries-backward-{seqlen_q}-{name}", **{"seqlen_q": seqlen_q, "seqlen_k": 300} | features)
    for seqlen_q in (1, 2, 4)
    for name, features in (
        ("plain", {"seqlen_k": 1100, "head_dim": 64}),
        ("wide", {"head_dim": 512, "value_dim": 320}),
        ("window", {"batch": 5, "seqlen_k": seqlen_q, "head_dim": 32, "has_dlse": True}),
        ("everything", {"heads": 4, "kv_heads": 2, "head_dim": 36, "value_dim": 68, "has_dlse": True} | EVERYTHING),
        ("mask-per-head", {"attn_mask": cases.bool_mask("BHLS", 0.4)}),
        ("mask-per-head-of-a-group", {"heads": 4, "kv_heads": 2, "attn_mask": cases.bool_mask("BHLS", 0.4)}),
        ("lower-right", {"attn_mask": cases.lower_right, "options": {"window_size": (7, 0)}}),
        ("bias-of-keys", {"attn_mask": cases.float_mask("111S")}),
        ("bias-of-queries", {"attn_mask": cases.float_mask("BHL1"), "sinks": cases.sink()}),
        ("bias-of-heads", {"attn_mask": cases.float_mask("1HLS"), "relative_bias": cases.shared_bias}),
        ("key-bias", {"key_padding_mask": cases.float_padding, "options": {"softcap": 5.0}}),
        ("empty-rows", {"seqlen_k": 6, "attn_mask": cases.empty_rows_mask, "has_dlse": True}),
        ("empty-rows-and-sinks", {"attn_mask": cases.empty_rows_mask, "sinks": cases.sink(20.0)}),
        ("nan-in-padding", {"key_padding_mask": cases.padding(171, 0), "edit": cases._nan_in_padding}),
        ("large-lse", {"has_dlse": True, "options": {"scale": 20.0}}),
        ("gqa-one-row", {"heads": 7, "kv_heads": 1, "query_layout": "blhd", "kv_layout": "blhd"}),
        ("no-gradient-of-keys", {"differentiated": ("query", "value")}),
    )
] + [
    cases.Case("few-queries-backward-varlen", heads=4, kv_heads=2, lengths_q=(2, 0, 1, 2), lengths_k=(300, 7, 0, 2),
               relative_bias=cases.per_head_bias, sinks=cases.sink()),
]  # fmt: skip

# A bias with an entry for each score, whose gradient is stored and not summed, in the dtype of the query; and such a
# bias that batch entries or heads share.
BIAS_OF_SCORES = [
    cases.Case(f"bias-{name}", **{"seqlen_q": 150, "seqlen_k": 171, "attn_mask": cases.float_mask("BHLS")} | features)
    for name, features in (
        ("plain", {}),
        ("odd", {"seqlen_q": 65, "seqlen_k": 33, "head_dim": 17}),
        ("causal", {"options": {"is_causal": True}}),
        ("window", {"options": {"window_size": (20, 3)}}),
        ("padded", {"key_padding_mask": cases.padding(171, 64)}),
        ("scattered-padding", {"key_padding_mask": cases.scattered_padding}),
        ("key-bias", {"key_padding_mask": cases.float_padding, "relative_bias": cases.per_head_bias}),
        ("softcap", {"options": {"softcap": 3.0}}),
        ("dropout", {"options": {"dropout_p": 0.2, "dropout_seed": 5}}),
        ("strided", {"attn_mask": cases.t5_strided_mask}),
        ("infinite", {"attn_mask": cases.float_mask_with(lambda dtype: -torch.inf, "BHLS")}),
        ("of-one-head", {"batch": 1, "attn_mask": cases.float_mask("11LS")}),
        ("of-one-query", {"seqlen_q": 1, "options": {"dropout_p": 0.2, "dropout_seed": 5}}),
        ("of-few-queries", {"seqlen_q": 2}),
        ("of-one-key", {"seqlen_k": 1}),
        ("without-dquery", {"differentiated": ("key", "value", "attn_mask"), "options": {"is_causal": True}}),
        ("chunks", {"batch": 1, "heads": 1, "seqlen_k": 700}),
        ("shared-by-batches", {"batch": 3, "attn_mask": cases.float_mask("1HLS")}),
        ("shared-by-heads", {"heads": 4, "kv_heads": 2, "attn_mask": cases.float_mask("B1LS")}),
    )
]  # fmt: skip

# Cases in which backward processes the keys in several slabs, because dK and dV of all keys do not fit into the cache.
SEVERAL_SLABS = [
    cases.Case("slabs", batch=1, seqlen_q=70, seqlen_k=600, head_dim=256),
    cases.Case("slabs-causal-gqa", batch=1, heads=4, kv_heads=2, seqlen_q=600, seqlen_k=600, head_dim=250,
               value_dim=256, options={"is_causal": True}),
    cases.Case("slabs-window-behind-the-first", batch=1, seqlen_q=40, seqlen_k=900, head_dim=256,
               attn_mask=cases.lower_right, options={"window_size": (100, 0)}),
    cases.Case("slabs-everything", batch=1, heads=4, seqlen_q=130, seqlen_k=600, head_dim=256, **EVERYTHING),
    cases.Case("slabs-large-lse", batch=1, seqlen_q=30, seqlen_k=600, head_dim=256, has_dlse=True,
               options={"scale": 20.0}),
    cases.Case("slabs-varlen", heads=2, head_dim=256, lengths_q=(50, 0, 20), lengths_k=(600, 300, 0)),
    cases.Case("slabs-wide", batch=1, seqlen_q=70, seqlen_k=300, head_dim=512),
]  # fmt: skip

# Cases in which a thread reuses copies of keys and values for other queries of the same head: interleaved rows of
# bfloat16 (SummedRows), and tiles of parts of float32 (CachedTiles).
MANY_QUERIES = [
    cases.Case(f"many-queries-{name}", **{"seqlen_q": 330, "seqlen_k": 300, "head_dim": 40} | features)
    for name, features in (
        ("causal", {"options": {"is_causal": True}}),
        ("odd-length", {"seqlen_k": 129, "head_dim": 17, "value_dim": 49}),
        ("few-left", {"seqlen_q": 66, "seqlen_k": 270}),
        ("dropout", {"options": {"dropout_p": 0.2, "dropout_seed": 5}}),
        ("everything", {"heads": 4, "has_dlse": True} | EVERYTHING),
        ("window", {"seqlen_k": 330, "options": {"window_size": (37, 20)}}),
        ("padded", {"key_padding_mask": cases.padding(171, 64), "options": {"is_causal": True}}),
        ("scattered-padding", {"key_padding_mask": cases.scattered_padding}),
        ("mask-per-head", {"attn_mask": cases.bool_mask("BHLS", 0.4)}),
        ("heads-of-one", {"kv_layout": "one_head_expanded"}),
        ("batches-of-one", {"kv_layout": "one_batch_expanded"}),
        ("gqa", {"heads": 4, "kv_heads": 2}),
        ("nan-in-padding", {"key_padding_mask": cases.padding(171, 63), "edit": cases._nan_in_padding}),
    )
] + [cases.Case("many-queries-varlen", heads=2, lengths_q=(200, 0, 3, 250), lengths_k=(190, 7, 0, 151))]


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest):
    before = _C.cpu_isa()
    _C.select_cpu_isa(request.param)
    yield request.param
    _C.select_cpu_isa(before)


#: The first mark of a test varies fastest. So the instruction sets of a case share the result of the oracle, which
#: takes most of the time.
on_each_isa = pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SUBSET])
def test_case(case: cases.Case, isa: str) -> None:
    assert _C.cpu_isa() == isa
    for dtype in case.dtypes:
        cases.check(case, dtype, "cpu")


@pytest.mark.parametrize("seqlen_k", [1, 2, 3])
@pytest.mark.parametrize("seqlen_q", [63, 64, 65, 72, 73])
def test_gradients_of_few_keys_and_about_as_many_queries_as_a_word_has_bits(
    isa: str, seqlen_q: int, seqlen_k: int
) -> None:
    """A mask hides the keys from all queries but a few. The queries behind the 64th are those that a shift loses."""
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    mask[:3] = mask[-1] = True
    case = cases.Case("few-keys", seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=96, attn_mask=lambda *_: mask)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases.check(case, dtype, "cpu")
    leaves = [torch.randn(1, 1, rows, 96, requires_grad=True) for rows in (seqlen_q, seqlen_k, seqlen_k)]
    results = []
    for backend in ("cpu", "reference"):
        out = fused_attn.fused_attention(*leaves, mask, backend=backend)
        results.append(torch.autograd.grad(out.sum(), leaves))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_few_queries_have_the_same_bits_in_every_layout_of_the_keys(
    isa: str, seqlen_q: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Of the layouts, some are read head by head, and some by several heads in turns, part by part.

    The numbers of threads change how many heads take turns.
    """
    batch, kv_heads, group, seqlen_k, page_size = 2, 20, 2, 333, 16
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = random(batch, kv_heads * group, seqlen_q, head_dim)
    key, value = (random(batch, kv_heads, seqlen_k, head_dim) for _ in range(2))
    lengths = torch.tensor([seqlen_k, 150], dtype=torch.int32)
    options = {"enable_gqa": True, "key_lengths": lengths, "backend": "cpu"}
    causal = causal_lower_right(seqlen_q, seqlen_k)
    columns = -(-seqlen_k // page_size)
    table = torch.randperm(batch * columns, generator=generator).view(batch, columns)
    pages = []
    for x in (key, value):
        rows = torch.nn.functional.pad(x, (0, 0, 0, columns * page_size - seqlen_k)).transpose(1, 2)
        memory = torch.empty(batch * columns, page_size, kv_heads, head_dim, dtype=dtype)
        memory[table.flatten()] = rows.reshape(batch * columns, page_size, kv_heads, head_dim)
        pages.append(memory)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    expected = fused_attn.fused_attention(query, key, value, causal, **options)
    reference = fused_attn.fused_attention(query, key, value, causal, **options | {"backend": "reference"})
    torch.testing.assert_close(expected, reference)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fused_attn.fused_attention(query, *by_token, causal, **options), expected)
            found = fused_attn.fused_attention_paged(query, *pages, table.int(), lengths, is_causal=True, backend="cpu")
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SEVERAL_SLABS])
def test_backward_of_several_slabs(case: cases.Case, isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # a type that memory holds as lanes, and one that it does not
        cases.check(case, dtype, "cpu")


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in BIAS_OF_SCORES])
def test_bias_of_scores(case: cases.Case, isa: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases.check(case, dtype, "cpu")


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in FEW_QUERIES_BACKWARD])
def test_backward_of_few_queries(case: cases.Case, isa: str) -> None:
    for dtype in case.dtypes:
        cases.check(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, 0, 0), (2, 0, 2), (2, 2, 2)], ids=str)  # batch, heads, kv heads
@pytest.mark.parametrize("seqlen_q", [0, 3, 70])
def test_backward_of_nothing(seqlen_q: int, sizes: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    batch, heads, kv_heads = sizes
    query = torch.randn(batch, heads, seqlen_q, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, kv_heads, 5, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    out = fused_attn.fused_attention(query, key, value, enable_gqa=heads != kv_heads, backend="cpu")
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    if query.numel() == 0:
        assert all((x == 0).all() for x in gradients)


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases.LOGITS_BEYOND_MILLIONS])
def test_huge_logits(case: cases.Case, isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cases.check(case, dtype, "cpu")


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9, 3e30])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])  # kernels for few queries, and for blocks of queries
def test_gradients_beside_a_huge_bias(seqlen_q: int, has_sinks: bool, offset: float, isa: str) -> None:
    """The logits are exact in float32, but the log-sum-exp is not, and exp(logit - lse) may overflow."""
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(1, 2, seqlen_q, 64)
    key, value = torch.randn(2, 1, 2, 300, 64, generator=generator)
    to_next = max(1.0, torch.tensor(offset).nextafter(torch.tensor(torch.inf)).item() - offset)
    bias = offset + to_next * torch.randint(2, (1, 2, seqlen_q, 300), generator=generator)
    inputs = [query, key, value, bias, *([torch.tensor([offset, offset + to_next])] if has_sinks else [])]
    douts = torch.randn(1, 2, seqlen_q, 64, generator=generator), torch.linspace(-1, 1, seqlen_q).expand(1, 2, -1)
    gradients = []
    for backend, dtype in ("cpu", torch.float32), ("reference", torch.float64):
        inputs_of_backend = [x.to(dtype).requires_grad_() for x in inputs]
        options = {"sinks": inputs_of_backend[4]} if has_sinks else {}
        results = fused_attn.fused_attention(*inputs_of_backend[:4], return_lse=True, backend=backend, **options)
        gradients.append(torch.autograd.grad(results, inputs_of_backend, [x.to(dtype) for x in douts]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1e9, 1e12, 1e16])
@pytest.mark.parametrize("seqlen_q", [2, 40])  # kernels for few queries, and for blocks of queries
def test_gradients_of_huge_logits_that_are_not_exact(seqlen_q: int, scale: float, isa: str) -> None:
    """Each query sees one key. A multiply-add in one of two sums that have to agree would make exponents differ."""
    generator = torch.Generator().manual_seed(0)
    query, dout = torch.randn(2, 1, 1, seqlen_q, 72, generator=generator)
    key, value = torch.randn(2, 1, 1, 130, 72, generator=generator)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    dvalues = []
    for backend in ("cpu", "reference"):
        out = fused_attn.fused_attention(*inputs, scale=scale, backend=backend)
        dquery, dkey, dvalue = torch.autograd.grad(out, inputs, dout)
        assert dquery.isfinite().all() and dkey.isfinite().all()
        dvalues.append(dvalue)
    torch.testing.assert_close(*dvalues)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spoils", ["query", "key", "bias"])
@pytest.mark.parametrize("row", [2, 4, 8, 16, 32])  # for each vector width, one of them shares row 0's lane
def test_a_row_that_is_not_finite_spoils_no_other(row: int, spoils: str, dtype: torch.dtype, isa: str) -> None:
    """A row with NaN or infinity must not change the maximum of another row.

    Comparisons with NaN are false, so a maximum over a vector of rows can go wrong.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    value = torch.randn(1, 1, 64, 8, generator=generator)
    query[..., row, 0], key[..., 48:, 0] = 1500.0, 3.0  # this maximum is far above that of the first keys
    mask = torch.zeros(64, 64)
    if spoils == "query":
        query[..., 0, :] = float("nan")
    elif spoils == "key":
        mask[1:, 48] = float("-inf")  # the first key of a tile, both for tiles of 4 and of 6 keys
        key[..., 48, 0] = float("nan")
    else:
        mask[0] = float("inf")
    inputs = [x.to(dtype) for x in (query, key, value)]
    attn_mask = {"query": None, "key": mask == 0, "bias": mask.to(dtype)}[spoils]
    out = fused_attn.fused_attention(*inputs, attn_mask, backend="cpu")
    expected = fused_attn.fused_attention(*(x.double() for x in inputs), attn_mask, backend="reference")
    assert out[0, 0, 0].isnan().all()
    torch.testing.assert_close(out[0, 0, 1:].double(), expected[0, 0, 1:], rtol=0, atol=0.02)


@pytest.mark.skipif("amx" not in _C.cpu_isas(), reason="needs a processor with AMX")
@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("spoils", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("heads", [1, 8], ids=["chunks", "single-pass"])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 4.0}], ids=["causal", "large-lse"])
def test_amx_takes_numbers_that_are_not_finite_as_avx512_does(
    options: dict[str, Any], heads: int, spoils: str, number: float
) -> None:
    """AMX multiplies floats as sums of bfloat16 numbers, and an infinite float is no such sum."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, heads, 150, 40, generator=generator) for name in ("query", "key", "value", "dout")}
    inputs[spoils][0, 0, 70, 3] = number
    dout = inputs.pop("dout")

    def results(isa: str) -> list[Tensor]:
        _C.select_cpu_isa(isa)
        given = [x.clone().requires_grad_() for x in inputs.values()]
        out = fused_attn.fused_attention(*given, backend="cpu", **options)
        return [out, *torch.autograd.grad(out, given, dout)]

    before = _C.cpu_isa()
    try:
        for found, expected in zip(results("amx"), results("avx512"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    finally:
        _C.select_cpu_isa(before)


@pytest.mark.skipif("amx" not in _C.cpu_isas(), reason="needs a processor with AMX")
@pytest.mark.parametrize("spoils", ["query", "dout"])
@pytest.mark.parametrize("threads", [1, 2])
def test_with_amx_a_row_spoils_no_key_that_it_does_not_see(threads: int, spoils: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, 1, 300, 40, generator=generator) for name in ("query", "key", "value", "dout")}
    inputs[spoils][0, 0, 160] = float("nan")
    dout = inputs.pop("dout")

    def rows_with_nan(isa: str) -> list[int]:
        _C.select_cpu_isa(isa)
        given = [x.clone().requires_grad_() for x in inputs.values()]
        out = fused_attn.fused_attention(*given, window_size=(20, 0), backend="cpu")
        return [int(x.isnan().any(-1).sum()) for x in torch.autograd.grad(out, given, dout)]

    isa, before = _C.cpu_isa(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert rows_with_nan("amx") == rows_with_nan("avx512")
    finally:
        _C.select_cpu_isa(isa)
        torch.set_num_threads(before)


@pytest.mark.skipif("amx" not in _C.cpu_isas(), reason="needs a processor with AMX")
def test_amx_multiplies_floats() -> None:
    """Finite inputs of usual size do not fall back to vectors, whose sums round in another order."""
    query, key, value = torch.randn(3, 1, 2, 150, 40, generator=torch.Generator().manual_seed(0))
    before, results = _C.cpu_isa(), []
    try:
        for isa in ("amx", "avx512"):
            _C.select_cpu_isa(isa)
            given = [x.clone().requires_grad_() for x in (query, key, value)]
            out = fused_attn.fused_attention(*given, backend="cpu")
            results.append([out, *torch.autograd.grad(out.sum(), given)])
    finally:
        _C.select_cpu_isa(before)
    assert not any(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


@pytest.mark.parametrize("factor", [1e-34, 1e-30, 1e-20, 1e30])
def test_gradients_of_any_size(factor: float, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, dout = (torch.randn(1, 2, 150, 40, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    found = torch.autograd.grad(fused_attn.fused_attention(*inputs, backend="cpu"), inputs, dout * factor)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = fused_attn.fused_attention(*exact, backend="reference")
    for mine, expected in zip(found, torch.autograd.grad(out, exact, dout.double()), strict=True):
        torch.testing.assert_close(mine.double() / factor, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_sequence_has_the_bits_it_has_alone(dtype: torch.dtype, isa: str) -> None:
    """The kernels of a sequence follow from its own length."""
    lengths = [100, 3, 64, 65, 200, 32]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (torch.randn(1, 2, sum(lengths), 40).to(dtype) for _ in range(3))

    def attend(begin: int, end: int, cu_seqlens: Tensor, longest: int) -> Tensor:
        rows = [x[0, :, begin:end].transpose(0, 1) for x in (query, key, value)]
        return fused_attn.fused_attention_varlen(
            *rows, cu_seqlens, cu_seqlens, longest, longest, is_causal=True, backend="cpu"
        )

    together = attend(0, sum(lengths), offsets, max(lengths))
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        alone = attend(begin, begin + length, torch.tensor([0, length]).int(), length)
        assert torch.equal(alone, together[begin : begin + length])


@pytest.mark.parametrize("threads", [1, 2] if _C.build_info()["openmp"] else [1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in MANY_QUERIES])
def test_kept_rows(case: cases.Case, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases.check(case, dtype, "cpu")
    finally:
        torch.set_num_threads(before)


@on_each_isa
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in FEW_QUERIES])
def test_decoding(case: cases.Case, isa: str) -> None:
    for dtype in case.dtypes:
        cases.check_inference(case, dtype, "cpu")


@pytest.mark.parametrize("value_dim", (8, 16, 40, 64, 72, 96))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_a_query_gets_the_same_bits_beside_any_others(dtype: torch.dtype, value_dim: int, isa: str) -> None:
    """Up to four heads of a group are computed together. With AMX in bfloat16, groups of 3 heads and more are."""
    query, key = torch.randn(1, 7, 1, 40).to(dtype), torch.randn(1, 1, 600, 40).to(dtype)
    value = torch.randn(1, 1, 600, value_dim).to(dtype)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return fused_attn.fused_attention(query, key, value, enable_gqa=True, num_splits=2)[0]

    has_tiles = isa == "amx" and dtype == torch.bfloat16
    together = attend(query[:, :2] if has_tiles else query)
    for head in range(together.shape[0]):
        assert torch.equal(attend(query[:, head : head + 1])[0], together[head])
    if has_tiles:
        together = attend(query)
        for others, position in ((2, 0), (4, 0), (9, 3), (17, 8), (21, 17), (40, 40)):
            beside = torch.randn(1, others, 1, 40).to(dtype)
            for head in range(7):
                mixed = torch.cat((beside[:, :position], query[:, head : head + 1], beside[:, position:]), dim=1)
                assert torch.equal(attend(mixed)[position], together[head])


@pytest.mark.skipif("amx" not in _C.cpu_isas(), reason="needs a processor with AMX")
@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("seqlen_q", [1, 3, 8])
def test_decoding_with_tiles_is_as_exact_as_with_vectors(seqlen_q: int, head_dim: int) -> None:
    query, key, value = (torch.randn(2, n, s, head_dim).bfloat16() for n, s in ((16, seqlen_q), (2, 700), (2, 700)))
    value[:, :, ::7, 5] *= 50  # where probs are rounded, columns with large values show it
    options = {"is_causal": True, "diagonal_alignment": "lower_right", "enable_gqa": True, "backend": "cpu"}
    exact = fused_attn.fused_attention(*(x.double() for x in (query, key, value)), **options | {"backend": "reference"})
    before, errors = _C.cpu_isa(), {}
    try:
        for isa in ("amx", "avx512"):
            _C.select_cpu_isa(isa)
            out = fused_attn.fused_attention(query, key, value, **options)
            errors[isa] = (out.double() - exact).pow(2).mean().sqrt().item()
    finally:
        _C.select_cpu_isa(before)
    assert errors["amx"] < 1.02 * errors["avx512"]


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_value_is_not_lost_in_decoding(value: float, heads: int, isa: str) -> None:
    """Tiles multiply it by two parts of a prob, of which one may be negative."""
    query, key, values = torch.randn(1, heads, 1, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    values[0, 0, 17, 5] = value
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype) for x in (query, key, values)]
        out = fused_attn.fused_attention(*inputs, enable_gqa=True)
        expected = fused_attn.fused_attention(*(x.double() for x in inputs), enable_gqa=True, backend="reference")
        torch.testing.assert_close(out[..., 5].double(), expected[..., 5], equal_nan=True)
        torch.testing.assert_close(out[..., 6:].double(), expected[..., 6:], atol=2e-3, rtol=2**-8)


def test_values_without_columns_in_decoding() -> None:
    query, key, value = torch.randn(1, 4, 1, 64), torch.randn(1, 1, 16384, 64), torch.randn(1, 1, 16384, 0)
    out = fused_attn.fused_attention(*(x.bfloat16() for x in (query, key, value)), enable_gqa=True)
    assert out.shape == (1, 4, 1, 0)


def _at_the_end_of_memory(x: torch.Tensor) -> torch.Tensor:
    """A copy of x behind which lies a page that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape)
    return copy.copy_(x)


GUARDED = """
import sys, torch, fused_attn
sys.path[:0] = ["tests/backends/cpu", "tests"]
from test_isa import _at_the_end_of_memory, _C
torch.set_num_threads(1)
cases = [
    (sizes, length)
    for sizes in ((4, 128, 8, 32), (16, 192, 128, 16), (4, 128, 64, 1), (2, 64, 64, 64))
    for length in (100, 128, 300)
]
for isa in sys.argv[1:]:
    print(isa, flush=True)
    _C.select_cpu_isa(isa)
    torch.manual_seed(0)
    for (heads, head_dim, value_dim, page_size), length in cases:
        pages = -(-length // page_size)
        rows = (pages, page_size, heads)
        keys = _at_the_end_of_memory(torch.randn(*rows, head_dim).bfloat16())
        values = _at_the_end_of_memory(torch.randn(*rows, value_dim).bfloat16())
        table = torch.arange(pages, dtype=torch.int32)[None].roll(1, 1)
        lengths = torch.tensor([length], dtype=torch.int32)
        query = torch.randn(1, 4 * heads, 1, head_dim).bfloat16()
        fused_attn.fused_attention_paged(query, keys, values, table, lengths)
        keys, values = (x.flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))
        fused_attn.fused_attention(query, keys, values, enable_gqa=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory by a function of the C library")
def test_decoding_reads_nothing_behind_the_rows() -> None:
    command = [sys.executable, "-c", GUARDED, *_C.cpu_isas()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.split() == _C.cpu_isas()


@pytest.mark.parametrize("outlier", (None, 0, 5, 9, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_a_query_gets_the_same_bits_in_blocks_of_any_size(dtype: torch.dtype, outlier: int | None, isa: str) -> None:
    """Blocks of few queries have tiles of other sizes. The score of the outlier raises the reference of the softmax."""
    query, key = torch.randn(1, 2, 64, 40).to(dtype), torch.randn(1, 2, 331, 40).to(dtype)
    value = torch.randn(1, 2, 331, 72).to(dtype)
    if outlier is not None:
        key[:, :, outlier] = 9.0 * query[:, :, 1]
    whole = fused_attn.fused_attention(query, key, value, return_lse=True)
    for count in (2, 4, 8, 16, 17, 33):
        part = fused_attn.fused_attention(query[:, :, :count], key, value, return_lse=True)
        for few, many in zip(part, whole, strict=True):
            assert torch.equal(few, many[:, :, :count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_queries_whose_last_keys_differ(dtype: torch.dtype, isa: str) -> None:
    """Rows that one block has converted serve another one only if both see the same keys of a group of 32."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 200, 64, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, 2, 213, 64, generator=generator).to(dtype)

    def attend(value: torch.Tensor, backend: str) -> torch.Tensor:
        mask = causal_lower_right(200, 213)
        return fused_attn.fused_attention(query, key, value, mask, enable_gqa=True, backend=backend)

    found = attend(value, "cpu")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, attend(value, "reference"), rtol=tolerance, atol=tolerance)
    spoilt = value.clone()
    spoilt[:, :, 90] = float("nan")  # the queries of the first block see keys up to number 76
    assert torch.equal(attend(spoilt, "cpu")[:, :, :64], found[:, :, :64])


def test_decoding_does_not_depend_on_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 2, 64, generator=generator)
    key, value = torch.randn(2, 1, 4, 3000, 64, generator=generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(fused_attn.fused_attention(query, key, value, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _pages(rows: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages, block table) with the rows (B, Hkv, S, D). The pages are shuffled. Behind row S, they have NaN."""
    batch, _, seqlen, _ = rows.shape
    columns = -(-seqlen // page_size)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, columns * page_size - seqlen), value=float("nan"))
    by_page = padded.unflatten(2, (columns, page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    table = torch.randperm(batch * columns, generator=torch.Generator().manual_seed(1))
    pages = torch.empty_like(by_page, memory_format=torch.contiguous_format).index_copy_(0, table, by_page)
    return pages, table.view(batch, columns).int()


def _with_order(x: torch.Tensor) -> torch.Tensor:
    """The same numbers. In memory, dimensions 1 and 2 have the other order."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "window_size": (700, 0)}, {"sinks": torch.linspace(-1, 4, 6)}],
    ids=["plain", "softcap-window", "sinks"],
)
@pytest.mark.parametrize("has_padding", [False, True], ids=["", "padded"])
def test_the_layout_of_a_cache_changes_no_bit(
    has_padding: bool, options: dict[str, Any], dtype: torch.dtype, threads: int, isa: str
) -> None:
    """Nor does the number of threads, which decides how many heads an item computes in turns."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 2, 40, generator=generator).to(dtype)
    key, value = (torch.randn(2, 3, 1100, dim, generator=generator).to(dtype) for dim in (40, 72))
    lengths = torch.tensor([1100, 837], dtype=torch.int32)
    padding = torch.rand(2, 1100, generator=generator) < 0.3 if has_padding else None
    sinks = options.get("sinks")
    options = options | {"num_splits": 2, "backend": "cpu"}

    def contiguous(key: torch.Tensor, value: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        return fused_attn.fused_attention(
            query[:, heads], key, value, causal_lower_right(2, 1100), key_lengths=lengths, key_padding_mask=padding,
            enable_gqa=True, **options | {"sinks": None if sinks is None else sinks[heads]},
        )  # fmt: skip

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Each head alone is an item of its own.
        alone = [contiguous(key[:, h : h + 1], value[:, h : h + 1], slice(2 * h, 2 * h + 2)) for h in range(3)]
        expected = torch.cat(alone, 1)
        torch.set_num_threads(threads)
        assert torch.equal(contiguous(key, value), expected)
        assert torch.equal(contiguous(_with_order(key), _with_order(value)), expected)
        for page_size in (16, 64, 7):
            (key_pages, table), (value_pages, _) = _pages(key, page_size), _pages(value, page_size)
            longer = table.shape[1] * page_size - 1100
            given = None if padding is None else torch.nn.functional.pad(padding, (0, longer))
            for change in (lambda x: x, _with_order):
                found = fused_attn.fused_attention_paged(
                    query, change(key_pages), change(value_pages), table, lengths, is_causal=True,
                    key_padding_mask=given, **options,
                )  # fmt: skip
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


@on_each_isa
@pytest.mark.parametrize("number", [0, 3])
def test_long_sums_are_exact(number: int, isa: str) -> None:
    """The id selects the numbers. One sum of 512 products has too large an error here, and in number 3, sums of 256."""
    case = cases.Case(f"long-sums-{number}", seqlen_q=70, seqlen_k=67, head_dim=512)
    cases.check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value_dim", [64, 136, 192, 256, 384, 512])
def test_a_query_that_sees_one_key_has_no_gradient(value_dim: int, dtype: torch.dtype, isa: str) -> None:
    """Its prob is 1 whatever its score is. dprob - delta is exactly 0, because both are summed in the same order."""
    generator = torch.Generator().manual_seed(value_dim)
    sizes = (64, 64, value_dim)
    leaves = [torch.randn(1, 2, 70, dim, generator=generator, dtype=dtype).requires_grad_() for dim in sizes]
    out = fused_attn.fused_attention(*leaves, is_causal=True, backend="cpu")
    dquery, *_ = torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator, dtype=dtype))
    assert (dquery[:, :, 0] == 0).all() and dquery.abs().sum() > 0


def test_few_queries_have_exact_gradients_where_keys_have_an_offset() -> None:
    """dquery is exact because forward and backward compute the same scores.

    If the scores of both differed by rounding, the difference would be multiplied by the mean of the keys.
    """
    case = cases.Case("offset-keys", seqlen_q=4, seqlen_k=300, head_dim=64, edit=_offset_keys, dtypes=(torch.float32,))
    cases.check(case, torch.float32, "cpu")


def _offset_keys(tensors: dict[str, torch.Tensor]) -> None:
    tensors["key"] = 0.3 * tensors["key"] + 10.0 * tensors["key"][:, :, :1]


@pytest.mark.quick
@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_everything_at_once(isa: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.id == "softcap-with-everything")
    cases.check(case, dtype, "cpu")


@pytest.mark.quick
def test_the_best_is_in_use_unless_asked_otherwise() -> None:
    assert _C.cpu_isa() == _C.cpu_isas()[-1]
    with pytest.raises(ValueError, match=r"isa: expected one of .*baseline.*, got no-such-set"):
        _C.select_cpu_isa("no-such-set")


@pytest.mark.timing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_instruction_set_is_faster(dtype: torch.dtype) -> None:
    """The newest set need not be the fastest: on Intel's processors, avx512_bf16 takes 1.5 times as long as avx512.

    The fastest of all calls counts for each set. There are more calls as long as the set in use is not the fastest,
    because another virtual machine may use the same core, for up to some seconds at a time. Then float32 with AMX takes
    1.3 times as long as with AVX-512. On a core of its own, it takes 0.9 times as long.
    """
    leaves = [torch.randn(1, 4, 512, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    in_use = _C.cpu_isa()
    best = dict.fromkeys(_C.cpu_isas(), float("inf"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(30):
            for isa in list(best) * 20:
                _C.select_cpu_isa(isa)
                start = time.perf_counter()
                fused_attn.fused_attention(*leaves).sum().backward()
                best[isa] = min(best[isa], time.perf_counter() - start)
            if best[in_use] <= 1.1 * min(best.values()):
                break
    finally:
        _C.select_cpu_isa(in_use)
        torch.set_num_threads(threads)
    assert best[in_use] <= 1.1 * min(best.values()), best


@pytest.mark.skipif("amx" not in _C.cpu_isas(), reason="needs a processor with AMX")
def test_amx_shares_the_tile_registers_with_torch() -> None:
    """torch multiplies bfloat16 with AMX in the same threads."""
    left, right = (torch.randn(512, 512).bfloat16() for _ in range(2))
    leaves = [torch.randn(2, 4, 300, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    in_use = _C.cpu_isa()

    def run() -> list[Tensor]:
        out = fused_attn.fused_attention(*leaves, backend="cpu")
        return [left @ right, out, left @ right, *torch.autograd.grad(out, leaves, torch.ones_like(out)), left @ right]

    try:
        _C.select_cpu_isa("amx")
        first = run()
        for _ in range(20):
            for x, y in zip(run(), first, strict=True):
                assert torch.equal(x, y)
    finally:
        _C.select_cpu_isa(in_use)


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("head_dim", [40, 64, 72])
def test_a_row_that_is_not_finite_spoils_no_other_sequence(head_dim: int, isa: str) -> None:
    """The blocks of a thread share memory, and a shorter block uses another part of it."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 70, 90], dtype=torch.int32)
    leaves = [torch.randn(1, 2, 90, head_dim, generator=generator).bfloat16() for _ in range(4)]
    query, key, value, dout = leaves
    query[0, 0, 3] = float("nan")
    dout[0, 1, 5] = float("inf")
    in_use, threads = _C.cpu_isa(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _C.select_cpu_isa(isa)
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 70, "max_seqlen_k": 70}
        rows = [x.squeeze(0).transpose(0, 1) for x in inputs]
        out = fused_attn.fused_attention_varlen(*rows, **lengths, backend="cpu")
        grads = torch.autograd.grad(out, inputs, dout.squeeze(0).transpose(0, 1))
    finally:
        _C.select_cpu_isa(in_use)
        torch.set_num_threads(threads)
    assert out[70:].isfinite().all()
    for x in grads:
        assert x[:, :, 70:].isfinite().all()


#: The flags of csrc/CMakeLists.txt.
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprfchw"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprfchw"],
}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
FLAGS["amx"] = [*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]


@pytest.mark.parametrize("name", FLAGS)
def test_an_instruction_set_that_was_not_built_compiles(name: str) -> None:
    """The compiler reads the sources and makes all instances, but no code: a second instead of half a minute."""
    source = Path(__file__).parents[3] / f"csrc/cpu/kernels_{name}.cpp"
    if name in _C.build_info()["cpu_isas"]:
        pytest.skip("was built")
    if not source.exists() or shutil.which("g++") is None or _C.best_cpu_isa() == "baseline":
        pytest.skip("needs the sources, g++ and an x86-64 processor")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    checked = subprocess.run([*command, *FLAGS[name], source], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
