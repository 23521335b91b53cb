"""How a stream of tokens is cut into rows of seq_len: windows of the text, or whole documents packed best-fit."""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from halny.model.data.dataset import AGAIN, DataError, TokenStream


class Windows:
    """The rows of a stream, cut every seq_len positions: row i predicts tokens i seq_len + 1 .. (i + 1) seq_len.

    Documents follow one another in a row and attend to each other. The last row may be short. At the tokens ``cuts``
    the stream is cut into parts, each of rows of its own: ``sizes`` says how many there are up to the end of each.
    """

    def __init__(self, stream: TokenStream, seq_len: int, cuts: Sequence[int] = ()):
        self.stream, self.seq_len = stream, seq_len
        self._begins = [0, *cuts]
        self._targets = [max(0, n - 1) for n in np.diff([*self._begins, len(stream)]).tolist()]
        self.sizes = list(itertools.accumulate(-(-n // seq_len) for n in self._targets))
        self.n_targets = sum(self._targets)

    def __len__(self) -> int:
        return self.sizes[-1]

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the runs of positions that make up a row: length positions take length + 1 tokens."""
        part = bisect.bisect_right(self.sizes, row)
        start = (row - (self.sizes[part - 1] if part else 0)) * self.seq_len
        return np.array([self._begins[part] + start]), np.array([min(self.seq_len, self._targets[part] - start)])

    def unpredicted(self) -> np.ndarray:
        """Where the tokens are in the stream that no row predicts: the first of each part."""
        return np.array([begin for begin in self._begins if begin < len(self.stream)], np.int64)


class Packing:
    """The rows of a stream with whole documents in them, best-fit: each attends to itself only, none predicts another.

    A document of n tokens has n - 1 positions, and one of more than seq_len is cut into pieces that overlap by a token,
    so every token but a document's first is predicted exactly once an epoch. Full pieces are rows; the others are
    packed by best-fit decreasing (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
    https://arxiv.org/abs/2404.10830), AT_ONCE documents at a time. The packing is a function of the documents' lengths
    and seq_len, and takes 12 bytes a piece and 8 a row. The documents of each part between ``cuts`` are packed apart.
    """

    AT_ONCE = 2**20

    def __init__(self, stream: TokenStream, seq_len: int, cuts: Sequence[int] = ()):
        self.stream, self.seq_len = stream, seq_len
        ends = _document_ends(stream)
        bounds = [0, *np.searchsorted(ends, cuts).tolist(), len(ends) - 1]
        parts = [
            _pack(ends[first : min(first + self.AT_ONCE, last) + 1], seq_len)
            for begin, last in itertools.pairwise(bounds)
            for first in range(begin, last, self.AT_ONCE)
        ]
        parts.append(_pack(ends[:1], seq_len))  # of no documents: there may be no others, as in an empty split
        self._starts, self._lengths, counts = map(np.concatenate, zip(*parts, strict=True))
        self._first_piece = np.concatenate([[0], counts.cumsum()])
        self.n_targets = int(self._lengths.sum(dtype=np.int64))
        begins = self._starts[self._first_piece[:-1]]
        self.sizes = [*(int((begins < cut).sum()) for cut in cuts), len(begins)]

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """As of Windows: a document or a piece of one each."""
        pieces = slice(self._first_piece[row], self._first_piece[row + 1])
        return self._starts[pieces], self._lengths[pieces]

    def unpredicted(self) -> np.ndarray:
        """As of Windows: the first token of each document."""
        ends = _document_ends(self.stream)
        return ends[:-1][np.diff(ends) > 0]


Rows = Windows | Packing


def _document_ends(stream: TokenStream) -> np.ndarray:
    """Where each document of a stream ends, after a 0 where the first begins."""
    ends, start = [np.zeros(1, np.int64)], 0
    for shard in stream.shards:
        own = np.asarray(shard.ends)
        if len(own) and (own[-1] > len(shard.tokens) or np.diff(own, prepend=0).min() < 0):
            raise DataError(f"{shard.tokens.filename}: the ends of its documents are not in order; {AGAIN}")
        ends.append(own + start)
        start += len(shard.tokens)
    return np.concatenate(ends)


def _pack(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of some documents, whose tokens are those between successive ``ends``.

    Returns the pieces' starts (int64) and lengths (int32), row after row, and how many pieces each row has.
    """
    begins, positions = ends[:-1], np.diff(ends) - 1
    begins, positions = begins[positions > 0], positions[positions > 0]
    n_full, rest = positions // seq_len, positions % seq_len
    nth = np.arange(n_full.sum()) - np.repeat(n_full.cumsum() - n_full, n_full)
    full = np.repeat(begins, n_full) + nth * seq_len
    begins, rest = (begins + n_full * seq_len)[rest > 0], rest[rest > 0]
    rows = best_fit_decreasing(rest, seq_len)
    order = np.argsort(rows, kind="stable")
    return (
        np.concatenate([full, begins[order]]),
        np.concatenate([np.full(len(full), seq_len), rest[order]]).astype(np.int32),
        np.concatenate([np.ones(len(full), np.int64), np.bincount(rows)]),
    )


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: the longest first, each into the fullest bin that still has room for it.

    Bins are kept by the room they have, and items of a size are placed together: the fullest bins with room for one
    take as many as they hold, which is where one after the other would go too. So Python works once for each pair of
    a size and a room that meet (some thousands, whatever the number of items), and numpy does the rest. ``rooms`` has a
    bit for each room that some bin has.
    """
    order = np.argsort((capacity - sizes).astype(np.min_scalar_type(capacity)), kind="stable")  # 16 bits: a radix sort
    bin_of = np.empty(len(sizes), np.int64)
    by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    rooms, n_bins, done = 0, 0, 0

    def put(bins: np.ndarray, room: int) -> None:
        nonlocal rooms
        if len(bins):
            by_room[room].append(bins)
            rooms |= 1 << room

    counts = np.bincount(sizes)
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            if usable := rooms >> size:
                room = size + (usable & -usable).bit_length() - 1
                bins = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room = capacity
                bins = np.arange(n_bins, n_bins - (-left // (capacity // size)))
                n_bins += len(bins)
            each = room // size
            n_used = min(len(bins), -(-left // each))
            put(bins[n_used:], room)
            placed = min(left, n_used * each)
            bin_of[order[done : done + placed]] = np.repeat(bins[:n_used], each)[:placed]
            n_last = placed - (n_used - 1) * each
            put(bins[: n_used - 1], room - each * size)
            put(bins[n_used - 1 : n_used], room - n_last * size)
            done, left = done + placed, left - placed
    return bin_of
