"""The quality classifier's data: the small set of the tests, damage, and what is read from help and manual pages."""

import random
from collections import Counter

import pytest
from polish_texts import PAGES, small_set

from bench.lib.polish import (
    DAMAGES,
    LISTS,
    TRAINED,
    Block,
    Document,
    articles,
    help_blocks,
    labelled,
    lists,
    man_blocks,
    part_of,
)

PROSE = {name: text for name, text in PAGES.items() if name.startswith("prose")}


def test_small_set_is_balanced_and_deterministic():
    documents = small_set()
    assert documents == small_set() != small_set(seed=1)
    assert Counter(row["quality"] for row in documents) == {"HIGH": 70, "MEDIUM": 70, "LOW": 70}
    assert len({row["text"] for row in documents}) == len(documents)
    assert all(200 <= len(row["text"]) <= 3000 for row in documents)
    high = [row["text"] for row in documents if row["quality"] == "HIGH"]
    assert all(any(text in page for page in PROSE.values()) for text in high)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_changes_the_text_and_keeps_its_length(kind):
    damage = DAMAGES[kind]
    for text in PROSE.values():
        for seed in range(5):
            damaged = damage(text, random.Random(seed))
            assert damaged == damage(text, random.Random(seed))
            assert 0.5 * len(text) <= len(damaged) <= 2 * len(text)
            changed = sum(a != b for a, b in zip(text, damaged, strict=False))
            assert changed > 0.3 * len(text)  # the rest is at another place, at least


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("text", ["", " \n\n", "a", "Kot", "żółć" * 200, "...", "Tak! " * 3], ids=repr)
def test_damage_takes_odd_text(kind, text):
    for seed in range(5):
        assert isinstance(DAMAGES[kind](text, random.Random(seed)), str)


def test_labelled_never_has_a_clean_document_damaged():
    sentence = PROSE["prose_bridge"].split("\n\n")[1]
    clean = [Document(f"{number}. {sentence}", "help") for number in range(400)]
    rows = list(labelled([*clean, Document("Plik\nEdycja", LISTS[0])], seed=0))
    assert rows == list(labelled([*clean, Document("Plik\nEdycja", LISTS[0])], seed=0))
    parts = Counter(part_of(text) for text, _ in clean)
    assert Counter(row["quality"] for row in rows) == {**{k: parts[k] for k in ("HIGH", "LOW")}, "MEDIUM": 1}
    assert parts["held back"] > 0 and parts["HIGH"] > 150 and parts["LOW"] > 150
    high = {row["text"] for row in rows if row["quality"] == "HIGH"}
    assert high == {text for text, _ in clean if part_of(text) == "HIGH"}
    damaged = Counter(row["kind"] for row in rows if row["quality"] == "LOW")
    assert set(damaged) == set(TRAINED) and max(damaged.values()) - min(damaged.values()) <= 1


def test_help_page_without_its_frame():
    page = """<html><header><p>Pomoc</p></header><aside><p>Spis treści</p></aside><div id="DisplayArea"><h1>Sprawdzanie
        <span class="emph">pisowni</span></h1>
        <p>Naciśnij <span><span class="MAC">Command</span><span>Ctrl</span></span>+A.
        <br>Potem&nbsp;czekaj.</p><pre>Sub Main</pre><p><a href="x">Słownik</a></p><table><tr><td><p>Tryb</p></td>
        <td><p>Wynik</p></td></tr></table><div class="howtoget"><p>Wybierz Plik</p></div></div>
        <footer><p>This page is</p></footer></html>"""
    assert help_blocks(page) == [
        Block("heading", "Sprawdzanie pisowni"),
        Block("text", "Naciśnij Ctrl+A."),
        Block("text", "Potem czekaj."),
        Block("link", "Słownik"),
        Block("row", "Tryb | Wynik"),
    ]


def test_man_page_without_roff():
    page = r""".\" uwaga
.TH LS 1
.SH NAZWA
ls \- wypisuje
.SH SKŁADNIA
\fBls\fP [\fIPLIK\fP]
.SH OPIS
Wypisuje \fIpliki\fP
.B \-\-sort .
.PP
Zob. \(aqtak\(aq i
.BR ls (1).
.TP
\fB\-a\fP
wszystkie
.nf
kod
.fi
.SH AUTOR
Jan
"""
    assert [block for block in man_blocks(page) if block.kind != "heading"] == [
        Block("option", "ls [PLIK]"),
        Block("text", "Wypisuje pliki --sort ."),
        Block("text", "Zob. 'tak' i ls(1)."),
        Block("option", "-a  wszystkie"),
    ]
    assert man_blocks(".Dd dziś\n.Sh NAZWA") == []


def test_articles_are_prose_in_polish_and_never_twice():
    paragraphs = [Block("text", text) for text in PROSE["prose_bees"].strip().split("\n\n")]
    english = Block("text", "This is the page that you can read if it is not in the language of the reader.")
    seen = set()
    (article,) = articles([Block("heading", "Taniec"), *paragraphs, english], seen)
    assert article == "Taniec\n\n" + PROSE["prose_bees"].strip()
    assert list(articles(paragraphs, seen)) == []
    assert list(articles([Block("text", line) for line in PAGES["menu"].splitlines()], set())) == []


def test_lists_have_every_line_once():
    lines = [f"pozycja {i}" for i in range(1000)]
    found = "\n".join(lists(lines)).splitlines()
    assert found == lines[: len(found)] and len(found) > 700
