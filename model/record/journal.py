"""What a person sees of a run while it goes: rank 0's lines, a bar on a terminal, and where the time goes that
the plan did not expect.

Nothing is measured for the latter and nothing waited for: the loop knows how long a step took, what it waited for data
and spent on checkpoints and evaluation, and the watch knows the time of a fixed matrix product on each rank. What these
do not explain is communication that nothing hides, or kernels slower than expected; ``--preflight`` and a profile tell.
"""

from __future__ import annotations

import contextlib
import sys
import time

import torch
from tqdm import tqdm

from halny.model.estimate import step_time
from halny.model.estimate.work import Layout, Sharding, Work
from halny.model.run.ranks import World, say
from halny.model.run.watch import Probe


class Gap:
    """Adds up steps until ``words`` asks.

    expected     the plan's step; None for a device that it does not know: then only what is lost is named
    tokens       of a rank in a step
    probe_s      seconds that the watch's matrix product takes at the rate that the plan expects
    """

    def __init__(self, expected: step_time.Step | None, tokens: int, probe_s: float | None = None):
        self.expected, self.tokens, self.probe_s = expected, tokens, probe_s
        self.steps, self.seconds, self.spent = -1, 0.0, {}  # the first step sets up, and is left out

    @classmethod
    def of_run(cls, work: Work, layout: Layout, dtype: torch.dtype, world: World) -> Gap:
        """Held against step_time.py's step at the rates that it calls good, on a GPU that it knows, in bf16."""
        tokens = work.accumulation * work.tokens
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        cluster = step_time.cluster_of_run(name, world.size, world.node_size)
        if cluster is None or dtype != torch.bfloat16:
            return cls(None, tokens)
        good = step_time.RATES["good"]
        step = step_time.step(work, cluster, Sharding.of(layout), good)
        return cls(step, tokens, Probe.flops(world.device) / (cluster.gpu.bf16_flops * good.matmul))

    def add(self, step_s: float, data_wait_s: float) -> None:
        self.steps += 1
        if self.steps:
            self.seconds += step_s
            self._spend("waiting for data", data_wait_s)

    @contextlib.contextmanager
    def spending(self, what: str):
        began = time.perf_counter()
        yield
        self._spend(what, time.perf_counter() - began)

    def _spend(self, what: str, seconds: float) -> None:
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    def parts(self, slowest: dict | None) -> dict[str, float]:
        """Seconds a step by cause. What slow products cost is an estimate, from the time of one of them."""
        parts = {what: seconds / self.steps for what, seconds in self.spent.items()}
        step_s = self.seconds / self.steps
        compute_s = self.expected.matmul + self.expected.attention if self.expected else step_s
        if slowest and slowest["seconds"] > 1.05 * slowest["median"]:
            slower = slowest["seconds"] / slowest["median"] - 1
            if self.expected is None:  # step_s is of a step that it has slowed already
                slower /= 1 + slower
            parts[f"slow rank {slowest['rank']} on {slowest['host']}"] = compute_s * slower
        if slowest and self.probe_s and slowest["median"] > 1.05 * self.probe_s:
            parts["matrix products slower on all ranks"] = compute_s * (slowest["median"] / self.probe_s - 1)
        return parts

    def words(self, slowest: dict | None) -> str | None:
        """The steps since the last call in one line, or None where there is nothing to say: a gap below 2% of a step,
        or without an expectation known losses below 10%. ``slowest`` is the watch's comparison of the ranks."""
        if self.steps < 1:
            return None
        step_s, parts = self.seconds / self.steps, self.parts(slowest)
        self.steps, self.seconds, self.spent = 0, 0.0, {}
        if self.expected is None:
            lost = sum(parts.values())
            if lost < 0.1 * step_s:
                return None
            return f"gap        {lost / step_s:.0%} of {step_s * 1e3:,.1f} ms a step: {_listed(parts, lost)}"
        lost = step_s - self.expected.total
        if lost < 0.02 * step_s:
            return None
        parts["communication that nothing hides, or slower kernels"] = max(0.0, lost - sum(parts.values()))
        return (
            f"gap        {self.tokens / step_s:,.0f} tokens/s/GPU, {self.expected.total / step_s:.0%} of the "
            f"{self.tokens / self.expected.total:,.0f} that --plan expects; {lost * 1e3:,.1f} ms a step more: "
            f"{_listed(parts, lost)}"
        )


def _listed(parts: dict[str, float], whole: float) -> str:
    large = sorted(((s, what) for what, s in parts.items() if s > 0.05 * whole), reverse=True)
    return ", ".join(f"{what} {s * 1e3:,.1f}" for s, what in large)


class Progress:
    """The loop's steps, from ``first`` to ``last``: a bar on a terminal, some twenty lines in a log file."""

    def __init__(self, world: World, first: int, last: int):
        self.world, self.first, self.last = world, first, last
        self.start = time.perf_counter()
        self.every = max(1, last // 20)
        self.slow_rank: int | None = None  # the one last complained about
        terminal = world.is_main and sys.stderr.isatty()
        self.bar = None
        if terminal:
            self.bar = tqdm(total=last, initial=first - 1, unit="step", dynamic_ncols=True)

    def show(self, m: dict) -> None:
        """A step's metrics line, as much of it as there is room for."""
        rate = f"{m['tokens_per_second_per_gpu']:,.0f} tokens/s" + ("/GPU" if self.world.device.type == "cuda" else "")
        mfu = [] if m["mfu"] is None else [f"mfu {m['mfu']:.1%}"]
        figures = [f"loss {m['loss']:.4f}", rate, *mfu, f"ppl {m['perplexity']:,.1f}", f"acc {m['accuracy']:.2%}",
            f"{m['peak_memory_gib']:.2f} GiB"]  # fmt: skip
        if self.bar is not None:  # as many as the window has room for, whole: tqdm would cut through a number
            room = (self.bar.format_dict["ncols"] or 80) - 46 - 2 * len(f"{self.bar.total}")
            fit = [f for i, f in enumerate(figures) if len("  ".join(figures[: i + 1])) <= room]
            self.bar.set_postfix_str("  ".join(fit), refresh=False)
            self.bar.update(m["step"] - self.bar.n)
        elif m["step"] % self.every == 0 or m["step"] in (self.first, self.last):
            done, left = m["step"] - self.first + 1, self.last - m["step"]
            eta = int((time.perf_counter() - self.start) / done * left)
            say(self.world, f"step {m['step']:>6}/{self.last}  {'  '.join(figures)}  lr {m['lr']:.2e}  "
                f"norm {m['grad_norm']:.2f}  eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}")  # fmt: skip

    def complain(self, slowest: dict | None) -> None:
        """Name a rank whose own work takes half as long again as the others', once."""
        if slowest and slowest["seconds"] > 1.5 * slowest["median"] and slowest["rank"] != self.slow_rank:
            self.slow_rank = slowest["rank"]
            say(self.world, f"rank {slowest['rank']} on {slowest['host']} is slow: a fixed matrix product takes it "
                f"{slowest['seconds'] * 1e3:.2f} ms, the others {slowest['median'] * 1e3:.2f}")  # fmt: skip

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
