"""How a run ends: the exit codes of each rank, and the exceptions that lead to them. Imports nothing heavy."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # 75, stopped and resumable, is EX_TEMPFAIL of sysexits


class Refused(Exception):
    """Something the user can put right: one line, exit code 2, nothing written."""


class Failed(Exception):
    """The end of a run that has begun, on all ranks alike: one line, exit code 1."""


class DataLost(Failed):
    """Data that cannot be read any more, between two steps: the last one is whole and worth a checkpoint."""


def unknown(kind: str, name: str, known) -> Refused:
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return Refused(f"unknown {kind} {name}: {remedy if close or len(known) < 10 else 'see train.py --help'}")


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Do the work of a command that writes whole or not at all: its exit code, after one line of why it failed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        work()
        return FINISHED
    except Refused as refusal:
        message, code = str(refusal), REFUSED
    except Failed as failure:
        message, code = str(failure), FAILED
    except KeyboardInterrupt:
        message, code = "interrupted; nothing was written", 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{command}: {message}", file=sys.stderr)
    return code
