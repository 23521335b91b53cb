"""What bench/step.py and bench/opponents.py share: steady steps, their tokens and figures, and how a row is put."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.lib.clocks import Bench, mark, milliseconds_between, summary
from halny.model.estimate import machines, roofline
from halny.model.mistral import MistralConfig

# What a profile takes from its step, whose sizes and ceiling it is read by (bench/rates.py).
SIZES = ("n_layers", "micro_batch", "seq_len", "accumulation", "ceiling_before")
# What every figure of a mode of bench/step.py says of itself, in the same cell or sentence.
MODE_LABELS = {"rank-of-256": "one rank of 256, emulated, no network", "one-gpu": "training on one GPU"}


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def step_words(row: dict) -> str:
    """A row of step.json in a sentence, without its label."""
    ms, memory = row["step_ms"], memory_words(row)
    share = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%} (PaLM's formula {row['mfu_palm']:.1%})"
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, step {ms['median']:,.1f} ms (p5 {ms['p5']:,.1f}, p95 "
        f"{ms['p95']:,.1f}, {ms['n']} steps), MFU {share}, {row['of_ceiling']:.1%} of the measured matmul ceiling"
        + (f", {memory}" if memory else "")
    )


def mfu_words(row: dict) -> str:
    return "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}"


def way_words(row: dict) -> str:
    """How an opponent was run."""
    kept = ", gradient checkpointing" if row["checkpointing"] else ""
    return f"micro batch {row['micro_batch']}, {row['compiled']} compiled{kept}"


def memory_words(row: dict) -> str:
    """Its peak, what memory.py had estimated, and what of both is in the place of a network."""
    if row["peak_memory_bytes"] is None:
        return ""
    estimated, stand_in = row.get("estimated_bytes"), row.get("stand_in_bytes", 0)
    said = gib(row["peak_memory_bytes"])
    said += f" ({estimated / 2**30:.1f} estimated)" if estimated else ""
    return said + (f", {stand_in / 2**30:.1f} of them the stand-in for the network" if stand_in else "")


def steady_steps(bench: Bench, step: Callable[[int], object], n_steps: int, seconds: float, warm_up: int = 3) -> dict:
    """Steps one after another as a training loop makes them, nothing read back between them: summary of ms a step.

    After the warm-up and one step that is only looked at, at most n_steps, and about ``seconds`` of them. On a GPU the
    time between two events around each step, so whatever the device waits for is in it; the garbage collector is off,
    as in train.py's loop.
    """
    for i in range(1 if bench.smoke else warm_up):
        step(i)
    bench.synchronize()
    start = time.perf_counter()
    step(0)
    bench.synchronize()
    n_steps = max(3, min(n_steps, int(seconds / (time.perf_counter() - start))))
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    gc.collect()  # before the clock starts: it took the first step 0.13 s of the host's time
    gc.disable()
    try:
        marks = [mark(bench)]
        for i in range(n_steps):
            step(i)
            marks.append(mark(bench))
        bench.synchronize()
    finally:
        gc.enable()
    return summary([list(itertools.starmap(milliseconds_between, itertools.pairwise(marks)))])


def random_tokens(vocab_size: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids, int64, as often as words of a text are: the n-th with a probability of about 1 / n (Zipf's law).

    So the rows of the embedding's gradient that many tokens share are as crowded as in training. Seeded.
    """
    generator = torch.Generator(device).manual_seed(0)
    weights = 1.0 / torch.arange(3, vocab_size + 3, device=device)
    draw = torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator)
    return torch.randperm(vocab_size, generator=generator, device=device)[draw].view(shape)


def step_figures(config: MistralConfig, n_tokens: int, seq_len: int, ms: float, device: str) -> dict:
    """Rates of a step on n_tokens that takes ms: the one place where ours and others' are divided."""
    rate, peak = n_tokens / ms * 1e3, machines.peak_flops(device)
    flops = roofline.flops_per_token(config, seq_len)
    return {
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "tflop_s": rate * flops / 1e12,
        "mfu": machines.mfu(rate, flops, peak),
        "mfu_palm": machines.mfu(rate, roofline.palm_flops_per_token(config, seq_len), peak),
        "peak_flops": peak,
    }


def memory_figures(bench: Bench) -> dict:
    """Bytes at the peak since it was last reset: of tensors, of the allocator, and of the device now, all processes."""
    if not bench.on_gpu:
        return {"peak_memory_bytes": None, "peak_reserved_bytes": None, "device_used_bytes": None}
    free, total = torch.cuda.mem_get_info(bench.device)
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(bench.device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(bench.device),
        "device_used_bytes": total - free,
    }
