"""The choices that a recipe leaves open: micro batch, layout, recompute, checkpoints. ``decide`` makes the first three,
for the trainer on the machine that it is on and for --plan on any other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halny.model.durable import in_words
from halny.model.estimate import sizes
from halny.model.estimate.machines import MACHINES
from halny.model.estimate.memory import checkpoint_bytes, memory_estimate, rank_memory, room
from halny.model.estimate.work import ALONE, Layout, Work
from halny.model.exits import Refused

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig

MOST_AT_ONCE = 8  # sequences in a micro batch, where the recipe does not say


@dataclass(frozen=True)
class Decision:
    work: Work
    layout: Layout
    recompute_why: str

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the fullest rank at the peak of a step, by part."""
        return rank_memory(self.work, self.layout)


class Decided:
    """What holds a ``decision``, with its parts at hand."""

    decision: Decision

    @property
    def work(self) -> Work:
        return self.decision.work

    @property
    def layout(self) -> Layout:
        return self.decision.layout


def decide(
    config: MistralConfig,
    *,
    ranks: int,
    node: int,
    memory_bytes: int | None,
    seq_len: int,
    share: int,
    micro_batch: int | None = None,
    shard: int | None = None,
    replicate: int | None = None,
    reshard: str | None = None,
    recompute: str = "auto",
    moments: str = "fp32",
    compute_bytes: int = 2,
    kernels: bool = True,
) -> Decision:
    """Micro batch, layout and recompute of a run on so many ranks, ``node`` of them a node; None: chosen.

    memory_bytes  of a GPU, all of it; None where that is unknown, as on a CPU
    share         sequences of a rank in a step. The micro batch is the largest divisor of it up to MOST_AT_ONCE that
                  fits the memory, or one sequence
    kernels       ours; without them it is PyTorch's own layers that compute

    Raises Refused for what cannot be.
    """
    alone = ranks == 1 and compute_bytes == 2
    if moments != "fp32" and not alone:
        dtype = "bf16" if compute_bytes == 2 else "fp32"
        remedy = "take --moments fp32: shards are small" if ranks > 1 else "add --dtype bf16, or leave it out"
        raise Refused(f"--moments {moments} is for one rank in bf16, and this is {dtype} on {ranks} rank(s); {remedy}")
    if micro_batch is not None and share % micro_batch:
        raise Refused(
            f"--micro-batch {micro_batch} does not divide the {share} samples that --batch-tokens "
            f"{share * ranks * seq_len} gives each of {ranks} rank(s); use a divisor of {share}"
        )
    possible = [n for n in divisors(share) if n <= MOST_AT_ONCE] if micro_batch is None else [micro_batch]
    for n in reversed(possible):
        least = Work(
            config, n, seq_len, share // n, recompute=kernels and recompute != "never", whole_logits=not kernels,
            moments=moments, compute_bytes=compute_bytes,
        )  # fmt: skip
        layout = choose_layout(
            least, ranks=ranks, node=node, memory_bytes=memory_bytes, shard=shard, replicate=replicate, reshard=reshard
        )
        if memory_bytes is None or sum(rank_memory(least, layout).values()) <= room(memory_bytes):
            break
    if not kernels:
        return Decision(least, layout, "PyTorch's own layers")
    work, why = choose_recompute(least, layout, memory_bytes, recompute)
    return Decision(work, layout, why)


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


# --------------------------------------------------------------------------------------------------------------- layout


