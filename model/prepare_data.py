"""Text to token shards: ``python -m halny.model.prepare_data INPUT... --out DIR``.

A document is BOS + ids + EOS, or without either as the flags say; ids + EOS where both are one token. Text is data:
"</s>" written in a document is four characters, never the end of it, unless --special-tokens says so. Held-out
documents are chosen by a hash of their text, so neither order nor company matters, unless they are so few that none or
all would be: then the end of the last one is. The way of a document, and where it is told in full:

    files -> blocks of a megabyte, in order            model/data/documents.py, in the main process
    block -> texts, --keep, --quality, ids             model/data/encode.py, in worker processes (model/data/workers.py)
    ids, in the order of the input -> --dedup, counts  model/data/tally.py, in the main process again
    -> shards                                          model/data/writer.py
    -> what a killed preparation goes on from          model/data/resume.py

What comes out depends on the input alone, not on the number of workers: blocks are cut without regard to it, and
results are taken in order. Memory depends on the number of workers and the largest document, not on the corpus, --dedup
aside.

Processes and not the tokenizers library's own threads, since those stand still while Python parses JSON before them and
makes arrays of ids after them: a small part of one core's time, and so the largest part of the time of many.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halny.model.data.command import Parser, exit_code, n_workers
from halny.model.data.dataset import DataError
from halny.model.data.documents import (
    ENDINGS,
    MAX_DOCUMENT_BYTES,
    Block,
    Part,
    check_packages,
    ending,
    find_files,
    ignored_in_words,
    read_blocks,
)
from halny.model.data.encode import Job, encoder_of_blocks
from halny.model.data.keep import Condition, parse_conditions
from halny.model.data.merge import merge
from halny.model.data.progress import Progress
from halny.model.data.resume import InputFile, Journal, input_file
from halny.model.data.tally import HOPELESS, Tally
from halny.model.data.tokenizer import MISTRAL, Tokenizer, load_tokenizer
from halny.model.data.workers import ordered_map
from halny.model.data.writer import SHARD_TOKENS, Writer, check_out, check_shard_tokens, new_folder, tool_version

if TYPE_CHECKING:
    from halny.model.data.quality import Classifier

BUILTIN_VAL_FRACTION = 0.08


def prepare(
    inputs: list[Path],
    out: Path,
    tokenizer: str | Path = MISTRAL,
    *,
    text_key: str = "text",
    keep: Iterable[str] = (),
    quality: Path | None = None,
    dedup: bool = False,
    strict: bool = False,
    bos: bool | None = None,
    eos: bool | None = None,
    special_tokens: bool = False,
    val_fraction: float = 0.005,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Tokenizes files, and folders of them, into a data folder; --help says more of the options.

    keep     conditions on metadata, as "quality=HIGH"; a document must fulfil all
    quality  a classifier's folder: its labels are the metadata `quality` and `quality_prob`, whatever the input says
    strict   DataError at the first document that cannot be used, instead of counting those
    bos, eos whether documents get them; None: if the tokenizer has them, one if they are the same token
    special_tokens  whether a special token that a text spells out is that token, and no text
    workers  processes beside this one; None: as many as cores, or none for a few megabytes

    Raises DataError, naming file, line and remedy, or WorkerDied. Nothing is left behind then but input files that were
    finished: they are kept beside `out`, and the same call goes on from there (model/data/resume.py).
    """
    if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: must be at least 0 and less than 1, for example 0.005")
    inputs, conditions = [Path(name) for name in inputs], parse_conditions(keep)
    classifier, on_labels = None, []
    if quality is not None:
        from halny.model.data.quality import KEYS, load_classifier

        on_labels = [condition for condition in conditions if condition.key in KEYS]
        if not on_labels:
            example = "--keep quality=HIGH --keep 'quality_prob>0.9'"
            raise DataError(f"--quality {quality}: no --keep asks for what it labels; add {example}")
        classifier = load_classifier(quality)
    on_metadata = [condition for condition in conditions if condition not in on_labels]
    files, ignored = find_files(inputs)
    check_packages(files)
    if on_metadata and (text := next((file for _, file in files if ending(file) == ".txt"), None)):
        raise DataError(f"--keep {on_metadata[0].text}: {text} has no metadata; leave .txt files out")
    input_files = [input_file(file) for _, file in files]
    size = sum(file.size for file in input_files)
    workers = n_workers(workers, size)
    settings = {"text_key": text_key, "keep": [condition.text for condition in conditions], "dedup": bool(dedup)}
    settings |= {"val_fraction": val_fraction, "shard_tokens": shard_tokens}
    settings |= {"special_tokens": True} if special_tokens else {}
    if classifier:
        settings["quality"] = {"fingerprint": classifier.fingerprint, "morphology": classifier.morphology_here}
        if progress and (warning := classifier.other_dictionary()):
            print(f"prepare_data: {warning}", file=sys.stderr)
    sources = [os.fsencode(name.resolve().name).decode(errors="replace") for name in inputs]
    _prepare(
        lambda done: read_blocks(files, text_key, on_metadata, done),
        out,
        tokenizer,
        settings,
        sources,
        files=input_files,
        keep=on_metadata,
        classifier=classifier,
        keep_labels=on_labels,
        bos=bos,
        eos=eos,
        strict=strict,
        workers=workers,
        total_bytes=size if progress else None,
        ignored=ignored,
    )


