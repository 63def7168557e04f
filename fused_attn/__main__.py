"""The command line: ``python -m fused_attn info``, ``check`` and ``tune``."""

from __future__ import annotations

import argparse
import sys

from fused_attn import selfcheck
from fused_attn.backends.triton import backend as triton
from fused_attn.installation import info


def main(argv: list[str] | None = None) -> int:
    """Runs the command that argv names (None = the arguments of the process); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, compiled code, hardware, which backends can run and why not")
    commands.add_parser(
        "check",
        help="numerical self-check of every backend that can run here; the exit status is 1 if one is wrong or none is",
    )
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
        return _check()
    return _tune(arguments, tune)


def _check() -> int:
    """Runs and prints the self-check; returns the exit status: 1 if a result is wrong or nothing was checked."""
    checked = wrong = 0
    for result in selfcheck.run():
        print(result, flush=True)
        checked += 1
        wrong += not result.is_right
    if not checked:
        print("Nothing checked: no backend but the reference can run here; `python -m fused_attn info` says why.")
        return 1
    print(f"{checked - wrong} of {checked} right")
    return 1 if wrong else 0


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
    sys.exit(main())
