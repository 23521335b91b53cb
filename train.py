"""Train a Mistral: from token shards to checkpoints, curves and a Hugging Face export, on one CPU or many GPUs.

    torchrun train.py                                       the built-in example: a minute on two CPU cores
    torchrun train.py bielik-7b --data DIR --init-from HF   the published run's recipe
    torchrun train.py my-run.toml --lr 1e-4                 a recipe of your own; a flag beats the file

The file is the story of a run, and reads from top to bottom:

    1  model and optimizer     meta device -> FSDP2, or one rank -> weights; AdamW; the learning rate
    2  one step                forward, backward, clip, update or not
    3  a run                   what the loop holds in its hands: saved, restored
    4  the loop                steps, checkpoints, evaluations
    5  from start to end       refusals first; set up, train, leave results

What it stands on: model/run/ (recipe: every setting; resolve: what follows from them; inputs: what is read; token_ids:
what exports say of texts; ranks: what ranks agree on; watch: who ends a run that hangs; fsdp: who holds what of the
model; optimizer: AdamW, which updates are skipped; checkpoint, saver and save_interval: how and when a run is saved,
and found again; average: the mean of checkpoints; evaluation; rank_process: signals and exit codes; host: drivers,
caches, cores), model/data/ (samples and how they reach the device), model/record/ (what a run says and leaves),
model/mistral.py.
"""

from __future__ import annotations

import sys

from halny.model.run.rank_process import RankProcess, exit_at_once
from halny.model.run.recipe import FREE_TO_CHANGE, IMPLIED, Recipe, ranks_to_profile, steps_to_profile

PROCESS = RankProcess()
begin = PROCESS.begin
if __name__ == "__main__":
    RECIPE = begin(sys.argv[1:])  # here, so that help and typing errors are answered before the seconds torch takes

import contextlib
import functools
import gc
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from halny.kernels import stochastic_rounding
from halny.kernels.dispatch import set_reference_only
from halny.model.convert import load_hf_weights
from halny.model.data.batches import IGNORED, Batch, Corpus
from halny.model.data.history import to_json
from halny.model.durable import write_json
from halny.model.estimate.roofline import attention_keys
from halny.model.exits import FINISHED, STOPPED, DataLost, Failed, Refused
from halny.model.mistral import Mistral
from halny.model.prepare_data import prepare_builtin
from halny.model.record.breakdown import floors_of_run
from halny.model.record.hook import CheckpointHook
from halny.model.record.journal import Journal
from halny.model.record.loggers import PATIENCE_S, check_loggers, start_loggers
from halny.model.record.profiler import StepProfiler
from halny.model.record.results import leave_curves, leave_export, leave_sample, leave_summary
from halny.model.record.run_folder import RunFolder
from halny.model.record.summary import energy_joules, spent_on
from halny.model.run import checkpoint, fsdp
from halny.model.run.average import fill_with_mean
from halny.model.run.evaluation import HELD_OUT, EvalSets, evaluate, perplexity_in_words
from halny.model.run.inputs import (
    check_evaluations,
    check_ids,
    check_same_inputs,
    check_tokenizers,
    hash_raw_files,
    open_data,
    open_eval_sets,
)
from halny.model.run.look_ahead import look_before, plan_ahead
from halny.model.run.optimizer import Guard, ShardedAdamW, SplitAdamW, narrow_
from halny.model.run.ranks import (
    World,
    agreed,
    anywhere,
    ask_everywhere,
    check_collectives,
    check_same_weights,
    check_shared_folder,
    first_missed,
    on_main,
    say,
    settle_on_host,
    start_distributed,
)
from halny.model.run.replay import replay
from halny.model.run.resolve import (
    DTYPES,
    RunSpec,
    as_it_began,
    can_be_written,
    check_disk,
    check_looking,
    data_or_refused,
    describe,
    is_frozen,
    resolve,
    scores_path,
)
from halny.model.run.save_interval import SaveInterval
from halny.model.run.saver import Saver, training_state
from halny.model.run.token_ids import settle_token_ids
from halny.model.run.watch import Watch

# ---------------------------------------------------------------------------------------------- 1 model and optimizer