def split_world(ranks: int, shard: int | None, replicate: int | None) -> tuple[int, int]:
    """(shard, replicate) with shard x replicate = ranks; what is None follows from the other, or is FSDP over all."""
    if shard is None:
        shard = max(1, ranks // (replicate or 1))
    if replicate is None:
        replicate = max(1, ranks // shard)
    if shard * replicate != ranks:
        raise Refused(
            f"--shard {shard} x --replicate {replicate} is {shard * replicate}, but there are {ranks} rank(s); "
            "use a divisor of that as one of them and leave the other out"
        )
    return shard, replicate


def choose_layout(
    work: Work,
    *,
    ranks: int,
    node: int,
    memory_bytes: int | None = None,
    shard: int | None = None,
    replicate: int | None = None,
    reshard: str | None = None,
) -> Layout:
    """The layout of this work on so many ranks, ``node`` of them a node; None: chosen. Refused for what cannot be.

    By default weights are not gathered twice where there is memory for that. Where there is not, and a group spans
    nodes, a part of 1 / node keeps the second gathering off the network; but FSDP2 copies such parts about, at 7B 49 GB
    a step more than keeping them whole moves (roofline.fsdp_copy_bytes), 1% of the step.
    """
    shard, replicate = split_world(ranks, shard, replicate)
    asked = None if reshard is None else _asked_for(reshard, shard, node)
    if ranks == 1 and work.compute_bytes == 2:
        return replace(ALONE, reshard_why="one rank has nothing to gather")
    spare = None
    if memory_bytes is not None:
        spare = room(memory_bytes) - memory_estimate(work, Layout(shard, replicate)).total
    weights = work.compute_bytes * work.config.n_layers * sizes.layer_parameters(work.config)
    spans_nodes = shard > node > 1 and shard % node == 0
    part = weights // node if spans_nodes else weights
    whole = sizes.FP32_BYTES * sizes.parameters(work.config)
    left = spare  # for gathered weights; sums of whole gradients, if they fit, save more of the network
    if spare is not None and work.accumulation > 1 and ranks > 1 and spare - part >= whole:
        left = spare - whole

    if asked is not None:
        again, why = asked, "as asked for"
    elif spare is None:
        again, why = 0, "the memory of this device is not known"
    elif weights <= left:
        again, why = 1, f"there is room for {in_words(weights)}"
    elif part <= spare:
        again, why = node, f"the second gathering stays inside the node, for {in_words(part)}"
    else:
        again, why = 0, f"keeping them takes {in_words(part)}, and {in_words(max(spare, 0))} are left"

    held = weights // again if again else 0
    if work.accumulation == 1 or ranks == 1:
        holds, gradients_why = True, "reduced once a step, as there is one micro batch"
        if work.accumulation > 1:
            gradients_why = "not reduced, as there is one rank"
    elif spare is None or spare - held >= whole:
        holds, gradients_why = True, f"summed whole over {work.accumulation} micro batches and reduced once a step"
    else:
        between = " inside each replica, between replicas once a step" if replicate > 1 else ""
        holds = False
        gradients_why = (
            f"reduced for each of {work.accumulation} micro batches{between}: whole, they take {in_words(whole)}"
        )
    return Layout(shard, replicate, again, holds, True, why, gradients_why)


def _asked_for(reshard: str, shard: int, node: int) -> int:
    """Layout.gathered_again as --reshard has it."""
    if reshard in ("always", "never"):
        return 0 if reshard == "always" else 1
    group = node if reshard == "node" else int(reshard) if reshard.isdecimal() and len(reshard) < 10 else 0
    if group < 1:
        raise Refused(f"--reshard must be always, never, node or a number of ranks, got {reshard!r}")
    if reshard == "node" and shard <= node:
        return 0  # all of a group is inside the node
    if shard % group:
        named = f"node ({group} ranks)" if reshard == "node" else reshard
        raise Refused(f"--reshard {named} does not divide the {shard} shards; use a divisor of {shard}")
    return 0 if group == shard else group


# ------------------------------------------------------------------------------------------------------------ recompute


def choose_recompute(work: Work, layout: Layout, memory_bytes: int | None, asked: str = "auto") -> tuple[Work, str]:
    """The work with ``recompute`` as --recompute has it, and why: by default all is kept that there is memory for.

    Recomputing the outputs of norms and SwiGLU costs a pass over memory, at 7B and 4 x 4096 23.6 GB a step, 0.5% of it
    (kernels/recompute_linear.py). Weights kept gathered and whole gradients save more for less, and come first.
    """
    again, keeping = replace(work, recompute=True), replace(work, recompute=False)
    if asked != "auto":
        return (again if asked == "always" else keeping), "as asked for"
    if memory_bytes is None:
        return again, "the memory of this device is not known"
    needs, more = (sum(rank_memory(x, layout).values()) for x in (again, keeping))
    spare = room(memory_bytes) - needs
    if more - needs <= spare:
        return keeping, f"there is room for {in_words(more - needs)} more"
    return again, f"keeping them takes {in_words(more - needs)} more, and {in_words(max(0, spare))} are left"


# ---------------------------------------------------------------------------------------------------------- checkpoints

WRITING_COSTS = 0.1  # of the time in which a checkpoint is written beside the steps: what it slows them by, assumed
DISK = 5e8  # bytes/s of a rank, a cautious guess


def expect_save(config: MistralConfig, moments: str, shards: int, gpu_name: str) -> tuple[float, float]:
    """Before one was made: seconds for which a save stops the training, and in which a rank writes its part.

    gpu_name  the driver's; for one that is not known the slowest copy into host memory is taken
    """
    size = checkpoint_bytes(config, moments, shards)
    rates = {machine.name: machine.host_copy for machine in MACHINES.values()}
    return size / rates.get(gpu_name, min(rates.values())), size / DISK


def best_interval_s(stop_s: float, writing_s: float, mtbf_s: float) -> float:
    """Seconds from checkpoint to checkpoint at which saves and failures together cost least.

    stop_s, writing_s  for how long a save stops the training, and is written beside it
    mtbf_s             mean time between failures: they come at random, and what was done since the last save is lost

    A save of cost C every T seconds takes C / T of the time, a failure T / 2. Young (1974) has sqrt(2 C mtbf_s); this
    is Daly's expansion, which is good where failures are frequent too (2006, doi:10.1016/j.future.2004.11.016). Not
    shorter than the writing, for which the next save would wait.
    """
    cost_s = stop_s + WRITING_COSTS * writing_s
    x = cost_s / (2 * mtbf_s)
    best = math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - cost_s if x < 1 else mtbf_s
    return max(best, writing_s)


# ------------------------------------------------------------------------------------------------------------- in words


def recomputed(work: Work) -> str:
    """What the backward recomputes, in words."""
    return "norms and SwiGLU, in the backward" if work.recompute else "nothing, all activations are kept"
