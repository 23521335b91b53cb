"""Windows on metrics.jsonl: TensorBoard, Weights & Biases, the summary, and curves of several runs in one picture."""

import importlib.util
import json
import os
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import SMALL, lines, ranks_run, status

from bench import report
from halny.model.estimate.roofline import palm_flops_per_token
from halny.model.exits import REFUSED, Refused
from halny.model.mistral import PRESETS
from halny.model.record import loggers
from halny.model.record.hook import CheckpointHook
from halny.model.record.loggers import Logger, check_loggers, wandb_id
from halny.model.record.summary import spent_on
from halny.model.run.recipe import command_line

TEN = [*SMALL, "--steps", 10, "--save-every", 5, "--eval-every", 5, "--peak-tflops", 1, "--run-dir", "r"]
SECRET = "0123456789abcdef" * 2 + "feedbeef"  # of a key's length


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def ten(small, tmp_path_factory):
    """Ten steps on two ranks, with both back ends; the first start dies in step 7, the second goes on from step 5."""
    needs("tensorboard", "wandb")
    cwd = tmp_path_factory.mktemp("ten")
    command = [*TEN, "--data", small, "--tensorboard", "--wandb", "winds"]
    options = dict(ranks=2, cwd=cwd, env={"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET})
    first = ranks_run(*command, **options, fault=("raises", "0", "8"), codes=[1, 1])
    again = ranks_run(*command, **options)
    return SimpleNamespace(path=cwd / "r", text=first.out + first.err + again.out + again.err, out=again.out)


def expected(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], float(line[name])) for line in lines(run_dir) if line.get(name) is not None]


def test_tensorboard_has_the_figures_of_metrics_jsonl_under_their_names(ten):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ten.path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == set().union(*lines(ten.path)) - {"step"}
    for name in tags:  # each step once, though step 6 was computed twice
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected(ten.path, name)
        ]