def build_model(spec: RunSpec, world: World) -> Mistral:
    """The model, allocated, its weights in fp32 and not yet filled.

    Sharded by FSDP2 or HSDP (run/fsdp.py): each layer is gathered in the compute dtype when it is needed, and gradients
    are reduced in fp32 into fp32 shards. One rank in bf16 has nothing to gather or reduce: there the model stays as it
    is, and ``begin_computing`` makes its weights bf16.
    """
    with torch.device("meta"):
        model = Mistral(spec.model, spec.work.recompute)
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name, spec.recipe))
    if spec.layout.fsdp:
        fsdp.shard_model(model, spec.layout, world, DTYPES[spec.recipe.dtype])
    model.to_empty(device=world.device)
    return model


def fill_model(model: Mistral, spec: RunSpec, world: World) -> None:
    """Fresh weights, or those of --init-from, of which each rank reads only its own rows. Refused if one is NaN."""
    if spec.recipe.init_from:
        try:
            agreed(load_hf_weights, model, spec.recipe.init_from)
        except Refused as refusal:
            raise Refused(f"--init-from: {refusal}") from None
    else:
        model.init_weights(spec.recipe.seed)


def build_optimizer(model: Mistral, recipe: Recipe) -> ShardedAdamW | SplitAdamW:
    """AdamW with weight decay on matrices, its moments allocated at once."""
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = recipe.beta1, recipe.beta2
    if fsdp.is_sharded(model):
        return ShardedAdamW(groups, betas, recipe.eps)
    return SplitAdamW(model, groups, betas, recipe.eps, recipe.moments, recipe.seed)


