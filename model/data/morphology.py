"""What a Polish word form can be, from morfeusz2's dictionary (which ships inside its wheel): used by features.py.

A form has readings: "mam" is "I have", "of mothers" and "delude!". Which of them a text means is not asked: each of n
readings counts 1/n, and where a reading leaves its case, person or number open, each of them gets an equal part.
Weights are whole numbers of 1/UNIT, so that sums are exact, in any order.

Woliński, Morfeusz Reloaded (LREC 2014); the tags are those of the National Corpus of Polish.
"""

import importlib.util
from functools import cache

import numpy as np

UNIT = 2520  # divisible by 1 to 10
MOST_READINGS = 20  # that are counted for `ambiguity`

# What a tag's first part says: the classes that its reading belongs to.
CLASSES = {
    "subst": ("noun",),
    "depr": ("noun",),
    "ppron12": ("pronoun",),
    "ppron3": ("pronoun",),
    "siebie": ("pronoun",),
    "adj": ("adjective",),
    "adja": ("adjective",),
    "adjp": ("adjective",),
    "adjc": ("adjective",),
    "adv": ("adverb",),
    "num": ("numeral",),
    "numcomp": ("numeral",),
    "prep": ("preposition",),
    "conj": ("conjunction",),
    "comp": ("conjunction", "subordinator"),
    "part": ("particle",),
    "interj": ("interjection",),
    "brev": ("abbreviation",),
    "fin": ("verb", "finite"),
    "bedzie": ("verb", "finite", "future"),
    "praet": ("verb", "finite", "past"),
    "cond": ("verb", "finite", "conditional"),
    "impt": ("verb", "finite", "imperative"),
    "imps": ("verb", "finite", "impersonal", "past"),
    "winien": ("verb", "finite", "present"),
    "pred": ("verb", "finite", "impersonal", "present"),
    "aglt": ("verb", "finite"),
    "inf": ("verb", "infinitive"),
    "pcon": ("verb", "adverbial_participle"),
    "pant": ("verb", "adverbial_participle"),
    "ger": ("verb", "gerund"),
    "pact": ("verb", "participle"),
    "ppas": ("verb", "participle"),
    "ign": ("oov",),
}
CASES = ("nom", "gen", "dat", "acc", "inst", "loc", "voc")
PERSONS = ("pri", "sec", "ter")
NUMBERS = ("sg", "pl")
ASPECTS = ("perf", "imperf")
COLUMNS = (
    *dict.fromkeys(name for names in CLASSES.values() for name in names),
    *CASES,
    *PERSONS,
    *NUMBERS,
    *ASPECTS,
    "proper_name",
    "ambiguity",
)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}


class NoMorphology(Exception):
    """morfeusz2 is not installed."""

    def __init__(self):
        super().__init__(
            "morphology needs morfeusz2, which has wheels for x86-64 but none for Linux on Arm (GH200): "
            "pip install 'halny[quality]' on x86-64, or use a classifier made by fit --no-morphology"
        )


def find_morfeusz() -> None:
    """Raises NoMorphology where the package is not there, without the 0.2 s of loading its dictionary."""
    if importlib.util.find_spec("morfeusz2") is None:
        raise NoMorphology


@cache
def dictionary() -> str:
    """Which one this is: versions of the package and of the dictionary."""
    import morfeusz2

    return f"morfeusz2 {morfeusz2.__version__}, {morfeusz2.Morfeusz(generate=False).dict_id()}"


class Morphology:
    """The readings of word forms, each form analysed on its own: 20 microseconds, so callers remember the answers."""

    def __init__(self):
        find_morfeusz()
        import morfeusz2

        # composite: "poszedłbym" is one word and not three
        self.analyser = morfeusz2.Morfeusz(generate=False, praet="composite")

    def row(self, form: str) -> np.ndarray:
        """[len(COLUMNS)] int64: the weight of each column in 1/UNIT; `ambiguity` is the number of readings."""
        readings = self._readings(form)
        if all(tag == "ign" for tag, _ in readings):  # "np" stands in the dictionary as "np."
            readings = [reading for reading in self._readings(form + ".") if reading[0].startswith("brev")] or readings
        return _row(tuple(readings))

    def _readings(self, form: str) -> list[tuple[str, bool]]:
        """(tag, whether of a proper name) of each reading of its first part: "żeś" is "że" + "ś" and counts as "że"."""
        found = {
            (tag, any(name != "nazwa_pospolita" for name in names))
            for start, _, (_, _, tag, names, _) in self.analyser.analyse(form)
            if start == 0
        }
        return sorted(found)


@cache  # of some thousand different ones
def _row(readings: tuple[tuple[str, bool], ...]) -> np.ndarray:
    row = np.zeros(len(COLUMNS), np.int64)
    weight = UNIT // len(readings)
    for tag, is_name in readings:
        kind, *parts = tag.split(":")
        for name in CLASSES.get(kind, ()):
            row[COLUMN[name]] += weight
        if kind == "fin":  # of a perfective verb it is the future
            row[COLUMN["future" if "perf" in parts else "present"]] += weight
        for values in (part.split(".") for part in parts if kind != "prep"):  # whose cases are those it governs
            for value in values:
                if value in COLUMN:  # cases, persons, numbers, aspects
                    row[COLUMN[value]] += weight // len(values)
        row[COLUMN["proper_name"]] += weight * is_name
    row[COLUMN["ambiguity"]] = min(len(readings), MOST_READINGS)
    return row
