"""``python -m fused_attn info`` and ``python -m fused_attn check``."""

from __future__ import annotations

import argparse
import sys

from fused_attn import selfcheck
from fused_attn.installation import info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, compiled code, hardware, which backends can run and why not")
    commands.add_parser("check", help="numerical self-check of every backend that can run here")
    command = parser.parse_args(argv).command
    if command == "info":
        print(info())
        return 0
    return _check()


def _check() -> int:
    checked = wrong = 0
    for result in selfcheck.run():
        print(result, flush=True)
        checked += 1
        wrong += not result.is_right
    if not checked:
        print("No backend but the reference can run here; `python -m fused_attn info` says why.")
        return 0
    print(f"{checked - wrong} of {checked} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
