"""The kernels use torch's number of threads. Results are right for any number, and the same in every run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import cases
import pytest
import torch
from cases import CASES

import fused_attn

CASE = {case.id: case for case in CASES}
NAMES = [
    "length-113-203-causal",
    "gqa-6-2-causal-padded",
    "softcap-with-everything",
    "varlen-causal",
    "mqa-8-1-decode",
    "relative-bias-shared",
    "float-mask-1H1S",
]


@pytest.fixture(autouse=True)
def _restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(first, second) -> None:
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_runs_are_bitwise_equal(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = CASE[name].make(dtype)
    first = cases.run(inputs, backend)
    for _ in range(5):
        assert_same_bits(first, cases.run(inputs, backend))


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_is_right(name: str, backend: str) -> None:
    """Among the numbers are more threads than heads, than blocks of queries, and than cores."""
    for threads in (1, 3, 16):
        torch.set_num_threads(threads)
        cases.check(CASE[name], torch.float32, backend)
        first = cases.run(CASE[name].make(torch.float32), backend)
        assert_same_bits(first, cases.run(CASE[name].make(torch.float32), backend))


SAME_GRADIENTS = [
    cases.Case("four-pairs", seqlen_q=150, seqlen_k=300, has_dlse=True, options={"window_size": (90, 20)}),
    cases.Case("four-pairs-few-queries", seqlen_q=2, seqlen_k=300, sinks=cases.sink()),
    cases.Case("four-pairs-padded", seqlen_q=70, seqlen_k=300, key_padding_mask=cases.scattered_padding),
    cases.Case("four-pairs-relative-bias", seqlen_q=70, seqlen_k=300, relative_bias=cases.shared_bias),
    cases.Case("few-keys", batch=1, seqlen_q=300, seqlen_k=128, attn_mask=cases.float_mask("11LS")),
    cases.Case("few-keys-and-queries", batch=1, seqlen_q=2, seqlen_k=128, attn_mask=cases.float_mask("11LS")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SAME_GRADIENTS, ids=lambda case: case.id)
def test_gradients_do_not_depend_on_the_threads(case: cases.Case, dtype: torch.dtype) -> None:
    """The calls have at most 128 keys, or at least twice as many pairs of a batch entry and a key head as threads."""
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)
    torch.set_num_threads(1)
    alone = cases.run(case.make(dtype), "cpu")
    torch.set_num_threads(2)
    assert_same_bits(alone, cases.run(case.make(dtype), "cpu"))


COUNT_THREADS = """
    import os
    import torch
    import fused_attn

    torch.set_num_threads(int(os.environ["WANTED"]))
    q = torch.randn(2, 8, 256, 64).requires_grad_()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        fused_attn.fused_attention(q, q, q, backend="cpu").sum().backward()
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_thread_means_one_thread() -> None:
    pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)

    def started(threads: int) -> int:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COUNT_THREADS)],
            env=os.environ | {"WANTED": str(threads)},
            cwd=Path(fused_attn.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(result.stdout)

    # Autograd runs backward of CPU tensors in the calling thread, so all new threads belong to OpenMP.
    assert started(1) == 0
    assert started(4) >= 3


@pytest.mark.quick
def test_calls_from_many_python_threads(backend: str) -> None:
    """Concurrent calls are right. The kernels release the GIL, so two calls may run at the same time."""
    inputs = {name: CASE[name].make(torch.float32) for name in NAMES[:4]}
    expected = {name: cases.run(x, backend) for name, x in inputs.items()}
    failures = []

    def work(name: str) -> None:
        try:
            for _ in range(5):
                result = cases.run(inputs[name], backend)
                assert_same_bits(result, expected[name])
        except Exception as error:  # kept for the main thread, where it is raised
            failures.append((name, error))

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES[:4] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.quick
def test_deterministic_algorithms_change_nothing(backend: str) -> None:
    inputs = CASE["gqa-6-2-causal-padded"].make(torch.float32)
    expected = cases.run(inputs, backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(cases.run(inputs, backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
