"""Prints figures about the structure of the sources. A change of structure should lower them.

    python tools/structure.py --list          # of this checkout, with names
    python tools/structure.py ANOTHER_CHECKOUT

The product is ``fused_attn/**/*.py`` and ``csrc/**`` (.h, .cpp, .cu). Old checkouts have ``csrc/emulation``, which does
not count, because only tests used it.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

MANY_PARAMETERS = 10


def python_files(root: Path) -> list[Path]:
    return sorted((root / "fused_attn").rglob("*.py"))


def product_files(root: Path) -> list[Path]:
    """The sources of the product: the Python package and the native code."""
    native = (path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return python_files(root) + sorted(path for path in native if "emulation" not in path.parts)


def files_with(root: Path, word: str) -> list[str]:
    """The files of the product, Python and native, that contain a word."""
    return [str(path.relative_to(root)) for path in product_files(root) if re.search(word, path.read_text())]


def occurrences(root: Path, text: str) -> list[str]:
    """The places, as path:line, where a text occurs in the Python files of the package."""
    return [
        f"{path.relative_to(root)}:{number}"
        for path in python_files(root)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if text in line
    ]


def functions_with_many_parameters(root: Path) -> list[str]:
    """The Python functions with many parameters. The first parameter of a method and ``*args`` count."""
    found = []
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                count = len(given.posonlyargs + given.args + given.kwonlyargs)
                count += (given.vararg is not None) + (given.kwarg is not None)
                if count >= MANY_PARAMETERS:
                    found.append(f"{path.relative_to(root)}:{node.lineno} {node.name} ({count})")
    return found


# ---- Imports


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports, inside functions and under ``TYPE_CHECKING`` too."""
    modules = {module_name(root, path): path for path in python_files(root)}
    return {name: set(_imported(ast.parse(path.read_text()), modules)) - {name} for name, path in modules.items()}


def _imported(tree: ast.Module, modules: dict[str, Path]) -> Iterator[str]:
    """The names of those `modules` that a syntax tree imports. ``from package import name`` may import a submodule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another, directly or through others (strongly connected, after Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        """Searches depth first. A module whose low number is its own index is the first one of its group."""
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def main() -> None:
    """Prints the figures, with the goals that some of them have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--list", action="store_true", help="also name the files, functions and modules")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if not (root / "fused_attn").is_dir():
        parser.error(f"root: expected a folder with the sources of fused_attn, got {root}")
    product, benchmarks = lines(product_files(root)), lines(sorted((root / "benchmarks").rglob("*.py")))
    figures = {
        "product files with `sinks`": (files_with(root, "sinks"), None),
        "product files with `relative_bias`": (files_with(root, "relative_bias"), None),
        f"functions with {MANY_PARAMETERS} or more parameters": (functions_with_many_parameters(root), 22),
        "`needs[`": (occurrences(root, "needs["), 0),
        "`(None,) *`": (occurrences(root, "(None,) *"), 0),
        "import circles": ([" <-> ".join(group) for group in circles(imports(root))], 0),
    }
    for name, (found, goal) in figures.items():
        print(f"{name:<45} {len(found):>6}" + ("" if goal is None else f"   goal: {goal} or fewer"))
        if arguments.list:
            print("".join(f"    {entry}\n" for entry in found), end="")
    print(f"{'lines of benchmarks : product':<45} {benchmarks / product:>6.2f}   goal: 0.15 or less")
    print(f"{'lines of README.md':<45} {lines([root / 'README.md']):>6}   goal: 130 or fewer")


if __name__ == "__main__":
    main()
