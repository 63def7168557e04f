"""A few small calls of the CUDA kernels for compute-sanitizer: ``python tests/cuda/small_calls.py ARCHITECTURE``.

Inputs are made on the CPU, so that compute-sanitizer instruments hardly any kernels but ours, which saves time. Lengths
end within a tile, where accesses out of bounds are likeliest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels import of_architecture

import fused_attn


def tensors(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random query, key and value on the GPU."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).cuda().requires_grad_() for _ in range(3)]


def padded(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A call with key padding, a causal mask and dropout."""
    is_padding = (torch.arange(200)[None] >= torch.tensor([[200], [131]])).cuda()
    return fused_attn.fused_attention(
        *tensors(2, 2, 200, head_dim, dtype=dtype), key_padding_mask=is_padding, is_causal=True, dropout_p=0.2,
        dropout_seed=1, backend="cuda",
    )  # fmt: skip


def packed(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed call with a window. The second sequence is empty."""
    starts = torch.tensor([0, 70, 70, 203], dtype=torch.int32).cuda()
    return fused_attn.fused_attention_varlen(
        *tensors(203, 2, head_dim, dtype=dtype), starts, starts, 133, 133, window_size=(90, -1), backend="cuda"
    )


def biased(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    bias, relative_bias, sinks = (torch.randn(*shape).cuda().requires_grad_() for shape in ((2, 1, 200), (399,), (2,)))
    return fused_attn.fused_attention(
        *tensors(2, 2, 200, head_dim, dtype=dtype), bias, softcap=2.0, relative_bias=relative_bias, sinks=sinks,
        backend="cuda",
    )  # fmt: skip


def masked(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    mask = (torch.rand(2, 1, 200, 200) < 0.5).cuda()
    return fused_attn.fused_attention(*tensors(2, 2, 200, head_dim - 8, dtype=dtype), mask, backend="cuda")


def main(architecture: int) -> None:
    """Runs forward and backward of both calls with every head dim of the kernels."""
    with of_architecture(architecture):
        for head_dim, dtype in ((64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16), (256, torch.float16)):
            for call in (padded, packed, biased, masked):
                out = call(head_dim, dtype)
                out.backward(out.detach())
    torch.cuda.synchronize()
    print("all calls made")


if __name__ == "__main__":
    main(int(sys.argv[1]))
