"""What the commands on data share: one line for a refusal, exit codes, and an end that leaves nothing half-done.

Exit codes: 0 done; 1 a worker died; 2 refused; 130 interrupted; 143 terminated.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from halny.model.data.dataset import DataError
from halny.model.data.workers import WorkerDied

SMALL = 4 << 20  # bytes of input that are not worth the start of a worker


def n_workers(asked: int | None, size: int) -> int:
    """How many processes read an input of `size` bytes, 0 for this one; DataError for a bad --workers."""
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise DataError(f"--workers {asked}: must be a positive number of processes, for example 8")
    if asked is None:
        return 0 if size < SMALL else len(os.sched_getaffinity(0))
    return asked


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and not the whole usage; prints descriptions as they are written."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str):
        self.exit(2, f"{self.prog.split('.')[-1]}: {message}; see --help\n")


class _Terminated(KeyboardInterrupt):
    pass


def _terminate(*_) -> None:
    raise _Terminated


def exit_code(name: str, work: Callable[[], int]) -> int:
    """Runs `work` and gives its exit code, or says in one line why it ended early."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return work()
    except DataError as error:
        message, code = [str(error), *_notes(error)], 2
    except WorkerDied as error:
        message, code = [str(error), *(_notes(error) or ["nothing was written"])], 1
    except BrokenPipeError:  # --check DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        what, code = ("terminated", 143) if isinstance(error, _Terminated) else ("interrupted", 130)
        message = [what, *(_notes(error) or ["nothing was written"])]
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{name}: " + " ".join("; ".join(message).splitlines()), file=sys.stderr)
    return code


def _notes(error: BaseException) -> list[str]:
    """What was kept, from model/data/resume.py."""
    return getattr(error, "__notes__", [])
