"""A training step of Mistral-7B at a context of 4096: tokens a second, share of the peak, memory, where the time goes.

    python bench/step.py [--mode rank-of-256 one-gpu] [--out DIR]                   DIR/step.json
    python bench/step.py --profile [--out DIR]                     the same, and DIR/profile.json, trace-CASE.json.gz
    python bench/step.py --smoke                                                    here: tiny, on the CPU, no figures

There is no second training loop: model, optimizer and step are train.py's ``build_model``, ``build_optimizer`` and
``train_step``, on random weights and tokens. Two modes; no figure of the second stands anywhere without its label:

**one-gpu** trains: one rank, the whole step, nothing left out, an update for every micro batch or every --accumulation
of them. A row for each --moments, what AdamW keeps.
Micro batches are what fits it by estimate; where not even one sequence fits beside 32 layers, as many layers as do, and
the label says so (nothing is extrapolated from it).

**rank-of-256** is one rank of 256, emulated, no network. The process group is PyTorch's fake one, with 256 ranks, four
a node; the layout is what the trainer chooses for them, so weights, moments and memory are one rank's. Each collective
is a copy on this GPU (``StandIn``). So computation, memory and its traffic are real, the numbers are not: the loss
means nothing. What 256 GPUs lose to a network is not in it; `train.py bielik-7b --plan --gpus 256` calculates that.

Each case runs in a process of its own; one that fails or runs out of memory is recorded so, and the next goes on.
Before and after its steps the same process times the step's matrix products alone (matmul_ceiling). With
--profile it also records one more step after those that were timed, and says where the time goes (profiler.py);
the trace of the first case is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py, before torch
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13's profiler announces itself on stderr below that

import torch
from torch.profiler import ProfilerActivity, profile

import train
from bench.lib.ceilings import copy_rate, matmul_ceiling
from bench.lib.clocks import Bench, bench_on
from bench.lib.command import at_least_one, command, leave, parser_of, passed_on
from bench.lib.emulated import StandIn, one_of
from bench.lib.process import Watch, be_a_case, in_its_own_process, line_of
from bench.lib.results import new_result, results_folder, write_json, write_result
from bench.lib.steps import MODE_LABELS, SIZES, memory_figures, random_tokens, steady_steps, step_figures, step_words
from halny.model.data.batches import Batch
from halny.model.estimate import choices, machines, plan, step_time
from halny.model.estimate.memory import memory_estimate, room
from halny.model.estimate.sizes import parameters
from halny.model.estimate.work import ALONE, Layout, Work
from halny.model.mistral import PRESETS, MistralConfig
from halny.model.record import breakdown
from halny.model.run.optimizer import Guard
from halny.model.run.ranks import World, start_distributed
from halny.model.run.resolve import DTYPES, resolve

SEQ_LEN = 4096
TRACE_BYTES = 15 * 2**20
MODES = ("rank-of-256", "one-gpu")  # the most telling first: a visit to a GPU is short
MOMENTS = ("8bit", "bf16", "fp32")
RANKS, NODE = 256, 4
START_S = 8  # that a process takes before it can do anything: imports, CUDA
AROUND_S = 10  # for the steps before those that are timed, and the ceiling after them
PROFILE_S = 10  # for recording a step and reading its trace
FIRST_SHARE = 1.5  # of the budget, for the first case: it also compiles
GRACE_S = 5  # beyond its share of the budget, before a process is ended; gpu_pass.py allows twice as much

# ----------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class StepCase:
    """What one process measures."""

    mode: str
    moments: str = "fp32"
    accumulation: int = 1

    @property
    def name(self) -> str:
        if self.mode != "one-gpu":
            return self.mode
        return f"{self.mode}-{self.moments}" + (f"-x{self.accumulation}" if self.accumulation > 1 else "")

    @property
    def micro_batch(self) -> int:
        return 2 if self.mode == "one-gpu" and self.moments == "fp32" else 4


def cases(modes: list[str], moments: Sequence[str], accumulation: int = 1) -> list[StepCase]:
    """Those of the modes, in the order of MODES."""
    found = [StepCase("rank-of-256")] if "rank-of-256" in modes else []
    return found + ([StepCase("one-gpu", m, accumulation) for m in moments] if "one-gpu" in modes else [])


def expected_rate(case: StepCase, model: MistralConfig, micro_batch: int, device: str) -> float:
    """Tokens/s that step_time.py expects of one GPU; of a card that it does not know, more of larger micro batches."""
    cluster = step_time.cluster_of_run(device, 1, 1)
    if cluster is None or case.mode != "one-gpu":
        return float(micro_batch)
    work = Work(model, micro_batch, SEQ_LEN, case.accumulation, moments=case.moments)
    chosen = plan.choose(work, cluster)
    return step_time.tokens_per_second(chosen.work, chosen.step)


def fitting(case: StepCase, model: MistralConfig, memory_bytes: int, device: str = "") -> list[int]:
    """Micro batches that fit a card of so much memory by the estimate, the fastest first."""
    fit = [n for n in (4, 2, 1) if n <= case.micro_batch and estimated_bytes(case, model, n) <= room(memory_bytes)]
    return sorted(fit, key=lambda n: -expected_rate(case, model, n, device))


def label(case: StepCase, config: MistralConfig, micro_batch: int, seq_len: int, smoke: bool) -> str:
    """What a figure of this case is a figure of."""
    if smoke:
        return f"smoke: no performance figure; {MODE_LABELS[case.mode]}: the test model on a CPU"
    whole = PRESETS["mistral-7b"].n_layers
    model = "Mistral-7B" if config.n_layers == whole else f"{config.n_layers} of Mistral-7B's {whole} layers"
    batch = f"{case.accumulation} x " * (case.accumulation > 1) + f"{micro_batch} x {seq_len}"
    return f"{MODE_LABELS[case.mode]}: {model}, {batch}, AdamW, {case.moments} moments"


def sizes(bench: Bench, case: StepCase, layers: int | None, micro_batch: int | None) -> list[tuple]:
    """(model, micro batch) to try in turn: what fits by the estimate, the fastest first; else with fewer layers."""
    if bench.smoke:
        return [(PRESETS["test"], 2)]
    whole, most = PRESETS["mistral-7b"], case.micro_batch
    if layers or micro_batch:
        return [(replace(whole, n_layers=layers or whole.n_layers), micro_batch or most)]
    wanted = [(whole, micro) for micro in fitting(case, whole, bench.memory_bytes, bench.name)]
    if not wanted:
        fewer = [replace(whole, n_layers=n) for n in range(1, whole.n_layers)]
        n = max(model.n_layers for model in fewer if most in fitting(case, model, bench.memory_bytes))
        wanted = [(replace(whole, n_layers=n), most), (replace(whole, n_layers=max(1, n - 2)), most)]
    return wanted


def estimated_bytes(case: StepCase, model: MistralConfig, micro_batch: int) -> int:
    """The least that a rank needs at the peak, everything gathered again or recomputed, and the stand-in's buffers."""
    if case.mode == "one-gpu":
        return memory_estimate(Work(model, micro_batch, SEQ_LEN, case.accumulation, moments=case.moments), ALONE).total
    total = memory_estimate(Work(model, micro_batch, SEQ_LEN), Layout(RANKS)).total
    return total + StandIn.bytes_for(model, RANKS, 2)


