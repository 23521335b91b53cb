"""Text to token shards: ``python -m halny.model.prepare_data INPUT... --out DIR``, and the reader of what it writes.

A document is BOS + ids + EOS. Text is data: "</s>" written in a document is four characters, never the end of it.
Held-out documents are chosen by a hash of their text, so neither order nor company matters. The folder that comes out
is described in model/dataset.py, the tokenizers in model/tokenizer.py.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from halny.model.dataset import (
    SHARD_TOKENS,
    DataError,
    Dataset,
    TokenStream,
    Writer,
    check_out,
    check_shard_tokens,
    is_dataset,
    new_folder,
    write_dataset,
)
from halny.model.tokenizer import MISTRAL, load_tokenizer

__all__ = ["DataError", "Dataset", "TokenStream", "is_dataset", "prepare", "prepare_builtin", "write_dataset"]

ENDINGS = (".txt", ".jsonl")
BATCH_CHARACTERS = 1 << 21  # a call of the tokenizer, whose encodings take some 100 bytes a token until written
BATCH_DOCUMENTS = 8192
BUILTIN_VAL_FRACTION = 0.08


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
    shard_tokens: int = SHARD_TOKENS,
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
    settings = {"source": source, "val_fraction": BUILTIN_VAL_FRACTION, "shard_tokens": SHARD_TOKENS}
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
    shard_tokens = check_shard_tokens(settings["shard_tokens"])
    tokenizer = load_tokenizer(tokenizer)
    encoder = tokenizer.encoder()
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    quiet = total_bytes is None or not sys.stderr.isatty()
    with (
        new_folder(out) as folder,
        Writer(folder, tokenizer.vocab_size, shard_tokens) as writer,
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
    add("--shard-tokens", default=SHARD_TOKENS, type=int, metavar="N", help=most)
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
