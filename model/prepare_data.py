"""Text to token shards: ``python -m halny.model.prepare_data INPUT... --out DIR``, and the reader of what it writes.

A data folder holds, for each split ("train", and "val" where documents were held out),

    train-00000.npy             token ids, one after the other: 1-D, uint16 up to 65,536 ids of vocabulary, else uint32
    train-00000.documents.npy   int64, where each document of that shard ends (its first one starts at 0)
    tokenizer/                  the tokenizer that made the ids, so that an export needs no network
    manifest.json               what all of it is: sizes, counts, SHA-256 of every file, tokenizer, settings

A document is BOS + ids + EOS, and a shard holds whole documents only: one that does not fit starts the next shard, one
longer than a shard gets a larger shard of its own. Text is data: "</s>" written in a document is four characters, never
the end of it. Held-out documents are chosen by a hash of their text, so neither order nor company matters. Nothing in
the folder depends on time, place or machine: the same input gives the same bytes.

The folder is written beside its final name as ``.NAME.partial``, each file synced, the manifest last, and then renamed:
under the final name it is complete or absent. The partial folder is locked while its process lives (flock on the
directory itself, so that there is no lock file to leave behind); a dead one's is emptied and used.

**Mistral-7B-v0.1's tokenizer** comes as a SentencePiece model (mistral-common ships it), and transformers 5 reads such
a lone file wrongly: without the leading "▁", without BOS, and merging by id where SentencePiece merges by score. All
pieces of spaces only have the score -1e9, so "▁▁", id 259, must merge last and not first: "\\n  x" is 28705 13 28705
1318 and not 13 259 28744. So the fast tokenizer is made here, with its merges by falling score. Among equal scores
SentencePiece takes the leftmost pair, which a list of merges cannot say; ordering them by the length of the left half,
longest first, comes to the same (shortest first gets a run of 16 spaces wrong). tests/test_data.py holds it to
SentencePiece; once AutoTokenizer on the lone file passes there, all this can go. Tokenizer folders of users are read
from their tokenizer.json as it stands, since for some classes ("LlamaTokenizer") transformers 5 rebuilds the rest by
its own rules; the copy saved with the data says so.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import operator
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halny.model.durable import sha256, sync

FORMAT, VERSION = "halny-tokens", 1
SPLITS = ("train", "val")
ENDINGS = (".txt", ".jsonl")
MISTRAL = "mistral-v0.1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"  # of its tokenizer.model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BATCH_CHARACTERS = 1 << 21  # a call of the tokenizer, whose encodings take some 100 bytes a token until written
BATCH_DOCUMENTS = 8192
BUILTIN_VAL_FRACTION = 0.08
AGAIN = "prepare it again with python -m halny.model.prepare_data"


class DataError(ValueError):
    """Input, output or a data folder that cannot be used: one line that names the file and what to do."""


# --- tokenizers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    name: str
    files: dict[str, bytes]  # what is saved with the data; tokenizer.json is among them and makes the ids
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encoder(self):
        """The `tokenizers` backend: no truncation or padding, and no special tokens found in text."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.files["tokenizer.json"].decode())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as text, that is
        return backend