def prepare_builtin(out: Path) -> None:
    """The corpus that every CPython carries: its language reference, a document a topic, with Mistral's tokenizer."""
    from pydoc_data.topics import topics

    source = f"pydoc_data.topics of Python {platform.python_version()}"
    parts = [Part(f"{source}, {name}", 1, topics[name].encode(), is_text=True) for name in sorted(topics)]
    settings = {"source": source, "val_fraction": BUILTIN_VAL_FRACTION, "shard_tokens": SHARD_TOKENS}
    _prepare(lambda done: [Block(0, parts, 0)], out, MISTRAL, settings, [source])


def _prepare(
    read: Callable[[int], Iterable[Block]],  # the blocks of all input files but the first so many
    out: Path,
    tokenizer: str | Path,
    settings: dict,
    sources: list[str],
    *,
    files: Iterable[InputFile] = (),
    keep: Iterable[Condition] = (),
    classifier: "Classifier | None" = None,
    keep_labels: Iterable[Condition] = (),
    bos: bool | None = None,
    eos: bool | None = None,
    strict: bool = False,
    workers: int = 0,
    total_bytes: int | None = None,  # of the input, for the progress bar; None for silence
    ignored: int = 0,
) -> None:
    began, given_out, out = time.monotonic(), out, check_out(out)
    shard_tokens, tokenizer = check_shard_tokens(settings["shard_tokens"]), load_tokenizer(tokenizer)
    tokenizer = replace(tokenizer, special_tokens=settings.get("special_tokens", False))
    bos_id, eos_id = _markers(bos, eos, tokenizer)
    job = Job(
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_id=eos_id,
        text_key=settings.get("text_key", "text"),
        keep=tuple(keep),
        classifier=classifier,
        keep_labels=tuple(keep_labels),
        val_fraction=settings["val_fraction"],
        dedup=settings.get("dedup", False),
    )
    if total_bytes is not None and eos is None and tokenizer.eos_id is None:
        print(f"prepare_data: {_unmarked(tokenizer, bos_id)}", file=sys.stderr)
    tally = Tally(len(sources), job.dedup)
    made_of = {"halny": tool_version(), "tokenizer": tokenizer.name, "tokenizer.json": tokenizer.sha256()}
    made_of |= {"BOS": bos_id, "EOS": eos_id, "inputs": sources, **settings}
    with (
        new_folder(out, resumes=True) as folder,
        Writer(folder, tokenizer.vocab_size, shard_tokens) as writer,
        Journal(folder, made_of, list(files), writer, tally) as journal,
        closing(ordered_map(encoder_of_blocks, job, read(journal.done), workers)) as encoded,
        Progress(total_bytes, journal.bytes_done(), writer.total("tokens")) as progress,
    ):
        if (goes_on := journal.goes_on()) and total_bytes is not None:
            print(f"prepare_data: {given_out}: {goes_on}", file=sys.stderr)
        for block in encoded:
            stays = tally.add(block)
            tally.check(strict)
            for split, chosen in (("train", stays & ~block.val), ("val", stays & block.val)):
                ids = block.ids if chosen.all() else block.ids[np.repeat(chosen, block.lengths)]
                writer.add(split, ids, block.lengths[chosen])
            journal.add(block.digests[stays] if job.dedup else block.digests, block.files_done)
            progress.update(block.size, writer.total("documents"), writer.total("tokens"))
        tally.check_some(writer.total("documents"))
        if job.val_fraction and not all(writer.documents.values()):
            journal.remove()  # which may speak of the document that is cut
            _hold_out_part(writer, job, tally)
        n_documents, n_val = writer.total("documents"), writer.documents["val"]
        policy = {"bos_id": job.bos_id, "eos_id": job.eos_id}
        counts, special = tally.record(sources), tokenizer.special_ids
        writer.finish(tokenizer.name, tokenizer.files, policy, settings, counts, special, tally.split_bytes())
        journal.remove()
    if total_bytes is not None:
        print(
            f"prepare_data: {given_out}: {n_documents:,} documents ({n_val:,} held out), {writer.total('tokens'):,} "
            f"tokens, from {total_bytes / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s{ignored_in_words(ignored)}",
            *tally.lines(),
            sep="\n",
            file=sys.stderr,
        )


