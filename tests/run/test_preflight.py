"""``--preflight`` on real gloo ranks: what is slow, wrong or missing is named, by rank and host; nothing is changed."""

import re
import shutil
import socket

import pytest
import torch
from runs import SMALL, Ranks, flip_a_bit, ranks_run, snapshot

from halny.model.estimate import machines, step_time
from halny.model.estimate.choices import choose_layout
from halny.model.estimate.work import ALONE, Work
from halny.model.mistral import PRESETS as MODELS
from halny.model.run import preflight
from halny.model.run.preflight import Job, predict, slow_ranks, throttled, too_little_memory
from halny.model.run.ranks import World

HOST = socket.gethostname()
COMMAND = [*SMALL, "--preflight", "--run-dir", "r"]


def test_two_ranks_go_and_leave_nothing_behind(small, tmp_path):
    run = ranks_run(*COMMAND, "--data", small, ranks=2, cwd=tmp_path)
    for words in (
        "2 rank(s) on 1 node(s)", "matrix product", "copy in memory", "all-gather of a layer in the node",
        "reduce-scatter of a layer over its shards", "known numbers are right", "torch 2", "every checksum right",
        "GB/s from all ranks",
    ):  # fmt: skip
        assert words in run.out, run.out
    assert re.search(r"predicted  [\d,]+ tokens/s a rank", run.out) and run.out.endswith("\ngo\n")
    assert not (tmp_path / "r").exists() and {path.name[:4] for path in tmp_path.iterdir()} == {"out-", "err-"}


def test_inside_and_between_nodes(small, tmp_path):
    command = [*COMMAND, "--data", small]

    def out_of(*flags) -> str:  # go or no-go: four ranks on two cores may well be slow
        ranks = Ranks(*command, *flags, ranks=4, cwd=tmp_path, fault=("nodes_of", "2"))
        assert set(ranks.codes()) <= {0, 1}
        return ranks.out

    out = out_of()
    rates = dict(re.findall(r"measured   (.*?): ([\d.,]+) GB/s", out))
    assert "4 rank(s) on 2 node(s)" in out and len(rates) == 6 and all(float(rate) > 0 for rate in rates.values())
    hsdp = out_of("--shard", 2)
    assert "2 shard(s) x 2 replica(s)" in hsdp and re.search(r"exposed [\d.]*[1-9]", hsdp)


@pytest.mark.parametrize("operation, what", [("mm", "matrix product"), ("copy_", "copy in memory")])
def test_a_slowed_rank_is_named_and_is_a_no_go(small, tmp_path, operation, what):
    fault = ("slow_device", "1", "40", operation)
    run = ranks_run(*COMMAND, "--data", small, ranks=2, cwd=tmp_path, fault=fault, codes=[1, 1])
    reasons = run.out.partition("no-go\n")[2].splitlines()
    assert any(line.startswith(f"  - rank 1 on {HOST} is slow: {what}") for line in reasons), run.out
    assert not any("rank 0" in line for line in reasons) and "2 rank(s) on 2 node(s)" in run.out
    assert "to and from a neighbouring node" in run.out


def test_what_is_wrong_is_named(small, tmp_path):
    """All in one run: data damaged, a collective that lies, code that differs on one rank, no room on the disk."""
    shutil.copytree(small, tmp_path / "damaged")
    flip_a_bit(tmp_path / "damaged/train-00000.npy", -5)
    before = snapshot(tmp_path / "damaged")
    run = ranks_run(*COMMAND, "--data", tmp_path / "damaged", ranks=2, cwd=tmp_path, fault=("unfit", "1"), codes=[1, 1])
    reasons = run.out.partition("no-go\n")[2]
    for words in (
        "all-reduce of known numbers came out wrong on rank 1", f"but on rank 1 ({HOST}) 0.0", "cannot read the data",
        "free, and 2 checkpoints kept",
    ):  # fmt: skip
        assert words in reasons, run.out
    assert snapshot(tmp_path / "damaged") == before and not list(tmp_path.glob(".preflight*"))


def test_the_slow_are_found_among_many():
    hosts = [f"node{rank // 4}" for rank in range(16)]
    measured = [{"matmul": 700e12, "copy": 3e12, "link": 24e9, "gather": 20e9} for _ in hosts]
    measured[6]["matmul"] = 500e12
    for rank in range(8, 12):
        measured[rank]["link"] = 9e9
    measured[3]["gather"] = 1e9  # not its own: all of its group are as slow
    reasons = slow_ranks(measured, hosts, preflight.GPU)
    assert len(reasons) == 5 and "rank 6 on node1 is slow: matrix product" in reasons[0]
    assert reasons[0].endswith("500 TFLOP/s, the median is 700")
    assert all(f"rank {r} on node2 is slow: to and from a neighbouring node" in reasons[r - 7] for r in range(8, 12))


def test_throttling_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert throttled([1.0, 0.7, 0.97], ["a", "b", "c"]) == [
        "rank 1 on b throttles: within seconds its matrix products fall to 70%"
    ]


@pytest.mark.parametrize("moments, fits", [("8bit", True), ("fp32", False)])
def test_memory_of_one_gpu_is_that_without_fsdp(moments, fits, monkeypatch):
    """The 7B on a card of 80 GB, a sequence at a time."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (84_000_000_000, 85_520_809_984))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("halny.model.run.preflight.everywhere", lambda x: [x])
    job = Job(Work(MODELS["mistral-7b"], 1, 4096, 16, moments=moments), ALONE, torch.bfloat16, None, 1)
    world, said = World(0, 1, torch.device("cuda"), mesh=None), []
    reasons = too_little_memory(job, world, ["node7"], said.append)
    assert not reasons if fits else "--moments 8bit" in reasons[0]
    assert ("71.0 GB" in said[0]) == fits


def test_the_prediction_is_the_plans_at_measured_rates():
    """Rates that are what step_time.py assumes of a GH200 give what it predicts; a slow network, or a CPU's, shows."""
    model, machine, good = MODELS["mistral-7b"], machines.MACHINES["gh200-96"], step_time.RATES["good"]
    layout = choose_layout(Work(model, 4, 4096), ranks=256, node=4, memory_bytes=machine.gpu.memory_bytes)
    job = Job(Work(model, 4, 4096), layout, torch.bfloat16, None, 2)
    world = World(0, 256, torch.device("cuda"), mesh=None, node_size=4)
    nic = 25e9 * step_time.NIC_SHARE
    rates = {
        "matmul": machine.gpu.bf16_flops * good.matmul, "copy": machine.gpu.hbm_bytes_per_second * good.memory,
        "node_gather": machine.nvlink * step_time.NVLINK_SHARE, "link": nic, "gather": 4 * nic, "reduce": 4 * nic,
    }  # fmt: skip
    cluster = step_time.Cluster(machine.gpu, 256, 4, machine.nvlink, 25e9)
    expected = step_time.step(Work(model, 4, 4096), cluster, layout, good)
    rate, parts = predict(job, rates, world)
    assert rate == pytest.approx(16384 / expected.total, rel=1e-6)
    assert parts["exposed"] == pytest.approx(expected.exposed, rel=1e-6)

    slow, slower = predict(job, rates | {"gather": nic}, world)
    assert slow < 0.8 * rate and slower["exposed"] > 10 * parts["exposed"]
    cpu = World(0, 256, torch.device("cpu"), mesh=None, node_size=4)
    assert predict(job, rates, cpu)[1]["exposed"] == pytest.approx(expected.exposed + expected.hidden)