def load_tokenizer(tokenizer: str | Path) -> Tokenizer:
    """The tokenizer of a folder that holds a tokenizer.json, or Mistral-7B-v0.1's own by the name "mistral-v0.1"."""
    if str(tokenizer) == MISTRAL:
        return mistral_tokenizer()
    folder = Path(tokenizer)
    if not folder.is_dir():
        raise DataError(f"--tokenizer {tokenizer}: no such folder; name one, or use --tokenizer {MISTRAL}")
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"--tokenizer {tokenizer}: no tokenizer.json in it, and only fast tokenizers are read; save one there with "
            f"save_pretrained of transformers, or use --tokenizer {MISTRAL}"
        )
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # advice about regular expressions and missing frameworks is not for our users
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        with tempfile.TemporaryDirectory() as saved:
            loaded.save_pretrained(saved)
            files = _tokenizer_files(Path(saved))
    except Exception as error:  # a broken file makes transformers and tokenizers raise nearly anything
        raise DataError(
            f"--tokenizer {tokenizer}: cannot be read ({_line(error)}); save it again or name another"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    for key in ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file"):
        config.pop(key, None)  # about this machine, not about the tokenizer
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it stands
    files["tokenizer_config.json"] = _json(config)
    return Tokenizer(folder.resolve().name, files, len(loaded), loaded.bos_token_id, loaded.eos_token_id)


def mistral_tokenizer() -> Tokenizer:
    """Mistral-7B-v0.1's tokenizer, exact to the id, from the SentencePiece model inside mistral-common."""
    spec = importlib.util.find_spec("mistral_common")  # finds without importing: the package is slow to import
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1" if spec and spec.origin else None
    if model is None or not model.is_file() or sha256(model) != MISTRAL_SHA256:
        raise DataError(
            f"--tokenizer {MISTRAL}: data/tokenizer.model.v1 of the package mistral-common is missing or not the one "
            "of Mistral-7B-v0.1; pip install -U mistral-common, or name a tokenizer folder"
        )
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    sp = SentencePieceProcessor(model_file=str(model))
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    # Only ordinary pieces merge: text that spells "<s>" or "<0x0A>" stays text.
    ordinary = [i for i in range(len(pieces)) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    score = {pieces[i]: sp.get_score(i) for i in ordinary}
    merges = [(p[:k], p[k:]) for p in score for k in range(1, len(p)) if p[:k] in score and p[k:] in score]
    merges.sort(key=lambda merge: (-score[merge[0] + merge[1]], -len(merge[0])))

    unk, bos, eos = (pieces[i] for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, sp.bos_id())]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (unk, bos, eos)])
    config = {
        # Not "LlamaTokenizer": transformers 5 would rebuild the pipeline by its own rules (see the head of this file).
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
    }
    files = {"tokenizer.json": fast.to_str().encode(), "tokenizer_config.json": _json(config)}
    return Tokenizer(MISTRAL, files, len(pieces), sp.bos_id(), sp.eos_id())


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


# --- documents --------------------------------------------------------------------------------------------------------


def find_files(inputs: Iterable[Path]) -> tuple[list[Path], int]:
    """The .txt and .jsonl files that inputs name, folders walked in sorted order, and how many others folders hold."""
    files, ignored = [], 0
    for name in map(Path, inputs):
        if name.is_dir():
            found = sorted(path for path in name.rglob("*") if path.is_file())
            kept = [path for path in found if path.suffix.lower() in ENDINGS and not _is_hidden(path, name)]
            files, ignored = files + kept, ignored + len(found) - len(kept)
        elif not name.is_file():
            raise DataError(f"{name}: no such file or folder; check the path")
        elif name.suffix.lower() not in ENDINGS:
            raise DataError(f"{name}: the ending {name.suffix!r} is not supported; give {' or '.join(ENDINGS)} files")
        else:
            files.append(name)
    seen = set()
    for file in files:
        if not os.access(file, os.R_OK):
            raise DataError(f"{file}: not readable; check its permissions")
        if (real := file.resolve()) in seen:
            raise DataError(f"{file}: named twice among the inputs, which would double its documents; name it once")
        seen.add(real)
    if not files:
        raise DataError(f"no {' or '.join(ENDINGS)} files in {', '.join(map(str, inputs)) or 'the inputs'}; name some")
    return files, ignored


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[tuple[str, int]]:
    """Yields (text, bytes of the file it took) of each document; DataError names file and line."""
    for file in files:
        is_text = file.suffix.lower() == ".txt"
        try:
            with open(file, "rb") as stream:
                for number, raw in enumerate([stream.read()] if is_text else stream, start=1):
                    text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, file, number)
                    if is_text:
                        yield text, len(raw)
                    elif text.strip():  # a blank line is no document
                        yield _text_of_line(text, text_key, f"{file}:{number}"), len(raw)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); check the file or leave it out") from error


