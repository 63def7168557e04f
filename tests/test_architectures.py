"""Which GPUs a binary of CUDA kernels runs on."""

from __future__ import annotations

import pytest

from fused_attn import architectures

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("built", "capability", "way"),
    [
        ("80,90a-real", (8, 0), "machine code of sm_80"),
        ("80,90a-real", (8, 9), "machine code of sm_80"),
        ("80,90a-real", (9, 0), "machine code of sm_90a"),
        ("80,90a-real", (10, 0), "PTX of sm_80, which the driver compiles at first use"),
        ("80,90a-real", (12, 1), "PTX of sm_80, which the driver compiles at first use"),
        ("80,90a-real", (7, 5), None),
        ("90a", (9, 0), "machine code of sm_90a"),
        ("90a", (10, 0), None),  # neither machine code nor PTX with the suffix a runs elsewhere
        ("86-real", (8, 6), "machine code of sm_86"),
        ("86-real", (8, 9), "machine code of sm_86"),
        ("86-real", (8, 0), None),  # a lower minor number
        ("86-real", (9, 0), None),
        ("80-virtual", (8, 0), "PTX of sm_80, which the driver compiles at first use"),
        ("90-virtual", (8, 9), None),
        ("80-virtual,100f-real", (10, 3), "machine code of sm_100f"),
        ("100f-virtual", (12, 0), None),
        ("", (9, 0), None),
    ],
)
def test_way_on(built: str, capability: tuple[int, int], way: str | None) -> None:
    assert architectures.way_on(architectures.parsed(built), capability) == way


def test_description() -> None:
    built = architectures.parsed("80,90a-real,120-virtual")
    assert ", ".join(map(str, built)) == "sm_80 (machine code and PTX), sm_90a (machine code), sm_120 (PTX)"


@pytest.mark.parametrize("entry", ["sm_80", "native", "8", "80 90a"])
def test_what_is_no_architecture(entry: str) -> None:
    with pytest.raises(ValueError, match=rf"architectures: expected entries such as 80 or 90a-real, got {entry!r}"):
        architectures.parsed(f"80,{entry}")
