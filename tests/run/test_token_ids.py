"""Which ids a run's exports say begin and end a text, and what they keep of --init-from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, ranks_run

from halny.model import export
from halny.model.convert import load_hf, save_hf
from halny.model.data.writer import write_dataset
from halny.model.exits import FINISHED, REFUSED
from halny.model.hf_folder import read_carried
from halny.model.mistral import PRESETS, Mistral
from halny.model.prepare_data import prepare
from halny.model.run.token_ids import of_earlier_weights, of_fresh_weights
from halny.model.tokenizer_files import SpecialIds

MODEL = PRESETS["test"]  # BOS 1, EOS 2
ONE_STEP = [*SMALL, "--steps", 1, "--eval-every", 0]
LINES = ["The wind comes down the mountains, and the trainer goes on.", "It blows for a day or two."] * 8


def own_tokenizer(folder: Path) -> Path:
    """A token a character; "<end>", id 0, ends a text, "<pad>" fills up a batch, and nothing begins a text."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.BPE(vocab={"<end>": 0, "<pad>": 9, **{chr(i): i for i in range(32, 126)}}, merges=[]))
    made.add_special_tokens(["<end>", "<pad>"])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prepared(out: Path, tokenizer: Path) -> Path:
    out.with_suffix(".jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    prepare([out.with_suffix(".jsonl")], out, tokenizer, val_fraction=0, progress=False)
    return out


def told(folder: Path, name: str = "config.json") -> tuple:
    content = json.loads((folder / name).read_text())
    return tuple(content.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad"))


@pytest.mark.parametrize(
    "data, bos, eos, carried",
    [
        (None, 1, 2, {}),
        (SpecialIds(5, 0, None), 5, 0, {}),
        (SpecialIds(None, None, 7), None, None, {"config": {"pad_token_id": 7}}),
        (SpecialIds(255, 256, 257), 255, None, {}),  # the model has 256 rows
    ],
)
def test_fresh_weights_take_what_the_data_say(data, bos, eos, carried):
    assert of_fresh_weights(MODEL, data) == (replace(MODEL, bos_id=bos, eos_id=eos), carried)


def test_earlier_weights_keep_their_ids_and_learn_to_end_as_the_data_do():
    several = {"config": {"eos_token_id": [2, 7], "pad_token_id": 3}, "generation_config": {"eos_token_id": [2, 7]}}
    before = json.dumps(several)
    for around in (SpecialIds(), SpecialIds(1, 7, 9), SpecialIds(None, 2, None)):
        assert of_earlier_weights(MODEL, several, around) == (MODEL, several, [])
    model, carried, said = of_earlier_weights(MODEL, several, SpecialIds(4, 0, 9))
    assert (model.bos_id, model.eos_id) == (4, 2)
    assert carried["config"] == {"eos_token_id": [2, 7, 0], "pad_token_id": 3}
    assert carried["generation_config"] == {"eos_token_id": [2, 7, 0], "bos_token_id": 4}
    assert len(said) == 2 and "end with 0, and --init-from names [2, 7]" in said[0] and "begin with 4" in said[1]
    assert json.dumps(several) == before

    model, carried, said = of_earlier_weights(MODEL, {}, SpecialIds(1, 0, 9))
    assert model == MODEL and carried == {"config": {"eos_token_id": [2, 0], "pad_token_id": 9}} and len(said) == 1
    model, carried, said = of_earlier_weights(replace(MODEL, eos_id=None), {}, SpecialIds(1, 0, None))
    assert model.eos_id == 0 and carried == {"config": {}} and "names no end" in said[0]


def test_own_tokenizer_to_the_export_of_a_checkpoint(tmp_path):
    """Fresh weights: all that reads the export stops at the end that the data have, not at the preset's id 2."""
    data = prepared(tmp_path / "own", own_tokenizer(tmp_path / "tok"))
    out = ranks_run(*ONE_STEP, "--data", data, "--run-dir", "r", cwd=tmp_path).out
    assert "token ids  BOS none, EOS 0, pad 9: as in the data" in out
    assert export.main([str(tmp_path / "r"), str(tmp_path / "later"), "--dtype", "fp32"]) == FINISHED
    for folder in (tmp_path / "r/export", tmp_path / "later"):
        assert told(folder) == told(folder, "generation_config.json") == (None, 0, 9)
        assert load_hf(folder).config == replace(MODEL, bos_id=None, eos_id=0)

    raw = tmp_path / "raw"
    write_dataset([np.arange(200) % 256] * 9, raw, vocab_size=256)
    out = ranks_run(*ONE_STEP, "--data", raw, "--run-dir", "unknown", cwd=tmp_path).out
    assert "token ids  BOS 1, EOS 2, pad none: of --model test, since the data do not say" in out
    assert told(tmp_path / "unknown/export") == (1, 2, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder that says more of itself than its sizes."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    torch.manual_seed(1)
    model = Mistral(replace(MODEL, eos_id=0))
    model.init_weights(1)
    carried = {
        "config": {"eos_token_id": [0, 7], "pad_token_id": 9, "initializer_range": 0.01},
        "generation_config": {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6},
        "chat_template": "{{ messages[0].content }}",
    }
    save_hf(model, folder, carried=carried, tokenizer=own_tokenizer(folder.parent / "tok"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Mistral"}}))
    return folder


def test_what_init_from_says_of_itself_outlives_its_folder(base, tmp_path):
    start = shutil.copytree(base, tmp_path / "start")
    data = prepared(tmp_path / "own", start)
    command = [*SMALL, "--data", data, "--init-from", "start", "--save-every", 1, "--run-dir", "r"]
    out = ranks_run(*command, "--steps", 1, cwd=tmp_path).out
    assert "token ids  BOS 1, EOS 0, 7, pad 9: of --init-from start" in out
    assert "export     without config.json: auto_map of --init-from start" in out
    shutil.rmtree(start)
    ranks_run(*command, "--steps", 2, "--allow-change", "steps", "--eval-every", 0, cwd=tmp_path)
    assert export.main([str(tmp_path / "r/checkpoints/step-00000002"), str(tmp_path / "later")]) == FINISHED

    carried, left = read_carried(base)
    assert left == ["config.json: auto_map"]
    own = own_tokenizer(tmp_path / "own-tok")
    for folder in (tmp_path / "r/export", tmp_path / "later"):
        assert read_carried(folder) == (carried, [])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (own / name).read_bytes()


def test_tokens_that_only_the_folder_knows_are_named_and_its_chat_template_stays_behind(base, tmp_path):
    start = shutil.copytree(base, tmp_path / "start")
    raw = json.loads((start / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 130, "content": "<|im_end|>"})
    (start / "tokenizer.json").write_text(json.dumps(raw))
    data = prepared(tmp_path / "own", own_tokenizer(tmp_path / "tok"))
    out = ranks_run(*ONE_STEP, "--data", data, "--init-from", "start", "--run-dir", "r", cwd=tmp_path).out
    assert (
        "auto_map, <|im_end|> of the tokenizer (that of --data, " in out and "the chat template of --init-from" in out
    )
    assert not (tmp_path / "r/export/chat_template.jinja").exists()
    assert (tmp_path / "r/export/tokenizer.json").read_bytes() == (tmp_path / "tok/tokenizer.json").read_bytes()


def test_an_earlier_run_with_the_ids_of_its_preset_goes_on(tmp_path):
    """Ids are no part of what a run computes: those that older versions took from the preset hinder nothing."""
    data = prepared(tmp_path / "own", own_tokenizer(tmp_path / "tok"))
    command = [*SMALL, "--data", data, "--steps", 2, "--save-every", 1, "--run-dir", "r", "--eval-every", 0]
    ranks_run(*command, cwd=tmp_path)
    shutil.rmtree(tmp_path / "r/checkpoints/step-00000002")
    path = tmp_path / "r/config.json"
    earlier = json.loads(path.read_text())
    earlier["model"] |= {"bos_id": 1, "eos_id": 2}
    del earlier["carried"]
    path.write_text(json.dumps(earlier))
    assert "resuming after step 1" in ranks_run(*command, cwd=tmp_path).out
    assert json.loads(path.read_text())["model"]["eos_id"] == 0


def test_a_generation_config_that_is_no_json_is_refused_before_anything_is_made(base, tmp_path):
    start = shutil.copytree(base, tmp_path / "start")
    (start / "generation_config.json").write_text("{")
    data = prepared(tmp_path / "own", own_tokenizer(tmp_path / "tok"))
    refused = ranks_run(
        *ONE_STEP, "--data", data, "--init-from", "start", "--run-dir", "r", cwd=tmp_path, codes=[REFUSED]
    )
    assert "--init-from: start/generation_config.json is not JSON" in refused.err and not (tmp_path / "r").exists()
