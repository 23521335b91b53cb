"""From token shards to the GPU: which tokens a step trains on, in which order, packed and mixed how.

    sample number -> (source, number within the source) -> row of that source -> tokens, labels, documents -> GPU
      order.py         order.py: mixtures by weight            rows.py                  here

Every arrow but the last is a pure function of (seed, sample number), and of the data's history (history.py) where a run
goes on with other data. Here are the corpus (what --data names, opened: sources, their weights and rows) and the
batches: rows as tensors, and a thread that makes them ahead.
"""

import contextlib
import hashlib
import itertools
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

from halny.model.data.dataset import DataError, Dataset, RawDataset, open_dataset, same_tokenizer
from halny.model.data.growth import contents, with_origins
from halny.model.data.history import Era, Share, from_json, gone_on, lineages, locate, samples_read
from halny.model.data.order import grown_order
from halny.model.data.rows import Packing, Rows, Windows

IGNORED = -100  # the label of a position that has no target


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

    vocab_size of all sources, and a tokenizer's folder if one has any; fingerprint of their tokens and weights. The
    history is of these sources from the first sample on, until ``go_on`` says what a run has read before.
    Raises DataError, naming the value or the folder, for what cannot be mixed or trained on.
    """

    def __init__(
        self,
        sources: Sequence[str],
        seq_len: int,
        documents: bool = False,
        open_dataset: Callable[[Path], Dataset | RawDataset] = open_dataset,
    ):
        opened = [(open_dataset(folder), weight) for folder, weight in named_sources(sources)]
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
        self.now = tuple(
            Share(dataset.fingerprint, weight, str(dataset.path), contents(dataset)) for dataset, weight in opened
        )
        self.history = [Era(0, self.now)]
        self.fingerprint = self.history[0].fingerprint

    @property
    def train(self) -> list[Rows]:
        return [source.train for source in self.sources]

    @property
    def held_out(self) -> list[Rows]:
        return [source.held_out for source in self.sources]

    def go_on(self, config: dict, number: int, may_change: bool) -> None:
        """Take up the history in a run's earlier config.json: the run goes on at this sample number, with this corpus.

        DataError where it cannot: see ``gone_on``.
        """
        earlier = from_json(config["data_history"]) if "data_history" in config else [_only_era(config, self.now)]
        self.history = gone_on(earlier, self.now, number, may_change)
        if self.history is not earlier:
            *before, now = self.history
            datasets = [source.dataset for source in self.sources]
            self.history = [*before, now._replace(shares=with_origins(now.shares, datasets, before))]
        self._cut_as_read()

    def _cut_as_read(self) -> None:
        """Give the sources that grew the rows that they had, and then those of what is new."""
        lines = lineages(self.history)
        known = {share.fingerprint: share for era in self.history for share in era.shares}
        for i, (dataset, _, rows, _) in enumerate(self.sources):
            if cuts := [known[name].contents["tokens"] for name in lines[dataset.fingerprint][:-1]]:
                self.sources[i] = self.sources[i]._replace(train=type(rows)(rows.stream, rows.seq_len, cuts))

    def describe(self, n_samples: int, seed: int) -> list[str]:
        """A line a source: its size, and how often a run of so many samples goes through it."""
        lines, total, changed = [], sum(source.weight for source in self.sources), self.history[-1].first
        whose, origins = "those to come" if changed else "the run's", lineages(self.history)
        before, read = (samples_read(self.history, n, seed) for n in (changed, n_samples))
        for dataset, weight, train, held_out in self.sources:
            line = f"{dataset.path}: {len(train.stream):,} tokens, {len(train):,} samples of {train.seq_len}"
            if len(train.sizes) > 1:
                line += f" ({len(train) - train.sizes[-2]:,} of them new since it grew)"
            if isinstance(train, Packing):
                padding = 1 - train.n_targets / (len(train) * train.seq_len)
                line += f" packed of {train.stream.n_documents:,} documents with {padding:.2%} padding"
            if len(self.sources) > 1:
                line += f", {weight / total:.2%} of {whose}"
            name = origins[dataset.fingerprint][0]
            line += f"; {read.pop(name, 0) / len(train):.2f} epochs"
            if changed:
                line += f", {before[name] / len(train):.2f} of them before the data changed"
            lines.append(f"{line}; held out {len(held_out.stream):,} tokens")
        paths = {share.fingerprint: share.path for era in self.history for share in era.shares}
        for name, n in read.items():
            as_it_was = " as it was" * any(paths[name] == share.path for share in self.now)
            lines.append(f"{paths[name]}{as_it_was}: no longer read, after {n:,} samples of it")
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
        lines = lineages(self.history)
        lines = [lines[source.dataset.fingerprint] for source in self.sources]
        source, row = locate(self.history, [line[0] for line in lines], numbers, seed)
        for i, line in enumerate(lines):
            begun = [next(era for era in self.history if name in era.names) for name in line]
            # A source that the run began with alone has the order that the seed alone gives it, in any later company.
            key = seed if len(begun[0].shares) == 1 else _key(seed, line[0])
            read = [samples_read(self.history, era.first, seed)[line[0]] for era in begun]
            row[source == i] = grown_order(row[source == i], self.sources[i].train.sizes, read, key)
        return source, row


def parse_sources(texts: Sequence[str]) -> list[tuple[Path, int]]:
    """The folders that --data names, and their weights: DIR, or DIR:WEIGHT. A DIR that has a colon must exist.

    Raw files are named in the same way. Several without a weight, as the shell makes of a pattern, are one source:
    `named_sources` puts them together.
    """
    folders, weights = [], []
    if _are_one_corpus(texts):
        return [(Path(text), 1) for text in texts]
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


def _only_era(config: dict, now: Sequence[Share]) -> Era:
    """The mixture in the config of an older halny, which wrote no history.

    It has the fingerprint of the whole, and weights by path. Where these do not lead to the sources open ``now``, the
    whole counts as one source.
    """
    texts = config["recipe"]["data"] or ()
    try:
        weights = {str(folder): weight for folder, weight in parse_sources(texts)}
    except DataError:  # a folder with a colon in its name is no more
        weights = {}
    by_path = tuple(share._replace(weight=weights[share.path]) for share in now if share.path in weights)
    eras = [Era(0, tuple(now)), Era(0, by_path), Era(0, (Share(config["data"], 1, " ".join(texts)),))]
    return next(era for era in eras if era.fingerprint == config["data"])


def named_sources(texts: Sequence[str]) -> list[tuple[Path | list[Path], int]]:
    """What --data names, as `open_dataset` opens it, and the weight of each."""
    sources = parse_sources(texts)
    return [([file for file, _ in sources], 1)] if _are_one_corpus(texts) else sources


def _are_one_corpus(texts: Sequence[str]) -> bool:
    return len(texts) > 1 and all(text.endswith(".bin") and Path(text).exists() for text in texts)


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
    if not same_tokenizer(one, other):
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
    a shard that vanished or changed. ``waited`` is how long the last step's were waited for, in seconds.
    """

    def __init__(self, corpus: Corpus, seed: int, steps: Iterable[np.ndarray], device: torch.device):
        self.waited = self._waiting = 0.0
        self._device = device
        self._next: list[Batch] | Exception | None = None  # taken from the thread already
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
        self._take()
        if isinstance(batches := self._next, Exception):
            raise batches  # the thread is gone; whoever asks again is told again
        self._next, self.waited, self._waiting = None, self._waiting, 0.0
        return [batch.to(self._device) for batch in batches]

    def problem(self, hurry: Callable[[], bool] = lambda: False) -> DataError | None:
        """Why there will be no batches of the next step, which is waited for, but not in a ``hurry``."""
        self._take(hurry)
        return self._next if isinstance(self._next, DataError) else None

    def _take(self, hurry: Callable[[], bool] = lambda: False) -> None:
        start = time.perf_counter()
        while self._next is None and not hurry():
            with contextlib.suppress(queue.Empty):
                self._next = self._ready.get(timeout=0.2)
        self._waiting += time.perf_counter() - start
