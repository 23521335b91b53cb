"""What a run will do, calculated before it is queued: a model of one training step on N GPUs, no GPU needed.

    python train.py bielik-7b --plan --gpus 256 --gpu gh200-96 --nic-gbs 25 --gpus-per-node 4
    python train.py bielik-7b --plan --gpus 8..2048        a table and plan.png: where it stops scaling
    python train.py mistral-7b-1gpu --plan --gpus 1 --gpu h100-80       what fits on one GPU, by --moments

Everything here is a model, never a measurement. A step is its matrix products and attention at a share of the tensor
cores' peak, its other kernels at a share of the memory bandwidth, and FSDP's collectives, layer by layer, beside them:
forward, layer l + 1 is gathered while layer l computes; backward, layer l - 1 is gathered and layer l + 1 reduced. What
does not fit into these windows is exposed, and so are always the first gather and the last reduction. FLOPs, bytes and
messages are roofline.py's, exactly; what is assumed are the constants below, and bench/published.py says how far the
model is from published runs that had no part in choosing them.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halny.model import roofline
from halny.model.durable import in_words
from halny.model.exits import Refused
from halny.model.roofline import RESERVED
from halny.model.settings import unknown
from halny.model.sharding import Layout, choose_layout

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
# the runs in bench/published.py (a test fits it again), its attention FlashAttention 2's rate (350 TFLOP/s). Measured
# since (bench/results/RESULTS.md): an H200 at its limit of 700 W does 690 to 704 TFLOP/s of a step's products, as
# "good" has it; 353 to 360 in attention by cuDNN, below "good"; copies at 4.25 TB/s, and norms, RoPE and SwiGLU at 95%
# of that, above "leading".
RATES = {
    "ideal": Rates(0.798, 0.489, 0.896, 0.0, 0.0),
    "leading": Rates(0.748, 0.438, 0.771, 0.02e-3, 0.005),
    "good": Rates(0.697, 0.395, 0.708, 0.3e-3, 0.010),
    "published": Rates(0.505, 0.354, 0.708, 0.3e-3, 0.0068),
}

# Assumed for every machine; --preflight measures them on the real one.
NIC_SHARE = 0.85  # of a NIC's line rate that collectives reach
NVLINK_SHARE = 0.80  # of NVLink's: NCCL's bus bandwidth on eight H100 is some 360 of 450 GB/s
HOP_S = 5e-6  # a collective's latency for each node in its ring
POWER_SHARE = 0.9  # of the board's limit, drawn on average while training
NIC = 25e9  # bytes/s a GPU between nodes, for a machine of which only the GPU is known


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

# ----------------------------------------------------------------------------------------------------- the step's model


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
    holds_gradients: bool = True  # whole ones over the micro batches, reduced once

    @classmethod
    def of(cls, layout: Layout) -> Sharding:
        """The trainer's layout, in this module's words."""
        again = (
            {"always": 0, "never": 1}.get(layout.reshard_name) if isinstance(layout.reshard, bool) else layout.reshard
        )
        kept = {0: "gathered again", 1: "kept gathered"}.get(again, f"gathered again among {again}")
        name = f"HSDP {layout.shard} x {layout.replicate}" if layout.replicate > 1 else "FSDP"
        return cls(f"{name}, {kept}", layout.shard, again, layout.holds_gradients)


@dataclass(frozen=True)
class Work:
    """What one GPU computes in an optimizer step."""

    config: MistralConfig
    micro_batch: int
    seq_len: int
    accumulation: int = 1
    lean: bool = True  # the backward makes the outputs of norms and SwiGLU again, instead of keeping them
    whole_logits: bool = False  # the loss is PyTorch's
    moments: str = "fp32"  # AdamW's, where there is one GPU: that does without FSDP (model/optimizer.py)
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
    nodes, passes = -(-c.ranks // inside), 2 if c.kind == "all-reduce" else 1
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

    forward, backward: a layer's computation; head: forward and backward of the head. One communicator serves gathers
    and reductions in the order they were issued, and a layer's reduction waits for the one before it; with two, gathers
    go first and reductions take what bandwidth is left.
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
            waiting += reduce
    end = network if communicators == 1 else now + waiting
    return max(end, now) + reduce_root


def cluster_of_run(gpu_name: str, gpus: int, gpus_per_node: int) -> Cluster | None:
    """The machine that a run is on, by its GPU's name; None for a GPU not in MACHINES, or nodes that are not full."""
    known = [m for m in MACHINES.values() if gpu_name in roofline.GPUS and m.gpu == roofline.GPUS[gpu_name]]
    if not known or gpus % gpus_per_node:
        return None
    return Cluster(known[0].gpu, gpus, gpus_per_node, known[0].nvlink, NIC)


