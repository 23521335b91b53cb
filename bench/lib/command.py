"""What the commands have in common: how they are asked, how they refuse, and how they end."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from halny.model.exits import REFUSED, Refused


def parser_of(doc: str, out: str, budget_s: float | None = None) -> argparse.ArgumentParser:
    """The options of whatever times something; out and budget_s are its own defaults, of which None is no option."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument("--smoke", action="store_true", help="rehearse on the CPU at tiny sizes, without figures")
    made.add_argument("--out", type=Path, metavar="DIR", help=f"folder for the files [{out}]")
    made.add_argument("--commit", help="commit to record where there is no git checkout")
    if budget_s is not None:
        limit = f"{budget_s:g}" if budget_s < 1e6 else "no limit"
        made.add_argument("--budget-s", type=float, default=budget_s, help=f"seconds for everything [{limit}]")
    return made


def at_least_one(given: argparse.Namespace, *names: str) -> None:
    """Refused if one of these was given and is less."""
    for name in names:
        value = getattr(given, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def no_such(only: str, names: Iterable[str]) -> Refused:
    return Refused(f"--only {only!r} is part of no name; there are {'; '.join(names)}")


def passed_on(given: argparse.Namespace, *names: str) -> list[str]:
    """The same options for another process, of those that were given."""
    options = []
    for name in names:
        if value := getattr(given, name):
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return options


def command(main: Callable[..., int]) -> Callable[..., int]:
    """A command's main, which ends with one line and code 2 where it refuses."""

    @functools.wraps(main)
    def refusing(*arguments) -> int:
        try:
            return main(*arguments)
        except Refused as problem:
            print(f"{Path(main.__code__.co_filename).name}: {problem}", file=sys.stderr)
            return REFUSED

    return refusing


def leave(code: int) -> None:
    """End without the interpreter's tear-down, in which threads (gloo's, or of a killed process) may abort or wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
