"""The data folder: written to the byte, read across shards, every damage found by name; raw .bin files; --check."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from halny.model.data import check, dataset, writer
from halny.model.data.dataset import DataError, Dataset, is_dataset, open_dataset
from halny.model.data.writer import Writer, write_dataset

# --- writing ----------------------------------------------------------------------------------------------------------


def test_writes_only_whole_documents_a_shard(tmp_path):
    lengths = [3, 4, 3, 1, 25, 2, 10, 0, 1]
    write_dataset((np.arange(n) for n in lengths), tmp_path / "d", vocab_size=300, shard_tokens=10)
    shards = [np.load(file).tolist() for file in sorted((tmp_path / "d").glob("train-*.documents.npy"))]
    assert shards == [[3, 7, 10], [1], [25], [2], [10], [1]]
    assert Dataset(tmp_path / "d").manifest["input"] == {"documents": 9, "skipped": {"empty": 1}}


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32), (2**32, np.uint32)])
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    ids = np.array([0, 32767, 32768, 65535, vocab_size - 1])
    write_dataset([ids], tmp_path / "d", vocab_size=vocab_size, val_documents=[ids[::-1]])
    assert np.load(tmp_path / "d/train-00000.npy").dtype == dtype
    data = Dataset(tmp_path / "d")
    assert data.split("train").read(0, 5).tolist() == ids.tolist() and data.tokenizer is None
    assert data.split("val").read(0, 5).tolist() == ids[::-1].tolist() and data.split("val").n_documents == 1


@pytest.mark.parametrize(
    "document", [[0, 300], [-1], [0.5], [[1, 2]], 7], ids=["past the vocabulary", "negative", "float", "2-D", "0-D"]
)
def test_refuses_ids_that_are_none(tmp_path, document):
    with pytest.raises(DataError, match=r"vocabulary of 300|1-D array of integers"):
        write_dataset([np.arange(5), np.array(document)], tmp_path / "d", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


# --- reading ----------------------------------------------------------------------------------------------------------


def test_read_crosses_shards(tmp_path):
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 500, size=rng.integers(1, 40)) for _ in range(200)]
    write_dataset(docs, tmp_path / "d", vocab_size=500, shard_tokens=50)
    stream, whole = Dataset(tmp_path / "d").split("train"), np.concatenate(docs)
    assert len(stream) == len(whole) and stream.n_documents == 200 and len(list((tmp_path / "d").iterdir())) > 50
    assert all(isinstance(shard.tokens[:], np.memmap) and shard.ends.dtype == np.int64 for shard in stream.shards)
    again = [ids for shard in stream.shards for ids in np.split(shard.tokens, shard.ends)[:-1]]
    assert len(again) == 200 and all(np.array_equal(ids, doc) for ids, doc in zip(again, docs, strict=True))
    borders = np.cumsum([0] + [len(np.load(file)) for file in sorted((tmp_path / "d").glob("train-?????.npy"))])
    starts = [*borders[:-1], *(borders[1:] - 1), *rng.integers(0, len(whole), size=500)]
    for start in map(int, starts):
        for length in (0, 1, int(rng.integers(0, len(whole) - start + 1)), len(whole) - start):
            part = stream.read(start, min(length, len(whole) - start))
            assert part.dtype == np.int64 and np.array_equal(part, whole[start : start + len(part)])
    assert len(stream.read(len(whole), 0)) == 0
    for start, length in ((-1, 1), (0, -1), (0, len(whole) + 1), (len(whole), 1)):
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_fingerprint_follows_every_token(tmp_path):
    docs = [np.arange(10), np.arange(20)]
    changed = [docs[0], np.arange(20)[::-1]]
    prints = set()
    for name, (train, val) in {"a": (docs, ()), "b": (changed, ()), "c": (docs, docs), "d": (docs[::-1], ())}.items():
        write_dataset(train, tmp_path / name, vocab_size=100, val_documents=val)
        prints.add(Dataset(tmp_path / name).fingerprint)
    write_dataset(docs, tmp_path / "e", vocab_size=101)
    assert len(prints | {Dataset(tmp_path / "e").fingerprint}) == 5


def edit_manifest(change):
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def replace(name: str, content: bytes | np.ndarray):
    """The file's content, of whatever length; the manifest is told the size, so that the file itself must be caught."""

    def damage(folder: Path) -> None:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            np.save(folder / name, content)
        manifest = json.loads((folder / "manifest.json").read_text())
        shard = manifest["splits"]["train"]["files"][0]
        record = shard["boundaries"] if "documents" in name else shard
        record["bytes"] = (folder / name).stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.arange(30, dtype=np.uint16))
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}] * 30, dtype=object), allow_pickle=True)
    return buffer.getvalue()


