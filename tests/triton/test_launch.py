"""The host's side of the Triton backend: which kernels it launches, no waiting for the GPU, and the time of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backend_arguments import arguments_of_backend
from cases import CASES, Case, Inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.attention.inputs import Saved, Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends import dispatch
from fused_attn.backends.cuda import hardware

pytest.importorskip("triton.language")

from fused_attn.backends.triton import backend as triton_backend
from fused_attn.backends.triton import launcher
from fused_attn.backends.triton.arguments import NO_MASKS, Masks, Rows, Scores

EVERY_CASE = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.quick] if case.is_quick else []) for case in CASES]
)
KERNELS = (
    "attention_fwd_kernel",
    "merge_splits_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "attention_bwd_dbias_kernel",
    "attention_bwd_drelative_bias_kernel",
)
# The operators of torch that the launcher may run, besides its kernels. Another operator that launches a kernel would
# take as long as a small call as a whole.
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
VIEWS = {
    *("aten::permute", "aten::slice", "aten::view", "aten::_unsafe_view", "aten::expand", "aten::detach"),
    *("aten::select", "aten::unsqueeze"),
}
#: In packed calls: rows that belong to no sequence become 0, and -inf in the LSE. With key_lengths: dk and dv of keys
#: behind the length, whose blocks no program visits.
FILLS = {"aten::zero_", "aten::fill_"}
COPIES = {"aten::clone"}  # of tensors whose column stride is not 1
SUMS = {"aten::sum", "aten::_to_copy", "aten::zeros", "aten::zeros_like", "aten::zero_"}
# On tensors with a number for each row: the gradient of a bias that is the same for all keys.
ROW_SUMS = {"aten::eq", "aten::masked_fill", "aten::sub", "aten::exp", "aten::mul", "aten::add"}


class Recorder(TorchDispatchMode):
    """Records the names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.name.startswith("prim::"):
            self.names.add(func._schema.name)
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy":
            assert result.device == args[0].device, "a copy to another device would wait for it"
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Replaces the kernels. The counter says how often each of them was launched; none runs."""
    counter = Counter()

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            assert len(grid) == 3 and all(
                0 < size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=True)
            )
            return lambda *args, **kwargs: counter.update([self.name])

    for name in KERNELS:
        monkeypatch.setattr(launcher, name, Kernel(name))
    return counter


@EVERY_CASE
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_one_launch_and_no_synchronisation(case: Case, launches: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward launch no kernel twice for the same result, and never read a tensor's contents on the host.

    Fake tensors have no contents, so a read raises an error.
    """
    inputs = case.make(torch.float16)
    # On a CPU, the checks of arguments read the contents of floating-point padding masks (except in transforms of
    # torch.func) and of cu_seqlens. On a GPU they do not. So both reads are switched off here.
    monkeypatch.setattr(modes, "in_functorch", lambda: True)
    monkeypatch.setattr(checks, "check_cu_seqlens_values", lambda *args: None)
    with FakeTensorMode() as fake:
        inputs = inputs._replace(tensors={name: fake.from_tensor(x) for name, x in inputs.tensors.items()})
        problem, inputs = arguments_of_backend(inputs)
        problem = problem.on("sm_90")
        with Recorder() as recorder:
            out, lse, row_max = launcher.forward(problem, inputs, True, True)
        assert row_max.shape == lse.shape and row_max.dtype == lse.dtype
        fills = FILLS if inputs.cu_seqlens_q is not None else set()
        assert recorder.names <= ALLOCATIONS | VIEWS | COPIES | fills
        splits = launcher._plan(problem, problem.has_bias, False).num_splits > 1 if lse.numel() else False
        assert launches == (
            {"attention_fwd_kernel": 1} | ({"merge_splits_kernel": 1} if splits else {}) if lse.numel() else {}
        )

        if problem.is_paged:
            return  # calls of paged caches have no backward
        launches.clear()
        wanted = Wanted.of(*(x is not None for x in inputs))
        dout, dlse = torch.empty_like(out), torch.empty_like(lse)
        with Recorder() as recorder:
            gradients = launcher.backward(problem, inputs, Saved(out, lse, dout, dlse), wanted)
        if inputs.key_lengths is not None:
            fills = FILLS
        is_row_bias = inputs.bias is not None and inputs.bias.shape[3] == 1 < problem.seqlen_k
        assert recorder.names <= ALLOCATIONS | VIEWS | COPIES | fills | SUMS | (ROW_SUMS if is_row_bias else set())
        of_biases = launches.pop("attention_bwd_dbias_kernel", 0)  # once for each of the two dense biases
        assert of_biases == ((wanted.bias and not is_row_bias) + wanted.key_bias if launches else 0)
        assert max(launches.values(), default=1) == 1
        for is_wanted, gradient, x in zip(wanted, gradients, inputs, strict=False):
            assert (gradient is not None) == is_wanted
            assert gradient is None or (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


@EVERY_CASE
@pytest.mark.usefixtures("launches")
def test_scale_is_folded_only_where_nothing_is_added_to_scores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, inputs = arguments_of_backend(case.make(torch.float16))
    found = []
    plan = launcher._plan
    monkeypatch.setattr(launcher, "_plan", lambda *arguments: found.append(plan(*arguments)) or found[-1])
    launcher.forward(problem.on("sm_90"), inputs, True, True)
    is_changed = problem.softcap != 0.0 or problem.has_relative_bias or not (inputs.bias is inputs.key_bias is None)
    for launches in found:
        for launch in (launches.forward, launches.dq, launches.dkdv, launches.dbias, launches.drelative_bias):
            assert launch.settings.is_scale_folded is None or not is_changed


@pytest.mark.slow
@pytest.mark.timing
def test_cost_of_a_call() -> None:
    """The fastest of many rounds counts, so that the test passes on a busy machine too."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("overhead.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    print("".join(f"\n{name:<20} {cost:5.1f} us" for name, cost in costs.items()))
    assert all(cost < 40.0 for name, cost in costs.items() if name.startswith("forward"))


@pytest.mark.quick
def test_splits_are_planned_for_the_keys_in_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys beyond the band need no programs. A number of splits that the caller chose stays, whatever the band is."""
    monkeypatch.setattr(launcher, "_multiprocessors", lambda device: 132)

    def splits(band: Band, seqlen_q: int = 1, num_splits: int = 0) -> int:
        problem = AttentionProblem(
            1, 8, 1, seqlen_q, 2**17, 128, 128, torch.float16, torch.device("cpu"), 1.0, band=band,
            num_splits=num_splits, capability=(9, 0),
        )  # fmt: skip
        return launcher._plan.__wrapped__(problem, False, False).num_splits  # the cached plans stay as they are

    assert splits(Band()) == splits(Band(right=0, is_from_end=True)) == 256
    assert splits(Band(left=4095, right=0, is_from_end=True)) == 8
    assert splits(Band(left=4095, is_from_end=True), seqlen_q=2) == 8
    assert splits(Band(left=100, right=0, is_from_end=True)) == 1
    assert splits(Band(right=0)) == 1  # the first query sees the first key alone
    assert splits(Band(left=100, right=0, is_from_end=True), num_splits=256) == 256


@pytest.mark.quick
def test_tf32_only_where_torch_allows_it() -> None:
    def precision(dtype: torch.dtype) -> str:
        problem = AttentionProblem(1, 1, 1, 8, 8, 16, 16, dtype, torch.device("cpu"), 1.0)
        plan = launcher._plan(problem, False, launcher._allows_tf32(dtype))
        return plan.forward.settings.PRECISION.value

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
        assert precision(torch.float16) == "ieee"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision(torch.float32) == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.quick
@pytest.mark.parametrize("field", Masks._fields)
def test_every_mask_has_a_kernel_of_its_own(field: str) -> None:
    """Without a field in `Masks.kind`, a call that has the field would run a kernel that was compiled without it."""
    absent = getattr(NO_MASKS, field)
    given = {type(None): torch.zeros(4), int: 1, Scores: Scores.of(torch.zeros(1, 1, 2, 4))}[type(absent)]
    assert NO_MASKS._replace(**{field: given}).kind != NO_MASKS.kind
    if isinstance(given, torch.Tensor):
        other_dtype = NO_MASKS._replace(**{field: given.half()})
        assert other_dtype.kind != NO_MASKS._replace(**{field: given}).kind


@pytest.mark.quick
@pytest.mark.parametrize(
    "columns, align", [(64, 1), (72, 8), (40, 8), (100, 4), (66, 2), (65, 1)], ids=lambda number: str(number)
)
def test_rows_say_by_which_power_of_two_their_strides_are_divisible(columns: int, align: int) -> None:
    """Triton itself sees strides that 16 divides."""
    x = torch.empty(2, 3, 5, columns)
    for rows in (Rows.of(x), Rows.of(x.transpose(1, 2)), Rows.of(x[0], is_packed=True), Rows.of_pages(x)):
        assert rows.ALIGN.value == align
    assert Rows.of(torch.empty(2, 3, 5, 80)[..., :72]).ALIGN.value == 1


@pytest.mark.quick
@pytest.mark.parametrize("keys, align", [(1024, 1), (1000, 8), (1004, 1), (1001, 1)])
def test_scores_say_whether_their_strides_are_divisible_by_8(keys: int, align: int) -> None:
    x = torch.empty(2, 3, 5, keys)
    assert Scores.of(x).ALIGN.value == align
    assert Scores.of(x[:, :, :1]).ALIGN.value == align
    assert Scores.of(x[:1, :1, :1]).ALIGN.value == 1  # all strides are 0


@EVERY_CASE
def test_explain_every_case_on_gpus_that_are_not_there(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA kernels, Triton is chosen for every case. tests/cuda/test_cuda_backend.py tests the rest."""
    monkeypatch.setattr(hardware, "module", None)

    def explain(inputs: Inputs, architecture: str) -> dispatch.Explanation:
        if inputs.function is fused_attn.fused_attention:
            return fused_attn.explain(**inputs.tensors, **inputs.options, device=architecture)
        problem, *_ = arguments_of_backend(inputs)
        return dispatch.explain(problem.on(architecture), None)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if max(case.head_dim, case.value_dim or 0) > triton_backend.max_head_dim(dtype):
            continue
        inputs = case.make(dtype)
        for architecture in ("sm_80", "sm_90", "sm_100"):
            explanation = explain(inputs, architecture)
            assert explanation.chosen == triton_backend.name, str(explanation)
            assert explanation.reasons[triton_backend.name] == []
            assert architecture in str(explanation)
        old = explain(inputs, "sm_75")
        assert old.chosen == "reference"
        assert "compute capability 7.5, expected 8.0" in str(old)
