"""Where a run's time goes that the plan did not expect: a line in the log now and then, from what is known anyway.

Nothing is measured for it and nothing waited for: the loop knows how long a step took, what it waited for data and
spent on checkpoints and evaluation, and the watch knows the time of a fixed matrix product on each rank. What these do
not explain is communication that nothing hides, or kernels slower than expected; ``--preflight`` and a profile tell.
"""

from __future__ import annotations

import contextlib
import time

import torch

from halny.model import plan
from halny.model.ranks import Probe, World
from halny.model.sharding import Layout


class Gap:
    """Adds up steps until ``words`` asks.

    expected     the plan's step; None for a device that it does not know: then only what is lost is named
    tokens       of a rank in a step
    probe_s      seconds that the watch's matrix product takes at the rate that the plan expects
    """

    def __init__(self, expected: plan.Step | None, tokens: int, probe_s: float | None = None):
        self.expected, self.tokens, self.probe_s = expected, tokens, probe_s
        self.steps, self.seconds, self.spent = -1, 0.0, {}  # the first step sets up, and is left out

    @classmethod
    def of_run(cls, work: plan.Work, layout: Layout, dtype: torch.dtype, world: World) -> Gap:
        """Held against model/plan.py's step at the rates that it calls good, on a GPU that it knows, in bf16."""
        tokens = work.accumulation * work.tokens
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        cluster = plan.cluster_of_run(name, world.size, world.node_size)
        if cluster is None or dtype != torch.bfloat16:
            return cls(None, tokens)
        good = plan.RATES["good"]
        step = plan.step(work, cluster, plan.Sharding.of(layout), good)
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