def _decode(raw: bytes, file: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        byte = f"byte 0x{raw[error.start]:02x}"
        raise DataError(
            f"{file}:{line}: not valid UTF-8 ({byte}); convert the file with iconv or leave it out"
        ) from None


def _text_of_line(line: str, text_key: str, where: str) -> str:
    mend = "mend or remove the line"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not valid JSON ({reason}); {mend}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__} where an object was expected; {mend}")
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(f"{where}: no key {text_key!r} (keys of this line: {keys}); name the right one with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{where}: {text_key!r} is of type {kind}, not a string; {mend}, or name another --text-key")
    if lone := re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: {text_key!r} holds the lone surrogate \\u{ord(lone.group()):04x}; {mend}")
    return text


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a pure function of its text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < val_fraction * 2.0**64


# --- writing ----------------------------------------------------------------------------------------------------------


def prepare(
    inputs: list[Path],
    out: Path,
    tokenizer: str | Path = MISTRAL,
    *,
    text_key: str = "text",
    val_fraction: float = 0.005,
    shard_tokens: int = 2**27,
    progress: bool = True,
) -> None:
    """Tokenizes .txt files (a document each), .jsonl files (a document a line) and folders of them into a data folder.

    Raises DataError, naming file, line and remedy, and then leaves nothing behind. Memory depends on the largest
    document, not on the corpus.
    """
    if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: must be at least 0 and less than 1, for example 0.005")
    files, ignored = find_files(inputs)
    settings = {"text_key": text_key, "val_fraction": val_fraction, "shard_tokens": shard_tokens}
    size = sum(file.stat().st_size for file in files)
    _prepare(read_documents(files, text_key), out, tokenizer, settings, size if progress else None, ignored)


def prepare_builtin(out: Path) -> None:
    """The corpus that every CPython carries: its language reference, a document a topic, with Mistral's tokenizer."""
    from pydoc_data.topics import topics

    documents = ((topics[name], 0) for name in sorted(topics))
    source = f"pydoc_data.topics of Python {platform.python_version()}"
    settings = {"source": source, "val_fraction": BUILTIN_VAL_FRACTION, "shard_tokens": 2**27}
    _prepare(documents, out, MISTRAL, settings, None)


def _prepare(
    documents: Iterator[tuple[str, int]],
    out: Path,
    tokenizer: str | Path,
    settings: dict,
    total_bytes: int | None,  # of the input, for the progress bar; None for silence
    ignored: int = 0,
) -> None:
    from tqdm import tqdm

    began, out = time.monotonic(), check_out(out)
    shard_tokens = _check_shard_tokens(settings["shard_tokens"])
    tokenizer = load_tokenizer(tokenizer)
    encoder = tokenizer.encoder()
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    quiet = total_bytes is None or not sys.stderr.isatty()
    with (
        _new_folder(out) as folder,
        _Writer(folder, tokenizer.vocab_size, shard_tokens) as writer,
        tqdm(total=total_bytes, unit="B", unit_scale=True, disable=quiet, desc="prepare_data") as bar,
    ):
        for batch in _batches(documents):
            encodings = encoder.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (text, _), encoding in zip(batch, encodings, strict=True):
                ids = np.array(head + encoding.ids + tail if text else [], dtype=np.int64)
                writer.add("val" if held_out(text, settings["val_fraction"]) else "train", ids)
            bar.update(sum(size for _, size in batch))
            bar.set_postfix_str(f"{writer.total('documents'):,} documents, {writer.total('tokens'):,} tokens")
        documents, val, tokens = writer.total("documents"), writer.documents["val"], writer.total("tokens")
        if not documents:
            raise DataError(f"no documents in the input ({writer.empty:,} empty ones); add some text")
        if val == documents:
            fraction = settings["val_fraction"]
            raise DataError(f"--val-fraction {fraction}: holds out all of {documents} documents; choose a smaller one")
        policy = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        writer.finish(tokenizer.name, tokenizer.files, policy, settings)
    if total_bytes is not None:
        empty = f", {writer.empty:,} empty ones skipped" if writer.empty else ""
        others = f"; {ignored:,} files of other endings or hidden ignored" if ignored else ""
        print(
            f"prepare_data: {out}: {documents:,} documents ({val:,} held out{empty}), {tokens:,} tokens, from "
            f"{total_bytes / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s{others}",
            file=sys.stderr,
        )


