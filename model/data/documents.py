"""From files to documents: what preparation reads, what it leaves out, and what it says about that.

    .txt                          a document a file
    .jsonl .jsonl.gz .jsonl.zst   a JSON object a line, the text under a key (`--text-key`)
    .parquet                      a row a document, the text in a column of that name

Two halves. `read_blocks` runs in the main process: it reads files in order and cuts them, at line ends, into blocks of
about a megabyte. `documents` runs in the workers: it makes a `Document` of each text, or a `Fault` of what is none.

Handled: a byte-order mark at the start of a file is no text; NUL, CR LF and any other character are; a blank line is no
document. Skipped, counted by reason, and refused with `--strict`: everything that raises `Fault` here. A damaged file
is read as far as it can be; a .gz may hide its damage up to the checksum at its end, and the count then warns of all
before it. Refused always: what is wrong with a file as a whole (none of that name, not readable, of another ending) or
with a flag.
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from halny.model.data.dataset import DataError, one_line
from halny.model.data.keep import Condition, Dropped, first_failed
from halny.model.durable import in_its_words
from halny.model.hints import hint, is_lfs_pointer

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BOM = b"\xef\xbb\xbf"
BLOCK_BYTES = 1 << 20
BLOCK_FILES = 1000  # .txt files in a block, at most
MAX_DOCUMENT_BYTES = 1 << 28  # a line or file beyond it is no document, and bounds the memory of a process


class Fault(Exception):
    """Something in the input that is no document. `reason` is counted, the message names file and line."""

    def __init__(self, reason: str, message: str, *, of_file: bool = False):
        super().__init__(message)
        self.reason, self.of_file = reason, of_file

    def __reduce__(self):
        return partial(Fault, of_file=self.of_file), (self.reason, str(self))


class Part(NamedTuple):
    """A piece of one file: bytes of a .txt, whole lines of a .jsonl, rows of a .parquet, or the fault that ended it."""

    file: str
    number: int  # of its first line or row, from 1
    data: "bytes | Rows | Fault"
    is_text: bool = False


class Rows(NamedTuple):
    texts: list[bytes | None]
    records: list[dict]  # a row each: of the other columns those that --keep reads, or all


class Document(NamedTuple):
    text: str
    record: dict  # the object of its line, text and all; of its row the columns that were read; empty for a .txt


class Block(NamedTuple):
    source: int  # which of the inputs of the command line
    parts: list[Part]
    size: int  # bytes of the files, as they lie on the disk, that it took
    files_done: int = 0  # how many files, from the first, are at their end with it


@dataclass(kw_only=True)
class Outcome:
    """What became of a block, whatever its documents are read for: Tally adds it up."""

    size: int  # as in `Block`, and so is the next
    files_done: int
    n_documents: int = 0  # those that the block holds, whatever becomes of them
    faults: Counter = field(default_factory=Counter)
    first_faults: dict[str, str] = field(default_factory=dict)  # reason -> the first message, in the order of the input

    def count(self, item: "Document | Fault | Dropped") -> None:
        self.n_documents += not (isinstance(item, Fault) and item.of_file)
        if isinstance(item, Fault):
            self.faults[item.reason] += 1
            self.first_faults.setdefault(item.reason, str(item))


# --- files ------------------------------------------------------------------------------------------------------------


def ending(path: Path) -> str | None:
    """The one of `ENDINGS` that a file has."""
    return next((known for known in ENDINGS if path.name.lower().endswith(known)), None)


def find_files(inputs: Iterable[Path]) -> tuple[list[tuple[int, Path]], int]:
    """(number of the input, file) of each file that inputs name, folders in sorted order; how many others they hold."""
    inputs = [Path(name) for name in inputs]
    endings = ", ".join(ENDINGS[:-1]) + f" or {ENDINGS[-1]}"
    files, ignored = [], 0
    for source, name in enumerate(inputs):
        if name.is_dir():
            found = sorted(_walk(name))
            kept = [path for path in found if ending(path) and not _is_hidden(path, name)]
            files, ignored = files + [(source, path) for path in kept], ignored + len(found) - len(kept)
        elif not name.is_file():
            raise DataError(f"{name}: no such file or folder; check the path")
        elif not ending(name):
            raise DataError(f"{name}: the ending {name.suffix!r} is not supported; give {endings} files")
        else:
            files.append((source, name))
    seen = set()
    for _, file in files:
        if not os.access(file, os.R_OK):
            raise DataError(f"{file}: not readable; check its permissions")
        if is_lfs_pointer(file):
            raise DataError(f"{file}: no text yet{hint(file)}")
        if (real := file.resolve()) in seen:
            raise DataError(f"{file}: named twice among the inputs, which would double its documents; name it once")
        seen.add(real)
    if not files:
        raise DataError(f"no {endings} files in {', '.join(map(str, inputs)) or 'the inputs'}; name some")
    return files, ignored


def ignored_in_words(n: int) -> str:
    """The end of a message on what was read."""
    return f"; {n:,} files of other endings or hidden ignored" if n else ""


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links too, each folder once. DataError for what cannot be looked into."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({in_its_words(error)}); check it or leave it out")

    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(root)) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(root) / name for name in names):
            if path.is_symlink() and not path.exists():
                raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there; mend it or leave it out")
            if path.is_file():
                yield path


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def check_packages(files: Iterable[tuple[int, Path]]) -> None:
    """DataError where a file needs a package that is not there."""
    for _, file in files:
        if ending(file) in (".jsonl.zst", ".parquet"):
            check_pyarrow(f"{file}: reading {ending(file)}")
            return


def check_pyarrow(what: str) -> None:
    """DataError where the package that `what` needs is not there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(f"{what} needs pyarrow; pip install 'halny[data]'") from None


