"""One sample through the model with a look at everything: what --replay-step does with each sample of a step."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from halny.model.data.batches import Batch


class Found(NamedTuple):
    loss: float  # mean over the sample's targets
    grad_norm: float
    first: str | None  # what was not finite first, in the order of the computation


def examine(model: nn.Module, optimizer, batch: Batch) -> Found:
    """Forward and backward on ``batch``: looks at each module's output and the gradient that reaches it. Nothing stays.

    A collective under FSDP. Waits for the device at every module.
    """
    seen: list[str] = []

    def check(x: Tensor, what: str) -> None:
        if not x.isfinite().all():
            seen.append(what)

    def look(name: str):
        def hook(_module, _inputs, output) -> None:
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, Tensor) and x.is_floating_point():
                    check(x, f"the output of {name}")
                    if x.requires_grad:
                        x.register_hook(lambda gradient: check(gradient, f"the gradient at {name}"))

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        loss, n_targets, _ = model(*batch.inputs)
        (loss / n_targets.clamp(min=1)).backward()
        norm = optimizer.clip_gradients(math.inf).item()
        optimizer.zero_grad()
    finally:
        for hook in hooks:
            hook.remove()
    return Found(loss.item() / max(int(n_targets), 1), norm, seen[0] if seen else None)
