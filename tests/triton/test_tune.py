"""``python -m fused_attn tune``: which configurations it measures, drops and stores, and when stored ones are used.

A `FakeRunner` stands in for the GPU. The tests at the end of the file run real inputs in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn.__main__ import main

pytest.importorskip("triton.language")

from fused_attn.backends.triton import configs, launcher, tune, tuned
from fused_attn.backends.triton.configs import Config

pytestmark = pytest.mark.quick

GPU = "NVIDIA H100 80GB HBM3"
TABLE, FAST, FASTER, SLOW = Config(128, 64), Config(128, 128), Config(64, 64), Config(32, 32)
WORKLOAD = tune.Workload("forward", torch.bfloat16, 64, ("causal", "padding"))
TRUTH = [torch.linspace(-1.0, 1.0, 100)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Gives the test its own, empty cache folder, and forgets tables that earlier tests have read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    tuned._read_table.cache_clear()
    yield tmp_path / "fused_attn"
    tuned._read_table.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch report one GPU, of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class FakeRunner:
    """Returns given times and results instead of measuring.

    ms: the time of each configuration
    wrong: the results of some configurations, or the errors that they raise
    """

    def __init__(self, ms, wrong=()):
        self.ms, self.wrong = ms, dict(wrong)
        self.orders = []

    def results(self, workload, config):
        found = self.wrong.get(config, TRUTH)
        if isinstance(found, Exception):
            raise found
        return found

    def times(self, workload, order):
        self.orders.append(tuple(order))
        # As with a drifting clock rate, all times of a round are up to 40 % longer than those of another round.
        return [self.ms[config] * (1.0 + 0.1 * (len(self.orders) % 5)) for config in order]


def outcome_of(ms, **options):
    return tune.measure(WORKLOAD, list(ms), FakeRunner(ms, **options))


def table_with(outcome):
    return tune.with_outcome(tuned.Table({"versions": tuned.versions(), "date": "2026-11-22"}, {}), outcome)


# ---- Measuring


def test_the_fastest_wins():
    outcome = outcome_of({TABLE: 1.0, FAST: 0.9, FASTER: 0.8, SLOW: 3.0})
    assert outcome.best == FASTER and outcome.table == TABLE and not outcome.dropped
    assert outcome.ms / outcome.baseline_ms == pytest.approx(0.8)
    assert "-20.0%" in str(outcome)


@pytest.mark.parametrize(
    ("ms", "best"), [(0.97, FAST), (0.985, TABLE), (1.0, TABLE), (1.1, TABLE), (float("nan"), TABLE)]
)
def test_only_more_than_2_percent_count(ms, best):
    outcome = outcome_of({TABLE: 1.0, FAST: ms})
    assert outcome.best == best
    assert ("nothing is worth replacing it" in str(outcome)) == (best == TABLE)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            RuntimeError("out of resource: shared memory\nRequired: 300000"),
            "RuntimeError: out of resource: shared memory",
        ),
        ([TRUTH[0] + 0.1], "wrong result, off by 1.0e-01"),
        ([TRUTH[0].masked_fill(torch.arange(100) == 7, float("nan"))], "wrong result, off by nan"),
    ],
    ids=["raises", "wrong", "nan"],
)
def test_what_does_not_run_or_is_wrong_is_dropped_with_its_reason(found, reason):
    outcome = outcome_of({TABLE: 1.0, FAST: 0.9, FASTER: 0.1}, wrong={FASTER: found})
    assert outcome.best == FAST
    assert outcome.dropped[FASTER].startswith(reason)
    assert f"dropped block_m=64 block_n=64 num_warps=4 num_stages=2: {reason}" in str(outcome)


def test_rounding_is_not_wrong():
    assert outcome_of({TABLE: 1.0, FAST: 0.5}, wrong={FAST: [x.bfloat16().float() for x in TRUTH]}).best == FAST


def test_a_table_whose_own_row_fails_says_so():
    outcome = outcome_of({TABLE: 1.0, FAST: 0.5}, wrong={TABLE: RuntimeError("spills")})
    assert isinstance(outcome, tune.Failure)
    assert "FAILS, please report it: RuntimeError: spills" in str(outcome)


def test_rounds_are_interleaved_and_soon_without_the_slow():
    runner = FakeRunner({TABLE: 1.0, FAST: 0.9, SLOW: 3.0})
    tune.measure(WORKLOAD, [TABLE, FAST, SLOW], runner)
    assert len(runner.orders) == tune.ROUNDS
    assert runner.orders[:2] == [(TABLE, FAST, SLOW), (SLOW, FAST, TABLE)]
    assert set(runner.orders[-1]) == {TABLE, FAST}


def test_the_table_s_own_stays_to_the_end_however_slow():
    runner = FakeRunner({TABLE: 2.0, FAST: 0.9, SLOW: 3.0})
    assert tune.measure(WORKLOAD, [TABLE, FAST, SLOW], runner).baseline_ms > 2.0
    assert set(runner.orders[-1]) == {TABLE, FAST}


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_nothing_half_measured_counts(steps):
    asked = itertools.count()
    ms = {TABLE: 1.0, FAST: 0.9, SLOW: 3.0}
    assert tune.measure(WORKLOAD, list(ms), FakeRunner(ms), lambda: next(asked) >= steps) is None


def test_the_time_limit_keeps_what_is_complete(cache, capsys):
    path = tuned.path_of(GPU)
    others = [tune.Workload("dq", torch.bfloat16, d, ()) for d in (64, 128)]
    to_try = {workload: [TABLE, FAST] for workload in (WORKLOAD, *others)}
    minutes = iter(range(10**6))
    about = {"versions": tuned.versions(), "date": "2026-11-22"}
    code = tune.run(
        to_try, FakeRunner({TABLE: 1.0, FAST: 0.9}), path, about, minutes=30, clock=lambda: 60.0 * next(minutes)
    )
    assert code == 0
    text = capsys.readouterr().out
    assert "30 minutes are over; --minutes gives more" in text
    assert f"1 of 3 measured, 1 faster configurations stored in {path}" in text
    assert [key.kernel for key in tuned.load(path).rows] == ["forward"]


def test_measuring_again_replaces_only_its_own_row():
    table = table_with(outcome_of({TABLE: 1.0, FAST: 0.5}))
    other = WORKLOAD._replace(kernel="dq")
    table = tune.with_outcome(table, tune.measure(other, [TABLE, SLOW], FakeRunner({TABLE: 1.0, SLOW: 0.5})))
    assert len(table.rows) == 2
    table = tune.with_outcome(table, outcome_of({TABLE: 1.0, FAST: 1.0}))
    assert [key.kernel for key in table.rows] == ["dq"]


# ---- Storing


def test_a_table_survives_the_file(cache):
    table = table_with(outcome_of({TABLE: 1.0, FAST: 0.5}))
    path = tuned.path_of(GPU)
    tuned.save(path, table)
    assert path.parent == cache and path.name.startswith("nvidia-h100-80gb-hbm3-triton-")
    assert tuned.load(path) == table
    (row,) = json.loads(path.read_text())["rows"]
    assert row["kernel"] == "forward" and row["dtype_bytes"] == 2 and row["head_dim"] == 64
    assert row["features"] == ["causal", "padding"] and row["config"]["block_n"] == 128
    assert row["ms"] < row["baseline_ms"]
    assert list(cache.iterdir()) == [path]


def problem_for(workload, device="sm_90"):
    return workload.problem(device)


def test_choose_takes_the_stored_row_for_its_problems_only(gpu, cache):
    table = configs.choose("forward", problem_for(WORKLOAD))
    stored = Config(table.block_m, table.block_n, 8, 7)
    tuned.save(
        tuned.path_of(GPU), table_with(tune.measure(WORKLOAD, [table, stored], FakeRunner({table: 1, stored: 0.5})))
    )
    assert tuned.choose("forward", problem_for(WORKLOAD)) == stored
    assert tuned.choose("forward", problem_for(WORKLOAD._replace(head_dim=50))) == stored  # padded to 64
    assert tuned.choose("forward", problem_for(WORKLOAD._replace(dtype=torch.float16))) == stored
    for other in (
        {"kernel": "dq"},
        {"head_dim": 128},
        {"dtype": torch.float32},
        {"features": ("causal",)},
        {"features": ("causal", "padding", "dropout")},
    ):
        workload = WORKLOAD._replace(**other)
        problem = problem_for(workload)
        assert tuned.choose(workload.kernel, problem) == configs.choose(workload.kernel, problem)
    # The row is not for an architecture that this machine does not have, and not for the interpreter.
    for device in ("sm_80", "cpu"):
        assert tuned.choose("forward", problem_for(WORKLOAD, device)) != stored
    elsewhere = dataclasses.replace(problem_for(WORKLOAD), device=torch.device("cuda", 7))
    assert tuned.choose("forward", elsewhere) != stored


def test_a_row_for_another_package_s_table_does_not_apply(gpu, cache):
    stored = Config(16, 16, 1, 1)
    outcome = tune.measure(WORKLOAD, [Config(16, 32, 1, 1), stored], FakeRunner({Config(16, 32, 1, 1): 1, stored: 0.5}))
    tuned.save(tuned.path_of(GPU), table_with(outcome))
    assert tuned.choose("forward", problem_for(WORKLOAD)) == configs.choose("forward", problem_for(WORKLOAD))


def test_the_file_is_read_once(gpu, cache, monkeypatch):
    tuned.save(tuned.path_of(GPU), table_with(outcome_of({TABLE: 1.0, FAST: 0.5})))
    reads = []
    load = tuned.load
    monkeypatch.setattr(tuned, "load", lambda path: reads.append(path) or load(path))
    for _ in range(3):
        tuned.choose("forward", problem_for(WORKLOAD))
    assert len(reads) == 1


def test_without_a_home_folder_nothing_is_stored(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert tuned._read_table.__wrapped__(GPU) is None
    with pytest.raises(RuntimeError, match=r"expected XDG_CACHE_HOME or a home folder, got neither"):
        tuned.path_of(GPU)


def spoil(text):
    """(name, contents, reason): files that cannot be used, made of the usable file `text`, with the expected reason."""
    about = json.loads(text)
    yield "cut off", text[: len(text) // 2], "is damaged"
    yield "not a table", "[]", "is damaged"
    yield "no rows", json.dumps({**about, "rows": None}), "is damaged"
    rows = [{**about["rows"][0], "config": {"tile": 3}}]
    yield "other fields", json.dumps({**about, "rows": rows}), "is damaged"
    rows = [{**about["rows"][0], "replaces": {**about["rows"][0]["replaces"], "warp_specialize": True}}]
    yield "fields of an earlier version", json.dumps({**about, "rows": rows}), "or other versions wrote its rows"
    versions = {**about["versions"], "fused_attn": "0.0.1"}
    yield "other version", json.dumps({**about, "versions": versions}), r"measured with fused_attn 0\.0\.1, 0\.1"


def test_a_file_of_no_use_is_ignored_with_a_warning(gpu, cache):
    path = tuned.path_of(GPU)
    tuned.save(path, table_with(outcome_of({TABLE: 1.0, FAST: 0.5})))
    problem = problem_for(WORKLOAD)
    for _, text, reason in list(spoil(path.read_text())):
        path.write_text(text)
        tuned._read_table.cache_clear()
        with pytest.warns(UserWarning, match=f"(?s){reason}.*`python -m fused_attn tune` measures this GPU anew"):
            assert tuned.choose("forward", problem) == configs.choose("forward", problem)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the warning is given once in a process
            tuned.choose("forward", problem)


def test_a_table_of_another_triton_is_ignored_with_a_warning(gpu, cache):
    path = tuned.path_of(GPU)
    tuned.save(path, table_with(outcome_of({TABLE: 1.0, FAST: 0.5})))
    path.rename(path.with_name("nvidia-h100-80gb-hbm3-triton-2.0.json"))
    problem = problem_for(WORKLOAD)
    with pytest.warns(UserWarning, match=r"triton-2\.0\.json is for another"):
        assert tuned.choose("forward", problem) == configs.choose("forward", problem)


# ---- The command


def test_dry_run_lists_without_a_gpu(no_gpu, capsys):
    assert main(["tune", "--dry-run", "--head-dim", "64", "--features", "padding+causal", "bias"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "forward bfloat16 head dim 64 causal+padding",
        "dq bfloat16 head dim 64 causal+padding",
        "dkdv bfloat16 head dim 64 causal+padding",
        "forward bfloat16 head dim 64 bias",
        "dq bfloat16 head dim 64 bias",
        "dkdv bfloat16 head dim 64 bias",
        "bias bfloat16 head dim 64 bias",
    ]
    assert all("block_m=" in line for line in lines[:-1])
    assert lines[-1].startswith("7 to measure, ")


def test_without_a_gpu_the_error_says_so(no_gpu, capsys):
    assert main(["tune"]) == 1
    assert "torch sees no GPU on this machine" in capsys.readouterr().err


EXPECTED_DEVICE = (
    "--device: expected a GPU of this machine, such as cuda:0, or with --dry-run an architecture, such as sm_90"
)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_dry_run_of_a_gpu_that_is_not_here_says_what_is_expected(no_gpu, capsys, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        main(["tune", "--dry-run", "--device", device])
    assert f"{EXPECTED_DEVICE}, got {device}" in capsys.readouterr().err


def test_an_old_gpu_is_refused_with_the_reason(no_gpu, capsys):
    assert main(["tune", "--dry-run", "--device", "sm_75"]) == 1
    assert "compute capability 7.5, expected 8.0 or higher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "backward"], "--kernel: expected some of forward, dq, dkdv, bias, got backward"),
        (["--dtype", "float64"], "--dtype: expected some of float32, float16, bfloat16, got float64"),
        (["--head-dim", "520"], "--head-dim: expected a number from 1 to 512 for .*, got 520"),
        (
            ["--head-dim", "512", "--dtype", "float32"],
            "--head-dim: expected a number from 1 to 256 for float32, got 512",
        ),
        (["--features", "causal+rotary"], "--features: expected some of plain, causal, .*, got causal.rotary"),
        (["--features", "causal+window"], "--features: causal and window do not occur together"),
        (["--kernel", "bias", "--features", "causal"], "--kernel, --features: .* bias or relative_bias"),
        (["--device", "gpu"], "device: expected .*, got 'gpu'"),
    ],
)
def test_wrong_options_are_named(no_gpu, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--dry-run", *options])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_gpu_has_to_be_one_of_this_machine(gpu, capsys):
    for device in ("cuda:1", "sm_90"):
        with pytest.raises(SystemExit):
            main(["tune", "--device", device])
        assert f"{EXPECTED_DEVICE}, got {device}" in capsys.readouterr().err


def test_clear_deletes_the_tables_of_this_gpu(gpu, cache, capsys):
    table = table_with(outcome_of({TABLE: 1.0, FAST: 0.5}))
    ours, old, other = (
        tuned.path_of(GPU),
        tuned.path_of(GPU).with_name("nvidia-h100-80gb-hbm3-triton-2.0.json"),
        tuned.path_of("NVIDIA A100"),
    )
    for path in (ours, old, other):
        tuned.save(path, table)
    assert main(["tune", "--clear"]) == 0
    assert list(cache.iterdir()) == [other]
    assert str(ours) in capsys.readouterr().out


def test_info_tells_where_tiles_come_from(gpu, cache, monkeypatch):
    from fused_attn import installation

    assert "the package's own" in installation._triton()["tiles of cuda:0"]
    tuned._read_table.cache_clear()
    tuned.save(tuned.path_of(GPU), table_with(outcome_of({TABLE: 1.0, FAST: 0.5})))
    assert "1 of the package's replaced by those tuned on 2026-11-22" in installation._triton()["tiles of cuda:0"]


# ---- The real inputs, in the interpreter


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tune, "BATCH", 2)
    monkeypatch.setattr(tune, "HEADS", 2)
    monkeypatch.setattr(tune, "LENGTH", 48)
    monkeypatch.setattr(tune, "WINDOW", 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter")
@pytest.mark.parametrize(
    ("kernel", "features"),
    [
        ("forward", ("causal", "padding")),
        ("forward", ("window", "mask", "dropout")),
        ("dq", ("padding", "softcap")),
        ("dkdv", ("varlen", "relative_bias")),
        ("bias", ("bias",)),
        ("bias", ("causal", "relative_bias")),
    ],
)
def test_a_configuration_runs_the_kernel_that_is_meant(small, monkeypatch, kernel, features):
    workload = tune.Workload(kernel, torch.float32, 16, features)
    inputs = tune._Inputs(workload, torch.device("cpu"))
    table = configs.choose(kernel, workload.problem("cpu"))
    other = table._replace(block_m=16, block_n=16)
    planned = []
    launch = launcher._launch
    monkeypatch.setattr(
        launcher, "_launch", lambda problem, *args, **kw: planned.append(args[0]) or launch(problem, *args, **kw)
    )
    for variant in inputs.variants:
        truth = inputs.call(table)(variant)
        planned.clear()
        found = inputs.call(other)(variant)
        assert other in planned and len(found) == {"forward": 2, "dq": 1, "dkdv": 2, "bias": 1}[kernel]
        assert tune._difference(found, truth, workload.dtype) is None
    assert len(inputs.variants) == (2 if "padding" in features else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_on_a_gpu(cache, capsys):
    assert main(["tune", "--kernel", "forward", "--head-dim", "64", "--features", "causal", "--minutes", "10"]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 measured" in text and "forward bfloat16 head dim 64 causal: block_m=" in text
    path = tuned.path_of(torch.cuda.get_device_name())
    assert tuned.load(path).about["device"] == torch.cuda.get_device_name()
    query = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    assert fused_attn.fused_attention(query, query, query, is_causal=True).isfinite().all()
