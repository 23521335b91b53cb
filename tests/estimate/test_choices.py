"""estimate/choices.py: train.py and --plan decide alike, on every card; the micro batch is what fits."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from halny.model.estimate import choices, machines, plan
from halny.model.estimate.memory import RESERVED, memory_estimate, rank_memory, room
from halny.model.estimate.work import ALONE, Work
from halny.model.mistral import PRESETS
from halny.model.run.look_ahead import plan_request
from halny.model.run.ranks import World
from halny.model.run.recipe import PRESETS as RECIPES
from halny.model.run.recipe import command_line
from halny.model.run.resolve import resolve

MISTRAL_7B = PRESETS["mistral-7b"]


@dataclass(frozen=True)
class Cards(World):
    """Ranks on GPUs of so many bytes, which are not here."""

    memory_bytes: int = 0


def flags(**options) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


GRID = [
    *(("mistral-7b-1gpu", 1, dict(recompute=recompute, moments=moments))
      for recompute in ("auto", "always", "never") for moments in ("fp32", "bf16", "8bit")),
    ("mistral-7b-1gpu", 1, dict(micro_batch=2, batch_tokens=8 * 4096)),
    *(("mistral-7b-1gpu", ranks, dict(moments="fp32", recompute=recompute))
      for ranks in (2, 8, 16) for recompute in ("auto", "never")),
    *(("bielik-7b", ranks, dict(recompute=recompute)) for ranks in (8, 64, 256) for recompute in ("auto", "never")),
    ("bielik-7b", 256, dict(reshard="node")),
    ("bielik-7b", 64, dict(shard=8, micro_batch=2)),
    ("mistral-1b", 1, dict(moments="8bit")),
    ("mistral-1b", 8, dict(reshard="always")),
    ("tiny", 1, {}),
    ("tiny", 4, dict(replicate=2)),
]  # fmt: skip


@pytest.mark.parametrize("card", machines.MACHINES)
def test_trainer_and_plan_decide_alike(card, monkeypatch):
    """The same micro batch, layout and recompute, whatever the preset, the number of GPUs and the flags."""
    monkeypatch.setattr("halny.model.run.resolve.INTERPRETED", True)  # as where kernels run
    gpu, found = machines.MACHINES[card].gpu, set()
    assert {preset for preset, *_ in GRID} == RECIPES.keys()
    for preset, gpus, options in GRID:
        recipe = command_line([preset, *flags(**options)])
        world = Cards(0, gpus, torch.device("cpu"), None, min(gpus, 4), memory_bytes=gpu.memory_bytes)
        trained = resolve(replace(recipe, dtype="bf16"), world)
        request = plan_request(replace(recipe, gpus=str(gpus), gpu=card))
        planned = plan.choose(
            plan.work_of(request, gpus), plan.cluster_of(request, gpus), recipe.recompute, **request.asked
        )
        assert (planned.work, planned.layout) == (trained.work, trained.layout), (preset, gpus, options)
        assert planned.decision.recompute_why == trained.decision.recompute_why
        assert trained.recipe.micro_batch == planned.work.micro_batch
        found.add((planned.work.micro_batch, planned.layout, planned.work.recompute))
    assert len(found) > 10  # the grid is one


def test_not_recomputing_takes_a_smaller_micro_batch():
    """As both say it of a GH200 of 96 GB and a B200; --plan had 2 and 8."""
    for card, micro_batch in (("gh200-96", 1), ("b200-180", 4)):
        recipe = command_line(["mistral-7b-1gpu", "--recompute", "never"])
        assert plan.work_of(plan_request(replace(recipe, gpu=card)), 1).micro_batch == micro_batch


def test_the_micro_batch_is_the_largest_that_fits():
    def needed(micro_batch: int, share: int) -> float:
        work = Work(MISTRAL_7B, micro_batch, 4096, share // micro_batch, moments="8bit")
        return memory_estimate(work, ALONE).total / (1 - RESERVED)

    def most(memory: float, share: int) -> int:
        decision = choices.decide(
            MISTRAL_7B, ranks=1, node=1, memory_bytes=int(memory), seq_len=4096, share=share, moments="8bit"
        )
        return decision.work.micro_batch

    assert most(needed(3, 12) + 1e6, 12) == 3
    assert most(needed(4, 16) - 1e6, 16) == 2  # 3 would fit, and does not divide
    assert most(needed(1, 12) - 1e6, 12) == 1  # one sequence, though it does not fit
    assert most(1e15, 12) == 6 and most(1e15, 64) == 8 and most(1e15, 3) == 3


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_it_fits_under_fsdp_too(ranks):
    """As many sequences as there is room for beside this layout's shards, and the next more would not fit."""
    memory_bytes = machines.GPUS["NVIDIA H100 80GB HBM3"].memory_bytes
    asked = dict(ranks=ranks, node=4, memory_bytes=memory_bytes, seq_len=4096, share=8)
    found = choices.decide(MISTRAL_7B, **asked)
    if ranks == 2:  # 58 GB of fp32 state each: not one sequence fits
        assert found.work.micro_batch == 1
        return
    more = choices.decide(MISTRAL_7B, micro_batch=2 * found.work.micro_batch, **asked)
    assert sum(rank_memory(found.work, found.layout).values()) <= room(memory_bytes)
    assert sum(rank_memory(more.work, more.layout).values()) > room(memory_bytes)


def test_a_cpu_takes_what_divides():
    """Where the memory is not known, up to eight at once."""
    recipe = replace(command_line([]), run_dir=Path("none"))
    found = resolve(recipe, World(0, 1, torch.device("cpu"), mesh=None))
    assert (found.recipe.micro_batch, found.layout.fsdp, found.layout.reshard) == (8, True, "always")
