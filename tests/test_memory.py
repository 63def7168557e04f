"""The strides of outputs and gradients, and how much memory a call needs besides its results."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS

import fused_attn


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_output_strides_follow_the_query(backend: str, layout: str, generator: torch.Generator) -> None:
    query, key, value = (
        LAYOUTS[layout](torch.randn(2, 3, n, 8, generator=generator)).requires_grad_() for n in (5, 7, 7)
    )
    out = fused_attn.fused_attention(query, key, value, backend=backend)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert out.stride() == theirs.stride() == query.stride()
    if layout == "blhd":
        out.transpose(1, 2).view(2, 5, 24)  # raises unless heads can be merged without a copy


@pytest.mark.quick
def test_transposed_inputs_are_not_copied(generator: torch.Generator) -> None:
    """Inputs may be views (B, H, L, D) of a model's projections (B, L, H, D).

    Gradients get the strides of their inputs.
    """
    if fused_attn.explain(*[torch.zeros(1, 1, 1, 1)] * 3).chosen == "reference":
        pytest.skip("the reference is plain PyTorch, whose matmul copies as it likes")
    leaves = [torch.randn(2, 5, 3, 8, generator=generator, requires_grad=True) for _ in range(3)]
    out = fused_attn.fused_attention(*(x.transpose(1, 2) for x in leaves))
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.is_contiguous()


SCRIPT = """
    import sys
    import torch
    import fused_attn

    length, backward, options = int(sys.argv[1]), sys.argv[2] == "backward", eval(sys.argv[3])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 32, requires_grad=backward) for _ in range(3))
    if options.pop("padding", False):
        options["key_padding_mask"] = torch.arange(length)[None] >= length // 2
    if options.pop("relative", False):
        options["relative_bias"] = torch.randn(1, 2 * length - 1, requires_grad=backward)
    small = [x[:, :, :64].detach() for x in (q, k, v)]
    small = [x.requires_grad_(backward) for x in small]
    warm = fused_attn.fused_attention(*small, backend="cpu")
    if backward:
        warm.sum().backward()

    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmHWM")
    out = fused_attn.fused_attention(q, k, v, **options, backend="cpu")
    if backward:
        out.backward(out.detach())
    print(status("VmHWM") - before)
"""


def extra_kib(length: int, backward: bool, options: dict) -> int:
    """By how much one call raises the peak of resident memory, in KiB. The call runs in a process of its own."""
    direction = "backward" if backward else "forward"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(length), direction, repr(options)],
        cwd=Path(fused_attn.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [{"window_size": (512, 512)}, {"padding": True, "is_causal": True}, {"relative": True}],
    ids=["window", "padded-causal", "relative-bias"],
)
def test_memory_grows_with_the_length_not_its_square(options: dict, backward: bool) -> None:
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    # A call allocates out and, with gradients, dq, dk, dv, delta and scratch, each 2 MiB. Scores would take 1 GiB, and
    # 32 MiB as bits.
    allowed = (12 if backward else 4) * 2 * 1024
    measured = extra_kib(16384, backward, options)
    assert measured < allowed, f"{measured} KiB, expected less than {allowed} KiB"
