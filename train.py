"""Train a Mistral: from token shards to checkpoints, curves and a Hugging Face export, on one CPU or many GPUs.

    torchrun train.py                                       the built-in example: a minute on two CPU cores
    torchrun train.py bielik-7b --data DIR --init-from HF   the published run's recipe
    torchrun train.py my-run.toml --lr 1e-4                 a recipe of your own; a flag beats the file

The file reads from top to bottom:

    1  the recipe          every setting, once, with its help; presets
    2  starting up         signals, processes, refusals that every rank hears
    3  the plan            everything derived from the recipe, before anything is allocated or written
    4  data                what model/data/batches.py makes of --data, and this rank's share of it
    5  model, optimizer    meta device -> FSDP2, or one rank -> weights; AdamW; the learning rate
    6  one step            forward, backward, clip, update or not
    7  the run             the loop, and what it leaves behind
    8  one step again      for whoever asks what went wrong in it

What it stands on: model/run/ (settings: command line and TOML files; ranks: what the ranks agree on; watch: who ends a
run that hangs; fsdp: who holds what of the model; optimizer: AdamW, and which updates are skipped; checkpoint, saver:
how a run is saved and found again; evaluation), model/data/ (batches: which samples a step has, and how they reach the
device), model/record/ (what a run leaves and says), model/estimate/ (its arithmetic), model/mistral.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import time
import typing
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from halny.model.exits import FAILED, FINISHED, REFUSED, STOPPED, Failed, Refused, unknown
from halny.model.run.settings import Settings, flag, setting

# ------------------------------------------------------------------------------------------------------- 1 the recipe


# One setting an entry, wrapped by hand to stay a table:
# fmt: off
@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of. None means: derived by ``resolve`` in chapter 3, as [the help line] says."""

    model: str = setting("model", "tiny", "model preset, or a Hugging Face folder whose config.json gives the sizes")
    init_from: Path | None = setting("model", None,
        "Hugging Face folder to start from: its sizes and its weights [fresh weights]")
    freeze: str | None = setting("model", None,
        r"regular expression on parameters that stay as they are, as in 'embed|layers\.[0-7]\.' [none]", shown="REGEX")
    seed: int = setting("model", 0, "fixes the fresh weights and the order of the samples", minimum=0,
        below=2**63)
    kernels: str = setting("model", "auto",
        "auto, or reference: plain PyTorch everywhere, to find out whether a kernel is to blame",
        choices=("auto", "reference"))

    data: tuple[str, ...] | None = setting("data", None,
        "folder made by python -m halny.model.prepare_data or raw .bin file; or several and the share of samples from "
        "each, as in pl:0.7 en:0.3 [built in: the Python language reference]")
    data_dtype: str | None = setting("data", None,
        "dtype of the ids where --data is a raw .bin file (nanoGPT's, llm.c's, ALLaMo's) whose header does not say",
        choices=("uint16", "uint32"))
    documents: bool = setting("data", False,
        "whole documents packed best-fit, attention inside each only, instead of windows of the concatenated text")
    seq_len: int = setting("data", 128, "tokens in a sample", minimum=1)
    batch_tokens: int = setting("data", 1024, "tokens in an optimizer step, over all ranks", minimum=1, below=2**32)
    micro_batch: int | None = setting("data", None,
        "samples a rank computes at once; it accumulates gradients over its share [the most that divides it, up to 8, "
        "and that fits one GPU if there is one]",
        minimum=1)

    steps: int = setting("optimizer", 200, "optimizer steps in the whole run", minimum=1, below=10**8)
    lr: float = setting("optimizer", 2e-3, "peak learning rate", above=0, below=100)
    min_lr: float | None = setting("optimizer", None, "learning rate of the last step [a tenth of --lr]", minimum=0)
    schedule: str = setting("optimizer", "cosine",
        "after the warm-up: constant, or down to --min-lr by cosine, linear or wsd (linear over --decay-steps only)",
        choices=("constant", "cosine", "linear", "wsd"))
    warmup_steps: int | None = setting("optimizer", None,
        "steps of linear warm-up [a tenth of --steps, at most 2000]", minimum=0)
    decay_steps: int | None = setting("optimizer", None, "last steps of a wsd schedule [a fifth of --steps]", minimum=1)
    weight_decay: float = setting("optimizer", 0.1, "AdamW's, on matrices; norms have none", minimum=0)
    beta1: float = setting("optimizer", 0.9, "AdamW's decay of the first moment", minimum=0, below=1)
    beta2: float = setting("optimizer", 0.95, "AdamW's decay of the second moment", minimum=0, below=1)
    eps: float = setting("optimizer", 1e-8, "AdamW's epsilon", above=0)
    clip: float = setting("optimizer", 1.0, "largest global gradient norm; 0 for no clipping", minimum=0)
    max_skips: int = setting("optimizer", 3,
        "updates in a row that are skipped for a loss or gradient that is not finite; one more stops the run",
        minimum=0)
    spike: float = setting("optimizer", 2.0,
        "a loss above so many times the median of the last 128 is a spike, and said so", above=1)
    skip_spikes: bool = setting("optimizer", False, "skip the updates of spikes too")
    moments: str = setting("optimizer", "fp32",
        "AdamW's two moments, 8 bytes a weight in fp32; for one rank in bf16 also bf16 (4) and 8bit (2), rounded "
        "stochastically",
        choices=("fp32", "bf16", "8bit"))
    dtype: str | None = setting("optimizer", None,
        "dtype of the computation; master weights and reductions are fp32 [bf16 on a GPU, fp32 on the CPU]",
        choices=("bf16", "fp32"))

    shard: int | None = setting("ranks", None,
        "ranks that share one copy of the model, neighbours [all, or what --replicate leaves]", minimum=1)
    replicate: int | None = setting("ranks", None,
        "such copies, between which gradients are summed: HSDP [what --shard leaves]", minimum=1)
    reshard: str | None = setting("ranks", None,
        "a layer's gathered weights after the forward pass: dropped always, never, or kept in parts on the ranks of a "
        "node or on a number of ranks [by memory and node; the start-up lines say why]")

    recompute: str = setting("ranks", "auto",
        "whether the backward pass makes the outputs of norms and SwiGLU again, a third of all activations: always, "
        "never, or auto, where memory is short; costs 0.5% of a 7B's step",
        choices=("auto", "always", "never"))

    plan: bool = setting("plan", False,
        "calculate what this run will do on the machine below (memory, speed, network, time, energy), without a GPU, "
        "print it and end")
    gpus: str | None = setting("plan", None,
        "how many, or a range of doublings, as in 8..2048, which is also plotted [256; 1 where --moments is not fp32]")
    gpu: str | None = setting("plan", None,
        "a100-40, a100-80, h100-80, h200-141, gh200-96, gh200-144, b200-180 or the driver's name of one [gh200-96]")
    nic_gbs: float | None = setting("plan", None,
        "GB/s of the network card of each GPU, one direction; 400 Gb/s are 50 [25]", above=0)
    gpus_per_node: int | None = setting("plan", None, "GPUs of a node, joined by NVLink [4]", minimum=1)

    run_dir: Path | None = setting("run", None, "folder of the run, on a file system that all nodes see [runs/PRESET]")
    resume: bool | None = setting("run", None,
        "--resume insists on a checkpoint to continue from; --no-resume sets an earlier run aside and starts anew "
        "[continue if there is a checkpoint]")
    save_every: int | None = setting("run", None,
        "steps between checkpoints [a tenth of --steps, at most 500]", minimum=1)
    keep: int = setting("run", 2, "newest checkpoints kept, beside the best of those evaluated", minimum=1)
    keep_every: int | None = setting("run", None, "also keep the checkpoints of every so many steps [none]", minimum=1)
    on_checkpoint: str | None = setting("run", None,
        "shell command after each checkpoint, beside the training, with HALNY_CHECKPOINT (its folder), HALNY_STEP and "
        "HALNY_RUN_DIR in its environment [none]", shown="CMD")
    eval_every: int | None = setting("run", None,
        "steps between evaluations, on the held-out split and --eval-data; 0: none [a fifth of --steps, at most 1000]",
        minimum=0)
    eval_data: tuple[str, ...] | None = setting("run", None,
        "more sets to evaluate on, all tokens of data folders named here, as in pl:DIR en:DIR [none]", shown="NAME:DIR")
    eval_only: bool = setting("run", False,
        "evaluate the newest checkpoint, or if there is none --init-from, into evaluation.json; changes nothing else")
    export_dtype: str = setting("run", "bf16", "dtype of the final Hugging Face export", choices=("bf16", "fp32"))
    max_hours: float | None = setting("run", None,
        "stop, saved, before so many hours from the start: the limit of the batch system, less a little [no limit]",
        above=0)
    deadline: float = setting("run", 600.0,
        "seconds that a rank may be in one place; then the run ends and names it (start, save, export: six times that)",
        minimum=1)
    replay_step: int | None = setting("run", None,
        "run this one step again, from the checkpoint before it, and say which sample and module are not finite; "
        "changes nothing", minimum=1)
    allow_change: tuple[str, ...] | None = setting("run", None,
        "settings that this run may go on with changed though its losses depend on them, as in steps lr data; "
        "config.json's history states each [none]", shown="NAME")
    preflight: bool = setting("run", False,
        "measure these machines for a minute instead of training: names the slow ones, predicts the rate, changes "
        "nothing; exit code 0 is go, 1 no-go")
    profile: str | None = setting("run", None,
        "profile these steps into traces/; alone: three, after five [none]", bare="auto", shown="FIRST[-LAST]")
    profile_ranks: tuple[str, ...] | None = setting("run", None,
        "ranks that --profile is for, or all [0]", shown="RANK")
    tensorboard: bool = setting("run", False, "write metrics.jsonl's figures for TensorBoard too, into tensorboard/")
    wandb: str | None = setting("run", None,
        "send them to this project of Weights & Biases; WANDB_MODE=offline keeps them in wandb/ [none; alone: halny]",
        bare="halny", shown="PROJECT")
    peak_tflops: float | None = setting("run", None,
        "this device's dense peak in bf16, for MFU [known GPUs: by name]", above=0)


