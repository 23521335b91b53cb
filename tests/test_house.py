"""Who may import whom: train.py -> record -> run -> data, estimate -> mistral, convert -> kernels, and no circle."""

import ast
import graphlib
from pathlib import Path

import pytest

from halny.model.run import preflight

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "halny.model.prepare_data",
    "halny.model.quality",
    "halny.model.export",
}  # they stand on the rooms, as train.py does


def modules() -> dict[str, Path]:
    """Module name -> file, of kernels/, model/ and train.py."""
    found = {"train": ROOT / "train.py"}
    for folder in ("kernels", "model"):
        for path in (ROOT / folder).rglob("*.py"):
            found["halny." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere in it, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    """kernels, a folder of model/, "core" for the files that lie in model/ itself, "commands" or "train"."""
    if module == "train" or module in COMMANDS:
        return "train" if module == "train" else "commands"
    _, top, *rest = module.split(".")
    return top if top == "kernels" else rest[0] if len(rest) > 1 else "core"


MAY = {  # room -> those it may import from, beside itself
    "kernels": set(),
    "core": {"kernels"},
    "data": {"core", "kernels"},
    "estimate": {"core", "kernels"},
    "run": {"data", "estimate", "core", "kernels"},
    "record": {"run", "data", "estimate", "core", "kernels"},
    "commands": {"record", "run", "data", "estimate", "core", "kernels"},
    "train": {"commands", "record", "run", "data", "estimate", "core", "kernels"},
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name):
    allowed = {room(name), *MAY[room(name)]}
    wrong = sorted(other for other in IMPORTS[name] if room(other) not in allowed)
    assert not wrong, f"{name} is of {room(name)} and imports {', '.join(wrong)}"


def test_no_import_cycle():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_the_rooms_are_all_there():
    """A test of imports that finds no modules would pass."""
    assert {room(name) for name in MODULES} == set(MAY) and sum(map(len, IMPORTS.values())) > 100


def test_no_init_file():
    """Hugging Face has a package named kernels: a regular package of ours would shadow it (setup.py)."""
    assert not [*(ROOT / "kernels").rglob("__init__.py"), *(ROOT / "model").rglob("__init__.py")]


def test_preflight_compares_every_source_file(tmp_path):
    assert set(preflight.sources(ROOT)) == set(MODULES.values())
    for name in ("kernels/a.py", "model/b.py", "model/room/c.py", "train.py", "bench/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in preflight.sources(tmp_path)]
    assert found == ["kernels/a.py", "model/b.py", "model/room/c.py", "train.py"]
