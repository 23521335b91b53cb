"""Real Polish text of Debian packages, the lists that are among it, and damage: what a quality classifier learns from.

``fetch`` downloads three packages: LibreOffice's help, manual pages and fortunes, some megabytes of Polish.
``documents`` yields what is in them as plain text: prose with a blank line between paragraphs (kinds in CLEAN), or
lists (kinds in LISTS). A paragraph that an earlier document has is left out, so no two documents share one.
``labelled`` makes of them HIGH (prose), MEDIUM (lists) and LOW (prose with one of the DAMAGES).
"""

import gzip
import hashlib
import html
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from halny.model.data.text_parts import ENGLISH, STOP_WORDS

PACKAGES = ("manpages-pl", "libreoffice-help-pl", "fortunes-pl")
CLEAN = ("help", "man", "fortunes")
LISTS = ("contents", "index", "table", "links", "options")
SHORTEST, LONGEST = 500, 3000  # characters of a clean document; a longer page becomes several
LIST_SIZES = (400, 800, 1300, 2000, 2800)  # characters of the lists, in turn
# of fortunes-pl; others are mostly chat logs, jokes in one line, or signatures
FORTUNES = ("bajki", "matura", "nauka", "pratchett", "puchatek", "sapkowski", "seneka", "stachura", "zen")

FORMULA = re.compile(r"\{?=|[A-ZĄĆĘŁŃÓŚŹŻ][\w.]+ ?\(.*\)$")  # also how a function of a spreadsheet is called


class Document(NamedTuple):
    text: str
    kind: str  # one of CLEAN or LISTS


class Block(NamedTuple):
    kind: str  # "heading", "text", "link" (all of it is links), "row" (of a table) or "option"
    text: str


# ------------------------------------------------------------------------------------------------------------- packages


