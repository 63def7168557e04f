"""Fails if the launcher runs a compiled kernel that Triton would not have chosen for the tensors of the call."""

from __future__ import annotations

import sys
from dataclasses import replace

import aot
import stub_driver
import torch
from stub_driver import UncompiledKernel

from fused_attn.attention.inputs import Inputs, Saved, Wanted
from fused_attn.backends.triton import launcher

CELL = aot.Cell(90, "fp16", 64, "padding+sinks+bias")


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape and dtype of x, at an address that 16 does not divide."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def variants(inputs: Inputs):
    """Inputs of one problem for which Triton compiles different kernels."""
    query, key = inputs.query, inputs.key
    yield inputs
    yield inputs._replace(query=shifted(query))
    yield inputs._replace(value=shifted(inputs.value))
    yield inputs._replace(sinks=shifted(inputs.sinks))
    yield inputs._replace(sinks=inputs.sinks.half())
    yield inputs._replace(bias=inputs.bias.float())
    yield inputs._replace(bias=inputs.bias[:, :1, :, :1])
    for columns in (65, 66, 68, 72):
        yield inputs._replace(key=torch.empty(*key.shape[:3], columns, dtype=key.dtype)[..., :64])
    yield inputs._replace(bias=torch.empty(*inputs.bias.shape[:3], key.shape[2] + 8)[..., : key.shape[2]])
    yield inputs._replace(query=query.mT.contiguous().mT)


def call(problem, inputs: Inputs, with_dlse: bool) -> list[tuple]:
    """The names of the kernels that two forward calls, with and without LSE, and one backward call launch."""
    UncompiledKernel.ran.clear()
    out, lse, _ = launcher.forward(problem, inputs, needs_lse=True, needs_max=False)
    launcher.forward(problem, inputs, needs_lse=False, needs_max=True)
    wanted = Wanted(query=True, key=with_dlse, value=True, sinks=True)
    launcher.backward(problem, inputs, Saved(out, lse, dout=out, dlse=lse if with_dlse else None), wanted)
    return list(UncompiledKernel.ran)


def main() -> int:
    stub_driver.compile_nothing()
    stub_driver.install(CELL.architecture)
    problem, representative = aot.representative(CELL)
    failed, chosen = False, set()
    for _ in range(2):  # in the second round, all kernels of `problem` have been compiled
        for inputs in variants(representative):
            for with_dlse in (False, True):
                reused = call(problem, inputs, with_dlse)
                # `replace` makes a new problem, whose plan has no compiled kernels. So Triton itself chooses them.
                fresh = call(replace(problem), inputs, with_dlse)
                chosen.add(tuple(fresh))
                if reused != fresh:
                    print(f"ran {reused}\nnot {fresh}")
                    failed = True
    if len(chosen) < 10:
        print(f"the inputs differ too little: {len(chosen)} choices of kernels")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
