"""python -m halny.model.convert: each row of a new vocabulary is what it should be, layers, and what is refused."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clients import sizes_folder
from runs import REPO, ranks_run, snapshot
from test_tokenizer_files import POLISH, byte_level, saved
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from halny.model import convert
from halny.model.convert import load_hf, save_hf
from halny.model.data.tokenizer import mistral_tokenizer
from halny.model.data.writer import write_dataset
from halny.model.exits import FAILED, FINISHED, REFUSED
from halny.model.mistral import PRESETS, Mistral
from halny.model.reshape import layer_order
from halny.model.tokenizer_files import pieces, special_ids, spelled

MORE_POLISH = POLISH + "Wieje wiatr od gór, a w mieście nikt nie śpi; źdźbła trawy chwieją się na łące nad Łodzią.\n"


def model_folder(path: Path, tokenizer: Path | None, n: int, dtype=torch.float32, carried=None, **sizes) -> Path:
    """A small model of n rows with random weights, none of them like another."""
    model = Mistral(replace(PRESETS["test"], vocab_size=n, **sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    save_hf(model, path, dtype=dtype, tokenizer=tokenizer, carried=carried)
    return path


def converted(source: Path, out: Path, *options) -> Path:
    assert convert.main([str(source), str(out), *map(str, options)]) == FINISHED
    return out


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_hf(folder).state_dict()


def in_raw(source: Path, target: Path, change) -> Path:
    """A copy of a tokenizer folder whose tokenizer.json is changed."""
    shutil.copytree(source, target)
    raw = json.loads((source / "tokenizer.json").read_text())
    change(raw)
    (target / "tokenizer.json").write_text(json.dumps(raw))
    return target


def shuffled(raw: dict, seed: int = 0) -> None:
    """Other ids for all tokens."""
    ids = list(range(len(raw["model"]["vocab"])))
    random.Random(seed).shuffle(ids)
    raw["model"]["vocab"] = {piece: ids[i] for piece, i in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        token["id"] = ids[token["id"]]
    for token in (raw.get("post_processor") or {}).get("special_tokens", {}).values():
        token["ids"] = [ids[i] for i in token["ids"]]


def grown(raw: dict, text: str, n: int) -> None:
    """n merges more, of the pieces that stand beside each other most often in a text."""
    vocabulary, merges = raw["model"]["vocab"], raw["model"]["merges"]
    merges[:] = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    n += len(vocabulary)
    while len(vocabulary) < n:
        backend = Tokenizer.from_str(json.dumps(raw))
        words = [backend.encode(word, add_special_tokens=False).tokens for word in text.split()]
        pairs = Counter(pair for word in words for pair in pairwise(word))
        for pair in [pair for pair, _ in pairs.most_common() if "".join(pair) not in vocabulary][:20]:
            if len(vocabulary) < n and "<" not in "".join(pair):
                vocabulary.setdefault("".join(pair), len(vocabulary))
                merges.append(list(pair))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    for name, content in mistral_tokenizer().files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def model(mistral, tmp_path_factory) -> Path:
    """A small model with Mistral's tokenizer, in bf16."""
    return model_folder(tmp_path_factory.mktemp("model") / "hf", mistral, 32000, torch.bfloat16)


@pytest.fixture(scope="module")
def polish(mistral, tmp_path_factory) -> Path:
    """Mistral's tokenizer, grown by 60 merges of Polish and two special tokens, under other ids."""

    def change(raw):
        grown(raw, MORE_POLISH, 60)
        for token in ("<|im_start|>", "<|im_end|>"):
            raw["model"]["vocab"][token] = len(raw["model"]["vocab"])
            raw["added_tokens"].append(
                {**raw["added_tokens"][0], "id": len(raw["model"]["vocab"]) - 1, "content": token}
            )
        shuffled(raw)

    folder = in_raw(mistral, tmp_path_factory.mktemp("polish") / "grown", change)
    (folder / "tokenizer.model").unlink()
    return folder


def by_name(folder: Path) -> dict[str, int]:
    return {piece: i for i, piece in pieces(folder).items()}


# ---- onto itself, and onto a permutation of itself