def fetch(folder: Path) -> Path:
    """Downloads the PACKAGES into a folder, those that are not there yet, and unpacks them; the tree they make."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = folder / "unpacked"
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            run(["apt-get", "download", package], folder, "run apt-get update; it needs a network")
        newest = max(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
        run(["dpkg-deb", "-x", newest.name, tree.name], folder, "remove the file, so that it is downloaded again")
    return tree / "usr/share"


def run(command: list[str], folder: Path, remedy: str) -> None:
    if not shutil.which(command[0]):
        raise SystemExit(f"{command[0]} is not here: this needs Debian or Ubuntu, for their {', '.join(PACKAGES)}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {folder}: {done.stderr.strip()}\n{remedy}")


def documents(tree: Path) -> Iterator[Document]:
    """All documents of the unpacked packages, always in the same order."""
    help_pages = [help_blocks(path.read_text()) for path in sorted(tree.glob("libreoffice/help/pl/text/**/*.html"))]
    man_pages = [
        man_blocks(gzip.decompress(path.read_bytes()).decode(errors="replace"))
        for path in sorted(tree.glob("man/pl/man*/*.gz"))
        if not path.is_symlink()
    ]
    fortunes = [
        [Block("text", " ".join(part.split())) for part in re.split(r"\n\s*\n|\n(?=\s*[-–] )", fortune)]
        for name in FORTUNES
        for fortune in re.split(r"(?m)^%$", (tree / "games/fortunes/pl" / name).read_text())
    ]
    seen = set()
    for kind, pages in zip(CLEAN, (help_pages, man_pages, fortunes), strict=True):
        for page in pages:
            yield from (Document(text, kind) for text in articles(page, seen))

    script = (tree / "libreoffice/help/pl/contents.js").read_text()
    titles = [html.unescape(title) for title in re.findall(r"<(?:label|a) [^>]*>([^<]+)</", script)]
    script = (tree / "libreoffice/help/pl/bookmarks.js").read_text()
    entries = [html.unescape(entry) for entry in re.findall(r'text:"([^"]+)"', script)]
    rows, links = ([b.text for page in help_pages for b in page if b.kind == kind] for kind in ("row", "link"))
    options = [block.text for page in man_pages for block in page if block.kind == "option"]
    for kind, lines in zip(LISTS, (titles, entries, rows, links, options), strict=True):
        items = dict.fromkeys(filter(is_item, lines))
        yield from (Document(text, kind) for text in lists(list(items)))


def share(words: frozenset[str], text: str) -> float:
    """The share of those words among the words of a text."""
    found = re.findall(r"\w+", text.lower())
    return sum(word in words for word in found) / max(1, len(found))


def is_polish(text: str) -> bool:
    polish, english = share(STOP_WORDS, text), share(ENGLISH, text)
    return polish > english or (english == 0 and re.search("[ąćęłńóśźż]", text) is not None)


def is_sentence(text: str) -> bool:
    return len(text) > 40 and text[-1] in '.!?"”»)'


def is_item(line: str) -> bool:
    """Whether a line may stand in a list: short, not in English, and more letters than figures and signs."""
    in_english = share(ENGLISH, line) > share(STOP_WORDS, line)
    return len(line) < 200 and not in_english and 2 * sum(map(str.isalpha, line)) > len(line)


def articles(page: list[Block], seen: set[str]) -> Iterator[str]:
    """The prose of a page, in parts of LONGEST characters; none if it is mostly a list, or half in English.

    Left out are paragraphs in English, those that are in ``seen``, to which the others are added, formulas, and what
    ends in a colon: it announces a program or a table, which is no prose. A heading stays if prose follows it.
    """
    texts = [block.text for block in page if block.kind == "text"]
    in_polish = [text for text in texts if is_polish(text)]
    size = sum(map(len, in_polish))
    if size < 0.5 * sum(map(len, texts)) or sum(len(t) for t in in_polish if is_sentence(t)) < 0.75 * size:
        return
    part, heading = [], None
    for kind, text in page:
        if kind == "heading":
            heading = None if share(ENGLISH, text) else text
        if kind != "text" or text in seen or text.endswith(":") or FORMULA.match(text) or not is_polish(text):
            continue
        seen.add(text)
        if sum(map(len, part)) + len(text) > LONGEST:
            yield from whole(part)
            part = []
        part += [heading, text] if heading else [text]
        heading = None
    yield from whole(part)


def whole(part: list[str]) -> Iterator[str]:
    """A document of these paragraphs, if it is long enough, and mostly of sentences in paragraphs rather than items."""
    text = "\n\n".join(part)
    prose = sum(len(paragraph) for paragraph in part if len(paragraph) > 80 and is_sentence(paragraph))
    if SHORTEST <= len(text) <= 1.5 * LONGEST and prose > 0.7 * len(text):
        yield text


def lists(lines: list[str]) -> Iterator[str]:
    """Lists of consecutive lines, of LIST_SIZES characters in turn; the last lines are left over."""
    start, n_lists, size = 0, 0, 0
    for i, line in enumerate(lines):
        size += len(line) + 1
        if size >= LIST_SIZES[n_lists % len(LIST_SIZES)]:
            yield "\n".join(lines[start : i + 1])
            start, n_lists, size = i + 1, n_lists + 1, 0


# --------------------------------------------------------------------------------------------------------------- markup


VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCK_TAGS = {"p", "h1", "h2", "h3", "h4", "h5", "tr", "li", "pre", "br"}
SKIPPED_TAGS = {"script", "style", "pre", "nav", "header", "aside", "footer"}
SKIPPED_CLASSES = {"howtoget", "relatedtopics", "related", "MAC", "WIN", "iconcell", "debug"}


class HelpPage(HTMLParser):
    """The blocks of a page of LibreOffice's help: of its article only, without programs and the keys of Macs."""

    def __init__(self):
        super().__init__()
        self.blocks, self.open, self.words, self.linked = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag in BLOCK_TAGS and "tr" not in self.open:
            self.end_block()
        if tag in ("td", "th"):
            self.words.append("\t")
        if tag not in VOID_TAGS:
            attributes = dict(attributes)
            classes = set((attributes.get("class") or "").split())
            skipped = tag in SKIPPED_TAGS or classes & SKIPPED_CLASSES
            article = attributes.get("id") == "DisplayArea"
            self.open.append("skipped" if skipped else "article" if article else tag)

    def handle_endtag(self, tag):
        if tag in VOID_TAGS or not self.open:
            return
        if tag in BLOCK_TAGS and ("tr" not in self.open or tag == "tr"):
            self.end_block()
        self.open.pop()

    def handle_data(self, data):
        if "article" in self.open and "skipped" not in self.open:
            self.words.append(data)
            self.linked += len(data) if "a" in self.open else 0

    def end_block(self):
        joined, linked = "".join(self.words), self.linked
        self.words, self.linked = [], 0
        if "tr" in self.open:
            cells = [" ".join(cell.split()) for cell in joined.split("\t")]
            text, kind = " | ".join(cell for cell in cells if cell), "row"
        else:
            text = " ".join(joined.split())
            is_link = linked > 0.8 * len(text)
            is_heading = self.open and re.fullmatch("h[1-5]", self.open[-1])
            kind = "link" if is_link else "heading" if is_heading else "text"
        if re.search(r"\w{2}", text):
            self.blocks.append(Block(kind, text))


