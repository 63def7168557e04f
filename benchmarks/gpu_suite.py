"""Turns minutes of a GPU into evidence: ``python benchmarks/gpu_suite.py --out DIR [--minutes N]``.

Runs its stages in order of worth, each in processes of its own, stops cleanly at the time limit, and ends with a short
summary. Everything is written to DIR as it comes, and a run into the same DIR, or with ``--resume-from`` its copy, does
not measure again what has rows:

log.txt       all output            rows.jsonl    benchmark rows
*tests.xml    results of the tests  tuned-*.json  tile sizes that beat the table
summary.txt   the end of the output

What has failed a test gets no speed. A stage that runs out of time is no failure; the summary says which did.

``--only bench:causal tests`` runs some stages. ``--device cpu`` is a dry run: every stage, at sizes that a CPU can do.
Needs no network. README.md beside this file tells how to spread it over several short loans of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Nothing here imports torch: the GPU belongs to the stages.
from benchmarks import conventions, rows, summary  # noqa: E402
from benchmarks.cases import MASKS  # noqa: E402

#: A stage with less time than this is not begun.
LEAST_SECONDS = 5.0
#: A stage is killed this long after its time is over.
GRACE_SECONDS = 30.0
#: It is interrupted, as by Ctrl-C, this long before it is killed, so that it can write what it knows.
INTERRUPT_SECONDS = 10.0
MAX_RESTARTS = 5
#: Verdicts of stages that end because the time is over. They are no failures.
STOPPED, NOT_RUN = "stopped at its time limit", "not run: the time is up"
#: The reports of pytest, one for each stage that runs tests.
REPORTS = ("cuda-tests.xml", "tests.xml", "kernel-tests.xml")
BACKENDS = set(conventions.OUR_BACKENDS.values())
#: More workers would only wait for the one GPU and its memory.
MOST_TEST_WORKERS = 8


class Outcome(NamedTuple):
    stage: str
    verdict: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage:28} {self.verdict:44} {self.seconds:6.0f} s"


class Skip(Exception):
    """A stage has nothing to do here. The message says why."""


class Stage(NamedTuple):
    """run returns a verdict that begins with "ok" or says what went wrong.

    share: the most that it takes of the time that is left
    needs: Python packages or programs without which it cannot run
    """

    name: str
    run: Callable[[Suite], str]
    share: float
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """The needs that are not installed, as a text; empty if all are."""
        return ", ".join(need for need in self.needs if not (importlib.util.find_spec(need) or shutil.which(need)))


class Suite:
    """deadline: when the stage at hand is to stop by itself; kill_at: when it is stopped."""

    def __init__(self, arguments: argparse.Namespace, log: TextIO) -> None:
        self.out, self.device, self.is_quick = arguments.out, arguments.device, arguments.quick
        self.commit = arguments.commit
        self.deadline = self.kill_at = float("inf")
        self.is_cut_short = False  # whether the running command has said that its time was up
        self._log = log
        self.minutes_asked = arguments.minutes
        self._end = float("inf") if arguments.minutes is None else time.monotonic() + 60.0 * arguments.minutes

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def begin(self, share: float) -> None:
        """Gives the next stage its time. It stops early enough for the suite to keep its own limit."""
        now, left = time.monotonic(), self.seconds_left
        self.deadline = now + min(share * left, max(0.6 * left, left - GRACE_SECONDS))
        self.kill_at = min(self.deadline + GRACE_SECONDS, self._end)

    @property
    def minutes(self) -> list[str]:
        """The option that tells a command when to stop; empty if the suite has no limit."""
        left = self.deadline - time.monotonic()
        return [] if left == float("inf") else ["--minutes", f"{max(0.0, left) / 60.0:.3f}"]

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def run(
        self, *command: str, environment: dict[str, str] | None = None, interrupt_at: float | None = None
    ) -> int | None:
        """Exit code of a command whose output is shown and logged; None if it was stopped at the stage's limit.

        interrupt_at: when a command that knows of no limit is to stop; default: shortly before it is killed.
        """
        if interrupt_at is None:
            interrupt_at = max(self.deadline, self.kill_at - INTERRUPT_SECONDS)
        self.say(f"$ {' '.join(command)}")
        variables = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()} | (environment or {})
        if self.is_dry:
            variables["OMP_NUM_THREADS"] = "1"  # more threads would wait for each other
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, preexec_fn=_hear_interrupts,
        )  # fmt: skip
        reader = threading.Thread(target=self._copy, args=(process.stdout,), daemon=True)
        reader.start()
        code = None
        try:
            code = _wait(process, interrupt_at)
            if code is None:
                process.send_signal(signal.SIGINT)
                _wait(process, self.kill_at)
        finally:
            # Its whole process group is killed, also when the user interrupts.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5.0)
        return code

    def run_all(self, commands: list[list[str]]) -> list[int | None]:
        """Exit codes of commands that run at the same time."""
        with ThreadPoolExecutor(len(commands)) as pool:
            return list(pool.map(lambda command: self.run(*command), commands))

    def python(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        return verdict_of(self.run(sys.executable, *arguments, environment=environment))

    def benchmark(self, *arguments: str) -> str:
        """A command of ``python -m benchmarks`` that appends to the suite's rows."""
        command = [sys.executable, "-m", "benchmarks", *arguments, "--device", self.device, "--commit", self.commit]
        command += ["--out", str(self.out / "rows.jsonl")]
        if self.is_quick or self.is_dry:
            command.append("--quick")
        self.is_cut_short = False
        verdict = verdict_of(self.run(*command, *self.minutes))
        return f"ok, but {STOPPED}" if verdict == "ok" and self.is_cut_short else verdict

    @property
    def red(self) -> set[str]:
        """Our backends that have failed tests, in this run or in the one that it continues."""
        found = set()
        for name in REPORTS:
            for case in _failed_cases(self.out / name):
                folder = (case.get("classname") or "").removeprefix("tests.").partition(".")[0]
                found |= {folder} & BACKENDS or BACKENDS
        return found

    def _copy(self, stream: TextIO) -> None:
        for line in stream:
            self.is_cut_short |= line.startswith("time is up")
            self.say(line.rstrip("\n"))


