"""The CUDA kernels, executed: every curated case, with the race detector on, against the oracle.

float16 runs a case with its own head dims, rounded up to multiples of 8, and with threads in one fixed order (seed 0,
copies as late as possible). bfloat16 runs it with one of the head dims that have kernels of their own, and with threads
in a random order that is the case's own.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import cases
import oracle
import pytest
import torch
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import Kernels
from operator_calls import CALLS, check_layouts, operator_calls
from test_fuzz import attention_cases, fuzz, packed_cases, paged_cases
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn.attention import inputs as tensors_of_call
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem, Scalars
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.partial import attention_partial, attention_partial_backward

ARCHITECTURES = (80, 90)
#: Head dims of queries and values that have kernels of their own.
HEAD_DIMS = [*((dim, dim) for dim in cuda.HEAD_DIMS), (192, 128)]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

pytestmark = pytest.mark.usefixtures("poisoned")


def has_kernels(dim: int) -> bool:
    return 0 < dim <= cuda.HEAD_DIMS[-1] and dim % cuda.HEAD_DIM_STEP == 0


def with_kernels(case: Case) -> Case:
    """The case with the next larger head dims that kernels take."""

    def rounded_up(dim: int) -> int:
        return dim + -dim % cuda.HEAD_DIM_STEP

    if case.shapes is not None:
        return dataclasses.replace(case, shapes=tuple((*x[:-1], rounded_up(x[-1])) for x in case.shapes))
    value_dim = None if case.value_dim is None else rounded_up(case.value_dim)
    return dataclasses.replace(case, head_dim=rounded_up(case.head_dim), value_dim=value_dim)


def without_missing_columns(case: Case, index: int) -> Case:
    """The case with a head dim that has kernels of its own: one after another, for one case after another."""
    head_dim = cuda.HEAD_DIMS[index % len(cuda.HEAD_DIMS)]
    if case.shapes is not None:
        return dataclasses.replace(case, shapes=tuple((*x[:-1], head_dim) for x in case.shapes))
    if case.head_dim in cuda.HEAD_DIMS and case.value_dim in (None, *cuda.HEAD_DIMS):
        return case
    return dataclasses.replace(case, head_dim=head_dim, value_dim=None)


def with_few_heads(case: Case) -> Case:
    """The case with one head if it has many scores: the second head would add seconds of emulation, and nothing new."""
    is_long = case.seqlen_q * case.seqlen_k > 2**19 and case.kv_heads is None
    return dataclasses.replace(case, heads=1) if is_long else case


def is_small(case: Case) -> bool:
    return "past-2-31" not in case.id  # 4 GiB for each tensor, with a record of accesses for every two bytes


def is_wide(case: Case) -> bool:
    """Whether no kernel takes the head dim or the value dim, however it is rounded up."""
    return max(case.head_dim, case.value_dim or 0) > cuda.HEAD_DIMS[-1]


SUPPORTED = [
    with_few_heads(with_kernels(case)) for case in CASES if is_small(case) and not is_wide(case) and case.value_dim != 0
]
WITHOUT_MISSING_COLUMNS = [without_missing_columns(case, index) for index, case in enumerate(SUPPORTED)]
UNSUPPORTED = [
    case for case in CASES if not (has_kernels(case.head_dim) and has_kernels(case.value_dim or case.head_dim))
]


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def running(kernels: Kernels, architecture: int) -> Iterator[None]:
    with kernels.running(architecture):
        yield


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.id)
def test_case(case: Case, architecture: int, kernels: Kernels) -> None:
    with kernels.running(architecture):
        cases.check(case, torch.float16, "cuda")


#: In these cases, some rows have finfo.min as the bias of every key. In bfloat16, the log-sum-exp of such a row is
#: about -3e38: as a float, it says nothing about how many keys share the row. So backward takes the gradients of such a
#: row for 0, where they should be those of a mean (docs/numerics.md, "Limits").
LOST_ROWS = ("float-mask-finfo-min", "float-mask-finfo-min-padding")


def with_right_gradients(case: Case, dtype: torch.dtype) -> Case:
    """The case, without gradients if they are lost."""
    is_lost = case.id in LOST_ROWS and dtype == torch.bfloat16
    return dataclasses.replace(case, has_dlse=False, differentiated=()) if is_lost else case


@pytest.mark.parametrize("case", WITHOUT_MISSING_COLUMNS, ids=lambda case: case.id)
def test_case_without_missing_columns(case: Case, architecture: int, kernels: Kernels) -> None:
    case = with_right_gradients(case, torch.bfloat16)
    with kernels.running(architecture, seed=zlib.crc32(case.id.encode())):
        cases.check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", cases.LOGITS_BEYOND_MILLIONS, ids=lambda case: case.id)
def test_huge_logits(case: Case, architecture: int, kernels: Kernels) -> None:
    """Forward alone: a log-sum-exp of millions in float32 says too little about the weights for the backward."""
    case = dataclasses.replace(case, head_dim=64, has_dlse=False, differentiated=())
    with kernels.running(architecture):
        cases.check(case, torch.bfloat16, "cuda")
        # float16 holds no larger logits. Tensor cores do not sum larger ones as exactly as lse would need.
        if case.id == "logits-1e6":
            expected = cases.expected(case, torch.float16)
            result = cases.run(case.make(torch.float16), "cuda")
            oracle.assert_close(result._replace(lse=expected.truth.lse.float()), expected)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("options", [{}, {"window": (9, 0), "dropout_p": 0.3}], ids=["plain", "window-dropout"])
@pytest.mark.usefixtures("running", "poisoned")
def test_packed_rows_that_no_sequence_owns(dtype: torch.dtype, options: dict) -> None:
    cases.check_strays(dtype, "cuda", **options)


@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("seed", range(1, 3))
def test_every_head_dim_in_random_orders(
    head_dim: int, value_dim: int, seed: int, architecture: int, kernels: Kernels
) -> None:
    """Several blocks of keys, so that rings go round, with every feature that moves their ends."""
    case = Case(
        f"random-order-{head_dim}",
        heads=2,
        kv_heads=1,
        seqlen_q=150,
        seqlen_k=330,
        head_dim=head_dim,
        value_dim=value_dim,
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
@pytest.mark.parametrize("head_dim", [64, 128, 256])
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


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (150, 100)], ids=["full", "causal", "window"])
def test_fused_backward_ends_on_any_number_of_multiprocessors(window: tuple[int, int], kernels: Kernels) -> None:
    """Blocks of keys wait for their turn to add to dq. There may be fewer multiprocessors than blocks of keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, dout = (torch.randn(1, 1, 520, 64, generator=generator).bfloat16() for _ in range(4))

    def gradients(resident_blocks: int) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        with kernels.running(90, seed=resident_blocks, resident_blocks=resident_blocks):
            out = fused_attn.fused_attention(*leaves, window_size=window, backend="cuda")
            return torch.autograd.grad(out, leaves, dout)

    of_one = gradients(1)
    for resident_blocks in (2, 8):
        assert all(map(torch.equal, gradients(resident_blocks), of_one))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (136, 8), (192, 136), (200, 128), (128, 136)])
