"""A text cut into its parts, and what is known of each word form: what features.py counts.

    word       a run of letters; a digit or a hyphen ends it
    line       what newlines separate, blank ones left out
    paragraph  what blank lines separate, or begins with a bullet; a text without either has its lines for paragraphs
    sentence   ends by . ! ? … before what is no small letter, unless after an abbreviation; or before a blank line or
               a bullet

Characters are looked at as arrays of numbers, since Python is slow at one after the other. Words follow Zipf's law, so
that nearly all are met again: analysed once, a form costs a look-up in a table.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np

from halny.model.data.morphology import COLUMNS, Morphology

LONGEST = 1 << 20  # characters of a text that are looked at
FORMS = 1 << 18  # that are remembered at least; twice as many at most
ROWS = 1 << 16  # different ones, of which prose has some ten thousand

# --- characters -------------------------------------------------------------------------------------------------------

KINDS = (
    "lower",  # a to z but q, v, x
    "polish_lower",
    "foreign_lower",
    "upper",
    "polish_upper",
    "foreign_upper",
    "other_script",  # letters that are not Latin
    "mark",  # combining
    "digit",
    "space",
    "newline",
    "sentence_mark",
    "comma",
    "other_mark",
    "symbol",
    "picture",
    "broken",
)
KIND = {name: i for i, name in enumerate(KINDS)}
N_LETTERS = KIND["mark"]  # the kinds before it are letters
N_LOWER = KIND["upper"]


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "L":
        case, lower = "upper" if category in ("Lu", "Lt") else "lower", character.lower()
        if lower in "abcdefghijklmnoprstuwyz":
            return case
        if lower in "ąćęłńóśźż":
            return f"polish_{case}"
        return f"foreign_{case}" if unicodedata.name(character, "").startswith("LATIN") else "other_script"
    if category[0] == "M":
        return "mark"
    if category[0] == "N":
        return "digit"
    if character in "\t\r" or category[0] == "Z":
        return "space"
    if single := {"\n": "newline", ",": "comma", **dict.fromkeys(".!?…", "sentence_mark")}.get(character):
        return single
    if character == "\ufffd" or category in ("Cc", "Cn", "Co", "Cs"):
        return "broken"
    if category == "So":
        return "picture"
    is_mark = (category in ("Pd", "Ps", "Pe", "Pi", "Pf") and character not in "[]{}") or character in ";:\"'"
    return "other_mark" if is_mark else "symbol"


@cache
def _kind_of_code() -> np.ndarray:
    """The number of the kind of each character of Unicode's first plane, in which all but emoji and rarities lie."""
    return np.array([KIND[_kind(chr(code))] for code in range(1 << 16)], np.uint8)


def kinds_of(codes: np.ndarray) -> np.ndarray:
    kinds = _kind_of_code()[np.minimum(codes, 0xFFFF)]
    if (beyond := codes > 0xFFFF).any():
        pictures = (codes >= 0x1F000) & (codes < 0x1FB00)
        kinds[beyond] = np.where(pictures, KIND["picture"], KIND["other_script"])[beyond]
    return kinds


# --- word forms -------------------------------------------------------------------------------------------------------


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


VOWEL = re.compile(r"i(?=[aąeęoóuy])|([aąeęioóuyáâäéèêëíîöôőüúů])")  # an "i" before another only softens: no syllable
STOP_WORDS = _set(
    "a aby ale albo ani bardzo bez bo by być był była było były będzie będą być choć co czy czyli dla do dlatego gdy "
    "gdyż gdzie go i ich im jak jako jakie jego jej jednak jest jeśli jeszcze już każdy kiedy która które którego "
    "której których który którzy którym ku lecz lub ma mają może można na nad nam nas nawet nich nie nim niż no o od "
    "ona oni ono oraz pod po podczas ponieważ przed przez przy się sobie są swoje swój ta tak takie także tam te tego "
    "tej ten teraz też to tu tych tylko tym tę tą u w we więc wszystkie wszystko z za ze że żeby"
)
ENGLISH = _set(
    "the of and in is that for it with as was on are by this be at from or an have not which you has were but they his "
    "their its all we can will there been if more when your our about click"
)
OTHER_LANGUAGES = _set(
    "der die das und ist nicht mit den von für auf ein eine sich dem auch wird bei sind le la les des est une dans qui "
    "pour sur pas avec sont je ve na jsou které který podle není také byl bylo jsem"
)
LEXICAL = (  # what is added up over the words of a text; morphology's columns follow
    "letters",
    "letters_squared",
    "vowels",
    "syllables",
    "short",
    "long",
    "hard",
    "capitalised",
    "all_capitals",
    "mixed_case",
    "lone",
    "no_vowel",
    "stop",
    "english",
    "other_languages",
)
SUMS = (*LEXICAL, *COLUMNS)


