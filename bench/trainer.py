"""train.py itself on a GPU: a run that is stopped, resumed and profiled, FSDP, --preflight, and the export in use.

    python bench/trainer.py --prepare DIR                  before: the built-in corpus with Mistral-7B-v0.1's tokenizer,
                                                           1.6 MB, on a machine that has mistral-common
    python bench/trainer.py [--data DIR] [--out DIR]       DIR/trainer.json; under a minute on one GPU
    python bench/trainer.py --smoke                        here: tiny, on the CPU, no figures

Without --data the tokens are random, and what needs a tokenizer says that it cannot run here. No benchmark: runs go on
beside each other to save time, and each row says from when to when it ran. What is tried:

**one rank** trains 2 of mistral-1b's 18 layers in bf16 with 8-bit moments, under torchrun: asked to stop by SIGTERM and
resumed by the same command, it must come to the losses of a second run that nobody disturbs, bit for bit. Where the GPU
does not repeat itself to the bit, the steps before the stop show that, and those after it may not differ by more than
``FACTOR`` times as much. In it are --profile, a checkpoint on the way, evaluations, export, curves and sample.txt.

**FSDP** does the same over NCCL, on one rank: that takes fp32 (estimate/choices.py), so two narrower layers and shorter
samples.

**preflight** may say go or no-go; both are answers. **The export** is read by transformers and by
``halny.model.convert.load_hf``, in bf16 both: the error of halny's logits against transformers' in fp32 must be within
twice that of transformers' own, and both continue a text greedily.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import numpy as np
import torch

from bench.lib.clocks import bench_on
from bench.lib.command import command, leave, parser_of
from bench.lib.operations import excess, limits
from bench.lib.process import ROOT, die_with_parent, line_of
from bench.lib.results import new_result, repeatable, results_folder, write_json, write_result
from halny.model.data.writer import write_dataset
from halny.model.exits import FAILED, FINISHED, STOPPED, Refused
from halny.model.hf_folder import hf_config
from halny.model.mistral import PRESETS, MistralConfig
from halny.model.record.run_folder import RunFolder

FACTOR = 10  # of the difference between two runs before the stop, on a GPU that does not repeat itself
SAID_LINES = 80  # of a process, kept in the file
ABSENT = "cannot run here"

# ---------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class TrainerCase:
    """A run of train.py: stopped once ``stop_at`` steps are done, then resumed up to the last."""

    name: str
    model: MistralConfig
    arguments: tuple[str, ...]
    steps: int
    stop_at: int
    save_every: int
    profiled: str
    torchrun: tuple[bool, bool]  # or a plain process: the run that is stopped, and the one that is not


def cases(smoke: bool, with_data: bool) -> list[TrainerCase]:
    common = ("--lr", "1e-3", "--warmup-steps", "2", "--deadline", "60", "--keep", "1")
    if smoke:
        model = PRESETS["tiny" if with_data else "test"]
        sizes = (*common, "--seq-len", "64", "--batch-tokens", "256", "--micro-batch", "2")
        whole, sharded = (*sizes, "--dtype", "bf16", "--moments", "8bit"), (*sizes, "--dtype", "fp32")
        steps, save_every = (12, 8) if with_data else (40, 20)  # a tiny model's are slow enough to be stopped
        return [
            TrainerCase("one rank", model, whole, steps, 5, save_every, "3-4", (True, False)),
            TrainerCase("FSDP", model, sharded, steps, 5, save_every, "3-4", (False, False)),
        ]
    wide, sizes = PRESETS["mistral-1b"], (*common, "--seq-len", "4096", "--batch-tokens", "16384", "--micro-batch", "2")
    short = (*common, "--seq-len", "1024", "--batch-tokens", "4096", "--micro-batch", "2", "--dtype", "fp32")
    whole = (*sizes, "--dtype", "bf16", "--moments", "8bit", "--eval-every", "16")
    # small, since each run writes several checkpoints: on an H200's machine 3.4 GB took 10 s beside other work
    narrow = replace(wide, dim=1024, n_heads=8, n_kv_heads=2, hidden_dim=3584, n_layers=2)
    return [
        TrainerCase("one rank", replace(wide, n_layers=2), whole, 32, 8, 20, "4-5", (True, False)),
        TrainerCase("FSDP", narrow, (*short, "--eval-every", "0"), 16, 6, 12, "4-5", (True, True)),
    ]


def random_data(folder: Path, vocab_size: int) -> Path:
    """A data folder of random ids; every second one is the one before it, so that there is something to learn."""
    draw = np.random.default_rng(0)
    documents = [np.repeat(draw.integers(3, vocab_size, 4096), 2) for _ in range(65)]
    write_dataset(documents[:64], folder, vocab_size=vocab_size, val_documents=documents[64:])
    return folder


# ----------------------------------------------------------------------------------------------------------- processes


@dataclass
class Stage:
    """What every part is told, and the file that each row goes to."""

    smoke: bool
    scratch: Path
    data: Path
    path: Path
    result: dict
    end: float  # time.monotonic() by which all is to be done
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    processes: list[Process] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def now(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def row(self, name: str, status: str, reason: str = "", from_s: float | None = None, **more) -> dict:
        """Add a row, on the disk at once."""
        from_s = self.now if from_s is None else from_s
        made = {"name": name, "status": status, "reason": reason, "seconds": round(self.now - from_s, 1)}
        made |= {"from_s": from_s, "to_s": self.now, "command": "", "figures": {}, "said": []} | more
        with self.lock:
            self.result["rows"].append(made)
            write_json(self.path, self.result)
            print(f"{name:34}{status:16}{made['seconds']:6.1f} s   {reason[:100]}", flush=True)
        return made

    @contextlib.contextmanager
    def tried(self, name: str):
        """A row for what is done inside, which fills in its dictionary; one that failed if that raises."""
        more, from_s = {}, self.now
        try:
            yield more
        except Exception as error:
            more = {key: value for key, value in more.items() if key not in ("status", "reason")}
            self.row(name, "failed", line_of(error), from_s, **more)
        else:
            self.row(name, more.pop("status", "ok"), more.pop("reason", ""), from_s, **more)


class Process:
    """A command, its output in a file. It stays in this script's group, so that whoever ends that ends all.

    Ranks under torchrun die with it (train.py's ``begin``).
    """

    def __init__(self, stage: Stage, name: str, command: list[str], **options):
        self.stage, self.log = stage, stage.scratch / f"{name}.log"
        self.words = " ".join([Path(command[0]).name, *map(repeatable, command[1:])])
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1" if stage.smoke else "4"}
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "60"  # a save on a slow disk takes longer than torchrun's 30
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # for two kernels, not 16 processes in each of four runs
        environment.pop("TRITON_INTERPRET", None)
        if stage.smoke:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, **options)
        stage.processes.append(self)

    def wait_until(self, happened) -> bool:
        """Whether it happened before the process or the time was over."""
        while self.process.poll() is None and self.stage.left > 0:
            if happened():
                return True
            time.sleep(0.05)
        return happened()

    def wait(self) -> int | None:
        """Its exit code; None if it had to be ended."""
        try:
            return self.process.wait(max(0.1, self.stage.left))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> list[str]:
        """What it printed: the beginning and the end where that is long."""
        text = self.log.read_text(errors="replace")
        for folder in (self.stage.scratch, self.stage.data.parent, sys.prefix):  # of this machine
            text = text.replace(f"{folder}/", "")
        lines = [line[:300] for line in text.splitlines() if line.strip()]
        if len(lines) > SAID_LINES:
            lines = [*lines[: SAID_LINES // 2], f"({len(lines) - SAID_LINES} lines)", *lines[-SAID_LINES // 2 :]]
        return lines

    def expect(self, code: int | None, *expected: int) -> None:
        """RuntimeError with its last words unless the exit code is one of these."""
        if code not in expected:
            how = "was not done in time" if code is None else f"ended with {code}"
            lines = self.said()
            blamed = [line for line in lines if "train.py:" in line or re.search(r"Error\b", line)]
            raise RuntimeError(f"{how}: {' | '.join((blamed or lines)[-2:])}")


def train_command(stage: Stage, case: TrainerCase, run_dir: Path, *more: str, torchrun: bool = False) -> list[str]:
    """train.py under torchrun as a user starts it, or alone, which is a world of one as well."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if torchrun else []
    model = stage.scratch / f"model-{case.name.replace(' ', '-')}"
    settings = ["--model", str(model), "--data", str(stage.data), "--run-dir", str(run_dir), "--steps", str(case.steps)]
    settings += ["--save-every", str(case.save_every)]
    return [sys.executable, *launcher, "train.py", "mistral-1b", *settings, *case.arguments, *more]


# ------------------------------------------------------------------------------------------------- what a run has left


def lines_of_steps(run_dir: Path) -> list[dict]:
    """metrics.jsonl's lines of training steps; of one that is being written, those that are whole."""
    return [line for line in RunFolder(run_dir).lines() if "loss" in line]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def figures_of_run(run_dir: Path, said: list[str], after: int = 0) -> dict:
    """Losses, memory, and how long the training waited for each checkpoint."""
    lines = [line for line in lines_of_steps(run_dir) if line["step"] > after]
    stalls = [int(ms) for text in said for ms in re.findall(r"the training waited (\d+) ms", text)]
    figures = {"steps": len(lines), "checkpoint_stall_ms": stalls}
    if lines:
        figures |= {
            "losses": [line["loss"] for line in lines],
            "peak_memory_gib": lines[-1]["peak_memory_gib"],
            "data_wait_s": max(line["data_wait_s"] for line in lines),
            "alloc_retries": lines[-1].get("alloc_retries", 0),
        }
    return figures


def compared(ours: list[dict], theirs: list[dict], stopped: int) -> tuple[str, str, dict]:
    """(status, reason, figures): losses and gradient norms of a resumed run beside those of an undisturbed one."""
    after = [(a, b) for a, b in zip(ours, theirs, strict=False) if a["step"] > stopped]
    before = [(a, b) for a, b in zip(ours, theirs, strict=False) if a["step"] <= stopped]
    if not before or not after or any(a["step"] != b["step"] for a, b in before + after):
        return "failed", f"there are {len(before)} steps before the stop and {len(after)} after it to compare", {}

    def largest(pairs, name: str) -> float:
        return max(abs(a[name] - b[name]) for a, b in pairs)

    figures = {
        f"{name}_{when}": largest(pairs, name)
        for name in ("loss", "grad_norm")
        for when, pairs in (("before", before), ("after", after))
    } | {"steps_after": len(after)}
    if not figures["loss_before"] and not figures["grad_norm_before"]:
        if not figures["loss_after"] and not figures["grad_norm_after"]:
            return "ok", f"bit for bit, the {len(after)} steps after the stop like those before it", figures
        return "failed", f"equal to the bit before the stop, but by {figures['loss_after']:.3g} apart after it", figures
    before, after = figures["loss_before"], figures["loss_after"]
    words = f"two runs differ in loss by {before:.3g} before the stop, {after:.3g} after"
    fine = after <= max(FACTOR * before, 0.01)
    return ("ok" if fine else "failed"), f"not to the bit, without the stop either: {words}", figures


# ---------------------------------------------------------------------------------------------------- stop and resume


def stop_and_resume(stage: Stage, case: TrainerCase) -> Path | None:
    """Rows of one case; its run folder if it came to its end."""
    run_dir, alone_dir = (stage.scratch / f"{case.name.replace(' ', '-')}{end}" for end in ("", "-undisturbed"))
    profile = ("--profile", case.profiled)
    command, stopped = train_command(stage, case, run_dir, *profile, torchrun=case.torchrun[0]), 0
    alone = Process(stage, alone_dir.name, train_command(stage, case, alone_dir, torchrun=case.torchrun[1]))
    try:
        with stage.tried(f"{case.name}: stopped by SIGTERM") as row:
            first = Process(stage, f"{run_dir.name}-1", command)
            row["command"] = first.words
            first.wait_until(lambda: len(lines_of_steps(run_dir)) >= case.stop_at)
            first.process.terminate()
            code = first.wait()
            row["said"] = first.said()
            row["figures"] = figures_of_run(run_dir, row["said"]) | {"exit_code": code}
            if RunFolder(run_dir).state() != "stopped" or not (case.torchrun[0] or code == STOPPED):
                first.expect(code, -1)  # whatever it was
            stopped = max(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*"))
            row["reason"] = f"saved after step {stopped} of {case.steps}"
        if not stopped:
            with stage.tried(f"{case.name}: undisturbed") as row:
                alone.wait_until(lambda: len(lines_of_steps(alone_dir)) >= case.steps)
                row["command"], row["said"] = alone.words, alone.said()
                row["figures"] = figures_of_run(alone_dir, row["said"])
                if row["figures"]["steps"] < case.steps:
                    alone.expect(alone.process.poll(), -1)
            return None
        with stage.tried(f"{case.name}: profile") as row:
            row["figures"] = profile_figures(run_dir, on_gpu=not stage.smoke)
            row["said"] = row["figures"].pop("tables")
        with stage.tried(f"{case.name}: resumed") as row:
            second = Process(stage, f"{run_dir.name}-2", command)
            row["command"] = second.words
            code = second.wait()
            row["said"] = second.said()
            row["figures"] = figures_of_run(run_dir, row["said"], stopped)
            second.expect(code, FINISHED)
            if not any(text.startswith(f"resuming after step {stopped} ") for text in row["said"]):
                raise RuntimeError(f"it did not resume after step {stopped}")
            row["figures"]["summary"] = read(run_dir / "summary.json")
            wanted = ("export", "curves.png", "sample.txt", "summary.json")
            row["reason"] = f"finished; left {', '.join(name for name in wanted if (run_dir / name).exists())}"
        with stage.tried(f"{case.name}: resumed = undisturbed") as row:
            alone.wait_until(lambda: len(lines_of_steps(alone_dir)) >= case.steps)
            row["command"], row["said"] = alone.words, alone.said()[-12:]
            steps = lines_of_steps(run_dir), lines_of_steps(alone_dir)
            row["status"], row["reason"], row["figures"] = compared(*steps, stopped)
            if len(steps[1]) < case.steps:
                alone.expect(alone.process.poll(), -1)
    finally:
        alone.kill()  # its checkpoint and export would show nothing new
    with stage.tried(f"{case.name}: sample.txt") as row:
        text = (run_dir / "sample.txt").read_text() if (run_dir / "sample.txt").exists() else None
        if not (stage.data / "tokenizer").is_dir():
            row |= {"status": ABSENT, "reason": "the data has no tokenizer: name a folder with --data"}
        elif not text:
            raise RuntimeError("train.py wrote none")
        else:
            row["said"] = [text]
    return run_dir if (run_dir / "export" / "config.json").exists() else None


def profile_figures(run_dir: Path, on_gpu: bool) -> dict:
    """What --profile has left. RuntimeError if a file of it is missing or empty."""
    found = {path.name: path.stat().st_size for path in sorted((run_dir / "traces").glob("steps-*"))}
    for end in ("-rank-0.json.gz", "-rank-0.txt", *(["-rank-0.memory.pickle"] if on_gpu else [])):
        if not any(name.endswith(end) and size for name, size in found.items()):
            raise RuntimeError(f"--profile left {', '.join(found) or 'nothing'}, and no steps-FIRST-LAST{end}")
    tables = next((run_dir / "traces").glob("steps-*-rank-0.txt")).read_text().splitlines()
    products = [float(at[1]) for line in tables if (at := re.match(r"  matmul +([\d.]+)", line))]
    if on_gpu and not any(products):
        raise RuntimeError("the trace shows no matrix product on the GPU")
    return {"bytes": found, "tables": [line.replace(f"{run_dir}/", "") for line in tables]}


# ------------------------------------------------------------------------------------------------------- the other two


def preflight(stage: Stage, case: TrainerCase) -> None:
    with stage.tried("preflight") as row:
        process = Process(stage, "preflight", train_command(stage, case, stage.scratch / "preflight", "--preflight"))
        row["command"], code = process.words, process.wait()
        row["said"], row["figures"] = process.said(), {"exit_code": code}
        process.expect(code, FINISHED, FAILED)
        verdicts = [line for line in row["said"] if line in ("go", "no-go") or line.startswith("  - ")]
        if not verdicts or (verdicts[0] == "go") != (code == FINISHED):
            raise RuntimeError(f"exit code {code} and no verdict to it: {' | '.join(row['said'][-3:])}")
        row["reason"] = " ".join(verdicts)


def use_export(stage: Stage, waiting: Process | None, export: Path | None) -> None:
    """Two rows, by a process that has done its imports beside the runs and waits for the folder's name."""
    name = "export in transformers"
    if waiting is None or export is None:
        if waiting is not None:
            waiting.kill()
        why = "transformers is not installed" if waiting is None else "there is no export"
        stage.row(name, ABSENT, why)
        return
    left = stage.scratch / "export.json"
    with stage.tried(name) as row:
        with contextlib.suppress(BrokenPipeError):
            waiting.process.stdin.write(f"{export}\n{left}\n".encode())
            waiting.process.stdin.close()
        waiting.expect(waiting.wait(), 0)
        found = read(left)
        text = found.pop("generation")
        row["figures"] = found
        row["reason"] = f"error of the logits {found['error']:.3g}, transformers' own {found['torch_error']:.3g}"
        if not found["error"] <= found["bound"]:
            raise RuntimeError(f"{row.pop('reason')}: beyond the bound of {found['bound']:.3g}")
        if not found["reference_only"] and not found["launches"]:
            raise RuntimeError("no kernel of ours was launched")
        stage.row("generation", text.pop("status"), text.pop("reason"), said=text.pop("said"), figures=text)


def be_export(smoke: bool) -> int:
    """The process of ``use_export``: told on its stdin the export and where to put what it finds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halny.kernels import dispatch
    from halny.model.convert import load_hf

    die_with_parent()
    export, left = (Path(sys.stdin.readline().strip()) for _ in range(2))
    if not export.name:
        return 1
    device = torch.device("cpu" if smoke else "cuda")
    generator = torch.Generator().manual_seed(0)
    vocab_size = read(export / "config.json")["vocab_size"]
    tokens = torch.randint(3, vocab_size, (2, 64 if smoke else 512), generator=generator).to(device)
    logits = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            theirs = AutoModelForCausalLM.from_pretrained(export, dtype=dtype).to(device).eval()
            logits[dtype] = theirs(tokens).logits
        ours = load_hf(export, torch.bfloat16).to(device).eval()
        dispatch.launches.clear()
        out = ours(tokens)
        found = excess(out, logits[torch.float32], *limits(logits[torch.bfloat16], logits[torch.float32]))
        found |= {"launches": dict(dispatch.launches), "reference_only": smoke, "n_tokens": tokens.numel()}
        found["loss_fp32"] = random_loss(logits[torch.float32], tokens)
        found["loss_ours"] = random_loss(out, tokens)
        found["same_most_likely"] = (out.argmax(-1) == logits[torch.float32].argmax(-1)).float().mean().item()

        prompt, text = tokens[:1, :8], {"status": "ok", "said": [], "n_new": 24}
        tokenizer = None
        if (export / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(export)
            prompt = tokenizer("The value of the", return_tensors="pt").input_ids.to(device)
        mask = torch.ones_like(prompt)
        new = theirs.generate(prompt, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        mine = ours.generate(prompt, 24)
    same = (new == mine)[0, prompt.shape[1] :].tolist() if new.shape == mine.shape else []
    text["first_difference"] = same.index(False) if False in same else len(same)
    text["reason"] = f"the first {text['first_difference']} of 24 greedy tokens are transformers' own"
    if tokenizer is None:
        text["reason"] += "; ids only, the export has no tokenizer"
    else:
        text["said"] = [tokenizer.decode(ids[0]) for ids in (mine, new)]
    if mine.shape != (1, prompt.shape[1] + 24):
        text |= {"status": "failed", "reason": f"generate made {tuple(mine.shape)}"}
    write_json(left, found | {"generation": text})
    return 0


def random_loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


# ---------------------------------------------------------------------------------------------------------------- main


def measured(stage: Stage, with_data: bool) -> None:
    """Both cases beside each other; then preflight, with the GPU to itself but for the look at the export."""
    wanted = cases(stage.smoke, with_data)
    for case in wanted:
        folder = stage.scratch / f"model-{case.name.replace(' ', '-')}"
        folder.mkdir()
        write_json(folder / "config.json", hf_config(case.model, torch.bfloat16))
    runs: dict[str, Path | None] = {}
    waiting = None

    def go(case: TrainerCase) -> None:
        with contextlib.suppress(Exception):  # said in a row
            runs[case.name] = stop_and_resume(stage, case)

    threads = [threading.Thread(target=go, args=(case,), name=case.name, daemon=True) for case in wanted]
    try:
        for thread in threads:
            thread.start()
        if find_spec("transformers"):
            command = [sys.executable, "bench/trainer.py", "--use-export", *(["--smoke"] if stage.smoke else [])]
            waiting = Process(stage, "export", command, stdin=subprocess.PIPE)
        threads[0].join()
        done = runs.get(wanted[0].name)
        other = threading.Thread(target=preflight, args=(stage, wanted[0]), daemon=True)
        other.start()
        use_export(stage, waiting, done and done / "export")
        other.join()
        threads[1].join()
    finally:
        for process in stage.processes:
            process.kill()


def parser() -> argparse.ArgumentParser:
    made = parser_of(__doc__, "bench/results/DATE-DEVICE; else runs/bench", 120)
    made.add_argument("--data", type=Path, help="data folder with Mistral-7B-v0.1's tokenizer [random tokens]")
    made.add_argument("--prepare", type=Path, metavar="DIR", help="make that folder of the built-in corpus, and end")
    made.add_argument("--use-export", action="store_true", help=argparse.SUPPRESS)  # of a process of its own
    return made


@command
def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    if given.use_export:
        return be_export(given.smoke)
    if given.prepare:
        from halny.model.data.dataset import DataError
        from halny.model.prepare_data import prepare_builtin

        try:
            prepare_builtin(given.prepare)
        except DataError as error:
            raise Refused(str(error)) from None
        return 0
    if given.data is not None and not (given.data / "tokenizer").is_dir():
        raise Refused(f"--data {given.data} is no data folder with a tokenizer; make one with --prepare")
    bench = bench_on(given.smoke)
    began = time.monotonic()
    out = given.out or results_folder(bench)
    result = new_result("trainer", bench, given.commit) | {"rows": []}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        vocab_size = cases(given.smoke, given.data is not None)[0].model.vocab_size
        data = given.data.resolve() if given.data else random_data(folder / "data", vocab_size)
        stage = Stage(given.smoke, folder, data, out / "trainer.json", result, began + given.budget_s, began)
        try:
            measured(stage, given.data is not None)
        except KeyboardInterrupt:  # the rows so far are in the file
            interrupted = True
        # before the folder goes: to delete these checkpoints took an H200's machine more than 20 s
        write_result(out / "trainer.json", result)
        states = [row["status"] for row in result["rows"]]
        bad = [row["name"] for row in result["rows"] if row["status"] == "failed"]
        words = f"trainer: {states.count('ok')} of {len(states)} ok, in {stage.now:.0f} s"
        print(words + "".join(f"; {name} failed" for name in bad), flush=True)
    return 130 if interrupted else 1 if bad else 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
