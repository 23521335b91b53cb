"""What became of the documents of the input: counts for the manifest and the last lines, and --dedup."""

from collections import Counter

import numpy as np

from halny.model.data.dataset import DataError
from halny.model.data.documents import Outcome
from halny.model.data.encode import Encoded

ARRAYS = ("documents", "tokens", "bytes")  # of Tally: by source
HOPELESS = 10_000  # faults before the first document, after which the flags are to blame and not the input


class Tally:
    """What became of the documents of the input, by reason and by source.

    bytes      UTF-8 bytes of the documents' texts, by source
    val_bytes  those of the documents held out; None if a document was cut where its bytes could not be counted
    """

    def __init__(self, n_sources: int, dedup: bool):
        self.n_read, self.dropped, self.faults, self.first_faults = 0, Counter(), Counter(), {}
        self.documents, self.tokens, self.bytes = (np.zeros(n_sources, np.int64) for _ in ARRAYS)
        self.val_bytes: int | None = 0
        self.last_bytes = 0  # of the last document
        self.seen = DigestSet() if dedup else None
        self.parts, self.message = 0, None  # documents made by cutting another

    def add(self, block: Encoded) -> np.ndarray:
        """Counts a block, and says which of its documents stay: all that were not seen before."""
        self.count(block)
        self.dropped += block.dropped
        keep = np.ones(len(block.lengths), bool) if self.seen is None else self.seen.add(block.digests)
        if duplicates := int((~keep).sum()):
            self.dropped["duplicate"] += duplicates
        self.documents[block.source] += keep.sum()
        self.tokens[block.source] += block.lengths[keep].sum()
        self.bytes[block.source] += block.n_bytes[keep].sum()
        self.val_bytes += int(block.n_bytes[keep & block.val].sum())
        if keep.any():
            self.last_bytes = int(block.n_bytes[keep][-1])
        return keep

    def count(self, block: Outcome) -> None:
        self.n_read += block.n_documents
        self.faults += block.faults
        self.first_faults = block.first_faults | self.first_faults

    def check(self, strict: bool) -> None:
        """DataError at the first fault if `strict`, and at the last of HOPELESS before any document."""
        first = next(iter(self.first_faults.values()), None)
        if first and strict:
            raise DataError(f"{first} (refused because of --strict)")
        if self.faults.total() >= HOPELESS and not self.documents.sum() and not self.dropped:
            raise DataError(f"none of the first {self.faults.total():,} documents can be used; the first: {first}")

    def check_some(self, n_documents: int) -> None:
        """DataError at the end of an input that gave none."""
        if not n_documents:
            raise DataError(f"no documents in the input ({self.line() or 'it is empty'}); add some text")

    def state(self) -> dict:
        """All but what was seen, for JSON; `restore` takes it back."""
        counts = {"n_read": self.n_read, "dropped": self.dropped, "faults": self.faults}
        counts |= {"val_bytes": self.val_bytes, "last_bytes": self.last_bytes}
        return {**counts, "first_faults": self.first_faults, **{name: getattr(self, name).tolist() for name in ARRAYS}}

    def restore(self, state: dict) -> None:
        self.n_read, self.first_faults = state["n_read"], state["first_faults"]
        self.dropped, self.faults = Counter(state["dropped"]), Counter(state["faults"])
        self.documents, self.tokens, self.bytes = (np.array(state[name], np.int64) for name in ARRAYS)
        self.val_bytes, self.last_bytes = state["val_bytes"], state["last_bytes"]

    def cut(self, message: str | None, documents: int, tokens: int, split: str, held_out_bytes: int | None) -> None:
        """The last document, of that split, became two: what that adds, markers included, to its source.

        held_out_bytes  of its text are in the second part, which is held out; None where they could not be counted
        """
        self.parts, self.message = documents, message
        source = np.flatnonzero(self.documents)[-1]
        self.documents[source] += documents
        self.tokens[source] += tokens
        if held_out_bytes is None or held_out_bytes > self.last_bytes:
            self.val_bytes = None
        else:
            self.val_bytes += held_out_bytes - (self.last_bytes if split == "val" else 0)

    def split_bytes(self) -> dict[str, int] | None:
        """The bytes of the texts of each split, where that is known."""
        if self.val_bytes is None:
            return None
        return {"train": int(self.bytes.sum()) - self.val_bytes, "val": self.val_bytes}

    def record(self, sources: list[str]) -> dict:
        """For the manifest."""
        arrays = (getattr(self, name).tolist() for name in ARRAYS)
        return {
            "input": {
                "documents": self.n_read,
                "dropped": dict(sorted(self.dropped.items())),
                "skipped": dict(sorted(self.faults.items())),
                **({"cut": self.parts} if self.parts else {}),
            },
            "sources": [dict(zip(("name", *ARRAYS), row, strict=True)) for row in zip(sources, *arrays, strict=True)],
        }

    def lines(self) -> list[str]:
        kept = int(self.documents.sum()) - self.parts
        lines = [f"  dropped {n:,}: {reason}" for reason, n in sorted(self.dropped.items())]
        lines += [
            f"  skipped {n:,}: {reason}; the first: {self.first_faults[reason]}" for reason, n in self.faults.items()
        ]
        kept_line = [f"  kept    {kept:,} of {self.n_read:,} documents"] if lines else []
        return [*kept_line, *lines, *([f"  {self.message}"] if self.message else [])]

    def line(self) -> str:
        return "; ".join(line.strip() for line in self.lines()[1:])


class DigestSet:
    """A set of 128-bit digests: open addressing in one array, 24 to 48 bytes each, where a Python set takes 130."""

    def __init__(self):
        self.table, self.n = np.zeros((1 << 10, 2), np.uint64), 0  # a row of zeros is free

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Which rows of [n, 2] uint64 are new, the first among equals, and puts them in."""
        unique, first = np.unique(digests, axis=0, return_index=True)
        while 3 * (self.n + len(unique)) > 2 * len(self.table):
            old = self.table[self.table.any(axis=1)]
            self.table = np.zeros((2 * len(self.table), 2), np.uint64)
            self._insert(old)
        new = self._insert(unique)
        self.n += int(new.sum())
        out = np.zeros(len(digests), bool)
        out[first[new]] = True
        return out

    def _insert(self, digests: np.ndarray) -> np.ndarray:
        mask, new, rest = np.uint64(len(self.table) - 1), np.zeros(len(digests), bool), np.arange(len(digests))
        slots = digests[:, 0] & mask
        while len(rest):
            free = rest[~self.table[slots[rest]].any(axis=1)]
            self.table[slots[free]] = digests[free]  # where several want one slot, the last gets it
            there = (self.table[slots[rest]] == digests[rest]).all(axis=1)
            new[free[(self.table[slots[free]] == digests[free]).all(axis=1)]] = True
            rest = rest[~there]
            slots[rest] = (slots[rest] + np.uint64(1)) & mask
        return new
