"""Labelling documents by a classifier: `python -m halny.model.quality label`.

Every document comes out as it came in, with the keys `quality` and `quality_prob` beside its own, as lines of JSON in
numbered .jsonl.zst files that hold some PART_BYTES of text each, in the order of the input; `labels.json` says of what
classifier they are, and what became of the documents. What is no document (model/data/documents.py) is counted and
left out, empty ones too. The way is that of a preparation: blocks, workers, results in order, and after a kill it goes
on from the last input file that was finished. The bytes do not depend on the number of workers.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from halny.model.data.command import n_workers
from halny.model.data.dataset import to_json
from halny.model.data.documents import (
    Block,
    Document,
    Outcome,
    check_packages,
    check_pyarrow,
    documents,
    find_files,
    ignored_in_words,
    read_blocks,
)
from halny.model.data.progress import Progress
from halny.model.data.quality import KEYS, LABELS, SURE, Classifier, Label, Labeller, load_classifier
from halny.model.data.resume import Journal, input_file
from halny.model.data.tally import Tally
from halny.model.data.workers import ordered_map
from halny.model.data.writer import check_out, new_folder, tool_version
from halny.model.durable import sync

PART_BYTES = 256 << 20  # of text in a file, about: preparation goes on from file to file
COMPRESSION = 3
ABOVE = f"probability above {SURE}"  # in labels.json


def label(
    inputs: list[Path],
    out: Path,
    classifier: Path,
    *,
    text_key: str = "text",
    strict: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Labels files and folders of them into the folder `out`; returns what became of their documents.

    Raises DataError, naming file, line and remedy, or WorkerDied.
    """
    inputs, began = [Path(name) for name in inputs], time.monotonic()
    files, ignored = find_files(inputs)
    check_packages(files)
    check_pyarrow("writing .jsonl.zst")
    classifier = load_classifier(classifier)
    given, out, input_files = out, check_out(out), [input_file(file) for _, file in files]
    size = sum(file.size for file in input_files)
    workers = n_workers(workers, size)
    made_of = {"tool": f"halny {tool_version()}", "classifier": classifier.fingerprint, "text_key": text_key}
    made_of["morphology"] = classifier.morphology_here
    if progress and (warning := classifier.other_dictionary()):
        print(f"quality: {warning}", file=sys.stderr)
    tally, job = LabelTally(), (classifier, text_key)
    with (
        new_folder(out, resumes=True) as folder,
        PartFiles(folder) as parts,
        Journal(folder, made_of, input_files, parts, tally) as journal,
    ):
        if (goes_on := journal.goes_on()) and progress:
            print(f"quality: {given}: {goes_on}", file=sys.stderr)
        blocks = read_blocks(files, text_key, None, journal.done)
        with (
            closing(ordered_map(labeller_of_blocks, job, blocks, workers)) as labelled,
            Progress(size if progress else None, journal.bytes_done(), name="quality") as bar,
        ):
            for block in labelled:
                tally.add(block)
                tally.check(strict)
                parts.add(block.frame, block.text_bytes, block.labels.total())
                journal.add(None, block.files_done)
                bar.update(block.size, parts.total("documents"))
        tally.check_some(parts.total("documents"))
        parts.finish()
        counts = {"documents": tally.n_read, "skipped": dict(sorted(tally.faults.items()))}
        record = {**made_of, "input": counts, **tally.of_labels()}
        (folder / "labels.json").write_bytes(to_json(record, indent=1))
        sync(folder / "labels.json")
        journal.remove()
    if progress:
        took = f"from {size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s{ignored_in_words(ignored)}"
        print(f"quality: {given}: {tally.labels.total():,} documents labelled, {took}", file=sys.stderr)
        print(*tally.label_lines(), *tally.lines(), sep="\n", file=sys.stderr)
    return record


# --- in the workers ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LabelledBlock(Outcome):
    """What became of a block; its documents are a frame of zstd, of which a file may hold many."""

    frame: bytes = b""
    text_bytes: int = 0
    labels: Counter = field(default_factory=Counter)
    sure: Counter = field(default_factory=Counter)  # of these, with a probability above SURE
    by_rule: int = 0
    replaced: int = 0  # documents that had such a key before


def labeller_of_blocks(job: tuple[Classifier, str]) -> Callable[[Block], LabelledBlock]:
    classifier, text_key = job
    return partial(label_block, Labeller(classifier), text_key)


