"""From token shards to the GPU: which tokens a step trains on, in which order, packed and mixed how.

    sample number -> (source, number within the source) -> row of that source -> tokens, labels, documents -> GPU

Every arrow but the last is a pure function of (seed, sample number). There is no state to save and no world size in
it: the whole position of a run in its data is its step number, so a resumed run reads what it would have read, on any
number of ranks that divides the batch. The file reads in the order of the arrows:

    the order of samples    a permutation an epoch, of which nothing is stored
    mixtures                several sources, each by its weight
    rows                    seq_len positions: windows of the concatenated stream, or whole documents packed best-fit
    the corpus              what --data names, opened: sources, their weights and rows
    batches                 rows as tensors, and a thread that makes them ahead
"""

import hashlib
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from halny.model.dataset import AGAIN, DataError, Dataset, RawDataset, TokenStream, open_dataset

IGNORED = -100  # the label of a position that has no target

# --- the order of samples ---------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, SplitMix64's increment


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64: every input bit reaches every output bit (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_order(numbers: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of the n samples each sample number stands for: number i is place i % n of epoch i // n.

    Each epoch is a permutation of its own, of which nothing is stored: a Feistel network keyed by (seed, epoch)
    permutes the smallest square power of two that holds n, and what falls outside 0 .. n - 1 is encrypted again until
    it falls inside ("cycle walking": Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). So the position of
    a run in its data is its step number alone, on any number of ranks.
    """
    numbers = np.asarray(numbers, dtype=np.uint64)
    epoch, place = numbers // np.uint64(n), numbers % np.uint64(n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = mix(mix(np.full_like(epoch, seed) + np.uint64(GOLDEN)) ^ epoch)

    def encrypt(x, key):
        left, right = x >> half, x & mask
        for turn in range(6):
            left, right = right, left ^ (mix((key + np.uint64(turn * GOLDEN % 2**64)) ^ right) & mask)
        return left << half | right

    place = encrypt(place, key)
    while (outside := place >= n).any():
        place[outside] = encrypt(place[outside], key[outside])
    return place.astype(np.int64)


def step_numbers(step: int, samples_a_step: int) -> np.ndarray:
    """The numbers of a step's samples in the order of the run (steps count from 1, samples from 0)."""
    return np.arange((step - 1) * samples_a_step, step * samples_a_step)


def share_of(numbers: np.ndarray, rank: int, world_size: int, micro_batch: int) -> np.ndarray:
    """A rank's share of a step's samples: [accumulation, micro_batch]."""
    return numbers.reshape(-1, world_size, micro_batch)[:, rank]


# --- mixtures ---------------------------------------------------------------------------------------------------------

BLOCK = 16  # sample numbers whose sources are shuffled among themselves


def interleave(numbers: np.ndarray, weights: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample number, its source and its number within that source, i.e. how many earlier samples have it too.

    Fair and yet without a pattern, from two parts:

    - A line of slots in which source 0 has slot p where floor(p w / W) steps up (w its weight, W the sum of all): as
      even as whole numbers allow. The slots that are left, counted anew, are divided among the others the same way. So
      how many of the first p slots a source has is a formula; it is off its share by less than the number of sources.
    - Within each BLOCK of sample numbers the slots are shuffled, by the permutation that ``sample_order`` gives it.

    So in a window of samples, wherever it starts, a source is off its share by what the two blocks torn at its ends can
    make of it (a quarter of a block each) and by rounding. A number costs its block, whatever came before.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    blocks, which = np.unique(numbers.ravel() // BLOCK, return_inverse=True)
    first = blocks[:, None] * BLOCK
    places = first + np.arange(BLOCK)
    slots = first + sample_order(places.ravel(), BLOCK, seed).reshape(places.shape)

    source, within = np.empty_like(slots), np.empty_like(slots)
    free = np.ones(slots.shape, dtype=bool)  # not given to a source yet
    for s, weight in enumerate(weights):
        total = sum(weights[s:])
        mine = free & (_share(slots + 1, weight, total) > _share(slots, weight, total))
        source[mine] = s
        within[mine] = (_share(first, weight, total) + mine.cumsum(axis=1) - 1)[mine]
        free &= ~mine
        slots, first = slots - _share(slots, weight, total), first - _share(first, weight, total)
    place = which * BLOCK + numbers.ravel() % BLOCK
    return source.ravel()[place].reshape(numbers.shape), within.ravel()[place].reshape(numbers.shape)


def _share(p: np.ndarray, weight: int, total: int) -> np.ndarray:
    """floor(p * weight / total), which no p overflows as long as total < 2^31."""
    return p // total * weight + p % total * weight // total


# --- rows -------------------------------------------------------------------------------------------------------------


class Windows:
    """The rows of a stream, cut every seq_len positions: row i predicts tokens i seq_len + 1 .. (i + 1) seq_len.

    Documents follow one another in a row and attend to each other. The last row may be short.
    """

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream, self.seq_len = stream, seq_len
        self.n_targets = max(0, len(stream) - 1)

    def __len__(self) -> int:
        return -(-self.n_targets // self.seq_len)

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the runs of positions that make up a row: length positions take length + 1 tokens."""
        start = row * self.seq_len
        return np.array([start]), np.array([min(self.seq_len, self.n_targets - start)])


class Packing:
    """The rows of a stream with whole documents in them, best-fit: each attends to itself only, none predicts another.

    A document of n tokens has n - 1 positions, and one of more than seq_len is cut into pieces that overlap by a token,
    so every token but a document's first is predicted exactly once an epoch. Full pieces are rows; the others are
    packed by best-fit decreasing (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
    https://arxiv.org/abs/2404.10830), AT_ONCE documents at a time. The plan is a function of the documents' lengths
    and seq_len, and takes 12 bytes a piece and 8 a row.
    """

    AT_ONCE = 2**20

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream, self.seq_len = stream, seq_len
        ends = _document_ends(stream)
        documents = range(0, len(ends) - 1, self.AT_ONCE)
        parts = [_pack(ends[first : first + self.AT_ONCE + 1], seq_len) for first in documents]
        parts.append(_pack(ends[:1], seq_len))  # of no documents: there may be no others, as in an empty split
        self._starts, self._lengths, counts = map(np.concatenate, zip(*parts, strict=True))
        self._first_piece = np.concatenate([[0], counts.cumsum()])
        self.n_targets = int(self._lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """As of Windows: a document or a piece of one each."""
        pieces = slice(self._first_piece[row], self._first_piece[row + 1])
        return self._starts[pieces], self._lengths[pieces]


Rows = Windows | Packing


def _document_ends(stream: TokenStream) -> np.ndarray:
    """Where each document of a stream ends, after a 0 where the first begins."""
    ends, start = [np.zeros(1, np.int64)], 0
    for shard in stream.shards:
        if len(shard.ends) and (shard.ends[-1] > len(shard.tokens) or np.diff(shard.ends, prepend=0).min() < 0):
            raise DataError(f"{shard.tokens.filename}: the ends of its documents are not in order; {AGAIN}")
        ends.append(shard.ends + start)
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


# --- the corpus -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    dataset: Dataset | RawDataset
    weight: int
    train: Rows
    held_out: Rows


class Corpus:
    """The data of a run: one data folder or several with weights, opened and cut into rows. What --data names.

    The sources come in the order of their fingerprints, and a fingerprint, not a path, keys a source's own order of
    samples. So neither their order on the command line nor where they lie is part of the run. Weights are of samples
    (rows), as whole numbers without a common divisor: 0.7 and 0.3 are 7 and 3.

    vocab_size of all sources, and a tokenizer's folder if one has any; fingerprint of their tokens and weights.
    Raises DataError, naming the value or the folder, for what cannot be mixed or trained on.
    """

    def __init__(
        self,
        sources: Sequence[str],
        seq_len: int,
        documents: bool = False,
        open_dataset: Callable[[Path], Dataset | RawDataset] = open_dataset,
    ):
        opened = [(open_dataset(folder), weight) for folder, weight in parse_sources(sources)]
        opened.sort(key=lambda entry: entry[0].fingerprint)
        datasets = [dataset for dataset, _ in opened]
        for one, other in itertools.combinations(datasets, 2):
            _check_goes_together(one, other)
        for dataset in datasets:
            if documents and isinstance(dataset, RawDataset):
                raise DataError(f"{dataset.path}: a raw file does not say where documents end; leave --documents out")
        cut = Packing if documents else Windows
        self.sources = [
            Source(dataset, weight, cut(dataset.split("train"), seq_len), cut(dataset.split("val"), seq_len))
            for dataset, weight in opened
        ]
        for source in self.sources:
            if not len(source.train):
                raise DataError(f"{source.dataset.path} has no tokens to train on")
        self.vocab_size = min(dataset.vocab_size for dataset in datasets)
        self.tokenizer = next((dataset.tokenizer for dataset in datasets if dataset.tokenizer), None)
        self.fingerprint = datasets[0].fingerprint
        if len(opened) > 1:
            identity = json.dumps([[dataset.fingerprint, weight] for dataset, weight in opened])
            self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    @property
    def train(self) -> list[Rows]:
        return [source.train for source in self.sources]

    @property
    def held_out(self) -> list[Rows]:
        return [source.held_out for source in self.sources]

    def describe(self, n_samples: int) -> list[str]:
        """A line a source: its size, and how often a run of so many samples goes through it."""
        lines, total = [], sum(source.weight for source in self.sources)
        for dataset, weight, train, held_out in self.sources:
            line = f"{dataset.path}: {len(train.stream):,} tokens, {len(train):,} samples of {train.seq_len}"
            if isinstance(train, Packing):
                padding = 1 - train.n_targets / (len(train) * train.seq_len)
                line += f" packed of {train.stream.n_documents:,} documents with {padding:.2%} padding"
            if len(self.sources) > 1:
                line += f", {weight / total:.2%} of the run's"
            epochs = n_samples * weight / total / len(train)
            lines.append(f"{line}; {epochs:.2f} epochs; held out {len(held_out.stream):,} tokens")
        return lines

    def place(self, source: int, row: int) -> str:
        """Where to look for a row, in words."""
        starts, _ = self.sources[source].train.pieces(row)
        of = f" of {self.sources[source].dataset.path}" if len(self.sources) > 1 else ""
        return f"from token {int(starts[0]):,}{of}"

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every parts-th file of each source: DataError where one is not what its manifest says."""
        for source in self.sources:
            source.dataset.verify(part, parts)

    def locate(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples that sample numbers stand for: (sources, rows of theirs), both of the shape of numbers."""
        source, row = interleave(numbers, [source.weight for source in self.sources], seed)
        for i, (dataset, _, rows, _) in enumerate(self.sources):
            # One source keeps the order that the seed alone gives it.
            key = seed if len(self.sources) == 1 else _key(seed, dataset.fingerprint)
            row[source == i] = sample_order(row[source == i], len(rows), key)
        return source, row


def parse_sources(texts: Sequence[str]) -> list[tuple[Path, int]]:
    """The folders that --data names, and their weights: DIR, or DIR:WEIGHT. A DIR that has a colon must exist."""
    folders, weights = [], []
    for text in texts:
        folder, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            if len(texts) > 1:
                raise DataError(f"{text}: of several folders each needs a weight, as in {text}:0.5")
            return [(Path(text), 1)]
        try:
            if not (folder and 1e-9 <= float(weight) <= 1e9):
                raise ValueError
            weights.append(Fraction(weight))
        except ValueError:
            raise DataError(
                f"{text}: no such folder, and no FOLDER:WEIGHT with a weight from 1e-9 to 1e9, as in pl:0.7"
            ) from None
        folders.append(Path(folder))
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) >= 2**31:
        raise DataError(f"{' '.join(texts)}: the weights have too many digits; round them")
    return list(zip(folders, whole, strict=True))


def _key(seed: int, fingerprint: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {fingerprint}".encode()).digest()[:8], "big")


def _check_goes_together(one: Dataset | RawDataset, other: Dataset | RawDataset) -> None:
    if one.fingerprint == other.fingerprint:
        raise DataError(f"{one.path} and {other.path} hold the same tokens; name one of them, with the sum of weights")
    check_one_tokenizer(one, other)


def check_one_tokenizer(one: Dataset | RawDataset, other: Dataset | RawDataset) -> None:
    """DataError if the ids of two data folders mean different tokens, as far as they say."""
    if one.vocab_size != other.vocab_size and not any(isinstance(dataset, RawDataset) for dataset in (one, other)):
        raise DataError(
            f"{one.path} has a vocabulary of {one.vocab_size}, {other.path} of {other.vocab_size}; prepare them with "
            "one tokenizer"
        )
    hashes = [dataset.manifest["tokenizer"]["sha256"] for dataset in (one, other) if dataset.tokenizer is not None]
    if len(set(hashes)) > 1:
        raise DataError(f"{one.path} and {other.path} were made by different tokenizers; prepare them with one")


# --- batches ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the model computes at once: ``model(*batch.inputs)``."""

    tokens: Tensor  # int64 [micro_batch, T]
    labels: Tensor  # int64 [micro_batch, T]: the token that follows, or IGNORED
    cu_seqlens: Tensor | None = None  # int32: where each document begins, and the end; None without --documents
    max_seqlen: int | None = None  # positions of the longest
    lengths: Sequence[int] = ()  # positions of every document, on the host: what attention costs

    @property
    def inputs(self) -> tuple:
        return self[:4]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


def read_batch(sources: Sequence[Rows], source: np.ndarray, row: np.ndarray, pin: bool = False) -> Batch:
    """A batch of rows: ``row[i]`` of ``sources[source[i]]``, or for -1 no sample, nothing but ignored labels.

    Positions that a row leaves free are a document of their own whose labels are ignored.
    """
    seq_len = sources[0].seq_len
    # Allocated anew for each batch: pinned memory comes from torch's caching allocator, which does not hand it out
    # again before the copies from it are done.
    tokens, labels = (torch.zeros(len(row), seq_len, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    documents = []
    for i, (s, r) in enumerate(zip(source.tolist(), row.tolist(), strict=True)):
        starts, lengths = sources[s].pieces(r) if r >= 0 else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        # Each piece is read with the token after it, which is the label of its last position and no token of its own.
        window = sources[s].stream.gather(starts.tolist(), (lengths + 1).tolist())
        after = (lengths + 1).cumsum() - 1
        filled = len(window) - len(lengths)
        tokens.numpy()[i, :filled] = np.delete(window, after)
        labels.numpy()[i, :filled] = np.delete(window, after - lengths)
        labels[i, filled:] = IGNORED
        documents += [*lengths.tolist(), seq_len - filled] if filled < seq_len else lengths.tolist()
    if isinstance(sources[0], Windows):
        return Batch(tokens, labels, lengths=[seq_len] * len(row))
    cu_seqlens = torch.tensor([0, *documents]).cumsum(0, dtype=torch.int32)
    return Batch(tokens, labels, cu_seqlens.pin_memory() if pin else cu_seqlens, max(documents), documents)


def read_in_turn(sources: Sequence[Rows], numbers: np.ndarray) -> Batch:
    """The batch of rows counted through all sources, one after the other; past the last there is no sample."""
    first = np.cumsum([0, *map(len, sources)])  # number of each source's first row, and how many there are
    source = np.searchsorted(first, numbers, side="right") - 1
    inside = numbers < first[-1]
    return read_batch(sources, np.where(inside, source, 0), np.where(inside, numbers - first[source], -1))


class Loader:
    """The batches of successive steps on a device, read ahead by a thread: ``next(loader)`` is a step's list of them.

    steps: the sample numbers of each, [accumulation, micro_batch]. next() raises what the thread raised: DataError for
    a shard that vanished or changed. ``waited`` is how long the last call waited for the thread, in seconds.
    """

    def __init__(self, corpus: Corpus, seed: int, steps: Iterable[np.ndarray], device: torch.device):
        self.waited = 0.0
        self._device = device
        self._ready: queue.Queue = queue.Queue(maxsize=2)
        threading.Thread(target=self._produce, args=(corpus, seed, steps), daemon=True, name="loader").start()

    def _produce(self, corpus: Corpus, seed: int, steps: Iterable[np.ndarray]) -> None:
        try:
            pin = self._device.type == "cuda"
            if pin:
                torch.cuda.set_device(self._device)  # a new thread starts on device 0, and would make a context there
            for numbers in steps:
                located = zip(*corpus.locate(numbers, seed), strict=True)
                self._ready.put([read_batch(corpus.train, source, row, pin) for source, row in located])
            self._ready.put(StopIteration())
        except Exception as error:
            self._ready.put(error)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        start = time.perf_counter()
        batches = self._ready.get()
        self.waited = time.perf_counter() - start
        if isinstance(batches, Exception):
            self._ready.put(batches)  # the thread is gone; whoever asks again is told again
            raise batches
        return [batch.to(self._device) for batch in batches]
