"""Fitting a classifier of quality to labelled documents: `python -m halny.model.quality fit`.

    labelled documents -> labels and hashes of all, faults refused      (a first reading, before any work)
                       -> features, in worker processes                 (a second one)
    four fifths        -> five folds: the margins of each document by trees that did not see it -> calibration
                       -> the trees of all four -> model.json
    one fifth          -> accuracy, confusion matrix, reliability: what is reported, and used for nothing else

Which fifth and which fold a document falls into is decided by a hash of its text: neither order nor company matters,
and equal texts fall together. Nothing depends on the number of threads or workers: the same documents give the same
bytes.

Weights make the classes count alike, however uneven their labels; that alone would make the probability of the rare
ones too high. Calibration, which is fitted without weights, sets it right for texts of which as many are HIGH as among
those labelled: label a random sample of the corpus.
"""

import hashlib
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from halny.model.data.command import n_workers
from halny.model.data.dataset import DataError, to_json
from halny.model.data.documents import Block, Document, Fault, check_packages, documents, find_files, read_blocks
from halny.model.data.encode import digest_of
from halny.model.data.features import VERSION, Features, feature_names
from halny.model.data.morphology import dictionary
from halny.model.data.progress import Progress
from halny.model.data.quality import (
    FORMAT,
    LABELS,
    MANIFEST,
    MODEL,
    PLOT,
    SURE,
    Calibration,
    by_rule,
    check_installed,
    margins_of,
    softmax,
)
from halny.model.data.workers import ordered_map
from halny.model.data.writer import check_out, new_folder, tool_version
from halny.model.durable import sync

LEAST = 50  # documents of a class
FOLDS, HELD_OUT = 5, 5  # one part in so many
ROUNDS = 300
XGBOOST = {
    "objective": "multi:softprob",
    "tree_method": "hist",
    "max_depth": 4,
    "learning_rate": 0.08,
    "subsample": 0.8,
    "colsample_bytree": 0.5,
    "min_child_weight": 2,
    "nthread": 1,  # each fold has a thread of its own
}
BINS = 10  # of the reliability table


