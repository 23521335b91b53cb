"""How a run ends: the exit codes of each rank, and the exceptions that lead to them. Imports nothing heavy."""

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # 75, stopped and resumable, is EX_TEMPFAIL of sysexits


class Refused(Exception):
    """Something the user can put right: one line, exit code 2, nothing written."""


class Failed(Exception):
    """The end of a run that has begun, on all ranks alike: one line, exit code 1."""
