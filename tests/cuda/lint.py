"""Finds code of kernels that uses the hardware without the primitives (csrc/cuda/primitives.h), for example asm.

The emulation could not check such code. `python tests/cuda/lint.py` prints what it finds. The files are read as text,
with regular expressions. These miss some accesses, such as one through a pointer that has the name of an array in
another file. Such an access faults in the emulation, where pointers are handles.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"

#: These files implement the primitives or call the CUDA runtime. All other files are checked.
EXEMPT = {
    "primitives.h",
    "primitives_ptx.h",
    "wgmma_ptx.h",
    "tensor_map_driver.cu",
    "hardware_gpu.h",
    "runtime_gpu.h",
}

#: A pattern that must not occur -> what it stands for in the message.
RULES = {
    r"\b(__)?asm(__)?\b": "asm",
    r"\b__(shared|device|global|constant|host|grid_constant|launch_bounds|forceinline|align)__\b": "a CUDA specifier",
    r"\b(thread|block)Idx\b|\b(block|grid)Dim\b|\bwarpSize\b": "a built-in variable",
    r"\b__(sync|shfl|ballot|any|all|activemask|ldg|float|half|nv_|fma|exp|log|umul|mul)\w*": "an intrinsic function",
    r"\batomic(Add|CAS|Exch|Max|Min|Sub|Inc|Dec|Or|And|Xor)\b": "an atomic function of CUDA",
    r"\b(mem(cpy|set|move)|printf)\b": "a library function on memory",
    r"#\s*pragma\s+unroll|_Pragma": "a pragma instead of GPU_UNROLL",
}

INCLUDE = re.compile(r"#\s*include\s*[<\"](cuda|mma|cooperative|cub|cutlass|cute|thrust|nv)\S*")
#: A `*` in front of an operand is a dereference, unless it follows an operand (a product) or a type (a declaration).
DEREFERENCE = re.compile(r"(?:^|[=({\[,;!&|?:<>+\-/%]|\breturn)\s*\*\s*[A-Za-z_(]", re.MULTILINE)
ARROW = re.compile(r"\b(\w+)\s*->\s*(?!\s*(?:auto|void|bool|int|float|uint|std)\b)")
SUBSCRIPT = re.compile(r"\b([A-Za-z_]\w*)\s*\[")
#: Declarations of arrays, whose subscripts are allowed because arrays stay in registers:
#: `float acc[4]` and `uint32_t (&r)[4]`; `, b[2]` of `float a[2], b[2];`; `, b[] = {`.
ARRAYS = (
    re.compile(r"[\w>]\s*(?:\(&\s*|\s|&\s*)(\w+)\)?\s*(?:\[[^\]]*\])+\s*(?=[;,=)\[{])"),
    re.compile(r",\s*(\w+)(?:\[[^\],()]*\])+(?=\s*(?:,\s*\w+(?:\[[^\],()]*\])+\s*)*;)"),
    re.compile(r",\s*(\w+)(?:\[[^\]]*\])+\s*=\s*\{"),
)
KEYWORDS = {"return", "auto", "constexpr", "const", "delete", "new", "operator", "case"}


def without_comments(source: str) -> str:
    """The source with spaces in place of comments and literals, so that lines stay where they are."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'"
    includes = re.compile(r"^\s*#\s*include.*$", re.MULTILINE)
    kept = includes.findall(source)
    blanked = re.sub(pattern, blank, includes.sub("\0", source), flags=re.DOTALL)
    return re.sub("\0", lambda _: kept.pop(0), blanked)


def is_device_code(path: Path) -> bool:
    """Whether a file has code of kernels. Other files are host code, which may dereference pointers."""
    return path.suffix in (".h", ".cuh") and "GPU_" in path.read_text()


def findings(path: Path, arrays: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for each finding in one file. `arrays` are the names of arrays in all files."""
    source = without_comments(path.read_text())

    def line(match: re.Match) -> int:
        return source.count("\n", 0, match.end()) + 1

    for pattern, what in RULES.items():
        for match in re.finditer(pattern, source):
            yield line(match), f"{what}: {match[0].strip()}"
    if not is_device_code(path):
        return
    for match in INCLUDE.finditer(source):
        yield line(match), f"an include of CUDA's headers: {match[0].strip()}"
    for match in DEREFERENCE.finditer(source):
        yield line(match), f"a dereferenced pointer: {match[0].strip()}"
    for match in ARROW.finditer(source):
        yield line(match), f"a dereferenced pointer: {match[0].strip()}"
    for match in SUBSCRIPT.finditer(source):
        if match[1] not in arrays | KEYWORDS:
            yield line(match), f"a subscript of what is no array in registers: {match[1]}[...]"


def arrays_in(source: str) -> set[str]:
    """The names of arrays that a source declares."""
    return {name for pattern in ARRAYS for name in pattern.findall(source)} - KEYWORDS


def check(folder: Path = CUDA) -> list[str]:
    """All findings in the files of a folder, as "file:line: what is wrong"."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    declaring = [*paths, *(folder.parent / "common").glob("*.h")]  # kernels use structs of this folder
    arrays = set().union(*(arrays_in(without_comments(path.read_text())) for path in declaring))
    return [
        f"{path.relative_to(folder)}:{line}: {what}"
        for path in paths
        if path.name not in EXEMPT
        for line, what in findings(path, arrays)
    ]


if __name__ == "__main__":
    wrong = check()
    print("\n".join(wrong))
    sys.exit(bool(wrong))