def test_smaller_values_take_fewer_products(head_dim: int, value_dim: int, architecture: int, kernels: Kernels) -> None:
    """The matrix instructions of forward and of backward, for 128 queries and 128 keys.

    On sm_90a, in the kernels for head dims 192 and 128, each of two consumers sums scores over 192 columns, 16 at a
    time, and values over 128 keys, 16 at a time: 2 * (12 + 8) instructions wgmma in forward. In the kernels for head
    dim 256, there are two blocks of 64 keys: 2 * 2 * (16 + 4). On sm_80, an instruction mma has 16 rows, 8 columns and
    16 products to sum: 8 * 16 * 12 + 8 * 16 * 8 in forward.
    """
    is_small = head_dim <= 192 and value_dim <= 128
    products = {
        80: (2560, 10752) if is_small else (4096, 16384),
        90: (40, 256) if is_small else (80, 368),
    }[architecture]
    make = lambda dim: torch.ones(1, 1, 128, dim).half().requires_grad_()  # noqa: E731

    def count() -> int:
        return kernels.statistics.mma if architecture == 80 else kernels.statistics.wgmma

    with kernels.running(architecture):
        out = fused_attn.fused_attention(make(head_dim), make(head_dim), make(value_dim), backend="cuda")
        forward = count()
        out.backward(torch.ones_like(out))
        assert (forward, count() - forward) == products


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_workspace_grows_with_the_length(head_dim: int) -> None:
    """Without a dense mask: it holds sums of dq of every query, and no number of a pair of a query and a key."""
    heads, most_bytes = 4, {}
    for length in (4096, 8192):
        most_bytes[length] = hardware.module.workspace_bytes(
            architecture=hardware.device_architecture(None), is_backward=True, batch=1, batch_entries=1,
            num_heads=heads, num_kv_heads=heads, rows_q=length, rows_k=length, seqlen_q=length, seqlen_k=length,
            head_dim=head_dim, value_dim=head_dim, is_packed=False, has_key_padding=True, mask_entries=0,
            relative_bias_heads=heads, decode_splits=0, large_splits=1, dq_splits=1, dk_splits=1, wants_dquery=True,
            wants_dkey=True, wants_dvalue=True, dbias_shape=None, wants_dkey_bias=False, wants_drelative_bias=False,
        )  # fmt: skip
        assert most_bytes[length] < heads * length * (4 * 2 * 64 + 4 * head_dim)
    assert most_bytes[8192] < 2.01 * most_bytes[4096]


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("beyond", [4, 8])
def test_a_workspace_starts_at_a_multiple_of_16_bytes(beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels copy parts of it in bulk, which a GPU does for groups of 16 bytes only."""

    def shifted(*args: Any, **options: Any) -> torch.Tensor:
        memory = workspace(*args, **options)
        return torch.empty(memory.numel() + beyond // 4)[beyond // 4 :]

    workspace = cuda.workspace
    monkeypatch.setattr(cuda, "workspace", shifted)
    x = torch.randn(1, 1, 16, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=f"workspace: expected .* multiple of 16 bytes, got .* {beyond} bytes beyond"):
        fused_attn.fused_attention(x, x, x, num_splits=2, backend="cuda")


# ---- Softcap, biases, masks and sinks, over several tiles of queries and keys


def large(name: str, **changes: Any) -> Case:
    sizes = {"batch": 2, "heads": 2, "kv_heads": 1, "seqlen_q": 140, "seqlen_k": 200, "head_dim": 64}
    return Case(name, **sizes | {"has_dlse": True} | changes)


def hidden_block(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A bool mask (1, H, L, S) that hides scattered entries, all of one block, and all keys of some queries."""
    mask = cases.bool_mask("1HLS")(case, dtype, generator)
    mask[..., :128, 64:128] = False
    mask[:, 1, 96:] = False
    mask[..., 7, :] = False
    return mask


#: Everything at once. A call has either a bool mask or a bias.
MIXED_FEATURES = {
    "bias": {
        "attn_mask": cases.float_mask("1HLS"),
        "relative_bias": cases.shared_bias,
        "options": {
            "window_size": (140, 30),
            "softcap": 3.0,
            "dropout_p": 0.2,
            "dropout_seed": 17,
            "return_max": True,
        },
    },
    "mask": {
        "attn_mask": hidden_block,
        "relative_bias": cases.per_head_bias,
        "options": {"is_causal": True, "dropout_p": 0.2, "dropout_seed": 17},
    },
}


@pytest.mark.parametrize(("head_dim", "value_dim"), [*HEAD_DIMS, (72, 40), (136, 72)])
@pytest.mark.parametrize("features", MIXED_FEATURES)
def test_mixed_features(features: str, head_dim: int, value_dim: int, architecture: int, kernels: Kernels) -> None:
    case = large(
        f"mixed-{features}-{head_dim}",
        head_dim=head_dim,
        value_dim=value_dim,
        key_padding_mask=cases.padding(200, 70),
        sinks=cases.sink(),
        **MIXED_FEATURES[features],
    )
    with kernels.running(architecture, seed=head_dim):
        cases.check(case, torch.float16, "cuda")


@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_sinks_in_plain_kernels(head_dim: int, value_dim: int, architecture: int, kernels: Kernels) -> None:
    """Sinks alone: with each further feature above, the general kernel runs."""
    case = large(
        f"sinks-{head_dim}", head_dim=head_dim, value_dim=value_dim, sinks=cases.sink(), options={"is_causal": True}
    )
    with kernels.running(architecture, seed=head_dim):
        cases.check(case, torch.float16, "cuda")


REPEATED = [
    *(
        large(f"bias-{shape}", attn_mask=cases.float_mask(shape))
        for shape in ("BHLS", "1HLS", "B1LS", "11LS", "B11S", "1H1S", "BHL1", "11L1", "1111")
    ),
    large("key-bias", key_padding_mask=cases.float_padding),
    large("key-bias-and-pair-bias", key_padding_mask=cases.float_padding, attn_mask=cases.float_mask("1HLS")),
    large("relative-bias-per-head-and-sinks", relative_bias=cases.per_head_bias, sinks=cases.sink()),
    large("relative-bias-shared-and-mask", relative_bias=cases.shared_bias, attn_mask=hidden_block),
    Case(
        "varlen",
        heads=4,
        kv_heads=2,
        lengths_q=(150, 0, 70, 5),
        lengths_k=(200, 30, 0, 140),
        head_dim=64,
        relative_bias=cases.per_head_bias,
        sinks=cases.sink(),
        options={"is_causal": True, "softcap": 2.0, "dropout_p": 0.2, "dropout_seed": 17},
        has_dlse=True,
    ),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.id)
def test_shared_gradients_are_the_same_every_time(case: Case, architecture: int, kernels: Kernels) -> None:
    """Those of biases and sinks are sums over blocks, which may run in any order."""
    inputs = case.make(torch.bfloat16)

    def result(seed: int, resident_blocks: int) -> oracle.Result:
        with kernels.running(architecture, seed, resident_blocks=resident_blocks):
            return cases.run(inputs, "cuda")

    first, second = result(seed=1, resident_blocks=2), result(seed=2, resident_blocks=5)
    oracle.assert_close(first, cases.expected(case, torch.bfloat16))
    for (name, x), (_, y) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "wanted",
    [
        ("attn_mask",),
        ("relative_bias",),
        ("sinks",),
        ("key_padding_mask",),
        ("query", "attn_mask"),
        ("attn_mask", "key_padding_mask"),
        ("key", "relative_bias"),
        ("value", "sinks"),
        ("query", "key", "value"),
        ("attn_mask", "relative_bias", "sinks"),
    ],
    ids="-".join,
)
def test_some_gradients_alone(wanted: tuple[str, ...], architecture: int, kernels: Kernels) -> None:
    case = large(
        "-".join(wanted),
        kv_heads=2,
        head_dim=128,
        attn_mask=cases.float_mask("B1LS"),
        key_padding_mask=cases.float_padding,
        relative_bias=cases.per_head_bias,
        sinks=cases.sink(),
        differentiated=wanted,
    )
    with kernels.running(architecture):
        cases.check(case, torch.float16, "cuda")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("features", [{}, {"softcap": 5.0}, {"relative_bias": 1.0}, {"sinks": 1.0}], ids=str)
