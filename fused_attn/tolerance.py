"""The error that a result may have: one rule for the tests, for ``python -m fused_attn check`` and for the benchmarks.

The yardstick is the error of PyTorch's eager attention in the dtype under test. A kernel's error may be 1.5 times the
yardstick, plus a floor, because the yardstick can be 0 by chance. This module has only the rule. Its users compute the
true results in float64, and those of eager attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 1.5
#: The floor for float64. There, eager attention is the truth itself, so the yardstick is 0. The truth has rounding
#: errors as large as those of the kernels.
FLOAT64_ULPS, FLOAT64_NOISE = 32.0, 8.0


def allowed(yardstick: float, floor: float, slack: float = SLACK) -> float:
    """The largest error that the rule allows."""
    return slack * yardstick + floor


def floor(dtype: torch.dtype, stored: torch.dtype, largest: float, noise: float, largest_lse: float = 0.0) -> float:
    """The floor of a result: one unit in the last place of its largest entry, plus its noise. In float64, several.

    Args:
        dtype: the dtype of the query.
        stored: the dtype of the result, such as float32 for the LSE.
        largest: the largest magnitude in the result.
        noise: the rounding error that every algorithm has on these inputs; see `noise`.
        largest_lse: the largest LSE. It matters for float64 alone, where it magnifies rounding errors of exponentials.
    """
    ulp = torch.finfo(stored).eps * largest
    if dtype == torch.float64:
        return FLOAT64_ULPS * ulp * (1 + largest_lse) + FLOAT64_NOISE * noise
    return ulp + noise


class Measure(NamedTuple):
    """The size of an error by one norm.

    name: ``max`` or ``rms``
    error, yardstick: this norm of the error under test and of eager's error
    allowed: the largest error that the rule allows
    """

    name: str
    error: float
    yardstick: float
    allowed: float

    @property
    def is_right(self) -> bool:
        # `not (error > allowed)` would be True if the error is NaN.
        return self.error <= self.allowed


def measures(error: Tensor, yardstick: Tensor, floor: float) -> Iterator[Measure]:
    """The largest and the root mean square error of a result, both of which have to be right.

    The largest error finds single wrong entries. The root mean square finds a systematic loss of precision, which may
    be smaller than the largest error that is allowed.

    Args:
        error: the absolute errors of all entries of a result.
        yardstick: the absolute errors of all entries of eager's result.
        floor: see `floor`.
    """
    for name, size in (("max", _max), ("rms", _rms)):
        yield Measure(name, size(error), size(yardstick), allowed(size(yardstick), floor))


def noise(
    dtype: torch.dtype,
    truth: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    largest_score: float,
    largest_weight_grad: float,
) -> dict[str, float]:
    """The rounding error of each result that no algorithm can avoid on these inputs.

    There are three causes:
    - A score has the absolute error eps * |score|. The exponential turns it into a relative error of the prob.
    - The gradient of a score is prob * (dprob - delta). The two numbers may be far larger than their difference.
    - delta = <dout, out> is computed from an ``out`` that was rounded to the dtype.

    Args:
        dtype: the dtype of the output under test.
        truth: the float64 results ``out``, ``lse``, ``max``, ``dquery``, ``dkey`` and so on. Each gets its noise.
        tensors: query, key and value.
        dout, dlse: the gradients of the loss by ``out`` and ``lse``.
        largest_score: the largest magnitude of all visible scores.
        largest_weight_grad: the largest magnitude of the gradients of the probs, from dout alone.
    """
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    relative = accumulate * max(1.0, largest_score / 4)
    factor = 1.0 / (1.0 - dropout_p) if 0.0 < dropout_p < 1.0 else 1.0
    weight_grad = largest_weight_grad + (0.0 if dlse is None else largest(dlse))
    delta = largest((truth["out"] * dout.double()).square().sum(-1).sqrt())
    score_grad = 8 * relative * weight_grad + torch.finfo(dtype).eps / 2 * delta
    found = {
        "out": relative * factor * largest(tensors["value"]),
        # In low precision, probs are rounded to the dtype before they are summed.
        "lse": 2 * relative + (0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 4),
        "max": relative,
        "dquery": score_grad * abs(scale) * largest(tensors["key"]),
        "dkey": score_grad * abs(scale) * largest(tensors["query"]),
        "dvalue": 4 * relative * factor * largest(dout),
    }
    return {name: found.get(name, score_grad) for name in truth}


def largest(x: Tensor) -> float:
    """The largest magnitude of all finite entries."""
    return _max(x.abs().nan_to_num(nan=0.0, posinf=0.0))  # x[x.isfinite()] would take several times as long


def _max(x: Tensor) -> float:
    """The largest entry; 0 for an empty tensor."""
    return x.max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    """The root mean square of the entries; 0 for an empty tensor."""
    return x.square().mean().sqrt().item() if x.numel() else 0.0