def begin_computing(model: Mistral, optimizer: ShardedAdamW | SplitAdamW | None) -> None:
    """After the weights have been filled or loaded, in fp32: on one rank in bf16, split them."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.take_weights()
    elif not fsdp.is_sharded(model):  # --eval-only
        narrow_(model)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step (from 1): linear warm-up to lr, then the schedule, min_lr exactly at the last."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    start = recipe.steps - recipe.decay_steps if recipe.schedule == "wsd" else recipe.warmup_steps
    if recipe.schedule == "constant" or step <= start:
        return recipe.lr
    progress = (step - start) / (recipe.steps - start)
    remaining = 1 - progress if recipe.schedule != "cosine" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * remaining


# --------------------------------------------------------------------------------------------------------- 2 one step


def train_step(
    model: Mistral,
    optimizer: ShardedAdamW | SplitAdamW,
    guard: Guard,
    step: int,
    batches: list[Batch],
    lr: float,
    clip: float,
) -> Tensor:
    """One optimizer step, its gradients accumulated over the batches; nothing in it waits for the device.

    The loss is the mean over the real targets of all ranks and micro batches, so every token weighs alike however the
    batch is divided: each summed loss is scaled by world size / global targets, because FSDP averages over ranks.

    Returns fp64 [7] on the device: of all ranks the loss sum, targets, correct predictions and pairs of a query and a
    key (what attention cost); the gradient norm before clipping; the guard's verdict on the update, and the median of
    losses behind it.
    """
    optimizer.begin(step, lr)
    world_size = dist.get_world_size()
    n_targets = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
    dist.all_reduce(n_targets)
    scale = world_size / n_targets.clamp(min=1)

    pairs = sum(attention_keys(batch.lengths, model.config.window) for batch in batches)
    totals = torch.zeros(4, dtype=torch.float64, device=n_targets.device)
    totals[3:].fill_(pairs)  # no totals[3] = pairs: that is a copy from the host, which waits for it
    for i, batch in enumerate(batches, start=1):
        fsdp.reduce_gradients(model, last=i == len(batches))
        loss, n_tokens, n_correct = model(*batch.inputs)
        (loss * scale).backward()
        totals[:3] += torch.stack([loss.detach().double(), n_tokens.double(), n_correct.double()])
    dist.all_reduce(totals)

    grad_norm = optimizer.clip_gradients(clip or math.inf)
    verdict, median = guard.judge(step, totals[0] / totals[1].clamp(min=1), grad_norm)
    optimizer.found_inf.copy_(verdict % 2)  # odd: skipped
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat([totals, torch.stack([grad_norm, verdict, median])])


# ------------------------------------------------------------------------------------------------------------ 3 a run


@dataclass
class Run:
    """A run in progress: what its loop holds in its hands."""

    spec: RunSpec
    world: World
    folder: RunFolder
    corpus: Corpus | None  # None: --eval-only on other data than a run's own
    eval_sets: EvalSets
    model: Mistral
    optimizer: ShardedAdamW | SplitAdamW | None  # None: --eval-only
    guard: Guard
    saver: Saver
    interval: SaveInterval
    hook: CheckpointHook
    watch: Watch
    journal: Journal
    process: RankProcess
    config: dict
    began: float  # time.monotonic() of its start
    step: int = 0  # the last one done
    next_checked: int = 0  # the layer whose weights the next save compares, modulo their number
    scores: dict | None = None  # of the last evaluation: its step, and the metrics
    evaluation_s: float = 0.0  # how long it took
    spent: dict[str, float] = field(default_factory=dict)  # seconds of this start, by what they were spent on
    energy_j: float | None = None  # what this rank's GPU had drawn when the steps began
    weights: str = ""  # where those come from that are evaluated

    @spent_on("checkpoints")
    def save(self) -> None:
        """Begin a checkpoint of the last step done, after a look whether all ranks see the same weights."""
        self.watch.at("checkpoint", self.step, long=True)
        began = time.monotonic()
        if self.world.size > 1:  # one layer at a time: in the end all of them
            layer, self.next_checked = self.next_checked % self.spec.model.n_layers, self.next_checked + 1
            check_same_weights(self.model.layers[layer], f"layer {layer}", self.world)
        updates = int(next(iter(self.optimizer.state.values()))["step"])  # steps less those that were skipped
        facts = {
            "config": self.config, "world_size": self.world.size,
            "updates": updates, "skips": self.journal.skips, "losses": self.guard.remembered(),
        }  # fmt: skip
        if self.scores and self.scores["step"] == self.step:
            facts["evaluation"] = {name: x for name, x in self.scores.items() if math.isfinite(x)}
        self.saver.save(self.step, training_state(self.model, self.optimizer), facts)
        self.interval.saved(time.monotonic() - began)
        stalled = f"{self.saver.stalled_s * 1e3:.0f} ms"
        say(self.world, f"saving step {self.step}; the training waited {stalled} for its copy")
        if self.world.is_main:
            self.folder.status("running", self.step)

    @spent_on("checkpoints")
    def finish_saving(self) -> None:
        self.watch.at("checkpoint", self.step, long=True)
        self.saver.wait()

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint that ``newest_sound`` has verified, whatever number of ranks wrote it."""
        facts = checkpoint.read_manifest(path)
        checkpoint.load(path, training_state(self.model, self.optimizer), whole=self.optimizer is not None)
        if self.optimizer is None:
            self.step = facts["step"]
            return
        try:
            for state in self.optimizer.state.values():
                state["step"].fill_(facts["updates"])
            self.guard.remember(facts["losses"])
            self.step, self.journal.skips = facts["step"], int(facts["skips"])
            self.next_checked = self.step
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{path}: its manifest does not tell where the run was ({error!r})") from None
        if self.spec.recipe.moments != "fp32" and facts["config"].get("rounding", 1) != stochastic_rounding.VERSION:
            say(self.world, "moments    rounded by other random bits than before the checkpoint: as right on average, "
                "but not to the bit what an uninterrupted run would have")  # fmt: skip

    def out_of_time(self, next_s: float) -> bool:
        """Whether what comes next, of so many seconds, may not fit into --max-hours."""
        limit = self.spec.recipe.max_hours
        return limit is not None and time.monotonic() - self.began + next_s > limit * 3600

    @property
    def save_s(self) -> float:
        """Seconds to allow for a checkpoint, or for the export, which is smaller; guessed until one is written."""
        return 1.5 * self.interval.writing_s

    def take_step(self, step: int, batches: list[Batch]) -> tuple[Tensor, float]:
        """``train_step`` at the learning rate of that step: its values, and the rate."""
        rate = learning_rate(self.spec.recipe, step)
        return train_step(self.model, self.optimizer, self.guard, step, batches, rate, self.spec.recipe.clip), rate

    def evaluation_is_due(self) -> bool:
        every, last = self.spec.recipe.eval_every, self.step == self.spec.recipe.steps
        return bool(every and self.eval_sets.rows) and self.step > 0 and (last or self.step % every == 0)


