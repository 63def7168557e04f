"""Splits of the keys in the large CUDA forward kernels, executed, and the number of splits.

tests/cuda/test_decode.py has the splits of the decode kernels.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from kernels import Kernels
from torch import Tensor

import fused_attn
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends import dispatch
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import splits as cuda_splits
from fused_attn.backends.cuda.splits import KeySplits

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("poisoned")


def divided(name: str, **changes) -> Case:
    """40 queries of each of four heads, which share two key heads, with 700 keys in three splits."""
    sizes = {"heads": 4, "kv_heads": 2, "seqlen_q": 40, "seqlen_k": 700, "head_dim": 64, "differentiated": ()}
    options = {"num_splits": 3} | changes.pop("options", {})
    return Case(name, **sizes | changes, options=options)


CASES = [
    *(divided(f"head-dim-{dim}", head_dim=dim) for dim in (*cuda.HEAD_DIMS, 8, 72, 160)),
    divided("value-dim", head_dim=192, value_dim=128),
    divided("value-dim-smaller", head_dim=128, value_dim=40),
    divided("gradients", differentiated=("query", "key", "value")),
    divided("more-splits-than-blocks", seqlen_k=140, options={"num_splits": 9}),
    divided("one-key", seqlen_k=1),
    divided("causal-upper-left", seqlen_q=128, options={"is_causal": True}),
    divided("causal-at-the-end", seqlen_q=128, attn_mask=cases.lower_right),
    divided("window", seqlen_q=128, attn_mask=cases.lower_right, options={"window_size": (200, 0)}),
    divided("padding", key_padding_mask=cases.padding(700, 33), edit=cases._nan_in_padding, sinks=cases.sink()),
    divided("padding-scattered", key_padding_mask=cases.scattered_padding, edit=cases._nan_in_padding),
    divided("lengths", key_lengths=(0, 650), edit=cases._nan_behind_lengths, attn_mask=cases.lower_right),
    divided("mask", attn_mask=cases.bool_mask("BHLS")),
    divided("mask-empty-rows", attn_mask=cases.empty_rows_mask, sinks=cases.sink()),
    divided("ranges", key_ranges=cases.random_ranges("BHL", 2)),
    divided("bias", attn_mask=cases.float_mask("B1LS")),
    divided("relative-bias", relative_bias=cases.per_head_bias, options={"softcap": 2.0}),
    divided("dropout", options={"dropout_p": 0.3, "dropout_seed": 5}),
    divided("dropout-of-all", options={"dropout_p": 1.0, "dropout_seed": 5}),
    divided("scale-negative", options={"scale": -0.2}),
    divided("scores-that-rise", edit=cases._ascending_scores),
    divided("layout", kv_layout="blhd", query_layout="blhd"),
    divided("paged", page_size=48, key_lengths=(700, 301), options={"is_causal": True}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, architecture: int, dtype: str, kernels: Kernels) -> None:
    with kernels.running(architecture, seed=len(case.id)):
        cases.check(case, DTYPES[dtype], "cuda")


def make_inputs(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 2, rows, 64, generator=generator).half() for rows in (queries, keys, keys))


@pytest.mark.parametrize("architecture", [80, 90])
def test_long_keys_are_divided_without_being_asked(architecture: int, kernels: Kernels) -> None:
    inputs = make_inputs(1, 33, 2048)
    with kernels.running(architecture):
        results = fused_attn.fused_attention(*inputs, backend="cuda", return_lse=True)
        assert kernels.statistics.launches == 2  # two splits, and merging
    expected = fused_attn.fused_attention(*inputs, backend="reference", return_lse=True)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(architecture: int, kernels: Kernels) -> None:
    """With num_splits, the bits are the same alone, in a batch, and in a cache with room for more keys."""
    query, key, value = make_inputs(3, 50, 512)
    lengths = torch.tensor([300, 512, 3], dtype=torch.int32)

    def run(batch: slice, rows: int) -> tuple[Tensor, Tensor]:
        with kernels.running(architecture):
            return fused_attn.fused_attention(
                query[batch], key[batch, :, :rows], value[batch, :, :rows], key_lengths=lengths[batch], num_splits=2,
                return_lse=True, backend="cuda",
            )  # fmt: skip

    together, alone, small = run(slice(3), 512), run(slice(1), 512), run(slice(1), 300)
    for x, y, z in zip(together, alone, small, strict=True):
        assert torch.equal(x[:1], y)
        assert torch.equal(y, z)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True, "diagonal_alignment": "lower_right"}, {"softcap": 50.0}],
    ids=["plain", "causal", "softcap"],
)
@pytest.mark.parametrize("is_paged", [False, True], ids=["varlen", "paged"])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_sequence_does_not_depend_on_the_next_one(
    architecture: int, head_dim: int, is_paged: bool, options: dict, kernels: Kernels
) -> None:
    """The last tile of a sequence may load the first queries of the next one, into the same warp as its own last ones.

    On the keys of the first sequence, the loud queries have scores that rise from block to block.
    """
    queries, keys = 72, 512
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2 * rows, 1, head_dim, generator=generator).half() for rows in (queries, keys, keys)
    )
    loud, broken = query.clone(), query.clone()
    loud[queries:] *= 20
    broken[queries:] = float("nan")
    offsets = [torch.tensor([0, rows, 2 * rows], dtype=torch.int32) for rows in (queries, keys)]
    table = torch.arange(2 * keys // 64, dtype=torch.int32).view(2, -1)

    def first_sequence(query: Tensor) -> tuple[Tensor, Tensor]:
        with kernels.running(architecture):
            if is_paged:
                own = {key: x for key, x in options.items() if key != "diagonal_alignment"}
                out, lse = fused_attn.fused_attention_paged(
                    query, key.view(-1, 64, 1, head_dim), value.view(-1, 64, 1, head_dim), table,
                    torch.full((2,), keys, dtype=torch.int32), num_splits=1, return_lse=True, cu_seqlens_q=offsets[0],
                    max_seqlen_q=queries, backend="cuda", **own,
                )  # fmt: skip
            else:
                out, lse = fused_attn.fused_attention_varlen(
                    query, key, value, *offsets, queries, keys, return_lse=True, backend="cuda", **options
                )
        return out[:queries], lse[:, :queries]

    for x, y, z in zip(*map(first_sequence, (query, loud, broken)), strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("architecture", [80, 90])
def test_each_block_of_keys_is_visited_once(architecture: int, kernels: Kernels) -> None:
    """Splits take as many products as one program that visits all keys."""
    inputs = make_inputs(1, 128, 1024)

    def products(num_splits: int) -> int:
        with kernels.running(architecture):
            fused_attn.fused_attention(*inputs, num_splits=num_splits, is_causal=True, backend="cuda")
            return kernels.statistics.mma + kernels.statistics.wgmma

    assert products(1) == products(3) > 0


@pytest.mark.parametrize("architecture", [80, 90])
def test_row_max_is_merged(architecture: int, kernels: Kernels) -> None:
    inputs = make_inputs(1, 40, 700)
    with kernels.running(architecture):
        *_, row_max = fused_attn.fused_attention(*inputs, num_splits=3, backend="cuda", return_max=True)
        assert kernels.statistics.launches == 2
    *_, expected = fused_attn.fused_attention(*inputs, backend="reference", return_max=True)
    torch.testing.assert_close(row_max, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("returns_max", [False, True])
@pytest.mark.parametrize("queries", [4, 40])
@pytest.mark.parametrize("architecture", [80, 90])
def test_nan_is_not_taken_for_a_split_without_keys(
    architecture: int, queries: int, returns_max: bool, kernels: Kernels
) -> None:
    """A row whose scores in a split are all NaN has the reference -inf there, as a row without keys has."""
    query, key, value = make_inputs(1, queries, 700)
    broken_query, broken_key = query.clone(), key.clone()
    broken_query[0, 0, 3, 5] = float("nan")
    broken_key[:, :, 512:, 0] = float("nan")  # all keys of the third split

    def run(query: Tensor, key: Tensor, num_splits: int) -> tuple[Tensor, ...]:
        with kernels.running(architecture):
            return fused_attn.fused_attention(
                query, key, value, num_splits=num_splits, return_lse=True, return_max=returns_max, backend="cuda"
            )

    for changed in ((broken_query, key), (query, broken_key)):
        for x, expected in zip(run(*changed, num_splits=3), run(*changed, num_splits=1), strict=True):
            assert torch.equal(x.isfinite(), expected.isfinite())
    for num_splits in (1, 3):
        assert all(x[0, 0, 3].isnan().all() for x in run(broken_query, key, num_splits))
        assert all(x.isnan().all() for x in run(query, broken_key, num_splits))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((0, 0), "expected one above 0"),
        ((2, 1), "for packed calls only"),
        ((-1, 1), "decode_splits: expected 0 to 256"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    splits: tuple[int, int], message: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_splits, "key_splits", lambda problem: KeySplits(*splits))
    with kernels.running(80), pytest.raises((ValueError, RuntimeError), match=message):
        fused_attn.fused_attention(*make_inputs(1, 4, 300), backend="cuda")


# ---- The plan


def problem_of(batch=1, heads=32, kv_heads=32, queries=1, keys=65536, head_dim=128, **others) -> AttentionProblem:
    """A problem for an H100, which has 132 multiprocessors, each with room for two programs of the decode kernels."""
    device = others.pop("device", torch.device("cpu"))
    sizes = (batch, heads, kv_heads, queries, keys, head_dim, head_dim)
    return AttentionProblem(*sizes, torch.bfloat16, device, 1.0, **others)


SERVER = {"kv_heads": 8, "queries": 300, "page_size": 16, "is_packed": True}


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({}, (8, 0)),  # 256 programs
        ({"kv_heads": 8}, (33, 0)),
        ({"heads": 1, "kv_heads": 1}, (256, 0)),
        ({"keys": 2048}, (8, 0)),
        ({"keys": 511}, (1, 0)),
        ({"keys": 0}, (1, 0)),
        ({"batch": 5}, (1, 0)),  # 160 programs run at once
        ({"batch": 9}, (4, 0)),  # 288 programs would be one round and a bit
        ({"batch": 64}, (1, 0)),  # many rounds
        ({"band": Band(1023, 0, is_from_end=True)}, (4, 0)),
        ({"band": Band(1023, 0)}, (1, 0)),  # the query sees the first key
        ({"num_splits": 5}, (5, 0)),
        ({"heads": 64, "kv_heads": 2}, (66, 0)),
        # Four tiles of rows of a head group are too many for the decode kernels.
        ({"heads": 64, "kv_heads": 1}, (0, 2)),
        ({"heads": 64, "kv_heads": 1, "page_size": 16}, (0, 2)),
        # 1 to 8 queries of 4 heads run in the decode kernels, also beside longer sequences.
        (SERVER | {"batch": 4}, (4, 1)),
        (SERVER, (16, 4)),  # 96 tiles of the long sequence: three rounds of programs in place of one of tiles
        (SERVER | {"queries": 100}, (16, 4)),
        (SERVER | {"queries": 100, "num_splits": 5}, (5, 1)),
        (SERVER | {"batch": 4, "page_size": 0}, (0, 1)),  # without pages
        # The large kernels: splits occupy all multiprocessors, if they have enough keys.
        ({"queries": 33}, (0, 4)),
        ({"queries": 33, "band": Band(right=0, is_from_end=True)}, (0, 4)),
        ({"queries": 33, "band": Band(2047, 0, is_from_end=True)}, (0, 4)),
        ({"queries": 128, "heads": 8, "kv_heads": 8}, (0, 16)),
        ({"queries": 512, "heads": 8, "kv_heads": 8}, (0, 4)),
        ({"queries": 1024, "heads": 8, "kv_heads": 8}, (0, 2)),
        ({"queries": 2048, "heads": 1, "kv_heads": 1}, (0, 8)),
        ({"queries": 128, "heads": 1, "kv_heads": 1, "band": Band(right=0)}, (0, 1)),  # queries see 128 keys at most
        ({"queries": 128, "heads": 1, "kv_heads": 1, "band": Band(left=4000, is_from_end=True)}, (0, 11)),
        ({"queries": 128, "heads": 1, "kv_heads": 1, "band": Band(4000, offset=65536 - 128)}, (0, 11)),
        ({"queries": 128, "heads": 1, "kv_heads": 1, "keys": 10**6}, (0, 131)),
        ({"band": Band(right=4000)}, (8, 0)),
        ({"band": Band(right=1000)}, (3, 0)),
        ({"queries": 33, "keys": 1024}, (0, 1)),
        ({"queries": 33, "keys": 1536}, (0, 4)),
        ({"queries": 33, "batch": 3}, (0, 4)),  # 96 tiles: three rounds of a quarter of the keys
        ({"queries": 33, "batch": 3, "keys": 2048}, (0, 1)),
        ({"queries": 33, "batch": 9}, (0, 1)),
        ({"dropout_p": 0.1}, (0, 4)),
        ({"num_splits": 5, "queries": 128}, (0, 5)),
        ({"num_splits": 5, "queries": 128, "batch": 100}, (0, 5)),
        ({"num_splits": 5, "queries": 129}, (0, 1)),
        ({"num_splits": 5, "queries": 64, "is_packed": True}, (0, 1)),
    ],
    ids=str,
)
def test_number_of_splits(changes: dict, splits: tuple[int, int]) -> None:
    assert cuda_splits.key_splits(problem_of(**changes)) == KeySplits(*splits)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "cuda"),
        ({"queries": 33}, "cuda"),
        ({"queries": 5000}, "cuda"),
        ({"kv_heads": 8, "queries": 8}, "cuda"),  # the decode kernels
        ({"kv_heads": 8, "queries": 9}, "triton"),  # 36 rows of a head group
        ({"kv_heads": 8, "queries": 32}, "triton"),
        ({"kv_heads": 8, "queries": 33}, "cuda"),
        ({"kv_heads": 4, "queries": 32}, "cuda"),  # 256 rows
        ({"kv_heads": 8, "queries": 32, "is_packed": True}, "triton"),
        ({"kv_heads": 8, "queries": 32, "is_packed": True, "page_size": 16}, "cuda"),  # both kinds of kernels
        ({"kv_heads": 16, "queries": 32}, "cuda"),
        ({"heads": 64, "kv_heads": 1}, "triton"),
        ({"kv_heads": 8, "dropout_p": 0.1}, "triton"),  # the decode kernels know no dropout
    ],
    ids=str,
)
def test_which_backend_comes_first_on_a_gpu(changes: dict, first: str) -> None:
    order = [backend.name for backend in dispatch.preferred(problem_of(**changes))]
    assert order.index(first) == 1  # behind "cpu", which runs nothing on a GPU
