"""The CUDA kernels for few queries and many keys, executed: splits, lengths on the device, and pages.

tests/cuda/test_splits.py has the number of splits. tests/cuda/test_cuda_kernels.py runs the curated cases, of which
many have few queries, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cases
import oracle
import pytest
import torch
from cases import Case
from kernels import Kernels, running_both_kinds
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import fused_attn
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.backends.cuda import splits as cuda_splits

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def running(kernels: Kernels) -> Iterator[None]:
    with kernels.running(80):
        yield


def decode(name: str, **changes) -> Case:
    """One query of each of four heads, which share two key heads, with 700 keys."""
    sizes = {"heads": 4, "kv_heads": 2, "seqlen_q": 1, "seqlen_k": 700, "head_dim": 64}
    return Case(name, **sizes | {"differentiated": ()} | changes)


CASES = [
    *(decode(f"head-dim-{dim}", head_dim=dim, options={"num_splits": 3}) for dim in (*cuda.HEAD_DIMS, 8, 72, 160)),
    decode("value-dim", head_dim=128, value_dim=40, options={"num_splits": 2}),
    decode("value-dim-larger", head_dim=40, value_dim=200, seqlen_q=3),
    decode("one-split", options={"num_splits": 1}),
    decode("more-splits-than-keys", seqlen_k=5, options={"num_splits": 9}),
    decode("most-splits", options={"num_splits": 256}),
    decode("two-tiles-of-rows", heads=6, kv_heads=1, seqlen_q=5, attn_mask=cases.lower_right),
    decode("group-that-fills-no-tile", heads=7, kv_heads=1, seqlen_q=3, attn_mask=cases.lower_right),
    decode("causal-at-the-end", seqlen_q=5, attn_mask=cases.lower_right, options={"num_splits": 2}),
    decode("causal-upper-left", seqlen_q=5, options={"is_causal": True, "num_splits": 2}),
    decode("window", seqlen_q=5, attn_mask=cases.lower_right, options={"window_size": (130, 0), "num_splits": 2}),
    decode("window-behind-all-keys", seqlen_q=8, seqlen_k=3, options={"window_size": (1, -1)}),
    decode("padding", key_padding_mask=cases.padding(700, 33), edit=cases._nan_in_padding, sinks=cases.sink()),
    decode("padding-scattered", key_padding_mask=cases.scattered_padding, edit=cases._nan_in_padding),
    decode("mask", seqlen_q=5, attn_mask=cases.bool_mask("BHLS"), options={"num_splits": 2}),
    decode("mask-empty-rows", seqlen_q=5, attn_mask=cases.empty_rows_mask, sinks=cases.sink()),
    decode("bias", seqlen_q=5, attn_mask=cases.float_mask("B1LS"), options={"num_splits": 2}),
    decode("bias-float32", attn_mask=cases.float_mask("BHLS", torch.float32), options={"softcap": 3.0}),
    decode("relative-bias", seqlen_q=5, relative_bias=cases.per_head_bias, options={"num_splits": 2, "softcap": 2.0}),
    decode("relative-bias-shared", relative_bias=cases.shared_bias, sinks=cases.sink(), options={"num_splits": 3}),
    decode("scale-negative", options={"scale": -0.2, "num_splits": 2}),
    decode("scores-that-rise", seqlen_q=2, edit=cases._ascending_scores, options={"num_splits": 3}),
    decode("layout", kv_layout="blhd", query_layout="blhd"),
    Case(
        "packed",
        heads=4,
        kv_heads=2,
        lengths_q=(1, 0, 3, 4),
        lengths_k=(300, 30, 0, 140),
        head_dim=64,
        sinks=cases.sink(),
        options={"is_causal": True},
        differentiated=(),
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, dtype: str, kernels: Kernels) -> None:
    with kernels.running(80, seed=len(case.id)):
        cases.check(case, DTYPES[dtype], "cuda")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("case", cases.LOGITS_BEYOND_MILLIONS, ids=lambda case: case.id)
def test_huge_logits_are_merged_exactly(case: Case) -> None:
    """The weight of a split is no difference of two log-sum-exps, which are inexact for such logits."""
    case = dataclasses.replace(
        case, seqlen_q=2, seqlen_k=300, head_dim=64, has_dlse=False, differentiated=(), options={"num_splits": 3}
    )
    cases.check(case, torch.bfloat16, "cuda")


# ---- Lengths and pages


def make_cache(lengths: list[int], rows: int, *, heads: int = 2, head_dim: int = 64) -> tuple[Tensor, ...]:
    """Queries (B, 2 * heads, 2, head_dim), keys and values (B, heads, rows, head_dim), and lengths (B,). Rows behind
    the lengths hold NaN.
    """
    generator = torch.Generator().manual_seed(len(lengths))
    query = torch.randn(len(lengths), 2 * heads, 2, head_dim, generator=generator).half()
    key, value = (torch.randn(len(lengths), heads, rows, head_dim, generator=generator).half() for _ in range(2))
    key_lengths = torch.tensor(lengths, dtype=torch.int32)
    behind = (torch.arange(rows) >= key_lengths[:, None])[:, None, :, None]
    return query, key.masked_fill(behind, float("nan")), value.masked_fill(behind, float("nan")), key_lengths


def in_pages(x: Tensor, page_size: int, order: Tensor) -> Tensor:
    """Rows (B, heads, rows, D) as pages (num_pages, page_size, heads, D); page `order[n]` is number n of all."""
    pages = x.transpose(1, 2).reshape(-1, page_size, x.shape[1], x.shape[3])
    return torch.empty_like(pages).index_copy_(0, order, pages)


LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 300, 511, 512]


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 128, 512])
def test_pages_give_the_bits_of_a_contiguous_cache(page_size: int, kernels: Kernels) -> None:
    query, key, value, lengths = make_cache(LENGTHS, 512)
    order = torch.randperm(len(LENGTHS) * 512 // page_size, generator=torch.Generator().manual_seed(0))
    table = order.to(torch.int32).view(len(LENGTHS), -1)
    bias = causal_lower_right(2, 512)
    options = {"num_splits": 3, "return_lse": True, "backend": "cuda"}
    with kernels.running(80):
        expected = fused_attn.fused_attention(query, key, value, bias, key_lengths=lengths, enable_gqa=True, **options)
        pages = (in_pages(x, page_size, order) for x in (key, value))
        actual = fused_attn.fused_attention_paged(query, *pages, table, lengths, is_causal=True, **options)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert not actual[0].isnan().any()


@pytest.mark.parametrize("architecture", [80, 90])
def test_tokens_and_prompts_share_a_call(architecture: int, kernels: Kernels) -> None:
    """Sequences with up to 16 queries, 32 rows, run in the decode kernels, and the others in those for many queries.

    The results have the bits of a call with the short ones, and of one with the long ones.
    """
    lengths_q, keys = torch.tensor([1, 40, 0, 16, 17, 2, 130]), [300, 40, 77, 512, 20, 2, 400]
    _, key, value, lengths = make_cache(keys, 512)
    order = torch.randperm(len(keys) * 16, generator=torch.Generator().manual_seed(0))
    pages, table = [in_pages(x, 32, order) for x in (key, value)], order.to(torch.int32).view(len(keys), -1)
    query = torch.randn(int(lengths_q.sum()), 4, 64, generator=torch.Generator().manual_seed(1)).half()

    def run(chosen: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """(out, lse) of the chosen sequences, and how many kernels ran."""
        own = lengths_q[chosen]
        rows = chosen.repeat_interleave(lengths_q)
        cu_seqlens = torch.cat((torch.zeros(1), own.cumsum(0))).int()
        with kernels.running(architecture):
            found = fused_attn.fused_attention_paged(
                query[rows], *pages, table[chosen], lengths[chosen], is_causal=True, num_splits=3, return_lse=True,
                cu_seqlens_q=cu_seqlens, max_seqlen_q=int(own.max()), backend="cuda",
            )  # fmt: skip
            return found, kernels.statistics.launches

    (out, lse), launches = run(lengths_q >= 0)
    assert launches == 4  # preparation (a list of tiles, rows of no sequence), decoding, merging, many queries
    for is_chosen, expected_launches in ((lengths_q <= 16, 3), (lengths_q > 16, 4)):
        (own_out, own_lse), launches = run(is_chosen)
        rows = is_chosen.repeat_interleave(lengths_q)
        assert torch.equal(out[rows], own_out) and torch.equal(lse[:, rows], own_lse)
        assert launches == expected_launches


@pytest.mark.parametrize(
    ("page_size", "architecture", "is_by_tma"), [(8, 90, True), (24, 90, True), (192, 90, True), (12, 90, False)]
)
def test_tma_loads_pages_of_whole_groups_of_rows(
    page_size: int, architecture: int, is_by_tma: bool, kernels: Kernels
) -> None:
    _, key, value, lengths = make_cache([384, 200], 384)
    query = torch.randn(2, 4, 40, 64, generator=torch.Generator().manual_seed(1)).half()
    order = torch.randperm(2 * 384 // page_size, generator=torch.Generator().manual_seed(0))
    pages, table = [in_pages(x, page_size, order) for x in (key, value)], order.to(torch.int32).view(2, -1)
    with kernels.running(architecture):
        out = fused_attn.fused_attention_paged(query, *pages, table, lengths, is_causal=True, backend="cuda")
        assert (kernels.statistics.tma_loads > 0) == is_by_tma
        expected = fused_attn.fused_attention(
            query, key, value, key_lengths=lengths, is_causal=True, diagonal_alignment="lower_right", enable_gqa=True,
            backend="cuda",
        )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("file", "constant", "number"),
    [
        ("tiles.h", "int kLeastPieceRows", hardware.PAGE_STEP),
        ("decode.h", "int kMaxDecodeTiles", cuda_splits.MAX_DECODE_TILES),
        ("decode.h", "int kDecodeRows", cuda_splits.DECODE_ROWS),
        ("params.h", "int32_t kKeyBlock", cuda_splits.FUSED_KEY_BLOCK),
        ("params.h", "int32_t kMaxRows", f"1 << {cuda.MAX_ROWS.bit_length() - 1}"),
    ],
)
def test_numbers_that_the_backend_shares_with_the_kernels(file: str, constant: str, number: int | str) -> None:
    text = (Path(__file__).parents[2] / "csrc" / "cuda" / file).read_text()
    assert f"constexpr {constant} = {number};" in text


@pytest.mark.parametrize("relative_bias", [cases.per_head_bias, cases.shared_bias], ids=["per-head", "shared"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_sequences_of_both_kinds_share_a_relative_bias(
    architecture: int, relative_bias: cases.Builder, kernels: Kernels
) -> None:
    """Its diagonals count from the longest sequence, also in the decode kernels, which do not compute that one.

    The backend makes no such call: calls with pages have no relative bias. The native module accepts it.
    """
    case = Case(
        "both-kinds",
        heads=4,
        kv_heads=2,
        lengths_q=(1, 40, 0, 16),
        lengths_k=(300, 40, 7, 140),
        head_dim=64,
        relative_bias=relative_bias,
        differentiated=(),
    )
    with kernels.running(architecture), running_both_kinds():
        cases.check(case, torch.float16, "cuda")
        assert kernels.statistics.launches > 2


@pytest.mark.parametrize("length", [1, 17, 300, 512])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(length: int, kernels: Kernels) -> None:
    """With num_splits, the bits are the same alone, in a batch, and in a cache with room for more keys."""
    query, key, value, lengths = make_cache([length, 512, 3], 512)

    def run(batch: slice, rows: int) -> tuple[Tensor, Tensor]:
        with kernels.running(80):
            return fused_attn.fused_attention(
                query[batch], key[batch, :, :rows], value[batch, :, :rows], key_lengths=lengths[batch],
                enable_gqa=True, num_splits=4, return_lse=True, backend="cuda",
            )  # fmt: skip

    together, alone, small = run(slice(3), 512), run(slice(1), 512), run(slice(1), length)
    for x, y, z in zip(together, alone, small, strict=True):
        assert torch.equal(x[:1], y)
        assert torch.equal(y, z)


def test_dropout_with_a_band_from_the_end(kernels: Kernels) -> None:
    """The decode kernels know no dropout. In the others, padding and a mask take the place of lengths and band."""
    query, key, value, lengths = make_cache([64, 17, 1], 64)
    bias = causal_lower_right(2, 64)
    results = {}
    for backend in ("cuda", "reference"):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        with kernels.running(80):
            out = fused_attn.fused_attention(
                *leaves, bias, key_lengths=lengths, enable_gqa=True, dropout_p=0.3, dropout_seed=5, backend=backend
            )
            results[backend] = (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for actual, expected in zip(results["cuda"], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-3, atol=5e-3)


def test_repeats_give_the_same_bits(kernels: Kernels) -> None:
    query, key, value, lengths = make_cache([512, 200], 512)

    def run(seed: int, resident_blocks: int) -> Tensor:
        with kernels.running(80, seed, resident_blocks=resident_blocks):
            return fused_attn.fused_attention(
                query, key, value, key_lengths=lengths, enable_gqa=True, num_splits=5, backend="cuda"
            )

    first = run(seed=1, resident_blocks=2)
    assert torch.equal(first, run(seed=2, resident_blocks=7))
    expected = fused_attn.fused_attention(query, key, value, key_lengths=lengths, enable_gqa=True, backend="reference")
    torch.testing.assert_close(first, expected, rtol=2e-3, atol=2e-3)


def test_numbers_of_splits_agree(kernels: Kernels) -> None:
    case = decode("any-splits", seqlen_q=3, sinks=cases.sink(), attn_mask=cases.lower_right)
    inputs, expected = case.make(torch.float16), cases.expected(case, torch.float16)
    for splits in (1, 2, 5, 11, 100):
        with kernels.running(80):
            result = cases.run(inputs._replace(options=inputs.options | {"num_splits": splits}), "cuda")
        oracle.assert_close(result, expected)


def test_hidden_keys_are_not_visited(kernels: Kernels) -> None:
    """Of 4096 keys, a window of 128 costs less than a tenth of the products, and a length of 128 does, too."""
    query, key, value, lengths = make_cache([128], 4096)
    key, value = key.nan_to_num(), value.nan_to_num()

    def products(**options) -> int:
        with kernels.running(80):
            fused_attn.fused_attention(query, key, value, enable_gqa=True, num_splits=2, backend="cuda", **options)
            return kernels.statistics.mma

    few = [products(window_size=(64, 63)), products(key_lengths=lengths)]
    assert 0 < max(few) < products() / 10
