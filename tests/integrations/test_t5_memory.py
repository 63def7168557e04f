"""The memory of a training step of a T5 with long, padded sequences grows with their length, not with its square."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fused_attn

SCRIPT = """
    import sys
    import torch
    import transformers
    from fused_attn.integrations import huggingface

    attention, length = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if attention == "fused":
        huggingface.enable(model, "cpu")
    else:
        model.set_attn_implementation(attention)

    def step(length):
        tokens = torch.randint(1, 64, (1, length))
        mask = torch.ones_like(tokens)
        mask[:, -length // 4 :] = 0
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()

    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    step(64)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    step(length)
    print(peak() - before)
"""


def extra_mib(attention: str, length: int) -> float:
    """By how much a training step raises the peak of resident memory, in MiB. It runs in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), attention, str(length)],
        cwd=Path(fused_attn.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_t5_trains_in_memory_linear_in_the_length() -> None:
    pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    scores = 4 * 2048 * 2048 * 4 / 2**20  # MiB of the scores of one layer: 64
    ours = {length: extra_mib("fused", length) for length in (2048, 4096)}
    assert ours[2048] < scores
    assert ours[4096] < 2.5 * ours[2048]  # a quadratic growth would make it 4 times
    for theirs in ("eager", "sdpa"):
        assert extra_mib(theirs, 2048) > 4 * scores
