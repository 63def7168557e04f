"""Events for torch's profiler: a profile shows each forward and each backward of a backend as one entry."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.autograd import profiler

from fused_attn.backends.base import Backend


def recorded(event: str, function: Callable) -> Callable:
    """The function, wrapped so that torch's profiler records each call under the name ``fused_attn::event``.

    The wrapper takes time, so callers use it only while a profiler runs.
    """

    @functools.wraps(function)
    def run(*args):
        with profiler.record_function(f"fused_attn::{event}"):
            return function(*args)

    return run


def recorded_if_profiling(event: str, function: Callable) -> Callable:
    """`recorded` while a profiler runs, else the function itself."""
    return recorded(event, function) if profiler._is_profiler_enabled else function


class _NamedBackend:
    """A backend that records its steps for torch's profiler, and otherwise does what the given backend does.

    The profile shows them as ``fused_attn::forward[name]`` and ``fused_attn::backward[name]``.
    """

    def __init__(self, backend: Backend):
        self.name, self.is_composite = backend.name, backend.is_composite
        self.unsupported_reasons = backend.unsupported_reasons
        self.forward, self.backward = (
            recorded(f"{step}[{backend.name}]", getattr(backend, step)) for step in ("forward", "backward")
        )


_named = functools.cache(_NamedBackend)


def named(backend: Backend) -> Backend:
    """The backend itself. While a profiler runs: the same backend, wrapped so that it records its steps."""
    return _named(backend) if profiler._is_profiler_enabled and type(backend) is not _NamedBackend else backend
