"""The 24 faults that a long run meets, each injected into real processes: nothing lost, nothing silently wrong.

The numbers are those of README's table of promises. Runs are of the smallest model on 2 ranks or 1; ``Ranks`` and the
faults are explained in runs.py and faults.py.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    LONG,
    SMALL,
    Ranks,
    checkpoint,
    column,
    equal,
    flip_a_bit,
    largest_shard,
    lines,
    metrics,
    ranks_of,
    ranks_run,
    run,
    saved_steps,
    start,
    status,
    wait_for_step,
    wait_until,
)

from halny.model.data.batches import Corpus, read_in_turn
from halny.model.data.order import sample_order
from halny.model.data.writer import write_dataset
from halny.model.exits import FAILED, REFUSED, STOPPED
from halny.model.mistral import PRESETS as MODELS
from halny.model.mistral import Mistral
from halny.model.run import checkpoint as checkpoints
from halny.model.run.optimizer import APPLIED, NOT_FINITE, SPIKE_SKIPPED, Guard

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory) -> Path:
    """A run of 150 steps on two ranks that nothing happened to."""
    cwd = tmp_path_factory.mktemp("uninterrupted")
    ranks_run(*LONG, "--data", small, "--run-dir", "r", ranks=2, cwd=cwd)
    return cwd / "r"


@pytest.fixture
def command(small) -> list:
    """Twelve steps and a checkpoint every two of them, in r."""
    steps = ["--steps", 12, "--save-every", 2, "--eval-every", 0, "--lr", "1e-3"]
    return [*SMALL, *steps, "--data", small, "--run-dir", "r"]


@pytest.fixture(scope="module")
def twelve(small, tmp_path_factory) -> Path:
    """The twelve steps of ``command`` on one rank, undisturbed, every checkpoint kept."""
    cwd = tmp_path_factory.mktemp("twelve")
    steps = ["--steps", 12, "--save-every", 2, "--eval-every", 0, "--lr", "1e-3", "--keep", 9]
    ranks_run(*SMALL, *steps, "--data", small, "--run-dir", "r", cwd=cwd)
    return cwd / "r"


def finish_like(command: list, run_dir: Path, twelve: Path, *, after: int) -> Ranks:
    """Start the run again: it must resume after that step and end as the undisturbed one, to the bit."""
    again = ranks_run(*command, cwd=run_dir.parent)
    assert f"resuming after step {after}" in again.out, again.out
    assert column(run_dir, "step", "loss", "grad_norm") == column(twelve, "step", "loss", "grad_norm")
    assert equal(checkpoint(run_dir, 12), checkpoint(twelve, 12))
    assert status(run_dir)["state"] == "finished" and not list((run_dir / "checkpoints").glob(".*"))
    return again


# ------------------------------------------------------------------------------------------------- killed at a bad time


@pytest.mark.parametrize(
    "fault, after",
    [
        pytest.param("killed_while_writing", 4, id="01_killed_while_a_shard_is_written"),
        pytest.param("killed_before_manifest", 4, id="02_killed_between_shards_and_manifest"),
        pytest.param("killed_after_rename", 6, id="04_killed_right_after_the_rename"),
    ],
)
def test_fault(command, twelve, tmp_path, fault, after):
    ranks_run(*command, cwd=tmp_path, fault=(fault, "3"), codes=[-signal.SIGKILL])
    partial = list((tmp_path / "r/checkpoints").glob(".step-00000006.partial"))
    assert bool(partial) == (after == 4) and saved_steps(tmp_path / "r")[-1] == after
    finish_like(command, tmp_path / "r", twelve, after=after)


def test_fault_03_leftover_of_the_same_step(command, twelve, tmp_path):
    """Both kinds: unfinished under its hidden name, and under the final name without a manifest."""
    ranks_run(*command, cwd=tmp_path, fault=("killed_before_manifest", "3"), codes=[-signal.SIGKILL])
    folder = tmp_path / "r/checkpoints"
    shutil.copytree(folder / ".step-00000006.partial", folder / "step-00000006")
    again = ranks_run(*command, ranks=2, cwd=tmp_path)
    assert "step-00000006 is damaged (manifest.json cannot be read" in again.out and "after step 4" in again.out
    assert (folder / "damaged-step-00000006-1").is_dir() and not list(folder.glob(".*"))
    np.testing.assert_allclose(column(tmp_path / "r", "loss"), column(twelve, "loss"), rtol=1e-5)


def test_fault_05_nothing_is_deleted_before_its_successor_is_durable(command, tmp_path):
    ranks_run(*command, "--keep", 1, cwd=tmp_path, fault=("traced", "trace"))
    trace = (tmp_path / "trace").read_text().splitlines()
    deletions = [i for i, line in enumerate(trace) if line.startswith("delete ")]
    assert len(deletions) == 5
    for step, i in zip(range(4, 14, 2), deletions, strict=True):
        assert trace[i] == f"delete step-{step - 2:08d}"
        before = trace[:i]
        renamed = before.index(f"rename step-{step:08d}")
        synced = before[:renamed]
        shards = [at for at, line in enumerate(synced) if re.match(r"sync shard-", line)]
        manifest = max(at for at, line in enumerate(synced) if line == "sync manifest.json.sha256")
        assert shards and shards[-1] < manifest  # the manifest after the shards
        assert (
            f"sync .step-{step:08d}.partial" in synced[manifest:]
        )  # then their folder, then the name, then its folder
        assert "sync checkpoints" in before[renamed:]


# ------------------------------------------------------------------------------------------------------ saves that fail


def test_fault_06_the_writing_thread_dies(command, twelve, tmp_path):
    failed = ranks_run(*command, cwd=tmp_path, fault=("writer_dies", "3"), codes=[FAILED])
    assert failed.err.count("\n") == 1 and "step 6 could not be written" in failed.err and "writer died" in failed.err
    assert status(tmp_path / "r")["state"] == "failed" and status(tmp_path / "r")["step"] <= 8
    assert saved_steps(tmp_path / "r") == [2, 4]
    finish_like(command, tmp_path / "r", twelve, after=4)


def test_fault_07_disk_full(command, twelve, tmp_path):
    """On a file system of 3 MB, of which a checkpoint is 0.9: no third one fits beside two and a filler."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:  # without the right to mount, only the fault injected below is tested
        pytest.skip("no right to mount a tmpfs")
    try:
        (disk / "filler").write_bytes(b"x" * 900_000)
        failed = ranks_run(*command, "--run-dir", disk / "r", cwd=tmp_path, codes=[FAILED])
        assert failed.err.count("\n") == 1 and "make room" in failed.err and "step 6 takes 906 kB" in failed.err
        assert status(disk / "r")["state"] == "failed" and saved_steps(disk / "r") == [2, 4]
        (disk / "filler").unlink()
        finish_like([*command, "--run-dir", disk / "r"], disk / "r", twelve, after=4)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_fault_07_no_room_for_anything_but_the_checkpoints(command, twelve, tmp_path):
    """The disk fills up, but not under the checkpoints: what else is written fails, and training goes on."""
    disk = tmp_path / "disk"
    (tmp_path / "checkpoints").mkdir()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        (disk / "r").mkdir()
        (disk / "r/checkpoints").symlink_to(tmp_path / "checkpoints")
        command = [*command, "--run-dir", disk / "r"]
        failed = ranks_run(*command, cwd=tmp_path, fault=("fills", str(disk), "3"), codes=[FAILED])
        assert "status.json cannot be written (No space left on device)" in failed.out
        assert re.fullmatch(r"train.py: stopped: .*: No space left on device.*\n", failed.err), failed.err
        assert checkpoints.complete(tmp_path / "checkpoints")[-1].name == "step-00000012"
        (disk / "filler").unlink()
        ranks_run(*command, cwd=tmp_path)
        assert status(disk / "r")["state"] == "finished" and equal(checkpoint(disk / "r", 12), checkpoint(twelve, 12))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_fault_07_disk_fills_in_the_middle_of_a_shard(command, twelve, tmp_path):
    failed = ranks_run(*command, cwd=tmp_path, fault=("disk_fills_unseen", "3"), codes=[FAILED])
    assert failed.err.count("\n") == 1 and "No space left on device" in failed.err
    assert saved_steps(tmp_path / "r") == [2, 4]
    finish_like(command, tmp_path / "r", twelve, after=4)


