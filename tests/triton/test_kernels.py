"""The results of the Triton kernels, on the GPU, or without one in Triton's interpreter on the CPU.

On a machine with a GPU, all tests of this file are marked `gpu`, so that `pytest -m gpu` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import cases
import oracle
import pytest
import torch
from cases import CASES, Case
from conftest import DEVICE, runnable_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import CALLS, check_layouts, operator_calls
from test_dropout import kept
from test_fuzz import attention_cases, fuzz, packed_cases, paged_cases
from torch import Tensor

import fused_attn

pytest.importorskip("triton.language")

from fused_attn.backends.triton import backend, decode, launcher
from fused_attn.partial import attention_partial, attention_partial_backward

IS_GPU = DEVICE == "cuda"
# The interpreter does not multiply bfloat16 correctly.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if IS_GPU else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

#: Cases whose query, key, value and gradient take 4 GiB each in a dtype of two bytes. They do not run in float32.
HUGE = ("strides-past-2-31", "strides-past-2-31-mask")
QUICK = ("gqa-4-2", "padding-nan-decode", "relative-bias-decode", "empty-rows-huge-sinks", "varlen-dropout", "rank-2")

pytestmark = [
    pytest.mark.usefixtures("poisoned", "quick_interpreter", "gpu_arithmetic"),
    # numpy warns of infinities and NaN in the interpreter. The kernels make some on purpose, and discard others.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    # The interpreter of Triton 3.6 causes this warning for every loop bound.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    *([pytest.mark.gpu] if IS_GPU else []),
]


@pytest.fixture(scope="module")
def quick_interpreter() -> Iterator[None]:
    """Without a GPU, the interpreter is used as `interpreter.quick` makes it."""
    if IS_GPU:
        yield
        return
    import interpreter

    with interpreter.quick():
        yield


@pytest.fixture
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_GPU:
        import interpreter

        interpreter.round_as_on_gpus(monkeypatch)


def is_run(case: Case, dtype: torch.dtype) -> bool:
    """Whether a test computes the case in this dtype."""
    is_wide = max(case.head_dim, case.value_dim or 0) > backend.max_head_dim(dtype)
    return not is_wide and not (case.id in HUGE and dtype == torch.float32)


def case_of(case_id: str) -> Case:
    return next(case for case in CASES if case.id == case_id)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            id=f"{case.id}-{NAMES[dtype]}",
            marks=[pytest.mark.quick] if case.id in QUICK and dtype == torch.float16 else [],
        )
        for case in CASES
        for dtype in DTYPES
        if is_run(case, dtype)
    ],
)
def test_case(case: Case, dtype: torch.dtype) -> None:
    if IS_GPU and case.id in HUGE and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB on the GPU")
    cases.check(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("case", cases.LOGITS_BEYOND_MILLIONS, ids=lambda case: case.id)
def test_huge_logits(case: Case) -> None:
    cases.check(case, torch.float32, "triton", DEVICE)


@pytest.mark.quick
def test_layouts_survive_the_way_to_the_device() -> None:
    """Tests `Inputs.on`: the tensors on the device have the strides, offset and contents that the case specifies."""
    for case in CASES:
        if case.id in HUGE:
            continue
        inputs = case.make(torch.float16)
        moved = inputs.on(DEVICE)
        for there, here in zip(
            (*moved.tensors.values(), moved.dout), (*inputs.tensors.values(), inputs.dout), strict=True
        ):
            assert there.device.type == DEVICE
            assert there.stride() == here.stride() and there.storage_offset() == here.storage_offset(), case.id
            torch.testing.assert_close(there.cpu(), here, rtol=0, atol=0, equal_nan=True)


@settings(fuzz, max_examples=100 if IS_GPU else 16)
@given(case=attention_cases(), dtype=st.sampled_from(DTYPES))
def test_fuzz(case: Case, dtype: torch.dtype) -> None:
    cases.check(case, dtype, "triton", DEVICE)


@settings(fuzz, max_examples=60 if IS_GPU else 6)
@given(case=packed_cases(), dtype=st.sampled_from(DTYPES))
def test_fuzz_packed(case: Case, dtype: torch.dtype) -> None:
    cases.check(case, dtype, "triton", DEVICE)


@settings(fuzz, max_examples=60 if IS_GPU else 6)
@given(case=paged_cases(), dtype=st.sampled_from(DTYPES))
def test_fuzz_paged(case: Case, dtype: torch.dtype) -> None:
    cases.check(case, dtype, "triton", DEVICE)


@pytest.mark.quick
@pytest.mark.parametrize(("p", "seed"), [(0.1, 0), (0.5, 2**32), (0.999, 2**63 - 1)])
def test_dropout_bits(p: float, seed: int) -> None:
    bits = kept("triton", p, seed, device=DEVICE)
    assert torch.equal(bits, torch.from_numpy(oracle.dropout_keep(seed, p, 0, *bits.shape)))
    assert torch.equal(bits, kept(runnable_backends()[0], p, seed))


def test_dropout_bits_of_long_rows() -> None:
    shape = (1, 1, 200, 700)
    bits = kept("triton", 0.3, 77, shape, DEVICE)
    assert torch.equal(bits, torch.from_numpy(oracle.dropout_keep(77, 0.3, 0, *shape)))


@pytest.mark.quick
def test_dropout_bits_of_the_backward_kernels() -> None:
    """All scores are 0, and inputs are chosen so that the sign of a gradient's entry says whether it was dropped."""
    p, seed, batch, heads, rows, columns = 0.4, 5, 2, 3, 70, 67

    def gradient(query: Tensor, key: Tensor, value: Tensor, dout: Tensor, wanted: int) -> Tensor:
        leaves = [x.expand(batch, heads, -1, -1).to(DEVICE) for x in (query, key, value)]
        leaves[wanted].requires_grad_()
        out = fused_attn.fused_attention(*leaves, dropout_p=p, dropout_seed=seed, backend="triton")
        return torch.autograd.grad(out, leaves[wanted], dout.expand(batch, heads, -1, -1).to(DEVICE))[0].cpu()

    # With dout = identity, dv[j, i] is the prob (i, j) after dropout.
    of_value = gradient(torch.zeros(rows, 8), torch.zeros(columns, 8), torch.zeros(columns, rows), torch.eye(rows), 2)
    # Values and dout are 1, so that dprobs is positive where a prob survives, and 0 where it was dropped. Delta, their
    # mean, lies between, so that dscores is positive where a prob survives alone. With identity keys, dq = dscores.
    one = torch.ones(columns, 1), torch.ones(rows, 1)
    of_query = gradient(torch.zeros(rows, columns), torch.eye(columns), *one, 0)
    of_key = gradient(torch.eye(rows), torch.zeros(columns, rows), *one, 1)
    expected = torch.from_numpy(oracle.dropout_keep(seed, p, 0, batch, heads, rows, columns))
    assert torch.equal(of_value.mT > 0, expected)
    assert torch.equal(of_query > 0, expected)
    assert torch.equal(of_key.mT > 0, expected)