def update_bytes(work: Work, sharding: Sharding | None) -> int:
    """That clipping and update move in a step; sharding None: on one GPU without FSDP, gradients' sums included."""
    config, micro = work.config, work.accumulation
    if sharding is None:
        sums = roofline.gradient_sum_bytes(config, work.moments, micro)
        return roofline.split_update_bytes(config, work.moments, micro) + sums
    return roofline.sharded_update_bytes(roofline.shard_numel(config, sharding.shards))


def copied_again(ranks: int) -> float:
    """Bytes a weight that FSDP2 copies for the second gather, ``ranks`` as in roofline.collectives.

    What arrives is copied out, 4; the part that each of n ranks kept is a clone, and copied into place twice, 12 of it.
    """
    if ranks == 0:
        return 4
    return 0 if ranks == 1 else 4 + 12 / ranks


def step(work: Work, cluster: Cluster, sharding: Sharding, rates: Rates, communicators: int = 2) -> Step:
    """The model of one optimizer step."""
    config, gpu, tokens = work.config, cluster.gpu, work.tokens
    n_layers, n_micro = config.n_layers, work.accumulation
    flops = gpu.bf16_flops
    matmul_s = 2 * roofline.layer_matmul_parameters(config) * tokens / (flops * rates.matmul)
    attention_s = roofline.attention_flops(config, [work.seq_len] * work.micro_batch) / n_layers
    attention_s = attention_s / 3 / (flops * rates.attention)  # forward; the backward is two such
    bandwidth = gpu.hbm_bytes_per_second * rates.memory
    alone = cluster.gpus == 1
    copied = 0 if alone else roofline.padded_numel(roofline.layer_shapes(config), sharding.shards)
    forward_bytes, backward_bytes = (n * tokens for n in roofline.memory_bound_bytes(config, 2, work.lean))
    forward_bytes += 4 * copied  # bf16 out of the gather's buffer: read and written
    backward_bytes += (copied_again(sharding.gathered_again) + 6) * copied  # and bf16 into fp32 to be reduced
    head_matmul_s = 6 * config.vocab_size * config.dim * tokens / (flops * rates.matmul)
    head_s = head_matmul_s + roofline.head_bytes(config, tokens, 2) / bandwidth

    again_matmul_s = work.recomputed * matmul_s
    again_attention_s = attention_s if work.recomputes_attention else 0.0
    again_bytes = work.recomputed * forward_bytes
    forward_s = matmul_s + attention_s + forward_bytes / bandwidth + rates.layer_gap_s / 3
    backward_s = 2 * (matmul_s + attention_s) + again_matmul_s + again_attention_s
    backward_s += (backward_bytes + again_bytes) / bandwidth + rates.layer_gap_s * 2 / 3

    replicas = cluster.gpus // sharding.shards
    each = dict.fromkeys(("gather", "gather_again", "gather_root", "reduce", "reduce_root"), 0.0)
    between = {"reduce": 0.0, "reduce_root": 0.0}  # replicas: the last micro step only
    for c in roofline.collectives(
        config, sharding.shards, replicas, sharding.gathered_again, reduce_bytes=work.reduce_bytes
    ):
        name = "gather" if c.kind == "all-gather" else "reduce"
        name += "_root" if c.group == "root" else "_again" if name == "gather" and c.when == "backward" else ""
        (between if c.kind == "all-reduce" else each)[name] += collective_s(c, cluster)
    last = each | {name: each[name] + s for name, s in between.items()}
    earlier = each | dict.fromkeys(between, 0.0) if sharding.holds_gradients else each
    compute_s = n_layers * (forward_s + backward_s) + head_s
    elapsed_s = network_s = 0.0
    for times, seconds in ((1, last), (n_micro - 1, earlier)):
        elapsed_s += times * micro_step_s(
            n_layers, forward_s, head_s, backward_s, **seconds, communicators=communicators
        )
        network_s += times * sum(s * (1 if name.endswith("root") else n_layers) for name, s in seconds.items())
    exposed = 0.0 if alone else elapsed_s - n_micro * compute_s

    optimizer_s = update_bytes(work, None if alone else sharding) / bandwidth
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