def test_fault_08_a_disk_that_changes_a_bit_is_noticed_when_saving(command, tmp_path):
    failed = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("disk_lies", "2"), codes=[FAILED] * 2)
    assert "does not hold what was written" in failed.err and saved_steps(tmp_path / "r") == [2]


def test_fault_14_a_save_longer_than_the_launchers_patience(command, twelve, tmp_path):
    """torchrun ends its ranks 30 s after it was told to stop (here 3): the save is lost, nothing before it is."""
    if "--shutdown-timeout" not in _torchrun_help():
        pytest.skip("this torchrun's patience cannot be set, and half a minute is long for a test")
    command = [*command, "--save-every", 4, "--steps", 5000]
    patience = dict(env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}, ranks=1, cwd=tmp_path, fault=("slow_save", "60", "2"))
    process = start(*command, **patience)
    wait_for_step(process, tmp_path / "r", 8)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 40  # not the 60 that the save takes
    assert saved_steps(tmp_path / "r") == [4] and (tmp_path / "r/checkpoints/.step-00000008.partial").exists()
    again = Ranks(*command, cwd=tmp_path)
    wait_until(again, lambda: "resuming after step 4" in again.out)
    again.kill()


def _torchrun_help() -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_fault_16_a_save_that_fails_on_one_rank_ends_all(command, tmp_path):
    began = time.monotonic()
    failed = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("save_fails_on_rank", "1", "2"), codes=[FAILED] * 2)
    assert time.monotonic() - began < 30
    assert "rank 1 on" in failed.err and "injected on this rank alone" in failed.err and failed.err.count("\n") == 1
    assert saved_steps(tmp_path / "r") == [2]


