"""A training step of Mistral-7B on this GPU: tokens a second, share of the peak, memory, and where the time goes.

    python bench/step.py [--out DIR]                  on a GPU: DIR/step.json
    python bench/step.py --profile [--out DIR]        one profiled step: DIR/profile.json and DIR/trace.json.gz
    python bench/step.py --smoke                      here: the "test" model on the CPU, no figures

The step is train.py's own: ``build_model`` (FSDP2, here a world of one), ``build_optimizer`` (AdamW on fp32 weights)
and ``train_step``, on random tokens. AdamW in fp32 takes 16 bytes a weight, 116 GB at 7B: on a card with less it runs
as many of the 32 layers as fit beside a micro batch of 4 x 4096, and every label says so. Such a figure is of that
model; nothing is extrapolated from it.
"""
# ruff: noqa: E402  imports follow the change of sys.path

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not bench/: see kernels.py
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py, before torch

import torch

import train
from bench import measure
from halny.model import profiler, roofline
from halny.model.batches import Batch
from halny.model.mistral import PRESETS, MistralConfig

SEQ_LEN = 4096
RESERVE_BYTES = 4 * 2**30  # CUDA context, a layer's working memory, fragments: what roofline's estimate leaves out
TRACE_BYTES = 15 * 2**20

# ------------------------------------------------------------------------------------------------------------ the step


def sizes(bench: measure.Bench, layers: int | None, micro_batch: int | None) -> list[tuple[MistralConfig, int]]:
    """(model, micro batch) to try in turn, the most wanted first: what the estimate says fits, then somewhat less."""
    if bench.smoke:
        return [(PRESETS["test"], 2)]
    whole = PRESETS["mistral-7b"]
    memory = torch.cuda.get_device_properties(bench.device).total_memory - RESERVE_BYTES
    lean = dict(compute_bytes=2, lean=True, logits_chunk_rows=2048)

    def fits(model: MistralConfig, micro: int) -> bool:
        return roofline.memory_estimate(model, 1, micro, SEQ_LEN, **lean).total <= memory

    if layers or micro_batch:
        return [(replace(whole, n_layers=layers or whole.n_layers), micro_batch or 4)]
    wanted = [(whole, micro) for micro in (4, 2, 1) if fits(whole, micro)]
    if not wanted:
        n = max(n for n in range(1, whole.n_layers) if fits(replace(whole, n_layers=n), 4))
        wanted = [(replace(whole, n_layers=n), 4), (replace(whole, n_layers=max(1, n - 2)), 4)]
    return wanted


class Step:
    """Model, optimizer and a few batches of random tokens, made by train.py's own functions."""

    def __init__(self, bench: measure.Bench, world: train.World, model: MistralConfig, micro_batch: int):
        self.bench, self.config, self.micro_batch = bench, model, micro_batch
        self.seq_len = 64 if bench.smoke else SEQ_LEN
        recipe = train.Recipe(  # of a model of the built-in vocabulary, so that no data are asked for
            model="mistral-7b", run_dir=Path("none"), seq_len=self.seq_len, micro_batch=micro_batch, steps=1000,
            batch_tokens=micro_batch * self.seq_len,
        )  # fmt: skip
        plan = replace(train.resolve(recipe, world), model=model)
        self.recipe = plan.recipe
        self.model = train.build_model(plan, world)
        with torch.no_grad():  # much as train.fill_model, which draws on the CPU, at 7B for a while
            for name, parameter in self.model.named_parameters():
                local = parameter.to_local()
                local.fill_(1.0) if name.endswith("norm.weight") else local.normal_(0.0, 0.02)
            self.model.init_buffers()
        self.optimizer = train.build_optimizer(self.model, plan.recipe)
        self.guard, self.n_steps = train.Guard(plan.recipe.spike, plan.recipe.skip_spikes, world.device), 0
        self.batches = [
            Batch(*torch.randint(model.vocab_size, (2, micro_batch, self.seq_len), device=bench.device),
                  lengths=[self.seq_len] * micro_batch)
            for _ in range(4)
        ]  # fmt: skip

    def run(self, i: int) -> torch.Tensor:
        """train.train_step on one of the batches; what it returns, on the device."""
        self.n_steps += 1
        batches = [self.batches[i % len(self.batches)]]
        return train.train_step(self.model, self.optimizer, self.guard, self.n_steps, batches, 1e-5, self.recipe.clip)

    @property
    def label(self) -> str:
        whole = PRESETS["mistral-7b"].n_layers
        if self.bench.smoke:
            return "smoke: the test model on a CPU, no performance figure"
        layers = (
            "Mistral-7B" if self.config.n_layers == whole else f"{self.config.n_layers} of Mistral-7B's {whole} layers"
        )
        return f"{layers}, {self.micro_batch} x {self.seq_len}, AdamW in fp32, one GPU"


def build(bench: measure.Bench, world: train.World, candidates: list[tuple[MistralConfig, int]]) -> Step:
    """The first of the candidates whose first two steps fit the memory."""
    for i, (model, micro_batch) in enumerate(candidates):
        step = None
        try:
            step = Step(bench, world, model, micro_batch)
            for n in range(2):
                step.run(n)
            bench.synchronize()
            return step
        except torch.OutOfMemoryError:
            if i + 1 == len(candidates):
                raise
            print(f"{model.n_layers} layers at micro batch {micro_batch} do not fit; trying less", flush=True)
        step = None
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("no candidates")