def help_blocks(source: str) -> list[Block]:
    page = HelpPage()
    page.feed(source)
    return page.blocks


ROFF = {"-": "-", "e": "\\", "(aq": "'", "[aq]": "'", "(co": "©", "(em": "—", "[em]": "—", "(en": "–", "[en]": "–"}
ROFF |= {" ": " ", "~": " ", "0": " ", "(bu": "•", "[bu]": "•", "(at": "@", "[ha]": "^", "(rs": "\\", "[ti]": "~"}
ROFF |= {"[oq]": "'", "[cq]": "'", "(cq": "'", "(lq": "„", "(rq": "”", "(dq": '"', "[dq]": '"', "(hy": "-", "'": "'"}
ESCAPE = re.compile(r"\\(f\[\w*\]|f\(..|f.|s[-+]?\d+|\*\(..|\*\[\w+\]|\*.|\(..|\[[^\]]*\]|[hvwoz]'[^']*'|.)")


def plain(line: str) -> str:
    """A line of roff as it is printed, without fonts and spacing."""
    return ESCAPE.sub(lambda match: ROFF.get(match[1], ""), line)


def man_blocks(source: str) -> list[Block]:
    """The blocks of a manual page in the man macros; none of one in mdoc, or in raw roff.

    Of its sections those are left out that are the same everywhere: translators, bugs, copyright, other pages.
    """
    if not re.search(r"(?m)^\.TH ", source):
        return []
    blocks, words, label, raw, section = [], [], None, False, ""

    def end_block():
        nonlocal label
        text = " ".join(" ".join(words).split())
        words.clear()
        boilerplate = re.match(
            "TŁUMACZ|ZGŁASZ|PRAWA|ZOBACZ|AUTOR|NAZWA|BŁĘDY|UWAGI DO TŁ|COPYRIGHT|SEE|NAME|REPORT", section
        )
        if text and not boilerplate:
            option = label is not None or section.startswith(("SKŁADNIA", "SYNOPSIS"))
            blocks.append(Block("option" if option else "text", f"{label}  {text}" if label else text))
        label = None

    wants_label = False
    for line in source.splitlines():
        request, _, rest = line.partition(" ")
        argument = plain(rest.strip().strip('"'))
        if request in (".nf", ".EX", ".TS", ".Vb", ".de"):
            raw = True  # a program, a table or a macro
        elif request in (".fi", ".EE", ".TE", ".Ve", ".."):
            raw = False
        elif raw or request.startswith((".\\", "'\\")):
            continue
        elif request in (".SH", ".SS"):
            end_block()
            section = argument.upper() if request == ".SH" else section
            blocks.append(Block("heading", argument.capitalize() if argument.isupper() else argument))
        elif request in (".TP", ".TQ"):
            end_block()
            wants_label = True
        elif request == ".IP":
            end_block()
            label = plain(re.match(r'"[^"]*"|\S*', rest.strip())[0].strip('"'))
        elif request in (".PP", ".P", ".LP", ".sp", ".RS", ".RE", ".HP", ".br") or not line.strip():
            if label is None or request not in (".sp", ".br"):
                end_block()
        elif request in (".B", ".I", ".BR", ".IR", ".RB", ".RI", ".BI", ".IB", ".SM", ".SB") or line[0] not in ".'":
            joint = "" if len(request) == 3 and request[0] == "." else " "
            text = plain(line if line[0] not in ".'" else joint.join(re.findall(r'"[^"]*"|\S+', rest)).replace('"', ""))
            if wants_label:
                label, wants_label = text, False
            else:
                words.append(text)
    end_block()
    return blocks


# --------------------------------------------------------------------------------------------------------------- damage


def sentences(text: str) -> list[str]:
    return re.findall(r"\S.*?(?:[.!?]+(?=\s)|\n\s*\n|\Z)", text, flags=re.DOTALL)


def mostly_replaced(text: str, rng: random.Random, replaced: float, other: Callable[[], str]) -> str:
    """The text with about that share of it put in place by ``other()``, sentence by sentence."""
    out, owed = [], 0.0
    for sentence in sentences(text) or [text]:
        owed += replaced * len(sentence)
        if owed < 0.5 * len(sentence) + 10 * rng.random():
            out.append(sentence)
            continue
        while owed > 0:
            out.append(other())
            owed -= len(out[-1])
    return " ".join(out)[: 2 * len(text)]


CONFUSED = {"rn": "m", "m": "rn", "l": "1", "O": "0", "o": "0", "ł": "t", "ę": "e,", "ą": "q", "ó": "6", "ś": "s'"}
CONFUSED |= {"w": "vv", "h": "li", "cl": "d", "d": "cl", "e": "c", "i": "!", "ż": "z", "ni": "m", "S": "5", "B": "8"}