# ---------------------------------------------------------------------------------------- checkpoints that were damaged


@pytest.mark.parametrize("damage", ["08_bit", "09_truncated", "09_empty", "missing", "manifest", "checksum", "extra"])
def test_fault_a_damaged_checkpoint_is_passed_over(command, twelve, tmp_path, damage):
    run_dir = tmp_path / "r"
    shutil.copytree(twelve, run_dir)
    newest = run_dir / "checkpoints/step-00000012"
    shard = largest_shard(newest)
    if damage == "08_bit":
        flip_a_bit(shard, -100)
    elif damage == "09_truncated":
        os.truncate(shard, shard.stat().st_size - 8)
    elif damage == "09_empty":
        os.truncate(shard, 0)
    elif damage == "missing":
        shard.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1')
    elif damage == "checksum":
        (newest / "manifest.json.sha256").unlink()
    elif damage == "extra":
        (newest / "other.safetensors").write_bytes(b"")
    again = finish_like([*command, "--keep", 9], run_dir, twelve, after=10)
    assert "step-00000012 is damaged" in again.out
    assert (run_dir / "checkpoints/damaged-step-00000012-1").is_dir()


def test_fault_08_no_flipped_bit_of_a_thousand_loads(twelve, tmp_path):
    """One bit anywhere: shards, manifest, its checksum. Every one is found, and only in the file that has it."""
    folder = tmp_path / "step-00000012"
    shutil.copytree(twelve / "checkpoints/step-00000012", folder)
    files = sorted(folder.iterdir())
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(0)
    assert len(files) == 3 and checkpoints.damage(folder) is None
    for i in range(1000):
        # half of them in the small files, which bytes drawn evenly would hardly ever hit
        path = files[rng.choice(3, p=sizes / sizes.sum())] if i % 2 else files[rng.integers(2)]
        offset, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip_a_bit(path, offset, bit)
        assert checkpoints.damage(folder) is not None, (path, offset, bit)
        flip_a_bit(path, offset, bit)
    assert checkpoints.damage(folder) is None


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("where", ["shard", "manifest", "metadata", "shard with a matching manifest"])
def test_fault_10_a_pickle_is_refused_unexecuted(command, twelve, tmp_path, where):
    run_dir = tmp_path / "r"
    shutil.copytree(twelve, run_dir)
    shutil.rmtree(run_dir / "export")
    newest = run_dir / "checkpoints/step-00000012"
    names = {"manifest": newest / "manifest.json", "metadata": newest / ".metadata"}
    target = names.get(where, largest_shard(newest))
    target.write_bytes(pickle.dumps(Bomb()))
    if where != "shard with a matching manifest":
        finish_like([*command, "--keep", 9], run_dir, twelve, after=10)
    else:  # someone who also forges checksums gets a clear end, not an execution
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"][target.name] = {"bytes": target.stat().st_size, "sha256": checkpoints.sha256(target)}
        content = json.dumps(manifest).encode()
        (newest / "manifest.json").write_bytes(content)
        (newest / "manifest.json.sha256").write_bytes(checkpoints.checksum_line(content))
        assert checkpoints.damage(newest) is None
        failed = ranks_run(*command, cwd=tmp_path, codes=[FAILED])
        assert "could not be read" in failed.err and failed.err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_fault_24_the_newest_good_checkpoint_outlives_a_damaged_newer_one(command, twelve, tmp_path):
    run_dir = tmp_path / "r"
    shutil.copytree(twelve, run_dir)
    flip_a_bit(largest_shard(run_dir / "checkpoints/step-00000012"), -9)
    again = [*command, "--keep", 1, "--save-every", 1]
    ranks_run(*again, cwd=tmp_path, fault=("killed_before_manifest", "1"), codes=[-signal.SIGKILL])
    assert saved_steps(run_dir)[-1] == 10 and (run_dir / "checkpoints/damaged-step-00000012-1").is_dir()
    finish_like(again, run_dir, twelve, after=10)
    assert saved_steps(run_dir) == [12]


def test_fault_24_strangers_among_the_checkpoints_neither_count_nor_go(command, twelve, tmp_path):
    """Copies under other names or numbers, and a link to another disk: what users leave there."""
    run_dir = tmp_path / "r"
    shutil.copytree(twelve, run_dir)
    folder = run_dir / "checkpoints"
    for path in sorted(folder.iterdir()):
        if path.name not in ("step-00000002", "step-00000004", "step-00000006"):
            shutil.rmtree(path)
    for name in ("step-best", "step-00000006.bak", "step-00099999", "step-00000005"):
        shutil.copytree(folder / "step-00000006", folder / name)
    (folder / "step-00000002").rename(tmp_path / "elsewhere")
    (folder / "step-00000002").symlink_to(tmp_path / "elsewhere")
    again = ranks_run(*command, "--keep", 1, "--keep-every", 8, "--replay-step", 5, cwd=tmp_path)
    assert "replaying step 5" in again.out
    again = finish_like([*command, "--keep", 1, "--keep-every", 8], run_dir, twelve, after=6)
    assert "step-00099999 is damaged" in again.out
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["damaged-step-00099999-1", "step-00000002", "step-00000005", "step-00000006.bak", "step-00000008",
        "step-00000012", "step-best"]  # fmt: skip