# ------------------------------------------------------------------------------------------------------------ the step


class TimedStep:
    """Model, optimizer and a few batches of random tokens, made by train.py's own functions."""

    def __init__(
        self, bench: Bench, world: World, case: StepCase, model: MistralConfig, micro_batch: int,
        reshard: str | None = None,
    ):  # fmt: skip
        self.config, self.micro_batch, self.world, self.accumulation = model, micro_batch, world, case.accumulation
        self.seq_len = 64 if bench.smoke else SEQ_LEN
        recipe = train.Recipe(  # of a model of the built-in vocabulary, so that no data are asked for
            model="mistral-7b", run_dir=Path("none"), seq_len=self.seq_len, micro_batch=micro_batch, steps=1000,
            batch_tokens=world.size * case.accumulation * micro_batch * self.seq_len, reshard=reshard,
            moments=case.moments,
            dtype="bf16" if case.mode == "one-gpu" else None,  # on a CPU too: its path is another than fp32's
        )  # fmt: skip
        resolved = resolve(recipe, world)
        decision = replace(resolved.decision, work=replace(resolved.work, config=model))
        self.spec = replace(resolved, model=model, decision=decision)
        self.recipe, self.layout = self.spec.recipe, self.spec.layout
        self.model = train.build_model(self.spec, world)
        dtype = DTYPES[self.recipe.dtype]
        self.stand_in = StandIn(model, world.size, dtype, world.device).on(self.model) if world.size > 1 else None
        with torch.no_grad():  # much as train.fill_model, which draws on the CPU, at 7B for a while
            for name, parameter in self.model.named_parameters():
                local = getattr(parameter, "to_local", lambda p=parameter: p)()
                local.fill_(1.0) if name.endswith("norm.weight") else local.normal_(0.0, 0.02)
        self.optimizer = train.build_optimizer(self.model, self.recipe)
        train.begin_computing(self.model, self.optimizer)
        self.guard, self.n_steps = Guard(self.recipe.spike, self.recipe.skip_spikes, world.device), 0
        shape = (4, micro_batch, self.seq_len + 1)
        self.batches = [
            Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), lengths=[self.seq_len] * micro_batch)
            for rows in random_tokens(model.vocab_size, shape, bench.device)
        ]
        self.totals = torch.zeros(7)

    def run(self, i: int) -> None:
        """train.train_step on one of the batches, or as many as it accumulates."""
        self.n_steps += 1
        first = i * self.accumulation
        batches = [self.batches[n % len(self.batches)] for n in range(first, first + self.accumulation)]
        self.totals = train.train_step(
            self.model, self.optimizer, self.guard, self.n_steps, batches, 1e-5, self.recipe.clip
        )

    def loss(self) -> float:
        """Of the last step. Raises RuntimeError if its update was skipped: a step that trains nothing is no step."""
        loss_sum, n_targets, *_, verdict, _ = self.totals.tolist()
        if verdict % 2:  # as the guard counts
            raise RuntimeError("the last update was skipped, as a loss or norm was not finite: what ran is no training")
        return loss_sum / n_targets

    @property
    def n_tokens(self) -> int:
        return self.accumulation * self.micro_batch * self.seq_len

    def estimated_bytes(self) -> int:
        """The trainer's estimate for what this step keeps and gathers, and the stand-in's buffers."""
        estimate = sum(self.spec.decision.memory.values())
        return estimate + (self.stand_in.source.nbytes + self.stand_in.target.nbytes if self.stand_in else 0)

    def floors(self, ceiling: dict, copy_gb_s: float, attention_flops: float) -> breakdown.Floors:
        """At what this machine has been measured to do, attention's rate assumed."""
        speeds = breakdown.Speeds(
            ceiling["tflop_s"] * 1e12, attention_flops, copy_gb_s * 1e9,
            f"measured beside it: matmuls at {ceiling['tflop_s']:,.0f} TFLOP/s (cuBLAS, these shapes), all else at "
            f"{copy_gb_s:,.0f} GB/s (copy); assumed: attention at {attention_flops / 1e12:,.0f} TFLOP/s",
        )  # fmt: skip
        return breakdown.floors(self.spec.work, speeds, self.layout, stand_in=self.stand_in is not None)