@pytest.mark.parametrize("first_key", [36, 38])
def test_dropout_bits_of_a_part(first_key: int) -> None:
    """With one-hot values, the outputs are the weights. The part begins at other positions than the whole attention."""
    p, seed, rows, columns = 0.4, 5, 70, 67
    query, key = (torch.zeros(1, 2, length, 8, device=DEVICE) for length in (rows, columns))
    value = torch.eye(columns, device=DEVICE).expand(1, 2, -1, -1).contiguous().requires_grad_()
    out, _ = attention_partial(
        query, key, value, batch_offset=3, head_offset=1, query_offset=65, key_offset=first_key,
        dropout_p=p, dropout_seed=seed, backend="triton",
    )  # fmt: skip
    dout = torch.eye(rows, columns, device=DEVICE).expand(1, 2, -1, -1)
    (dvalue,) = torch.autograd.grad(out, value, dout)
    whole = torch.from_numpy(oracle.dropout_keep(seed, p, 3, 1, 3, 65 + rows, first_key + columns))
    expected = whole[:, 1:, 65:, first_key:]
    assert torch.equal(out.cpu() != 0, expected)
    assert torch.equal(dvalue.mT.cpu() != 0, expected[..., :columns, :])


@pytest.mark.parametrize("columns", [None, 1, 40])
def test_backward_of_a_part_whose_rows_have_a_large_lse(columns: int | None) -> None:
    """The probs of a part do not add up to 1, so no kernel may take their sum for a rounding error of the LSE.

    columns: those of a bias. With one column, the gradient of the whole rows would follow from the LSE alone.
    """
    torch.manual_seed(0)
    query, key, value, out, dout = (torch.randn(1, 2, 40, 16, dtype=torch.float64, device=DEVICE) for _ in range(5))
    lse = torch.full((1, 2, 40), 20.0, dtype=torch.float64, device=DEVICE)
    bias = None if columns is None else torch.randn(1, 2, 40, columns, dtype=torch.float64, device=DEVICE)
    expected, found = (
        attention_partial_backward(
            *(x.to(dtype) for x in (dout, query, key, value, out, lse)), scale=1.0, backend=backend,
            attn_mask=None if bias is None else bias.to(dtype),
        )
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton"))
    )  # fmt: skip
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