def test_keep_every_keeps_old_ones_too(command, tmp_path):
    ranks_run(*command, "--keep", 1, "--keep-every", 4, cwd=tmp_path)
    assert saved_steps(tmp_path / "r") == [4, 8, 12]


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_fault_11_not_finite_on_one_rank_is_skipped_by_all_untouched(command, tmp_path, factor):
    fault = ("loss_times", factor, "1", "6", "7")
    result = ranks_run(*command, "--save-every", 1, "--keep", 99, ranks=2, cwd=tmp_path, fault=fault)
    skipped = [line["step"] for line in metrics(tmp_path / "r") if line.get("skipped")]
    assert skipped == [6, 7] and [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 13))
    states = [checkpoint(tmp_path / "r", step) for step in (5, 6, 7, 8)]
    assert equal(states[0], states[1]) and equal(states[0], states[2]) and not equal(states[2], states[3])
    assert result.out.count("the update was skipped") == 2
    assert metrics(tmp_path / "r")[-1]["loss"] < metrics(tmp_path / "r")[0]["loss"]


def test_fault_11_too_many_in_a_row_stop_the_run_and_can_be_replayed(command, twelve, tmp_path):
    fault = ("loss_times", "nan", "0", "6", "7", "8")
    failed = ranks_run(*command, "--max-skips", 2, ranks=2, cwd=tmp_path, fault=fault, codes=[FAILED] * 2)
    assert "step 8: loss nan" in failed.err and "3 in a row" in failed.err and failed.err.count("\n") == 1
    assert "numbers 28 to 31" in failed.err and "--replay-step 8" in failed.err
    assert status(tmp_path / "r")["state"] == "failed" and saved_steps(tmp_path / "r") == [4, 6]
    # A resumed run counts on: the skips of steps 6 and 7 are in the checkpoint's books, or this would go one further.
    again = ranks_run(*command, "--max-skips", 2, cwd=tmp_path, fault=("loss_times", "nan", "0", "1", "2"), codes=[1])
    assert "step 8: loss nan" in again.err and "3 in a row" in again.err


def test_fault_11_replay_names_sample_and_module(small, tmp_path):
    """A poisoned embedding row that only some samples reach."""
    from halny.model.convert import save_hf

    rare = 41  # a token of the corpus that a sample or two hold
    rows, *_ = read_in_turn(Corpus([str(small)], 64).train, np.arange(4))
    model = Mistral(MODELS["test"])
    model.init_weights(seed=0)
    holders = (rows == rare).any(1)
    assert 0 < holders.sum() < 4
    with torch.no_grad():
        model.embed.weight[rare] = float("nan")
    save_hf(model, tmp_path / "hf")
    places = [int(sample_order(np.array([i]), 4, seed=0)[0]) for i in range(8)]
    bad = next(i for i in range(8) if holders[places[i]])
    first_bad = 1 + bad // 2
    command = [*SMALL, "--batch-tokens", 128, "--steps", 30, "--init-from", "hf", "--run-dir", "r", "--data", small]
    command += ["--save-every", 30, "--max-skips", 0]
    fault = ("weights_are_believed",)
    failed = ranks_run(*command, ranks=2, cwd=tmp_path, fault=fault, codes=[FAILED] * 2)
    after = status(tmp_path / "r")
    assert after["state"] == "failed" and f"step {first_bad}" in after["reason"] and "nan" in after["reason"]
    assert "stopped: step" in failed.err and first_bad > 1 and not (tmp_path / "r/checkpoints").exists()

    replayed = ranks_run(*command, "--replay-step", first_bad, ranks=2, cwd=tmp_path, fault=fault).out
    found = re.findall(r"sample (\d+) \(rank \d, from token ([\d,]+)\)  loss (\S+) .*", replayed)
    assert [int(number) for number, _, _ in found] == [2 * first_bad - 2, 2 * first_bad - 1]
    for number, token, loss in found:
        assert int(token) == 64 * places[int(number)]
        assert (loss == "nan") == bool(holders[places[int(number)]])
    assert f"sample {bad} " in replayed and "first not finite: the output of embed" in replayed
    assert status(tmp_path / "r") == after  # a replay changes nothing

    failed = ranks_run(*command, "--run-dir", "s", "--save-every", 1, cwd=tmp_path, fault=fault, codes=[FAILED])
    assert "a weight is not finite" in failed.err and not list((tmp_path / "s/checkpoints").glob("step-*"))