@dataclass(frozen=True)
class Choice:
    work: Work
    sharding: Sharding
    step: Step  # at the rates called good
    memory: dict[str, int]  # bytes on the fullest rank at the peak, by part
    fits: bool
    why: str  # the weights are gathered again, or not
    why_lean: str

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


def choose(work: Work, cluster: Cluster, recompute: str = "auto", **asked) -> Choice:
    """A layout as the trainer would choose it on this machine, where ``asked`` (shard, reshard) leaves it open."""
    layout = choose_layout(
        work.config, size=cluster.gpus, node_size=cluster.node, micro_batch=work.micro_batch, seq_len=work.seq_len,
        accumulation=work.accumulation, lean=recompute != "never", memory_bytes=cluster.gpu.memory_bytes, **asked,
    )  # fmt: skip
    sharding, why = Sharding.of(layout), layout.reshard_why
    if cluster.gpus == 1:
        sharding = Sharding(f"none, moments in {work.moments}", 1, gathered_again=1)
        why = "one GPU has nothing to gather or to reduce"
    work, why_lean = activations(work, sharding, cluster.gpus, cluster.gpu.memory_bytes, recompute)
    parts = memory(work, cluster, sharding)
    fits = sum(parts.values()) <= cluster.gpu.memory_bytes
    return Choice(work, sharding, step(work, cluster, sharding, RATES["good"]), parts, fits, why, why_lean)


def compare(work: Work, cluster: Cluster, recompute: str = "auto") -> list[Choice]:
    """Side by side: gathered again everywhere, in the node, not at all; HSDP in groups of eight nodes and of one.

    For one GPU AdamW's moments in fp32, bf16 and 8 bits.
    """
    if cluster.gpus == 1:
        return [choose(replace(work, moments=moments), cluster, recompute) for moments in roofline.MOMENT_BYTES]
    asked = [{"reshard": "always"}, {"reshard": "node"}, {"reshard": "never"}]
    if cluster.nodes == 1:
        del asked[1]  # it is the first again
    asked += [{"shard": n * cluster.node} for n in (8, 1) if n < cluster.nodes and cluster.nodes % n == 0]
    return [choose(work, cluster, recompute, **options) for options in asked]


def activations(
    work: Work, sharding: Sharding, gpus: int, memory_bytes: int | None, recompute: str = "auto", compute_bytes: int = 2
) -> tuple[Work, str]:
    """The work with ``lean`` as --recompute has it, and why: by default all is kept that there is memory for.

    Making the outputs of norms and SwiGLU again costs a pass over memory, at 7B and 4 x 4096 23.6 GB a step, 0.5% of it
    (kernels/lean_linear.py). Weights that are kept gathered and whole gradients save more for less, and come first.
    """
    lean, keeping = replace(work, lean=True), replace(work, lean=False)
    if recompute != "auto":
        return (lean if recompute == "always" else keeping), "as asked for"
    if memory_bytes is None:
        return lean, "the memory of this device is not known"
    needs, more = (sum(rank_memory(x, sharding, gpus, compute_bytes).values()) for x in (lean, keeping))
    spare = int(memory_bytes * (1 - RESERVED)) - needs
    if more - needs <= spare:
        return keeping, f"there is room for {in_words(more - needs)} more"
    return lean, f"keeping them takes {in_words(more - needs)} more, and {in_words(max(0, spare))} are left"


def recomputed(work: Work) -> str:
    """What the backward makes again, in words."""
    return "norms and SwiGLU, in the backward" if work.lean else "nothing, all activations are kept"


