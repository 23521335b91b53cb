"""Writing a folder of token shards, in dataset.py's format: all of it appears at once under its name, or nothing does.

The folder is written beside its final name as ``.NAME.partial``, each file synced, the manifest last, and then renamed.
The partial folder is locked while its process lives (flock on the directory itself, so that there is no lock file to
leave behind); a dead one's is emptied and used, unless there is something to go on from (model/data/resume.py).
"""

import fcntl
import hashlib
import importlib.metadata
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from halny.model.data.dataset import FORMAT, SPLITS, VERSION, DataError, read_tokenizer_files, to_json, token_dtype
from halny.model.durable import sha256, sync
from halny.model.tokenizer_files import SpecialIds

SHARD_TOKENS = 2**27
UNFINISHED = "unfinished.json"  # of a partial folder that a preparation can go on from


def write_dataset(
    documents: Iterable[np.ndarray],
    out: Path,
    *,
    vocab_size: int,
    val_documents: Iterable[np.ndarray] = (),
    tokenizer: Path | None = None,
    settings: dict | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Token ids straight to a data folder: 1-D integer arrays, one a document, written as they are (no BOS, no EOS).

    `tokenizer` is a folder whose files are copied along. Raises DataError on ids outside the vocabulary.
    """
    out, shard_tokens = check_out(out), check_shard_tokens(shard_tokens)
    files = {} if tokenizer is None else read_tokenizer_files(Path(tokenizer))
    if tokenizer is not None and "tokenizer.json" not in files:
        raise DataError(f"{tokenizer}: no tokenizer.json in it; name a folder that holds a fast tokenizer")
    empty = 0
    with new_folder(out) as folder, Writer(folder, vocab_size, shard_tokens) as writer:
        for split, stream in zip(SPLITS, (documents, val_documents), strict=True):
            for ids in stream:
                ids = np.asarray(ids)
                empty += ids.ndim == 1 and not len(ids)
                writer.add(split, ids)
        if not writer.documents["train"]:
            raise DataError(f"no documents to write to {out}; give some to train on")
        counts = {
            "input": {"documents": writer.total("documents") + empty, "skipped": {"empty": empty} if empty else {}}
        }
        name = None if tokenizer is None else Path(tokenizer).resolve().name
        writer.finish(name, files, {"bos_id": None, "eos_id": None}, settings or {}, counts)


def check_out(out: Path) -> Path:
    """The folder to write, absolute; DataError where it is taken or could not be made. Writes nothing."""
    path = Path(out).resolve()
    if path.is_dir():
        if any(path.iterdir()):
            raise DataError(f"--out {out}: exists and is not empty; remove it or choose another")
    elif path.exists():
        raise DataError(f"--out {out}: exists and is not a folder; choose another")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--out {out}: {parent} is not a folder that can be written; choose another place")
    return path


def check_shard_tokens(shard_tokens: int) -> int:
    if isinstance(shard_tokens, bool) or not isinstance(shard_tokens, int) or shard_tokens < 1:
        raise DataError(
            f"--shard-tokens {shard_tokens}: must be a positive number of tokens, for example {SHARD_TOKENS}"
        )
    return shard_tokens


@contextmanager
def new_folder(out: Path, resumes: bool = False) -> Iterator[Path]:
    """A locked, empty folder beside `out` that takes its name on leaving, or vanishes on an exception.

    What holds an UNFINISHED neither vanishes nor is emptied; only who `resumes` gets it.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    partial, lock = out.with_name(f".{out.name}.partial"), None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        if not _locked(lock, partial):
            raise DataError(f"--out {out}: another process is preparing it now; wait for that or choose another")
        if not (partial / UNFINISHED).exists():
            for leftover in partial.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        elif not resumes:
            remedy = "finish it by its own command, or remove that folder"
            raise DataError(f"--out {out}: {partial} holds an interrupted preparation; {remedy}")
        try:
            yield partial
            sync(partial)
            os.rename(partial, out)  # replaces an empty folder, refuses any other
            sync(out.parent)
        except BaseException:
            if not (partial / UNFINISHED).exists():
                shutil.rmtree(partial, ignore_errors=True)
                with suppress(OSError):
                    for parent in missing:
                        parent.rmdir()
            raise
    except OSError as error:
        refused = DataError(f"--out {out}: cannot be written ({error.strerror}); make room or choose another")
        for note in getattr(error, "__notes__", []):
            refused.add_note(note)
        raise refused from error
    finally:
        if lock is not None:
            os.close(lock)


def _locked(lock: int, folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(folder).st_ino == os.fstat(lock).st_ino  # else its process renamed it since we opened it
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # some network file systems lock no folders: there, one preparation at a time is up to the user


class Writer:
    """Shards, document ends and at last the manifest of both splits, into a folder."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int):
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
            raise DataError(f"vocab_size must be between 1 and 2**32, got {vocab_size!r}")
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.open: dict[str, tuple[GrowingArray, GrowingArray]] = {}  # split -> tokens, and the ends of its documents
        self.shards = {split: [] for split in SPLITS}
        self.documents = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        for array in (array for arrays in self.open.values() for array in arrays):
            with suppress(OSError):  # of a full disk, which was said before
                array.file.close()

    def total(self, what: str) -> int:
        return sum(getattr(self, what).values())

    def add(self, split: str, ids: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Documents one after the other in `ids`, each of its length and none empty; without lengths it is one."""
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"a document must be a 1-D array of integers, got {ids.dtype} of shape {ids.shape}")
        ends = np.array([len(ids)]) if lengths is None else np.cumsum(lengths, dtype=np.int64)
        if not len(ids):
            return
        if (bad := ids.min()) < 0 or (bad := ids.max()) >= self.vocab_size:
            number = self.total("documents") + int(np.searchsorted(ends, np.flatnonzero(ids == bad)[0], side="right"))
            where = f"document {number}: token id {bad}"
            raise DataError(f"{where} is outside the vocabulary of {self.vocab_size}; check the tokenizer's files")
        first = begin = 0  # the first document that is not yet written, and the token where it begins
        while first < len(ends):
            full = self.open[split][0].length if split in self.open else 0
            last = int(np.searchsorted(ends, begin + self.shard_tokens - full, side="right"))  # those before it fit
            if last <= first and full:
                self._close(split)
                continue
            last = max(last, first + 1)
            if split not in self.open:
                self.open[split] = self._arrays(split)
            tokens, shard_ends = self.open[split]
            end = int(ends[last - 1])
            tokens.append(ids[begin:end])
            shard_ends.append(ends[first:last] - begin + full)
            self.documents[split] += last - first
            self.tokens[split] += end - begin
            first, begin = last, end

    def take_last(self, split: str) -> np.ndarray:
        """The last document, which is taken out again."""
        tokens, ends = self.open[split]
        last_two = ends.take(max(ends.length - 2, 0))
        ends.append(last_two[:-1])
        ids = tokens.take(int(last_two[0]) if len(last_two) == 2 else 0)
        self.documents[split] -= 1
        self.tokens[split] -= len(ids)
        if not ends.length:
            for array in self.open.pop(split):
                array.file.close()
                array.path.unlink()
        return ids

    def sync(self) -> None:
        """All that was added is on the disk."""
        for arrays in self.open.values():
            for array in arrays:
                array.file.flush()
                os.fsync(array.file.fileno())

    def state(self) -> dict:
        """For JSON; `restore` takes it back, in a folder where more may have been added since."""
        lengths = {split: [array.length for array in arrays] for split, arrays in self.open.items()}
        return {"open": lengths, "shards": self.shards, "documents": self.documents, "tokens": self.tokens}

    def restore(self, state: dict) -> set[str]:
        """The names of the files that belong to it; ValueError if one of them is too short."""
        self.shards, self.documents, self.tokens = state["shards"], state["documents"], state["tokens"]
        records = [
            record for split in SPLITS for shard in self.shards[split] for record in (shard, shard["boundaries"])
        ]
        for record in records:
            if (size := (self.folder / record["name"]).stat().st_size) != record["bytes"]:
                raise ValueError(f"{record['name']} has {size} bytes, not {record['bytes']}")
        for split, lengths in state["open"].items():
            self.open[split] = self._arrays(split, *lengths)
        files = [array.path.name for arrays in self.open.values() for array in arrays]
        return {*files, *(record["name"] for record in records)}

    def _arrays(self, split: str, n_tokens: int = 0, n_documents: int = 0) -> "tuple[GrowingArray, GrowingArray]":
        path = self.folder / f"{split}-{len(self.shards[split]):05d}.npy"
        ends = path.with_suffix(".documents.npy")
        return GrowingArray(path, self.dtype, n_tokens), GrowingArray(ends, np.dtype("<i8"), n_documents)

    def _close(self, split: str) -> None:
        tokens, ends = self.open.pop(split)
        for array in (tokens, ends):
            array.finish()
        counts = {"tokens": tokens.length, "documents": ends.length}
        self.shards[split].append({**self._record(tokens.path), **counts, "boundaries": self._record(ends.path)})

    def _record(self, path: Path) -> dict:
        sync(path)
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def finish(
        self,
        tokenizer: str | None,  # its name
        files: dict[str, bytes],
        document: dict,
        settings: dict,
        counts: dict | None = None,
        special: SpecialIds | None = None,  # of the tokenizer, where they are known
        n_bytes: dict[str, int] | None = None,  # of the texts of each split in UTF-8, where that is known
    ) -> None:
        for split in list(self.open):
            self._close(split)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"halny {tool_version()}",
            "vocab_size": self.vocab_size,
            "dtype": self.dtype.name,
            "document": document,  # the ids before and after each; null for none, or for whatever the caller wrote
            "tokenizer": None,
            "settings": settings,
            **(counts or {}),  # of the input: what became of its documents
            "splits": {
                split: {
                    "documents": self.documents[split],
                    "tokens": self.tokens[split],
                    **({"bytes": n_bytes[split]} if n_bytes else {}),
                    "files": self.shards[split],
                }
                for split in SPLITS
            },
        }
        if files:
            folder = self.folder / "tokenizer"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            records = [{**self._record(folder / name), "name": name} for name in sorted(files)]
            digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
            ids = special._asdict() if special else {}
            manifest["tokenizer"] = {"name": tokenizer, "sha256": digest, **ids, "files": records}
            sync(folder)
        (self.folder / "manifest.json").write_bytes(to_json(manifest, indent=1))
        sync(self.folder / "manifest.json")


