"""--replay-step: one step of a run again, sample by sample, with a look at everything. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from halny.model.data.batches import Batch, Corpus, read_batch
from halny.model.data.tokenizer import decode
from halny.model.mistral import Mistral
from halny.model.run import fsdp
from halny.model.run.ranks import World, everywhere, say
from halny.model.run.resolve import RunSpec
from halny.model.run.watch import Watch


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


def replay(
    step: int, done: int, spec: RunSpec, world: World, corpus: Corpus, model: Mistral, optimizer,
    take_step: Callable[[int, list[Batch]], object], watch: Watch,
) -> None:  # fmt: skip
    """Run one step again from the checkpoint of step ``done``, sample by sample, and print what is not finite where.

    The steps between are taken as they were, by ``take_step``; then each sample of ``step`` alone, forward and
    backward, with a look at the output of every module and the gradient that reaches it.
    """
    first = done + 1
    say(world, f"replaying step {step}" + (f", after steps {first} to {step - 1}" if first < step else ""))
    loader = spec.load_steps(first, step - 1, corpus, world)
    for again in range(first, step):
        watch.at("replay", again)
        take_step(again, next(loader))

    fsdp.reduce_gradients(model, last=True)
    rows = []
    for number in spec.own_numbers(step, world).ravel():
        watch.at("replay", step)
        source, row = corpus.locate(number[None], spec.recipe.seed)
        batch = read_batch(corpus.train, source, row)
        found = examine(model, optimizer, batch.to(world.device))
        text = decode(corpus.tokenizer, batch.tokens[0, :24].tolist()) if corpus.tokenizer else ""
        rows.append((int(number), corpus.place(int(source[0]), int(row[0])), found, text))
    for rank, theirs in enumerate(everywhere(rows)):
        for number, place, found, text in theirs:
            bad = f"  first not finite: {found.first}" if found.first else ""
            say(world, f"sample {number} (rank {rank}, {place})  loss {found.loss:.4f}  "
                f"gradient norm {found.grad_norm:.4g}{bad}{'  ' + repr(text) if text else ''}")  # fmt: skip
