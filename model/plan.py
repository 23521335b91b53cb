"""What a run will do, calculated before it is queued: a model of one training step on N GPUs, no GPU needed.

    python train.py bielik-7b --plan --gpus 256 --gpu gh200-96 --nic-gbs 25 --gpus-per-node 4
    python train.py bielik-7b --plan --gpus 8..2048        a table and plan.png: where it stops scaling

Everything here is a model, never a measurement. A step is its matrix products and attention at a share of the tensor
cores' peak, its other kernels at a share of the memory bandwidth, and FSDP's collectives, layer by layer, beside them:
forward, layer l + 1 is gathered while layer l computes; backward, layer l - 1 is gathered and layer l + 1 reduced. What
does not fit into these windows is exposed, and so are always the first gather and the last reduction. FLOPs, bytes and
messages are roofline.py's, exactly; what is assumed are the constants below, and bench/published.py says how far the
model is from published runs that had no part in choosing them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halny.model import roofline
from halny.model.durable import in_words
from halny.model.exits import Refused
from halny.model.settings import unknown

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig

# ---------------------------------------------------------------------------------------------------- stated constants


@dataclass(frozen=True)
class Rates:
    """What a program reaches, as shares of the data sheet's peaks, and what it wastes."""

    matmul: float  # of the dense bf16 peak, in matrix products
    attention: float  # of the same, in attention, forward and backward, FLOPs as roofline.attention_flops counts them
    memory: float  # of the memory bandwidth, in all other kernels
    layer_gap_s: float  # idle a layer, forward and backward together: launches, waits
    straggling: float  # of the step, each time the number of nodes doubles: the slowest rank, others' network traffic


# The first three are for kernels as fast as the best public ones on Hopper: 790, 740 and 690 of 989.5 TFLOP/s in matrix
# products; attention's 52.8 TFLOP of four sequences of 4,096 in 109, 122 and 135 ms (FlashAttention 3); 4.3, 3.7 and
# 3.4 of an H200's 4.8 TB/s (its copy bandwidth; quack; Liger-Kernel). Straggling is assumed. "published" is fitted to
# the runs in bench/published.py (a test fits it again), its attention FlashAttention 2's rate (350 TFLOP/s).
RATES = {
    "ideal": Rates(0.798, 0.489, 0.896, 0.0, 0.0),
    "leading": Rates(0.748, 0.438, 0.771, 0.02e-3, 0.005),
    "good": Rates(0.697, 0.395, 0.708, 0.3e-3, 0.010),
    "published": Rates(0.6, 0.354, 0.708, 0.3e-3, 0.010),
}

# Assumed for every machine; --preflight measures them on the real one.
NIC_SHARE = 0.85  # of a NIC's line rate that collectives reach
NVLINK_SHARE = 0.80  # of NVLink's: NCCL's bus bandwidth on eight H100 is some 360 of 450 GB/s
HOP_S = 5e-6  # a collective's latency for each node in its ring
OVERHEAD_BYTES = 3e9  # CUDA context, gradients on their way, a layer's working memory, the allocator's fragments
POWER_SHARE = 0.9  # of the board's limit, drawn on average while training
CHUNK_ROWS = 2048  # rows of logits at once


@dataclass(frozen=True)
class Machine:
    name: str  # in roofline.GPUS
    nvlink: float  # bytes/s a GPU and direction inside the node
    watts: float  # the board's limit
    host_copy: float  # bytes/s into pinned host memory, a rank

    @property
    def gpu(self) -> roofline.GPU:
        return roofline.GPUS[self.name]


# NVLink and watts are the data sheets' (half of the bidirectional total; of GH200, the whole module with its CPU).
# Copies: PCIe 4 and 5 x16 with two GPUs sharing one are assumed, and two thirds of a GH200's 450 GB/s of NVLink-C2C.
MACHINES = {
    "a100-40": Machine("NVIDIA A100-SXM4-40GB", 300e9, 400, 12e9),
    "a100-80": Machine("NVIDIA A100-SXM4-80GB", 300e9, 400, 12e9),
    "h100-80": Machine("NVIDIA H100 80GB HBM3", 450e9, 700, 25e9),
    "h200-141": Machine("NVIDIA H200", 450e9, 700, 25e9),
    "gh200-96": Machine("NVIDIA GH200 480GB", 450e9, 1000, 300e9),
    "gh200-144": Machine("NVIDIA GH200 144G HBM3e", 450e9, 1000, 300e9),
    "b200-180": Machine("NVIDIA B200", 900e9, 1000, 25e9),
}

