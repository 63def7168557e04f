"""Runs a module of ours and the one of torch.nn that it replaces, and compares all that comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Same outputs and same gradients of every parameter and every floating-point tensor among the arguments.

    Where torch has NaN, we must be finite.
    """
    expected, actual = outcome(theirs, *args, **kwargs), outcome(ours, *args, **kwargs)
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        if reference is None:
            assert actual[name] is None, name
            continue
        mine = actual[name]
        assert mine.isfinite().all(), f"{name}: not finite"
        reference = torch.where(reference.isnan(), mine, reference)
        torch.testing.assert_close(mine, reference, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def outcome(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor | None]:
    """Outputs by number and gradients by name. An argument that is passed twice stays one tensor."""
    leaves: dict[int, Tensor] = {}

    def leaf(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        return leaves.setdefault(id(x), x.detach().clone().requires_grad_())

    args = [leaf(x) for x in args]
    kwargs = {name: leaf(x) for name, x in kwargs.items()}
    outputs = module(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {n}": x for n, x in enumerate(outputs)}
    parameters = {f"d{name}": p for name, p in module.named_parameters() if p.requires_grad}
    inputs = {f"dinput {n}": x for n, x in enumerate(leaves.values())}
    inputs |= parameters
    # Unequal weights, since a plain sum would hide gradients that cancel along a softmax row.
    loss = sum((x * torch.arange(x.numel(), dtype=x.dtype).cos().view_as(x)).sum() for x in outputs if x is not None)
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        results[name] = torch.zeros_like(x) if grad is None else grad
    return results


def twins(
    ours: Callable[..., nn.Module], theirs: Callable[..., nn.Module], *args: Any, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """One module of each class with the same float64 weights; biases are random, since torch starts them at zero."""
    torch.manual_seed(1)
    reference = theirs(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    mine = ours(*args, dtype=torch.float64, **kwargs)
    mine.load_state_dict(reference.state_dict(), strict=True)
    return mine, reference


def randn(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def causal(seqlen_q: int, seqlen_k: int | None = None) -> Tensor:
    """(L, S), True above the diagonal: what torch.nn calls masked."""
    return torch.ones(seqlen_q, seqlen_k or seqlen_q, dtype=torch.bool).triu(1)


def added(mask: Tensor) -> Tensor:
    """A bool mask (True = masked) as a float64 one."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


def padding(*lengths: int, longest: int) -> Tensor:
    """(N, S), True from each length on."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]
