"""`fused_attn.tolerance`, the rule that says which error is allowed, finds wrong results and accepts right ones."""

from __future__ import annotations

import pytest
import torch

from fused_attn import tolerance

pytestmark = pytest.mark.quick


def verdicts(error: torch.Tensor, yardstick: torch.Tensor, floor: float = 0.0) -> dict[str, bool]:
    return {measure.name: measure.is_right for measure in tolerance.measures(error, yardstick, floor)}


def test_one_wrong_entry_is_found():
    error, yardstick = torch.full((100,), 0.1), torch.full((100,), 0.1)
    error[7] = 0.2
    assert verdicts(error, yardstick) == {"max": False, "rms": True}
    assert verdicts(error, yardstick, floor=0.06) == {"max": True, "rms": True}


def test_a_loss_of_precision_below_the_worst_entry_is_found():
    yardstick = torch.zeros(100)
    yardstick[7] = 1.0
    assert verdicts(torch.full((100,), 0.5), yardstick) == {"max": True, "rms": False}


def test_nan_is_wrong():
    error = torch.zeros(100)
    error[7] = float("nan")
    assert verdicts(error, torch.ones(100)) == {"max": False, "rms": False}


def test_the_floor_is_one_unit_of_the_stored_dtype():
    """The eager float64 result is the true result and has no error, so the smallest allowed error must be larger."""
    floor = tolerance.floor(torch.float16, torch.float32, largest=4.0, noise=1e-3, largest_lse=9.0)
    assert floor == 4.0 * 2**-23 + 1e-3
    floor = tolerance.floor(torch.float64, torch.float64, largest=4.0, noise=1e-12, largest_lse=9.0)
    assert floor == 32 * 4.0 * 2**-52 * 10.0 + 8e-12


def test_a_score_and_a_gradient_that_are_large_make_noise():
    shapes = {"out": (1, 2, 3, 8), "lse": (1, 2, 3), "dquery": (1, 2, 3, 8), "dsinks": (2,)}
    truth = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors = {name: torch.ones(1, 2, 3, 8) for name in ("query", "key", "value")}

    def noise(**sizes: float) -> dict[str, float]:
        sizes = {"largest_score": 0.0, "largest_weight_grad": 0.0} | sizes
        dout = torch.zeros(1, 2, 3, 8)
        return tolerance.noise(torch.float32, truth, tensors, dout, None, scale=0.5, dropout_p=0.0, **sizes)

    eps = 2**-23
    assert noise() == {"out": eps, "lse": 2 * eps, "dquery": 0.0, "dsinks": 0.0}
    assert noise(largest_score=40.0)["out"] == 10 * eps
    assert noise(largest_weight_grad=3.0)["dsinks"] == 24 * eps
    assert noise(largest_weight_grad=3.0)["dquery"] == 12 * eps  # grows with the scale and the largest key as well
