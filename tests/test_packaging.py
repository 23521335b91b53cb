"""The names that halny installs under, and the one it must leave alone: Hugging Face's package ``kernels``."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_from_root(arguments: list[str], extra_path: Path | None = None) -> str:
    """stdout of a Python started in the repository root, so that the root comes first on its sys.path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if extra_path is not None:
        environment["PYTHONPATH"] = str(extra_path)  # comes after the current directory, before site-packages
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_in_pytest(code: str, tmp_path: Path, extra_path: Path | None = None) -> None:
    """Run code as a test under ``python -m pytest`` in the repository root, apart from this suite's conftest."""
    (tmp_path / "test_probe.py").write_text("def test_probe():\n    " + code.replace("\n", "\n    ") + "\n")
    (tmp_path / "empty.ini").write_text("[pytest]\n")
    options = ["-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "empty.ini"), "--rootdir", str(tmp_path)]
    run_from_root(["-m", "pytest", *options, str(tmp_path / "test_probe.py")], extra_path)


def stand_in(folder: Path) -> Path:
    """A folder for sys.path that holds a package named ``kernels``, as Hugging Face's distribution does."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("WHOSE = 'stand-in'\n")
    return folder


FIRST_ON_THE_PATH = "import sys, os\nassert os.path.realpath(sys.path[0] or '.') == {root!r}, sys.path\n"


def test_a_package_named_kernels_wins_over_our_folder(tmp_path):
    """Ours, without __init__.py, is only a namespace candidate, and loses to a package later on the path."""
    path = stand_in(tmp_path / "site")
    code = "import kernels\nassert kernels.WHOSE == 'stand-in'\nimport halny.kernels.rope, halny.model.mistral"
    run_from_root(["-c", FIRST_ON_THE_PATH.format(root=str(ROOT)) + code], path)
    run_in_pytest(code, tmp_path, path)


def test_this_guard_can_fail(tmp_path):
    """An __init__.py in a folder named kernels does shadow: the situation that the tests here are against."""
    first, second = tmp_path / "repository", stand_in(tmp_path / "site")
    (first / "kernels").mkdir(parents=True)
    (first / "kernels" / "__init__.py").touch()
    code = "import kernels; assert not hasattr(kernels, 'WHOSE')"
    subprocess.run([sys.executable, "-c", code], cwd=first, env={**os.environ, "PYTHONPATH": str(second)}, check=True)


# find_spec gives our own folder, as a namespace without origin, where Hugging Face's package is not installed
hugging_face_kernels = pytest.mark.skipif(
    getattr(importlib.util.find_spec("kernels"), "origin", None) is None,
    reason="Hugging Face's package kernels is not installed; the stand-in above covers the rule",
)


@hugging_face_kernels
def test_hugging_faces_kernels_imports_beside_ours(tmp_path):
    code = (
        "import kernels, importlib.metadata\n"
        f"assert not kernels.__file__.startswith({str(ROOT / 'kernels')!r}), kernels.__file__\n"
        "assert kernels.get_kernel and importlib.metadata.version('kernels')\n"
        "import halny.kernels.rms_norm"
    )
    run_from_root(["-c", code])
    run_in_pytest(code, tmp_path)


def test_transformers_imports_from_the_root():
    """hub_kernels is the module of transformers that imports from ``kernels``; modeling_mistral uses it."""
    code = (
        "import transformers.integrations.hub_kernels, transformers.models.mistral.modeling_mistral, sys\n"
        "print(getattr(sys.modules.get('kernels'), '__file__', None))"
    )
    assert str(ROOT / "kernels") not in run_from_root(["-c", code])


def test_halny_imports_from_anywhere():
    """halny.kernels and halny.model are the two folders, wherever Python starts, in a plain and an editable install."""
    rooms = sorted(path.name for path in (ROOT / "model").iterdir() if any(path.glob("*.py")))
    one_of_each = [f"halny.model.{room}.{next((ROOT / 'model' / room).glob('*.py')).stem}" for room in rooms]
    found = "\n".join(f"import importlib.util; assert importlib.util.find_spec({name!r})" for name in one_of_each)
    assert len(rooms) == 4
    subprocess.run([sys.executable, "-c", found], cwd="/", check=True)
    code = "import halny.kernels.rms_norm as a, halny.model.mistral as b; print(a.__file__); print(b.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    names = [Path(line).parts[-2:] for line in done.stdout.split()]
    assert names == [("kernels", "rms_norm.py"), ("model", "mistral.py")]


def test_metadata():
    assert importlib.metadata.version("halny")
    requires = [line for line in importlib.metadata.requires("halny") if "extra ==" not in line]
    names = {re.match(r"[A-Za-z0-9_.-]+", line).group() for line in requires}
    assert {"torch", "triton", "transformers", "safetensors", "numpy", "tqdm", "sentencepiece"} <= names
    (torch_line,) = (line for line in requires if re.match(r"torch\b", line))
    assert "<2.14" in torch_line and ">=2.11" in torch_line, torch_line
    assert "kernels" not in names  # not needed, only to be left in peace


def test_the_distribution_owns_no_top_level_kernels_or_model():
    top_level = importlib.metadata.distribution("halny").read_text("top_level.txt")
    assert top_level.split() == ["halny"]


def test_the_image_is_built_of_what_this_repository_has_and_asks_for():
    """bench/slurm/halny.def, as far as that can be told without Apptainer."""
    text = (ROOT / "bench/slurm/halny.def").read_text()
    header, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert re.search(r"^Bootstrap: docker\nFrom: \S+:\S+$", header, re.MULTILINE)
    assert list(sections) == ["labels", "help", "files", "post", "environment", "runscript", "test"]
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections[name], text=True, check=True)  # which Apptainer runs them with

    files = dict(line.split() for line in sections["files"].splitlines() if line.strip())
    assert files == {
        name: f"/opt/halny/{name}" for name in ("setup.py", "pyproject.toml", "kernels", "model", "train.py")
    }
    assert all((ROOT / name).exists() for name in files)

    requires = importlib.metadata.requires("halny")
    lowest, end = re.search(r'"torch>=([\d.]+),<([\d.]+)"', sections["post"]).groups()
    (ours,) = (line for line in requires if re.match(r"torch\b", line))
    assert f"<{end}" in ours and int(lowest[2:]) >= int(re.search(r">=2\.(\d+)", ours)[1])
    extras = re.search(r'"/opt/halny\[(.*)\]"', sections["post"])[1].split(",")
    assert set(extras) <= set(importlib.metadata.metadata("halny").get_all("Provides-Extra"))
    program = sections["test"].split('python -c "')[1].rpartition('"')[0]
    compile(program, "halny.def", "exec")