@pytest.mark.parametrize("options", [[], ["--layers", "0-1"]])
def test_a_tokenizer_onto_itself_is_the_identity(model, mistral, tmp_path, options, capsys):
    out = converted(model, tmp_path / "out", "--tokenizer", mistral, *options)
    before, after = weights(model), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_hf(out).config == load_hf(model).config and after["embed.weight"].dtype == torch.bfloat16
    files = snapshot(model)
    assert all(snapshot(out)[name] == files[name] for name in files if "config" not in name)
    assert "vocabulary 32,000 -> 32,000 ids: 32,000 rows kept\n" in capsys.readouterr().out


def test_rows_beyond_the_tokenizer_stay_where_the_tokenizer_does(mistral, tmp_path):
    source = model_folder(tmp_path / "padded", mistral, 32010)
    out = converted(source, tmp_path / "out", "--tokenizer", mistral)
    assert torch.equal(weights(out)["embed.weight"], weights(source)["embed.weight"])
    out = converted(source, tmp_path / "out", "--tokenizer", mistral, "--pad-to", 64)  # 32,000 is a multiple
    assert torch.equal(weights(out)["head.weight"], weights(source)["head.weight"][:32000])


def test_a_permuted_tokenizer_permutes_the_rows(model, mistral, tmp_path, capsys):
    other = in_raw(mistral, tmp_path / "permuted", shuffled)
    out = converted(model, tmp_path / "out", "--tokenizer", other)
    old, new = by_name(mistral), by_name(other)
    at = torch.tensor([new[piece] for piece in old])  # of each old id, in order
    before, after = weights(model), weights(out)
    for name in before:
        row = after[name][at] if name in ("embed.weight", "head.weight") else after[name]
        assert torch.equal(row, before[name]), name
    assert not torch.equal(after["embed.weight"], before["embed.weight"])

    backends = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (mistral, other)]
    ids, moved = (torch.tensor([backend.encode(MORE_POLISH).ids]) for backend in backends)
    assert torch.equal(at[ids], moved)
    with torch.no_grad():
        expected, got = load_hf(model, torch.float32)(ids), load_hf(out, torch.float32)(moved)
    torch.testing.assert_close(got[..., at], expected, rtol=1e-6, atol=1e-6)
    config = config_of(out)
    assert (config["bos_token_id"], config["eos_token_id"]) == (new["<s>"], new["</s>"])
    assert config["pad_token_id"] == new["<unk>"]
    moved = sum(new[piece] != i for piece, i in old.items())
    assert f"32,000 rows kept (moved {moved:,})\n" in capsys.readouterr().out


# ---- a tokenizer that grew


