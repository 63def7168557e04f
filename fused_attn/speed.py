"""The speed of each kernel on this machine, beside a matrix product and torch's attention: part of ``check``.

How fast a kernel can be depends on the machine, and on what else the machine is doing. So each line is measured in
turns with a large matrix product of the same dtype, and with torch's `scaled_dot_product_attention` for the same
result. All times are medians of the calls after a warm-up.

The operations of a line are those on visible scores: two products in forward, five in backward, and two operations for
each multiply-add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import measurement
from fused_attn.api import explain, fused_attention
from fused_attn.backends import cpu
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.triton import backend as triton
from fused_attn.measurement import Call

FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
PRODUCTS = {FORWARD: 2, BACKWARD: 5, DECODE: 2}
#: The most rounds of a line, and the seconds that they take.
ROUNDS, SECONDS = 20, 0.3


class Sizes(NamedTuple):
    """The sizes of all lines on one kind of device.

    length: the number of queries and of keys; decoding has one query
    matrix: the rows of the square matrices that are multiplied
    """

    batch: int
    heads: int
    length: int
    matrix: int
    dtype: torch.dtype


SIZES = {
    "cpu": Sizes(1, 8, 512, 1024, torch.float32),
    "cuda": Sizes(4, 16, 2048, 8192, torch.bfloat16),
}


class Feature(NamedTuple):
    """What a call has besides query, key and value.

    ours, torchs: the arguments of `fused_attention` and of torch's function. torchs is None if torch lacks the feature.
    learned: the tensor of `ours` that gets a gradient, and that of `torchs`; None if none does
    visible: the part of the scores that is visible
    """

    ours: dict[str, Any]
    torchs: dict[str, Any] | None
    learned: tuple[Tensor | None, Tensor | None] = (None, None)
    visible: float = 1.0


def _plain(sizes: Sizes, device: torch.device) -> Feature:
    return Feature({}, {})


def _causal(sizes: Sizes, device: torch.device) -> Feature:
    return Feature({"is_causal": True}, {"is_causal": True}, visible=(sizes.length + 1) / (2 * sizes.length))


def _padding(sizes: Sizes, device: torch.device) -> Feature:
    """A quarter of the keys is padding."""
    is_padding = torch.arange(sizes.length, device=device).expand(sizes.batch, -1) >= sizes.length * 3 // 4
    visible = sizes.length * 3 // 4 / sizes.length
    return Feature({"key_padding_mask": is_padding}, {"attn_mask": ~is_padding[:, None, None, :]}, visible=visible)


def _mask(sizes: Sizes, device: torch.device) -> Feature:
    """A dense mask of ones and zeros without structure, so that no block can be skipped."""
    shape = (sizes.batch, 1, sizes.length, sizes.length)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    return Feature({"attn_mask": mask}, {"attn_mask": mask}, visible=mask.float().mean().item())


def _bias(sizes: Sizes, device: torch.device) -> Feature:
    bias = _random(1, sizes.heads, sizes.length, sizes.length, dtype=sizes.dtype, device=device).requires_grad_()
    return Feature({"attn_mask": bias}, {"attn_mask": bias}, (bias, bias))


def _relative_bias(sizes: Sizes, device: torch.device) -> Feature:
    """torch gets the dense bias, and computes the gradient of the dense bias."""
    length = sizes.length
    bias = _random(sizes.heads, 2 * length - 1, dtype=sizes.dtype, device=device)
    position = torch.arange(length, device=device)
    dense = bias[:, position[None, :] - position[:, None] + length - 1][None].contiguous()
    dense.requires_grad_()
    return Feature({"relative_bias": bias.requires_grad_()}, {"attn_mask": dense}, (bias, dense))


def _softcap(sizes: Sizes, device: torch.device) -> Feature:
    return Feature({"softcap": 20.0}, None)


def _dropout(sizes: Sizes, device: torch.device) -> Feature:
    return Feature({"dropout_p": 0.1, "dropout_seed": 7}, {"dropout_p": 0.1})


FEATURES: dict[str, Callable[[Sizes, torch.device], Feature]] = {
    "plain": _plain,
    "causal": _causal,
    "padding": _padding,
    "mask": _mask,
    "bias": _bias,
    "relative bias": _relative_bias,
    "softcap": _softcap,
    "dropout": _dropout,
}


class Line(NamedTuple):
    """What is measured: one kernel, of one backend on one device."""

    device: str
    backend: str
    direction: str
    feature: str
    head_dim: int


@dataclass(frozen=True)
class Speed:
    """The result of a line.

    milliseconds: the median time of a call
    tflops, matmul_tflops: 10^12 operations a second of the call, and of the matrix product measured in turns with it
    torch_milliseconds: the median time of torch's attention; None if torch cannot compute the same
    failure: why the line could not be measured; empty if it was
    """

    line: Line
    dtype: str
    milliseconds: float = 0.0
    tflops: float = 0.0
    matmul_tflops: float = 0.0
    torch_milliseconds: float | None = None
    failure: str = ""

    @property
    def matmul_fraction(self) -> float:
        """The speed as a part of that of the matrix product."""
        return self.tflops / self.matmul_tflops

    def __str__(self) -> str:
        line = self.line
        name = f"{line.backend:<10} {line.direction:<9} {line.feature:<14} {self.dtype:<9} head dim {line.head_dim:<4}"
        if self.failure:
            return f"{name} not measured: {self.failure}"
        theirs = "torch: cannot"
        if self.torch_milliseconds is not None:
            ratio = self.torch_milliseconds / self.milliseconds
            theirs = f"torch {self.torch_milliseconds:8.3f} ms ({ratio:.2f} times as long)"
        return (
            f"{name} {self.milliseconds:8.3f} ms {self.tflops:8.3g} TFLOP/s {self.matmul_fraction:6.1%} of a matrix "
            f"product  {theirs}"
        )


def lines() -> list[Line]:
    """All lines of this machine: the kernels that can run on its CPU, and on the current GPU."""
    found = []
    if cpu._C is not None:
        found += [
            Line("cpu", cpu.name, direction, feature, 64)
            for feature in ("plain", "causal", "padding", "bias", "relative bias")
            for direction in (FORWARD, BACKWARD)
        ]
        found.append(Line("cpu", cpu.name, DECODE, "plain", 64))
    if torch.cuda.is_available():
        found += [
            Line("cuda", cuda.name, direction, feature, head_dim)
            for feature, head_dims in {"plain": cuda.HEAD_DIMS, "causal": (64, 128)}.items()
            for head_dim in head_dims
            for direction in (FORWARD, BACKWARD)
        ]
        found += [
            Line("cuda", cuda.name, direction, feature, 128)
            for feature in list(FEATURES)[2:]
            for direction in (FORWARD, BACKWARD)
        ]
        found += [
            Line("cuda", triton.name, direction, feature, 128)
            for feature in ("plain", "causal", "bias", "relative bias", "dropout")
            for direction in (FORWARD, BACKWARD)
        ]
        found.append(Line("cuda", triton.name, DECODE, "plain", 128))
    return [line for line in found if _can_run(line)]


def matmul_rates(speeds: list[Speed]) -> dict[str, float]:
    """{device: the median of the rates of the matrix product that its lines were measured beside, in TFLOP/s}."""
    devices = dict.fromkeys(found.line.device for found in speeds if not found.failure)
    return {
        device: median(found.matmul_tflops for found in speeds if found.line.device == device and not found.failure)
        for device in devices
    }


def _can_run(line: Line) -> bool:
    """Whether the backend can run calls of this head dim on the device."""
    device, sizes = torch.device(line.device), SIZES[line.device]
    query = torch.empty(1, 1, 1, line.head_dim, dtype=sizes.dtype, device=device)
    return not explain(query, query, query).reasons[line.backend]


def run(chosen: list[Line]) -> Iterator[Speed]:
    """Measures the lines one after another. An error, such as a lack of memory, ends its own line alone."""
    for line in chosen:
        dtype = str(SIZES[line.device].dtype).removeprefix("torch.")
        try:
            yield _measured(line, dtype)
        except (RuntimeError, ValueError, measurement.CallError) as error:
            cause = error.__cause__ or error
            yield Speed(line, dtype, failure=(str(cause) or type(cause).__name__).partition("\n")[0])


def _measured(line: Line, dtype: str) -> Speed:
    device, sizes = torch.device(line.device), SIZES[line.device]
    feature = FEATURES[line.feature](sizes, device)
    rows = 1 if line.direction == DECODE else sizes.length
    leaves = [
        _random(sizes.batch, sizes.heads, length, line.head_dim, dtype=sizes.dtype, device=device)
        for length in (rows, sizes.length, sizes.length)
    ]
    query, key, value = leaves
    matrices = [_random(sizes.matrix, sizes.matrix, dtype=sizes.dtype, device=device) for _ in range(2)]
    ours: Call = functools.partial(fused_attention, query, key, value, **feature.ours, backend=line.backend)
    calls: dict[str, Call] = {
        "matmul": lambda: matrices[0] @ matrices[1],
        "ours": _call(ours, leaves, feature.learned[0], line.direction),
    }
    if feature.torchs is not None:
        theirs: Call = functools.partial(F.scaled_dot_product_attention, query, key, value, **feature.torchs)
        calls["torch"] = _call(theirs, leaves, feature.learned[1], line.direction)
    with torch.set_grad_enabled(line.direction == BACKWARD):
        times = measurement.measure(calls, _timer(line.device), ROUNDS, SECONDS)
    seconds = {name: median(own) for name, own in times.items()}
    scores = sizes.batch * sizes.heads * rows * sizes.length * feature.visible
    operations = 2 * PRODUCTS[line.direction] * line.head_dim * scores
    return Speed(
        line,
        dtype,
        milliseconds=seconds["ours"] * 1e3,
        tflops=operations / seconds["ours"] / 1e12,
        matmul_tflops=2 * sizes.matrix**3 / seconds["matmul"] / 1e12,
        torch_milliseconds=seconds["torch"] * 1e3 if "torch" in seconds else None,
    )


def _call(attention: Call, leaves: list[Tensor], learned: Tensor | None, direction: str) -> Call:
    """The call that is timed: forward without gradients, or backward alone.

    learned: the bias that gets a gradient, too; None without one
    """
    if direction != BACKWARD:
        return attention
    wanted = [x.requires_grad_() for x in leaves] + ([] if learned is None else [learned])
    out = attention()
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


@functools.cache
def _timer(device: str) -> measurement.Timer:
    return measurement.CpuTimer() if device == "cpu" else measurement.GpuTimer(torch.device(device))


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed numbers. Products of zeros can be faster than others."""
    return torch.randn(shape, device=device).to(dtype)
