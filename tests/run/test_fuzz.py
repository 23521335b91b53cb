"""Files that nobody wrote as they are: each is refused with a clear error, never a crash, a hang, or silent acceptance.

Text formats are fuzzed by hypothesis (JSON of every shape, and valid files with a few bytes changed); binary ones by
changing bytes of a sound file. Checksums are forged where there are any, so that what lies behind them is reached.
"""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import SMALL, ranks_run

import train
from halny.model.convert import check_hf_weights, load_hf, save_hf
from halny.model.data.dataset import DataError, Dataset
from halny.model.exits import REFUSED, Refused
from halny.model.mistral import PRESETS, Mistral
from halny.model.record.run_folder import RunFolder
from halny.model.run import checkpoint as checkpoints
from halny.model.run.recipe import SETTINGS, read_toml

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def changed_bytes(draw, content: bytes) -> bytes:
    """The content with some bytes overwritten, cut off, or repeated."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["overwrite", "cut", "repeat"]))
        if kind == "overwrite":
            content[at : at + 1] = draw(st.binary(max_size=3))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
    return bytes(content)


@st.composite
def changed_json(draw, value) -> bytes:
    """Valid JSON, with one of its members, at any depth, replaced by anything or removed."""
    value = json.loads(json.dumps(value))
    parent, key, here = None, None, value
    while isinstance(here, dict | list) and here and draw(st.integers(0, 3)):
        parent = here
        key = draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
        here = parent[key]
    if parent is None:
        value = draw(anything)
    elif draw(st.booleans()):
        parent[key] = draw(anything)
    else:
        del parent[key]
    return json.dumps(value).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    """A sound checkpoint of two steps."""
    cwd = tmp_path_factory.mktemp("saved")
    ranks_run(*SMALL, "--steps", 2, "--save-every", 2, "--data", small, "--run-dir", "r", cwd=cwd)
    return cwd / "r/checkpoints/step-00000002"


def forge(folder: Path, content: bytes) -> None:
    """A manifest with the checksum that belongs to it."""
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.json.sha256").write_bytes(checkpoints.checksum_line(content))


@fuzz
@given(data=st.data())
def test_manifest_of_a_checkpoint(saved, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed" / saved.name
    if not folder.exists():
        shutil.copytree(saved, folder)
    sound = (saved / "manifest.json").read_bytes()
    content = data.draw(st.one_of(changed_bytes(sound), changed_json(json.loads(sound)), st.binary(max_size=60)))
    forge(folder, content)
    problem = checkpoints.damage(folder)
    assert problem is None or (problem and "\n" not in problem)
    if problem is None:  # then everything that identifies the files is as it was
        assert json.loads(content)["files"] == json.loads(sound)["files"] and json.loads(content)["step"] == 2


def test_manifest_deeply_nested_and_strangers_in_the_folder(saved, tmp_path):
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    forge(folder, DEEP)
    assert "manifest.json is not one" in checkpoints.damage(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")  # to read it would be to wait for ever
    assert "manifest.json cannot be read" in checkpoints.damage(folder)
    (folder / "manifest.json").unlink()
    forge(folder, (saved / "manifest.json").read_bytes())
    assert checkpoints.damage(folder) is None
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)  # to read it would be to wait for ever
    assert "files missing" in checkpoints.damage(folder)
    shard.unlink()
    shard.mkdir()
    assert "files missing" in checkpoints.damage(folder)


@pytest.mark.parametrize("key", ["updates", "losses", "skips"])
def test_manifest_without_what_a_resume_needs(small, saved, tmp_path, key):
    shutil.copytree(saved.parent.parent, tmp_path / "r")
    folder = tmp_path / "r/checkpoints" / saved.name
    manifest = json.loads((saved / "manifest.json").read_bytes())
    manifest[key] = "many"
    forge(folder, json.dumps(manifest).encode())
    command = [*SMALL, "--steps", 2, "--save-every", 2, "--data", small, "--run-dir", "r"]
    refused = ranks_run(*command, cwd=tmp_path, codes=[REFUSED])
    assert "does not tell where the run was" in refused.err and refused.err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------- data


@fuzz
@given(data=st.data())
def test_manifest_of_a_data_folder(small, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-data"
    if not folder.exists():
        shutil.copytree(small, folder)
    sound = (small / "manifest.json").read_bytes()
    content = data.draw(st.one_of(changed_bytes(sound), changed_json(json.loads(sound)), st.binary(max_size=60)))
    (folder / "manifest.json").write_bytes(content)
    try:
        dataset = Dataset(folder)
        dataset.verify()
    except DataError as error:
        assert "\n" not in str(error)
    else:  # then it still says of every file what the sound one says
        assert json.loads(content)["splits"] == json.loads(sound)["splits"]
        assert dataset.vocab_size == 256 or json.loads(content)["vocab_size"] != 256


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000.documents.npy"])
def test_token_shards(small, tmp_path, name):
    """Any change of a byte is found, and before it nothing crashes; truncation and growth on opening already."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    shutil.copytree(small, folder)
    sound = (folder / name).read_bytes()
    for i in range(200):
        content = bytearray(sound)
        if i % 4 == 0:
            content = content[: rng.integers(len(content))]
        elif i % 4 == 1:
            content += rng.bytes(rng.integers(1, 50))
        else:
            at = rng.integers(128 if i % 4 == 2 else len(content))  # half of them in the header
            content[at] ^= rng.integers(1, 256)
        (folder / name).write_bytes(content)
        with pytest.raises(DataError):
            Dataset(folder).verify()