PRESETS: dict[str, dict] = {
    # the first run: real text, the real tokenizer, about a minute on two CPU cores
    "tiny": {},
    # 1.1 billion parameters from fresh weights
    "mistral-1b": dict(
        model="mistral-1b", seq_len=4096, batch_tokens=262_144, micro_batch=1, steps=10_000, lr=4e-4, warmup_steps=500,
    ),
    # Mistral-7B continued on one GPU of 80 GB or more: 8 bytes a weight, activations for as many sequences as fit
    "mistral-7b-1gpu": dict(
        model="mistral-7b", moments="8bit", seq_len=4096, batch_tokens=65_536, steps=10_000, lr=1e-5, min_lr=1e-6,
        warmup_steps=200, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0, keep=1,
    ),
    # Bielik-7B-v0.1: Mistral-7B-v0.1 continued on Polish text by 256 GH200
    "bielik-7b": dict(
        model="mistral-7b", seq_len=4096, batch_tokens=4_194_304, micro_batch=4, steps=17_350, lr=3e-5, min_lr=2e-5,
        schedule="cosine", warmup_steps=2000, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0,
    ),
}
# fmt: on

# What a resumed run may change: what is computed stays, but for updates skipped. (Data may move: its fingerprint not.)
FREE_TO_CHANGE = (
    *("run_dir", "resume", "data", "micro_batch", "kernels", "max_skips", "spike", "skip_spikes"),
    *("shard", "replicate", "reshard", "recompute"),
    *("save_every", "keep", "keep_every", "eval_every", "export_dtype", "peak_tflops"),
    *("max_hours", "deadline", "replay_step", "eval_data", "eval_only", "profile", "profile_ranks"),
    *("plan", "gpus", "gpu", "nic_gbs", "gpus_per_node", "preflight"),
    *("tensorboard", "wandb", "on_checkpoint", "allow_change"),
)
# What it may change when --allow-change says so, stated in config.json's history. ("data": to other tokens.)
CHANGE_WHEN_ASKED = (
    *("steps", "lr", "min_lr", "schedule", "warmup_steps", "decay_steps"),
    *("weight_decay", "beta1", "beta2", "eps", "clip", "data"),
)
IMPLIED = {"steps": ("warmup_steps", "decay_steps"), "lr": ("min_lr",)}  # which follow it, where not given

COMMAND = Settings(
    Recipe,
    PRESETS,
    usage="torchrun [--nproc-per-node N ...] train.py [PRESET | FILE.toml] [--flag value ...]",
    description="Train a Mistral with FSDP: fp32 master weights, exact resume, Hugging Face weights in and out. "
    f"Presets: {', '.join(PRESETS)}. A FILE.toml holds the same settings (seq_len = 4096) and may start from a "
    'preset (preset = "bielik-7b"). The same command again resumes. In [brackets]: what holds if the flag is left '
    "out and the preset does not say.",
    epilog="Exit codes of each rank: 0 finished, 2 refused, 75 stopped by a signal and resumable, 1 failed.",
)
SETTINGS, read_toml, command_line = COMMAND.fields, COMMAND.read_toml, COMMAND.command_line


# ------------------------------------------------------------------------------------------------------ 2 starting up

stop_signal: str | None = None  # the name of a signal that asked this rank to stop; looked at between steps
active: Active | None = None  # the run that has begun, for those who cannot be handed it


def ask_to_stop(number: int, _frame) -> None:
    global stop_signal
    stop_signal = signal.Signals(number).name
    if active is not None:
        active.watch.stop_asked_at = time.monotonic()