# ----------------------------------------------------------------------------------------------------------- 4 the loop


@spent_on("steps")
def train(run: Run) -> str | None:
    """The steps after run.step up to the recipe's last; why it stopped before that, or None."""
    recipe, journal = run.spec.recipe, run.journal
    loader = run.spec.load_steps(run.step + 1, recipe.steps, run.corpus, run.world)
    journal.begin(run.step + 1)
    profiler = make_profiler(run)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step on one rank is a pause on all of them
    stopping, saved = False, run.step
    try:
        while run.step < recipe.steps and not stopping:
            step = run.step + 1
            run.watch.at("step", step)
            profiler.begin(step, run.model, run.optimizer)
            with profiler.region("data"):
                batches = next(loader)
            journal.probe.begin()
            values, lr = run.take_step(step, batches)
            journal.add(step, values, lr, loader.waited)
            run.step = run.watch.done = step
            if step == profiler.last:
                run.watch.at("profile", step, long=True)
                journal.settle()
                profiled = f"profile of steps {profiler.first} to {step}: in {profiler.folder}"
                say(run.world, profiler.end() or profiled)

            # Of the next step, and before it: a rank that found out in it would leave the others in their collectives.
            missed = loader.problem(hurry=run.process.stopping)
            stop = run.process.stopping() or run.out_of_time(2 * journal.step_s + run.save_s)
            save = run.interval.due(step, run.evaluation_is_due(), journal.step_s)
            answers, asking = ask_everywhere(stop, run.saver.failed, missed is not None, save)
            asking.wait()
            stopping, save_failed, data_lost, save = map(bool, answers.tolist())
            if save_failed:
                run.saver.wait()
                raise Failed("another rank could not write its part of the checkpoint, and says why")
            if data_lost and not stopping:
                raise first_missed(missed)
            if run.evaluation_is_due() and not stopping:
                journal.settle()
                with journal.gap.spending("evaluation"):
                    stopping = not log_evaluation(run)
            if stopping or save or step == recipe.steps:
                journal.settle()
                with journal.gap.spending("checkpoints"):
                    run.save()
                saved = step
                gc.collect()
        run.finish_saving()
    except DataLost:
        if run.step > saved:
            journal.settle()
            run.save()
        run.finish_saving()
        raise
    except Failed:
        with contextlib.suppress(Failed):  # the reason is known; but a checkpoint under way is worth the wait
            run.saver.wait()
        raise
    finally:
        profiler.close()
        journal.close()
        gc.enable()
    return anywhere(run.process.stop_signal) or f"--max-hours {recipe.max_hours}" if stopping else None


def make_profiler(run: Run) -> StepProfiler:
    """--profile's; without it one of step 0, which never comes."""
    recipe, world, first, last, floors = run.spec.recipe, run.world, 0, 0, None
    if recipe.profile:
        first, last = steps_to_profile(recipe.profile, run.step + 1, recipe.steps)
        floors = floors_of_run(run.spec.work, run.spec.layout, world)
        if first <= run.step:
            say(world, f"--profile {recipe.profile}: nothing is profiled, step {run.step} is done already")
    chosen = world.rank in ranks_to_profile(recipe.profile_ranks or "0", world.size)
    return StepProfiler(first, last, chosen, run.folder.path / "traces", world.rank, world.device, floors)


