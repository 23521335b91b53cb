"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) in the two forms that train.py's step takes.

    ShardedAdamW   on FSDP's fp32 shards: PyTorch's fused kernel
    SplitAdamW     one rank in bf16: each fp32 weight lives once, as the bf16 that the model computes with and the 16
                   bits beneath it (kernels/adamw.py)

Sharding makes fp32 weights, gradients and moments cheap: 16 bytes a weight are 0.45 GB on each of 256 ranks of a 7B.
On one rank they are 116 GB, and FSDP's copy of each weight in bf16 and of each gradient in fp32 costs time besides,
with nothing to gather or to reduce. Split weights are the same fp32 numbers to the bit in 4 bytes, the model's own
included, so that one rank holds 6 bytes a weight with its bf16 gradient, plus moments: 8 in fp32, 4 in bf16, 2 in 8bit.

Both are told the step by ``begin``, make the gradients' global norm and clip them by ``clip_gradients``, and look at
``found_inf``: where it is 1, ``step`` changes nothing, and no host has to know.

``Guard`` judges which updates are skipped; train.py's step asks it, and never waits for the answer.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halny.kernels.adamw import adamw_, join, new_moments, split
from halny.kernels.gradient_norm import gradient_norm
from halny.kernels.stochastic_rounding import add_rounded_, add_wide
from halny.model.mistral import named_weights


def _check_groups(groups: list[dict]) -> None:
    """TypeError unless each parameter group has params and weight_decay, and nothing else."""
    for group in groups:
        if wrong := group.keys() ^ {"params", "weight_decay"}:
            raise TypeError(
                f"a parameter group must set params and weight_decay alone; missing or too much: "
                f"{', '.join(sorted(wrong))} (begin sets lr, and betas and eps are the optimizer's)"
            )


class ShardedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, fused, on parameters that FSDP2 shards; its moments are allocated at once."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        _check_groups(groups)
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.parameters = [p for group in groups for p in group["params"]]
        device = self.parameters[0].device
        for p in self.parameters:
            step = torch.zeros((), dtype=torch.float32, device=device)
            self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)  # the fused kernel's own switch

    def begin(self, step: int, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def clip_gradients(self, clip: float) -> Tensor:
        """Scale the gradients so that their global norm is at most ``clip``; the norm before, fp64. A collective."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, clip).full_tensor().double()


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on one rank: parameters that are fp32 until ``take_weights``, and bf16 from then on.

    moments  "fp32", "bf16" or "8bit": kernels/adamw.py; the latter two are rounded stochastically, by bits that depend
             on (seed, step, parameter, element) alone, so that a resumed run draws what an uninterrupted one would have

    Gradients of several micro batches are summed in fp32, or with 8bit moments in bf16, rounded stochastically: a hook
    on each parameter takes its gradient as soon as the backward has made it.

    Of torch's interface it has step, zero_grad and param_groups, whose lr is one for all; run/saver.py keeps its state.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict], betas: tuple[float, float], eps: float, moments: str, seed: int
    ):
        _check_groups(groups)
        super().__init__(groups, {"lr": 0.0})
        self.model, self.betas, self.eps, self.moments = model, betas, eps, moments
        self.low: dict[Tensor, Tensor] = {}  # of every parameter, once ``take_weights`` has split it
        self.parameters = [p for group in groups for p in group["params"]]
        device = self.parameters[0].device
        self.updates = torch.zeros((), dtype=torch.float32, device=device)  # the t of AdamW
        for p in self.parameters:
            self.state[p] = {"step": self.updates, **new_moments(p, moments)}
            p.register_post_accumulate_grad_hook(self._take)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._scale: Tensor | None = None  # of the gradients in the update to come
        names = {p: name for name, p in named_weights(model)}
        self._keys = {p: zlib.crc32(f"{seed} {names[p]}".encode()) for p in self.parameters}
        self._sums: dict[Tensor, Tensor] = {}  # gradients of this step, summed over its micro batches so far
        self._added: Counter[Tensor] = Counter()
        self._number = 0

    def state_dict(self, *_):
        raise NotImplementedError(
            "SplitAdamW's state includes half of each weight: training_state and checkpoint.load save and restore both"
        )

    load_state_dict = state_dict

    def add_param_group(self, param_group):
        if hasattr(self, "_keys"):
            raise NotImplementedError("SplitAdamW takes its parameter groups when it is made, and no more afterwards")
        super().add_param_group(param_group)

    def take_weights(self) -> None:
        """Split the model's weights, which have been filled in fp32; from here on it computes in bf16."""
        self.low = narrow_(self.model)

    def begin(self, step: int, lr: float) -> None:
        self._number = step
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """After each backward: p's gradient goes into the step's sum."""
        total = self._sums.get(p)
        if total is None:
            total = p.grad
        elif self.moments == "8bit":
            self._added[p] += 1
            add_rounded_(total, p.grad, seed=self._seed(p, self._added[p]))
        else:
            total = add_wide(total, p.grad) if total.dtype == torch.bfloat16 else total.add_(p.grad)
        self._sums[p], p.grad = total, None

    def _seed(self, p: Tensor, use: int) -> int:
        """Of the random bits for p in this step: use 0 is the update, n the n-th addition to the sum."""
        return zlib.crc32(f"{self._number} {use}".encode(), self._keys[p])

    @torch.no_grad()
    def clip_gradients(self, clip: float) -> Tensor:
        """The gradients' global norm, fp64; ``step`` scales them on its way, so that it is at most ``clip``."""
        norm = gradient_norm(list(self._sums.values()))
        self._scale = (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self) -> None:
        (beta1, beta2), applied = self.betas, 1.0 - self.found_inf
        t = (self.updates + 1.0).double()
        if self._scale is None:
            raise RuntimeError("step needs the gradients' scale: call clip_gradients before each step")
        rates = [group["lr"] for group in self.param_groups]
        if len(set(rates)) > 1:
            raise ValueError(f"lr must be one for all parameter groups, got {rates}")
        lr = torch.full_like(t, rates[0])
        scalars = [lr, 1.0 - beta1**t, (1.0 - beta2**t).sqrt(), self._scale, self.found_inf.double()]
        scalars, self._scale = torch.stack(scalars).float(), None
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._sums:
                    moments = {name: x for name, x in self.state[p].items() if name != "step"}
                    adamw_(
                        p, self.low[p], self._sums[p], moments, scalars, beta1=beta1, beta2=beta2, eps=self.eps,
                        weight_decay=group["weight_decay"], seed=self._seed(p, 0),
                    )  # fmt: skip
        self.updates.add_(applied)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._sums.clear()
        self._added.clear()


class Split(NamedTuple):
    """A parameter in its two halves."""

    high: Tensor  # bf16
    low: Tensor  # int16

    def joined(self) -> Tensor:
        """The fp32 master weight."""
        return join(*self)


def narrow_(model: nn.Module) -> dict[Tensor, Tensor]:
    """Turn fp32 parameters into bf16 in place; returns the lower halves: parameter -> int16."""
    low = {}
    for p in model.parameters():
        p.data, low[p] = split(p.data)
    return low


def master_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor | Split]]:
    """(name, fp32 weight): the parameter itself, this rank's shard, or its two halves where it has been split."""
    low = getattr(optimizer, "low", {})
    for name, p in named_weights(model):
        yield name, Split(p.data, low[p]) if p in low else p.detach()


