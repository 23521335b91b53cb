"""What a preparation has finished, saved beside its shards so that a killed one goes on and does not start anew.

The bytes are those of an undisturbed preparation, whatever the moment it was killed at. Shards, the ends of documents
and --dedup's digests are only ever appended to, and `unfinished.json` says how much of each belongs to which finished
input files: it is replaced in one step, after all it speaks of is on the disk. Going on, what is beyond it is cut off.
Only whole input files count as finished, since then the rest is a pure function of the files that follow.

`unfinished.json` goes away before the folder takes its final name, and a folder that has it is no data folder yet.
"""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halny.model.data.dataset import DataError
from halny.model.data.tally import Tally
from halny.model.data.writer import UNFINISHED, Writer
from halny.model.durable import sync, write_json

INPUTS, DIGESTS = "inputs.json", "digests.bin"
SHARE = 20  # saving takes no more than one part in so many of the time
WORTH = 60  # seconds of work that a refusal of the input leaves for when it is mended; less, and nothing is left
AT_ONCE = 1 << 20  # digests that are read together


class InputFile(NamedTuple):
    """A file that is the same when all of this is."""

    name: str
    size: int
    mtime_ns: int


def input_file(path: Path) -> InputFile:
    stat = path.stat()
    return InputFile(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


class Journal:
    """The finished part of a preparation in `folder`. Entered, it brings writer and tally to where they were.

    made_of  everything beside the input files that the bytes depend on
    done     how many of the input files were finished and saved
    """

    def __init__(self, folder: Path, made_of: dict, files: list[InputFile], writer: Writer, tally: Tally):
        self.folder, self.made_of, self.files, self.writer, self.tally = folder, made_of, files, writer, tally
        self.done, self.n_digests, self.next_save, self.digests = 0, 0, 0.0, None
        self.began, self.restored = time.monotonic(), False

    def __enter__(self) -> "Journal":
        if (self.folder / UNFINISHED).exists():
            self._restore()
        write_json(self.folder / INPUTS, {"made_of": self.made_of, "files": self.files})
        if self.tally.seen is not None:
            self.digests = open(self.folder / DIGESTS, "ab")
            self.digests.truncate(16 * self.n_digests)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_) -> None:
        if self.digests is not None:
            with suppress(OSError):  # of a full disk, which was said before
                self.digests.close()
        if isinstance(error, DataError) and not self.restored and time.monotonic() < self.began + WORTH:
            self.remove()
        if error is not None and (self.folder / UNFINISHED).exists():
            kept = f"{self.done:,} of {len(self.files):,} input files are done and kept in {self.folder}"
            error.add_note(f"{kept}; the same command goes on from there")

    def goes_on(self) -> str | None:
        """What to say where an earlier process did a part."""
        done = f"{self.done:,} of {len(self.files):,} input files"
        return f"going on after {done}, done before" if self.done else None

    def bytes_done(self) -> int:
        return sum(file.size for file in self.files[: self.done])

    def add(self, digests: np.ndarray | None, done: int) -> None:
        """A block is written: its documents' digests for --dedup, and how many files are done. Saves, if worth it."""
        began = time.monotonic()
        if self.digests is not None:
            self.digests.write(digests.tobytes())
            self.n_digests += len(digests)
        if done == self.done or not self.writer.total("documents") or began < self.next_save:
            return
        self.writer.sync()
        if self.digests is not None:
            self.digests.flush()
            os.fsync(self.digests.fileno())
        sync(self.folder)
        state = {"done": done, "writer": self.writer.state(), "tally": self.tally.state(), "digests": self.n_digests}
        write_json(self.folder / UNFINISHED, state)
        self.done, now = done, time.monotonic()
        self.next_save = now + SHARE * (now - began)

    def remove(self) -> None:
        """What follows cannot go on from here."""
        for name in (UNFINISHED, INPUTS, DIGESTS):
            (self.folder / name).unlink(missing_ok=True)

    def _restore(self) -> None:
        try:
            inputs, state = (json.loads((self.folder / name).read_bytes()) for name in (INPUTS, UNFINISHED))
            self._check_same(inputs["made_of"], [InputFile(*file) for file in inputs["files"][: state["done"]]])
            names = {UNFINISHED, INPUTS, DIGESTS, *self.writer.restore(state["writer"])}
            self.tally.restore(state["tally"])
            if self.tally.seen is not None:
                self._read_digests(state["digests"])
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            if isinstance(error, DataError):
                raise
            remedy = "remove it to start anew"
            raise DataError(f"{self.folder}: left by a killed preparation, and damaged ({error}); {remedy}") from error
        self.done, self.n_digests, self.restored = state["done"], state["digests"], True
        for entry in self.folder.iterdir():
            if entry.name not in names:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _check_same(self, made_of: dict, finished: list[InputFile]) -> None:
        """DataError if what was finished is not what the same command would give now."""
        changed = [
            f"{key} was {made_of.get(key)!r} and is {self.made_of.get(key)!r}"
            for key in {**made_of, **self.made_of}
            if made_of.get(key) != self.made_of.get(key)
        ]
        now = {file.name: file for file in self.files}
        changed += [
            f"{file.name} has {'changed' if file.name in now else 'gone'}"
            for file in finished
            if now.get(file.name) != file
        ]
        if not changed and finished != self.files[: len(finished)]:
            changed.append("other files come before or between those that were finished")
        if changed:
            raise DataError(
                f"{self.folder} holds an interrupted preparation of other settings or inputs ({changed[0]}); give the "
                "same again to go on with it, or remove it to start anew"
            )

    def _read_digests(self, n: int) -> None:
        with open(self.folder / DIGESTS, "rb") as file:
            while n:
                read = np.fromfile(file, np.uint64, 2 * min(n, AT_ONCE)).reshape(-1, 2)
                if not len(read):
                    raise ValueError(f"{DIGESTS} is cut short")
                self.tally.seen.add(read)
                n -= len(read)
