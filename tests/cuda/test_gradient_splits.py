"""Backward with several programs for each block of rows of a gradient, executed, and the number of programs."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from kernels import Kernels, dividing_gradients
from torch import Tensor

import fused_attn
from fused_attn.attention.inputs import Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.backends.cuda import splits as cuda_splits
from fused_attn.backends.cuda import workspace as cuda_workspace
from fused_attn.backends.cuda.splits import GradientSplits

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("poisoned")


def divided(name: str, **changes) -> Case:
    """200 queries of each of two heads, which share a key head, with 300 keys."""
    sizes = {"heads": 2, "kv_heads": 1, "batch": 2, "seqlen_q": 200, "seqlen_k": 300, "head_dim": 64}
    return Case(name, **sizes | changes)


CASES = [
    *(divided(f"head-dim-{dim}", head_dim=dim) for dim in (*cuda.HEAD_DIMS, 8, 72, 160)),
    divided("value-dim", head_dim=192, value_dim=128),
    divided("value-dim-smaller", head_dim=128, value_dim=40),
    divided("not-grouped", kv_heads=2),
    divided("more-splits-than-blocks", seqlen_q=50, seqlen_k=30),
    divided("one-query", seqlen_q=1),
    divided("causal-upper-left", options={"is_causal": True}),  # blocks of keys that no query sees
    divided("causal-at-the-end", attn_mask=cases.lower_right),
    divided("window", attn_mask=cases.lower_right, options={"window_size": (100, 0)}),
    divided("padding", key_padding_mask=cases.padding(300, 33), edit=cases._nan_in_padding, sinks=cases.sink()),
    divided("padding-scattered", key_padding_mask=cases.scattered_padding, edit=cases._nan_in_padding),
    divided("lengths", key_lengths=(0, 250), edit=cases._nan_behind_lengths, attn_mask=cases.lower_right),
    divided("mask", attn_mask=cases.bool_mask("BHLS")),
    divided("mask-empty-rows", attn_mask=cases.empty_rows_mask),
    divided("ranges", key_ranges=cases.random_ranges("BHL", 2)),
    divided("bias", attn_mask=cases.float_mask("B1LS")),
    divided("bias-head-dim-256", head_dim=256, attn_mask=cases.float_mask("B1LS")),
    divided("relative-bias", relative_bias=cases.per_head_bias, options={"softcap": 2.0}),
    divided("dropout", options={"dropout_p": 0.3, "dropout_seed": 5}),
    divided("dropout-head-dim-256", head_dim=256, options={"dropout_p": 0.3, "dropout_seed": 5}),
    divided("layout", kv_layout="blhd", query_layout="blhd"),
    Case("packed", heads=2, kv_heads=1, lengths_q=(100, 0, 30, 64), lengths_k=(300, 90, 1, 130), head_dim=64),
    Case("packed-long-and-short", heads=2, lengths_q=(300, 5, 0, 9), lengths_k=(600, 7, 30, 1), head_dim=64),
    Case("packed-head-dim-192", heads=2, kv_heads=1, lengths_q=(100, 0, 30), lengths_k=(300, 90, 1), head_dim=192),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, architecture: int, dtype: str, kernels: Kernels) -> None:
    with kernels.running(architecture, seed=len(case.id)), dividing_gradients(dq=2, dk=3):
        cases.check(case, DTYPES[dtype], "cuda")


def leaves(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *shape, head_dim, generator=generator).half().requires_grad_() for shape in shapes]


def gradients(inputs: list[Tensor], wanted: str = "qkv", **options) -> tuple[Tensor, ...]:
    out = fused_attn.fused_attention(*inputs, backend="cuda", enable_gqa=True, **options)
    return torch.autograd.grad(out, [inputs["qkv".index(name)] for name in wanted], torch.ones_like(out))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_repeats_give_the_same_bits(head_dim: int, kernels: Kernels) -> None:
    inputs = leaves(1, 4, 2, 300, 300, head_dim)

    def run(seed: int, resident_blocks: int) -> tuple[Tensor, ...]:
        with kernels.running(90, seed, resident_blocks=resident_blocks), dividing_gradients(dq=2, dk=3):
            return gradients(inputs, is_causal=True)

    first = run(seed=1, resident_blocks=1)
    for resident_blocks in (3, 16):
        for x, y in zip(first, run(2, resident_blocks), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_some_gradients_only(head_dim: int, architecture: int, wanted: str, kernels: Kernels) -> None:
    inputs = leaves(1, 2, 1, 100, 100, head_dim)
    with kernels.running(architecture):
        expected = gradients(inputs, wanted)
        with dividing_gradients(dq=2, dk=2):
            found = gradients(inputs, wanted)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_each_pair_of_blocks_is_visited_once(head_dim: int, architecture: int, kernels: Kernels) -> None:
    """Splits take as many products as one program that makes all steps of a block."""
    inputs = leaves(1, 2, 1, 300, 300, head_dim)

    def products() -> int:
        with kernels.running(architecture):
            gradients(inputs, is_causal=True)
            return kernels.statistics.mma + kernels.statistics.wgmma

    whole = products()
    with dividing_gradients(dq=3, dk=2):
        assert products() == whole > 0


@pytest.mark.parametrize("architecture", [80, 90])
def test_few_keys_are_divided_without_being_asked(architecture: int, kernels: Kernels) -> None:
    """Two blocks of keys with 64 steps each: 132 multiprocessors can do better."""
    inputs = leaves(1, 2, 2, 4096, 32)
    with kernels.running(architecture):
        assert planned(problem_of(heads=2, kv_heads=2, queries=4096, keys=32, head_dim=64)).dk > 1
        found = gradients(inputs)
        # Forward; preparation, the kernels for dk and dv and for dq, and adding the parts. On sm_90a, one kernel
        # computes all gradients.
        assert kernels.statistics.launches == (5 if architecture == 80 else 4)
    out = fused_attn.fused_attention(*inputs, backend="reference")
    for x, y in zip(found, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("head_dim", "splits", "message"),
    [
        (64, (2, 1), "dq_splits: expected 1 for the fused backward, got 2"),
        (64, (1, 0), "dk_splits: expected 1 to 256, got 0"),
        (256, (257, 1), "dq_splits: expected 1 to 256, got 257"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    head_dim: int, splits: tuple[int, int], message: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_splits, "gradient_splits", lambda *_: GradientSplits(*splits))
    with kernels.running(90), pytest.raises((ValueError, RuntimeError), match=message):
        gradients(leaves(1, 1, 1, 64, 64, head_dim))


# ---- The plan


def planned(problem: AttentionProblem, rows: int | None = None) -> GradientSplits:
    """rows: those of all sequences if the problem is packed"""
    return cuda_splits.gradient_splits(problem, rows or problem.seqlen_q, rows or problem.seqlen_k)


def problem_of(batch=1, heads=16, kv_heads=16, queries=4096, keys=4096, head_dim=128, **others) -> AttentionProblem:
    """A problem for an H100, which has 132 multiprocessors."""
    sizes = (batch, heads, kv_heads, queries, keys, head_dim, head_dim)
    return AttentionProblem(*sizes, torch.bfloat16, torch.device("cpu"), 1.0, **others)


@pytest.mark.parametrize(
    ("architecture", "changes", "splits"),
    [
        # Blocks enough: training is not divided.
        (90, {}, (1, 1)),
        (80, {}, (1, 1)),
        (90, {"batch": 8, "queries": 512, "keys": 512}, (1, 1)),
        (90, {"heads": 8, "queries": 2048, "keys": 2048}, (1, 1)),  # 128 blocks
        # 32 query heads share a key head: 32 blocks of keys, with 2048 steps each.
        (90, {"heads": 32, "kv_heads": 1}, (1, 4)),
        (90, {"heads": 32, "kv_heads": 2}, (1, 2)),
        (80, {"heads": 32, "kv_heads": 1}, (1, 4)),  # 64 blocks, and room for 264 programs
        (90, {"heads": 32, "kv_heads": 1, "queries": 320, "keys": 1024}, (1, 5)),  # five tiles of queries
        (90, {"heads": 128, "kv_heads": 1, "queries": 64}, (1, 1)),  # one tile
        # Cross-attention to 77 tokens of a text: 16 blocks.
        (90, {"keys": 77}, (1, 8)),
        (90, {"keys": 77, "batch": 2}, (1, 4)),
        (90, {"keys": 77, "batch": 16}, (1, 1)),
        (90, {"keys": 77, "queries": 512, "heads": 8, "head_dim": 64}, (1, 1)),  # four tiles of 128 queries
        # 128 queries with many keys.
        (80, {"queries": 128, "keys": 65536, "heads": 8}, (16, 1)),
        (90, {"queries": 128, "keys": 65536, "heads": 8}, (1, 1)),
        (90, {"queries": 128, "keys": 65536, "heads": 8, "head_dim": 256}, (16, 1)),
        (80, {"queries": 128, "keys": 65536, "heads": 8, "band": Band(255, 0, is_from_end=True)}, (1, 1)),
        # One long sequence with one head. With a window, a block meets few blocks of the other side.
        (90, {"heads": 1, "kv_heads": 1}, (1, 4)),
        (90, {"heads": 1, "kv_heads": 1, "band": Band(128, 0)}, (1, 1)),
        (80, {"heads": 1, "kv_heads": 1, "band": Band(128, 0)}, (1, 1)),
        (90, {"heads": 1, "kv_heads": 1, "queries": 65536, "keys": 128, "band": Band(left=0)}, (1, 1)),
        (90, {"heads": 1, "kv_heads": 1, "queries": 65536, "keys": 128, "band": Band(right=0)}, (1, 54)),
        # 16 packed sequences, of which one is long: 32 + 15 blocks of keys.
        (90, {"heads": 32, "kv_heads": 1, "batch": 16, "is_packed": True, "rows": 4096 + 15}, (1, 8)),
        # A few steps are not worth a launch.
        (90, {"queries": 300, "keys": 100}, (1, 1)),
        (90, {"queries": 0, "keys": 0}, (1, 1)),
    ],
    ids=str,
)
def test_number_of_splits(
    architecture: int, changes: dict, splits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "device_architecture", lambda problem: architecture)
    rows = changes.pop("rows", None)
    assert planned(problem_of(**changes), rows) == splits


def bytes_of_backward(
    problem: AttentionProblem,
    splits: GradientSplits,
    names: tuple[str, ...] = ("query", "key", "value"),
    masks: int = 0,
) -> int:
    """The workspace of backward for the gradients of these names."""
    wanted = Wanted(**{name: name in names for name in Wanted._fields})
    return cuda_workspace.workspace_bytes(
        problem, problem.seqlen_q, problem.seqlen_k, masks, 0, cuda_splits.UNDIVIDED, splits, wanted, None
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("architecture", [80, 90])
def test_parts_take_little_memory(architecture: int, head_dim: int, kernels: Kernels) -> None:
    """There are parts only if there are few blocks of rows. Lists of what a mask shows have no more entries."""
    with kernels.running(architecture):
        for batch, heads, kv_heads in ((1, 1, 1), (1, 8, 8), (1, 64, 1), (4, 32, 4)):
            for queries, keys in ((64, 10**6), (10**6, 64), (4096, 4096), (500, 20000)):
                problem = problem_of(batch, heads, kv_heads, queries, keys, head_dim)
                for masks in (0, 1):
                    divided = bytes_of_backward(problem, planned(problem), masks=masks)
                    assert divided - bytes_of_backward(problem, GradientSplits(), masks=masks) <= 150 * 2**20


@pytest.mark.parametrize("dk", [1, 2])
def test_number_of_sums_of_dq(dk: int, kernels: Kernels) -> None:
    """With two splits, 64 blocks of keys share half of the 64 tiles of queries. So each tile has two sums."""
    problem, splits = problem_of(heads=1, kv_heads=1, queries=4096, keys=8192), GradientSplits(dk=dk)
    with kernels.running(90):
        of_dq = bytes_of_backward(problem, splits) - bytes_of_backward(problem, splits, ("key", "value"))
    assert of_dq // (4096 * 128 * 4) == dk


def test_many_splits_are_listed_in_a_launch_of_their_own(kernels: Kernels) -> None:
    """With padding, one block of threads lists those of a batch entry: 96 heads x 4 blocks, six splits of each."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 96, rows, 8, generator=generator).half().requires_grad_() for rows in (70, 500, 500)]
    padding = torch.zeros(1, 500, dtype=torch.bool)
    padding[:, 400:] = True

    def launches(dk: int) -> int:
        with kernels.running(90), dividing_gradients(dq=1, dk=dk):
            gradients(inputs, key_padding_mask=padding)
            return kernels.statistics.launches

    assert launches(6) == launches(1) + 2  # the list, and adding the parts
