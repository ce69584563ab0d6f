"""The rules of docs/architecture.md: who imports whom."""

import ast

from conftest import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", "support", "networks", "importers")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
}
FLOORS = [  # from the ground up; each imports from its own and from those below
    {"support.config", "support.terminal", "support.parallel", "support.metrics", "support.costs"}
    | {"objectives", "model", "importers.safe_pickle", "importers.state_dict"},
    {"networks.song_unet", "networks.dhariwal_unet", "networks.diffusers_unet", "discriminator", "sampling"}
    | {"support.images", "support.training", "support.device", "support.plots", "support.page", "support.options_page"},
    {"guidance", "unified_model", "checkpoint", "data", "support.logger", "support.image_files"}
    | {"importers.edm", "importers.diffusers"},
    {"support.runs", "support.dry_run", "support.features"},
    {"train_teacher", "train_dmd2", "generate", "evaluate", "export", "benchmark", "compare", "import_teacher", "import_edm"},
]


def imports(path):
    """Our own modules that the file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


def test_every_module_has_its_floor():
    assert set().union(*FLOORS) == set(MODULES)


def test_imports_point_one_way():
    for floor, names in enumerate(FLOORS):
        below = set().union(*FLOORS[: floor + 1])
        for name in names:
            assert imports(MODULES[name]) <= below, name
    assert not any("train_teacher" in imports(path) for path in MODULES.values())


def test_the_method_knows_no_processes_and_the_logger_no_checkpoints():
    for name in ("model", "objectives", "discriminator", "guidance", "unified_model"):
        assert not any("parallel" in module for module in imports(MODULES[name])), name
    assert imports(MODULES["objectives"]) == imports(MODULES["support.metrics"]) == set()
    assert "checkpoint" not in imports(MODULES["support.logger"])
