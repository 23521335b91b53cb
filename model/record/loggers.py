"""TensorBoard and Weights & Biases: they get what metrics.jsonl gets, under the same names. For train.py.

metrics.jsonl is the record; these are windows on it, so nothing about them may stop, slow or change a run. Each has a
thread of its own behind a queue: what it raises, and where it hangs, happens there. It is then said once, and the run
goes on without it. Only what can be known before the run starts is refused: a package or a key that is missing.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from halny.model.durable import replacing
from halny.model.exits import Refused

WAITING = 10_000  # lines that a back end may be behind before it is given up
PATIENCE_S = 20.0  # how long the end of a run waits for what is under way; torchrun's patience is 30 s


def check_loggers(tensorboard: bool, wandb: str | None) -> None:
    """Refuse a back end that is not installed, or one that would ask for a key in the middle of the start."""
    for flag, package, wanted in (("--tensorboard", "tensorboard", tensorboard), ("--wandb", "wandb", wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            raise Refused(f'{flag} needs the package {package}: pip install -e ".[log]", or leave the flag out')
    if wandb and os.environ.get("WANDB_MODE", "online") in ("online", "shared") and not has_wandb_key():
        raise Refused("--wandb: no API key on this machine; run wandb login, or set WANDB_MODE=offline and sync later")


def has_wandb_key() -> bool:
    """Whether there is a key where wandb looks for one; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tensorboard(folder: Path, step: int) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(log a line, close) of an event file in ``folder``/tensorboard; what it holds of steps after ``step`` is void."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1, flush_secs=10)

    def log(line: dict) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, line["step"])

    return log, writer.close


def open_wandb(
    folder: Path, project: str, config: dict, say: Callable[[str], None]
) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(log a line, close) of a W&B run that is the same one each time the run in ``folder`` is started again.

    Neither the terminal nor the code is sent; WANDB_MODE and wandb's other variables hold.
    """
    import wandb

    run = wandb.init(
        project=project,
        name=folder.name,
        id=wandb_id(folder / "wandb-id.txt", say),
        resume="allow",
        dir=folder,
        config=json.loads(json.dumps(config, default=str)),
        settings=wandb.Settings(console="off", silent=True, save_code=False),
    )
    run.define_metric("*", step_metric="step")  # not its own count of lines: evaluations have lines of their own
    return run.log, run.finish


def wandb_id(path: Path, say: Callable[[str], None]) -> str:
    """The run's id at W&B, drawn at its first start; another, and a word of it, if the file does not hold it."""
    found = path.read_text(errors="replace").strip() if path.exists() else None
    if found is None or not re.fullmatch(r"[\w-]{1,128}", found):
        if found is not None:
            say(f"--wandb: {path} holds no id ({found[:20]!r}); the run goes on there under a new one")
        found = secrets.token_hex(4)
        with replacing(path, synced=True) as partial:
            partial.write_text(found)
    return found


class Logger:
    """One back end in its thread. ``open`` makes it there; ``complain`` is told, once, if it fails."""

    def __init__(self, flag: str, open: Callable, arguments: tuple, complain: Callable[[str], None]):
        self.flag, self.complain = flag, complain
        self.dead = False
        self._lines: queue.Queue[dict | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, args=(open, arguments), daemon=True, name=flag)
        self._thread.start()

    def log(self, line: dict) -> None:
        """Hand over a line of metrics.jsonl; never waits and never raises."""
        try:
            if not self.dead:
                self._lines.put_nowait(line)
        except queue.Full:
            self._give_up(f"it is {WAITING:,} lines behind")

    def close(self, patience: float = PATIENCE_S) -> None:
        """Let it finish what it has, for so many seconds."""
        if self.dead:
            return
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            patience = 0.0
        self._thread.join(patience)
        if self._thread.is_alive():
            self._give_up(f"it had not finished {patience:g} s after the run")

    def _work(self, open: Callable, arguments: tuple) -> None:
        try:
            log, close = open(*arguments)
            while (line := self._lines.get()) is not None:
                log(line)
            close()
        except BaseException as error:  # some leave by SystemExit
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _give_up(self, why: str) -> None:
        if self.dead:
            return
        self.dead = True
        if key := os.environ.get("WANDB_API_KEY"):
            why = why.replace(key, "[the key]")
        self.complain(f"{self.flag} stopped ({why}); the run goes on without it, metrics.jsonl has everything")


def start_loggers(
    tensorboard: bool, wandb: str | None, folder: Path, step: int, config: dict, complain: Callable[[str], None]
) -> list[Logger]:
    """Those that are wanted, for a run that continues after ``step``."""
    loggers = []
    if tensorboard:
        loggers.append(Logger("--tensorboard", open_tensorboard, (folder, step), complain))
    if wandb:
        loggers.append(Logger("--wandb", open_wandb, (folder, wandb, config, complain), complain))
    return loggers
