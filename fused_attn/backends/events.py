"""What torch's profiler sees of attention: each step of a backend as an event."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.autograd import profiler

from fused_attn.backends.base import Backend


def recorded(event: str, function: Callable) -> Callable:
    """The function, wrapped so that each call is an event of torch's profiler.

    The wrapper takes time, so it is used only while a profiler runs.
    """

    @functools.wraps(function)
    def run(*args):
        with profiler.record_function(f"fused_attn::{event}"):
            return function(*args)

    return run


class _NamedBackend:
    """A backend whose steps are the events ``fused_attn::forward[name]`` and ``fused_attn::backward[name]``."""

    def __init__(self, backend: Backend):
        self.name, self.is_composite = backend.name, backend.is_composite
        self.unsupported_reasons = backend.unsupported_reasons
        self.forward, self.backward = (
            recorded(f"{step}[{backend.name}]", getattr(backend, step)) for step in ("forward", "backward")
        )


_named = functools.cache(_NamedBackend)


def named(backend: Backend) -> Backend:
    """The backend itself, or while a profiler runs, the same backend with steps that are events."""
    return _named(backend) if profiler._is_profiler_enabled and type(backend) is not _NamedBackend else backend
