"""What a quality classifier sees of a text: some hundred numbers, all of them in the table `FEATURES`.

`Features().measure(text)` makes them, `Features(morphology=False)` those that need no dictionary. They are a pure
function of the text, taken in Unicode's NFC and up to its first million characters, which bounds time and memory: sums
are of whole numbers, and what is remembered between texts (the analysis of word forms) only saves time. What a word, a
line, a paragraph and a sentence is: text_parts.py.

Shares of nothing are 0. Whoever changes a definition raises VERSION, since classifiers fitted before would misjudge:
tests/data/test_features.py holds the values of some texts.
"""

import math
import re
import statistics
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from halny.model.data.morphology import CASES, PERSONS, UNIT, Morphology
from halny.model.data.text_parts import (
    BULLET,
    KIND,
    KINDS,
    LONGEST,
    N_LETTERS,
    N_LOWER,
    STOP_WORDS,
    SUMS,
    Forms,
    Parts,
    kinds_of,
)

VERSION = 1
SENTENCE_MARKS = (".", "!", "?", "…")
INF = float("inf")


class Feature(NamedTuple):
    name: str
    definition: str
    low: float
    high: float
    why: str


FEATURES = [
    Feature(*row)
    for row in (
        # lengths
        ("log_characters", "log10 of the number of characters", 0, 7, "stubs are short"),
        ("log_words", "log10 of 1 + the number of words", 0, 7, "stubs are short"),
        ("log_sentences", "log10 of 1 + the number of sentences", 0, 7, "lists have few for their words"),
        ("word_length", "letters per word", 0, LONGEST, "chat has short words, glued ones are long"),
        ("word_length_sd", "standard deviation of letters per word", 0, LONGEST, "prose mixes short and long words"),
        ("short_words", "share of words of 1 or 2 letters", 0, 1, "lists lack them, spaced-out text is made of them"),
        ("long_words", "share of words of 10 letters or more", 0, 1, "learned prose has many, chat few"),
        ("log_longest_word", "log10 of 1 + the letters of the longest word", 0, 7, "glued words, keys, codes"),
        ("sentence_words", "words per sentence", 0, INF, "menus have none that end, chat has short ones"),
        ("sentence_words_sd", "standard deviation of words per sentence", 0, INF, "templates have sentences alike"),
        ("sentence_words_median", "median of words per sentence", 0, INF, "unmoved by a single run-on sentence"),
        ("log_longest_sentence", "log10 of 1 + the words of the longest sentence", 0, 7, "missing punctuation"),
        ("short_sentences", "share of sentences of under 4 words", 0, 1, "captions, menus, cut text"),
        ("long_sentences", "share of sentences of over 40 words", 0, 1, "missing punctuation, legal text"),
        ("line_characters", "characters per line", 0, INF, "menus and verse have short lines"),
        ("line_characters_cv", "deviation of characters per line over their mean", 0, INF, "wrapped lines are even"),
        ("short_lines", "share of lines of under 30 characters", 0, 1, "menus, lists, tables"),
        ("line_words", "words per line", 0, INF, "menus and verse have few"),
        ("paragraph_words", "words per paragraph", 0, INF, "articles have long paragraphs"),
        ("paragraph_words_cv", "deviation of words per paragraph over their mean", 0, INF, "boilerplate is uneven"),
        # characters
        ("letters", "share of letters among characters", 0, 1, "tables, code, noise have few"),
        ("upper_case", "share of capitals among letters", 0, 1, "shouting, headings, codes"),
        ("polish_letters", "share of ąćęłńóśźż among letters", 0, 1, "lost by careless typing and wrong encodings"),
        ("foreign_latin", "share of Latin letters that Polish has not (q, v, x, é)", 0, 1, "foreign words, encodings"),
        ("other_script", "share of letters that are not Latin", 0, 1, "Cyrillic, Greek, Chinese and so on"),
        ("vowels", "share of vowels among letters", 0, 1, "noise and codes have others"),
        ("digits", "share of digits among characters", 0, 1, "tables, prices, dates"),
        ("white_space", "share of spaces, tabs and newlines among characters", 0, 1, "layout, spaced-out letters"),
        ("newlines", "share of newlines among characters", 0, 1, "lists, cut lines"),
        ("sentence_marks", "share of . ! ? … among characters", 0, 1, "prose has one per sentence"),
        ("commas", "share of commas among characters", 0, 1, "Polish clauses need them"),
        ("other_marks", "share of ; : - – — ( ) and quotation marks among characters", 0, 1, "style; lists of terms"),
        ("symbols", "share of other signs among characters: @ # % & * + = < > | { } [ ] / _", 0, 1, "code, markup"),
        ("pictures", "share of emoji and other pictures among characters", 0, 1, "chat"),
        ("broken", "share of control, private and replacement characters", 0, 1, "a wrong decoding"),
        ("mojibake", "pairs that UTF-8 leaves when read as Latin (Å‚, Ä…), per word", 0, INF, "wrong encoding"),
        ("letter_entropy", "bits per letter of their distribution", 0, 10, "noise is even, repetition is not"),
        # words as they are written
        ("capitalised", "share of words with a capital first and small letters after", 0, 1, "names, headings"),
        ("all_capitals", "share of words of two letters or more in capitals", 0, 1, "shouting, codes, acronyms"),
        ("mixed_case", "share of words with a capital after a small letter", 0, 1, "glued words, code, misreading"),
        ("letters_and_digits", "places where a letter touches a digit, per word", 0, INF, "misread l0ve, codes"),
        ("lone_letters", "share of one-letter words other than a, i, o, u, w, z", 0, 1, "misreading, spaced-out text"),
        ("no_vowel", "share of words of three letters or more without a vowel", 0, 1, "codes, noise, acronyms"),
        ("hyphenated_ends", "share of lines that end by a letter and a hyphen", 0, 1, "columns of print"),
        ("addresses", "parts of addresses (://, www., .pl, .com, .html, ...) per word", 0, INF, "links, spam"),
        ("tags", "words after # or @, per word", 0, INF, "social media"),
        ("markup", "HTML tags, entities, braces of templates, =\" and \": per word", 0, INF, "residues of pages"),
        ("bullets", "share of lines that begin with a bullet or number", 0, 1, "lists"),
        ("separators", "share of lines with | » > • or tabs between words", 0, 1, "menus, breadcrumbs, tables"),
        ("exclamations", "exclamation marks per sentence", 0, INF, "advertising, chat"),
        ("questions", "question marks per sentence", 0, INF, "forums, lists of questions"),
        ("ellipses", "ellipses (… or ...) per sentence", 0, INF, "chat, teasers that are cut off"),
        ("repeated_marks", "pairs of ! or ? in a row, per sentence", 0, INF, "chat"),
        ("stretched", "letters three times in a row, per word", 0, INF, "sooo: chat"),
        ("space_before_mark", "share of , . ! ? … after a space", 0, 1, "careless typing, misreading"),
        ("no_space_after_mark", "share of , . ! ? … between letters", 0, 1, "glued text"),
        ("double_spaces", "spaces after a space, per word", 0, INF, "layout by spaces"),
        ("ended_lines", "share of lines that end with a sentence mark", 0, 1, "menus and wrapped lines do not"),
        ("small_starts", "share of sentences that begin with a small letter", 0, 1, "careless typing, cut text"),
        # repetition
        ("repeated_lines", "share of lines that occurred before", 0, 1, "boilerplate"),
        ("repeated_paragraphs", "share of paragraphs that occurred before", 0, 1, "boilerplate"),
        ("repeated_sentences", "share of sentences that occurred before", 0, 1, "spun text, broken generators"),
        ("top_word", "share of the most frequent word", 0, 1, "keyword stuffing"),
        ("top_2_gram", "share of the most frequent pair of words", 0, 1, "keyword stuffing"),
        ("top_3_gram", "share of the most frequent three words", 0, 1, "keyword stuffing"),
        ("repeated_3_grams", "share of threes of words that occurred before", 0, 1, "templates"),
        ("repeated_5_grams", "share of fives of words that occurred before", 0, 1, "boilerplate, copies"),
        ("compression", "bytes after zlib (level 1) over bytes before", 0, INF, "low: repetition; high: noise"),
        # vocabulary and readability
        ("type_token", "distinct words over words, mean of windows of 100", 0, 1, "templates are poor, lists rich"),
        ("hapax", "share of the first 500 words that occur once in them", 0, 1, "word lists have no others"),
        ("word_entropy", "entropy of the words' distribution over its greatest value", 0, 1, "word lists reach it"),
        ("stop_words", "share of Polish function words", 0, 1, "prose is a third of them, lists have none"),
        ("distinct_stop_words", "distinct Polish function words over those that there are", 0, 1, "poor in lists"),
        ("english_stop_words", "share of English function words", 0, 1, "mixed languages"),
        ("other_stop_words", "share of German, French and Czech function words", 0, 1, "mixed languages"),
        ("syllables", "syllables per word", 0, LONGEST, "learned prose, lists of terms"),
        ("hard_words", "share of words of four syllables or more", 0, 1, "learned prose"),
        ("fog", "0.4 (sentence_words + 100 hard_words): years of school (Gunning)", 0, INF, "register"),
        # morphology (morfeusz2)
        ("oov", "share of words that the dictionary does not know", 0, 1, "errors, foreign words, noise"),
        ("nouns", "share of words that are nouns", 0, 1, "lists have many"),
        ("verbs", "share of words that are any form of a verb", 0, 1, "lists have few"),
        ("finite_verbs", "share of words that are finite verbs", 0, 1, "sentences need them"),
        ("infinitives", "share of words that are infinitives", 0, 1, "instructions"),
        ("participles", "share of words that are adjectival participles", 0, 1, "written style"),
        ("adverbial_participles", "share of words that are adverbial participles", 0, 1, "written style"),
        ("gerunds", "share of words that are gerunds", 0, 1, "official style, menus"),
        ("adjectives", "share of words that are adjectives", 0, 1, "description, lists of goods"),
        ("adverbs", "share of words that are adverbs", 0, 1, "prose"),
        ("pronouns", "share of words that are personal or reflexive pronouns", 0, 1, "talk, stories"),
        ("numerals", "share of words that are numerals", 0, 1, "prose writes numbers out"),
        ("prepositions", "share of words that are prepositions", 0, 1, "prose has many, lists none"),
        ("conjunctions", "share of words that are conjunctions", 0, 1, "prose"),
        ("subordinators", "share of words that open a subordinate clause", 0, 1, "complex sentences"),
        ("particles", "share of words that are particles", 0, 1, "talk, argument"),
        ("interjections", "share of words that are interjections", 0, 1, "chat"),
        ("abbreviations", "share of words that are abbreviations", 0, 1, "entries of catalogues"),
        ("proper_names", "share of words that are names of people or places", 0, 1, "lists of names"),
        ("case_nom", "share of the nominative among words with a case", 0, 1, "lists are in it"),
        ("case_gen", "share of the genitive among words with a case", 0, 1, "chains of it: official style"),
        ("case_dat", "share of the dative among words with a case", 0, 1, "rare: people acting"),
        ("case_acc", "share of the accusative among words with a case", 0, 1, "somebody does something"),
        ("case_inst", "share of the instrumental among words with a case", 0, 1, "prose"),
        ("case_loc", "share of the locative among words with a case", 0, 1, "prose: where and when"),
        ("case_voc", "share of the vocative among words with a case", 0, 1, "mostly the form of another case"),
        ("first_person", "share of the first person among words with a person", 0, 1, "talk, diaries"),
        ("second_person", "share of the second person among words with a person", 0, 1, "instructions, advertising"),
        ("third_person", "share of the third person among words with a person", 0, 1, "reports, stories"),
        ("past", "share of past tense among finite verbs", 0, 1, "stories, history"),
        ("present", "share of present tense among finite verbs", 0, 1, "explanation"),
        ("future", "share of future tense among finite verbs", 0, 1, "announcements"),
        ("imperative", "share of the imperative among finite verbs", 0, 1, "instructions, advertising"),
        ("conditional", "share of the conditional among finite verbs", 0, 1, "argument"),
        ("impersonal", "share of impersonal forms (-no, -to, trzeba) among finite verbs", 0, 1, "official style"),
        ("perfective", "share of perfective ones among verbs with an aspect", 0, 1, "stories"),
        ("plural", "share of the plural among words with a number", 0, 1, "lists of goods, categories"),
        ("nouns_per_verb", "nouns over 1 + verbs", 0, INF, "nominal style, lists"),
        ("ambiguity", "readings per word that the dictionary knows", 0, 20, "short common words have many"),
        ("finite_sentences", "share of sentences with what can be a finite verb", 0, 1, "what is a sentence at all"),
        ("finite_words", "share of words in sentences with what can be a finite verb", 0, 1, "prose against lists"),
    )
]  # fmt: skip
FIRST_OF_MORPHOLOGY = next(i for i, feature in enumerate(FEATURES) if feature.name == "oov")