def score(run: Run) -> dict | None:
    """Evaluate every set as of run.step: that and the metrics. None if a signal came in between."""
    scores, alive = {"step": run.step}, lambda: run.watch.at("evaluation", run.step)
    began = time.monotonic()

    def stopping() -> bool:  # the first takes as long as it takes, and is cut short where time is; later ones are known
        left = max(0.0, run.evaluation_s - (time.monotonic() - began))
        return run.process.stopping() or run.out_of_time(left + run.save_s)

    for key, rows in run.eval_sets.rows.items():
        text = run.eval_sets.texts[key]
        found = evaluate(run.model, rows, text, run.spec.recipe.micro_batch, run.world, alive, stopping)
        if found is None:
            return None
        scores |= {f"{key}_{name}": value for name, value in found.items()}
        say(run.world, f"{'held out' if key == HELD_OUT else key.removeprefix(HELD_OUT + '_')} at step {run.step}: "
            f"loss {found['loss']:.4f}  ppl {perplexity_in_words(found['perplexity'])}  "
            f"acc {found['accuracy']:.2%}" + (f"  {found['bits_per_byte']:.4f} bits/byte" if text else ""))  # fmt: skip
    run.evaluation_s = time.monotonic() - began
    return scores


@spent_on("evaluation")
def log_evaluation(run: Run) -> bool:
    """Evaluate after run.step; False if a signal came in between, and nothing is logged."""
    scores = score(run)
    if scores is None:
        return False
    run.scores = scores
    if run.world.is_main:
        run.folder.log(scores)
    return True


def evaluate_only(run: Run) -> int:
    """--eval-only: the scores of the weights that set_up has loaded, into --out; nothing else of a run changes."""
    scores = score(run)
    if scores is None:
        say(run.world, "stopped by a signal; nothing was written")
        return STOPPED
    if run.world.is_main:
        path = scores_path(run.spec.recipe)
        if not can_be_written(path):  # somebody else's run: what it scored is said above
            say(run.world, f"evaluation not kept: {path} cannot be written; name a file with --out")
            return FINISHED
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"weights": run.weights} | scores)
        say(run.world, f"evaluation {path}")
    return FINISHED


# --------------------------------------------------------------------------------------------- 5 from start to end


