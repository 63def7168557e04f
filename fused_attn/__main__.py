"""The command line: ``python -m fused_attn info``, ``check`` and ``tune``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from typing import Any

from fused_attn import measurement, selfcheck, speed
from fused_attn.backends.triton import backend as triton
from fused_attn.installation import info


def main(argv: list[str] | None = None) -> int:
    """Runs the command that argv names (None = the arguments of the process); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, compiled code, hardware, which backends can run and why not")
    check = commands.add_parser(
        "check",
        help="numerical self-check of every backend that can run here, and its speed; the exit status is 1 if a result "
        "is wrong or nothing was checked",
    )
    check.add_argument("--json", action="store_true", help="print everything as JSON, with `info`, for bug reports")
    check.add_argument("--no-speed", action="store_true", help="leave the speed out")
    tune = commands.add_parser(
        "tune",
        help="measure tile sizes of the Triton kernels on this GPU and store the better ones",
        description="Measures tile sizes of the Triton kernels on this machine's GPU and stores, in the user's cache "
        "folder, those that are faster than the package's own table. Calls on this kind of GPU use them from then on.",
    )
    _add_tune_options(tune)
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    if arguments.command == "check":
        return _check(arguments.json, not arguments.no_speed)
    return _tune(arguments, tune)


def _check(is_json: bool, has_speed: bool) -> int:
    """Runs and prints the self-check; returns the exit status: 1 if a result is wrong or nothing was checked.

    Args:
        is_json: print one JSON object in place of lines.
        has_speed: measure the speed, too.
    """

    def say(line: object) -> None:
        if not is_json:
            print(line, flush=True)

    jobs, lines = selfcheck.jobs(), speed.lines() if has_speed else []
    results: list[selfcheck.Result] = []
    speeds: list[speed.Speed] = []
    with measurement.progress(len(jobs) + len(lines)) as advance:
        for found in selfcheck.run(jobs, selfcheck.num_processes()):
            for result in found:
                results.append(result)
                say(result)
            advance("comparing every kernel with float64")
        for measured in speed.run(lines):
            speeds.append(measured)
            say(measured)
            advance("measuring the speed of every kernel")
    wrong = sum(not result.is_right for result in results)
    if is_json:
        print(json.dumps(_report(results, speeds), indent=1))
    for device, rate in speed.matmul_rates(speeds).items():
        say(f"matrix product on {device}: {rate:.3g} TFLOP/s")
    if not results:
        say("Nothing checked: no backend but the reference can run here; `python -m fused_attn info` says why.")
        return 1
    say(f"{len(results) - wrong} of {len(results)} right")
    return 1 if wrong else 0


def _report(results: list[selfcheck.Result], speeds: list[speed.Speed]) -> dict[str, Any]:
    """What ``check --json`` prints: the fields of `info`, of all results, and of all speeds."""
    return {
        "info": asdict(info()),
        "checked": len(results),
        "wrong": sum(not result.is_right for result in results),
        "results": [
            {
                "backend": result.backend,
                "dtype": str(result.dtype).removeprefix("torch."),
                "case": result.case,
                "is_right": result.is_right,
                "error": None if result.measure is None else result.measure.error,
                "allowed": None if result.measure is None else result.measure.allowed,
                "failure": result.failure,
            }
            for result in results
        ],
        "speed": [asdict(found) | {"line": found.line._asdict()} for found in speeds],
    }


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``tune`` to its parser.

    The values are not checked here but in `tune.workloads`. A check needs the module `tune`, which imports Triton, and
    the other commands must work without Triton.
    """
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="forward, dq, dkdv, bias; default: all")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="float32, float16, bfloat16; default: bfloat16")
    parser.add_argument("--head-dim", nargs="+", metavar="D", type=int, help="default: 64 128")
    parser.add_argument(
        "--features",
        nargs="+",
        metavar="FEATURES",
        help="plain, or some of causal, window, padding, varlen, mask, bias, relative_bias, softcap and dropout joined "
        "by +, such as causal+dropout: what is measured is used for calls with just these; default: "
        "causal padding causal+padding plain bias relative_bias dropout",
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit; what is measured by then is stored")
    parser.add_argument("--device", help="default: cuda; with --dry-run also an architecture such as sm_90")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    parser.add_argument("--clear", action="store_true", help="delete what is stored for this GPU, or all without one")


def _tune(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs ``tune``; returns the exit status, which is 1 if Triton is missing."""
    if (reason := triton.installation_problem()) is not None:
        print(reason, file=sys.stderr)
        return 1
    # Imported here: the other commands work without Triton.
    from fused_attn.backends.triton import tune

    try:
        return tune.main(arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command without an error
    sys.exit(main())