def build(bench: Bench, world: World, case: StepCase, candidates: list[tuple]) -> tuple[TimedStep, list[str]]:
    """The first of the candidates whose first two steps fit the memory, and what was tried before it."""
    tried: list[str] = []
    for i, (model, micro_batch) in enumerate(candidates):
        step = None
        try:
            step = TimedStep(bench, world, case, model, micro_batch)
            for n in range(2):
                step.run(n)
            bench.synchronize()
            return step, tried
        except torch.OutOfMemoryError:
            if i + 1 == len(candidates):
                raise
            tried.append(f"{model.n_layers} layers at micro batch {micro_batch} ran out of memory")
            print(f"{tried[-1]}; trying less", flush=True)
        del step
        bench.release()
    raise AssertionError("no candidates")


# --------------------------------------------------------------------------------------------------------- one process


def measured(bench: Bench, case: StepCase, given: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """The row of a case, with --profile its "profile" too; saved whenever there is more of it."""
    began = time.monotonic()
    if case.mode == "rank-of-256":
        if bench.on_gpu:
            torch.cuda.set_device(bench.device)
        world = one_of(RANKS, bench.device, NODE)
    else:
        world = start_distributed(deadline=600)
    candidates = sizes(bench, case, given.layers, given.micro_batch)
    row = {"case": case.name, "mode": case.mode, "moments": case.moments, "status": "failed", "reason": ""}
    row["label"] = label(case, *candidates[0], SEQ_LEN, bench.smoke)
    save(row)
    config, micro_batch = candidates[0]
    n_tokens = micro_batch * (64 if bench.smoke else SEQ_LEN)
    before = matmul_ceiling(bench, config, n_tokens)
    copy_gb_s = copy_rate(bench)["gb_s"]
    bench.release()

    step, tried = build(bench, world, case, candidates)
    row |= {
        "label": label(case, step.config, step.micro_batch, step.seq_len, bench.smoke),
        "n_layers": step.config.n_layers, "micro_batch": step.micro_batch, "seq_len": step.seq_len,
        "accumulation": step.accumulation, "n_parameters": parameters(step.config), "tried": tried,
        "sharding": step.layout.name,
        "recomputed": choices.recomputed(step.spec.work),
        "ceiling_before": before, "copy_gb_s": copy_gb_s,
    }  # fmt: skip
    seconds = given.budget_s - (time.monotonic() - began) - START_S - AROUND_S - PROFILE_S * given.profile
    with Watch() as watch:
        ms = steady_steps(bench, step.run, 3 if bench.smoke else given.steps, max(1.0, seconds))
    row |= {
        "step_ms": ms,
        **step_figures(step.config, step.n_tokens, step.seq_len, ms["median"], bench.name),
        **memory_figures(bench),
        "estimated_bytes": None if bench.smoke else step.estimated_bytes(),
        "loss": step.loss() if world.size == 1 else None,  # where weights are random values, it means nothing
        "nvidia_smi_beside": watch.found,
    }
    save(row)  # without an "ok" yet, but what was measured is on disk
    if step.stand_in is not None:
        step.loss()
        row |= stand_in_figures(step)
    if given.profile:
        about = {k: row[k] for k in ("case", "mode", "moments", "label", "reason", *SIZES)}
        try:
            row["profile"] = about | profiled(bench, step, case.mode, Path(given.trace), before, copy_gb_s)
        except Exception as error:  # the row is worth more than its profile
            row["profile"] = about | {"status": "failed", "reason": line_of(error)}
        save(row)
    config, n_tokens = step.config, step.micro_batch * step.seq_len
    del step
    bench.release()
    row["ceiling_after"] = matmul_ceiling(bench, config, n_tokens)
    ceiling = (before["tflop_s"] + row["ceiling_after"]["tflop_s"]) / 2
    save(row | {"of_ceiling": row["tflop_s"] / ceiling, "status": "ok"})


def stand_in_figures(step: TimedStep) -> dict:
    """What one more step's collectives were replaced by."""
    step.stand_in.calls.clear()
    step.run(0)
    calls = step.stand_in.calls
    return {
        "stand_in_bytes": StandIn.bytes_for(step.config, step.world.size, step.stand_in.source.element_size()),
        "collectives": {
            kind: {"n": sum(k == kind for k, *_ in calls), "bytes": sum(b for k, b, _ in calls if k == kind)}
            for kind in ("all-gather", "reduce-scatter")
        },
    }


def profiled(bench: Bench, step: TimedStep, mode: str, trace: Path, ceiling: dict, copy_gb_s: float) -> dict:
    """One step under torch.profiler; its Chrome trace goes to ``trace``, unless it is too large to keep."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    step.run(0)
    bench.synchronize()
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        step.run(1)
        bench.synchronize()
        wall_ms = (time.perf_counter() - start) * 1e3
    recorded.export_chrome_trace(str(trace))
    on_gpu = bench.on_gpu
    kernels = breakdown.kernels_of(breakdown.events_of(trace)) if on_gpu else breakdown.operators_of(recorded)
    size = trace.stat().st_size
    if size > TRACE_BYTES:
        trace.unlink()
    found = breakdown.breakdown(kernels, wall_ms)
    gpu = machines.GPUS.get(bench.name)
    attention = step_time.RATES["ideal"].attention * gpu.bf16_flops if gpu else ceiling["tflop_s"] * 1e12 * 0.6
    least = step.floors(ceiling, copy_gb_s, attention)
    return found | {
        "status": "ok",
        "floors": {"ms": least.ms, "basis": least.basis},
        "gaps": breakdown.gaps(found, least),
        "text": breakdown.gap_lines(found, least, label=MODE_LABELS[mode]),
        "trace_bytes": size,
        "trace_kept": size <= TRACE_BYTES,
    }


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    made = parser_of(__doc__, "bench/results/DATE-DEVICE; else runs/bench", 600)
    made.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="what to measure [both]")
    made.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS),
        help="what AdamW keeps in one-gpu, a row each [all three]")  # fmt: skip
    made.add_argument("--accumulation", type=int, default=1, help="micro batches of an update in one-gpu [1]")
    made.add_argument("--profile", action="store_true", help="also profile one step of each case")
    made.add_argument("--steps", type=int, default=50, help="steps timed [50]")
    made.add_argument("--layers", type=int, help="layers of the model [32, or as many as fit]")
    made.add_argument("--micro-batch", type=int, help="sequences of 4096 [as the mode says, or as many as fit]")
    for name in ("--case", "--trace", "--row"):  # of a process of its own: what, and where to
        made.add_argument(name, help=argparse.SUPPRESS)
    return made


@command
def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    at_least_one(given, "steps", "layers", "micro_batch", "accumulation")
    if given.case:  # the process of one
        mode, _, moments = given.case.partition(":")
        case = StepCase(mode, moments, given.accumulation if mode == "one-gpu" else 1)
        return be_a_case(given.case, Path(given.row), lambda save: measured(bench_on(given.smoke), case, given, save))
    bench = bench_on(given.smoke)
    started = time.monotonic()
    wanted = cases(given.mode, given.moments, given.accumulation)
    out = given.out or results_folder(bench)
    out.mkdir(parents=True, exist_ok=True)
    result = new_result("step", bench, given.commit) | {"rows": []}
    profiles = new_result("profile", bench, given.commit) | {"profiles": []}
    for i, case in enumerate(wanted):
        left, share = given.budget_s - (time.monotonic() - started), 1 if i else FIRST_SHARE
        seconds = left * share / (share + len(wanted) - i - 1)
        asked = ["bench/step.py", "--case", f"{case.mode}:{case.moments}", "--budget-s", str(seconds)]
        asked += passed_on(given, "smoke", "steps", "layers", "micro_batch", "accumulation", "profile")
        trace = out / f"trace-{case.name}.json.gz"
        row = in_its_own_process([*asked, "--trace", str(trace), "--row"], seconds + GRACE_S)
        missing = {"case": case.name, "mode": case.mode, "moments": case.moments}
        missing["label"] = label(case, PRESETS["mistral-7b"], case.micro_batch, SEQ_LEN, given.smoke)
        row = missing | row
        if i:
            trace.unlink(missing_ok=True)
        lines = lines_of(row, given.smoke)
        if (found := row.pop("profile", None)) is not None:
            profiles["profiles"].append(found)
            write_json(out / "profile.json", profiles)
            lines += lines_of(found, given.smoke)
        result["rows"].append(row)
        write_json(out / "step.json", result)
        print("\n".join(lines), flush=True)
    bad = [row["case"] for row in [*result["rows"], *profiles["profiles"]] if row["status"] != "ok"]
    n_run = len(result["rows"])
    write_result(out / "step.json", result)
    print(f"step: {n_run - len(set(bad))} of {n_run} cases" + "".join(f"; {c} failed" for c in dict.fromkeys(bad)))
    return 1 if bad else 0


def lines_of(row: dict, smoke: bool) -> list[str]:
    """A row for people: its figures and its label in one line."""
    if row["status"] != "ok":
        return [f"{row['label']}: {row['status']}, {row['reason']}"]
    if smoke:
        return [f"{row['case']}: ran"]
    if "gaps" in row:
        return [row["label"], *row["text"]]
    return [f"{row['label']}: {step_words(row)}"]


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