@pytest.mark.parametrize("skip", [False, True])
def test_fault_12_a_spike_is_said_and_by_flag_skipped(small, tmp_path, skip):
    command = [
        *SMALL,
        "--steps",
        24,
        "--save-every",
        1,
        "--keep",
        99,
        "--eval-every",
        0,
        "--data",
        small,
        "--run-dir",
        "r",
    ]
    command += ["--skip-spikes"] if skip else []
    result = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("loss_times", "50", "1", "10", "20"))
    spikes = [(line["step"], line.get("skipped", False)) for line in metrics(tmp_path / "r") if line.get("spike")]
    assert spikes == [(20, skip)]  # at step 10 there were too few losses to compare with
    assert "a spike over the median" in result.out
    assert equal(checkpoint(tmp_path / "r", 19), checkpoint(tmp_path / "r", 20)) == skip


def test_guard_judges_as_its_definition():
    cpu = torch.device("cpu")
    guard, rng, applied = Guard(1.5, True, cpu), np.random.default_rng(0), []
    for step in range(1, 700):
        loss = float(rng.lognormal(0, 0.4)) if rng.random() > 0.05 else float(rng.choice([np.nan, np.inf, 1e9]))
        recent = [x for at, x in applied if at >= step - 128]
        median = sorted(recent)[(len(recent) - 1) // 2] if recent else np.inf
        spike = len(recent) >= 16 and loss > 1.5 * median
        expected = NOT_FINITE if not np.isfinite(loss) else SPIKE_SKIPPED if spike else APPLIED
        loss_tensor = torch.tensor(loss, dtype=torch.float64)
        verdict, seen = guard.judge(step, loss_tensor, torch.tensor(1.0, dtype=torch.float64))
        assert verdict.item() == expected, (step, loss, recent)
        if expected == SPIKE_SKIPPED:
            assert seen.item() == median
        if expected == APPLIED:
            applied.append((step, loss))
        if step % 100 == 50:  # as a resumed run would
            again = Guard(1.5, True, cpu)
            again.remember(json.loads(json.dumps(guard.remembered())))
            guard = again


# --------------------------------------------------------------------------------------------------------- told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_fault_13_a_signal_to_one_rank_stops_all_saved(small, tmp_path, number):
    process = Ranks(*LONG, "--steps", 5000, "--data", small, "--run-dir", "r", ranks=2, cwd=tmp_path)
    wait_for_step(process, tmp_path / "r", 3)
    os.kill(process.pids[1], number)
    assert process.codes() == [STOPPED] * 2, process.communicate()
    stopped = status(tmp_path / "r")
    assert (stopped["state"], stopped["reason"]) == ("stopped", number.name) and "Traceback" not in process.err
    assert saved_steps(tmp_path / "r")[-1] == stopped["step"] == len(metrics(tmp_path / "r"))
    assert (tmp_path / "r/curves.png").exists()


@pytest.mark.parametrize("number, flags", [
    (signal.SIGTERM, ()), (signal.SIGINT, ()),
    (signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")),
])  # fmt: skip
def test_fault_13_a_signal_to_torchrun_stops_all_saved(small, tmp_path, number, flags):
    if flags and flags[0] not in _torchrun_help():
        pytest.skip(f"this torchrun has no {flags[0]}")
    process = start(*LONG, "--steps", 5000, "--data", small, "--run-dir", "r", ranks=2, cwd=tmp_path, launcher=flags)
    wait_for_step(process, tmp_path / "r", 3)
    process.send_signal(number)
    process.communicate(timeout=60)
    stopped = status(tmp_path / "r")
    assert stopped["state"] == "stopped" and saved_steps(tmp_path / "r")[-1] == stopped["step"]


@pytest.mark.parametrize("where, step", [("evaluation", 4), ("save", 2), ("writing", 2), ("loading", 3)])
def test_fault_13_a_signal_at_an_awkward_moment(command, twelve, tmp_path, where, step):
    if where == "loading":
        shutil.copytree(twelve, tmp_path / "r")
        for path in sorted((tmp_path / "r/checkpoints").iterdir())[1:]:
            shutil.rmtree(path)
    fault = ("signals_itself", str(int(signal.SIGTERM)), "0", where)
    evaluating = ["--eval-every", 4]
    stopped = ranks_run(*command, *evaluating, ranks=2, cwd=tmp_path, fault=fault, codes=[STOPPED] * 2)
    assert "stopped by SIGTERM" in stopped.out
    at = status(tmp_path / "r")["step"]
    assert at >= step and saved_steps(tmp_path / "r")[-1] == at
    if where == "evaluation":
        assert not any("val_loss" in line for line in lines(tmp_path / "r"))
    ranks_run(*command, *evaluating, ranks=2, cwd=tmp_path)
    assert status(tmp_path / "r")["state"] == "finished" and len(metrics(tmp_path / "r")) == 12
    assert [line["step"] for line in lines(tmp_path / "r") if "val_loss" in line] == [4, 8, 12]


def test_fault_13_a_signal_while_the_data_is_prepared(tmp_path):
    process = Ranks("--steps", 2000, "--run-dir", "r", cwd=tmp_path)
    wait_until(process, lambda: "preparing the built-in corpus" in process.out)
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.codes() == [STOPPED]
    assert status(tmp_path / "r")["step"] == 1 and saved_steps(tmp_path / "r") == [1]


def test_max_hours_stops_ahead_of_the_limit(small, tmp_path):
    began = time.monotonic()
    process = ranks_run(*LONG, "--steps", 50_000, "--max-hours", 9 / 3600, "--data", small, "--run-dir", "r", ranks=2,
        cwd=tmp_path, codes=[STOPPED] * 2)  # fmt: skip
    assert time.monotonic() - began < 30 and "stopped by --max-hours" in process.out
    stopped = status(tmp_path / "r")
    assert stopped["state"] == "stopped" and saved_steps(tmp_path / "r")[-1] == stopped["step"] > 1


def test_max_hours_cuts_an_evaluation_short_and_says_where_none_fits(small, tmp_path):
    write_dataset([np.full(65 * 40_000, 7)], tmp_path / "large", vocab_size=256)
    command = [*SMALL, "--data", small, "--run-dir", "r", "--steps", 100, "--save-every", 100, "--eval-every", 2]
    command += ["--eval-data", f"large:{tmp_path / 'large'}", "--micro-batch", 1, "--max-hours", 4 / 3600]
    began = time.monotonic()
    process = ranks_run(*command, cwd=tmp_path, codes=[STOPPED])
    assert time.monotonic() - began < 30 and "stopped by --max-hours" in process.out  # the evaluation takes minutes
    assert saved_steps(tmp_path / "r") == [2] and not any("val_loss" in line for line in metrics(tmp_path / "r"))
    again = ranks_run(*command, cwd=tmp_path, codes=[1])
    assert "one evaluation does not fit; give it longer, or evaluate on less" in again.err


def test_max_hours_leaves_the_export_to_the_next_start(small, tmp_path):
    command = [*SMALL, "--data", small, "--run-dir", "r", "--steps", 4, "--save-every", 4]
    late = ranks_run(*command, "--max-hours", 1, cwd=tmp_path, fault=("saves_take", "3600"), codes=[STOPPED])
    assert "before the export" in late.out and not (tmp_path / "r/export").exists()
    ranks_run(*command, "--max-hours", 1, cwd=tmp_path)
    assert (tmp_path / "r/export/model.safetensors").exists()


def test_an_evaluation_cut_short_by_a_signal_is_made_up_for(command, tmp_path):
    command = [*command, "--steps", 4, "--eval-every", 2]
    ranks_run(*command, cwd=tmp_path)
    before = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert '"val_loss"' in before[-1]
    (tmp_path / "r/metrics.jsonl").write_text("\n".join(before[:-1]) + "\n")
    ranks_run(*command, cwd=tmp_path)
    again = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert json.loads(again[-1]) == pytest.approx(json.loads(before[-1])) and len(again) == 6


# -------------------------------------------------------------------------------------------- ranks that hang or differ


def test_fault_15_a_stopped_rank_is_named_within_the_deadline(small, tmp_path):
    process = Ranks(*LONG, "--steps", 5000, "--deadline", 3, "--data", small, "--run-dir", "r", ranks=2, cwd=tmp_path)
    wait_for_step(process, tmp_path / "r", 3)
    os.kill(process.pids[1], signal.SIGSTOP)
    process.processes[0].join(40)
    assert process.processes[0].exitcode == FAILED, process.communicate()
    process.kill()
    reason = status(tmp_path / "r")["reason"]
    assert status(tmp_path / "r")["state"] == "failed" and f"rank 1 on {HOST} is silent since" in reason
    assert reason in process.err and "Thread" in (tmp_path / "r/stacks/rank-00000.txt").read_text()


def test_fault_15_a_rank_that_hangs_is_named_within_the_deadline(command, tmp_path):
    hung = ranks_run(*command, "--deadline", 3, ranks=2, cwd=tmp_path, fault=("hangs", "1", "5"), codes=[1, 1])
    reason = status(tmp_path / "r")["reason"]
    assert re.search(rf"rank 1 on {HOST} is in <lambda> \(faults.py\), called from train_step:\d+", reason), reason
    assert "no progress for" in hung.err and "in step 5" in hung.err
    assert "faults.py" in (tmp_path / "r/stacks/rank-00001.txt").read_text()


def test_fault_15_a_killed_rank_is_named_by_the_others(small, tmp_path):
    process = Ranks(*LONG, "--steps", 5000, "--data", small, "--run-dir", "r", ranks=2, cwd=tmp_path)
    wait_for_step(process, tmp_path / "r", 3)
    os.kill(process.pids[1], signal.SIGKILL)
    assert process.codes(40) == [FAILED, -signal.SIGKILL]
    assert f"rank 1 on {HOST} is silent since" in status(tmp_path / "r")["reason"]
    assert process.err.count("train.py: stopped") == 1 and "Traceback" not in process.err


def test_an_exception_on_one_rank_ends_all_and_its_reason_is_kept(command, tmp_path):
    ranks_run(*command, ranks=2, cwd=tmp_path, fault=("raises", "1", "5"), codes=[FAILED] * 2)
    after = status(tmp_path / "r")
    assert after["reason"] == f"rank 1 on {HOST}: RuntimeError: injected into a forward pass" and after["step"] == 4


def test_fault_23_wrong_collectives_are_found_before_the_first_step(command, tmp_path):
    failed = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("wrong_all_reduce", "1"), codes=[FAILED] * 2)
    assert f"all-reduce of known numbers came out wrong on rank 1 ({HOST})" in failed.err
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_fault_23_weights_that_differ_between_ranks_are_never_saved(command, tmp_path):
    failed = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("wrong_gather", "1"), codes=[FAILED] * 2)
    assert "the gathered weights of layer" in failed.err and "differ between ranks: rank 1" in failed.err
    assert not saved_steps(tmp_path / "r")


