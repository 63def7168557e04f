"""Build, tests and benchmarks on a GPU with one command: ``python -m tools.gpu_suite --out DIR [--minutes N]``.

The stages run in order of usefulness, each in processes of its own, until the time limit. The output ends with a short
summary. DIR gets these files:

log.txt       all output            rows.jsonl    benchmark rows
*tests.xml    results of the tests  tuned-*.json  tile sizes that beat the table
summary.txt   the end of the output

A second run into the same DIR does not measure again what has rows. Neither does a run with ``--resume-from DIR``.
A kernel whose tests fail is not measured.

``--only bench:causal tests`` runs some stages. ``--device cpu`` is a dry run of every stage, at sizes for a CPU. The
suite needs no network. README.md beside this file describes the stages, and how to use several short loans of a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from benchmarks import conventions
from benchmarks.session import duration
from tools.gpu_suite import summary
from tools.gpu_suite.reports import REPORTS
from tools.gpu_suite.stages import STAGES
from tools.gpu_suite.suite import Skip, Stage, Suite
from tools.gpu_suite.summary import NOT_RUN, Outcome

#: A stage that would have less time than this does not run.
LEAST_SECONDS = 5.0


def selected(only: list[str] | None) -> list[Stage]:
    """The stages with these names, in the order of the suite. "bench" stands for every stage bench:*."""
    return [
        stage
        for stage in STAGES
        if only is None or stage.name in only or ("bench" in only and stage.name.startswith("bench:"))
    ]


def run_stages(suite: Suite, stages: list[Stage]) -> list[Outcome]:
    """Runs the stages one after another, and returns what became of each of them.

    A stage gets its share of the time that is left. The last stage gets all of it. A stage that fails does not stop the
    others.
    """
    outcomes = []
    for stage in stages:
        if stage.missing:
            suite.say(f"{stage.name} will not run: it needs {stage.missing}")
    for number, stage in enumerate(stages, 1):
        start = time.monotonic()
        if stage.missing:
            verdict = f"FAILED: it needs {stage.missing}"
        elif suite.seconds_left < LEAST_SECONDS:
            verdict = NOT_RUN
        else:
            suite.begin(stage.share if number < len(stages) else 1.0)
            suite.say(f"\n==== {stage.name}, {suite.deadline - start:.0f} s of {suite.seconds_left:.0f} s")
            try:
                verdict = stage.run(suite)
            except Skip as why:
                verdict = f"skipped: {why}"
            except Exception as error:  # An error in one stage must not stop the others.
                verdict = f"FAILED: {type(error).__name__}: {error}"
        outcomes.append(Outcome(stage.name, verdict, time.monotonic() - start))
        suite.say(f"==== {outcomes[-1]}")
    return outcomes


def _earlier_run(text: str) -> Path:
    """The folder that --resume-from names, checked to be that of an earlier run."""
    path = Path(text)
    if not (path / "rows.jsonl").exists():
        raise argparse.ArgumentTypeError(f"expected a folder with rows.jsonl, got {path}")
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the suite, and returns the exit code: 1 if a stage has failed."""
    names = ["bench", *(stage.name for stage in STAGES)]
    parser = argparse.ArgumentParser(
        "python -m tools.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument("--minutes", type=duration, help="time for the whole run (no limit)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"run these: {', '.join(names)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is a dry run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes in the benchmarks")
    parser.add_argument("--fail-on-spills", action="store_true",
                        help="fail if a CUDA kernel spills registers, whatever the version of nvcc")  # fmt: skip
    parser.add_argument("--resume-from", type=_earlier_run, metavar="DIR",
                        help="the folder of an earlier run; what has rows there is not measured again")  # fmt: skip
    parser.add_argument("--commit", help="the commit that rows name, where the source tree has no git history")
    arguments = parser.parse_args(argv)
    # The commit is read before DIR, which may lie in the tree, adds files to the tree.
    arguments.commit = arguments.commit or conventions.commit()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.resume_from is not None:
        for name in ("rows.jsonl", *REPORTS):
            if (arguments.resume_from / name).exists() and not (arguments.out / name).exists():
                shutil.copyfile(arguments.resume_from / name, arguments.out / name)
    # nvcc and compute-sanitizer are often installed, but not on the PATH.
    os.environ["PATH"] += os.pathsep + str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    with (arguments.out / "log.txt").open("a") as log:
        suite = Suite(arguments, log)
        outcomes = run_stages(suite, selected(arguments.only))
        lines = summary.of_run(suite.out, outcomes, suite.minutes_asked)
        suite.say("\n".join(lines))
    (arguments.out / "summary.txt").write_text("\n".join(lines) + "\n")
    return 1 if any("FAILED" in outcome.verdict for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
