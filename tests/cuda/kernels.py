"""The CUDA kernels in the emulation, behind the public API: meanwhile, backend="cuda" takes CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from emulator import CSRC, Builder, Library, Statistics

from fused_attn import planning
from fused_attn.backends import cuda, dispatch
from fused_attn.derivatives import ops

FLAGS = ("-Wno-psabi",)


STUB = """
#include "cuda/kernels.h"
namespace fused_attn::gpu::{family} {{
template <> void launch_forward<{head_dim}>(const Params&, bool, Stream) {{}}
template <> void launch_backward<{head_dim}>(const Params&, bool, Stream) {{}}
}}
"""

STUB_BIAS_GRADIENT = """
#include "cuda/bias_gradient.h"
namespace fused_attn::gpu {{
template <> void launch_bias_gradient<{head_dim}>(const Params&, const BiasGradientParams&, bool, Stream) {{}}
}}
"""


class Kernels:
    """A build of all kernels, or in ``csrc`` of changed ones. With ``only``, a head dim, other kernels do nothing.

    Each build has a ``name`` of its own: pybind11 loads a module once for each name, wherever its file is.
    """

    def __init__(
        self,
        builder: Builder,
        csrc: Path = CSRC,
        only: int | None = None,
        others: Sequence[Path] = (),
        flags: Sequence[str] = (),
        name: str = "_cuda_emulated",
    ) -> None:
        folder = csrc / "cuda"
        sources = [folder / "attention.cu", folder / "bindings.cpp", *others]
        for source in sorted(folder.glob("*/head_dim_*.cu")):
            head_dim = int(source.stem.removeprefix("head_dim_"))
            if only not in (None, head_dim):
                stub = STUB_BIAS_GRADIENT if source.parent.name == "bias_gradient" else STUB
                source.write_text(stub.format(family=source.parent.name, head_dim=head_dim))
            sources.append(source)
        flags = (f"-DFUSED_ATTN_CUDA_MODULE={name}", *FLAGS, *flags)
        self._module = builder.module(name, sources, csrc, flags)
        self.path = Path(self._module.__file__)
        self._library = Library(self.path)

    @contextlib.contextmanager
    def running(self, architecture: int, seed: int = 0, **options: int) -> Iterator[None]:
        """backend="cuda" is this build's kernels for sm_80 or sm_90a, in the order of threads that the seed draws.

        ``options`` are those of `Library.start`.
        """
        before = cuda._kernels
        cuda._kernels = self._module
        self._library.start(seed, **options)
        try:
            with of_architecture(architecture):
                yield
        finally:
            cuda._kernels = before

    @property
    def statistics(self) -> Statistics:
        """Those of all launches since `running` began."""
        return self._library.statistics


@contextlib.contextmanager
def of_architecture(architecture: int) -> Iterator[None]:
    """backend="cuda" runs its kernels for sm_80 or sm_90a, whatever the device."""
    before = cuda._architecture
    _forget_plans()
    cuda._architecture = lambda problem: architecture
    try:
        yield
    finally:
        cuda._architecture = before
        _forget_plans()


def _forget_plans() -> None:
    plans = (planning.cached_plan, planning._cached_packed_problem, ops._problem_of_shapes, dispatch.choose)
    for function in (*plans, cuda._config, cuda._workspace_bytes):
        function.cache_clear()
