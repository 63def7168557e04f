"""Modules of the package import only what docs/architecture.md allows."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.attention.inputs import Inputs, Saved, Shapes
from fused_attn.attention.problem import Scalars
from fused_attn.derivatives import ops

ROOT = Path(__file__).resolve().parents[1]

#: From the lowest layer to the highest. A module may import from its own layer and from lower layers only.
LAYERS = (
    ("fused_attn.native", "fused_attn.driver", "fused_attn.architectures", "fused_attn.subinterpreters"),
    ("fused_attn.modes", "fused_attn.tolerance", "fused_attn.measurement"),
    ("fused_attn.attention",),
    ("fused_attn.backends",),
    ("fused_attn.derivatives",),
    ("fused_attn.planning", "fused_attn.running", "fused_attn.api", "fused_attn.partial", "fused_attn.sharded"),
    ("fused_attn.distributed",),
    ("fused_attn.nn",),
    ("fused_attn.integrations",),
    ("fused_attn.installation", "fused_attn.selfcheck", "fused_attn.speed", "fused_attn.__main__", "fused_attn"),
)

pytestmark = pytest.mark.quick


def load_structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = load_structure()


def layer_of(module: str) -> int:
    """The layer of a module: that of the longest name that fits. ``fused_attn`` fits the module of this name only."""
    for level, names in enumerate(LAYERS):
        if any(module == name or (name != "fused_attn" and module.startswith(name + ".")) for name in names):
            return level
    raise AssertionError(f"{module}: expected a place in LAYERS")


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{a} imports {b}" for a, found in sorted(graph.items()) for b in sorted(found) if layer_of(b) > layer_of(a)
    ]


def test_imports_go_down() -> None:
    graph = structure.imports(ROOT)
    assert len(graph) > 40
    assert upward(graph) == []


def test_no_circle() -> None:
    assert structure.circles(structure.imports(ROOT)) == []


def test_backends_do_not_import_one_another() -> None:
    siblings = ("cpu", "cuda", "reference", "triton")
    for name, found in structure.imports(ROOT).items():
        for own in siblings:
            if name.startswith(f"fused_attn.backends.{own}"):
                others = [f"fused_attn.backends.{other}" for other in siblings if other != own]
                assert not [x for x in found if x.startswith(tuple(others))], name


def test_the_native_module_is_imported_in_one_place() -> None:
    texts = {path: path.read_text() for path in structure.python_files(ROOT)}
    assert [path.name for path, text in texts.items() if "import fused_attn._C" in text] == ["native.py"]


def test_shapes_have_the_names_of_inputs() -> None:
    assert Shapes._fields == Inputs._fields
    assert Shapes._field_defaults == Inputs._field_defaults


def test_operators_take_the_fields_of_tuples() -> None:
    """The schemas of the operators spell these fields out, because each has a type of its own there."""
    assert names_of_schema(ops._SCALARS) == Scalars._fields
    assert names_of_schema(ops._SAVED) == Saved._fields


def names_of_schema(arguments: str) -> tuple[str, ...]:
    return tuple(argument.split()[-1] for argument in arguments.split(", "))


def test_what_breaks_the_rules_is_seen(tmp_path: Path) -> None:
    """The rules also hold for imports inside functions and for imports under ``TYPE_CHECKING``."""
    package = tmp_path / "fused_attn"
    (package / "attention").mkdir(parents=True)
    for path in (package, package / "attention"):
        (path / "__init__.py").write_text("")
    (package / "attention" / "masks.py").write_text("def f():\n    from fused_attn import api\n")
    (package / "api.py").write_text("if TYPE_CHECKING:\n    import fused_attn.attention.masks\n")
    graph = structure.imports(tmp_path)
    assert upward(graph) == ["fused_attn.attention.masks imports fused_attn.api"]
    assert structure.circles(graph) == [["fused_attn.api", "fused_attn.attention.masks"]]


def test_figures_are_printed() -> None:
    done = subprocess.run([sys.executable, "tools/structure.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "import circles" in done.stdout and "fused_attn/api.py" in done.stdout


def test_inputs_are_spelled_out_in_their_order() -> None:
    """`inputs_of` and `new_inputs` get the fields of Inputs in order. A check at run time would slow small calls."""
    calls = [
        node
        for path in structure.python_files(ROOT)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("inputs_of", "new_inputs")
    ]
    assert calls
    for call in calls:
        if any(isinstance(entry, ast.Starred) for entry in call.args):
            continue
        names = [entry.id if isinstance(entry, ast.Name) else entry.value for entry in call.args]
        assert all(name in (field, None) for name, field in zip(names, Inputs._fields, strict=True)), ast.unparse(call)
