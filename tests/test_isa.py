"""The C++ kernels on every instruction set that was compiled and that this machine can run."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import CASES

pytestmark = pytest.mark.usefixtures("poisoned")

_C = pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)

PREFIXES = ("head-dim-", "gqa-", "length-1", "lse-", "padding-nan", "dropout-", "varlen-c")
SUBSET = [
    case
    for case in CASES
    if case.is_quick or (case.id.startswith(PREFIXES) and case.seqlen_q * case.seqlen_k < 100_000)
]


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest):
    before = _C.cpu_isa()
    _C.select_cpu_isa(request.param)
    yield request.param
    _C.select_cpu_isa(before)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SUBSET])
def test_case(case: cases.Case, isa: str) -> None:
    assert _C.cpu_isa() == isa
    for dtype in case.dtypes:
        cases.check(case, dtype, "cpu")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_everything_at_once(isa: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.id == "softcap-with-everything")
    cases.check(case, dtype, "cpu")


@pytest.mark.quick
def test_the_best_is_in_use_unless_asked_otherwise() -> None:
    assert _C.cpu_isa() == _C.cpu_isas()[-1]
    with pytest.raises(ValueError, match=r"isa: expected one of .*baseline.*, got no-such-set"):
        _C.select_cpu_isa("no-such-set")
