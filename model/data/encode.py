"""A block of the input to token ids: what each worker of model/prepare_data.py does, or it itself for little input."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halny.model.data.documents import Block, Document, Fault, Outcome, documents
from halny.model.data.keep import Condition, Dropped, first_failed
from halny.model.data.tokenizer import Encoder, Tokenizer

if TYPE_CHECKING:
    from halny.model.data.quality import Classifier, Labeller


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a pure function of its text."""
    return _held_out(text.encode(), val_fraction)


def _held_out(raw: bytes, val_fraction: float) -> bool:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") < val_fraction * 2.0**64


def digest_of(raw: bytes) -> bytes:
    """16 bytes by which two texts, in UTF-8, are told to be the same."""
    return hashlib.blake2b(raw, digest_size=16).digest()


@dataclass(frozen=True)
class Job:
    """What a worker must know."""

    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int | None
    text_key: str = "text"
    keep: tuple[Condition, ...] = ()  # on the metadata of the input
    classifier: "Classifier | None" = None
    keep_labels: tuple[Condition, ...] = ()  # on what the classifier says
    val_fraction: float = 0.0
    dedup: bool = False

    def markers(self) -> list[np.ndarray]:
        """What stands before and after the ids of each document."""
        return [np.array([] if i is None else [i], self.tokenizer.dtype) for i in (self.bos_id, self.eos_id)]


@dataclass(kw_only=True)
class Encoded(Outcome):
    """What became of a block: its documents' ids, one after the other, and counts of what is none."""

    source: int
    ids: np.ndarray | None = None
    lengths: np.ndarray | None = None
    n_bytes: np.ndarray | None = None  # of each document's text in UTF-8
    val: np.ndarray | None = None  # bool, a document each
    digests: np.ndarray | None = None  # [documents, 2] uint64 with --dedup, else [0, 2]
    dropped: Counter = field(default_factory=Counter)


def encoder_of_blocks(job: Job) -> Callable[[Block], Encoded]:
    labeller = None
    if job.classifier is not None:
        from halny.model.data.quality import Labeller

        labeller = Labeller(job.classifier)
    return partial(encode_block, job, Encoder(job.tokenizer), labeller)


def encode_block(job: Job, encoder: Encoder, labeller: "Labeller | None", block: Block) -> Encoded:
    out = Encoded(source=block.source, size=block.size, files_done=block.files_done)
    found = [pair for part in block.parts for pair in documents(part, job.text_key, job.keep)]
    if labeller:
        found = list(_unless_label_drops(found, labeller, job.keep_labels))
    encodings = iter(encoder.encode([item.text for _, item in found if isinstance(item, Document)]))
    (head, tail), none = job.markers(), np.array([], job.tokenizer.dtype)
    pieces, lengths, n_bytes, val, digests = [none], [], [], [], []
    for where, item in found:
        if isinstance(item, Document) and not len(ids := next(encodings)):  # a normalizer may leave nothing of a text
            item = Fault("empty", f"{where}: a document of which the tokenizer leaves no token; remove it")
        out.count(item)
        if isinstance(item, Dropped):
            out.dropped[item.reason] += 1
        elif isinstance(item, Document):
            raw = item.text.encode()
            first, last = head, tail
            if job.tokenizer.special_tokens:  # a text may begin and end with them of its own accord
                first, last = none if ids[0] in head else head, none if ids[-1] in tail else tail
            pieces += [first, ids, last]
            lengths.append(len(first) + len(ids) + len(last))
            n_bytes.append(len(raw))
            val.append(_held_out(raw, job.val_fraction))
            if job.dedup:
                digests.append(digest_of(raw))
    out.ids, out.val = np.concatenate(pieces), np.array(val, bool)
    out.lengths, out.n_bytes = np.array(lengths, np.int64), np.array(n_bytes, np.int64)
    out.digests = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return out


def _unless_label_drops(found: list[tuple], labeller: "Labeller", keep: Sequence[Condition]) -> Iterator[tuple]:
    labels = iter(labeller.label([item.text for _, item in found if isinstance(item, Document)]))
    for where, item in found:
        if isinstance(item, Document):
            item = first_failed(keep, next(labels).metadata()) or item
        yield where, item