def _hear_interrupts() -> None:
    """A process in a shell's background ignores SIGINT, and so do its children, unless they are told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen, until: float) -> int | None:
    """The exit code; None if the process has not ended by then."""
    left = until - time.monotonic()
    try:
        return process.wait(None if left == float("inf") else max(0.0, left))
    except subprocess.TimeoutExpired:
        return None


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def verdict_of(code: int | None) -> str:
    if code is None:
        return STOPPED
    return "ok" if code == 0 else f"FAILED, exit code {code}"


# ---- Stages


def environment(suite: Suite) -> str:
    for tool in (("nvidia-smi",), ("nvcc", "--version")):
        if shutil.which(tool[0]):
            suite.run(*tool)
        else:
            suite.say(f"{tool[0]}: not on the PATH")
    return suite.python("-m", "fused_attn", "info")


def build(suite: Suite) -> str:
    if suite.is_dry and suite.python("-c", "from fused_attn import _C; print(_C.build_info())") == "ok":
        return "ok: already built"
    # CMake installs into the tree, which the stages import from. pip would need build packages, which may be missing
    # or too old, and there may be no network.
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    folder = str(ROOT / "build" / f"suite-{sys.implementation.cache_tag}")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        [*cmake, "-S", str(ROOT), "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}"],
        [*cmake, "--build", folder, "--parallel"],
        [*cmake, "--install", folder, "--prefix", str(ROOT / "fused_attn")],
    ):
        verdict = verdict_of(suite.run(*command))
        if verdict != "ok":
            return verdict
    return suite.python("-c", "from fused_attn import _C; print(_C.build_info())")


def check(suite: Suite) -> str:
    """Checks the numbers of every backend, and ours in every case of the table at one length.

    All checks run at the same time, because most of the time goes into compiling Triton kernels, each on one core.
    Later stages find these kernels in Triton's cache.
    """
    commands = {"self-check": [sys.executable, "-m", "fused_attn", "check"]}
    masks = list(MASKS)
    workers = max(1, min(len(masks), (os.cpu_count() or 1) - 1))
    for number in range(workers):
        own = masks[number::workers]
        command = [sys.executable, "-m", "benchmarks", "attention", "--device", suite.device, "--check-only", *FIRST]
        command += ["--only", *own, "--rivals", conventions.OURS, *conventions.OUR_BACKENDS]
        command += ["--quick", "--lengths", "64"] if suite.is_dry else ["--lengths", "2048"]
        commands[" ".join(own)] = command + suite.minutes
    codes = dict(zip(commands, suite.run_all(list(commands.values())), strict=True))
    failed = [f"{name}: {verdict_of(code)}" for name, code in codes.items() if code != 0]
    return "; ".join(failed) or "ok"


def cuda_tests(suite: Suite) -> str:
    """The CUDA kernels on the GPU, case by case, before anything else is asked of them."""
    return _tests(suite, suite.out / "cuda-tests.xml", *_gpu_test_files("tests/cuda"), "-m", "gpu")


def gpu_tests(suite: Suite) -> str:
    """All other tests that need a GPU."""
    files = sorted(set(_gpu_test_files("tests")) - set(_gpu_test_files("tests/cuda")))
    return _tests(suite, suite.out / "tests.xml", *files, "-m", "gpu")


def _gpu_test_files(folder: str) -> list[str]:
    """Only the files that have tests for a GPU: collecting all files takes long."""
    return [str(path) for path in sorted((ROOT / folder).glob("**/test_*.py")) if "mark.gpu" in path.read_text()]


def kernel_tests(suite: Suite) -> str:
    """The other tests of the Triton kernels, which look at what this Triton compiles for each architecture."""
    # A dry run only collects them: in the interpreter they take minutes, and the ordinary tests run them.
    dry = ("--collect-only",) if suite.is_dry else ()
    return _tests(suite, suite.out / "kernel-tests.xml", "tests/triton", "-m", "not gpu", *dry)


def _tests(suite: Suite, report: Path, *arguments: str) -> str:
    """Runs pytest. When the time is up it is interrupted, so that it still reports what it has found."""
    command = ["-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling, which uses one core for each test.
        command += ["-n", "1" if suite.is_dry else str(min(MOST_TEST_WORKERS, os.cpu_count() or 1))]
    report.unlink(missing_ok=True)  # an earlier run's report says nothing about this run
    code = suite.run(sys.executable, *command, f"--junitxml={report}", *arguments, interrupt_at=suite.deadline)
    if code == 5:
        return "skipped: no such tests"
    return _verdict_of_tests(code, report) if report.exists() else verdict_of(code)


def _verdict_of_tests(code: int | None, report: Path) -> str:
    root = _report_of(report)
    if root is None:
        return f"{verdict_of(code)}: its report is cut off"
    tests, failed, errors, skipped = (
        sum(int(one.get(name, 0)) for one in root.iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    )
    passed = tests - failed - errors - skipped
    counts = f"{passed} passed, {failed} failed, {errors} errors, {skipped} skipped"
    if failed or errors:
        return f"FAILED: {counts}"
    if code == 0 and not passed:
        reasons = Counter(one.get("message") for one in root.iter("skipped"))
        return f"skipped: all {skipped} tests: {', '.join(str(reason) for reason, _ in reasons.most_common(1))}"
    return f"{verdict_of(code)}: {counts}"


def _report_of(path: Path) -> ElementTree.Element | None:
    """None if pytest was killed before it had written its report."""
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError:
        return None


def _failed_cases(report: Path) -> list[ElementTree.Element]:
    root = _report_of(report) if report.exists() else None
    cases = [] if root is None else root.iter("testcase")
    return [case for case in cases if case.find("failure") is not None or case.find("error") is not None]


def _failures(report: Path) -> list[str]:
    if report.exists() and _report_of(report) is None:
        return [f"{report.name} is cut off"]
    lines = []
    for case in _failed_cases(report):
        for found in (*case.findall("failure"), *case.findall("error")):
            message = " ".join((found.get("message") or "").split())[:160]
            lines.append(f"{case.get('classname')}::{case.get('name')}: {message}")
    return lines


def sanitizer(suite: Suite) -> str:
    tool = shutil.which("compute-sanitizer")
    # Without torch's cache every tensor has an allocation of its own, so that an access beyond its end is seen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        sys.executable, "-m", "benchmarks", "attention", "--device", suite.device, "--check-only", "--quick",
        "--rivals", conventions.OURS, *conventions.OUR_BACKENDS, "--tokens", "300", "--lengths", "150",
        "--head-dim", "64", "--directions", "forward+backward",
    ]  # fmt: skip
    if tool is None and not suite.is_dry:
        raise Skip("compute-sanitizer is not on the PATH")
    checker = [] if tool is None else [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    return verdict_of(suite.run(*checker, *command, environment=variables))


def bench(*options: str, dry: tuple[str, ...] = ()) -> Callable[[Suite], str]:
    """dry: further options of a dry run."""

    def run(suite: Suite) -> str:
        own = (*options, *dry, "--seconds", "0.02") if suite.is_dry else options
        own = (*own, "--refuse", *sorted(suite.red)) if suite.red else own
        for _ in range(MAX_RESTARTS):
            verdict = suite.benchmark("attention", *own, "--resume")
            if verdict != verdict_of(conventions.DEVICE_LOST) or time.monotonic() > suite.deadline:
                break
            suite.say("the device was lost: the cases that are left run in a new process")
        return verdict

    return run


def modules(*options: str) -> Callable[[Suite], str]:
    def run(suite: Suite) -> str:
        if suite.red:  # a module may call any kernel
            return f"FAILED: no speed while tests are red ({', '.join(sorted(suite.red))})"
        return suite.benchmark("modules", *options, "--resume")

    return run


def memory(suite: Suite) -> str:
    dry = ("--only", "none", "--directions", "forward") if suite.is_dry else ()
    return suite.benchmark("memory", "--resume", *dry)


def tune(suite: Suite) -> str:
    """Compares tile sizes of the Triton kernels."""
    if suite.is_dry:
        return suite.python("-m", "fused_attn", "tune", "--dry-run", "--device", "sm_90")
    if "triton" in suite.red:
        return "FAILED: no tile is tuned while tests of the Triton kernels are red"
    # Results go to a cache folder of their own, so that they are returned with the others and change no later run.
    folder = suite.out / "cache"
    verdict = suite.python("-m", "fused_attn", "tune", *suite.minutes, environment={"XDG_CACHE_HOME": str(folder)})
    for found in (folder / "fused_attn").glob("*.json"):
        shutil.copy(found, suite.out / f"tuned-{found.name}")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


#: The part of the table that is measured first, for every mask.
FIRST = ("--dtype", "bfloat16", "--head-dim", "128", "64", "--seconds", "0.5")
#: FlexAttention compiles for every shape, which takes a quarter of a minute. It is asked at one length.
FLEX = ("--rivals", conventions.OURS, "flex", "--dtype", "bfloat16", "--head-dim", "128", "--lengths", "8192")
DRY_FLEX = ("--lengths", "64", "--only", "causal", "--directions", "forward")

TESTS_NEED = ("pytest", "hypothesis", "numpy")

STAGES = (
    Stage("environment", environment, 0.2),
    Stage("build", build, 0.5, ("cmake", "pybind11")),
    Stage("cuda-tests", cuda_tests, 0.5, TESTS_NEED),
    Stage("check", check, 0.4),
    Stage("tests", gpu_tests, 0.5, TESTS_NEED),
    Stage("sanitizer", sanitizer, 0.3),
    *(Stage(f"bench:{mask}", bench("--only", mask, *FIRST, "--no-compile"), 0.2) for mask in MASKS),
    Stage("modules", modules("--no-compile"), 0.3),
    Stage("memory", memory, 0.3),
    Stage("tune", tune, 0.5, ("triton",)),
    Stage("bench:flex", bench(*FLEX, dry=DRY_FLEX), 0.4, ("triton",)),
    Stage("modules:compiled", modules(), 0.5, ("triton",)),
    Stage("kernel-tests", kernel_tests, 0.3, (*TESTS_NEED, "triton")),
    Stage("bench:rest", bench("--no-compile", dry=("--only", "causal")), 1.0),
)


def selected(only: list[str] | None) -> list[Stage]:
    """Stages by name; "bench" is all of bench:*."""
    if only is None:
        return list(STAGES)
    names = [stage.name for stage in STAGES]
    for name in only:
        if name != "bench" and name not in names:
            raise ValueError(f"--only: expected some of bench, {', '.join(names)}, got {name}")
    return [stage for stage in STAGES if stage.name in only or ("bench" in only and stage.name.startswith("bench:"))]


def run_stages(suite: Suite, stages: list[Stage]) -> list[Outcome]:
    outcomes = []
    for stage in stages:
        if stage.missing:
            suite.say(f"{stage.name} will not run: it needs {stage.missing}")
    for number, stage in enumerate(stages, 1):
        if stage.missing:
            outcomes.append(Outcome(stage.name, f"FAILED: it needs {stage.missing}", 0.0))
            continue
        if suite.seconds_left < LEAST_SECONDS:
            outcomes.append(Outcome(stage.name, NOT_RUN, 0.0))
            continue
        suite.begin(stage.share if number < len(stages) else 1.0)
        start = time.monotonic()
        suite.say(f"\n==== {stage.name}, {suite.deadline - start:.0f} s of {suite.seconds_left:.0f} s")
        try:
            verdict = stage.run(suite)
        except Skip as why:
            verdict = f"skipped: {why}"
        except Exception as error:  # a mistake in one stage must not stop the others
            verdict = f"FAILED: {type(error).__name__}: {error}"
        outcomes.append(Outcome(stage.name, verdict, time.monotonic() - start))
        suite.say(f"==== {outcomes[-1]}")
    return outcomes


def summarise(suite: Suite, outcomes: list[Outcome]) -> list[str]:
    """The results, with the most important at the end: often only the end of an output is kept."""
    path = suite.out / "rows.jsonl"
    found = rows.newest(rows.read(path)) if path.exists() else []
    sections = {
        "attention by length: effective TFLOP/s, fastest other, our lead (* solves another problem); part of matmul or "
        "copy rate": summary.attention_lines(found)[::-1],
        "memory beyond inputs and results": summary.memory_lines(found),
        "modules": summary.module_lines(found),
        "problems": summary.problem_lines(found),
        "failed tests": _failed_tests(suite),
        "measured on": _device_lines(found),
        "stages": list(map(str, outcomes)),
        "time limit": _limit_lines(suite, outcomes),
    }
    lines = ["", "==== summary"]
    for title, made in sections.items():
        lines += [f"-- {title}", *made] if made else []
    names = sorted(one.name for one in suite.out.iterdir() if one.is_file())
    return [*lines, f"written: {', '.join(names)} in {suite.out}"]


def _limit_lines(suite: Suite, outcomes: list[Outcome]) -> list[str]:
    cut = [outcome.stage for outcome in outcomes if STOPPED in outcome.verdict or outcome.verdict == NOT_RUN]
    return [f"{suite.minutes_asked:g} minutes were asked for, too few for all of: {', '.join(cut)}"] if cut else []


def _failed_tests(suite: Suite) -> list[str]:
    lines = []
    for report in (suite.out / name for name in REPORTS):
        failures = _failures(report)
        lines += failures[:12] + ([f"... {len(failures) - 12} more in {report.name}"] if len(failures) > 12 else [])
    return lines


def _device_lines(found: list[rows.Row]) -> list[str]:
    if not found:
        return []
    newest = max(found, key=lambda row: row["date"])
    about = ("device", "driver", "cuda", "torch", "triton", "python", "commit", "date")
    peaks = {row["dtype"]: row["matmul_tflops"] for row in found if "matmul_tflops" in row}
    return [
        ", ".join(f"{name} {newest[name]}" for name in about if name in newest),
        *(f"{dtype} matmul {peak:.3g} TFLOP/s" for dtype, peak in peaks.items()),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, help="for everything; default: no limit")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"bench, {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--device", default="cuda", help="cpu: dry run")
    parser.add_argument("--quick", action="store_true", help="fewer sizes in the benchmarks")
    parser.add_argument("--resume-from", type=Path, metavar="DIR", help="of an earlier run: leave out what it measured")
    parser.add_argument("--commit", help="what rows say where the tree has no history")
    arguments = parser.parse_args(argv)
    try:
        stages = selected(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if arguments.resume_from is not None and not (arguments.resume_from / "rows.jsonl").exists():
        parser.error(f"--resume-from: expected a folder with rows.jsonl, got {arguments.resume_from}")
    arguments.commit = arguments.commit or conventions.commit()  # while DIR has not changed the tree
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.resume_from is not None:
        for name in ("rows.jsonl", *REPORTS):
            if (arguments.resume_from / name).exists() and not (arguments.out / name).exists():
                shutil.copyfile(arguments.resume_from / name, arguments.out / name)
    # CUDA's compiler and tools are found even if the PATH does not have them.
    os.environ["PATH"] += os.pathsep + str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    with (arguments.out / "log.txt").open("a") as log:
        suite = Suite(arguments, log)
        outcomes = run_stages(suite, stages)
        lines = summarise(suite, outcomes)
        suite.say("\n".join(lines))
    (arguments.out / "summary.txt").write_text("\n".join(lines) + "\n")
    return 1 if any("FAILED" in outcome.verdict for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
