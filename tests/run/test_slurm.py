"""The job files of bench/slurm/ under a stand-in for Slurm (slurm.py): real ranks, real signals, real requeues."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPO, SMALL, TESTS, checkpoint, column, equal, metrics, ranks_run, status, wait_for_step, wait_until

COMMAND = [*SMALL, "--steps", 60, "--save-every", 20, "--lr", "1e-3", "--eval-every", 0]


@pytest.fixture
def submit():
    """sbatch of a job file, on two ranks, in a folder that looks like the repository's; nothing outlives the test."""
    jobs = []

    def start(cwd: Path, file: str, *arguments, nodes: int = 1, env: dict | None = None) -> subprocess.Popen:
        for name in ("train.py", "bench"):
            (cwd / name).symlink_to(REPO / name)
        options = ["--ntasks", "2", "--nodes", str(nodes)]
        command = [sys.executable, TESTS / "slurm.py", "sbatch", *options, f"bench/slurm/{file}", *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | (env or {})
        command = list(map(str, command))
        jobs.append(subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes))
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def output(job: subprocess.Popen, code: int = 0) -> str:
    out, _ = job.communicate(timeout=240)
    assert job.returncode == code, out
    return out


def kill_a_task(cwd: Path) -> None:
    os.kill(int((cwd / "fake-slurm/tasks").read_text().split()[1]), signal.SIGKILL)


def test_usr1_and_a_dead_rank_are_requeued_and_resumed_with_no_step_lost_or_repeated(submit, small, tmp_path):
    """gh200.sbatch, a rank a node: the time is up, then a rank dies after a save, then the run ends by itself."""
    job = submit(tmp_path, "gh200.sbatch", *COMMAND, "--data", small, "--run-dir", "r", nodes=2)
    wait_for_step(job, tmp_path / "r", 7)
    os.kill(job.pid, signal.SIGUSR1)
    log = tmp_path / f"logs/{job.pid}/0.txt"  # one file over all starts
    wait_until(job, lambda: "resuming after step" in log.read_text())
    wait_for_step(job, tmp_path / "r", 25)
    kill_a_task(tmp_path)
    out = output(job)
    for words in ("start 0 of job", "ended with 75, saved step-", "start 1 of job", "ended with 137", "start 2 of job"):
        assert words in out, out
    assert out.rstrip().endswith("finished")

    text = log.read_text()
    stopped = int(text.partition("stopped by SIGUSR1 after step ")[2].split(";")[0])
    assert 7 <= stopped < 60 and f"resuming after step {stopped} " in text and f"saved step-{stopped:08d}" in out
    assert "rank 1 on" in text and "is silent" in text and text.count("resuming after step") == 2
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 61))
    assert status(tmp_path / "r")["state"] == "finished" and (log.parent / "1.txt").exists()

    ranks_run(*COMMAND, "--data", small, "--run-dir", "whole", ranks=2, cwd=tmp_path)
    assert column(tmp_path / "r", "step", "loss") == column(tmp_path / "whole", "step", "loss")
    assert equal(checkpoint(tmp_path / "r", 60), checkpoint(tmp_path / "whole", 60))


def test_a_run_that_fails_where_it_started_is_not_requeued(submit, small, tmp_path):
    long = ["--steps", 5000, "--save-every", 5000]
    job = submit(tmp_path, "8gpu.sbatch", *COMMAND, *long, "--data", small, "--run-dir", "r")
    wait_for_step(job, tmp_path / "r", 2)
    kill_a_task(tmp_path)
    out = output(job, code=128 + signal.SIGKILL)
    assert "failed with 137 and came no further" in out and "start 1" not in out


def test_a_refused_run_is_not_requeued(submit, tmp_path):
    out = output(submit(tmp_path, "8gpu.sbatch", "--steps", "none"), code=2)
    assert "refused" in out and "start 1" not in out
    [log] = tmp_path.glob("logs/*/0.txt")
    assert log.read_text() == "train.py: --steps must be a whole number, got 'none'\n"


def test_in_an_image_the_ranks_run_what_the_image_holds(submit, tmp_path):
    """HALNY_IMAGE, with a stand-in for Apptainer that says how it was called, and where."""
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/sh\necho "$RANK: $*"\n')
    apptainer.chmod(0o755)
    image = {"HALNY_IMAGE": "halny.sif", "PATH": f"{apptainer.parent}:{os.environ['PATH']}"}
    assert "finished" in output(submit(tmp_path, "8gpu.sbatch", "mistral-1b", "--lr", "1e-3", env=image))
    logs = [path.read_text() for path in sorted(tmp_path.glob("logs/*/*.txt"))]
    assert logs == [f"{rank}: run --nv --bind {tmp_path} halny.sif mistral-1b --lr 1e-3\n" for rank in (0, 1)]
