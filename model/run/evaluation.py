"""Evaluation: loss, perplexity and accuracy over whole sets of rows, every row exactly once on any number of ranks.

A run evaluates on its held-out split, and on what --eval-data names. The key of a set begins its names in
metrics.jsonl: ``val`` for the held-out split (val_loss, val_perplexity, val_accuracy) and ``val_NAME`` for the others.
All of them are means over targets, so a long document weighs more than a short one, and a row of padding nothing.

Losses of different tokenizers do not compare, since their targets are different pieces of text. val_bits_per_byte does:
the bits that the model needs for the set's text, by the bytes of that text in UTF-8, which prepare_data has counted.
BOS and EOS around documents are no text, so what they cost is left out, as lm-evaluation-harness leaves it out of its
bits_per_byte. (With add_bos_token=False: else it puts a BOS of its own before the tokenizer's, and counts that one.)
Where --special-tokens lets texts spell them out, they are text like any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from halny.model.data.batches import Corpus, check_one_tokenizer, read_in_turn
from halny.model.data.dataset import SPLITS, DataError, Dataset, RawDataset
from halny.model.data.rows import Packing, Rows, Windows
from halny.model.data.tokenizer import bytes_before
from halny.model.hf_folder import few
from halny.model.mistral import Mistral
from halny.model.run import fsdp
from halny.model.run.ranks import World, ask_everywhere, first_missed
from halny.model.tokenizer_files import spelled

HELD_OUT = "val"


class Text(NamedTuple):
    """What the tokens of a set stand for: so many bytes in UTF-8, and none by the ids around its documents."""

    n_bytes: int
    markers: tuple[int, ...]


def text_of(sets: Sequence[tuple[Dataset | RawDataset, str, Rows]]) -> Text | None:
    """The text of the targets of these splits' rows, all of one tokenizer; None where its bytes are not known."""
    sets = [each for each in sets if len(each[-1])]
    counts = [_bytes_of_targets(*each) for each in sets]
    if None in counts or not sum(counts):
        return None
    spelled_out = any(dataset.special_tokens for dataset, *_ in sets)
    markers = {i for dataset, *_ in sets for i in dataset.markers if not spelled_out}
    return Text(sum(counts), tuple(sorted(markers)))


def _bytes_of_targets(dataset: Dataset | RawDataset, split: str, rows: Rows) -> int | None:
    """The bytes of a split's text, without those of a first token that nothing predicts, where there is no BOS."""
    n_bytes = dataset.n_bytes(split)
    if n_bytes is None or dataset.special_tokens or dataset.manifest["document"]["bos_id"] is not None:
        return n_bytes
    first, text = rows.unpredicted().tolist(), spelled(dataset.tokenizer)
    ids = [i for i in rows.stream.gather(first, [1] * len(first)).tolist() if i not in dataset.markers]
    if not text.keys() >= set(ids):
        return None
    before = bytes_before(dataset.tokenizer)
    return n_bytes - sum(len(text[i]) - before for i in ids)


