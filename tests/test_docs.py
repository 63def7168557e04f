"""The pages in docs/: their examples run, their links lead somewhere, their pictures are what the script draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if any("transformers" in block for block in blocks):
        pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    for block in blocks:
        exec(block, {})


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def _plot_masks():
    spec = importlib.util.spec_from_file_location("plot_masks", DOCS / "plot_masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.quick
def test_every_mask_has_its_picture() -> None:
    pictures = _plot_masks().pictures()
    shown = re.findall(r"masks/([^)]+)\.png", (DOCS / "masks.md").read_text())
    assert sorted(shown) == sorted(pictures) == sorted(path.stem for path in (DOCS / "masks").glob("*.png"))
    assert torch.equal(pictures["is_causal"], torch.ones(12, 12).tril())
    assert torch.equal(pictures["varlen"].bool(), torch.block_diag(*(torch.ones(n, n) for n in (5, 3, 4))).bool())


def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e .[examples]")
    _plot_masks().main(["--output", str(tmp_path)])
    for path in (DOCS / "masks").glob("*.png"):
        assert (tmp_path / path.name).stat().st_size > 500
