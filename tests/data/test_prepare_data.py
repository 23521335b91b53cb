"""Text to shards and back: the tokenizer to the id, every format and number of workers alike, faults by line."""

import dataclasses
import gzip
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from halny.model import prepare_data
from halny.model.data import documents as reading
from halny.model.data import encode, progress, tally, tokenizer, writer
from halny.model.data.dataset import DataError, Dataset, is_dataset
from halny.model.data.encode import held_out
from halny.model.data.keep import parse_conditions
from halny.model.data.merge import merge
from halny.model.data.workers import ordered_map
from halny.model.prepare_data import prepare, prepare_builtin

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


@pytest.fixture(scope="module")
def mistral():
    return tokenizer.mistral_tokenizer()


@pytest.fixture(scope="module")
def encoder(mistral):
    return tokenizer.Encoder(mistral)


@pytest.fixture(autouse=True)
def _made_once(mistral, monkeypatch):
    """Making Mistral's tokenizer takes half a second, too long for every call of prepare."""
    monkeypatch.setattr(tokenizer, "mistral_tokenizer", lambda: mistral)


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


def saved_tokenizer(folder: Path, bos: str | None, eos: str | None, normalizer=None) -> Path:
    """A folder with a tokenizer of a token a character, "<s>" 0 and "</s>" 1 beside them."""
    from tokenizers import Tokenizer, models

    vocab = {"<s>": 0, "</s>": 1, **{chr(i): i for i in range(2, 128)}}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(["<s>", "</s>"])
    if normalizer is not None:
        made.normalizer = normalizer
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
    for loaded in (generator.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert loaded.is_fast and "Mistral" not in type(loaded).__name__
        for text in [POLISH, *RUNS]:
            assert loaded(text).input_ids == [1, *sentencepiece.encode(text)]
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
    config["extra_special_tokens"] = {"image": "<img>"}  # which transformers 5 would write as a list
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "added_tokens.json").write_text("{ }\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{tools}}")
    whole = contents(source)
    (source / "model.safetensors").write_bytes(b"not to be copied")
    (source / "README.md").write_bytes(b"neither")
    (tmp_path / "a.txt").write_text(POLISH, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", source, progress=False)
    expected = saved(POLISH, add_special_tokens=False).input_ids
    assert documents(tmp_path / "out", "train")[0].tolist() == [*expected, 2]
    data = Dataset(tmp_path / "out")
    assert data.manifest["document"] == {"bos_id": None, "eos_id": 2} and data.manifest["tokenizer"]["name"] == "mine"
    assert contents(data.tokenizer) == whole
    assert data.special_ids == (None, 2, 0)
    data.verify()
    merge([tmp_path / "out", shutil.copytree(tmp_path / "out", tmp_path / "copy")], tmp_path / "both", progress=False)
    assert contents(tmp_path / "both/tokenizer") == whole and Dataset(tmp_path / "both").special_ids == (None, 2, 0)
    assert not any(str(tmp_path).encode() in content for content in contents(tmp_path / "out").values())


def test_the_built_in_tokenizer_brings_what_its_readers_need(builtin, mistral, saved, sentencepiece):
    """llama.cpp the pieces' scores, transformers up to 4.44 merges as strings, a batch something to fill it up."""
    raw = json.loads((builtin / "tokenizer/tokenizer.json").read_bytes())
    assert {type(merge) for merge in raw["model"]["merges"]} == {str}
    assert len(raw["model"]["merges"]) == len(json.loads(mistral.files["tokenizer.json"])["model"]["merges"]) > 50_000
    assert (builtin / "tokenizer/tokenizer.model").read_bytes() == sentencepiece.serialized_model_proto()
    assert Dataset(builtin).special_ids == (1, 2, 0)
    assert saved.pad_token_id == 0 and saved.padding_side == "left"
    assert list(saved(["a b c", "a"], padding=True)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    "beside, expected",
    [
        ({}, {"bos_id": None, "eos_id": None}),
        ({"config.json": {"bos_token_id": 0, "eos_token_id": [1, 5]}}, {"bos_id": 0, "eos_id": 1}),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": 1}}, {"bos_id": None, "eos_id": None}),
    ],
)
def test_a_tokenizer_json_alone_is_asked_for_its_markers(tmp_path, beside, expected, capsys):
    tok = saved_tokenizer(tmp_path / "tok", None, None)
    (tok / "tokenizer_config.json").unlink()
    for name, content in beside.items():
        (tok / name).write_text(json.dumps(content))
    text = str(write(tmp_path / "x.jsonl", ["ab"]))
    command = [text, "--out", str(tmp_path / "out"), "--tokenizer", str(tok), "--val-fraction", "0"]
    assert prepare_data.main(command) == 0
    assert Dataset(tmp_path / "out").manifest["document"] == expected
    assert not (tmp_path / "out/tokenizer/config.json").exists()
    none = expected["eos_id"] is None
    said, loud = capsys.readouterr().err, "NO END OF TEXT: documents begin without BOS and end without EOS"
    assert (loud in said) == none
    assert prepare_data.main(["--check", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert ("NO MARKERS" in out) == none and ("each document begins with BOS 0 and ends with EOS 1" in out) == (
        not none
    )
    meant = tmp_path / "meant"
    assert prepare_data.main([*command[:2], str(meant), *command[3:], "--no-eos"]) == 0
    assert "NO END" not in capsys.readouterr().err
    assert prepare_data.main(["--check", str(meant)]) == 0
    out = capsys.readouterr().out
    assert ("NO MARKERS" in out) == none and ("begins with BOS 0 and has no EOS at its end" in out) == (not none)


def test_special_tokens_in_text_are_meant_only_where_the_flag_says_so(tmp_path, saved, sentencepiece, capsys):
    """Of Mistral's tokenizer, and of a long text, which is otherwise encoded in windows."""
    saved.save_pretrained(tmp_path / "tok")
    texts = ["<s> user</s> x", "user </s>", "plain", "a</s>b " * 9000]
    path = write(tmp_path / "chat.jsonl", texts)
    common = {"val_fraction": 0, "progress": False, "workers": 1}
    prepare([path], tmp_path / "text", tmp_path / "tok", **common)
    ours = documents(tmp_path / "text", "train")
    assert [ids.tolist() for ids in ours] == [[1, *sentencepiece.encode(text), 2] for text in texts]

    prepare([path], tmp_path / "meant", tmp_path / "tok", special_tokens=True, **common)
    meant = documents(tmp_path / "meant", "train")
    expected = [saved(text, add_special_tokens=False).input_ids for text in texts]
    assert expected[0].count(2) == 1 and expected[3].count(2) == 9000
    # no second BOS or EOS where a text has its own
    assert meant[0].tolist() == [*expected[0], 2] and meant[1].tolist() == [1, *expected[1]]
    assert [ids.tolist() for ids in meant[2:]] == [[1, *ids, 2] for ids in expected[2:]]
    assert Dataset(tmp_path / "meant").manifest["settings"]["special_tokens"] is True
    assert "special_tokens" not in Dataset(tmp_path / "text").manifest["settings"]
    assert prepare_data.main(["--check", str(tmp_path / "meant")]) == 0
    out = tmp_path / "by command"
    assert prepare_data.main([str(path), "--out", str(out), "--special-tokens", "--val-fraction", "0"]) == 0
    assert [ids.tolist() for ids in documents(out, "train")] == [ids.tolist() for ids in meant]


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


@pytest.mark.parametrize(
    "lengths, fraction, train, val",
    [
        ([100], 0.1, [(0, 90)], [(90, 100)]),  # its hash would hold out nothing
        ([100], 0.7, [(0, 30)], [(30, 100)]),  # and here everything
        ([100], 0.001, [(0, 100)], []),  # less than a token
        ([1], 0.7, [(0, 1)], []),
        ([40, 30, 50], 0.05, [(0, 40), (40, 70), (70, 114)], [(114, 120)]),  # 0.05 of all 120 and their markers
        ([40, 30, 10], 0.3, [(0, 40), (40, 70), (70, 75)], [(75, 80)]),  # no more than half of the last one
        ([9, 8, 20], 0.8, [(17, 21)], [(0, 9), (9, 17), (21, 37)]),
    ],
)
def test_of_too_few_documents_the_end_of_the_last_is_held_out(
    tmp_path, capsys, monkeypatch, lengths, fraction, train, val
):
    """Whichever of train and val would be empty; both parts are documents with BOS and EOS."""
    monkeypatch.setattr(encode, "_held_out", lambda raw, fraction: fraction > 0.5)
    tok = saved_tokenizer(tmp_path / "tok", "<s>", "</s>")
    text = "".join(chr(33 + i % 90) for i in range(sum(lengths)))
    ends = np.cumsum(lengths).tolist()
    path = write(tmp_path / "x.jsonl", [text[end - n : end] for n, end in zip(lengths, ends, strict=True)])
    prepare([path], tmp_path / "out", tok, val_fraction=fraction, shard_tokens=60)
    for split, expected in (("train", train), ("val", val)):
        found = [bytes(ids.tolist()) for ids in documents(tmp_path / "out", split)]
        assert found == [b"\0" + text[begin:end].encode() + b"\1" for begin, end in expected]
    data, line = Dataset(tmp_path / "out"), capsys.readouterr().err
    n = data.split("train").n_documents + data.split("val").n_documents
    counts = {"documents": n, "tokens": sum(lengths) + 2 * n, "bytes": sum(lengths)}
    assert data.manifest["sources"] == [{"name": "x.jsonl", **counts}]
    for split, expected in (("train", train), ("val", val)):
        assert data.n_bytes(split) == sum(end - begin for begin, end in expected)
    if n > len(lengths):
        assert f"--val-fraction {fraction}: the last {val[-1][1] - val[-1][0]} tokens of the last one are held" in line
    assert data.manifest["input"]["documents"] == len(lengths) == n - data.manifest["input"].get("cut", 0)
    assert prepare_data.main(["--check", str(tmp_path / "out")]) == 0


def test_the_bytes_of_what_is_kept_are_counted(tmp_path, capsys):
    """By split and by source, of the text as it is in UTF-8; duplicates, what --keep drops and faults are not in it."""
    lines = [{"text": f"{POLISH} {i % 40}", "quality": "LOW" if i % 3 else "HIGH"} for i in range(120)]
    one, two = jsonl(tmp_path / "one.jsonl", lines), jsonl(tmp_path / "two.jsonl", [{"text": t} for t in AWKWARD])
    options = dict(dedup=True, val_fraction=0.3, progress=False)
    prepare([one], tmp_path / "a", keep=["quality=HIGH"], **options)
    prepare([one, two], tmp_path / "b", **options)
    kept = {"a": [[line["text"] for line in lines if line["quality"] == "HIGH"]]}
    kept["b"] = [[line["text"] for line in lines], AWKWARD]
    for name, sources in kept.items():
        data, seen = Dataset(tmp_path / name), set()
        new = [[text for text in dict.fromkeys(texts) if not (text in seen or seen.add(text))] for texts in sources]
        sizes = [sum(len(text.encode()) for text in texts) for texts in new]
        assert [source["bytes"] for source in data.manifest["sources"]] == sizes and sizes[0] > 1000
        for split, wanted in (("train", False), ("val", True)):
            mine = [text for texts in new for text in texts if held_out(text, 0.3) is wanted]
            assert data.n_bytes(split) == sum(len(text.encode()) for text in mine) > 0
    assert prepare_data.main(["--merge", *(str(tmp_path / name) for name in "ab"), "--out", str(tmp_path / "c")]) == 0
    both, parts = Dataset(tmp_path / "c"), [Dataset(tmp_path / name) for name in "ab"]
    for split in ("train", "val"):
        assert both.n_bytes(split) == sum(part.n_bytes(split) for part in parts)
    capsys.readouterr()
    assert prepare_data.main(["--check", str(tmp_path / "c")]) == 0
    out, n = capsys.readouterr().out, both.n_bytes("train")
    assert f"{n:,} bytes of text, {n / len(both.split('train')):.2f} per token" in out


def test_a_cut_inside_a_character_is_counted_to_the_byte(tmp_path, mistral, encoder):
    """One document, whose characters take several tokens each: the held-out bytes are those of the held-out tokens."""
    text = "👩‍👩‍👧 zażółć 𓀀𓀁 " * 7
    (tmp_path / "x.txt").write_text(text)
    spelled, cuts = mistral.spelled(), set()
    for fraction in (0.1, 0.2, 0.31, 0.42, 0.5, 0.63):
        prepare([tmp_path / "x.txt"], tmp_path / f"{fraction}", val_fraction=fraction, progress=False)
        data = Dataset(tmp_path / f"{fraction}")
        (ids,) = documents(tmp_path / f"{fraction}", "val")
        tail = b"".join(spelled[i] for i in ids[1:-1].tolist())
        assert text.encode().endswith(tail) and data.n_bytes("val") == len(tail)
        assert data.n_bytes("train") == len(text.encode()) - len(tail)
        cuts.add(tail[0] & 0xC0 == 0x80)
    assert cuts == {False, True}  # some between characters, some inside one


def test_a_count_of_bytes_makes_no_other_data(tmp_path):
    """A run goes on with the folder prepared anew, and an older folder, without the count, is read."""
    write(tmp_path / "x.jsonl", [POLISH, "other"])
    prepare([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0.5, progress=False)
    new, path = Dataset(tmp_path / "out"), tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    for record in [*manifest["sources"], *manifest["splits"].values()]:
        del record["bytes"]
    path.write_text(json.dumps(manifest))
    old = Dataset(tmp_path / "out")
    assert old.fingerprint == new.fingerprint and old.n_bytes("train") is None and old.n_bytes("val") is None
    assert prepare_data.main(["--check", str(tmp_path / "out")]) == 0
    prepare([tmp_path / "x.jsonl"], tmp_path / "more", val_fraction=0.2, progress=False)
    prepare_data.merge([tmp_path / "out", tmp_path / "more"], tmp_path / "both", progress=False)
    assert Dataset(tmp_path / "both").n_bytes("train") is None
    manifest["splits"]["val"]["bytes"] = -1
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="bytes is -1"):
        Dataset(tmp_path / "out")


# --- long texts -------------------------------------------------------------------------------------------------------


def test_long_texts_equal_the_library(monkeypatch, mistral, encoder):
    """Windows so small and tails so short that cuts fail; the ids are those of the whole text all the same."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(mistral.files["tokenizer.json"].decode())
    whole.encode_special_tokens = True
    rng, apart = random.Random(5), []
    assert encoder.plain
    stay_apart = encoder._stay_apart
    monkeypatch.setattr(encoder, "_stay_apart", lambda left, right: apart.append(stay_apart(left, right)) or apart[-1])
    pieces = [piece.replace("▁", " ") for piece in whole.get_vocab()]
    texts = [AWKWARD[-1] * 300, *(text * 99 for text in AWKWARD if text)]
    for _ in range(8):
        texts.append("".join(rng.choices(pieces, k=2000)))
        texts.append("".join("".join(rng.choices(pieces, k=rng.randint(1, 3))) * rng.randint(1, 99) for _ in range(40)))
        texts.append("".join(rng.choice(" \n\ta=-0🇵") * rng.randint(1, 900) for _ in range(20)))
        texts.append("".join(rng.choices("ab 👩‍🇵🇱ﬁ中ჰ\0", k=3000)))
    expected = [encoding.ids for encoding in whole.encode_batch(texts, add_special_tokens=False)]
    for window, tail in ((64, 4), (100, 1)):
        monkeypatch.setattr(tokenizer, "WINDOW", window)
        monkeypatch.setattr(tokenizer, "TAIL", tail)
        apart.clear()
        for ids, right, text in zip(encoder.encode(texts), expected, texts, strict=True):
            assert ids.dtype == np.uint16 and ids.tolist() == right, (window, tail, text[:50])
        assert len(apart) > 1000 and (tail > 1 or apart.count(False) > 100)


def test_only_plain_bpe_is_encoded_in_windows(mistral):
    raw = json.loads(mistral.files["tokenizer.json"])
    assert tokenizer._is_plain_bpe(raw)
    for change in (
        lambda t: t.update(normalizer=None),
        lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t["model"].update(dropout=0.1),
        lambda t: t["model"].update(ignore_merges=True),
        lambda t: t["model"].update(byte_fallback=False),
        lambda t: t["model"].update(end_of_word_suffix="</w>"),
        lambda t: t["model"]["vocab"].pop("<0xC3>"),
        lambda t: t["model"]["merges"].append(["<0x0A>", "a"]),
        lambda t: t["added_tokens"].append({"content": "<|im_start|>", "special": False}),
    ):
        changed = json.loads(json.dumps(raw))
        change(changed)
        assert not tokenizer._is_plain_bpe(changed)


@pytest.mark.slow
def test_one_line_of_50_megabytes(tmp_path):
    text = (POLISH + "\n") * 20_000 + "a" * 25_000_000 + " " * 25_000_000
    prepare([jsonl(tmp_path / "x.jsonl", [{"text": "before"}, {"text": text}])], tmp_path / "out", val_fraction=0)
    ids = documents(tmp_path / "out", "train")[1]
    assert Dataset(tmp_path / "out").split("train").n_documents == 2 and len(ids) > 5_000_000
    assert texts(tmp_path / "out") == ["before", text]


# --- any partition, any format, any number of workers -----------------------------------------------------------------

ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40
)  # ▁ decodes to a space
FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def write(path: Path, documents: list[str], extra: list[dict] | None = None, newline: str = "\n") -> Path:
    """Documents in the format of the path's ending, with more keys or columns if given."""
    records = [{"text": text, **more} for text, more in zip(documents, extra or [{}] * len(documents), strict=True)]
    if path.name.endswith(".parquet"):
        columns = {name: [record.get(name) for record in records] for name in records[0]}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
        return path
    if path.name.endswith(".txt"):
        (text,) = documents
        path.write_bytes(text.encode())
        return path
    raw = "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + newline for i, record in enumerate(records)).encode()
    if path.name.endswith(".gz"):
        raw = gzip.compress(raw[:100]) + gzip.compress(raw[100:])  # two members: a valid file too
    elif path.name.endswith(".zst"):
        raw = pyarrow.compress(raw, "zstd", asbytes=True)
    path.write_bytes(raw)
    return path


@st.composite
def corpora(draw):
    """A list of documents, cut into files of any format."""
    files = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(FORMATS))
        content = draw(st.lists(ANY_TEXT, min_size=1, max_size=1 if kind == ".txt" else 8))
        if not (kind == ".txt" and content[0].startswith("\ufeff")):  # which would be no text there
            files.append((kind, content, draw(st.sampled_from(["\n", "\r\n", "\n\n"]))))
    return files


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=corpora(), shard_tokens=st.integers(20, 200), block=st.integers(1, 300))
def test_any_partition_gives_the_same_tokens(mistral, encoder, files, shard_tokens, block):
    whole = [text for _, content, _ in files for text in content if text]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(prepare_data, "load_tokenizer", lambda name: mistral),
        mock.patch.object(encode, "Encoder", lambda name: encoder),
        mock.patch.object(writer, "sync", lambda path: None),
        mock.patch.object(reading, "BLOCK_BYTES", block),
        mock.patch.object(reading, "BLOCK_FILES", 3),
    ):
        folder = Path(folder)
        (folder / "in").mkdir()
        for i, (kind, content, newline) in enumerate(files):
            write(folder / "in" / f"{i:03d}{kind}", content, newline=newline)
        options = {"val_fraction": 0, "shard_tokens": shard_tokens, "progress": False}
        if not whole:
            with pytest.raises(DataError, match=r"no documents|no \.txt"):
                prepare([folder / "in"], folder / "out", **options)
            return
        prepare([folder / "in"], folder / "out", **options)
        found = documents(folder / "out", "train")
        assert [ids.tolist() for ids in found] == [[1, *ids.tolist(), 2] for ids in encoder.encode(whole)]
        assert texts(folder / "out") == whole