def ocr(text: str, rng: random.Random) -> str:
    """A bad scan, read by a machine: letters that look alike are confused, words broken, merged and speckled."""
    pattern = "|".join(sorted(CONFUSED, key=len, reverse=True))
    text = re.sub(pattern, lambda m: CONFUSED[m[0]] if rng.random() < 0.12 else m[0], text)
    text = re.sub(r" ", lambda _: rng.choices((" ", "", "  ", " | ", " ~ ", " . "), (80, 12, 2, 2, 2, 2))[0], text)
    return re.sub(r"(?<=\w\w)(?=\w\w)", lambda _: rng.choices(("", " ", "-\n", "'"), (96, 2, 1, 1))[0], text)


def mojibake(text: str, rng: random.Random) -> str:
    """The bytes of UTF-8 read in an eight-bit encoding, as many a web page and database has it."""
    return text.encode().decode(rng.choice(("cp1250", "cp1252", "iso8859-1", "iso8859-2")), "replace")


WITHOUT_MARKS = str.maketrans("ąćęłńóśźż", "acelnoszz")
EXCLAMATIONS = ("!!!!", " :D", " xD", "......", " ;)", "!!1!", " ??", " hehe", " lol", " kurde no", " pozdro")


def no_diacritics_typos(text: str, rng: random.Random) -> str:
    """The style of a forum: no Polish letters, no capitals, typing mistakes, emoticons, !!!!"""
    out = []
    for word in re.findall(r"\S+\s*", text.lower().translate(WITHOUT_MARKS)):
        place = rng.randrange(len(word))
        mistake = rng.choices(("", "swapped", "missing", "double"), (76, 10, 8, 6))[0]
        if mistake == "swapped":
            word = word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
        elif mistake:
            word = word[:place] + (2 * word[place] if mistake == "double" else "") + word[place + 1 :]
        out.append(re.sub(r"[.,;:]+(?=\s|$)", lambda _: rng.choice(EXCLAMATIONS) if rng.random() < 0.7 else "", word))
    return "".join(out)


