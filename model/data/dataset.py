"""The data folder: what model/prepare_data.py writes, and what train.py and ``--check`` read.

A data folder holds, for each split ("train", and "val" where documents were held out),

    train-00000.npy             token ids, one after the other: 1-D, uint16 up to 65,536 ids of vocabulary, else uint32
    train-00000.documents.npy   int64, where each document of that shard ends (its first one starts at 0)
    tokenizer/                  the tokenizer that made the ids, so that an export needs no network
    manifest.json               what all of it is: sizes, counts, SHA-256 of every file, tokenizer, settings

A shard holds whole documents only: one that does not fit starts the next shard, one longer than a shard gets a larger
shard of its own. Nothing in the folder depends on time, place or machine: the same input gives the same bytes.

Read as well, by `open_dataset`: raw .bin files of token ids, as nanoGPT and ALLaMo (ids alone) and llm.c (behind a
header of 256 int32: a magic number, a version, the number of ids; many to a corpus) write them.
"""

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from halny.model.data.stream import DataError, FileArray, Shard, TokenStream, in_one_line
from halny.model.durable import in_its_words, sha256
from halny.model.hints import hint, is_lfs_pointer
from halny.model.tokenizer_files import (
    SpecialIds,
    is_tokenizer_file,
    makes_the_same_ids,
    special_ids,
    tokenizer_files,
)

FORMAT, VERSION = "halny-tokens", 1
SPLITS = ("train", "val")
CHUNK = 1 << 22  # tokens looked at in one go
AGAIN = "prepare it again with python -m halny.model.prepare_data"


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The content of a tokenizer's files by their names. DataError where `tokenizer_files` raises ValueError."""
    try:
        return {name: (folder / name).read_bytes() for name in tokenizer_files(folder)}
    except ValueError as error:
        raise DataError(str(error)) from None


