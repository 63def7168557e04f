"""What pytest's reports (--junitxml) say: how many tests passed, which failed, and which backends are red."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.conventions import OUR_BACKENDS

#: The report of each stage that runs tests.
CUDA_TESTS, GPU_TESTS, KERNEL_TESTS = REPORTS = ("cuda-tests.xml", "tests.xml", "kernel-tests.xml")
BACKENDS = set(OUR_BACKENDS.values())
#: The summary names this many failures of one report.
MOST_FAILURES = 12


def verdict(report: Path, of_command: str) -> str:
    """The verdict on a stage of tests.

    Args:
        report: what pytest has written.
        of_command: the verdict by the exit code alone.
    """
    root = _read(report)
    if root is None:
        return f"{of_command}: its report is cut off"
    tests, failed, errors, skipped = (
        sum(int(one.get(name, 0)) for one in root.iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    )
    passed = tests - failed - errors - skipped
    counts = f"{passed} passed, {failed} failed, {errors} errors, {skipped} skipped"
    if failed or errors:
        return f"FAILED: {counts}"
    if of_command == "ok" and not passed:
        reasons = Counter(one.get("message") for one in root.iter("skipped"))
        return f"skipped: all {skipped} tests: {', '.join(str(reason) for reason, _ in reasons.most_common(1))}"
    return f"{of_command}: {counts}"


def red_backends(folder: Path) -> set[str]:
    """The backends whose tests have failed. A failed test outside of tests/cuda and tests/triton may concern every
    backend, so it makes all of them red."""
    red = set()
    for name in REPORTS:
        for case in _failed_cases(folder / name):
            tests = (case.get("classname") or "").removeprefix("tests.").partition(".")[0]
            red |= {tests} & BACKENDS or BACKENDS
    return red


def failures(folder: Path) -> list[str]:
    """The failed tests of all reports in a folder, one line for each test."""
    lines = []
    for report in (folder / name for name in REPORTS):
        found = failures_of(report)
        more = len(found) - MOST_FAILURES
        lines += found[:MOST_FAILURES] + ([f"... {more} more in {report.name}"] if more > 0 else [])
    return lines


def failures_of(report: Path) -> list[str]:
    """A line for each failed test in a report of pytest, with the beginning of its message."""
    if report.exists() and _read(report) is None:
        return [f"{report.name} is cut off"]
    lines = []
    for case in _failed_cases(report):
        for found in (*case.findall("failure"), *case.findall("error")):
            message = " ".join((found.get("message") or "").split())[:160]
            lines.append(f"{case.get('classname')}::{case.get('name')}: {message}")
    return lines


def _failed_cases(report: Path) -> list[ElementTree.Element]:
    root = _read(report) if report.exists() else None
    cases = [] if root is None else root.iter("testcase")
    return [case for case in cases if case.find("failure") is not None or case.find("error") is not None]


def _read(report: Path) -> ElementTree.Element | None:
    """The root of a report, or None if pytest was killed while it wrote the report."""
    try:
        return ElementTree.parse(report).getroot()
    except ElementTree.ParseError:
        return None
