"""How a model is spread over the ranks: FSDP, HSDP, what is gathered again, and what overlaps what.

FSDP (Zhao et al. 2023, https://arxiv.org/abs/2304.11277) keeps one shard of weights, gradients and optimizer on each of
N ranks; each layer is gathered before it computes, and its gradients are reduced into shards. HSDP does that in groups
of N, of which there are M replicas: reduce-scatter inside the group, then all-reduce between the groups. Ranks of a
group are neighbours, so that with N the size of a node the gathering stays inside it:

    mesh[m, n] = rank m N + n        placements (Replicate, Shard(0)); M = 1: a mesh of one dimension, (Shard(0))

FSDP averages gradients over all N M ranks in both forms, and a checkpoint holds each shard once, so a run may resume
under another layout.

Two choices trade memory for traffic. ``reshard`` says what becomes of a layer's gathered weights between its forward
and its backward pass: dropped and gathered again (always), kept (never), or kept in parts inside a node and gathered
again there (an int). With gradients accumulated over micro batches, whole ones may be summed and reduced once, if there
is room, or shards are summed: reduced for each micro batch, between the replicas only once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from halny.model import roofline
from halny.model.durable import in_words
from halny.model.exits import Refused
from halny.model.roofline import RESERVED

if TYPE_CHECKING:  # the choice is arithmetic, made on laptops too
    import torch

    from halny.model.mistral import Mistral, MistralConfig
    from halny.model.ranks import World


@dataclass(frozen=True)
class Layout:
    """Shards and replicas, and the two choices, each with its reason."""

    shard: int
    replicate: int
    reshard: bool | int  # as fully_shard's reshard_after_forward takes it, for the layers
    reshard_why: str
    holds_gradients: bool  # sums whole gradients over the micro batches
    gradients_why: str

    @property
    def reshard_name(self) -> str:
        """As --reshard takes it."""
        return {True: "always", False: "never"}[self.reshard] if isinstance(self.reshard, bool) else str(self.reshard)


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
        needed = roofline.memory_estimate(config, shard, micro_batch, seq_len, compute_bytes, lean).total
        spare = int(memory_bytes * (1 - RESERVED)) - needed
    weights = compute_bytes * config.n_layers * roofline.layer_parameters(config)
    spans_nodes = shard > node_size > 1 and shard % node_size == 0
    part = weights // node_size if spans_nodes else weights
    whole = roofline.FP32_BYTES * roofline.parameters(config)
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


def is_whole(world: World, compute_dtype: torch.dtype) -> bool:
    """Whether one rank holds the model without FSDP: in bf16, its fp32 masters split (model/optimizer.py)."""
    return world.size == 1 and compute_dtype.itemsize == 2


def describe(layout: Layout) -> str:
    """Two lines for the log."""
    what = {
        "always": "dropped after the forward pass",
        "never": "kept from the forward to the backward pass",
    }.get(layout.reshard_name, f"kept after the forward pass as parts on {layout.reshard_name} ranks")
    return (
        f"sharding   {layout.shard} shard(s) x {layout.replicate} replica(s); gathered weights are {what}: "
        f"{layout.reshard_why}\ngradients  {layout.gradients_why}"
    )


def shard_model(model: Mistral, layout: Layout, world: World, compute_dtype: torch.dtype) -> None:
    """fully_shard the model, on the meta device, each layer a group; embedding, final norm and head are the root's.

    The root's weights stay gathered from the forward to the backward pass: they are the last and the first needed.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from halny.kernels import chunk_cat, dispatch

    if world.device.type != "cpu" or dispatch.INTERPRETED:
        chunk_cat.use_in_fsdp()
    mesh = world.mesh
    if layout.replicate > 1:
        shape = (layout.replicate, layout.shard)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Inputs stay as they are: a layer's are in the compute dtype already, but for RoPE's fp32 tables.
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layout.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.holds_gradients = layout.holds_gradients  # for reduce_gradients
    if has_streams(world.device) and world.size > 1:
        overlap(model)


def is_sharded(model: Mistral) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def has_streams(device: torch.device) -> bool:
    """Whether communication runs beside computation there."""
    return device.type == "cuda"


def overlap(model: Mistral) -> None:
    """What lets communication run beside computation, and beside other communication. Changes no result.

    The next layer is gathered as soon as this one's weights are there, in a stated order instead of the one that FSDP
    saw in the step before, so from the first step on. Gathering and reducing have a communicator each, where torch has
    the switch (2.13): one would do them in turn. Two buffers for gradients on their way, not one: computation need not
    wait for the reduction before, and memory stays bounded.
    """
    order = [model, *model.layers]
    for this, following in pairwise(order):
        this.set_modules_to_forward_prefetch([following])
    backward = [model, *reversed(model.layers)]
    for this, following in pairwise(backward):
        this.set_modules_to_backward_prefetch([following])
    if hasattr(model, "set_separate_reduce_scatter_group"):
        model.set_separate_reduce_scatter_group(True)
    if hasattr(model, "set_reduce_scatter_max_input_buffers"):
        model.set_reduce_scatter_max_input_buffers(2)


def reduce_gradients(model: Mistral, last: bool) -> None:
    """Before a micro batch: reduce its gradients only as far as the layout wants, and at the last one all of them."""
    if not is_sharded(model):
        return
    if model.holds_gradients:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)  # between replicas; inside them always


def reshard(model: Mistral) -> None:
    """Drop all gathered weights, of the layers too. For after a forward pass that no backward pass follows."""
    if is_sharded(model):
        for module in (*model.layers, model):
            module.reshard()