# ------------------------------------------------------------------------------------------------- Hugging Face folders


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(Mistral(PRESETS["test"]), folder)
    return folder


def loads_or_refuses(folder: Path) -> None:
    """ValueError in one line, or a model with the tensors it says it has."""
    try:
        check_hf_weights(folder)
        model = load_hf(folder)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(p.numel() for p in model.parameters())


@fuzz
@given(data=st.data())
def test_config_of_a_hugging_face_folder(hugging_face, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-hf"
    if not folder.exists():
        shutil.copytree(hugging_face, folder)
    sound = (hugging_face / "config.json").read_bytes()
    content = data.draw(st.one_of(changed_bytes(sound), changed_json(json.loads(sound)), st.binary(max_size=60)))
    (folder / "config.json").write_bytes(content)
    loads_or_refuses(folder)


@fuzz
@given(data=st.data())
def test_header_of_safetensors(hugging_face, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-weights"
    if not folder.exists():
        shutil.copytree(hugging_face, folder)
    sound = (hugging_face / "model.safetensors").read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header = data.draw(st.one_of(changed_bytes(sound[8 : 8 + length]), changed_json(json.loads(sound[8 : 8 + length]))))
    size = data.draw(st.sampled_from([len(header), length, 0, 2**63]))
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + sound[8 + length :])
    loads_or_refuses(folder)


# ------------------------------------------------------------------------------------------------ run folder and recipe


@fuzz
@given(content=st.one_of(st.binary(max_size=200), anything.map(lambda x: json.dumps(x).encode()), st.just(DEEP)))
def test_files_of_a_run_folder(tmp_path_factory, content):
    folder = RunFolder(tmp_path_factory.getbasetemp() / "fuzzed-run")
    folder.path.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "status.json", "config.json"):
        (folder.path / name).write_bytes(content)
    assert all(isinstance(line["step"], int) for line in folder.lines())
    assert isinstance(folder.state(), str)
    with pytest.raises(Refused, match="is not readable"):
        folder.check_config({"recipe": {"seed": 1}, "model": {}, "data": "x"}, free=())


@fuzz
@given(content=st.one_of(st.binary(max_size=100), st.text(max_size=60).map(str.encode), st.dictionaries(
    st.sampled_from([*SETTINGS, "preset", "sets"]), scalars, max_size=3
).map(lambda table: "\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items()).encode())))  # fmt: skip
def test_recipe_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    try:
        train.Recipe(**read_toml(path))
    except Refused as refusal:
        assert str(refusal)


def test_metrics_survive_a_disk_that_was_full(tmp_path, monkeypatch):
    """A line that was only partly written is taken back, and written whole later."""
    folder, limit = RunFolder(tmp_path), 70
    # pytest's own file would be limited too
    monkeypatch.setattr("halny.model.record.run_folder.tqdm.write", lambda _: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for step in range(1, 6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if step < 5 else before[0], before[1]))
            folder.log({"step": step, "loss": 0.123456789})
            if step < 5:
                assert folder.metrics.stat().st_size <= limit and folder.metrics.read_text().endswith("}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [line["step"] for line in folder.lines()] == [1, 2, 3, 4, 5]
    assert len(folder.metrics.read_text().splitlines()) == 5