def spelled_by(folder: Path, words: list[str]) -> dict[str, list[int]]:
    """The ids of pieces by a whole tokenizer with nothing before its model."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = raw["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(raw))
    return {piece: backend.encode(piece, add_special_tokens=False).ids for piece in words}


def test_new_pieces_are_the_mean_of_the_old_ones_that_spell_them(model, mistral, polish, tmp_path, capsys):
    out = converted(model, tmp_path / "out", "--tokenizer", polish, "--pad-to", 64)
    said = capsys.readouterr().out
    before, after, old, new = weights(model), weights(out), by_name(mistral), by_name(polish)
    added = [piece for piece in new if piece not in old and not piece.startswith("<")]
    spelling = spelled_by(mistral, added)
    n_pieces = sum(map(len, spelling.values())) / 60
    assert len(added) == 60 and min(map(len, spelling.values())) > 1
    words = rf"32,000 -> 32,064 ids: 32,000 rows kept \(moved [\d,]+\), 60 composed of {n_pieces:.1f} old pieces on"
    assert re.search(words + r" average, 4 made \(the mean of all\)\n", said), said
    assert re.search(
        r'\ncomposed   "\S+" = "\S+" \+ .*, \.\.\.\nmade       "<\|im_end\|>", "<\|im_start\|>", 2 ids', said
    )

    for name in ("embed.weight", "head.weight"):
        kept = torch.tensor([[i, new[piece]] for piece, i in old.items()])
        assert torch.equal(after[name][kept[:, 1]], before[name][kept[:, 0]])
        for piece, ids in spelling.items():
            row = np.mean([before[name][i].double().numpy() for i in ids], axis=0)
            assert torch.equal(after[name][new[piece]], torch.from_numpy(row).bfloat16()), piece
        mean = torch.from_numpy(before[name].double().numpy().mean(axis=0)).bfloat16()
        for i in (new["<|im_start|>"], new["<|im_end|>"], 32062, 32063):
            assert torch.equal(after[name][i], mean)
    assert config_of(out)["halny"]["vocabulary"] == {"kept": 32000, "composed": 60, "made": 4}
    assert config_of(out)["vocab_size"] == 32064

    ids = torch.tensor([Tokenizer.from_file(str(mistral / "tokenizer.json")).encode("The wind of the mountains").ids])
    at = torch.tensor([new[piece] for piece in old])
    with torch.no_grad():
        expected, got = load_hf(model, torch.float32)(ids), load_hf(out, torch.float32)(at[ids])
    torch.testing.assert_close(got[..., at], expected, rtol=1e-6, atol=1e-6)


def test_pieces_of_bytes_fall_back_on_byte_tokens(model, mistral, tmp_path):
    """From SentencePiece's vocabulary to a byte-level one: the same pieces are written in another way."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["🦙", " the mountains"])
    other = saved(tokenizer, tmp_path / "bytes", bos_token="<s>", eos_token="</s>")
    out = converted(model, tmp_path / "out", "--tokenizer", other)
    x, y, old, new = *(weights(f)["embed.weight"] for f in (model, out)), by_name(mistral), by_name(other)

    def row(*names):
        return x[[old[name] for name in names]].double().mean(0).bfloat16()

    assert torch.equal(y[new["A"]], row("A"))  # the letter's row, not that of <0x41>
    assert torch.equal(y[new["Ġ"]], row("▁"))
    words = [piece for piece in new if piece[0] == "Ġ" and "▁" + piece[1:] in old]
    assert len(words) > 3 and all(torch.equal(y[new[piece]], row("▁" + piece[1:])) for piece in words)
    assert torch.equal(y[new["Ċ"]], row("<0x0A>")) and torch.equal(y[new["Å"]], row("<0xC5>"))
    assert torch.equal(y[new["ÅĤ"]], row("ł"))  # two bytes, one letter
    assert torch.equal(y[new["🦙"]], row("<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"))
    assert torch.equal(y[new[" the mountains"]], row("▁the", "▁mountains"))
    halves = [piece for piece in new if len(spelled(other).get(new[piece], b"")) > 1 and "Å" in piece[-1:]]
    for piece in halves:  # letters, and half of one
        assert y[new[piece]].isfinite().all()
    assert torch.equal(y[new["<s>"]], row("<s>")) and torch.equal(y[new["</s>"]], row("</s>"))


