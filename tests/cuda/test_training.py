"""Blocks with biases, trained a few steps on the emulated CUDA kernels: the losses are those of eager attention.

A block computes in float32 and attends in float16, as under autocast. Eager attention gets the same rounded query, key
and value. So both differ by the rounding of the output and of the gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import Kernels
from torch import Tensor, nn

import fused_attn
from fused_attn.nn import T5RelativeBias

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 2, 40, 16
STEPS = 3
#: How far the losses may be apart: some roundings of float16, whose unit is 2^-11.
TOLERANCE = 4 * 2.0**-11

pytestmark = pytest.mark.usefixtures("poisoned")


class Block(nn.Module):
    """Self-attention with a bias of its own kind, and the residual connection around it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.backend = backend
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def options(self, x: Tensor) -> dict:
        """The arguments of `fused_attention` that make this block what it is."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).half() for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = fused_attn.fused_attention(query, key, value, backend=self.backend, **self.options(x))
        return x + self.out(attended.transpose(1, 2).flatten(2).float())


class T5Block(Block):
    """One bias for each bucket of distances and each head; no scale."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.position_bias = T5RelativeBias(num_buckets=8, num_heads=HEADS, max_distance=32)

    def options(self, x: Tensor) -> dict:
        return {"relative_bias": self.position_bias(LENGTH, LENGTH), "scale": 1.0}


class RelativeBertBlock(Block):
    """One bias for each distance, shared by the heads, and padding."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.relative_bias = nn.Parameter(torch.randn(2 * LENGTH - 1))

    def options(self, x: Tensor) -> dict:
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[1, 30:] = True
        return {"relative_bias": self.relative_bias, "key_padding_mask": padding, "dropout_p": 0.1, "dropout_seed": 5}


class AlphaFoldBlock(Block):
    """A bias for each pair of positions, projected from pair features, plus one that hides padding."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.pair = nn.Parameter(torch.randn(LENGTH, LENGTH, 4))
        self.project = nn.Linear(4, HEADS)

    def options(self, x: Tensor) -> dict:
        padding = torch.zeros(BATCH, LENGTH)
        padding[0, 35:] = -1e4
        return {"attn_mask": self.project(self.pair).permute(2, 0, 1)[None], "key_padding_mask": padding}


class SwinBlock(Block):
    """A table of biases for offsets in a window of 5 x 8, and a mask for shifted windows."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        rows, columns = torch.meshgrid(torch.arange(5), torch.arange(8), indexing="ij")
        row, column = rows.flatten(), columns.flatten()
        offsets = (row[:, None] - row[None] + 4) * 15 + column[:, None] - column[None] + 7
        self.table = nn.Parameter(torch.randn(9 * 15, HEADS))
        self.register_buffer("offsets", offsets)
        is_other_region = (column[:, None] < 4) != (column[None] < 4)
        self.register_buffer("shift", torch.stack([torch.zeros(LENGTH, LENGTH), is_other_region * -100.0])[:, None])

    def options(self, x: Tensor) -> dict:
        return {"attn_mask": self.table[self.offsets].permute(2, 0, 1)[None] + self.shift}


def losses_of(make: Callable[[str], Block], backend: str) -> list[float]:
    torch.manual_seed(0)
    block = make(backend)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    x, target = torch.randn(2, BATCH, LENGTH, HEADS * HEAD_DIM)
    losses = []
    for _ in range(STEPS):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in block.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", (80, 90), ids=lambda architecture: f"sm_{architecture}")
@pytest.mark.parametrize("block", (T5Block, RelativeBertBlock, AlphaFoldBlock, SwinBlock), ids=lambda x: x.__name__)
def test_losses_are_those_of_eager_attention(block: type[Block], architecture: int, kernels: Kernels) -> None:
    expected = losses_of(block, "reference")
    assert expected[-1] < expected[0]
    with kernels.running(architecture):
        losses = losses_of(block, "cuda")
    assert losses == pytest.approx(expected, rel=TOLERANCE)