def shard_of(manifest: dict) -> dict:
    return manifest["splits"]["train"]["files"][0]


SHARD, ENDS = "train-00000.npy", "train-00000.documents.npy"
DAMAGE = {
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    "manifest cut": (lambda d: (d / "manifest.json").write_text('{"format": '), "manifest.json"),
    "manifest not UTF-8": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json"),
    "manifest a list": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json"),
    "manifest nested": (lambda d: (d / "manifest.json").write_text("[" * 100000), "manifest.json"),
    "other version": (edit_manifest(lambda m: m.update(version=99)), "version 99"),
    "other format": (edit_manifest(lambda m: m.update(format="x")), "manifest.json"),
    "no splits": (edit_manifest(lambda m: m.pop("splits")), "'splits'"),
    "no val": (edit_manifest(lambda m: m["splits"].pop("val")), "'val'"),
    "no vocabulary": (edit_manifest(lambda m: m.pop("vocab_size")), "'vocab_size'"),
    "vocabulary a string": (edit_manifest(lambda m: m.update(vocab_size="100")), "vocab_size"),
    "vocabulary past dtype": (edit_manifest(lambda m: m.update(vocab_size=70000)), "uint16"),
    "unknown dtype": (edit_manifest(lambda m: m.update(dtype="object")), "object"),
    "name escapes": (edit_manifest(lambda m: shard_of(m).update(name="../../etc/passwd")), "passwd"),
    "name absolute": (edit_manifest(lambda m: shard_of(m).update(name="/etc/passwd")), "passwd"),
    "name a number": (edit_manifest(lambda m: shard_of(m).update(name=3)), "3"),
    "ends elsewhere": (edit_manifest(lambda m: shard_of(m)["boundaries"].update(name="../x")), "x"),
    "no size": (edit_manifest(lambda m: shard_of(m).pop("bytes")), "'bytes'"),
    "no tokens": (edit_manifest(lambda m: shard_of(m).update(tokens=0)), "tokens"),
    "total tokens": (edit_manifest(lambda m: m["splits"]["train"].update(tokens=31)), "31"),
    "total documents": (edit_manifest(lambda m: m["splits"]["train"].update(documents=3)), "3"),
    "a source without a name": (edit_manifest(lambda m: m.update(sources=[{"documents": 1, "tokens": 3}])), "'name'"),
    "counts of the input": (edit_manifest(lambda m: m["input"].update(skipped={"empty": -1})), "empty"),
    "shard tokens": (edit_manifest(lambda m: shard_of(m).update(tokens=29)), SHARD),
    "shard missing": (lambda d: (d / SHARD).unlink(), SHARD),
    "shard cut": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 2), SHARD),
    "shard empty": (lambda d: (d / SHARD).write_bytes(b""), SHARD),
    "shard empty and known": (replace(SHARD, b""), SHARD),
    "shard cut and known": (replace(SHARD, b"\x93NUMPY"), SHARD),
    "shard no npy": (replace(SHARD, b"some other file altogether"), SHARD),
    "shard signed": (replace(SHARD, np.zeros(30, np.int16)), SHARD),
    "shard big-endian": (replace(SHARD, np.zeros(30, ">u2")), SHARD),
    "shard 2-D": (replace(SHARD, np.zeros((30, 1), np.uint16)), SHARD),
    "shard an archive": (replace(SHARD, archive()), SHARD),
    "shard a pickle": (replace(SHARD, pickled()), SHARD),
    "ends missing": (lambda d: (d / ENDS).unlink(), ENDS),
    "ends off": (replace(ENDS, np.array([10, 29])), ENDS),
    "ends of another type": (replace(ENDS, np.array([10, 30], np.int32)), ENDS),
    "tokenizer missing": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer.json"),
    "tokenizer cut": (lambda d: os.truncate(d / "tokenizer/tokenizer.json", 5), "tokenizer.json"),
    "tokenizer elsewhere": (edit_manifest(lambda m: m["tokenizer"]["files"][0].update(name="../../x")), "../../x"),
}


