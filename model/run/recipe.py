"""The recipe of a run: every setting once, with its help; presets; what a resumed run may change. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halny.model.run.settings import Settings, setting

AUTO = "auto"  # --profile without a value; a value of --save-every


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
        "folder made by python -m halny.model.prepare_data, or raw .bin files or a folder of them; or several and the "
        "share of samples from each, as in pl:0.7 en:0.3 [built in: the Python language reference]")
    data_dtype: str | None = setting("data", None,
        "dtype of the ids where --data is a raw .bin file (nanoGPT's, llm.c's, ALLaMo's) whose header does not say",
        choices=("uint16", "uint32"))
    documents: bool = setting("data", False,
        "whole documents packed best-fit, attention inside each only, instead of windows of the concatenated text")
    seq_len: int = setting("data", 128, "tokens in a sample", minimum=1)
    batch_tokens: int = setting("data", 1024, "tokens in an optimizer step, over all ranks", minimum=1, below=2**32)
    micro_batch: int | None = setting("data", None,
        "samples a rank computes at once; it accumulates gradients over its share [the most that divides it, up to 8, "
        "and that fits the GPU]",
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
        "whether the backward pass recomputes the outputs of norms and SwiGLU, a third of all activations: always, "
        "never, or auto, where memory is short; costs 0.5% of a 7B's step",
        choices=("auto", "always", "never"))

    numa: bool = setting("ranks", True,
        "keep each rank on the cores of its GPU's NUMA node, where its launcher has not bound it to one")
    allow_old_nccl: bool = setting("ranks", False, "on Arm, start with an NCCL before 2.29.3, which may hang there")

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
    save_every: int | str | None = setting("run", None,
        "steps between checkpoints; or auto, where saves and failures together cost least, by what a save takes and "
        "--mtbf-hours [a tenth of --steps, at most 500]", minimum=1, word=AUTO, shown="N|auto")
    mtbf_hours: float | None = setting("run", None,
        "mean time between failures of the whole job, for --save-every auto. Llama 3's 16,384 GPUs had one every 3.1 "
        "hours: some 50,000 hours, divided by the number of GPUs", above=0)
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
        "evaluate the newest checkpoint, or if there is none --init-from, into --out; changes nothing else, so the run "
        "may be going on, or be one that only others may write")
    average: int | None = setting("run", None,
        "--eval-only evaluates the mean of the weights of so many newest checkpoints; python -m halny.model.export "
        "writes it [the newest alone]", minimum=2)
    out: Path | None = setting("run", None, "file for what --eval-only finds [evaluation.json in --run-dir]",
        shown="FILE")
    export_dtype: str = setting("run", "bf16", "dtype of the final Hugging Face export",
        choices=("bf16", "fp16", "fp32"))
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
        "profile these steps into traces/; alone: three, after five [none]", bare=AUTO, shown="FIRST[-LAST]")
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
    *("shard", "replicate", "reshard", "recompute", "numa", "allow_old_nccl"),
    *("save_every", "mtbf_hours", "keep", "keep_every", "eval_every", "export_dtype", "peak_tflops"),
    *("max_hours", "deadline", "replay_step", "eval_data", "eval_only", "average", "out", "profile", "profile_ranks"),
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


def steps_to_profile(text: str, begin: int, end: int) -> tuple[int, int]:
    """(first, last) of "10-12", "10", or "auto": three steps after five that warm up, in a run from begin to end.

    Raises ValueError for anything else and for steps beyond the end.
    """
    if text == AUTO:
        first = max(begin, min(begin + 5, end - 2))
        return first, min(first + 2, end)
    numbers = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= first <= last <= end:
        raise ValueError(f"{text} must be a step or FIRST-LAST within 1 to {end}, as in 10-12")
    return first, last


def ranks_to_profile(texts: Sequence[str], world_size: int) -> set[int]:
    """Of rank numbers as text, or "all". Raises ValueError for one that there is not."""
    if list(texts) == ["all"]:
        return set(range(world_size))
    for text in texts:
        if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) < world_size):
            raise ValueError(f"{text} must be ranks from 0 to {world_size - 1}, or all")
    return set(map(int, texts))
