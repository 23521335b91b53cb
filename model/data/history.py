"""What a run has read of its data where they have changed: other weights, a source more, a source less.

The order of samples is a pure function of the seed, the sample number and the run's data history, which is in its
config.json and in every checkpoint: a list of eras, each with the number of its first sample and its sources,

    [{"first_sample": 0, "sources": [{"fingerprint": "1f...", "weight": 9, "path": "data/pl"}, ...]}, ...]

A source's samples are counted through all eras. So it goes on at the sample after the last one read, whatever its
weight; a new source starts at its beginning; and one that an era leaves out keeps its place, should it come back. One
that grew is the same source: its rows are those that it had, and then the new ones (``grown_order``).
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halny.model.data.dataset import DataError
from halny.model.data.order import count_sources, interleave


class Share(NamedTuple):
    """A source of a mixture, by its fingerprint."""

    fingerprint: str
    weight: int
    path: str  # where it was then, for people
    contents: dict | None = None  # by which to know it in a folder that grew: growth.py
    grown_from: str | None = None  # the fingerprint that it had before


class Era(NamedTuple):
    first: int  # number of its first sample
    shares: tuple[Share, ...]  # in the order of their fingerprints

    @property
    def names(self) -> list[str]:
        return [share.fingerprint for share in self.shares]

    @property
    def weights(self) -> list[int]:
        return [share.weight for share in self.shares]

    @property
    def fingerprint(self) -> str:
        """Its only source's, or a hash of fingerprints and weights: all of it that the samples depend on."""
        if len(self.shares) == 1:
            return self.names[0]
        return hashlib.sha256(json.dumps([list(share[:2]) for share in self.shares]).encode()).hexdigest()


History = Sequence[Era]


def to_json(history: History) -> list[dict]:
    return [{"first_sample": era.first, "sources": [share._asdict() for share in era.shares]} for era in history]


def from_json(records: list[dict]) -> History:
    """DataError for what no run wrote."""
    try:
        history = [Era(era["first_sample"], tuple(Share(**share) for share in era["sources"])) for era in records]
        shares, firsts = [share for era in history for share in era.shares], [era.first for era in history]
        numbers = [*(n + 1 for n in firsts), *(share.weight for share in shares)]
        numbers += [share.contents[key] + 1 for share in shares if share.contents for key in ("tokens", "shards")]
        texts = [text for share in shares for text in (share.fingerprint, share.path, share.grown_from or "")]
        sound = firsts == sorted({0, *firsts}) and all(era.shares for era in history)
        sound &= all(isinstance(n, int) and n > 0 for n in numbers) and all(isinstance(text, str) for text in texts)
        if not sound or {share.grown_from for share in shares} - {None, *(share.fingerprint for share in shares)}:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DataError(
            "data_history in the run's config.json is not readable; restore it, or start anew with --no-resume"
        ) from None
    return history


def lineages(history: History) -> dict[str, list[str]]:
    """Of each source's fingerprint, those that it had before it grew, oldest first, and itself."""
    found: dict[str, list[str]] = {}
    for share in (share for era in history for share in era.shares):
        found.setdefault(share.fingerprint, [*found.get(share.grown_from, []), share.fingerprint])
    return found


def gone_on(earlier: History, shares: Sequence[Share], number: int, may_change: bool) -> History:
    """The history of a run that goes on at a sample number with these sources: a new era, unless they are the last's.

    Where the run goes on from before the last change (its newest checkpoint was damaged, or a step is replayed), the
    samples up to that change are those of then. If a source of then is not open now that is a DataError, or with
    ``may_change`` the last era begins at this number.
    """
    now = Era(number, tuple(shares))
    if earlier and earlier[-1].fingerprint == now.fingerprint:
        to_come = [era for era, after in itertools.pairwise(earlier) if after.first > number]
        lines = lineages(earlier)
        opened = {name for last in now.names for name in lines[last]}
        closed = [share.path for era in to_come for share in era.shares if share.fingerprint not in opened]
        if not closed:
            return earlier
        if not may_change:
            raise DataError(
                f"{' '.join(share.path for share in shares)}: samples {number} to {earlier[-1].first - 1} were also of "
                f"{closed[0]}; with --allow-change data name the data of then, or to train those that it is to go on "
                "with"
            )
    return [*(era for era in earlier if era.first < number), now]


def locate(history: History, names: list[str], numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample number its source, as a place in ``names``, and its number within that source.

    The names are fingerprints, of sources that grew the first ones.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    source, within, lines = np.empty_like(numbers), np.empty_like(numbers), lineages(history)
    era_of = np.searchsorted([era.first for era in history], numbers, side="right") - 1
    for i in np.unique(era_of).tolist():
        era, mine = history[i], era_of == i
        which, number = interleave(numbers[mine], era.weights, seed)
        # That is the number within this mixture as if there had been no other; what the others read makes a shift.
        read = samples_read(history, era.first, seed)
        origins = [lines[name][0] for name in era.names]
        shift = np.array([read[name] for name in origins]) - count_sources(era.first, era.weights, seed)
        source[mine] = np.array([names.index(name) for name in origins])[which]
        within[mine] = number + shift[which]
    return source, within


def samples_read(history: History, number: int, seed: int) -> Counter[str]:
    """How many of the samples below a number are of each source, by its fingerprint, the first one if it grew."""
    read, lines = Counter(), lineages(history)
    for era, last in zip(history, [*(era.first for era in history[1:]), number], strict=True):
        if (last := min(last, number)) > era.first:
            counts = count_sources(last, era.weights, seed) - count_sources(era.first, era.weights, seed)
            read.update(dict(zip((lines[name][0] for name in era.names), counts.tolist(), strict=True)))
    return read