@pytest.fixture
def small(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text('{"any": "thing"}')
    out = tmp_path / "data"
    write_dataset([np.arange(10), np.arange(20)], out, vocab_size=100, tokenizer=tmp_path / "tok")
    return out


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_on_opening(small, what):
    Dataset(small)
    damage, named = DAMAGE[what]
    damage(small)
    with pytest.raises(DataError) as caught:
        Dataset(small)
    message = str(caught.value)
    assert named in message and "prepare it again" in message and "\n" not in message and str(small) in message


def test_verify_finds_changed_content(small):
    Dataset(small).verify()
    for name in (SHARD, ENDS, "tokenizer/tokenizer.json"):
        content = (small / name).read_bytes()
        flipped = bytearray(content)
        flipped[-10 if name == ENDS else -1] ^= 1
        (small / name).write_bytes(flipped)
        with pytest.raises(DataError, match="SHA-256"):
            Dataset(small).verify()
        (small / name).write_bytes(content)


def test_is_dataset(small, tmp_path):
    assert is_dataset(small) and not is_dataset(tmp_path) and not is_dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="train and val"):
        Dataset(small).split("test")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "sync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_dataset([np.arange(5)], tmp_path / "out", vocab_size=9)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_may_be_moved(tmp_path):
    write_dataset([np.arange(5)], tmp_path / "out", vocab_size=9)
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    assert Dataset(Path(os.path.relpath(moved))).split("train").read(0, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_block_of_documents_is_written_as_they_would_be_one_by_one(tmp_path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, size=300)
    ids = rng.integers(0, 500, size=lengths.sum()).astype(np.uint16)
    write_dataset(np.split(ids, np.cumsum(lengths)[:-1]), tmp_path / "one", vocab_size=500, shard_tokens=50)
    (tmp_path / "block").mkdir()
    with Writer(tmp_path / "block", 500, 50) as writer:
        for part in np.split(np.arange(300), [1, 7, 200]):
            begin = lengths[: part[0]].sum()
            writer.add("train", ids[begin : begin + lengths[part].sum()], lengths[part])
        with pytest.raises(DataError, match="document 302: token id 500"):
            writer.add("val", np.array([1, 2, 3, 500]), np.array([1, 1, 2]))
        writer.finish(None, {}, {"bos_id": None, "eos_id": None}, {})
    one, block = (Dataset(tmp_path / name) for name in ("one", "block"))
    assert one.manifest["splits"] == block.manifest["splits"] and one.fingerprint == block.fingerprint


# --- raw .bin files ---------------------------------------------------------------------------------------------------


def llm_c(path: Path, tokens: np.ndarray, magic: int, version: int) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def test_raw_files(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) + 32000
    tokens.tofile(tmp_path / "train.bin")
    tokens[:100].tofile(tmp_path / "val.bin")
    data = open_dataset(tmp_path, dtype="uint16", vocab_size=33000)
    data.verify()
    assert data.vocab_size == 33000 and data.tokenizer is None
    assert len(data.split("train")) == 1000 and data.split("val").read(5, 3).tolist() == [32005, 32006, 32007]
    alone = open_dataset(tmp_path / "train.bin", dtype="uint16")
    assert len(alone.split("val")) == 0 and alone.vocab_size == 65536 and alone.fingerprint != data.fingerprint
    gpt2 = open_dataset(llm_c(tmp_path / "gpt2.bin", tokens, 20240520, 1))
    llama = open_dataset(llm_c(tmp_path / "llama.bin", tokens.astype(np.uint32) * 2, 20240801, 7))
    assert gpt2.split("train").read(0, 1000).tolist() == tokens.tolist() and gpt2.dtype == np.uint16
    assert llama.split("train").read(999, 1).tolist() == [65998] and llama.split("train").n_documents == 1
    before = data.fingerprint
    tokens[500] = 1
    tokens.tofile(tmp_path / "train.bin")
    assert open_dataset(tmp_path, dtype="uint16").fingerprint != before
    write_dataset([tokens], tmp_path / "folder", vocab_size=33000)
    assert isinstance(open_dataset(tmp_path / "folder"), Dataset)


@pytest.fixture
def fineweb(tmp_path):
    """Three files to train on and one held out, as llm.c writes them: tokens 0 to 99."""
    kinds, parts = ("val", "train", "train", "train"), np.split(np.arange(100, dtype=np.uint16), [10, 20, 50])
    for i, (kind, tokens) in enumerate(zip(kinds, parts, strict=True)):
        llm_c(tmp_path / f"edu_fineweb_{kind}_{i:06d}.bin", tokens, 20240520, 1)
    return tmp_path


def test_many_raw_files_are_one_source(fineweb, monkeypatch):
    files = sorted(fineweb.glob("*_train_*"))
    of_folder, of_pattern = open_dataset(fineweb), open_dataset(fineweb / "*.bin")
    of_training, of_list = open_dataset(fineweb / "*_train_*.bin"), open_dataset(files[::-1])
    for data in (of_folder, of_pattern, of_training, of_list):
        data.verify()
        tokens = data.split("train")
        assert tokens.read(0, len(tokens)).tolist() == list(range(10, 100)) and tokens.n_documents == 3
    assert of_folder.split("val").read(0, 10).tolist() == list(range(10)) and not len(of_list.split("val"))
    assert of_folder.fingerprint == of_pattern.fingerprint != of_list.fingerprint == of_training.fingerprint
    held_out = open_dataset(fineweb / "*_val_*.bin")  # nothing to hold out from: an evaluation of its own
    assert held_out.split("train").read(0, 10).tolist() == list(range(10))
    assert not check.check(fineweb, vocab_size=60)
    with pytest.raises(DataError, match=r"train_000003\.bin: id 99 at token 49 is outside the vocabulary of 60"):
        open_dataset(fineweb, vocab_size=60).verify()
    hashes = dataset.hash_files(of_folder.files)
    monkeypatch.setattr(dataset, "sha256", None)
    assert open_dataset(fineweb, hashes=hashes).fingerprint == of_folder.fingerprint


def test_one_raw_file_has_the_fingerprint_that_it_always_had(tmp_path):
    """A run that began before there could be several must go on."""
    content = np.arange(9, dtype=np.uint16).tobytes()
    (tmp_path / "train.bin").write_bytes(content)
    identity = ["uint16", hashlib.sha256(content).hexdigest()]
    alone = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    assert open_dataset(tmp_path / "train.bin", "uint16").fingerprint == alone
    (tmp_path / "val.bin").write_bytes(content)
    (tmp_path / "test.bin").write_bytes(content)  # nobody's
    both = hashlib.sha256(json.dumps([*identity, identity[1]]).encode()).hexdigest()
    assert open_dataset(tmp_path, "uint16").fingerprint == both


def test_raw_files_that_do_not_go_together_are_refused(fineweb):
    first, *_, last = sorted(fineweb.glob("*.bin"))
    for files, named in {
        (first, last, first): f"{first} is named twice",
        (fineweb / "*_test_*.bin",): "_test_",
        (first, last, llm_c(fineweb / "more.bin", np.arange(5, dtype=np.uint16), 20240520, 1)): "more.bin: neither",
        (first, llm_c(fineweb / "val.bin", np.arange(5, dtype=np.uint32), 20240801, 7)): "uint32; they must be alike",
    }.items():
        with pytest.raises(DataError, match=re.escape(named)):
            open_dataset(list(files) if len(files) > 1 else files[0])


def test_raw_files_are_verified_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 10)
    tokens = np.arange(100, dtype=np.uint32)
    tokens[57] = 100_000
    tokens.tofile(tmp_path / "t.bin")
    data = open_dataset(tmp_path / "t.bin", "uint32", 100)
    failed = []
    for part in range(3):
        try:
            data.verify(part, 3)
        except DataError as error:
            failed.append((part, str(error)))
    assert len(failed) == 1 and failed[0][0] == 2 and "id 100000 at token 57" in failed[0][1]