def _hold_out_part(writer: Writer, job: Job, tally: Tally) -> None:
    """Cuts the last document in two, the end held out: for where all of a few documents fell into one split.

    Of tokens, as many are held out as --val-fraction says of all, unless that is most of this document.
    """
    last_in = "train" if writer.documents["train"] else "val"
    n_documents, n_tokens = writer.total("documents"), writer.total("tokens")
    ids = writer.take_last(last_in)
    head, tail = job.markers()
    ids = ids[len(head) : len(ids) - len(tail)]
    n = min(int(job.val_fraction * n_tokens), int(max(job.val_fraction, 0.5) * len(ids)))
    for split, part in (("train", ids[: len(ids) - n]), ("val", ids[len(ids) - n :])):
        if len(part):
            writer.add(split, np.concatenate([head, part, tail]))
    few = f"too few documents for --val-fraction {job.val_fraction}"
    message = f"{few}: the last {n:,} tokens of the last one are held out as a document of their own" if n else None
    spelled = job.tokenizer.spelled()
    held_out = ids[len(ids) - n :].tolist()
    n_bytes = sum(len(spelled[i]) for i in held_out) if spelled.keys() >= set(held_out) else None
    more = (writer.total(what) - before for what, before in (("documents", n_documents), ("tokens", n_tokens)))
    tally.cut(message, *more, last_in, n_bytes)


