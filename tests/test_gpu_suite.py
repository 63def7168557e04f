"""tools/gpu_suite on a CPU: its time limit, the verdicts on stages, the commands that stages run, and the summary."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention, cases, rows  # noqa: E402
from tools.gpu_suite import __main__ as gpu_suite  # noqa: E402
from tools.gpu_suite import reports, stages  # noqa: E402
from tools.gpu_suite.suite import Skip, Stage, Suite, verdict_of  # noqa: E402


def suite(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    code = gpu_suite.main(["--device", "cpu", "--commit", "abc", "--out", str(tmp_path / "out"), *arguments])
    return code, (tmp_path / "out" / "summary.txt").read_text()


def settings(out: Path, **changes: object) -> argparse.Namespace:
    """What the command line gives to a `Suite`."""
    options = {"device": "cpu", "quick": False, "commit": "abc", "minutes": None, "fail_on_spills": False}
    return argparse.Namespace(out=out, **(options | changes))


@pytest.mark.timing
def test_dry_run_of_a_stage_writes_rows_and_a_summary(tmp_path: Path) -> None:
    code, text = suite(tmp_path, "--minutes", "10", "--only", "bench:decode")
    assert code == 0
    assert "bench:decode                 ok" in text
    assert "decode bf16 D128 fwd | 64: " in text
    assert rows.read(tmp_path / "out" / "rows.jsonl")[0]["commit"] == "abc"


def test_the_suite_keeps_its_time_limit_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = "import signal, time; signal.signal(2, signal.SIG_IGN); print('began', flush=True); time.sleep(60)"
    made = (
        Stage("broken", lambda suite: 1 / 0, 1.0),
        Stage("absent", lambda suite: (_ for _ in ()).throw(Skip("no tool")), 1.0),
        Stage("fails", lambda suite: suite.python("-c", "raise SystemExit(3)"), 1.0),
        Stage("long", lambda suite: suite.python("-c", sleep), 1.0),
        Stage("never", lambda suite: "ok", 1.0),
    )
    monkeypatch.setattr(gpu_suite, "STAGES", made)
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.5)
    code, text = suite(tmp_path, "--minutes", "0.1")
    assert code == 1
    outcomes = text.splitlines()[text.splitlines().index("-- stages") + 1 :]
    verdicts = [line.split(maxsplit=1)[1].rsplit(maxsplit=2)[0].strip() for line in outcomes[:5]]
    assert verdicts == [
        "FAILED: ZeroDivisionError: division by zero",
        "skipped: no tool",
        "FAILED, exit code 3",
        "stopped at its time limit",
        "not run: the time is up",
    ]
    assert "began" in (tmp_path / "out" / "log.txt").read_text()


def test_a_time_limit_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages without enough time do not fail the suite. The summary names them."""
    cut = "print('time is up: 3 of 7 cases not run')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    made = (
        Stage("quick", lambda suite: suite.python("-c", ""), 1.0),
        Stage("cut", lambda suite: suite.benchmark(), 1.0),
        Stage("long", lambda suite: suite.python("-c", deaf), 1.0),
        Stage("never", lambda suite: "ok", 1.0),
    )
    run = Suite.run
    monkeypatch.setattr(
        Suite,
        "run",
        lambda self, *command, **options: run(
            self, *((sys.executable, "-c", cut) if "benchmarks" in command else command), **options
        ),
    )
    monkeypatch.setattr(gpu_suite, "STAGES", made)
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.5)
    code, text = suite(tmp_path, "--minutes", "0.1")
    assert code == 0
    assert "0.1 minutes were asked for, too few for all of: cut, long, never" in text
    assert "\ncut                          ok, but stopped at its time limit" in text


def test_what_a_stage_lacks_is_said_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = (
        Stage("first", lambda suite: suite.say("first runs") or "ok", 1.0, ("torch",)),
        Stage("second", lambda suite: suite.say("second runs") or "ok", 1.0, ("torch", "no_such_package")),
    )
    monkeypatch.setattr(gpu_suite, "STAGES", made)
    code, text = suite(tmp_path)
    assert code == 1 and "second                       FAILED: it needs no_such_package" in text
    said = capsys.readouterr().out
    assert said.index("second will not run: it needs no_such_package") < said.index("first runs")
    assert "second runs" not in said and "first will not" not in said


