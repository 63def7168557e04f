"""``python -m fused_attn`` and `explain`: what a user reads when something is slow or missing."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import dispatch, selfcheck
from fused_attn.__main__ import main
from fused_attn.backends import cpu

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="the native kernels are not built")


@pytest.fixture
def without_kernels(monkeypatch):
    """As after an installation without a compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "import_error", "No module named 'fused_attn._C'")
    yield
    dispatch.choose.cache_clear()


@needs_kernels
@pytest.mark.quick
def test_info_names_what_runs(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert cpu._C.cpu_isa() in text
    runs = fused_attn.info().backends["cpu float32"]
    assert runs["cpu"] == [] and runs["reference"] == []


@pytest.mark.quick
def test_without_kernels_everything_still_runs(without_kernels, capsys):
    assert main(["info"]) == 0
    assert "need a C++ compiler" in capsys.readouterr().out
    # A size that no other test uses, so that no plan of it is cached.
    query = torch.randn(1, 3, 71, 24)
    explanation = fused_attn.explain(query, query, query)
    assert explanation.chosen == "reference"
    assert "C++ compiler" in str(explanation)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run .*\n.*C\+\+ compiler"):
        fused_attn.fused_attention(query, query, query, backend="cpu")
    assert main(["check"]) == 0
    assert "No backend but the reference" in capsys.readouterr().out


@needs_kernels
@pytest.mark.slow
def test_check_passes(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    variants = len(cpu._C.cpu_isas())
    assert len(lines) == 3 * len(selfcheck.CASES) * variants + 1
    assert all(line.endswith("ok") for line in lines[:-1])


@needs_kernels
@pytest.mark.quick
def test_check_finds_a_wrong_kernel(monkeypatch, capsys):
    right = cpu.forward

    def wrong(*args):
        out, lse = right(*args)
        out[0, 0, 0, 0] += 0.01
        return out, lse

    monkeypatch.setattr(cpu, "forward", wrong)
    monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[:1])
    assert main(["check"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.quick
def test_explain_describes_the_call():
    query = torch.randn(2, 4, 8, 16)
    text = str(fused_attn.explain(query, query, query, is_causal=True, key_padding_mask=torch.zeros(2, 8).bool()))
    assert "B=2 H=4 L=8 S=8 D=16 float32 on cpu" in text
    assert "key_padding" in text and "right=0" in text
    for backend in dispatch.BACKENDS:
        assert backend.name in text
