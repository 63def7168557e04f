"""Runs nvcc, and fails if ptxas had to spill registers or says that it gave up on asynchronous matrix instructions.

A compiler launcher for CMake: `python checked_nvcc.py VERSION ON|OFF nvcc ARGUMENTS...`. Either fault leaves a kernel
right and slow, so that no other test would see the fault.

- With the version of nvcc that the kernels are written for, a fault is an error.
- With another version, a fault is only reported: slower kernels are better than none.
- ON makes faults errors with every version. This is the setting FUSED_ATTN_FAIL_ON_SPILLS, in any of CMake's words.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: The version of nvcc that the kernels are written for, which is that of the compiler wheels (find_nvcc.py).
WRITTEN_FOR = "13.0."

#: CMake's words for ON.
ON = ("1", "ON", "YES", "TRUE", "Y")

FAULTS = {
    # C7510 to C7520: wgmma was serialised, or a fence that is missing in the source was put in.
    r"\(C75\d\d\)": "ptxas changed the order of wgmma",
    r"[1-9]\d* bytes spill (stores|loads)": "registers were spilled",
    r"[1-9]\d* bytes stack frame": "local memory is used",
}
#: What -Xptxas -v prints about every kernel.
DETAILS = re.compile(r"^(ptxas info|    \d+ bytes)")


def faults(output: str) -> list[str]:
    """Lines of the compiler's output that must not be there, each with the function that it belongs to."""
    found, function = [], "?"
    for line in output.splitlines():
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?(\S+?)'?(?: for|$)", line):
            function = match[1]
        why = next((why for fault, why in FAULTS.items() if re.search(fault, line)), None)
        if why:
            found.append(f"{why} in {function}: {line.strip()}")
    return found


def main(version: str, fail_on_spills: str, command: list[str]) -> int:
    is_compilation = "-c" in command or "--compile" in command
    verbose = ["-Xptxas", "-v"] if is_compilation else []
    result = subprocess.run([*command, *verbose], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("\n".join(line for line in result.stdout.splitlines() if not DETAILS.match(line)), end="")
    wrong = faults(result.stdout)
    if result.returncode or not wrong:
        return result.returncode
    print("\n".join(wrong))
    if not version.startswith(WRITTEN_FOR) and fail_on_spills.upper() not in ON:
        return 0
    if "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
