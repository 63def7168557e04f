"""Nested tensors with layout=torch.strided: what torch computes in its fast path, and also what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention

E, HEADS, LENGTHS = 16, 4, (5, 2, 0, 3)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:enable_nested_tensor is True")


def rows_of(generator: torch.Generator, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Sequences (length, E) that require gradients."""
    return [torch.randn(n, E, generator=generator, dtype=torch.float64, requires_grad=True) for n in lengths]


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows)


@pytest.mark.quick
@pytest.mark.parametrize("average", [True, False])
def test_weights_are_those_of_torch(average: bool, generator: torch.Generator) -> None:
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64).eval()
    x = nested(rows_of(generator, (5, 2)))
    with torch.no_grad():
        expected = module(x, x, x, average_attn_weights=average)
        found = FusedMultiheadAttention.from_torch(module)(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(found[0].unbind(), expected[0].unbind())
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"rotary": True}], ids=str)
def test_weights_of_each_sequence(options: dict, generator: torch.Generator) -> None:
    """Each sequence has the weights of a call of its own, and zeros around them."""
    module = FusedMultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64, **options)
    rows = rows_of(generator)
    x = nested(rows)
    _, weights = module(x, x, x, average_attn_weights=False, is_causal=True)
    appended = module._num_appended
    longest = max(LENGTHS)
    expected = torch.zeros(len(rows), HEADS, longest, longest + appended, dtype=torch.float64)
    for i, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        alone = module(row, row, row, average_attn_weights=False, is_causal=True)[1]
        expected[i, :, :length, :length] = alone[..., :length]
        expected[i, :, :length, longest:] = alone[..., length:]
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(
        torch.autograd.grad(weights.square().sum(), rows[0]), torch.autograd.grad(expected.square().sum(), rows[0])
    )
