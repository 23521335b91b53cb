"""Text to shards and back: the tokenizer to the id, the folder to the byte, every refusal by its line."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from halny.model import dataset
from halny.model.prepare_data import DataError, Dataset, held_out, is_dataset, prepare, prepare_builtin, write_dataset

POLISH = "Zażółć gęślą jaźń — „Pan Tadeusz”: Litwo! Ojczyzno moja! ty jesteś jak zdrowie."
AWKWARD = [
    POLISH,
    "def f(x):\n    if x:\n\t\treturn  x\n",
    "\n  x",
    "👩‍👩‍👧 🇵🇱 e\u0301 ﬁ ① 中文 \u2028 \u00a0 \ufffd",
    "NUL \0 and bell \a",
    "a\r\nb\r\n",
    "\ufeff not at the start of a file",
    " ",
    "  two before, two after  ",
    "</s>",
    "<s>[INST] <unk> <0x0A> </s>\n<s> x</s>",
    "=" * 77 + "-" * 33 + "." * 19,
    "word" * 50,
]
RUNS = [shape.replace("_", " " * n) for n in range(1, 41) for shape in ("_", "x_y", "\n_def", "x_", "_\n_\t_")]


@pytest.fixture(scope="module")
def sentencepiece():
    import mistral_common
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"))


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "builtin"
    began = time.monotonic()
    prepare_builtin(out)
    assert time.monotonic() - began < 20
    return out


@pytest.fixture
def saved(builtin, monkeypatch):
    """The tokenizer that a data folder carries, as a user of transformers finds it there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin / "tokenizer")


def documents(path: Path, split: str) -> list[np.ndarray]:
    """Read the slow way: whole files, cut at the recorded ends."""
    out = []
    for shard in sorted(path.glob(f"{split}-?????.npy")):
        ends = np.load(shard.with_suffix(".documents.npy"))
        out += np.split(np.load(shard).astype(np.int64), ends[:-1])
    return out


def texts(path: Path) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer/tokenizer.json"))
    out = []
    for split in ("train", "val"):
        for ids in documents(path, split):
            assert ids[0] == 1 and ids[-1] == 2 and not np.isin(ids[1:-1], (0, 1, 2)).any()
            out.append(tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False))
    return out


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_tokenizer_equals_sentencepiece(sentencepiece, saved):
    from pydoc_data.topics import topics

    rng = random.Random(0)
    pieces = [sentencepiece.id_to_piece(i).replace("▁", " ") for i in range(259, 32000)]
    periodic = [("".join(rng.choices(pieces, k=rng.randint(1, 3))) * rng.randint(1, 9))[1:] for _ in range(3000)]
    for text in [*topics.values(), *AWKWARD, *RUNS, *periodic, "", "▁", "a▁b"]:
        expected = sentencepiece.encode(text)
        assert saved(text, split_special_tokens=True).input_ids == [1, *expected], repr(text[:80])
        assert saved.decode(expected) == sentencepiece.decode(expected), repr(text[:80])
    assert len(saved) == sentencepiece.vocab_size() == 32000
    assert (saved.bos_token_id, saved.eos_token_id, saved.unk_token_id) == (1, 2, 0)


