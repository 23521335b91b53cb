"""From a recipe to the run's spec: what the recipe leaves open, filled in, or a refusal that names flag and value.

Nothing is allocated or written here, and of the data and of weights only their descriptions are read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from halny.kernels.dispatch import INTERPRETED
from halny.model.convert import check_hf_weights, pieces
from halny.model.data.batches import Corpus, Loader, parse_sources
from halny.model.data.dataset import (
    DataError,
)
from halny.model.data.order import share_of, step_numbers
from halny.model.durable import folder_above, in_words
from halny.model.estimate import machines, roofline, sizes
from halny.model.estimate.choices import Decided, Decision, decide, recomputed
from halny.model.estimate.memory import checkpoint_bytes
from halny.model.exits import Refused, unknown
from halny.model.hf_folder import read_carried, read_hf_config, weights_fingerprint
from halny.model.hints import hint
from halny.model.mistral import PRESETS as MODELS
from halny.model.mistral import MistralConfig
from halny.model.run.checkpoint import complete, config_of, newest_kept
from halny.model.run.evaluation import EvalSets, parse_named
from halny.model.run.ranks import World
from halny.model.run.recipe import AUTO, CHANGE_WHEN_ASKED, Recipe, ranks_to_profile, steps_to_profile
from halny.model.run.settings import flag

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # fp16 to export in only
BUILTIN_VOCAB_SIZE = 32_000  # of Mistral-7B-v0.1's tokenizer


@dataclass(frozen=True)
class RunSpec(Decided):
    """The recipe with nothing left open, and what follows from it on this world."""

    recipe: Recipe
    model: MistralConfig
    decision: Decision
    peak_flops: float | None  # of this device, in bf16

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in a step."""
        return self.work.accumulation

    @property
    def samples_a_step(self) -> int:
        return self.recipe.batch_tokens // self.recipe.seq_len

    @property
    def n_parameters(self) -> int:
        return sizes.parameters(self.model)

    @property
    def flops_per_token(self) -> float:
        return roofline.flops_per_token(self.model, self.recipe.seq_len)

    def own_numbers(self, step: int, world: World) -> np.ndarray:
        """The numbers of this rank's samples in a step: [accumulation, micro_batch]."""
        return share_of(step_numbers(step, self.samples_a_step), world.rank, world.size, self.recipe.micro_batch)

    def load_steps(self, first: int, last: int, corpus: Corpus, world: World) -> Loader:
        """This rank's batches of steps first to last, a list of as many as it accumulates for each step."""
        steps = (self.own_numbers(step, world) for step in range(first, last + 1))
        return Loader(corpus, self.recipe.seed, steps, world.device)


