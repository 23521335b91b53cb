"""What a run will do, calculated before it is queued: the answer to train.py --plan, in tables. No GPU is needed.

    python train.py bielik-7b --plan --gpus 256 --gpu gh200-96 --nic-gbs 25 --gpus-per-node 4
    python train.py bielik-7b --plan --gpus 8..2048        a table and plan.png: where it stops scaling
    python train.py mistral-7b-1gpu --plan --gpus 1 --gpu h100-80       what fits on one GPU, by --moments

Everything here is calculated, never measured: micro batch, layout and recompute are what the trainer itself would
decide (choices.py), memory is memory.py's, and a step's time step_time.py's, from rates that are stated there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halny.model.durable import duration, in_words, replacing
from halny.model.estimate import machines, roofline, sizes
from halny.model.estimate.choices import Decided, Decision, best_interval_s, decide, divisors, expect_save, recomputed
from halny.model.estimate.machines import MACHINES, Machine
from halny.model.estimate.memory import (
    MOMENT_BYTES,
    RESERVED,
    checkpoint_bytes,
)
from halny.model.estimate.step_time import RATES, Cluster, StepTime, collective_s, step, tokens_per_second
from halny.model.estimate.work import Work
from halny.model.exits import Refused, unknown

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


POWER_SHARE = 0.9  # of the board's limit, drawn on average while training


# ------------------------------------------------------------------------------------------------- layouts side by side


@dataclass(frozen=True)
class Choice(Decided):
    """A decision on one machine, with its step at the rates called good."""

    decision: Decision
    step: StepTime
    memory: dict[str, int]  # bytes on the fullest rank at the peak, by part
    fits: bool

    @property
    def name(self) -> str:
        """Of the layout, and where that has none, of AdamW's moments."""
        return self.layout.name if self.layout.fsdp else f"none, moments in {self.work.moments}"

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


def choose(work: Work, cluster: Cluster, recompute: str = "auto", **asked) -> Choice:
    """What the trainer decides for these micro batches on this machine, where ``asked`` (shard, reshard) leaves it."""
    decision = decide(
        work.config, ranks=cluster.gpus, node=cluster.node, memory_bytes=cluster.gpu.memory_bytes, seq_len=work.seq_len,
        share=work.micro_batch * work.accumulation, micro_batch=work.micro_batch, recompute=recompute,
        moments=work.moments, **asked,
    )  # fmt: skip
    parts = decision.memory | {"reserved, assumed": int(RESERVED * cluster.gpu.memory_bytes)}
    fits = sum(parts.values()) <= cluster.gpu.memory_bytes
    return Choice(decision, step(decision.work, cluster, decision.layout, RATES["good"]), parts, fits)


def compare(work: Work, cluster: Cluster, recompute: str = "auto") -> list[Choice]:
    """Side by side: gathered again everywhere, in the node, not at all; HSDP in groups of eight nodes and of one.

    For one GPU AdamW's moments in fp32, bf16 and 8 bits.
    """
    if cluster.gpus == 1:
        return [choose(replace(work, moments=moments), cluster, recompute) for moments in MOMENT_BYTES]
    asked = [{"reshard": "always"}, {"reshard": "node"}, {"reshard": "never"}]
    if cluster.nodes == 1:
        del asked[1]  # it is the first again
    asked += [{"shard": n * cluster.node} for n in (8, 1) if n < cluster.nodes and cluster.nodes % n == 0]
    return [choose(work, cluster, recompute, **options) for options in asked]


# --------------------------------------------------------------------------------------------------- the command's part


@dataclass(frozen=True)
class Request:
    """What --plan is asked, of the recipe and about the machine."""

    config: MistralConfig
    batch_tokens: int
    seq_len: int
    micro_batch: int | None
    steps: int
    save_every: int | str  # steps, or "auto" by mtbf_hours
    gpus: str  # "256", or a range of powers of two, "8..2048"
    gpu: str
    nic_gbs: float  # of each GPU, GB/s
    gpus_per_node: int
    shard: int | None = None
    replicate: int | None = None
    reshard: str | None = None
    moments: str = "fp32"  # AdamW's, on one GPU
    recompute: str = "auto"
    mtbf_hours: float | None = None

    @property
    def asked(self) -> dict:
        """What is asked for of the layout, as ``choose`` takes it."""
        asked = {"shard": self.shard, "replicate": self.replicate, "reshard": self.reshard}
        return {name: value for name, value in asked.items() if value is not None}