def _lexical(form: str) -> list[int]:
    """In the order of LEXICAL."""
    lower, n = form.lower(), len(form)
    is_syllable = [match[1] is not None for match in VOWEL.finditer(lower)]
    return [
        n,
        n * n,
        len(is_syllable),
        max(sum(is_syllable), 1),
        n <= 2,
        n >= 10,
        sum(is_syllable) >= 4,
        n > 1 and form[0].isupper() and form[1:].islower(),
        n > 1 and form.isupper(),
        any(a.islower() and b.isupper() for a, b in pairwise(form)),
        n == 1 and lower not in "aiouwz",
        n > 2 and not is_syllable,
        lower in STOP_WORDS,
        lower in ENGLISH,
        lower in OTHER_LANGUAGES and lower not in STOP_WORDS,
    ]


class Forms(dict):
    """Word form -> the number of its row in `rows`, made when it is first asked for. Many forms share a row.

    Bounded: `tidy` forgets those that were not asked for since it last did, when there are FORMS of others.
    """

    def __init__(self, morphology: Morphology | None):
        self.morphology, self.older = morphology, {}
        self.numbers, self.rows = {}, np.zeros((1 << 10, len(SUMS if morphology else LEXICAL)), np.int64)

    def __missing__(self, form: str) -> int:
        if (number := self.older.get(form)) is None:
            row = np.array(_lexical(form), np.int64)
            if self.morphology:
                row = np.concatenate([row, self.morphology.row(form)])
            number = self.numbers.setdefault(row.tobytes(), len(self.numbers))
            if number == len(self.rows):
                self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
            self.rows[number] = row
        self[form] = number
        return number

    def tidy(self) -> None:
        if len(self.numbers) > ROWS:  # of endless noise
            for remembered in (self, self.older, self.numbers):
                remembered.clear()
        elif len(self) > FORMS:
            self.older = dict(self)
            self.clear()


# --- the parts of a text ----------------------------------------------------------------------------------------------

BULLET = re.compile(r"(?:[-–—•*▪◦·»>+]|\(?\d{1,3}[.)]|[a-z]\))\s")
PARAGRAPH_END = re.compile(rf"\n\s*(?:\n\s*|(?={BULLET.pattern}))")
SENTENCE_END = re.compile(r"[.!?…]++[\"'”’»)\]]*\s++(?!(?:[-–—]\s+)?[a-ząćęłńóśźż,;:])")
LAST_WORD = re.compile(r"\w+$")
ABBREVIATIONS = _set(  # beside every single letter
    "al art bp cd cz dr doc dot ds etc fot gen godz hab im inż jw kard kl ks lek mec mgr mjr mln mld nb nr np nt ob ok "
    "os par pkt pl płk por pow poz ppłk prof proc ps red rtm rys sp st str św tab tel tj tys tzn tzw ul ur ust wg wł "
    "woj wyd zał zob zw"
)


class Parts:
    """A text, cut in all the ways that features need it. Positions count characters."""

    def __init__(self, text: str):
        self.text = text = unicodedata.normalize("NFC", text[:LONGEST])
        self.codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.kinds = kinds_of(self.codes)
        self.is_letter = self.kinds < N_LETTERS
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]
        spaced = np.where(self.is_letter, self.codes, np.uint32(ord(" ")))
        spaced = spaced.tobytes().decode("utf-32-le")
        self.forms = spaced.split()
        self.words = spaced.lower().split()  # the same in small letters
        starts = np.flatnonzero(self.is_letter & ~np.concatenate([[False], self.is_letter[:-1]]))

        ends = [match.end() for match in PARAGRAPH_END.finditer(text)]
        ends_or_lines = ends or [match.end() for match in re.finditer("\n", text)]
        self.paragraphs, _, self.paragraph_words = self._cut(ends_or_lines, starts)
        ends = sorted({*ends, *self._sentence_ends()})
        self.sentences, self.sentence_starts, self.sentence_words = self._cut(ends, starts)

    def _cut(self, ends: list[int], word_starts: np.ndarray) -> tuple[list[str], list[int], np.ndarray]:
        """The parts that have a word, without space around them; where each begins; how many words each has."""
        bounds = [0, *ends, len(self.text)]
        n_words = np.diff(np.searchsorted(word_starts, bounds))
        kept = [(a, b) for a, b, n in zip(bounds, bounds[1:], n_words.tolist(), strict=False) if n]
        return [self.text[a:b].strip() for a, b in kept], [a for a, _ in kept], n_words[n_words > 0]

    def _sentence_ends(self) -> Iterator[int]:
        for match in SENTENCE_END.finditer(self.text):
            if match[0][0] == ".":
                start = match.start()
                word = LAST_WORD.search(self.text[max(start - 8, 0) : start])
                if word and (word[0].lower() in ABBREVIATIONS or (len(word[0]) == 1 and word[0].isalpha())):
                    continue
            yield match.end()