# ------------------------------------------------------------------------------------------------------ the step's model


@dataclass(frozen=True)
class Cluster:
    gpu: roofline.GPU
    gpus: int
    gpus_per_node: int
    nvlink: float  # bytes/s a GPU and direction
    nic: float  # bytes/s a GPU

    @property
    def node(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.node


@dataclass(frozen=True)
class Sharding:
    """Weights cut into ``shards`` on neighbouring GPUs; gpus / shards replicas of them."""

    name: str
    shards: int
    gathered_again: int = 0  # for the backward, among so many ranks (roofline.collectives); 0 all, 1 kept: not at all


@dataclass(frozen=True)
class Work:
    """What one GPU computes in an optimizer step."""

    config: MistralConfig
    micro_batch: int
    seq_len: int
    accumulation: int = 1
    lean: bool = True
    recomputed: float = 0.0  # share of the layers' forward matrix products that the backward computes again
    recomputes_attention: bool = False
    reduce_bytes: int = 4  # of a gradient on the network

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len


@dataclass(frozen=True)
class Step:
    """The parts of an optimizer step in seconds, one after another; ``total`` is their sum."""

    matmul: float
    attention: float
    memory_bound: float
    optimizer: float
    gaps: float
    exposed: float  # communication that nothing hides
    straggling: float
    hidden: float  # communication beside computation: no part of the total

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) - self.hidden


def collective_s(c: roofline.Collective, cluster: Cluster) -> float:
    """Seconds of one collective: a pipelined ring over NVLink inside the nodes and all of a node's NICs between them.

    Of a message of B bytes among n nodes of g GPUs, each NIC carries B (n - 1) / n / g, each NVLink B (g - 1) / g; the
    slower of the two counts, and a hop of latency a node. An all-reduce is a reduce-scatter and an all-gather; replicas
    are whole nodes apart, so there each GPU's NIC carries its own shard.
    """
    inside = 1 if c.kind == "all-reduce" else min(c.ranks, cluster.node)
    nodes, passes = c.ranks // inside, 2 if c.kind == "all-reduce" else 1
    nic_s = c.bytes * (nodes - 1) / nodes / inside / (cluster.nic * NIC_SHARE)
    nvlink_s = c.bytes * (inside - 1) / inside / (cluster.nvlink * NVLINK_SHARE)
    return passes * (max(nic_s, nvlink_s) + HOP_S * (nodes - 1))


def micro_step_s(
    n_layers: int,
    forward: float,
    head: float,
    backward: float,
    gather: float,
    gather_again: float,
    gather_root: float,
    reduce: float,
    reduce_root: float,
    communicators: int,
) -> float:
    """Seconds from the start of a micro step to its last reduction, FSDP2's order of work played through.

    forward, backward: a layer's computation; head: forward and backward of the head. One communicator serves gathers and
    reductions in the order they were issued, and a layer's reduction waits for the one before it; with two, gathers go
    first, reductions take what bandwidth is left, and two may be waiting.
    """
    network = now = gather_root
    ends = []
    for layer in range(n_layers):
        network = max(network, ends[layer - 2] if layer >= 2 else 0.0) + gather  # two layers in flight
        now = max(now, network) + forward
        ends.append(now)
    gathered = max(network, now) + gather_again  # the last layer's, beside the head
    now += head
    network, waiting = max(network, gathered), 0.0  # waiting: seconds of reductions not yet done, two communicators
    for layer in reversed(range(n_layers)):
        start = max(now, gathered)
        again = gather_again if layer else 0.0
        if communicators == 1:
            now = max(start + backward, network if layer < n_layers - 1 and reduce else 0.0)
            gathered = max(network, start) + again
            network = max(gathered, now) + reduce
        else:
            gathered = start + again
            now = start + backward
            waiting = max(0.0, waiting - max(0.0, backward - again))
            if waiting > reduce:
                now, waiting = now + waiting - reduce, reduce
            waiting += reduce
    end = network if communicators == 1 else now + waiting
    return max(end, now) + reduce_root