def _batches(documents: Iterator[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_dataset(
    documents: Iterable[np.ndarray],
    out: Path,
    *,
    vocab_size: int,
    val_documents: Iterable[np.ndarray] = (),
    tokenizer: Path | None = None,
    settings: dict | None = None,
    shard_tokens: int = 2**27,
) -> None:
    """Token ids straight to a data folder: 1-D integer arrays, one a document, written as they are (no BOS, no EOS).

    `tokenizer` is a folder whose files are copied along. Raises DataError on ids outside the vocabulary.
    """
    out, shard_tokens = check_out(out), _check_shard_tokens(shard_tokens)
    files = {} if tokenizer is None else _tokenizer_files(Path(tokenizer))
    if tokenizer is not None and "tokenizer.json" not in files:
        raise DataError(f"{tokenizer}: no tokenizer.json in it; name a folder that holds a fast tokenizer")
    with _new_folder(out) as folder, _Writer(folder, vocab_size, shard_tokens) as writer:
        for split, stream in zip(SPLITS, (documents, val_documents), strict=True):
            for ids in stream:
                writer.add(split, np.asarray(ids))
        if not writer.documents["train"]:
            raise DataError(f"no documents to write to {out}; give some to train on")
        name = None if tokenizer is None else Path(tokenizer).resolve().name
        writer.finish(name, files, {"bos_id": None, "eos_id": None}, settings or {})


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


def _check_shard_tokens(shard_tokens: int) -> int:
    if isinstance(shard_tokens, bool) or not isinstance(shard_tokens, int) or shard_tokens < 1:
        raise DataError(f"--shard-tokens {shard_tokens}: must be a positive number of tokens, for example {2**27}")
    return shard_tokens


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A locked, empty folder beside `out` that takes its name on leaving, or vanishes on an exception."""
    missing = [parent for parent in out.parents if not parent.exists()]
    partial, lock = out.with_name(f".{out.name}.partial"), None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        if not _locked(lock, partial):
            raise DataError(f"--out {out}: another process is preparing it now; wait for that or choose another")
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield partial
            sync(partial)
            os.rename(partial, out)  # replaces an empty folder, refuses any other
            sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for parent in missing:
                    parent.rmdir()
            raise
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror}); make room or choose another") from error
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


class _Writer:
    """Shards, document ends and at last the manifest of both splits, into a folder."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int):
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
            raise DataError(f"vocab_size must be between 1 and 2**32, got {vocab_size!r}")
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.open = {}  # split -> (file, ends of its documents so far)
        self.shards = {split: [] for split in SPLITS}
        self.documents = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.empty = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception) -> None:
        for file, _ in self.open.values():
            file.close()

    def total(self, what: str) -> int:
        return sum(getattr(self, what).values())

    def add(self, split: str, ids: np.ndarray) -> None:
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"a document must be a 1-D array of integers, got {ids.dtype} of shape {ids.shape}")
        if not len(ids):
            self.empty += 1
            return
        if (bad := ids.min()) < 0 or (bad := ids.max()) >= self.vocab_size:
            where = f"document {self.total('documents')}: token id {bad}"
            raise DataError(f"{where} is outside the vocabulary of {self.vocab_size}; check the tokenizer's files")
        if split in self.open and self.open[split][1][-1] + len(ids) > self.shard_tokens:
            self._close(split)
        if split not in self.open:
            file = open(self.folder / f"{split}-{len(self.shards[split]):05d}.npy", "wb")  # noqa: SIM115 closed by _close
            file.write(_npy_header(self.dtype, 0))  # the real one follows when the length is known
            self.open[split] = (file, array("q"))
        file, ends = self.open[split]
        file.write(ids.astype(self.dtype).tobytes())
        ends.append((ends[-1] if ends else 0) + len(ids))
        self.documents[split] += 1
        self.tokens[split] += len(ids)

    def _close(self, split: str) -> None:
        file, ends = self.open.pop(split)
        with file:
            file.seek(0)
            file.write(_npy_header(self.dtype, ends[-1]))
        path = Path(file.name)
        boundaries = path.with_suffix(".documents.npy")
        np.save(boundaries, np.array(ends, dtype="<i8"), allow_pickle=False)
        self.shards[split].append(
            {**self._record(path), "tokens": ends[-1], "documents": len(ends), "boundaries": self._record(boundaries)}
        )

    def _record(self, path: Path) -> dict:
        sync(path)
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def finish(self, tokenizer: str | None, files: dict[str, bytes], document: dict, settings: dict) -> None:
        for split in list(self.open):
            self._close(split)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"halny {_tool_version()}",
            "vocab_size": self.vocab_size,
            "dtype": self.dtype.name,
            "document": document,  # the ids before and after each; null for none, or for whatever the caller wrote
            "tokenizer": None,
            "settings": settings,
            "empty_documents_skipped": self.empty,
            "splits": {
                split: {"documents": self.documents[split], "tokens": self.tokens[split], "files": self.shards[split]}
                for split in SPLITS
            },
        }
        if files:
            folder = self.folder / "tokenizer"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            records = [self._record(folder / name) for name in sorted(files)]
            digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
            manifest["tokenizer"] = {"name": tokenizer, "sha256": digest, "files": records}
            sync(folder)
        (self.folder / "manifest.json").write_bytes(_json(manifest, indent=1))
        sync(self.folder / "manifest.json")


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    """The head of a 1-D .npy file: numpy leaves room for the length to grow, so that it has the same size for any."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json(value: dict, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def _tool_version() -> str:
    try:
        return importlib.metadata.version("halny")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# --- reading ----------------------------------------------------------------------------------------------------------


def is_dataset(path: Path) -> bool:
    """Whether path is a data folder; whether it is a sound one, `Dataset` finds out."""
    return (Path(path) / "manifest.json").is_file()


class TokenStream:
    """The tokens of a split, all shards as one stream, memory-mapped."""

    def __init__(self, shards: list[np.ndarray], n_documents: int):
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.n_documents = n_documents

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length as int64, across shards; IndexError where the stream has no such tokens."""
        start, length = operator.index(start), operator.index(length)
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
        out = np.empty(length, dtype=np.int64)
        shard, done = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while done < length:
            offset = start + done - int(self._starts[shard])
            part = self._shards[shard][offset : offset + length - done]
            out[done : done + len(part)] = part
            shard, done = shard + 1, done + len(part)
        return out