def refuse(message: object) -> typing.NoReturn:
    """One line from rank 0, and exit code 2 on every rank.

    torchrun ends all ranks as soon as the first one exits, so the others wait until rank 0 has been heard.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(REFUSED))
        time.sleep(10)
    os._exit(REFUSED)


def begin(arguments: list[str]) -> Recipe:
    """What need not wait for torch: streams, signals, dying with torchrun, and the command line."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, stream).reconfigure(errors="replace")  # a terminal that cannot show a letter shows a "?"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, ask_to_stop)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # on the CPU, huge pages for the logits
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # on a GPU, less fragmentation
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing: torch 2.13 announces its profiler otherwise
    if os.environ.get("RANK", "0") != "0" and not sys.warnoptions:
        warnings.simplefilter("ignore")  # rank 0 has the same ones, and says them once
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # A killed torchrun (kill -9) cannot end its ranks; the kernel does it, so that they do not hold GPUs and locks.
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        return command_line(arguments)
    except Refused as refusal:
        refuse(refusal)


if __name__ == "__main__":
    RECIPE = begin(sys.argv[1:])  # here, so that help and typing errors are answered before the seconds torch takes

import functools  # noqa: E402
import gc  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from halny.kernels.dispatch import INTERPRETED, set_reference_only  # noqa: E402
from halny.model.convert import check_hf_weights, load_hf_weights, pieces, read_hf_config, save_hf, write_hf  # noqa: E402
from halny.model.data.batches import IGNORED, Batch, Corpus, Loader, parse_sources, read_batch  # noqa: E402
from halny.model.data.dataset import DataError, Dataset, RawDataset, is_dataset, open_dataset  # noqa: E402
from halny.model.data.order import share_of, step_numbers  # noqa: E402
from halny.model.durable import in_words, write_json  # noqa: E402
from halny.model.estimate import choices, machines, out_of_memory, roofline, sizes  # noqa: E402
from halny.model.estimate.choices import activations, choose_layout, recomputed  # noqa: E402
from halny.model.estimate.memory import moment_bytes, rank_memory  # noqa: E402
from halny.model.estimate.plan import Request, answer  # noqa: E402
from halny.model.estimate.work import Layout, Sharding, Work  # noqa: E402
from halny.model.mistral import PRESETS as MODELS  # noqa: E402
from halny.model.mistral import Mistral, MistralConfig  # noqa: E402
from halny.model.prepare_data import prepare_builtin  # noqa: E402
from halny.model.record.breakdown import floors_of_run  # noqa: E402
from halny.model.record.hook import CheckpointHook  # noqa: E402
from halny.model.record.journal import (  # noqa: E402
    Gap,
    Progress,
)
from halny.model.record.loggers import PATIENCE_S, check_loggers, start_loggers  # noqa: E402
from halny.model.record.profiler import StepProfiler, ranks_to_profile, steps_to_profile  # noqa: E402
from halny.model.record.run_folder import RunFolder  # noqa: E402
from halny.model.record.summary import energy_joules, in_lines, spent_on, summarize  # noqa: E402
from halny.model.run import checkpoint, fsdp  # noqa: E402
from halny.model.run.checkpoint import step_of  # noqa: E402
from halny.model.run.evaluation import HELD_OUT, EvalSets, evaluate, loss_metrics, parse_named  # noqa: E402
from halny.model.run.fsdp import shard_model  # noqa: E402
from halny.model.run.optimizer import (  # noqa: E402  # noqa: E402
    NOT_FINITE,
    SPIKE,
    SPIKE_SKIPPED,
    Guard,
    ShardedAdamW,
    SplitAdamW,
    master_weights,
    narrow_,
)
from halny.model.run.preflight import Job, preflight  # noqa: E402
from halny.model.run.ranks import (  # noqa: E402
    World,
    agreed,
    ask_everywhere,
    check_collectives,
    check_same_weights,
    everywhere,
    on_main,
    say,
    start_distributed,
)
from halny.model.run.replay import examine  # noqa: E402
from halny.model.run.saver import Saver, training_state  # noqa: E402
from halny.model.run.watch import Probe, Watch  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUILTIN_VOCAB_SIZE = 32_000  # of Mistral-7B-v0.1's tokenizer


# --------------------------------------------------------------------------------------------------------- 3 the plan


@dataclass(frozen=True)
class Plan:
    """The recipe with nothing left open, and what follows from it on this world."""

    recipe: Recipe
    model: MistralConfig
    samples_a_step: int
    whole: bool  # one rank holds all of the model, in bf16, without FSDP
    layout: Layout
    work: Work  # what a rank computes in a step
    why_lean: str  # why the backward makes the outputs of norms and SwiGLU again, or they are kept
    flops_per_token: float
    peak_flops: float | None

    @property
    def n_parameters(self) -> int:
        return sizes.parameters(self.model)

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in a step."""
        return self.work.accumulation

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the fullest rank at the peak of a step, by part."""
        r = self.recipe
        return rank_memory(self.work, Sharding.of(self.layout), r.shard * r.replicate, DTYPES[r.dtype].itemsize)


def model_config(recipe: Recipe) -> MistralConfig:
    """The sizes of --init-from, whose files are checked here without reading a weight, or of --model."""
    try:
        if recipe.init_from:
            return check_hf_weights(recipe.init_from)
        if recipe.model in MODELS:
            return MODELS[recipe.model]
        if Path(recipe.model).is_dir():
            return read_hf_config(Path(recipe.model))
    except ValueError as error:
        raise Refused(f"{'--init-from' if recipe.init_from else '--model'}: {error}") from None
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


