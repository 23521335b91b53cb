"""Which updates of a run are skipped, decided on the device: train.py's step asks, and never waits for the answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