def step(work: Work, cluster: Cluster, sharding: Sharding, rates: Rates, communicators: int = 2) -> Step:
    """The model of one optimizer step."""
    config, gpu, tokens = work.config, cluster.gpu, work.tokens
    n_layers, n_micro = config.n_layers, work.accumulation
    flops = gpu.bf16_flops
    matmul_s = 2 * roofline.layer_matmul_parameters(config) * tokens / (flops * rates.matmul)
    attention_s = roofline.attention_flops(config, [work.seq_len] * work.micro_batch) / n_layers
    attention_s = attention_s / 3 / (flops * rates.attention)  # forward; the backward is two such
    bandwidth = gpu.hbm_bytes_per_second * rates.memory
    copied = roofline.padded_numel(roofline.layer_shapes(config), sharding.shards)
    forward_bytes, backward_bytes = (n * tokens for n in roofline.memory_bound_bytes(config, 2, work.lean))
    forward_bytes += 4 * copied  # bf16 out of the gather's buffer: read and written
    backward_bytes += (4 if sharding.gathered_again != 1 else 0) * copied + 6 * copied  # bf16 into fp32 to be reduced
    head_matmul_s = 6 * config.vocab_size * config.dim * tokens / (flops * rates.matmul)
    head_s = head_matmul_s + roofline.head_bytes(config, tokens, 2, CHUNK_ROWS) / bandwidth

    again_matmul_s = work.recomputed * matmul_s
    again_attention_s = attention_s if work.recomputes_attention else 0.0
    again_bytes = work.recomputed * forward_bytes
    forward_s = matmul_s + attention_s + forward_bytes / bandwidth + rates.layer_gap_s / 3
    backward_s = 2 * (matmul_s + attention_s) + again_matmul_s + again_attention_s
    backward_s += (backward_bytes + again_bytes) / bandwidth + rates.layer_gap_s * 2 / 3

    replicas = cluster.gpus // sharding.shards
    seconds = dict.fromkeys(("gather", "gather_again", "gather_root", "reduce", "reduce_root"), 0.0)
    for c in roofline.collectives(
        config, sharding.shards, replicas, sharding.gathered_again, reduce_bytes=work.reduce_bytes
    ):
        name = "gather" if c.kind == "all-gather" else "reduce"
        name += "_root" if c.group == "root" else "_again" if name == "gather" and c.when == "backward" else ""
        seconds[name] += collective_s(c, cluster)
    timed = (n_layers, forward_s, head_s, backward_s)
    last = micro_step_s(*timed, **seconds, communicators=communicators)
    others = micro_step_s(*timed, **seconds | {"reduce": 0.0, "reduce_root": 0.0}, communicators=communicators)
    compute_s = n_layers * (forward_s + backward_s) + head_s
    exposed = last + (n_micro - 1) * others - n_micro * compute_s

    gathers = n_layers * (seconds["gather"] + seconds["gather_again"]) + seconds["gather_root"]
    network_s = n_micro * gathers + n_layers * seconds["reduce"] + seconds["reduce_root"]
    optimizer_s = 36 * roofline.shard_numel(config, sharding.shards) / bandwidth  # AdamW 28 B a weight, the norm 4, zero 4
    busy = n_micro * compute_s + optimizer_s + exposed
    return Step(
        matmul=n_micro * (n_layers * (3 * matmul_s + again_matmul_s) + head_matmul_s),
        attention=n_micro * n_layers * (3 * attention_s + again_attention_s),
        memory_bound=n_micro
        * (n_layers * (forward_bytes + backward_bytes + again_bytes) / bandwidth + head_s - head_matmul_s),
        optimizer=optimizer_s,
        gaps=n_micro * n_layers * rates.layer_gap_s,
        exposed=exposed,
        straggling=busy * rates.straggling * math.log2(cluster.nodes),
        hidden=network_s - exposed,
    )


def tokens_per_second(work: Work, step: Step) -> float:
    """Tokens/s a GPU."""
    return work.accumulation * work.tokens / step.total