def tiny(folder: Path, vocabulary: list[str], merges=(), special=(), added=(), sp: bool = False, **named) -> Path:
    """A BPE of a handful of pieces: byte-level, or SentencePiece's with bytes to fall back on."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, list(merges), byte_fallback=sp))
    tokenizer.decoder = decoders.Metaspace() if sp else decoders.ByteLevel()
    tokenizer.pre_tokenizer = None if sp else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in added])
    return saved(tokenizer, folder, **named)


def rows_of(tmp_path: Path, old: Path, new: Path, *options, n: int | None = None, **given) -> tuple:
    """(old rows, new rows by piece) of the head, OUT."""
    n = 1 + max(pieces(old)) if n is None else n
    source = model_folder(tmp_path / "hf", old, n, **given)
    out = converted(source, tmp_path / "out", "--tokenizer", new, *options)
    head = weights(out)["head.weight"]
    return weights(source)["head.weight"], {piece: head[i] for piece, i in by_name(new).items()}, out


def mean(x: torch.Tensor, *ids: int) -> torch.Tensor:
    return x[list(ids)].double().mean(0).float()


def test_each_byte_takes_a_row_of_its_own_kind_first(tmp_path):
    old = tiny(tmp_path / "old", ["<0x41>", "A", "<0x42>", "B", "<0x43>", "D"], sp=True)
    new = tiny(tmp_path / "new", ["D", "C", "<0x44>", "A", "<0x41>", "<0x45>"], sp=True)
    x, y, _ = rows_of(tmp_path, old, new, n=9)  # three rows are of no token, and count in no mean
    expected = {"A": x[1], "<0x41>": x[0], "C": x[4], "<0x44>": x[5], "D": x[5], "<0x45>": mean(x, *range(6))}
    assert all(torch.equal(y[piece], row) for piece, row in expected.items())


def test_of_two_pieces_that_stand_for_one_text_each_keeps_its_own_row(tmp_path):
    old = tiny(tmp_path / "old", ["▁", " ", "a"], sp=True)
    new = tiny(tmp_path / "new", ["a", "▁", " "], sp=True)
    x, y, _ = rows_of(tmp_path, old, new)
    assert torch.equal(torch.stack([y["▁"], y[" "], y["a"]]), x)


def test_half_a_character_is_spelled_by_bytes(tmp_path):
    """b"a\\xc5" is no text; neither are the bytes of a character that the old vocabulary lacks."""
    old = tiny(tmp_path / "old", ["a", "▁", "▁a", "<0xC5>", "<0x82>", "<0xC4>"], [("▁", "a")], sp=True)
    merges = [("a", "Å"), ("Ġ", "a"), ("Ġa", "Å"), ("Å", "Ĥ"), ("a", "Ä"), ("Ĥ", "Ä")]
    new = tiny(tmp_path / "new", ["Ġ", "a", "Å", "Ĥ", "Ä", "ħ", *("".join(merge) for merge in merges), "aħ"], merges)
    x, y, _ = rows_of(tmp_path, old, new)
    every = mean(x, *range(6))
    expected = {
        **{"a": x[0], "Ġ": x[1], "Ġa": x[2], "Å": x[3], "Ĥ": x[4], "Ä": x[5]},
        **{"aÅ": mean(x, 0, 3), "ĠaÅ": mean(x, 2, 3), "ÅĤ": mean(x, 3, 4), "aÄ": mean(x, 0, 5), "ĤÄ": mean(x, 4, 5)},
        **{"ħ": every, "aħ": every},  # a byte that nothing spells
    }
    assert expected.keys() == y.keys() and all(torch.equal(y[piece], row) for piece, row in expected.items())


def test_a_byte_level_vocabulary_to_sentencepieces(tmp_path):
    old = tiny(tmp_path / "old", ["a", "Ġ", "Ġa", "Å", "Ĥ", "â", "ĸ", "ģ"], [("Ġ", "a")])
    new = tiny(tmp_path / "new", ["▁", "▁a", "<0xC5>", "ł", "ała", "▁a▁a", "<0x61>"], sp=True)
    x, y, _ = rows_of(tmp_path, old, new)
    expected = {"▁": x[1], "▁a": x[2], "<0xC5>": x[3], "ł": mean(x, 3, 4), "ała": mean(x, 0, 3, 4, 0)}
    expected |= {"▁a▁a": x[2], "<0x61>": x[0]}
    assert all(torch.equal(y[piece], row) for piece, row in expected.items())


def test_old_ids_without_a_row_are_not_there(tmp_path):
    old = tiny(tmp_path / "old", ["a", "b", "ab", "c"], [("a", "b")])
    new = tiny(tmp_path / "new", ["c", "ab", "b", "a"], [("a", "b")])
    x, y, _ = rows_of(tmp_path, old, new, n=2)
    assert torch.equal(y["a"], x[0]) and torch.equal(y["b"], x[1]) and torch.equal(y["c"], mean(x, 0, 1))


# ---- special tokens


def test_special_tokens_follow_their_role(tmp_path, capsys):
    named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    old = tiny(tmp_path / "old", ["a"], special=["<unk>", "<s>", "</s>", "<pad>", "<tool>", "<gone>"], **named)
    named = dict(bos_token="<|begin|>", eos_token="<|end|>", unk_token="<?>", pad_token="<fill>")
    new = tiny(
        tmp_path / "new", ["a"], special=["<|end|>", "<|begin|>", "<fill>", "<?>", "<tool>", "<new>", "</s>"], **named
    )
    carried = {
        "config": {"eos_token_id": [3, 5, 6], "pad_token_id": 4},
        "generation_config": {"bos_token_id": 2, "eos_token_id": [6, 5], "temperature": 0.6, "suppress_tokens": [5]},
        "chat_template": "{{ '<gone>' }}",
    }
    x, y, out = rows_of(tmp_path, old, new, carried=carried, bos_id=2, eos_id=3)
    expected = {"<|end|>": x[3], "<|begin|>": x[2], "<fill>": x[4], "<?>": x[1], "<tool>": x[5], "</s>": x[3]}
    expected |= {"<new>": mean(x, *range(7)), "a": x[0]}
    assert expected.keys() == y.keys() and all(torch.equal(y[piece], row) for piece, row in expected.items())

    assert special_ids(new) == (2, 1, 3)
    config, generation = config_of(out), json.loads((out / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, [1, 5], 3)
    assert generation == {"bos_token_id": 2, "eos_token_id": [5], "temperature": 0.6}
    said = capsys.readouterr().out
    assert said.count('left out   eos_token_id 6 ("<gone>"): new has no such token\n') == 1
    assert "left out   suppress_tokens" in said and "left out   the chat template: new has no " in said
    assert not (out / "chat_template.jinja").exists()
    assert (out / "README.md").read_text().count("left out") == 3 and str(tmp_path) not in (
        out / "README.md"
    ).read_text()


def test_special_tokens_without_a_role_follow_their_name(tmp_path):
    """A token may be special in one tokenizer and not in the other; one that both begins and ends texts is an end."""
    old = tiny(tmp_path / "old", ["a", "<", ">"], special=["<s>", "</s>", "<x>"], added=["<y>"])
    (tmp_path / "old/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    named = dict(bos_token="<|both|>", eos_token="<|both|>", pad_token="<x>")
    new = tiny(tmp_path / "new", ["<", "a", ">"], special=["<|both|>", "<y>"], added=["<x>"], **named)
    carried = {"generation_config": {"eos_token_id": [99], "forced_eos_token_id": 98, "bos_token_id": None}}
    x, y, out = rows_of(tmp_path, old, new, bos_id=3, eos_id=4, carried=carried)
    expected = {"<|both|>": x[4], "<y>": x[6], "<x>": x[5], "<": x[1], "a": x[0], ">": x[2]}
    assert all(torch.equal(y[piece], row) for piece, row in expected.items())
    config = config_of(out)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 3, 5)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [3], "bos_token_id": None}  # an end that is gone is replaced, the rest not


def test_tokens_that_only_the_files_beside_tokenizer_json_name(tmp_path):
    """As folders of transformers up to 4.33 have them; transformers adds them when it reads the folder."""
    old, new = tiny(tmp_path / "old", ["a", "b"]), tiny(tmp_path / "new", ["b"], special=["<x>"])
    (old / "added_tokens.json").write_text('{"<x>": 2, "<y>": 3}')
    (new / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "<y>"}}}')
    source = model_folder(tmp_path / "hf", old, 4)
    x, y = (
        weights(folder)["head.weight"] for folder in (source, converted(source, tmp_path / "out", "--tokenizer", new))
    )
    assert torch.equal(y, torch.stack([x[1], x[2], mean(x, 0, 1, 2, 3), x[3]]))


def test_ids_that_the_new_tokenizer_does_not_name_are_those_of_the_same_tokens(tmp_path):
    old = tiny(tmp_path / "old", ["a"], special=["<s>", "</s>"])
    new = tiny(tmp_path / "new", ["b", "a"], special=["</s>"])
    _, _, out = rows_of(tmp_path, old, new, bos_id=1, eos_id=2, carried={"chat_template": "{{ x }}"})
    assert (config_of(out)["bos_token_id"], config_of(out)["eos_token_id"]) == (None, 2)
    source = model_folder(tmp_path / "again", new, 3, bos_id=None, eos_id=2, carried={"chat_template": "{{ x }}"})
    out = converted(source, tmp_path / "kept", "--tokenizer", old)
    assert (config_of(out)["bos_token_id"], config_of(out)["eos_token_id"]) == (None, 2)
    assert (out / "chat_template.jinja").read_text() == "{{ x }}"


# ---- padding and layers


def test_padding_alone_adds_rows_up_to_a_multiple(model, tmp_path, capsys):
    out = converted(model, tmp_path / "out", "--pad-to", 128 * 3)
    x, y = weights(model)["head.weight"], weights(out)["head.weight"]
    assert y.shape[0] == 32256 and torch.equal(y[:32000], x)
    assert (y[32000:] == x.double().mean(0).bfloat16()).all()
    assert "32,000 -> 32,256 ids: 32,000 rows kept, 256 made (the mean of all)\n" in capsys.readouterr().out
    assert snapshot(out)["tokenizer.model"] == snapshot(model)["tokenizer.model"]

    bare = model_folder(tmp_path / "bare", None, 10)
    y = weights(converted(bare, tmp_path / "two", "--pad-to", 4))["head.weight"]
    assert y.shape[0] == 12 and torch.equal(y[11], y[:10].double().mean(0).float())
    assert "none found" in capsys.readouterr().out


def test_layers_are_those_named_in_their_order(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    source = model_folder(tmp_path / "hf", None, 64, n_layers=4)
    out = converted(source, tmp_path / "out", "--layers", "0-2,1-3,0")
    order = [0, 1, 2, 1, 2, 3, 0]
    before, after = weights(source), weights(out)
    per_layer = [name.removeprefix("layers.0.") for name in before if name.startswith("layers.0.")]
    assert len(after) - 3 == len(order) * len(per_layer) and len(per_layer) > 5
    for i, of in enumerate(order):
        assert all(torch.equal(after[f"layers.{i}.{name}"], before[f"layers.{of}.{name}"]) for name in per_layer)
    assert all(torch.equal(after[name], before[name]) for name in ("embed.weight", "norm.weight", "head.weight"))
    assert load_hf(out).config == replace(load_hf(source).config, n_layers=7)
    assert "layers     0-2,1-3,0: 7 where there were 4\n" in capsys.readouterr().out
    assert config_of(out)["halny"] == {"layers": "0-2,1-3,0"}

    tokens = torch.arange(30)[None] * 7 % 64
    by_hand = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    by_hand.config.num_hidden_layers = len(order)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[i] for i in order])
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        expected, read = by_hand(tokens, use_cache=False).logits, theirs(tokens).logits
        torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_hf(out)(tokens), read, rtol=1e-4, atol=1e-4)


def test_all_at_once_and_read_by_transformers(model, polish, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    both = converted(model, tmp_path / "both", "--tokenizer", polish, "--pad-to", 64, "--layers", "1,0,1")
    one = converted(model, tmp_path / "one", "--tokenizer", polish, "--pad-to", 64)
    two = converted(one, tmp_path / "two", "--layers", "1,0,1")
    assert snapshot(both)["model.safetensors"] == snapshot(two)["model.safetensors"]
    assert {name for name, x in snapshot(both).items() if snapshot(two)[name] != x} == {"config.json", "README.md"}
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(both), AutoTokenizer.from_pretrained(both)
    ids = tokenizer(POLISH, return_tensors="pt").input_ids
    assert theirs.config.vocab_size == 32064 and theirs.dtype == torch.bfloat16
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == POLISH.strip()
    with torch.no_grad():
        torch.testing.assert_close(theirs.float()(ids).logits, load_hf(both, torch.float32)(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "text, expected",
    [("0-2,1-3", [0, 1, 2, 1, 2, 3]), ("3, 2 ,1-1", [3, 2, 1]), ("0", [0]), (" 1 - 2 ", [1, 2])],
)
def test_layer_order(text, expected):
    assert layer_order(text, 4) == expected


# ---- refusals


def lone(tmp_path: Path, name: str, content: str | None) -> Path:
    (tmp_path / name).mkdir()
    if content is not None:
        (tmp_path / name / "tokenizer.json").write_text(content)
    return tmp_path / name


WORDPIECE = '{"model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", '
WORDPIECE += '"max_input_chars_per_word": 9, "vocab": {"a": 0}}, "added_tokens": []}'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1795188\n"
REFUSED_BY = {
    "nothing": (["SMALL", "OUT"], ["--tokenizer, --pad-to or --layers"]),
    "pad": (["SMALL", "OUT", "--pad-to", "0"], ["--pad-to 0", "1 or more"]),
    "no such layer": (["SMALL", "OUT", "--layers", "0-1,1-40"], ["0-1,1-40", "no layer 40", "layers 0 to 1"]),
    "beyond": (["SMALL", "OUT", "--layers", "7-9"], ["no layer 7", "layers 0 to 1"]),
    "open": (["SMALL", "OUT", "--layers", "1-"], ["--layers 1-", "'1-'", "0-23,8-31"]),
    "backwards": (["SMALL", "OUT", "--layers", "1-0"], ["'1-0'", "0-23,8-31"]),
    "letters": (["SMALL", "OUT", "--layers", "0,a"], ["'a'", "0-23,8-31"]),
    "empty": (["SMALL", "OUT", "--layers", ""], ["nothing", "0-23,8-31"]),
    "negative": (["SMALL", "OUT", "--layers=-1"], ["'-1'", "0-23,8-31"]),
    "no model": (["EMPTY", "OUT", "--layers", "0"], ["config.json"]),
    "no weights": (["TOKENIZER", "OUT", "--layers", "0"], ["config.json"]),
    "itself": (["SMALL", "SMALL", "--layers", "0"], ["one folder", "another OUT"]),
    "inside": (["SMALL", "SMALL/out", "--layers", "0"], ["one folder", "another OUT"]),
    "around": (["SMALL", "TMP", "--layers", "0"], ["one folder", "another OUT"]),
    "the tokenizer": (["SMALL", "TOKENIZER", "--tokenizer", "TOKENIZER"], ["one folder", "another OUT"]),
    "taken": (["SMALL", "TAKEN", "--layers", "0"], ["mine.txt"]),
    "no tokenizer": (["SMALL", "OUT", "--tokenizer", "EMPTY"], ["EMPTY", "no tokenizer.json", "save_pretrained"]),
    "nowhere": (
        ["SMALL", "OUT", "--tokenizer", "mistralai/Mistral-7B-v0.3"],
        ["hf download mistralai/Mistral-7B-v0.3"],
    ),
    "bare": (["BARE", "OUT", "--tokenizer", "TOKENIZER"], ["BARE has no tokenizer.json", "save_pretrained"]),
    "broken": (["SMALL", "OUT", "--tokenizer", "BROKEN"], ["BROKEN", "cannot be read", "save it again"]),
    "LFS": (["SMALL", "OUT", "--tokenizer", "LFS"], ["LFS", "git lfs pull"]),
    "WordPiece": (["SMALL", "OUT", "--tokenizer", "WORDPIECE"], ["WORDPIECE", "byte-level BPE", "name another"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    tmp_path = tmp_path_factory.mktemp("refused")
    tokenizer = tiny(tmp_path / "TOKENIZER", ["a", "b"])
    model_folder(tmp_path / "SMALL", tokenizer, 2)
    model_folder(tmp_path / "BARE", None, 2)
    for name, content in {"EMPTY": None, "BROKEN": '{"model": [', "LFS": LFS, "WORDPIECE": WORDPIECE}.items():
        lone(tmp_path, name, content)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN/mine.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED_BY)
def test_refusals_name_the_value_and_the_remedy(folders, name, capsys):
    arguments, words = REFUSED_BY[name]
    places = [re.sub(r"^(?=[A-Z]{2,})", f"{folders}/", each).replace("/TMP", "") for each in arguments]
    before = snapshot(folders), sorted(folders.iterdir())
    assert convert.main(places) == REFUSED
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("convert: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert (snapshot(folders), sorted(folders.iterdir())) == before


def test_no_room_is_refused_before_anything_is_written(folders, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    assert convert.main([str(folders / "SMALL"), str(folders / "OUT"), "--layers", "0"]) == REFUSED
    assert "make room" in capsys.readouterr().err and not (folders / "OUT").exists()


def test_typing_errors_are_refused(folders, capsys):
    for arguments in (["--pad-to", "many"], ["--dtype", "bf16"]):
        with pytest.raises(SystemExit) as end:
            convert.main([str(folders / "SMALL"), str(folders / "OUT"), *arguments])
        assert end.value.code == REFUSED and arguments[0] in capsys.readouterr().err


def test_written_whole_or_not_at_all(folders, tmp_path, monkeypatch, capsys):
    out = converted(folders / "SMALL", tmp_path / "out", "--layers", "0,1,0")
    converted(folders / "SMALL", out, "--layers", "1")  # an earlier export is replaced
    before, calls = snapshot(tmp_path), []
    assert load_hf(out).config.n_layers == 1

    def full(*arguments, **options):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    assert convert.main([str(folders / "SMALL"), str(out), "--layers", "0"]) == FAILED
    error = capsys.readouterr().err
    assert calls and snapshot(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert f"convert: {out} was not written: " in error and "No space left" in error and error.count("\n") == 1


def test_as_a_command(folders, tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "halny.model.convert"]
    run = dict(capture_output=True, text=True, cwd=REPO)
    done = subprocess.run([*command, "--help"], check=True, **run)
    assert "--layers 0-23,8-31" in done.stdout and "Exit codes" in done.stdout and done.stderr == ""
    done = subprocess.run([*command, folders / "SMALL", tmp_path / "out", "--layers", "1,1"], check=True, **run)
    assert done.stderr == "" and load_hf(tmp_path / "out").config.n_layers == 2


# ---- what it is for


def bits_per_byte(folder: Path, text: str) -> float:
    """Of a text in pieces of 256 tokens, each of which is told the last token of the one before."""
    model, ids = load_hf(folder), Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    nats, n_bytes, spells = 0.0, 0, spelled(folder)
    with torch.no_grad():
        for at in range(0, len(ids) - 1, 256):
            tokens = torch.tensor(ids[at : at + 257])
            nats += F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="sum").item()
            n_bytes += sum(len(spells[i]) for i in tokens[1:].tolist())
    return nats / math.log(2) / n_bytes


@pytest.mark.slow
def test_a_trained_model_keeps_much_of_what_it_learnt(tmp_path):
    """Bits per byte of its corpus with 20 pieces more; the same with random rows for them, as large as the others."""
    texts = [topics[name] for name in sorted(topics)[:2]]
    ends = dict(bos_token="<s>", eos_token="</s>")
    small = byte_level(n=300, texts=texts)
    old, large = (
        saved(small, tmp_path / "old", **ends),
        saved(byte_level(n=320, texts=texts), tmp_path / "large", **ends),
    )
    new = in_raw(large, tmp_path / "new", shuffled)
    added = [i for piece, i in by_name(new).items() if piece not in by_name(old)]
    assert len(added) == 20
    documents = [np.array(small.encode(text).ids) for text in texts]
    write_dataset(documents, tmp_path / "data", vocab_size=300, val_documents=documents[:1], tokenizer=old)
    recipe = ["--seq-len", 128, "--batch-tokens", 2048, "--dtype", "fp32", "--export-dtype", "fp32", "--eval-every", 0]
    recipe += ["--model", sizes_folder(tmp_path, 300), "--steps", 110, "--lr", "2e-2", "--run-dir", "run"]
    ranks_run(*recipe, "--data", "data", cwd=tmp_path)

    out = converted(tmp_path / "run/export", tmp_path / "out", "--tokenizer", new)
    before, after = (bits_per_byte(folder, "".join(texts)) for folder in (tmp_path / "run/export", out))
    model = load_hf(out)
    for parameter in (model.embed.weight, model.head.weight):
        parameter.data[added] = torch.randn(len(added), parameter.shape[1]) * parameter.data.std()
    save_hf(model, tmp_path / "random", tokenizer=new)
    by_chance = bits_per_byte(tmp_path / "random", "".join(texts))
    print(f"bits per byte: {before:.3f} before, {after:.3f} after, {by_chance:.3f} with random rows for new pieces")
    assert before < 3 and after < by_chance - 0.12 and after < before + 1.2
