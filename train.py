"""Train a Mistral: from token shards to checkpoints, curves and a Hugging Face export, on one CPU or many GPUs.

    torchrun train.py                                       the built-in example: a minute on two CPU cores
    torchrun train.py bielik-7b --data DIR --init-from HF   the published run's recipe
    torchrun train.py my-run.toml --lr 1e-4                 a recipe of your own; a flag beats the file

The file reads from top to bottom:

    1  the recipe          every setting, once, with its help; presets; command line and TOML
    2  starting up         signals, processes, refusals that every rank hears
    3  the plan            everything derived from the recipe, before anything is allocated or written
    4  data                the order of samples, batches, the loader's thread
    5  model, optimizer    meta device -> FSDP2 -> weights; AdamW; the learning rate
    6  one step            forward, backward, clip, update; evaluation
    7  checkpoints         written whole or not at all; resumed exactly
    8  the run folder      lock, status, metrics, curves
    9  the run             the loop, and what it leaves behind
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import math
import os
import re
import signal
import sys
import time
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # exit codes of each rank's process; 75 is EX_TEMPFAIL of sysexits

# ------------------------------------------------------------------------------------------------------- 1 the recipe


def setting(group: str, default, help: str, *, minimum=None, above=None, below=None, choices=None):
    """A field of Recipe: the group it is listed under, its help line, and the values it admits."""
    return field(
        default=default,
        metadata=dict(group=group, help=help, minimum=minimum, above=above, below=below, choices=choices),
    )


# One setting an entry, wrapped by hand to stay a table:
# fmt: off
@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of. None means: derived by ``resolve`` in chapter 3, as [the help line] says."""

    model: str = setting("model", "tiny", "model preset, or a Hugging Face folder whose config.json gives the sizes")
    init_from: Path | None = setting("model", None,
        "Hugging Face folder to start from: its sizes and its weights [fresh weights]")
    seed: int = setting("model", 0, "fixes the fresh weights and the order of the samples", minimum=0,
        below=2**63)
    kernels: str = setting("model", "auto",
        "auto, or reference: plain PyTorch everywhere, to find out whether a kernel is to blame",
        choices=("auto", "reference"))

    data: Path | None = setting("data", None,
        "folder made by python -m halny.model.prepare_data [built in: the Python language reference]")
    seq_len: int = setting("data", 128, "tokens in a sample", minimum=1)
    batch_tokens: int = setting("data", 1024, "tokens in an optimizer step, over all ranks", minimum=1, below=2**32)
    micro_batch: int | None = setting("data", None,
        "samples a rank computes at once; it accumulates gradients over its share [the most that divides it, up to 8]",
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
    dtype: str | None = setting("optimizer", None,
        "dtype of the computation; master weights and reductions are fp32 [bf16 on a GPU, fp32 on the CPU]",
        choices=("bf16", "fp32"))

    run_dir: Path | None = setting("run", None, "folder of the run, on a file system that all nodes see [runs/PRESET]")
    resume: bool | None = setting("run", None,
        "--resume insists on a checkpoint to continue from; --no-resume sets an earlier run aside and starts anew "
        "[continue if there is a checkpoint]")
    save_every: int | None = setting("run", None,
        "steps between checkpoints [a tenth of --steps, at most 500]", minimum=1)
    keep: int = setting("run", 2, "newest checkpoints kept", minimum=1)
    eval_every: int | None = setting("run", None,
        "steps between evaluations on the held-out split; 0 for none [a fifth of --steps, at most 1000]", minimum=0)
    export_dtype: str = setting("run", "bf16", "dtype of the final Hugging Face export", choices=("bf16", "fp32"))
    peak_tflops: float | None = setting("run", None,
        "this device's dense peak in bf16, for MFU [known GPUs: by name]", above=0)


PRESETS: dict[str, dict] = {
    # the first run: real text, the real tokenizer, about a minute on two CPU cores
    "tiny": {},
    # 1.1 billion parameters from fresh weights
    "mistral-1b": dict(
        model="mistral-1b", seq_len=4096, batch_tokens=262_144, micro_batch=1, steps=10_000, lr=4e-4, warmup_steps=500,
    ),
    # Bielik-7B-v0.1: Mistral-7B-v0.1 continued on Polish text by 256 GH200
    "bielik-7b": dict(
        model="mistral-7b", seq_len=4096, batch_tokens=4_194_304, micro_batch=4, steps=17_350, lr=3e-5, min_lr=2e-5,
        schedule="cosine", warmup_steps=2000, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0,
    ),
}
# fmt: on

# What a resumed run may change; everything else changes what is computed. (Data may move: its fingerprint may not.)
FREE_TO_CHANGE = (
    *("run_dir", "resume", "data", "micro_batch", "kernels"),
    *("save_every", "keep", "eval_every", "export_dtype", "peak_tflops"),
)

SETTINGS = {f.name: f for f in fields(Recipe)}
KINDS = {  # the type of each setting, without its "| None"
    name: next(k for k in typing.get_args(kind) or (kind,) if k is not types.NoneType)
    for name, kind in typing.get_type_hints(Recipe).items()
}
KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", Path: "a path"}


class Refused(Exception):
    """Something the user can put right: one line, exit code 2, nothing written."""


class Failed(Exception):
    """The end of a run that has begun, on all ranks alike: one line, exit code 1."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown(kind: str, name: str, known) -> Refused:
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return Refused(f"unknown {kind} {name}: {remedy if close or len(known) < 10 else 'see train.py --help'}")


def convert(name: str, value, where: str):
    """A flag's text or a TOML value as its setting's type; Refused, naming where and the value, if it is none."""
    kind, limits = KINDS[name], SETTINGS[name].metadata
    wrong = Refused(f"{where} must be {KIND_NAMES[kind]}, got {value!r}")
    if isinstance(value, bool) != (kind is bool) or (kind in (str, Path, int) and isinstance(value, float)):
        raise wrong
    if kind in (str, Path) and not (isinstance(value, str) and value and "\0" not in value):
        raise wrong
    try:
        value = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is float and not math.isfinite(value):
        raise Refused(f"{where} must be finite, got {value}")
    for bound, words, broken in (
        ("minimum", "at least", lambda limit: value < limit),
        ("above", "more than", lambda limit: value <= limit),
        ("below", "less than", lambda limit: value >= limit),
    ):
        if limits[bound] is not None and broken(limits[bound]):
            raise Refused(f"{where} must be {words} {limits[bound]}, got {value}")
    if limits["choices"] and value not in limits["choices"]:
        raise Refused(f"{where} must be one of {', '.join(limits['choices'])}, got {value!r}")
    return value


def read_toml(path: Path) -> dict:
    """A recipe file: settings under the names of their flags, and ``preset``, the one it starts from (tiny)."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not valid TOML: {error}") from None
    preset = table.pop("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise unknown("preset", f"{preset} in {path}", PRESETS)
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in SETTINGS:
            raise unknown(f"key in {path}:", key, SETTINGS)
        if name in values:
            raise Refused(f"{name} is named twice in {path}, with - and with _")
        values[name] = convert(name, value, f"{key} in {path}")
    return PRESETS[preset] | values


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(message)


def command_line(arguments: list[str]) -> Recipe:
    """The recipe of a command line: preset or TOML file, then flags, the last of a repeated flag wins. Or Refused."""
    parser = Parser(
        prog="train.py",
        usage="torchrun [--nproc-per-node N ...] train.py [PRESET | FILE.toml] [--flag value ...]",
        description="Train a Mistral with FSDP: fp32 master weights, exact resume, Hugging Face weights in and out. "
        f"Presets: {', '.join(PRESETS)}. A FILE.toml holds the same settings (seq_len = 4096) and may start from a "
        'preset (preset = "bielik-7b"). The same command again resumes. In [brackets]: what holds if the flag is left '
        "out and the preset does not say.",
        epilog="Exit codes of each rank: 0 finished, 2 refused, 75 stopped by a signal and resumable, 1 failed.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d|-(inf|nan)")  # argparse takes -1e-3 for a flag otherwise
    parser.add_argument("preset", nargs="?", default="tiny", metavar="PRESET", help="preset or recipe file [tiny]")
    groups = {}
    for name, s in SETTINGS.items():
        if s.metadata["group"] not in groups:
            groups[s.metadata["group"]] = parser.add_argument_group(s.metadata["group"])
        options = dict(default=argparse.SUPPRESS, help=s.metadata["help"].replace("%", "%%"))
        if s.default is not None:
            options["help"] += f" [{s.default}]"
        if KINDS[name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = s.metadata["choices"]
            plain = {int: "N", float: "X", Path: "DIR", str: "NAME"}[KINDS[name]]
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else plain
        groups[s.metadata["group"]].add_argument(flag(name), **options)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise unknown("argument", rest[0].partition("=")[0], [flag(name) for name in SETTINGS])

    values = vars(given)
    preset = values.pop("preset")
    if preset.endswith(".toml"):
        base, run_name = read_toml(Path(preset)), Path(preset).stem
    elif preset in PRESETS:
        base, run_name = PRESETS[preset], preset
    else:
        raise unknown("preset", preset, PRESETS)
    values = {name: convert(name, value, flag(name)) for name, value in values.items()}
    recipe = Recipe(**(base | values))
    return recipe if recipe.run_dir else replace(recipe, run_dir=Path("runs") / run_name)


# ------------------------------------------------------------------------------------------------------ 2 starting up

stop_signal: str | None = None  # the name of a signal that asked this rank to stop; looked at between steps


def ask_to_stop(number: int, _frame) -> None:
    global stop_signal
    stop_signal = signal.Signals(number).name


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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, ask_to_stop)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # on the CPU, huge pages for the logits
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # on a GPU, less fragmentation
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

import fcntl  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import queue  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from tqdm import tqdm  # noqa: E402

from halny.kernels.dispatch import set_reference_only  # noqa: E402
from halny.model import roofline  # noqa: E402
from halny.model.convert import check_hf_weights, check_replaceable, load_hf_weights, read_hf_config, save_hf  # noqa: E402
from halny.model.durable import sha256, sync  # noqa: E402
from halny.model.mistral import PRESETS as MODELS  # noqa: E402
from halny.model.mistral import Mistral, MistralConfig, local_rows  # noqa: E402
from halny.model.prepare_data import DataError, Dataset, TokenStream, prepare_builtin  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUILTIN_VOCAB_SIZE = 32_000  # of Mistral-7B-v0.1's tokenizer
IGNORED = -100  # the label of a position that has no target


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_distributed() -> World:
    """NCCL for tensors on GPUs and gloo for the rest; without torchrun, a world of one process."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return World(dist.get_rank(), dist.get_world_size(), device, mesh)


def everywhere(value) -> list:
    """Every rank's ``value``, in order of rank (any small Python object)."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(check: Callable, *arguments):
    """``check(*arguments)`` on every rank; if it refuses on any, all ranks refuse, with the first one's message."""
    result = problem = None
    try:
        result = check(*arguments)
    except (Refused, ValueError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'input'}: {error.strerror or error}"
    for other in everywhere(problem):
        if other is not None:
            raise Refused(other)
    return result


def on_main(world: World, action: Callable, *arguments):
    """``action(*arguments)`` on rank 0 while the others wait; its result, or its refusal, on all of them."""
    return everywhere(agreed(action if world.is_main else lambda *_: None, *arguments))[0]


def stop_requested_anywhere() -> tuple[Tensor, dist.Work]:
    """Ask all ranks, on the CPU and without waiting, whether one of them has been told to stop."""
    asked = torch.tensor(int(stop_signal is not None), dtype=torch.int32)
    return asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)