# -------------------------------------------------------------------------------------------------- sharding and memory


def shardings(cluster: Cluster) -> list[Sharding]:
    """The choices that are compared; of equal ones, the first."""
    n, node = cluster.gpus, cluster.node
    choices = [Sharding("FSDP, gathered again", n)]
    if cluster.nodes > 1:
        choices.append(Sharding("FSDP, gathered again in the node", n, node))
    choices.append(Sharding("FSDP, kept gathered", n, 1))
    for nodes in (8, 1):
        if nodes < cluster.nodes and cluster.nodes % nodes == 0:
            choices.append(Sharding(f"HSDP {nodes * node} x {cluster.nodes // nodes}", nodes * node))
    return choices


def memory(work: Work, cluster: Cluster, sharding: Sharding) -> dict[str, int]:
    """Bytes on the fullest rank at the peak, by part."""
    config = work.config
    parts = asdict(
        roofline.memory_estimate(
            config, sharding.shards, work.micro_batch, work.seq_len, 2, work.lean, logits_chunk_rows=CHUNK_ROWS
        )
    )
    layers = 2 * config.n_layers * roofline.padded_numel(roofline.layer_shapes(config), sharding.shards)
    if sharding.gathered_again:
        parts["kept for the backward"] = layers // sharding.gathered_again
    if work.accumulation > 1:
        parts["accumulated gradients"] = 4 * roofline.parameters(config)  # whole: only the last micro step reduces
    return {name.replace("_", " "): size for name, size in parts.items()} | {"overhead, assumed": int(OVERHEAD_BYTES)}


@dataclass(frozen=True)
class Choice:
    sharding: Sharding
    step: Step  # at the rates called good
    memory: int
    fits: bool


def compare(work: Work, cluster: Cluster) -> list[Choice]:
    """Every sharding's step and memory."""
    return [
        Choice(s, step(work, cluster, s, RATES["good"]), size, size <= cluster.gpu.memory_bytes)
        for s in shardings(cluster)
        for size in [sum(memory(work, cluster, s).values())]
    ]


def best(choices: list[Choice]) -> Choice:
    """The fastest that fits; of those within half a percent of it, the smallest; where none fits, the smallest."""
    fitting = [c for c in choices if c.fits]
    if not fitting:
        return min(choices, key=lambda c: c.memory)
    fastest = min(c.step.total for c in fitting)
    return min((c for c in fitting if c.step.total <= 1.005 * fastest), key=lambda c: c.memory)


# ---------------------------------------------------------------------------------------------------- the command's part