def same_tokenizer(one: "Dataset", other: "Dataset") -> bool:
    """Whether the ids of two data folders mean the same tokens, so far as they say of what tokenizer they are."""
    if one.tokenizer is None or other.tokenizer is None:
        return True
    hashes = [dataset.manifest["tokenizer"]["sha256"] for dataset in (one, other)]
    if hashes[0] == hashes[1]:
        return True
    folders = [one.tokenizer, other.tokenizer]
    sound = [sha256(folder / "tokenizer.json") for folder in folders] == hashes
    return sound and makes_the_same_ids(*folders)  # as of one that was written by two versions of a library


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def to_json(value: dict, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def is_dataset(path: Path | list[Path]) -> bool:
    """Whether path is a data folder, and no list of raw files; whether it is a sound one, `Dataset` finds out."""
    return not isinstance(path, list) and (Path(path) / "manifest.json").is_file()


class Dataset:
    """A data folder: manifest, sizes, dtypes and shapes checked, and no file left open. `verify` reads the tokens too.

    fingerprint  a hash of vocabulary, dtype and all shards: another one means other tokens or another order of them
    tokenizer    the folder of the tokenizer that made the ids, or None
    special_ids  BOS and EOS that the documents got, else those of the tokenizer; and its padding
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        with in_one_line(self.path):
            self.manifest = manifest = self._read_manifest()
            self.vocab_size = manifest["vocab_size"]
            identity = [manifest[key] for key in ("format", "version", "vocab_size", "dtype")]
            identity.append({split: {k: x for k, x in record.items() if k != "bytes"} for split, record in
                             manifest["splits"].items()})  # fmt: skip
            self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            self.tokenizer = None
            if manifest["tokenizer"] is not None:
                self.tokenizer = self.path / "tokenizer"
                for record in manifest["tokenizer"]["files"]:
                    self._check_size(self.tokenizer / record["name"], record)
            self._streams = {split: self._open_split(split) for split in SPLITS}

    @cached_property
    def special_ids(self) -> SpecialIds:
        recorded = self.manifest["tokenizer"] or {}
        if "eos_id" in recorded or self.tokenizer is None:
            known = SpecialIds(*map(recorded.get, SpecialIds._fields))
        else:  # write_dataset records none, nor did older versions
            known = special_ids(self.tokenizer)
        return known._replace(**{name: i for name, i in self.manifest["document"].items() if i is not None})

    def split(self, name: str) -> TokenStream:
        """The stream of "train" or "val"; val may be empty."""
        if name not in SPLITS:
            raise DataError(f"a data folder has the splits {' and '.join(SPLITS)}, got {name!r}")
        return self._streams[name]

    def n_bytes(self, split: str) -> int | None:
        """The UTF-8 bytes of the documents' texts, without what stands around them; None if nobody counted them."""
        return self.manifest["splits"][split].get("bytes")

    @property
    def markers(self) -> tuple[int, ...]:
        """The ids around documents, which stand for no byte of their texts; none where texts may spell them out."""
        ids = (i for i in self.manifest["document"].values() if i is not None)
        return () if self.special_tokens else tuple(ids)

    @property
    def special_tokens(self) -> bool:
        """Whether --special-tokens prepared the folder, or one of those that it was merged from."""

        def asked(settings: dict) -> bool:
            return bool(settings.get("special_tokens")) or any(map(asked, settings.get("merged", ())))

        return asked(self.manifest["settings"])

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every byte of every parts-th file: DataError where one is not what the manifest says."""
        for path in self.changed_files(part, parts):
            raise DataError(f"{path}: its SHA-256 is not the manifest's, the file has changed; {AGAIN}")

    def changed_files(self, part: int = 0, parts: int = 1) -> Iterator[Path]:
        """Reads every byte of every parts-th file: those that are not what the manifest says."""
        shards = [shard for split in SPLITS for shard in self.manifest["splits"][split]["files"]]
        records = [(self.path, record) for shard in shards for record in (shard, shard["boundaries"])]
        if self.tokenizer is not None:
            records += [(self.tokenizer, record) for record in self.manifest["tokenizer"]["files"]]
        for folder, record in records[part::parts]:
            path = folder / record["name"]
            with in_one_line(path):
                changed = sha256(path) != record["sha256"]
            if changed:
                yield path

    def _read_manifest(self) -> dict:
        path = self.path / "manifest.json"
        if not path.is_file():
            raise DataError(f"{path}: missing, so {self.path} is no data folder; {AGAIN}, or name another")
        content = path.read_bytes()
        try:
            manifest = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({one_line(error)}); {AGAIN}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{path}: not the manifest of a halny data folder; {AGAIN}, or name another")
        if manifest.get("version") != VERSION:
            raise DataError(f"{path}: format version {manifest.get('version')!r}, this halny reads {VERSION}; {AGAIN}")
        try:
            _check_manifest(manifest)
        except (KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}: {reason}, the file is damaged; {AGAIN}") from error
        return manifest

    def _open_split(self, split: str) -> TokenStream:
        record = self.manifest["splits"][split]
        shards, hashes = [], {}
        for shard in record["files"]:
            tokens = self._open_array(shard, np.dtype(self.manifest["dtype"]), shard["tokens"])
            ends = self._open_array(shard["boundaries"], np.dtype(np.int64), shard["documents"])
            if (last := ends[-1]) != shard["tokens"]:
                raise DataError(
                    f"{ends.filename}: the last document ends at token {last}, the shard at {shard['tokens']}; {AGAIN}"
                )
            shards.append(Shard(tokens, ends))
            hashes[tokens.filename] = shard["sha256"]
        for what in ("tokens", "documents"):
            if record[what] != (total := sum(shard[what] for shard in record["files"])):
                raise DataError(
                    f"{self.path / 'manifest.json'}: {split} has {record[what]} {what} by its total and {total} by its "
                    f"shards; {AGAIN}"
                )
        return TokenStream(shards, hashes)

    def _open_array(self, record: dict, dtype: np.dtype, length: int) -> FileArray:
        path = self.path / record["name"]
        self._check_size(path, record)
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:  # of resources: the file may be sound
            raise
        except Exception as error:  # a damaged header makes numpy raise nearly anything, tokenize.TokenError too
            raise DataError(f"{path}: not a .npy file of numbers ({one_line(error)}); {AGAIN}") from error
        if not isinstance(loaded, np.ndarray) or loaded.dtype != dtype or loaded.shape != (length,):
            found = f"{loaded.dtype} of shape {loaded.shape}" if isinstance(loaded, np.ndarray) else "an archive"
            raise DataError(f"{path}: holds {found}, the manifest says {dtype} of shape ({length},); {AGAIN}")
        return FileArray(str(path.absolute()), dtype, loaded.offset, length)

    def _check_size(self, path: Path, record: dict) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; {AGAIN}")
        if (size := path.stat().st_size) != record["bytes"]:
            remedy = hint(path) or f" (cut short?); {AGAIN}"
            raise DataError(f"{path}: {size} bytes, the manifest says {record['bytes']}{remedy}")


# llm.c's dev/data/data_common.py: (magic number, version) -> dtype
LLM_C_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
LLM_C_HEADER_BYTES = 256 * 4


class RawDataset:
    """Token ids in raw .bin files, with the interface of `Dataset`, less the manifest.

    files        of "train", and of "val" if there are any: each split is one stream, in their order
    vocab_size   as given, else the whole range of the dtype; `verify` holds the ids to it
    hashes       SHA-256 of files by their absolute names, as `hash_files` finds them, so far as they are known
    fingerprint  a hash of dtype and all bytes; reads those files that ``hashes`` lacks when first asked for
    tokenizer    None: the files do not say, so no special_ids either
    A file has no document boundaries and so counts as one document.
    """

    tokenizer, special_ids, markers = None, SpecialIds(), ()

    def __init__(
        self,
        path: Path,
        files: dict[str, list[Path]],
        dtype: str | None = None,
        vocab_size: int | None = None,
        hashes: Mapping[str, str] | None = None,
    ):
        self.path, self._sha256 = path, dict(hashes or {})
        shards = {split: [_raw_array(file, dtype) for file in files.get(split, [])] for split in SPLITS}
        self._arrays = arrays = shards["train"] + shards["val"]
        self.files = [Path(array.filename) for array in arrays]
        self.dtype = arrays[0].dtype
        for other in arrays:
            if other.dtype != self.dtype:
                one = arrays[0].filename
                raise DataError(f"{one} holds {self.dtype}, {other.filename} {other.dtype}; they must be alike")
        most = np.iinfo(self.dtype).max + 1
        if vocab_size is not None and not 1 <= vocab_size <= most:
            raise DataError(f"{path}: a vocabulary of {vocab_size} does not fit {self.dtype}; give the right --dtype")
        self.vocab_size = vocab_size or most
        with in_one_line(path):
            self._streams = {
                split: TokenStream([Shard(array, np.array([len(array)])) for array in shards[split]], self._sha256)
                for split in SPLITS
            }

    def split(self, name: str) -> TokenStream:
        """The stream of "train" or "val"; val may be empty."""
        if name not in SPLITS:
            raise DataError(f"a dataset has the splits {' and '.join(SPLITS)}, got {name!r}")
        return self._streams[name]

    def n_bytes(self, split: str) -> None:
        """None: the files do not say what text the ids stand for."""

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads the parts-th share of the ids: DataError where one is outside the vocabulary.

        A raw file has no checksum of its own; that it is the same as before only `fingerprint` can tell.
        """
        for tokens in self._arrays:
            for start in range(part * CHUNK, len(tokens), parts * CHUNK):
                if (bad := int(tokens[start : start + CHUNK].max())) >= self.vocab_size:
                    where = start + int((tokens[start : start + CHUNK] == bad).argmax())
                    raise DataError(
                        f"{tokens.filename}: id {bad} at token {where} is outside the vocabulary of {self.vocab_size}; "
                        "give the right --dtype, or the model of these data"
                    )

    @cached_property
    def fingerprint(self) -> str:
        self._sha256 |= hash_files([file for file in self.files if str(file) not in self._sha256])
        hashes = [[self._sha256[shard.tokens.filename] for shard in self.split(name).shards] for name in SPLITS]
        if max(map(len, hashes)) == 1:  # as it was before there could be more
            hashes = hashes[0] + hashes[1]
        return hashlib.sha256(json.dumps([self.dtype.name, *hashes]).encode()).hexdigest()


def hash_files(files: Sequence[Path], show: bool = True) -> dict[str, str]:
    """The SHA-256 of each file by its name, with a bar where they are large."""
    out = {}
    with in_one_line(Path()):
        size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading the data", leave=False,
              disable=None if show and size > 1e9 else True) as bar:  # fmt: skip
        for file in files:
            with in_one_line(file):
                out[str(file)] = sha256(file, bar.update)
    return out


