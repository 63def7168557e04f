"""Fails if a call crashes whose kernels Triton compiles asynchronously, or a call of the same problem after it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import aot
import stub_driver
import triton
from stub_driver import UncompiledKernel

CELL = aot.Cell(90, "fp16", 64, "padding+sinks")


def main() -> int:
    stub_driver.compile_nothing()
    stub_driver.install(CELL.architecture)
    problem, inputs = aot.representative(CELL)
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        aot.launch(problem, inputs)
        aot.launch(problem, inputs)
    aot.launch(problem, inputs)
    names = [name for name, *_ in UncompiledKernel.ran]
    expected = ["attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"] * 3
    if names != expected:
        print(f"ran {names}\nnot {expected}")
    return int(names != expected)


if __name__ == "__main__":
    sys.exit(main())
