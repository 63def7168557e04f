"""Translates the kernels of every curated case to TTIR, Triton's first intermediate language. Needs no GPU.

    PYTHONPATH=tests python tests/triton/front_end.py

The interpreter runs kernels as Python, so it accepts what Triton cannot compile. `aot.py` compiles the combinations of
features that need most registers. This script shows that Triton accepts all other combinations, too: pages, lengths of
keys, many ranges. It prints how many kernels there are, and fails at the first that is none. Run it with the oldest
Triton that is supported, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

# Triton reads this variable when the kernels are imported. A test session that interprets kernels sets it.
os.environ.pop("TRITON_INTERPRET", None)

import cases
import stub_driver
import torch
from backend_arguments import arguments_of_backend
from torch import Tensor
from triton import knobs, language
from triton.compiler.code_generator import CodeGenerator

from fused_attn.attention.inputs import Saved, Wanted
from fused_attn.backends.triton import backend, launcher

ARCHITECTURE = 90


def stop_after_ttir(backend=None, stages=None, options=None, language=None, capability=None) -> tuple[str, str] | None:
    """Makes Triton put a text in the place of a kernel's machine code; see `compilations.install`."""
    if stages is None:
        return "front_end", "front_end"
    for name in list(stages)[1:]:
        del stages[name]

    def make(module, metadata) -> bytes:
        metadata |= {"name": "kernel", "shared": 0, "tmem_size": 0, "global_scratch_size": 0, "profile_scratch_size": 0}
        return module.str_nodebug().encode()

    stages["cubin"] = make
    return None


def refuse_none_in_tuples() -> None:
    """Makes a function fail that returns a tuple with None, as it does in Triton 3.6, the oldest that is supported."""
    visit = CodeGenerator.visit_Return

    def visit_return(self: CodeGenerator, node: object) -> None:
        visit(self, node)
        if hasattr(self, "return_vals"):
            check_returned(self.return_vals[-1])

    CodeGenerator.visit_Return = visit_return


def check_returned(value: object) -> None:
    """Raises a TypeError if the value is a tuple with None, at any depth."""
    if not isinstance(value, language.tuple):
        return
    for entry in value.values:
        if entry is None or (isinstance(entry, language.constexpr) and entry.value is None):
            raise TypeError("a function returns None in a tuple, which Triton 3.6 cannot compile")
        check_returned(entry)


def translate(case: cases.Case, dtype: torch.dtype) -> None:
    """Launches the kernels of forward and backward, with everything that they can return."""
    problem, inputs = arguments_of_backend(case.make(dtype))
    problem = problem.on(f"sm_{ARCHITECTURE}")
    if backend.unsupported_reasons(problem):
        return
    out, lse, _ = launcher.forward(problem, inputs, needs_lse=True, needs_max=True)
    if not problem.is_paged:
        wanted = Wanted.of(*(isinstance(x, Tensor) for x in inputs))
        launcher.backward(problem, inputs, Saved(out, lse, torch.empty_like(out), torch.empty_like(lse)), wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float16, and one case of each kind")
    is_quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    stub_driver.install(ARCHITECTURE)
    launcher._multiprocessors = lambda device: stub_driver.ARCHITECTURES[ARCHITECTURE].multiprocessors
    knobs.runtime.add_stages_inspection_hook = stop_after_ttir
    refuse_none_in_tuples()
    kernels = [x for x in vars(launcher).values() if isinstance(x, stub_driver.JITFunction)]
    chosen = [case for case in cases.CASES if "2-31" not in case.id]
    if is_quick:
        # The first word of an id names the kind of the case.
        chosen = list({case.id.split("-")[0]: case for case in reversed(chosen)}.values())
    for dtype in (torch.float16,) if is_quick else (torch.float16, torch.bfloat16, torch.float32):
        for case in chosen:
            translate(case, dtype)
        counts = {kernel.__name__: len(stub_driver.compiled(kernel)) for kernel in kernels}
        print(dtype, counts)
        assert is_quick or all(counts.values()), "a kernel has not been translated"
    return 0


if __name__ == "__main__":
    sys.exit(main())