APPLIED, NOT_FINITE, SPIKE, SPIKE_SKIPPED = range(4)  # a Guard's verdict on an update


class Guard:
    """Judges each update by numbers that all ranks share, so all of them skip the same ones.

    Skipped is an update whose loss or gradient norm is not finite, and with --skip-spikes one whose loss is above
    --spike times the median of the last 128 applied ones. A skipped update leaves weights and moments untouched to the
    bit; its step number is consumed. The host learns of it a step later, and nothing here waits for the device.
    """

    LENGTH, LEAST = 128, 16  # losses remembered; losses without which no loss is a spike

    def __init__(self, spike: float, skip_spikes: bool, device: torch.device):
        self.factor, self.skips_spikes = spike, skip_spikes
        # Of step n at n % LENGTH; inf where nothing was applied, which sorts behind the losses.
        self.losses = torch.full((self.LENGTH,), math.inf, dtype=torch.float64, device=device)

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """(verdict, the median it was held against), fp64 scalars. Remembers the loss if the update is applied."""
        applied = self.losses.isfinite().sum()
        median = self.losses.sort().values.gather(0, ((applied - 1).clamp(min=0) // 2).view(1)).squeeze()
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        spike = (applied >= self.LEAST) & (loss > self.factor * median)
        verdict = torch.where(bad, NOT_FINITE, torch.where(spike, SPIKE_SKIPPED if self.skips_spikes else SPIKE, 0))
        place = step % self.LENGTH
        self.losses[place] = torch.where(verdict % 2 == 0, loss, math.inf)  # even: applied
        return verdict.double(), median

    def remembered(self) -> list[float | None]:
        """For the checkpoint's manifest: with these a resumed run judges as an uninterrupted one."""
        return [loss if math.isfinite(loss) else None for loss in self.losses.tolist()]

    def remember(self, losses: list[float | None]) -> None:
        self.losses.copy_(torch.tensor([math.inf if loss is None else loss for loss in losses], dtype=torch.float64))