def fit(
    inputs: list[Path],
    out: Path,
    *,
    text_key: str = "text",
    label_key: str = "quality",
    morphology: bool = True,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Makes a classifier folder from labelled documents; returns its manifest (model/data/quality.py).

    Raises DataError for what cannot be used: before the features are measured, but for what only they tell.
    """
    check_installed(morphology)
    import scipy
    import xgboost

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise DataError(f"--seed {seed}: must be a whole number from 0 to 2**31 - 1")
    files, _ = find_files(inputs)
    check_packages(files)
    given, out = out, check_out(out)
    size = sum(file.stat().st_size for _, file in files)
    workers, began = n_workers(workers, size), time.monotonic()
    labelled = read_labels(files, text_key, label_key)
    samples = measure(files, text_key, labelled.of_digest, morphology, workers, size if progress else None)
    if progress:
        took = time.monotonic() - began
        print(f"quality: measured {len(samples.values):,} documents in {took:.1f} s; fitting", file=sys.stderr)
    names = feature_names(morphology)
    ruled = by_rule(names, samples.values)
    counts = {"read": labelled.n_read, "conflicting": labelled.conflicting, "repeated": labelled.repeated}
    counts["LOW by rule"] = int(ruled.sum())
    samples = Samples(*(array[~ruled] for array in samples))
    of_label = Counter(samples.labels.tolist())
    _check_enough(of_label)
    classes = [label for label in LABELS if of_label[label]]
    with new_folder(out) as folder:
        manifest, model, draw = _fit(samples, classes, names, seed, progress)
        manifest = {
            "format": FORMAT,
            "tool": f"halny {tool_version()}, Python {platform.python_version()}",
            "packages": {module.__name__: module.__version__ for module in (np, scipy, xgboost)},
            "features_version": VERSION,
            "morphology": dictionary() if morphology else None,
            "documents": counts | {label: of_label[label] for label in classes},
            **manifest,
        }
        (folder / MODEL).write_bytes(model)
        draw(folder / PLOT)
        (folder / MANIFEST).write_bytes(to_json(manifest, indent=1))
        for name in (MODEL, PLOT, MANIFEST):
            sync(folder / name)
    if progress:
        took = time.monotonic() - began
        print(f"quality: {given}: a classifier, from {size / 1e6:,.1f} MB in {took:.1f} s", file=sys.stderr)
    return manifest


# --- labels and features ----------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    of_digest: dict[bytes, str]  # what hashes to it has this label
    n_read: int
    conflicting: int  # documents that are left out, since their text has another label elsewhere
    repeated: int  # that are left out, since their text and label came before


def read_labels(files: list[tuple[int, Path]], text_key: str, label_key: str) -> Labelled:
    """The first reading. Raises DataError for documents without a label, unknown labels, and too few of one."""
    labels, counts = {}, Counter()
    for block in read_blocks(files, text_key, None):
        for where, item in (pair for part in block.parts for pair in documents(part, text_key, [])):
            if isinstance(item, Fault):
                raise DataError(f"{item} (labelled documents are used all, or not at all)")
            if (label := item.record.get(label_key)) is None:
                keys = ", ".join(map(repr, list(item.record)[:8])) or "none"
                remedy = "label it, or name the right key with --label-key"
                raise DataError(f"{where}: no label under {label_key!r} (keys of this document: {keys}); {remedy}")
            counts[str(label)] += 1
            labels.setdefault(digest_of(item.text.encode()), Counter())[str(label)] += 1
    if unknown := {label: n for label, n in counts.items() if label not in LABELS}:
        named = ", ".join(f"{label!r} ({n:,} documents)" for label, n in sorted(unknown.items())[:6])
        raise DataError(f"unknown labels under {label_key!r}: {named}; they must be {', '.join(LABELS)}")
    of_digest = {key: next(iter(found)) for key, found in labels.items() if len(found) == 1}
    _check_enough(Counter(of_digest.values()))
    conflicting = sum(found.total() for found in labels.values() if len(found) > 1)
    n_read = counts.total()
    return Labelled(of_digest, n_read, conflicting, n_read - conflicting - len(of_digest))


def _check_enough(counts: Counter) -> None:
    if len(counts) < 2:
        only = f"only {next(iter(counts))}" if counts else "no label at all"
        raise DataError(f"{only} among the labelled documents; two or three of {', '.join(LABELS)} make a classifier")
    for label, n in sorted(counts.items()):
        if n < LEAST:
            remedy = f"label {LEAST} at least, better some thousand"
            raise DataError(f"{n} different documents are labelled {label}, too few to learn from; {remedy}")


class Samples(NamedTuple):
    """Documents in the order of their hashes, whatever the order of the input: the trees depend on it."""

    digests: np.ndarray  # [n, 16] uint8
    labels: np.ndarray  # [n] str
    values: np.ndarray  # [n, features] float32


def measure(
    files: list[tuple[int, Path]],
    text_key: str,
    labels: dict[bytes, str],
    morphology: bool,
    workers: int,
    total_bytes: int | None,
) -> Samples:
    """The second reading: features of each text that `labels` has, once."""
    blocks, values = read_blocks(files, text_key, []), {}
    with (
        closing(ordered_map(measurer, (text_key, morphology), blocks, workers)) as results,
        Progress(total_bytes, name="quality") as progress,
    ):
        for size, measured in results:
            values.update((key, row) for key, row in measured if key in labels)
            progress.update(size, len(values))
    keys = sorted(values)
    digests = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    return Samples(digests, np.array([labels[key] for key in keys]), np.stack([values[key] for key in keys]))


def measurer(argument: tuple[str, bool]) -> Callable[[Block], tuple[int, list[tuple[bytes, np.ndarray]]]]:
    """What each worker does: a block to its size, and (digest, features) of each of its documents."""
    text_key, morphology = argument
    features = Features(morphology)

    def measure_block(block: Block) -> tuple[int, list[tuple[bytes, np.ndarray]]]:
        found = [item for part in block.parts for _, item in documents(part, text_key, [])]
        texts = [item.text for item in found if isinstance(item, Document)]
        return block.size, [(digest_of(text.encode()), features.measure(text)) for text in texts]

    return measure_block


# --- trees and calibration --------------------------------------------------------------------------------------------


def _fit(
    samples: Samples, classes: list[str], names: list[str], seed: int, progress: bool
) -> tuple[dict, bytes, Callable[[Path], None]]:
    """The part of the manifest that depends on the documents, the trees, and what draws the plot."""
    y = np.array([classes.index(label) for label in samples.labels])
    drawn = np.array([_draws(row.tobytes(), seed) for row in samples.digests])
    held_out, fold = drawn[:, 0] == 0, drawn[:, 1]
    if not set(y[~held_out]) == set(y[held_out]) == set(range(len(classes))):
        raise DataError("the held-out fifth, or the rest, has no document of some label; label more, or change --seed")
    settings = {**XGBOOST, "num_class": len(classes), "seed": seed}
    used = np.flatnonzero(~held_out)
    sets = [used, *(used[fold[used] != i] for i in range(FOLDS))]
    boosters = _grow(samples.values, y, sets, names, settings, progress)
    booster, unseen = boosters[0], np.zeros((len(y), len(classes)))  # margins by trees that did not see the document
    for i in range(FOLDS):
        rows = used[fold[used] == i]
        unseen[rows] = margins_of(boosters[1 + i], samples.values[rows])
    calibration, errors = calibrate(unseen[used], y[used], fold[used])
    test = np.flatnonzero(held_out)
    probabilities = calibration.probabilities(margins_of(booster, samples.values[test]))
    report = {"calibration_error_in_folds": errors, "held_out": report_on(probabilities, y[test], classes)}
    gains = booster.get_score(importance_type="total_gain")
    total = sum(gains.values()) or 1.0
    report["most_telling"] = {
        name: round(gain / total, 4) for name, gain in sorted(gains.items(), key=lambda pair: (-pair[1], pair[0]))[:20]
    }
    model = bytes(booster.save_raw("json"))
    medians = np.stack([np.median(samples.values[y == k], 0) for k in range(len(classes))]).astype(float).round(6)
    of_medians = calibration.probabilities(margins_of(booster, medians.astype(np.float32)))
    manifest = {
        "features": names,
        "classes": classes,
        "calibration": calibration._asdict(),
        "model": hashlib.sha256(model).hexdigest(),
        "training": {"xgboost": settings, "rounds": ROUNDS, "folds": FOLDS, "held_out": f"1 in {HELD_OUT}"},
        "medians": dict(zip(names, medians.T.tolist(), strict=True)),
        "of_medians": of_medians.round(6).tolist(),  # their probabilities, to see whether another XGBoost agrees
        "report": report,
    }
    return manifest, model, partial(plot, report["held_out"])


def _grow(values: np.ndarray, y: np.ndarray, sets: list[np.ndarray], names: list[str], settings: dict, progress: bool):
    """An xgboost.Booster for each set of rows, in threads: XGBoost computes without Python's lock."""
    import xgboost

    left = Event()

    class Stop(xgboost.callback.TrainingCallback):
        """Ends the training after an interruption, of which only the main thread hears."""

        def after_iteration(self, *_) -> bool:
            return left.is_set()

    def train(rows: np.ndarray) -> xgboost.Booster:
        k = settings["num_class"]
        weights = len(rows) / (k * np.bincount(y[rows], minlength=k).clip(1))
        data = xgboost.DMatrix(values[rows], y[rows], weight=weights[y[rows]], feature_names=names, nthread=1)
        return xgboost.train(settings, data, ROUNDS, callbacks=[Stop()])

    with ThreadPoolExecutor() as pool:
        off = not (progress and sys.stderr.isatty())
        try:
            return list(tqdm(pool.map(train, sets), total=len(sets), desc="quality: fitting", disable=off))
        finally:
            left.set()


def _draws(digest: bytes, seed: int) -> tuple[int, int]:
    """Which part of HELD_OUT a text is of (0: the one that is held out), and which fold."""
    mixed = hashlib.blake2b(digest, digest_size=16, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(mixed[:8], "big") % HELD_OUT, int.from_bytes(mixed[8:], "big") % FOLDS


def calibrate(margins: np.ndarray, y: np.ndarray, fold: np.ndarray) -> tuple[Calibration, dict]:
    """The calibration that makes `y` likeliest, or none where it does not lower the expected calibration error.

    Whether it does is seen on each fold by a calibration that was fitted to the others.
    """
    none, fitted = Calibration(1.0, [0.0] * margins.shape[1]), np.zeros_like(margins)
    for i in np.unique(fold):
        fitted[fold == i] = likeliest(margins[fold != i], y[fold != i]).probabilities(margins[fold == i])
    errors = {"before": calibration_error(softmax(margins), y), "after": calibration_error(fitted, y)}
    return likeliest(margins, y) if errors["after"] < errors["before"] else none, errors


def likeliest(margins: np.ndarray, y: np.ndarray) -> Calibration:
    from scipy.optimize import minimize

    n, k = margins.shape

    def loss(x: np.ndarray) -> float:
        probabilities = Calibration(np.exp(x[0]), [*x[1:], 0.0]).probabilities(margins)
        return float(-np.log(probabilities[np.arange(n), y].clip(1e-12)).mean())

    # Bounds: of documents that are told apart without a fault, the likeliest probabilities would be 1.
    best = minimize(loss, np.zeros(k), method="L-BFGS-B", bounds=[(np.log(0.5), np.log(10)), *[(-4, 4)] * (k - 1)])
    return Calibration(round(float(np.exp(best.x[0])), 6), [*(round(float(b), 6) for b in best.x[1:]), 0.0])


# --- what it is worth -------------------------------------------------------------------------------------------------


def reliability(probabilities: np.ndarray, y: np.ndarray) -> list[dict]:
    """By the probability of the label that is given: how many documents, its mean, and how many labels are right."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    return [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "documents": int((bins == i).sum()),
            "probability": round(float(sure[bins == i].mean()), 4),
            "right": round(float(right[bins == i].mean()), 4),
        }
        for i in sorted(set(bins.tolist()))
    ]


def calibration_error(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: |probability - share that is right|, the mean over documents, by the bins above."""
    table = reliability(probabilities, y)
    return round(sum(row["documents"] * abs(row["probability"] - row["right"]) for row in table) / len(y), 4)


def report_on(probabilities: np.ndarray, y: np.ndarray, classes: list[str]) -> dict:
    given, k = probabilities.argmax(1), len(classes)
    confusion = np.bincount(k * y + given, minlength=k * k).reshape(k, k)
    f1 = 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1)).clip(1)
    report = {
        "documents": len(y),
        "accuracy": round(float((given == y).mean()), 4),
        "macro_f1": round(float(f1.mean()), 4),
        "confusion": confusion.tolist(),  # a row for each true label
        "calibration_error": calibration_error(probabilities, y),
        "reliability": reliability(probabilities, y),
    }
    if "HIGH" in classes:
        high = classes.index("HIGH")
        kept = (given == high) & (probabilities[:, high] > SURE)
        report[f"HIGH, p > {SURE}"] = {
            "documents": int(kept.sum()),
            "are HIGH": int((y[kept] == high).sum()),
            "of HIGH": int((y == high).sum()),
        }
    return report


def plot(report: dict, path: Path) -> None:
    """The reliability table as a picture."""
    from matplotlib.figure import Figure

    rows = report["reliability"]
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([row["probability"] for row in rows], [row["right"] for row in rows], "o")
    for row in rows:
        place = (row["probability"], row["right"])
        axes.annotate(
            f"{row['documents']:,}", place, textcoords="offset points", xytext=(-5, -12), fontsize=8, ha="right"
        )
    axes.set(xlabel="probability of the label", ylabel="share of labels that are right")
    axes.set_title(f"{report['documents']:,} documents held out\ncalibration error {report['calibration_error']:.3f}")
    figure.savefig(path, dpi=120, metadata={"Software": None})
