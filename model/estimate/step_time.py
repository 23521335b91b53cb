"""The time of an optimizer step on N GPUs, from stated rates: FSDP's order of work, played through.

A step is its matrix products and attention at a share of the tensor cores' peak, its other kernels at a share of the
memory bandwidth, and FSDP's collectives, layer by layer, beside them: forward, layer l + 1 is gathered while layer l
computes; backward, layer l - 1 is gathered and layer l + 1 reduced. What does not fit into these windows is exposed,
and so are always the first gather and the last reduction. FLOPs, bytes and messages are roofline.py's, exactly; what is
assumed are the constants below, and bench/published.py says how far the model is from published runs that had no part
in choosing them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from halny.model.estimate import machines, roofline, sizes
from halny.model.estimate.machines import MACHINES
from halny.model.estimate.work import Layout, Work

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
# the runs in bench/published.py (a test fits it again), its products those of cuBLAS before 12.8, its attention
# FlashAttention 2's rate (350 TFLOP/s). Measured since (bench/results/RESULTS.md): an H200 at its limit of 700 W does
# 690 to 704 TFLOP/s of a step's products, as "good" has it; 353 to 360 in attention by cuDNN, below "good"; copies at
# 4.25 TB/s, and norms, RoPE and SwiGLU at 95% of that, above "leading".
RATES = {
    "ideal": Rates(0.798, 0.489, 0.896, 0.0, 0.0),
    "leading": Rates(0.748, 0.438, 0.771, 0.02e-3, 0.005),
    "good": Rates(0.697, 0.395, 0.708, 0.3e-3, 0.010),
    "published": Rates(0.587, 0.354, 0.708, 0.3e-3, 0.0156),
}

# Assumed for every machine; --preflight measures them on the real one.
NIC_SHARE = 0.85  # of a NIC's line rate that collectives reach
NVLINK_SHARE = 0.80  # of NVLink's: NCCL's bus bandwidth on eight H100 is some 360 of 450 GB/s
HOP_S = 5e-6  # a collective's latency for each node in its ring
NIC = 25e9  # bytes/s a GPU between nodes, for a machine of which only the GPU is known

# ----------------------------------------------------------------------------------------------------- the step's model


@dataclass(frozen=True)
class Cluster:
    gpu: machines.GPU
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
class StepTime:
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
    known = [m for m in MACHINES.values() if gpu_name in machines.GPUS and m.gpu == machines.GPUS[gpu_name]]
    if not known or gpus % gpus_per_node:
        return None
    return Cluster(known[0].gpu, gpus, gpus_per_node, known[0].nvlink, NIC)


def update_bytes(work: Work, layout: Layout) -> int:
    """That clipping and update move in a step; without FSDP gradients' sums included."""
    config, micro = work.config, work.accumulation
    if not layout.fsdp:
        sums = roofline.gradient_sum_bytes(config, work.moments, micro)
        return roofline.split_update_bytes(config, work.moments, micro) + sums
    return roofline.sharded_update_bytes(sizes.shard_numel(config, layout.shard))


