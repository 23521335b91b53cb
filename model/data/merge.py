"""``prepare_data --merge A B --out C``: prepared folders of one tokenizer, joined without tokenizing again.

The shards are written anew, so that what comes out has the very tokens and shards of all inputs prepared at once with
the same settings, but that --dedup cannot find a document of one folder in another. The folders are read twice: first
against their checksums, since damage must not get a fresh checksum.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from halny.model.data.dataset import AGAIN, CHUNK, SPLITS, DataError, Dataset, read_tokenizer_files, same_tokenizer
from halny.model.data.progress import Progress
from halny.model.data.writer import SHARD_TOKENS, Writer, check_out, check_shard_tokens, new_folder


def merge(folders: list[Path], out: Path, *, shard_tokens: int = SHARD_TOKENS, progress: bool = True) -> None:
    """The documents of all folders in their order, train to train and held out to held out.

    Raises DataError, naming the folder, where they are not of one tokenizer or one is damaged, and leaves nothing.
    """
    began, given_out, out = time.monotonic(), out, check_out(out)
    check_shard_tokens(shard_tokens)
    folders = [Path(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        named = " ".join(map(str, folders))
        raise DataError(f"--merge {named}: names one folder only, or one twice; name two or more, each once")
    datasets = [Dataset(folder) for folder in folders]
    for dataset in datasets:
        _check_goes_together(datasets[0], dataset)
        for shard in (shard for split in SPLITS for shard in dataset.split(split).shards):
            if np.diff(shard.ends, prepend=0).min() < 1:
                raise DataError(f"{shard.tokens.filename}: the ends of its documents are not in order; {AGAIN}")
    sizes = [sum(shard["bytes"] for split in SPLITS for shard in _shards(dataset, split)) for dataset in datasets]
    first = datasets[0].manifest
    with Progress(2 * sum(sizes) if progress else None) as bar:
        for dataset, size in zip(datasets, sizes, strict=True):
            parts = sum(len(_shards(dataset, split)) for split in SPLITS)
            for part in range(parts):
                dataset.verify(part, parts)
                bar.update(size // parts, 0, 0)
        with new_folder(out) as folder, Writer(folder, datasets[0].vocab_size, shard_tokens) as writer:
            for dataset in datasets:
                for split in SPLITS:
                    for ids, lengths in _documents(dataset, split):
                        writer.add(split, ids, lengths)
                        bar.update(ids.nbytes, writer.total("documents"), writer.total("tokens"))
            settings = {"merged": [dataset.manifest["settings"] for dataset in datasets], "shard_tokens": shard_tokens}
            name, files = None, {}
            if first["tokenizer"] is not None:
                name, files = first["tokenizer"]["name"], read_tokenizer_files(datasets[0].tokenizer)
            counts, special = _counts(datasets), datasets[0].special_ids
            writer.finish(name, files, first["document"], settings, counts, special, _n_bytes(datasets))
    if progress:
        print(
            f"prepare_data: {given_out}: {writer.total('documents'):,} documents ({writer.documents['val']:,} held "
            f"out), {writer.total('tokens'):,} tokens, from {len(folders)} folders in {time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )


def _check_goes_together(one: Dataset, other: Dataset) -> None:
    def refuse(what: str, ours: object, theirs: object) -> None:
        raise DataError(
            f"--merge {one.path} {other.path}: {what} is {ours} in the first and {theirs} in the second, so their "
            "documents are not alike; prepare one of them again with the tokenizer and flags of the other"
        )

    ours, theirs = one.manifest["tokenizer"], other.manifest["tokenizer"]
    if (ours is None) != (theirs is None) or not same_tokenizer(one, other):
        names = [tok and f"{tok['name']} (tokenizer.json of SHA-256 {tok['sha256'][:12]})" for tok in (ours, theirs)]
        refuse("the tokenizer", *(name or "unknown" for name in names))
    if one.vocab_size != other.vocab_size:
        refuse("the vocabulary", one.vocab_size, other.vocab_size)
    for name in ("bos_id", "eos_id"):
        ours, theirs = (dataset.manifest["document"][name] for dataset in (one, other))
        if ours != theirs:
            refuse(f"{name} of each document", *("none" if i is None else i for i in (ours, theirs)))


def _shards(dataset: Dataset, split: str) -> list[dict]:
    return dataset.manifest["splits"][split]["files"]


def _documents(dataset: Dataset, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All documents, some millions of tokens at a time: their ids one after the other, and the length of each."""
    stream, shard_start = dataset.split(split), 0
    for shard in stream.shards:
        every, first, begin = np.asarray(shard.ends), 0, 0
        while first < len(every):
            last = max(first + 1, int(np.searchsorted(every, begin + CHUNK, side="right")))
            ends = every[first:last]
            yield stream.gather([shard_start + begin], [int(ends[-1]) - begin]), np.diff(ends, prepend=begin)
            first, begin = last, int(ends[-1])
        shard_start += begin


def _n_bytes(datasets: list[Dataset]) -> dict[str, int] | None:
    """Of the texts of each split; None where one of the folders does not say."""
    found = {split: [dataset.n_bytes(split) for dataset in datasets] for split in SPLITS}
    return None if any(None in each for each in found.values()) else {split: sum(each) for split, each in found.items()}


def _counts(datasets: list[Dataset]) -> dict:
    """What became of the documents of all inputs, and their sources; a folder that says nothing is its own source."""
    total, dropped, skipped, sources = Counter(), Counter(), Counter(), []
    for dataset in datasets:
        written = {
            what: sum(dataset.manifest["splits"][split][what] for split in SPLITS) for what in ("documents", "tokens")
        }
        counts = dataset.manifest.get("input") or {"documents": written["documents"]}
        total += Counter({name: counts.get(name, 0) for name in ("documents", "cut")})
        dropped += Counter(counts.get("dropped", {}))
        skipped += Counter(counts.get("skipped", {}))
        sources += dataset.manifest.get("sources") or [{"name": dataset.path.resolve().name, **written}]
    counts = {"documents": total["documents"], "dropped": dict(sorted(dropped.items()))}
    counts |= {"skipped": dict(sorted(skipped.items())), **({"cut": total["cut"]} if total["cut"] else {})}
    return {"input": counts, "sources": sources}