def say(world: World, text: str) -> None:
    if world.is_main:
        with contextlib.suppress(OSError):  # a reader that left ("| head"), a full disk: no reason to stop training
            tqdm.write(text)
            sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------- 3 the plan


@dataclass(frozen=True)
class Plan:
    """The recipe with nothing left open, and what follows from it on this world."""

    recipe: Recipe
    model: MistralConfig
    samples_a_step: int
    accumulation: int
    flops_per_token: float
    peak_flops: float | None

    @property
    def n_parameters(self) -> int:
        return roofline.parameters(self.model)


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


def open_data(path: Path) -> Dataset:
    try:
        return Dataset(path)
    except DataError as error:
        raise Refused(f"--data {path}: {error}") from None


def resolve(recipe: Recipe, world: World) -> Plan:
    """Fill in what the recipe leaves open and refuse what cannot be. Reads little, allocates and writes nothing."""
    model = model_config(recipe)
    r = recipe
    if r.seq_len > model.max_seq_len:
        raise Refused(f"--seq-len {r.seq_len} is beyond the model's limit of {model.max_seq_len} positions")
    if r.data is None and model.vocab_size != BUILTIN_VOCAB_SIZE:
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
    samples_a_step = r.batch_tokens // r.seq_len
    share = samples_a_step // world.size
    micro_batch = r.micro_batch or max(n for n in range(1, 9) if share % n == 0)
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

    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    if r.resume is False:
        for name in ("data", "init_from", "model"):
            value = getattr(r, name)
            if value and Path(value).exists() and Path(value).resolve().is_relative_to(r.run_dir.resolve()):
                raise Refused(f"--no-resume would set aside {flag(name)} {value}, which lies in --run-dir {r.run_dir}")
    recipe = replace(
        recipe,
        model=str(r.init_from or r.model),
        micro_batch=micro_batch,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        min_lr=min_lr,
        dtype=r.dtype or ("bf16" if world.device.type == "cuda" else "fp32"),
        save_every=r.save_every or max(1, min(500, r.steps // 10)),
        eval_every=max(1, min(1000, r.steps // 5)) if r.eval_every is None else r.eval_every,
    )
    return Plan(
        recipe,
        model,
        samples_a_step=samples_a_step,
        accumulation=share // micro_batch,
        flops_per_token=roofline.flops_per_token(model, r.seq_len),
        peak_flops=roofline.peak_flops(device_name, r.peak_tflops),
    )


def check_data(plan: Plan, dataset: Dataset) -> None:
    """Refuse data that this model cannot train on."""
    padded = -(-dataset.vocab_size // 128) * 128  # models are often padded to a multiple of 128 rows, and that is fine
    if not dataset.vocab_size <= plan.model.vocab_size <= padded:
        raise Refused(
            f"--data {dataset.path} has a vocabulary of {dataset.vocab_size}, but the model's is of "
            f"{plan.model.vocab_size}; prepare the data with the model's tokenizer"
        )
    if len(dataset.split("train")) < 2:
        raise Refused(f"--data {dataset.path} has no tokens to train on")


def describe(plan: Plan, world: World, dataset: Dataset) -> str:
    """Everything derived, for the log, before the first step."""
    r, tokens, gib = plan.recipe, len(dataset.split("train")), 2**30
    samples = n_samples(dataset.split("train"), r.seq_len)
    lean = world.device.type == "cuda" and r.kernels != "reference"  # kernels/lean_linear.py
    memory = roofline.memory_estimate(
        plan.model, world.size, r.micro_batch, r.seq_len, 4 if r.dtype == "fp32" else 2, lean
    )
    parts = ", ".join(f"{name.replace('_', ' ')} {size / gib:.2f}" for name, size in asdict(memory).items())
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    peak = "unknown, so no MFU (--peak-tflops)" if plan.peak_flops is None else f"{plan.peak_flops / 1e12:,.0f} TFLOP/s"
    weights = f"Hugging Face weights of {r.init_from}" if r.init_from else f"fresh weights, seed {r.seed}"
    return "\n".join([
        f"model      {plan.n_parameters:,} parameters; {weights}",
        f"data       {dataset.path}: {tokens:,} tokens, {samples:,} samples of {r.seq_len}; "
        f"held out {len(dataset.split('val')):,} tokens",
        f"batch      {r.batch_tokens:,} tokens a step = {world.size} rank(s) x {plan.accumulation} accumulated x "
        f"{r.micro_batch} x {r.seq_len}",
        f"length     {r.steps:,} steps = {r.steps * r.batch_tokens:,} tokens = "
        f"{r.steps * plan.samples_a_step / samples:.2f} epochs of {samples / plan.samples_a_step:,.1f} steps",
        f"schedule   {r.warmup_steps} warm-up steps to {r.lr:g}, then {r.schedule}"
        + (f" to {r.min_lr:g}" if r.schedule != "constant" else ""),
        f"compute    {r.dtype} on {world.size} x {device}; {plan.flops_per_token / 1e9:.3f} GFLOP a token; peak {peak}",
        f"memory     about {memory.total / gib:.2f} GiB a rank: {parts}",
        f"run        {r.run_dir}: a checkpoint every {r.save_every} steps"
        + (f", evaluation every {r.eval_every}" if r.eval_every else ", no evaluation"),
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- 4 data


def n_samples(stream: TokenStream, seq_len: int) -> int:
    """Samples in an epoch: windows of seq_len positions and their targets; the last one may be short."""
    return -(-(len(stream) - 1) // seq_len) if len(stream) > 1 else 0


GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, SplitMix64's increment


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64: every input bit reaches every output bit (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_order(numbers: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of the n samples each sample number stands for: number i is place i % n of epoch i // n.

    Each epoch is a permutation of its own, of which nothing is stored: a Feistel network keyed by (seed, epoch)
    permutes the smallest square power of two that holds n, and what falls outside 0 .. n - 1 is encrypted again until
    it falls inside ("cycle walking": Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). So the position of
    a run in its data is its step number alone, on any number of ranks.
    """
    numbers = np.asarray(numbers, dtype=np.uint64)
    epoch, place = numbers // np.uint64(n), numbers % np.uint64(n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = mix(mix(np.full_like(epoch, seed) + np.uint64(GOLDEN)) ^ epoch)

    def encrypt(x, key):
        left, right = x >> half, x & mask
        for turn in range(6):
            left, right = right, left ^ (mix((key + np.uint64(turn * GOLDEN % 2**64)) ^ right) & mask)
        return left << half | right

    place = encrypt(place, key)
    while (outside := place >= n).any():
        place[outside] = encrypt(place[outside], key[outside])
    return place.astype(np.int64)


def read_samples(stream: TokenStream, indices: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels), int64 [len(indices), seq_len]: labels are the next tokens, IGNORED past the stream's end.

    An index of -1 stands for no sample: its labels are all ignored.
    """
    tokens = np.zeros((len(indices), seq_len), dtype=np.int64)
    labels = np.full((len(indices), seq_len), IGNORED, dtype=np.int64)
    for row, index in enumerate(indices):
        if index >= 0:
            start = int(index) * seq_len
            window = stream.read(start, min(seq_len + 1, len(stream) - start))
            tokens[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def step_samples(plan: Plan, world: World, step: int, n: int) -> np.ndarray:
    """This rank's sample indices in a step (steps count from 1): [accumulation, micro_batch]."""
    first = (step - 1) * plan.samples_a_step
    numbers = np.arange(first, first + plan.samples_a_step).reshape(plan.accumulation, world.size, -1)[:, world.rank]
    return sample_order(numbers.ravel(), n, plan.recipe.seed).reshape(numbers.shape)


class Loader:
    """Batches of steps first .. last in order, made ahead by a thread: (tokens, labels), [accumulation, micro, T].

    ``next(loader)`` raises what the thread raised. ``waited`` is how long the last call had to wait, in seconds.
    """

    def __init__(self, plan: Plan, world: World, stream: TokenStream, first: int, last: int):
        self.waited = 0.0
        self._ready: queue.Queue = queue.Queue(maxsize=2)
        self._device = world.device
        threading.Thread(target=self._produce, args=(plan, world, stream, first, last), daemon=True).start()

    def _produce(self, plan, world, stream, first, last) -> None:
        try:
            for step in range(first, last + 1):
                indices = step_samples(plan, world, step, n_samples(stream, plan.recipe.seq_len))
                batch = read_samples(stream, indices.ravel(), plan.recipe.seq_len)
                batch = [x.view(*indices.shape, -1) for x in batch]
                self._ready.put([x.pin_memory() for x in batch] if self._device.type == "cuda" else batch)
        except Exception as error:
            self._ready.put(error)

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        batch = self._ready.get()
        self.waited = time.perf_counter() - start
        if isinstance(batch, Exception):
            raise batch
        tokens, labels = (x.to(self._device, non_blocking=True) for x in batch)
        return tokens, labels


# ------------------------------------------------------------------------------------------------- 5 model, optimizer


def build_model(plan: Plan, world: World) -> Mistral:
    """The model, sharded and allocated, its weights not yet filled.

    FSDP2 in the form of the paper (Zhao et al. 2023, https://arxiv.org/abs/2304.11277): each layer is gathered in the
    compute dtype when it is needed; embedding, final norm and head make up the root's group. Gradients are reduced in
    fp32 into fp32 shards, beside the fp32 master weights.
    """
    with torch.device("meta"):
        model = Mistral(plan.model)
    compute = DTYPES[plan.recipe.dtype]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    return model


def fill_model(model: Mistral, plan: Plan, world: World) -> None:
    """Fresh weights, or those of --init-from, of which each rank reads only its own rows."""
    if plan.recipe.init_from:
        load_hf_weights(model, plan.recipe.init_from)
        model.init_buffers()
    else:
        model.init_weights(plan.recipe.seed)


def build_optimizer(model: Mistral, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) on the fp32 shards, with its moments allocated at once.

    ``found_inf`` is the fused kernel's own switch: where it is 1, an update changes nothing, and no host has to look.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)
    device = matrices[0].device
    for p in matrices + vectors:
        step = torch.zeros((), dtype=torch.float32, device=device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=device)
    return optimizer


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


def train_step(model: Mistral, optimizer: torch.optim.AdamW, tokens: Tensor, labels: Tensor, lr: float, clip: float):
    """One optimizer step on tokens, labels [accumulation, micro_batch, T]; nothing in it waits for the device.

    The loss is the mean over the real targets of all ranks and micro batches, so every token weighs alike however the
    batch is divided: each summed loss is scaled by world size / global targets, because FSDP averages over ranks.

    Returns fp64 [5] on the device: the loss sum, targets and correct predictions of all ranks, the gradient norm before
    clipping, and 1 if anything so far was not finite. From that step on no update changes the weights.
    """
    world_size = dist.get_world_size()
    n_targets = (labels != IGNORED).sum()
    dist.all_reduce(n_targets)
    scale = world_size / n_targets.clamp(min=1)

    totals = torch.zeros(3, dtype=torch.float64, device=tokens.device)
    for i in range(len(tokens)):
        model.set_requires_gradient_sync(i == len(tokens) - 1)
        loss, n_tokens, n_correct = model(tokens[i], labels[i])
        (loss * scale).backward()
        totals += torch.stack([loss.detach().double(), n_tokens.double(), n_correct.double()])
    dist.all_reduce(totals)

    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).full_tensor()
    finite = torch.isfinite(totals[0]) & torch.isfinite(grad_norm)
    optimizer.found_inf.copy_(torch.maximum(optimizer.found_inf, (~finite).float()))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat([totals, torch.stack([grad_norm.double(), optimizer.found_inf.double()])])


@torch.no_grad()
def evaluate(model: Mistral, stream: TokenStream, plan: Plan, world: World) -> dict[str, float] | None:
    """Loss, perplexity and accuracy a target over a whole split, each sample once whatever the world size.

    None if a rank was told to stop in the middle of it.
    """
    n, micro_batch = n_samples(stream, plan.recipe.seq_len), plan.recipe.micro_batch
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    stopping = False
    for first in range(0, n, world.size * micro_batch):  # the same number of forward passes on every rank
        asked, asking = stop_requested_anywhere()
        indices = first + world.rank * micro_batch + np.arange(micro_batch)
        tokens, labels = read_samples(stream, np.where(indices < n, indices, -1), plan.recipe.seq_len)
        loss, n_tokens, n_correct = model(tokens.to(world.device), labels.to(world.device))
        totals += torch.stack([loss.double(), n_tokens.double(), n_correct.double()])
        asking.wait()
        if stopping := bool(asked.item()):
            break
    model.reshard()  # without a backward pass the root's parameters stay gathered, and are not those of the optimizer
    dist.all_reduce(totals)
    return None if stopping else loss_metrics(*totals.tolist())


def loss_metrics(loss_sum: float, n_targets: float, n_correct: float) -> dict[str, float]:
    loss = loss_sum / max(n_targets, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": n_correct / max(n_targets, 1)}


# ------------------------------------------------------------------------------------------------------ 7 checkpoints
#
# A checkpoint is a folder checkpoints/step-NNNNNNNN of safetensors files, one set a rank, written by torch's
# distributed checkpointing (DCP), and a manifest.json with the SHA-256 of each. It is written under another name, the
# manifest last, and renamed when everything is on the disk: a folder with the final name is complete. Nothing in it can
# run code, which rules out DCP's default metadata, a pickle; the safetensors headers say where each shard belongs.

BYTES_A_FILE = 4_000_000_000  # DCP serialises a whole file in memory, so this bounds what a save costs a host


def checkpoint_state(model: Mistral, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """All tensors of a run by name: master weights and the two moments, each rank's shards of them."""
    state = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[p][moment]
    return state


def save_checkpoint(run: RunFolder, step: int, model: Mistral, optimizer: torch.optim.AdamW, world: World) -> None:
    """Write checkpoints/step-NNNNNNNN, every rank its shards, then delete all but the newest ``keep``.

    Raises Failed, with the earlier checkpoints as they were, if it cannot be written or a weight is not finite.
    """
    state = checkpoint_state(model, optimizer)
    if not all(everywhere(all(bool(p.isfinite().all()) for p, _ in map(local_rows, model.parameters())))):
        raise Failed(f"step {step}: a weight is not finite, so no checkpoint was written")
    final = run.checkpoints / f"step-{step:08d}"
    partial = run.checkpoints / f".{final.name}.partial"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()

    files, written = {}, 0
    for name, x in state.items():
        files[name] = 1 + written // (BYTES_A_FILE * world.size)
        written += x.numel() * x.element_size()
    writer = dcp.HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)
    with one_line(f"the checkpoint of step {step} could not be written, earlier ones are as they were"):
        dcp.save(state, storage_writer=writer)
    dist.barrier()

    names = sorted(p.name for p in partial.iterdir())[world.rank :: world.size]
    listed = {name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in names}
    listed = {name: entry for part in everywhere(listed) for name, entry in sorted(part.items())}
    if world.is_main:
        manifest = {"format": 1, "step": step, "world_size": world.size, "config": run.config, "files": listed}
        write_json(partial / "manifest.json", manifest)
        sync(partial)
        partial.rename(final)
        sync(run.checkpoints)
        for old in run.complete_checkpoints()[: -run.keep]:
            run.delete_checkpoint(old)
    dist.barrier()


@contextlib.contextmanager
def one_line(what_failed: str):
    """DCP's exception, which holds a traceback of every rank and is no Exception, as a Failed."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise Failed(f"{what_failed}: rank {rank}: {' '.join(str(cause).split())}") from None


def newest_checkpoint(run: RunFolder, world: World) -> Path | None:
    """The newest complete and undamaged checkpoint, all its checksums verified; None if there never was one.

    Damaged ones that are newer get another name, so that they neither count as kept nor are in the way.
    """
    candidates = on_main(world, run.complete_checkpoints)
    damaged = []
    for folder in reversed(candidates):
        problems = [p for p in everywhere(damage(folder, world)) if p]
        if not problems:
            on_main(world, run.put_aside, damaged)
            return folder
        say(world, f"checkpoint {folder.name} is damaged ({problems[0]}); falling back to the one before")
        damaged.append(folder)
    if candidates:
        raise Refused(
            f"every checkpoint in {run.checkpoints} is damaged; --no-resume sets the run aside and starts anew"
        )
    return None


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != 1 or f"step-{manifest['step']:08d}" != folder.name:
            return "manifest.json is of another format or step"
        present = {p.name for p in folder.iterdir()} - {"manifest.json"}
        if present != manifest["files"].keys():
            return f"files missing or too many: {', '.join(sorted(present ^ manifest['files'].keys()))}"
        for name, entry in list(manifest["files"].items())[world.rank :: world.size]:
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} has the wrong checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_checkpoint(folder: Path, step: int, model: Mistral, optimizer: torch.optim.AdamW) -> None:
    """Fill model and optimizer from the checkpoint of a step, whatever number of ranks wrote it."""
    with one_line(f"{folder} could not be read"):
        dcp.load(checkpoint_state(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    model.init_buffers()
    for state in optimizer.state.values():
        state["step"].fill_(step)


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step: a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("w") as file:
        json.dump(value, file, indent=2, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# --------------------------------------------------------------------------------------------------- 8 the run folder


class RunFolder:
    """One run's folder. Rank 0 alone writes in it, but for the checkpoints' shards and the export."""

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.step = 0  # the last one that is finished or saved, for status.json
        self.config: dict = {}
        self._lock = None

    def open(self, resume: bool | None) -> None:
        """Create and lock the folder; with resume=False set an earlier run aside first. Refused if that cannot be."""
        if resume is True and not self.complete_checkpoints():
            raise Refused(f"--resume: no checkpoint in {self.checkpoints}; leave the flag out to start a new run")
        try:
            present = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
            aside = resume is False and present - {".lock"}
            if aside and not present & {"config.json", "data", ".data.partial"}:
                raise Refused(f"--no-resume: {self.path} holds no run that could be set aside; choose another")
            check_replaceable(self.path / "export")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._take_lock()
            if aside:
                self._set_aside()
                lock, earlier_lock = self._take_lock(), lock
                earlier_lock.close()
            self._lock = lock
            for leftover in self.checkpoints.glob(".*.partial"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise Refused(f"--run-dir {self.path} cannot be written: {error.strerror}") from None

    def _take_lock(self):
        """The locked file, to be held until the process ends, however it ends."""
        in_use = Refused(f"--run-dir {self.path} is in use by another run; wait for it or choose another")
        try:
            lock = (self.path / ".lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == (self.path / ".lock").stat().st_ino:
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        raise in_use  # held by another, or the folder was set aside by another between the two lines above

    def _set_aside(self) -> None:
        real = Path(os.path.realpath(self.path))  # a link to a run stays a link, to the new one
        if Path.cwd().is_relative_to(real):
            raise Refused(f"--no-resume: {self.path} is the current folder and cannot be set aside; leave it first")
        aside = self.free_name(real.parent, f"{real.name}.old")
        real.rename(aside)
        with contextlib.suppress(FileExistsError):  # by a run that started this instant, and is then found in use
            real.mkdir()
        with contextlib.suppress(OSError):
            tqdm.write(f"the earlier run is now {aside}")

    @staticmethod
    def free_name(folder: Path, name: str) -> Path:
        return next(path for n in range(1, 100_000) if not (path := folder / f"{name}-{n}").exists())

    def complete_checkpoints(self) -> list[Path]:
        """Folders that were renamed into place, oldest first."""
        return sorted(p.parent for p in self.checkpoints.glob("step-*/manifest.json"))

    def put_aside(self, damaged: list[Path]) -> None:
        for folder in damaged:
            folder.rename(self.free_name(self.checkpoints, f"damaged-{folder.name}"))

    def delete_checkpoint(self, folder: Path) -> None:
        """Under another name first: a kill in the middle leaves no half of it under its own."""
        doomed = folder.with_name(f".{folder.name}.old.partial")
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def check_config(self, config: dict) -> None:
        """Refuse to continue a run that differs in anything its losses depend on."""
        path = self.path / "config.json"
        checkpoints = self.complete_checkpoints()
        try:
            if path.exists():
                earlier = json.loads(path.read_text())
            elif checkpoints:
                earlier = json.loads((checkpoints[-1] / "manifest.json").read_text())["config"]
            else:
                return
            recipe = {k: v for k, v in config["recipe"].items() if k not in FREE_TO_CHANGE}
            pairs = [(flag(k), earlier["recipe"].get(k), v) for k, v in recipe.items()]
            pairs += [(f"model {k}", earlier["model"].get(k), v) for k, v in config["model"].items()]
            pairs += [("data fingerprint", earlier["data"], config["data"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Refused(f"{path} is not readable; --no-resume sets the run aside and starts anew") from None
        if not checkpoints and not (self.metrics.exists() and self.metrics.stat().st_size):
            return  # nothing was done yet under the earlier settings
        different = [f"{name} was {old} and is {new}" for name, old, new in pairs if str(old) != str(new)]
        if different:
            raise Refused(
                f"--run-dir {self.path} holds another run: {'; '.join(different)}. Repeat its settings, choose another "
                "--run-dir, or set it aside with --no-resume"
            )

    def status(self, state: str, reason: str = "") -> None:
        write_json(self.path / "status.json", {
            "state": state, "step": self.step, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(), "pid": os.getpid(),
        })  # fmt: skip

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and a last line that a kill tore apart."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        partial = self.metrics.with_name(".metrics.jsonl.partial")
        partial.write_text("".join(kept))
        partial.replace(self.metrics)

    def has_evaluation(self, step: int) -> bool:
        lines = map(json.loads, self.metrics.read_text().splitlines() if self.metrics.exists() else [])
        return any("val_loss" in line and line["step"] == step for line in lines)

    def log(self, line: dict) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def plot_curves(self) -> None:
        """curves.png: loss, perplexity and accuracy over the steps, training and held-out."""
        from matplotlib.figure import Figure  # not pyplot: no display, no global state

        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, 3), ("loss", "perplexity", "accuracy"), strict=True):
            for key, label, style in ((name, "training", "-"), (f"val_{name}", "held out", "o-")):
                points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
            axes.set(title=name, xlabel="step", yscale="log" if name == "perplexity" else "linear")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        partial = self.path / ".curves.partial.png"
        figure.savefig(partial, dpi=120)
        partial.replace(self.path / "curves.png")


# ---------------------------------------------------------------------------------------------------------- 9 the run


class Progress:
    """What a person sees of the loop: a bar on a terminal, some twenty lines in a log file. Silent but on rank 0."""

    def __init__(self, plan: Plan, world: World, first: int):
        self.plan, self.world, self.first = plan, world, first
        self.start = time.perf_counter()
        self.every = max(1, plan.recipe.steps // 20)
        terminal = world.is_main and sys.stderr.isatty()
        self.bar = None
        if terminal:
            self.bar = tqdm(total=plan.recipe.steps, initial=first - 1, unit="step", dynamic_ncols=True)

    def show(self, m: dict) -> None:
        rate = f"{m['tokens_per_second_per_gpu']:,.0f} tokens/s" + ("/GPU" if self.world.device.type == "cuda" else "")
        mfu = "" if m["mfu"] is None else f"  mfu {m['mfu']:.1%}"
        figures = (
            f"loss {m['loss']:.4f}  ppl {m['perplexity']:,.1f}  acc {m['accuracy']:.2%}  {rate}{mfu}"
            f"  {m['peak_memory_gib']:.2f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(m["step"] - self.bar.n)
        elif m["step"] % self.every == 0 or m["step"] in (self.first, self.plan.recipe.steps):
            done, left = m["step"] - self.first + 1, self.plan.recipe.steps - m["step"]
            eta = int((time.perf_counter() - self.start) / done * left)
            say(self.world, f"step {m['step']:>6}/{self.plan.recipe.steps}  {figures}  lr {m['lr']:.2e}  "
                f"norm {m['grad_norm']:.2f}  eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}")  # fmt: skip

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclass
class InFlight:
    """A step whose metrics are still on the device: read one step late, so that the host never waits for the device."""

    step: int
    values: Tensor
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

    def metrics(self, plan: Plan, world: World, seconds_since: Callable[[], float]) -> dict:
        """The metrics line of this step. Raises Failed if it was not finite."""
        if self.ready is not None:
            self.ready.synchronize()
        *sums, grad_norm, bad = self.values.tolist()
        if bad:
            raise Failed(
                f"step {self.step}: loss {sums[0] / max(sums[1], 1)}, gradient norm {grad_norm}; the weights are those "
                f"of step {self.step - 1}"
            )
        rate = plan.recipe.batch_tokens / world.size / seconds_since()
        return {
            "step": self.step,
            **loss_metrics(*sums),
            "lr": self.lr,
            "grad_norm": grad_norm,
            "tokens": self.step * plan.recipe.batch_tokens,
            "tokens_per_second_per_gpu": rate,
            "mfu": roofline.mfu(rate, plan.flops_per_token, plan.peak_flops),
            "peak_memory_gib": peak_memory_bytes(world) / 2**30,
            "data_wait_s": self.data_wait_s,
        }


def peak_memory_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(plan: Plan, world: World, run: RunFolder, dataset: Dataset, model: Mistral, optimizer) -> bool:
    """The steps after run.step up to the plan's last, each ending in run.step; whether a signal stopped them."""
    recipe = plan.recipe
    loader = Loader(plan, world, dataset.split("train"), run.step + 1, recipe.steps)
    progress = Progress(plan, world, run.step + 1)
    clock = time.perf_counter()
    in_flight: InFlight | None = None

    def seconds_since() -> float:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        return clock - before

    def settle() -> None:
        """Log the step in flight, and stop the run if it was not finite."""
        nonlocal in_flight
        if in_flight is not None:
            metrics, in_flight = in_flight.metrics(plan, world, seconds_since), None
            if world.is_main:
                run.log(metrics)
                progress.show(metrics)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step on one rank is a pause on all of them
    stopping = False
    try:
        while run.step < recipe.steps and not stopping:
            step = run.step + 1
            asked, asking = stop_requested_anywhere()
            tokens, labels = next(loader)
            lr = learning_rate(recipe, step)
            values = train_step(model, optimizer, tokens, labels, lr, recipe.clip)
            settle()
            in_flight = InFlight.after(step, values, lr, loader.waited)
            if in_flight.ready is None:  # on the CPU there is nothing to wait for
                settle()
            run.step = step

            asking.wait()
            stopping = bool(asked.item())
            if evaluation_is_due(plan, dataset, step) and not stopping:
                settle()
                stopping = not log_evaluation(plan, world, run, dataset, model)
            if stopping or step == recipe.steps or step % recipe.save_every == 0:
                settle()
                save_checkpoint(run, step, model, optimizer, world)
                if world.is_main:
                    run.status("running")
                gc.collect()
    finally:
        progress.close()
        gc.enable()
    return stopping


def evaluation_is_due(plan: Plan, dataset: Dataset, step: int) -> bool:
    every, last = plan.recipe.eval_every, step == plan.recipe.steps
    return bool(every) and len(dataset.split("val")) > 1 and step > 0 and (last or step % every == 0)


def log_evaluation(plan: Plan, world: World, run: RunFolder, dataset: Dataset, model: Mistral) -> bool:
    """Evaluate after run.step; False if a signal came in between, and nothing is logged."""
    scores = evaluate(model, dataset.split("val"), plan, world)
    if scores is None:
        return False
    if world.is_main:
        run.log({"step": run.step} | {f"val_{name}": value for name, value in scores.items()})
    say(world, f"held out at step {run.step}: loss {scores['loss']:.4f}  ppl {scores['perplexity']:,.1f}  "
        f"acc {scores['accuracy']:.2%}")  # fmt: skip
    return True


def leave_results(plan: Plan, world: World, run: RunFolder, dataset: Dataset, model: Mistral, again: bool) -> None:
    """The Hugging Face export, the curves and a sample of text; with ``again`` only those that are missing."""
    export = run.path / "export"
    if not (again and on_main(world, is_complete_export, export)):
        tokenizer = dataset.tokenizer or (plan.recipe.init_from if has_tokenizer(plan.recipe.init_from) else None)
        save_hf(model, export, dtype=DTYPES[plan.recipe.export_dtype], tokenizer=tokenizer)
        say(world, f"export     {export}")
    if world.is_main and not (again and (run.path / "curves.png").exists()):
        run.plot_curves()
        say(world, f"curves     {run.path / 'curves.png'}")
    if dataset.tokenizer and not (again and on_main(world, (run.path / "sample.txt").exists)):
        source = dataset.split("val") if len(dataset.split("val")) >= 16 else dataset.split("train")
        prompt = torch.from_numpy(source.read(0, min(16, len(source))))
        ids = model.generate(prompt[None].to(world.device), 48, temperature=0.7, seed=plan.recipe.seed)[0].tolist()
        model.reshard()
        if world.is_main:
            begins, text = decode(dataset.tokenizer, ids[: len(prompt)]), decode(dataset.tokenizer, ids)
            (run.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
            say(world, f"prompt     {begins!r}\ncontinued  {text[len(begins) :]!r}")


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
    free, needed = shutil.disk_usage(existing).free, plan.n_parameters * (12 + 4)
    if free < needed:
        raise Refused(
            f"--run-dir {plan.recipe.run_dir} has {free / 1e9:.1f} GB free, but one checkpoint and the export take "
            f"{needed / 1e9:.1f} GB"
        )


def main(recipe: Recipe) -> int:
    """The whole run; returns the exit code of this rank. Raises Refused."""
    world = start_distributed()
    plan = agreed(resolve, recipe, world)
    dataset = agreed(open_data, recipe.data) if recipe.data else None
    if dataset:
        agreed(check_data, plan, dataset)
    agreed(check_disk, plan)
    set_reference_only(recipe.kernels == "reference")

    run = RunFolder(recipe.run_dir, recipe.keep)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, so --no-resume has had its turn
    on_main(world, run.open, None if restarted else recipe.resume)
    if dataset is None:
        folder = run.path / "data"
        if world.is_main and not folder.exists():
            say(world, "preparing the built-in corpus: the Python language reference, Mistral-7B-v0.1's tokenizer")
        on_main(world, lambda: folder.exists() or prepare_builtin(folder))
        dataset = agreed(open_data, folder)
        agreed(check_data, plan, dataset)
    agreed(dataset.verify, world.rank, world.size)
    run.config = {"recipe": asdict(plan.recipe), "model": asdict(plan.model), "data": dataset.fingerprint}
    on_main(world, run.check_config, run.config)
    checkpoint = newest_checkpoint(run, world)

    global active_run  # from here on, what ends the run is told in its status.json
    active_run = run
    run.step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    if world.is_main:
        versions = {"torch": torch.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
        write_json(run.path / "config.json", run.config | {"world_size": world.size, "versions": versions})
        run.keep_metrics_until(run.step)
        run.status("running")
    say(world, describe(plan, world, dataset))

    model = build_model(plan, world)
    optimizer = build_optimizer(model, plan.recipe)
    if checkpoint:
        load_checkpoint(checkpoint, run.step, model, optimizer)
        say(world, f"resuming after step {run.step} from {checkpoint}")
    else:
        fill_model(model, plan, world)

    again = run.step == plan.recipe.steps
    if again:
        say(world, f"this run is finished: {run.step} steps in {run.path}")
    stopped = False
    if evaluation_is_due(plan, dataset, run.step) and not on_main(world, run.has_evaluation, run.step):
        stopped = not log_evaluation(plan, world, run, dataset, model)  # a signal had cut it short
    if not again and not stopped:
        stopped = train(plan, world, run, dataset, model, optimizer)
    if stopped:
        reason = next(filter(None, everywhere(stop_signal)), "a signal")
        if world.is_main:
            run.plot_curves()
            run.status("stopped", reason)
        say(world, f"stopped by {reason} after step {run.step}; the same command again continues")
        return STOPPED
    leave_results(plan, world, run, dataset, model, again)
    if world.is_main:
        run.status("finished")
    return FINISHED


active_run: RunFolder | None = None


def run_to_exit_code(recipe: Recipe) -> int:
    """``main`` with its failures turned into one line, a status and an exit code."""
    rank, host = int(os.environ.get("RANK", "0")), socket.gethostname()
    try:
        code = main(recipe)
        dist.barrier()  # torchrun ends everyone when the first rank exits with an error: let all get here
        return code
    except Refused as refusal:
        refuse(refusal)
    except Failed as failure:
        reason, is_first = str(failure), rank == 0
        if rank == 0:
            print(f"train.py: stopped: {reason}", file=sys.stderr)
    except BaseException as error:
        reason = f"rank {rank} on {host}: {type(error).__name__}: {error}"
        print(f"train.py: rank {rank} on {host} failed", file=sys.stderr)
        traceback.print_exc()
        # A rank that lost its connection has seen another one die: that one's reason is the one to keep.
        is_first = not isinstance(error, dist.DistError) and "gloo" not in str(error).lower()
    if active_run is not None:
        with contextlib.suppress(OSError, ValueError):  # a full disk may be what ended the run
            if not is_first:
                time.sleep(1)
            if is_first or json.loads((active_run.path / "status.json").read_text())["state"] != "failed":
                active_run.status("failed", reason)
    return FAILED


if __name__ == "__main__":
    code = run_to_exit_code(RECIPE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # not sys.exit: gloo's threads now and then abort the interpreter's tear-down, and spoil the code
