"""The numbers that a quality classifier sees: by hand, on damage, within their ranges, and whatever came before."""

import hashlib
import math
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polish_texts import PAGES

from bench.lib.polish import DAMAGES
from halny.model.data import morphology, text_parts
from halny.model.data.features import FEATURES, VERSION, Features, feature_names
from halny.model.data.morphology import COLUMN, UNIT, Morphology, NoMorphology
from halny.model.data.text_parts import Parts

pytest.importorskip("morfeusz2", reason="no wheel for Linux on Arm")
PROSE = [text for name, text in PAGES.items() if name.startswith("prose")]


@pytest.fixture(scope="module")
def features():
    return Features()


@pytest.fixture(scope="module")
def analyser():
    return Morphology()


def measured(features: Features, text: str) -> dict[str, float]:
    return dict(zip(features.names, features.measure(text).tolist(), strict=True))


def test_the_table():
    assert len(FEATURES) > 93 and len(set(feature_names(True))) == len(FEATURES)  # the reference run had 93
    assert len({feature.definition for feature in FEATURES}) == len(FEATURES)
    assert feature_names(False) == feature_names(True)[: len(feature_names(False))]
    assert all(feature.low < feature.high and feature.why for feature in FEATURES)
    assert f"[{len(FEATURES)} numbers]" in (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "Ala ma kota. Kot ma Alę!\n",
            {
                "log_characters": math.log10(26),
                "log_words": math.log10(7),
                "log_sentences": math.log10(3),
                "word_length": 17 / 6,
                "word_length_sd": math.sqrt((9 + 4 + 16 + 9 + 4 + 9) / 6 - (17 / 6) ** 2),
                "short_words": 2 / 6,
                "sentence_words": 3,
                "sentence_words_sd": 0,
                "short_sentences": 1,
                "line_characters": 24,
                "letters": 17 / 25,
                "upper_case": 3 / 17,
                "polish_letters": 1 / 17,
                "vowels": 9 / 17,
                "sentence_marks": 2 / 25,
                "newlines": 1 / 25,
                "white_space": 6 / 25,
                "capitalised": 3 / 6,
                "exclamations": 0.5,
                "ended_lines": 1,
                "top_word": 2 / 6,
                "hapax": 4 / 6,
                "type_token": 5 / 6,
                "stop_words": 2 / 6,
                "syllables": 9 / 6,
                "hard_words": 0,
                "fog": 0.4 * 3,
                "oov": 0,
                "prepositions": 0,
                "finite_sentences": 1,
                "finite_words": 1,
            },
        ),
        (
            "MENU\n- Dom\n- Dom\n1) Zażółć gęślą jaźń  x\n\nwww.onet.pl | RTV/AGD 24h\n",
            {
                "bullets": 3 / 5,
                "separators": 1 / 5,
                "repeated_lines": 1 / 5,
                "all_capitals": 3 / 13,
                "addresses": 2 / 13,
                "letters_and_digits": 1 / 13,
                "lone_letters": 2 / 13,  # x, h
                "double_spaces": 1 / 13,
                "no_space_after_mark": 1,
                "ended_lines": 0,
                "foreign_latin": 2 / 42,  # x, V
            },
        ),
        ("", dict.fromkeys(["letters", "compression", "sentence_words", "oov", "finite_words", "type_token"], 0)),
        ("12 345, 67!", {"digits": 7 / 11, "log_words": 0, "sentence_words": 0, "oov": 0}),
        ("Привет, как дела? Tak.", {"other_script": 13 / 16, "oov": 3 / 4}),
        ("xDDD heeej!!! co tam??? nooo...", {"stretched": 3 / 5, "repeated_marks": 4, "ellipses": 1}),
        ("Zobacz koty ,psy i ptaki.A potem wracaj .", {"space_before_mark": 2 / 3, "no_space_after_mark": 1 / 3}),
        ("Å‚Ã³dÅº pÅ‚ynie", {"mojibake": 4 / 5}),
        ('<b>Tak</b> &amp; {{nie}} <a href="x">', {"markup": 6 / 8}),
        ("kto to\nnie ma-\nmy i ta-\nk", {"hyphenated_ends": 2 / 4}),
    ],
)
def test_by_hand(features, text, expected):
    found = measured(features, text)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Prof. J. Nowak mieszka przy ul. Długiej. Ma psa.", 2),
        ("W 1990 r. Kraków liczył 750 tys. Ludzie tam żyli... i żyją. „Tak!” — rzekł.", 2),
        ("Czy to on? Tak! Chodź… Już.", 4),
        ("Jeden.\n\nDwa bez kropki\n\n3. Trzy", 3),
        ("Lista:\n- chleb\n- masło\n* mleko", 4),
        ("Zdanie złamane\nw dwóch wierszach. Drugie.", 2),
        ("Kupił m.in.  mleko,   chleb i ser.   Potem wrócił.", 2),
        ("", 0),
        ("... !!! ???", 0),
    ],
)
def test_sentences(text, sentences):
    assert len(Parts(text).sentences) == sentences


def test_parts_have_all_words_once():
    for text in PAGES.values():
        parts = Parts(text)
        assert parts.sentence_words.sum() == parts.paragraph_words.sum() == len(parts.words) == len(parts.forms)
        for cut in (parts.sentences, parts.paragraphs, parts.lines):
            assert re.findall(r"[^\W\d_]+", " ".join(cut)) == parts.forms