def test_raw_refusals(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "t.bin")
    (tmp_path / "odd.bin").write_bytes(b"x" * 21)
    (tmp_path / "empty.bin").write_bytes(b"")
    cut = llm_c(tmp_path / "cut.bin", np.arange(10, dtype=np.uint16), 20240520, 1)
    os.truncate(cut, cut.stat().st_size - 2)
    write_dataset([np.arange(5)], tmp_path / "folder", vocab_size=9)
    for arguments, named in {
        ("t.bin",): "--dtype uint16 or uint32",
        ("t.bin", "int64"): "int64",
        ("t.bin", "uint16", 70000): "70000",
        ("odd.bin", "uint16"): "21 bytes",
        ("empty.bin", "uint16"): "no tokens",
        ("cut.bin",): "10 tokens",
        ("cut.bin", "uint32"): "header of llm.c",
        ("nowhere.bin", "uint16"): "nowhere.bin",
        ("folder", "uint16"): "only raw .bin files",
        ("nowhere",): "no data folder",
    }.items():
        with pytest.raises(DataError) as caught:
            open_dataset(tmp_path / arguments[0], *arguments[1:])
        assert named in str(caught.value) and arguments[0] in str(caught.value) and "\n" not in str(caught.value)


# --- --check ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """A clean folder of documents 1 ... 2 in two shards a split, and --check with chunks that cut documents."""
    monkeypatch.setattr(check, "CHUNK", 7)
    monkeypatch.setattr(check, "GIANT_TOKENS", 40)
    rng = np.random.default_rng(0)
    docs = [[1, *rng.integers(3, 100, size=n), 2] for n in (5, 30, 1, 12, 8, 30, 1)]
    write_dataset(docs[:5], tmp_path / "d", vocab_size=100, val_documents=docs[5:], shard_tokens=50)
    edit_manifest(lambda m: m.update(document={"bos_id": 1, "eos_id": 2}))(tmp_path / "d")
    return tmp_path / "d"