def test_a_slow_rank_is_named(small, tmp_path):
    command = [*LONG, "--steps", 3000, "--data", small, "--run-dir", "r"]
    process = Ranks(*command, ranks=2, cwd=tmp_path, fault=("slow_rank", "1", "50"))
    try:
        wait_until(process, lambda: f"rank 1 on {HOST} is slow" in process.out)
        beat = json.loads((tmp_path / "r/heartbeat.json").read_text())
        assert beat["slowest_rank"]["rank"] == 1 and beat["ranks_heard"] == 2
    finally:
        process.kill()


# ------------------------------------------------------------------------------------------------------------ exactness


def test_fault_20_killed_stopped_and_resumed_equals_uninterrupted_bitwise(small, uninterrupted, tmp_path):
    """Under torchrun: the launcher killed with -9, one rank told to stop, torchrun told to stop, then to the end."""
    command = [*LONG, "--data", small, "--run-dir", "r"]
    run_dir = tmp_path / "r"

    process = start(*command, ranks=2, cwd=tmp_path)
    wait_for_step(process, run_dir, 45)
    ranks = ranks_of(process)
    process.kill()  # the launcher alone; the ranks die with it
    process.wait()
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 46, "lo')  # a line torn by the kill

    process = Ranks(*command, ranks=2, cwd=tmp_path)
    wait_for_step(process, run_dir, 70)
    os.kill(process.pids[1], signal.SIGUSR1)  # one rank is told; all stop
    assert process.codes() == [STOPPED] * 2
    assert re.search(r"resuming after step (40|60)", process.out) and "stopped by SIGUSR1" in process.out
    stopped = status(run_dir)
    assert stopped["step"] >= 70 and len(metrics(run_dir)) == stopped["step"]

    ranks_run(*command, ranks=2, cwd=tmp_path)
    names = ("step", "loss", "accuracy", "grad_norm", "lr", "tokens")
    assert column(run_dir, *names) == column(uninterrupted, *names)
    ours = checkpoint(run_dir, 150)
    assert equal(ours, checkpoint(uninterrupted, 150)) and len(ours) == 3 * len(
        list(Mistral(MODELS["test"]).parameters())
    )
    assert saved_steps(run_dir) == [140, 150]