def label_block(labeller: Labeller, text_key: str, block: Block) -> LabelledBlock:
    import pyarrow

    out = LabelledBlock(size=block.size, files_done=block.files_done)
    found = [item for part in block.parts for _, item in documents(part, text_key, [])]
    for item in found:
        out.count(item)
    items, lines = [item for item in found if isinstance(item, Document)], []
    for item, given in zip(items, labeller.label([item.text for item in items]), strict=True):
        lines.append(_line(item, text_key, given))
        out.text_bytes += len(lines[-1])
        out.labels[given.quality] += 1
        out.sure[given.quality] += given.probability > SURE
        out.by_rule += given.by_rule
        out.replaced += not item.record.keys().isdisjoint(KEYS)
    if lines:
        codec = pyarrow.Codec("zstd", COMPRESSION)
        out.frame = codec.compress(b"".join(lines), asbytes=True)
    return out


def _line(item: Document, text_key: str, given: Label) -> bytes:
    """The document as JSON: its keys in their order, the text first where it came from a table, and the label last."""
    others = {key: value for key, value in item.record.items() if key not in KEYS}
    record = {**({} if text_key in others else {text_key: item.text}), **others, **given.metadata()}
    try:
        return json.dumps(record, ensure_ascii=False, default=_as_json).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in another key
        return json.dumps(record, default=_as_json).encode() + b"\n"


def _as_json(value: object) -> str:
    """Of parquet: binary text, dates, decimals, as --keep reads them."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# --- in the main process ----------------------------------------------------------------------------------------------


class LabelTally(Tally):
    """What became of the documents: how many got which label, and which were none."""

    def __init__(self):
        super().__init__(1, dedup=False)
        self.labels, self.sure, self.by_rule, self.replaced = Counter(), Counter(), 0, 0

    def add(self, block: LabelledBlock) -> None:
        self.count(block)
        self.documents[0] += block.labels.total()
        self.labels += block.labels
        self.sure += block.sure
        self.by_rule += block.by_rule
        self.replaced += block.replaced

    def state(self) -> dict:
        return super().state() | self.of_labels()

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.labels, self.sure = Counter(state["labels"]), Counter(state[ABOVE])
        self.by_rule, self.replaced = state["by_rule"], state["replaced"]

    def of_labels(self) -> dict:
        """For labels.json."""
        counts = {"labels": self.labels, ABOVE: self.sure}
        ordered = {name: {label: count[label] for label in LABELS} for name, count in counts.items()}
        return {**ordered, "by_rule": self.by_rule, "replaced": self.replaced}

    def label_lines(self) -> list[str]:
        lines = [f"  {label:6} {self.labels[label]:,} ({self.sure[label]:,} with a {ABOVE})" for label in LABELS]
        if self.by_rule:
            lines.append(f"  {self.by_rule:,} of LOW without being judged: no word, or most letters of another script")
        if self.replaced:
            lines.append(f"  {self.replaced:,} had {' or '.join(KEYS)} before, replaced here")
        return lines


class PartFiles:
    """The files that are written, for resume.py's Journal."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.n_documents = folder, 0, 0
        self.file, self.text_bytes = None, 0  # of the part that is open

    def __enter__(self) -> "PartFiles":
        return self

    def __exit__(self, *exception) -> None:
        if self.file:
            with suppress(OSError):  # of a full disk, which was said before
                self.file.close()

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.jsonl.zst"

    def total(self, what: str) -> int:
        return self.n_documents

    def add(self, frame: bytes, text_bytes: int, n_documents: int) -> None:
        if not frame:
            return
        if self.file is None:
            self.file = open(self.path(self.number), "wb")  # noqa: SIM115 see finish
        self.file.write(frame)
        self.text_bytes += text_bytes
        self.n_documents += n_documents
        if self.text_bytes >= PART_BYTES:
            self.finish()

    def finish(self) -> None:
        """Ends the part that is open: on the disk, and never touched again."""
        if self.file:
            self.sync()
            self.file.close()
            self.file, self.text_bytes, self.number = None, 0, self.number + 1

    def sync(self) -> None:
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def state(self) -> dict:
        size = self.file.tell() if self.file else 0
        return {"number": self.number, "size": size, "text_bytes": self.text_bytes, "documents": self.n_documents}

    def restore(self, state: dict) -> set[str]:
        """The names of the files that belong to it; ValueError if the last of them is too short."""
        self.number, self.text_bytes, self.n_documents = state["number"], state["text_bytes"], state["documents"]
        names = {self.path(i).name for i in range(self.number)}
        if state["size"]:
            last = self.path(self.number)
            if last.stat().st_size < state["size"]:
                raise ValueError(f"{last.name} is cut short")
            self.file = open(last, "r+b")  # noqa: SIM115 see finish
            self.file.truncate(state["size"])
            self.file.seek(state["size"])
            names.add(last.name)
        return names
