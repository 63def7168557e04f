"""Dense biases on sm_90a, executed: TMA loads tiles of those whose strides it accepts (csrc/cuda/sm90/bias_tiles.h)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import cases
import pytest
import torch
from cases import Builder, Case
from kernels import Kernels
from torch import Tensor

import fused_attn
from fused_attn.backends.cuda import hardware

pytestmark = pytest.mark.usefixtures("poisoned")

#: Several blocks of keys and of queries, the last ones not full.
BIASED = Case("bias-tiles", batch=1, heads=2, seqlen_q=150, seqlen_k=400, attn_mask=cases.float_mask("HLS"))


def check(kernels: Kernels, dtype: torch.dtype, **changes: object) -> None:
    """Checks a case that differs from BIASED, forward and backward, with threads in an order of the case's own."""
    case = dataclasses.replace(BIASED, id=f"bias-tiles-{sorted(changes)}-{changes.get('head_dim')}", **changes)
    with kernels.running(90, seed=zlib.crc32(case.id.encode())):
        cases.check(case, dtype, "cuda")


def stored_in(columns: Callable[[int], int], first: int = 0) -> Builder:
    """A bias (L, S) within rows of columns(S) numbers, from number `first` on."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        rows = cases.randn((case.seqlen_q, columns(case.seqlen_k)), dtype, generator)
        return rows[:, first : first + case.seqlen_k]

    return build


def toeplitz(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows that overlap: each begins 8 numbers after the one before."""
    numbers = cases.randn((8 * case.seqlen_q + case.seqlen_k,), dtype, generator)
    return numbers.as_strided((case.seqlen_q, case.seqlen_k), (8, 1))


def transposed(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return cases.randn((case.seqlen_k, case.seqlen_q), dtype, generator).t()


@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [("BHLS", 64), ("1HLS", 96), ("B1LS", 128), ("LS", 256), ("BH1S", 128), ("B11S", 64), ("1H1S", 256), ("111S", 96)],
)
def test_every_broadcast_shape(shape: str, head_dim: int, kernels: Kernels) -> None:
    """If queries share a row, a tile has one row, and every lane of a warp reads it."""
    dtype = torch.float16 if shape.startswith("B") else torch.bfloat16
    check(kernels, dtype, batch=2, seqlen_q=70, seqlen_k=152, head_dim=head_dim, attn_mask=cases.float_mask(shape))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_rings_of_tiles_go_round(head_dim: int, kernels: Kernels) -> None:
    check(kernels, torch.bfloat16, head_dim=head_dim)


@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        (64, {"options": {"is_causal": True, "softcap": 3.0}, "heads": 4, "kv_heads": 2, "seqlen_q": 70}),
        (128, {"options": {"window_size": (40, 20)}, "seqlen_k": 304}),  # blocks that one consumer alone sees
        (96, {"options": {"dropout_p": 0.2, "dropout_seed": 3, "scale": -0.2}, "seqlen_q": 70}),
        (128, {"key_padding_mask": cases.scattered_padding, "edit": cases._nan_in_padding, "sinks": cases.sink()}),
        (256, {"key_padding_mask": cases.float_padding, "relative_bias": cases.per_head_bias, "seqlen_k": 200}),
        (64, {"seqlen_q": 1, "seqlen_k": 136}),
        (128, {"seqlen_q": 65, "seqlen_k": 8, "differentiated": ("query", "attn_mask")}),
    ],
    ids=["causal-gqa-softcap", "window", "dropout", "padding-sinks", "other-biases", "one-query", "some-gradients"],
)
def test_other_features_beside_a_bias(head_dim: int, changes: dict, kernels: Kernels) -> None:
    check(kernels, torch.float16 if head_dim == 128 else torch.bfloat16, head_dim=head_dim, **changes)


