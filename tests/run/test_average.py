"""Averaged models: the export and the evaluation of a mean, against a mean in fp64 computed apart."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import SMALL, checkpoint, flip_a_bit, largest_shard, ranks_run, snapshot
from safetensors.torch import load_file

from halny.model import export
from halny.model.convert import load_hf, save_hf
from halny.model.exits import FAILED, FINISHED, REFUSED
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.average import Mean
from halny.model.run.checkpoint import CheckpointWeights

STEPS = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def run_dir(small, tmp_path_factory) -> Path:
    """Eight steps on three ranks, whose shards of 48, 112 and 256 rows are uneven; four checkpoints."""
    cwd = tmp_path_factory.mktemp("average")
    command = [*SMALL, "--batch-tokens", 384, "--data", small, "--steps", 8, "--save-every", 2, "--keep", 4]
    ranks_run(*command, "--lr", "1e-2", "--run-dir", "r", "--eval-every", 8, ranks=3, cwd=cwd)
    return cwd / "r"


@pytest.fixture(scope="module")
def folders(run_dir, tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders: two checkpoints in fp32 and in bf16."""
    made = tmp_path_factory.mktemp("folders")
    for name, step, dtype in (("a", 2, "fp32"), ("b", 8, "bf16")):
        assert run_export(run_dir / f"checkpoints/step-{step:08d}", made / name, "--dtype", dtype) == FINISHED
    return {name: made / name for name in "ab"}


def run_export(*arguments) -> int:
    return export.main([str(argument) for argument in arguments])