def rank_memory(work: Work, sharding: Sharding, gpus: int, compute_bytes: int = 2) -> dict[str, int]:
    """Bytes of the fullest rank's tensors at the peak, by part; parts of nothing are left out."""
    config, sizes = work.config, (work.micro_batch, work.seq_len)
    if gpus == 1 and compute_bytes == 2:
        parts = asdict(roofline.one_rank_memory(config, *sizes, work.moments, work.accumulation, work.lean))
    else:
        reduced = 1 if sharding.holds_gradients else work.accumulation  # times a step
        parts = asdict(
            roofline.memory_estimate(
                config, sharding.shards, *sizes, compute_bytes, work.lean, work.whole_logits, reduced
            )
        )
        if sharding.gathered_again:
            layer = compute_bytes * roofline.padded_numel(roofline.layer_shapes(config), sharding.shards)
            others = config.n_layers - (2 if sharding.gathered_again == 1 else 1)  # than those that are whole anyway
            parts["kept for the backward"] = max(0, others) * layer // sharding.gathered_again
        if work.accumulation > 1 and sharding.holds_gradients and gpus > 1:
            parts["whole gradients"] = 4 * roofline.parameters(config)
    return {name.replace("_", " "): size for name, size in parts.items() if size}


def memory(work: Work, cluster: Cluster, sharding: Sharding) -> dict[str, int]:
    """Bytes on the fullest rank at the peak, by part."""
    reserved = {"reserved, assumed": int(RESERVED * cluster.gpu.memory_bytes)}
    return rank_memory(work, sharding, cluster.gpus) | reserved


