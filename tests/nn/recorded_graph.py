"""A stand-in for a CUDA graph, for machines without a GPU: records the operators of a step and replays them.

Like a CUDA graph, the recording knows only operators and tensors. Numbers that the step reads on the host are as they
were during the recording. Reading a number from a tensor is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

#: Operators whose results depend on the contents of tensors, so that a CUDA graph cannot contain them.
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Recorder(TorchDispatchMode):
    """Records calls as (operator, arguments, keyword arguments, result)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError(f"{func} reads a tensor on the host, during a capture")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(step: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """A function that replays the operators of the step. As a capture, the recording itself changes no tensor of
    `state`."""
    before = [x.clone() for x in state]
    with Recorder() as recorder:
        step()
    for x, old in zip(state, before, strict=True):
        if not torch.equal(x, old):  # a cache notices that its memory is written, and a capture writes no memory
            x.copy_(old)

    def replay() -> None:
        known: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            return known.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, recorded in recorder.calls:
            result = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(_tensors(recorded), _tensors(result), strict=True):
                known[id(old)] = new

    return replay


def _tensors(result: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, result)
    return found
