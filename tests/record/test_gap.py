"""model/record/journal.py: what the log says of time that was not expected, and a run that says it."""

import pytest
import torch
from runs import SMALL, ranks_run

from halny.model.estimate import machines, step_time
from halny.model.estimate.choices import choose_layout
from halny.model.estimate.work import Work
from halny.model.mistral import PRESETS as MODELS
from halny.model.record.journal import Gap
from halny.model.run.ranks import World

STEP = step_time.StepTime(0.9, 0.1, 0.1, 0.02, 0.0, 0.0, 0.0, hidden=0.5)  # 1.12 s


def gap_of(expected, *, step_s: float, data_s: float = 0.0, probe_s: float | None = None) -> Gap:
    gap = Gap(expected, 16384, probe_s)
    gap.add(99.0, 50.0)  # the first step sets up
    for _ in range(10):
        gap.add(step_s, data_s)
    return gap


def test_the_gap_is_divided_among_its_causes():
    slowest = {"rank": 7, "host": "nid0042", "seconds": 1.1e-3, "median": 1e-3}
    gap = gap_of(STEP, step_s=1.42, data_s=0.05, probe_s=1e-3)
    gap._spend("checkpoints", 0.4)
    text = gap.words(slowest)
    assert text == (
        "gap        11,538 tokens/s/GPU, 79% of the 14,629 that --plan expects; 300.0 ms a step more: "
        "communication that nothing hides, or slower kernels 110.0, slow rank 7 on nid0042 100.0, "
        "waiting for data 50.0, checkpoints 40.0"
    )
    assert gap.words(slowest) is None  # it begins anew


def test_slow_products_everywhere_are_the_devices():
    everywhere = {"rank": 0, "host": "a", "seconds": 1.3e-3, "median": 1.3e-3}
    text = gap_of(STEP, step_s=1.42, probe_s=1e-3).words(everywhere)
    assert text.endswith("300.0 ms a step more: matrix products slower on all ranks 300.0")


def test_one_rank_has_no_communication():
    alone = step_time.StepTime(0.9, 0.1, 0.1, 0.02, 0.0, 0.0, 0.0, hidden=0.0)
    assert gap_of(alone, step_s=1.42).words(None).endswith("a step more: slower kernels, or a late host 300.0")


def test_no_gap_no_words():
    assert gap_of(STEP, step_s=1.13).words(None) is None
    assert gap_of(None, step_s=1.0, data_s=0.09).words(None) is None
    assert (
        gap_of(None, step_s=1.0, data_s=0.3).words(None)
        == "gap        30% of 1,000.0 ms a step: waiting for data 300.0"
    )
    slowest = {"rank": 1, "host": "b", "seconds": 2.0, "median": 1.0}
    assert "slow rank 1 on b 500.0" in gap_of(None, step_s=1.0).words(slowest)


def test_a_known_gpu_is_held_against_the_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GH200 120GB")
    model, world = MODELS["mistral-7b"], World(0, 256, torch.device("cuda"), mesh=None, node_size=4)
    layout = choose_layout(Work(model, 4, 4096), ranks=256, node=4, memory_bytes=97871 * 2**20)
    gap = Gap.of_run(Work(model, 4, 4096), layout, world)
    machine, good = machines.MACHINES["gh200-96"], step_time.RATES["good"]
    cluster = step_time.Cluster(machine.gpu, 256, 4, machine.nvlink, 25e9)
    assert gap.expected == step_time.step(Work(model, 4, 4096), cluster, layout, good)
    assert gap.probe_s == pytest.approx(2 * 4096**3 / (989.5e12 * good.matmul))
    assert Gap.of_run(Work(model, 4, 4096, compute_bytes=4), layout, world).expected is None


def test_a_run_says_what_its_evaluations_cost(small, tmp_path):
    command = [*SMALL, "--steps", 6, "--save-every", 6, "--data", small, "--run-dir", "r"]
    assert "evaluation" in gap_lines(ranks_run(*command, "--eval-every", 1, cwd=tmp_path).out)
    assert "evaluation" not in gap_lines(ranks_run(*command, "--eval-every", 0, "--no-resume", cwd=tmp_path).out)


def gap_lines(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if line.startswith("gap "))