# --------------------------------------------------------------------------------------------------- the command's part


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
    shard: int | None = None
    replicate: int | None = None
    reshard: str | None = None
    moments: str = "fp32"  # AdamW's, on one GPU
    recompute: str = "auto"

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


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


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
    share, most = samples // gpus, r.micro_batch or 8
    if gpus == 1 and r.micro_batch is None:
        most = max(1, roofline.most_micro_batch(r.config, machine(r.gpu).gpu.memory_bytes, r.seq_len, r.moments, share))
    micro_batch = max(n for n in divisors(share) if n <= most)
    return Work(r.config, micro_batch, r.seq_len, share // micro_batch, moments=r.moments)


def answer(request: Request, plot: Path | None = None) -> str:
    """The answer to --plan: a table for one number of GPUs, a sweep for a range. Refused for what cannot be."""
    if request.seq_len > request.config.max_seq_len:
        raise Refused(
            f"--seq-len {request.seq_len} is beyond the model's limit of {request.config.max_seq_len} positions"
        )
    counts = gpu_counts(request.gpus)
    if request.moments not in roofline.MOMENT_BYTES:
        raise unknown("--moments", request.moments, roofline.MOMENT_BYTES)
    if request.moments != "fp32" and counts != [1]:
        raise Refused(
            f"--moments {request.moments} is for one GPU, and --gpus is {request.gpus}; with more take --moments fp32: "
            "shards are small"
        )
    clusters = [cluster_of(request, n) for n in counts]
    if len(counts) == 1:
        return one(request, work_of(request, counts[0]), clusters[0])
    return sweep(request, clusters, plot)


def one(request: Request, work: Work, cluster: Cluster) -> str:
    """The plan for one number of GPUs."""
    r, m, config = request, machine(request.gpu), request.config
    chosen = choose(work, cluster, r.recompute, **r.asked)
    work, choices = chosen.work, compare(work, cluster, r.recompute)
    if all(c.sharding != chosen.sharding for c in choices):
        choices.append(chosen)
    per_token = roofline.flops_per_token(config, r.seq_len)
    lines = [
        "a model of the run, calculated from stated constants (model/plan.py): nothing here is measured",
        "",
        f"machine    {cluster.gpus} x {m.name}, {cluster.node} a node; {r.nic_gbs:g} GB/s a NIC, NVLink "
        f"{m.nvlink / 1e9:g} GB/s, peak {m.gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
        f"model      {roofline.parameters(config):,} parameters; {per_token / 1e9:.2f} GFLOP a token, "
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
            f"{c.sharding.name:<36}{in_words(c.bytes):>9}{'yes' if c.fits else 'no':>6}{s.total * 1e3:>8,.0f} ms"
            f"{(s.hidden + s.exposed) * 1e3:>7,.0f} ms{s.hidden * 1e3:>7,.0f} ms{s.exposed * 1e3:>7,.0f} ms"
            f"{s.exposed / s.total:>7.1%}{tokens_per_second(work, s):>14,.0f}"
            + ("  <- " + ("asked for" if asked else "default") if c.sharding == chosen.sharding else "")
        )
    lines.append(f"chosen     {chosen.sharding.name}: {chosen.why}")
    lines.append(f"recompute  {recomputed(work)}: {chosen.why_lean}")
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

    steps = {name: step(work, cluster, chosen.sharding, rates) for name, rates in RATES.items()}
    rate = {name: tokens_per_second(work, x) for name, x in steps.items()}
    peak, palm = m.gpu.bf16_flops, roofline.palm_flops_per_token(config, r.seq_len)

    def row(name: str, values) -> str:
        return f"  {name:<22}" + "".join(f"{value:>11}" for value in values)

    lines.append(f"{'a step, ms':<24}" + "".join(f"{name:>11}" for name in steps))
    for name in ("matmul", "attention", "memory_bound", "optimizer", "gaps", "exposed", "straggling", "total"):
        lines.append(row(name.replace("_", " "), (f"{getattr(x, name) * 1e3:,.0f}" for x in steps.values())))
    lines += [
        row("tokens/s/GPU", (f"{x:,.0f}" for x in rate.values())),
        row("MFU", (f"{roofline.mfu(x, per_token, peak):.1%}" for x in rate.values())),
        row("MFU, PaLM's formula", (f"{roofline.mfu(x, palm, peak):.1%}" for x in rate.values())),
        row("assumed: matmul", (f"{x.matmul:.0%}" for x in RATES.values())) + "  of the peak",
        row("assumed: attention", (f"{x.attention:.0%}" for x in RATES.values())) + "  of the peak",
        row("assumed: memory", (f"{x.memory:.0%}" for x in RATES.values())) + "  of the bandwidth",
        row("assumed: straggling", (f"{x.straggling:.1%}" for x in RATES.values())) + "  a doubling of the nodes",
        "",
        f"speed      floor {steps['ideal'].total:.3f} s a step, {rate['ideal']:,.0f} tokens/s/GPU; expected "
        f"{rate['good']:,.0f} to {rate['leading']:,.0f} with kernels as good as the best public ones; "
        f"{rate['published']:,.0f} at the rates of published runs",
    ]

    whole = size = roofline.parameter_bytes(config) + roofline.moment_bytes(config, work.moments)
    if cluster.gpus > 1:
        whole, size = roofline.checkpoint_bytes(config), roofline.checkpoint_bytes(config, chosen.sharding.shards)
    stall = size / m.host_copy
    hours = {name: (r.steps * x.total + r.steps // r.save_every * stall) / 3600 for name, x in steps.items()}
    mwh = {name: cluster.gpus * m.watts * POWER_SHARE * h / 1e6 for name, h in hours.items()}
    lines += [
        f"checkpoint {in_words(whole)}, {in_words(size)} a rank; a save stalls {stall:.3f} "
        f"s at {in_words(m.host_copy)}/s, every {r.save_every} steps {stall / (r.save_every * s.total):.4%} of it",
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
        work.config, chosen.sharding.shards, cluster.gpus // chosen.sharding.shards, chosen.sharding.gathered_again,
        work.accumulation, holds_gradients=chosen.sharding.holds_gradients,
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
    grown = Work(r.config, r.micro_batch or 4, r.seq_len)
    lines = [
        "a model, calculated from stated constants (model/plan.py), at the rates called good: nothing here is measured",
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
            left = f"{batch:>11}  {chosen.sharding.name.removeprefix('FSDP, '):<25}{memory:>9}{columns(fixed, n)}"
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
    cases += [("  HSDP", base, last, c) for c in compared if c.sharding.shards < last.gpus]
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
            f"{c.sharding.name}{'' if c.fits else ', does not fit'}")  # fmt: skip
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
        f"modelled, not measured: {roofline.parameters(request.config) / 1e9:.2f} billion parameters on {request.gpu}, "
        f"{request.nic_gbs:g} GB/s a NIC, {request.gpus_per_node} a node",
        fontsize=10,
    )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    except OSError as error:
        raise Refused(f"cannot write the plot {path}: {error.strerror}; name another --run-dir") from None
