"""train.py --profile: the traces that runs leave, and that they leave nothing else."""

import contextlib
import gzip
import json
import re

import pytest
import torch
from runs import SMALL, checkpoint, column, equal, ranks_run

import train
from halny.model.mistral import PRESETS, Mistral
from halny.model.profiler import REGIONS, StepProfiler, ranks_to_profile, steps_to_profile

CPU = torch.device("cpu")


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_profiled_steps_leave_a_trace_with_every_region_and_the_run_as_it_was(small, tmp_path):
    command = [*SMALL, "--data", small, "--steps", 5, "--save-every", 5, "--eval-every", 0]
    ranks_run(*command, "--run-dir", "plain", ranks=2, cwd=tmp_path)
    profiled = ranks_run(
        *command, "--run-dir", "profiled", "--profile", "2-3", "--profile-ranks", 1, 0, ranks=2, cwd=tmp_path
    )
    values = ("step", "loss", "accuracy", "grad_norm")
    assert column(tmp_path / "profiled", *values) == column(tmp_path / "plain", *values)
    assert equal(checkpoint(tmp_path / "profiled", 5), checkpoint(tmp_path / "plain", 5))

    traces = tmp_path / "profiled/traces"
    names = [f"steps-2-3-rank-{rank}.{ending}" for rank in (0, 1) for ending in ("json.gz", "txt")]
    assert sorted(path.name for path in traces.iterdir()) == names
    for rank in (0, 1):
        with gzip.open(traces / f"steps-2-3-rank-{rank}.json.gz", "rt") as file:
            trace = json.load(file)
        assert trace["distributedInfo"]["rank"] == rank
        spans = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and e["ph"] == "X"]
        count = {region: sum(bool(re.match(p, e["name"])) for e in spans) for region, p in REGIONS}
        layers = 2 * PRESETS["test"].n_layers * 2  # of two steps, two micro batches
        assert count["attention"] == count["MLP"] == layers / 2 and count["loss"] == count["embedding"] == 2
        assert count["data"] == count["optimizer"] == 2 and count["gather"] >= 6 and count["reduce"] == 6
        assert [e["name"] for e in spans if e["name"].startswith("step ")] == ["step 2", "step 3"]
        operators = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "cpu_op"}
        assert {"aten::mm", "aten::_fused_adamw_"} <= operators

    out = profiled.out
    assert "profile of steps 2 to 3 on rank 0" in out and out.count("profile of steps") == 1
    assert re.search(r"^  matmul +[\d.]+ ms +[\d.]+%$", out, re.M), out
    assert re.search(r"^  MLP +[\d.]+ ms +[\d.]+%$", out, re.M), out
    assert re.search(r"^ +[\d.]+ ms +[\d.]+% +[\d.]+ x  aten::mm$", out, re.M), out


def test_outside_the_chosen_steps_there_is_no_hook_and_no_span(tmp_path):
    model = Mistral(PRESETS["test"])
    optimizer = torch.optim.AdamW(model.parameters())
    profiler = StepProfiler(2, 2, True, tmp_path / "traces", 0, CPU)
    tokens = torch.arange(32).view(1, 32)

    def step(number: int) -> bool:
        profiler.begin(number, model, optimizer)
        marked = not isinstance(profiler.region("data"), contextlib.nullcontext)
        model(tokens, tokens).loss.backward()
        optimizer.step()
        assert (hooks(model) > 0) == marked == bool(optimizer._optimizer_step_pre_hooks)
        return marked

    assert not step(1) and step(2)
    (tmp_path / "traces").write_text("in the way")  # as a full disk: said, and nothing else
    assert "could not be written" in profiler.end()
    assert not step(3) and profiler.end() is None

    begun = StepProfiler(4, 5, True, tmp_path / "other", 0, CPU)
    begun.begin(4, model, optimizer)
    begun.close()  # a run that stops before the last of its steps
    assert hooks(model) == 0 and not (tmp_path / "other").exists()


def test_which_steps_and_ranks():
    assert steps_to_profile("auto", 1, 200) == (6, 8) and steps_to_profile("auto", 101, 104) == (102, 104)
    assert steps_to_profile("auto", 1, 2) == (1, 2) and steps_to_profile("7", 1, 9) == (7, 7)
    assert steps_to_profile("10-12", 1, 12) == (10, 12)
    for text in ("0", "13", "12-10", "10-", "x", "-1", "1-2-3", "tiny"):
        with pytest.raises(ValueError, match=re.escape(text)):
            steps_to_profile(text, 1, 12)
    assert ranks_to_profile(["0", "2"], 4) == {0, 2} and ranks_to_profile(["all"], 3) == {0, 1, 2}
    for ranks in (["3"], ["0", "x"], ["all", "0"]):
        with pytest.raises(ValueError, match="ranks from 0 to 2"):
            ranks_to_profile(ranks, 3)


def test_the_flag_alone_leaves_a_preset_its_place():
    assert train.COMMAND.command_line(["--profile"]).profile == "auto"
    recipe = train.COMMAND.command_line(["--profile", "bielik-7b"])
    assert recipe.profile == "auto" and recipe.steps == 17_350
    assert train.COMMAND.command_line(["tiny", "--profile", "3-4"]).profile == "3-4"
    with pytest.raises(train.Refused, match=r"--profile 201 .*200"):
        train.resolve(train.COMMAND.command_line(["--profile", "201"]), train.World(0, 1, CPU, mesh=None))
