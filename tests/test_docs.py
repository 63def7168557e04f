"""In the pages of docs/, examples run, links have a target, and each picture can be drawn by its script."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_run(block: str) -> None:
    if "transformers" in block:
        pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    exec(block, {})


TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.quick
@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for name, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if name.startswith("https://"):  # not tested, because the machine may have no network
            continue
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not heading or heading in _anchors(target), heading


def _anchors(page: Path) -> list[str]:
    """The names by which links refer to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.quick
def test_paths_that_texts_name_exist() -> None:
    named = {
        path
        for page in TEXTS
        for path in re.findall(r"[ `](\w+/[\w./]+\.(?:py|h|cu|cpp|md|jsonl))\b", page.read_text())
    }
    assert "tests/cases.py" in named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.quick
def test_the_page_of_examples_names_every_script() -> None:
    named = set(re.findall(r"\b(\w+\.py)\b", (DOCS / "examples.md").read_text()))
    scripts = {path.name for path in (ROOT / "examples").glob("*.py") if not path.stem.endswith("utils")}
    assert named == scripts


@pytest.mark.quick
def test_the_index_names_every_page() -> None:
    named = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted([*named, "README.md"]) == [page.name for page in PAGES]


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.quick
def test_every_mask_has_its_picture() -> None:
    pictures = _script("plot_masks").pictures()
    shown = re.findall(r"masks/([^)]+)\.png", (DOCS / "masks.md").read_text())
    assert sorted(shown) == sorted(pictures) == sorted(path.stem for path in (DOCS / "masks").glob("*.png"))
    assert torch.equal(pictures["is_causal"], torch.ones(12, 12).tril())
    assert torch.equal(pictures["varlen"].bool(), torch.block_diag(*(torch.ones(n, n) for n in (5, 3, 4))).bool())


def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e .[examples]")
    _script("plot_masks").main(["--output", str(tmp_path)])
    for path in (DOCS / "masks").glob("*.png"):
        assert (tmp_path / path.name).stat().st_size > 500


def test_the_plan_on_the_page_is_that_of_the_command() -> None:
    """One line of each table, as all of them would take seconds. `python docs/plot_plan.py` writes the tables."""
    script = _script("plot_plan")
    page = (DOCS / "distributed.md").read_text()
    assert f"\n{script.curve_line(script.plan(script.GPUS[0]))}\n" in page
    assert not script.MEASURED.exists() or script.check() in page


def test_the_plan_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e .[examples]")
    script = _script("plot_plan")
    methods = [{"ring": 8, "ulysses": 1, "seconds": 2.0}, {"ring": 1, "ulysses": 8, "seconds": 1.0}]
    script.draw([{"gpus": 8, "methods": methods}], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 500
    assert (DOCS / "plan.png").exists()