def test_dropout_bits(features: dict, generator: torch.Generator) -> None:
    """A value of unit vectors shows which weights of out are dropped, and a dout of unit vectors those of dvalue."""
    batch, heads, rows, columns, seed = 1, 2, 140, 200, 2**40 + 12345
    query, key = (torch.randn(batch, heads, n, 64, generator=generator).half() for n in (rows, columns))
    value, dout = (torch.eye(n, 256).half().expand(batch, heads, n, 256) for n in (columns, rows))
    shapes = {"relative_bias": (heads, rows + columns - 1), "sinks": (heads,)}
    options = {name: torch.full(shapes[name], x) if name in shapes else x for name, x in features.items()}
    value.requires_grad_()
    out = fused_attn.fused_attention(query, key, value, dropout_p=0.4, dropout_seed=seed, backend="cuda", **options)
    (dvalue,) = torch.autograd.grad(out, value, dout)
    expected = torch.from_numpy(oracle.dropout_keep(seed, 0.4, 0, batch, heads, rows, columns))
    assert torch.equal(out[..., :columns] != 0, expected)
    assert torch.equal(dvalue[..., :rows].mT != 0, expected)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(("features", "first_key"), [({}, 36), ({"softcap": 5.0}, 38)], ids=str)
def test_dropout_bits_of_a_part(features: dict, first_key: int, generator: torch.Generator) -> None:
    """As `test_dropout_bits`, for a part of a larger attention that begins at other positions."""
    batch, heads, rows, columns, seed = 1, 2, 140, 200, 2**40 + 12345
    origin = {"batch_offset": 3, "head_offset": 1, "query_offset": 65, "key_offset": first_key}
    query, key = (torch.randn(batch, heads, n, 64, generator=generator).half() for n in (rows, columns))
    value, dout = (torch.eye(n, 256).half().expand(batch, heads, n, 256) for n in (columns, rows))
    options = {"dropout_p": 0.4, "dropout_seed": seed, "backend": "cuda", **origin, **features}
    value.requires_grad_()
    out, _ = attention_partial(query, key, value, **options)
    (dvalue,) = torch.autograd.grad(out, value, dout.float())
    whole = torch.from_numpy(oracle.dropout_keep(seed, 0.4, 3, batch, 1 + heads, 65 + rows, first_key + columns))
    expected = whole[:, 1:, 65:, first_key:]
    assert torch.equal(out[..., :columns] != 0, expected)
    assert torch.equal(dvalue[..., :rows].mT != 0, expected)