def weights_at(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return {k.removeprefix("model."): x.double() for k, x in checkpoint(run_dir, step).items() if k[:6] == "model."}


def mean_of(*models: tuple[dict, int]) -> dict[str, torch.Tensor]:
    """In fp64, on whole tensors; by whole weights, as a third has no fp64 and turns ties of fp32 the other way."""
    total = sum(weight for _, weight in models)
    return {name: sum(x[name] * weight for x, weight in models) / total for name in models[0][0]}


def assert_is(folder: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    found = load_hf(folder).weights()
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == dtype and torch.equal(x, expected[name].to(dtype)), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_newest_are_averaged_in_fp64_and_rounded_once(run_dir, tmp_path, capsys, dtype):
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for n in (2, 4):
        out = tmp_path / f"{n}"
        assert run_export(run_dir, out, "--average", n, "--dtype", dtype) == FINISHED
        assert_is(out, mean_of(*((weights_at(run_dir, step), 1) for step in STEPS[-n:])), torch_dtype)
        said = json.loads((out / "config.json").read_text())["halny"]["average"]
        assert [row["step"] for row in said] == list(STEPS[::-1][:n]) and {row["share"] for row in said} == {1 / n}
        for row in said:
            manifest = run_dir / f"checkpoints/step-{row['step']:08d}/manifest.json.sha256"
            assert row["model"] == f"r/step-{row['step']:08d}" and row["sha256_of_manifest"] in manifest.read_text()
            assert f"| {1 / n:.2%} | {row['model']} | {row['sha256_of_manifest']} |" in (out / "README.md").read_text()
        assert str(tmp_path) not in (out / "README.md").read_text() + (out / "config.json").read_text()
    assert capsys.readouterr().out.count("verifying its checksums") == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_number_of_ranks_wrote_them(small, tmp_path, ranks):
    command = [*SMALL, "--data", small, "--steps", 4, "--save-every", 1, "--keep", 3, "--run-dir", "r"]
    ranks_run(*command, "--lr", "1e-2", "--eval-every", 0, ranks=ranks, cwd=tmp_path)
    assert run_export(tmp_path / "r", tmp_path / "out", "--average", 3, "--dtype", "fp32") == FINISHED
    assert_is(tmp_path / "out", mean_of(*((weights_at(tmp_path / "r", step), 1) for step in (2, 3, 4))))


def test_models_by_name_and_weight(run_dir, folders, tmp_path):
    """Checkpoints, a run and Hugging Face folders together; weights count by their ratio."""
    at = {step: weights_at(run_dir, step) for step in STEPS}
    first, last = run_dir / "checkpoints/step-00000002", run_dir
    assert run_export(f"{first}:1.5", f"{last}:0.5", tmp_path / "one", "--dtype", "fp32") == FINISHED
    assert_is(tmp_path / "one", mean_of((at[2], 3), (at[8], 1)))
    a, b = ({name: x.double() for name, x in load_hf(folders[name]).weights().items()} for name in "ab")
    assert run_export(f"{folders['a']}:0.5", f"{folders['b']}:0.5", "--dtype", "fp32", tmp_path / "two") == FINISHED
    assert_is(tmp_path / "two", mean_of((a, 1), (b, 1)))
    assert run_export(f"{folders['b']}:1", f"{folders['a']}:3", tmp_path / "three") == FINISHED
    assert_is(tmp_path / "three", mean_of((b, 1), (a, 3)), torch.bfloat16)
    mixed = [f"{folders['b']}:1", f"{run_dir / 'checkpoints/step-00000004'}:1", tmp_path / "four", "--dtype", "fp32"]
    assert run_export(*mixed) == FINISHED
    assert_is(tmp_path / "four", mean_of((b, 1), (at[4], 1)))
    names = [row["model"] for row in json.loads((tmp_path / "four/config.json").read_text())["halny"]["average"]]
    assert names == ["b", "r/step-00000004"]
    assert run_export(f"{folders['b']}:1", f"{run_dir / 'export'}:1", tmp_path / "five") == FINISHED
    names = [row["model"] for row in json.loads((tmp_path / "five/config.json").read_text())["halny"]["average"]]
    assert names == ["b", "r/export"]


def test_the_mean_of_one_is_itself_and_rows_are_those_of_the_whole(run_dir):
    weights = CheckpointWeights(run_dir / "checkpoints/step-00000008")
    other = CheckpointWeights(run_dir / "checkpoints/step-00000002")
    alone, mean = Mean([(weights, 7)]), Mean([(weights, 1), (other, 2)])
    for name, x in weights_at(run_dir, 8).items():
        assert torch.equal(alone.rows(name).view(torch.int32), x.float().view(torch.int32))
        whole, n = mean.rows(name), x.shape[0]
        for low, high in ((0, n), (1, n - 1), (n // 3, n // 3 + 1), (n, n), (n // 2, n)):
            assert torch.equal(mean.rows(name, low, high), whole[low:high]), (name, low, high)


@torch.no_grad()
def test_transformers_reads_it_and_a_run_starts_from_it(run_dir, small, tmp_path):
    from transformers import AutoModelForCausalLM

    assert run_export(run_dir, tmp_path / "out", "--average", 3) == FINISHED
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(60)[None]
    torch.testing.assert_close(theirs(tokens).logits, load_hf(tmp_path / "out")(tokens), rtol=1e-4, atol=1e-4)
    command = [*SMALL, "--init-from", "out", "--data", small, "--steps", 1, "--run-dir", "next"]
    assert "without config.json: halny of --init-from" in ranks_run(*command, cwd=tmp_path).out
    assert "halny" not in json.loads((tmp_path / "next/export/config.json").read_text())


def test_models_that_differ_in_their_ends_of_texts_are_averaged_and_it_is_said(run_dir, tmp_path, capsys):
    chat = load_hf(run_dir / "export")
    chat.config = replace(chat.config, eos_id=7)
    save_hf(chat, tmp_path / "chat")
    assert run_export(f"{tmp_path / 'chat'}:1", f"{run_dir}:1", tmp_path / "out") == FINISHED
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 7
    bos, eos = load_hf(run_dir / "export").config.bos_id, load_hf(run_dir / "export").config.eos_id
    words = f"token ids  BOS {bos} and EOS 7 of chat; {bos} and {eos} in r/step-00000008\n"
    assert words in capsys.readouterr().out


def test_only_our_readme_is_replaced(run_dir, tmp_path):
    assert run_export(run_dir, tmp_path / "out", "--average", 2) == FINISHED
    assert run_export(run_dir, tmp_path / "out") == FINISHED
    assert not (tmp_path / "out/README.md").exists()
    (tmp_path / "out/README.md").write_text("# Mine\n")
    before = snapshot(tmp_path / "out")
    assert run_export(run_dir, tmp_path / "out", "--average", 2) == REFUSED and snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_mean_is_evaluated_without_an_export(run_dir, small, tmp_path, ranks):
    command = [*SMALL, "--batch-tokens", 384, "--data", small, "--steps", 8, "--save-every", 2, "--keep", 4]
    command += ["--lr", "1e-2", "--eval-every", 8, "--eval-only", "--micro-batch", 1]
    before = snapshot(run_dir)
    out = ranks_run(*command, "--run-dir", run_dir, "--average", 3, "--out", "mean.json", ranks=ranks, cwd=tmp_path).out
    assert snapshot(run_dir) == before and "evaluating the mean of steps 4, 6, 8" in out
    found = json.loads((tmp_path / "mean.json").read_text())
    assert found["weights"] == f"mean of steps 4, 6, 8 of {run_dir}" and found["step"] == 8
    assert run_export(run_dir, tmp_path / "out", "--average", 3, "--dtype", "fp32") == FINISHED
    look = [*SMALL, "--init-from", "out", "--eval-data", f"x:{small}", "--data", small, "--eval-only"]
    ranks_run(*look, "--micro-batch", 1, "--out", "export.json", "--run-dir", "none", cwd=tmp_path)
    exported = json.loads((tmp_path / "export.json").read_text())
    assert found["val_loss"] == exported["val_loss"]
    ranks_run(*command, "--run-dir", run_dir, "--out", "last.json", cwd=tmp_path)
    assert json.loads((tmp_path / "last.json").read_text())["val_loss"] != found["val_loss"]


def damaged(run_dir: Path, tmp_path: Path) -> list:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    flip_a_bit(shard := largest_shard(copy / "checkpoints/step-00000006"), shard.stat().st_size - 5)
    return [copy, "--average", 3]


def of_another_size(run_dir: Path, tmp_path: Path) -> list:
    model = Mistral(replace(PRESETS["test"], rope_theta=20000.0))
    save_hf(model, tmp_path / "other")
    return [f"{run_dir}:1", f"{tmp_path / 'other'}:1"]


def of_another_tokenizer(run_dir: Path, tmp_path: Path) -> list:
    for name, order in (("x", 1), ("y", -1)):
        save_hf(load_hf(run_dir / "export"), tmp_path / name)
        vocabulary = {chr(65 + i): i for i in range(26)[::order]}
        vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
        raw = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(raw))
    return [f"{tmp_path / 'x'}:1", f"{tmp_path / 'y'}:1"]


def nan_in_a_folder(run_dir: Path, tmp_path: Path) -> list:
    model = load_hf(run_dir / "export")
    model.norm.weight.data[3] = float("nan")
    save_hf(model, tmp_path / "nan")
    return [f"{run_dir}:1", f"{tmp_path / 'nan'}:1"]


@pytest.mark.parametrize(
    "make, code, words",
    [
        (lambda r, t: [r, "--average", 5], REFUSED, ["--average 5", "has kept 4 checkpoints", "--keep 5"]),
        (lambda r, t: [r, "--average", 1], REFUSED, ["--average 1 is no mean", "2 or more"]),
        (lambda r, t: [r / "export", "--average", 2], REFUSED, ["--average 2", "is no run", "a:0.5 b:0.5"]),
        (lambda r, t: [f"{r}:1", f"{r}/export:1", "--average", 2], REFUSED, ["--average 2 takes one run's"]),
        (lambda r, t: [r, r / "export"], REFUSED, ["each needs a weight"]),
        (lambda r, t: [f"{r}:1", f"{r}/export:-1"], REFUSED, ["-1", "weight from 1e-9"]),
        (lambda r, t: [f"{r}:1", f"{r}/checkpoints/step-00000008:2"], REFUSED, ["named twice", "sum of its weights"]),
        (lambda r, t: [f"{r}:1", f"{t}/nowhere:1"], REFUSED, ["nowhere is neither a run nor a checkpoint nor a model"]),
        (damaged, REFUSED, ["step-00000006", "wrong checksum", "move it away"]),
        (of_another_size, REFUSED, ["rope_theta", "20000.0 and 10000.0"]),
        (of_another_tokenizer, REFUSED, ["different tokenizers", "id 0 is 'Z' and 'A'"]),
        (nan_in_a_folder, FAILED, ["norm.weight holds a number that is not finite"]),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(make, code, words, run_dir, tmp_path, capsys):
    arguments = make(run_dir, tmp_path)
    before = snapshot(tmp_path)
    assert run_export(*arguments, tmp_path / "out") == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert snapshot(tmp_path) == before and snapshot(run_dir)


def test_a_folder_that_is_averaged_is_not_replaced(folders, run_dir, tmp_path, capsys):
    copy = shutil.copytree(folders["a"], tmp_path / "a")
    before = snapshot(copy)
    assert run_export(f"{copy}:1", f"{run_dir}:1", copy) == REFUSED and snapshot(copy) == before
    assert "is to be read; choose another folder" in capsys.readouterr().err


def test_evaluation_refuses_what_it_cannot_average(run_dir, small, tmp_path):
    command = [*SMALL, "--batch-tokens", 384, "--data", small, "--steps", 8, "--save-every", 2, "--keep", 4]
    command += ["--lr", "1e-2", "--eval-every", 8]
    copy = damaged(run_dir, tmp_path)[0]
    for flags, words in (
        (["--average", 3, "--run-dir", run_dir], "--average 3 belongs to --eval-only"),
        (
            ["--average", 5, "--eval-only", "--run-dir", run_dir],
            "has kept 4 checkpoints; train.py keeps more with --keep 5",
        ),
        (["--average", 1, "--eval-only", "--run-dir", run_dir], "--average"),
        (["--average", 3, "--eval-only", "--run-dir", copy], "step-00000006 is damaged"),
    ):
        before = snapshot(run_dir) | snapshot(copy)
        refused = ranks_run(*command, *flags, cwd=tmp_path, codes=[REFUSED])
        assert words in refused.err and refused.err.count("\n") == 1, refused.err
        assert snapshot(run_dir) | snapshot(copy) == before


def test_files_of_the_export_are_those_of_any_other(run_dir, tmp_path):
    """Tokenizer, generation_config.json and keys of config.json as train.py's own export has them."""
    assert run_export(run_dir, tmp_path / "out", "--average", 2) == FINISHED
    own, mean = snapshot(run_dir / "export"), snapshot(tmp_path / "out")
    assert mean.keys() - own.keys() == {"README.md"} and own.keys() <= mean.keys()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (run_dir / "export", tmp_path / "out")]
    assert configs[1].pop("halny") and configs[0] == configs[1]
    assert re.search("summed in fp64 and rounded to fp32, then to fp32", (tmp_path / "out/README.md").read_text())
    assert (
        load_file(tmp_path / "out/model.safetensors").keys() == load_file(run_dir / "export/model.safetensors").keys()
    )
