"""Text to shards and back: the tokenizer to the id, every format and number of workers alike, faults by line."""

import json
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
from halny.model.prepare_data import DataError, Dataset, held_out, is_dataset, prepare, prepare_builtin

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
    assert (
        data.manifest["input"] == {"documents": len(expected) + 2, "dropped": {}, "skipped": {"empty": 2}}
        and len(data.split("val")) == 0
    )


def test_identical_folders_for_identical_input(tmp_path):
    rng = random.Random(1)
    words = [POLISH[i : i + 5] for i in range(len(POLISH) - 5)]
    for place in ("one", "two"):
        (tmp_path / place / "corpus").mkdir(parents=True)
        rng.seed(1)
        jsonl(tmp_path / place / "corpus" / "x.jsonl", [{"t": "".join(rng.choices(words, k=20))} for _ in range(300)])
        prepare([tmp_path / place / "corpus"], tmp_path / place / "out", text_key="t", val_fraction=0.1, progress=False)
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
    lines = {name: ([path.with_suffix(".jsonl")], {"strict": True}, [f"{name}.jsonl:3:"]) for name, path in at.items()}
    lines["other"][2].extend(["'body'", "--text-key"])
    return {
        **lines,
        "no input": ([], {}, ["name some"]),
        "missing": ([good, tmp_path / "nowhere.txt"], {}, ["nowhere.txt", "no such"]),
        "ending": ([folder / "a.md"], {}, ["a.md", ".jsonl"]),
        "no ending": ([tmp_path / "full" / "x"], {}, ["full/x", ".jsonl"]),
        "nothing in folder": ([folder], {}, ["folder", ".txt"]),
        "only empty": ([tmp_path / "blank.txt", tmp_path / "blank.jsonl"], {}, ["no documents", "blank.txt:1:"]),
        "only faults": (
            [at["torn"].with_suffix(".jsonl"), tmp_path / "latin.txt"],
            {"text_key": "x"},
            ["torn.jsonl:1:"],
        ),
        "twice": ([good, tmp_path], {}, ["good.txt", "twice"]),
        "not UTF-8": ([good, tmp_path / "latin.txt"], {"strict": True}, ["latin.txt:3:", "0xbf", "UTF-8"]),
        "not UTF-8 line": ([tmp_path / "latin.jsonl"], {"strict": True}, ["latin.jsonl:2:", "UTF-8"]),
        "UTF-16": ([tmp_path / "utf16.txt"], {"strict": True}, ["utf16.txt:1:", "UTF-8"]),
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
        "workers": ([good], {"workers": 0}, ["--workers 0"]),
        "keep, no condition": ([good], {"keep": ["quality"]}, ["--keep 'quality'", "KEY=VALUE"]),
        "keep, two operators": ([good], {"keep": ["quality==HIGH"]}, ["--keep 'quality==HIGH'"]),
        "keep, no number": ([good], {"keep": ["quality>HIGH"]}, ["'HIGH'", "numbers"]),
        "keep of .txt": ([folder.parent / "torn.jsonl", good], {"keep": ["quality=HIGH"]}, ["good.txt", "metadata"]),
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
        given = {"out": tmp_path / "o", **options}
        flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in given.items()]
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


def interrupted(tmp_path: Path, signum: int, workers: int = 2) -> tuple[int, str]:
    """Starts a preparation of some seconds, sends the signal once tokens are being written."""
    rng = random.Random(3)
    if not (tmp_path / "big.jsonl").exists():
        lines = ({"text": " ".join(str(rng.random()) for _ in range(200))} for _ in range(6000))
        jsonl(tmp_path / "big.jsonl", lines)
    arguments = command(tmp_path / "big.jsonl", "--out", tmp_path / "out", "--workers", workers)
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