def machine(name: str) -> Machine:
    """A machine by our short name or the driver's; Refused, listing those known."""
    by_name = {m.name: m for m in reversed(MACHINES.values())} | MACHINES
    if name not in by_name:
        refusal = unknown("--gpu", name, MACHINES)
        raise refusal if "there are" in str(refusal) else Refused(f"{refusal} Known are {', '.join(MACHINES)}")
    return by_name[name]


def gpu_counts(gpus: str) -> list[int]:
    """The counts that --gpus asks for: one, or the doublings of a range."""
    first, dots, last = gpus.partition("..")
    numbers = [first, last] if dots else [first]
    if len(gpus) > 16 or not all(n.isascii() and n.isdecimal() and int(n) for n in numbers):
        raise Refused(f"--gpus must be a number or a range such as 8..2048, got {gpus!r}")
    if not dots:
        return [int(first)]
    if int(last) < int(first):
        raise Refused(f"--gpus {gpus} ends below its beginning; write {last}..{first}")
    return [int(first) << i for i in range((int(last) // int(first)).bit_length())]


def cluster_of(request: Request, gpus: int) -> Cluster:
    m, node = machine(request.gpu), request.gpus_per_node
    if gpus > node and gpus % node:
        near = " or ".join(str(n * node) for n in (gpus // node, gpus // node + 1))
        raise Refused(f"--gpus {gpus} is not a multiple of --gpus-per-node {node}; use {near}")
    return Cluster(m.gpu, gpus, node, m.nvlink, request.nic_gbs * 1e9)


def work_of(request: Request, gpus: int) -> Work:
    """A GPU's share of the batch, in micro batches of the recipe's size or the most below it that divides the share."""
    r = request
    samples, rest = divmod(r.batch_tokens, r.seq_len)
    if rest or not samples:
        raise Refused(f"--batch-tokens {r.batch_tokens} is not a multiple of --seq-len {r.seq_len}")
    if samples % gpus:
        possible = [n for n in divisors(samples) if n <= r.gpus_per_node or n % r.gpus_per_node == 0]
        near = sorted(sorted(possible, key=lambda n: abs(math.log(n / gpus)))[:4])
        raise Refused(
            f"--gpus {gpus} do not divide the {samples} samples of --batch-tokens {r.batch_tokens} and --seq-len "
            f"{r.seq_len}; {', '.join(map(str, near))} would, or another --batch-tokens"
        )
    share, micro_batch = samples // gpus, None
    if r.micro_batch is not None:
        micro_batch = max(n for n in divisors(share) if n <= r.micro_batch)
    cluster = cluster_of(r, gpus)
    return decide(
        r.config, ranks=gpus, node=cluster.node, memory_bytes=cluster.gpu.memory_bytes, seq_len=r.seq_len, share=share,
        micro_batch=micro_batch, recompute=r.recompute, moments=r.moments, **r.asked,
    ).work  # fmt: skip


def answer(request: Request, plot: Path | None = None) -> str:
    """The answer to --plan: a table for one number of GPUs, a sweep for a range. Refused for what cannot be."""
    if request.seq_len > request.config.max_seq_len:
        raise Refused(
            f"--seq-len {request.seq_len} is beyond the model's limit of {request.config.max_seq_len} positions"
        )
    counts = gpu_counts(request.gpus)
    clusters = [cluster_of(request, n) for n in counts]
    if len(counts) == 1:
        return one(request, work_of(request, counts[0]), clusters[0])
    return sweep(request, clusters, plot)


def one(request: Request, work: Work, cluster: Cluster) -> str:
    """The plan for one number of GPUs."""
    r, m, config = request, machine(request.gpu), request.config
    chosen = choose(work, cluster, r.recompute, **r.asked)
    work, choices = chosen.work, compare(work, cluster, r.recompute)
    if all(c.name != chosen.name for c in choices):
        choices.append(chosen)
    per_token = roofline.flops_per_token(config, r.seq_len)
    lines = [
        "a model of the run, calculated from stated constants (model/estimate/step_time.py): nothing here is measured",
        "",
        f"machine    {cluster.gpus} x {m.name}, {cluster.node} a node; {r.nic_gbs:g} GB/s a NIC, NVLink "
        f"{m.nvlink / 1e9:g} GB/s, peak {m.gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
        f"model      {sizes.parameters(config):,} parameters; {per_token / 1e9:.2f} GFLOP a token, "
        f"{per_token * r.batch_tokens / 1e15:,.1f} PFLOP a step",
        f"batch      {r.batch_tokens:,} tokens = {cluster.gpus} GPUs x {work.accumulation} accumulated x "
        f"{work.micro_batch} x {r.seq_len}"
        + (
            f"; the trainer will want --micro-batch {work.micro_batch}: {r.micro_batch} does not divide a rank's share"
            if r.micro_batch and work.micro_batch != r.micro_batch
            else ""
        ),
        "",
        f"{'sharding, at the rates called good':<36}{'memory':>9}{'fits':>6}{'step':>11}{'network':>10}{'hidden':>10}"
        f"{'exposed':>10}{'':>7}{'tokens/s/GPU':>14}",
    ]
    asked = r.asked if cluster.gpus > 1 else r.moments != "fp32"
    for c in choices:
        s = c.step
        lines.append(
            f"{c.name:<36}{in_words(c.bytes):>9}{'yes' if c.fits else 'no':>6}{s.total * 1e3:>8,.0f} ms"
            f"{(s.hidden + s.exposed) * 1e3:>7,.0f} ms{s.hidden * 1e3:>7,.0f} ms{s.exposed * 1e3:>7,.0f} ms"
            f"{s.exposed / s.total:>7.1%}{tokens_per_second(work, s):>14,.0f}"
            + ("  <- " + ("asked for" if asked else "default") if c.name == chosen.name else "")
        )
    lines.append(f"chosen     {chosen.name}: {chosen.layout.reshard_why}")
    lines.append(f"recompute  {recomputed(work)}: {chosen.decision.recompute_why}")
    if not chosen.fits:
        smaller = "" if cluster.gpus > 1 or work.moments == "8bit" else "--moments 8bit, "
        lines.append(
            f"memory     does not fit: take {smaller}a smaller --micro-batch, more GPUs, or GPUs with more memory"
        )
    lines += ["", f"memory of the fullest rank, of {in_words(m.gpu.memory_bytes)}"]
    lines += [f"  {name:<24}{in_words(size):>10}" for name, size in chosen.memory.items()]
    left = m.gpu.memory_bytes - chosen.bytes
    lines += [f"  {'left' if left >= 0 else 'MISSING':<24}{in_words(abs(left)):>10}", ""]

    if cluster.gpus > 1:
        lines += communication_lines(work, cluster, chosen)

    steps = {name: step(work, cluster, chosen.layout, rates) for name, rates in RATES.items()}
    rate = {name: tokens_per_second(work, x) for name, x in steps.items()}
    peak, palm = m.gpu.bf16_flops, roofline.palm_flops_per_token(config, r.seq_len)

    def row(name: str, values) -> str:
        return f"  {name:<22}" + "".join(f"{value:>11}" for value in values)

    lines.append(f"{'a step, ms':<24}" + "".join(f"{name:>11}" for name in steps))
    for name in ("matmul", "attention", "memory_bound", "optimizer", "gaps", "exposed", "straggling", "total"):
        lines.append(row(name.replace("_", " "), (f"{getattr(x, name) * 1e3:,.0f}" for x in steps.values())))
    lines += [
        row("tokens/s/GPU", (f"{x:,.0f}" for x in rate.values())),
        row("MFU", (f"{machines.mfu(x, per_token, peak):.1%}" for x in rate.values())),
        row("MFU, PaLM's formula", (f"{machines.mfu(x, palm, peak):.1%}" for x in rate.values())),
        row("assumed: matmul", (f"{x.matmul:.0%}" for x in RATES.values())) + "  of the peak",
        row("assumed: attention", (f"{x.attention:.0%}" for x in RATES.values())) + "  of the peak",
        row("assumed: memory", (f"{x.memory:.0%}" for x in RATES.values())) + "  of the bandwidth",
        row("assumed: straggling", (f"{x.straggling:.1%}" for x in RATES.values())) + "  a doubling of the nodes",
        "",
        f"speed      floor {steps['ideal'].total:.3f} s a step, {rate['ideal']:,.0f} tokens/s/GPU; expected "
        f"{rate['good']:,.0f} to {rate['leading']:,.0f} with kernels as good as the best public ones; "
        f"{rate['published']:,.0f} at the rates of published runs",
    ]

    whole, size = (checkpoint_bytes(config, work.moments, shards) for shards in (1, chosen.layout.shard))
    stall, writing = expect_save(config, work.moments, chosen.layout.shard, m.name)
    every = r.save_every
    if r.mtbf_hours is not None:
        every = max(1, round(best_interval_s(stall, writing, r.mtbf_hours * 3600) / s.total))
    hours = {name: (r.steps * x.total + r.steps // every * stall) / 3600 for name, x in steps.items()}
    mwh = {name: cluster.gpus * m.watts * POWER_SHARE * h / 1e6 for name, h in hours.items()}
    lines += [
        f"checkpoint {in_words(whole)}, {in_words(size)} a rank; a save stalls {stall:.3f} "
        f"s at {in_words(m.host_copy)}/s, every {every} steps "
        + (f"({duration(every * s.total)}, best for --mtbf-hours {r.mtbf_hours:g}) " if r.mtbf_hours else "")
        + f"{stall / (every * s.total):.4%} of it",
        f"time       {r.steps:,} steps of {r.steps * r.batch_tokens / 1e9:,.1f} billion tokens: "
        f"{in_days(hours['leading'])} to {in_days(hours['good'])}, {in_days(hours['published'])} at published rates; "
        f"{cluster.gpus * hours['good']:,.0f} GPU hours (evaluation and queue come on top)",
        f"energy     {mwh['leading']:,.2f} to {mwh['good']:,.2f} MWh, {mwh['published']:,.2f} at published rates: "
        f"{m.watts:g} W a board at {POWER_SHARE:.0%}, assumed; hosts, network and cooling come on top",
    ]
    return "\n".join(lines)


def communication_lines(work: Work, cluster: Cluster, chosen: Choice) -> list[str]:
    """Every collective of a step, and what of them hides."""
    lines = [f"{'communication of a step':<34}{'times':>7}{'bytes each':>12}{'ranks':>7}{'each':>10}{'all':>11}"]
    for c in roofline.collectives(
        work.config, chosen.layout.shard, cluster.gpus // chosen.layout.shard, chosen.layout.gathered_again,
        work.accumulation, holds_gradients=chosen.layout.holds_gradients,
    ):  # fmt: skip
        each = collective_s(c, cluster)
        lines.append(
            f"  {f'{c.kind}, {c.group}, {c.when}':<32}{c.count:>7}{in_words(c.bytes):>12}{c.ranks:>7}"
            f"{each * 1e3:>7.2f} ms{c.count * each * 1e3:>8,.0f} ms"
        )
    s = chosen.step
    return [
        *lines,
        f"  {s.hidden * 1e3:,.0f} ms of it hide behind {(s.total - s.exposed - s.straggling) * 1e3:,.0f} ms of work, "
        f"{s.exposed * 1e3:,.0f} ms ({s.exposed / s.total:.1%}) are exposed",
        "",
    ]


def in_days(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep(request: Request, clusters: list[Cluster], plot: Path | None) -> str:
    """A line a number of GPUs, with the recipe's batch and with one that grows with the GPUs; what moves the limit."""
    r = request
    grown = Work(r.config, r.micro_batch or 4, r.seq_len, moments=r.moments)
    lines = [
        "a model, calculated from stated constants (step_time.py), at the rates called good: nothing here is measured",
        f"{r.gpu}, {r.nic_gbs:g} GB/s a NIC, {r.gpus_per_node} a node, sharding as the trainer chooses it. Left the "
        f"recipe's batch of {r.batch_tokens:,} tokens, right {grown.micro_batch} x {r.seq_len} tokens a GPU",
        "",
        f"{'GPUs':>6}{'batch/GPU':>11}  {'sharding':<25}{'memory':>9}{'exposed':>9}{'tokens/s/GPU':>14}{'of best':>9}"
        f"   |{'exposed':>9}{'tokens/s/GPU':>14}{'of best':>9}{'million tokens/s':>18}",
    ]
    fixed: dict[int, tuple[Work, Choice]] = {}
    growing = {cluster.gpus: (grown, choose(grown, cluster, r.recompute, **r.asked)) for cluster in clusters}
    reasons = {}
    for cluster in clusters:
        try:
            work = work_of(r, cluster.gpus)
        except Refused as refusal:
            reasons[cluster.gpus] = str(refusal)
        else:
            fixed[cluster.gpus] = work, choose(work, cluster, r.recompute, **r.asked)
    for n in growing:
        if n in fixed:
            work, chosen = fixed[n]
            batch = f"{work.accumulation} x {work.micro_batch}"
            memory = in_words(chosen.bytes) + ("" if chosen.fits else "!")
            left = f"{batch:>11}  {chosen.name.removeprefix('FSDP, '):<25}{memory:>9}{columns(fixed, n)}"
        else:
            left = f"{'-':>11}  {'not divisible':<66}"
        work, chosen = growing[n]
        million = n * tokens_per_second(work, chosen.step) / 1e6
        lines.append(f"{n:>6}{left}   |{columns(growing, n)}{million:>18.2f}{'' if chosen.fits else '!'}")
    lines += ["! does not fit", *reasons.values(), "", *limit(r, clusters[-1], grown, fixed, growing)]
    if plot:
        draw(request, fixed, growing, plot)
        lines.append(f"\nplot       {plot}")
    return "\n".join(lines)


Series = dict[int, tuple[Work, Choice]]  # number of GPUs -> what each computes, and how


def rates_of(series: Series) -> dict[int, float]:
    return {n: tokens_per_second(work, chosen.step) for n, (work, chosen) in series.items()}


def columns(series: Series, n: int) -> str:
    rates, step = rates_of(series), series[n][1].step
    return f"{step.exposed / step.total:>9.1%}{rates[n]:>14,.0f}{rates[n] / max(rates.values()):>9.1%}"


def limit(request: Request, last: Cluster, grown: Work, fixed: Series, growing: Series) -> list[str]:
    """Where it stops scaling, and what would move that for one sequence a GPU at the largest number of GPUs."""
    lines = []
    for what, series in (("the recipe's batch", fixed), ("a batch that grows", growing)):
        if series:
            rates = rates_of(series)
            best = max(rates.values())
            scaling = max(n for n, rate in rates.items() if rate >= 0.9 * best)
            beyond = [n for n in rates if n > scaling]
            end = f"at {beyond[0]} {rates[beyond[0]] / best:.0%}" if beyond else "the end of this range"
            lines.append(f"{what + ':':<20} at least 90% of its best rate a GPU up to {scaling} GPUs, {end}")
    base, asked = replace(grown, micro_batch=1), request.asked | {"recompute": request.recompute}
    plain = choose(base, last, **asked)
    cases = [("one sequence a GPU", base, last, plain)]
    compared = compare(base, last, request.recompute)
    cases += [("  HSDP", base, last, c) for c in compared if c.layout.shard < last.gpus]
    cases += [("  kept gathered", base, last, choose(base, last, request.recompute, reshard="never"))]
    for name, work, cluster in (
        ("  NICs twice as fast", base, replace(last, nic=2 * last.nic)),
        ("  sequence twice as long", replace(base, seq_len=2 * base.seq_len), last),
        ("  micro batch of 2", replace(base, micro_batch=2), last),
        ("  micro batch of 4", replace(base, micro_batch=4), last),
    ):
        cases.append((name, work, cluster, choose(work, cluster, **asked)))
    lines += ["", f"{f'what moves the limit, at {last.gpus} GPUs':<40}{'exposed':>9}{'tokens/s/GPU':>14}  sharding"]
    for name, work, _, c in cases:
        lines.append(f"{name:<40}{c.step.exposed / c.step.total:>9.1%}{tokens_per_second(work, c.step):>14,.0f}  "
            f"{c.name}{'' if c.fits else ', does not fit'}")  # fmt: skip
    return lines


def draw(request: Request, fixed: Series, growing: Series, path: Path) -> None:
    """Tokens/s/GPU and the exposed share over the number of GPUs, written to path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, share = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for label, series, marker in (
        (f"batch of {request.batch_tokens / 1e6:.1f} million tokens", fixed, "o"),
        ("batch grows with the GPUs", growing, "s"),
    ):
        rates = rates_of(series)
        exposed = [100 * c.step.exposed / c.step.total for _, c in series.values()]
        speed.plot(list(rates), list(rates.values()), marker=marker, label=label)
        share.plot(list(rates), exposed, marker=marker, label=label)
    speed.set(ylabel="tokens/s/GPU")
    speed.set_ylim(0, 1.15 * max(rates_of(growing).values()))
    share.set(ylabel="exposed communication, %", xlabel="GPUs", ylim=(0, None))
    speed.set_xscale("log", base=2)
    share.set_xticks(list(growing), [str(n) for n in growing])
    for axes in (speed, share):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, loc="lower left")
    speed.set_title(
        f"modelled, not measured: {sizes.parameters(request.config) / 1e9:.2f} billion parameters on {request.gpu}, "
        f"{request.nic_gbs:g} GB/s a NIC, {request.gpus_per_node} a node",
        fontsize=10,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=120)
    except OSError as error:
        raise Refused(f"cannot write the plot {path}: {error.strerror}; name another --run-dir") from None
