"""Tests of the Triton kernels that need a GPU. test_kernels.py has the other ones, and runs on a GPU too."""

from __future__ import annotations

import gpu_checks
import pytest
import torch
from cases import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: Cases that together use all kernels and all kinds of masks.
MIXED = [
    Case("long-causal", seqlen_q=256, seqlen_k=256, head_dim=64, options={"is_causal": True}),
    *(
        case
        for case in CASES
        if case.id
        in ("softcap-with-everything", "padding-causal", "mqa-8-1-decode", "relative-bias-t5", "varlen-dropout")
        or case.id in ("paged-causal", "paged-packed", "key-lengths-lower-right")
    ),
]
EVERY_MIX = pytest.mark.parametrize("case", MIXED, ids=lambda case: case.id)


@EVERY_MIX
def test_the_host_never_waits(case: Case) -> None:
    gpu_checks.check_the_host_never_waits(case, "triton")


@EVERY_MIX
def test_cuda_graph(case: Case, poisoned: None) -> None:
    gpu_checks.check_cuda_graph(case, "triton")


@EVERY_MIX
def test_streams(case: Case) -> None:
    gpu_checks.check_streams(case, "triton")


def test_more_than_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB on the GPU")
    gpu_checks.check_more_than_2_31_elements("triton")
