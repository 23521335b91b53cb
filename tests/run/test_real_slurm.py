"""The job files of bench/slurm/ under a real Slurm (real_slurm.py): its limits, its signals, its queue."""

import os
import re
import signal
from pathlib import Path

import pytest
from real_slurm import MISSING, Job, Slurm
from runs import REPO, SMALL, checkpoint, column, equal, metrics, ranks_run, status, wait_for_step, wait_until

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge; test_slurm.py has a stand-in"
)

STEPS = 60
COMMAND = [*SMALL, "--steps", STEPS, "--save-every", 20, "--lr", "1e-3", "--eval-every", 0, "--run-dir", "r"]
ENDLESS = [*COMMAND, "--steps", 20_000, "--save-every", 50]  # ten minutes or more
TWO_NODES = ["--nodes", 2, "--ntasks-per-node", 1]
ONE_NODE = ["--ntasks-per-node", 2]
ONE_RANK = ["--ntasks-per-node", 1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.end()


@pytest.fixture
def submit(slurm, small, tmp_path):
    """sbatch of a job file, on two ranks, in a folder that looks like the repository's; cancelled after the test."""
    for name in ("train.py", "bench"):
        (tmp_path / name).symlink_to(REPO / name)
    jobs = []

    def start(options: list, file: str, *arguments) -> Job:
        jobs.append(Job(slurm, tmp_path, *options, f"bench/slurm/{file}", *arguments, "--data", small))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm.ask("scancel", job.number)
    for job in jobs:
        job.ended()


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Path:
    """The run folder that COMMAND leaves without Slurm."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    ranks_run(*COMMAND, "--data", small, ranks=2, cwd=cwd)
    return cwd / "r"


def same(ours: Path, theirs: Path) -> bool:
    """Whether two finished runs took the same steps to the same weights, to the bit."""
    return column(ours, "step", "loss") == column(theirs, "step", "loss") and equal(
        checkpoint(ours, STEPS), checkpoint(theirs, STEPS)
    )


def stopped_and_resumed(text: str) -> tuple[int, int]:
    """The last step before the last stop by a signal, and that after which the next start went on."""
    return int(re.findall(r"stopped by SIG\w+ after step (\d+)", text)[-1]), resumed(text)


def resumed(text: str) -> int:
    return int(re.findall(r"resuming after step (\d+) ", text)[-1])


@pytest.mark.slow
def test_at_its_time_limit_a_job_saves_goes_back_into_the_queue_and_resumes(submit, slurm, tmp_path):
    """Told by USR1 in time, or at the limit by TERM. Slurm looks at limits every half minute."""
    told = submit([*ONE_RANK, "--time", 1, "--signal", "USR1@15"], "8gpu.sbatch", *ENDLESS)
    late = submit([*ONE_RANK, "--time", 1, "--signal", "URG@1"], "8gpu.sbatch", *ENDLESS, "--run-dir", "late")
    wait_for_step(late, tmp_path / "late", 2)
    slurm.ask("scontrol", "update", f"JobId={late.number}", "EndTime=now")
    for job in (told, late):
        wait_until(job, lambda job=job: "start 1 of job" in job.out)
        slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")  # so that it is not stopped again
    for job, run_dir in ((told, tmp_path / "r"), (late, tmp_path / "late")):
        wait_until(job, lambda job=job: "resuming after step" in job.log.read_text())
        stopped, again = stopped_and_resumed(job.log.read_text())
        assert again == stopped >= 2
        assert f"ended with 75, saved step-{stopped:08d}; back into the queue" in job.out
        wait_for_step(job, run_dir, stopped + 3)
        steps = [line["step"] for line in metrics(run_dir)]
        assert steps == list(range(1, len(steps) + 1))
        assert job.facts()["Restarts"] == "1"
    assert "stopped by SIGUSR1" in told.log.read_text()
    assert "DUE TO TIME LIMIT" in late.out and "DUE TO TIME LIMIT" not in told.out


def test_a_cancelled_job_saves_and_stays_away_and_a_later_one_resumes(submit, slurm, tmp_path, undisturbed):
    job = submit(TWO_NODES, "gh200.sbatch", *COMMAND)
    wait_for_step(job, tmp_path / "r", 7)
    slurm.ask("scancel", job.number)
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), job.communicate()
    assert "back into the queue" not in job.out
    assert status(tmp_path / "r")["state"] == "stopped"

    later = submit(TWO_NODES, "gh200.sbatch", *COMMAND)
    assert later.ended()["JobState"] == "COMPLETED", later.communicate()
    stopped, again = stopped_and_resumed(job.log.read_text() + later.log.read_text())
    assert again == stopped >= 7
    assert same(tmp_path / "r", undisturbed)


def test_scontrol_requeue_saves_and_the_job_comes_back_once(submit, slurm, tmp_path, undisturbed):
    job = submit(ONE_NODE, "8gpu.sbatch", *COMMAND)
    wait_for_step(job, tmp_path / "r", 7)
    slurm.ask("scontrol", "requeue", job.number)
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.communicate()
    stopped, again = stopped_and_resumed(job.log.read_text())
    assert again == stopped >= 7
    assert same(tmp_path / "r", undisturbed)


def test_after_a_killed_rank_a_job_is_requeued_as_long_as_it_comes_further(submit, tmp_path):
    job = submit(TWO_NODES, "gh200.sbatch", *ENDLESS)
    wait_for_step(job, tmp_path / "r", 55)
    os.kill(job.pid(1), signal.SIGKILL)
    wait_until(job, lambda: "resuming after step" in job.log.read_text())
    saved = resumed(job.log.read_text())
    assert saved % 50 == 0 and f"ended with 137, saved step-{saved:08d}; back into the queue" in job.out
    wait_for_step(job, tmp_path / "r", saved + 2)
    os.kill(job.pid(1), signal.SIGKILL)
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "137:0", "1"), job.communicate()
    assert "failed with 137 and came no further" in job.out
    assert job.log.read_text().count("rank 1 on") == 2


def test_a_refused_job_fails_and_is_not_requeued(submit):
    job = submit(ONE_NODE, "8gpu.sbatch", "--steps", "none")
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.communicate()
    assert job.log.read_text() == "train.py: --steps must be a whole number, got 'none'\n"


def test_of_two_jobs_in_one_run_folder_the_second_is_refused_and_the_first_goes_on(submit, tmp_path, undisturbed):
    first = submit(ONE_NODE, "8gpu.sbatch", *COMMAND)
    wait_for_step(first, tmp_path / "r", 2)
    os.kill(first.pid(0), signal.SIGSTOP)  # so that it does not finish before the second has started
    second = submit(ONE_NODE, "8gpu.sbatch", *COMMAND)
    facts = second.ended()
    os.kill(first.pid(0), signal.SIGCONT)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), second.communicate()
    assert "is in use by another run" in second.log.read_text()
    assert first.ended()["JobState"] == "COMPLETED", first.communicate()
    assert same(tmp_path / "r", undisturbed)
