"""The product's CUDA kernels in the emulation, behind the public API: backend="cuda" takes CPU tensors meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from emulator import CSRC, Builder, Library

from fused_attn import api, dispatch
from fused_attn.backends import cuda

MODULE = "_cuda_emulated"
FLAGS = (f"-DFUSED_ATTN_CUDA_MODULE={MODULE}", "-Wno-psabi")


class Kernels:
    """A build of all kernels, or of those with a deliberate bug in ``csrc``."""

    def __init__(self, builder: Builder, csrc: Path = CSRC) -> None:
        names = ["attention.cu", "bindings.cpp"]
        folder = csrc / "cuda"
        sources = [*(folder / name for name in names), *sorted(folder.glob("sm[89]0/*.cu"))]
        self._module = builder.module(MODULE, sources, csrc, FLAGS)
        self._library = Library(Path(self._module.__file__))

    @contextlib.contextmanager
    def running(self, architecture: int, seed: int = 0) -> Iterator[None]:
        """backend="cuda" is this build's kernels for sm_80 or sm_90a, in the order of threads that the seed draws."""
        before = cuda._kernels, cuda._architecture
        _forget_plans()
        cuda._kernels, cuda._architecture = self._module, lambda problem: architecture
        self._library.start(seed)
        try:
            yield
        finally:
            cuda._kernels, cuda._architecture = before
            _forget_plans()


def _forget_plans() -> None:
    for function in (api._cached_plan, api._cached_varlen_plan, dispatch.choose, cuda._config):
        function.cache_clear()
