"""The memory of a training step of a T5 with long, padded sequences grows with their length, not with its square."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fused_attn

# Prints the attention, the length, and by how many KiB a training step raises the peak of resident memory. Each step
# has a process of its own, forked from one that has imported everything.
SCRIPT = """
    import os
    import torch
    import transformers
    from fused_attn.integrations import huggingface

    torch.set_num_threads(1)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )

    def step(model, length):
        tokens = torch.randint(1, 64, (1, length))
        mask = torch.ones_like(tokens)
        mask[:, -length // 4 :] = 0
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()

    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    def measure(attention, length):
        model = transformers.T5ForConditionalGeneration(config)
        if attention == "fused":
            huggingface.enable(model, "cpu")
        else:
            model.set_attn_implementation(attention)
        step(model, 64)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = peak()
        step(model, length)
        print(attention, length, peak() - before, flush=True)

    for case in (("fused", 2048), ("fused", 4096), ("eager", 1024), ("sdpa", 1024)):
        child = os.fork()
        if child == 0:
            measure(*case)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(f"{case} failed")
"""


def scores_mib(length: int) -> float:
    """The memory of the scores of one layer."""
    return 4 * length * length * 4 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_t5_trains_in_memory_linear_in_the_length() -> None:
    pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=Path(fused_attn.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split() for line in done.stdout.splitlines())
    extra_mib = {(attention, int(length)): int(kib) / 1024 for attention, length, kib in lines}
    assert extra_mib["fused", 2048] < scores_mib(2048)
    assert extra_mib["fused", 4096] < 2.5 * extra_mib["fused", 2048]  # a quadratic growth would make it 4 times
    for theirs in ("eager", "sdpa"):
        assert extra_mib[theirs, 1024] > 4 * scores_mib(1024)
