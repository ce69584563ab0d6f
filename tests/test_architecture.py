"""The rules of docs/architecture.md: who imports whom."""

import ast
import sys

import pytest
from conftest import ROOT

METHOD = {"model", "objectives", "discriminator", "guidance", "unified_model", "sampling"}
FLOORS = [  # from the ground up; a module imports from its own room and from the floors below
    [METHOD, {"support"}],
    [{"networks"}, {"readers"}],
    [{"importers"}],
    [{"data", "checkpoint", "run"}],
    [{"evaluation"}],
    [{"train_teacher", "train_dmd2", "generate", "evaluate"}],
    [{"compare", "import_teacher", "export"}, {"toy"}],
    [{"extras"}],
]
FILES = [path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern) if path.parent.name != "tests"]


def name_of(path):
    """The file's place in `FLOORS`: its folder, or its own name in the root."""
    return path.stem if path.parent == ROOT else path.parent.name


OURS = {name_of(path) for path in FILES}
ROOMS = [(floor, names) for floor, rooms in enumerate(FLOORS) for names in rooms]
PLACES = {name: (floor, sorted(names)) for floor, names in ROOMS for name in names}


def imports(path):
    """The first parts of the names of all modules that the file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_every_module_has_its_floor():
    assert set(PLACES) == OURS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    place = PLACES[name_of(path)]
    for name in imports(path) & OURS:
        assert PLACES[name] == place or PLACES[name][0] < place[0], f"{path.name} imports {name}"


@pytest.mark.parametrize("name", sorted(METHOD))
def test_the_method_imports_torch_and_itself(name):
    assert imports(ROOT / f"{name}.py") <= METHOD | {"torch"} | sys.stdlib_module_names
