"""Runs one of our modules and the torch.nn module that it replaces, and compares outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Asserts that both modules have the same outputs and gradients.

    The gradients are those of all parameters and of all floating-point tensors among the arguments. Where torch's
    result is NaN, ours must be finite.
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
    """The outputs by number and the gradients by name. A tensor that is passed twice stays one tensor."""
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
    # The loss is a sum with unequal weights. In a plain sum, the gradients of one softmax row would cancel.
    loss = sum((x * torch.arange(x.numel(), dtype=x.dtype).cos().view_as(x)).sum() for x in outputs if x is not None)
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        results[name] = torch.zeros_like(x) if grad is None else grad
    return results


def twins(
    ours: Callable[..., nn.Module], theirs: Callable[..., nn.Module], *args: Any, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """One module of each class, with the same float64 weights and random biases, which torch would set to zero."""
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
    """A causal mask (L, S) as torch.nn takes it: True above the diagonal, where the query must not attend."""
    return torch.ones(seqlen_q, seqlen_k or seqlen_q, dtype=torch.bool).triu(1)


def added(mask: Tensor) -> Tensor:
    """A bool mask (True = hidden) as a float64 mask, which is added to the scores."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


def padding(*lengths: int, longest: int) -> Tensor:
    """A padding mask (N, S): True from the length of each sequence on."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]