def feature_names(morphology: bool) -> list[str]:
    """Those that are measured, in the order of the table."""
    return [feature.name for feature in (FEATURES if morphology else FEATURES[:FIRST_OF_MORPHOLOGY])]


# --- measuring --------------------------------------------------------------------------------------------------------


class Features:
    """`measure` of one text after the other; `names` are those of the numbers.

    Raises morphology.NoMorphology where morfeusz2 is wanted and not installed.
    """

    def __init__(self, morphology: bool = True):
        self.morphology = Morphology() if morphology else None
        self.forms = Forms(self.morphology)
        self.names = feature_names(morphology)

    def measure(self, text: str) -> np.ndarray:
        """[len(self.names)] float32 of any text, an empty one too."""
        self.forms.tidy()
        parts = Parts(text)
        numbers = np.fromiter(map(self.forms.__getitem__, parts.forms), np.int64, len(parts.forms))
        rows = self.forms.rows[numbers]
        sums = dict(zip(SUMS, rows.sum(0).tolist(), strict=False))
        values = _lengths(parts, sums) | _characters(parts) | _marks(parts) | _written(parts, sums)
        values |= _repetition(parts) | _vocabulary(parts, sums)
        if self.morphology:
            values |= _morphology(parts, sums, rows[:, SUMS.index("finite")] > 0)
        return np.array([values[name] for name in self.names], np.float32)