def resolve(recipe: Recipe, world: World) -> RunSpec:
    """Fill in what the recipe leaves open and refuse what cannot be."""
    model = model_config(recipe)
    check_flags(recipe, model, world)
    check_profile(recipe, world)
    decision = decide_here(recipe, model, world)
    warmup_steps, decay_steps, min_lr = schedule(recipe)
    recipe = replace(
        recipe,
        model=str(recipe.init_from or recipe.model),
        micro_batch=decision.work.micro_batch,
        shard=decision.layout.shard,
        replicate=decision.layout.replicate,
        reshard=decision.layout.reshard,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        min_lr=min_lr,
        dtype=compute_dtype(recipe, world),
        save_every=saving_interval(recipe),
        eval_every=max(1, min(1000, recipe.steps // 5)) if recipe.eval_every is None else recipe.eval_every,
    )
    return RunSpec(recipe, model, decision, machines.peak_flops(world.device_name, recipe.peak_tflops))


# ---------------------------------------------------------------------------------------------- what resolve stands on


def earlier_config(recipe: Recipe) -> dict | None:
    """The config of the run that this one continues from a checkpoint; None where it continues none, or cannot tell."""
    if recipe.resume is False or not complete(recipe.run_dir / "checkpoints"):
        return None
    try:
        found = config_of(recipe.run_dir)
        return found if {"recipe", "model"} <= found.keys() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # ``check_config`` says so
        return None


def as_it_began(recipe: Recipe) -> Recipe:
    """The recipe; where --allow-change steps, with what followed from the earlier --steps and is not asked for now.

    A warm-up that is over would begin again else.
    """
    earlier = earlier_config(recipe)
    if earlier is None or "steps" not in (recipe.allow_change or ()):
        return recipe
    names = ("warmup_steps", "decay_steps") if recipe.schedule == "wsd" else ("warmup_steps",)
    kept = {name: earlier["recipe"].get(name) for name in names if getattr(recipe, name) is None}
    return replace(recipe, **kept)


def weights_of(recipe: Recipe) -> str | None:
    """What tells the weights that a run began with from others: of --init-from, or if that is gone as then recorded."""
    if recipe.init_from and recipe.init_from.is_dir():
        return weights_fingerprint(recipe.init_from)
    return (earlier_config(recipe) or {}).get("weights")


def model_config(recipe: Recipe) -> MistralConfig:
    """The sizes of --init-from, whose files are checked here without reading a weight, or of --model.

    A folder that is gone since the run's first checkpoint is not needed any more.
    """
    named, began_with = recipe.init_from or recipe.model, recipe.init_from and "init_from"
    gone = (recipe.init_from or recipe.model not in MODELS) and not Path(named).exists()
    earlier = earlier_config(recipe) if gone else None
    if earlier is not None and earlier["recipe"].get(began_with or "model") == str(named):
        return MistralConfig(**earlier["model"])
    try:
        if recipe.init_from:
            read_carried(recipe.init_from)  # whose errors are for now and not for when the run's folder is there
            return check_hf_weights(recipe.init_from)
        if recipe.model in MODELS:
            return MODELS[recipe.model]
        if Path(recipe.model).is_dir():
            return read_hf_config(Path(recipe.model))
    except ValueError as error:
        raise Refused(f"{'--init-from' if recipe.init_from else '--model'}: {error}") from None
    if remedy := hint(recipe.model):
        raise Refused(f"--model {recipe.model} is neither a preset nor a folder{remedy}")
    raise unknown("--model", recipe.model, MODELS)


def data_or_refused(make: Callable, *arguments, of: str = "--data"):
    """``make(*arguments)``, with its DataError as a refusal of a flag."""
    try:
        return make(*arguments)
    except DataError as error:
        raise Refused(f"{of} {error}".replace("--dtype", "--data-dtype")) from None  # prepare_data's name for it


def is_frozen(name: str, recipe: Recipe) -> bool:
    return recipe.freeze is not None and re.search(recipe.freeze, name) is not None


def check_freeze(recipe: Recipe, model: MistralConfig) -> None:
    names = [name for name, _ in pieces(model)]
    try:
        frozen = sum(is_frozen(name, recipe) for name in names)
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused(f"--freeze {recipe.freeze!r} is not a regular expression: {error}") from None
    if recipe.freeze is not None and frozen in (0, len(names)):
        what = "every parameter" if frozen else "no parameter"
        raise Refused(
            f"--freeze {recipe.freeze!r} matches {what}; their names are {names[0]}, {names[1]}, ... {names[-1]}"
        )


def check_flags(recipe: Recipe, model: MistralConfig, world: World) -> None:
    """Refuse flags that do not go together, or not with this model."""
    r = recipe
    for name in ("gpus", "gpu", "nic_gbs", "gpus_per_node"):
        if getattr(r, name) is not None:
            raise Refused(f"{flag(name)} {getattr(r, name)} belongs to --plan; add that or leave it out")
    if r.seq_len > model.max_seq_len:
        raise Refused(f"--seq-len {r.seq_len} is beyond the model's limit of {model.max_seq_len} positions")
    check_freeze(r, model)
    for name in r.allow_change or ():
        if name not in CHANGE_WHEN_ASKED:
            raise Refused(f"--allow-change {name}: it can be one of {', '.join(CHANGE_WHEN_ASKED)}")
    sources = data_or_refused(parse_sources, r.data or ())
    named = data_or_refused(parse_named, r.eval_data or (), of="--eval-data")
    if r.data is None and not (r.eval_only and named) and model.vocab_size != BUILTIN_VOCAB_SIZE:
        raise Refused(
            f"--data is needed: the built-in corpus has a vocabulary of {BUILTIN_VOCAB_SIZE}, but the model's is of "
            f"{model.vocab_size}"
        )
    if r.resume is False:
        inputs = [(flag(name), Path(value)) for name in ("init_from", "model") if (value := getattr(r, name))]
        inputs += [("--data", folder) for folder, _ in sources]
        inputs += [("--eval-data", folder) for folder in named.values()]
        for name, path in inputs:
            if path.exists() and path.resolve().is_relative_to(r.run_dir.resolve()):
                raise Refused(f"--no-resume would set aside {name} {path}, which lies in --run-dir {r.run_dir}")


def check_profile(recipe: Recipe, world: World) -> None:
    r = recipe
    if r.profile_ranks and not r.profile:
        raise Refused(f"--profile-ranks {' '.join(r.profile_ranks)} belongs to --profile; name steps, or leave it out")
    try:
        steps_to_profile(r.profile or "auto", 1, r.steps)
    except ValueError as error:
        raise Refused(f"--profile {error}") from None
    try:
        ranks_to_profile(r.profile_ranks or "0", world.size)
    except ValueError as error:
        raise Refused(f"--profile-ranks {error}") from None


def compute_dtype(recipe: Recipe, world: World) -> str:
    return recipe.dtype or ("bf16" if world.device.type == "cuda" else "fp32")


def decide_here(recipe: Recipe, model: MistralConfig, world: World) -> Decision:
    """Micro batch, layout and recompute on these ranks, as estimate/choices.py decides them."""
    r = recipe
    if r.batch_tokens % (r.seq_len * world.size):
        unit = r.seq_len * world.size
        near = " or ".join(f"{n * unit}" for n in (r.batch_tokens // unit, r.batch_tokens // unit + 1) if n)
        raise Refused(
            f"--batch-tokens {r.batch_tokens} is not a multiple of --seq-len {r.seq_len} x {world.size} rank(s); "
            f"use {near}, or another number of ranks"
        )
    return decide(
        model,
        ranks=world.size,
        node=world.node_size,
        memory_bytes=world.memory_bytes,
        seq_len=r.seq_len,
        share=r.batch_tokens // r.seq_len // world.size,
        micro_batch=r.micro_batch,
        shard=r.shard,
        replicate=r.replicate,
        reshard=r.reshard,
        recompute=r.recompute,
        moments=r.moments,
        compute_bytes=DTYPES[compute_dtype(r, world)].itemsize,
        kernels=(world.device.type == "cuda" or INTERPRETED) and r.kernels != "reference",
    )


def schedule(recipe: Recipe) -> tuple[int, int, float]:
    """(warm-up steps, steps of decay, the last learning rate), as the recipe has them or by default."""
    r = recipe
    warmup_steps = min(2000, r.steps // 10) if r.warmup_steps is None else r.warmup_steps
    decay_steps = max(1, r.steps // 5) if r.decay_steps is None else r.decay_steps
    if warmup_steps > r.steps:
        raise Refused(f"--warmup-steps {warmup_steps} is more than --steps {r.steps}; lower it")
    if r.schedule == "wsd" and warmup_steps + decay_steps > r.steps:
        raise Refused(f"--warmup-steps {warmup_steps} and --decay-steps {decay_steps} exceed --steps {r.steps}")
    if r.decay_steps is not None and r.schedule != "wsd":
        raise Refused(f"--decay-steps {r.decay_steps} belongs to --schedule wsd, not to {r.schedule}")
    min_lr = r.lr / 10 if r.min_lr is None else r.min_lr
    if min_lr > r.lr:
        raise Refused(f"--min-lr {min_lr} is above --lr {r.lr}")
    return warmup_steps, decay_steps, min_lr


def saving_interval(recipe: Recipe) -> int | str:
    """Steps between checkpoints, or "auto" (run/save_interval.py)."""
    if recipe.save_every == AUTO and recipe.mtbf_hours is None:
        raise Refused("--save-every auto needs --mtbf-hours, the mean time between failures of the whole job; 50,000 "
            "divided by its number of GPUs, where nothing better is known")  # fmt: skip
    if recipe.save_every != AUTO and recipe.mtbf_hours is not None:
        raise Refused(f"--mtbf-hours {recipe.mtbf_hours:g} belongs to --save-every auto; add that or leave it out")
    return recipe.save_every or max(1, min(500, recipe.steps // 10))


def check_disk(spec: RunSpec) -> None:
    """Refuse a run whose first checkpoint and export cannot fit on the disk."""
    export = DTYPES[spec.recipe.export_dtype].itemsize * spec.n_parameters
    free = shutil.disk_usage(folder_above(spec.recipe.run_dir)).free
    needed = checkpoint_bytes(spec.model, spec.recipe.moments) + export
    if free < needed:
        raise Refused(
            f"--run-dir {spec.recipe.run_dir} has {in_words(free)} free, but one checkpoint and the export take "
            f"{in_words(needed)}"
        )


def check_looking(recipe: Recipe) -> None:
    """Refuse to look into a run that is not there."""
    if recipe.replay_step and not (recipe.run_dir / "config.json").exists():
        raise Refused(f"--replay-step {recipe.replay_step}: no run in {recipe.run_dir}; name its --run-dir")
    if recipe.replay_step and recipe.resume is False:
        raise Refused(f"--replay-step {recipe.replay_step} and --no-resume exclude each other; leave one out")
    if recipe.replay_step and recipe.replay_step > recipe.steps:
        raise Refused(f"--replay-step {recipe.replay_step} is beyond the last of --steps {recipe.steps}")
    if recipe.eval_only and (recipe.replay_step or recipe.resume is False):
        other = f"--replay-step {recipe.replay_step}" if recipe.replay_step else "--no-resume"
        raise Refused(f"--eval-only and {other} exclude each other; leave one out")
    for name in ("out", "average"):
        if (value := getattr(recipe, name)) and not recipe.eval_only:
            raise Refused(f"{flag(name)} {value} belongs to --eval-only; add that or leave it out")
    if recipe.average:
        newest_kept(recipe.run_dir, recipe.average)
    if recipe.out and not can_be_written(recipe.out):
        raise Refused(f"--out {recipe.out} cannot be written; name another file")
    if recipe.eval_only and not recipe.init_from and not complete(recipe.run_dir / "checkpoints"):
        raise Refused(f"--eval-only: no checkpoint in {recipe.run_dir}; name its --run-dir, or a Hugging Face folder "
            "with --init-from")  # fmt: skip


def scores_path(recipe: Recipe) -> Path:
    """The file of what --eval-only finds."""
    return recipe.out or recipe.run_dir / "evaluation.json"


def can_be_written(path: Path) -> bool:
    return not path.is_dir() and os.access(folder_above(path.parent), os.W_OK)


# ---------------------------------------------------------------------------------------------------------- in words


def describe(spec: RunSpec, world: World, corpus: Corpus | None, eval_sets: EvalSets) -> str:
    """Everything derived, for the log, before the first step."""
    r, gib = spec.recipe, 2**30
    memory = spec.decision.memory
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in memory.items())
    peak = "unknown, so no MFU (--peak-tflops)" if spec.peak_flops is None else f"{spec.peak_flops / 1e12:,.0f} TFLOP/s"
    sources = corpus.describe(r.steps * spec.samples_a_step, r.seed) if corpus else []
    weights = f"Hugging Face weights of {r.init_from}" if r.init_from else f"fresh weights, seed {r.seed}"
    if r.init_from and not r.init_from.is_dir():
        weights += ", which are not there any more: the checkpoints hold what became of them"
    return "\n".join([
        f"model      {spec.n_parameters:,} parameters; {weights}"
        + (f"; frozen: {r.freeze} (memory and MFU as if not)" if r.freeze else ""),
        *(f"data       {line}" for line in shortened(sources)),
        *(f"vocabulary {line}" for line in vocabulary_line(corpus, spec)),
        *(f"evaluated  {line}" for line in [*shortened(eval_sets.describe()), *eval_sets.without_bytes()]),
        f"batch      {r.batch_tokens:,} tokens a step = {world.size} rank(s) x {spec.accumulation} accumulated x "
        f"{r.micro_batch} x {r.seq_len}",
        f"length     {r.steps:,} steps = {r.steps * r.batch_tokens:,} tokens",
        f"schedule   {r.warmup_steps} warm-up steps to {r.lr:g}, then {r.schedule}"
        + (f" to {r.min_lr:g}" if r.schedule != "constant" else ""),
        f"compute    {r.dtype} on {world.size} x {world.device_name}; {spec.flops_per_token / 1e9:.3f} GFLOP a token; "
        f"peak {peak}",
        describe_sharding(spec),
        f"recompute  {recomputed(spec.work)}: {spec.decision.recompute_why}",
        f"memory     about {sum(memory.values()) / gib:.2f} GiB a rank: {parts}",
        f"run        {r.run_dir}: a checkpoint every "
        + (f"{r.save_every} steps" if r.save_every != AUTO else f"so often, best for --mtbf-hours {r.mtbf_hours:g}")
        + (f", evaluation every {r.eval_every}" if r.eval_every and eval_sets.rows else ", no evaluation"),
    ])  # fmt: skip


def describe_sharding(spec: RunSpec) -> str:
    """Two lines for the log: where weights and gradients are."""
    layout = spec.layout
    if layout.fsdp:
        what = {
            "always": "dropped after the forward pass",
            "never": "kept from the forward to the backward pass",
        }.get(layout.reshard, f"kept after the forward pass as parts on {layout.reshard} ranks")
        return (
            f"sharding   {layout.shard} shard(s) x {layout.replicate} replica(s); gathered weights are {what}: "
            f"{layout.reshard_why}\ngradients  {layout.gradients_why}"
        )
    sums = {"8bit": "bf16, rounded stochastically"}.get(spec.recipe.moments, "fp32")
    return (
        f"sharding   none: bf16 weights, the lower halves of their fp32 masters, and moments in {spec.recipe.moments}\n"
        "gradients  in bf16" + (f", summed over {spec.accumulation} micro batches in {sums}" * (spec.accumulation > 1))
    )


def shortened(lines: list[str], most: int = 9) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]


def vocabulary_line(corpus: Corpus | None, spec: RunSpec) -> list[str]:
    ours, theirs = spec.model.vocab_size, corpus.vocab_size if corpus else None
    if theirs in (None, ours):
        return []
    unused = f"{ours - theirs:,} of them stand for no token" if ours > theirs else "no token has the last ids"
    return [f"{theirs:,} ids in the data's tokenizer, {ours:,} rows in the model: {unused}"]