def set_up(recipe: Recipe, process: RankProcess) -> Run:
    """Everything before the first step: refusals first, then the folder, the data, the model and its weights."""
    began, looking = process.began, recipe.replay_step is not None or recipe.eval_only
    world = start_distributed(recipe.deadline)
    about_host = settle_on_host(world, recipe.numa, recipe.allow_old_nccl)
    recipe = on_main(world, as_it_began, recipe)
    spec = agreed(resolve, recipe, world)
    agreed(check_looking, recipe)
    hashes = hash_raw_files(spec, world)
    corpus = agreed(open_data, recipe.data, spec, hashes) if recipe.data else None
    eval_sets = agreed(open_eval_sets, corpus, spec, hashes)
    agreed(check_ids, corpus, eval_sets, spec, world.rank, world.size)
    weights = check_same_inputs(recipe, corpus, eval_sets, world)
    if not looking:
        agreed(check_disk, spec)
        on_main(world, check_loggers, spec.recipe.tensorboard, spec.recipe.wandb)
    set_reference_only(recipe.kernels == "reference")

    folder = RunFolder(recipe.run_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, so --no-resume has had its turn
    if not looking:
        on_main(world, folder.open, None if restarted else recipe.resume)
        check_shared_folder(folder.path, world)
    watch = Watch(world, recipe.deadline, folder.path, process.write_failure)
    process.run_begins(spec, watch, None if looking else folder)
    if corpus is None and (not (recipe.eval_only and recipe.eval_data) or on_main(world, folder.data.exists)):
        corpus = builtin_corpus(folder, spec, world)
        eval_sets = agreed(open_eval_sets, corpus, spec)
    watch.at("verifying the data", long=True)
    check_evaluations(recipe, eval_sets)
    said = on_main(world, check_tokenizers, recipe.init_from, corpus, eval_sets)
    model_config, carried, about_ids = on_main(world, settle_token_ids, spec, corpus)
    spec = replace(spec, model=model_config)
    for read in filter(None, (corpus, eval_sets)):
        agreed(data_or_refused, read.verify, world.rank, world.size)
    config = {
        "recipe": asdict(spec.recipe), "model": asdict(spec.model), "carried": carried,
        "data": corpus and corpus.fingerprint,
        "weights": weights, "rounding": stochastic_rounding.VERSION,
    }  # fmt: skip
    asked = [other for name in recipe.allow_change or () for other in (name, *IMPLIED.get(name, ()))]
    history, changed = on_main(world, folder.check_config, config, FREE_TO_CHANGE, asked)
    watch.at("testing the collectives", long=True)
    check_collectives(world)
    watch.at("verifying the checkpoint", long=True)
    averaged = checkpoint.newest_to_average(folder.path, world, recipe.average) if recipe.average else []
    path = averaged[-1] if averaged else newest_checkpoint(recipe, folder, world)
    watch.done = checkpoint.step_of(path) if path else 0
    if watch.done > recipe.steps and not looking:
        raise Refused(f"--steps {recipe.steps}: {folder.path} has done {watch.done} steps already; name more, or "
            "another --run-dir")  # fmt: skip
    if corpus and not recipe.eval_only and (earlier := on_main(world, checkpoint.config_of, folder.path)):
        may_change = "data" in (recipe.allow_change or ()) and not looking
        agreed(data_or_refused, corpus.go_on, earlier, watch.done * spec.samples_a_step, may_change)
    config["data_history"] = corpus and to_json(corpus.history)
    if world.is_main and not looking:
        open_records(folder, spec, world, watch.done, config, history, changed)
        watch.writes_heartbeat = True
    say(world, describe(spec, world, corpus, eval_sets))
    for line in (*about_host, *about_ids, *said):
        say(world, line)

    watch.at("filling the model", long=True)
    model = build_model(spec, world)
    optimizer = None if recipe.eval_only else build_optimizer(model, spec.recipe)
    guard = Guard(recipe.spike, recipe.skip_spikes, world.device)
    say_all, spent = functools.partial(say, world), {}
    hook = CheckpointHook(recipe.on_checkpoint, folder.path, say_all)
    saver = Saver(folder.checkpoints, recipe.keep, recipe.keep_every, world, eval_sets.decides, hook.saved)
    interval = SaveInterval(spec, saver, world, say_all)
    journal = Journal(spec, world, folder, watch, spent)
    run = Run(spec, world, folder, corpus, eval_sets, model, optimizer, guard, saver, interval, hook, watch, journal,
        process, config, began, spent=spent)  # fmt: skip
    if averaged:
        agreed(fill_with_mean, model, averaged)
        run.step = watch.done
        steps = ", ".join(str(checkpoint.step_of(each)) for each in averaged)
        run.weights = f"mean of steps {steps} of {folder.path}"
        say(world, f"evaluating the {run.weights}")
    elif path:
        run.restore(path)
        run.weights = f"step {run.step} of {folder.path}"
        say(world, f"{'evaluating' if recipe.eval_only else 'resuming after'} step {run.step} from {path}")
    else:
        fill_model(model, spec, world)
        run.weights = str(recipe.init_from)
    begin_computing(model, optimizer)
    spent["start-up"], run.energy_j = time.monotonic() - began, energy_joules(world.device)
    return run


def builtin_corpus(folder: RunFolder, spec: RunSpec, world: World) -> Corpus:
    """The Python language reference, prepared in the run's folder by whoever comes first."""
    if world.is_main and not folder.data.exists():
        say(world, "preparing the built-in corpus: the Python language reference, Mistral-7B-v0.1's tokenizer")
    on_main(world, lambda: folder.data.exists() or prepare_builtin(folder.data))
    return agreed(open_data, (str(folder.data),), spec)


def newest_checkpoint(recipe: Recipe, folder: RunFolder, world: World) -> Path | None:
    """The one to go on from: the newest that is sound, or the newest sound one before the step to replay."""
    before = recipe.replay_step or (10**9 if recipe.eval_only else None)
    path = checkpoint.newest_sound(folder.checkpoints, world, functools.partial(say, world), before)
    if recipe.eval_only and path is None and on_main(world, checkpoint.complete, folder.checkpoints):
        raise Refused(f"--eval-only: every checkpoint in {folder.checkpoints} is damaged")
    return path


def open_records(
    folder: RunFolder, spec: RunSpec, world: World, step: int, config: dict, history: list[dict], changed: dict
) -> None:
    """On rank 0: what the run writes down from ``step`` on; config.json says with what, and what was changed."""
    versions = {"torch": torch.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    say_all = functools.partial(say, world)
    if step < spec.recipe.steps:
        folder.loggers = start_loggers(spec.recipe.tensorboard, spec.recipe.wandb, folder.path, step, config, say_all)
    if changed:
        history = [*history, {"after_step": step, "changed": changed}]
        changes = "; ".join(f"{name} from {old} to {new}" for name, (old, new) in changed.items())
        say(world, f"changed from here on: {changes}")
        settings = {name: old for name, (old, _) in changed.items() if name in asdict(spec.recipe)}
        before = replace(spec.recipe, **settings)
        rates = [learning_rate(r, min(step + 1, r.steps)) for r in (before, spec.recipe)]
        if not math.isclose(*rates, rel_tol=0.01):
            say(world, f"learning rate of step {step + 1}: {rates[1]:.3g}, and as it was {rates[0]:.3g}")
    facts = {"world_size": world.size, "versions": versions, "history": history}
    write_json(folder.path / "config.json", config | facts)
    folder.keep_metrics_until(step)
    folder.status("running", step)


def main(recipe: Recipe, process: RankProcess) -> int:
    """The whole run; returns the exit code of this rank. Raises Refused or Failed."""
    if recipe.plan:
        return plan_ahead(recipe)
    if recipe.preflight:
        return look_before(recipe, process)
    run = set_up(recipe, process)
    if recipe.replay_step:
        replay(recipe.replay_step, run.step, run.spec, run.world, run.corpus, run.model, run.optimizer, run.take_step,
            run.watch)  # fmt: skip
        return FINISHED
    if recipe.eval_only:
        return evaluate_only(run)
    world, folder, again, stopped = run.world, run.folder, run.step == recipe.steps, None
    if again:
        say(world, f"this run is finished: {run.step} steps in {folder.path}")
    if run.evaluation_is_due() and not on_main(world, folder.has_evaluation, run.step) and not log_evaluation(run):
        stopped = anywhere(run.process.stop_signal)  # in an evaluation that had been cut short before
        if not stopped:
            raise Failed(
                f"--max-hours {recipe.max_hours}: one evaluation does not fit; give it longer, or evaluate on less"
            )
    if not again and not stopped:
        stopped = train(run)
        if not stopped and anywhere(run.out_of_time(run.save_s)):
            stopped = f"--max-hours {recipe.max_hours}, before the export,"
    if stopped:
        if world.is_main:
            folder.plot_curves()
            folder.status("stopped", run.step, stopped)
        summarize_run(run)
        run.hook.wait(PATIENCE_S)
        say(world, f"stopped by {stopped} after step {run.step}; the same command again continues")
        return STOPPED
    leave_results(run, again)
    if run.eval_sets.decides and (best := on_main(world, checkpoint.best, folder.checkpoints, run.eval_sets.decides)):
        say(world, f"best       {best[0]}: {run.eval_sets.decides} {best[1]:.4f}")
    if not (again and on_main(world, (folder.path / "summary.json").exists)):
        summarize_run(run)
    if world.is_main:
        folder.status("finished", run.step)
    run.watch.at("on-checkpoint", run.step, long=True)
    run.hook.wait(recipe.deadline)
    return FINISHED


@spent_on("export")
def leave_results(run: Run, again: bool) -> None:
    """Export, curves and a sample of text; of a run that was finished before, those that are missing."""
    run.watch.at("export", run.step, long=True)
    carried = run.config["carried"]
    leave_export(run.folder, run.spec, run.world, run.corpus, run.model, run.optimizer, carried, again)
    leave_curves(run.folder, run.world, again)
    leave_sample(run.folder, run.spec, run.world, run.corpus, run.model, again)


def summarize_run(run: Run) -> None:
    wall_s = time.monotonic() - run.began
    leave_summary(run.folder, run.spec, run.world, run.spent, wall_s, run.energy_j)


run_to_exit_code = functools.partial(PROCESS.run_to_exit_code, main)

if __name__ == "__main__":
    exit_at_once(run_to_exit_code(RECIPE))
