"""A call that fails leaves its cache as the cache was before, so that the caller can repeat the call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch


class Restoring:
    """Gives caches their former state back if the body of ``with`` raises an error, of whatever cause.

    Without it, the rows of a failed step would stay in the caches of the first layers. The next step would then be
    silently wrong.

    Args:
        parts: the caches of attention modules. A part of a class without `state` and `restore` stays as it is.
    """

    def __init__(self, parts: Iterable[Any]):
        self._states = [(part, part.state()) for part in parts if hasattr(part, "restore")]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            for part, state in self._states:
                part.restore(state)


def restoring_layers(layers: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """`restoring` for all parts of the caches of decoder layers. A layer refuses a cache without these parts."""
    names = ("self_attention", "cross_attention")
    return restoring(getattr(layer, name, None) for layer in layers for name in names)


def restoring(parts: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """A `Restoring`. In a traced graph, nothing: Dynamo breaks no graph inside of a context manager of Python."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else Restoring(parts)
