"""What error is allowed: one rule for the tests, for ``python -m fused_attn check`` and for the benchmarks.

PyTorch's eager attention in the dtype under test has an error, the yardstick. A kernel's error may be 1.5 times as
large, plus a floor, which is there because the yardstick may be exact by chance. This module has the rule alone. What
is true, and what eager attains, is for those who use the rule to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 1.5
#: In float64 the truth is rounded as the kernels' results are, and eager is that truth, so that the floor is all.
FLOAT64_ULPS, FLOAT64_NOISE = 32.0, 8.0


def allowed(yardstick: float, floor: float, slack: float = SLACK) -> float:
    """The largest error that is not wrong."""
    return slack * yardstick + floor


def floor(dtype: torch.dtype, stored: torch.dtype, largest: float, noise: float, largest_lse: float = 0.0) -> float:
    """One unit in the last place of the largest entry of a result, and the result's noise.

    Args:
        dtype: of the query.
        stored: the result's own dtype, such as float32 for the log-sum-exp.
        noise: rounding errors that every algorithm has on these inputs.
        largest_lse: the largest log-sum-exp, which in float64 magnifies the rounding of the exponentials.
    """
    ulp = torch.finfo(stored).eps * largest
    if dtype == torch.float64:
        return FLOAT64_ULPS * ulp * (1 + largest_lse) + FLOAT64_NOISE * noise
    return ulp + noise


class Measure(NamedTuple):
    """One way to take the size of an error: ``max`` or ``rms``."""

    name: str
    error: float
    yardstick: float
    allowed: float

    @property
    def is_right(self) -> bool:
        # A NaN error is wrong, so the comparison stands this way round.
        return self.error <= self.allowed


def measures(error: Tensor, yardstick: Tensor, floor: float) -> Iterator[Measure]:
    """Both the largest and the root mean square error have to be right.

    The first finds single wrong entries, the second a systematic loss of precision that hides below the worst entry.

    Args:
        error: absolute errors of all entries of a result.
        yardstick: those of eager's result.
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
    """Floors for results that cancel, where "an ulp of the largest entry" would ask for more than numbers can give.

    A weight has the relative error that its score has absolutely, eps * |score|. A score's gradient is
    P * (dP - delta), a difference of numbers that may be far larger than it; and delta = <dout, out> is read
    from an ``out`` that was rounded to the dtype.

    Args:
        dtype: of the output under test.
        truth: the float64 results ``out``, ``lse``, ``dquery``, ``dkey``, ``dvalue`` and so on; each gets its noise.
        tensors: query, key and value.
        largest_score: of all visible entries.
        largest_weight_grad: the largest gradient of any weight by the output alone.
    """
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    relative = accumulate * max(1.0, largest_score / 4)
    factor = 1.0 / (1.0 - dropout_p) if 0.0 < dropout_p < 1.0 else 1.0
    weight_grad = largest_weight_grad + (0.0 if dlse is None else largest(dlse))
    delta = largest((truth["out"] * dout.double()).square().sum(-1).sqrt())
    score_grad = 8 * relative * weight_grad + torch.finfo(dtype).eps / 2 * delta
    found = {
        "out": relative * factor * largest(tensors["value"]),
        # In low precision the weights are rounded before they are summed.
        "lse": 2 * relative + (0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 4),
        "dquery": score_grad * abs(scale) * largest(tensors["key"]),
        "dkey": score_grad * abs(scale) * largest(tensors["query"]),
        "dvalue": 4 * relative * factor * largest(dout),
    }
    return {name: found.get(name, score_grad) for name in truth}


def largest(x: Tensor) -> float:
    """The largest magnitude of all finite entries."""
    return _max(x[x.isfinite()].abs())


def _max(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
