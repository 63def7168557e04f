"""How many kernels a call launches: at most one before the large kernels of forward or backward (preparation.h), or two
if a list of blocks of keys is very long.

docs/backends.md has the same table, which a test compares with this one.
"""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import Case
from kernels import Kernels

import fused_attn

#: With more heads than multiprocessors in the emulation, and more than one block of 128 keys.
HEADS, LENGTH = 3, 130
#: One tile of queries and one block of keys for each head.
SHORT = 40

PADDING = {"key_padding_mask": torch.arange(LENGTH)[None] >= LENGTH - 7}
MASK = {"attn_mask": torch.arange(LENGTH)[None] % 3 < torch.arange(LENGTH)[:, None]}
RELATIVE_BIAS = {"relative_bias": torch.linspace(0, 1, 2 * LENGTH - 1)}

#: kind of call -> arguments, and the launches of forward and of backward on sm_80 and on sm_90a
LAUNCHES: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "no mask": ({}, (1, 3), (1, 3)),
    "causal or window": ({"is_causal": True}, (1, 3), (2, 3)),
    "key padding": (PADDING, (2, 3), (2, 3)),
    "bool mask": (MASK, (2, 3), (2, 4)),
    "relative bias": (RELATIVE_BIAS, (2, 3), (2, 3)),
    "all of these": ({"is_causal": True} | PADDING | MASK | RELATIVE_BIAS, (2, 3), (2, 4)),
}


def tensors(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).half().requires_grad_() for _ in range(3)]


def launches(kernels: Kernels, architecture: int, inputs: list[torch.Tensor], call: Any) -> tuple[int, int]:
    """How many kernels forward and backward of a call have launched."""
    with kernels.running(architecture):
        out = call(*inputs)
        forward = kernels.statistics.launches
        out.backward(torch.ones_like(out))
        return forward, kernels.statistics.launches - forward


@pytest.mark.parametrize("kind", LAUNCHES)
def test_one_preparation_for_all_of_a_call(kind: str, kernels: Kernels) -> None:
    options, *expected = LAUNCHES[kind]
    for architecture, count in zip((80, 90), expected, strict=True):
        inputs = tensors(1, HEADS, LENGTH, 64)
        call = lambda *x: fused_attn.fused_attention(*x, **options, backend="cuda")  # noqa: E731
        assert launches(kernels, architecture, inputs, call) == count, architecture


@pytest.mark.parametrize("architecture, count", [(80, (2, 3)), (90, (2, 2))])
def test_packed(architecture: int, count: tuple[int, int], kernels: Kernels) -> None:
    """The preparation clears the rows that belong to no sequence."""
    starts = torch.tensor([0, 33, 60, 97], dtype=torch.int32)
    call = lambda *x: fused_attn.fused_attention_varlen(*x, starts, starts, 37, 37, backend="cuda")  # noqa: E731
    assert launches(kernels, architecture, tensors(97, 1, 64), call) == count


@pytest.mark.parametrize("architecture", [80, 90])
def test_packed_sequences_that_differ_much(architecture: int, kernels: Kernels) -> None:
    """Their tiles of queries are listed, which takes a launch."""
    starts = torch.tensor([0, 1, 300, 301, 301], dtype=torch.int32)
    call = lambda *x: fused_attn.fused_attention_varlen(*x, starts, starts, 299, 299, backend="cuda")  # noqa: E731
    assert launches(kernels, architecture, tensors(301, 1, 64), call)[0] == 2


def test_no_counter_for_one_tile_of_each_multiprocessor(kernels: Kernels) -> None:
    """On sm_90a, forward shares unequal tiles by a counter, which a launch has to reset, only if there are more of them
    than multiprocessors.
    """
    call = lambda *x: fused_attn.fused_attention(*x, is_causal=True, backend="cuda")  # noqa: E731
    assert launches(kernels, 90, tensors(1, HEADS - 1, SHORT, 64), call) == (1, 2)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 1, 2)], ids=["dq", "dkdv", "all"])
@pytest.mark.parametrize(("architecture", "head_dim"), [(80, 64), (80, 256), (90, 64), (90, 256)])
def test_backward_launches_what_is_wanted(
    wanted: tuple[int, ...], architecture: int, head_dim: int, kernels: Kernels
) -> None:
    """After the preparation: a kernel for dq, and one for dk and dv; or one for all, and one that rounds dq."""
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors(1, 1, LENGTH, head_dim))]
    call = lambda *x: fused_attn.fused_attention(*x, **PADDING, backend="cuda")  # noqa: E731
    count = 1 + (0 in wanted) + (1 in wanted or (architecture, head_dim) == (90, 64))
    assert launches(kernels, architecture, inputs, call)[1] == count


@pytest.mark.slow
def test_long_lists_of_padded_blocks_of_keys_take_a_launch_more(kernels: Kernels) -> None:
    """Only some keys are valid, in two blocks, so that the kernels have little to do."""
    heads, length = 33, 62 * 128 + 5  # 2079 blocks of keys

    def padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        keys = torch.arange(length)
        return ((keys < 200) | (keys > 260)).expand(1, -1)

    case = Case("long-list", heads=heads, batch=1, seqlen_q=2, seqlen_k=length, head_dim=64, key_padding_mask=padding)
    with kernels.running(90):
        cases.check(case, torch.bfloat16, "cuda")
        assert kernels.statistics.launches == 2 + 4


def test_the_documentation_has_this_table(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs" / "backends.md").read_text()
    for kind, (_, sm80, sm90) in LAUNCHES.items():
        assert f"| {' | '.join(map(str, (kind, *sm80, *sm90)))} |" in text, kind