def shuffled(text: str, rng: random.Random) -> str:
    """The words of the whole text in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def repeated(text: str, rng: random.Random) -> str:
    """The same one to three sentences again and again."""
    found = sentences(text) or [text]
    start = rng.randrange(len(found))
    few = [sentence.strip()[:200] for sentence in found[start : start + rng.randint(1, 3)]]
    joined = rng.choice((" ", "\n")).join(few)
    return rng.choice((" ", "\n")).join([joined] * max(2, len(text) // (len(joined) + 1)))[
        : max(2 * len(joined), len(text))
    ]


OFFERS = (
    "{a} {b} tanio najtaniej okazja {a} sklep {a} online cena {n},99 zł",
    "TANIE {A} - PROMOCJA -{p}% !!! kup teraz {b} od {n} PLN",
    "www.{a}-{b}24.pl {a} opinie, {a} forum, {a} cennik, {b} allegro",
    "Kredyt bez BIK {n}000 zł w {p} minut >>> http://{b}-{a}.info/?ref={n}",
    "{a} {b} Warszawa, {a} {b} Kraków, {a} {b} Wrocław, {a} {b} Gdańsk tel. {n} {n} {n}",
    "KLIKNIJ TUTAJ!!! darmowy {b} + {a} GRATIS tylko dziś {p}% taniej",
)


def spam(text: str, rng: random.Random) -> str:
    """An offer in place of most sentences: words of the text as keywords, prices, addresses of web pages."""
    words = re.findall(r"\w{5,}", text.lower()) or ["okazja"]

    def offer() -> str:
        a, b = rng.choice(words), rng.choice(words)
        return rng.choice(OFFERS).format(a=a, b=b, A=a.upper(), n=rng.randint(100, 999), p=rng.randint(5, 90))

    return mostly_replaced(text, rng, 0.75, offer)


FOREIGN = (
    "By continuing to use this site you agree to our terms of service and privacy policy.",
    "All rights reserved, no part of this page may be reproduced without permission.",
    "Click here to read more about this item and similar products.",
    "This article is a stub, and you can help by expanding it.",
    "Diese Website verwendet Cookies, um Ihnen den bestmöglichen Service zu bieten.",
    "Alle Angaben ohne Gewähr, Änderungen und Irrtümer vorbehalten.",
    "Bitte melden Sie sich an, um einen Kommentar zu schreiben.",
    "Tato stránka používá soubory cookie, jejím používáním s tím souhlasíte.",
    "Všechna práva vyhrazena, šíření obsahu bez souhlasu není dovoleno.",
    "Přihlaste se prosím, abyste mohli vložit příspěvek do diskuse.",
)


def machine_mix(text: str, rng: random.Random) -> str:
    """English, German and Czech boilerplate in place of every other sentence."""
    return mostly_replaced(text, rng, 0.6, lambda: rng.choice(FOREIGN))


def cut(text: str, rng: random.Random) -> str:
    """Two columns read straight across, each line cut in the middle of words."""
    width, text = rng.randint(18, 32), " ".join(text.split())
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    lines = [line[rng.randint(0, 2) :] + ("-" if line[-1:].isalpha() and rng.random() < 0.5 else "") for line in lines]
    half = (len(lines) + 1) // 2
    return "\n".join("  ".join(pair) for pair in zip(lines[:half], [*lines[half:], ""], strict=False))


RESIDUES = (
    '<div class="col-md-{n} widget"><span style="color:#3{n}3;font-size:{n}px">',
    "</span></div></td></tr>&nbsp;&nbsp;|&nbsp;",
    '{{"id":{n}{n},"type":"paragraph","visible":true,"children":[',
    ".menu-item-{n} a:hover {{ padding: 0 {n}px; display: inline-block !important; }}",
    "$(document).ready(function(){{ $('#slider{n}').cycle(); }});",
    '<a href="/index.php?option=com_content&amp;view=article&amp;id={n}">',
    "&lt;br /&gt;&amp;quot; [/quote] [url=#{n}]",
)


def markup(text: str, rng: random.Random) -> str:
    """The remains of HTML, JSON, CSS and scripts in place of half of the text, and entities for some letters."""
    text = mostly_replaced(text, rng, 0.5, lambda: rng.choice(RESIDUES).format(n=rng.randint(1, 99)))
    return re.sub(r"[ó–—„”]", lambda match: f"&#{ord(match[0])};", text)


def letters(text: str, rng: random.Random) -> str:
    """The first half of the text, most of its words s p a c e d   o u t."""
    words = text[: max(1, len(text) // 2)].split()
    return "  ".join(" ".join(word) if rng.random() < 0.9 else word for word in words)


def random_words(text: str, rng: random.Random) -> str:
    """Words that are none, made of the text's own pieces of two or three letters."""
    pieces = re.findall(r"\w{2,3}", text.lower()) or ["po"]

    def word(match: re.Match) -> str:
        made = "".join(rng.choices(pieces, k=max(1, round(len(match[0]) / 2.7))))
        return made.capitalize() if match[0][0].isupper() else made

    return re.sub(r"\w+", word, text)


DAMAGES: dict[str, Callable[[str, random.Random], str]] = {
    "ocr": ocr,
    "no_diacritics_typos": no_diacritics_typos,
    "shuffled": shuffled,
    "repeated": repeated,
    "spam": spam,
    "mojibake": mojibake,
    "machine_mix": machine_mix,
    "cut": cut,
    "markup": markup,
    "letters": letters,
    "random_words": random_words,
}
TRAINED = ("ocr", "no_diacritics_typos", "shuffled", "repeated", "spam")  # no classifier sees the others in training


# --------------------------------------------------------------------------------------------------------------- labels


def part_of(text: str) -> str:
    """By a hash of a clean document: whether it stays as it is, is damaged, or neither ("held back", one of 20)."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 20
    return "held back" if bucket == 0 else "HIGH" if bucket < 11 else "LOW"


def partly(damage: Callable[[str, random.Random], str], text: str, rng: random.Random) -> str:
    """The text with its last paragraphs damaged, a fifth of them to all: pages are seldom bad throughout."""
    paragraphs = text.split("\n\n")
    start = int(rng.uniform(0, 0.8) * len(paragraphs))
    return "\n\n".join([*paragraphs[:start], damage("\n\n".join(paragraphs[start:]), rng)])


def labelled(documents: Iterable[Document], seed: int) -> Iterator[dict]:
    """{"text", "quality", "kind"} of all documents but those held back; a clean one is HIGH, or partly damaged."""
    rng, n_damaged = random.Random(seed), 0
    for text, kind in documents:
        quality = "MEDIUM" if kind in LISTS else part_of(text)
        if quality == "LOW":
            kind = TRAINED[n_damaged % len(TRAINED)]
            text, n_damaged = partly(DAMAGES[kind], text, rng), n_damaged + 1
        if quality != "held back":
            yield {"text": text, "quality": quality, "kind": kind}