def time_steps(bench: measure.Bench, step: Step, n_steps: int, seconds: float) -> dict:
    """Steady steps one after another, nothing read back between them; at most n_steps, and about ``seconds``."""
    for i in range(1 if bench.smoke else 3):
        step.run(i)
    bench.synchronize()
    start = time.perf_counter()
    totals = step.run(0)
    bench.synchronize()
    n_steps = max(3, min(n_steps, int(seconds / (time.perf_counter() - start))))
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    marks = []
    gc.collect()
    gc.disable()  # as train.py's loop
    for i in range(n_steps + 1):
        if bench.on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if i < n_steps:
            totals = step.run(i)
    bench.synchronize()
    gc.enable()
    if bench.on_gpu:
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        times = [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
    milliseconds = measure.summary([times])
    n_tokens = step.micro_batch * step.seq_len
    tokens_per_second = n_tokens / milliseconds["median"] * 1e3
    flops = roofline.flops_per_token(step.config, step.seq_len)
    peak = roofline.peak_flops(torch.cuda.get_device_name(bench.device)) if bench.on_gpu else None
    loss_sum, n_targets, *_, verdict, _ = totals.tolist()
    if verdict % 2:  # as train.Guard counts
        raise RuntimeError(
            "the last update was skipped, as a loss or norm was not finite: what was timed is no training"
        )
    return {
        "label": step.label,
        "n_layers": step.config.n_layers,
        "micro_batch": step.micro_batch,
        "seq_len": step.seq_len,
        "n_parameters": roofline.parameters(step.config),
        "step_ms": milliseconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops,
        "mfu": roofline.mfu(tokens_per_second, flops, peak),
        "peak_flops": peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.on_gpu else None,
        "loss": loss_sum / n_targets,
    }


def profile(bench: measure.Bench, step: Step, trace: Path) -> dict:
    """One step under torch.profiler; its Chrome trace goes to ``trace``, unless it is too large to keep."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    step.run(0)
    bench.synchronize()
    with torch_profile(activities=activities) as profiled:
        start = time.perf_counter()
        step.run(1)
        bench.synchronize()
        wall_ms = (time.perf_counter() - start) * 1e3
    profiled.export_chrome_trace(str(trace))
    on_gpu = bench.on_gpu
    kernels = profiler.kernels_of(profiler.events_of(trace)) if on_gpu else profiler.operators_of(profiled)
    size = trace.stat().st_size
    if size > TRACE_BYTES:
        trace.unlink()
    return profiler.breakdown(kernels, wall_ms) | {
        "label": step.label,
        "trace_bytes": size,
        "trace_kept": size <= TRACE_BYTES,
    }


def print_breakdown(found: dict) -> None:
    print("\n".join(profiler.category_lines(found)))
    for kernel in found["other"][:5]:
        print(f"  other: {kernel['ms']:8.2f} ms {kernel['n']:5} x {kernel['kernel'][:80]}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="rehearse on the CPU with a tiny model, without figures")
    parser.add_argument(
        "--out", type=Path, help="folder for the files [bench/results/DATE-DEVICE; runs/bench with --smoke]"
    )
    parser.add_argument("--profile", action="store_true", help="profile one step instead of timing many")
    parser.add_argument("--steps", type=int, default=50, help="steps timed [50]")
    parser.add_argument("--layers", type=int, help="layers of the model [as many as fit]")
    parser.add_argument("--micro-batch", type=int, help="sequences of 4096 [4, or as many as fit]")
    parser.add_argument("--budget-s", type=float, default=60, help="time steps for about so many seconds [60]")
    parser.add_argument("--commit", help="commit to record where there is no git checkout")
    given = parser.parse_args(arguments)
    for name in ("steps", "layers", "micro_batch"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            print(
                f"step.py: --{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}", file=sys.stderr
            )
            return 2
    try:
        bench = measure.bench_on(given.smoke)
    except RuntimeError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    world = train.start_distributed(deadline=600)
    described = measure.machine(bench, given.commit)
    step = build(bench, world, sizes(bench, given.layers, given.micro_batch))
    note = {"note": "smoke: no performance figure"} if bench.smoke else {}
    kind = "profile" if given.profile else "step"
    result = {"format": 1, "kind": kind, "smoke": bench.smoke} | note | {"machine": described}
    out = given.out or measure.results_folder(bench)
    out.mkdir(parents=True, exist_ok=True)
    if given.profile:
        result["profile"] = profile(bench, step, out / "trace.json.gz")
    else:
        result["step"] = time_steps(bench, step, 3 if bench.smoke else given.steps, given.budget_s)
    described["nvidia_smi_after"] = measure.nvidia_smi() if bench.on_gpu else None
    measure.write_json(out / f"{kind}.json", result)
    print(step.label)
    if bench.smoke:
        print(f"{kind}: ran")
    elif given.profile:
        print_breakdown(result["profile"])
    else:
        s, mfu = result["step"], result["step"]["mfu"]
        share = "unknown" if mfu is None else f"{mfu:.1%}"
        print(f"{s['tokens_per_second']:,.0f} tokens/s, step {s['step_ms']['median']:.1f} ms, "
              f"MFU {share}, {s['peak_memory_bytes'] / 2**30:.1f} GiB")  # fmt: skip
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py: gloo's threads now and then abort the interpreter's tear-down