def rewrite(folder: Path, name: str, change) -> None:
    """Changes tokens of a shard and its checksum too, as a program would that writes such a folder."""
    tokens = np.load(folder / name)
    change(tokens)
    np.save(folder / name, tokens)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["files"]:
            for record in (shard, shard["boundaries"]):
                record["sha256"] = dataset.sha256(folder / record["name"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def put(at: int, *values: int):
    def change(tokens: np.ndarray) -> None:
        tokens[at : at + len(values)] = values

    return change


FAULTS = {  # name of the file, what to do to it, and the findings with their counts and first places
    "past the vocabulary": (
        "train-00001.npy",
        put(10, 100, 65535),
        ["ids past the vocabulary: 2", "id 100 at token 10"],
    ),
    "doubled BOS": ("train-00000.npy", put(1, 1), ["doubled BOS: 1", "token 1 of train-00000"]),
    "doubled BOS over chunks": ("train-00000.npy", put(13, 1, 1), ["doubled BOS: 1", "token 14 of"]),
    "doubled EOS": ("val-00000.npy", put(29, 2, 2), ["doubled EOS: 2", "token 30 of val-00000"]),
    "no BOS": ("train-00000.npy", put(7, 50), ["without BOS: 1", "document 1 of train-00000"]),
    "no EOS": ("train-00000.npy", put(6, 50), ["without EOS: 1", "document 0 of train-00000"]),
    "empty": ("train-00000.documents.npy", put(0, 2), ["empty documents: 1", "document 0 of train"]),
    "ends disordered": ("train-00000.documents.npy", put(0, 40), ["out of order: 1", "document 1 of train"]),
    "giant": ("train-00000.documents.npy", put(0, 1, 42), ["giant documents: 1", "document 1 of train"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_each_fault(checked, fault, capsys):
    assert check.check(checked) and "NOT CLEAN" not in capsys.readouterr().out
    name, change, expected = FAULTS[fault]
    rewrite(checked, name, change)
    assert not check.check(checked)
    out = capsys.readouterr().out
    assert all(part in out for part in expected) and "clean      " not in out, out


def test_check_counts_two_separators_once_where_bos_is_eos(checked, capsys):
    rewrite(checked, "train-00000.npy", lambda tokens: np.copyto(tokens, 2, where=tokens == 1))
    edit_manifest(lambda m: m.update(document={"bos_id": 2, "eos_id": 2}))(checked)
    assert not check.check(checked)
    out = capsys.readouterr().out
    assert "doubled BOS, which is EOS: 2; the first: token 7 of train-00000.npy" in out and "doubled EOS" not in out


def test_check_finds_changed_and_truncated_files(checked, capsys):
    shard = checked / "train-00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not check.check(checked)
    assert "checksum says: 1" in (out := capsys.readouterr().out) and str(shard) in out
    os.truncate(shard, len(content) - 2)
    with pytest.raises(DataError, match="cut short"):
        check.check(checked)


def test_check_says_what_is_in_it(checked, tmp_path, capsys):
    assert check.check(checked, tokens_per_second=0.001)
    out = capsys.readouterr().out
    assert "5 documents, 66 tokens, 13.2 tokens each" in out and "2 documents, 35 tokens" in out
    histogram = {line.split()[0]: int(line.split()[3]) for line in out.splitlines() if line.endswith("#")}
    assert histogram == {"2": 2, "4": 1, "8": 2, "32": 2}
    assert "an epoch: 66 tokens, 0.76 days at 0.001 tokens/s" in out and out.count("  token ") == 4
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "t.bin")
    assert check.check(tmp_path / "t.bin", dtype="uint16", vocab_size=1000)
    assert not check.check(tmp_path / "t.bin", dtype="uint16", vocab_size=999)
    assert "ids past the vocabulary: 1; the first: id 999 at token 999" in capsys.readouterr().out


def test_check_exit_codes(checked):
    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "halny.model.prepare_data", "--check", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    assert (ran := run(checked)).returncode == 0 and ran.stderr == "" and f"clean      {checked}" in ran.stdout
    rewrite(checked, "train-00000.npy", put(1, 1))
    assert (ran := run(checked)).returncode == 1 and "NOT CLEAN  doubled BOS: 1" in ran.stdout
    assert (ran := run(checked / "nowhere")).returncode == 2 and ran.stderr.count("\n") == 1 and ran.stdout == ""
    assert run(checked, "--out", "x").returncode == 2