@pytest.mark.usefixtures("running")
def test_backward_of_a_part_with_one_bias_for_each_row(generator: torch.Generator) -> None:
    """In whole rows, such a bias has no effect on the softmax. In a part, the bias moves logits of some keys alone."""
    query, key, value, out, dout = (torch.randn(1, 2, 40, 64, generator=generator).half() for _ in range(5))
    lse, bias = torch.full((1, 2, 40), 6.0), torch.randn(1, 2, 40, 1, generator=generator).half()
    expected, found = (
        attention_partial_backward(
            *(x.to(dtype) for x in (dout, query, key, value, out)), lse.to(accumulate), attn_mask=bias.to(dtype),
            backend=backend,
        )
        for dtype, accumulate, backend in (
            (torch.float64, torch.float64, "reference"), (torch.float16, torch.float32, "cuda")
        )
    )  # fmt: skip
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x.double(), y, rtol=0.0, atol=0.01 * y.abs().max().item())


class LargestTensor(TorchDispatchMode):
    """Watches how many bytes the largest memory has that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("is_expanded", [False, True], ids=["shared", "expanded"])
def test_padding_beside_a_shared_bias_stores_no_sum(
    is_expanded: bool, architecture: int, kernels: Kernels, generator: torch.Generator
) -> None:
    """AlphaFold adds a bias (B, 1, 1, S) and a bias (1, H, L, S). Nothing as large as their sum is stored.

    A bias that the caller has expanded to the shape of the sum is not copied. Its gradient would have that shape.
    """
    batch, heads, length, head_dim = 16, 2, 96, 8
    leaves = [torch.randn(batch, heads, length, head_dim, generator=generator).half() for _ in range(3)]
    pair_bias = torch.randn(1, heads, length, length, generator=generator).half()
    padding = torch.randn(batch, length, generator=generator)
    leaves = [x.requires_grad_() for x in leaves]
    padding.requires_grad_()
    pair_bias.requires_grad_(not is_expanded)
    attn_mask = pair_bias.expand(batch, -1, -1, -1) if is_expanded else pair_bias
    with kernels.running(architecture), LargestTensor() as largest:
        out = fused_attn.fused_attention(*leaves, attn_mask, key_padding_mask=padding, backend="cuda")
        out.backward(torch.ones_like(out))
    assert 0 < largest.bytes < batch * heads * length * length


def test_hidden_blocks_are_not_computed(architecture: int, kernels: Kernels, generator: torch.Generator) -> None:
    """Of 512 x 512 scores, a mask that shows 128 x 128 of them costs less than a quarter of the products."""
    query, key, value = (torch.randn(1, 1, 512, 64, generator=generator).half().requires_grad_() for _ in range(3))
    relative_bias = torch.zeros(1023, requires_grad=True)
    is_visible = torch.zeros(512, 512, dtype=torch.bool)
    is_visible[128:256, 256:384] = True

    def count(mask: torch.Tensor) -> int:
        with kernels.running(architecture):
            out = fused_attn.fused_attention(query, key, value, mask, relative_bias=relative_bias, backend="cuda")
            torch.autograd.grad(out, (query, key, value, relative_bias), torch.ones_like(out))
            return kernels.statistics.mma + kernels.statistics.wgmma

    assert 0 < count(is_visible) < count(torch.ones_like(is_visible)) / 4


# ---- Random combinations


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Those of `test_fuzz`, with head dims that have kernels and up to three times as many queries and keys."""
    case = draw(st.one_of(attention_cases(), packed_cases(), paged_cases()))
    if case.lengths_q is None and case.page_size is None:
        longer_q, longer_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        case = dataclasses.replace(case, seqlen_q=longer_q * case.seqlen_q, seqlen_k=longer_k * case.seqlen_k)
    return with_kernels(case)


