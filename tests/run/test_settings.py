"""Settings as text: what --print-config prints is a recipe again, and the README's command lines are ones."""

import contextlib
import dataclasses
import os
import re
import shlex
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from runs import REPO

from halny.model.exits import Refused
from halny.model.run.ranks import World
from halny.model.run.recipe import COMMAND, PRESETS, SETTINGS, Recipe, command_line, read_toml
from halny.model.run.resolve import RunSpec, resolve
from halny.model.run.settings import NAMES

# The README's recipes: a command line, the number of ranks it is for, and what it must come to.
RECIPES = {
    "first run": ("", 1, {"model": "tiny", "steps": 200}),
    "own corpus on one GPU": (
        "mistral-1b --data data/mine --batch-tokens 131072 --micro-batch 4 --steps 5000",
        1,
        {"data": ("data/mine",), "accumulation": 8},
    ),
    "bielik-7b on 64 x 4": (
        "bielik-7b --data data/polish --init-from Mistral-7B-v0.1/",
        256,
        {"init_from": Path("Mistral-7B-v0.1"), "accumulation": 1, "samples_a_step": 1024},
    ),
    "long context": (
        "bielik-7b --data data/long --documents --seq-len 32768 --micro-batch 1 --steps 2000 --run-dir runs/long",
        32,
        {"seq_len": 32_768, "window": 4096, "accumulation": 4, "documents": True},
    ),
    "resume with changes": (
        "bielik-7b --data data/polish --init-from Mistral-7B-v0.1/ --resume --micro-batch 2 --save-every 250 --keep 3",
        64,
        {"resume": True, "micro_batch": 2, "accumulation": 8, "save_every": 250, "keep": 3},
    ),
}


def spec_on(size: int, recipe: Recipe) -> RunSpec:
    """The run's spec on so many ranks; without the weights of --init-from, which are not here."""
    model = "mistral-7b" if recipe.init_from else recipe.model
    return resolve(
        dataclasses.replace(recipe, init_from=None, model=model), World(0, size, torch.device("cpu"), mesh=None)
    )


def printed_config(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        command_line([*arguments, "--print-config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_the_readme_resolves(name):
    arguments, size, expected = RECIPES[name]
    recipe = command_line(arguments.split())
    spec = spec_on(size, recipe)
    facts = dataclasses.asdict(spec.model) | dataclasses.asdict(spec.recipe)
    facts |= {"init_from": recipe.init_from, "accumulation": spec.accumulation, "samples_a_step": spec.samples_a_step}
    assert {key: facts[key] for key in expected} == expected


def test_every_command_of_the_readme_parses(tmp_path, monkeypatch):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for toml in re.findall(r"```toml\n(.*?)```", readme, re.S):
        (tmp_path / "mine.toml").write_text(toml)
        monkeypatch.chdir(tmp_path)
        command_line(["mine.toml"])
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", readme, re.S)).replace("\\\n", " ")
    commands = [line.partition("#")[0] for line in blocks.splitlines() if re.search(r"torchrun .*train\.py", line)]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.rpartition("&&")[2])
        with contextlib.suppress(SystemExit):  # of --print-config
            command_line(words[words.index("train.py") + 1 :])


@pytest.mark.parametrize("preset", PRESETS)
def test_print_config_is_the_same_recipe_again(preset, tmp_path, capsys):
    file = tmp_path / "again.toml"
    for more in (
        [],
        ["--data", "a b:0.5", 'q"\\:2', "--resume", "--lr", "3e-5", "--run-dir", "ż ó/\x7f\t", "--seed", "7"],
    ):
        file.write_text(printed_config([preset, *more], capsys), encoding="utf-8")
        assert command_line([str(file)]) == command_line([preset, *more])


def test_print_config_names_every_setting_below_its_help(capsys):
    text = printed_config(["--no-resume"], capsys)
    assert tomllib.loads(text)["resume"] is False
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    for name, s in SETTINGS.items():
        line = next(i for i, line in enumerate(lines) if re.match(rf"(# )?{name} =", line))
        assert lines[line].startswith("#") == (s.default is None and name not in ("run_dir", "resume")), name
        comment = []
        while lines[line := line - 1]:
            comment.insert(0, lines[line].removeprefix("# "))
        assert " ".join(comment) == s.metadata["help"]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


def values(name: str):
    """Values that ``name`` admits."""
    kind, limits = COMMAND.kinds[name], SETTINGS[name].metadata
    if limits["choices"]:
        return st.sampled_from(limits["choices"])
    low = limits["minimum"] if limits["above"] is None else limits["above"] * (1 + 1e-9) or 1e-9
    of_kind = {
        int: st.integers(limits["minimum"] or 0, (limits["below"] or 2**63) - 1),
        float: st.floats(low, (limits["below"] or 1e6) * (1 - 1e-9), allow_nan=False),
        bool: st.booleans(),
        str: names,
        Path: names.map(Path),
        NAMES: st.lists(names, min_size=1, max_size=3).map(tuple),
    }[kind]
    return of_kind if limits["word"] is None else st.just(limits["word"]) | of_kind


@given(st.data())
@examples(max_examples=60, deadline=None)
def test_to_toml_keeps_any_recipe(tmp_path_factory, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=6, unique=True))
    recipe = Recipe(**{name: data.draw(values(name), name) for name in chosen})
    file = tmp_path_factory.mktemp("toml") / "any.toml"
    file.write_text(COMMAND.to_toml(recipe), encoding="utf-8")
    assert Recipe(**read_toml(file)) == recipe


def test_print_config_refuses_what_toml_cannot_hold():
    with pytest.raises(Refused, match=r"--run-dir .* is not valid Unicode"):
        command_line(["--run-dir", os.fsdecode(b"caf\xe9"), "--print-config"])


def test_print_config_refuses_bad_settings_first():
    with pytest.raises(Refused, match="--steps must be at least 1"):
        command_line(["--steps", "0", "--print-config"])


def test_print_config_before_torch_from_one_rank():
    def printed(rank: int) -> str:
        command = [sys.executable, "-X", "importtime", REPO / "train.py", "--print-config"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"RANK": str(rank)})
        assert not re.search(r"\| +(torch|numpy)$", done.stderr, re.M)
        return done.stdout

    assert "batch_tokens = 1024" in printed(0) and printed(1) == ""
    assert set(printed(0)) <= set(string.printable)
