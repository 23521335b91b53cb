"""A classifier of the quality of texts, HIGH, MEDIUM or LOW: what `python -m halny.model.quality fit` makes.

A classifier is a folder:

    classifier.json   features and classes in their order, calibration, versions, settings, what fit measured
    model.json        the trees, as XGBoost writes them: no pickle, no code
    reliability.png   for people

    texts -> features.py -> XGBoost's margins -> calibration -> (quality, probability)

The trees are not asked about what no training set of Polish text knows: a text without a word, or with most of its
letters in another script, is LOW with probability 1.

XGBoost: Chen and Guestrin, KDD 2016. Calibration, by a temperature and a bias per class: Alexandari et al., ICML 2020.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halny.model.data.dataset import DataError, one_line
from halny.model.data.features import VERSION, Features, feature_names
from halny.model.data.morphology import NoMorphology, dictionary, find_morfeusz

LABELS = ("HIGH", "MEDIUM", "LOW")
KEYS = ("quality", "quality_prob")  # what a label adds to the metadata of a document
FORMAT, MANIFEST, MODEL, PLOT = "halny-quality", "classifier.json", "model.json", "reliability.png"
DIGITS = 4  # of a probability
SURE = 0.9  # above it the reference run kept documents that are HIGH
IDENTITY = ("format", "features_version", "features", "classes", "calibration", "model")  # of what is in a manifest
INSTALL = "pip install 'halny[quality]'"


class Label(NamedTuple):
    quality: str
    probability: float
    by_rule: bool = False  # no word of the language in it: not judged by the trees

    def metadata(self) -> dict:
        return dict(zip(KEYS, self[:2], strict=True))


class Calibration(NamedTuple):
    """Probabilities are softmax(margins / temperature + biases)."""

    temperature: float
    biases: list[float]

    def probabilities(self, margins: np.ndarray) -> np.ndarray:
        return softmax(margins / self.temperature + np.array(self.biases))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@dataclass(frozen=True)
class Classifier:
    """What a classifier folder holds, checked; may be pickled. `Labeller` is what works with it."""

    folder: Path
    manifest: dict
    model: bytes

    @property
    def morphology(self) -> str | None:
        """The dictionary that it was fitted with, or None."""
        return self.manifest["morphology"]

    @property
    def calibration(self) -> Calibration:
        return Calibration(**self.manifest["calibration"])

    @property
    def fingerprint(self) -> str:
        """The hash of all that a label depends on, beside the versions of the libraries."""
        parts = {key: self.manifest[key] for key in IDENTITY}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def morphology_here(self) -> str | None:
        """The dictionary at hand, which labels depend on as well."""
        return self.morphology and dictionary()

    def other_dictionary(self) -> str | None:
        """What to say where the dictionary at hand is not that of the fit."""
        if self.morphology == (here := self.morphology_here):
            return None
        fitted = f"{self.folder} was fitted with {self.morphology}, and here is {here}"
        return f"{fitted}: probabilities may be off; install that version, or fit again"


def load_classifier(folder: Path) -> Classifier:
    """Raises DataError where something is missing, cut, changed, of another version, or needs what is not installed."""
    folder, again = Path(folder), "fit it again with python -m halny.model.quality fit"
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: no {MANIFEST} in it; name a folder that python -m halny.model.quality fit made")
    try:
        manifest, model = json.loads((folder / MANIFEST).read_bytes()), (folder / MODEL).read_bytes()
        classifier = Classifier(folder, manifest, model)
        if not (wrong := _differs(classifier)):
            check_installed(classifier.morphology is not None)
            wrong = _read_otherwise(classifier)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        wrong = f"cut or changed since the fit ({f'no {error}' if isinstance(error, KeyError) else one_line(error)})"
    if wrong:
        raise DataError(f"{folder}: {wrong}; copy it again, or {again}")
    return classifier


def _differs(classifier: Classifier) -> str | None:
    """What makes a classifier unfit for use here."""
    manifest = classifier.manifest
    for key, known in (("format", FORMAT), ("features_version", VERSION)):
        if manifest[key] != known:
            return f"its {key} is {manifest[key]!r}, and this halny knows {known!r}"
    names = feature_names(classifier.morphology is not None)
    if manifest["features"] != names:
        others = [*(set(manifest["features"]) - set(names)), *sorted(set(names) - set(manifest["features"]))]
        others = ", ".join(others[:4]) or "in another order"
        return f"fitted with other features ({others})"
    if not set(manifest["classes"]) <= set(LABELS) or len(manifest["classes"]) != len(classifier.calibration.biases):
        return f"cut or changed since the fit (of the classes {manifest['classes']})"
    if (digest := hashlib.sha256(classifier.model).hexdigest()) != manifest["model"]:
        return f"{MODEL} was cut or changed since the fit ({len(classifier.model):,} bytes, SHA-256 {digest[:12]}...)"
    return None


def _read_otherwise(classifier: Classifier) -> str | None:
    """What this XGBoost makes of the trees, if it is not what the fit made: 3.0 ignores a part of 3.2's files."""
    import xgboost

    manifest = classifier.manifest
    medians = np.array([manifest["medians"][name] for name in manifest["features"]], np.float32).T
    # The bound is far above rounding (1e-6), and far below what a part that is ignored does: 3.0 moves margins by 0.5.
    if np.allclose(Trees(classifier).probabilities(medians), manifest["of_medians"], rtol=0, atol=1e-3):
        return None
    wrote = f"xgboost-cpu {manifest['packages']['xgboost']}"
    return f"XGBoost {xgboost.__version__} reads its trees otherwise than the one that wrote them (install {wrote})"