def report_of_tests(path: Path, *cases: str, skipped: int = 0) -> None:
    """Writes a report as pytest does.

    Args:
        cases: tests as "folder.file::outcome" with the outcomes ok, failure and error.
        skipped: the number of skipped tests besides.
    """
    lines = ['<testcase classname="tests.x" name="t"><skipped message="no GPU"/></testcase>'] * skipped
    for case in cases:
        name, outcome = case.split("::")
        found = "" if outcome == "ok" else f'<{outcome} message="why"/>'
        lines.append(f'<testcase classname="tests.{name}" name="t">{found}</testcase>')
    counts = {f"{kind}s": sum(case.endswith(kind) for case in cases) for kind in ("failure", "error")}
    counts |= {"tests": len(lines), "skipped": skipped}
    attributes = " ".join(f'{name}="{count}"' for name, count in counts.items())
    path.write_text(f"<testsuites><testsuite {attributes}>{''.join(lines)}</testsuite></testsuites>")


def test_skipped_tests_are_not_ok(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report_of_tests(report, skipped=91)
    assert reports.verdict(report, verdict_of(0)) == "skipped: all 91 tests: no GPU"
    report_of_tests(report, "cuda.a::ok", skipped=2)
    assert reports.verdict(report, verdict_of(0)) == "ok: 1 passed, 0 failed, 0 errors, 2 skipped"
    report_of_tests(report, "cuda.a::ok", "cuda.a::failure", "cuda.b::error")
    assert reports.verdict(report, verdict_of(1)) == "FAILED: 1 passed, 1 failed, 1 errors, 0 skipped"
    # A test that failed before the time was up has failed.
    assert reports.verdict(report, verdict_of(None)).startswith("FAILED")
    report_of_tests(report, "cuda.a::ok")
    assert reports.verdict(report, verdict_of(None)).startswith("stopped at its time limit: 1 passed")


@pytest.mark.parametrize(
    ("file", "case", "red"),
    [
        ("cuda-tests.xml", "cuda.test_cuda_gpu::failure", ["cuda"]),
        ("tests.xml", "triton.test_kernels::error", ["triton"]),
        ("tests.xml", "nn.test_attention::failure", ["cuda", "triton"]),
        ("tests.xml", "triton.test_kernels::ok", []),
    ],
)
def test_what_is_red_gets_no_speed(
    file: str, case: str, red: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setattr(Suite, "run", lambda self, *command, **options: commands.append(command) or 0)
    arguments = settings(tmp_path, device="cuda")
    report_of_tests(tmp_path / file, "cuda.a::ok", case)
    with (tmp_path / "log.txt").open("w") as log:
        found = Suite(arguments, log)
        assert stages.bench("--only", "causal")(found) == "ok"
        modules_verdict, tune_verdict = stages.modules()(found), stages.tune(found)
    options = " ".join(commands[0])
    assert f"--refuse {' '.join(red)} --" in options if red else "--refuse" not in options
    assert modules_verdict.startswith("FAILED") == bool(red)
    assert tune_verdict.startswith("FAILED") == ("triton" in red)


def stage_of(tmp_path: Path, script: str, limit: float) -> tuple[int | None, Suite]:
    """Runs a script in a stage that is interrupted after `limit` seconds and killed three seconds later."""
    arguments = settings(tmp_path)
    with (tmp_path / "log.txt").open("w") as log:
        found = Suite(arguments, log)
        found.deadline = time.monotonic() + limit
        found.kill_at = found.deadline + 3.0
        return found.run(sys.executable, "-c", script, interrupt_at=found.deadline), found


def test_a_stage_is_interrupted_before_it_is_killed(tmp_path: Path) -> None:
    """pytest needs the interrupt to write its report."""
    script = (
        "import time\nprint('began', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('last words', flush=True)"
    )
    start = time.monotonic()
    code, _ = stage_of(tmp_path, script, 2.0)
    assert code is None and time.monotonic() - start < 5.0
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == ["began", "last words"]
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    code, _ = stage_of(tmp_path, deaf, 0.5)
    assert code is None and time.monotonic() - start < 12.0


def test_commands_of_a_stage_run_at_the_same_time(tmp_path: Path) -> None:
    arguments = settings(tmp_path, minutes=1.0)
    # Each command waits for the file of the other one.
    script = (
        "import pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:])\nown.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    with (tmp_path / "log.txt").open("w") as log:
        found = Suite(arguments, log)
        found.begin(1.0)
        paths = [str(tmp_path / "a"), str(tmp_path / "b")]
        commands = [[sys.executable, "-c", script, *paths], [sys.executable, "-c", script, *paths[::-1]]]
        assert found.run_all([*commands, [sys.executable, "-c", "raise SystemExit(3)"]]) == [0, 0, 3]


def test_a_report_that_is_cut_off_or_old_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="3" failures="1"><testcase name="a')
    assert reports.verdict(report, verdict_of(0)) == "ok: its report is cut off"
    assert reports.failures_of(report) == ["tests.xml is cut off"]
    monkeypatch.setattr(
        Suite, "run", lambda self, *command, **options: None
    )  # pytest was killed before it wrote a report.
    arguments = settings(tmp_path)
    with (tmp_path / "log.txt").open("w") as log:
        assert stages.gpu_tests(Suite(arguments, log)) == "stopped at its time limit"
    assert not report.exists()


@pytest.mark.parametrize(("option", "value"), [([], "OFF"), (["--fail-on-spills"], "ON")])
def test_spills_can_fail_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], value: str
) -> None:
    commands = []
    monkeypatch.setattr(Suite, "run", lambda self, *command, **options: commands.append(command) or 0)
    gpu_suite.main(["--out", str(tmp_path), "--only", "build", *option])
    assert f"-DFUSED_ATTN_FAIL_ON_SPILLS={value}" in commands[0]
    assert "-DFUSED_ATTN_CUDA_ARCHITECTURES=all" in commands[0]


def test_files_with_gpu_tests_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(Suite, "run", lambda self, *command, **options: commands.append(command) or 5)
    arguments = settings(tmp_path)
    with (tmp_path / "log.txt").open("w") as log:
        assert stages.gpu_tests(Suite(arguments, log)) == "skipped: no such tests"
    files = {Path(word).name for word in commands[0] if word.endswith(".py")}
    assert {"test_gpu.py", "test_kernels.py", "test_tune.py"} <= files and "test_errors.py" not in files
    assert "test_cuda_gpu.py" not in files
    with (tmp_path / "log.txt").open("w") as log:
        stages.cuda_tests(Suite(arguments, log))
    files = {Path(word).name for word in commands[1] if word.endswith(".py")}
    assert files == {"test_cuda_gpu.py", "test_fragments.py", "test_use_on_gpu.py", "test_wrong_offsets.py"}


def test_a_run_goes_on_from_the_rows_of_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one implementation at one length, to be quick."""
    options = (
        "--only",
        "decode",
        "--rivals",
        stages.OURS,
        "--dtype",
        "bfloat16",
        "--head-dim",
        "128",
        "--lengths",
        "64",
    )
    small = stages.bench(*options)
    monkeypatch.setattr(gpu_suite, "STAGES", (Stage("bench:decode", small, 1.0),))
    code, _ = suite(tmp_path, "--minutes", "2")
    assert code == 0
    first = tmp_path / "first"
    (tmp_path / "out").rename(first)
    code, text = suite(tmp_path, "--minutes", "2", "--resume-from", str(first))
    assert code == 0 and "decode bf16 D128 fwd | 64: " in text
    assert rows.read(tmp_path / "out" / "rows.jsonl") == rows.read(first / "rows.jsonl")  # Nothing was measured again.


def test_the_case_of_compute_sanitizer_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(Suite, "run", lambda self, *command, **options: commands.append(command) or 0)
    arguments = settings(tmp_path)
    with (tmp_path / "log.txt").open("w") as log:
        assert stages.sanitizer(Suite(arguments, log)) == "ok"
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    asked = parser.parse_args(commands[0][commands[0].index("attention") + 1 :])
    asked.device = "cuda"  # By default, the batches for a GPU are large.
    table = list(cases.table(attention.scale_of(asked), asked.only or cases.MASKS, asked.directions))
    assert len({case.mask for case in table}) > 8
    assert max(case.batch * case.heads * case.length**2 for case in table) < 2**22


@pytest.mark.parametrize("option", [("--minutes", "-1"), ("--minutes", "nan"), ("--device", "tpu")])
def test_options_are_checked(option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), *option])
    assert f"argument {option[0]}: " in capsys.readouterr().err


def test_a_stage_that_does_not_exist_is_an_error_that_lists_them(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", "unused", "--only", "bench:everything"])
    error = capsys.readouterr().err
    assert "--only: invalid choice: 'bench:everything'" in error
    assert error.index("bench") < error.index("environment") < error.index("build")
    assert [stage.name for stage in gpu_suite.selected(["bench", "tests"])][:2] == ["tests", "bench:causal"]