def parse_named(texts: Sequence[str]) -> dict[str, Path]:
    """NAME:DIR, several: the folders by name. DataError for anything else, and for a name twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition(":")
        if not (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) and folder):
            raise DataError(f"{text} must be NAME:DIR, the name of letters, digits, _ and -, as in pl:data/pl")
        if name in folders:
            raise DataError(f"{text}: there are two sets of the name {name}; rename one")
        folders[name] = Path(folder)
    return folders


class EvalSets:
    """What a run evaluates on: ``rows`` holds the rows of each set under its key, the held-out split first.

    ``texts`` holds what they stand for, or None where the data do not say. A named folder is evaluated whole, whatever
    its split; it is cut into rows as the training data is. Sets without a target are left out. Raises DataError for a
    folder that is none, does not fit, or has nothing to predict.
    """

    def __init__(
        self,
        corpus: Corpus | None,
        named: dict[str, Path],
        seq_len: int,
        documents: bool,
        open_dataset: Callable[[Path], Dataset | RawDataset],
    ):
        self.rows: dict[str, list[Rows]] = {}
        self.texts: dict[str, Text | None] = {}
        if corpus is not None and any(map(len, corpus.held_out)):
            self.rows[HELD_OUT] = corpus.held_out
            self.texts[HELD_OUT] = text_of([(source.dataset, "val", source.held_out) for source in corpus.sources])
        self.datasets = {name: open_dataset(folder) for name, folder in named.items()}
        read = {source.dataset.fingerprint for source in corpus.sources} if corpus is not None else set()
        self.trained_on = {name for name, dataset in self.datasets.items() if dataset.fingerprint in read}
        cut = Packing if documents else Windows
        for name, dataset in self.datasets.items():
            if documents and isinstance(dataset, RawDataset):
                raise DataError(f"{dataset.path}: a raw file does not say where documents end; leave --documents out")
            for source in corpus.sources if corpus is not None else ():
                check_one_tokenizer(dataset, source.dataset)
            rows = [cut(dataset.split(split), seq_len) for split in SPLITS]
            if not any(map(len, rows)):
                raise DataError(f"{dataset.path} has no token to predict")
            self.rows[f"{HELD_OUT}_{name}"] = rows
            self.texts[f"{HELD_OUT}_{name}"] = text_of([(dataset, *each) for each in zip(SPLITS, rows, strict=True)])

    @property
    def decides(self) -> str | None:
        """The metric by which one checkpoint is better than another: the loss of the first set not trained on."""
        trained_on = {f"{HELD_OUT}_{name}" for name in self.trained_on}
        return next((f"{key}_loss" for key in self.rows if key not in trained_on), None)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every parts-th file of the named folders: DataError where one is not what its manifest says."""
        for dataset in self.datasets.values():
            dataset.verify(part, parts)

    def describe(self) -> list[str]:
        """One line per named set."""
        return [
            f"{name}: {dataset.path}, {sum(rows.n_targets for rows in self.rows[f'{HELD_OUT}_{name}']):,} targets"
            + "; the run trains on them, so they say nothing about other text" * (name in self.trained_on)
            for name, dataset in self.datasets.items()
        ]

    def without_bytes(self) -> list[str]:
        """One line that names the sets whose bits per byte are not known; none where there are no such sets."""
        unknown = {key for key, text in self.texts.items() if text is None}
        why = "the data do not say how many bytes their text has; preparing them again counts these"
        return [f"{few(unknown)}: no bits per byte, since {why}"] if unknown else []


@torch.no_grad()
def evaluate(
    model: Mistral,
    rows: Sequence[Rows],
    text: Text | None,
    micro_batch: int,
    world: World,
    alive: Callable[[], None],
    asked_to_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss, perplexity and accuracy per target over all rows, each once whatever the world size; bits per byte of text.

    The same micro batches are computed on any number of ranks, and their fp32 losses added in fp64, so for one
    micro_batch the numbers are the same too. ``alive`` is called for each batch. None if ``asked_to_stop`` was true on
    some rank in the middle of it. Raises DataLost, on all ranks, where one could not read its rows.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    markers = torch.tensor(text.markers if text else (), dtype=torch.int64, device=world.device)
    stopping, missed, data_lost = False, None, False
    # Every rank runs as many forward passes as any, for each gathers parameters with the others; past the last row a
    # batch is empty.
    for first in range(0, sum(map(len, rows)), world.size * micro_batch):
        alive()
        mine = first + world.rank * micro_batch + np.arange(micro_batch)
        try:
            batch = read_in_turn(rows, mine)
        except DataError as error:  # of this rank alone, perhaps: the others are told, and need its forward pass
            missed, batch = error, read_in_turn(rows, sum(map(len, rows)) + mine)
        answers, asking = ask_everywhere(asked_to_stop(), missed is not None)
        batch = batch.to(world.device)
        losses, n_tokens, n_correct = model(*batch.inputs, reduction="none")
        losses = losses.double()
        around = torch.where(torch.isin(batch.labels, markers), losses, 0.0)
        totals += torch.stack([losses.sum(), around.sum(), n_tokens.double(), n_correct.double()])
        asking.wait()
        stopping, data_lost = map(bool, answers.tolist())
        if stopping or data_lost:
            break
    fsdp.reshard(model)  # without a backward pass some stay gathered, and are not those of the optimizer
    dist.all_reduce(totals)
    if data_lost:
        raise first_missed(missed)
    if stopping:
        return None
    loss_sum, around_sum, n_targets, n_correct = totals.tolist()
    found = loss_metrics(loss_sum, n_targets, n_correct)
    if text:
        found["bits_per_byte"] = (loss_sum - around_sum) / math.log(2) / text.n_bytes
    return found


def perplexity_in_words(perplexity: float) -> str:
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def loss_metrics(loss_sum: float, n_targets: float, n_correct: float) -> dict[str, float]:
    loss = loss_sum / max(n_targets, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": n_correct / max(n_targets, 1)}
