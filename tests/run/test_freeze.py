"""--freeze: parameters that stay as they are, on any number of ranks, in checkpoints and in the export."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, checkpoint, column, equal, ranks_run

from halny.model import export
from halny.model.convert import load_hf
from halny.model.exits import REFUSED, Refused
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.ranks import World
from halny.model.run.recipe import command_line
from halny.model.run.resolve import resolve

FROZEN = r"embed|layers\.0\.|layers\.1\.mlp\.down|^norm"
FOUR = [*SMALL, "--steps", 4, "--save-every", 2, "--eval-every", 2, "--lr", "1e-2", "--keep", 9, "--run-dir", "r"]


@pytest.fixture(scope="module")
def frozen(small, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("frozen")
    ranks_run(*FOUR, "--data", small, "--freeze", FROZEN, ranks=2, cwd=cwd)
    return cwd / "r"


def test_frozen_parameters_stay_and_have_no_moments(frozen):
    model = Mistral(PRESETS["test"])
    model.init_weights(0)
    weights, held = dict(model.named_parameters()), checkpoint(frozen, 4)
    stay = {name for name in weights if name.startswith(("embed", "layers.0.", "layers.1.mlp.down", "norm"))}
    assert 0 < len(stay) < len(weights)
    for name, x in weights.items():
        assert torch.equal(held[f"model.{name}"], x) == (name in stay), name
        assert {f"exp_avg.{name}", f"exp_avg_sq.{name}"} & held.keys() == (
            set() if name in stay else {f"exp_avg.{name}", f"exp_avg_sq.{name}"}
        )
    exported = dict(load_hf(frozen / "export").named_parameters())
    assert all(torch.equal(exported[name], held[f"model.{name}"]) for name in weights)


def test_frozen_runs_resume_on_any_number_of_ranks(frozen, small, tmp_path):
    command = [*FOUR, "--data", small, "--freeze", FROZEN]
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        shutil.copytree(frozen, cwd / "r")
        shutil.rmtree(cwd / "r/checkpoints/step-00000004")
        again = ranks_run(*command, ranks=ranks, cwd=cwd)
        assert "resuming after step 2" in again.out and f"frozen: {FROZEN}" in again.out
    assert equal(checkpoint(tmp_path / "2/r", 4), checkpoint(frozen, 4))
    one, two = (column(run_dir, "loss", "grad_norm") for run_dir in (tmp_path / "1/r", frozen))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    refused = ranks_run(*FOUR, "--data", small, ranks=1, cwd=tmp_path / "1", codes=[REFUSED])
    assert "--freeze was" in refused.err


def test_export_of_a_frozen_checkpoint(frozen, tmp_path):
    assert export.main([str(frozen), str(tmp_path / "out")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (frozen / "export" / name).read_bytes()


@pytest.mark.parametrize(
    "regex, word", [("(", "not a regular"), ("embedding", "no parameter"), (".", "every parameter")]
)
def test_freeze_refuses_what_leaves_nothing_to_do(regex, word):
    recipe = command_line(["--freeze", regex])
    with pytest.raises(Refused, match=f"--freeze .*{word}") as refusal:
        resolve(recipe, World(0, 1, torch.device("cpu"), mesh=None))
    assert "\n" not in str(refusal.value)
