"""A small labelled set of Polish texts for tests, made from the pages in tests/polish.

The pages were written for this repository: prose of several registers, and what a web crawl has besides: forums, menus,
lists, a bad scan, languages mixed. Their names begin with what they are.
"""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from bench.lib.polish import DAMAGES, TRAINED

PAGES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "polish").glob("*.txt"))}

SENTENCE_ENDS, PARAGRAPH_ENDS = r"(?<=[.!?”])\s+", r"\n\s*\n"


def pages(*kinds: str) -> list[str]:
    return [text for name, text in PAGES.items() if name.startswith(kinds)]


def windows(text: str, ends: str, rng: random.Random) -> Iterator[str]:
    """From every start of a sentence (or paragraph) the text to a later end, some 300 to 1500 characters."""
    text = text.strip()
    gaps = [match.span() for match in re.finditer(ends, text)]
    starts, stops = [0, *(gap[1] for gap in gaps)], [*(gap[0] for gap in gaps), len(text)]
    for start in starts:
        size = rng.randint(300, 1200)
        stop = next((stop for stop in stops if stop >= start + size), None)
        if stop is not None and stop - start <= 1500:
            yield text[start:stop]


def distinct(n: int, texts: list[str], ends: str, rng: random.Random) -> list[str]:
    found = {}
    while len(found) < n:
        found |= dict.fromkeys(window for text in texts for window in windows(text, ends, rng))
    return rng.sample(list(found), n)


def shuffled_lines(text: str, rng: random.Random) -> str:
    """Lines of a menu or list in random order, 300 to 1000 characters of them."""
    lines = text.splitlines()
    rng.shuffle(lines)
    sizes = itertools.accumulate(len(line) + 1 for line in lines)
    size = rng.randint(300, 1000)
    return "\n".join(line for line, end in zip(lines, sizes, strict=True) if end <= size)


def small_set(seed: int = 0) -> list[dict]:
    """{"text", "quality"} of 70 documents each of HIGH, MEDIUM and LOW, no two alike, in random order."""
    rng = random.Random(seed)
    prose = distinct(120, pages("prose"), SENTENCE_ENDS, rng)
    high, to_damage = prose[:70], prose[70:]
    lists = pages("menu", "list", "word_list")
    medium = [shuffled_lines(lists[i % len(lists)], rng) for i in range(70)]
    low = [DAMAGES[TRAINED[i % len(TRAINED)]](text, rng) for i, text in enumerate(to_damage)]
    low += distinct(20, pages("forum", "ocr"), PARAGRAPH_ENDS, rng)
    documents = [
        {"text": text, "quality": quality}
        for quality, texts in (("HIGH", high), ("MEDIUM", medium), ("LOW", low))
        for text in texts
    ]
    rng.shuffle(documents)
    return documents