class GrowingArray:
    """A 1-D .npy file to append to, whose header has the right length when it is finished."""

    def __init__(self, path: Path, dtype: np.dtype, length: int = 0):
        """Of `length` values that the file has already; what follows those is cut off."""
        self.path, self.dtype, self.length = path, dtype, length
        self.file = open(path, "r+b" if length else "w+b")  # noqa: SIM115 see finish
        self.file.write(_npy_header(dtype, 0))
        if (size := path.stat().st_size) < self._at(length) and length:
            raise ValueError(f"{path.name} has {size} bytes, not {self._at(length)} or more")
        self.file.seek(self._at(length))
        self.file.truncate()

    def _at(self, index: int) -> int:
        return len(_npy_header(self.dtype, 0)) + index * self.dtype.itemsize

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def take(self, start: int) -> np.ndarray:
        """The values from `start` on, which are cut off."""
        self.file.seek(self._at(start))
        values = np.frombuffer(self.file.read(), self.dtype)
        self.file.seek(self._at(start))
        self.file.truncate()
        self.length = start
        return values

    def finish(self) -> None:
        with self.file:
            self.file.seek(0)
            self.file.write(_npy_header(self.dtype, self.length))


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    """The head of a 1-D .npy file: numpy leaves room for the length to grow, so that it has the same size for any."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


def tool_version() -> str:
    try:
        return importlib.metadata.version("halny")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
