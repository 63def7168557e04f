"""The sources use the words of docs/glossary.md, and tools/check_glossary.py finds words that are not allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_glossary  # noqa: E402

pytestmark = pytest.mark.quick

CLEAN = """
// kept, live and place may be said here, /* and in a "text" */
const char* text = "the kept ones"; const char quote = '"';  // kept
const char* raw = R"(kept "here" too)";
int dropout_keep = keep_registers(replaced, alive), unit_stride = 1;
"""


def test_the_sources_use_the_words_of_the_glossary() -> None:
    assert check_glossary.check() == []


@pytest.mark.parametrize(
    ("tool", "argument", "message"),
    [
        ("check_glossary", "--help", "usage: check_glossary.py"),
        ("check_glossary", "nofile", "paths: expected files and folders, got nofile"),
        ("structure", "nofile", "root: expected a folder with the sources of fused_attn, got "),
    ],
)
def test_tools_explain_their_arguments(tool: str, argument: str, message: str) -> None:
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", argument]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == (0 if argument == "--help" else 2)
    assert message in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_each_word_has_a_meaning_and_is_there_once() -> None:
    rows = [line.split(" | ") for line in check_glossary.GLOSSARY.read_text().splitlines() if line.startswith("| ")]
    words = [row[0].strip("| ") for row in rows if row[0] != "| word"]
    assert len(words) == len(set(words))
    assert all(row[1].strip().endswith((".", "meaning")) for row in rows)
    banned = [word.text for word in check_glossary.banned_words(check_glossary.GLOSSARY.read_text())]
    assert len(banned) == len(set(banned)) >= 15
    assert not {name for word in words for name in word.split(", ")} & set(banned)


@pytest.mark.parametrize("suffix", [".h", ".cu", ".cpp"])
def test_nothing_is_found_in_comments_and_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kernel{suffix}"
    path.write_text(CLEAN)
    assert check_glossary.check([path]) == []


@pytest.mark.parametrize(
    ("code", "name", "instead"),
    [
        ("int kept = 0;", "kept", "valid"),
        ("struct KeptKeys {};", "KeptKeys", "valid"),
        ("constexpr int kMostKeptBytes = 1;", "kMostKeptBytes", "valid"),
        ("bool* live_;", "live_", "valid"),
        ("use(ignored);", "ignored", "key_padding"),
        ("bool keep = true;", "keep", "dropout_keep"),
        ("const Place place_of(p);", "Place", "head slice"),
        ("int heads_per_section;", "heads_per_section", "L2 group"),
        ("int unit = 0;", "unit", "tile scheduler"),
        ("float peak[2];", "peak", "reference"),
        ("float dweights[4];", "dweights", "dprobs, dscores"),
    ],
)
def test_each_kind_of_word_is_found(tmp_path: Path, code: str, name: str, instead: str) -> None:
    path = tmp_path / "kernel.h"
    path.write_text(f"{CLEAN}{code}\n")
    words = check_glossary.banned_words(check_glossary.GLOSSARY.read_text())
    found = [line for line in check_glossary.findings(path, words) if f": {name}: " in line]
    line = CLEAN.count("\n") + 1
    assert [text.partition(": ")[0] for text in found] == [f"{path}:{line}"]
    assert instead in found[0]


def test_python_is_read_as_python(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text('"""kept"""\ntext = "kept"  # kept\nvalue = text.kept // place\nbias.seq_len_q\n')
    assert [line.split(": ")[:2] for line in check_glossary.check([path])] == [
        [f"{path}:3", "kept"],
        [f"{path}:3", "place"],
    ]
