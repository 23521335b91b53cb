"""Exports are read as they were trained: by transformers of three ages, CTranslate2, llama.cpp and lm-eval."""

import copy
from pathlib import Path

import numpy as np
import pytest
from clients import CLIENTS, PROMPT, absent, answers, expected, exports, judge, parts_asked
from runs import snapshot

from halny.model.convert import load_hf, save_hf
from halny.model.hf_folder import read_carried

EXPORTS = ("builtin", "chatml", "own", "init-from")
QUICK = ("transformers", "ctranslate2")
BOTH = ("logits", "settings")
PARTS = {  # of an answer; "chat" of exports with a template only, "scores" of those with SentencePiece's tokens only
    **dict.fromkeys(
        ("transformers", "transformers-4.57", "transformers-4.44"), ("ids", "vocabulary", "generated", "chat", *BOTH)
    ),
    "ctranslate2": ("vocabulary", *BOTH),
    "llama.cpp": ("ids", "vocabulary", "scores", "chat", *BOTH),
    "lm_eval": ("ids", *BOTH),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def built(folder) -> dict:
    return exports(folder)


@pytest.fixture(scope="module")
def right(built) -> dict[str, dict]:
    return {of: expected(export) for of, export in built.items()}


@pytest.fixture(scope="module")
def read_by(built, right, folder):
    """What a client, by its name, says of all exports: asked once."""
    asked = {}

    def ask(client: str) -> dict[str, dict]:
        if client not in asked:
            asked[client] = answers(client, built, right, folder)
        return asked[client]

    return ask


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    "client", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLIENTS]
)
def test_client_reads_what_was_trained(client, export, read_by, built, right):
    if (remedy := absent(client)) is not None:
        pytest.skip(remedy)
    judged = judge(right[export], read_by(client)[export])
    wrong = {part: words for part, (is_right, words) in judged.items() if not is_right}
    assert not wrong
    assert judged.keys() == {*PARTS[client]} & {*parts_asked(client, built[export], right[export])}


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_of_an_export_is_the_same_to_the_byte(export, built, tmp_path):
    source = built[export].path
    carried, left = read_carried(source)
    save_hf(load_hf(source), tmp_path / "again", tokenizer=source, carried=carried)
    assert snapshot(tmp_path / "again") == snapshot(source) and not left


@pytest.mark.parametrize("export", ["chatml", "own", "init-from"])
def test_the_users_own_tokenizer_files_are_in_the_export_byte_for_byte(export, built):
    given, made = snapshot(Path(built[export].source)), snapshot(built[export].path)
    ours = {"config.json", "generation_config.json", "model.safetensors"}
    assert {name: made[name] for name in made.keys() - ours} == {name: given[name] for name in given.keys() - ours}


def test_a_batch_of_texts_goes_on_as_each_of_them_alone(built):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built["builtin"].path)
    model = AutoModelForCausalLM.from_pretrained(built["builtin"].path)

    def continued(texts: list[str]) -> list[str]:
        ids = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    texts = [PROMPT, "Wind", f"{PROMPT} and {PROMPT}"]
    assert continued(texts) == [continued([text])[0] for text in texts]


def broken(part: str, answer):
    """An answer that is wrong in one place."""
    answer = copy.deepcopy(answer)
    if part == "settings":
        answer["generation_config"]["eos_token_id"] = None
    elif part == "chat":
        answer[1].insert(0, 1)
    elif part == "generated":
        answer.append(2)
    else:
        answer[-1] = answer[0]
    return answer


def test_a_wrong_answer_is_seen(right, tmp_path):
    """Of each part, and whatever is missing or of another size."""
    of = right["init-from"]
    answer = {part: of[part] for part in ("ids", "generated", "settings", "chat", "vocabulary", "scores")}
    for part, said in answer.items():
        assert judge(of, {part: said})[part] == (True, "104/104" if part == "ids" else "=")
        for wrong in (broken(part, said), said[:-1] if isinstance(said, list) else {}, {"error": "no"}, None):
            assert not judge(of, {part: wrong})[part][0], (part, wrong)
    assert not all(is_right for is_right, _ in judge(of, {}).values())
    for move, is_right in ((0, True), (1e-3, False), (np.nan, False)):
        np.save(tmp_path / "logits.npy", of["logits"] + np.float32(move) * (np.arange(32000) == 5))
        assert judge(of, {"logits": str(tmp_path / "logits.npy")})["logits"][0] is is_right


def test_exports_differ_where_readers_go_wrong(built, right):
    """A chat model's end is not 2, a user's own is 0, and the second of two ends is met before the twelfth token."""
    ends = {of: export.settings["config"]["eos_token_id"] for of, export in built.items()}
    assert (ends["builtin"], ends["chatml"], ends["own"]) == (2, 32001, 0)
    assert right["init-from"]["generated"][-1] == ends["init-from"][1]
    assert len(right["init-from"]["generated"]) < len(right["builtin"]["generated"])
