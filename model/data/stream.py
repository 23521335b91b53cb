"""The tokens of a split as one stream, read from the files of its shards while a run goes on for weeks.

Nothing is held between two reads, neither a file nor a memory map. Descriptors would run out at some 500 shards, for
numpy's maps hold one each. And where a mapped file is cut short under a run, the kernel kills the process with SIGBUS,
without a word. So a file is opened anew for each read, and what happened to it in between is told apart:

    missing, unreadable, short     waited for, up to PATIENCE_S: a file system that hiccups, a copy that is under way
    touched, moved, copied         read whole, once: with the SHA-256 that it always had it is the same shard
    changed                        a DataError, before anyone trains on it
"""

import bisect
import hashlib
import itertools
import operator
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from halny.model.durable import in_its_words

RESTORE = "restore it as it was, and the same command continues the run"
PATIENCE_S = 45.0  # a failover of a network file system takes half a minute; run/watch.py's deadline is ten


class DataError(ValueError):
    """Input, output or a data folder that cannot be used: one line that names the file and what to do."""


@contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """What the system refuses, as a DataError in its own words: no descriptor left, say, is no damage of the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: {in_its_words(error)}") from error


@dataclass(frozen=True)
class FileArray:
    """Numbers in a file, 1-D: mapped when some are asked for, and only for as long as the answer is used."""

    filename: str
    dtype: np.dtype
    offset: int  # bytes before the first
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key):
        with in_one_line(Path(self.filename)):
            return np.memmap(self.filename, self.dtype, "r", self.offset, (self.length,))[key]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype)


class Shard(NamedTuple):
    tokens: FileArray  # uint16 or uint32
    ends: FileArray | np.ndarray  # int64: where each document ends, from the shard's start; the last is len(tokens)


class TokenStream:
    """The tokens of a split: all shards as one stream by `read` and `gather`, or one by one as `shards`.

    sha256    of each shard's file by its name, as far as it is known: what a file that was touched is compared with
    """

    def __init__(self, shards: list[Shard], sha256: Mapping[str, str]):
        self.shards = shards
        self.n_documents = sum(len(shard.ends) for shard in shards)
        self._sha256, self._said = sha256, False
        self._starts = [0, *itertools.accumulate(len(shard.tokens) for shard in shards)]
        self._identities = [_identity(os.stat(shard.tokens.filename)) for shard in shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length as int64, across shards; IndexError where the stream has no such tokens."""
        return self.gather([operator.index(start)], [operator.index(length)]).astype(np.int64)

    def gather(self, starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """The tokens of several ranges, one range after the other, in the dtype of the shards."""
        for start, length in zip(starts, lengths, strict=True):
            if start < 0 or length < 0 or start + length > len(self):
                raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
        out = np.empty(sum(lengths), dtype=self.shards[0].tokens.dtype if self.shards else np.int64)
        room, done = memoryview(out.view(np.uint8)), 0
        wanted: dict[int, list[tuple[memoryview, int]]] = {}  # shard -> (room for tokens, which is the first of them)
        for start, length in zip(starts, lengths, strict=True):
            end = start + length
            while start < end:
                i = bisect.bisect_right(self._starts, start) - 1
                stop = min(end, self._starts[i + 1])
                n = (stop - start) * out.itemsize
                wanted.setdefault(i, []).append((room[done : done + n], start - self._starts[i]))
                start, done = stop, done + n
        for i, places in wanted.items():  # one open at a time: packed documents may lie in hundreds of shards
            self._read_patiently(i, places)
        return out

    def _read_patiently(self, i: int, places: list[tuple[memoryview, int]]) -> None:
        path, began, pause = self.shards[i].tokens.filename, time.monotonic(), 0.1
        while True:
            try:
                return self._read(i, places)
            except OSError as error:
                words, waited = in_its_words(error), time.monotonic() - began
                if waited >= PATIENCE_S:
                    raise DataError(f"{path}: cannot be read for {waited:.0f} s ({words}); {RESTORE}") from error
                if pause == 0.1:
                    _log(f"{path}: cannot be read ({words}); trying again for {PATIENCE_S:.0f} s")
                time.sleep(min(pause, PATIENCE_S - waited))
                pause = min(2 * pause, 5)

    def _read(self, i: int, places: list[tuple[memoryview, int]]) -> None:
        """Fill each room with bytes of shard i, from a token on. Raises OSError for what may pass, DataError if not."""
        tokens = self.shards[i].tokens
        file = os.open(tokens.filename, os.O_RDONLY)
        try:
            self._check_is_the_same(i, file)
            for room, first in places:
                offset = tokens.offset + first * tokens.dtype.itemsize
                while room:
                    n = os.preadv(file, [room], offset)
                    if n == 0:
                        raise OSError(f"was cut short, it ends before byte {offset}")
                    room, offset = room[n:], offset + n
        finally:
            os.close(file)

    def _check_is_the_same(self, i: int, file: int) -> None:
        before, now = self._identities[i], _identity(os.fstat(file))
        if now == before:
            return
        path = self.shards[i].tokens.filename
        if now.bytes < before.bytes:
            raise OSError(f"was cut short, it has {now.bytes} bytes of {before.bytes}")
        if not self._said:  # who touches one file often touches all
            _log(f"{path}: was touched or replaced; each such file is read whole, once, to see whether it is the same")
            self._said = True
        with open(file, "rb", closefd=False) as whole:
            if hashlib.file_digest(whole, "sha256").hexdigest() != self._sha256.get(path):
                raise DataError(f"{path}: was changed or replaced after it was opened; {RESTORE}")
        self._identities[i] = now


class _Identity(NamedTuple):
    device: int
    inode: int
    bytes: int
    modified_ns: int


def _identity(stat: os.stat_result) -> _Identity:
    return _Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _log(text: str) -> None:
    """A line from any rank: it may be the only one that sees this. Not run/ranks.py's ``say``, which is rank 0's."""
    with suppress(OSError):  # a reader that left, a full disk
        tqdm.write(f"{text} [{socket.gethostname()}]")
        sys.stdout.flush()
