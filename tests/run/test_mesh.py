"""FSDP and HSDP on 2 and 4 ranks: the same run as on one, in its samples to the bit, in losses and weights to fp32.

Runs are of the smallest model, forked by runs.Ranks. A GPU's layout is had on the CPU by the "fault" small_gpu, which
says how much memory there is and sets up the overlap as there.
"""

import json
import signal

import numpy as np
import pytest
import torch
from runs import SMALL, checkpoint, column, ranks_run

from halny.model.estimate.choices import choose_layout, split_world
from halny.model.estimate.sizes import parameters
from halny.model.estimate.work import Work
from halny.model.exits import Refused
from halny.model.mistral import PRESETS as MODELS
from halny.model.run.ranks import World
from halny.model.run.recipe import command_line
from halny.model.run.resolve import resolve

STEPS = 10
COMMAND = [*SMALL, "--batch-tokens", "512", "--micro-batch", 1, "--steps", STEPS, "--lr", "1e-3", "--eval-every", 5]
COMMAND += ["--warmup-steps", 2, "--save-every", 5]  # 8 samples a step: 4 micro batches on 2 ranks, 2 on 4
ROOM, NO_ROOM = ("small_gpu", str(10**12)), ("small_gpu", "1")


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The run on one rank; beside it, its samples."""
    cwd = tmp_path_factory.mktemp("alone")
    ranks_run(*COMMAND, "--data", small, "--run-dir", "r", cwd=cwd, fault=("traced_samples", "trace"))
    return cwd / "r"


def assert_same_run(ours, theirs) -> None:
    for names in (("loss",), ("grad_norm",), ("accuracy",)):
        np.testing.assert_allclose(column(ours, *names), column(theirs, *names), rtol=1e-5)
    held_out = [
        [line["val_loss"] for line in map(json.loads, (r / "metrics.jsonl").open()) if "val_loss" in line]
        for r in (ours, theirs)
    ]
    np.testing.assert_allclose(*held_out, rtol=1e-5)
    assert len(held_out[0]) == 2
    ours, theirs = checkpoint(ours, STEPS), checkpoint(theirs, STEPS)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.shape == theirs[name].shape
        if name.startswith("model."):  # AdamW divides by a gradient's size, so rounding shows where that is small
            torch.testing.assert_close(x, theirs[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "ranks, flags, fault, says",
    [
        (2, [], (), "2 shard(s) x 1 replica(s); gathered weights are dropped"),
        (2, ["--replicate", 2], (), "1 shard(s) x 2 replica(s)"),
        (2, [], ROOM, "kept from the forward to the backward pass: there is room"),
        (4, ["--shard", 2], (), "2 shard(s) x 2 replica(s); gathered weights are dropped"),
        (4, ["--shard", 2, "--replicate", 2, "--reshard", "never"], NO_ROOM, "inside each replica, between replicas"),
        (4, ["--reshard", "2"], NO_ROOM, "parts on 2 ranks: as asked for\ngradients  reduced for each of 2 micro"),
    ],
)  # fmt: skip
def test_any_layout_is_the_run_of_one_rank(small, alone, tmp_path, ranks, flags, fault, says):
    command = [*COMMAND, *flags, "--data", small, "--run-dir", "r"]
    run = ranks_run(*command, ranks=ranks, cwd=tmp_path, fault=fault)
    assert says in run.out
    assert_same_run(tmp_path / "r", alone)


def test_hsdp_reads_the_same_samples_and_saves_each_shard_once(small, alone, tmp_path):
    command = [*COMMAND, "--data", small, "--run-dir", "r", "--shard", 2, "--replicate", 2]
    ranks_run(*command, ranks=4, cwd=tmp_path, fault=("traced_samples", "trace"))

    def samples(path) -> list[int]:
        return [json.loads(line.partition(" ")[2]) for line in path.read_text().splitlines()]

    whole = samples(alone.parent / "trace-0")
    parts = [samples(tmp_path / f"trace-{rank}") for rank in range(4)]
    merged = [[n for micro in zip(*step, strict=True) for n in micro] for step in zip(*parts, strict=True)]
    assert len(whole) >= STEPS and merged == whole  # a sample a micro batch: rank by rank

    folder = tmp_path / f"r/checkpoints/step-{STEPS:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = 12 * parameters(MODELS["test"])
    assert tensors < sum(entry["bytes"] for entry in manifest["files"].values()) < 1.5 * tensors
    assert sum(x.numel() * 4 for x in checkpoint(tmp_path / "r", STEPS).values()) == tensors


@pytest.mark.parametrize(
    "flags, fault, reductions",
    [
        ([], (), {"reduce_scatter": 1}),  # accumulated whole: one reduction a group of weights, in the last micro batch
        ([], NO_ROOM, {"reduce_scatter": 4}),
        (["--shard", 1], (), {"all_reduce": 1}),
        (["--shard", 1], NO_ROOM, {"all_reduce": 1}),
    ],
)
def test_gradients_are_reduced_no_more_often_than_the_layout_needs(small, tmp_path, flags, fault, reductions):
    """Two ranks, four micro batches a step, three groups of weights (two layers and the root)."""
    command = [*COMMAND, *flags, "--data", small, "--run-dir", "r", "--steps", 2, "--eval-every", 0]
    ranks_run(*command, ranks=2, cwd=tmp_path, fault=("counted_collectives", "count", *fault[1:]))
    seen = (tmp_path / "count-1").read_text().split()
    assert {name: seen.count(name) / (2 * 3) for name in reductions} == reductions


def test_a_run_resumes_on_other_ranks_and_meshes(small, alone, tmp_path):
    """4 ranks, then 2, 4 in a 2 x 2 mesh, 4 kept in parts, 2 replicas: each continues where the one before stopped."""
    command = [*COMMAND, "--data", small, "--run-dir", "r", "--save-every", 2]
    layouts = [(4, []), (2, []), (4, ["--shard", 2]), (4, ["--reshard", "2"]), (2, ["--shard", 1])]
    for done, (ranks, flags) in zip(range(2, STEPS + 1, 2), layouts, strict=True):
        last = done == STEPS
        fault = () if last else ("signals_itself", str(int(signal.SIGUSR1)), "0", "save")
        run = ranks_run(*command, *flags, ranks=ranks, cwd=tmp_path, fault=fault, codes=[0 if last else 75] * ranks)
        assert done == 2 or "resuming after step" in run.out
    assert [step for (step,) in column(tmp_path / "r", "step")] == list(range(1, STEPS + 1))
    assert_same_run(tmp_path / "r", alone)


def test_weights_that_differ_between_replicas_are_never_saved(small, tmp_path):
    command = [*COMMAND, "--data", small, "--run-dir", "r", "--shard", 1]
    run = ranks_run(*command, ranks=2, cwd=tmp_path, fault=("wrong_gather", "1"), codes=[1, 1])
    assert "differ between ranks: rank 1" in run.err and not list((tmp_path / "r/checkpoints").glob("step-*"))


# ----------------------------------------------------------------------------------------------------------- the choice

GH200, H200 = 97871 * 2**20, 143771 * 2**20


@pytest.mark.parametrize(
    "size, node, memory, more, reshard, holds",
    [
        (256, 4, GH200, {}, False, True),  # the published run: 14 GB of the 33 that are left
        # a node's share of fp32 state leaves no room for 14 GB
        (256, 4, GH200, dict(replicate=64, micro_batch=5), True, True),
        # whole gradients in fp32, 29 GB, come first; 3.5 GB then take the second gathering off the network
        (256, 4, GH200, dict(accumulation=4), 4, True),
        (256, 4, GH200, dict(accumulation=4, micro_batch=5), False, False),
        (256, 4, GH200, dict(micro_batch=8), True, True),
        (64, 1, GH200, {}, False, True),
        (8, 8, H200, dict(micro_batch=4), False, True),
        (256, 4, None, dict(accumulation=4), True, True),
        (256, 4, GH200, dict(reshard="node"), 4, True),
        (4, 4, GH200, dict(reshard="node"), True, True),
        (8, 8, H200, dict(reshard="1"), False, True),
        (8, 8, H200, dict(reshard="8"), True, True),
    ],
)
def test_the_default_follows_from_node_and_memory(size, node, memory, more, reshard, holds):
    work = Work(MODELS["mistral-7b"], more.pop("micro_batch", 4), 4096, more.pop("accumulation", 1))
    layout = choose_layout(work, ranks=size, node=node, memory_bytes=memory, **more)
    again = layout.reshard_after_forward
    assert again == reshard and type(again) is type(reshard)
    assert layout.holds_gradients == holds


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--shard", "3"], ["--shard 3", "4 rank(s)"]),
        (["--shard", "2", "--replicate", "4"], ["--shard 2 x --replicate 4 is 8", "4 rank(s)"]),
        (["--replicate", "8"], ["--replicate 8", "4 rank(s)"]),
        (["--reshard", "3"], ["--reshard 3", "4 shards"]),
        (["--reshard", "0"], ["--reshard", "'0'"]),
        (["--reshard", "sometimes"], ["--reshard", "sometimes", "always, never, node"]),
        (["--shard", "2", "--reshard", "4"], ["--reshard 4", "2 shards"]),
    ],
)
def test_layouts_that_cannot_be_are_refused(flags, words):
    with pytest.raises(Refused) as refusal:
        resolve(command_line(flags), World(0, 4, torch.device("cpu"), mesh=None))
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


def test_a_world_is_split_by_either_number():
    assert [split_world(8, *s) for s in ((None, None), (2, None), (None, 2), (8, 1))] == [
        (8, 1),
        (2, 4),
        (4, 2),
        (8, 1),
    ]