def wandb_records(file: Path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def test_wandb_offline_has_them_in_one_run(ten):
    files = sorted((ten.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two starts, one id
    rows, config = {}, {}
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items}
                rows |= {(row["step"], name): value for name, value in row.items() if not name.startswith("_")}
            elif record.WhichOneof("record_type") == "run":
                assert record.run.project == "winds"
                config |= {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.run.config.update}
    assert config["recipe"]["steps"] == 10
    for line in lines(ten.path):
        for name, value in line.items():
            assert rows[line["step"], name] == value


def test_no_key_is_written_anywhere(ten):
    assert SECRET not in ten.text
    assert not [p for p in ten.path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_summary_is_printed_and_written(ten):
    summary = json.loads((ten.path / "summary.json").read_text())
    steps = [line for line in lines(ten.path) if "loss" in line]
    assert (summary["steps"], summary["tokens"]) == (10, 2560)
    seconds = [256 / line["tokens_per_second_per_gpu"] for line in steps]
    assert summary["gpu_seconds"] == pytest.approx(sum(seconds))
    assert summary["tokens_per_second_per_gpu"] == pytest.approx(2560 / sum(seconds))
    weighted = sum(line["mfu"] * s for line, s in zip(steps, seconds, strict=True)) / sum(seconds)
    assert summary["mfu"] == pytest.approx(weighted)
    plan = palm_flops_per_token(PRESETS["test"], 64)
    assert summary["mfu_palm"] == pytest.approx(2560 / sum(seconds) * plan / 1e12)
    best = min((line for line in lines(ten.path) if "val_loss" in line), key=lambda line: line["val_loss"])
    assert summary["best_evaluation"] == {"step": best["step"], "val_loss": best["val_loss"]}

    spent, wall = summary["this_start"]["spent_s"], summary["this_start"]["wall_s"]
    assert {"start-up", "steps", "waiting for data", "evaluation", "checkpoints", "export"} == spent.keys()
    assert min(spent.values()) >= 0 and 0.9 * wall < sum(spent.values()) <= wall
    printed = ten.out[ten.out.index("summary ") :]
    assert "10 steps, 2,560 tokens" in printed and f"step-{best['step']:08d}: val_loss" in ten.out and "MFU" in printed


def test_spent_on_counts_no_second_twice():
    run = SimpleNamespace(spent={})

    @spent_on("inner")
    def inner(run):
        time.sleep(0.05)

    @spent_on("outer")
    def outer(run):
        time.sleep(0.02)
        inner(run)
        inner(run)

    outer(run)
    assert 0.1 <= run.spent["inner"] < 0.2 and 0.02 <= run.spent["outer"] < 0.05


def test_a_back_end_that_dies_does_not_stop_the_run(small, tmp_path):
    needs("tensorboard")
    done = ranks_run(*TEN, "--data", small, "--tensorboard", ranks=1, cwd=tmp_path, fault=("tensorboard_dies", "3"))
    assert done.out.count("--tensorboard stopped") == 1 and "the lights went out" in done.out
    assert len(lines(tmp_path / "r")) == 12 and status(tmp_path / "r")["state"] == "finished"


def test_logger_never_waits_and_says_once_why_it_stopped(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(loggers, "WAITING", 5)
    said, release = [], threading.Event()

    def hangs():
        return (lambda line: release.wait()), (lambda: None)

    began, logger = time.perf_counter(), Logger("--wandb", hangs, (), said.append)
    for step in range(20):
        logger.log({"step": step})
    logger.close()
    assert time.perf_counter() - began < 1 and len(said) == 1 and "5 lines behind" in said[0]
    release.set()

    def refuses(key):
        raise SystemExit(f"no such key: {key}\nsorry")

    logger = Logger("--wandb", refuses, (SECRET,), said.append)
    logger.close()
    assert len(said) == 2 and SECRET not in said[1] and "no such key: [the key] sorry" in said[1]


def test_a_torn_id_is_drawn_anew_and_said(tmp_path):
    said, path = [], tmp_path / "wandb-id.txt"
    first = wandb_id(path, said.append)
    assert wandb_id(path, said.append) == first and not said
    for torn in (b"", b"\0\0\0\0", b"a b"):
        path.write_bytes(torn)
        drawn = wandb_id(path, said.append)
        assert drawn == path.read_text() != first and wandb_id(path, said.append) == drawn
    assert len(said) == 3 and all("wandb-id.txt holds no id" in line for line in said)


def test_logger_hands_over_every_line_before_it_closes():
    got = []

    def slow():
        return (lambda line: (time.sleep(0.005), got.append(line))), (lambda: got.append("closed"))

    logger = Logger("--tensorboard", slow, (), pytest.fail)
    for step in range(20):
        logger.log({"step": step})
    logger.close()
    assert got == [*({"step": step} for step in range(20)), "closed"]


def test_what_is_not_installed_or_has_no_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flag, wanted in (("--tensorboard", (True, None)), ("--wandb", (False, "halny"))):
        with pytest.raises(Refused, match=rf"{flag} needs the package {flag[2:]}.*\[log\]"):
            check_loggers(*wanted)
    check_loggers(False, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Refused, match="WANDB_MODE=offline"):
        check_loggers(False, "halny")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    os.chmod(tmp_path / "netrc", 0o600)
    check_loggers(False, "halny")


def test_refused_before_the_run_folder_is_there(small, tmp_path):
    refused = ranks_run(
        *TEN, "--data", small, "--wandb", ranks=1, cwd=tmp_path, fault=("without", "wandb"), codes=[REFUSED]
    )
    assert '--wandb needs the package wandb: pip install -e ".[log]"' in refused.err
    assert not (tmp_path / "r").exists()


def test_wandb_alone_means_halny_and_a_preset_after_it_stays_one():
    assert command_line(["--wandb"]).wandb == "halny"
    recipe = command_line(["--wandb", "bielik-7b"])
    assert (recipe.wandb, recipe.steps) == ("halny", 17_350)


def test_curves_of_two_runs_in_one_picture(tmp_path, capsys, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    def write(name: str, tokens_a_step: int, *steps: int) -> Path:
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.jsonl").open("w") as file:
            for step in steps:
                line = {"step": step, "loss": 5 / step, "accuracy": 0.1, "tokens": step * tokens_a_step}
                file.write(json.dumps(line | {"tokens_per_second_per_gpu": 100.0}) + "\n")
            file.write(json.dumps({"step": step, "val_loss": 4.0, "val_accuracy": 0.2}) + "\n")
        return tmp_path / name

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: drawn.append((x, y)) or plot(self, x, y, *a, **k))
    a, b, png = write("a", 100, 1, 2, 3), write("b", 50, 1, 2), tmp_path / "both.png"
    assert report.main([str(a), str(b), "--png", str(png)]) == 0
    assert "both.png" in capsys.readouterr().out and imread(png).shape[1] > 1000
    for curve in (((100, 200, 300), (5.0, 2.5, 5 / 3)), ((50, 100), (5.0, 2.5)), ((300,), (4.0,)), ((100,), (4.0,))):
        assert curve in drawn

    (tmp_path / "new").mkdir()
    assert report.main([str(a), str(tmp_path / "new"), "--png", str(png)]) == 2
    assert "new has no step" in capsys.readouterr().err and [*tmp_path.glob(".both*")] == []


# ------------------------------------------------------------------------------------------------------ --on-checkpoint


def test_on_checkpoint_runs_after_each_save_with_its_folder_whole(small, tmp_path):
    command = (
        'test -f "$HALNY_CHECKPOINT/manifest.json" && echo "$HALNY_STEP $HALNY_RUN_DIR ${RANK-none}" >> seen.txt; '
        'echo said by "$HALNY_STEP"; test "$HALNY_STEP" != 5 || exit 3'
    )
    done = ranks_run(*TEN, "--keep", 2, "--data", small, "--on-checkpoint", command, ranks=2, cwd=tmp_path)
    assert (tmp_path / "seen.txt").read_text() == f"5 {tmp_path / 'r'} none\n10 {tmp_path / 'r'} none\n"
    assert done.out.count("--on-checkpoint: failed for step-00000005: exit code 3") == 1
    assert "failed for step-00000010" not in done.out and status(tmp_path / "r")["state"] == "finished"
    assert "said by 5\n" in (tmp_path / "r/on-checkpoint.log").read_text()


def test_on_checkpoint_never_waits_and_never_runs_two_at_once(tmp_path):
    said: list[str] = []
    go, busy = tmp_path / "go", tmp_path / "busy"
    command = f"mkdir {busy} || echo two >> {tmp_path}/two; until test -e {go}; do sleep 0.02; done; rmdir {busy}"
    hook, began = CheckpointHook(command, tmp_path, said.append), time.perf_counter()
    for step in range(1, 13):
        hook.saved(tmp_path / f"step-{step:08d}")
    hook.wait(0.1)
    assert time.perf_counter() - began < 1
    passed_over = [text for text in said if "not run for" in text]
    assert 3 <= len(passed_over) <= 4 and "step-00000012" in passed_over[-1] and "not ended 0.1 s" in said[-1]
    go.touch()
    hook.wait(30)
    assert not (tmp_path / "two").exists() and not busy.exists()
    names = [line for line in hook.log.read_text().splitlines() if line.startswith("---")]
    assert names == [f"--- step-{step:08d}" for step in range(1, 13 - len(passed_over))]
    assert len(said) == len(passed_over) + 1


def test_on_checkpoint_that_cannot_be_started_or_logged_is_said(tmp_path):
    said: list[str] = []
    hook = CheckpointHook("kill -9 $$", tmp_path, said.append)
    hook.saved(tmp_path / "step-00000001")
    hook.wait(30)
    hook.log.unlink()
    hook.log.mkdir()
    hook.saved(tmp_path / "step-00000002")
    hook.wait(30)
    assert len(said) == 2 and "step-00000001: killed by signal 9" in said[0] and "step-00000002: " in said[1]
