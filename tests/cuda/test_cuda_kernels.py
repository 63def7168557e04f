"""The CUDA kernels, executed: every curated case that they support, with the race detector on, against the oracle.

Cases of another head dim are run with one that has kernels. Threads run in one fixed order for float16 (seed 0, copies
as late as possible), and for bfloat16 in a random one that is the case's own.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import cases
import oracle
import pytest
import torch
from cases import CASES, Case
from emulator import Builder
from kernels import Kernels

import fused_attn
from fused_attn.backends import cuda

ARCHITECTURES = (80, 90)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

pytestmark = pytest.mark.usefixtures("poisoned")


def is_supported(case: Case) -> bool:
    """Apart from the head dim."""
    return (
        (case.attn_mask is None or case.attn_mask in (cases.upper_left, cases.lower_right))
        and case.key_padding_mask not in (cases.float_padding, cases.zero_or_minus_inf_padding)
        and case.relative_bias is None
        and case.sinks is None
        and case.options.get("softcap", 0.0) == 0.0
        and case.options.get("scale", 1.0) > 0.0
        and case.value_dim in (None, case.head_dim)
        and (case.shapes is None or case.shapes[0][-1] == case.shapes[2][-1])
        and "past-2-31" not in case.id  # 4 GiB for each tensor, with a record of accesses for every four bytes
    )


def with_kernels(case: Case, index: int) -> Case:
    """The case in a head dim that has kernels: its own, or one of them in turn."""
    head_dim = cuda.HEAD_DIMS[index % len(cuda.HEAD_DIMS)]
    if case.shapes is not None:
        return dataclasses.replace(case, shapes=tuple((*shape[:-1], head_dim) for shape in case.shapes))
    if case.head_dim in cuda.HEAD_DIMS:
        return case
    return dataclasses.replace(case, head_dim=head_dim, value_dim=None)


SUPPORTED = [with_kernels(case, index) for index, case in enumerate(filter(is_supported, CASES))]
UNSUPPORTED = [case for case in CASES if not is_supported(case) and torch.float16 in case.dtypes]


@pytest.fixture(scope="session")
def kernels(builder: Builder) -> Kernels:
    return Kernels(builder)


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def running(kernels: Kernels, architecture: int) -> Iterator[None]:
    with kernels.running(architecture):
        yield


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.id)
def test_case(case: Case, dtype: torch.dtype, architecture: int, kernels: Kernels) -> None:
    seed = 0 if dtype == torch.float16 else zlib.crc32(case.id.encode())
    with kernels.running(architecture, seed):
        cases.check(case, dtype, "cuda")


@pytest.mark.parametrize("case", cases.LOGITS_BEYOND_MILLIONS, ids=lambda case: case.id)
def test_huge_logits(case: Case, architecture: int, kernels: Kernels) -> None:
    """Forward alone: a log-sum-exp of millions in float32 says too little about the weights for the backward."""
    case = dataclasses.replace(case, head_dim=64, has_dlse=False, differentiated=())
    with kernels.running(architecture):
        cases.check(case, torch.bfloat16, "cuda")
        if (
            case.id == "logits-1e6"
        ):  # float16 holds no larger ones; tensor cores do not sum them as exactly as lse would need
            expected = cases.expected(case, torch.float16)
            result = cases.run(case.make(torch.float16), "cuda")
            oracle.assert_close(result._replace(lse=expected.truth.lse.float()), expected)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("options", [{}, {"window": (9, 0), "dropout_p": 0.3}], ids=["plain", "window-dropout"])
@pytest.mark.usefixtures("running")
def test_packed_rows_that_no_sequence_owns(dtype: torch.dtype, options: dict) -> None:
    cases.check_strays(dtype, "cuda", **options)


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_every_head_dim_in_random_orders(head_dim: int, seed: int, architecture: int, kernels: Kernels) -> None:
    """Several blocks of keys, so that rings go round, with every feature that moves their ends."""
    case = Case(
        f"random-order-{head_dim}",
        heads=4,
        kv_heads=2,
        seqlen_q=150,
        seqlen_k=330,
        head_dim=head_dim,
        attn_mask=cases.lower_right,
        key_padding_mask=cases.padding(330, 270),
        options={"window_size": (260, -1), "dropout_p": 0.2, "dropout_seed": 17},
        has_dlse=True,
    )
    with kernels.running(architecture, seed):
        cases.check(case, torch.float16, "cuda")


@pytest.mark.usefixtures("running")
def test_dead_blocks_of_keys_are_not_read(generator: torch.Generator) -> None:
    """What padding drops may be anything, also whole blocks in the middle."""
    query, key, value = (torch.randn(1, 1, 300, 64, generator=generator).half() for _ in range(3))
    is_padding = torch.zeros(1, 300, dtype=torch.bool)
    is_padding[:, 40:290] = True
    kept = ~is_padding[0]
    expected = fused_attn.fused_attention(query, key[:, :, kept], value[:, :, kept], backend="cuda")
    key[:, :, 40:290] = value[:, :, 40:290] = float("nan")
    out = fused_attn.fused_attention(query, key, value, key_padding_mask=is_padding, backend="cuda")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)


@pytest.mark.usefixtures("running")
def test_nan_stays_in_its_sequence(generator: torch.Generator) -> None:
    """Tiles of packed rows reach into the next sequence."""
    lengths = torch.tensor([0, 30, 75, 140], dtype=torch.int32)
    tensors = [torch.randn(140, 2, 64, generator=generator).half() for _ in range(3)]
    for x in tensors:
        x[30:75] = float("nan")
    leaves = [x.requires_grad_() for x in tensors]
    out = fused_attn.fused_attention_varlen(*leaves, lengths, lengths, 65, 65, backend="cuda")
    out.backward(torch.ones_like(out))
    for x in (out, *(leaf.grad for leaf in leaves)):
        assert x[:30].isfinite().all() and x[75:].isfinite().all() and x[30:75].isnan().all()


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1, 2)], ids=["all", "dk-dv"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dropout_hides_no_nan(head_dim: int, wanted: tuple[int, ...], generator: torch.Generator) -> None:
    """A query that is NaN reaches the gradients of the keys that dropout leaves it."""
    tensors = [torch.randn(1, 1, 40, head_dim, generator=generator).half() for _ in range(3)]
    tensors[0][0, 0, 7] = float("nan")
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    out = fused_attn.fused_attention(*leaves, dropout_p=0.3, dropout_seed=5, backend="cuda")
    dkey, dvalue = torch.autograd.grad(out, leaves[1:], torch.ones_like(out))
    # A dropped NaN may come through as well, as it does in eager attention, where it is multiplied by 0.
    reached = dvalue.isnan().all(-1).float().mean().item()
    assert dkey.isnan().all() and reached > 0.5


@pytest.mark.usefixtures("running")
def test_results_are_the_same_every_time(kernels: Kernels, architecture: int, generator: torch.Generator) -> None:
    """In whichever order threads and blocks run: gradients are summed in a fixed order."""
    query, key, value, dout = (torch.randn(1, 2, 200, 64, generator=generator).bfloat16() for _ in range(4))

    def results(seed: int, resident_blocks: int) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        with kernels.running(architecture, seed, resident_blocks=resident_blocks):
            out = fused_attn.fused_attention(*leaves, is_causal=True, backend="cuda")
            return [out, *torch.autograd.grad(out, leaves, dout)]

    for first, second in zip(results(seed=1, resident_blocks=2), results(seed=2, resident_blocks=5), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("layout", ["sliced", "every_second_column", "one_row_expanded", "one_head_expanded"])
def test_rows_that_no_kernel_can_read_are_copied(layout: str) -> None:
    case = Case(f"layout-{layout}", head_dim=64, query_layout=layout, kv_layout=layout, dout_layout=layout)
    cases.check(case, torch.float16, "cuda")


@pytest.mark.usefixtures("running")
def test_strides_of_single_entries_do_not_matter(generator: torch.Generator) -> None:
    """Not a multiple of 16 bytes, and nothing that TMA accepts."""
    query, key, value = (torch.randn(70 * 64, generator=generator).half() for _ in range(3))
    expected = fused_attn.fused_attention(*(x.view(1, 1, 70, 64) for x in (query, key, value)), backend="cuda")
    tensors = (x.as_strided((1, 1, 70, 64), (3, 5, 64, 1)) for x in (query, key, value))
    assert torch.equal(fused_attn.fused_attention(*tensors, backend="cuda"), expected)


@pytest.mark.parametrize("case", UNSUPPORTED, ids=lambda case: case.id)
def test_what_is_not_supported_has_a_reason(case: Case, kernels: Kernels) -> None:
    inputs = case.make(torch.float16)
    with kernels.running(80), pytest.raises(ValueError, match="backend='cuda' cannot run"):
        cases.run(inputs, "cuda")
