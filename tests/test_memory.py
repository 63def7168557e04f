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


#: Defines ``measure_peak(call)``: by how many KiB the call raises the peak of resident memory.
MEASURE_PEAK = """
    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

    def measure_peak(call):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmHWM")
        call()
        return status("VmHWM") - before
"""

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

    def call():
        out = fused_attn.fused_attention(q, k, v, **options, backend="cpu")
        if backward:
            out.backward(out.detach())

    print(measure_peak(call))
"""

#: Many sequences of 2 rows and one of 2048, packed.
PACKED_SCRIPT = """
    import torch
    from fused_attn import fused_attention_varlen

    offsets = torch.cat([torch.arange(0, 2000, 2), torch.tensor([2000, 4048])]).int()
    rows, sinks = torch.randn(4048, 4, 8, requires_grad=True), torch.zeros(4, requires_grad=True)

    def call(offsets):
        x = rows[: offsets[-1]]
        out = fused_attention_varlen(x, x, x, offsets, offsets, 2048, 2048, sinks=sinks, backend="cpu")
        torch.autograd.grad(out, [rows, sinks], out.detach())

    call(offsets[:2])
    print(measure_peak(lambda: call(offsets)))
"""


def printed_kib(script: str, *arguments: str) -> int:
    """The number that the script prints. It runs in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE_PEAK) + textwrap.dedent(script), *arguments],
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
    measured = printed_kib(SCRIPT, "16384", "backward" if backward else "forward", repr(options))
    assert measured < allowed, f"{measured} KiB, expected less than {allowed} KiB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_short_sequences_need_no_memory_of_a_long_one() -> None:
    """With sinks, backward keeps four numbers for each row: 125 MiB if each of the 1001 sequences had 2048 rows."""
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    measured = printed_kib(PACKED_SCRIPT)
    assert measured < 16 * 1024, f"{measured} KiB, expected less than 16 MiB"
