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

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from halny.model.exits import Refused


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs: device, whether it is only a rehearsal, bytes of its last-level cache."""

    device: torch.device
    smoke: bool
    cache_bytes: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"

    @property
    def memory_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(self.device).total_memory if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def bench_on(smoke: bool) -> Bench:
    """The current GPU; with smoke the CPU. Refused without a GPU: what a CPU takes says nothing here."""
    if smoke:
        return Bench(torch.device("cpu"), True, 2**20)
    if not torch.cuda.is_available():
        raise Refused("needs a CUDA GPU; --smoke rehearses on a CPU, at tiny sizes and without figures")
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

    def _schedule(self, call: Call) -> dict:
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
        schedules: dict[str, dict] = {}
        for name, call in calls.items():
            try:
                schedules[name] = self._schedule(call)
            except Exception as error:
                results[name] = error.with_traceback(None)  # whose frames hold tensors
        times = {name: ([], [], []) for name in schedules}
        for i_round in range(self.rounds):
            for name in random.Random(i_round).sample(list(schedules), len(schedules)):
                if name in results:
                    continue
                try:
                    schedule, (kernel, walls, hosts) = schedules[name], times[name]
                    n, burst = schedule["n"], schedule["burst"]
                    kernel.append(self._kernel_round(calls[name], n, i_round * n * burst, schedule["host_ms"], burst))
                    for _ in range(schedule["n_walls"]):
                        wall, one_host = self._wall_round(calls[name], schedule["n_wall"])
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
                    "burst": schedules[name]["burst"],
                }
        return results


def mark(bench: Bench):
    """A point in the device's time."""
    if not bench.on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(a, b) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


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