@dataclass(frozen=True)
class Request:
    """What --plan is asked, of the recipe and about the machine."""

    config: MistralConfig
    batch_tokens: int
    seq_len: int
    micro_batch: int | None
    steps: int
    save_every: int
    gpus: str  # "256", or a range of powers of two, "8..2048"
    gpu: str
    nic_gbs: float  # of each GPU, GB/s
    gpus_per_node: int


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
    if not (first.isdecimal() and (last.isdecimal() or not dots)) or int(first) < 1 or len(gpus) > 16:
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
    """A GPU's share of the recipe's batch; the recipe's micro batch, or the most below it that divides the share."""
    r = request
    if r.batch_tokens % (r.seq_len * gpus):
        samples = r.batch_tokens // r.seq_len
        would = [str(n) for n in range(1, samples + 1) if samples % n == 0 and n & (n - 1) == 0] or ["1"]
        raise Refused(
            f"--gpus {gpus}: --batch-tokens {r.batch_tokens} is {r.batch_tokens / r.seq_len:g} samples of "
            f"--seq-len {r.seq_len}, which {gpus} do not divide; {', '.join(would)} GPUs would, or another --batch-tokens"
        )
    share = r.batch_tokens // r.seq_len // gpus
    micro_batch = max(n for n in range(1, (r.micro_batch or 8) + 1) if share % n == 0)
    return Work(r.config, micro_batch, r.seq_len, share // micro_batch)


def run(request: Request, plot: Path | None = None) -> str:
    """The answer to --plan: a table for one number of GPUs, a sweep for a range. Refused for what cannot be."""
    if request.seq_len > request.config.max_seq_len:
        raise Refused(f"--seq-len {request.seq_len} is beyond the model's limit of {request.config.max_seq_len} positions")
    counts = gpu_counts(request.gpus)
    clusters = [cluster_of(request, n) for n in counts]
    if len(counts) == 1:
        return one(request, work_of(request, counts[0]), clusters[0])
    return sweep(request, clusters, plot)


def one(request: Request, work: Work, cluster: Cluster) -> str:
    """The plan for one number of GPUs."""
    r, m, config = request, machine(request.gpu), request.config
    choices = compare(work, cluster)
    chosen = best(choices)
    per_token = roofline.flops_per_token(config, r.seq_len)
    lines = [
        "a model of the run, calculated from stated constants (model/plan.py): nothing here is measured",
        "",
        f"machine    {cluster.gpus} x {m.name}, {cluster.node} a node; {r.nic_gbs:g} GB/s a NIC, NVLink "
        f"{m.nvlink / 1e9:g} GB/s, peak {m.gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
        f"model      {roofline.parameters(config):,} parameters; {per_token / 1e9:.2f} GFLOP a token, "
        f"{per_token * r.batch_tokens / 1e15:,.1f} PFLOP a step",
        f"batch      {r.batch_tokens:,} tokens = {cluster.gpus} GPUs x {work.accumulation} accumulated x "
        f"{work.micro_batch} x {r.seq_len}",
        "",
        f"{'sharding':<34}{'memory':>9}{'fits':>6}{'step':>10}{'network':>10}{'hidden':>9}{'exposed':>9}{'':>7}"
        f"{'tokens/s/GPU':>14}",
    ]
    for c in choices:
        s = c.step
        lines.append(f"{c.sharding.name:<34}{in_words(c.memory):>9}{'yes' if c.fits else 'no':>6}{s.total * 1e3:>7.0f} ms"
            f"{(s.hidden + s.exposed) * 1e3:>7.0f} ms{s.hidden * 1e3:>6.0f} ms{s.exposed * 1e3:>6.0f} ms"
            f"{s.exposed / s.total:>7.1%}{tokens_per_second(work, s):>14,.0f}"
            f"{'  <- default' if c is chosen else ''}")  # fmt: skip
    why = (
        "the fastest that fits; of those within half a percent, the one with the least memory"
        if chosen.fits
        else "none fits: take a smaller --micro-batch, more GPUs, or GPUs with more memory; shown is the smallest"
    )
    lines += [f"default    {chosen.sharding.name}: {why}", ""]

    parts = memory(work, cluster, chosen.sharding)
    lines += [f"memory of the fullest rank, of {in_words(m.gpu.memory_bytes)}"]
    lines += [f"  {name:<24}{in_words(size):>10}" for name, size in parts.items()]
    lines += [f"  {'left':<24}{in_words(max(0, m.gpu.memory_bytes - chosen.memory)):>10}", ""]

    lines += [f"{'communication of a step':<34}{'times':>7}{'bytes each':>12}{'ranks':>7}{'each':>10}{'all':>10}"]
    for c in roofline.collectives(
        config, chosen.sharding.shards, cluster.gpus // chosen.sharding.shards, chosen.sharding.gathered_again,
        work.accumulation,
    ):  # fmt: skip
        each = collective_s(c, cluster)
        lines.append(f"  {f'{c.kind}, {c.group}, {c.when}':<32}{c.count:>7}{in_words(c.bytes):>12}{c.ranks:>7}"
            f"{each * 1e3:>7.2f} ms{c.count * each * 1e3:>7.0f} ms")  # fmt: skip
    s = chosen.step
    lines += [f"  {s.hidden * 1e3:.0f} ms of it hide behind {(s.total - s.exposed - s.straggling) * 1e3:.0f} ms of "
        f"computation, {s.exposed * 1e3:.0f} ms ({s.exposed / s.total:.1%}) are exposed", ""]  # fmt: skip

    steps = {name: step(work, cluster, chosen.sharding, rates) for name, rates in RATES.items()}
    lines += ["a step, ms" + " " * 14 + "".join(f"{name:>11}" for name in steps)]
    names = ("matmul", "attention", "memory_bound", "optimizer", "gaps", "exposed", "straggling", "total")
    for name in names:
        values = "".join(f"{getattr(x, name) * 1e3:>11.0f}" for x in steps.values())
        lines.append(f"  {name.replace('_', ' '):<22}{values}")
    rate = {name: tokens_per_second(work, x) for name, x in steps.items()}
    lines.append(f"  {'tokens/s/GPU':<22}" + "".join(f"{x:>11,.0f}" for x in rate.values()))
    peak = m.gpu.bf16_flops
    palm = roofline.palm_flops_per_token(config, r.seq_len)
    lines.append(f"  {'MFU':<22}" + "".join(f"{roofline.mfu(x, per_token, peak):>11.1%}" for x in rate.values()))
    lines.append(f"  {'MFU, PaLM formula':<22}" + "".join(f"{roofline.mfu(x, palm, peak):>11.1%}" for x in rate.values()))
    lines.append(f"  {'rates assumed':<22}" + "".join(f"{f'{x.matmul:.0%} {x.memory:.0%}':>11}" for x in RATES.values())
        + "   of the peak in matmuls, of the memory bandwidth")  # fmt: skip
    lines += [
        f"speed      floor {steps['ideal'].total:.3f} s a step, {rate['ideal']:,.0f} tokens/s/GPU; expected "
        f"{rate['good']:,.0f} to {rate['leading']:,.0f} with kernels as good as the best public ones, "
        f"{rate['published']:,.0f} as published runs do",
    ]

    size = roofline.checkpoint_bytes(config, chosen.sharding.shards)
    stall = roofline.checkpoint_stall_s(config, chosen.sharding.shards, m.host_copy)
    saves = -(-r.steps // r.save_every)
    days = {n: (r.steps * steps[n].total + saves * stall) / 86400 for n in ("leading", "good", "published")}
    mwh = {n: cluster.gpus * m.watts * POWER_SHARE * d * 24 / 1e6 for n, d in days.items()}
    # one replica saves: the others hold the same
    lines += [
        f"checkpoint {in_words(12 * roofline.parameters(config))}, {in_words(size)} a rank; a save stalls {stall:.3f} s at "
        f"{in_words(m.host_copy)}/s, every {r.save_every} steps {stall / (r.save_every * s.total):.4%} of the time",
        f"time       {r.steps:,} steps, {r.steps * r.batch_tokens / 1e9:,.1f} billion tokens: {days['leading']:.1f} to "
        f"{days['good']:.1f} days, {days['published']:.1f} as published runs do; {cluster.gpus * days['good'] * 24:,.0f} "
        "GPU hours (no evaluation, no queue)",
        f"energy     {mwh['leading']:,.1f} to {mwh['good']:,.1f} MWh, {mwh['published']:,.1f} as published runs do: "
        f"{m.watts:g} W a board at {POWER_SHARE:.0%}, assumed; hosts, network and cooling come on top",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- sweep


def sweep(request: Request, clusters: list[Cluster], plot: Path | None) -> str:
    """A line a number of GPUs, with the recipe's batch and with a batch that grows with the GPUs; what moves the limit."""
    r = request
    grown = Work(r.config, r.micro_batch or 4, r.seq_len)
    lines = [
        "a model, calculated from stated constants (model/plan.py), at the rates called good: nothing here is measured",
        f"{r.gpu}, {r.nic_gbs:g} GB/s a NIC, {r.gpus_per_node} a node; left the recipe's batch of {r.batch_tokens:,} "
        f"tokens, right {grown.micro_batch} x {r.seq_len} tokens a GPU, whatever the batch",
        "",
        f"{'GPUs':>6}{'batch/GPU':>12}  {'sharding':<34}{'memory':>9}{'exposed':>9}{'tokens/s/GPU':>14}   |{'exposed':>9}"
        f"{'tokens/s/GPU':>14}{'million tokens/s':>18}",
    ]
    fixed, growing = {}, {}
    for cluster in clusters:
        n = cluster.gpus
        other = best(compare(grown, cluster))
        growing[n] = tokens_per_second(grown, other.step), other.step.exposed / other.step.total
        right = f"   |{growing[n][1]:>9.1%}{growing[n][0]:>14,.0f}{n * growing[n][0] / 1e6:>18.2f}"
        right += "" if other.fits else "  does not fit"
        try:
            work = work_of(r, n)
        except Refused:
            lines.append(f"{n:>6}{'-':>12}  {'less than a sample a GPU, or not divisible':<66}".ljust(84) + right)
            continue
        chosen = best(compare(work, cluster))
        fixed[n] = tokens_per_second(work, chosen.step), chosen.step.exposed / chosen.step.total
        memory = in_words(chosen.memory) + ("" if chosen.fits else "!")
        lines.append(
            f"{n:>6}{f'{work.accumulation} x {work.micro_batch}':>12}  {chosen.sharding.name:<34}{memory:>9}"
            f"{fixed[n][1]:>9.1%}{fixed[n][0]:>14,.0f}" + right
        )
    lines += ["! does not fit", "", *limit(r, clusters[-1], grown, fixed, growing)]
    if plot:
        draw(request, fixed, growing, plot)
        lines.append(f"plot       {plot}")
    return "\n".join(lines)


def limit(request: Request, last: Cluster, grown: Work, fixed: dict, growing: dict) -> list[str]:
    """Where it stops scaling, and what would move that, at the largest number of GPUs."""
    lines = []
    for what, series in (("the recipe's batch", fixed), ("a batch that grows", growing)):
        if not series:
            continue
        reference = max(rate for rate, _ in series.values())
        scaling = [n for n, (rate, _) in series.items() if rate >= 0.95 * reference]
        beyond = [n for n in series if n > max(scaling)]
        end = f"below that from {min(beyond)} on" if beyond else "nowhere less in this range above it"
        lines.append(f"{what}: within 95% of its best rate a GPU up to {max(scaling)} GPUs, {end}")
    smallest = replace(grown, micro_batch=1)
    cases = {
        "one sequence a GPU": (smallest, last, 2),
        "micro batch of 2": (replace(grown, micro_batch=2), last, 2),
        f"micro batch of {grown.micro_batch}": (grown, last, 2),
        "one sequence, twice as long": (replace(smallest, seq_len=2 * grown.seq_len), last, 2),
        "one sequence, NICs twice as fast": (smallest, replace(last, nic=2 * last.nic), 2),
        "one sequence, a single communicator": (smallest, last, 1),
    }
    lines += ["", f"what moves the limit, at {last.gpus} GPUs{'':<10}" + f"{'exposed':>9}{'tokens/s/GPU':>14}  sharding"]
    for name, (work, cluster, communicators) in cases.items():
        chosen = best(compare(work, cluster)).sharding
        s = step(work, cluster, chosen, RATES["good"], communicators)
        lines.append(f"  {name:<42}{s.exposed / s.total:>9.1%}{tokens_per_second(work, s):>14,.0f}  {chosen.name}")
    for c in compare(smallest, last):
        if c.sharding.name != best(compare(smallest, last)).sharding.name:
            fits = "" if c.fits else "  does not fit"
            lines.append(
                f"  {'one sequence, ' + c.sharding.name:<42.42}{c.step.exposed / c.step.total:>9.1%}"
                f"{tokens_per_second(smallest, c.step):>14,.0f}{fits}"
            )
    return lines


def draw(request: Request, fixed: dict, growing: dict, path: Path) -> None:
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
        if series:
            counts = list(series)
            speed.plot(counts, [rate for rate, _ in series.values()], marker=marker, label=label)
            share.plot(counts, [100 * exposed for _, exposed in series.values()], marker=marker, label=label)
    everything = fixed | growing
    speed.set(ylabel="tokens/s/GPU", xscale="log")
    speed.set_ylim(0, 1.15 * max(rate for series in (fixed, growing) for rate, _ in series.values()))
    share.set(ylabel="exposed communication, %", xlabel="GPUs", ylim=(0, None))
    speed.set_xscale("log", base=2)
    share.set_xticks(list(everything), [str(n) for n in everything])
    for axes in (speed, share):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, loc="lower left")
    speed.set_title(
        f"modelled, not measured: {roofline.parameters(request.config) / 1e9:.2f} billion parameters on {request.gpu}, "
        f"{request.nic_gbs:g} GB/s a NIC, {request.gpus_per_node} a node",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
