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

from itertools import pairwise
from typing import TYPE_CHECKING

from halny.model.estimate.work import Layout

if TYPE_CHECKING:
    import torch

    from halny.model.mistral import Mistral
    from halny.model.run.ranks import World


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
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layout.reshard_after_forward)
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
