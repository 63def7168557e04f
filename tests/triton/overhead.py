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
CALLS = 40  # calls of a round


def fastest(calls: dict[str, Callable[[], object]], sweeps: int = 12, rounds: int = 25) -> dict[str, float]:
    """The microseconds of each call in its fastest round.

    Other processes make rounds slower, but hardly all of them. They may keep a processor busy for a second. So the
    calls take turns, and pause between the sweeps.
    """
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # compiles
    for _ in range(sweeps):
        for name, call in calls.items():
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
        time.sleep(0.25)
    return {name: seconds * 1e6 for name, seconds in best.items()}


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
    out, lse, _ = launcher.forward(*calls["plain"], True, False)
    wanted = Wanted(query=True, key=True, value=True)
    saved = Saved(out, lse, dout)
    timed: dict[str, Callable[[], object]] = {
        f"forward {name}": lambda call=call: launcher.forward(*call, True, False) for name, call in calls.items()
    }
    timed["backward plain"] = lambda: launcher.backward(*calls["plain"], saved, wanted)
    print(json.dumps(fastest(timed)))


if __name__ == "__main__":
    main()