def resolve(recipe: Recipe, world: World) -> Plan:
    """Fill in what the recipe leaves open and refuse what cannot be. Reads little, allocates and writes nothing."""
    model = model_config(recipe)
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

    if r.batch_tokens % (r.seq_len * world.size):
        unit = r.seq_len * world.size
        near = " or ".join(f"{n * unit}" for n in (r.batch_tokens // unit, r.batch_tokens // unit + 1) if n)
        raise Refused(
            f"--batch-tokens {r.batch_tokens} is not a multiple of --seq-len {r.seq_len} x {world.size} rank(s); "
            f"use {near}, or another number of ranks"
        )
    dtype = r.dtype or ("bf16" if world.device.type == "cuda" else "fp32")
    whole = fsdp.is_whole(world, DTYPES[dtype])
    if r.moments != "fp32" and not whole:
        raise Refused(
            f"--moments {r.moments} is for one rank in bf16, and this is {dtype} on {world.size} rank(s); "
            + ("take --moments fp32: shards are small" if world.size > 1 else "add --dtype bf16, or leave it out")
        )
    samples_a_step = r.batch_tokens // r.seq_len
    share = samples_a_step // world.size
    micro_batch = r.micro_batch or max(n for n in range(1, 9) if share % n == 0)
    if whole and r.micro_batch is None and world.memory_bytes is not None:
        lean = r.recompute != "never"
        micro_batch = choices.most_micro_batch(model, world.memory_bytes, r.seq_len, r.moments, share, lean=lean) or 1
    if share % micro_batch:
        raise Refused(
            f"--micro-batch {micro_batch} does not divide the {share} samples that --batch-tokens {r.batch_tokens} "
            f"gives each of {world.size} rank(s); use a divisor of {share}"
        )

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

    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    if r.resume is False:
        inputs = [(flag(name), Path(value)) for name in ("init_from", "model") if (value := getattr(r, name))]
        inputs += [("--data", folder) for folder, _ in sources]
        inputs += [("--eval-data", folder) for folder in named.values()]
        for name, path in inputs:
            if path.exists() and path.resolve().is_relative_to(r.run_dir.resolve()):
                raise Refused(f"--no-resume would set aside {name} {path}, which lies in --run-dir {r.run_dir}")
    ours = (world.device.type == "cuda" or INTERPRETED) and r.kernels != "reference"  # kernels, not what they stand for
    layout = choose_layout(
        model, size=world.size, node_size=world.node_size, shard=r.shard, replicate=r.replicate, reshard=r.reshard,
        micro_batch=micro_batch, seq_len=r.seq_len, accumulation=share // micro_batch,
        compute_bytes=DTYPES[dtype].itemsize, lean=ours and r.recompute != "never", memory_bytes=world.memory_bytes,
    )  # fmt: skip
    work = Work(model, micro_batch, r.seq_len, share // micro_batch, moments=r.moments)
    if ours:
        work, why_lean = activations(
            work, Sharding.of(layout), world.size, world.memory_bytes, r.recompute, DTYPES[dtype].itemsize
        )
    else:
        work, why_lean = replace(work, lean=False, whole_logits=True), "PyTorch's own layers"
    recipe = replace(
        recipe,
        model=str(r.init_from or r.model),
        micro_batch=micro_batch,
        shard=layout.shard,
        replicate=layout.replicate,
        reshard=layout.reshard_name,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        min_lr=min_lr,
        dtype=dtype,
        save_every=saving_interval(r),
        eval_every=max(1, min(1000, r.steps // 5)) if r.eval_every is None else r.eval_every,
    )
    return Plan(
        recipe,
        model,
        samples_a_step=samples_a_step,
        whole=whole,
        layout=layout,
        work=work,
        why_lean=why_lean,
        flops_per_token=roofline.flops_per_token(model, r.seq_len),
        peak_flops=machines.peak_flops(device_name, r.peak_tflops),
    )


def saving_interval(recipe: Recipe) -> int:
    return recipe.save_every or max(1, min(500, recipe.steps // 10))


def plan_ahead(recipe: Recipe) -> int:
    """--plan: the run on another machine, calculated (model/estimate/plan.py). Starts nothing; returns an exit code."""
    if os.environ.get("RANK", "0") != "0":
        return FINISHED
    r = recipe
    if r.dtype == "fp32" or r.kernels == "reference":
        raise Refused(
            "--plan calculates a run in bf16 with our kernels; leave out --dtype fp32 and --kernels reference"
        )
    request = Request(
        model_config(r), r.batch_tokens, r.seq_len, r.micro_batch, r.steps, saving_interval(r),
        r.gpus or ("256" if r.moments == "fp32" else "1"),
        r.gpu or "gh200-96", r.nic_gbs or 25.0, r.gpus_per_node or 4, r.shard, r.replicate, r.reshard, r.moments,
        r.recompute,
    )  # fmt: skip
    print(answer(request, r.run_dir.with_name(f"{r.run_dir.name}-plan.png")))
    return FINISHED


def describe(plan: Plan, world: World, corpus: Corpus | None, eval_sets: EvalSets) -> str:
    """Everything derived, for the log, before the first step."""
    r, gib = plan.recipe, 2**30
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in plan.memory.items())
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    peak = "unknown, so no MFU (--peak-tflops)" if plan.peak_flops is None else f"{plan.peak_flops / 1e12:,.0f} TFLOP/s"
    weights = f"Hugging Face weights of {r.init_from}" if r.init_from else f"fresh weights, seed {r.seed}"
    return "\n".join([
        f"model      {plan.n_parameters:,} parameters; {weights}"
        + (f"; frozen: {r.freeze} (memory and MFU as if not)" if r.freeze else ""),
        *(f"data       {line}" for line in shortened(corpus.describe(r.steps * plan.samples_a_step) if corpus else [])),
        *(f"evaluated  {line}" for line in shortened(eval_sets.describe())),
        f"batch      {r.batch_tokens:,} tokens a step = {world.size} rank(s) x {plan.accumulation} accumulated x "
        f"{r.micro_batch} x {r.seq_len}",
        f"length     {r.steps:,} steps = {r.steps * r.batch_tokens:,} tokens",
        f"schedule   {r.warmup_steps} warm-up steps to {r.lr:g}, then {r.schedule}"
        + (f" to {r.min_lr:g}" if r.schedule != "constant" else ""),
        f"compute    {r.dtype} on {world.size} x {device}; {plan.flops_per_token / 1e9:.3f} GFLOP a token; peak {peak}",
        describe_sharding(plan),
        f"recompute  {recomputed(plan.work)}: {plan.why_lean}",
        f"memory     about {sum(plan.memory.values()) / gib:.2f} GiB a rank: {parts}",
        f"run        {r.run_dir}: a checkpoint every {r.save_every} steps"
        + (f", evaluation every {r.eval_every}" if r.eval_every else ", no evaluation"),
    ])  # fmt: skip


def describe_sharding(plan: Plan) -> str:
    if not plan.whole:
        return fsdp.describe(plan.layout)
    sums = {"8bit": "bf16, rounded stochastically"}.get(plan.recipe.moments, "fp32")
    return (
        f"sharding   none: bf16 weights, the lower halves of their fp32 masters, and moments in {plan.recipe.moments}\n"
        "gradients  in bf16" + (f", summed over {plan.accumulation} micro batches in {sums}" * (plan.accumulation > 1))
    )


def shortened(lines: list[str], most: int = 9) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]


# ------------------------------------------------------------------------------------------------------------- 4 data


def open_one(path: Path, plan: Plan) -> Dataset | RawDataset:
    return open_dataset(path, None if is_dataset(path) else plan.recipe.data_dtype, plan.model.vocab_size)


def open_data(sources: tuple[str, ...], plan: Plan) -> Corpus:
    """The data that --data names, opened and cut into samples; Refused if this model cannot train on it."""
    r, open_source = plan.recipe, functools.partial(open_one, plan=plan)
    corpus = data_or_refused(Corpus, sources, r.seq_len, r.documents, open_source)
    if r.data_dtype and not any(isinstance(source.dataset, RawDataset) for source in corpus.sources):
        raise Refused(f"--data-dtype {r.data_dtype} belongs to raw .bin files, and {' '.join(sources)} is none; "
            "leave it out")  # fmt: skip
    check_vocabulary(corpus.vocab_size, f"--data {' '.join(sources)}", plan)
    return corpus


def open_eval_sets(corpus: Corpus | None, plan: Plan) -> EvalSets:
    """The held-out split, if it has one, and what --eval-data names; Refused if this model cannot read that."""
    r, open_source = plan.recipe, functools.partial(open_one, plan=plan)
    named = data_or_refused(parse_named, r.eval_data or (), of="--eval-data")
    sets = data_or_refused(EvalSets, corpus, named, r.seq_len, r.documents, open_source, of="--eval-data")
    for dataset in sets.datasets.values():
        check_vocabulary(dataset.vocab_size, f"--eval-data {dataset.path}", plan)
    return sets


def check_vocabulary(size: int, of: str, plan: Plan) -> None:
    padded = -(-size // 128) * 128  # models are often padded to a multiple of 128 rows, and that is fine
    if not size <= plan.model.vocab_size <= padded:
        raise Refused(
            f"{of} has a vocabulary of {size}, but the model's is of {plan.model.vocab_size}; prepare the data with "
            "the model's tokenizer"
        )


def own_numbers(step: int, plan: Plan, world: World) -> np.ndarray:
    """The numbers of this rank's samples in a step: [accumulation, micro_batch]."""
    return share_of(step_numbers(step, plan.samples_a_step), world.rank, world.size, plan.recipe.micro_batch)


def load_steps(first: int, last: int, run: Run) -> Loader:
    """This rank's batches of steps first to last, a list of as many as it accumulates for each step."""
    steps = (own_numbers(step, run.plan, run.world) for step in range(first, last + 1))
    return Loader(run.corpus, run.plan.recipe.seed, steps, run.world.device)


# ------------------------------------------------------------------------------------------------- 5 model, optimizer


def build_model(plan: Plan, world: World) -> Mistral:
    """The model, allocated, its weights in fp32 and not yet filled.

    Sharded by FSDP2 or HSDP (model/run/fsdp.py): each layer is gathered in the compute dtype when it is needed, and
    gradients are reduced in fp32 into fp32 shards. One rank in bf16 has nothing to gather or reduce: there the model
    stays as it is, and ``begin_computing`` makes its weights bf16.
    """
    with torch.device("meta"):
        model = Mistral(plan.model, plan.work.lean)
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name, plan.recipe))
    dtype = DTYPES[plan.recipe.dtype]
    if not fsdp.is_whole(world, dtype):
        shard_model(model, plan.layout, world, dtype)
    model.to_empty(device=world.device)
    return model


def fill_model(model: Mistral, plan: Plan, world: World) -> None:
    """Fresh weights, or those of --init-from, of which each rank reads only its own rows."""
    if plan.recipe.init_from:
        load_hf_weights(model, plan.recipe.init_from)
        model.init_buffers()
    else:
        model.init_weights(plan.recipe.seed)


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


# --------------------------------------------------------------------------------------------------------- 6 one step


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

    pairs = sum(roofline.attention_keys(batch.lengths, model.config.window) for batch in batches)
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


# ---------------------------------------------------------------------------------------------------------- 7 the run


@dataclass
class Run:
    """A run in progress: what its loop holds in its hands."""

    plan: Plan
    world: World
    folder: RunFolder
    corpus: Corpus | None  # None: --eval-only on other data than a run's own
    eval_sets: EvalSets
    model: Mistral
    optimizer: ShardedAdamW | SplitAdamW | None  # None: --eval-only
    guard: Guard
    saver: Saver
    hook: CheckpointHook
    watch: Watch
    config: dict
    began: float  # time.monotonic() of its start
    step: int = 0  # the last one done
    scores: dict | None = None  # of the last evaluation: its step, and the metrics
    skips: int = 0  # updates skipped in a row up to it, as far as the host knows
    step_s: float = 0.0  # how long it took
    spent: dict[str, float] = field(default_factory=dict)  # seconds of this start, by what they were spent on
    energy_j: float | None = None  # what this rank's GPU had drawn when the steps began

    @spent_on("checkpoints")
    def save(self) -> None:
        """Begin a checkpoint of the last step done, after a look whether all ranks see the same weights."""
        self.watch.at("checkpoint", self.step, long=True)
        if self.world.size > 1:  # one layer at a time: in the end all of them
            layer = self.step // self.plan.recipe.save_every % self.plan.model.n_layers
            check_same_weights(self.model.layers[layer], f"layer {layer}", self.world)
        updates = int(next(iter(self.optimizer.state.values()))["step"])  # steps less those that were skipped
        facts = {
            "config": self.config, "world_size": self.world.size,
            "updates": updates, "skips": self.skips, "losses": self.guard.remembered(),
        }  # fmt: skip
        if self.scores and self.scores["step"] == self.step:
            facts["evaluation"] = {name: x for name, x in self.scores.items() if math.isfinite(x)}
        self.saver.save(self.step, training_state(self.model, self.optimizer), facts)
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
        self.model.init_buffers()
        if self.optimizer is None:
            self.step = facts["step"]
            return
        try:
            for state in self.optimizer.state.values():
                state["step"].fill_(facts["updates"])
            self.guard.remember(facts["losses"])
            self.step, self.skips = facts["step"], int(facts["skips"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{path}: its manifest does not tell where the run was ({error!r})") from None

    def out_of_time(self) -> bool:
        """Whether another step and a checkpoint may not fit into --max-hours."""
        limit = self.plan.recipe.max_hours
        soon = time.monotonic() - self.began + 2 * self.step_s + 1.5 * self.saver.took_s
        return limit is not None and soon > limit * 3600


@dataclass
class InFlight:
    """A step whose metrics are still on the device: read one step late, so that the host never waits for the device."""

    step: int
    values: Tensor  # as train_step returns them
    ready: torch.cuda.Event | None
    lr: float
    data_wait_s: float

    @classmethod
    def after(cls, step: int, values: Tensor, lr: float, data_wait_s: float) -> InFlight:
        if not values.is_cuda:
            return cls(step, values, None, lr, data_wait_s)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(step, host, ready, lr, data_wait_s)

    def settle(self, run: Run, seconds_since: Callable[[], float]) -> tuple[dict, str | None]:
        """The metrics line of this step, and what is to be said of its update if it was skipped or a spike."""
        if self.ready is not None:
            self.ready.synchronize()
        *sums, pairs, grad_norm, verdict, median = self.values.tolist()
        run.step_s = seconds_since()
        recipe = run.plan.recipe
        rate = recipe.batch_tokens / run.world.size / run.step_s
        flops = roofline.step_flops(run.plan.model, recipe.batch_tokens, pairs)
        line = {
            "step": self.step,
            **loss_metrics(*sums),
            "lr": self.lr,
            "grad_norm": grad_norm,
            "tokens": self.step * recipe.batch_tokens,
            "tokens_per_second_per_gpu": rate,
            "mfu": machines.mfu(rate, flops / recipe.batch_tokens, run.plan.peak_flops),
            "peak_memory_gib": peak_memory_bytes(run.world) / 2**30,
            "data_wait_s": self.data_wait_s,
        }
        if run.world.device.type == "cuda" and (retries := torch.cuda.memory_stats()["num_alloc_retries"]):
            line["alloc_retries"] = retries  # memory is so short that the allocator had to give up its cache
        what = f"step {self.step}: loss {line['loss']:.4g}, gradient norm {grad_norm:.4g}"
        if verdict in (SPIKE, SPIKE_SKIPPED):
            what += f", a spike over the median of {median:.4g}"
            line["spike"] = True
        if verdict in (NOT_FINITE, SPIKE_SKIPPED):
            line["skipped"] = True
            what += "; the update was skipped"
        run.skips = run.skips + 1 if "skipped" in line else 0
        return line, what if verdict else None


def peak_memory_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@spent_on("steps")
def train(run: Run) -> str | None:
    """The steps after run.step up to the plan's last; why it stopped before that, or None."""
    plan, world, recipe = run.plan, run.world, run.plan.recipe
    loader = load_steps(run.step + 1, recipe.steps, run)
    progress = Progress(world, run.step + 1, recipe.steps)
    probe = Probe(world.device)
    gap = Gap.of_run(plan.work, plan.layout, DTYPES[recipe.dtype], world)
    profiler = make_profiler(run)
    clock = time.perf_counter()
    in_flight: InFlight | None = None

    def seconds_since() -> float:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        return clock - before

    def settle() -> None:
        """Log the step in flight, and stop the run if too many were skipped."""
        nonlocal in_flight
        if in_flight is None:
            return
        (line, remark), in_flight = in_flight.settle(run, seconds_since), None
        run.watch.probe(probe.seconds())
        gap.add(run.step_s, line["data_wait_s"])
        run.spent["waiting for data"] = run.spent.get("waiting for data", 0.0) + line["data_wait_s"]
        if world.is_main:
            run.folder.log(line)
            progress.show(line)
            progress.complain(run.watch.slowest)
            if line["step"] % progress.every == 0 and (text := gap.words(run.watch.slowest)):
                say(world, text)
        if run.skips > recipe.max_skips:
            samples = step_numbers(line["step"], plan.samples_a_step)
            raise Failed(f"{remark}, {run.skips} in a row now (--max-skips {recipe.max_skips}). Its samples have the "
                f"numbers {samples[0]} to {samples[-1]}; --replay-step {line['step']} looks into them")  # fmt: skip
        if remark:
            say(world, remark)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step on one rank is a pause on all of them
    stopping = False
    try:
        while run.step < recipe.steps and not stopping:
            step = run.step + 1
            run.watch.at("step", step)
            profiler.begin(step, run.model, run.optimizer)
            answers, asking = ask_everywhere(stop_signal is not None or run.out_of_time(), run.saver.failed)
            with profiler.region("data"):
                batches = next(loader)
            lr = learning_rate(recipe, step)
            probe.begin()
            values = train_step(run.model, run.optimizer, run.guard, step, batches, lr, recipe.clip)
            settle()
            in_flight = InFlight.after(step, values, lr, loader.waited)
            if in_flight.ready is None:  # on the CPU there is nothing to wait for
                settle()
            run.step = run.watch.done = step
            if step == profiler.last:
                run.watch.at("profile", step, long=True)
                settle()
                say(world, profiler.end() or f"profile of steps {profiler.first} to {step}: in {profiler.folder}")

            asking.wait()
            stopping, save_failed = map(bool, answers.tolist())
            if save_failed:
                run.saver.wait()
                raise Failed("another rank could not write its part of the checkpoint, and says why")
            if evaluation_is_due(run) and not stopping:
                settle()
                with gap.spending("evaluation"):
                    stopping = not log_evaluation(run)
            if stopping or step == recipe.steps or step % recipe.save_every == 0:
                settle()
                with gap.spending("checkpoints"):
                    run.save()
                gc.collect()
        run.finish_saving()
    except Failed:
        with contextlib.suppress(Failed):  # the reason is known; but a checkpoint under way is worth the wait
            run.saver.wait()
        raise
    finally:
        profiler.close()
        progress.close()
        gc.enable()
    if not stopping:
        return None
    return next(filter(None, everywhere(stop_signal)), None) or f"--max-hours {recipe.max_hours}"


def make_profiler(run: Run) -> StepProfiler:
    """--profile's; without it one of step 0, which never comes."""
    recipe, world, first, last = run.plan.recipe, run.world, 0, 0
    if recipe.profile:
        first, last = steps_to_profile(recipe.profile, run.step + 1, recipe.steps)
        if first <= run.step:
            say(world, f"--profile {recipe.profile}: nothing is profiled, step {run.step} is done already")
    chosen = world.rank in ranks_to_profile(recipe.profile_ranks or "0", world.size)
    floors = None
    if recipe.profile:
        floors = floors_of_run(run.plan.work, run.plan.layout, DTYPES[recipe.dtype], world)
    return StepProfiler(first, last, chosen, run.folder.path / "traces", world.rank, world.device, floors)


def evaluation_is_due(run: Run) -> bool:
    every, last = run.plan.recipe.eval_every, run.step == run.plan.recipe.steps
    return bool(every and run.eval_sets.rows) and run.step > 0 and (last or run.step % every == 0)


def score(run: Run) -> dict | None:
    """Evaluate every set as of run.step: that and the metrics. None if a signal came in between."""
    scores, alive = {"step": run.step}, lambda: run.watch.at("evaluation", run.step)
    for key, rows in run.eval_sets.rows.items():
        found = evaluate(
            run.model, rows, run.plan.recipe.micro_batch, run.world, alive, lambda: stop_signal is not None
        )
        if found is None:
            return None
        scores |= {f"{key}_{name}": value for name, value in found.items()}
        say(run.world, f"{'held out' if key == HELD_OUT else key.removeprefix(HELD_OUT + '_')} at step {run.step}: "
            f"loss {found['loss']:.4f}  ppl {found['perplexity']:,.1f}  acc {found['accuracy']:.2%}")  # fmt: skip
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
    """--eval-only: the scores of the weights that set_up has loaded, into evaluation.json."""
    scores = score(run)
    if scores is None:
        say(run.world, "stopped by a signal; nothing was written")
        return STOPPED
    if run.world.is_main:
        source = f"step {run.step} of {run.folder.path}" if run.step else str(run.plan.recipe.init_from)
        write_json(run.folder.path / "evaluation.json", {"weights": source} | scores)
        say(run.world, f"evaluation {run.folder.path / 'evaluation.json'}")
    return FINISHED


@spent_on("export")
def leave_results(run: Run, again: bool) -> None:
    """The Hugging Face export, the curves and a sample of text; with ``again`` only those that are missing."""
    plan, world, folder, model, own = run.plan, run.world, run.folder, run.model, run.corpus.tokenizer
    run.watch.at("export", run.step, long=True)
    export = folder.path / "export"
    if not (again and on_main(world, is_complete_export, export)):
        tokenizer = own or (plan.recipe.init_from if has_tokenizer(plan.recipe.init_from) else None)
        try:
            save_export(run, export, tokenizer)
        except ValueError as error:  # on all ranks: a tokenizer that is gone, say
            raise Failed(f"the export could not be written: {error}; the same command again makes it") from None
        say(world, f"export     {export}")
    if world.is_main and not (again and (folder.path / "curves.png").exists()):
        folder.plot_curves()
        say(world, f"curves     {folder.path / 'curves.png'}")
    if own and not (again and on_main(world, (folder.path / "sample.txt").exists)):
        streams = [rows.stream for rows in run.corpus.held_out + run.corpus.train]
        stream = next((stream for stream in streams if len(stream) >= 16), streams[-1])
        prompt = torch.from_numpy(stream.read(0, min(16, len(stream))))
        ids = model.generate(prompt[None].to(world.device), 48, temperature=0.7, seed=plan.recipe.seed)[0].tolist()
        fsdp.reshard(model)
        if world.is_main:
            begins, text = decode(own, ids[: len(prompt)]), decode(own, ids)
            (folder.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
            say(world, f"prompt     {begins!r}\ncontinued  {text[len(begins) :]!r}")


def save_export(run: Run, path: Path, tokenizer: Path | None) -> None:
    """The master weights as a Hugging Face folder."""
    dtype = DTYPES[run.plan.recipe.export_dtype]
    if fsdp.is_sharded(run.model):
        return save_hf(run.model, path, dtype=dtype, tokenizer=tokenizer)
    weights = dict(master_weights(run.model, run.optimizer))
    whole = ((name, weights[name].joined()) for name, _ in pieces(run.plan.model))
    write_hf(run.plan.model, dtype, whole, path, tokenizer=tokenizer)


def leave_summary(run: Run) -> None:
    """summary.json, and the same in lines."""
    drawn = everywhere(None if run.energy_j is None else energy_joules(run.world.device) - run.energy_j)
    if run.world.is_main:
        energy_j = None if None in drawn else sum(drawn)
        wall_s = time.monotonic() - run.began
        summary = summarize(run.folder.lines(), run.plan, run.spent, wall_s, energy_j)
        write_json(run.folder.path / "summary.json", summary)
        say(run.world, in_lines(summary))


def is_complete_export(folder: Path) -> bool:
    try:
        check_hf_weights(folder)
    except ValueError:
        return False
    return True


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def decode(tokenizer: Path, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids)


def check_disk(plan: Plan) -> None:
    """Refuse a run whose first checkpoint and export cannot fit on the disk."""
    existing = next(p for p in (plan.recipe.run_dir, *plan.recipe.run_dir.absolute().parents) if p.exists())
    moments = moment_bytes(plan.model, plan.recipe.moments)
    free, needed = shutil.disk_usage(existing).free, plan.n_parameters * (4 + 4) + moments
    if free < needed:
        raise Refused(
            f"--run-dir {plan.recipe.run_dir} has {in_words(free)} free, but one checkpoint and the export take "
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
    if recipe.eval_only and not recipe.init_from and not checkpoint.complete(recipe.run_dir / "checkpoints"):
        raise Refused(f"--eval-only: no checkpoint in {recipe.run_dir}; name its --run-dir, or a Hugging Face folder "
            "with --init-from")  # fmt: skip


def look_before(recipe: Recipe) -> int:
    """--preflight: whether these machines are fit for this run, and how fast it will be (model/run/preflight.py)."""
    world = start_distributed(recipe.deadline)
    plan = agreed(resolve, recipe, world)
    r, watch = plan.recipe, Watch(world, min(recipe.deadline, 60.0), recipe.run_dir, write_failure)
    global active
    active = Active(watch, None, plan)

    def stage(what: str) -> None:
        watch.at(what, long=True)
        if told := next(filter(None, everywhere(stop_signal)), None):
            raise Failed(f"the preflight was stopped by {told}")

    job = Job(plan.work, plan.layout, DTYPES[r.dtype], r.run_dir, r.keep)
    say(world, describe_sharding(plan))
    opening = functools.partial(open_data, recipe.data, plan) if recipe.data else None
    return FINISHED if preflight(job, world, opening, functools.partial(say, world), stage) else FAILED


def set_up(recipe: Recipe) -> Run:
    """Everything before the first step: refusals first, then the folder, the data, the model and its weights."""
    began, looking = time.monotonic(), recipe.replay_step is not None or recipe.eval_only
    world = start_distributed(recipe.deadline)
    plan = agreed(resolve, recipe, world)
    agreed(check_looking, recipe)
    corpus = agreed(open_data, recipe.data, plan) if recipe.data else None
    eval_sets = agreed(open_eval_sets, corpus, plan)
    if not looking:
        agreed(check_disk, plan)
        on_main(world, check_loggers, plan.recipe.tensorboard, plan.recipe.wandb)
    set_reference_only(recipe.kernels == "reference")

    folder = RunFolder(recipe.run_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, so --no-resume has had its turn
    on_main(world, folder.open, None if restarted else recipe.resume)
    watch = Watch(world, recipe.deadline, folder.path, write_failure)
    global active
    active = Active(watch, None if looking else folder, plan)  # from here on its status.json is told how it ended
    data = folder.path / "data"
    if corpus is None and (not (recipe.eval_only and recipe.eval_data) or on_main(world, data.exists)):
        if world.is_main and not data.exists():
            say(world, "preparing the built-in corpus: the Python language reference, Mistral-7B-v0.1's tokenizer")
        on_main(world, lambda: data.exists() or prepare_builtin(data))
        corpus = agreed(open_data, (str(data),), plan)
        eval_sets = agreed(open_eval_sets, corpus, plan)
    watch.at("verifying the data", long=True)
    if recipe.eval_only and not eval_sets.rows:
        raise Refused("--eval-only: nothing was held out; name something to evaluate on with --eval-data NAME:DIR")
    for read in filter(None, (corpus, eval_sets)):
        agreed(data_or_refused, read.verify, world.rank, world.size)
    config = {"recipe": asdict(plan.recipe), "model": asdict(plan.model), "data": corpus and corpus.fingerprint}
    asked = [other for name in recipe.allow_change or () for other in (name, *IMPLIED.get(name, ()))]
    history, changed = on_main(world, folder.check_config, config, FREE_TO_CHANGE, asked)
    watch.at("testing the collectives", long=True)
    check_collectives(world)
    watch.at("verifying the checkpoint", long=True)
    say_all = functools.partial(say, world)
    before = recipe.replay_step or (10**9 if recipe.eval_only else None)
    path = checkpoint.newest_sound(folder.checkpoints, world, say_all, before)
    if recipe.eval_only and path is None and on_main(world, checkpoint.complete, folder.checkpoints):
        raise Refused(f"--eval-only: every checkpoint in {folder.checkpoints} is damaged")
    step = watch.done = step_of(path) if path else 0
    if world.is_main and not looking:
        versions = {"torch": torch.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
        if step < plan.recipe.steps:
            folder.loggers = start_loggers(
                plan.recipe.tensorboard, plan.recipe.wandb, folder.path, step, config, say_all
            )
        if changed:
            history = [*history, {"after_step": step, "changed": changed}]
            say(
                world,
                f"changed from here on: {'; '.join(f'{k} from {old} to {new}' for k, (old, new) in changed.items())}",
            )
        facts = {"world_size": world.size, "versions": versions, "history": history}
        write_json(folder.path / "config.json", config | facts)
        folder.keep_metrics_until(step)
        folder.status("running", step)
        watch.writes_heartbeat = True
    say(world, describe(plan, world, corpus, eval_sets))

    watch.at("filling the model", long=True)
    model = build_model(plan, world)
    optimizer = None if recipe.eval_only else build_optimizer(model, plan.recipe)
    guard = Guard(recipe.spike, recipe.skip_spikes, world.device)
    hook = CheckpointHook(recipe.on_checkpoint, folder.path, say_all)
    saver = Saver(folder.checkpoints, recipe.keep, recipe.keep_every, world, eval_sets.decides, hook.saved)
    run = Run(plan, world, folder, corpus, eval_sets, model, optimizer, guard, saver, hook, watch, config, began)
    if path:
        run.restore(path)
        say(world, f"{'evaluating' if recipe.eval_only else 'resuming after'} step {run.step} from {path}")
    else:
        fill_model(model, plan, world)
    begin_computing(model, optimizer)
    run.spent["start-up"], run.energy_j = time.monotonic() - began, energy_joules(world.device)
    return run


def main(recipe: Recipe) -> int:
    """The whole run; returns the exit code of this rank. Raises Refused or Failed."""
    if recipe.preflight:
        return look_before(recipe)
    run = set_up(recipe)
    if recipe.replay_step:
        replay(run, recipe.replay_step)
        return FINISHED
    if recipe.eval_only:
        return evaluate_only(run)
    world, folder, again = run.world, run.folder, run.step == recipe.steps
    if again:
        say(world, f"this run is finished: {run.step} steps in {folder.path}")
    stopped = None
    if evaluation_is_due(run) and not on_main(world, folder.has_evaluation, run.step) and not log_evaluation(run):
        stopped = next(filter(None, everywhere(stop_signal)))  # in an evaluation that a signal had cut short before
    if not again and not stopped:
        stopped = train(run)
    if stopped:
        if world.is_main:
            folder.plot_curves()
            folder.status("stopped", run.step, stopped)
        leave_summary(run)
        run.hook.wait(PATIENCE_S)
        say(world, f"stopped by {stopped} after step {run.step}; the same command again continues")
        return STOPPED
    leave_results(run, again)
    if run.eval_sets.decides and (best := on_main(world, checkpoint.best, folder.checkpoints, run.eval_sets.decides)):
        say(world, f"best       {best[0]}: {run.eval_sets.decides} {best[1]:.4f}")
    if not (again and on_main(world, (folder.path / "summary.json").exists)):
        leave_summary(run)
    if world.is_main:
        folder.status("finished", run.step)
    run.watch.at("on-checkpoint", run.step, long=True)
    run.hook.wait(recipe.deadline)
    return FINISHED


class Active(typing.NamedTuple):
    """What the signal handler and the last words of a failing run need of it."""

    watch: Watch
    folder: RunFolder | None  # None: its status is not to be touched
    plan: Plan


def write_failure(reason: str) -> None:
    """Tell status.json, unless another rank has already said why; that was first and is the one to keep."""
    if active is not None and active.folder is not None and active.folder.state() != "failed":
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            active.folder.status("failed", active.watch.done, reason)


def explain_shortage(error: torch.OutOfMemoryError, plan: Plan) -> str:
    """What to change, and by how much, for a run that a GPU has no memory for (model/estimate/out_of_memory.py)."""
    r, free, total, reserved = plan.recipe, None, None, None
    if torch.cuda.is_available():
        (free, total), reserved = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    return out_of_memory.explain(error, plan.work, Sharding.of(plan.layout), r.shard * r.replicate,
        compute_bytes=DTYPES[r.dtype].itemsize, free=free, total=total, reserved=reserved)  # fmt: skip


def run_to_exit_code(recipe: Recipe) -> int:
    """``main`` with its failures turned into one line, a status and an exit code."""
    rank, host = int(os.environ.get("RANK", "0")), socket.gethostname()
    try:
        if recipe.plan:
            return plan_ahead(recipe)
        code = main(recipe)
        dist.barrier()  # torchrun ends everyone when the first rank exits with an error: let all get here
        return code
    except Refused as refusal:
        refuse(refusal)
    except (Failed, DataError) as failure:  # this rank alone may have missed a shard
        reason, speaks = str(failure), rank == 0 or isinstance(failure, DataError)
        if speaks:
            print(f"train.py: stopped: {reason}", file=sys.stderr)
    except BaseException as error:
        lost_a_rank = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if lost_a_rank and active is not None:  # another one died, and the reason is there: say which one it was
            reason, speaks = active.watch.verdict("lost the connection to another rank")
            if speaks:
                print(f"train.py: stopped: {reason}", file=sys.stderr)
        elif isinstance(error, torch.OutOfMemoryError) and active is not None:
            reason, speaks = f"rank {rank} on {host}: {explain_shortage(error, active.plan)}", True
            print(f"train.py: stopped: {reason}", file=sys.stderr)
        elif isinstance(error, OSError) and error.strerror and active is not None:  # a full disk, a folder taken away
            where = error.filename or f"in {active.watch.phase}"
            reason, speaks = f"rank {rank} on {host}: {where}: {error.strerror}", True
            print(f"train.py: stopped: {reason}", file=sys.stderr)
        else:
            reason, speaks = f"rank {rank} on {host}: {type(error).__name__}: {error}", True
            print(f"train.py: rank {rank} on {host} failed", file=sys.stderr)
            traceback.print_exc()
    finally:
        if active is not None and active.folder is not None:
            active.folder.close_loggers()
    if speaks:
        write_failure(reason)
    return FAILED


# -------------------------------------------------------------------------------------------------- 8 one step again


def replay(run: Run, step: int) -> None:
    """Run one step again from the checkpoint before it, sample by sample, and print what is not finite where.

    The steps between are computed as they were; then each sample of ``step`` alone, forward and backward, with a look
    at the output of every module and the gradient that reaches it. Nothing is written.
    """
    plan, world, recipe = run.plan, run.world, run.plan.recipe
    corpus, first = run.corpus, run.step + 1
    say(world, f"replaying step {step}" + (f", after steps {first} to {step - 1}" if first < step else ""))
    loader = load_steps(first, step - 1, run)
    for again in range(first, step):
        run.watch.at("replay", again)
        rate = learning_rate(recipe, again)
        train_step(run.model, run.optimizer, run.guard, again, next(loader), rate, recipe.clip)

    fsdp.reduce_gradients(run.model, last=True)
    rows = []
    for number in own_numbers(step, plan, world).ravel():
        run.watch.at("replay", step)
        source, row = corpus.locate(number[None], recipe.seed)
        batch = read_batch(corpus.train, source, row)
        found = examine(run.model, run.optimizer, batch.to(world.device))
        text = decode(corpus.tokenizer, batch.tokens[0, :24].tolist()) if corpus.tokenizer else ""
        rows.append((int(number), corpus.place(int(source[0]), int(row[0])), found, text))
    for rank, theirs in enumerate(everywhere(rows)):
        for number, place, found, text in theirs:
            bad = f"  first not finite: {found.first}" if found.first else ""
            say(world, f"sample {number} (rank {rank}, {place})  loss {found.loss:.4f}  "
                f"gradient norm {found.grad_norm:.4g}{bad}{'  ' + repr(text) if text else ''}")  # fmt: skip


if __name__ == "__main__":
    code = run_to_exit_code(RECIPE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # not sys.exit: gloo's threads now and then abort the interpreter's tear-down, and spoil the code