# --- main process: blocks ---------------------------------------------------------------------------------------------


def read_blocks(
    files: list[tuple[int, Path]], text_key: str, keep: list[Condition] | None, done: int = 0
) -> Iterator[Block]:
    """The blocks of all files but the first `done`, in order; DataError where the disk or the network fails.

    Of .parquet files the columns are read that `keep` asks for, or all where it is None.
    """
    together, source_before, size_together = [], 0, 0  # small .txt files share a block

    def full(source: int, kind: str) -> bool:
        other = kind != ".txt" or source != source_before
        return bool(together) and (other or size_together >= BLOCK_BYTES or len(together) >= BLOCK_FILES)

    for i, (source, file) in enumerate(files[done:], start=done):
        kind = ending(file)
        if full(source, kind):
            yield Block(source_before, together, size_together, i)
            together, size_together = [], 0
        try:
            if kind == ".txt":
                part, size = read_text(file)
                together.append(part)
                source_before, size_together = source, size_together + size
            else:
                parts = _read_rows(file, text_key, keep) if kind == ".parquet" else _read_lines(file, kind)
                before = None  # held back, since the last one of a file is marked
                for part, size in parts:
                    if before is not None:
                        yield before
                    before = Block(source, [part], size, i)
                if before is not None:
                    yield before._replace(files_done=i + 1)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({in_its_words(error)}); check it or leave it out") from error
    if together:
        yield Block(source_before, together, size_together, len(files))


def read_text(file: Path) -> tuple[Part, int]:
    if (size := file.stat().st_size) > MAX_DOCUMENT_BYTES:
        return Part(str(file), 1, _too_large(f"{file}:1"), is_text=True), size
    return Part(str(file), 1, file.read_bytes().removeprefix(BOM), is_text=True), size


def _too_large(where: str) -> Fault:
    size = f"a document of over {MAX_DOCUMENT_BYTES >> 20} MiB"
    return Fault("too large", f"{where}: {size}, a whole corpus in one?; split it, or give it as .jsonl")


def _read_lines(file: Path, kind: str) -> Iterator[tuple[Part, int]]:
    """Whole lines, about a block of them or one, and the bytes of the file that they took."""
    number, taken, pieces, held, skipping, fault = 1, 0, [], 0, False, None
    with open(file, "rb") as raw:
        read, at_once = _reader(raw, kind)
        while True:
            try:
                chunk = read(at_once)
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                chunk, fault = b"", error
            ended = not chunk
            if skipping and (cut := chunk.find(b"\n") + 1):
                yield Part(str(file), number, _too_large(f"{file}:{number}")), 0
                number, chunk, skipping = number + 1, chunk[cut:], False
            if not skipping:
                pieces.append(chunk)
                held += len(chunk)
            if ended or (held >= BLOCK_BYTES and b"\n" in chunk) or held > MAX_DOCUMENT_BYTES:
                data = b"".join(pieces)
                cut = len(data) if ended and fault is None else data.rfind(b"\n") + 1
                if cut:
                    lines, before, taken = data[:cut], taken, raw.tell()
                    yield Part(str(file), number, lines.removeprefix(BOM) if number == 1 else lines), taken - before
                    number += lines.count(b"\n")
                pieces, held = [data[cut:]], len(data) - cut
                if held > MAX_DOCUMENT_BYTES:
                    pieces, held, skipping = [], 0, True
            if ended:
                break
        if fault is not None:
            yield Part(str(file), number, _damage(file, number, "line", fault)), raw.tell() - taken
        elif skipping:
            yield Part(str(file), number, _too_large(f"{file}:{number}")), raw.tell() - taken


def _damage(file: Path, number: int, what: str, error: Exception) -> Fault:
    message = f"the file is damaged at this {what} or before ({one_line(error)}), the {what}s before it are used"
    return Fault("damaged file", f"{file}:{number}: {message}; mend the file or leave it out", of_file=True)


def _reader(raw, kind: str) -> tuple[Callable[[int], bytes], int]:
    """What reads the content of an open .jsonl, .jsonl.gz or .jsonl.zst, and how much at a time.

    It raises on damage, after having given what comes before.
    """
    if kind == ".jsonl":
        return raw.read, BLOCK_BYTES
    if kind == ".jsonl.gz":
        return gzip.GzipFile(fileobj=raw).read1, BLOCK_BYTES  # read() would lose what comes before the damage
    import pyarrow

    # Not the package zstandard, whose reader takes a truncated file for a whole one. What is read in one go with the
    # damage is lost, hence little.
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd").read, min(BLOCK_BYTES, 1 << 16)


