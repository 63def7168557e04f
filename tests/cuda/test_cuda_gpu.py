"""The CUDA kernels on a GPU: every curated case that they support, and what only hardware can show.

Kernels for sm_80 run on every later GPU too, from their PTX; those for sm_90a only on Hopper.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cases
import gpu
import gpu_checks
import oracle
import pytest
import torch
from cases import CASES, Case
from gpu_checks import assert_same
from kernels import dividing_gradients, is_built_for, of_architecture
from test_cuda_kernels import (
    ARCHITECTURES,
    HEAD_DIMS,
    MIXED_FEATURES,
    NAMES,
    SUPPORTED,
    WITHOUT_MISSING_COLUMNS,
    with_right_gradients,
)
from test_decode import CASES as DECODE_CASES
from test_decode import in_pages, make_cache
from test_gradient_splits import CASES as GRADIENT_SPLIT_CASES
from test_partial_gradients import NAMES as DIFFERENTIATED
from test_partial_gradients import WANTED, Call
from test_splits import CASES as SPLIT_CASES
from test_sums_of_dq import CASES as LATENTS

import fused_attn
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).resolve().parents[2]

#: All that the kernels have, over several tiles of queries and of keys.
EVERYTHING = [
    Case(
        f"everything-{head_dim}",
        heads=4,
        kv_heads=2,
        seqlen_q=333,
        seqlen_k=590,
        head_dim=head_dim,
        value_dim=value_dim,
        attn_mask=cases.lower_right,
        key_padding_mask=cases.padding(590, 413),
        options={"window_size": (400, -1), "dropout_p": 0.2, "dropout_seed": 17},
        has_dlse=True,
    )
    for head_dim, value_dim in HEAD_DIMS
]
EVERYTHING += [
    Case(
        f"everything-{features}-{head_dim}",
        heads=4,
        kv_heads=2,
        seqlen_q=333,
        seqlen_k=590,
        head_dim=head_dim,
        value_dim=value_dim,
        key_padding_mask=cases.padding(590, 413),
        sinks=cases.sink(),
        has_dlse=True,
        **MIXED_FEATURES[features],
    )
    for features in MIXED_FEATURES
    for head_dim, value_dim in (*HEAD_DIMS, (40, 72))
]


def random_blocks(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A bool mask (L, S) that shows about half of all blocks of 128 x 128."""
    blocks = torch.rand(-(-case.seqlen_q // 128), -(-case.seqlen_k // 128), generator=generator) < 0.5
    mask = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return mask[: case.seqlen_q, : case.seqlen_k]


LARGE = [
    *(
        Case(f"large-{name}", batch=1, seqlen_q=2100, seqlen_k=4104, head_dim=128, **features)
        for name, features in {
            "relative-bias": {"relative_bias": cases.per_head_bias},
            "bias": {"attn_mask": cases.float_mask("1HLS")},
            "bias-of-keys": {"attn_mask": cases.float_mask("1H1S")},
            "mask": {"attn_mask": random_blocks},
            "sinks": {"sinks": cases.sink(), "options": {"is_causal": True}},
            "softcap-and-sinks": {"sinks": cases.sink(), "options": {"softcap": 20.0, "is_causal": True}},
        }.items()
    ),
    # Forward divides the keys, and tiles of dq have several sums.
    *(Case(f"large-latents-{dim}", batch=1, heads=8, seqlen_q=500, seqlen_k=16000, head_dim=dim) for dim in (64, 128)),
    # Several programs share a block of keys in backward.
    Case("large-few-keys", batch=1, heads=8, seqlen_q=16000, seqlen_k=77, head_dim=64),
    Case("large-one-key-head", batch=1, heads=16, kv_heads=1, seqlen_q=2048, seqlen_k=2048, head_dim=128),
]
#: Cases whose tensors have other layouts than (B, H, L, D), or lengths on the GPU.
LAYOUTS = ("paged-causal", "paged-packed", "key-lengths-lower-right")
MIXED = [
    Case("long-causal", seqlen_q=1024, seqlen_k=1024, head_dim=128, options={"is_causal": True}),
    *EVERYTHING,
    *(case for case in SUPPORTED if case.id in ("padding-causal", "mqa-8-1-decode", "varlen-dropout", *LAYOUTS)),
]
EVERY_MIX = pytest.mark.parametrize("case", MIXED, ids=lambda case: case.id)
EVERY_DTYPE = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}", autouse=True)
def architecture(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whose kernels backend="cuda" runs."""
    if hardware.module is None:
        pytest.skip(f"{hardware.missing}")
    if request.param == 90 and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("kernels for sm_90a need a GPU of compute capability 9")
    if not is_built_for(request.param):  # by default, a build has those for the GPUs of its machine alone
        pytest.skip(f"the module has no kernels for {request.param}: {hardware.module.build_info()['architectures']}")
    with of_architecture(request.param):
        yield request.param


# ---- Right


@EVERY_DTYPE
@pytest.mark.parametrize(
    "case",
    [*SUPPORTED, *EVERYTHING, *LARGE, *DECODE_CASES, *SPLIT_CASES, *LATENTS],
    ids=lambda case: case.id,
)
def test_case(case: Case, dtype: torch.dtype, architecture: int, poisoned: None) -> None:
    if (case.page_size or 0) % hardware.PAGE_STEP and architecture == 90 and not is_built_for(80):
        pytest.skip("the kernels for sm_90a cannot load these pages, and the module has no others")
    cases.check(with_right_gradients(case, dtype), dtype, "cuda", "cuda")


@EVERY_DTYPE
@pytest.mark.parametrize("case", GRADIENT_SPLIT_CASES, ids=lambda case: case.id)
def test_case_with_divided_gradients(case: Case, dtype: torch.dtype, architecture: int, poisoned: None) -> None:
    with dividing_gradients(dq=2, dk=3):
        cases.check(case, dtype, "cuda", "cuda")


@EVERY_DTYPE
@pytest.mark.parametrize("case", WITHOUT_MISSING_COLUMNS, ids=lambda case: case.id)
def test_case_without_missing_columns(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    cases.check(with_right_gradients(case, dtype), dtype, "cuda", "cuda")


@contextlib.contextmanager
def gpu_memory(gibibytes: int) -> Iterator[None]:
    """Memory for one test at a time, among the processes that share the GPU; skips the test if there is not enough."""
    with gpu.alone(Path(tempfile.gettempdir()) / f"fused_attn-gpu-memory-{os.getuid()}"):
        patience = time.monotonic() + 60.0
        while torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
            if time.monotonic() > patience:
                pytest.skip(f"needs {gibibytes} GiB of free memory on the GPU")
            time.sleep(1.0)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_strides_past_2_31(head_dim: int) -> None:
    case = next(case for case in CASES if case.id == "strides-past-2-31")
    with gpu_memory(24):
        cases.check(dataclasses.replace(case, head_dim=head_dim), torch.bfloat16, "cuda", "cuda")


def test_strides_past_2_31_of_a_mask() -> None:
    case = next(case for case in CASES if case.id == "strides-past-2-31-mask")
    with gpu_memory(24):
        cases.check(case, torch.bfloat16, "cuda", "cuda")


def test_more_than_2_31_elements() -> None:
    with gpu_memory(40):
        gpu_checks.check_more_than_2_31_elements("cuda")


def test_rows_may_overlap() -> None:
    """The documentation of cuTensorMapEncodeTiled does not say whether the driver accepts such strides."""
    cases.check_overlapping_rows("cuda", "cuda")


@EVERY_MIX
def test_without_lse(case: Case) -> None:
    """Inference is the same forward, which then leaves the log-sum-exp out."""
    inputs = case.make(torch.bfloat16).on("cuda")
    with torch.no_grad():
        out = inputs.function(**inputs.tensors, **inputs.options, backend="cuda")
    assert torch.equal(out, cases.run(inputs, "cuda").out)


# ---- The same every time


@EVERY_DTYPE
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_repeats(head_dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    """A hundred runs, among other work on the GPU, give the same bits."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(heads: int) -> torch.Tensor:
        shape = (2, heads, 1100, head_dim)
        return torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()

    leaves, dout = (randn(8), randn(4), randn(4)), randn(8).detach()
    is_padding = torch.arange(1100, device="cuda")[None] >= torch.tensor([[1100], [700]], device="cuda")

    def run() -> list[torch.Tensor]:
        out = fused_attn.fused_attention(
            *leaves, is_causal=is_causal, key_padding_mask=is_padding, enable_gqa=True, backend="cuda"
        )
        return [out, *torch.autograd.grad(out, leaves, dout)]

    first = run()
    for _ in range(100):
        for x, y in zip(run(), first, strict=True):
            assert torch.equal(x, y)


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("has_mask", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_some_gradients_are_those_of_all(
    is_packed: bool, has_mask: bool, head_dim: int, dtype: torch.dtype, poisoned: None
) -> None:
    call = Call(head_dim, dtype, has_mask, is_packed, device="cuda")
    out, lse = call.forward()
    complete = call.gradients(out, lse, DIFFERENTIATED)
    oracle.assert_close(oracle.Result(out, lse, complete).cpu(), call.expected)
    for wanted in WANTED:
        for name, grad in call.gradients(out, lse, wanted).items():
            assert torch.equal(grad, complete[name]), f"{name} of {wanted}"


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_repeats_of_shared_gradients(case: Case) -> None:
    """Those of biases and sinks are sums over blocks that run in any order."""
    inputs = case.make(torch.bfloat16).on("cuda")
    first = cases.run(inputs, "cuda")
    for _ in range(20):
        assert_same(cases.run(inputs, "cuda"), first)


def test_gradient_of_a_relative_bias_takes_little_memory() -> None:
    """Of 8 heads, scores of one byte each would take 2 GiB. q, k, v, out, their gradients and row sums take 136 MiB."""
    query, key, value = (torch.randn(1, 8, 2**14, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    bias = torch.randn(8, 2**15 - 1, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fused_attn.fused_attention(query, key, value, relative_bias=bias, backend="cuda")
    torch.autograd.grad(out, (query, key, value, bias), torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 512 * 2**20


# ---- Streams, graphs, and the host


@EVERY_MIX
def test_the_host_never_waits(case: Case) -> None:
    gpu_checks.check_the_host_never_waits(case, "cuda")


@EVERY_MIX
def test_cuda_graph(case: Case, poisoned: None) -> None:
    gpu_checks.check_cuda_graph(case, "cuda")


def test_a_graph_replays_with_other_lengths() -> None:
    query, key, value, lengths = (x.cuda() for x in make_cache([1000, 1000], 1024))
    key, value = key.nan_to_num(), value.nan_to_num()
    order = torch.randperm(2 * 1024 // 16, device="cuda")
    tensors = (query, *(in_pages(x, 16, order) for x in (key, value)), order.int().view(2, -1), lengths)

    def run(backend: str) -> torch.Tensor:
        return fused_attn.fused_attention_paged(*tensors, is_causal=True, num_splits=4, backend=backend)

    run("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("cuda")
    for pair in ([1024, 3], [0, 17], [16, 999]):
        lengths.copy_(torch.tensor(pair, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(captured, run("reference"), rtol=2e-3, atol=2e-3)


def test_lengths_and_numbers_of_pages_are_clipped() -> None:
    """The host does not read them, so a wrong one must not lead out of the cache."""
    query, key, value, _ = (x.cuda() for x in make_cache([1000, 1000], 1024))
    key, value = key.nan_to_num(), value.nan_to_num()
    order = torch.arange(2 * 1024 // 16, device="cuda")
    pages = [in_pages(x, 16, order) for x in (key, value)]
    table, wrong = order.int().view(2, -1).clone(), order.int().view(2, -1).clone()
    for at, number in enumerate((-1, 10**6, 2**31 - 1)):
        wrong[0, at], table[0, at] = number, min(max(number, 0), len(order) - 1)

    def run(table: torch.Tensor, *lengths: int) -> torch.Tensor:
        counts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        return fused_attn.fused_attention_paged(query, *pages, table, counts, is_causal=True, backend="cuda")

    assert torch.equal(run(wrong, 2**31 - 1, -5), run(table, 1024, 0))


@EVERY_MIX
def test_streams(case: Case) -> None:
    gpu_checks.check_streams(case, "cuda")


@pytest.mark.parametrize("longest", [(130, 300), (70, 300), (130, 140)])
def test_sequences_longer_than_said(longest: tuple[int, int]) -> None:
    """On a GPU nobody reads the lengths before a kernel does: wrong ones may cost rows, never the whole GPU."""
    offsets_q = torch.tensor([0, 130, 150], dtype=torch.int32, device="cuda")
    offsets_k = torch.tensor([0, 300, 310], dtype=torch.int32, device="cuda")
    query, key, value = (
        torch.randn(rows, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True) for rows in (150, 310, 310)
    )
    out = fused_attn.fused_attention_varlen(query, key, value, offsets_q, offsets_k, *longest, backend="cuda")
    gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    torch.cuda.synchronize()
    for x in (out[130:], gradients[0][130:], gradients[1][300:], gradients[2][300:]):
        assert x.isfinite().all()


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = EVERYTHING[0].make(torch.float16)
    here, there = (cases.run(inputs.on(device), "cuda") for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same(there.cpu(), here.cpu())


FIRST_BACKWARD = """
import sys
import torch
from torch import nn
import fused_attn

options = {"device": "cuda", "dtype": torch.float16}
x = torch.randn(2, 4, 100, 64, **options)
if sys.argv[1] == "function":
    # In backward right after attention, the first operation: a matrix product of cuBLAS.
    out = fused_attn.fused_attention(nn.Linear(64, 64, **options)(x), x, x, backend="cuda")
elif sys.argv[1] == "module":
    x = x.flatten(0, 1)
    out, _ = fused_attn.FusedMultiheadAttention(64, 1, batch_first=True, **options)(x, x, x, need_weights=False)
else:
    out = nn.Linear(64, 64, **options)(x)
out.backward(torch.ones_like(out))
torch.cuda.synchronize()
"""


def lacks_context(kind: str) -> bool:
    """Whether cuBLAS finds no CUDA context in the first backward of a process, and torch warns of that."""
    command = [sys.executable, "-c", FIRST_BACKWARD, kind]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return "no current CUDA context" in result.stderr


def test_first_backward(architecture: int) -> None:
    """The thread that runs backward begins without a CUDA context; our kernels make one current.

    In a module's backward the output projection comes first, for which torch warns without attention, too.
    """
    if architecture == 80:
        pytest.skip("the processes that this test starts choose the architecture")
    assert not lacks_context("function")
    assert lacks_context("linear") or not lacks_context("module")


# ---- Under torch's transforms


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    """One graph without breaks, with a result that is equal to that of the eager call."""
    if compiler == "inductor" and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("Inductor's kernels are launched by code that a C compiler makes")
    torch.compiler.reset()
    case = EVERYTHING[0]
    inputs = case.make(torch.bfloat16).on("cuda")

    def scaled(function):
        def run(query, **tensors):
            out, lse = function(query * 2, **tensors)
            return out * 2, lse

        return run

    compiled = torch.compile(scaled(inputs.function), fullgraph=True, backend=compiler)
    actual = cases.run(inputs._replace(function=compiled), "cuda")
    torch.compiler.reset()
    assert_same(actual, cases.run(inputs._replace(function=scaled(inputs.function)), "cuda"))


@EVERY_DTYPE
def test_autocast(dtype: torch.dtype) -> None:
    """float32 inputs are rounded once, and their gradients are float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(2, 3, 300, 64, device="cuda", generator=generator).requires_grad_() for _ in range(3)]
    with torch.autocast("cuda", dtype):
        out = fused_attn.fused_attention(*leaves, is_causal=True, backend="cuda")
    expected = fused_attn.fused_attention(*(x.to(dtype) for x in leaves), is_causal=True, backend="cuda")
    assert out.dtype == dtype and torch.equal(out, expected)
    dout = torch.randn(out.shape, device="cuda", generator=generator).to(dtype)
    for x, y in zip(*(torch.autograd.grad(result, leaves, dout) for result in (out, expected)), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


# ---- compute-sanitizer


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["memcheck", "racecheck"])
def test_sanitizer(checker: str, architecture: int) -> None:
    """A few small calls: no access out of bounds, and no race in shared memory that the tool can see."""
    if (checker, architecture) == ("racecheck", 90):
        # Run on an H100 with CUDA 13.0: it reports the row sums of key_gradient_kernel, which a warp stores and hands
        # over by sync_warp and the arrival of one lane at an mbarrier. The emulation does look for races there.
        pytest.skip("racecheck does not follow a warp whose first lane arrives at an mbarrier for all of them")
    sanitizer = gpu.tool("compute-sanitizer")
    # Without caching every tensor is an allocation of its own, so that an access beyond it is seen.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).with_name("small_calls.py")
    command = [sanitizer, "--tool", checker, "--error-exitcode", "9", sys.executable, str(script), str(architecture)]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500)
    text = result.stdout + result.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0 and "all calls made" in text, text[-6000:]