LONG = [
    *(case_of(case_id) for case_id in ("length-799-3", "length-4096-8", "length-1023-1024-causal")),
    Case("long-keys", batch=1, heads=1, seqlen_q=150, seqlen_k=2048, head_dim=32, options={"scale": 0.2},
         edit=lambda tensors: tensors["value"].add_(3.0), differentiated=()),
    Case("long-gqa", batch=1, kv_heads=1, seqlen_q=2048, seqlen_k=8, has_dlse=True),
    Case("long-biases", batch=16, heads=4, seqlen_q=3, seqlen_k=8, attn_mask=cases.float_mask("LS"),
         relative_bias=cases.shared_bias, sinks=cases.sink()),
]  # fmt: skip


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_long_sums(case: Case) -> None:
    """Sums of many terms in float32. An error that grows with every term would exceed PyTorch's, which sums blocks."""
    cases.check(case, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("factor", [4, 12, 30])
def test_large_logits(factor: int) -> None:
    """Errors are below twice those of PyTorch's eager attention.

    The rule of `fused_attn.tolerance` is not enough here, because what it allows grows with the logits.
    """
    case = case_of(f"logits-of-randn-times-{factor}")
    truth, eager, *_ = cases.expected(case, torch.float32)
    result = cases.check(case, torch.float32, "triton", DEVICE)

    def error(result: oracle.Result, name: str) -> float:
        return (dict(result.items())[name].double() - dict(truth.items())[name]).abs().max().item()

    for name in ("out", "lse", "dvalue"):
        assert error(result, name) < 2 * error(eager, name), name


def _second_half(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.arange(case.seqlen_k) > case.seqlen_k // 2).expand(1, 1, 1, -1)


SPLIT = [
    Case("split", batch=1, heads=1, seqlen_q=1, seqlen_k=1200, has_dlse=True),
    Case(
        "split-group-padding-sinks",
        batch=1,
        heads=4,
        kv_heads=1,
        seqlen_q=3,
        seqlen_k=1100,
        key_padding_mask=cases.padding(700),
        edit=cases._nan_in_padding,
        sinks=cases.sink(),
        has_dlse=True,
    ),
    Case(
        "split-lower-right-relative-bias-dropout",
        batch=1,
        seqlen_q=2,
        seqlen_k=1537,
        attn_mask=cases.lower_right,
        relative_bias=cases.per_head_bias,
        options={"dropout_p": 0.2, "dropout_seed": 3},
    ),
    Case("split-blind", batch=1, heads=1, seqlen_q=2, seqlen_k=1100, attn_mask=_second_half, has_dlse=True),
    Case(
        "split-all-blind",
        batch=1,
        heads=1,
        seqlen_q=2,
        seqlen_k=1100,
        key_padding_mask=cases.padding(0),
        sinks=cases.sink(),
    ),
]


@pytest.fixture
def decide_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., int]], None]]:
    """A function that replaces `decode.num_splits` by a rule of the test."""

    def decide(rule: Callable[..., int]) -> None:
        launcher._plan.cache_clear()
        monkeypatch.setattr(decode, "num_splits", rule)

    yield decide
    launcher._plan.cache_clear()


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.id)
def test_split_keys(case: Case, decide_splits) -> None:
    """If several programs divide the keys of a head among themselves, results are the same as without splits."""
    decided = []
    rule = decode.num_splits

    def spy(*args) -> int:
        decided.append(rule(*args))
        return decided[-1]

    decide_splits(spy)
    split = cases.check(case, torch.float32, "triton", DEVICE)
    assert decided and min(decided) >= 2
    decide_splits(lambda *args: 1)
    whole = cases.check(case, torch.float32, "triton", DEVICE)
    torch.testing.assert_close(dict(split.items()), dict(whole.items()))


