"""bench/step.py and bench/opponents.py: whose work they time, what they call it, and what becomes of what fails."""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mistral import modeling_mistral

import train
from bench import opponents, report, step
from bench.lib import emulated
from bench.lib.ceilings import matmul_ceiling, products_of
from bench.lib.clocks import Bench
from bench.lib.process import ROOT, Watch, in_its_own_process, watched
from bench.lib.results import BadResult, machine, read_result, write_json
from bench.lib.steps import MODE_LABELS, random_tokens, steady_steps
from halny.model.convert import save_hf
from halny.model.estimate import machines, roofline, sizes
from halny.model.estimate.memory import memory_estimate, rank_memory, room
from halny.model.estimate.work import ALONE, Work
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.ranks import start_distributed

CPU = Bench(torch.device("cpu"), True, 2**16)
MISTRAL_7B, SMALL = PRESETS["mistral-7b"], PRESETS["test"]
RANK = step.StepCase("rank-of-256")

# -------------------------------------------------------------------------------------------- one rank of 256, emulated


class Collectives(TorchDispatchMode):
    """Names the gathers and reductions that reach the process group."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in ("_allgather_base_", "_reduce_scatter_base_"):
            self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def one_rank():
    """Makes the emulated step, by the layout asked for."""
    world = emulated.one_of(step.RANKS, CPU.device, step.NODE)
    yield lambda reshard: step.TimedStep(CPU, world, RANK, SMALL, 2, reshard)
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard, again", [("always", 0), ("node", step.NODE), ("never", 1)])
def test_each_collective_is_one_copy_of_its_bytes(one_rank, reshard, again):
    """Kind, bytes and ranks of all that a step's collectives would move, as roofline.py has them; none is called."""
    made = one_rank(reshard)
    made.run(0)
    made.stand_in.calls.clear()
    with Collectives() as seen:
        made.run(1)
    expected = roofline.collectives(SMALL, step.RANKS, 1, again, compute_bytes=4)
    whole = [(c.kind, c.bytes, c.ranks) for c in expected for _ in range(c.count)]
    assert sorted(made.stand_in.calls) == sorted(whole)
    assert not seen.names
    # what is gathered is the buffer's, what is reduced this rank's own chunk; everything stays finite
    made.loss()
    assert all(p.to_local().isfinite().all() for p in made.model.parameters())
    n = sum(p.to_local().numel() for p in made.model.parameters())
    assert 0 < n <= sizes.shard_numel(SMALL, step.RANKS)
    figures = step.stand_in_figures(made)
    assert figures["collectives"]["all-gather"]["bytes"] == sum(b for k, b, _ in whole if k == "all-gather")
    assert figures["stand_in_bytes"] == made.stand_in.source.nbytes + made.stand_in.target.nbytes
    memory = rank_memory(made.spec.work, made.layout)
    assert made.spec.work.config == SMALL
    assert made.estimated_bytes() == sum(memory.values()) + figures["stand_in_bytes"]


def test_what_is_gathered_and_reduced(one_rank):
    made = one_rank("always")
    group = SimpleNamespace(size=lambda: 4)
    gathered, reduced = torch.empty(64), torch.empty(16)
    emulated._Gather(made.stand_in)(gathered, gathered[:16], group)
    assert torch.equal(gathered, made.stand_in.source[:64]) and gathered.std() > 0.01
    emulated._Reduce(made.stand_in)(reduced, torch.arange(64.0), group, dist.ReduceOp.AVG)
    assert torch.equal(reduced, torch.arange(16.0))
    made.totals[-2] = 1.0  # as a step whose update the guard has skipped
    with pytest.raises(RuntimeError, match="was skipped"):
        made.loss()


def test_a_torch_without_the_switch_is_refused():
    with pytest.raises(RuntimeError, match="cannot replace FSDP's collectives"):
        emulated.StandIn(SMALL, 256, torch.float32, CPU.device).on(torch.nn.Module())


# ------------------------------------------------------------------------------------------------ what fits, and counts


