"""What a person sees of a run while it goes: its steps, a bar on a terminal, where time goes that nobody expected.

The last needs no measuring and no waiting: the loop knows how long a step took, what it waited for data and spent on
checkpoints and evaluation, and the watch knows the time of a fixed matrix product on each rank. What these do not
explain is communication that nothing hides, kernels slower than expected, or on one rank a host that gives the device
its work too late; --preflight and a profile tell.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from halny.model.data.order import step_numbers
from halny.model.estimate import machines, roofline, step_time
from halny.model.estimate.work import Layout, Work
from halny.model.exits import Failed
from halny.model.record.run_folder import RunFolder
from halny.model.run.evaluation import loss_metrics, perplexity_in_words
from halny.model.run.optimizer import NOT_FINITE, SPIKE, SPIKE_SKIPPED
from halny.model.run.ranks import World, say
from halny.model.run.resolve import RunSpec
from halny.model.run.watch import Probe, Watch


class Journal:
    """Writes down the steps of a run, each one step late: it owns the step in flight.

    skips   updates skipped in a row up to the last step written down
    step_s  how long that step took, by the device's clock: from its end of the step before to its end of this one. The
            host's says when it came to look, which is late where the host, not the device, is what a run waits for
    """

    def __init__(self, spec: RunSpec, world: World, folder: RunFolder, watch: Watch, spent: dict[str, float]):
        self.spec, self.world, self.folder, self.watch, self.spent = spec, world, folder, watch, spent
        self.skips, self.step_s = 0, 0.0
        self._in_flight: InFlight | None = None

    def begin(self, first: int) -> None:
        """The loop begins, with step ``first``."""
        self.progress = Progress(self.world, first, self.spec.recipe.steps)
        self.gap = Gap.of_run(self.spec.work, self.spec.layout, self.world)
        self.probe = Probe(self.world.device)
        self._ended = mark(self.world.device)

    def add(self, step: int, values: Tensor, lr: float, data_wait_s: float) -> None:
        """A step that the device has been given: ``values`` as train_step returns them. The one before is settled."""
        self.settle()
        self._in_flight = InFlight.after(step, values, lr, data_wait_s)
        if isinstance(self._in_flight.ended, float):  # on the CPU there is nothing to wait for
            self.settle()

    def settle(self) -> None:
        """Write down the step in flight. Raises Failed if too many updates were skipped."""
        settled, self._in_flight = self._in_flight, None
        if settled is None:
            return
        settled.wait()
        self.step_s, self._ended = seconds_between(self._ended, settled.ended), settled.ended
        line, remark = settled.line(self.spec, self.world, self.step_s)
        self.skips = self.skips + 1 if "skipped" in line else 0
        self.watch.probe(self.probe.seconds())
        self.gap.add(self.step_s, line["data_wait_s"])
        self.spent["waiting for data"] = self.spent.get("waiting for data", 0.0) + line["data_wait_s"]
        if self.world.is_main:
            self.folder.log(line)
            self.progress.show(line)
            self.progress.complain(self.watch.slowest)
            if line["step"] % self.progress.every == 0 and (text := self.gap.words(self.watch.slowest)):
                say(self.world, text)
        most = self.spec.recipe.max_skips
        if self.skips > most:
            samples = step_numbers(line["step"], self.spec.samples_a_step)
            raise Failed(f"{remark}, {self.skips} in a row now (--max-skips {most}). Its samples have the numbers "
                f"{samples[0]} to {samples[-1]}; --replay-step {line['step']} looks into them")  # fmt: skip
        if remark:
            say(self.world, remark)

    def close(self) -> None:
        self.progress.close()


@dataclass
class InFlight:
    """A step whose metrics are still on the device: read one step late, so that the host never waits for the device."""

    step: int
    values: Tensor  # as train_step returns them, on the host
    ended: Mark
    lr: float
    data_wait_s: float

    @classmethod
    def after(cls, step: int, values: Tensor, lr: float, data_wait_s: float) -> InFlight:
        device = values.device
        if device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        return cls(step, values, mark(device), lr, data_wait_s)

    def wait(self) -> None:
        """Until the device is through with the step."""
        if not isinstance(self.ended, float):
            self.ended.synchronize()

    def line(self, spec: RunSpec, world: World, step_s: float) -> tuple[dict, str | None]:
        """Its metrics line, and what is to be said of its update if it was skipped or a spike.

        step_s: seconds from the end of the step before to the end of this one.
        """
        *sums, pairs, grad_norm, verdict, median = self.values.tolist()
        recipe = spec.recipe
        rate = recipe.batch_tokens / world.size / step_s
        flops = roofline.step_flops(spec.model, recipe.batch_tokens, pairs)
        line = {
            "step": self.step,
            **loss_metrics(*sums),
            "lr": self.lr,
            "grad_norm": grad_norm,
            "tokens": self.step * recipe.batch_tokens,
            "tokens_per_second_per_gpu": rate,
            "mfu": machines.mfu(rate, flops / recipe.batch_tokens, spec.peak_flops),
            "peak_memory_gib": peak_memory_bytes(world) / 2**30,
            "data_wait_s": self.data_wait_s,
        }
        if world.device.type == "cuda" and (retries := torch.cuda.memory_stats()["num_alloc_retries"]):
            line["alloc_retries"] = retries  # memory is so short that the allocator had to give up its cache
        what = f"step {self.step}: loss {line['loss']:.4g}, gradient norm {grad_norm:.4g}"
        if verdict in (SPIKE, SPIKE_SKIPPED):
            what += f", a spike over the median of {median:.4g}"
            line["spike"] = True
        if verdict in (NOT_FINITE, SPIKE_SKIPPED):
            line["skipped"] = True
            what += "; the update was skipped"
        return line, what if verdict else None


Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The moment when the device is through with what it has been given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Mark, after: Mark) -> float:
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3


def peak_memory_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Gap:
    """Adds up steps until ``words`` asks.

    expected     the step that --plan expects; None for a device that it does not know: only what is lost is named
    tokens       of a rank in a step
    probe_s      seconds that the watch's matrix product takes at the rate that --plan expects
    """

    def __init__(self, expected: step_time.StepTime | None, tokens: int, probe_s: float | None = None):
        self.expected, self.tokens, self.probe_s = expected, tokens, probe_s
        self.steps, self.seconds, self.spent = -1, 0.0, {}  # the first step sets up, and is left out

    @classmethod
    def of_run(cls, work: Work, layout: Layout, world: World) -> Gap:
        """Held against step_time.py's step at the rates that it calls good, on a GPU that it knows, in bf16."""
        tokens = work.accumulation * work.tokens
        cluster = step_time.cluster_of_run(world.device_name, world.size, world.node_size)
        if cluster is None or work.compute_bytes != 2:
            return cls(None, tokens)
        good = step_time.RATES["good"]
        step = step_time.step(work, cluster, layout, good)
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
        alone = self.expected.exposed + self.expected.hidden == 0
        rest = "slower kernels, or a late host" if alone else "communication that nothing hides, or slower kernels"
        parts[rest] = max(0.0, lost - sum(parts.values()))
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
        figures = [f"loss {m['loss']:.4f}", rate, *mfu, f"ppl {perplexity_in_words(m['perplexity'])}",
            f"acc {m['accuracy']:.2%}", f"{m['peak_memory_gib']:.2f} GiB"]  # fmt: skip
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