@settings(fuzz, max_examples=settings().max_examples // 3)
@given(case=random_cases(), dtype=st.sampled_from(list(NAMES)), seed=st.integers(0, 2**32))
def test_random_cases(case: Case, dtype: torch.dtype, seed: int, architecture: int, kernels: Kernels) -> None:
    with kernels.running(architecture, seed):
        cases.check(case, dtype, "cuda")


# ---- Layouts


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("layout", ["sliced", "every_second_column", "one_row_expanded", "one_head_expanded"])
def test_rows_that_no_kernel_can_read_are_copied(layout: str) -> None:
    case = Case(f"layout-{layout}", head_dim=64, query_layout=layout, kv_layout=layout, dout_layout=layout)
    cases.check(case, torch.float16, "cuda")


@pytest.mark.usefixtures("running")
def test_rows_may_overlap() -> None:
    cases.check_overlapping_rows("cuda")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_results_of_copied_rows_follow_the_layout_of_the_caller(is_packed: bool, generator: torch.Generator) -> None:
    """As compiled code expects, which does not know that the backend copies rows that are not aligned."""

    def rows() -> torch.Tensor:
        x = torch.randn(4, 9, 68, generator=generator).half()[..., :64]  # heads before rows
        return x.transpose(0, 1) if is_packed else x.unflatten(1, (3, 3)).transpose(0, 1)

    query, key, value, dout = (rows() for _ in range(4))
    offsets = torch.tensor([0, 9]).int() if is_packed else None
    inputs = tensors_of_call.Inputs(query, key, value, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    shapes = tensors_of_call.Shapes(*(None if x is None else x.shape for x in inputs))
    longest = 9 if is_packed else 3
    problem = AttentionProblem.of(shapes, query.dtype, query.device, Scalars(longest, longest, 0.125))
    out, lse, _ = cuda.forward(problem, inputs, needs_lse=True, needs_max=False)
    wanted = tensors_of_call.Wanted(query=True, key=True, value=True)
    grads = cuda.backward(problem, inputs, tensors_of_call.Saved(out, lse, dout=dout), wanted)
    for found, like in zip((out, *grads), (query, query, key, value), strict=False):
        assert found.stride() == empty_like_layout(like, 64).stride()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_results_lie_in_memory_as_compiled_code_expects(
    name: str, architecture: int, kernels: Kernels, generator: torch.Generator
) -> None:
    call = operator_calls("cuda", generator, torch.float16, value_dim=8)[name]
    with kernels.running(architecture):
        check_layouts(call)


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