def wanted(memory: int, case: step.StepCase) -> list[tuple[int, int]]:
    """(layers, micro batch) in the order of trying, on a card of so much memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "")
        on_gpu = Bench(torch.device("cuda", 0), False, 1)
        return [(model.n_layers, micro) for model, micro in step.sizes(on_gpu, case, None, None)]


def test_the_step_fits_the_card():
    """The whole model at the largest micro batch that memory.py lets in; else as many layers as leave room for it."""
    h200, h100, gh200 = (machines.GPUS[name].memory_bytes for name in
                         ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"))  # fmt: skip
    assert wanted(h200, step.StepCase("one-gpu", "fp32")) == [(32, 2), (32, 1)]
    assert wanted(h200, step.StepCase("one-gpu", "bf16")) == wanted(h200, step.StepCase("one-gpu", "8bit"))
    assert wanted(h200, step.StepCase("one-gpu", "bf16"))[0] == (32, 4)
    for memory, case in ((h100, "fp32"), (h100, "bf16"), (gh200, "fp32"), (h100, "8bit")):
        (layers, micro), *smaller = wanted(memory, step.StepCase("one-gpu", case))
        fits = memory_estimate(Work(MISTRAL_7B, 1, step.SEQ_LEN, moments=case), ALONE).total <= room(memory)
        assert layers == 32 if fits else 10 < layers < 32 and smaller[0][0] == layers - 2
        assert micro <= (2 if case == "fp32" else 4)
    assert wanted(gh200, RANK)[0] == wanted(h200, RANK)[0] == (32, 4)


def test_the_fastest_way_is_chosen_by_what_the_plan_expects(monkeypatch):
    """The micro batch: on 80 GB two sequences with 8bit moments, one with bf16 ones; the largest need not be first."""
    h100 = machines.GPUS["NVIDIA H100 80GB HBM3"].memory_bytes
    assert step.fitting(step.StepCase("one-gpu", "8bit"), MISTRAL_7B, h100, "NVIDIA H100 80GB HBM3") == [2, 1]
    assert step.fitting(step.StepCase("one-gpu", "bf16"), MISTRAL_7B, h100, "NVIDIA H100 80GB HBM3") == [1]
    rates = {2: 5.0, 1: 7.0}
    monkeypatch.setattr(step, "expected_rate", lambda case, model, n, device: rates[n])
    assert step.fitting(step.StepCase("one-gpu", "8bit"), MISTRAL_7B, h100) == [1, 2]


def test_accumulation_is_part_of_the_step_and_its_name(monkeypatch):
    """As many micro batches an update as asked, in tokens, label and name; other modes have none."""
    case, used, train_step = step.StepCase("one-gpu", "bf16", accumulation=3), [], train.train_step
    assert case.name == "one-gpu-bf16-x3" and step.StepCase("one-gpu", "bf16").name == "one-gpu-bf16"
    assert "Mistral-7B, 3 x 4 x 4096, AdamW, bf16 moments" in step.label(case, MISTRAL_7B, 4, 4096, False)
    assert [c.accumulation for c in step.cases(["one-gpu", "rank-of-256"], ["8bit"], 3)] == [1, 3]
    monkeypatch.setattr(train, "train_step", lambda *a: (used.append(len(a[4])), train_step(*a))[1])
    world = start_distributed(deadline=600)
    try:
        made = step.TimedStep(CPU, world, case, SMALL, 2)
        made.run(1)
        assert used == [3] and made.n_tokens == 3 * 2 * 64 and made.loss() > 0
    finally:
        dist.destroy_process_group()


def test_the_products_are_all_of_the_steps():
    for n_tokens in (16384, 8192, 2048):
        products = products_of(MISTRAL_7B, n_tokens).values()
        flops = sum(times * 2 * rows * n_out * n_in for _, rows, n_out, n_in, times in products)
        assert flops == 6 * sizes.matmul_parameters(MISTRAL_7B) * n_tokens


def test_a_ceiling_is_of_whole_turns():
    found = matmul_ceiling(CPU, MISTRAL_7B, 16384)
    assert found["ms"] == pytest.approx(sum(p["ms"] * p["times"] for p in found["products"].values()))
    assert found["tflop_s"] == pytest.approx(found["flops"] / found["ms"] / 1e9)


def test_tokens_are_as_frequent_as_words():
    tokens = random_tokens(32000, (4, 4, 4097), CPU.device)
    assert torch.equal(tokens, random_tokens(32000, (4, 4, 4097), CPU.device))
    counts = tokens.flatten().bincount(minlength=32000).sort(descending=True).values / tokens.numel()
    assert tokens.shape == (4, 4, 4097) and 0.02 < counts[0] < 0.06 and 0.4 < counts[:200].sum() < 0.6
    assert tokens.flatten().mode().values > 3  # which one is frequent says nothing


def test_clocks_beside_the_work():
    assert watched("1980, 690.1, 61\n1755, 701.5, 66\nN/A, [N/A], 60\n1800, 700.0, 64\n") == {
        "n": 3, "sm_mhz": 1800.0, "watts": 700.0, "celsius": 66.0,
    }  # fmt: skip
    assert watched("") is None
    with Watch() as watch:
        pass
    assert torch.cuda.is_available() or watch.found is None


def test_steady_steps_are_counted_and_bounded():
    ran = []

    def run(i: int) -> None:
        ran.append(i)
        time.sleep(0.02)

    found = steady_steps(CPU, run, n_steps=4, seconds=60)
    assert found["n"] == 4 and ran == [0, 0, 0, 1, 2, 3] and 20 <= found["median"] < 60
    assert steady_steps(CPU, run, n_steps=50, seconds=0.1)["n"] in (3, 4)


# ------------------------------------------------------------------------------------------------- processes and labels


def test_what_a_process_leaves_counts(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, subprocess, sys, time\n"
        "how, row = sys.argv[1:]\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path)!r} + '/' + how, 'w').write(str(child.pid))\n"
        "if how != 'silent':\n"
        "    open(row, 'w').write(json.dumps({'status': 'ok' if how == 'late' else 'failed', 'reason': ''}))\n"
        "{'late': lambda: time.sleep(60), 'silent': lambda: time.sleep(60), 'dies': lambda: os.kill(os.getpid(), 11),\n"
        " 'ends': lambda: sys.exit(3)}[how]()\n"
    )
    rows = {how: in_its_own_process([str(script), how], 2) for how in ("late", "silent", "dies", "ends")}
    assert rows == {
        "late": {"status": "ok", "reason": "was not done after 2 s"},
        "silent": {"status": "failed", "reason": "was not done after 2 s"},
        "dies": {"status": "failed", "reason": "its process was ended by signal 11"},
        "ends": {"status": "failed", "reason": "its process ended with 3"},
    }
    for how in rows:  # and nothing that it has started goes on
        assert not is_alive((tmp_path / how).read_text()), how


def test_a_process_ends_with_whoever_started_it(tmp_path):
    """Though it is of another session, and its parent is killed with no chance to say so."""
    child, parent = tmp_path / "child.py", tmp_path / "parent.py"
    head = f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom bench.lib.process import *\n"
    child.write_text(head + "die_with_parent()\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)")
    parent.write_text(head + f"in_its_own_process([{str(child)!r}, {str(tmp_path / 'pid')!r}], 60)")
    process = subprocess.Popen([sys.executable, str(parent)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    process.kill()
    process.wait()
    pid = (tmp_path / "pid").read_text()
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: str) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_case_that_fails_is_a_row_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    asked = []

    def process(command, seconds):
        asked.append(command[command.index("--case") + 1])
        good = {"status": "ok", "reason": ""} | timed()
        return {"status": "failed", "reason": "OutOfMemoryError: a lot"} if len(asked) == 1 else good

    monkeypatch.setattr(step, "in_its_own_process", process)
    assert step.main(["--smoke", "--mode", "one-gpu", "rank-of-256", "--moments", "fp32", "--out", str(tmp_path)]) == 1
    assert asked == ["rank-of-256:fp32", "one-gpu:fp32"]
    rows = read_result(tmp_path / "step.json")["rows"]
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "OutOfMemoryError: a lot" in capsys.readouterr().out


def times(ms: float) -> dict:
    return {"median": ms, "p5": ms - 1.25, "p95": ms + 3.5, "n": 50, "rounds": [ms]}


def timed(rate: float = 14321.0, ms: float = 1144.0, mfu: float = 0.6636) -> dict:
    return {"step_ms": times(ms), "tokens_per_second": rate, "mfu": mfu, "mfu_palm": 1.0875 * mfu,
            "of_ceiling": 0.8715, "n_layers": 32, "micro_batch": 4, "seq_len": 4096, "flops_per_token": 4.588e10,
            "peak_memory_bytes": int(61.3 * 2**30), "ceiling_before": {"tflop_s": 771.0},
            "ceiling_after": {"tflop_s": 752.0},
            "nvidia_smi_beside": {"n": 9, "sm_mhz": 1715.0, "watts": 691.0, "celsius": 67.0}}  # fmt: skip


def gaps(rows: dict[str, tuple]) -> list[dict]:
    return [dict(part=part, ms=a, kernels_ms=b, floor_ms=c, gap_ms=a - c) for part, (a, b, c) in rows.items()]


def results(folder: Path) -> Path:
    """A made-up visit: figures of each mode that occur nowhere else, one case that failed, opponents."""
    machine = {"date": "2026-01-02T03:04:05Z", "device": "Fixture GPU", "versions": {"torch": "2.0"}, "commit": "abc",
               "command": "python bench/step.py"}  # fmt: skip
    about = {"format": 1, "smoke": False, "machine": machine}

    def row(case: step.StepCase, **more) -> dict:
        named = {"case": case.name, "mode": case.mode, "moments": case.moments, "status": "ok", "reason": ""}
        return named | {"label": step.label(case, MISTRAL_7B, 4, 4096, False)} | more

    emulated = timed() | {"stand_in_bytes": 3 * 2**29, "estimated_bytes": int(60.2 * 2**30)}
    ours = timed(12750.0, 1285.0, 0.5908) | {"of_ceiling": 0.7788}
    rows = [row(step.StepCase("one-gpu", "bf16"), **ours), row(RANK, **emulated)]
    rows.insert(1, row(step.StepCase("one-gpu", "8bit"), status="failed", reason="OutOfMemoryError: a lot"))
    fewer = timed(31000.0, 528.5, 0.5555) | {"n_layers": 13, "of_ceiling": 0.5}  # no match for an opponent of 32
    rows.insert(2, row(step.StepCase("one-gpu", "fp32"), **fewer))
    by_name = {o.name: o for o in opponents.OPPONENTS}
    hf = {"name": "hf-bf16", "label": by_name["hf-bf16"].label, "compiled": opponents.MODEL, "checkpointing": False}
    ours_only = ("of_ceiling", "ceiling_before", "ceiling_after", "nvidia_smi_beside")
    hf |= {k: x for k, x in timed(8500.0, 963.8, 0.3939).items() if k not in ours_only}
    hf |= {"micro_batch": 2, "status": "ok", "reason": ""}
    attempt = {k: x for k, x in hf.items() if k not in ("name", "label", "n_layers", "seq_len")}
    tried = [attempt | {"micro_batch": 4, "status": "does not fit", "reason": "needs more"}, attempt]
    absent = {"name": "liger-bf16", "label": by_name["liger-bf16"].label, "status": "absent", "attempts": [],
              "reason": "ModuleNotFoundError: No module named 'liger_kernel'"}  # fmt: skip
    step_file = about | {"kind": "step", "rows": rows, "opponents": [absent, hf | {"attempts": tried}]}
    write_json(folder / "step.json", step_file)
    found = gaps({"matmul": (921.25, 921.25, 885.5), "communication": (17.75, 650.5, 0.0), "idle": (9.5, 0.0, 0.0)})
    profile = row(RANK, wall_ms=948.5, idle_ms=9.5, hidden_communication_ms=632.75, own_ms={}, gaps=found,
                  categories_ms={}, floors={"ms": {}, "basis": "measured beside it"},
                  other=[{"kernel": "mystery", "ms": 3.25}])  # fmt: skip
    write_json(folder / "profile.json", about | {"kind": "profile", "profiles": [profile]})
    return folder


def test_the_report_has_every_mode_and_who_is_beside_it(tmp_path, capsys):
    assert report.main([str(results(tmp_path))]) == 0
    text = capsys.readouterr().out
    line = next(one for one in text.splitlines() if one.startswith("| training on one GPU: Mistral-7B, 4 x 4096"))
    assert "| 12,750 | 1,285.0 (1,283.8 to 1,288.5, 50) | 59.1% (64.2%) |" in line
    assert "| 77.9% of 771 before, 752 after | 61.3 GiB |" in line
    assert "61.3 GiB (60.2 estimated), 1.5 of them the stand-in for the network<br>one rank of 256" in text
    assert "| failed: OutOfMemoryError: a lot |" in text
    opponent = next(one for one in text.splitlines() if one.startswith("| Hugging Face + torch.compile, bf16"))
    assert "| 1.50 (bf16 moments, micro batch 4) |" in opponent and "the whole model compiled" in opponent
    assert "absent: ModuleNotFoundError: No module named 'liger_kernel'" in text
    assert "micro batch 4, the whole model compiled: does not fit: needs more" in text
    assert re.search(r"\| matmul \| 921.25.*\+35.75", text) and "| the step | 948.50" in text
    assert "1,715 MHz, 691 W, at most 67" in text


def test_no_figure_of_one_emulated_rank_without_its_label(tmp_path, capsys):
    """In each cell and each line of the report that has a figure of that mode, and in each object of the files."""
    results(tmp_path)
    label = MODE_LABELS["rank-of-256"]
    stored = json.loads((tmp_path / "step.json").read_text())
    report.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    cells = [cell for one in lines for cell in (one.split("|") if one.startswith("|") else [one])]
    for figure in ("14,321", "1,144.0", "66.4%", "87.2%", "921.25", "650.50", "885.50", "+35.75", "948.50", "632.8",
                   "3.25 ms"):  # fmt: skip
        holding = [cell for cell in cells if figure in cell]
        assert holding and all(label in cell for cell in holding), (figure, holding)
    for row in stored["rows"]:
        assert MODE_LABELS[row["mode"]] in row["label"]
        for line in step.lines_of(row, smoke=False):
            assert MODE_LABELS[row["mode"]] in line


def test_a_file_that_lost_a_label_is_refused(tmp_path, capsys):
    results(tmp_path)
    for name, rows in (("step.json", "rows"), ("profile.json", "profiles")):
        stored = json.loads((tmp_path / name).read_text())
        next(row for row in stored[rows] if row["mode"] == "rank-of-256")["label"] = "Mistral-7B on 256 GPUs"
        (tmp_path / name).write_text(json.dumps(stored))
        with pytest.raises(BadResult, match="its label must say 'one rank of 256, emulated, no network'"):
            read_result(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ opponents


def tries(*came: str) -> list[tuple]:
    """The ways that are tried, if these come of them in turn."""
    attempts, ways, states = [], [], iter(came)
    while (way := opponents.next_way(attempts, False, None)) is not None:
        ways.append(way)
        state, _, rate = next(states).partition(" ")
        made = dict(zip(("micro_batch", "compiled", "checkpointing"), way, strict=True))
        attempts.append(made | {"status": state, "tokens_per_second": float(rate or 0)})
    assert next(states, None) is None
    return ways


def test_an_opponent_is_tried_until_it_is_at_its_best():
    layers, model = opponents.LAYERS, opponents.MODEL
    every = [(8, layers, False), (4, layers, False), (2, layers, False), (1, layers, False)]
    assert tries("no", "ok 9", "ok 11", "ok 7", "ok 12") == [*every, (2, model, False)]
    assert tries("ok 9", "ok 8", "ok 3") == [(8, layers, False), (4, layers, False), (8, model, False)]
    assert tries("no", "no", "no", "no", "no", "ok 5") == [*every, (8, model, True), (4, model, True)]
    assert len(tries(*8 * ["no"])) == 8
    assert opponents.next_way([], False, 2) == (2, layers, False) and opponents.next_way([], True, None)[0] == 2


def test_what_cannot_fit_is_not_tried(monkeypatch):
    """On 80 GB neither fp32 weights with their moments nor, in bf16, four sequences; on 141 GB those do."""
    by_name = {o.name: o for o in opponents.OPPONENTS}
    h100, h200 = (machines.GPUS[n].memory_bytes for n in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    assert opponents.least_bytes(by_name["hf-fp32"], MISTRAL_7B, 1, True) > h100
    assert opponents.least_bytes(by_name["hf-bf16"], MISTRAL_7B, 4, False) > h100
    assert opponents.least_bytes(by_name["hf-bf16"], MISTRAL_7B, 4, False) < h200
    assert opponents.least_bytes(by_name["hf-bf16"], MISTRAL_7B, 8, True) < h100
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=h100))
    made = SimpleNamespace(opponent=by_name["hf-bf16"], config=MISTRAL_7B)
    on_gpu = Bench(torch.device("cuda", 0), False, 1)
    tried = opponents.attempt(on_gpu, made, 8, opponents.LAYERS, False, 3, 1.0)
    assert tried["status"] == "does not fit" and "GiB of 79.6" in tried["reason"]


def test_an_opponent_does_not_fit_only_where_all_was_tried():
    too_large, failed, ok = ({"status": s, "reason": s} for s in ("does not fit", "failed", "ok"))
    late = "the budget ended"
    assert opponents.verdict([too_large] * 2, "") == {"status": "does not fit", "reason": "does not fit"}
    assert opponents.verdict([too_large] * 2, late) == {"status": "not tried", "reason": late}
    assert opponents.verdict([failed, too_large], late) == {"status": "failed", "reason": "failed"}
    assert opponents.verdict([too_large, ok, failed], late) == {"reason": late}


def test_an_opponents_budget_is_spent_on_what_fits(monkeypatch):
    """However little is left, the largest way that fits is run; a visit ended before it, at 8 sequences, which do not.

    On 141 GB of memory, in bf16.
    """
    run = []

    def attempt(bench, step, *way):
        reason = opponents.too_large(bench, step, way[0], way[2])
        run.extend([] if reason else [way[:3]])
        made = dict(zip(("micro_batch", "compiled", "checkpointing"), way, strict=False))
        return made | ({"status": "does not fit", "reason": reason} if reason else FIGURES)

    monkeypatch.setattr(opponents, "OpponentStep", lambda opponent, config, _: SimpleNamespace(**locals()))
    monkeypatch.setattr(opponents, "attempt", attempt)
    memory = machines.GPUS["NVIDIA H200"].memory_bytes
    rows = []
    given = SimpleNamespace(budget_s=1.0, layers=None, micro_batch=None, steps=3)
    on_gpu = SimpleNamespace(smoke=False, memory_bytes=memory, device=None, release=lambda: None)
    opponents.measured(on_gpu, next(o for o in opponents.OPPONENTS if o.name == "liger-bf16"), given, rows.append)
    assert run == [(4, opponents.LAYERS, False)] and rows[-1] == {"reason": "the budget ended before all was tried"}
    assert rows[-2]["tokens_per_second"] == FIGURES["tokens_per_second"]


FIGURES = {"status": "ok", "reason": "", "tokens_per_second": 9.0}


@pytest.fixture
def hugging_face(monkeypatch):
    """As it was, afterwards: the benchmark patches it."""
    monkeypatch.setattr(modeling_mistral, "create_causal_mask", modeling_mistral.create_causal_mask)


@pytest.mark.usefixtures("hugging_face")
def test_opponents_compute_the_same_loss():
    """On our weights, Hugging Face's model as it is made here gives our loss: no window, no mask is between them."""
    config = replace(SMALL, window=None)
    theirs = opponents.OpponentStep(next(o for o in opponents.OPPONENTS if o.name == "hf-fp32"), config, CPU.device)
    theirs.prepare(2, 64, None, False)
    ours = Mistral(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0.0, 0.3)  # so large that attention matters
        theirs.model.load_state_dict(hf_weights(ours))
        tokens = theirs.batches[0]
        loss, n_targets, _ = ours(tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100))
        found = theirs.model(input_ids=tokens, labels=tokens).loss
        assert found.item() == pytest.approx((loss / n_targets).item(), rel=1e-5)


