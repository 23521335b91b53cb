"""How this folder measures: two clocks, the ceilings of the machine, the error bound, and files that are whole.

**Kernel time** is what the GPU spends between two CUDA events. The events themselves cost 2 to 3 us, 4% of a kernel of
62 us, so a kernel shorter than BURST_BELOW_MS is called several times between one pair of them, each time on another of
its input sets, and the time is divided; the gap of about a microsecond between kernels is thereby counted, as a
training step pays it. In front of each pair the queue holds first a kernel that only waits, for longer than the host
needs to enqueue all the calls, so that host time cannot show; then a read of four times the L2 cache, so that it holds
nothing of the inputs, and nothing dirty whose write-back would be charged to the call. Inside a burst no set comes
twice, the sets together are several times the cache, and what the calls return is kept until the burst is over:
otherwise the allocator would give every call the same output to write, which would never leave the cache.

**Wall time** is the eager call as a training loop makes it: back to back, nothing in between, so a call whose launch
takes longer than its kernels shows. **Host time** is the part of that before the call returns.

Providers are interleaved, a few calls of each in turn, because clocks drift with temperature and power; and in an order
drawn anew each round, because under a power limit whoever comes after a thrifty kernel finds a higher clock: on an H200
the same attention, measured under two names in one fixed order, differed by 12%. Data are random: a matrix product of
zeros is faster than one of data.

On a CPU the same code runs with perf_counter in place of the events. That is a rehearsal (``smoke`` in every file it
writes), never a figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from halny.kernels.linear_cross_entropy import chunk_rows
from halny.model.estimate import machines, roofline
from halny.model.mistral import MistralConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl"),
)

# -------------------------------------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs: device, whether it is only a rehearsal, bytes of its last-level cache."""

    device: torch.device
    smoke: bool
    cache_bytes: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def bench_on(smoke: bool) -> Bench:
    """The current GPU; with smoke the CPU. Raises RuntimeError without a GPU: what a CPU takes says nothing here."""
    if smoke:
        return Bench(torch.device("cpu"), True, 2**20)
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU; --smoke rehearses on a CPU, at tiny sizes and without figures")
    device = torch.device("cuda", torch.cuda.current_device())
    return Bench(device, False, torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass
class Call:
    """A provider to time: run(i) works on input set i of n_sets; prepare(i), untimed, restores what it spoils."""

    run: Callable[[int], object]
    n_sets: int
    prepare: Callable[[int], None] | None = None


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    """median, p5 and p95 by linear interpolation between the two nearest values."""
    ordered = sorted(milliseconds)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"median": at(0.5), "p5": at(0.05), "p95": at(0.95)}


def summary(rounds: list[list[float]]) -> dict:
    """Of rounds of milliseconds: quantiles over all of them, their number, and each round's own median, raw."""
    every = [t for one in rounds for t in one]
    return quantiles(every) | {"n": len(every), "rounds": [quantiles(one)["median"] for one in rounds]}


BURST_BELOW_MS = 0.3  # a kernel at least as long is timed alone: the events are below 1% of it
BURST_MS, BURST_CALLS = 0.6, 16  # how long a burst should take, and the most calls it may have
WALL_BURST_MS = 20.0  # of wall time; two calls at least
SET_BYTES, MOST_SETS = 3 * 2**29, 64


