"""Fails if Triton compiles a kernel again for a call that differs only in batch size and lengths."""

from __future__ import annotations

import sys
from dataclasses import replace

import aot
import stub_driver
import torch
from stub_driver import UncompiledKernel

from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import AttentionProblem, Band

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64

PADDED = AttentionProblem(
    1, HEADS, KV_HEADS, 1, 1, HEAD_DIM, HEAD_DIM, torch.float16, torch.device("cuda", 90), HEAD_DIM**-0.5,
    band=Band(right=0), has_key_padding=True, capability=(9, 0),
)  # fmt: skip
PACKED = replace(PADDED, has_key_padding=False, is_packed=True)


def call_padded(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    problem = replace(PADDED, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    query = torch.empty(batch, HEADS, seqlen_q, HEAD_DIM, dtype=problem.dtype)
    key, value = (torch.empty(batch, KV_HEADS, seqlen_k, HEAD_DIM, dtype=problem.dtype) for _ in range(2))
    aot.launch(problem, Inputs(query, key, value, key_padding=torch.empty(batch, seqlen_k, dtype=torch.bool)))


def call_packed(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    problem = replace(PACKED, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    query = torch.empty(batch * seqlen_q, HEADS, HEAD_DIM, dtype=problem.dtype)
    key, value = (torch.empty(batch * seqlen_k, KV_HEADS, HEAD_DIM, dtype=problem.dtype) for _ in range(2))
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    aot.launch(problem, Inputs(query, key, value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens))


def main() -> int:
    stub_driver.compile_nothing()
    stub_driver.install(90)
    failed = False
    for call in (call_padded, call_packed):
        for kernel in aot.KERNELS.values():
            stub_driver.forget(kernel)
        # Lengths that 16 divides and others, one sequence and several, more keys than queries and fewer.
        for sizes in ((2, 512, 512), (1, 513, 511), (7, 1000, 336), (16, 129, 2049)):
            call(*sizes)
        for name, kernel in aot.KERNELS.items():
            count = len(stub_driver.compiled(kernel))
            if count > 1:
                print(f"{call.__name__}: the {name} kernel was compiled {count} times")
                failed = True
    if not UncompiledKernel.ran:
        print("no kernel was launched")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
