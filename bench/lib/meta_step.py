"""The trainer's step on the meta device, going the way of a Hopper GPU: for bench/account.py and bench/memory.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from bench.lib.emulated import one_of
from halny.kernels import dispatch
from halny.model.data.batches import Batch
from halny.model.estimate import choices
from halny.model.estimate.choices import Decision
from halny.model.mistral import MistralConfig
from halny.model.run.optimizer import Guard
from halny.model.run.ranks import World

META = torch.device("meta")
HOPPER = {"capability": (9, 0), "multiprocessors": 132}
NODE = 4  # GPUs of one


class MetaMode(TorchDispatchMode):
    """Sees the operators of a step on meta tensors, those inside the registered ones of ours included: ``ran``."""

    def begins(self, operator) -> None:
        """An operator is about to run."""

    def opens(self, operator, args: tuple, kwargs: dict):
        """Run one of ours from the inside, seen by this mode."""
        with self:
            return dispatch.implementations[operator](*args, **kwargs)

    def ran(self, operator, args: tuple, kwargs: dict, out) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, FakeTensor) for t in types):  # a DTensor finding out what shape a result will have
            return operator(*args, **kwargs)
        if not all(t in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a DTensor, which will ask again about its local tensors
        self.begins(operator)
        if operator in dispatch.implementations:
            return self.opens(operator, args, kwargs)
        if operator is torch.ops.aten.addmm.dtype_out:  # whose meta function, in torch 2.11, takes the dtype for beta
            out = kwargs["out"]
        else:
            out = operator(*args, **kwargs)
        self.ran(operator, args, kwargs, out)
        return out


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    """What scaled_dot_product_attention is on a GPU whose cuDNN it was told to use; on meta it would be plain math."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)[0]


@contextlib.contextmanager
def on_hopper(record, window_hides: bool) -> Iterator[None]:
    """Inside, meta tensors are a Hopper GPU's: kernels, attention, FSDP2, lists of tensors in one kernel.

    Attention is cuDNN's where the window hides nothing, as on a machine without FlashAttention, otherwise version 4's.
    FSDP2 refuses meta tensors, and knows devices by a module of torch each: the three places are replaced.
    """
    gpu = dispatch.StandIn(**HOPPER, packages=("flash-attn-4",) if window_hides else (), record=record)
    fsdp = "torch.distributed.fsdp._fully_shard"
    with (
        patch("torch.nn.functional.scaled_dot_product_attention", cudnn_attention),
        patch(f"{fsdp}._fsdp_param_group.FSDPParamGroup._validate_no_meta_params", lambda self: None),
        patch(f"{fsdp}._fully_shard._get_device_from_mesh", lambda mesh: META),
        patch("torch.meta", torch.cpu, create=True),
        patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        dispatch.stand_in(gpu),
    ):
        yield


@contextlib.contextmanager
def world_of(ranks: int) -> Iterator[World]:
    """Rank 0 of so many, on the meta device, in a process group whose collectives move nothing."""
    world = one_of(ranks, torch.device("cpu"), min(NODE, ranks))
    try:
        yield replace(world, device=META)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class MetaCase(choices.Decided):
    """What is counted."""

    config: MistralConfig
    micro_batch: int
    seq_len: int
    ranks: int
    moments: str = "fp32"
    accumulation: int = 1
    reshard: str | None = None  # None: by memory_bytes, as the trainer decides
    memory_bytes: int | None = None  # of the GPU
    recompute: str = "auto"

    @property
    def n_tokens(self) -> int:
        """Of a micro batch."""
        return self.micro_batch * self.seq_len

    @property
    def tokens(self) -> str:
        """Those of a step, in words."""
        return f"{self.accumulation} x " * (self.accumulation > 1) + f"{self.micro_batch} x {self.seq_len} tokens"

    @property
    def lengths(self) -> list[int]:
        return [self.seq_len] * self.micro_batch

    @property
    def decision(self) -> Decision:
        return choices.decide(
            self.config, ranks=self.ranks, node=min(NODE, self.ranks), memory_bytes=self.memory_bytes,
            seq_len=self.seq_len, share=self.micro_batch * self.accumulation, micro_batch=self.micro_batch,
            reshard=self.reshard, recompute=self.recompute, moments=self.moments,
        )  # fmt: skip

    @property
    def window_hides(self) -> bool:
        return self.config.window is not None and self.config.window < self.seq_len


class MetaStep:
    """Model, optimizer and a batch, made by train.py's own functions inside ``on_hopper``."""

    def __init__(self, case: MetaCase, world: World):
        self.recipe = train.Recipe(dtype="bf16", moments=case.moments)
        spec = SimpleNamespace(model=case.config, recipe=self.recipe, layout=case.layout, work=case.work)
        self.model = train.build_model(spec, world)
        self.optimizer = train.build_optimizer(self.model, self.recipe)
        train.begin_computing(self.model, self.optimizer)
        self.guard = Guard(self.recipe.spike, self.recipe.skip_spikes, META)
        tokens = torch.empty(case.micro_batch, case.seq_len, dtype=torch.int64, device=META)
        self.batches = case.accumulation * [Batch(tokens, tokens, lengths=case.lengths)]

    def run(self) -> Tensor:
        return train.train_step(self.model, self.optimizer, self.guard, 1, self.batches, 1e-5, self.recipe.clip)
