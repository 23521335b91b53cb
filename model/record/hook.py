"""--on-checkpoint: a command of the user's after each checkpoint, beside the training. train.py's; Saver calls it.

The command runs in a shell on rank 0's machine once the checkpoint is on the disk under its name, one at a time and in
order. It finds HALNY_CHECKPOINT (the folder), HALNY_STEP and HALNY_RUN_DIR in its environment, which is otherwise that
of the run without torchrun's variables, so that it may start torchrun itself. It says what it has to say into
RUN_DIR/on-checkpoint.log. Whatever becomes of it, the run goes on.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

WAITING = 8  # checkpoints that may wait for commands before them; the next is passed over, and that is said
OF_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


class CheckpointHook:
    """``command`` None: nothing is run."""

    def __init__(self, command: str | None, run_dir: Path, say: Callable[[str], None]):
        self.command, self.run_dir, self.say = command, run_dir.absolute(), say
        self.log = self.run_dir / "on-checkpoint.log"
        self._left = 0  # checkpoints whose command has not ended
        self._ended = threading.Condition()
        self._queue: queue.Queue[Path] = queue.Queue(WAITING)
        if command is not None:
            threading.Thread(target=self._work, daemon=True, name="on-checkpoint").start()

    def saved(self, checkpoint: Path) -> None:
        """Run the command for it when its turn comes; never waits and never raises."""
        if self.command is None:
            return
        try:
            with self._ended:
                self._queue.put_nowait(checkpoint)
                self._left += 1
        except queue.Full:
            self.say(f"--on-checkpoint: not run for {checkpoint.name}, {WAITING} others still wait for their turn")

    def wait(self, seconds: float) -> None:
        """For all commands to end, at most so long; one that has begun goes on by itself, and that is said."""
        with self._ended:
            if not self._ended.wait_for(lambda: self._left == 0, seconds):
                self.say(f"--on-checkpoint: {self._left} not ended {seconds:g} s after the run; not waiting for it")

    def _work(self) -> None:
        while True:
            checkpoint = self._queue.get()
            try:
                if why := self._run(checkpoint):
                    self.say(f"--on-checkpoint: failed for {checkpoint.name}: {why}; see {self.log}")
            except Exception as error:  # a full disk, no process left
                self.say(f"--on-checkpoint: failed for {checkpoint.name}: {error}")
            with self._ended:
                self._left -= 1
                self._ended.notify_all()

    def _run(self, checkpoint: Path) -> str | None:
        """What went wrong, if anything."""
        environment = {k: v for k, v in os.environ.items() if not OF_TORCHRUN.fullmatch(k)}
        environment |= {
            "HALNY_CHECKPOINT": str(checkpoint.absolute()),
            "HALNY_STEP": str(int(checkpoint.name.removeprefix("step-"))),
            "HALNY_RUN_DIR": str(self.run_dir),
        }
        with self.log.open("ab") as log:
            log.write(f"--- {checkpoint.name}\n".encode())
            log.flush()
            # A session of its own: a Ctrl-C meant for the run is not for it, and it may outlive the run.
            code = subprocess.run(
                self.command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            ).returncode  # fmt: skip
        if code == 0:
            return None
        return f"exit code {code}" if code > 0 else f"killed by signal {-code}"