def _raw_array(path: Path, dtype: str | None) -> FileArray:
    if dtype not in (None, "uint16", "uint32"):
        raise DataError(f"--dtype {dtype}: {path} can hold uint16 or uint32; choose one")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({in_its_words(error)}); check the path") from error
    if is_lfs_pointer(path):
        raise DataError(f"{path}: no tokens yet{hint(path)}")
    offset, known = 0, LLM_C_HEADERS.get(tuple(header[:2].tolist()))
    if known is not None and size >= LLM_C_HEADER_BYTES:
        if dtype not in (None, known):
            raise DataError(f"--dtype {dtype}: {path} has the header of llm.c for {known}; leave the flag out")
        dtype, offset, told = known, LLM_C_HEADER_BYTES, int(header[2])
        if size != offset + told * np.dtype(dtype).itemsize:
            raise DataError(
                f"{path}: {size} bytes, its header says {told} tokens of {dtype} (cut short?); copy it again"
            )
    if dtype is None:
        raise DataError(
            f"{path}: a .bin file without a header does not say what it holds; give --dtype uint16 or uint32"
        )
    kind = np.dtype(dtype).newbyteorder("<")
    if (size - offset) % kind.itemsize:
        raise DataError(f"{path}: {size} bytes are no whole number of {dtype} (cut short?); check the file and --dtype")
    if size == offset:
        raise DataError(f"{path}: no tokens in it; name another")
    return FileArray(str(path.absolute()), kind, offset, (size - offset) // kind.itemsize)


def open_dataset(
    path: Path | list[Path],
    dtype: str | None = None,
    vocab_size: int | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Dataset | RawDataset:
    """A data folder; or raw .bin files: one, several, those that a pattern matches, or a folder of them.

    dtype, vocab_size and hashes are for raw files: "uint16" or "uint32", needed unless a header says so; what `verify`
    holds the ids to; and what is known of their content.
    """
    if files := raw_files(path):
        named = path if not isinstance(path, list) else path[0].parent
        return RawDataset(Path(named), _by_split(files), dtype, vocab_size, hashes)
    if dtype is not None:
        raise DataError(f"--dtype {dtype}: only raw .bin files need it, and {path} is none; leave the flag out")
    return Dataset(path)


def raw_files(path: Path | list[Path]) -> list[Path]:
    """The .bin files that a source stands for, by name; none if it is a data folder, or to be one."""
    if isinstance(path, list):
        if twice := [file for file, n in Counter(path).items() if n > 1]:
            raise DataError(f"{twice[0]} is named twice; name it once")
        return sorted(path)
    path = Path(path)
    with in_one_line(path):
        if path.is_dir():
            files = [] if is_dataset(path) else sorted(path.glob("*.bin"))
            usual = [path / "train.bin", path / "val.bin"]  # nanoGPT's, beside which others may lie
            return [file for file in files if file in usual] if usual[0] in files else files
        if path.suffix != ".bin":
            return []
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        return matches or [path]


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Those for training and those held out, by "train" and "val" in their names; all for training if none differ."""
    kinds = {"train": [], "val": [], "": []}
    for file in files:
        word = re.search(r"(?<![a-z])(train|val)(id|idation)?(?![a-z])", file.stem.lower())
        kinds[word[1] if word else ""].append(file)
    if kinds["train"] and kinds["val"] and not kinds[""]:
        return kinds
    if len(files) in map(len, kinds.values()):
        return {"train": files}
    raise DataError(f"{kinds[''][0]}: neither train nor val is in its name, as in others'; name only those that belong")


def _check_manifest(manifest: dict) -> None:
    """KeyError or TypeError, saying what, unless every key that a reader relies on is there and sane."""

    def count(record: dict, key: str, least: int = 0) -> int:
        if isinstance(value := record[key], bool) or not isinstance(value, int) or value < least:
            raise TypeError(f"{key} is {value!r}, which is no count")
        return value

    def check_file(record: dict, names: Iterable[str]) -> None:
        if record["name"] not in names:
            raise TypeError(f"{record['name']!r} is no name of a file there")
        count(record, "bytes")
        if not isinstance(record["sha256"], str):
            raise TypeError(f"the sha256 of {record['name']} is no text")

    dtype = manifest["dtype"]
    if dtype not in ("uint16", "uint32") or count(manifest, "vocab_size", 1) > np.iinfo(dtype).max + 1:
        raise TypeError(f"dtype {dtype!r} does not fit a vocabulary of {manifest['vocab_size']!r}")
    for key in ("bos_id", "eos_id"):
        if manifest["document"][key] is not None:
            count(manifest["document"], key)
    if not isinstance(manifest["settings"], dict):
        raise TypeError("settings is no object")
    if manifest["tokenizer"] is not None:
        if not isinstance(manifest["tokenizer"]["sha256"], str):
            raise TypeError("the sha256 of the tokenizer is no text")
        for name in SpecialIds._fields:
            if manifest["tokenizer"].get(name) is not None:
                count(manifest["tokenizer"], name)
        for record in manifest["tokenizer"]["files"]:
            check_file(record, [record["name"]] if is_tokenizer_file(record["name"]) else [])
    for record in manifest.get("sources", []):  # which, as "input", write_dataset and older versions leave out
        count(record, "documents")
        count(record, "tokens")
        count({"bytes": 0} | record, "bytes")  # which versions before this one did not count
        if not isinstance(record["name"], str):
            raise TypeError(f"a source's name is {record['name']!r}")
    if counts := manifest.get("input"):
        count(counts, "documents")
        for reason in [*counts.get("dropped", {}), *counts["skipped"]]:
            count(counts["skipped"] if reason in counts["skipped"] else counts["dropped"], reason)
    for split in SPLITS:
        record = manifest["splits"][split]
        count(record, "documents")
        count(record, "tokens")
        count({"bytes": 0} | record, "bytes")
        for i, shard in enumerate(record["files"]):
            check_file(shard, [f"{split}-{i:05d}.npy"])
            check_file(shard["boundaries"], [f"{split}-{i:05d}.documents.npy"])
            count(shard, "tokens", 1)
            count(shard, "documents", 1)