def test_any_number_of_workers_gives_the_same_folder(tmp_path, monkeypatch):
    """With every kind of document that is dropped or skipped among them, and blocks of a line or two."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 200)
    rng, corpus = random.Random(4), tmp_path / "corpus"
    corpus.mkdir()
    lines = []
    for _ in range(300):
        text = rng.choice([POLISH * rng.randint(1, 9), f"document {rng.randint(0, 99)}", "", "x" * rng.randint(1, 500)])
        lines.append(json.dumps({"text": text, "quality": rng.choice(["HIGH", "LOW"])}).encode())
    for i in range(0, 300, 9):
        lines[i] = rng.choice(
            [
                b"{",
                b'{"text": 3}',
                b'{"text": "?"}',
                b'{"quality": "HIGH"}',
                b'{"text": "\xff"}',
                b'{"text": "\\ud800"}',
            ]
        )
    (corpus / "a.jsonl").write_bytes(b"\n".join(lines[:150]))
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[150:]))[:-9])
    write(corpus / "c.parquet", [f"row {i % 30}" for i in range(60)], [{"quality": "HIGH"}] * 60)
    (tmp_path / "second.jsonl").write_bytes(b"\n".join(lines[100:200]))
    folders = {}
    for workers in (None, 1, 3):
        out = tmp_path / f"out-{workers}"
        options = {
            "val_fraction": 0.2,
            "shard_tokens": 700,
            "keep": ["quality=HIGH"],
            "dedup": True,
            "workers": workers,
        }
        prepare([corpus, tmp_path / "second.jsonl"], out, progress=False, **options)
        folders[workers] = contents(out)
    assert folders[None] == folders[1] == folders[3]
    manifest = Dataset(out).manifest
    counts = manifest["input"]
    assert len(counts["skipped"]) == 7 and set(counts["dropped"]) == {"duplicate", "no quality", "not quality=HIGH"}
    n_written = sum(manifest["splits"][split]["documents"] for split in ("train", "val"))
    skipped = sum(n for reason, n in counts["skipped"].items() if reason != "damaged file")
    assert counts["documents"] == n_written + sum(counts["dropped"].values()) + skipped
    assert [source["name"] for source in manifest["sources"]] == ["corpus", "second.jsonl"]
    assert sum(source["documents"] for source in manifest["sources"]) == n_written
    assert len(folders[1]) > 12  # several shards


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_formats_equal_jsonl(tmp_path, kind):
    content = [text for text in AWKWARD if text] * 3
    extra = [{"quality": "HIGH" if i % 3 else "LOW"} for i in range(len(content))]
    for name, ending in (("a", ".jsonl"), ("b", kind)):
        path = write(tmp_path / f"x{ending}", content, extra)
        prepare([path], tmp_path / name, keep=["quality=HIGH"], dedup=True, val_fraction=0.3, progress=False)
    first, second = Dataset(tmp_path / "a"), Dataset(tmp_path / "b")
    assert first.fingerprint == second.fingerprint and first.manifest["input"] == second.manifest["input"]


# --- faults of the input ----------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, name: str) -> Path:
    """A file of 12,000 numbered documents that ends in damage."""
    rng = random.Random(6)
    content = [f"{i} {rng.random()}" for i in range(12000)]
    path = write(tmp_path / name.replace("corrupt-", ""), content)
    raw = bytearray(path.read_bytes())
    if "corrupt" in name:
        raw[-len(raw) // 3 : -len(raw) // 3 + 8] = b"\xff" * 8
    else:
        del raw[-len(raw) // 3 :]
    path.unlink()
    (tmp_path / name).write_bytes(raw)
    return tmp_path / name


@pytest.mark.parametrize(
    "name, least",
    [
        ("x.jsonl.gz", 5000),
        ("x.jsonl.zst", 3000),
        ("corrupt-x.jsonl.gz", 5000),
        ("x.parquet", 0),
        ("corrupt-x.parquet", 0),
    ],
)
def test_damaged_files_are_read_up_to_the_damage(tmp_path, name, least, capsys):
    path = damaged(tmp_path, name)
    good = write(tmp_path / "z.jsonl", ["after the damage"])
    prepare([path, good], tmp_path / "out", val_fraction=0)
    prepared = texts(tmp_path / "out")
    assert prepared[-1] == "after the damage" and len(prepared) > least
    n_sound = least if name == "corrupt-x.jsonl.gz" else len(prepared) - 1  # there, only the end tells
    assert [int(text.split()[0]) for text in prepared[:n_sound]] == list(range(n_sound))
    skipped = Dataset(tmp_path / "out").manifest["input"]["skipped"]
    assert skipped["damaged file"] == 1 and (len(skipped) == 1 or name == "corrupt-x.jsonl.gz")
    assert f"skipped 1: damaged file; the first: {path}:" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"{name}:[0-9]+: .*--strict"):
        prepare([path, good], tmp_path / "strict", strict=True, progress=False)
    assert not (tmp_path / "strict").exists()


def test_faults_are_counted_by_reason_and_named_by_line(tmp_path, capsys):
    lines = {
        "not JSON": [b'{"text": "torn', b"not json"],
        "not a JSON object": [b"[1]"],
        "no such key": [b'{"body": "x"}'],
        "not a string": [b'{"text": 3}', b'{"text": null}', b'{"text": ["a"]}'],
        "lone surrogate": [b'{"text": "\\ud83d"}', b'{"text": "a \\udc00 b"}'],
        "not UTF-8": [b'{"text": "\xe4"}', b'{"text": "\xed\xa0\x80"}'],  # Latin-1, and a surrogate as three bytes
        "empty": [b'{"text": ""}'],
    }
    raw = [b'\xef\xbb\xbf{"text": "first"}\r']
    expected = {}
    for reason, bad in lines.items():
        raw += [b'{"text": "good\\u0000"}', b"", *bad]
        expected[reason] = len(raw) - len(bad) + 1
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(raw))
    prepare([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0)
    errors = capsys.readouterr().err.splitlines()
    assert texts(tmp_path / "out") == ["first"] + ["good\0"] * len(lines)
    skipped = Dataset(tmp_path / "out").manifest["input"]["skipped"]
    assert skipped == {reason: len(bad) for reason, bad in lines.items()}
    for reason, line in expected.items():
        assert any(f"{reason}; the first: {tmp_path / 'x.jsonl'}:{line}:" in error for error in errors), (
            reason,
            errors,
        )
    with pytest.raises(DataError, match=r"x.jsonl:4: not valid JSON .*--strict"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "strict", strict=True, progress=False)


def test_documents_without_a_token_are_empty(tmp_path, capsys):
    """A normalizer may leave nothing of a text, and then there is no document to learn from or to --check."""
    from tokenizers import normalizers

    tok = saved_tokenizer(tmp_path / "tok", "<s>", "</s>", normalizers.Strip())
    path = write(tmp_path / "x.jsonl", ["one", " ", "", "two ", "\n\n", " "])
    for i, (bos, dedup) in enumerate([(None, False), (False, True)]):
        out = tmp_path / str(i)
        prepare([path], out, tok, bos=bos, eos=bos, dedup=dedup, val_fraction=0)
        assert f"skipped 4: empty; the first: {path}:2: " in capsys.readouterr().err
        assert [bytes(ids.tolist()).strip(b"\0\1") for ids in documents(out, "train")] == [b"one", b"two"]
        assert Dataset(out).manifest["input"] == {"documents": 6, "dropped": {}, "skipped": {"empty": 4}}
        assert prepare_data.main(["--check", str(out)]) == 0
    with pytest.raises(DataError, match=r"x.jsonl:2: .*no token; remove it \(refused because of --strict\)"):
        prepare([path], tmp_path / "strict", tok, strict=True, progress=False)


def test_parquet_faults(tmp_path):
    table = pyarrow.table({"text": ["a", None, ""], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table.rename_columns(["other", "n"]), tmp_path / "b.parquet")
    parquet.write_table(table.rename_columns(["other", "text"]), tmp_path / "c.parquet")
    bad = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "d.parquet")
    kind = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).cast(kind)}), tmp_path / "e.parquet")
    prepare([tmp_path], tmp_path / "out", val_fraction=0, progress=False)
    assert texts(tmp_path / "out") == ["a", "ok", "x", "y", "x"]
    skipped = {"null": 1, "empty": 1, "no such column": 1, "column of another type": 1, "not UTF-8": 1}
    assert Dataset(tmp_path / "out").manifest["input"]["skipped"] == skipped
    for name, expected in {
        "a": ":2: .*null",
        "b": "no column 'text' .*'other', 'n'",
        "c": "int64",
        "d": ":2: .*0xff",
    }.items():
        with pytest.raises(DataError, match=f"{name}.parquet.*{expected}"):
            prepare([tmp_path / f"{name}.parquet"], tmp_path / "strict", strict=True, progress=False)


def test_documents_too_large_are_skipped_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 300)
    write(tmp_path / "a.jsonl", ["one", "x" * 1500, "two", "y" * 9000, "three"])
    (tmp_path / "b.txt").write_text("z" * 1001)
    prepare([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", val_fraction=0, progress=False)
    assert texts(tmp_path / "out") == ["one", "two", "three"]
    assert Dataset(tmp_path / "out").manifest["input"]["skipped"] == {"too large": 3}
    with pytest.raises(DataError, match=r"a.jsonl:2: a document of over"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "strict", strict=True, progress=False)


def test_a_wrong_key_is_refused_before_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "HOPELESS", 50)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    write(tmp_path / "x.jsonl", ["some text"] * 1000)
    with pytest.raises(DataError, match=r"none of the first [5-9]\d documents .*x.jsonl:1: no key 'body'"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", text_key="body", progress=False)


# --- --keep, --dedup, --bos, --eos ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition, found, expected",
    [
        ("q=HIGH", "HIGH", True),
        ("q=HIGH", "high", False),
        (" q = HIGH ", "HIGH", True),
        ("q=a b = c", "a b = c", True),
        ("q!=HIGH", "LOW", True),
        ("q=1", 1, True),
        ("q=1", 1.0, True),
        ("q=1", "1", True),
        ("q=1", "1.0", False),
        ("q=true", True, True),
        ("q=1", True, False),
        ("q=", "", True),
        ("q>0.9", 0.9, False),
        ("q>=0.9", 0.9, True),
        ("q>=0.9", "0.95", True),
        ("q<-1e-3", -1, True),
        ("q<=3", 3, True),
        ("q<=3", "many", False),
        ("q<=3", True, False),
        ("q>0", float("nan"), False),
        ("q>9007199254740992", 9007199254740993, True),
    ],
)
def test_conditions(condition, found, expected):
    (parsed,) = parse_conditions([condition])
    assert (reading.first_failed([parsed], {"q": found}) is None) == expected
    assert reading.first_failed([parsed], {"other": found}) == reading.first_failed([parsed], {"q": None}) == ("no q",)


def test_conditions_on_nested_keys(tmp_path):
    metadata = [
        {"meta": {"quality": q, "p": p}} for q, p in (("HIGH", 0.95), ("HIGH", 0.5), ("LOW", 0.99), (None, 1.0))
    ]
    for kind in (".jsonl", ".parquet"):
        path, out = write(tmp_path / f"x{kind}", list("abcd"), metadata), tmp_path / f"out{kind}"
        prepare([path], out, keep=["meta.quality=HIGH", "meta.p>0.9"], val_fraction=0, progress=False)
        assert texts(out) == ["a"]
        dropped = {"no meta.quality": 1, "not meta.p>0.9": 1, "not meta.quality=HIGH": 1}
        assert Dataset(out).manifest["input"] == {"documents": 4, "dropped": dropped, "skipped": {}}
        assert Dataset(out).manifest["settings"]["keep"] == ["meta.quality=HIGH", "meta.p>0.9"]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=30))
def test_digests_equal_a_set(batches):
    seen, ours = set(), tally.DigestSet()
    ours.table = np.zeros((4, 2), np.uint64)
    for batch in batches:
        expected = [not (i in seen or seen.add(i)) for i in batch]
        digests = np.array([[i // 3 << 60, i] for i in batch], np.uint64).reshape(-1, 2) + np.uint64(1)
        assert ours.add(digests).tolist() == expected and ours.n == len(seen)


def test_bos_and_eos_policy(tmp_path, mistral, encoder):
    ids = encoder.encode([POLISH])[0].tolist()
    path = write(tmp_path / "x.jsonl", [POLISH])
    for i, (bos, eos) in enumerate([(None, None), (True, False), (False, True), (False, False)]):
        prepare([path], tmp_path / str(i), bos=bos, eos=eos, progress=False)
        head, tail = [1] * (bos is not False), [2] * (eos is not False)
        assert documents(tmp_path / str(i), "train")[0].tolist() == [*head, *ids, *tail]
        assert Dataset(tmp_path / str(i)).manifest["document"] == {
            "bos_id": (head or [None])[0],
            "eos_id": (tail or [None])[0],
        }
    bare = dataclasses.replace(mistral, bos_id=None)
    with mock.patch.object(prepare_data, "load_tokenizer", lambda name: bare), pytest.raises(DataError, match="--bos"):
        prepare([path], tmp_path / "out", bos=True, progress=False)


@pytest.mark.parametrize(
    "flags, document, expected",
    [
        ({}, {"bos_id": None, "eos_id": 1}, b"a\1b\1"),
        ({"eos": True}, {"bos_id": None, "eos_id": 1}, b"a\1b\1"),
        ({"bos": False}, {"bos_id": None, "eos_id": 1}, b"a\1b\1"),
        ({"bos": True}, {"bos_id": 1, "eos_id": None}, b"\1a\1b"),
        ({"eos": False}, {"bos_id": 1, "eos_id": None}, b"\1a\1b"),
        ({"bos": False, "eos": False}, {"bos_id": None, "eos_id": None}, b"ab"),
    ],
)
def test_one_separator_where_bos_is_eos(tmp_path, flags, document, expected):
    tok = saved_tokenizer(tmp_path / "tok", "</s>", "</s>")
    prepare([write(tmp_path / "x.jsonl", ["a", "b"])], tmp_path / "out", tok, val_fraction=0, progress=False, **flags)
    assert Dataset(tmp_path / "out").manifest["document"] == document
    assert bytes(np.concatenate(documents(tmp_path / "out", "train")).tolist()) == expected
    assert prepare_data.main(["--check", str(tmp_path / "out")]) == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals(tmp_path: Path) -> dict[str, tuple[list, dict, list[str]]]:
    """name -> (inputs, options of prepare, what the line must hold)"""
    good, folder, empty = tmp_path / "good.txt", tmp_path / "folder", tmp_path / "empty"
    one_marker = saved_tokenizer(tmp_path / "one-marker", "</s>", "</s>")
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
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1795188\n")
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
        "pointer": ([good, tmp_path / "pointer.txt"], {}, ["pointer.txt: no text yet", "git lfs pull"]),
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
        "one token for both": (
            [good],
            {"tokenizer": one_marker, "bos": True, "eos": True},
            ["--bos --eos", "one-marker", "one token for both (1)"],
        ),
        "fraction 1": ([good], {"val_fraction": 1.0}, ["--val-fraction 1.0"]),
        "fraction negative": ([good], {"val_fraction": -0.1}, ["--val-fraction -0.1"]),
        "fraction NaN": ([good], {"val_fraction": float("nan")}, ["--val-fraction nan"]),
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


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, *(10.0 * i for i in range(1, 8))])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress(100_000_000) as bar:
        for i in range(1, 8):
            bar.update(10_000_000, 100 * i, 4_000_000 * i)
    assert capsys.readouterr().err.splitlines() == [
        "prepare_data: 40%, 400 documents, 1.0 MB/s, 400,000 tokens/s, 60 s left"
    ]


def test_progress_counts_what_was_done_before_as_done_and_not_as_speed(monkeypatch, capsys):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress(100_000_000, bytes_before=50_000_000, tokens_before=1_000_000) as bar:
        bar.update(10_000_000, 100, 5_000_000)
    line = "prepare_data: 60%, 100 documents, 0.2 MB/s, 100,000 tokens/s, 160 s left"
    assert capsys.readouterr().err.splitlines() == [line]


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, interrupt, workers: int = 2) -> tuple[int, str]:
    """Starts a preparation of some seconds, sends the signal or calls the function once tokens are being written."""
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
    interrupt(process) if callable(interrupt) else process.send_signal(interrupt)
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
    with writer.new_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        with pytest.raises(DataError, match="another process"):
            prepare([tmp_path / "a.txt"], tmp_path / "out", progress=False)
        assert (folder / "mine").exists()
    assert (tmp_path / "out" / "mine").exists()


# --- processes --------------------------------------------------------------------------------------------------------


def running(pids: list[int]) -> list[int]:
    """Those that run still: a zombie does not."""
    out = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                out.append(pid)
    return out


def children(parent: int) -> list[int]:
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                out.append(int(stat.parent.name))
    return out


def wait_for_the_end_of(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(pids)


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_processes_neither_hang_nor_outlive(tmp_path, victim):
    seen = []

    def kill(process: subprocess.Popen) -> None:
        seen.extend(children(process.pid))
        os.kill(process.pid if victim == "parent" else seen[0], signal.SIGKILL)

    code, errors = interrupted(tmp_path, kill)
    wait_for_the_end_of(seen)
    assert len(seen) == 2 and not (tmp_path / "out").exists()
    if victim == "worker":
        assert code == 1 and errors.count("\n") == 1
        assert "killed by SIGKILL" in errors and "nothing was written" in errors
        assert [file.name for file in tmp_path.iterdir()] == ["big.jsonl"]


def test_idle_workers_do_not_outlive_their_parent():
    code = (
        "import operator, time; from halny.model.data.workers import ordered_map\n"
        "results = ordered_map(operator.methodcaller, 'bit_length', range(100), 2)\n"
        "print(next(results), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.2)  # they have done all they were given
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert len(workers) == 2
    wait_for_the_end_of(workers)


def test_ordered_map():
    """Results in order, items taken only a few ahead, exceptions of a worker raised here."""
    taken, before = [], set(children(os.getpid()))  # children of other tests, which may end at any time

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    results = ordered_map(operator.methodcaller, "bit_length", items(), 2)
    assert next(results) == 0 and len(taken) <= 8
    assert list(results) == [i.bit_length() for i in range(1, 50)]
    with pytest.raises(AttributeError, match="no_such"):
        list(ordered_map(operator.methodcaller, "no_such", range(3), 1))
    assert set(children(os.getpid())) <= before


def test_links_are_followed_once_and_broken_ones_refused(tmp_path):
    (tmp_path / "in/real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/real/a.txt").write_text("one")
    (tmp_path / "elsewhere/b.txt").write_text("two")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    prepare([tmp_path / "in"], tmp_path / "out", val_fraction=0.0, progress=False)
    assert Dataset(tmp_path / "out").manifest["splits"]["train"]["documents"] == 2
    (tmp_path / "in/broken.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a link to .*gone, which is not there"):
        prepare([tmp_path / "in"], tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()