def _read_rows(file: Path, text_key: str, keep: list[Condition] | None) -> Iterator[tuple[Part, int]]:
    import pyarrow
    from pyarrow import parquet

    number, total = 1, file.stat().st_size
    try:
        # A row group may be larger than memory: read through a buffer, page by page.
        table = parquet.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
        schema, rows = table.schema_arrow, table.metadata.num_rows
        if text_key not in schema.names:
            columns = ", ".join(map(repr, schema.names[:8])) or "none"
            message = f"{file}: no column {text_key!r} (its columns: {columns}); name the right one with --text-key"
            yield Part(str(file), number, Fault("no such column", message, of_file=True)), total
            return
        if not _is_text(schema.field(text_key).type):
            message = (
                f"{file}: the column {text_key!r} is of type {schema.field(text_key).type}, not strings; name another"
            )
            yield Part(str(file), number, Fault("column of another type", message, of_file=True)), total
            return
        if keep is None:
            read = [name for name in schema.names if name != text_key]
        else:
            read = list({name: None for condition in keep if (name := condition.column(schema.names))})
        per_row = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)) / max(rows, 1)
        batch_size = max(1, min(8192, int(BLOCK_BYTES / max(per_row, 1))))
        for batch in table.iter_batches(
            batch_size, columns=list({text_key: None, **dict.fromkeys(read)}), use_threads=False
        ):
            texts = batch.column(text_key)
            if pyarrow.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            texts = texts.cast(pyarrow.large_binary()).to_pylist()
            records = batch.select(read).to_pylist() if read else [{}] * len(texts)
            yield Part(str(file), number, Rows(texts, records)), total * len(texts) // max(rows, 1)
            number += len(texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Part(str(file), number, _damage(file, number, "row", error)), 0


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


# --- workers: documents -----------------------------------------------------------------------------------------------


def documents(part: Part, text_key: str, keep: list[Condition]) -> Iterator[tuple[str, Document | Fault | Dropped]]:
    """What a part holds, one after the other, each with its place: documents, faults, those that --keep drops."""
    if isinstance(part.data, Fault):
        yield f"{part.file}:{part.number}", part.data
    elif isinstance(part.data, Rows):
        for i, raw in enumerate(part.data.texts):
            where = f"{part.file}:{part.number + i}"
            yield where, _guarded(_document_of_row, raw, part.data.records[i], where, keep)
    elif part.is_text:
        yield f"{part.file}:1", _guarded(_document_of_file, part.data, part.file)
    else:
        for number, line in enumerate(part.data.split(b"\n"), start=part.number):
            if line.strip():  # a blank line is no document
                where = f"{part.file}:{number}"
                yield where, _guarded(_document_of_line, line, text_key, where, keep)


def _guarded(make, *arguments) -> Document | Fault | Dropped:
    try:
        return make(*arguments)
    except Fault as fault:
        return fault


def decode(raw: bytes, file: str, line: int | None = None) -> str:
    """`line` counts from the start of raw; without it, `file` names the place."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        lines = raw.count(b"\n", 0, error.start)
        where = file if line is None else f"{file}:{line + lines}"
        byte = f"byte 0x{raw[error.start]:02x}"
        remedy = "convert the file with iconv or leave it out"
        raise Fault("not UTF-8", f"{where}: not valid UTF-8 ({byte}); {remedy}") from None


def _document_of_file(raw: bytes, file: str) -> Document:
    return _not_empty(decode(raw, file, 1), {}, f"{file}:1")


def _document_of_line(raw: bytes, text_key: str, where: str, keep: list[Condition]) -> Document | Dropped:
    mend = "mend or remove the line"
    try:
        record = json.loads(decode(raw, where))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise Fault("not JSON", f"{where}: not valid JSON ({reason}); {mend}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise Fault("not a JSON object", f"{where}: a JSON {kind} where an object was expected; {mend}")
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        message = f"{where}: no key {text_key!r} (keys of this line: {keys}); name the right one with --text-key"
        raise Fault("no such key", message)
    text = record[text_key]
    if not isinstance(text, str):
        message = (
            f"{where}: {text_key!r} is of type {type(text).__name__}, not a string; {mend}, or name another --text-key"
        )
        raise Fault("not a string", message)
    if lone := re.search("[\ud800-\udfff]", text):
        code = f"\\u{ord(lone.group()):04x}"
        raise Fault("lone surrogate", f"{where}: {text_key!r} holds the lone surrogate {code}; {mend}")
    return first_failed(keep, record) or _not_empty(text, record, where)


def _document_of_row(raw: bytes | None, record: dict, where: str, keep: list[Condition]) -> Document | Dropped:
    if raw is None:
        raise Fault("null", f"{where}: the text of this row is null; remove the row")
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _too_large(where)
    return first_failed(keep, record) or _not_empty(decode(raw, where), record, where)


def _not_empty(text: str, record: dict, where: str) -> Document:
    if not text:
        raise Fault("empty", f"{where}: an empty document; remove it")
    return Document(text, record)
