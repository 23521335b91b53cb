"""--merge: the very tokens of all inputs prepared at once, and a refusal of what is not alike or not whole."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from halny.model import prepare_data
from halny.model.data import merge as merging
from halny.model.data import tokenizer
from halny.model.data.dataset import DataError, Dataset
from halny.model.data.merge import merge
from halny.model.data.writer import write_dataset
from halny.model.prepare_data import prepare

OPTIONS = {"val_fraction": 0.2, "shard_tokens": 300, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """a, b and c, the latter of a single document, all of Mistral's tokenizer; their inputs beside them."""
    root, rng = tmp_path_factory.mktemp("merge"), random.Random(0)
    made = tokenizer.mistral_tokenizer()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizer, "mistral_tokenizer", lambda: made)
        for name, n in (("a", 150), ("b", 80), ("c", 1)):
            lines = [json.dumps({"text": f"{name} " + " ".join(str(rng.random()) for _ in range(rng.randint(1, 9)))})]
            lines += [json.dumps({"text": f"{name} {i} {rng.random()}"}) for i in range(n - 1)]
            (root / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": ""}', "not JSON"]))
            prepare([root / f"{name}.jsonl"], root / name, **OPTIONS)
        prepare([root / "a.jsonl", root / "b.jsonl"], root / "both", **OPTIONS)
        prepare([root / "a.jsonl"], root / "no-eos", eos=False, **OPTIONS)
    return root


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("chunk", [1, 150, 10**6])
def test_merged_are_as_prepared_at_once(folders, tmp_path, monkeypatch, capsys, chunk):
    monkeypatch.setattr(merging, "CHUNK", chunk)
    arguments = ["--merge", folders / "a", folders / "b", "--out", tmp_path / "out", "--shard-tokens", 300]
    assert prepare_data.main([str(argument) for argument in arguments]) == 0
    merged, both = contents(tmp_path / "out"), contents(folders / "both")
    manifest, expected = (json.loads(files.pop("manifest.json")) for files in (merged, both))
    assert merged == both and len(merged) > 20
    settings = expected.pop("settings")
    assert manifest.pop("settings") == {"merged": [settings, settings], "shard_tokens": 300}
    assert manifest == expected and manifest["input"]["skipped"] == {"empty": 2, "not JSON": 2}
    documents = f"230 documents ({expected['splits']['val']['documents']} held out)"
    assert documents in capsys.readouterr().err
    assert prepare_data.main(["--check", str(tmp_path / "out")]) == 0


def test_a_merge_of_merges_keeps_counts(folders, tmp_path):
    """c is one document cut in two."""
    merge([folders / "a", folders / "c"], tmp_path / "ac", progress=False)
    merge([folders / "b", tmp_path / "ac"], tmp_path / "out", progress=False)
    manifest = Dataset(tmp_path / "out").manifest
    assert manifest["input"] == {
        "documents": 231 + 6,
        "dropped": {},
        "skipped": {"empty": 3, "not JSON": 3},
        "cut": 1,
    }
    assert [source["name"] for source in manifest["sources"]] == ["b.jsonl", "a.jsonl", "c.jsonl"]
    for what in ("documents", "tokens"):
        total = sum(source[what] for source in manifest["sources"])
        assert total == sum(split[what] for split in manifest["splits"].values())
    assert len(list((tmp_path / "out").glob("train-?????.npy"))) == 1


def test_folders_without_a_tokenizer(tmp_path):
    for name, vocab_size in (("a", 9), ("b", 9), ("c", 10)):
        write_dataset([np.arange(5), np.arange(3)], tmp_path / name, vocab_size=vocab_size)
    merge([tmp_path / "b", tmp_path / "a"], tmp_path / "out", progress=False)
    data = Dataset(tmp_path / "out")
    assert data.split("train").read(0, 16).tolist() == 2 * [0, 1, 2, 3, 4, 0, 1, 2] and data.tokenizer is None
    assert data.manifest["sources"] == [{"name": name, "documents": 2, "tokens": 8} for name in "ba"]
    with pytest.raises(DataError, match="the vocabulary is 9 in the first and 10 in the second"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "no", progress=False)


def test_what_is_not_alike_or_not_whole_is_refused_and_nothing_is_written(folders, tmp_path):
    def copy(name: str, change) -> Path:
        shutil.copytree(folders / "b", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def other_tokenizer(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["tokenizer"]["sha256"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def flip(folder: Path) -> None:
        raw = bytearray((folder / "val-00000.npy").read_bytes())
        raw[-1] ^= 1
        (folder / "val-00000.npy").write_bytes(raw)

    a, unknown = folders / "a", tmp_path / "unknown"
    write_dataset([np.arange(5)], unknown, vocab_size=32000)
    cases = [
        ([a], "names one folder only"),
        ([a, folders / "b", folders / "x" / ".." / "a"], "one twice"),
        ([a, tmp_path / "nowhere"], "nowhere is no data folder"),
        ([a, copy("other", other_tokenizer)], "the tokenizer is mistral-v0.1 .* in the first and .*000000000000"),
        ([a, folders / "b", unknown], "unknown in the second"),
        ([a, folders / "no-eos"], "eos_id of each document is 2 in the first and none in the second"),
        ([a, copy("flipped", flip)], "flipped/val-00000.npy: its SHA-256 is not"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for named, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            merge(named, tmp_path / "new" / "out", progress=False)
        assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_flags_that_merging_cannot_follow(folders, tmp_path, capsys):
    for flags, named in (
        (["--dedup"], "without --dedup"),
        (["--val-fraction", "0.1"], "without --val-fraction"),
        (["--no-eos"], "without --eos"),
    ):
        given = ["--merge", str(folders / "a"), str(folders / "b"), "--out", str(tmp_path / "out"), *flags]
        with pytest.raises(SystemExit, match="2"):
            prepare_data.main(given)
        assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
