"""``--preflight`` on real gloo ranks: what is slow, wrong or missing is named, by rank and host; nothing is changed."""

import re
import shutil
import socket

import pytest
import torch
from runs import SMALL, flip_a_bit, ranks_run, snapshot

import train
from halny.model import preflight, roofline
from halny.model.mistral import PRESETS as MODELS
from halny.model.preflight import Job, predict, slow_ranks, throttled
from halny.model.sharding import choose_layout

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
    assert len(reasons) == 5 and "rank 6 on node1 is slow: matrix product" in reasons[0] and "700.00" in reasons[0]
    assert all(f"rank {r} on node2 is slow: to and from a neighbouring node" in reasons[r - 7] for r in range(8, 12))


def test_throttling_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert throttled([1.0, 0.7, 0.97], ["a", "b", "c"]) == [
        "rank 1 on b throttles: within seconds its matrix products fall to 70%"
    ]


def test_the_prediction_is_its_formula():
    """The published run on 256 GH200 at 740 TFLOP/s, 3.7 TB/s and a NIC of 25 GB/s: all communication hides."""
    model = MODELS["mistral-7b"]
    sizes = dict(micro_batch=4, seq_len=4096, memory_bytes=97871 * 2**20)
    layout = choose_layout(model, size=256, node_size=4, **sizes)
    job = Job(model, layout, 4, 1, 4096, torch.bfloat16, True, None, 2)
    world = train.World(0, 256, torch.device("cuda"), mesh=None, node_size=4)
    rates = {"matmul": 740e12, "copy": 3.7e12, "gather": 86e9, "reduce": 86e9, "node_gather": 300e9, "link": 25e9}
    rate, parts = predict(job, rates, world)
    assert parts["exposed communication"] == 0
    assert parts["matrix products and attention"] == pytest.approx(16384 * 45.88e9 / 740e12, rel=1e-3)
    assert parts["memory-bound"] == pytest.approx(0.061, rel=0.05)  # 225 GB at 3.7 TB/s
    assert 14_000 < rate < 16_000

    slower = predict(job, rates | {"reduce": 10e9}, world)[1]["exposed communication"]
    window = (parts["matrix products and attention"] + parts["memory-bound"]) * 2 / 3
    again = 2 * 3 / 4 * roofline.parameters(model) / 300e9
    assert slower == pytest.approx(4 * roofline.parameters(model) * 255 / 256 / 10e9 + again - window)