@pytest.mark.usefixtures("hugging_face")
def test_an_opponents_step_trains():
    theirs = opponents.OpponentStep(next(o for o in opponents.OPPONENTS if o.name == "hf-bf16"), SMALL, CPU.device)
    theirs.prepare(2, 64, None, False)
    before = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    assert all(p.dtype == torch.bfloat16 for p in before.values())
    theirs.optimizer.param_groups[0]["lr"] = 0.1
    theirs.run(0)
    changed = [name for name, p in theirs.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == list(before) and all(p.grad is None for p in theirs.model.parameters())


def hf_weights(model: Mistral) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "hf")
        files = (Path(folder) / "hf").glob("*.safetensors")
        return {name: x for file in files for name, x in load_file(file).items()}


def test_opponents_stand_beside_our_rows(tmp_path, monkeypatch, capsys):
    """In the file that bench/step.py left, unless that is of another commit; what is absent is named."""
    mine = {"format": 1, "kind": "step", "smoke": True, "machine": machine(CPU, "abc"), "rows": []}
    row = {"case": "one-gpu-fp32", "mode": "one-gpu", "label": MODE_LABELS["one-gpu"], "status": "failed", "reason": ""}
    kept = mine | {"rows": [row]}
    write_json(tmp_path / "step.json", kept)
    monkeypatch.setattr(
        opponents, "in_its_own_process", lambda command, seconds: {"status": "absent", "reason": "gone"}
    )
    assert opponents.main(["--smoke", "--commit", "abc", "--only", "liger", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "step.json").read_text())
    assert stored["rows"] == kept["rows"] and [o["status"] for o in stored["opponents"]] == 2 * ["absent"]
    assert "Liger-Kernel + torch.compile, bf16 weights and moments: absent, gone" in capsys.readouterr().out
    assert opponents.main(["--smoke", "--commit", "def", "--only", "liger", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == []
    assert opponents.main(["--smoke", "--only", "nobody", "--out", str(tmp_path / "new")]) == 2
    assert "--only 'nobody' is part of no name; there are liger-fp32" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
