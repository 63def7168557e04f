"""Runs the CUDA kernels in the emulation, under the public API. backend="cuda" then takes tensors on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emulator import CSRC, Builder, Library, Statistics

from fused_attn import architectures, planning
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import dispatch
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware
from fused_attn.backends.cuda import splits as cuda_splits
from fused_attn.backends.cuda import workspace as cuda_workspace
from fused_attn.backends.cuda.splits import GradientSplits, KeySplits
from fused_attn.derivatives import ops

FLAGS = ("-Wno-psabi",)  # otherwise g++ warns about how it passes vector types


#: Launchers that do nothing, in place of those of a head dim that a test does not need: this saves compile time.
STUB = """
#include "cuda/bias_gradient.h"
namespace fused_attn::gpu::{family} {{
template <> void launch_forward<{head_dims}>(const Params&, bool, Stream) {{}}
template <> void launch_backward<{head_dims}>(const Params&, bool, Stream) {{}}
template <> void launch_bias_gradient<{head_dims}>(const Params&, const BiasGradientParams&, bool, Stream) {{}}
}}
"""

STUB_DECODE = """
#include "cuda/decode.h"
namespace fused_attn::gpu {{
template <> void launch_decode<{head_dims}>(const Params&, const DecodeParams&, bool, Stream) {{}}
}}
"""

#: The stub for a folder of kernels.
STUBS = {"sm80": STUB, "sm90": STUB, "decode": STUB_DECODE}


class Kernels:
    """A build of all kernels of ``csrc``: the product's, or a copy with changes.

    ``needs(folder, head_dim)`` says which launchers a test needs. The other ones do nothing: a source that is added to
    the copy has them. None = all are needed.

    ``others`` are further sources. Each build needs another ``name``: pybind11 loads a module once for each name.
    """

    def __init__(
        self,
        builder: Builder,
        csrc: Path = CSRC,
        needs: Callable[[str, int], bool] | None = None,
        others: Sequence[Path] = (),
        flags: Sequence[str] = (),
        name: str = "_cuda_emulated",
    ) -> None:
        folder = csrc / "cuda"
        sources = [folder / "attention.cu", folder / "bindings.cpp", *others]
        stubs = ""
        for source in sorted(folder.glob("*/head_dim_*.cu")):
            head_dims = source.stem.removeprefix("head_dim_").split("_")  # of queries, and of values if unlike
            if needs is None or needs(source.parent.name, int(head_dims[0])):
                sources.append(source)
            else:
                stubs += STUBS[source.parent.name].format(family=source.parent.name, head_dims=", ".join(head_dims))
        if stubs:
            sources.append(csrc / "stubs.cpp")
            sources[-1].write_text(stubs)
        flags = (f"-DFUSED_ATTN_CUDA_MODULE={name}", *FLAGS, *flags)
        self._module = builder.module(name, sources, csrc, flags)
        self.path = Path(self._module.__file__)
        self._library = Library(self.path)

    @contextlib.contextmanager
    def running(self, architecture: int, seed: int = 0, **options: int) -> Iterator[None]:
        """Within this context, backend="cuda" runs this build's kernels for sm_80 (80) or sm_90a (90).

        ``seed`` draws the order of threads.

        ``options`` are those of `Library.start`.
        """
        before = hardware.module
        hardware.module = self._module
        self._library.start(seed, **options)
        try:
            with of_architecture(architecture):
                yield
        finally:
            hardware.module = before

    @property
    def statistics(self) -> Statistics:
        """Those of all launches since `running` began."""
        return self._library.statistics


def is_built_for(architecture: int) -> bool:
    """Whether the module of backend="cuda" has the kernels for sm_80 (80) or sm_90a (90)."""
    built = architectures.parsed(hardware.module.build_info()["architectures"])
    return any(entry.name.rstrip("a") == str(architecture) for entry in built)


@contextlib.contextmanager
def of_architecture(architecture: int) -> Iterator[None]:
    """Within this context, backend="cuda" runs its kernels for sm_80 (80) or sm_90a (90), whatever the device is."""
    before = hardware.device_architecture
    _forget_plans()
    hardware.device_architecture = lambda problem: architecture
    try:
        yield
    finally:
        hardware.device_architecture = before
        _forget_plans()


@contextlib.contextmanager
def dividing_gradients(dq: int, dk: int) -> Iterator[None]:
    """Within this context, so many programs share a block of rows of dq, and of dk and dv. The fused backward of sm_90a
    has no blocks of dq.
    """

    def splits(problem: AttentionProblem, rows_q: int, rows_k: int) -> GradientSplits:
        return GradientSplits(1 if cuda_splits.is_fused_backward(problem) else dq, dk)

    before = cuda_splits.gradient_splits
    cuda_splits.gradient_splits = splits
    try:
        yield
    finally:
        cuda_splits.gradient_splits = before


@contextlib.contextmanager
def running_both_kinds() -> Iterator[None]:
    """Within this context, packed calls run the decode kernels for sequences with few queries, and the large kernels
    for the others. The backend runs both kinds for pages only.
    """
    before = cuda_splits.key_splits
    cuda_splits.key_splits = lambda problem: KeySplits(decode=2, large=1)
    try:
        yield
    finally:
        cuda_splits.key_splits = before


#: The functions that remember what follows from a problem. Contexts of this file replace two of them.
CACHED = (
    ops._cached_problem,
    dispatch.choose,
    cuda._config,
    cuda_workspace.workspace_bytes,
    cuda_splits.key_splits,
    cuda_splits.gradient_splits,
)


def _forget_plans() -> None:
    """Clears the caches of plans, which hold the architecture and the kernels that were chosen before."""
    for planner in (planning.dense, planning.packed, planning.paged):
        planner.clear()
    for function in CACHED:
        function.cache_clear()