def step(work: Work, cluster: Cluster, layout: Layout, rates: Rates, communicators: int = 2) -> StepTime:
    """The model of one optimizer step."""
    config, gpu, tokens = work.config, cluster.gpu, work.tokens
    n_layers, n_micro = config.n_layers, work.accumulation
    flops = gpu.bf16_flops
    matmul_s = 2 * sizes.layer_matmul_parameters(config) * tokens / (flops * rates.matmul)
    attention_s = roofline.attention_flops(config, [work.seq_len] * work.micro_batch) / work.shared_by / n_layers
    attention_s = attention_s / 3 / (flops * rates.attention)  # forward; the backward is two such
    bandwidth = gpu.hbm_bytes_per_second * rates.memory
    forward_bytes, backward_bytes = (
        work.row_bytes * moved / n_layers
        for moved in roofline.row_kernel_bytes(config, tokens, recompute=work.recompute)
    )
    again_bytes = forward_bytes if work.recomputed_matmuls else 0.0
    head_bytes = roofline.loss_bytes(config, tokens) + roofline.other_bytes(config, tokens)
    if layout.fsdp:
        gathered, reduced = roofline.copy_bytes(sizes.layer_shapes(config), layout.shard, layout.gathered_again)
        if layout.gathers_once:  # no copies: weights lie where they are gathered; fp32 sums of gradients are rewritten
            gathered, reduced = 0, 2 * sizes.FP32_BYTES * sizes.layer_parameters(config)
        forward_bytes, backward_bytes = forward_bytes + gathered, backward_bytes + reduced
        head_bytes += sum(roofline.copy_bytes(sizes.root_shapes(config), layout.shard, 1))
    head_matmul_s = 6 * config.vocab_size * config.dim * tokens / (flops * rates.matmul)
    head_s = head_matmul_s + head_bytes / bandwidth

    again_matmul_s = work.recomputed_matmuls * matmul_s
    again_attention_s = attention_s if work.recomputes_attention else 0.0
    forward_s = matmul_s + attention_s + forward_bytes / bandwidth + rates.layer_gap_s / 3
    backward_s = 2 * (matmul_s + attention_s) + again_matmul_s + again_attention_s
    backward_s += (backward_bytes + again_bytes) / bandwidth + rates.layer_gap_s * 2 / 3

    replicas = cluster.gpus // layout.shard
    each = dict.fromkeys(("gather", "gather_again", "gather_root", "reduce", "reduce_root"), 0.0)
    between = {"reduce": 0.0, "reduce_root": 0.0}  # replicas: the last micro step only
    for c in roofline.collectives(
        config, layout.shard, replicas, layout.gathered_again, reduce_bytes=work.reduce_bytes
    ):
        name = "gather" if c.kind == "all-gather" else "reduce"
        name += "_root" if c.group == "root" else "_again" if name == "gather" and c.when == "backward" else ""
        (between if c.kind == "all-reduce" else each)[name] += collective_s(c, cluster)
    last = each | {name: each[name] + s for name, s in between.items()}
    earlier = each | dict.fromkeys(between, 0.0) if layout.holds_gradients else each
    if layout.gathers_once:
        earlier = earlier | dict.fromkeys(("gather", "gather_again", "gather_root"), 0.0)
    alone = layout.gathers_once and layout.holds_gradients  # no rank waits for another before the last micro step
    compute_s = n_layers * (forward_s + backward_s) + head_s
    elapsed_s = network_s = 0.0
    for times, seconds in ((1, last), (n_micro - 1, earlier)):
        elapsed_s += times * micro_step_s(
            n_layers, forward_s, head_s, backward_s, **seconds, communicators=communicators
        )
        network_s += times * sum(s * (1 if name.endswith("root") else n_layers) for name, s in seconds.items())
    exposed = 0.0 if not layout.fsdp else elapsed_s - n_micro * compute_s

    optimizer_s = update_bytes(work, layout) / bandwidth
    busy = n_micro * compute_s + optimizer_s + exposed
    return StepTime(
        matmul=n_micro * (n_layers * (3 * matmul_s + again_matmul_s) + head_matmul_s),
        attention=n_micro * n_layers * (3 * attention_s + again_attention_s),
        memory_bound=n_micro
        * (n_layers * (forward_bytes + backward_bytes + again_bytes) / bandwidth + head_s - head_matmul_s),
        optimizer=optimizer_s,
        gaps=n_micro * n_layers * rates.layer_gap_s,
        exposed=exposed,
        straggling=busy / (n_micro if alone else 1) * rates.straggling * math.log2(cluster.nodes),
        hidden=network_s - exposed,
    )


def tokens_per_second(work: Work, step: StepTime) -> float:
    """Tokens/s a GPU."""
    return work.accumulation * work.tokens / step.total
