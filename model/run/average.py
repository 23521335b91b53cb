"""The weighted mean of several models' weights: for model/export.py, and for train.py --eval-only --average.

At a constant learning rate the checkpoints of a run scatter around a better model. Their mean has much of what a decay
of the rate would bring, without its steps (Sanyal et al. 2023, Early Weight Averaging meets High Learning Rates for LLM
Pre-training, https://arxiv.org/abs/2306.03241; Tian et al. 2025, WSM, https://arxiv.org/abs/2507.17634). bench/
convergence.py --average measures how much. Models that were tuned from one beginning on different data may be averaged
too (Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482).

Sums are in fp64, and no more than some rows of one parameter is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from halny.model.convert import HfWeights
from halny.model.exits import Refused
from halny.model.hf_folder import FIELDS
from halny.model.mistral import Mistral, local_rows
from halny.model.run.checkpoint import CheckpointWeights

Weights = CheckpointWeights | HfWeights
NOT_OF_THE_WEIGHTS = ("bos_id", "eos_id")  # fields of a config in which models that are averaged may differ


class Mean:
    """``sum(weight * model) / sum(weights)`` as fp32, some rows of one parameter at a time.

    models  each with its weight, a positive whole number; one alone is its own mean, to the bit
    config  of the first. Raises Refused for models that differ in a field that the weights depend on.
    """

    def __init__(self, models: Sequence[tuple[Weights, int]]):
        self.models, self.config = models, models[0][0].config
        first, ours = models[0][0], asdict(self.config)
        for other, _ in models[1:]:
            for name, theirs in asdict(other.config).items():
                if name not in NOT_OF_THE_WEIGHTS and theirs != ours[name]:
                    raise Refused(f"{other.path} and {first.path} are models of different sizes or kinds and have no "
                        f"mean: {name} ({FIELDS[name][0]}) is {theirs} and {ours[name]}")  # fmt: skip

    def rows(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows low to high of our parameter of that name, on the CPU."""
        total = None
        for model, weight in self.models:
            x = model.rows(name, low, high).double().mul_(weight)
            total = x if total is None else total.add_(x)
        return total.div_(sum(weight for _, weight in self.models)).float()


@torch.no_grad()
def fill_with_mean(model: Mistral, checkpoints: Sequence[Path]) -> None:
    """Give a model the mean of checkpoints, each rank the rows that it owns.

    Raises Refused, as Mean and where a checkpoint cannot be read any more.
    """
    mean = Mean([(CheckpointWeights(path), 1) for path in checkpoints])
    try:
        for name, parameter in model.weights().items():
            local, start = local_rows(parameter)
            local.copy_(mean.rows(name, start, start + local.shape[0]))
    except SafetensorError as error:  # a run that goes on deletes its oldest
        raise Refused(f"{checkpoints[0]} and those after it: {error}; give the command again") from None
