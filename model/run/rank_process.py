"""One rank's process from its start to its exit code: signals, refusals that the user hears, last words.

torchrun ends all ranks as soon as one exits, and says 0 or 1 itself, so whoever has something to say says it before any
exits, and status.json holds it. Imports no torch: --help and typing errors are answered before the seconds that takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from halny.model.durable import in_its_words
from halny.model.exits import FAILED, REFUSED, Failed, Refused
from halny.model.run.host import keep_caches_here
from halny.model.run.recipe import Recipe, command_line

if TYPE_CHECKING:
    import torch

    from halny.model.run.resolve import RunSpec
    from halny.model.run.watch import Watch


class RankProcess:
    """What a signal handler and the last words of a failing run need of it; made once, and handed around.

    began         time.monotonic() of the start
    stop_signal   the name of a signal that asked this rank to stop; the loop looks at it between steps
    watch, spec   of the run that has begun
    folder        of the run, whose status.json is told how it ended; None: it is not to be touched
    """

    def __init__(self):
        self.began = time.monotonic()
        self.stop_signal: str | None = None
        self.watch: Watch | None = None
        self.spec: RunSpec | None = None
        self.folder = None

    def begin(self, arguments: list[str]) -> Recipe:
        """What need not wait for torch: streams, signals, dying with torchrun, and the command line."""
        self.began = time.monotonic()
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # closed by whoever started us
                setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
            getattr(sys, stream).reconfigure(errors="replace")  # a terminal that cannot show a letter shows a "?"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._ask_to_stop)
        if mmap.PAGESIZE == 4096:  # on the CPU, huge pages of 2 MiB for the logits; of pages of 64 kB they are 512
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # on a GPU, less fragmentation
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing: torch 2.13 announces its profiler otherwise
        keep_caches_here()
        if os.environ.get("RANK", "0") != "0" and not sys.warnoptions:
            warnings.simplefilter("ignore")  # rank 0 has the same ones, and says them once
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # A killed torchrun (kill -9) cannot end its ranks; the kernel does it, so that they hold no GPUs and locks.
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            return command_line(arguments)
        except Refused as refusal:
            refuse(refusal, alone=True)

    def _ask_to_stop(self, number: int, _frame) -> None:
        self.stop_signal = signal.Signals(number).name
        if self.watch is not None:
            self.watch.stop_asked_at = time.monotonic()

    def stopping(self) -> bool:
        return self.stop_signal is not None

    def run_begins(self, spec: RunSpec, watch: Watch, folder=None) -> None:
        """From here on a signal is told to the watch, and status.json in the folder how the run ended."""
        self.spec, self.watch, self.folder = spec, watch, folder

    def run_to_exit_code(self, main: Callable[[Recipe, RankProcess], int], recipe: Recipe) -> int:
        """``main`` with its failures turned into one line, a status and an exit code."""
        import torch.distributed as dist

        try:
            code = main(recipe, self)
            if dist.is_initialized():
                dist.barrier()  # torchrun ends everyone when the first rank exits with an error: let all get here
            return code
        except Refused as refusal:
            if self.watch is not None and self.watch.writes_heartbeat:  # status.json says by now that the run goes on
                self.write_failure(str(refusal))
            refuse(refusal)
        except BaseException as error:
            reason, speaks, foreseen = self.last_words(error)
            if speaks and foreseen:
                print(f"train.py: stopped: {reason}", file=sys.stderr)
            elif speaks:
                print(f"train.py: {reason.partition(': ')[0]} failed", file=sys.stderr)
                traceback.print_exc()
        finally:
            if self.folder is not None:
                self.folder.close_loggers()
        if speaks:
            self.write_failure(reason)
        return FAILED

    def last_words(self, error: BaseException) -> tuple[str, bool, bool]:
        """Why the run failed; whether this rank is to say so; whether a sentence says it all, without a traceback."""
        import torch
        import torch.distributed as dist

        from halny.model.data.dataset import DataError

        rank, host = int(os.environ.get("RANK", "0")), socket.gethostname()
        here = f"rank {rank} on {host}: "
        if isinstance(error, Failed | DataError):
            return (
                str(error),
                rank == 0 or isinstance(error, DataError),
                True,
            )  # this rank alone may have missed a shard
        if self.watch is not None and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            # another rank died, and the reason is there: say which one it was
            return *self.watch.verdict("lost the connection to another rank"), True
        if self.spec is not None and isinstance(error, torch.OutOfMemoryError):
            return here + explain_shortage(error, self.spec), True, True
        if self.watch is not None and isinstance(error, OSError) and error.strerror:  # a full disk, a folder gone
            return f"{here}{error.filename or f'in {self.watch.phase}'}: {in_its_words(error)}", True, True
        return f"{here}{type(error).__name__}: {error}", True, False

    def write_failure(self, reason: str) -> None:
        """Tell status.json, unless another rank has already said why; that was first and is the one to keep."""
        if self.folder is not None and self.folder.state() != "failed":
            with contextlib.suppress(OSError):  # a full disk may be what ended the run
                self.folder.status("failed", self.watch.done, reason)


def refuse(message: object, alone: bool = False) -> typing.NoReturn:
    """One line from rank 0, and exit code 2 on every rank.

    torchrun ends all ranks as soon as the first one exits, so the others wait until rank 0 has been heard. ``alone``:
    before the ranks have met. Rank 0 may have nothing to refuse then, as where one node lacks the recipe file, so that
    the first rank of each host speaks too, if it was not ended in the meantime.
    """
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(REFUSED))
        time.sleep(10)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    if rank == "0" or (alone and local_rank == "0"):
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(REFUSED)


def explain_shortage(error: torch.OutOfMemoryError, spec: RunSpec) -> str:
    """What to change, and by how much, for a run that a GPU has no memory for (estimate/out_of_memory.py)."""
    import torch

    from halny.model.estimate import out_of_memory

    free, total, reserved = None, None, None
    if torch.cuda.is_available():
        (free, total), reserved = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    return out_of_memory.explain(error, spec.work, spec.layout, free=free, total=total, reserved=reserved)


def exit_at_once(code: int) -> typing.NoReturn:
    """Not sys.exit: gloo's threads now and then abort the interpreter's tear-down, and spoil the code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
