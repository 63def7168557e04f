"""What the CUDA backend says that it can run, and where it comes before Triton. Needs neither a GPU nor nvcc."""

from __future__ import annotations

import types

import pytest
import torch

import fused_attn
from fused_attn.backends import cuda

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nvcc had been there; nothing is called."""
    monkeypatch.setattr(cuda, "_kernels", types.SimpleNamespace())


@pytest.mark.parametrize(
    ("device", "length", "chosen"),
    [
        ("sm_90", 2112, "cuda"),  # 136 tiles
        ("sm_90", 2048, "triton"),  # 128 tiles
        ("sm_90", 8, "triton"),
        ("sm_80", 2112, "triton"),
        ("sm_100", 2112, "triton"),
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
        ({"head_dim": 80}, "head dim 80 is none of 64, 96, 128, 256"),
        ({"value_dim": 32}, "the value's head dim 32 differs from the query's 64"),
        ({"scale": -1.0}, "scale -1.0 is not above 0"),
        ({"softcap": 2.0}, "a softcap is not supported"),
        ({"attn_mask": torch.ones(8, 8, dtype=torch.bool)}, "a dense mask is not supported"),
        ({"attn_mask": torch.zeros(8, 8).bfloat16()}, "a bias is not supported"),
        ({"key_padding_mask": torch.zeros(2, 8)}, "floating-point key padding is not supported"),
        ({"relative_bias": torch.zeros(15)}, "a relative bias is not supported"),
        ({"sinks": torch.zeros(4)}, "sinks is not supported"),
        ({"device": "sm_75"}, "the GPU has compute capability 7.5, expected 8.0 or higher"),
        ({"device": "cpu"}, "the tensors are on cpu, expected cuda"),
    ],
)
def test_reasons(changes: dict, reason: str) -> None:
    options = {"device": "sm_90", **changes}
    dtype, head_dim = options.pop("dtype", torch.bfloat16), options.pop("head_dim", 64)
    query = torch.randn(2, 4, 8, head_dim).to(dtype)
    value = torch.randn(2, 4, 8, options.pop("value_dim", head_dim)).to(dtype)
    (found,) = fused_attn.explain(query, query, value, **options).reasons["cuda"]
    assert reason in found