def sets_for(bench: Bench, n_bytes: int) -> int:
    """How many input sets of n_bytes each: several times the cache together, and as many as a burst has calls."""
    if bench.smoke:
        return 2
    return min(MOST_SETS, max(4, -(-max(4 * bench.cache_bytes, SET_BYTES) // n_bytes)))


def burst_of(kernel_ms: float, n_sets: int) -> int:
    """Calls between a pair of events for a kernel of about that time."""
    if kernel_ms >= BURST_BELOW_MS:
        return 1
    return max(1, min(n_sets, BURST_CALLS, math.ceil(BURST_MS / max(kernel_ms, 1e-6))))


class Clocks:
    """Kernel, wall and host time of calls, interleaved."""

    def __init__(self, bench: Bench, rounds: int = 5, seconds_a_call: float = 0.12, least: int = 2):
        """rounds turns of every call, each of at least ``least`` runs and about seconds_a_call in all."""
        self.bench, self.rounds, self.seconds_a_call, self.least = bench, rounds, seconds_a_call, least
        # 4-byte elements, summed: a read of four times the cache
        self._flushed = torch.zeros(bench.cache_bytes, dtype=torch.float32, device=bench.device)
        self._flush_ms = self._once(self._flush)
        self._cycles_a_ms = 0.0
        if bench.on_gpu:
            cycles = 10**7
            self._cycles_a_ms = cycles / self._once(lambda: torch.cuda._sleep(cycles))

    def _flush(self) -> None:
        self._flushed.sum()

    def _wait(self, ms: float) -> None:
        """Put a kernel into the queue that does nothing for so long."""
        if self.bench.on_gpu:
            torch.cuda._sleep(int(ms * self._cycles_a_ms))

    def _once(self, work: Callable[[], object]) -> float:
        """Milliseconds of work, waiting before and after; the least of five."""
        least = float("inf")
        for _ in range(5):
            self.bench.synchronize()
            start = time.perf_counter()
            work()
            self.bench.synchronize()
            least = min(least, (time.perf_counter() - start) * 1e3)
        return least

    def _kernel_round(self, call: Call, n: int, first: int, host_ms: float, burst: int = 1) -> list[float]:
        """Milliseconds a call of n bursts, from the input set ``first`` on."""
        marks = []
        for start in range(first, first + n * burst, burst):
            sets = [i % call.n_sets for i in range(start, start + burst)]
            if call.prepare:
                for i in sets:
                    call.prepare(i)
            self._wait(0.1 + 2 * burst * host_ms)
            self._flush()
            before = mark(self.bench)
            kept = [call.run(i) for i in sets]
            marks.append((before, mark(self.bench)))
            del kept
        self.bench.synchronize()
        return [milliseconds_between(*pair) / burst for pair in marks]

    def _wall_round(self, call: Call, n: int) -> tuple[float, float]:
        """(wall, host) milliseconds a call, over one burst through the first n input sets."""
        if call.prepare:
            for i in range(n):
                call.prepare(i)
        self.bench.synchronize()
        start = time.perf_counter()
        for i in range(n):
            call.run(i)
        returned = time.perf_counter()
        self.bench.synchronize()
        wall = (time.perf_counter() - start) * 1e3 / n
        return wall, (returned - start) * 1e3 / n

    def _plan(self, call: Call) -> dict:
        """What a round of the call consists of: bursts, calls a burst, host time, wall rounds and their calls."""
        self._wall_round(call, 1)  # compiles
        wall, host = self._wall_round(call, min(call.n_sets, 2))  # fills the allocator
        n_wall = min(call.n_sets, max(2, int(WALL_BURST_MS / wall)))
        wall, host = self._wall_round(call, n_wall)
        kernel = min(self._kernel_round(call, 1 if wall > WALL_BURST_MS else 2, 0, host))
        burst = burst_of(kernel, call.n_sets)
        turn_ms = burst * (kernel + 2 * host) + 0.1 + 2 * self._flush_ms
        n = int(self.seconds_a_call * 1e3 / self.rounds / turn_ms)
        least = self.least if self.bench.smoke or kernel < WALL_BURST_MS else 1
        n = least if self.bench.smoke else max(least, min(20, n))
        n_walls = 1 if wall * n_wall > WALL_BURST_MS else max(1, min(n, 3))
        return {"n": n, "burst": burst, "host_ms": host, "n_wall": n_wall, "n_walls": n_walls}

    def time(self, calls: dict[str, Call]) -> dict[str, dict | Exception]:
        """name -> {"kernel_ms", "wall_ms", "host_ms"} of summaries and "burst", or the exception that a call raised."""
        results: dict[str, dict | Exception] = {}
        plans: dict[str, dict] = {}
        for name, call in calls.items():
            try:
                plans[name] = self._plan(call)
            except Exception as error:
                results[name] = error.with_traceback(None)  # whose frames hold tensors
        times = {name: ([], [], []) for name in plans}
        for i_round in range(self.rounds):
            for name in random.Random(i_round).sample(list(plans), len(plans)):
                if name in results:
                    continue
                try:
                    plan, (kernel, walls, hosts) = plans[name], times[name]
                    n, burst = plan["n"], plan["burst"]
                    kernel.append(self._kernel_round(calls[name], n, i_round * n * burst, plan["host_ms"], burst))
                    for _ in range(plan["n_walls"]):
                        wall, one_host = self._wall_round(calls[name], plan["n_wall"])
                        walls.append(wall)
                        hosts.append(one_host)
                except Exception as error:
                    results[name] = error.with_traceback(None)
        for name, (kernel, walls, hosts) in times.items():
            if name not in results:
                results[name] = {
                    "kernel_ms": summary(kernel),
                    "wall_ms": summary([[w] for w in walls]),
                    "host_ms": summary([[h] for h in hosts]),
                    "burst": plans[name]["burst"],
                }
        return results


def peak_bytes(bench: Bench, call: Call) -> int | None:
    """Bytes a call allocates at its peak above what is there before it; None on a CPU, which does not count them."""
    if call.prepare:
        call.prepare(0)
    if not bench.on_gpu:
        return None
    bench.synchronize()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    call.run(0)
    bench.synchronize()
    return torch.cuda.max_memory_allocated(bench.device) - before


# ------------------------------------------------------------------------------------------------------------- ceilings

# Matrix products of a 7B step, [m, k] by [k, n], m the tokens of a micro batch: one a linear layer, forward; and the
# head's three over one of its chunks of 4,096 rows.
STEP_PRODUCTS = {
    "qkv": (16384, 4096, 6144),
    "out": (16384, 4096, 4096),
    "gate_up": (16384, 4096, 28672),
    "down": (16384, 14336, 4096),
    "gate_up, input gradient": (16384, 28672, 4096),
    "gate_up, weight gradient": (28672, 16384, 4096),
}
HEAD_PRODUCTS = {
    "head": (4096, 4096, 32000),
    "head, input gradient": (4096, 32000, 4096),
    "head, weight gradient": (32000, 4096, 4096),
}


def copy_call(bench: Bench, n_bytes: int) -> Call:
    """A device-to-device copy that moves n_bytes, read plus written, under the clock as an operation is."""
    n_sets, half = sets_for(bench, n_bytes), max(1, n_bytes // 2)
    sources = [torch.randint(0, 255, (half,), dtype=torch.uint8, device=bench.device) for _ in range(n_sets)]
    targets = [torch.empty_like(source) for source in sources]
    return Call(lambda i: targets[i].copy_(sources[i]), n_sets)


def copy_rate(bench: Bench) -> dict:
    """GB/s of a copy of 2 GiB, bytes read plus bytes written: what no memory-bound kernel can beat."""
    n_bytes = 2**22 if bench.smoke else 2**31
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    milliseconds = Clocks(bench).time({"copy": Call(lambda _: target.copy_(source), 1)})["copy"]
    if isinstance(milliseconds, Exception):
        raise milliseconds
    return {"gb_s": 2 * n_bytes / milliseconds["kernel_ms"]["median"] / 1e6, "kernel_ms": milliseconds["kernel_ms"]}


def product_rates(bench: Bench, products: dict[str, tuple[int, int, int]]) -> dict[str, dict]:
    """name -> TFLOP/s of torch's bf16 matrix product (cuBLAS) on random data at each shape."""
    calls, flops = {}, {}
    for name, (m, k, n) in products.items():
        if bench.smoke:
            m, k, n = m // 128, k // 128, n // 128
        x, w = (torch.randn(*shape, device=bench.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        calls[name], flops[name] = Call(lambda _, x=x, w=w: x @ w, 1), 2 * m * k * n
    rates = {}
    for name, result in Clocks(bench).time(calls).items():
        if isinstance(result, Exception):
            raise result
        median = result["kernel_ms"]["median"]
        rates[name] = {"tflop_s": flops[name] / median / 1e9, "flops": flops[name], "kernel_ms": result["kernel_ms"]}
    return rates


def combined_rate(rates: dict[str, dict]) -> float:
    """TFLOP/s of several products one after another."""
    return sum(r["flops"] for r in rates.values()) / sum(r["kernel_ms"]["median"] for r in rates.values()) / 1e9


def ceilings(bench: Bench) -> dict:
    """What this machine can do, measured now: "copy" in GB/s; "step", "head" and "square" (8192^3) in TFLOP/s."""
    step, head = product_rates(bench, STEP_PRODUCTS), product_rates(bench, HEAD_PRODUCTS)
    square = product_rates(bench, {"square": (8192, 8192, 8192)})
    copy = copy_rate(bench)
    return {
        "copy_gb_s": copy["gb_s"],
        "step_tflop_s": combined_rate(step),
        "head_tflop_s": combined_rate(head),
        "square_tflop_s": square["square"]["tflop_s"],
        "products": step | head | square,
        "copy": copy,
    }


# ------------------------------------------------------------------------------------------------------- training steps

# What every figure of a mode of bench/step.py says of itself, in the same cell or sentence.
MODE_LABELS = {
    "rank-of-256": "one rank of 256, emulated, no network",
    "one-gpu": "training on one GPU",
    "model-of-256": "calculated",
}


def step_words(row: dict) -> str:
    """A row of step.json in a sentence, without its label."""
    if "range" in row:
        r = row["range"]
        (low, high), (slow, fast), mfu, palm = r["tokens_per_second"], r["step_ms"], r["mfu"], r["mfu_palm"]
        return (
            f"{low:,.0f} to {high:,.0f} tokens/s, step {slow:,.0f} to {fast:,.0f} ms, MFU {mfu[0]:.1%} to {mfu[1]:.1%} "
            f"(PaLM's formula {palm[0]:.1%} to {palm[1]:.1%}), {r['memory_bytes'] / 2**30:.1f} GiB"
        )
    ms, memory = row["step_ms"], memory_words(row)
    share = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%} (PaLM's formula {row['mfu_palm']:.1%})"
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, step {ms['median']:,.1f} ms (p5 {ms['p5']:,.1f}, p95 "
        f"{ms['p95']:,.1f}, {ms['n']} steps), MFU {share}, {row['of_ceiling']:.1%} of the measured matmul ceiling"
        + (f", {memory}" if memory else "")
    )


def memory_words(row: dict) -> str:
    """Its peak, what roofline.py had estimated, and what of both is in the place of a network."""
    if row["peak_memory_bytes"] is None:
        return ""
    estimated, stand_in = row.get("estimated_bytes"), row.get("stand_in_bytes", 0)
    said = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
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
    marks = [mark(bench)]
    gc.collect()
    gc.disable()
    try:
        for i in range(n_steps):
            step(i)
            marks.append(mark(bench))
        bench.synchronize()
    finally:
        gc.enable()
    return summary([list(itertools.starmap(milliseconds_between, itertools.pairwise(marks)))])


def mark(bench: Bench):
    """A point in the device's time."""
    if not bench.on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(a, b) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


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


def products_of(config: MistralConfig, n_tokens: int) -> dict[str, tuple[str, int, int, int, int]]:
    """name -> (kind, rows, out, in, times a step) of every matrix product of a step on n_tokens, out and in a weight's.

    forward: x [rows, in] by w [out, in] transposed; input gradient: dy [rows, out] by w; weight gradient: dy transposed
    by x. The head's come a chunk of rows at a time (kernels/linear_cross_entropy.py).
    """
    weights = {
        "qkv": ((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, config.dim),
        "out": (config.dim, config.n_heads * config.head_dim),
        "gate_up": (2 * config.hidden_dim, config.dim),
        "down": (config.dim, config.hidden_dim),
    }
    rows = chunk_rows(n_tokens, config.vocab_size, config.dim, 2)
    found = {}
    for kind in ("forward", "input gradient", "weight gradient"):
        for name, (n_out, n_in) in weights.items():
            found[f"{name}, {kind}"] = kind, n_tokens, n_out, n_in, config.n_layers
        found[f"head, {kind}"] = kind, rows, config.vocab_size, config.dim, -(-n_tokens // rows)
    return found


def matmul_ceiling(bench: Bench, config: MistralConfig, n_tokens: int, seconds: float = 2.0) -> dict:
    """The step's own matrix products and nothing else, by torch (cuBLAS) in bf16 on random data, back to back.

    In turn and without a pause for about ``seconds``, so clocks and power are those of work that goes on. tflop_s and
    ms are of all products of a step, ``products`` has each one's median.
    """
    products = products_of(config, n_tokens)
    if bench.smoke:
        products = {name: (kind, 8, 16, 16, times) for name, (kind, *_, times) in products.items()}
    # x, dy and w of all products are views of three buffers
    shapes = [((rows, n_in), (rows, n_out), (n_out, n_in)) for _, rows, n_out, n_in, _ in products.values()]
    largest = [max(a * b for a, b in one) for one in zip(*shapes, strict=True)]
    flat = [torch.randn(n, device=bench.device, dtype=torch.bfloat16) for n in largest]
    pairs = []
    for (kind, *_), sizes in zip(products.values(), shapes, strict=True):
        x, dy, w = (buffer[: a * b].view(a, b) for buffer, (a, b) in zip(flat, sizes, strict=True))
        pairs.append({"forward": (x, w.T), "input gradient": (dy, w), "weight gradient": (dy.T, x)}[kind])

    def turn() -> list:
        marks = []
        for a, b in pairs:
            marks.append(mark(bench))
            torch.mm(a, b)
        return [*marks, mark(bench)]

    turn()
    bench.synchronize()
    begun = time.perf_counter()
    turn()
    bench.synchronize()
    n = 2 if bench.smoke else max(5, int(seconds / (time.perf_counter() - begun)))
    turns = [turn() for _ in range(n)]
    bench.synchronize()
    times = [list(itertools.starmap(milliseconds_between, itertools.pairwise(marks))) for marks in turns]
    found, ms, flops = {}, 0.0, 0
    for i, (name, (_, rows, n_out, n_in, n_times)) in enumerate(products.items()):
        median = statistics.median(one[i] for one in times)
        found[name] = {"ms": median, "tflop_s": 2 * rows * n_out * n_in / median / 1e9, "times": n_times}
        ms, flops = ms + n_times * median, flops + n_times * 2 * rows * n_out * n_in
    return {"tflop_s": flops / ms / 1e9, "ms": ms, "flops": flops, "products": found}


class Watch:
    """nvidia-smi beside the work, twice a second: clocks, power and temperature while it went on. Sets nothing."""

    def __enter__(self) -> Watch:
        self._file = tempfile.TemporaryFile("w+")
        self._process = None
        with contextlib.suppress(OSError):
            fields = "clocks.sm,power.draw,temperature.gpu"
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0", "-lms", "500"]
            self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._file.seek(0)
        self.found = watched(self._file.read())
        self._file.close()


def watched(text: str) -> dict | None:
    """Medians of what nvidia-smi printed, and the hottest; None if that is nothing."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            sm, watts, celsius = map(float, line.split(","))
            rows.append((sm, watts, celsius))
    if not rows:
        return None
    sm, watts, celsius = zip(*rows, strict=True)
    return {"n": len(rows), "sm_mhz": statistics.median(sm), "watts": statistics.median(watts), "celsius": max(celsius)}


# ---------------------------------------------------------------------------------------------- a process for each case


def die_with_parent() -> None:
    """Have this process killed when the one that started it is gone, however that ended. On Linux."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def in_its_own_process(arguments: list[str], seconds: float) -> dict:
    """``python *arguments FILE``, which leaves a JSON object in FILE: that object; or why there is none, as "reason".

    So a case's memory is given back whole, and one that crashes, hangs or poisons its CUDA context loses only its row.
    What it wrote before it was ended counts. The process should call ``die_with_parent``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "row.json"
        process = subprocess.Popen([sys.executable, *arguments, str(path)], cwd=ROOT, start_new_session=True)
        reason = None
        try:
            code = process.wait(max(1.0, seconds))
            if code:
                reason = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            reason = f"was not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            row = {"status": "failed", "reason": reason or "its process left nothing"}
        return row | {"reason": row.get("reason") or reason or ""}


# -------------------------------------------------------------------------------------------------------------- errors


def largest(x: Tensor, truth: Tensor | None = None) -> float:
    """max |x - truth|, or max |x|, in fp64, a piece at a time; inf if a value that should be finite is not."""
    if truth is not None and x.shape != truth.shape:
        return float("inf")
    found, flat = 0.0, x.detach().reshape(-1)
    flat_truth = None if truth is None else truth.reshape(-1)
    for start in range(0, flat.numel(), 2**26):
        piece = flat[start : start + 2**26].double()
        if flat_truth is not None:
            piece = piece - flat_truth[start : start + 2**26].double()
        top = piece.abs().max().item()
        if not top < float("inf"):
            return float("inf")
        found = max(found, top)
    return found


def limits(same_dtype: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max |same_dtype - truth|, max |truth|): all that the bound needs, once a case and not once a provider."""
    return largest(same_dtype, truth), largest(truth)


def excess(out: Tensor, truth: Tensor, torch_error: float, largest_truth: float) -> dict[str, float]:
    """The error of out and its bound, 2 torch_error + eps |truth|, each the largest over the tensor; see ``limits``.

    torch_error is of what plain PyTorch makes in the dtype of the inputs, truth what it makes in a wider one; eps is of
    out's dtype. Right is error <= bound.
    """
    bound = 2 * torch_error + torch.finfo(out.dtype).eps * largest_truth
    return {"error": largest(out, truth), "torch_error": torch_error, "bound": bound}


# --------------------------------------------------------------------------------------------------------------- files


def results_folder(bench: Bench, partial: bool = False) -> Path:
    """bench/results/DATE-DEVICE; for a rehearsal, or a part that should not replace the whole, one that git ignores."""
    if bench.smoke or partial:
        return ROOT / "runs" / "bench"
    name = f"{datetime.now(UTC):%Y-%m-%d}-{torch.cuda.get_device_name(bench.device)}"
    return ROOT / "bench" / "results" / re.sub(r"[^A-Za-z0-9.]+", "-", name)


def nvidia_smi() -> dict | None:
    """Clocks, power and temperature now; None where there is no nvidia-smi. Nothing is ever set."""
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = ("driver", "sm_mhz", "memory_mhz", "watts", "watts_limit", "celsius", "utilisation_percent")
    return dict(zip(names, (value.strip() for value in line.strip().split(",")), strict=False))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else "none"
    return found


def commit() -> str:
    """The commit of the code that runs, "+ changes" if it was edited since; "unknown" outside a git checkout."""
    try:
        options = dict(cwd=ROOT, capture_output=True, text=True, check=True)
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
        return f"{name} + changes" if changed else name
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def repeatable(argument: str) -> str:
    """A command's argument as it can be typed elsewhere: paths from the repository on, of others only the name."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def machine(bench: Bench, given_commit: str | None = None) -> dict:
    """What a reader needs to judge or repeat a figure."""
    described = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU",
        "versions": versions(),
        "commit": given_commit or commit(),
        "command": " ".join([Path(sys.executable).name, *map(repeatable, sys.argv)]),
        "nvidia_smi_before": nvidia_smi() if bench.on_gpu else None,
        "nvidia_smi_after": None,
    }  # fmt: skip
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        described |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return described


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step, so that whoever is stopped leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class BadResult(ValueError):
    """A result file that does not say what it must; the message names file and field."""


NUMBER = (int, float)
MACHINE = {"date": str, "device": str, "versions": dict, "commit": str, "command": str}
TIMES = {"median": NUMBER, "p5": NUMBER, "p95": NUMBER, "n": int, "rounds": list}
CEILINGS = {"copy_gb_s": NUMBER, "step_tflop_s": NUMBER, "head_tflop_s": NUMBER, "square_tflop_s": NUMBER}
ROW_WORDS = ("operation", "set", "dtype", "mode", "provider", "package", "call", "status", "reason", "ceiling")
ROW = {
    **dict.fromkeys(ROW_WORDS, str),
    **{"shape": dict, "bytes": int, "flops": int},
}
TIMED_ROW = {"kernel_ms": TIMES, "wall_ms": TIMES, "host_ms": TIMES, "gb_s": NUMBER, "tflop_s": NUMBER,
             "of_ceiling": NUMBER, "errors": dict}  # fmt: skip
AOT_ROW = {"kernel": str, "arch": str, "warps": int, "registers": int, "spills": int, "shared_bytes": int,
           "loads": dict, "stores": dict, "occupancy": (int, float, type(None))}  # fmt: skip
STEP_ROW = {"case": str, "mode": str, "label": str, "status": str, "reason": str}
MAYBE = (int, float, type(None))
TIMED_STEP = {"tokens_per_second": NUMBER, "step_ms": TIMES, "mfu": MAYBE, "mfu_palm": MAYBE, "n_layers": int,
              "micro_batch": int, "seq_len": int, "flops_per_token": NUMBER, "peak_memory_bytes": MAYBE}  # fmt: skip
OF_CEILING = {"of_ceiling": NUMBER, "ceiling_before": {"tflop_s": NUMBER}, "ceiling_after": {"tflop_s": NUMBER}}
RANGE = {"tokens_per_second": list, "step_ms": list, "mfu": list, "mfu_palm": list, "memory_bytes": int}
OPPONENT = {"name": str, "label": str, "status": str, "reason": str, "attempts": list}
GAP = {"part": str, "ms": NUMBER, "kernels_ms": NUMBER, "floor_ms": NUMBER, "gap_ms": NUMBER}
PROFILE = {"wall_ms": NUMBER, "idle_ms": NUMBER, "hidden_communication_ms": NUMBER, "categories_ms": dict,
           "other": list, "gaps": [GAP], "floors": {"basis": str}}  # fmt: skip
CONVERGENCE_SETTING = {
    "weights": int,
    "steps": int,
    "seeds": int,
    "beta2": NUMBER,
    "samples_a_step": int,
    "seq_len": int,
}
CONVERGENCE_ROW = {
    "optimizer": str, "held_out_loss": NUMBER, "spread": NUMBER, "difference": NUMBER, "spread_of_difference": NUMBER,
}  # fmt: skip
TRAINER_ROW = {"name": str, "status": str, "reason": str, "seconds": NUMBER, "from_s": NUMBER, "to_s": NUMBER,
               "command": str, "figures": dict, "said": list}  # fmt: skip

KINDS: dict[str, dict] = {
    "kernels": {"ceilings": CEILINGS, "rows": [ROW]},
    "step": {"rows": [STEP_ROW]},
    "aot": {"rows": [AOT_ROW]},
    "profile": {"profiles": [STEP_ROW]},
    "pass": {"parts": dict},
    "trainer": {"rows": [TRAINER_ROW]},
    "convergence": {"setting": CONVERGENCE_SETTING, "summary": [CONVERGENCE_ROW]},
}


def check(value, form, where: str) -> None:
    """BadResult unless value has the form: a type or types, a dict of required fields, or [form of every entry]."""
    if isinstance(form, dict):
        check(value, dict, where)
        for name, inner in form.items():
            if name not in value:
                raise BadResult(f"{where}.{name} is missing")
            check(value[name], inner, f"{where}.{name}")
    elif isinstance(form, list):
        check(value, list, where)
        for i, entry in enumerate(value):
            check(entry, form[0], f"{where}[{i}]")
    else:
        kinds = form if isinstance(form, tuple) else (form,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadResult(f"{where} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.60}")


def read_result(path: Path) -> dict:
    """A result file of this folder, checked. Raises BadResult naming file and field."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadResult(f"{path.name} is no JSON file that can be read: {error}") from None
    where = path.name
    check(value, {"format": int, "kind": str, "smoke": bool, "machine": MACHINE}, where)
    if value["format"] != 1 or value["kind"] not in KINDS:
        raise BadResult(
            f"{where} has format {value['format']} and kind {value['kind']!r}, which this code does not read"
        )
    check(value, KINDS[value["kind"]], where)
    if value["kind"] == "kernels":
        check_rows(value["rows"], f"{where}.rows", lambda row: TIMED_ROW)
    if value["kind"] == "step":
        check(value.get("opponents", []), [OPPONENT], f"{where}.opponents")
        timed = TIMED_STEP | OF_CEILING
        check_rows(value["rows"], f"{where}.rows", lambda row: {"range": RANGE} if "range" in row else timed)
        check_rows(value.get("opponents", []), f"{where}.opponents", lambda row: TIMED_STEP)
    if value["kind"] == "profile":
        check_rows(value["profiles"], f"{where}.profiles", lambda row: PROFILE)
    for rows in ("rows", "profiles"):
        if value["kind"] in ("step", "profile"):
            check_labels(value.get(rows, []), f"{where}.{rows}")
    return value


def check_rows(rows: list[dict], where: str, form: Callable[[dict], dict]) -> None:
    """BadResult unless every row that has figures has those of its form."""
    for i, row in enumerate(rows):
        if row["status"] == "ok":
            check(row, form(row), f"{where}[{i}]")


def check_labels(rows: list[dict], where: str) -> None:
    """BadResult unless every row of a mode of bench/step.py says in its label which that is."""
    for i, row in enumerate(rows):
        if row["mode"] not in MODE_LABELS or MODE_LABELS[row["mode"]] not in row["label"]:
            said = MODE_LABELS.get(row["mode"], "one that is known")
            raise BadResult(f"{where}[{i}] is of mode {row['mode']!r}, so its label must say {said!r}, "
                            f"got {row['label']!r:.60}")  # fmt: skip
