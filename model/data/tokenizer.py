"""Tokenizers for preparation: Mistral-7B-v0.1's own, made exact to the id, and folders of users.

**Mistral-7B-v0.1's tokenizer** comes as a SentencePiece model (mistral-common ships it), and transformers 5 reads such
a lone file wrongly: without the leading "▁", without BOS, and merging by id where SentencePiece merges by score. All
pieces of spaces only have the score -1e9, so "▁▁", id 259, must merge last and not first: "\n  x" is 28705 13 28705
1318 and not 13 259 28744. So the fast tokenizer is made here, with its merges by falling score. Among equal scores
SentencePiece takes the leftmost pair, which a list of merges cannot say; ordering them by the length of the left half,
longest first, comes to the same (shortest first gets a run of 16 spaces wrong). tests/data/test_prepare_data.py holds
it to SentencePiece; once AutoTokenizer on the lone file passes there, all this can go. The SentencePiece model goes
with the data and with every export beside it: llama.cpp's converter takes the scores of the pieces from there.

**Tokenizer folders of users** are read from their tokenizer.json as it stands, since for some classes
("LlamaTokenizer") transformers 5 rebuilds the rest by its own rules. All their files travel as they are.

**Long texts.** Llama-style BPE has no pre-tokenizer: a whole document is one "word", for which the `tokenizers` library
takes some 120 bytes a character, and ever longer. So a long text is encoded in windows, and the ids are still exactly
those of the whole text. BPE applies, again and again, the merge of lowest rank, the leftmost of equals, which reads
nothing but the two symbols it joins. Hence

1. what lies between two token boundaries of an encoding, encoded alone, gives the same tokens: no merge has crossed the
   boundaries, and those inside come in the same order with or without the rest;
2. if each of two neighbouring tokens, encoded together, come out as they are, then nothing ever merges across them in
   any text where they stand beside each other: the first merge to cross would read symbols of these two tokens only,
   would be first in the queue of the pair as it is in that of the text, and so would cross in the pair too.

So a window is cut at a token boundary some tokens before its end, the next window starts there, and the cut is accepted
if its two neighbouring tokens, encoded together, come out as they are. If not, the window's end had changed tokens
farther back than that, and a window twice as long is tried, up to the whole text.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halny.model.data.dataset import DataError, one_line, read_tokenizer_files, to_json, token_dtype
from halny.model.durable import REMEDIES, in_its_words, sha256
from halny.model.hints import hint
from halny.model.tokenizer_files import AS_IT_STANDS, NAMING, SpecialIds, special_ids, spelled, spelled_by

MISTRAL = "mistral-v0.1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"  # of its tokenizer.model
BATCH_CHARACTERS = 1 << 21  # a call of the library, whose encodings take some 100 bytes a token until they are arrays
WINDOW = 1 << 14  # characters of a long text encoded at a time; from there on the library is slower the longer they are
TAIL = 32  # tokens at the end of a window that are encoded again; two would do for most text


@dataclass(frozen=True)
class Tokenizer:
    name: str
    files: dict[str, bytes]  # what is saved with the data, tokenizer.json among them
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None = None
    backend: str | None = None  # the tokenizer.json that makes the ids, with tokens that only its neighbours name
    special_tokens: bool = False  # "</s>" in a text is the end of a text, and not four characters

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def special_ids(self) -> SpecialIds:
        return SpecialIds(self.bos_id, self.eos_id, self.pad_id)

    def spelled(self) -> dict[int, bytes]:
        """What each id stands for in running text, as far as its kind is known: tokenizer_files.spelled."""
        return spelled_by(json.loads(self.files["tokenizer.json"]))

    def sha256(self) -> str:
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()


class Window(NamedTuple):
    start: int
    size: int
    end: int  # where it is cut, and the next one starts
    ids: np.ndarray
    first: tuple[str, list[int]]  # the character or token that it starts with: its text, and its ids
    last: tuple[str, list[int]]  # likewise before the cut


class Encoder:
    """Texts to arrays of ids: exactly the `tokenizers` library's own of each whole text, no special tokens added.

    No truncation, no padding; special tokens found in text only where the tokenizer says so. Elsewhere it needs memory
    for the text, not the library's 120 bytes a character, if the tokenizer is plain BPE like Mistral's (see the head of
    this file); others see texts whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        from tokenizers import Tokenizer as Backend

        raw = json.loads(tokenizer.backend or tokenizer.files["tokenizer.json"])
        self.dtype, self.plain = tokenizer.dtype, _is_plain_bpe(raw) and not tokenizer.special_tokens
        if self.plain:
            raw["normalizer"] = None  # done in `_normalized`, where it costs a tenth less of the whole
        self.backend = Backend.from_str(json.dumps(raw))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not tokenizer.special_tokens  # True: as text

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, uint16 or uint32 by the vocabulary."""
        out, short = [None] * len(texts), []
        for i, text in enumerate(texts):
            if self.plain and len(text) > 2 * WINDOW:
                out[i] = self._encode_long(_normalized(text))
            else:
                short.append(i)
        for batch in _batches(short, texts):
            batch_texts = [_normalized(texts[i]) if self.plain else texts[i] for i in batch]
            encodings = self.backend.encode_batch_fast(batch_texts, add_special_tokens=False)
            for i, encoding in zip(batch, encodings, strict=True):
                out[i] = np.array(encoding.ids, dtype=self.dtype)
        return out

    def _encode_long(self, text: str) -> np.ndarray:
        windows, start, size = [], 0, WINDOW
        while start < len(text):
            window = self._window(text, start, size)
            if windows and not self._stay_apart(windows[-1].last, window.first):
                failed = windows.pop()
                start, size = failed.start, 2 * failed.size
                continue
            windows.append(window)
            start, size = window.end, WINDOW
        return np.concatenate([window.ids for window in windows])

    def _window(self, text: str, start: int, size: int) -> Window:
        while True:
            encoding = self.backend.encode(text[start : start + size], add_special_tokens=False)
            ids, spans = encoding.ids, encoding.offsets
            cut = len(ids)
            if start + size < len(text):
                cut -= TAIL
                while cut > 0 and spans[cut][0] < spans[cut - 1][1]:  # inside a character that takes several tokens
                    cut -= 1
            if cut > 0:
                break
            size *= 2
        first, last = (
            (text[start + a : start + b], [ids[i] for i in near if spans[i] == (a, b)])
            for (a, b), near in ((spans[0], range(min(cut, 4))), (spans[cut - 1], range(max(cut - 4, 0), cut)))
        )
        return Window(start, size, start + spans[cut - 1][1], np.array(ids[:cut], dtype=self.dtype), first, last)

    def _stay_apart(self, left: tuple[str, list[int]], right: tuple[str, list[int]]) -> bool:
        return self.backend.encode(left[0] + right[0], add_special_tokens=False).ids == left[1] + right[1]


def _batches(indices: list[int], texts: list[str]) -> Iterator[list[int]]:
    batch, size = [], 0
    for i in indices:
        batch.append(i)
        size += len(texts[i])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _normalized(text: str) -> str:
    return "▁" + text.replace(" ", "▁") if text else ""


LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def _is_plain_bpe(raw: dict) -> bool:
    """Whether a tokenizer.json is BPE on the text as a whole, with Llama's normalizer and bytes for what it lacks.

    Everything that would let a symbol look farther than its neighbour is excluded: pre-tokenizers, dropout, words taken
    whole, marks at the ends of words, unknown characters fused, byte tokens that merge, tokens found before BPE.
    """
    model, byte = raw["model"], re.compile("<0x[0-9A-F]{2}>")
    if raw["normalizer"] != LLAMA_NORMALIZER or raw["pre_tokenizer"] is not None or model.get("type") != "BPE":
        return False
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if any(model.get(key) for key in odd) or not model.get("byte_fallback"):
        return False
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return (
        all(f"<0x{i:02X}>" in model["vocab"] for i in range(256))
        and not any(byte.fullmatch(part) for merge in merges for part in merge)
        and all(token["special"] for token in raw["added_tokens"])
    )


def load_tokenizer(tokenizer: str | Path) -> Tokenizer:
    """The tokenizer of a folder that holds a tokenizer.json, or Mistral-7B-v0.1's own by the name "mistral-v0.1"."""
    if str(tokenizer) == MISTRAL:
        return mistral_tokenizer()
    folder = Path(tokenizer)
    if not folder.is_dir():
        remedy = hint(tokenizer) or f"; name one, or use --tokenizer {MISTRAL}"
        raise DataError(f"--tokenizer {tokenizer}: no such folder{remedy}")
    if not (folder / "tokenizer.json").is_file():
        usual = f"; save one there with save_pretrained of transformers, or use --tokenizer {MISTRAL}"
        remedy = hint(folder) or usual
        raise DataError(f"--tokenizer {tokenizer}: no tokenizer.json in it, and only fast tokenizers are read{remedy}")
    try:
        files = read_tokenizer_files(folder)
    except OSError as error:
        raise DataError(f"--tokenizer {tokenizer}: cannot be read ({in_its_words(error)})") from error
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # advice about regular expressions and missing frameworks is not for our users
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file makes transformers and tokenizers raise nearly anything
        if isinstance(error, OSError) and error.errno in REMEDIES:  # says nothing about what is in the folder
            raise DataError(f"--tokenizer {tokenizer}: cannot be read ({in_its_words(error)})") from error
        raise DataError(
            f"--tokenizer {tokenizer}: cannot be read ({one_line(error)}); save it again or name another"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    ids = SpecialIds(loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    if not files.keys() & {*NAMING}:  # a tokenizer.json alone
        ids = special_ids(folder)
    vocab_size = max(loaded.get_vocab().values(), default=0) + 1  # more than there are tokens, where some ids have none
    return Tokenizer(folder.resolve().name, files, vocab_size, *ids, loaded.backend_tokenizer.to_str())


def mistral_tokenizer() -> Tokenizer:
    """Mistral-7B-v0.1's tokenizer, exact to the id, from the SentencePiece model inside mistral-common."""
    spec = importlib.util.find_spec("mistral_common")  # finds without importing: the package is slow to import
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1" if spec and spec.origin else None
    if model is None or not model.is_file() or sha256(model) != MISTRAL_SHA256:
        raise DataError(
            f"--tokenizer {MISTRAL}: data/tokenizer.model.v1 of the package mistral-common is missing or not the one "
            "of Mistral-7B-v0.1; pip install -U mistral-common, or name a tokenizer folder"
        )
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    sp = SentencePieceProcessor(model_file=str(model))
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    # Only ordinary pieces merge: text that spells "<s>" or "<0x0A>" stays text.
    ordinary = [i for i in range(len(pieces)) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    score = {pieces[i]: sp.get_score(i) for i in ordinary}
    merges = [(p[:k], p[k:]) for p in score for k in range(1, len(p)) if p[:k] in score and p[k:] in score]
    merges.sort(key=lambda merge: (-score[merge[0] + merge[1]], -len(merge[0])))

    unk, bos, eos = (pieces[i] for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, sp.bos_id())]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (unk, bos, eos)])
    raw = json.loads(fast.to_str())
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]  # as transformers up to 4.44 read it
    # No text has the unknown token, since bytes stand for what has no piece; so it can fill up a batch.
    tokens = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": unk}
    config = AS_IT_STANDS | tokens | {"add_bos_token": True, "add_eos_token": False}
    files = {
        "tokenizer.json": to_json(raw),
        "tokenizer.model": model.read_bytes(),
        "tokenizer_config.json": to_json(config),
    }
    return Tokenizer(MISTRAL, files, len(pieces), sp.bos_id(), sp.eos_id(), sp.unk_id())


def bytes_before(tokenizer: Path) -> int:
    """How many bytes a tokenizer folder puts before each text: 1 where that is a space, as Llama's does."""
    from tokenizers import Tokenizer as Backend

    ids, text = Backend.from_file(str(tokenizer / "tokenizer.json")).encode("a", add_special_tokens=False).ids, "a"
    pieces = spelled(tokenizer)
    return sum(len(pieces.get(i, text.encode())) for i in ids) - len(text)  # a piece that it lacks: unknown, for "a"


def decode(tokenizer: Path, ids: list[int]) -> str:
    """The text of these ids, by the tokenizer.json in a folder."""
    from tokenizers import Tokenizer as Backend

    return Backend.from_file(str(tokenizer / "tokenizer.json")).decode(ids)
