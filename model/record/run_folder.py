"""The folder of a run: its lock, status.json, metrics.jsonl and curves.png.

What lies in it is described in README's first section; checkpoints/ is checkpoint.py's. One run at a time has the
folder: the lock (flock) goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from halny.model.durable import replacing, write_json
from halny.model.exits import Refused
from halny.model.hf_folder import check_replaceable
from halny.model.record.loggers import Logger
from halny.model.run import checkpoint


class RunFolder:
    """One run's folder. Rank 0 alone writes in it, but for the checkpoints' shards and the export."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.data = path / "data"  # the built-in corpus, where the run is on that
        self.metrics = path / "metrics.jsonl"
        self.loggers: list[Logger] = []  # told what metrics.jsonl is told
        self._lock = None
        self._unwritten: list[str] = []

    def open(self, resume: bool | None) -> None:
        """Create and lock the folder; with resume=False set an earlier run aside first. Refused if that cannot be."""
        if resume is True and not checkpoint.complete(self.checkpoints):
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
            checkpoint.delete_leftovers(self.checkpoints)
        except OSError as error:
            raise Refused(f"--run-dir {self.path} cannot be written: {error.strerror or error}") from None

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
        aside = checkpoint.free_name(real.parent, f"{real.name}.old")
        real.rename(aside)
        with contextlib.suppress(FileExistsError):  # by a run that started this instant, and is then found in use
            real.mkdir()
        with contextlib.suppress(OSError):
            tqdm.write(f"the earlier run is now {aside}")

    def check_config(self, config: dict, free: Collection[str], asked: Collection[str] = ()) -> tuple[list, dict]:
        """Refuse to continue a run that differs in anything its losses depend on: all but the ``free`` settings.

        Returns (config.json's history so far, name -> (old, new) of the ``asked`` settings that have changed now).
        """
        path, checkpoints = self.path / "config.json", checkpoint.complete(self.checkpoints)
        try:
            if (earlier := checkpoint.config_of(self.path)) is None:
                return [], {}
            # which weights those of --init-from are, their fingerprint says, and no path; older runs have none
            named = {"model", "init_from"} if "weights" in earlier else set()
            recipe = {k: v for k, v in config["recipe"].items() if k not in {*free, *named}}
            off = {k: False for k, v in recipe.items() if isinstance(v, bool)}  # what a switch was before there was one
            rows = [(k, "--" + k.replace("_", "-"), (off | earlier["recipe"]).get(k), v) for k, v in recipe.items()]
            sizes = {k: v for k, v in config["model"].items() if k not in ("bos_id", "eos_id")}  # which no loss sees
            rows += [("model", f"model {k}", earlier["model"].get(k), v) for k, v in sizes.items()]
            rows += [("data", "data fingerprint", earlier["data"], config["data"])]
            if named:
                rows += [("weights", "fingerprint of --init-from's weights", earlier["weights"], config["weights"])]
            history = list(earlier.get("history", []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(f"{path} is not readable; --no-resume sets the run aside and starts anew") from None
        if not checkpoints and not (self.metrics.exists() and self.metrics.stat().st_size):
            return [], {}  # nothing was done yet under the earlier settings
        rows = [row for row in rows if str(row[2]) != str(row[3])]
        refused = [f"{label} was {old} and is {new}" for key, label, old, new in rows if key not in asked]
        if refused:
            raise Refused(
                f"--run-dir {self.path} holds another run: {'; '.join(refused)}. Repeat its settings, choose another "
                "--run-dir, set it aside with --no-resume, or see --allow-change"
            )
        return history, {key: (old, new) for key, _, old, new in rows}

    def status(self, state: str, step: int, reason: str = "") -> None:
        """status.json: running, stopped (resumable), finished or failed; the last step done; why."""
        now = {
            "state": state, "step": step, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        try:
            write_json(self.path / "status.json", now)
        except OSError as error:
            if state != "running":  # no reason to stop: a full disk is for the next checkpoint to report
                raise
            tqdm.write(f"{self.path / 'status.json'} cannot be written ({error.strerror})")

    def state(self) -> str:
        """What status.json says now; "" where it says nothing readable."""
        try:
            return json.loads((self.path / "status.json").read_text())["state"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ""

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl, but for those that a kill or a full disk tore apart."""
        lines = []
        for text in self.metrics.read_text(errors="replace").splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
        return lines

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of steps that will be run again."""
        if self.metrics.exists():
            kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step)
            with replacing(self.metrics) as partial:
                partial.write_text(kept)

    def has_evaluation(self, step: int) -> bool:
        return any(line["step"] == step and any(key.startswith("val_") for key in line) for line in self.lines())

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl. On a full disk it is kept, and written with the next that finds room."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        for logger in self.loggers:
            logger.log({k: v for k, v in values.items() if v is not None})
        self._unwritten.append(json.dumps(values) + "\n")
        content = "".join(self._unwritten).encode()
        try:
            with self.metrics.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(content) < len(content):  # as much as there was room for
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(before)
                    raise
            self._unwritten = []
        except OSError as error:
            if len(self._unwritten) == 1:
                tqdm.write(f"{self.metrics} cannot be written ({error.strerror}); its lines wait for room")

    def close_loggers(self) -> None:
        for logger in self.loggers:
            logger.close()

    def plot_curves(self) -> None:
        """curves.png: loss, perplexity and accuracy over the steps, training and held-out; held-out bits per byte."""
        from matplotlib.figure import Figure  # not pyplot: no display, no global state

        lines = self.lines()
        keys = sorted({key for line in lines for key in line if key.startswith("val_")}, key=len)
        names = ["loss", "perplexity", "accuracy"]
        names += ["bits_per_byte"] if any(key.endswith("_bits_per_byte") for key in keys) else []
        figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
            sets = [key for key in keys if key.endswith(f"_{name}")]
            labels = {name: "training", f"val_{name}": "held out"}
            for key in (name, *sets):
                label = labels.get(key, key.removeprefix("val_").removesuffix(f"_{name}"))
                style = "-" if key == name else "o-"
                points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
            axes.set(title=name.replace("_", " "), xlabel="step", yscale="log" if name == "perplexity" else "linear")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        with replacing(self.path / "curves.png") as partial:
            figure.savefig(partial, dpi=120)