def test_fault_17_and_19_resume_within_and_between_epochs_reads_each_sample_once(small, tmp_path):
    """Epochs of 4 samples, 2 a step: stopped after 5 steps (mid-epoch) and after 8 (an epoch's end)."""
    command = [*SMALL, "--batch-tokens", 128, "--save-every", 1, "--eval-every", 0, "--steps", 13, "--data", small]
    ranks_run(*command, "--run-dir", "whole", ranks=2, cwd=tmp_path, fault=("traced_samples", "whole-trace"))
    for save in (5, 3, None):  # counted anew after each start: steps 5, 8 and the rest
        codes = [STOPPED] * 2
        fault = ("traced_samples", "parts-trace")
        if save is None:
            ranks_run(*command, "--run-dir", "parts", ranks=2, cwd=tmp_path, fault=fault)
        else:
            stop = Ranks(
                *command, "--run-dir", "parts", ranks=2, cwd=tmp_path, fault=("killed_after_rename", str(save))
            )
            codes = stop.codes()
            assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert column(tmp_path / "parts", "step", "loss") == column(tmp_path / "whole", "step", "loss")
    for rank in (0, 1):
        whole = (tmp_path / f"whole-trace-{rank}").read_text().splitlines()
        rest = (tmp_path / f"parts-trace-{rank}").read_text().splitlines()
        assert whole[8:] == rest and whole[0].startswith("1 ") and rest[0].startswith("9 ")
    read = [json.loads(line.partition(" ")[2]) for rank in (0, 1) for line in
            (tmp_path / f"whole-trace-{rank}").read_text().splitlines()[:12]]  # fmt: skip
    assert sorted(itertools.chain(*read)) == sorted(list(range(4)) * 6)  # 12 steps of 2: six epochs, each sample once