def test_tokenizer_survives_saving_a_model_folder_and_pipelines(builtin, saved, tmp_path, sentencepiece):
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, pipeline

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    MistralForCausalLM(MistralConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    shutil.copytree(builtin / "tokenizer", tmp_path, dirs_exist_ok=True)
    generator = pipeline("text-generation", str(tmp_path))
    saved.save_pretrained(tmp_path / "again")
    for tokenizer in (generator.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert tokenizer.is_fast and "Mistral" not in type(tokenizer).__name__
        for text in [POLISH, *RUNS]:
            assert tokenizer(text).input_ids == [1, *sentencepiece.encode(text)]
    assert generator(POLISH, max_new_tokens=2)[0]["generated_text"].startswith(POLISH)


def test_users_tokenizer(tmp_path, saved):
    """A folder of one's own: no BOS, truncation left switched on, a class that transformers rebuilds."""
    source = tmp_path / "mine"
    saved.save_pretrained(source)
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config = {**config, "tokenizer_class": "LlamaTokenizer", "bos_token": None, "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(b"not to be copied")
    (tmp_path / "a.txt").write_text(POLISH, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", source, progress=False)
    expected = saved(POLISH, add_special_tokens=False).input_ids
    assert documents(tmp_path / "out", "train")[0].tolist() == [*expected, 2]
    data = Dataset(tmp_path / "out")
    assert data.manifest["document"] == {"bos_id": None, "eos_id": 2} and data.manifest["tokenizer"]["name"] == "mine"
    assert sorted(file.name for file in data.tokenizer.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert not any(str(tmp_path).encode() in content for content in contents(tmp_path / "out").values())


# --- preparing --------------------------------------------------------------------------------------------------------


def test_builtin(builtin):
    from pydoc_data.topics import topics

    data = Dataset(builtin)
    data.verify()
    train, val = data.split("train"), data.split("val")
    assert len(train) > 100_000 and len(val) > 1000 and train.n_documents + val.n_documents == len(topics)
    assert sorted(texts(builtin)) == sorted(topics.values())
    assert "pydoc_data.topics" in data.manifest["settings"]["source"] and data.vocab_size == 32000
    ends = np.concatenate([np.load(builtin / f"{split}-00000.documents.npy") for split in ("train", "val")])
    assert ends[train.n_documents - 1] == len(train) and ends[-1] == len(val)


def test_formats_and_round_trip(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "b" / "deep").mkdir(parents=True)
    (corpus / ".hidden").mkdir()
    expected = []
    for i, text in enumerate(AWKWARD):
        (corpus / "b" / f"{i:02d}.txt").write_bytes(text.encode())
        expected.append(text.removeprefix("\ufeff"))
    (corpus / "b" / "deep" / "bom.TXT").write_bytes(b"\xef\xbb\xbfwith a mark\r\n")
    (corpus / "b" / "empty.txt").write_bytes(b"")
    (corpus / "b" / "README.md").write_text("ignored")
    (corpus / ".hidden" / "x.txt").write_text("ignored")
    jsonl(corpus / "c.jsonl", [{"text": text, "quality": 1} for text in (*AWKWARD, "")])
    with open(corpus / "c.jsonl", "ab") as file:
        file.write(b'\n   \r\n{"text": "escaped \\u0142\\ud83d\\udc69 \\u0000"}')  # blank lines, no newline at the end
    extra = tmp_path / "a.jsonl"
    extra.write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n')
    prepare([extra, corpus], tmp_path / "out", val_fraction=0, shard_tokens=64, progress=False)
    prepared = texts(tmp_path / "out")
    expected = ["first", *expected, "with a mark\r\n", *AWKWARD, "escaped ł👩 \0"]
    assert prepared == expected
    data = Dataset(tmp_path / "out")
    data.verify()
    assert data.manifest["empty_documents_skipped"] == 2 and len(data.split("val")) == 0


def test_identical_folders_for_identical_input(tmp_path):
    rng = random.Random(1)
    words = [POLISH[i : i + 5] for i in range(len(POLISH) - 5)]
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        rng.seed(1)
        jsonl(tmp_path / place / "x.jsonl", [{"t": "".join(rng.choices(words, k=20))} for _ in range(300)])
        prepare([tmp_path / place], tmp_path / place / "out", text_key="t", val_fraction=0.1, progress=False)
    first, second = (contents(tmp_path / place / "out") for place in ("one", "two"))
    assert first == second and "manifest.json" in first
    assert not any(str(tmp_path).encode() in content for content in first.values())
    assert Dataset(tmp_path / "one/out").fingerprint == Dataset(tmp_path / "two/out").fingerprint


def test_held_out_documents_depend_on_their_text_alone(tmp_path):
    rng = random.Random(2)
    lines = [{"text": f"document {rng.random()}"} for _ in range(400)]
    for name, records in {"all": lines, "shuffled": rng.sample(lines, 400), "half": lines[:200]}.items():
        prepare([jsonl(tmp_path / f"{name}.jsonl", records)], tmp_path / name, val_fraction=0.2, progress=False)
    train, val = ({name: set() for name in ("all", "shuffled", "half")} for _ in range(2))
    for name in train:
        train[name] = {tuple(ids) for ids in documents(tmp_path / name, "train")}
        val[name] = {tuple(ids) for ids in documents(tmp_path / name, "val")}
    assert train["all"] == train["shuffled"] and val["all"] == val["shuffled"]
    assert train["half"] < train["all"] and val["half"] < val["all"]
    assert len(val["all"]) == sum(held_out(line["text"], 0.2) for line in lines) and 40 < len(val["all"]) < 130


def test_writes_only_whole_documents_a_shard(tmp_path):
    lengths = [3, 4, 3, 1, 25, 2, 10, 0, 1]
    write_dataset((np.arange(n) for n in lengths), tmp_path / "d", vocab_size=300, shard_tokens=10)
    shards = [np.load(file).tolist() for file in sorted((tmp_path / "d").glob("train-*.documents.npy"))]
    assert shards == [[3, 7, 10], [1], [25], [2], [10], [1]]
    assert Dataset(tmp_path / "d").manifest["empty_documents_skipped"] == 1


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
    assert all(isinstance(shard.tokens, np.memmap) and shard.ends.dtype == np.int64 for shard in stream.shards)
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


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals(tmp_path: Path) -> dict[str, tuple[list, dict, list[str]]]:
    """name -> (inputs, options of prepare, what the line must hold)"""
    good, folder, empty = tmp_path / "good.txt", tmp_path / "folder", tmp_path / "empty"
    good.write_text("good text")
    folder.mkdir()
    empty.mkdir()
    (folder / "a.md").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nza\xbf\xf3\xb3\xe6")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xbf"}\n')
    (tmp_path / "utf16.txt").write_text("x", encoding="utf-16")
    for name, line in {
        "torn": '{"text": "x',
        "list": '["text"]',
        "other": '{"body": "x", "url": "y"}',
        "number": '{"text": 3}',
        "null": '{"text": null}',
        "lone": '{"text": "a \\ud800 b"}',
        "deep": "[" * 100000,
    }.items():
        (tmp_path / f"{name}.jsonl").write_text('{"text": "first line"}\n\n' + line + "\n")
    (tmp_path / "no-json").mkdir()
    (tmp_path / "no-json" / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "bad-json").mkdir()
    (tmp_path / "bad-json" / "tokenizer.json").write_text('{"version": "1.0"')
    at = {name: tmp_path / name for name in ("torn", "list", "other", "number", "null", "lone", "deep")}
    lines = {name: ([path.with_suffix(".jsonl")], {}, [f"{name}.jsonl:3:"]) for name, path in at.items()}
    lines["other"][2].extend(["'body'", "--text-key"])
    return {
        **lines,
        "no input": ([], {}, ["name some"]),
        "missing": ([good, tmp_path / "nowhere.txt"], {}, ["nowhere.txt", "no such"]),
        "ending": ([folder / "a.md"], {}, ["a.md", ".jsonl"]),
        "no ending": ([tmp_path / "full" / "x"], {}, ["full/x", ".jsonl"]),
        "nothing in folder": ([folder], {}, ["folder", ".txt"]),
        "only empty": ([tmp_path / "blank.txt", tmp_path / "blank.jsonl"], {}, ["no documents"]),
        "twice": ([good, tmp_path], {}, ["good.txt", "twice"]),
        "not UTF-8": ([good, tmp_path / "latin.txt"], {}, ["latin.txt:3:", "0xbf", "UTF-8"]),
        "not UTF-8 line": ([tmp_path / "latin.jsonl"], {}, ["latin.jsonl:2:", "UTF-8"]),
        "UTF-16": ([tmp_path / "utf16.txt"], {}, ["utf16.txt:1:", "UTF-8"]),
        "out taken": ([good], {"out": tmp_path / "full"}, ["full", "not empty"]),
        "out a file": ([good], {"out": good}, ["good.txt", "not a folder"]),
        "out under a file": ([good], {"out": good / "a" / "b"}, ["good.txt", "another place"]),
        "tokenizer missing": ([good], {"tokenizer": tmp_path / "nowhere"}, ["nowhere", "mistral-v0.1"]),
        "tokenizer slow": ([good], {"tokenizer": tmp_path / "no-json"}, ["no-json", "tokenizer.json"]),
        "tokenizer broken": ([good], {"tokenizer": tmp_path / "bad-json"}, ["bad-json", "cannot be read"]),
        "tokenizer empty": ([good], {"tokenizer": empty}, ["empty", "tokenizer.json"]),
        "fraction 1": ([good], {"val_fraction": 1.0}, ["--val-fraction 1.0"]),
        "fraction negative": ([good], {"val_fraction": -0.1}, ["--val-fraction -0.1"]),
        "fraction NaN": ([good], {"val_fraction": float("nan")}, ["--val-fraction nan"]),
        "all held out": ([good], {"val_fraction": 0.9999999}, ["--val-fraction", "all of 1"]),
        "shard tokens": ([good], {"shard_tokens": 0}, ["--shard-tokens 0"]),
    }


def test_every_refusal_is_one_line_and_writes_nothing(tmp_path):
    for name, (inputs, options, expected) in refusals(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        options = {"out": tmp_path / "new" / "out", "progress": False, **options}
        with pytest.raises(DataError) as caught:
            prepare(inputs, **options)
        message = str(caught.value)
        assert all(part in message for part in expected) and "\n" not in message, (name, message)
        assert sorted(tmp_path.rglob("*")) == before, name


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "halny.model.prepare_data", *map(str, arguments)]


def test_command_refuses_in_one_line(tmp_path):
    cases = refusals(tmp_path)
    for name in ("torn", "not UTF-8", "out taken", "tokenizer broken", "fraction 1"):
        inputs, options, expected = cases[name]
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in {"out": tmp_path / "o", **options}.items()]
        before = sorted(tmp_path.rglob("*"))
        ran = subprocess.run(command(*inputs, *flags), capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1, (name, ran)
        assert all(part in ran.stderr for part in expected) and sorted(tmp_path.rglob("*")) == before
    for arguments in ((), ("x.txt", "--out", "o", "--val-fraction", "many"), ("x.txt", "--out", "o", "--no-such-flag")):
        ran = subprocess.run(command(*arguments), capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "--help" in ran.stderr


def test_command(tmp_path):
    (tmp_path / "a.txt").write_text(POLISH, encoding="utf-8")
    ran = subprocess.run(command(tmp_path / "a.txt", "--out", tmp_path / "o"), capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "" and ran.stderr.count("\n") == 1 and "1 documents" in ran.stderr
    assert texts(tmp_path / "o") == [POLISH]
    imports = (
        "import sys, halny.model.prepare_data; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", imports]).returncode == 0


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, signum: int) -> tuple[int, str]:
    """Starts a preparation of some seconds, sends the signal once tokens are being written."""
    rng = random.Random(3)
    if not (tmp_path / "big.jsonl").exists():
        lines = ({"text": " ".join(str(rng.random()) for _ in range(200))} for _ in range(6000))
        jsonl(tmp_path / "big.jsonl", lines)
    arguments = command(tmp_path / "big.jsonl", "--out", tmp_path / "out")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / "train-00000.npy").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_killed_preparation_leaves_nothing_and_can_be_run_again(tmp_path):
    code, errors = interrupted(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL and errors == ""
    assert not (tmp_path / "out").exists() and not is_dataset(tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "tokenizer").mkdir()
    (tmp_path / ".out.partial" / "val-00007.npy").write_bytes(b"leftover")
    (tmp_path / "short.txt").write_text("short")
    prepare([tmp_path / "short.txt"], tmp_path / "out", progress=False)
    assert texts(tmp_path / "out") == ["short"] and not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "out" / "val-00007.npy").exists()


@pytest.mark.parametrize("signum, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_preparation_cleans_up(tmp_path, signum, expected):
    code, errors = interrupted(tmp_path, signum)
    assert code == expected and errors.count("\n") == 1 and "nothing was written" in errors
    assert [file.name for file in tmp_path.iterdir()] == ["big.jsonl"]


def test_two_at_once_on_one_folder(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with dataset.new_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        with pytest.raises(DataError, match="another process"):
            prepare([tmp_path / "a.txt"], tmp_path / "out", progress=False)
        assert (folder / "mine").exists()
    assert (tmp_path / "out" / "mine").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "sync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_dataset([np.arange(5)], tmp_path / "out", vocab_size=9)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_may_be_moved(tmp_path):
    write_dataset([np.arange(5)], tmp_path / "out", vocab_size=9)
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    assert Dataset(Path(os.path.relpath(moved))).split("train").read(0, 5).tolist() == [0, 1, 2, 3, 4]