@pytest.mark.parametrize(
    "form, expected",
    [
        ("mam", {"noun": 1 / 3, "finite": 2 / 3, "imperative": 1 / 3, "gen": 1 / 3, "present": 1 / 3, "ambiguity": 3}),
        ("zrobi", {"future": 1, "present": 0, "perf": 1, "ter": 1, "sg": 1}),
        ("poszedłbym", {"conditional": 1, "finite": 1, "verb": 1, "pri": 1, "ambiguity": 1}),
        ("zrobiono", {"impersonal": 1, "past": 1, "finite": 1}),
        ("czytając", {"adverbial_participle": 1, "finite": 0, "verb": 1}),
        ("Kraków", {"proper_name": 1, "noun": 1}),
        ("np", {"abbreviation": 1, "oov": 0}),
        ("przez", {"preposition": 1, "acc": 0}),
        ("xyzzy", {"oov": 1, "ambiguity": 1}),
        ("że", {"conjunction": 1 / 2, "subordinator": 1 / 2, "particle": 1 / 2}),
        ("żeś", {"conjunction": 1 / 2, "finite": 0}),
    ],
)
def test_readings_of_a_form(analyser, form, expected):
    row = analyser.row(form)
    found = {name: row[COLUMN[name]] / (1 if name == "ambiguity" else UNIT) for name in expected}
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "kind, name, more",
    [
        ("ocr", "oov", True),
        ("ocr", "letters_and_digits", True),
        ("mojibake", "mojibake", True),
        ("no_diacritics_typos", "polish_letters", False),
        ("no_diacritics_typos", "small_starts", True),
        ("shuffled", "capitalised", None),  # its words are the same, and so is what only counts them
        ("repeated", "compression", False),
        ("repeated", "repeated_5_grams", True),
        ("spam", "exclamations", True),
        ("spam", "addresses", True),
        ("machine_mix", "english_stop_words", True),
        ("machine_mix", "other_stop_words", True),
        ("cut", "hyphenated_ends", True),
        ("cut", "ended_lines", False),
        ("markup", "markup", True),
        ("letters", "lone_letters", True),
        ("letters", "double_spaces", True),
        ("random_words", "oov", True),
        ("random_words", "stop_words", False),
    ],
)
def test_damage_shows(features, kind, name, more):
    for text in PROSE:
        before, after = measured(features, text)[name], measured(features, DAMAGES[kind](text, random.Random(1)))[name]
        assert before == after if more is None else (after > before if more else after < before), text[:40]


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters() | st.sampled_from("aąż. \n\t!?-…|<>&;0@")) | st.text(max_size=400))
def test_any_text_is_within_the_ranges(features, text):
    values = features.measure(text)
    assert values.dtype == np.float32 and np.isfinite(values).all()
    for feature, value in zip(FEATURES, values.tolist(), strict=True):
        assert feature.low <= value <= feature.high + 1e-6, feature.name


def test_without_morphology_the_others_are_the_same(features):
    without = Features(morphology=False)
    for text in PAGES.values():
        assert (without.measure(text) == features.measure(text)[: len(without.names)]).all()


def test_what_came_before_changes_nothing_and_memory_is_bounded(features, monkeypatch):
    expected = [features.measure(text) for text in PAGES.values()]
    monkeypatch.setattr(text_parts, "FORMS", 100)
    small = Features()
    for _ in range(2):
        for text, values in zip(PAGES.values(), expected, strict=True):
            assert (small.measure(text) == values).all()
            most = len(set(Parts(text).forms))
            assert len(small.forms) <= 100 + most and len(small.forms.older) <= 100 + 400
    monkeypatch.setattr(text_parts, "ROWS", 50)
    for text, values in zip(PAGES.values(), expected, strict=True):
        assert (small.measure(text) == values).all()
        assert len(small.forms.numbers) <= 50 + len(set(Parts(text).forms))


def test_a_composed_and_a_decomposed_text_are_one(features):
    text = PROSE[0]
    assert (features.measure(unicodedata.normalize("NFD", text)) == features.measure(text)).all()


def test_a_long_text_is_looked_at_up_to_a_point(features, monkeypatch):
    monkeypatch.setattr(text_parts, "LONGEST", 1000)
    assert (features.measure(PROSE[0][:1000] + "x" * 10**6) == features.measure(PROSE[0][:1000])).all()


def test_the_definitions_are_those_of_this_version(features):
    """Who changes what is measured must raise VERSION, and put the new hash here."""
    totals = dict(zip(features.names, sum(map(features.measure, PAGES.values())).tolist(), strict=True))
    own = [f"{name} {totals[name]:.4g}" for name in feature_names(False) if name != "compression"]  # zlib's differ
    assert (VERSION, hashlib.sha256("\n".join(own).encode()).hexdigest()[:16]) == (1, "603c06397e7a4538")


def test_morfeusz_missing(monkeypatch):
    monkeypatch.setattr(morphology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoMorphology, match=r"pip install 'halny\[quality\]' on x86-64, or .* fit --no-morphology"):
        Features()
    assert Features(morphology=False).measure("Ala ma kota.").any()
