"""What a recipe names to read: its data, what it evaluates on, the tokenizers of both and of its first weights.

Each is opened, or refused in a line that names flag and value, before the run's folder is touched.
"""

from __future__ import annotations

import functools
import socket
from pathlib import Path

from halny.model.data.batches import Corpus, named_sources
from halny.model.data.dataset import CHUNK, SPLITS, Dataset, RawDataset, hash_files, is_dataset, open_dataset
from halny.model.durable import in_words
from halny.model.exits import Refused
from halny.model.run.evaluation import EvalSets, parse_named
from halny.model.run.ranks import World, agreed, everywhere, on_main, say
from halny.model.run.recipe import Recipe
from halny.model.run.resolve import RunSpec, data_or_refused, weights_of
from halny.model.tokenizer_files import differing, pieces


def open_one(path: Path | list[Path], spec: RunSpec, hashes: dict[str, str] | None = None) -> Dataset | RawDataset:
    dtype = None if is_dataset(path) else spec.recipe.data_dtype
    return open_dataset(path, dtype, spec.model.vocab_size, hashes)


def hash_raw_files(spec: RunSpec, world: World) -> dict[str, str]:
    """SHA-256 of the raw files that --data and --eval-data name, each read by one rank. A collective."""

    def files() -> list[Path]:
        named = [("--data", path) for path, _ in named_sources(spec.recipe.data or ())]
        named += [("--eval-data", path) for path in parse_named(spec.recipe.eval_data or ()).values()]
        opened = [data_or_refused(open_one, path, spec, of=of) for of, path in named if not is_dataset(path)]
        return sorted({file for dataset in opened for file in dataset.files})

    shared = on_main(world, files)
    if world.is_main and (size := sum(file.stat().st_size for file in shared)) > 1e9:
        say(world, f"reading {in_words(size)} of .bin files for their checksums, each on one rank")
    mine = agreed(hash_files, shared[world.rank :: world.size], world.is_main)
    return {name: digest for part in everywhere(mine) for name, digest in part.items()}


def open_data(sources: tuple[str, ...], spec: RunSpec, hashes: dict[str, str] | None = None) -> Corpus:
    """The data that --data names, opened and cut into samples; Refused if this model cannot train on it.

    hashes: of raw files, as ``hash_raw_files`` has found them.
    """
    r, open_source = spec.recipe, functools.partial(open_one, spec=spec, hashes=hashes)
    corpus = data_or_refused(Corpus, sources, r.seq_len, r.documents, open_source)
    if r.data_dtype and not any(isinstance(source.dataset, RawDataset) for source in corpus.sources):
        raise Refused(f"--data-dtype {r.data_dtype} belongs to raw .bin files, and {' '.join(sources)} is none; "
            "leave it out")  # fmt: skip
    return corpus


def open_eval_sets(corpus: Corpus | None, spec: RunSpec, hashes: dict[str, str] | None = None) -> EvalSets:
    """The held-out split, if it has one, and what --eval-data names; Refused if this model cannot read that."""
    r, open_source = spec.recipe, functools.partial(open_one, spec=spec, hashes=hashes)
    named = data_or_refused(parse_named, r.eval_data or (), of="--eval-data")
    sets = data_or_refused(EvalSets, corpus, named, r.seq_len, r.documents, open_source, of="--eval-data")
    return sets


def check_ids(corpus: Corpus | None, sets: EvalSets, spec: RunSpec, part: int, parts: int) -> None:
    """Refuse ids that the model has no row for. Of data whose vocabulary is larger than the model's, every parts-th
    piece is read: a token that was added to the tokenizer and never used is no reason to refuse."""
    datasets = [("--data", source.dataset) for source in corpus.sources] if corpus else []
    for flag_, dataset in [*datasets, *(("--eval-data", dataset) for dataset in sets.datasets.values())]:
        if dataset.vocab_size <= spec.model.vocab_size:
            continue
        for stream in (dataset.split(split) for split in SPLITS):
            for first in range(part * CHUNK, len(stream), parts * CHUNK):
                ids = stream.gather([first], [min(CHUNK, len(stream) - first)])
                if (bad := int(ids.max())) >= spec.model.vocab_size:
                    raise Refused(
                        f"{flag_} {dataset.path}: token {first + int((ids == bad).argmax()):,} has id {bad}, but the "
                        f"model's vocabulary is of {spec.model.vocab_size}, that of the data {dataset.vocab_size}; "
                        "prepare the data with the model's tokenizer"
                    )


def check_same_inputs(recipe: Recipe, corpus: Corpus | None, sets: EvalSets, world: World) -> str | None:
    """Refuse data or weights of which a node has another copy than rank 0; a collective.

    Each rank reads its own part, so that an old copy on the disk of one node would be in the batch unseen. Returns the
    fingerprint of the weights (``weights_of``).
    """
    first_of_node = world.rank % world.node_size == 0
    weights = agreed(weights_of if first_of_node else lambda _: None, recipe)
    found = {f"--data {' '.join(recipe.data or ())}": corpus.fingerprint} if corpus else {}
    found |= {f"--eval-data {dataset.path}": dataset.fingerprint for dataset in sets.datasets.values()}
    if recipe.init_from and first_of_node:
        found[f"--init-from {recipe.init_from}"] = weights
    everyone, hosts = everywhere((weights, found)), everywhere(socket.gethostname())
    main_weights, main_found = everyone[0]
    for rank, (_, theirs) in enumerate(everyone):
        for name, fingerprint in theirs.items():
            if fingerprint != main_found[name]:
                raise Refused(f"{name} is another for rank {rank} on {hosts[rank]} than for rank 0 on {hosts[0]}; copy "
                    "it there anew, or name one on a file system that all nodes share")  # fmt: skip
    return main_weights


def check_tokenizers(start: Path | None, corpus: Corpus | None, sets: EvalSets) -> list[str]:
    """What is to be said of ids that mean one thing to the weights of --init-from and another in the data.

    A few may have another name, as special tokens do. Refused where a piece has moved, or where it is more than a few.
    """
    ours, said = pieces(start), []
    datasets = [("--data", source.dataset) for source in corpus.sources] if corpus else []
    for of, dataset in [*datasets, *(("--eval-data", dataset) for dataset in sets.datasets.values())]:
        theirs = pieces(dataset.tokenizer)
        ids, refused = differing(ours, theirs)
        if not ids:
            continue
        found = (
            f"{len(ids):,} of {len(ours.keys() & theirs.keys()):,} ids mean something else in the tokenizer of {of} "
            f"{dataset.path} than in that of --init-from {start}: {ids[0]} is {theirs[ids[0]]!r} there and "
            f"{ours[ids[0]]!r} here"
        )
        if refused:
            raise Refused(f"{found}; prepare the data with the model's tokenizer")
        said.append(f"tokenizer  {found}")
    return said


def check_evaluations(recipe: Recipe, sets: EvalSets) -> None:
    """Refuse evaluations that were asked for where there is nothing to evaluate on."""
    if not sets.rows and (recipe.eval_only or recipe.eval_every):
        asked = "--eval-only" if recipe.eval_only else f"--eval-every {recipe.eval_every}"
        raise Refused(f"{asked}: nothing of the data was held out; name something to evaluate on with --eval-data "
            "NAME:DIR, or prepare the data with a larger --val-fraction")  # fmt: skip