def check_installed(morphology: bool) -> None:
    """DataError where XGBoost, or the dictionary that is wanted, is not installed."""
    try:
        import xgboost  # noqa: F401

        if morphology:
            find_morfeusz()
    except ImportError:
        raise DataError(f"quality needs xgboost; {INSTALL}") from None
    except NoMorphology as error:
        raise DataError(str(error)) from None


def by_rule(names: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Which of the measured texts, [n, features], are LOW without being judged."""
    names = list(names)
    return (values[:, names.index("log_words")] == 0) | (values[:, names.index("other_script")] > 0.5)


def margins_of(booster, values: np.ndarray) -> np.ndarray:
    """[n, classes] float64 of measured texts, [n, features]."""
    return booster.inplace_predict(values, predict_type="margin").reshape(len(values), -1).astype(np.float64)


class Trees:
    """XGBoost's model and the calibration, in one thread."""

    def __init__(self, classifier: Classifier):
        import xgboost

        self.booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(classifier.model))
        self.names, self.calibration = classifier.manifest["features"], classifier.calibration

    def probabilities(self, values: np.ndarray) -> np.ndarray:
        """[n, classes] of measured texts; that of one does not depend on the others."""
        return self.calibration.probabilities(margins_of(self.booster, values))

    def contributions(self, values: np.ndarray) -> np.ndarray:
        """[classes, features] of one measured text: how much each moved the margin of each class (TreeSHAP)."""
        import xgboost

        data = xgboost.DMatrix(values[None], feature_names=self.names, nthread=1)
        return self.booster.predict(data, pred_contribs=True)[0, :, :-1]


class Labeller:
    """The classifier at work."""

    def __init__(self, classifier: Classifier):
        self.classes, self.trees = classifier.manifest["classes"], Trees(classifier)
        self.features = Features(classifier.morphology is not None)

    def label(self, texts: Sequence[str]) -> list[Label]:
        """A label for each text; that of one does not depend on the others."""
        return self.judge(np.stack([self.features.measure(text) for text in texts])) if texts else []

    def judge(self, values: np.ndarray) -> list[Label]:
        """The same of texts that are measured: [n, features]."""
        ruled = by_rule(self.features.names, values)
        probabilities = self.trees.probabilities(values)
        best = probabilities.argmax(1)
        return [
            Label("LOW", 1.0, True) if rule else Label(self.classes[k], round(float(row[k]), DIGITS))
            for rule, k, row in zip(ruled, best, probabilities, strict=True)
        ]
