"""Does the low-memory optimizer learn as fp32 AdamW does? A small Mistral in bf16, trained by each, side by side.

    python bench/convergence.py [--steps 400] [--seeds 3] [--beta2 0.95]    a quarter of an hour on a CPU core

Same data in the same order, same fresh weights, same clipping and schedule; only what is kept between steps differs:

    fp32 AdamW          torch.optim.AdamW(fused=True) on fp32 master weights, copied to the bf16 model every step
    fp32, bf16, 8bit    kernels/adamw.py: the master weight's upper half *is* the model's, moments in that format
    bf16, nearest       torch.optim.AdamW on the bf16 model: weights and moments rounded to nearest. What one must not
                        do, here to show that the comparison can tell

Every optimizer runs with every seed (of fresh weights, order of samples and rounding), so a difference to fp32 AdamW is
taken at the same seed, and held against the spread of fp32 AdamW between seeds. Runs that differ in one bit drift apart
as far as chance takes them: "fp32", whose arithmetic is AdamW's but for last bits, shows how far that is.

The text is the built-in corpus with Mistral's tokenizer; ids that never occur in it are taken out of the vocabulary,
which leaves the many rare tokens, whose embeddings see a gradient once in a while: the hard case for coarse moments.

    python bench/convergence.py --average [--steps 400] [--seeds 3]    can the mean of checkpoints stand for the decay?

Trains with fp32 AdamW only, at a constant rate to the end, and, from the same state a fifth before it, a second time
with the rate decaying (train.py's ``--schedule wsd``), so that both have read the same tokens. Held-out losses of the
last checkpoint at constant rate, of the mean of the last 2, 4, 8 and 16, one taken every fortieth of the run, and of
the decayed model. In bf16 on a GPU, in fp32 on a CPU, as train.py; averaged are the fp32 master weights. Averaging in
place of the decay: Tian et al., WSM, arXiv:2507.17634. At a constant rate the held-out loss stops falling after some
600 steps, five times through the text: longer runs compare overfitted models.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import numpy as np
import torch
from torch import Tensor

import train
from bench import report
from bench.lib.clocks import Bench, bench_on
from bench.lib.command import at_least_one, command
from bench.lib.results import new_result, results_folder, write_result
from halny.kernels import adamw
from halny.model.data.batches import IGNORED, Corpus, read_in_turn
from halny.model.data.order import sample_order, step_numbers
from halny.model.data.rows import Rows
from halny.model.durable import replacing
from halny.model.estimate import sizes
from halny.model.exits import Refused
from halny.model.mistral import Mistral, MistralConfig
from halny.model.prepare_data import prepare_builtin

SEQ_LEN, SAMPLES_A_STEP = 128, 8
EVALUATIONS = 16  # over a run, the last of them at its end
BETA1, EPS, WEIGHT_DECAY, CLIP = 0.9, 1e-8, 0.1, 1.0
LR = 2e-3  # at its peak
CHECKPOINTS = 40  # over a run of --average; the decay, a fifth of it, has 8 of them
KS = (1, 2, 4, 8, 16)  # how many of the last are averaged
SHOWN = 8  # of these the one whose curve is drawn
SIZES = dict(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=192, window=64, max_seq_len=1024)

# ---------------------------------------------------------------------------------------------------------------- data


class Text:
    """The built-in corpus on a device, cut into rows of SEQ_LEN; its ids renumbered without gaps."""

    def __init__(self, device: torch.device):
        with tempfile.TemporaryDirectory() as folder:
            prepare_builtin(Path(folder) / "data")
            corpus = Corpus([str(Path(folder) / "data")], SEQ_LEN)
            splits = [whole(corpus.train), whole(corpus.held_out)]
        ids = torch.cat([x.flatten() for split in splits for x in split]).unique()
        ids = ids[ids != IGNORED]
        renumbered = torch.empty(corpus.vocab_size, dtype=torch.int64)
        renumbered[ids] = torch.arange(len(ids))
        self.vocab_size = len(ids)
        self.train, self.held_out = (
            tuple(torch.where(x == IGNORED, IGNORED, renumbered[x.clamp(min=0)]).to(device) for x in split)
            for split in splits
        )

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """(tokens, labels) of a step, in train.py's order of samples."""
        tokens, labels = self.train
        rows = sample_order(step_numbers(step, SAMPLES_A_STEP), len(tokens), seed)
        return tokens[rows], labels[rows]