def test_fault_18_resume_on_another_number_of_ranks(small, uninterrupted, tmp_path):
    command = [*LONG, "--data", small, "--run-dir", "r"]
    for ranks, until in ((4, 30), (1, 70), (2, 150)):
        process = Ranks(*command, ranks=ranks, cwd=tmp_path)
        if until < 150:
            wait_for_step(process, tmp_path / "r", until)
            os.kill(process.pids[-1], signal.SIGINT)
        assert process.codes() == [STOPPED if until < 150 else 0] * ranks
    np.testing.assert_allclose(column(tmp_path / "r", "loss"), column(uninterrupted, "loss"), rtol=1e-3)
    np.testing.assert_allclose(column(tmp_path / "r", "loss")[:40], column(uninterrupted, "loss")[:40], rtol=1e-5)


def test_fault_21_data_changed_underneath_is_refused(command, small, twelve, tmp_path):
    shutil.copytree(twelve, tmp_path / "r")
    rng = np.random.default_rng(5)
    write_dataset([rng.integers(0, 256, 202)], tmp_path / "other", vocab_size=256)
    before = (tmp_path / "r/metrics.jsonl").read_bytes()
    refused = ranks_run(*command, "--data", tmp_path / "other", ranks=2, cwd=tmp_path, codes=[REFUSED] * 2)
    assert "data fingerprint was" in refused.err and refused.err.count("\n") == 1
    shutil.copytree(small, tmp_path / "changed")
    flip_a_bit(tmp_path / "changed/train-00000.npy", -5)
    refused = ranks_run(*command, "--data", tmp_path / "changed", ranks=2, cwd=tmp_path, codes=[REFUSED] * 2)
    assert "train-00000.npy" in refused.err and (tmp_path / "r/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("rows, split", [(10, "train"), (24, "val")])
def test_fault_21_data_lost_on_one_rank_ends_all_with_the_last_step_saved(command, twelve, tmp_path, rows, split):
    """Two rows a step and rank: those of five steps, or of all twelve but not of the evaluation after them."""
    command += ["--save-every", 1000, *(["--eval-every", 12] if split == "val" else [])]
    ended = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("unreadable", "1", str(rows), "0.3"), codes=[FAILED] * 2)
    step = rows // 2
    assert status(tmp_path / "r")["step"] == step == metrics(tmp_path / "r")[-1]["step"]
    assert saved_steps(tmp_path / "r") == [step]
    assert ended.err.count("train.py: stopped: rank 1 on " + HOST) == ended.err.count("train.py:") == 1
    assert f"{split}-00000.npy: cannot be read" in status(tmp_path / "r")["reason"] and "Traceback" not in ended.err
    if split == "train":
        ranks_run(*command, ranks=2, cwd=tmp_path)
        np.testing.assert_allclose(column(tmp_path / "r", "loss"), column(twelve, "loss"), rtol=1e-5)


def test_a_stop_does_not_wait_for_data(command, tmp_path):
    process = Ranks(*command, "--save-every", 1000, cwd=tmp_path, fault=("unreadable", "0", "20", "600"))
    wait_for_step(process, tmp_path / "r", 4)  # written in the fifth, which has the last rows that could be read
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.codes(timeout=20) == [STOPPED] and saved_steps(tmp_path / "r") == [5]


def test_fault_22_another_configuration_or_dtype_is_refused(command, twelve, tmp_path):
    shutil.copytree(twelve, tmp_path / "r")
    refused = ranks_run(*command, "--dtype", "bf16", "--seed", 3, ranks=2, cwd=tmp_path, codes=[REFUSED] * 2)
    assert "--dtype was fp32 and is bf16" in refused.err and "--seed was 0 and is 3" in refused.err


@pytest.mark.parametrize("change, words", [("dtype", "torch.bfloat16"), ("name", "only in the"), ("shape", "[")])
def test_fault_22_a_checkpoint_of_other_tensors_is_refused(command, twelve, tmp_path, change, words):
    """Well-formed and with right checksums, but not of this run: DCP itself would cast a dtype silently."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(twelve, tmp_path / "r")
    newest = tmp_path / "r/checkpoints/step-00000012"
    path = largest_shard(newest)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = "model.norm.weight"
    if change == "dtype":
        tensors[name] = tensors[name].bfloat16()
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors["model.stranger"] = tensors.pop(name)
        sharding = json.loads(metadata["DCP_SHARDING_INFO"])
        sharding["model.stranger"] = sharding.pop(name)
        metadata["DCP_SHARDING_INFO"] = json.dumps(sharding)
    save_file(tensors, path, metadata)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checkpoints.sha256(path)}
    content = json.dumps(manifest).encode()
    (newest / "manifest.json").write_bytes(content)
    (newest / "manifest.json.sha256").write_bytes(checkpoints.checksum_line(content))
    refused = ranks_run(*command, cwd=tmp_path, codes=[REFUSED])
    assert words in refused.err and refused.err.count("\n") == 1, refused.err


def test_checkpoints_and_status_respect_umask(command, tmp_path):
    before = os.umask(0o077)
    try:
        run(*command, "--steps", 2, cwd=tmp_path)
    finally:
        os.umask(before)
    loose = [path for path in (tmp_path / "r").rglob("*") if path.stat().st_mode & 0o077]
    assert not loose
