"""bench/trainer.py: what it concludes, and its rehearsal where mistral-common is not installed; paths beside a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import trainer
from bench.lib.results import BadResult, read_result
from halny.model.record import profiler
from halny.model.run.saver import Saver

REPO = Path(__file__).parents[2]


def steps(*losses: float) -> list[dict]:
    return [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("resumed", "undisturbed", "status", "says"),
    [
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.0), "ok", "bit for bit, the 1 steps"),
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.0 + 1e-7), "failed", "apart after it"),
        ((3.0, 2.0, 1.0), (3.0, 2.0 + 1e-6, 1.0 + 1e-5), "ok", "not to the bit, without the stop either"),
        ((3.0, 2.0, 1.0), (3.0, 2.0 + 1e-6, 1.1), "failed", "0.1 after"),
        ((3.0, 2.0), (3.0, 2.0), "failed", "0 after it"),
    ],
)
def test_a_resumed_run_is_held_against_one_that_nobody_disturbed(resumed, undisturbed, status, says):
    found, reason, _ = trainer.compared(steps(*resumed), steps(*undisturbed), stopped=2)
    assert found == status and says in reason


def test_steps_that_do_not_stand_beside_each_other_are_not_compared():
    status, _, _ = trainer.compared(steps(3.0, 2.0, 1.0)[1:], steps(3.0, 2.0, 1.0), stopped=2)
    assert status == "failed"


def test_a_profile_without_its_memory_snapshot_or_without_kernels_is_refused(tmp_path):
    traces = tmp_path / "traces"
    traces.mkdir()
    (traces / "steps-4-5-rank-0.json.gz").write_bytes(b"x")
    (traces / "steps-4-5-rank-0.txt").write_text("  matmul                    0.00 ms   0.0%\n")
    assert trainer.profile_figures(tmp_path, on_gpu=False)["bytes"]["steps-4-5-rank-0.json.gz"] == 1
    with pytest.raises(RuntimeError, match=r"no steps-FIRST-LAST-rank-0\.memory\.pickle"):
        trainer.profile_figures(tmp_path, on_gpu=True)
    (traces / "steps-4-5-rank-0.memory.pickle").write_bytes(b"x")
    with pytest.raises(RuntimeError, match="no matrix product"):
        trainer.profile_figures(tmp_path, on_gpu=True)
    (traces / "steps-4-5-rank-0.txt").write_text("  matmul                   10.00 ms   0.0%\n")
    trainer.profile_figures(tmp_path, on_gpu=True)


def test_data_without_a_tokenizer_is_refused(tmp_path, capsys):
    assert trainer.main(["--smoke", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "make one with --prepare" in capsys.readouterr().err


HIDE = """
import importlib.machinery as machinery, sys
find = machinery.PathFinder.find_spec
def hiding(name, path=None, target=None):
    return None if name.split(".")[0] == "mistral_common" else find(name, path, target)
machinery.PathFinder.find_spec = hiding
"""


def test_the_rehearsal_needs_no_mistral_common_once_the_data_is_prepared(tmp_path):
    """As on the machine with the GPU: a folder of real tokens, made elsewhere, and the package is not there."""
    assert trainer.main(["--prepare", str(tmp_path / "data")]) == 0
    assert sum(p.stat().st_size for p in (tmp_path / "data").rglob("*") if p.is_file()) < 5e6  # it travels
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join(filter(None, [str(tmp_path / "hide"), os.environ.get("PYTHONPATH")]))
    options = dict(cwd=REPO, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    hidden = subprocess.run([sys.executable, "-c", "import mistral_common"], **options)
    assert "ModuleNotFoundError" in hidden.stderr

    command = ["bench/trainer.py", "--smoke", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *command, "--commit", "a test's", "--budget-s", "280"], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "out" / "trainer.json")
    rows = {row["name"]: row for row in result["rows"]}
    of_a_run = ("stopped by SIGTERM", "profile", "resumed", "resumed = undisturbed", "sample.txt")
    expected = {f"{case}: {what}" for case in ("one rank", "FSDP") for what in of_a_run}
    assert rows.keys() == expected | {"preflight", "export in transformers", "generation"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert result["smoke"] and result["machine"]["commit"] == "a test's"
    for case in ("one rank", "FSDP"):
        assert rows[f"{case}: resumed"]["figures"]["checkpoint_stall_ms"]
        assert any(line.startswith("sharding ") for line in rows[f"{case}: resumed"]["said"])
        assert rows[f"{case}: resumed = undisturbed"]["figures"]["loss_after"] == 0.0
    assert str(tmp_path) not in (tmp_path / "out" / "trainer.json").read_text()

    result["rows"][0]["figures"] = None
    (tmp_path / "bad.json").write_text(json.dumps(result))
    with pytest.raises(BadResult, match=r"rows\[0\]\.figures must be dict"):
        read_result(tmp_path / "bad.json")


# ------------------------------------------------------------------------------------------------- paths beside a GPU


def test_a_checkpoint_is_written_on_a_stream_of_its_own_on_the_ranks_device(monkeypatch, tmp_path):
    """DCP's writer waits for the current stream before each tensor: it must be neither the training's nor GPU 0's."""
    device, calls = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: calls.append(("device", d)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda d: SimpleNamespace(device=d))

    class Current:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            calls.append(("stream of", self.stream.device))

        def __exit__(self, *_):
            calls.append("left")

    monkeypatch.setattr(torch.cuda, "stream", Current)
    saver = object.__new__(Saver)
    saver.world, saver._problem = SimpleNamespace(device=device, rank=3), None
    monkeypatch.setattr(saver, "_write", lambda *_: calls.append("written"), raising=False)
    saver._run(1, {}, {}, 0.0)
    assert saver._problem is None
    assert calls == [("device", device), ("stream of", device), "written", "left"]


def test_the_memory_snapshot_needs_no_program_that_reads_debug_symbols(monkeypatch, tmp_path):
    """C++ frames are put into words by addr2line: ValueError (stoi) in torch 2.11 where that is not installed."""
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: seen.append(options))
    monkeypatch.setattr(profiler, "_Spans", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(profiler, "profile", lambda activities: SimpleNamespace(start=lambda: None, stop=lambda: None))
    recorder = profiler.StepProfiler(1, 1, True, tmp_path, 0, torch.device("cuda", 0))
    recorder.begin(1, None, None)
    recorder.close()
    assert seen[0]["stacks"] == "python" and seen[-1] == {"enabled": None}
