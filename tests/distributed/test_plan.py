"""The plan of a step: model and command. `test_context_parallel.py` compares bytes and memory with real runs."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fused_attn.attention.masks import band_of
from fused_attn.attention.problem import Band
from fused_attn.distributed import __main__ as command
from fused_attn.distributed import cost as model
from fused_attn.distributed import quantities
from fused_attn.distributed.blocks import Block
from fused_attn.distributed.cost import Machine, Method, Workload
from fused_attn.distributed.rates import Rates, read_rows
from fused_attn.distributed.traffic import ring_elements

#: Two GPUs a node. A message takes 1 s and 1 s for each byte within a node, 10 s and 10 s for each byte outside.
MACHINE = Machine(2, 1.0, 0.1, 1.0, 10.0, 1e30)
RATES = Rates.constant(1.0, 1.0)


def workload(tokens: int = 128, window: int = -1, dtype: str = "float32", kv_heads: int = 2, **more) -> Workload:
    """Causal attention of one layer."""
    numbers = {"batch": 2, "heads": 8, "head_dim": 16, "layers": 1} | more
    return Workload(tokens, kv_heads=kv_heads, dtype=dtype, band=band_of(True, (window, -1)), **numbers)


@pytest.mark.quick
@pytest.mark.parametrize("band", [Band(), Band(right=0), Band(3, 2), Band(left=5), Band(2, 0, offset=4)], ids=str)
def test_visible_scores_are_counted(band: Band) -> None:
    for query_offset, key_offset, rows, keys in ((0, 0, 7, 9), (8, 0, 5, 6), (0, 4, 9, 3), (3, 2, 1, 8)):
        diagonals = (torch.arange(keys) + key_offset)[None] - (torch.arange(rows) + query_offset)[:, None] - band.offset
        visible = torch.ones(rows, keys, dtype=torch.bool)
        if band.left >= 0:
            visible &= diagonals >= -band.left
        if band.right >= 0:
            visible &= diagonals <= band.right
        block = Block(slice(0, rows), slice(10, 10 + keys), query_offset, key_offset)
        assert model.visible_scores(block, band) == visible.sum()


@pytest.mark.quick
@pytest.mark.parametrize("gpus, window", [(4, -1), (8, 100), (64, -1), (64, 3000)])
def test_all_scores_and_bytes_of_a_ring_are_planned(gpus: int, window: int) -> None:
    """The ranks of a ring that is too long to be looked at as a whole stand for the others."""
    load = workload(tokens=64 * gpus, window=window)
    planned = model.cost(load, MACHINE, RATES, Method(gpus, 1))
    shape = (load.batch, load.kv_heads, 0, load.head_dim)
    assert planned.sent_forward == 4 * max(ring_elements(load.scores(gpus), shape, shape))
    whole = model.cost(load, MACHINE, RATES, Method(1, 1))
    assert whole.sent_forward == whole.sent_backward == whole.seconds.exposed == whole.seconds.copies == 0
    scores = (
        load.batch
        * load.heads
        * load.head_dim
        * sum(min(i + 1, 10**9 if window < 0 else window + 1) for i in range(load.tokens))
    )
    assert whole.forward.kernels == 4 * scores
    assert whole.backward.kernels == 10 * scores
    if window < 0:  # then all ranks have the same work
        assert planned.forward.kernels == pytest.approx(whole.forward.kernels / gpus, rel=0.02)


@pytest.mark.quick
def test_only_messages_that_take_longer_than_the_kernels_are_exposed() -> None:
    """A ring of two without a mask: in forward, the whole shard travels once. In backward, its gradient comes back."""
    load = workload(tokens=16, kv_heads=8, batch=1)._replace(band=Band())
    shard = 8 * 8 * 16 * 2  # elements of the keys and values of a rank
    step = 4 * 8 * 16 * 8 * 8  # operations of a step
    slow = model.cost(load, MACHINE, RATES, Method(2, 1))
    assert slow.forward.kernels == 2 * step
    assert slow.forward.exposed == max(0, 1 + 4 * shard - step)
    assert slow.backward.exposed == max(0, 1 + 4 * shard - 2.5 * step) + 1 + 4 * shard
    for rate, exposed in ((1e-3, 0.0), (1e9, 1 + 4 * shard)):
        found = model.cost(load, MACHINE, Rates.constant(rate, rate), Method(2, 1))
        assert found.forward.exposed == pytest.approx(exposed, abs=1e-3)
    serial = model.cost(load, MACHINE._replace(overlaps=False), Rates.constant(1e-3, 1e-3), Method(2, 1))
    assert serial.forward.exposed == 1 + 4 * shard


@pytest.mark.quick
def test_messages_between_nodes_take_infiniband() -> None:
    """Groups of two are nodes here. A ring of two such groups sends between nodes, and its groups do not."""
    load = workload(tokens=64, kv_heads=8)
    nested = model.cost(load, MACHINE, Rates.constant(1e30, 1e30), Method(2, 2))
    one_node = model.cost(load, MACHINE._replace(gpus_per_node=4), Rates.constant(1e30, 1e30), Method(2, 2))
    keys = 4 * 2 * 4 * 32 * 16 * 2  # bytes that travel around the ring in forward: 4 heads, 32 rows at most
    rows = nested.forward.exposed - one_node.forward.exposed
    assert rows == pytest.approx(9 + 9 * keys)
    divided = model.cost(load, MACHINE, RATES, Method(1, 4))
    # Two of three other ranks are in another node.
    assert divided.forward.exposed == pytest.approx(5 * 10 + 10 * divided.sent_forward * 2 / 3)


@pytest.mark.quick
def test_rates_are_those_of_the_newest_rows() -> None:
    def row(length: int, rate: float, mask: str = "none", direction: str = "forward", **more) -> dict:
        return {
            "device": "NVIDIA H100", "dtype": "bfloat16", "shape": [1, 8, length, 64], "mask": mask,
            "direction": direction, "benchmark": "attention", "implementation": "fused_attn", "is_right": True,
            "effective_tflops": rate, "matmul_tflops": 700.0, "commit": "abc", "date": "2026-01-01",
        } | more  # fmt: skip

    rows = [row(512, 100.0), row(2048, 300.0), row(512, 1.0, date="2025-01-01"), row(512, 9.0, implementation="torch")]
    rows += [row(512, 50.0, mask, "backward") for mask in ("none", "causal")] + [row(512, 80.0, "causal")]
    rates = Rates.of_rows(rows, "h100", "bfloat16", 64)
    assert [rates.rate("forward", False, length) for length in (64, 512, 1024, 2048, 1 << 20)] == [
        1e14, 1e14, pytest.approx(2e14), 3e14, 3e14,
    ]  # fmt: skip
    assert rates.rate("forward", True, 512) == 8e13 and rates.rate("backward", True, 512) == 5e13
    assert rates.matmul == 7e14
    for arguments, message in (
        (("H200", "bfloat16", 64), "--device: expected a part of the name of one device with rows (NVIDIA H100)"),
        (("H100", "float16", 64), "--dtype: expected one with measured rows of NVIDIA H100 (bfloat16)"),
        (("H100", "bfloat16", 96), "--head-dim: expected one with measured rows of NVIDIA H100 (64)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Rates.of_rows(rows, *arguments)
    with pytest.raises(ValueError, match="--rows: expected rows of mask 'none', forward"):
        Rates.of_rows(rows[3:], "H100", "bfloat16", 64)


@pytest.mark.quick
def test_an_installation_without_rows_says_what_to_give(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("fused_attn.distributed.rates.ROWS", tmp_path)
    with pytest.raises(ValueError, match=r"--rows: expected files of .* or --tflops, got none"):
        read_rows()
    for content, message in (
        (b"no JSON", r"a file of JSON lines, got .*bad\.jsonl"),
        (b"\xff\xfe", r"a file of JSON lines, got .*bad\.jsonl"),  # no UTF-8
        (b"{}\n[1]", r"lines that are JSON objects, got .*bad\.jsonl: \[1\]"),
    ):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=f"--rows: expected {message}"):
            read_rows([tmp_path / "bad.jsonl"])


PLAN = ["plan", "--gpus", "16", "--tokens", "64K"]
GIVEN = [*PLAN, "--tflops", "600", "400"]


@pytest.mark.quick
def test_the_command_names_the_fastest_method(capsys) -> None:
    assert command.main([*PLAN, "--hidden", "4096"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H100" in text and "so attention is" in text
    times = [line for line in text.splitlines() if line.startswith(("ring", "ulysses"))]
    assert len(times) == 5
    assert command.main([*PLAN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = [x["seconds"] for x in found["methods"]]
    assert seconds == sorted(seconds) and len(seconds) == 5
    assert f"The best is {found['methods'][0]['method']}:" in text and times[0].startswith(
        found["methods"][0]["method"]
    )
    assert found["workload"]["tokens"] == 65536


@pytest.mark.quick
def test_methods_that_need_too_much_memory_lose(capsys) -> None:
    given = [*GIVEN, "--gpus", "32", "--gpus-per-node", "32", "--json"]  # a group of 32 repeats the 8 key heads
    command.main(given)
    best, *others = json.loads(capsys.readouterr().out)["methods"]
    size = best["saved_bytes"] + best["buffer_bytes"]
    smaller = [x for x in others if x["saved_bytes"] + x["buffer_bytes"] < size]
    assert smaller
    command.main([*given, "--memory", f"{size / 1e9 - 1e-6:.6f}GB"])
    found = json.loads(capsys.readouterr().out)
    assert found["methods"][0]["method"] == smaller[0]["method"]
    assert "do not fit into --memory" in found["reason"]
    command.main([*GIVEN, "--memory", "1kB"])
    assert "No method fits into --memory 1 kB" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "ulysses", "--heads", "24"], "--heads: expected a multiple of the 16 GPUs that divide them"),
        (["--method", "2x8", "--heads", "4", "--kv-heads", "4"], "--heads: expected a multiple of the 8 GPUs"),
        (["--method", "3x4"], "--method: expected a nesting of 16 GPUs, got 3x4"),
        (["--method", "tree"], "--method: expected auto, ring, ulysses, or a nesting such as 128x8, got 'tree'"),
        (["--tokens", "100"], "--tokens: expected at least 16 for each of the 16 GPUs, got 100"),
        (["--kv-heads", "5"], "--kv-heads: expected a divisor of the 32 heads, got 5"),
        (["--nvlink", "450"], "--nvlink: expected a bandwidth such as 450GB/s (bytes) or 400Gb/s (bits), got '450'"),
        (["--gpus", "0"], "--gpus: expected a whole number of at least 1, got '0'"),
        (["--latency", "1", "2us"], "--latency: expected a time such as 12us, got '1'"),
        (["--window", "-2", "0"], "window_size: expected"),
        (["--device", "A100"], "--memory-bandwidth: expected one for a device other than H100, H200, got none"),
        (["--hidden", "64"], "--hidden: expected --matmul-tflops with --tflops, got no rate of a matrix product"),
        (["--infiniband", "0GB/s"], "--infiniband: expected a finite number above 0, got 0.0"),
        (["--tflops", "nan", "400"], "--tflops: expected a finite number above 0, got nan"),
        (["--matmul-tflops", "inf"], "--matmul-tflops: expected a finite number above 0, got inf"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        command.main([*GIVEN, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.quick
def test_lengths_that_do_not_divide_are_mentioned(capsys) -> None:
    command.main([*GIVEN, "--tokens", "65000"])
    assert "--tokens: 65000 is no multiple of 256 (16 a GPU), so the GPUs hold " in capsys.readouterr().out


@pytest.mark.quick
def test_units() -> None:
    assert quantities.count("4M") == 4 * 1024 * 1024 and quantities.count("1.5K") == 1536 == quantities.count("1.5k")
    assert quantities.bandwidth("400Gb/s") == quantities.bandwidth("50 GB/s") == 5e10
    assert quantities.duration("12us") == pytest.approx(1.2e-5)
    assert quantities.size("80GB") == 8e10
    assert quantities.in_bytes(1.5e9) == "1.5 GB" and quantities.in_bytes(0) == "0 B"
    assert [quantities.in_seconds(x) for x in (1234.5, 2.0, 0.035, 12e-6)] == ["1234 s", "2 s", "35 ms", "12 us"]
