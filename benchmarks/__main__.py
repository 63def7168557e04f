"""``python -m benchmarks attention | modules | generation | memory | distributed | report``."""

from __future__ import annotations

import argparse
import signal
import sys

from benchmarks import attention, distributed, generation, memory, modules, report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed, memory and error.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (attention, modules, generation, memory, distributed, report):
        name = module.__name__.rpartition(".")[2]
        summary = module.__doc__.splitlines()[0].partition(": ``")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command without an error
    sys.exit(main())
