"""What goes from one Hugging Face folder to the next beside the weights, and what a path that is none probably is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from halny.model import hf_folder
from halny.model.convert import load_hf, save_hf
from halny.model.data.dataset import DataError, open_dataset
from halny.model.data.tokenizer import load_tokenizer
from halny.model.data.writer import write_dataset
from halny.model.hf_folder import read_carried, read_hf_config
from halny.model.hints import hint
from halny.model.mistral import PRESETS, Mistral
from halny.model.tokenizer_files import SpecialIds, makes_the_same_ids, read_chat_template, special_ids, tokenizer_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1795188\n"


@pytest.fixture(scope="module")
def model() -> Mistral:
    model = Mistral(PRESETS["test"])
    model.init_weights(0)
    return model


def tokenizer_json(pieces: list[str], post_processor: dict | None = None, merges: list | None = None) -> str:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": piece, **flags} for i, piece in enumerate(pieces) if piece[0] == "<"]
    bpe = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges or []}
    return json.dumps({"model": bpe, "added_tokens": added, "post_processor": post_processor})


def folder_of(path: Path, files: dict[str, str | dict]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- config.json, generation_config.json


def test_what_a_folder_says_beside_its_sizes_is_the_same_after_a_round_trip(model, tmp_path):
    save_hf(model, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"eos_token_id": [2, 7], "pad_token_id": 5, "initializer_range": 0.01, "task": {"of": "mine"}}
    config |= {"auto_map": {"AutoModel": "code.py"}, "transformers_version": "4.1", "rope_scaling": None}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    (tmp_path / "base/generation_config.json").write_text(json.dumps(generation | {"transformers_version": "4.1"}))
    folder_of(
        tmp_path / "base", {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{x}}"}]}}
    )
    folder_of(tmp_path / "tokenizer", {"tokenizer.json": tokenizer_json(["a"]), "tokenizer_config.json": "{}"})

    carried, left = read_carried(tmp_path / "base")
    assert carried == json.loads(json.dumps(carried))
    names = [
        "config.json: auto_map",
        "config.json: transformers_version",
        "generation_config.json: transformers_version",
    ]
    assert left == names
    again, tokenizer = load_hf(tmp_path / "base"), tmp_path / "tokenizer"
    assert again.config.eos_id == 2
    save_hf(again, tmp_path / "out", carried=carried, tokenizer=tokenizer)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {key: x for key, x in config.items() if key not in (*hf_folder.NOT_CARRIED, "rope_scaling")}
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == generation
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{x}}"
    assert read_carried(tmp_path / "out") == (carried, [])
    assert read_hf_config(tmp_path / "out") == again.config
    save_hf(again, tmp_path / "out", carried=carried, tokenizer=tokenizer)  # a second time, over the first

    save_hf(again, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/generation_config.json").read_text())["eos_token_id"] == 2


def test_generation_stops_where_the_config_says_if_there_is_no_generation_config(model, tmp_path):
    carried = {"config": {"eos_token_id": [2, 7], "pad_token_id": 0}}
    save_hf(model, tmp_path / "out", carried=carried)
    told = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert told == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}


def test_fp16_holds_what_it_can_and_refuses_the_rest(model, tmp_path):
    save_hf(model, tmp_path / "out", dtype=torch.float16)
    halves = {name: x.half() for name, x in model.state_dict().items()}
    assert all(torch.equal(x, halves[name]) for name, x in load_hf(tmp_path / "out").state_dict().items())
    before = contents(tmp_path)
    large = Mistral(PRESETS["test"])
    large.init_weights(0)
    with torch.no_grad():
        large.layers[1].mlp.down.weight[3, 4] = 70000
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds a number beyond fp16's"):
        save_hf(large, tmp_path / "out", dtype=torch.float16)
    assert contents(tmp_path) == before


# ---- the tokenizer's files


def test_tokenizer_files_travel_byte_for_byte(model, tmp_path):
    files = {
        "tokenizer.json": tokenizer_json(["a", "<s>"]),
        "tokenizer.model": "pieces and scores",
        "tokenizer_config.json": '{ "extra_special_tokens": {"image": "<i>"},\n "chat_template": "{{a}}"}',
        "added_tokens.json": "{}",
        "additional_chat_templates/tool_use.jinja": "{{tools}}",
        "tokenizer.model.v3": "pieces of another version",
    }
    source = folder_of(tmp_path / "mine", files)
    (source / "model.safetensors").write_text("no file of a tokenizer")
    (source / "additional_chat_templates/notes.txt").write_text("neither")
    assert tokenizer_files(source) == list(files)
    carried = {"chat_template": "another"}  # the tokenizer has its own
    for _ in range(2):  # the second over the first
        save_hf(model, tmp_path / "out", tokenizer=source, carried=carried)
        out = contents(tmp_path / "out")
        assert {name: out[name].decode() for name in files} == files
        assert out.keys() - files.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    (tmp_path / "out/additional_chat_templates/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds additional_chat_templates, which is no part of an export"):
        save_hf(model, tmp_path / "out", tokenizer=source)


def test_a_tokenizer_json_alone_is_read_as_it_stands(model, tmp_path):
    """AutoTokenizer would guess its class by the type of the model, and then know no token that ends a text."""
    from transformers import AutoTokenizer

    pieces = ["<end>", *(chr(i) for i in range(33, 126)), "<pad>"]
    source = folder_of(tmp_path / "mine", {"tokenizer.json": tokenizer_json(pieces)})
    config = PRESETS["test"].__class__(**{**vars(PRESETS["test"]), "bos_id": None, "eos_id": 0})
    ours = Mistral(config)
    ours.init_weights(0)
    save_hf(ours, tmp_path / "out", tokenizer=source, carried={"config": {"pad_token_id": len(pieces) - 1}})
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (None, 0, len(pieces) - 1)
    assert read(["wind", "x"], padding=True).input_ids[1][:3] == [len(pieces) - 1] * 3
    assert read.model_input_names == ["input_ids", "attention_mask"]
    assert contents(tmp_path / "out")["tokenizer.json"] == contents(source)["tokenizer.json"]


def template(*parts: str) -> dict:
    single = [{"Sequence": {"id": "A"}} if part == "A" else {"SpecialToken": {"id": part}} for part in parts]
    return {"type": "TemplateProcessing", "single": single, "special_tokens": {}}


@pytest.mark.parametrize(
    "post_processor, files, expected",
    [
        (None, {}, (None, None, None)),
        (template("<s>", "A"), {}, (1, None, None)),
        (template("<s>", "A", "</s>"), {}, (1, 2, None)),
        (template("<s>", "<s>", "A"), {}, (None, None, None)),  # two: neither is the beginning
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("A", "</s>")]}, {}, (None, 2, None)),
        ({"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}, {}, (1, 2, None)),
        (None, {"config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}}, (1, 2, 0)),
        (template("<s>", "A"), {"config.json": {"bos_token_id": 3, "eos_token_id": 99}}, (1, None, None)),
        # who names them beside the file has the only word
        (template("<s>", "A"), {"tokenizer_config.json": {"eos_token": "</s>"}}, (None, 2, None)),
        (None, {"special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "a"}}, (1, 3, None)),
        (
            None,
            {
                "special_tokens_map.json": {"eos_token": "a", "pad_token": "<unk>"},
                "tokenizer_config.json": {"eos_token": "</s>", "bos_token": None},
                "config.json": {"bos_token_id": 1},
            },
            (None, 2, 0),
        ),
        (None, {"tokenizer_config.json": "[broken"}, (None, None, None)),
    ],
)
def test_which_ids_a_tokenizer_names(tmp_path, post_processor, files, expected):
    raw = tokenizer_json(["<unk>", "<s>", "</s>", "a"], post_processor)
    assert special_ids(folder_of(tmp_path, {"tokenizer.json": raw, **files})) == SpecialIds(*expected)


def test_tokenizers_written_by_two_versions_of_a_library_are_the_same(tmp_path):
    pieces = ["a", "b", "ab", "<s>"]
    folders = [
        folder_of(tmp_path / str(i), {"tokenizer.json": tokenizer_json(words, merges=merges)})
        for i, (words, merges) in enumerate(
            [(pieces, ["a b"]), (pieces, [["a", "b"]]), (pieces, [["b", "a"]]), (["b", "a", "ab", "<s>"], ["a b"])]
        )
    ]
    same = [[makes_the_same_ids(one, other) for other in folders] for one in folders]
    assert same == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert not makes_the_same_ids(folders[0], tmp_path / "nowhere")


def test_chat_templates_of_any_version(tmp_path):
    assert read_chat_template(tmp_path) is None
    folder_of(tmp_path, {"tokenizer_config.json": {"chat_template": "inside"}})
    assert read_chat_template(tmp_path) == "inside"
    folder_of(tmp_path, {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "x"}]}})
    assert read_chat_template(tmp_path) is None
    folder_of(tmp_path, {"chat_template.jinja": "beside"})
    assert read_chat_template(tmp_path) == "beside"


# ---- hints

HINTED = {
    "adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, ["LoRA adapter", "merge"]),
    "cache": ({"refs/main": "c0ffee", "snapshots/c0ffee/config.json": "{}"}, ["cache", "snapshots/c0ffee"]),
    "hub": ({"models--a--b/snapshots/c0ffee/config.json": "{}"}, ["cache", "models--a--b/snapshots/c0ffee"]),
    "run": ({"config.json": "{}", "checkpoints/x": "", "export/config.json": "{}"}, ["run of train.py", "export/"]),
    "unfinished": ({"config.json": "{}", "checkpoints/x": ""}, ["run of train.py", "halny.model.export"]),
    "step-00000003": ({"manifest.json": "{}"}, ["checkpoint", "halny.model.export"]),
    "pointers": ({"tokenizer.model": POINTER, "model.safetensors": POINTER}, ["model.safetensors", "git lfs pull"]),
}


@pytest.mark.parametrize("name", HINTED)
def test_a_refusal_says_what_the_folder_probably_is(tmp_path, name):
    files, words = HINTED[name]
    folder = folder_of(tmp_path / name, files)
    with pytest.raises(ValueError) as weights:
        load_hf(folder)
    with pytest.raises(DataError) as tokenizer:
        load_tokenizer(folder)
    for refusal in (weights, tokenizer):
        assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_hub_id_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1" in hint("mistralai/Mistral-7B-v0.1")
    for other in ("nowhere", "a/b/c", "/mistralai/x", "../x", tmp_path):
        assert hint(other) == ""


def test_git_lfs_pointers_are_refused_wherever_they_lie(model, tmp_path):
    save_hf(model, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull in .*/hf"):
        load_hf(tmp_path / "hf")
    source = folder_of(tmp_path / "tok", {"tokenizer.json": tokenizer_json(["a"]), "tokenizer.model": POINTER})
    for refuse in (lambda: save_hf(model, tmp_path / "out", tokenizer=source), lambda: load_tokenizer(source)):
        with pytest.raises((ValueError, DataError), match=r"tokenizer\.model is a Git LFS pointer"):
            refuse()
    assert not (tmp_path / "out").exists()

    write_dataset([np.arange(99)], tmp_path / "data", vocab_size=99)
    (tmp_path / "data/train-00000.npy").write_text(POINTER)
    (tmp_path / "raw.bin").write_text(POINTER + " " * (len(POINTER) % 2))
    for path, name, dtype in (("data", "train-00000.npy", None), ("raw.bin", "raw.bin", "uint16")):
        with pytest.raises(DataError, match=f"{name} is a Git LFS pointer"):
            open_dataset(tmp_path / path, dtype)
