"""A native call with its arguments: made ready once, and run once or many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_attn.backends import events


class NativeCall(NamedTuple):
    """A call of a CPU kernel. Each run reads the same tensors, and writes `out` anew.

    event: the name of the call in a profile
    function: the function of ``_C``
    arguments: all arguments but the last one, which is the number of threads
    out: what the call writes
    before, after: called before and after the kernel, if given
    """

    event: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    out: Tensor
    before: Callable[[], Any] | None = None
    after: Callable[[], None] | None = None

    def run(self) -> Tensor:
        if self.before is not None:
            self.before()
        function = events.recorded_if_profiling(self.event, self.function)
        function(*self.arguments, torch.get_num_threads())
        if self.after is not None:
            self.after()
        return self.out


def norm_arguments(norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """What native calls get of a layer norm: its weight, bias and eps."""
    return (None, None, 0.0) if norm is None else (norm._parameters["weight"], norm._parameters["bias"], norm.eps)
