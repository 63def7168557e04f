"""Runs nvcc, and fails if the machine code of a kernel is slow or would hang, which no compiler reports as an error.

A compiler launcher for CMake: `python checked_nvcc.py VERSION ON|OFF nvcc ARGUMENTS...`.

ptxas may spill registers, or say that it gave up on asynchronous matrix instructions. Either fault leaves a kernel
right and slow, so that no other test would see the fault.

- With the version of nvcc that the kernels are written for, a fault is an error.
- With another version, a fault is only reported: slower kernels are better than none.
- ON makes faults errors with every version. This is the setting FUSED_ATTN_FAIL_ON_SPILLS, in any of CMake's words.

With every version, it is an error if a kernel that moves registers between its warpgroups (setmaxnreg) starts with
another number of registers than it counts on: it might wait for registers that the block does not have.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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


def lines_of_functions(output: str) -> Iterator[tuple[str, str]]:
    """(function, line) for each line of the compiler's output."""
    function = "?"
    for line in output.splitlines():
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?(\S+?)'?(?: for|$)", line):
            function = match[1]
        yield function, line


def faults(output: str) -> list[str]:
    """Lines of the compiler's output that must not be there, each with the function that it belongs to."""
    found = []
    for function, line in lines_of_functions(output):
        why = next((why for fault, why in FAULTS.items() if re.search(fault, line)), None)
        if why:
            found.append(f"{why} in {function}: {line.strip()}")
    return found


def registers_at_launch(ptx: str) -> dict[str, int]:
    """kernel -> the registers of a thread at launch that fits_registers (csrc/cuda/sm90/loader.h) counts on.

    Only kernels with setmaxnreg are listed. A block of one has a multiprocessor, with 65536 registers, to itself.
    """
    found = {}
    for kernel in ptx.split(".entry ")[1:]:
        if "setmaxnreg" in kernel:
            bounds = re.search(r"\.maxntid ([\d, ]+)", kernel)
            threads = math.prod(map(int, bounds[1].split(","))) if bounds else 1024  # the most of any block
            found[kernel.partition("(")[0]] = 65536 // threads // 8 * 8
    return found


def wrong_registers(output: str, expected: dict[str, int]) -> list[str]:
    """Which kernels ptxas did not give the expected number of registers."""
    used = {}
    for function, line in lines_of_functions(output):
        if match := re.search(r"Used (\d+) registers", line):
            used[function] = int(match[1])
    return [
        f"setmaxnreg in {kernel}: expected {registers} registers at launch, got {used.get(kernel, 'no number')}"
        for kernel, registers in expected.items()
        if used.get(kernel) != registers
    ]


def main(version: str, fail_on_spills: str, command: list[str]) -> int:
    is_compilation = "-c" in command or "--compile" in command
    with tempfile.TemporaryDirectory() as folder:
        verbose = ["-Xptxas", "-v", "--keep", "--keep-dir", folder] if is_compilation else []
        result = subprocess.run([*command, *verbose], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    print("\n".join(line for line in result.stdout.splitlines() if not DETAILS.match(line)), end="")
    if result.returncode:
        return result.returncode
    slow, hanging = faults(result.stdout), wrong_registers(result.stdout, registers_at_launch(ptx))
    for line in (*slow, *hanging):
        print(line)
    must_be_fast = version.startswith(WRITTEN_FOR) or fail_on_spills.upper() in ON
    is_error = bool(hanging or (slow and must_be_fast))
    if is_error and "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1 if is_error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