def _markers(bos: bool | None, eos: bool | None, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids before and after each document; one of them is None where BOS and EOS are the same token.

    GPT-2, GPT-NeoX and SmolLM have one token for both, and between two documents it stands once: after the first, as
    the end that a model must learn to write, unless the flags put it before the second.
    """
    wanted = {"bos": (bos, tokenizer.bos_id), "eos": (eos, tokenizer.eos_id)}
    for name, (flag, token_id) in wanted.items():
        if flag and token_id is None:
            raise DataError(f"--{name}: the tokenizer {tokenizer.name} has no {name.upper()} token; leave the flag out")
    bos_id, eos_id = (None if flag is False else token_id for flag, token_id in wanted.values())
    if bos_id is None or bos_id != eos_id:
        return bos_id, eos_id
    if bos and eos:
        both = f"the tokenizer {tokenizer.name} has one token for both ({bos_id}), which would stand between documents"
        raise DataError(f"--bos --eos: {both} twice; leave one of the flags out")
    return (bos_id, None) if bos else (None, eos_id)


def _unmarked(tokenizer: Tokenizer, bos_id: int | None) -> str:
    what = "begin without BOS and " if bos_id is None else ""
    return (
        f"NO END OF TEXT: documents {what}end without EOS, so a model cannot learn where one ends: the tokenizer "
        f'{tokenizer.name} names none. Name it in its tokenizer_config.json as "eos_token"; if none is meant, --no-eos'
    )


# --- command line -----------------------------------------------------------------------------------------------------


DESCRIPTION = f"""Tokenizes text into a folder of memory-mapped token shards for train.py --data.

INPUT is .txt (a document a file), .jsonl, .jsonl.gz or .jsonl.zst (a JSON object a line), .parquet (a row a document),
or folders of them, walked in sorted order. The same input gives the same bytes, whatever the number of workers.

Kept as they are: NUL, CR LF, every character that is one. Not text: a byte-order mark at the start of a file.
Skipped, and counted by reason with the first place of each: empty documents, also those of which the tokenizer leaves
nothing; bytes that are not UTF-8; lines that are not JSON, no object, without the key, or with something other than a
string there; lone surrogates; null; documents over {MAX_DOCUMENT_BYTES >> 20} MiB; .parquet files without the column;
what follows the damage in a damaged file.
With --strict the first of them refuses the whole, as do {HOPELESS:,} of them before anything else without it.

Killed or stopped, the same command goes on after the input files that were finished, so give a large corpus as several
files; they are kept beside DIR, in .DIR.partial. The bytes are the same as without the interruption.

--merge A B --out C joins folders that were prepared in parts: the same tokens as of all their inputs prepared at once,
but that --dedup finds no document of one in another.
"""
EPILOG = """Exit codes: 0 done; 1 a worker died; 2 refused; 130 interrupted; 143 terminated (no DIR unless 0).
With --check: 0 clean; 1 not clean; 2 nothing that could be opened.
"""


def _arguments() -> Parser:
    parser = Parser(
        prog="python -m halny.model.prepare_data",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=f"{', '.join(ENDINGS)} files or folders of them")
    add("--out", type=Path, metavar="DIR", help="data folder to make; must not exist, or be empty")
    names = "folder with a tokenizer.json, whose tokenizer files go as they are into DIR and every export; or "
    names += "Mistral-7B-v0.1's own by name (default: %(default)s)"
    add("--tokenizer", default=MISTRAL, metavar=f"DIR|{MISTRAL}", help=names)
    add("--text-key", default="text", metavar="KEY", help="key or column of the text (default: %(default)s)")
    condition = (
        "keep only documents whose metadata fulfil this, as quality=HIGH or 'quality_prob>0.9' (operators = != > >= "
    )
    condition += "< <=; a dot in KEY leads into nested objects); given several times, all must hold"
    add("--keep", action="append", default=[], metavar="CONDITION", help=condition)
    judge = "label documents by this classifier (python -m halny.model.quality fit), for --keep quality=... and "
    add("--quality", type=Path, metavar="DIR", help=f"{judge}quality_prob...")
    drop = "drop documents whose text came before, the first stays; takes 24 to 48 bytes of memory a document"
    add("--dedup", action="store_true", help=drop)
    add("--strict", action="store_true", help="refuse the input at the first document that would be skipped")
    has = "put {} {} each document (default: if the tokenizer has it{})"
    add("--bos", action=argparse.BooleanOptionalAction, help=has.format("BOS", "before", " and it is not EOS"))
    add("--eos", action=argparse.BooleanOptionalAction, help=has.format("EOS", "after", ""))
    meant = "take special tokens that a text spells out, as in chats in a template (<|im_end|>), for these tokens; "
    add("--special-tokens", action="store_true", help=f"{meant}without, they are text like any other")
    share = "share of documents held out for evaluation, chosen by a hash of their text; of too few documents, the end "
    share += "of the last one (default: %(default)s)"
    add("--val-fraction", default=0.005, type=float, metavar="F", help=share)
    most = "tokens in a shard, at most, unless one document has more (default: %(default)s)"
    add("--shard-tokens", default=SHARD_TOKENS, type=int, metavar="N", help=most)
    add("--workers", type=int, metavar="N", help="processes (default: as many as cores)")
    join = "join prepared folders of one tokenizer, in this order, into --out, without tokenizing again"
    parser.add_argument_group("merging").add_argument("--merge", nargs="+", type=Path, metavar="DIR", help=join)
    check = parser.add_argument_group("checking")
    add = check.add_argument
    whole = "read all of a data folder or .bin file, and say what is wrong with it and what is in it"
    add("--check", type=Path, metavar="DIR", help=whole)
    add("--tokens-per-second", type=float, metavar="N", help="of the training to come: how many days an epoch takes")
    add("--dtype", choices=("uint16", "uint32"), help="of the tokens in a .bin file without a header")
    add("--vocab-size", type=int, metavar="N", help="vocabulary of a .bin file")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _arguments()
    args = parser.parse_args(argv)
    names = ["tokenizer", "text_key", "keep", "quality", "dedup", "strict", "bos", "eos", "special_tokens"]
    names += ["val_fraction", "workers"]
    if args.check is None and not ((args.inputs or args.merge) and args.out):
        parser.error("give INPUT and --out, or --merge and --out, or --check")
    if args.check is not None and (args.inputs or args.merge or args.out):
        parser.error("--check takes neither INPUT nor --merge nor --out")
    if args.merge is not None:
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]
        if args.inputs or given:
            parser.error(f"--merge joins documents as they were prepared, without {(given or ['INPUT'])[0]}")

    def work() -> int:
        if args.check is not None:
            from halny.model.data.check import check

            return 0 if check(args.check, args.tokens_per_second, args.dtype, args.vocab_size) else 1
        if args.merge is not None:
            merge(args.merge, args.out, shard_tokens=args.shard_tokens)
        else:
            options = {name: getattr(args, name) for name in names}
            prepare(args.inputs, args.out, shard_tokens=args.shard_tokens, **options)
        return 0

    return exit_code("prepare_data", work)


if __name__ == "__main__":
    sys.exit(main())