class Dataset:
    """A data folder, opened: manifest, sizes, dtypes and shapes checked, tokens mapped. `verify` reads them too.

    fingerprint  a hash of vocabulary, dtype and all shards: another one means other tokens or another order of them
    tokenizer    the folder of the tokenizer that made the ids, or None
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.manifest = manifest = self._read_manifest()
        self.vocab_size = manifest["vocab_size"]
        identity = [manifest[key] for key in ("format", "version", "vocab_size", "dtype", "splits")]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.tokenizer = None
        if manifest["tokenizer"] is not None:
            self.tokenizer = self.path / "tokenizer"
            for record in manifest["tokenizer"]["files"]:
                self._check_size(self.tokenizer / record["name"], record)
        self._streams = {split: self._open_split(split) for split in SPLITS}

    def split(self, name: str) -> TokenStream:
        """The stream of "train" or "val"; val may be empty."""
        if name not in SPLITS:
            raise DataError(f"a data folder has the splits {' and '.join(SPLITS)}, got {name!r}")
        return self._streams[name]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every byte of every parts-th file: DataError where one is not what the manifest says."""
        shards = [shard for split in SPLITS for shard in self.manifest["splits"][split]["files"]]
        records = [(self.path, record) for shard in shards for record in (shard, shard["boundaries"])]
        if self.tokenizer is not None:
            records += [(self.tokenizer, record) for record in self.manifest["tokenizer"]["files"]]
        for folder, record in records[part::parts]:
            path = folder / record["name"]
            if sha256(path) != record["sha256"]:
                raise DataError(f"{path}: its SHA-256 is not the manifest's, the file has changed; {AGAIN}")

    def _read_manifest(self) -> dict:
        path = self.path / "manifest.json"
        if not path.is_file():
            raise DataError(f"{path}: missing, so {self.path} is no data folder; {AGAIN}, or name another")
        try:
            manifest = json.loads(path.read_bytes().decode())
        except (ValueError, RecursionError, OSError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({_line(error)}); {AGAIN}") from error
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
        shards = []
        for shard in record["files"]:
            shards.append(self._open_array(shard, np.dtype(self.manifest["dtype"]), shard["tokens"]))
            ends = self._open_array(shard["boundaries"], np.dtype(np.int64), shard["documents"])
            if ends[-1] != shard["tokens"]:
                raise DataError(
                    f"{self.path / shard['boundaries']['name']}: the last document ends at token {ends[-1]}, the shard "
                    f"at {shard['tokens']}; {AGAIN}"
                )
        for what in ("tokens", "documents"):
            if record[what] != (total := sum(shard[what] for shard in record["files"])):
                raise DataError(
                    f"{self.path / 'manifest.json'}: {split} has {record[what]} {what} by its total and {total} by its "
                    f"shards; {AGAIN}"
                )
        return TokenStream(shards, record["documents"])

    def _open_array(self, record: dict, dtype: np.dtype, length: int) -> np.ndarray:
        path = self.path / record["name"]
        self._check_size(path, record)
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: not a .npy file of numbers ({_line(error)}); {AGAIN}") from error
        if not isinstance(loaded, np.ndarray) or loaded.dtype != dtype or loaded.shape != (length,):
            found = f"{loaded.dtype} of shape {loaded.shape}" if isinstance(loaded, np.ndarray) else "an archive"
            raise DataError(f"{path}: holds {found}, the manifest says {dtype} of shape ({length},); {AGAIN}")
        return loaded

    def _check_size(self, path: Path, record: dict) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; {AGAIN}")
        if (size := path.stat().st_size) != record["bytes"]:
            raise DataError(f"{path}: {size} bytes, the manifest says {record['bytes']} (cut short?); {AGAIN}")


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
        for record in manifest["tokenizer"]["files"]:
            check_file(record, TOKENIZER_FILES)
    for split in SPLITS:
        record = manifest["splits"][split]
        count(record, "documents")
        count(record, "tokens")
        for i, shard in enumerate(record["files"]):
            check_file(shard, [f"{split}-{i:05d}.npy"])
            check_file(shard["boundaries"], [f"{split}-{i:05d}.documents.npy"])
            count(shard, "tokens", 1)
            count(shard, "documents", 1)


# --- command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"prepare_data: {message}; see --help\n")


class _Terminated(KeyboardInterrupt):
    pass


def _terminate(*_) -> None:
    raise _Terminated


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m halny.model.prepare_data",
        description="Tokenizes text into a folder of memory-mapped token shards for train.py --data.",
        epilog="Exit codes: 0 done, 2 refused (nothing is written), 130 interrupted, 143 terminated (likewise).",
    )
    add = parser.add_argument
    inputs = ".txt (a document a file), .jsonl (a JSON object a line), or folders of them, walked in sorted order"
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=inputs)
    add("--out", required=True, type=Path, metavar="DIR", help="data folder to make; must not exist, or be empty")
    names = "folder with a tokenizer.json, or Mistral-7B-v0.1's own by name (default: %(default)s)"
    add("--tokenizer", default=MISTRAL, metavar=f"DIR|{MISTRAL}", help=names)
    add("--text-key", default="text", metavar="KEY", help="key of the text in .jsonl lines (default: %(default)s)")
    share = "share of documents held out for evaluation, chosen by a hash of their text (default: %(default)s)"
    add("--val-fraction", default=0.005, type=float, metavar="F", help=share)
    most = "tokens in a shard, at most, unless one document has more (default: %(default)s)"
    add("--shard-tokens", default=2**27, type=int, metavar="N", help=most)
    args = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        options = {"text_key": args.text_key, "val_fraction": args.val_fraction, "shard_tokens": args.shard_tokens}
        prepare(args.inputs, args.out, args.tokenizer, **options)
        return 0
    except DataError as error:
        message, code = str(error), 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        message, code = (
            ("terminated" if terminated else "interrupted") + "; nothing was written",
            143 if terminated else 130,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print("prepare_data: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
