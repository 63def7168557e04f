"""Prints the time that a call of the launcher takes on the host, in microseconds. The driver's launch is not included.

test_launch.py runs this script in another process, because a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)

import stub_driver
import torch

from fused_attn.attention.inputs import Inputs, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem, Band
from fused_attn.backends.triton import launcher

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 4, 16, 64


def best_of(call: Callable[[], object], rounds: int = 300, calls: int = 40) -> float:
    """The microseconds of a call in the fastest round. Other processes make rounds slower, but hardly all of them."""
    call()  # compiles
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def main() -> None:
    stub_driver.install(90)

    def problem(**features) -> AttentionProblem:
        return AttentionProblem(
            BATCH, HEADS, HEADS, LENGTH, LENGTH, HEAD_DIM, HEAD_DIM, torch.float16, torch.device("cuda", 90), 0.125,
            band=Band(right=0), capability=(9, 0), **features,
        )  # fmt: skip

    query, key, value, dout = torch.randn(4, BATCH, HEADS, LENGTH, HEAD_DIM).half()
    plain = Inputs(query, key, value)
    padding = plain._replace(key_padding=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    everything = padding._replace(
        bias=torch.zeros(BATCH, HEADS, LENGTH, LENGTH).half(), relative_bias=torch.zeros(HEADS, 2 * LENGTH - 1),
        sinks=torch.zeros(HEADS), seed=torch.tensor(3),
    )  # fmt: skip
    calls = {
        "plain": (problem(), plain),
        "padding": (problem(has_key_padding=True), padding),
        "everything": (
            problem(
                has_key_padding=True, has_bias=True, has_relative_bias=True, has_sinks=True, softcap=5.0, dropout_p=0.1
            ),
            everything,
        ),
    }  # fmt: skip
    costs = {
        f"forward {name}": best_of(lambda call=call: launcher.forward(*call, True, False))
        for name, call in calls.items()
    }
    out, lse, _ = launcher.forward(*calls["plain"], True, False)
    wanted = Wanted(query=True, key=True, value=True)
    saved = Saved(out, lse, dout)
    costs["backward plain"] = best_of(lambda: launcher.backward(*calls["plain"], saved, wanted))
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
