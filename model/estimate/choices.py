"""The choices that a recipe leaves open: micro batch, layout, what the backward recomputes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from halny.model.durable import in_words
from halny.model.estimate import memory, sizes
from halny.model.estimate.memory import RESERVED, one_rank_memory, rank_memory
from halny.model.estimate.work import Layout, Sharding, Work
from halny.model.exits import Refused

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


def activations(
    work: Work, sharding: Sharding, gpus: int, memory_bytes: int | None, recompute: str = "auto", compute_bytes: int = 2
) -> tuple[Work, str]:
    """The work with ``lean`` as --recompute has it, and why: by default all is kept that there is memory for.

    Making the outputs of norms and SwiGLU again costs a pass over memory, at 7B and 4 x 4096 23.6 GB a step, 0.5% of it
    (kernels/recompute_linear.py). Weights that are kept gathered and whole gradients save more for less, and come
    first.
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


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def most_micro_batch(
    config: MistralConfig,
    memory_bytes: int,
    seq_len: int,
    moments: str,
    divides: int,
    at_most: int = 8,
    lean: bool = True,
    compute_bytes: int = 2,
) -> int:
    """The largest micro batch that divides a rank's share of ``divides`` sequences and fits, by ``one_rank_memory``.

    memory_bytes is the whole of the GPU's, of which RESERVED is left alone. 0 if not even one sequence fits.
    """
    room = memory_bytes * (1 - RESERVED)
    for micro_batch in range(min(at_most, divides), 0, -1):
        if divides % micro_batch == 0:
            accumulation = divides // micro_batch
            if one_rank_memory(config, micro_batch, seq_len, moments, accumulation, lean, compute_bytes).total <= room:
                return micro_batch
    return 0


def split_world(size: int, shard: int | None, replicate: int | None) -> tuple[int, int]:
    """(shard, replicate) with shard x replicate = size; what is None follows from the other, or is FSDP over all."""
    if shard is None:
        shard = max(1, size // (replicate or 1))
    if replicate is None:
        replicate = max(1, size // shard)
    if shard * replicate != size:
        raise Refused(
            f"--shard {shard} x --replicate {replicate} is {shard * replicate}, but there are {size} rank(s); "
            "use a divisor of that as one of them and leave the other out"
        )
    return shard, replicate


def choose_layout(
    config: MistralConfig,
    *,
    size: int,
    node_size: int,
    shard: int | None = None,
    replicate: int | None = None,
    reshard: str | None = None,
    micro_batch: int,
    seq_len: int,
    accumulation: int = 1,
    compute_bytes: int = 2,
    lean: bool = True,
    memory_bytes: int | None = None,
) -> Layout:
    """The layout on so many ranks, so many of them a node; None: chosen. Raises Refused for what cannot be.

    By default weights are not gathered twice where there is memory for that. Where there is not, and a group spans
    nodes, a part of 1 / node_size keeps the second gathering off the network; but FSDP2 copies such parts about, at 7B
    49 GB a step more than keeping them whole moves (roofline.fsdp_copy_bytes), 1% of the step.
    ``memory_bytes`` is a GPU's whole memory; None where that is unknown, as on a CPU.
    """
    shard, replicate = split_world(size, shard, replicate)
    spare = None
    if memory_bytes is not None:
        needed = memory.memory_estimate(config, shard, micro_batch, seq_len, compute_bytes, lean).total
        spare = int(memory_bytes * (1 - RESERVED)) - needed
    weights = compute_bytes * config.n_layers * sizes.layer_parameters(config)
    spans_nodes = shard > node_size > 1 and shard % node_size == 0
    part = weights // node_size if spans_nodes else weights
    whole = sizes.FP32_BYTES * sizes.parameters(config)
    room = spare  # for gathered weights; sums of whole gradients, if they fit, save more of the network
    if spare is not None and accumulation > 1 and size > 1 and spare - part >= whole:
        room = spare - whole

    if reshard is None:
        if spare is None:
            choice, why = True, "the memory of this device is not known"
        elif weights <= room:
            choice, why = False, f"there is room for {in_words(weights)}"
        elif part <= spare:
            choice, why = node_size, f"the second gathering stays inside the node, for {in_words(part)}"
        else:
            choice, why = True, f"keeping them takes {in_words(part)}, and {in_words(max(spare, 0))} are left"
    else:
        choice, why = _asked_for(reshard, shard, node_size), "as asked for"

    held = 0 if choice is True else weights if choice is False else weights // choice
    if accumulation == 1 or size == 1:
        holds, gradients_why = True, "reduced once a step, as there is one micro batch"
        if accumulation > 1:
            gradients_why = "not reduced, as there is one rank"
    elif spare is None or spare - held >= whole:
        holds, gradients_why = True, f"summed whole over {accumulation} micro batches and reduced once a step"
    else:
        between = " inside each replica, between replicas once a step" if replicate > 1 else ""
        holds = False
        gradients_why = f"reduced for each of {accumulation} micro batches{between}: whole, they take {in_words(whole)}"
    return Layout(shard, replicate, choice, why, holds, gradients_why)


def _asked_for(reshard: str, shard: int, node_size: int) -> bool | int:
    if reshard in ("always", "never"):
        return reshard == "always"
    group = node_size if reshard == "node" else int(reshard) if reshard.isdecimal() and len(reshard) < 10 else 0
    if group < 1:
        raise Refused(f"--reshard must be always, never, node or a number of ranks, got {reshard!r}")
    if reshard == "node" and shard <= node_size:
        return True  # all of a group is inside the node
    if shard % group:
        named = f"node ({group} ranks)" if reshard == "node" else reshard
        raise Refused(f"--reshard {named} does not divide the {shard} shards; use a divisor of {shard}")
    return group if 1 < group < shard else group == shard