@pytest.mark.parametrize("value_dim", [24, 64])
def test_merge_of_more_splits_than_are_loaded_at_a_time(value_dim: int) -> None:
    """The number of splits is no multiple of the number that is loaded, and the last splits have no keys."""
    num_splits = 2 * decode.LOADED_SPLITS.value + 5
    sizes = {"batch": 2, "heads": 2, "kv_heads": 1, "seqlen_q": 3, "seqlen_k": 1200, "value_dim": value_dim}
    case = Case(f"split-{num_splits}", **sizes, sinks=cases.sink(), options={"num_splits": num_splits})
    cases.check(case, torch.float32, "triton", DEVICE)


def test_float32_logits_beyond_a_billion(gpu_arithmetic: None, generator: torch.Generator) -> None:
    """The maximum of a row is a rounded product, so that no exponential of a score may come from an unrounded one."""
    query, key, value = torch.randn(3, 1, 1, 64, 128, generator=generator).mul(3e4).to(DEVICE)
    out = fused_attn.fused_attention(query, key, value, backend="triton")
    torch.testing.assert_close(out, fused_attn.fused_attention(query, key, value, backend="reference"))


def test_splits_of_large_logits_have_the_right_weights(gpu_arithmetic: None) -> None:
    """The largest logits of the splits, near 1e6, are half a unit apart."""
    quarter = (torch.arange(512) // 128).half()
    query, key = torch.zeros(1, 1, 1, 64).half(), torch.zeros(1, 1, 512, 64).half()
    query[..., 0], key[..., 0] = 1024, 8192
    query[..., 1], key[..., 1] = 8, quarter / 2
    inputs = [x.to(DEVICE) for x in (query, key, quarter[None, None, :, None].expand(1, 1, 512, 64))]
    split, whole = (fused_attn.fused_attention(*inputs, num_splits=n, backend="triton") for n in (4, 1))
    torch.testing.assert_close(split, whole, rtol=2**-10, atol=0)


def _large_row_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(1, 1, case.seqlen_q, 1, generator=generator).to(dtype) + 600


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_row_bias_and_sinks_of_a_large_size(dtype: torch.dtype) -> None:
    """An LSE near 600 has a large rounding error in float32. The probability of the sink is exact nevertheless."""
    case = Case(
        "large-row-bias-sinks", batch=1, seqlen_q=48, seqlen_k=40, head_dim=32, attn_mask=_large_row_bias,
        sinks=cases.sink(603.5), has_dlse=True,
    )  # fmt: skip
    cases.check(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("case_id", ["softcap-with-everything", "gqa-6-2-causal-padded"])
def test_deterministic(case_id: str) -> None:
    """Repeated calls give equal bits, because no sum depends on the order in which programs run."""
    inputs = case_of(case_id).make(torch.float16).on(DEVICE)
    first = cases.run(inputs, "triton")
    for _ in range(50 if IS_GPU else 1):
        again = cases.run(inputs, "triton")
        for (name, x), (_, y) in zip(first.items(), again.items(), strict=True):
            assert torch.equal(x, y), name


def test_saved_tensors_hooks_may_return_other_strides() -> None:
    """The kernels read rows, so a saved out whose columns lie apart must be copied."""
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 2, 13, 8, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]

    def results() -> Tensor:
        out, lse = fused_attn.fused_attention(*args, is_causal=True, return_lse=True, backend="triton")
        return out.sin().sum() + lse.sum()

    expected = torch.autograd.grad(results(), args)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x):
        changed = results()
    torch.testing.assert_close(torch.autograd.grad(changed, args), expected)


WIDE = [
    Case("wide-window", seqlen_q=70, seqlen_k=67, options={"window_size": (2**40, 2**31 - 1)}),
    Case("wide-window-causal", seqlen_q=70, seqlen_k=67, options={"window_size": (2**31 - 1, 0), "is_causal": True}),
    *(case_of(case_id) for case_id in ("softcap-with-everything", "causal-bias-lower-right-window", "varlen-dropout")),
    *(case_of(case_id) for case_id in HUGE),
    SPLIT[2],
]


