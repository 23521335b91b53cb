"""``python -m halny.model.prepare_data --check DIR``: what is wrong with token data, and what is in it.

Every file is read against its checksum, every token against the vocabulary, every document against the policy that the
manifest records, through memory maps and in chunks, so that any size takes the same memory. What it counts as wrong:

    checksum          a file is not what the manifest says (one cut short or missing cannot even be opened)
    vocabulary        an id past it: a GPU would read beside its embedding
    doubled           BOS or EOS twice in a row, as happens where two programs add them
    missing           a document without the BOS or EOS that the manifest promises
    empty             a document of nothing but BOS and EOS
    giant             a document of more tokens than a batch of the reference run, 2^22: a corpus taken for one text?
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from halny.model.data.dataset import CHUNK, SPLITS, DataError, Dataset, RawDataset, Shard, open_dataset

GIANT_TOKENS = 1 << 22
N_SAMPLES, SAMPLE_TOKENS = 4, 48
BAR = 40  # characters


class Findings:
    """What is wrong: how often, and where first."""

    def __init__(self):
        self.counts, self.first = {}, {}

    def add(self, what: str, n: int, where: str) -> None:
        if n:
            self.counts[what] = self.counts.get(what, 0) + int(n)
            self.first.setdefault(what, where)


def check(
    path: Path, tokens_per_second: float | None = None, dtype: str | None = None, vocab_size: int | None = None
) -> bool:
    """Prints statistics of a data folder or .bin file and what is wrong with it; whether it is clean."""
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise DataError(f"--tokens-per-second {tokens_per_second}: must be positive, for example 9200")
    data = open_dataset(path, dtype, vocab_size)
    findings = Findings()
    for name in data.changed_files() if isinstance(data, Dataset) else []:
        findings.add("files that are not what their checksum says", 1, str(name))
    bos_id, eos_id, _ = data.special_ids
    promised = data.manifest["document"] if isinstance(data, Dataset) else {"bos_id": None, "eos_id": None}
    histograms = {}
    for split in SPLITS:
        histograms[split] = np.zeros(64, np.int64)
        for number, shard in enumerate(data.split(split).shards):
            where = f"{split}-{number:05d}.npy" if isinstance(data, Dataset) else shard.tokens.filename
            check_tokens(shard, where, data.vocab_size, bos_id, eos_id, findings)
            if isinstance(data, Dataset):  # a raw file knows of no documents
                histograms[split] += check_documents(shard, where, promised["bos_id"], promised["eos_id"], findings)
    for line in [*_statistics(data, histograms, tokens_per_second), *_samples(data), ""]:
        print(line)
    for what, n in findings.counts.items():
        print(f"NOT CLEAN  {what}: {n:,}; the first: {findings.first[what]}")
    if not findings.counts:
        print(f"clean      {path}")
    return not findings.counts


def check_tokens(
    shard: Shard, where: str, vocab_size: int, bos_id: int | None, eos_id: int | None, findings: Findings
) -> None:
    before = -1  # the last token of the chunk before
    markers = {bos_id: "BOS", eos_id: "EOS"} if bos_id != eos_id else {bos_id: "BOS, which is EOS"}
    for start in range(0, len(shard.tokens), CHUNK):
        tokens = shard.tokens[start : start + CHUNK]
        bad = np.flatnonzero(tokens >= vocab_size)
        if len(bad):
            what = f"id {tokens[bad[0]]} at token {start + bad[0]} of {where}, the vocabulary is of {vocab_size}"
            findings.add("ids past the vocabulary", len(bad), what)
        for token_id, name in markers.items():
            if token_id is not None:
                here = np.flatnonzero(tokens == token_id)
                doubled = here[:-1][np.diff(here) == 1] + 1
                if before == token_id and len(here) and here[0] == 0:
                    doubled = np.concatenate([[0], doubled])
                if len(doubled):
                    findings.add(f"doubled {name}", len(doubled), f"token {start + doubled[0]} of {where}")
        before = int(tokens[-1])


def check_documents(shard: Shard, where: str, bos_id: int | None, eos_id: int | None, findings: Findings) -> np.ndarray:
    """The histogram of its lengths: [k] counts documents of 2^k to 2^(k+1) - 1 tokens, [63] those of none."""
    histogram, n_special = np.zeros(64, np.int64), (bos_id is not None) + (eos_id is not None)
    for start, ends in _chunks(shard.ends):
        begins = np.concatenate([[shard.ends[start - 1] if start else 0], ends[:-1]])
        lengths = ends - begins

        def add(what: str, wrong: np.ndarray, start: int = start, lengths: np.ndarray = lengths) -> None:
            if len(at := np.flatnonzero(wrong)):
                first = f"document {start + at[0]} of {where}, of {lengths[at[0]]:,} tokens"
                findings.add(what, len(at), first)

        add("document ends out of order", (lengths < 0) | (ends > len(shard.tokens)))
        add("empty documents", (lengths >= 0) & (lengths <= n_special))
        add("giant documents", lengths > GIANT_TOKENS)
        sound = (lengths > 0) & (ends <= len(shard.tokens)) & (begins >= 0)
        if bos_id is not None:
            add("documents without BOS", sound & (shard.tokens[np.where(sound, begins, 0)] != bos_id))
        if eos_id is not None:
            add("documents without EOS", sound & (shard.tokens[np.where(sound, ends - 1, 0)] != eos_id))
        histogram += np.bincount(np.frexp(lengths[lengths > 0])[1] - 1, minlength=64)
        histogram[63] += (lengths <= 0).sum()
    return histogram


def _chunks(ends: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(ends), CHUNK):
        yield start, np.asarray(ends[start : start + CHUNK])


def _statistics(data: Dataset | RawDataset, histograms: dict, tokens_per_second: float | None) -> Iterator[str]:
    dtype = data.manifest["dtype"] if isinstance(data, Dataset) else data.dtype.name
    yield f"{data.path}: a vocabulary of {data.vocab_size:,}, {dtype}"
    for split in SPLITS:
        stream = data.split(split)
        if len(stream):
            mean = f", {len(stream) / stream.n_documents:,.1f} tokens each" if isinstance(data, Dataset) else ""
            documents = f"{stream.n_documents:,} documents, " if isinstance(data, Dataset) else ""
            n_bytes = data.n_bytes(split) if isinstance(data, Dataset) else None
            of_text = "" if n_bytes is None else f"; {n_bytes:,} bytes of text, {n_bytes / len(stream):.2f} per token"
            yield f"{split:6} {documents}{len(stream):,} tokens{mean}{of_text}"
    if isinstance(data, Dataset):
        yield _markers(data)
    histogram = sum(histograms.values())
    if histogram.any():
        yield "\nlengths of documents, in tokens"
        kinds = np.flatnonzero(histogram[:63])
        for k in range(kinds[0], kinds[-1] + 1) if len(kinds) else []:
            bar = "#" * round(BAR * histogram[k] / histogram.max())
            yield f"{f'{2**k:,} to {2 ** (k + 1) - 1:,}':>24} {histogram[k]:12,} {bar}"
        if histogram[63]:
            yield f"{'none':>24} {histogram[63]:12,}"
    if isinstance(data, Dataset):
        yield from _of_the_input(data.manifest)
    epoch = len(data.split("train"))
    days = ""
    if tokens_per_second is not None:
        days = f", {epoch / tokens_per_second / 86400:,.2f} days at {tokens_per_second:,g} tokens/s"
    yield f"\nan epoch: {epoch:,} tokens{days}"


def _markers(data: Dataset) -> str:
    """What stands around each document; loudly, if nothing does."""
    bos, eos = (data.manifest["document"][key] for key in ("bos_id", "eos_id"))
    if bos is None and eos is None:
        return "NO MARKERS: no BOS before documents and no EOS after them, unless whoever made the ids put them there"
    begins = "" if bos is None else f"begins with BOS {bos} and "
    return f"each document {begins}{'has no EOS at its end' if eos is None else f'ends with EOS {eos}'}"


def _of_the_input(manifest: dict) -> Iterator[str]:
    total = max(sum(record["tokens"] for record in manifest.get("sources", [])), 1)
    if manifest.get("sources"):
        yield "\nsources"
        for record in manifest["sources"]:
            share = f"{record['tokens'] / total:7.2%} of tokens"
            n_bytes = f"{record['bytes']:15,} bytes" if "bytes" in record else ""
            yield f"{share:>24} {record['documents']:12,} documents{n_bytes}  {record['name']}"
    counts = manifest.get("input", {})
    left_out = [(n, f"{why} {reason}") for why in ("dropped", "skipped") for reason, n in counts.get(why, {}).items()]
    if left_out:
        yield f"\nleft out of {counts['documents']:,} documents of the input"
        for n, reason in left_out:
            yield f"{n:24,} {reason}"


def _samples(data: Dataset | RawDataset) -> Iterator[str]:
    """A few tokens from random places, always the same ones, as text if there is a tokenizer."""
    stream, rng = data.split("train"), np.random.default_rng(0)
    decode = str
    if data.tokenizer is not None:
        try:
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(data.tokenizer / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            yield f"\nno samples as text: the tokenizer cannot be read ({error})"
        else:

            def decode(ids: list[int]) -> str:
                return repr(backend.decode(ids, skip_special_tokens=False))

    yield "\nsamples"
    length = min(SAMPLE_TOKENS, len(stream))
    for start in sorted(rng.integers(0, len(stream) - length + 1, size=N_SAMPLES).tolist()) if length else []:
        ids = stream.read(start, length)
        shown = decode(ids.tolist()) if (ids < data.vocab_size).all() else ids.tolist()
        yield f"  token {start:,}: {shown}"