def _lengths(parts: Parts, sums: dict[str, int]) -> dict[str, float]:
    n_words, in_lines = len(parts.words), np.array([len(line) for line in parts.lines])
    mean, square = _over(sums["letters"], n_words), _over(sums["letters_squared"], n_words)
    in_sentences = parts.sentence_words
    return {
        "log_characters": math.log10(1 + len(parts.text)),
        "log_words": math.log10(1 + n_words),
        "log_sentences": math.log10(1 + len(in_sentences)),
        "word_length": mean,
        "word_length_sd": math.sqrt(max(square - mean**2, 0)),
        "short_words": _over(sums["short"], n_words),
        "long_words": _over(sums["long"], n_words),
        "log_longest_word": math.log10(1 + max(map(len, parts.words), default=0)),
        "sentence_words": _mean(in_sentences),
        "sentence_words_sd": _sd(in_sentences),
        "sentence_words_median": statistics.median(in_sentences.tolist() or [0]),
        "log_longest_sentence": math.log10(1 + in_sentences.max(initial=0)),
        "short_sentences": _over(_count(in_sentences < 4), len(in_sentences)),
        "long_sentences": _over(_count(in_sentences > 40), len(in_sentences)),
        "line_characters": _mean(in_lines),
        "line_characters_cv": _over(_sd(in_lines), _mean(in_lines)),
        "short_lines": _over(_count(in_lines < 30), len(in_lines)),
        "line_words": _over(n_words, len(parts.lines)),
        "paragraph_words": _mean(parts.paragraph_words),
        "paragraph_words_cv": _over(_sd(parts.paragraph_words), _mean(parts.paragraph_words)),
    }