#: The layout of a bias, the number of keys, and whether TMA accepts the layout.
LAYOUTS = {
    "odd": (stored_in(lambda keys: keys), 149, False),
    "odd-in-aligned-rows": (stored_in(lambda keys: 152), 149, True),
    "slice-aligned": (stored_in(lambda keys: 168, 8), 144, True),
    "slice-misaligned": (stored_in(lambda keys: 168, 1), 144, False),
    "overlapping-rows": (toeplitz, 144, True),
    "transposed": (transposed, 144, False),
    "float32": (cases.float_mask("LS", torch.float32), 144, False),
    "one-key": (cases.float_mask("L1"), 144, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_tma_accepts(layout: str, kernels: Kernels) -> None:
    """The bias of 128 queries and two blocks of keys takes eight boxes, each with 64 queries and 64 keys."""
    bias, keys, is_accepted = LAYOUTS[layout]
    case = dataclasses.replace(BIASED, id=layout, heads=1, seqlen_q=70, seqlen_k=keys, head_dim=64, attn_mask=bias)
    inputs = case.make(torch.bfloat16)
    loads = []
    for attn_mask in (inputs.tensors["attn_mask"], None):
        with kernels.running(90):
            rows = [inputs.tensors[name] for name in ("query", "key", "value")]
            fused_attn.fused_attention(*rows, attn_mask=attn_mask, backend="cuda")
            loads.append(kernels.statistics.tma_loads)
    assert loads[0] - loads[1] == (8 if is_accepted else 0)
    with kernels.running(90):
        cases.check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_tiles_take_memory_of_the_same_kernel(head_dim: int, kernels: Kernels) -> None:
    """A kernel takes more shared memory if it loads tiles of a bias. All its launches have to set the same limit: the
    emulation reports one that sets another limit than the launch before.
    """
    for bias in (cases.float_mask("LS"), cases.float_mask("LS", torch.float32)):
        check(kernels, torch.bfloat16, head_dim=head_dim, heads=1, seqlen_q=70, seqlen_k=152, attn_mask=bias)


@pytest.mark.parametrize(
    ("query", "bias", "written"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_write_the_gradient_in_the_dtype_of_the_bias(
    architecture: int, query: torch.dtype, bias: torch.dtype, written: torch.dtype, kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It may be as large as the scores, so a copy in float32 would take twice as much memory, and time to convert."""
    sizes = {"seqlen_q": 70, "seqlen_k": 152, "head_dim": 64}
    case = dataclasses.replace(BIASED, **sizes, attn_mask=cases.float_mask("HLS", bias), differentiated=("attn_mask",))
    found = []
    with kernels.running(architecture):
        backward = hardware.module.backward

        def recorded(inputs, saved, grads, *others):
            found.append(grads.bias.dtype)
            return backward(inputs, saved, grads, *others)

        monkeypatch.setattr(hardware.module, "backward", recorded)
        cases.run(case.make(query), "cuda")
    assert found == [written]


def test_blocks_of_threads_run_several_programs(kernels: Kernels) -> None:
    """If each batch entry has a bias, each tile of scores is a program: 36 of them here, for two multiprocessors."""
    case = dataclasses.replace(
        BIASED, batch=2, seqlen_q=300, seqlen_k=304, head_dim=64, attn_mask=cases.float_mask("BHLS")
    )
    blocks = {}
    for differentiated in (("query",), ("query", "attn_mask")):
        with kernels.running(90):
            cases.run(dataclasses.replace(case, differentiated=differentiated).make(torch.float16), "cuda")
            blocks[len(differentiated)] = kernels.statistics.blocks
    assert blocks[2] - blocks[1] == 2


@pytest.mark.parametrize("shape", ["LS", "1S"])
def test_no_bank_conflicts(shape: str, kernels: Kernels) -> None:
    """The swizzle spreads the rows of a tile over all banks. Lanes that read the same row do not collide either."""
    case = dataclasses.replace(BIASED, heads=1, seqlen_q=70, head_dim=64, attn_mask=cases.float_mask(shape))
    tensors = case.make(torch.bfloat16).tensors
    with kernels.running(90, count_bank_conflicts=True):
        fused_attn.fused_attention(**tensors, backend="cuda")
        assert kernels.statistics.shared_wavefronts == kernels.statistics.ideal_wavefronts
