"""What the CUDA backend says that it can run, and where it comes before Triton. Needs neither a GPU nor nvcc."""

from __future__ import annotations

import types

import pytest
import torch
from kernels import is_built_for

import fused_attn
from fused_attn.backends.cuda import hardware

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels had been built for all GPUs; nothing else of the module is called."""
    build = {"version": "1", "compiler": "nvcc 13.0", "architectures": "80,90a-real"}
    monkeypatch.setattr(hardware, "module", types.SimpleNamespace(build_info=lambda: build))


@pytest.mark.parametrize(
    ("built", "found"),
    [("80,90a-real", [80, 90]), ("90a-real", [90]), ("80", [80]), ("80-real,80-virtual", [80]), ("", [])],
)
def test_which_kernels_a_module_has(monkeypatch: pytest.MonkeyPatch, built: str, found: list[int]) -> None:
    """The tests on a GPU skip the kernels that the module lacks."""
    monkeypatch.setattr(hardware, "module", types.SimpleNamespace(build_info=lambda: {"architectures": built}))
    assert [architecture for architecture in (80, 90) if is_built_for(architecture)] == found


@pytest.mark.parametrize(
    ("device", "length", "chosen"),
    [
        ("sm_90", 2048, "cuda"),
        ("sm_90", 129, "cuda"),
        ("sm_90", 33, "cuda"),
        ("sm_90", 32, "cuda"),
        ("sm_90", 1, "cuda"),
        ("sm_80", 2048, "cuda"),
        ("sm_100", 2048, "cuda"),
    ],
)
def test_which_backend_comes_first(device: str, length: int, chosen: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    query = torch.randn(2, 4, length, 64, dtype=torch.bfloat16)
    explanation = fused_attn.explain(query, query, query, is_causal=True, device=device)
    assert explanation.chosen == chosen
    assert explanation.reasons["cuda"] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32 is none of"),
        ({"head_dim": 20}, "head dim 20 is no multiple of 8 up to 256"),
        ({"head_dim": 264, "value_dim": 64}, "head dim 264 is no multiple of 8 up to 256"),
        ({"value_dim": 36}, "head dim 36 is no multiple of 8 up to 256"),
        ({"device": "sm_75"}, "the GPU has compute capability 7.5, expected 8.0 or higher"),
        ({"device": "cpu"}, "the tensors are on cpu, expected cuda"),
    ],
)
def test_reasons(changes: dict, reason: str) -> None:
    (found,) = reasons_of(**changes)
    assert reason in found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "head_dim": 8},
        {"head_dim": 192, "value_dim": 128},
        {"scale": -1.0},
        {"scale": 0.0},
        {"softcap": 2.0},
        {"is_causal": True, "window_size": (5, 0), "dropout_p": 0.1},
        {"attn_mask": torch.ones(8, 8, dtype=torch.bool), "sinks": torch.zeros(4)},
        {"attn_mask": torch.zeros(8, 8), "relative_bias": torch.zeros(15)},
        {"key_padding_mask": torch.zeros(2, 8)},
        {"device": "sm_120"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_what_is_supported(changes: dict) -> None:
    assert reasons_of(**changes) == []


def reasons_of(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, value_dim: int | None = None, **options
) -> list[str]:
    query = torch.randn(2, 4, 8, head_dim).to(dtype)
    value = torch.randn(2, 4, 8, head_dim if value_dim is None else value_dim).to(dtype)
    return fused_attn.explain(query, query, value, **{"device": "sm_90"} | options).reasons["cuda"]