@pytest.mark.skipif(IS_GPU, reason="only the interpreter checks integers")
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.id)
def test_integers_do_not_overflow(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its debug mode, the interpreter raises an error if a sum or product of integers overflows."""
    from triton.runtime.interpreter import interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=True, debug=True)
    monkeypatch.setattr(interpreter_builder, "options", options)
    cases.check(case, torch.float16, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", CALLS)
def test_results_lie_in_memory_as_compiled_code_expects(name: str, dtype: torch.dtype) -> None:
    call = operator_calls("triton", torch.Generator().manual_seed(0), dtype)[name]
    check_layouts(tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in call))


def test_compiled() -> None:
    """`torch.compile` without a graph break gives the same bits, forward and backward."""
    inputs = case_of("padding-causal").make(torch.float16).on(DEVICE)
    expected = cases.run(inputs, "triton")
    # Compilers differ in how they fuse operators. The graph here has only one, so one compiler is enough.
    compiled = torch.compile(inputs.function, fullgraph=True, backend="inductor" if IS_GPU else "aot_eager")
    actual = cases.run(inputs._replace(function=compiled), "triton")
    for (name, x), (_, y) in zip(expected.items(), actual.items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.skipif(IS_GPU, reason="GPUs multiply bfloat16")
@pytest.mark.quick
def test_interpreter_refuses_bfloat16() -> None:
    x = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter does not multiply bfloat16"):
        fused_attn.fused_attention(x, x, x, backend="triton")
    assert fused_attn.explain(x, x, x).chosen != "triton"


@pytest.mark.quick
def test_what_triton_cannot_run_is_refused_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 4, 520, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        fused_attn.fused_attention(x, x, x, backend="triton")
    for reason in ("are on cpu, expected cuda", "dtype torch.float64 is none of", "head dim 520 is above 512"):
        assert reason in str(error.value)


@pytest.mark.quick
def test_rows_of_float32_are_shorter() -> None:
    x = torch.zeros(1, 1, 4, 264)
    with pytest.raises(ValueError, match=r"head dim 264 is above 256 in torch\.float32"):
        fused_attn.fused_attention(x, x, x, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("options", [{}, {"window": (9, 0), "dropout_p": 0.3}], ids=["plain", "window-dropout"])
def test_packed_rows_that_no_sequence_owns(dtype: torch.dtype, options: dict) -> None:
    cases.check_strays(dtype, "triton", DEVICE, **options)


# ---- Lengths of keys and pages, whose contents the host does not read


def _paged_call(batch: int = 3) -> dict[str, Tensor]:
    case = dataclasses.replace(case_of("paged-splits"), batch=batch, seqlen_q=1)
    return {name: x.to(DEVICE) for name, x in case.make(torch.float16).tensors.items()}


def test_lengths_are_clipped() -> None:
    query, key = (torch.randn(3, 2, n, 16, dtype=torch.float16, device=DEVICE) for n in (2, 40))
    wrong = torch.tensor([2**31 - 1, -5, 41], dtype=torch.int32, device=DEVICE)
    right = torch.tensor([40, 0, 40], dtype=torch.int32, device=DEVICE)
    found, expected = (
        fused_attn.fused_attention(query, key, key, key_lengths=lengths, backend="triton") for lengths in (wrong, right)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [-1, 10**6, 2**31 - 1])
def test_numbers_of_pages_are_clipped(number: int) -> None:
    tensors = _paged_call()
    table = tensors["block_table"]
    last = tensors["key_pages"].shape[0] - 1
    wrong, right = table.clone(), table.clone()
    wrong[0, 3], right[0, 3] = number, min(max(number, 0), last)
    found, expected = (
        fused_attn.fused_attention_paged(**tensors | {"block_table": x}, backend="triton") for x in (wrong, right)
    )
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_no_bit_depends_on_the_other_entries() -> None:
    """With num_splits, entries give the same bits alone, beside others, and with a narrower table."""
    tensors = _paged_call()

    def rows(entries: list[int], columns: int) -> Tensor:
        chosen = {name: tensors[name][entries] for name in ("query", "block_table", "key_lengths")}
        chosen["block_table"] = chosen["block_table"][:, :columns]
        return fused_attn.fused_attention_paged(**tensors | chosen, is_causal=True, num_splits=3, backend="triton")

    together = rows([0, 1, 2], 69)
    for entries, columns in (([0], 69), ([1], 33), ([2, 1], 40), ([1] * 5, 69)):
        assert torch.equal(rows(entries, columns), together[entries])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_a_trace_runs_with_other_lengths() -> None:
    """torch.jit.trace stores the lengths of its example. Kernels that used them would write beyond a shorter result."""

    def call(x: Tensor) -> Tensor:
        return fused_attn.fused_attention(x, x, x, backend="triton")

    traced = torch.jit.trace(call, torch.randn(1, 2, 5, 16, device=DEVICE))
    for length in (4, 9):
        x, dout = torch.randn(2, 1, 2, length, 16, device=DEVICE)
        results = []
        for function in (traced, call):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            results.append((out, *torch.autograd.grad(out, leaf, dout)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
