"""The house: imports only point down, in no circle, and nothing in src/ can run what a file says."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "regard"
FLOORS = {
    "errors": 0, "heap": 0,
    "config": 1, "config_model": 1, "config_train": 1, "text": 1,
    "data": 2, "shapes": 2, "products": 2,
    "model.attention": 3, "model.positions": 3, "model.state": 3, "model.layers": 3,
    "model.cells": 3, "model.pairs": 3, "model.pointer": 3, "model.rows": 3, "model.stepwise": 3,
    "model.sublayers": 3,
    "model.rnn": 4, "model.conv": 4, "model.transformer": 4,
    "model.seq2seq": 5,
    "decode": 6, "look": 6, "metrics": 6,
    "training": 7, "engines": 7,
    "translator": 8,
    "evaluate": 9, "export": 9, "distill": 9,
    "demo": 10,
    "cli": 11, "__main__": 12,
}
MODULES = {".".join(("regard", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
           for path in SOURCE.rglob("*.py")}
ROOT = "regard"
"""Its names are imported when they are first used; all others may import only its version."""
CIRCLES = {("regard.look.trace", "regard.look.picture")}
"""A trace draws itself (`trace.picture`), and imports the drawing when it does."""


def floor(module):
    """The floor of a module of ours; None for an empty package."""
    name = module.removeprefix("regard.")
    return next((FLOORS[part] for part in (name, name.split(".")[0]) if part in FLOORS), None)


def imports(path):
    """Modules of ours that a file imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == ROOT)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                if (node.module or "").split(".")[0] == ROOT and (node.module, alias.name) != (ROOT, "__version__"):
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {ROOT}))
def test_imports_only_point_down(module):
    upwards = [other for other in imports(MODULES[module]) if other == ROOT or floor(other) > floor(module)]
    if MODULES[module].name == "__init__.py" and floor(module) is None:
        assert not list(imports(MODULES[module]))
    assert not upwards, f"{module} stands on floor {floor(module)} and imports {upwards}"


def test_no_circle_on_a_floor():
    reached = {module: {other for other in imports(path) if (module, other) not in CIRCLES}
               for module, path in MODULES.items() if module != ROOT}
    for middle in reached:
        for module in reached:
            if middle in reached[module]:
                reached[module] |= reached[middle]
    assert not [module for module, others in reached.items() if module in others]


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_nothing_runs_what_a_file_says(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        assert not {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"} & {name.split(".")[0] for name in names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in ("pickle", "marshal")
            assert node.module not in ("torch", "yaml") or not {"load", "save", "unsafe_load"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = ("eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load")
            assert called not in forbidden, f"{path}:{node.lineno}"
            allowed = [word for word in node.keywords if word.arg == "allow_pickle"]
            assert all(ast.unparse(word.value) == "False" for word in allowed), f"{path}:{node.lineno}"
