"""What every stage of the suite needs: a time limit, a log, and commands that run in processes of their own."""

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TextIO

# The suite never imports torch: a process that holds the GPU would disturb the measurements of the stages.
from benchmarks.conventions import ROOT
from tools.gpu_suite import reports

#: A stage is killed this long after its time is over.
GRACE_SECONDS = 30.0
#: A stage gets SIGINT, as from Ctrl-C, this long before it is killed, so that it can write its last results.
INTERRUPT_SECONDS = 10.0
#: The verdict of a stage whose time was over. Such a stage has not failed.
STOPPED = "stopped at its time limit"


class Skip(Exception):
    """A stage has nothing to do on this machine. The message says why."""


class Stage(NamedTuple):
    """
    name: what --only calls the stage
    run: does the work, and returns a verdict that begins with "ok", "skipped", "stopped" or "FAILED"
    share: the largest part of the remaining time that the stage may take
    needs: Python packages or programs that the stage cannot run without
    """

    name: str
    run: Callable[[Suite], str]
    share: float
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """The names in ``needs`` that are not installed, separated by commas."""
        return ", ".join(need for need in self.needs if not (importlib.util.find_spec(need) or shutil.which(need)))


class Suite:
    """One run of the suite. All times are those of `time.monotonic`.

    deadline: when the current stage should end by itself
    kill_at: when the current stage is killed
    fails_on_spills: whether the build fails if a CUDA kernel spills registers, whatever the version of nvcc
    is_cut_short: whether the last benchmark has printed that its time was up
    """

    def __init__(self, arguments: argparse.Namespace, log: TextIO) -> None:
        self.out, self.device, self.commit = arguments.out, arguments.device, arguments.commit
        self.minutes_asked = arguments.minutes
        self.fails_on_spills = arguments.fail_on_spills
        self.is_dry = self.device == "cpu"
        self.is_quick = arguments.quick or self.is_dry
        self.deadline = self.kill_at = float("inf")
        self.is_cut_short = False
        self._log = log
        self._end = float("inf") if arguments.minutes is None else time.monotonic() + 60.0 * arguments.minutes

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def begin(self, share: float) -> None:
        """Sets deadline and kill_at for the next stage, which gets this share of the remaining time at most.

        Even a stage with all of the remaining time has a deadline before the end, so that the suite can still stop it.
        """
        now, left = time.monotonic(), self.seconds_left
        self.deadline = now + min(share * left, max(0.6 * left, left - GRACE_SECONDS))
        self.kill_at = min(self.deadline + GRACE_SECONDS, self._end)

    @property
    def minutes(self) -> list[str]:
        """The option --minutes that tells a command the deadline; no option if the suite has no time limit."""
        left = self.deadline - time.monotonic()
        return [] if left == float("inf") else ["--minutes", f"{max(0.0, left) / 60.0:.3f}"]

    def say(self, text: str = "") -> None:
        """Prints a text, and appends it to log.txt."""
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def run(
        self, *command: str, environment: dict[str, str] | None = None, interrupt_at: float | None = None
    ) -> int | None:
        """Runs a command, whose output is printed and logged.

        Args:
            environment: variables beside those of this process.
            interrupt_at: when the command gets SIGINT. By default shortly before kill_at, because most commands know
                their deadline and stop by themselves. pytest does not, so its stages pass the deadline.

        Returns:
            The exit code, or None if the command was interrupted or killed.
        """
        if interrupt_at is None:
            interrupt_at = max(self.deadline, self.kill_at - INTERRUPT_SECONDS)
        self.say(f"$ {' '.join(command)}")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | (environment or {})
        if self.is_dry:
            variables["OMP_NUM_THREADS"] = "1"  # The commands of one stage share the cores.
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, preexec_fn=_accept_interrupts,
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
            # The whole process group is killed, because a command may have started other processes. Ctrl-C in the
            # suite itself comes here too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5.0)
        return code

    def run_all(self, commands: list[list[str]]) -> list[int | None]:
        """Runs all commands at the same time, and returns what `run` returns for each."""
        with ThreadPoolExecutor(len(commands)) as pool:
            return list(pool.map(lambda command: self.run(*command), commands))

    def python(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """The verdict of ``python ARGUMENTS``."""
        return verdict_of(self.run(sys.executable, *arguments, environment=environment))

    def benchmark(self, *arguments: str) -> str:
        """The verdict of ``python -m benchmarks ARGUMENTS``, which appends its rows to rows.jsonl."""
        command = ["-m", "benchmarks", *arguments, "--device", self.device, "--commit", self.commit]
        command += ["--out", str(self.out / "rows.jsonl"), *["--quick"] * self.is_quick]
        self.is_cut_short = False
        verdict = self.python(*command, *self.minutes)
        return f"ok, but {STOPPED}" if verdict == "ok" and self.is_cut_short else verdict

    @property
    def red(self) -> set[str]:
        """The backends whose tests have failed, in this run or in the run that --resume-from names."""
        return reports.red_backends(self.out)

    def _copy(self, stream: TextIO) -> None:
        """Prints and logs what a command writes. A benchmark whose time is up says so in a line of its own."""
        for line in stream:
            self.is_cut_short |= line.startswith("time is up")
            self.say(line.rstrip("\n"))


def _accept_interrupts() -> None:
    """Lets SIGINT end the process.

    A process that a shell starts in the background ignores SIGINT, and so do the processes that it starts itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen, until: float) -> int | None:
    """The exit code, or None if the process still runs at that time."""
    left = until - time.monotonic()
    try:
        return process.wait(None if left == float("inf") else max(0.0, left))
    except subprocess.TimeoutExpired:
        return None


def verdict_of(code: int | None) -> str:
    """The verdict on a command with this exit code. None: the command was stopped."""
    if code is None:
        return STOPPED
    return "ok" if code == 0 else f"FAILED, exit code {code}"
