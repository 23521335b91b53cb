"""Others' training step beside ours: Hugging Face's Mistral, and the same with Liger-Kernel's patches, both compiled.

    python bench/opponents.py [--out DIR]       on a GPU: "opponents" of DIR/step.json, beside bench/step.py's rows
    python bench/opponents.py --smoke           here: a tiny model on the CPU, not compiled, no figures

The same model on the same card: MistralForCausalLM of our sizes (attn_implementation="sdpa"; no window, since at a
context of 4,096 one of 4,096 changes nothing, and no mask beside is_causal, so that SDPA has its flash kernel), random
weights and tokens, the mean loss, ``clip_grad_norm_``, ``torch.optim.AdamW(fused=True)``,
``zero_grad(set_to_none=True)``; timed by ``steady_steps`` and divided by ``step_figures``, as ours. Liger-Kernel: all
that it patches by default, the fused linear cross-entropy with it.

Two precisions: weights, gradients and moments in bf16, as is usual on one card; and fp32 ones with autocast to bf16,
which is what ours keeps with fp32 moments. Each opponent is given its best (``next_way``): the largest throughput
counts, all that was tried is recorded. Each runs in a process of its own, within its share of the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch._dynamo

from bench.lib.clocks import Bench, bench_on
from bench.lib.command import at_least_one, command, leave, no_such, parser_of, passed_on
from bench.lib.process import be_a_case, in_its_own_process, line_of
from bench.lib.results import new_result, results_folder, write_json, write_result
from bench.lib.steps import gib, memory_figures, mfu_words, random_tokens, steady_steps, step_figures, way_words
from halny.model.estimate.memory import activation_bytes_per_token
from halny.model.estimate.sizes import parameters
from halny.model.mistral import PRESETS, MistralConfig

SEQ_LEN = 4096
MICRO_BATCHES = (8, 4, 2, 1)
LEAST_S = 6  # seconds of steps in each way, at least
START_S = 15  # of a process, before its first way
LEAST_BUDGET_S = 55  # of an opponent: the start, a first step that compiles for 12 to 18 s on an H200, steps; two ways
LAYERS, MODEL = "each layer", "the whole model"  # what torch.compile is given


@dataclass(frozen=True)
class Opponent:
    name: str
    liger: bool
    fp32: bool  # weights, gradients and moments

    @property
    def label(self) -> str:
        package = "Hugging Face + Liger-Kernel" if self.liger else "Hugging Face"
        kept = "fp32 weights and moments, autocast" if self.fp32 else "bf16 weights and moments"
        return f"{package} + torch.compile, {kept}"

    @property
    def state_bytes(self) -> int:
        """Bytes a weight of weight, gradient and two moments; with autocast of its copy in bf16 too."""
        return 4 * 4 + 2 if self.fp32 else 4 * 2


OPPONENTS = (  # the strongest first, and of its two precisions the one that keeps what ours keeps
    Opponent("liger-fp32", True, True),
    Opponent("liger-bf16", True, False),
    Opponent("hf-bf16", False, False),
    Opponent("hf-fp32", False, True),
)


# ------------------------------------------------------------------------------------------------------------ its step


def load(opponent: Opponent, config: MistralConfig, device: torch.device) -> torch.nn.Module:
    """The model with random weights. Raises ImportError where a package is missing, or cannot run."""
    from transformers import AutoModelForCausalLM
    from transformers import MistralConfig as HFConfig
    from transformers.models.mistral import modeling_mistral

    # transformers leaves the mask out where nothing is padded, and so SDPA has its flash kernel; but while
    # torch.compile traces the whole model, before torch 2.14, it builds it. No opponent should lose by that.
    modeling_mistral.create_causal_mask = lambda *arguments, **options: None
    if opponent.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_mistral

        if device.type == "cpu":
            raise ImportError("Liger-Kernel is installed, but needs a GPU")
        apply_liger_kernel_to_mistral()
    hf = HFConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        sliding_window=None, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    dtype = torch.float32 if opponent.fp32 else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation="sdpa")
    return model.train()


class OpponentStep:
    """An opponent's training loop, a step a call."""

    def __init__(self, opponent: Opponent, config: MistralConfig, device: torch.device):
        self.opponent, self.config, self.device = opponent, config, device
        self.model = load(opponent, config, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
        self.call, self.loss, self.batches = self.model, None, []

    def prepare(self, micro_batch: int, seq_len: int, compiled: str | None, checkpointing: bool) -> None:
        """What the next steps work on, and how."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.batches = list(random_tokens(self.config.vocab_size, (4, micro_batch, seq_len), self.device))
        if checkpointing:
            self.model.gradient_checkpointing_enable()  # without reentrance, as transformers 5 does by itself
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None  # what nn.Module.compile sets
            if compiled == LAYERS:
                layer.compile(dynamic=False)
        self.call = torch.compile(self.model, dynamic=False) if compiled == MODEL else self.model

    def run(self, i: int) -> None:
        tokens = self.batches[i % len(self.batches)]
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.opponent.fp32 else contextlib.nullcontext()
        with mixed:
            loss = self.call(input_ids=tokens, labels=tokens, use_cache=False).loss  # shifts them itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()


# ---------------------------------------------------------------------------------------------------------- its process


def least_bytes(opponent: Opponent, config: MistralConfig, micro_batch: int, checkpointing: bool) -> int:
    """What it needs at least: weights, gradients, moments; and what any such model keeps for its backward.

    With checkpointing a layer's input; without it what memory.py counts with all cheap things recomputed, as a
    compiler may.
    """
    tokens = micro_batch * SEQ_LEN
    if checkpointing:
        kept = 2 * config.dim * config.n_layers * tokens
    else:
        kept = activation_bytes_per_token(config, 2, recompute=True) * tokens
    return opponent.state_bytes * parameters(config) + kept


def too_large(bench: Bench, step: OpponentStep, micro_batch: int, checkpointing: bool) -> str:
    """Why a way need not be run, or ""."""
    needed, memory = least_bytes(step.opponent, step.config, micro_batch, checkpointing), bench.memory_bytes
    return f"needs at least {gib(needed)} of {gib(memory)}" if memory is not None and needed > memory else ""


def attempt(
    bench: Bench, step: OpponentStep, micro_batch: int, compiled: str | None, checkpointing: bool, n_steps: int,
    seconds: float,
) -> dict:  # fmt: skip
    """One way to run it: its figures, or why there are none."""
    tried = {"micro_batch": micro_batch, "compiled": compiled or "nothing", "checkpointing": checkpointing}
    if reason := too_large(bench, step, micro_batch, checkpointing):
        return tried | {"status": "does not fit", "reason": reason}
    seq_len = 64 if bench.smoke else SEQ_LEN
    began = time.monotonic()
    try:
        step.prepare(micro_batch, seq_len, compiled, checkpointing)
        step.run(0)
        bench.synchronize()
        first_s, graphs = time.monotonic() - began, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ms = steady_steps(bench, step.run, n_steps, seconds)
        loss = step.loss.item()
        if not loss < float("inf"):
            return tried | {"status": "failed", "reason": f"the loss is {loss}"}
    except torch.OutOfMemoryError as error:
        return tried | {"status": "does not fit", "reason": line_of(error)}
    except Exception as error:  # what a compiler may raise
        return tried | {"status": "failed", "reason": line_of(error)}
    figures = step_figures(step.config, micro_batch * seq_len, seq_len, ms["median"], bench.name)
    about = {"status": "ok", "reason": "", "first_step_s": first_s, "graphs": graphs, "step_ms": ms}
    return tried | about | figures | memory_figures(bench)


def next_way(attempts: list[dict], smoke: bool, micro_batch: int | None) -> tuple[int, str | None, bool] | None:
    """The (micro batch, compiled, checkpointing) to try after these; None: enough.

    The sizes of MICRO_BATCHES, each layer compiled, which is quick, until one is slower than the one before; and the
    best of them with the whole model compiled. If none fits, with checkpointing, the largest that does; of the whole
    model, because a checkpoint keeps a compiled layer from running.
    """
    sizes = (2, 1) if smoke else (micro_batch,) if micro_batch else MICRO_BATCHES
    plain = [a for a in attempts if not a["checkpointing"] and a["compiled"] != MODEL]
    fitting = [a for a in plain if a["status"] == "ok"]
    slower = len(fitting) > 1 and fitting[-1]["tokens_per_second"] < fitting[-2]["tokens_per_second"]
    if len(plain) < len(sizes) and not slower:
        return sizes[len(plain)], None if smoke else LAYERS, False
    if fitting:
        best = max(fitting, key=lambda a: a["tokens_per_second"])
        done = smoke or any(a["compiled"] == MODEL for a in attempts)
        return None if done else (best["micro_batch"], MODEL, False)
    kept = [a for a in attempts if a["checkpointing"]]
    if len(kept) == len(sizes) or any(a["status"] == "ok" for a in kept):
        return None
    return sizes[len(kept)], None if smoke else MODEL, True


def measured(bench: Bench, opponent: Opponent, given: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Everything that is tried of one opponent; the row is saved after each, its figures those of the best so far."""
    end = time.monotonic() + given.budget_s
    config = PRESETS["test"] if bench.smoke else PRESETS["mistral-7b"]
    config = replace(config, n_layers=given.layers or config.n_layers, window=None)
    attempts: list[dict] = []
    row = {"name": opponent.name, "label": opponent.label, "status": "failed", "reason": "", "attempts": attempts}
    row |= {"n_layers": config.n_layers, "seq_len": 64 if bench.smoke else SEQ_LEN}
    save(row)
    needed, memory = opponent.state_bytes * parameters(config), bench.memory_bytes
    if memory is not None and needed > memory:
        reason = f"weights, gradients and moments alone take {gib(needed)} of {gib(memory)}"
        save({"status": "does not fit", "reason": reason})
        return
    try:
        step = OpponentStep(opponent, config, bench.device)
    except ImportError as error:
        save({"status": "absent", "reason": line_of(error)})
        return
    ran, unfinished = False, ""
    while (way := next_way(attempts, bench.smoke, given.micro_batch)) is not None:
        runs, left = not too_large(bench, step, way[0], way[2]), end - time.monotonic()
        if ran and runs and left < max(2 * LEAST_S, 0.1 * given.budget_s):
            unfinished = "the budget ended before all was tried"
            break
        ran |= runs
        seconds = min(max(LEAST_S, left / 8), left)
        attempts.append(attempt(bench, step, *way, 3 if bench.smoke else given.steps, seconds))
        bench.release()
        best = max((a for a in attempts if a["status"] == "ok"), key=lambda a: a["tokens_per_second"], default=None)
        save(row | (best or {"reason": attempts[-1]["reason"]}) | {"attempts": attempts})
    save(verdict(attempts, unfinished))


def verdict(attempts: list[dict], unfinished: str) -> dict:
    """What a row says in the end; unfinished: why not all was tried, "" if it was.

    An opponent does not fit only where all was tried.
    """
    states = [a["status"] for a in attempts]
    if "ok" in states:
        return {"reason": unfinished}
    if "failed" in states:
        return {"status": "failed", "reason": attempts[states.index("failed")]["reason"]}
    return {"status": "not tried" if unfinished else "does not fit", "reason": unfinished or attempts[-1]["reason"]}


# ---------------------------------------------------------------------------------------------------------------- main


def words(row: dict, smoke: bool) -> str:
    if row["status"] != "ok":
        return f"{row['label']}: {row['status']}, {row['reason'][:120]}"
    if smoke:
        return f"{row['label']}: ran (smoke: no performance figure)"
    return (
        f"{row['label']}: {row['tokens_per_second']:,.0f} tokens/s at {way_words(row)}, MFU {mfu_words(row)}, "
        f"{gib(row['peak_memory_bytes'])}; {len(row['attempts'])} ways tried"
    )


@command
def main(arguments: list[str]) -> int:
    made = parser_of(__doc__, "as bench/step.py", 600)
    made.add_argument("--only", default="", help="opponents whose name contains this: "
        f"{', '.join(o.name for o in OPPONENTS)} [all]")  # fmt: skip
    made.add_argument("--steps", type=int, default=50, help="steps timed in each way, at most [50]")
    made.add_argument("--layers", type=int, help="layers of the model [32]")
    made.add_argument("--micro-batch", type=int, help="sequences of 4096 [the best of 8, 4, 2 and 1]")
    for name in ("--case", "--row"):  # of a process of its own: who, and where to
        made.add_argument(name, help=argparse.SUPPRESS)
    given = made.parse_args(arguments)
    if given.case:
        opponent = next(o for o in OPPONENTS if o.name == given.case)
        run = lambda save: measured(bench_on(given.smoke), opponent, given, save)  # noqa: E731
        return be_a_case(given.case, Path(given.row), run)
    wanted = [o for o in OPPONENTS if given.only in o.name]
    if not wanted:
        raise no_such(given.only, (o.name for o in OPPONENTS))
    at_least_one(given, "steps", "layers", "micro_batch")
    bench = bench_on(given.smoke)
    started = time.monotonic()
    path = (given.out or results_folder(bench)) / "step.json"
    result = beside_ours(path, bench, given)
    for i, opponent in enumerate(wanted):
        left = given.budget_s - (time.monotonic() - started)
        seconds = max(left / (len(wanted) - i), min(left, LEAST_BUDGET_S))
        asked = ["bench/opponents.py", "--case", opponent.name, "--budget-s", str(max(1.0, seconds - START_S))]
        asked += passed_on(given, "smoke", "steps", "layers", "micro_batch")
        row = {"status": "not tried", "reason": "no time was left"}
        if seconds > 2 * START_S:
            row = in_its_own_process([*asked, "--row"], seconds)
        result["opponents"].append({"name": opponent.name, "label": opponent.label, "attempts": []} | row)
        write_json(path, result)
        print(words(result["opponents"][-1], given.smoke), flush=True)
    write_result(path, result)
    states = [row["status"] for row in result["opponents"]]
    print(f"opponents: {', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}")
    return 1 if "failed" in states else 0


def beside_ours(path: Path, bench: Bench, given: argparse.Namespace) -> dict:
    """What bench/step.py left in this folder, if on this kind of card at this commit; else a file without its rows."""
    result = new_result("step", bench, given.commit) | {"rows": []}
    described = result["machine"]
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = json.loads(path.read_text(encoding="utf-8"))
        same = all(old["machine"][k] == described[k] for k in ("device", "commit")) and old["smoke"] == bench.smoke
        result = old if same else result
    return result | {"opponents": [], "opponents_command": described["command"]}


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
