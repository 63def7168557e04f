"""The operators that SDPA calls on a GPU, on the kernels of the CPU: only the dispatch key differs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention as torch_attention

from fused_attn import fused_attention
from fused_attn.integrations import sdpa

FLASH = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def on_cpu():
    registration = sdpa.Registration("CPU")
    yield
    registration.remove()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_results_and_gradients(on_cpu, is_causal: bool, dropout_p: float, generator: torch.Generator) -> None:
    shapes = [(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)]
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    out, lse, *_, state, _, _ = FLASH(*leaves, dropout_p, is_causal, False, scale=0.3)
    expected, expected_lse = fused_attention(
        *leaves, dropout_p=dropout_p, dropout_seed=state.view(torch.int64)[0], is_causal=is_causal, scale=0.3,
        enable_gqa=True, return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    grads = torch.autograd.grad(out.cos().sum(), leaves)
    for found, wanted in zip(grads, torch.autograd.grad(expected.cos().sum(), leaves), strict=True):
        torch.testing.assert_close(found, wanted)


def test_debug_mask_is_refused(on_cpu) -> None:
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match="return_debug_mask: expected"):
        FLASH(x, x, x, 0.0, False, True)


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sdpa.NAME in torch_attention.list_flash_attention_impls()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        sdpa.enable()
    assert torch_attention.current_flash_attention_impl() == sdpa.NAME
    assert torch._C._dispatch_has_kernel_for_dispatch_key(FLASH.default.name(), "CUDA")
    torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None
    if not torch.cuda.is_available():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(FLASH.default.name(), "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="expected a CUDA GPU"):
        sdpa.enable()