def _characters(parts: Parts) -> dict[str, float]:
    counts = np.bincount(parts.kinds, minlength=len(KINDS))
    n, n_letters = len(parts.text), int(counts[:N_LETTERS].sum())
    counts = dict(zip(KINDS, counts.tolist(), strict=True))
    lower = np.frombuffer(parts.text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    latin = lower[(lower < 0x250) & (kinds_of(lower) < N_LETTERS)]
    in_capitals = counts["upper"] + counts["polish_upper"] + counts["foreign_upper"]
    return {
        "letters": _over(n_letters, n),
        "upper_case": _over(in_capitals, n_letters),
        "polish_letters": _over(counts["polish_lower"] + counts["polish_upper"], n_letters),
        "foreign_latin": _over(counts["foreign_lower"] + counts["foreign_upper"], n_letters),
        "other_script": _over(counts["other_script"], n_letters),
        "digits": _over(counts["digit"], n),
        "white_space": _over(counts["space"] + counts["newline"], n),
        "newlines": _over(counts["newline"], n),
        "sentence_marks": _over(counts["sentence_mark"], n),
        "commas": _over(counts["comma"], n),
        "other_marks": _over(counts["other_mark"], n),
        "symbols": _over(counts["symbol"], n),
        "pictures": _over(counts["picture"], n),
        "broken": _over(counts["broken"], n),
        "letter_entropy": _entropy(np.bincount(latin)),
    }


ADDRESS = re.compile(r"\.(?:pl|com|org|net|eu|info|html?|php)\b")
MARKUP = re.compile(
    r"[<&{}=\"](?:(?<=<)/?[A-Za-z!][^<>\n]{0,200}>|(?<=&)(?:\w{2,8}|#\d{1,6});|(?<=[{}])[{}]|(?<==)\"|(?<=\"):)"
)
SEPARATOR = re.compile(r"[|»>•·\t]")
MOJIBAKE = re.compile(r"[ÃÅÄĹĂâ][\u0080-\u00bf€‚„…†‡‰Š‹ŚŤŽŹ‘’“”•–—™š›śťžźˇ˘Ł¤Ą¦§¨©Ş«¬®Ż°±˛ł´µ¶·¸ąş»Ľ˝ľż]")


def _marks(parts: Parts) -> dict[str, float]:
    """What stands between words: by the kinds of neighbouring characters where patterns would be slower."""
    text, codes, kinds, letter = parts.text, parts.codes, parts.kinds, parts.is_letter
    n_words, n_lines, n_sentences = len(parts.words), len(parts.lines), len(parts.sentences)
    digit, space = kinds == KIND["digit"], kinds == KIND["space"]
    mark = (kinds == KIND["sentence_mark"]) | (kinds == KIND["comma"])
    n_marks = _count(mark)
    shout = (codes == ord("!")) | (codes == ord("?"))
    tag = (codes == ord("#")) | (codes == ord("@"))
    hyphen = (codes == ord("-")) | (codes == 0xAD) | (codes == ord("¬"))
    stretched = letter[2:] & (codes[2:] == codes[1:-1]) & (codes[1:-1] == codes[:-2])
    seen = np.flatnonzero(letter | digit)
    first = np.searchsorted(seen, parts.sentence_starts)  # of each sentence, and each has a letter
    return {
        "mojibake": _over(sum(1 for _ in MOJIBAKE.finditer(text)), n_words),
        "letters_and_digits": _over(_count(letter[1:] & digit[:-1]) + _count(digit[1:] & letter[:-1]), n_words),
        "hyphenated_ends": _over(_count(letter[:-2] & hyphen[1:-1] & (codes[2:] == ord("\n"))), n_lines),
        "addresses": _over(text.count("://") + text.count("www.") + len(ADDRESS.findall(text)), n_words),
        "tags": _over(_count(tag[:-1] & letter[1:]), n_words),
        "markup": _over(sum(1 for _ in MARKUP.finditer(text)), n_words),
        "bullets": _over(sum(1 for line in parts.lines if BULLET.match(line)), n_lines),
        "separators": _over(sum(1 for line in parts.lines if SEPARATOR.search(line, 1, len(line) - 1)), n_lines),
        "exclamations": _over(text.count("!"), n_sentences),
        "questions": _over(text.count("?"), n_sentences),
        "ellipses": _over(text.count("…") + text.count("..."), n_sentences),
        "repeated_marks": _over(_count(shout[1:] & shout[:-1]), n_sentences),
        "stretched": _over(_count(stretched), n_words),
        "space_before_mark": _over(_count(space[:-1] & mark[1:]), n_marks),
        "no_space_after_mark": _over(_count(letter[:-2] & mark[1:-1] & letter[2:]), n_marks),
        "double_spaces": _over(_count(space[1:] & space[:-1]), n_words),
        "ended_lines": _over(sum(line.rstrip("\"'”’»)]").endswith(SENTENCE_MARKS) for line in parts.lines), n_lines),
        "small_starts": _over(_count(kinds[seen[first]] < N_LOWER), n_sentences),
    }


def _written(parts: Parts, sums: dict[str, int]) -> dict[str, float]:
    n_words = len(parts.words)
    return {
        "vowels": _over(sums["vowels"], sums["letters"]),
        "capitalised": _over(sums["capitalised"], n_words),
        "all_capitals": _over(sums["all_capitals"], n_words),
        "mixed_case": _over(sums["mixed_case"], n_words),
        "lone_letters": _over(sums["lone"], n_words),
        "no_vowel": _over(sums["no_vowel"], n_words),
    }


def _repetition(parts: Parts) -> dict[str, float]:
    raw, n = parts.text.encode("utf-8", "surrogatepass"), len(parts.words)
    number = {word: i for i, word in enumerate(dict.fromkeys(parts.words))}
    words = np.fromiter(map(number.__getitem__, parts.words), np.int64, n)
    twos = words[:-1] * len(number) + words[1:]
    threes = twos[:-1] * len(number) + words[2:]  # below 2^60, since there are under 2^20 words
    fives = zip(threes[:-2].tolist(), threes[2:].tolist(), strict=True)
    counts, twos, threes = np.bincount(words), Counter(twos.tolist()), Counter(threes.tolist())
    return {
        "repeated_lines": _repeated(parts.lines),
        "repeated_paragraphs": _repeated(parts.paragraphs),
        "repeated_sentences": _repeated(parts.sentences),
        "top_word": _over(int(counts.max(initial=0)), n),
        "top_2_gram": _over(max(twos.values(), default=0), n - 1),
        "top_3_gram": _over(max(threes.values(), default=0), n - 2),
        "repeated_3_grams": 1 - len(threes) / (n - 2) if n > 2 else 0.0,
        "repeated_5_grams": 1 - len(set(fives)) / (n - 4) if n > 4 else 0.0,
        "compression": _over(len(zlib.compress(raw, 1)), len(raw)),
        "word_entropy": _over(_entropy(counts), math.log2(max(n, 1))),
    }


def _vocabulary(parts: Parts, sums: dict[str, int]) -> dict[str, float]:
    words, n = parts.words, len(parts.words)
    windows = [words[i : i + 100] for i in range(0, n, 100)]
    if len(windows) > 1 and len(windows[-1]) < 50:
        windows.pop()
    hapax = sum(count == 1 for count in Counter(words[:500]).values())
    return {
        "type_token": _over(sum(len(set(window)) / len(window) for window in windows), len(windows)),
        "hapax": _over(hapax, min(n, 500)),
        "stop_words": _over(sums["stop"], n),
        "distinct_stop_words": len(STOP_WORDS.intersection(words)) / len(STOP_WORDS),
        "english_stop_words": _over(sums["english"], n),
        "other_stop_words": _over(sums["other_languages"], n),
        "syllables": _over(sums["syllables"], n),
        "hard_words": _over(sums["hard"], n),
        "fog": 0.4 * (_over(n, len(parts.sentences)) + 100 * _over(sums["hard"], n)),
    }


OF_WORDS = {  # feature -> column of morphology.py
    "oov": "oov",
    "nouns": "noun",
    "verbs": "verb",
    "finite_verbs": "finite",
    "infinitives": "infinitive",
    "participles": "participle",
    "adverbial_participles": "adverbial_participle",
    "gerunds": "gerund",
    "adjectives": "adjective",
    "adverbs": "adverb",
    "pronouns": "pronoun",
    "numerals": "numeral",
    "prepositions": "preposition",
    "conjunctions": "conjunction",
    "subordinators": "subordinator",
    "particles": "particle",
    "interjections": "interjection",
    "abbreviations": "abbreviation",
    "proper_names": "proper_name",
}
PERSON_NAMES = {"first_person": "pri", "second_person": "sec", "third_person": "ter"}


def _morphology(parts: Parts, sums: dict[str, int], can_be_finite: np.ndarray) -> dict[str, float]:
    n, n_sentences = len(parts.words), len(parts.sentences)
    sentence = np.repeat(np.arange(n_sentences), parts.sentence_words)
    finite = np.bincount(sentence, can_be_finite, minlength=n_sentences) > 0
    cases, persons = (sum(sums[name] for name in names) for names in (CASES, PERSONS))
    known = UNIT * n - sums["oov"]
    return {
        **{name: _over(sums[column], UNIT * n) for name, column in OF_WORDS.items()},
        **{f"case_{case}": _over(sums[case], cases) for case in CASES},
        **{name: _over(sums[person], persons) for name, person in PERSON_NAMES.items()},
        **{name: _over(sums[name], sums["finite"]) for name in ("past", "present", "future")},
        **{name: _over(sums[name], sums["finite"]) for name in ("imperative", "conditional", "impersonal")},
        "perfective": _over(sums["perf"], sums["perf"] + sums["imperf"]),
        "plural": _over(sums["pl"], sums["sg"] + sums["pl"]),
        "nouns_per_verb": sums["noun"] / (UNIT + sums["verb"]),
        "ambiguity": _over(UNIT * sums["ambiguity"] - sums["oov"], known),
        "finite_sentences": _over(_count(finite), n_sentences),
        "finite_words": _over(int(parts.sentence_words[finite].sum()), n),
    }


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_count = np.count_nonzero


def _mean(values: np.ndarray) -> float:
    """Of whole numbers; numpy's own mean takes three times as long on arrays as short as these."""
    return int(values.sum()) / len(values) if len(values) else 0.0


def _sd(values: np.ndarray) -> float:
    return math.sqrt(max(int(values @ values) / len(values) - _mean(values) ** 2, 0)) if len(values) else 0.0


def _repeated(parts: list[str]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _entropy(counts: np.ndarray) -> float:
    counts = counts[counts > 0]
    shares = counts / max(counts.sum(), 1)
    return abs(float((shares * np.log2(shares)).sum()))
