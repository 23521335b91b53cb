"""train.py: its recipe and arithmetic as functions, and whole runs as the processes a user would start."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import (
    LONG,
    REPO,
    SMALL,
    Ranks,
    checkpoint,
    column,
    flip_a_bit,
    lines,
    metrics,
    ranks_run,
    run,
    saved_steps,
    snapshot,
    start,
    status,
    wait_for_step,
)
from safetensors.torch import load_file, save_file

import train
from halny.model.convert import load_hf, save_hf
from halny.model.data import batches
from halny.model.data.batches import Corpus, read_in_turn
from halny.model.data.dataset import Dataset, open_dataset
from halny.model.data.order import interleave, sample_order
from halny.model.data.writer import write_dataset
from halny.model.estimate import roofline
from halny.model.exits import FAILED, REFUSED, Refused
from halny.model.mistral import PRESETS as MODELS
from halny.model.mistral import Mistral
from halny.model.run.evaluation import EvalSets
from halny.model.run.inputs import check_ids, check_tokenizers, open_data
from halny.model.run.ranks import World
from halny.model.run.recipe import SETTINGS, command_line
from halny.model.run.resolve import resolve, vocabulary_line
from halny.model.run.settings import flag

CPU = torch.device("cpu")


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, CPU, mesh=None)


# ------------------------------------------------------------------------------------------------------ recipe and spec


def test_command_line_preset_then_file_then_flags(tmp_path):
    assert command_line([]) == train.Recipe(run_dir=Path("runs/tiny"))
    bielik = command_line(["bielik-7b", "--data", "d"])
    assert (bielik.steps, bielik.lr, bielik.min_lr, bielik.batch_tokens) == (17_350, 3e-5, 2e-5, 4_194_304)
    assert bielik.run_dir == Path("runs/bielik-7b") and bielik.data == ("d",)

    file = tmp_path / "mine.toml"
    file.write_text('preset = "bielik-7b"\nseq-len = 2048\nlr = 1e-4\nresume = false\n')
    mine = command_line([str(file), "--lr", "1", "--lr", "2e-4"])
    assert (mine.model, mine.seq_len, mine.lr, mine.resume) == ("mistral-7b", 2048, 2e-4, False)
    assert mine.run_dir == Path("runs/mine")


def test_data_is_one_folder_or_several_with_weights(tmp_path):
    two = ("pl:0.7", "en:0.3")
    assert command_line(["--data", *two, "--documents"]).data == two
    assert command_line(["--data", "x", "--data", *two, "--steps", "4"]).data == two
    after = command_line(["--data", *two, "bielik-7b"])  # the preset may come last
    assert after.data == two and after.steps == 17_350 and after.run_dir == Path("runs/bielik-7b")
    file = tmp_path / "mine.toml"
    file.write_text('data = ["pl:0.7", "en:0.3"]')
    assert command_line([str(file)]).data == two == command_line(["--data", *two, str(file)]).data
    file.write_text('data = "pl"')
    assert command_line([str(file)]).data == ("pl",)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "x"], ["--steps", "'x'"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--steps", "-5"], ["--steps", "-5"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--steps"], ["--steps"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--lr", "0"], ["--lr", "0"]),
        (["--lr", "-1e-3"], ["--lr", "-0.001"]),
        (["--beta2", "1"], ["--beta2", "1"]),
        (["--batch-tokens", "1" + "0" * 30], ["--batch-tokens"]),
        (["--seed", str(2**63)], ["--seed"]),
        (["--dtype", "fp16"], ["--dtype", "fp16", "bf16, fp32"]),
        (["--data", ""], ["--data", "''"]),
        (["--data"], ["--data"]),
        (["--stepz", "4"], ["--stepz", "--steps"]),
        (["bielik"], ["bielik", "bielik-7b"]),
        (["tiny", "extra"], ["extra"]),
        (["none.toml"], ["none.toml"]),
    ],
)
def test_command_line_refuses_naming_flag_and_value(arguments, words):
    with pytest.raises(Refused) as refusal:
        command_line(arguments)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepz = 4", ["stepz", "steps"]),
        ('steps = "many"', ["steps", "many"]),
        ("steps = 1.0", ["steps", "1.0"]),
        ("steps = true", ["steps", "True"]),
        ("resume = 1", ["resume", "1"]),
        ("lr = nan", ["lr", "nan"]),
        ('preset = "huge"', ["huge"]),
        ("steps 4", ["TOML"]),
        ("[optimizer]\nlr = 1.0", ["optimizer"]),
        ('preset = ["tiny"]', ["preset", "tiny"]),
        ("seq_len = 8\nseq-len = 9", ["seq_len"]),
        ("lr = 1" + "0" * 400, ["lr"]),
        ("steps = 1" + "0" * 5000, ["TOML"]),
        ('run_dir = "a\\u0000b"', ["run_dir"]),
        ("data = []", ["data", "[]"]),
        ('data = ["a:1", 2]', ["data", "2"]),
        ("data = 1", ["data", "1"]),
    ],
)
def test_toml_refuses_naming_file_key_and_value(tmp_path, text, words):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(Refused) as refusal:
        command_line([str(file)])
    assert all(word in str(refusal.value) for word in [*words, "bad.toml"])


def test_help_needs_neither_torch_nor_three_seconds():
    code = (
        "import runpy, sys\nsys.argv = ['train.py', '--help']\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 3
    assert all(flag(name) in shown for name in SETTINGS) and "bielik-7b" in shown


def test_resolve_divides_the_batch():
    spec = resolve(command_line(["--batch-tokens", "8192"]), world(size=4))
    assert (spec.samples_a_step, spec.recipe.micro_batch, spec.accumulation) == (64, 8, 2)
    spec = resolve(command_line(["bielik-7b"]), world(size=256))
    assert (spec.samples_a_step, spec.recipe.micro_batch, spec.accumulation) == (1024, 4, 1)
    assert spec.n_parameters == 7_241_732_096 and spec.recipe.dtype == "fp32"


@pytest.mark.parametrize(
    "arguments, size, words",
    [
        (["--batch-tokens", "1000"], 1, ["--batch-tokens 1000", "896 or 1024"]),
        ([], 3, ["--batch-tokens 1024", "3 rank", "768 or 1152"]),
        (["--micro-batch", "3"], 1, ["--micro-batch 3", "divisor of 8"]),
        (["--seq-len", "2048", "--batch-tokens", "2048"], 1, ["--seq-len 2048", "1024"]),
        (["--steps", "5", "--warmup-steps", "6"], 1, ["--warmup-steps 6", "--steps 5"]),
        (["--schedule", "wsd", "--steps", "9", "--warmup-steps", "5", "--decay-steps", "5"], 1, ["--decay-steps 5"]),
        (["--decay-steps", "5"], 1, ["--decay-steps 5", "wsd"]),
        (["--lr", "1e-3", "--min-lr", "1e-2"], 1, ["--min-lr 0.01", "--lr 0.001"]),
        (["--model", "test"], 1, ["--data", "32000", "256"]),
        (["--model", "mistral-8b"], 1, ["--model mistral-8b", "mistral-7b"]),
        (["--data", "pl:0", "en:1"], 1, ["--data pl:0", "1e-9"]),
        (["--data", "pl:lots"], 1, ["--data pl:lots", "weight"]),
        (["--data", "pl:1", "en"], 1, ["--data en", "weight"]),
    ],
)
def test_resolve_refuses_what_cannot_be(arguments, size, words):
    with pytest.raises(Refused) as refusal:
        resolve(command_line(arguments), world(size=size))
    assert all(word in str(refusal.value) for word in words)


def test_data_dtype_is_for_raw_files(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(250, dtype="<u4").tofile("ids.bin")

    def opened(*arguments):
        spec = resolve(command_line(["--model", "test", "--seq-len", "64", "--data", *arguments]), world())
        return open_data(spec.recipe.data, spec)

    assert opened("ids.bin", "--data-dtype", "uint32").vocab_size == 256
    assert len(opened("ids.bin:1", f"{small}:1", "--data-dtype", "uint32").sources) == 2
    for arguments, words in (
        (["ids.bin"], "--data ids.bin: .* give --data-dtype uint16 or uint32"),
        ([str(small), "--data-dtype", "uint16"], "--data-dtype uint16 .* leave it out"),
        (["ids.bin", "--data-dtype", "uint32", "--documents"], "--data ids.bin: .* leave --documents out"),
    ):
        with pytest.raises(Refused, match=words):
            opened(*arguments)


def test_learning_rate_schedules():
    def rates(*arguments):
        recipe = resolve(command_line(["--lr", "1e-3", "--min-lr", "1e-4", *arguments]), world()).recipe
        return [train.learning_rate(recipe, step) for step in range(1, recipe.steps + 1)]

    cosine = rates("--steps", "110", "--warmup-steps", "10")
    assert cosine[0] == pytest.approx(1e-4) and cosine[9] == 1e-3 and cosine[-1] == 1e-4
    assert cosine[59] == pytest.approx((1e-3 + 1e-4) / 2)  # half way down
    assert all(a >= b for a, b in itertools.pairwise(cosine[9:]))
    linear = rates("--steps", "110", "--warmup-steps", "10", "--schedule", "linear")
    assert linear[84] == pytest.approx(1e-3 - 0.75 * 9e-4) and linear[-1] == pytest.approx(1e-4)
    wsd = rates("--steps", "100", "--schedule", "wsd", "--warmup-steps", "0", "--decay-steps", "10")
    assert set(wsd[:90]) == {1e-3} and wsd[94] == pytest.approx(1e-3 - 0.5 * 9e-4) and wsd[-1] == pytest.approx(1e-4)
    assert set(rates("--steps", "7", "--schedule", "constant", "--warmup-steps", "1")) == {1e-3}
    assert train.learning_rate(resolve(command_line([]), world()).recipe, 1) > 0


# ----------------------------------------------------------------------------------------------------------- whole runs


def plain_loop(data: Path, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by the shortest single-process training loop there is."""
    [rows], model = Corpus([str(data)], 64).train, Mistral(MODELS["test"])
    model.init_weights(seed=0)
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=False)
    history = []
    for step in range(steps):
        tokens, labels, *_ = read_in_turn([rows], sample_order(np.arange(4 * step, 4 * step + 4), 4, seed=0))
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.view(-1, 256), labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.parametrize("ranks, micro_batch", [(1, 4), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_losses_equal_a_plain_loop_on_any_division_of_the_batch(small, tmp_path, ranks, micro_batch):
    """Samples have 64, 64, 64 and 9 targets, so a mean of means would show in the first digit."""
    flags = ["--data", small, "--steps", 8, "--micro-batch", micro_batch, "--run-dir", "r"]
    flags += ["--lr", "1e-3", "--schedule", "constant", "--warmup-steps", "0", "--eval-every", "4"]
    run(*SMALL, *flags, ranks=ranks, cwd=tmp_path)
    ours, plain = column(tmp_path / "r", "loss", "grad_norm"), plain_loop(small, 8)
    assert len(ours) == 8
    np.testing.assert_allclose(ours, plain, rtol=2e-5)
    assert ours[0][0] - ours[-1][0] > 0.05

    held_out = [line for line in lines(tmp_path / "r") if "val_loss" in line]
    assert [line["step"] for line in held_out] == [4, 8] and "loss" not in held_out[0]
    tokens, labels, *_ = read_in_turn(Corpus([str(small)], 64).held_out, np.arange(3))
    loss, n_tokens, n_correct = load_hf(tmp_path / "r/export")(tokens, labels)
    assert n_tokens == 149
    assert held_out[-1]["val_loss"] == pytest.approx(loss.item() / 149, rel=1e-5)
    assert held_out[-1]["val_accuracy"] == pytest.approx(n_correct.item() / 149)
    assert status(tmp_path / "r") | {"state": "finished", "step": 8} == status(tmp_path / "r")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folders a and b of short documents over the same 40 tokens, each with some held out."""
    folder, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)

    def documents(n, stride):
        return [np.arange(length) * stride % 40 for length in rng.integers(1, 150, n)]

    for name, stride in (("a", 7), ("b", 3)):
        write_dataset(documents(30, stride), folder / name, vocab_size=256, val_documents=documents(4, stride))
    return folder


@pytest.mark.parametrize("flags", [[], ["--documents"]])
def test_a_mixture_trains_alike_on_one_rank_and_two_and_over_a_stop(two, tmp_path, flags):
    command = [*SMALL, *flags, "--steps", 20, "--lr", "3e-3", "--eval-every", 10, "--save-every", 5]
    alone = ranks_run(*command, "--data", f"{two}/a:0.7", f"{two}/b:0.3", "--run-dir", "alone", cwd=tmp_path).out
    assert f"{two}/a: " in alone and "70.00% of the run's" in alone and ("padding" in alone) == bool(flags)
    losses = column(tmp_path / "alone", "loss")
    assert losses[0][0] - losses[-1][0] > 0.5

    command += ["--data", f"{two}/b:3", f"{two}/a:7"]  # the same mixture
    ranks_run(*command, "--run-dir", "both", ranks=2, cwd=tmp_path)
    np.testing.assert_allclose(column(tmp_path / "both", "loss"), losses, rtol=1e-5)
    shutil.copytree(tmp_path / "both", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000020")
    ranks_run(*command, "--run-dir", "stopped", ranks=2, cwd=tmp_path)
    assert column(tmp_path / "stopped", "loss") == column(tmp_path / "both", "loss")

    rows = Corpus([f"{two}/a:7", f"{two}/b:3"], 64, bool(flags)).held_out
    batch = read_in_turn(rows, np.arange(sum(map(len, rows))))
    loss, n_tokens, _ = load_hf(tmp_path / "both/export")(*batch.inputs)
    held_out = [line["val_loss"] for line in lines(tmp_path / "both") if "val_loss" in line]
    assert held_out[-1] == pytest.approx(loss.item() / n_tokens.item(), rel=1e-5)


def test_a_shard_that_is_cut_short_during_a_run_ends_it_by_name(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")
    command = [*LONG, "--data", "two/a:1", "two/b:1", "--steps", 5000, "--save-every", 5000, "--run-dir", "r"]
    process = Ranks(*command, ranks=2, cwd=tmp_path, fault=("impatient", "0.5"))
    wait_for_step(process, tmp_path / "r", 3)
    os.truncate(tmp_path / "two/b/train-00000.npy", 200)
    assert process.codes() == [FAILED] * 2
    assert process.err.count("two/b/train-00000.npy: cannot be read for") == 1 and "Traceback" not in process.err
    assert re.search(r"was cut short, it has 200 bytes of \d+\); restore it", process.err)
    failed = status(tmp_path / "r")
    assert failed["state"] == "failed" and "two/b/train-00000.npy" in failed["reason"]
    assert saved_steps(tmp_path / "r") == [failed["step"]] == [metrics(tmp_path / "r")[-1]["step"]]


def test_each_raw_file_is_hashed_by_one_rank(tmp_path):
    names = [str(tmp_path / f"{name}.bin") for name in ("train_0", "train_1", "val_0", "other")]
    for i, name in enumerate(names):
        np.random.default_rng(i).integers(0, 256, 600).astype("<u2").tofile(name)
    (tmp_path / "folder").mkdir()
    for name in names[:3]:
        shutil.move(name, tmp_path / "folder")
    command = [*SMALL, "--data", "folder", "--data-dtype", "uint16", "--eval-data", "more:other.bin", "--steps", 1]
    ranks_run(*command, "--run-dir", "r", ranks=2, cwd=tmp_path, fault=("traced_hashes", "hashed"))
    hashed = [Path(line).name for line in (tmp_path / "hashed").read_text().splitlines()]
    assert sorted(hashed) == ["other.bin", "train_0.bin", "train_1.bin", "val_0.bin"]
    corpus = Corpus(["folder"], 64, open_dataset=lambda _: open_dataset(tmp_path / "folder", "uint16"))
    assert json.loads((tmp_path / "r/config.json").read_text())["data"] == corpus.fingerprint


def test_metrics_lines_say_what_they_should(small, tmp_path):
    run(*SMALL, "--data", small, "--steps", 3, "--run-dir", "r", "--peak-tflops", "0.1", cwd=tmp_path)
    line = metrics(tmp_path / "r")[-1]
    assert line.keys() == {
        "step", "loss", "perplexity", "accuracy", "lr", "grad_norm", "tokens", "tokens_per_second_per_gpu", "mfu",
        "peak_memory_gib", "data_wait_s",
    }  # fmt: skip
    assert line["step"] == 3 and line["tokens"] == 3 * 256
    assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    flops = roofline.flops_per_token(MODELS["test"], 64)
    assert line["mfu"] == pytest.approx(line["tokens_per_second_per_gpu"] * flops / 1e11)
    assert (tmp_path / "r/curves.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["recipe"]["steps"] == 3 and config["recipe"]["save_every"] == 1 and config["model"]["dim"] == 48


def test_bf16_trains_close_to_fp32(small, tmp_path):
    flags = ["--data", small, "--steps", 20, "--lr", "3e-3"]
    run(*SMALL, *flags, "--run-dir", "fp32", cwd=tmp_path)
    run(*SMALL, *flags, "--dtype", "bf16", "--run-dir", "bf16", ranks=2, cwd=tmp_path)
    fp32, bf16 = (np.array(column(tmp_path / name, "loss"))[:, 0] for name in ("fp32", "bf16"))
    assert fp32[0] - fp32[-1] > 0.5
    np.testing.assert_allclose(bf16, fp32, rtol=0.02)
    assert (bf16 != fp32).all()
    assert {x.dtype for x in checkpoint(tmp_path / "bf16", 20).values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- starting again


def test_a_finished_run_says_so_and_remakes_what_is_missing(small, tmp_path):
    command = [*SMALL, "--data", small, "--steps", 4, "--run-dir", "r"]
    run(*command, cwd=tmp_path)
    before = (tmp_path / "r/metrics.jsonl").read_bytes()
    weights = (tmp_path / "r/export/model.safetensors").read_bytes()
    (tmp_path / "r/export/model.safetensors").unlink()
    (tmp_path / "r/curves.png").unlink()
    config = json.loads((tmp_path / "r/config.json").read_text())
    del config["recipe"]["documents"]  # a run from before there was this switch is one without it
    (tmp_path / "r/config.json").write_text(json.dumps(config))
    out = run(*command, cwd=tmp_path).stdout
    assert "finished" in out and (tmp_path / "r/curves.png").exists()
    assert (tmp_path / "r/export/model.safetensors").read_bytes() == weights
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == before and status(tmp_path / "r")["state"] == "finished"


def test_closed_streams_and_a_full_log_stop_nothing(small, tmp_path):
    line = f"exec {sys.executable} {REPO}/train.py {' '.join(SMALL)} --data {small} --steps 3 --run-dir"
    for name, redirection in (("closed", ">&- 2>&-"), ("full", "> /dev/full")):
        subprocess.run(f"{line} {name} {redirection}", shell=True, cwd=tmp_path, check=True)
        assert status(tmp_path / name)["state"] == "finished"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("finished")
    run(*SMALL, "--data", small, "--steps", 4, "--run-dir", "r", cwd=cwd)
    return cwd


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "corrupt"], ["corrupt", "manifest"]),
        (["--data", "other-vocabulary"], ["--data other-vocabulary", "4000", "256"]),
        (["--init-from", "nowhere"], ["nowhere"]),
        (["--init-from", "truncated"], ["truncated", "model.safetensors"]),
        (["--lr", "3e-3"], ["--lr was 0.002 and is 0.003", "--no-resume"]),
        (["--seq-len", "32"], ["--seq-len was 64 and is 32"]),
        (["--dtype", "bf16"], ["--dtype was fp32 and is bf16"]),
        (["--data", "changed"], ["data fingerprint"]),
        (["--resume", "--run-dir", "new"], ["--resume", "no checkpoint", "new"]),
        (["--no-resume", "--run-dir", "notes"], ["--no-resume", "notes"]),
        (["--run-dir", "kept"], ["kept/export", "mine.txt"]),
        (["--no-resume", "--init-from", "r/export"], ["--init-from r/export", "--run-dir r"]),
        (["--data", "flipped"], ["flipped", "train-00000.npy"]),
        (["--run-dir", "no-config", "--seed", "9"], ["--seed was 0 and is 9"]),
        (["--run-dir", "a-file/r"], ["--run-dir a-file/r"]),
        (["--replay-step", "5"], ["--replay-step 5", "--steps 4"]),
        (["--replay-step", "2", "--no-resume"], ["--replay-step 2", "--no-resume"]),
        (["--batch-tokens", "100"], ["--batch-tokens 100"]),
    ],
)
def test_refused_in_one_line_with_nothing_written(small, finished, flags, words):
    rng = np.random.default_rng(1)
    if not (finished / "corrupt").exists():
        shutil.copytree(small, finished / "corrupt")
        (finished / "corrupt/manifest.json").write_text("{")
        write_dataset([rng.integers(0, 4000, 500)], finished / "other-vocabulary", vocab_size=4000)
        write_dataset([rng.integers(0, 256, 500)], finished / "changed", vocab_size=256)
        (finished / "a-file").write_text("")
        shutil.copytree(small, finished / "flipped")
        flip_a_bit(finished / "flipped/train-00000.npy", -5)
        shutil.copytree(finished / "r", finished / "no-config")
        (finished / "no-config/config.json").unlink()
        for stranger in ("notes/mine.txt", "kept/export/mine.txt"):
            (finished / stranger).parent.mkdir(parents=True)
            (finished / stranger).write_text("keep me")
            (finished / stranger.partition("/")[0] / ".lock").write_text("")
        shutil.copytree(finished / "r/export", finished / "truncated")
        weights = finished / "truncated/model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    before = snapshot(finished)
    refused = run(*SMALL, "--data", small, "--steps", 4, "--run-dir", "r", *flags, cwd=finished, code=REFUSED)
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("train.py: "), refused.stderr
    assert all(word in refused.stderr for word in words), refused.stderr
    assert "Traceback" not in refused.stderr
    assert snapshot(finished) == before


def test_every_rank_refuses_and_one_speaks(small, tmp_path):
    refused = run(*SMALL, "--data", small, "--batch-tokens", 64, ranks=2, cwd=tmp_path, code=1)
    assert refused.stderr.count("train.py: --batch-tokens 64") == 1
    assert "exitcode  : 2" in refused.stderr and not (tmp_path / "runs").exists()


def test_a_run_folder_in_use_is_refused_and_left_alone(small, tmp_path):
    process = start(*LONG, "--steps", 5000, "--data", small, "--run-dir", "r", cwd=tmp_path)
    try:
        wait_for_step(process, tmp_path / "r", 1)
        refused = run(*LONG, "--steps", 5000, "--data", small, "--run-dir", "r", cwd=tmp_path, code=REFUSED)
        assert "--run-dir r is in use" in refused.stderr
        assert process.poll() is None and status(tmp_path / "r")["state"] == "running"
    finally:
        process.kill()
        process.communicate()


def test_a_run_goes_on_with_changes_that_were_asked_for(small, tmp_path):
    """More steps, another rate, other data: refused unless named, stated in the history, and only once."""
    rng = np.random.default_rng(3)
    write_dataset([rng.integers(0, 256, 500)], tmp_path / "other", vocab_size=256)
    command = [*SMALL, "--run-dir", "r", "--eval-every", 0, "--warmup-steps", 2]
    ranks_run(*command, "--data", small, "--steps", 6, "--lr", "1e-3", cwd=tmp_path)
    changed = [*command, "--data", "other", "--steps", 9, "--lr", "5e-4"]
    refused = ranks_run(*changed, "--allow-change", "steps", "data", cwd=tmp_path, codes=[REFUSED])
    assert "--lr was 0.001 and is 0.0005" in refused.err and "--steps" not in refused.err.partition(":")[2]
    refused = ranks_run(*changed, "--allow-change", "seed", cwd=tmp_path, codes=[REFUSED])
    assert "--allow-change seed: it can be one of steps, lr" in refused.err
    went_on = ranks_run(*changed, "--allow-change", "steps", "lr", "data", cwd=tmp_path)
    assert "resuming after step 6" in went_on.out and "steps from 6 to 9" in went_on.out
    for _ in range(2):  # the second start finds nothing changed
        history = json.loads((tmp_path / "r/config.json").read_text())["history"]
        assert [entry["after_step"] for entry in history] == [6]
        assert history[0]["changed"].keys() == {"steps", "lr", "min_lr", "data"}
        assert history[0]["changed"]["lr"] == [1e-3, 5e-4]
        ranks_run(*changed, cwd=tmp_path)
    assert column(tmp_path / "r", "lr")[6][0] < 5e-4 and len(metrics(tmp_path / "r")) == 9


def test_a_longer_run_keeps_its_warm_up_and_a_shorter_one_is_refused(small, tmp_path):
    command = [*SMALL, "--data", small, "--run-dir", "r", "--eval-every", 0, "--schedule", "linear", "--save-every", 20]
    ranks_run(*command, "--steps", 20, cwd=tmp_path)
    longer = [*command, "--steps", 60, "--allow-change", "steps"]
    out = ranks_run(*longer, cwd=tmp_path).out  # a tenth of 60 steps would be 6: a warm-up in the middle of the run
    assert "steps from 20 to 60" in out and "2 warm-up steps" in out
    assert re.search(r"learning rate of step 21: 0.0014\d, and as it was 0.0002", out)  # it does go back up the slope
    rates = [rate for (rate,) in column(tmp_path / "r", "lr")]
    assert rates[20:] == [2e-4 + 1.8e-3 * (1 - (step - 2) / 58) for step in range(21, 61)]
    before = snapshot(tmp_path / "r")
    refused = ranks_run(*command, "--steps", 40, "--allow-change", "steps", cwd=tmp_path, codes=[REFUSED])
    assert "--steps 40: r has done 60 steps already" in refused.err and snapshot(tmp_path / "r") == before


def test_sources_go_on_where_they_were_with_other_weights(tmp_path):
    """Also on other ranks, and when a step from before the change is replayed, by what a checkpoint says of it."""
    rng, sources = np.random.default_rng(0), {}
    for name in "ab":
        write_dataset([rng.integers(0, 256, 40 * 64 + 1)], tmp_path / name, vocab_size=256)
        sources[Dataset(tmp_path / name).fingerprint] = name
    names = [name for _, name in sorted(sources.items())]
    expected, read = [], Counter()
    for first, weights in ((0, {"a": 7, "b": 1}), (16, {"a": 1, "b": 7})):
        order = interleave(np.arange(first, first + 16), [weights[name] for name in names], 0)[0]
        expected += [(names[i], read.update(names[i]) or read[names[i]] - 1) for i in order]
    keys = {name: batches._key(0, fingerprint) for fingerprint, name in sources.items()}
    rows = {name: sample_order(np.arange(40), 40, keys[name]).tolist() for name in "ab"}
    expected = [(name, rows[name][n]) for name, n in expected]
    assert read["a"] == read["b"] == 16 and len(set(expected)) == 32  # nothing twice

    command = [*SMALL, "--run-dir", "r", "--eval-every", 0, "--save-every", 2, "--keep", 9, "--warmup-steps", 0]
    changed = [*command, "--data", "a:1", "b:7", "--steps", 8, "--allow-change", "steps", "data"]
    ranks_run(*command, "--data", "a:7", "b:1", "--steps", 4, cwd=tmp_path, fault=("traced_samples", "begun"))
    ranks_run(*changed, ranks=2, cwd=tmp_path, fault=("traced_samples", "changed"))
    manifest = json.loads((tmp_path / "r/checkpoints/step-00000008/manifest.json").read_text())
    (tmp_path / "r/config.json").write_text(json.dumps(manifest["config"]))
    replayed = ranks_run(*changed, "--replay-step", 3, cwd=tmp_path).out
    found = re.findall(r"sample (\d+) \(rank 0, from token ([\d,]+) of (\w)\)  loss (\S+)", replayed)
    places = [(int(number), name, int(token.replace(",", "")) // 64) for number, token, name, _ in found]
    assert places == [(number, *expected[number]) for number in range(8, 12)]
    [(loss,)] = column(tmp_path / "r", "loss")[2:3]
    assert sum(float(text) for *_, text in found) / 4 == pytest.approx(loss, abs=1e-3)
    for place, ranks, first, last in (("begun", 1, 1, 4), ("changed", 2, 5, 8)):
        traces = [(tmp_path / f"{place}-{rank}").read_text().splitlines() for rank in range(ranks)]
        steps = [[row for text in step for row in json.loads(text[2:])] for step in zip(*traces, strict=True)]
        assert steps == [[row for _, row in expected[4 * step - 4 : 4 * step]] for step in range(first, last + 1)]


def test_no_resume_sets_the_earlier_run_aside(small, tmp_path):
    command = [*SMALL, "--data", small, "--steps", 4, "--run-dir", "r"]
    run(*command, cwd=tmp_path)
    before = snapshot(tmp_path / "r")
    out = run(*command, "--no-resume", "--lr", "1e-3", cwd=tmp_path).stdout
    assert "r.old-1" in out and snapshot(tmp_path / "r.old-1") == before
    assert len(metrics(tmp_path / "r")) == 4


# ------------------------------------------------------------------------------------------------- Hugging Face, README


def test_init_from_hugging_face_is_exact_and_keeps_its_sizes(small, tmp_path):
    torch.manual_seed(1)
    model = Mistral(MODELS["test"])
    save_hf(model, tmp_path / "hf")
    run(*SMALL, "--data", small, "--init-from", "hf", "--steps", 1, "--run-dir", "r", ranks=2, cwd=tmp_path)
    tokens, labels, *_ = read_in_turn(Corpus([str(small)], 64).train, np.arange(4))
    loss, n_tokens, _ = model(tokens, labels)
    assert column(tmp_path / "r", "loss")[0][0] == pytest.approx((loss / n_tokens).item(), rel=1e-5)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder of the test model, with 40 rows more than its 256 words."""
    torch.manual_seed(1)
    save_hf(Mistral(replace(MODELS["test"], vocab_size=296)), tmp_path / "hf")
    return tmp_path / "hf"


def test_the_weights_a_run_began_with_may_move_and_go(small, folder, tmp_path):
    """Once there is a checkpoint; what they were, not where they lay, is part of the run."""
    command = [*SMALL, "--data", small, "--steps", 4, "--save-every", 2, "--run-dir", "r"]
    out = ranks_run(*command, "--init-from", "hf", cwd=tmp_path).out
    assert "vocabulary 256 ids in the data's tokenizer, 296 rows in the model: 40 of them stand for no token" in out
    losses = column(tmp_path / "r", "loss")

    def again(*flags, codes=None):
        shutil.rmtree(tmp_path / "r/checkpoints/step-00000004", ignore_errors=True)
        return ranks_run(*command, *flags, cwd=tmp_path, codes=codes)

    other = load_file(folder / "model.safetensors")
    other["model.norm.weight"][3] += 1e-3
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path / "other")
    refused = again("--init-from", "other", codes=[REFUSED])
    assert "fingerprint of --init-from's weights was" in refused.err
    folder.rename(tmp_path / "moved")
    for flags in (["--model", "moved"], ["--init-from", "moved"]):
        assert "resuming after step 2" in again(*flags).out and column(tmp_path / "r", "loss") == losses
    (tmp_path / "moved").rename(tmp_path / "away")
    out = again("--init-from", "moved").out
    assert "which are not there any more" in out and column(tmp_path / "r", "loss") == losses
    refused = again("--init-from", "elsewhere", codes=[REFUSED])
    assert "--init-from: elsewhere is not a folder" in refused.err
    shutil.rmtree(tmp_path / "r/checkpoints")  # nothing to go on from: now they are needed
    assert "--init-from: moved is not a folder" in again("--init-from", "moved", codes=[REFUSED]).err


def test_weights_that_are_not_numbers_are_refused_before_the_first_step(small, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    command = [*SMALL, "--data", small, "--init-from", "hf", "--steps", 2, "--run-dir", "r"]
    refused = ranks_run(*command, ranks=2, cwd=tmp_path, codes=[REFUSED] * 2)
    words = "hf/model.safetensors: model.layers.1.mlp.up_proj.weight holds a number that is not finite"
    assert refused.err.startswith("train.py: --init-from: rank 1 on ") and words in refused.err
    assert status(tmp_path / "r")["state"] == "failed"
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_another_copy_of_the_weights_on_one_node_is_refused(small, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere/hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "elsewhere/hf/model.safetensors", metadata={"format": "pt"})
    command = [*SMALL, "--data", small, "--init-from", "hf", "--steps", 2, "--run-dir", "r"]
    fault = ("another_folder", "1", "0.3")
    refused = ranks_run(*command, ranks=2, cwd=tmp_path, fault=fault, codes=[REFUSED] * 2)
    assert "--init-from hf is another for rank 1 on" in refused.err and not (tmp_path / "r").exists()


def test_ids_that_no_token_uses_are_no_reason_to_refuse(small, tmp_path):
    """A tokenizer with a token more than the model has rows; the test model's vocabulary is 256."""
    rng, spec = np.random.default_rng(0), SimpleNamespace(model=MODELS["test"])
    for name, largest in (("unused", 255), ("used", 256)):
        tokens = [*rng.integers(0, 256, 700), largest, 3]
        write_dataset([tokens], tmp_path / name, vocab_size=257, val_documents=[[1, 2, 3]])
    fits, lacks = (Corpus([str(tmp_path / name)], 64) for name in ("unused", "used"))
    nothing = EvalSets(None, {}, 64, False, Dataset)
    check_ids(fits, nothing, spec, 0, 1)
    assert vocabulary_line(fits, spec) == [
        "257 ids in the data's tokenizer, 256 rows in the model: no token has the last ids"
    ]
    with pytest.raises(Refused, match=r"--data .*used: token 700 has id 256, but the model's vocabulary is of 256"):
        check_ids(lacks, nothing, spec, 0, 1)
    check_ids(lacks, nothing, spec, 1, 2)  # the piece of another rank
    with pytest.raises(Refused, match=r"--eval-data .*used: token 700"):
        check_ids(None, EvalSets(None, {"x": tmp_path / "used"}, 64, False, Dataset), spec, 0, 1)


def test_ids_that_mean_something_else_to_the_weights(tmp_path):
    def tokenizer(name: str, pieces: list[str], added: tuple = ()) -> Path:
        (tmp_path / name).mkdir()
        raw = {"model": {"vocab": {piece: i for i, piece in enumerate(pieces)}}, "added_tokens": list(added)}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(raw))
        return tmp_path / name

    def of(folder: Path | None):
        return SimpleNamespace(sources=[SimpleNamespace(dataset=SimpleNamespace(path="d", tokenizer=folder))])

    words, nothing = ["<unk>", "<s>", "</s>", *map(str, range(300))], SimpleNamespace(datasets={})
    ours = tokenizer("ours", words)
    more = tokenizer("more", words, [{"id": 303, "content": "[PAD]"}])
    renamed = tokenizer("renamed", ["[UNK]", *words[1:]])
    swapped = tokenizer("swapped", ["<unk>", "</s>", "<s>", *words[3:]])
    strange = tokenizer("strange", [f"x{i}" for i in range(303)])
    for same in (ours, more, None, tmp_path / "none"):
        assert check_tokenizers(ours, of(same), nothing) == [] == check_tokenizers(same, of(ours), nothing)
    (said,) = check_tokenizers(ours, of(renamed), nothing)
    assert said.startswith("tokenizer  1 of 303 ids mean something else") and "0 is '[UNK]' there and '<unk>'" in said
    for other, of_all in ((swapped, "2 of 303 ids"), (strange, "303 of 303")):
        with pytest.raises(Refused, match=f"{of_all}.*prepare the data with the model's tokenizer"):
            check_tokenizers(ours, of(other), nothing)
    sets = SimpleNamespace(datasets={"pl": of(swapped).sources[0].dataset})
    with pytest.raises(Refused, match="of --eval-data d"):
        check_tokenizers(ours, None, sets)


def readme_commands() -> list[str]:
    return re.findall(r"<!-- \w+ command -->\n```\w*\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_readme_main_job_as_written(tmp_path):
    """The first command's second half (the first half installed what runs this test), in a folder with train.py."""
    install, job = readme_commands()[0].strip().split(" && ")
    assert install == "pip install -e ."
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(job, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    run_dir = tmp_path / "runs/tiny"
    losses = [loss for (loss,) in column(run_dir, "loss")]
    assert losses[0] - np.mean(losses[-20:]) > 2, out.stdout
    assert status(run_dir)["state"] == "finished"
    for name in ("config.json", "curves.png", "sample.txt", "export/tokenizer.json"):
        assert (run_dir / name).stat().st_size > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size == 32_000
    generated = pipeline("text-generation", model=model, tokenizer=tokenizer)("The value of", max_new_tokens=8)
    assert generated[0]["generated_text"].startswith("The value of")
    stream = Dataset(run_dir / "data").split("val")
    tokens = torch.from_numpy(stream.read(0, 129))[None]
    with torch.no_grad():
        loss = model.float()(tokens[:, :-1], labels=None).logits
    loss = torch.nn.functional.cross_entropy(loss[0], tokens[0, 1:]).item()
    assert loss < losses[0] - 2
