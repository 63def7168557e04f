"""Finds names in the sources that docs/glossary.md does not allow: `python tools/check_glossary.py [PATH...]`.

The last column of each table of the page lists the words that must not be used. The page says what an entry means.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
#: The folders that are checked if no path is given.
SOURCES = (ROOT / "csrc", ROOT / "fused_attn", ROOT / "tools")
#: Attributes of torch's causal biases, which cannot be renamed here.
NAMES_OF_OTHERS = {"seq_len_q", "seq_len_kv"}
SUFFIXES = {".h", ".cuh", ".cu", ".cpp", ".py"}

COMMENTS_AND_TEXTS = {
    ".py": r'"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'|#[^\n]*",
    ".h": r'R"(\w*)\(.*?\)\1"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])'",
}


class Word(NamedTuple):
    """A word that must not be used, and the words of the glossary that take its place."""

    text: str
    is_whole_name: bool
    instead: str


def banned_words(glossary: str) -> list[Word]:
    """The words that the last column of the glossary's tables forbids; see docs/glossary.md for their notation."""
    rows = [line.strip("|").split(" | ") for line in glossary.splitlines() if line.startswith("| ")]
    return [
        Word(word.lstrip("="), word.startswith("="), instead.strip())
        for instead, *_, last in rows
        for word in re.findall(r"`([^`]+)`", last)
    ]


def parts(name: str) -> list[str]:
    """The words of a name in lower case. For example, KeptKeys, kept_keys and kKeptKeys all contain kept."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_").split("_")


def is_banned(word: Word, name: str) -> bool:
    """Whether a name contains a forbidden word, or, for a word of the form ``=word``, whether the name is this word."""
    if name in NAMES_OF_OTHERS:
        return False
    if word.is_whole_name:
        return name.strip("_").lower() == word.text
    return f"_{word.text}_" in f"_{'_'.join(parts(name))}_"


def findings(path: Path, words: Sequence[Word]) -> Iterator[str]:
    """A line for each forbidden name in a file. Comments and texts are removed first, but their line breaks stay, so
    that the numbers of lines are right.
    """
    pattern = COMMENTS_AND_TEXTS[".py" if path.suffix == ".py" else ".h"]
    code = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), path.read_text(), flags=re.DOTALL)
    for number, line in enumerate(code.split("\n"), start=1):
        for name in re.findall(r"\b[A-Za-z_]\w*", line):
            for word in words:
                if is_banned(word, name):
                    yield f"{path}:{number}: {name}: the glossary says {word.instead}, not {word.text}"


def check(paths: Sequence[Path] = SOURCES) -> list[str]:
    """The findings in all files, and in all files of the folders, that are named."""
    words = banned_words(GLOSSARY.read_text())
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [line for file in files if file.suffix in SUFFIXES for line in findings(file, words)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders (all sources)")
    paths = parser.parse_args().paths
    if missing := [str(path) for path in paths if not path.exists()]:
        parser.error(f"paths: expected files and folders, got {', '.join(missing)}")
    wrong = check(paths or SOURCES)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