def whole(rows: list[Rows]) -> tuple[Tensor, Tensor]:
    return read_in_turn(rows, np.arange(sum(map(len, rows))))[:2]


# ---------------------------------------------------------------------------------------------------------- optimizers
# Each takes the model's fp32 weights, puts bf16 ones in their place, and has a step(scale, lr, seed) that reads the
# bf16 gradients, times the scale of the clip, a tensor.


class Torch:
    """torch.optim.AdamW on fp32 master weights, or, ``nearest``, on the bf16 ones themselves.

    With another dtype the model's weights are of that one, as --average has it on a CPU.
    """

    def __init__(self, model: Mistral, beta2: float, nearest: bool, dtype: torch.dtype = torch.bfloat16):
        self.weights = list(model.parameters())
        self.masters = self.weights if nearest else [p.detach().clone() for p in self.weights]
        for p in self.weights:
            p.data = p.data.to(dtype)
        groups = [
            {"params": [p for p in self.masters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.masters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(BETA1, beta2), eps=EPS, fused=True)

    def step(self, scale: Tensor, lr: float, seed: int) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = (weight.grad.float() * scale).to(master.dtype)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master)


class Halves:
    """adamw_ on the model's weights and their lower halves."""

    def __init__(self, model: Mistral, beta2: float, moments: str):
        self.weights, self.lows, self.beta2, self.steps = list(model.parameters()), [], beta2, 0
        for p in self.weights:
            high, low = adamw.split(p.data)
            p.data = high
            self.lows.append(low)
        self.moments = [adamw.new_moments(p, moments) for p in self.weights]

    def step(self, scale: Tensor, lr: float, seed: int) -> None:
        self.steps += 1
        corrections = [1 - BETA1**self.steps, math.sqrt(1 - self.beta2**self.steps)]
        scalars = torch.tensor([lr, *corrections, 1.0, 0.0]).to(scale.device)
        scalars[3] = scale
        for i, (weight, low, moments) in enumerate(zip(self.weights, self.lows, self.moments, strict=True)):
            decay = WEIGHT_DECAY if weight.ndim >= 2 else 0.0
            settings = dict(beta1=BETA1, beta2=self.beta2, eps=EPS, weight_decay=decay)
            rounding = (seed << 40) + (self.steps << 12) + i
            adamw.adamw_(weight.data, low, weight.grad, moments, scalars, **settings, seed=rounding)


OPTIMIZERS: dict[str, Callable] = {
    "fp32 AdamW": lambda model, beta2: Torch(model, beta2, nearest=False),
    "fp32": lambda model, beta2: Halves(model, beta2, "fp32"),
    "bf16": lambda model, beta2: Halves(model, beta2, "bf16"),
    "8bit": lambda model, beta2: Halves(model, beta2, "8bit"),
    "bf16, nearest": lambda model, beta2: Torch(model, beta2, nearest=True),
}

# ------------------------------------------------------------------------------------------------------------- one run


@torch.no_grad()
def held_out_loss(model: Mistral, text: Text) -> float:
    parts = [model(*pair) for pair in zip(*(x.split(64) for x in text.held_out), strict=True)]
    return (sum(p.loss.double() for p in parts) / sum(p.n_tokens for p in parts)).item()


def recipe_of(steps: int, **schedule) -> train.Recipe:
    return train.Recipe(steps=steps, lr=LR, min_lr=LR / 10, warmup_steps=max(1, steps // 10), **schedule)


def fresh(text: Text, seed: int) -> Mistral:
    model = Mistral(MistralConfig(vocab_size=text.vocab_size, **SIZES)).to(text.train[0].device)
    model.init_weights(seed)
    return model


def trained(
    model: Mistral, optimizer: Torch | Halves, text: Text, recipe: train.Recipe, steps: range, seed: int
) -> Iterator[tuple[int, float]]:
    """Train through these steps of the recipe; after each (step, its training loss)."""
    for step in steps:
        result = model(*text.batch(step, seed))
        (result.loss / result.n_tokens).backward()
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in model.parameters()])
        optimizer.step((CLIP / norm).clamp(max=1.0), train.learning_rate(recipe, step), seed)
        model.zero_grad()
        yield step, (result.loss.detach() / result.n_tokens).item()


def run(name: str, text: Text, steps: int, seed: int, beta2: float) -> dict:
    """Train one model: {"losses": of every step, "held_out": [[step, loss], ...]}."""
    model = fresh(text, seed)
    optimizer = OPTIMIZERS[name](model, beta2)
    losses, held_out = [], []
    for step, loss in trained(model, optimizer, text, recipe_of(steps), range(1, steps + 1), seed):
        losses.append(loss)
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            held_out.append([step, held_out_loss(model, text)])
    return {"optimizer": name, "seed": seed, "losses": losses, "held_out": held_out}


# --------------------------------------------------------------------------------------------------- means or the decay


def named(k: int) -> str:
    return "last checkpoint" if k == 1 else f"mean of the last {k}"


def mean_of(checkpoints: list[list[Tensor]]) -> list[Tensor]:
    """The mean of each weight, summed in fp64, in fp32."""
    return [(sum(x.double() for x in weights) / len(weights)).float() for weights in zip(*checkpoints, strict=True)]


def schedules(steps: int) -> tuple[train.Recipe, train.Recipe]:
    """Constant after the warm-up; and the same up to the decay."""
    return recipe_of(steps, schedule="constant"), recipe_of(steps, schedule="wsd", decay_steps=steps // 5)


def average(text: Text, steps: int, seed: int, beta2: float, dtype: str) -> dict:
    """Train one model to the end at constant rate, and from where wsd decays a copy of it: their held-out losses.

    {"curves": {"last checkpoint": [[step, loss], ...], "mean of the last 2": ..., "decayed": ...}}, those of constant
    rate first. Checkpoints are the fp32 master weights; they are evaluated in the model's dtype.
    """
    constant, decaying = schedules(steps)
    fork, interval = steps - decaying.decay_steps, steps // CHECKPOINTS
    model = fresh(text, seed)
    optimizer = Torch(model, beta2, nearest=False, dtype=train.DTYPES[dtype])
    judged, checkpoints = copy.deepcopy(model), []
    curves: dict[str, list] = {named(k): [] for k in KS} | {"decayed": []}
    for step, _ in trained(model, optimizer, text, constant, range(1, steps + 1), seed):
        if step % interval == 0:
            checkpoints = [*checkpoints[1 - max(KS) :], [x.clone() for x in optimizer.masters]]
            for k in (k for k in KS if k <= len(checkpoints)):
                for p, x in zip(judged.parameters(), mean_of(checkpoints[-k:]), strict=True):
                    p.data.copy_(x)
                curves[named(k)].append([step, held_out_loss(judged, text)])
        if step == fork:
            branch = copy.deepcopy((model, optimizer))  # as one, so that the optimizer's weights stay the model's
    for step, _ in trained(*branch, text, decaying, range(fork + 1, steps + 1), seed):
        if step % interval == 0:
            curves["decayed"].append([step, held_out_loss(branch[0], text)])
    return {"seed": seed, "curves": curves}


# -------------------------------------------------------------------------------------------------------- what it says


def over_seeds(losses: list[float], baseline: list[float]) -> dict:
    """Mean and spread of held-out losses, a seed each, and of their differences to a baseline's at the same seed.

    "spread" is the sample standard deviation between seeds, of the loss, and of the difference; 0 with one seed.
    """
    differences = [loss - other for loss, other in zip(losses, baseline, strict=True)]
    spreads = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in (losses, differences)]
    return {
        "held_out_loss": statistics.mean(losses), "spread": spreads[0],
        "difference": statistics.mean(differences), "spread_of_difference": spreads[1],
    }  # fmt: skip


def summary(runs: list[dict]) -> list[dict]:
    """Of each optimizer: final held-out loss, and its difference to fp32 AdamW."""
    final = {name: [r["held_out"][-1][1] for r in runs if r["optimizer"] == name] for name in OPTIMIZERS}
    return [{"optimizer": name} | over_seeds(final[name], final["fp32 AdamW"]) for name in OPTIMIZERS]


def summary_of_averages(runs: list[dict], at: list[int]) -> list[dict]:
    """Of each model at these steps: held-out loss, and its difference to the last checkpoint at constant rate."""
    rows = []
    for step in at:
        points = [{name: dict(curve).get(step) for name, curve in run["curves"].items()} for run in runs]
        baseline = [point["last checkpoint"] for point in points]
        for name in (name for name, loss in points[0].items() if loss is not None):
            rows.append({"what": name, "step": step} | over_seeds([point[name] for point in points], baseline))
    return rows


def plot(result: dict, path: Path) -> None:
    """Training loss, smoothed, and the held-out loss less that of fp32 AdamW at the same seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(13, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    by_name = {name: [r for r in result["runs"] if r["optimizer"] == name] for name in OPTIMIZERS}
    baseline = [dict(r["held_out"]) for r in by_name["fp32 AdamW"]]
    at = sorted(baseline[0])
    for i, (name, runs) in enumerate(by_name.items()):
        color = "black" if i == 0 else colormaps["tab10"](i)
        losses = np.mean([r["losses"] for r in runs], axis=0)
        width = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        left.plot(np.arange(width, len(losses) + 1), smooth, color=color, linewidth=1.2, label=name)
        if i:
            differences = np.array([
                [dict(r["held_out"])[s] - b[s] for s in at] for r, b in zip(runs, baseline, strict=True)
            ])  # fmt: skip
            right.plot(at, differences.mean(0), "o-", color=color, linewidth=1.2, markersize=3, label=name)
            right.plot(at, differences.T, color=color, linewidth=0.5, alpha=0.4)
    if len(baseline) > 1:
        spread = np.array([np.std([b[s] for b in baseline], ddof=1) for s in at])
        right.fill_between(at, -spread, spread, color="black", alpha=0.1, label="fp32 AdamW between seeds")
    left.set(title="training loss (mean of seeds, smoothed)", xlabel="step")
    right.set(title="held-out loss less fp32 AdamW's, same seed", xlabel="step")
    finish(figure, result, path)


def plot_averages(result: dict, path: Path) -> None:
    """Held-out loss over the steps of both branches and of a running mean; and at the end over how many are averaged.

    Thick is the mean of the seeds, thin is each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    about, curves = result["setting"], [run["curves"] for run in result["runs"]]
    end = about["steps"]
    fork = end - about["decay_steps"]

    def lines(axes, x, of_seeds, **style) -> None:
        axes.plot(x, np.mean(of_seeds, axis=0), "o-", linewidth=1.2, markersize=3, **style)
        axes.plot(x, np.transpose(of_seeds), linewidth=0.5, alpha=0.4, color=style["color"])

    for name, color in ((named(1), "black"), (named(SHOWN), "tab:blue"), ("decayed", "tab:red")):
        points = np.array([[point for point in c[name] if point[0] >= fork // 2] for c in curves])
        label = name if name == "decayed" else f"constant rate, {name}"
        lines(left, points[0, :, 0], points[:, :, 1], color=color, label=label)
    for step, color in ((fork, "tab:gray"), (end, "tab:blue")):
        losses = [[dict(c[named(k)])[step] for k in KS] for c in curves]
        lines(right, KS, losses, color=color, label=f"constant rate, step {step}")
    decayed = [dict(c["decayed"])[end] for c in curves]
    right.axhline(np.mean(decayed), color="tab:red", linewidth=1.2, label=f"decayed, step {end}")
    for loss in decayed:
        right.axhline(loss, color="tab:red", linewidth=0.5, alpha=0.4)
    right.set_xscale("log", base=2)
    right.set_xticks(KS, map(str, KS))
    left.set(title="held-out loss (thin: each seed)", xlabel="step")
    right.set(
        title="held-out loss of means of the last checkpoints",
        xlabel=f"checkpoints averaged, {about['interval']} steps apart",
    )
    finish(figure, result, path)


def finish(figure, result: dict, path: Path) -> None:
    """Grids, legends, the title that says what was trained and where; to the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    about, machine = result["setting"], result["machine"]
    figure.suptitle(
        f"{about['weights']:,} weights, {about.get('dtype', 'bf16')}, {about['steps']} steps of "
        f"{SAMPLES_A_STEP} x {SEQ_LEN} tokens, beta2 {about['beta2']}, {about['seeds']} seeds; "
        f"{machine['device']}, torch {machine['versions']['torch']}",
        fontsize=10,
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


@command
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--average", action="store_true", help="means of checkpoints beside the decay, instead")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run [400]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer [3]")
    parser.add_argument("--beta2", type=float, default=0.95, help="AdamW's; 0.999 is where coarse moments stall [0.95]")
    parser.add_argument("--out", type=Path, help="folder of the JSON file [bench/results/DATE-DEVICE]")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the curves [beside the JSON file]")
    given = parser.parse_args(arguments)
    at_least_one(given, "steps", "seeds")
    if not 0 <= given.beta2 < 1:
        raise Refused(f"--beta2 must be in [0, 1), got {given.beta2}")
    if given.average and given.steps % CHECKPOINTS:
        said = f"a multiple of {CHECKPOINTS}, so that as many checkpoints lie evenly in them"
        raise Refused(f"with --average --steps must be {said}, got {given.steps}")

    if torch.cuda.is_available():
        bench = bench_on(smoke=False)
    else:
        torch.set_num_threads(1)  # tensors this small are no faster with two, and the same bits on any machine's cores
        bench = Bench(torch.device("cpu"), False, 0)
    kind = "averaging" if given.average else "convergence"
    name = kind if given.beta2 == 0.95 else f"{kind}-beta2-{given.beta2:g}"
    path = (given.out or results_folder(bench)) / f"{name}.json"
    png = given.png or path.with_suffix(".png")
    result, text = new_result(kind, bench), Text(bench.device)
    model = MistralConfig(vocab_size=text.vocab_size, **SIZES)
    n_weights = sizes.parameters(model)
    setting = dict(
        steps=given.steps, seeds=given.seeds, beta1=BETA1, beta2=given.beta2, eps=EPS, lr=LR, clip=CLIP,
        weight_decay=WEIGHT_DECAY, seq_len=SEQ_LEN, samples_a_step=SAMPLES_A_STEP, model=asdict(model),
        weights=n_weights, train_tokens=text.train[0].numel(), held_out_tokens=text.held_out[0].numel(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    print(f"{bench.name}, torch {torch.__version__}; {n_weights:,} weights, vocabulary {text.vocab_size:,}, "
        f"{given.steps} steps of {SAMPLES_A_STEP} x {SEQ_LEN} tokens, beta2 {given.beta2}", flush=True)  # fmt: skip
    dtype = "bf16" if bench.on_gpu else "fp32"  # of --average, as train.py: a CPU may take five times as long in bf16
    runs, started = [], time.monotonic()
    todo = [(seed, name) for seed in range(given.seeds) for name in (["averaging"] if given.average else OPTIMIZERS)]
    for i, (seed, what) in enumerate(todo, start=1):
        if given.average:
            runs.append(average(text, given.steps, seed, given.beta2, dtype))
            said = ", ".join(f"{name} {curve[-1][1]:.4f}" for name, curve in runs[-1]["curves"].items())
        else:
            runs.append(run(what, text, given.steps, seed, given.beta2))
            loss, held_out = statistics.mean(runs[-1]["losses"][-20:]), runs[-1]["held_out"][-1][1]
            said = f"training loss {loss:.4f}, held out {held_out:.4f}"
        minutes = (time.monotonic() - started) / i * (len(todo) - i) / 60
        print(f"{i:3} of {len(todo)}: {what:15} seed {seed}: {said}; {minutes:.0f} min left", flush=True)
    if given.average:
        constant, decaying = schedules(given.steps)
        setting |= dict(
            schedule=decaying.schedule, warmup_steps=constant.warmup_steps, decay_steps=decaying.decay_steps,
            min_lr=decaying.min_lr, dtype=dtype, interval=given.steps // CHECKPOINTS, ks=list(KS),
        )  # fmt: skip
        rows = summary_of_averages(runs, at=[given.steps - decaying.decay_steps, given.steps])
        draw, tabled = plot_averages, report.averaging_table
    else:
        rows, draw, tabled = summary(runs), plot, report.convergence_table
    result |= {"setting": setting, "summary": rows, "runs": runs}
    write_result(path, result)
    png.parent.mkdir(parents=True, exist_ok=True)
    draw(result, png)
    print(f"{path} and {png}")
    print(tabled(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
