"""The files of a tokenizer, as data folders, checkpoints' exports and Hugging Face folders hold them.

They are copied byte for byte. To save a tokenizer anew would drop what the installed library does not know, and may
write what an older one cannot read.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from halny.model.durable import write_json
from halny.model.hints import is_lfs_pointer

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # either is a tokenizer; the rest below only accompany one
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
NAMING = ("special_tokens_map.json", CONFIG)  # which say what BOS, EOS and padding are; the latter has the last word
TOKENIZER_FILES = (
    *TOKENIZERS,
    *(*NAMING, "added_tokens.json", TEMPLATE, "chat_template.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
# Mistral's SentencePiece models by version, and the chat templates of transformers 5 beside the default one
OTHERS = re.compile(r"tokenizer\.model\.v\d\w*|additional_chat_templates/[\w-][\w.-]*\.jinja")
# What makes any transformers take a tokenizer.json as it stands: not "LlamaTokenizer", whose pipeline transformers 5
# rebuilds by its own rules; no token types, which a Mistral does not take; padding on the left, as text grows on the
# right.
AS_IT_STANDS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656,
}
# The 256 characters in which a byte-level BPE, GPT-2's and those after it, writes bytes; "Ġ" is the space
SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))  # these bytes are the characters of their number
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
BYTE_LEVEL = {chr(byte): byte for byte in SEEN} | {chr(256 + i): byte for i, byte in enumerate(UNSEEN)}
SPACE = "▁"  # SentencePiece's
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # and its piece for a byte, where no piece has the character
ODD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)  # of JSON that is not what it seems


class SpecialIds(NamedTuple):
    """The ids that begin a text, end it, and fill a batch up; None where a tokenizer has no such token."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def is_tokenizer_file(name: str) -> bool:
    return name in TOKENIZER_FILES or OTHERS.fullmatch(name) is not None


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[str]:
    """The names of those that a folder has. ValueError if none is a tokenizer, or one is Git LFS's stand-in for it."""
    if not has_tokenizer(folder):
        raise ValueError(f"tokenizer {folder} is not a folder with a {' or a '.join(TOKENIZERS)}")
    others = [*folder.glob("tokenizer.model.*"), *folder.glob("additional_chat_templates/*")]
    named = [*TOKENIZER_FILES, *sorted(str(path.relative_to(folder)) for path in others)]
    names = [name for name in named if is_tokenizer_file(name) and (folder / name).is_file()]
    for name in names:
        if is_lfs_pointer(folder / name):
            raise ValueError(f"tokenizer {folder}: {name} is a Git LFS pointer, not the file; run git lfs pull there")
    return names


def pieces(folder: Path | None) -> dict[int, str]:
    """What each id means, as a folder's tokenizer.json says; nothing where there is none, or it says it otherwise."""
    try:
        return {} if folder is None else _pieces(_read(folder / "tokenizer.json"))
    except (OSError, *ODD):
        return {}


def named_beside(folder: Path) -> dict[int, str]:
    """The tokens by id that the files beside tokenizer.json name; transformers adds those that it lacks."""
    try:
        older = {i: piece for piece, i in _read(folder / "added_tokens.json").items()}
        newer = _read(folder / CONFIG).get("added_tokens_decoder") or {}
        return older | {int(i): token["content"] for i, token in newer.items()}
    except (OSError, *ODD):
        return {}


def spelled(folder: Path | None) -> dict[int, bytes]:
    """What each ordinary id stands for in running text, in UTF-8; a part of a character for some, as "<0xC5>".

    Special tokens and the unknown token stand for no text and are not in it. Nothing where there is no tokenizer.json,
    or its pieces spell in another way than those of byte-level BPE and of SentencePiece (WordPiece's "##").
    """
    try:
        return {} if folder is None else spelled_by(_read(folder / "tokenizer.json"))
    except (OSError, *ODD):
        return {}


def spelled_by(raw: dict) -> dict[int, bytes]:
    """As ``spelled``, of the content of a tokenizer.json."""
    try:
        return _spelled(raw)
    except ODD:
        return {}


def is_byte_level(folder: Path) -> bool:
    """Whether a folder's tokenizer.json writes its pieces in the characters of BYTE_LEVEL."""
    try:
        return _is_byte_level(_read(folder / "tokenizer.json"))
    except (OSError, *ODD):
        return False


def unknown_id(folder: Path) -> int | None:
    """The id for what a folder's tokenizer.json cannot spell; None where it has none, or bytes stand in."""
    try:
        raw = _read(folder / "tokenizer.json")
        unknown = _unknown(raw)
        return _named(folder, raw, "unk")[0] if unknown is None else unknown
    except (OSError, *ODD):
        return None


def differing(ours: dict[int, str], theirs: dict[int, str]) -> tuple[list[int], bool]:
    """Of the ids of both those that mean something else, and whether that makes them other tokenizers.

    A few may have another name, as special tokens do; but not where a piece has moved, or where it is more than a few.
    """
    both, named = sorted(ours.keys() & theirs.keys()), set(ours.values())
    found = sorted((i for i in both if ours[i] != theirs[i]), key=lambda i: theirs[i] not in named)  # moved ones first
    return found, bool(found) and (theirs[found[0]] in named or len(found) > len(both) / 100)


def special_ids(folder: Path) -> SpecialIds:
    """What tokenizer_config.json (or special_tokens_map.json) names; of a tokenizer.json without either, what its
    post-processor puts around a text, and what config.json beside it says of the rest."""
    try:
        raw = _read(folder / "tokenizer.json")
        if any((folder / name).is_file() for name in NAMING):
            return SpecialIds(*_named(folder, raw, "bos", "eos", "pad"))
        ids, config = _ids(raw), _read(folder / "config.json")
        around, known = _around(raw.get("post_processor")), set(ids.values())
        firsts = [[*listed(config.get(f"{name}_token_id")), None][0] for name in ("bos", "eos", "pad")]
        found = [ids.get(piece, first) for piece, first in zip((*around, None), firsts, strict=True)]
        return SpecialIds(*(i if i in known else None for i in found))
    except (OSError, *ODD):
        return SpecialIds()


def makes_the_same_ids(one: Path, other: Path) -> bool:
    """Whether the tokenizer.json of two folders make the same ids of any text, though they differ in their bytes."""
    try:
        return _of_the_ids(one) == _of_the_ids(other)
    except (OSError, *ODD):
        return False


def copy_tokenizer(folder: Path, target: Path, ids: SpecialIds, chat_template: str | None = None) -> list[Path]:
    """Copy a folder's tokenizer files into another as they are; returns the files made.

    Two may be added: a tokenizer_config.json beside a tokenizer.json that has none, without which transformers guesses
    by the type of the model, and the chat template, if the folder has none of its own.
    """
    names = tokenizer_files(folder)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    if CONFIG not in names and "tokenizer.json" in names:
        text = pieces(folder)
        tokens = {f"{name.removesuffix('_id')}_token": text[i] for name, i in ids._asdict().items() if i in text}
        write_json(target / CONFIG, AS_IT_STANDS | tokens)
        names.append(CONFIG)
    templates = [name for name in names if "chat_template" in name]
    if chat_template is not None and not templates and read_chat_template(folder) is None:
        (target / TEMPLATE).write_text(chat_template, encoding="utf-8")
        names.append(TEMPLATE)
    return [target / name for name in names]


def read_chat_template(folder: Path) -> str | None:
    """The default one of a tokenizer folder, from where transformers of any version puts it."""
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        for name in ("chat_template.json", CONFIG):
            found = _read(folder / name).get("chat_template")
            if isinstance(found, list):  # several, by name
                found = next((each["template"] for each in found if each["name"] == "default"), None)
            if isinstance(found, str):
                return found
    except (OSError, *ODD):
        pass
    return None


def listed(ids: int | list[int] | None) -> list[int]:
    """The ids that a key of a config names: one, several or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _read(file: Path) -> dict:
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _pieces(raw: dict) -> dict[int, str]:
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: piece and score, in the order of ids
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added = {token["id"]: token["content"] for token in raw.get("added_tokens", [])}
    return {i: piece for piece, i in vocabulary.items()} | added


def _ids(raw: dict) -> dict[str, int]:
    """The id of each piece: the inverse of ``_pieces``."""
    return {piece: i for i, piece in _pieces(raw).items()}


def _spelled(raw: dict) -> dict[int, bytes]:
    model = raw["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE" if "merges" in model else None) not in ("BPE", "Unigram") or marked:
        return {}
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    without = {_unknown(raw), *(i for i, token in added.items() if token["special"])}
    bytes_of = _of_byte_level if _is_byte_level(raw) else _of_sentencepiece
    own = _pieces({"model": model})  # Gemma lists "▁▁" as an added token too: it is two spaces nonetheless
    return {
        i: bytes_of(piece) if own.get(i) == piece else piece.encode()
        for i, piece in _pieces(raw).items()
        if i not in without
    }


def _of_byte_level(piece: str) -> bytes:
    known = all(character in BYTE_LEVEL for character in piece)
    return bytes(BYTE_LEVEL[character] for character in piece) if known else piece.encode()  # as its decoder does


def _of_sentencepiece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def _is_byte_level(raw: dict) -> bool:
    """Whether the step of that name is among those that a text, or a list of pieces, goes through."""
    steps = [raw.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    for step in filter(None, steps):  # which grows by those inside
        if step["type"] == "ByteLevel":
            return True
        steps += [inside for key in ("normalizers", "pretokenizers", "decoders") for inside in step.get(key, [])]
    return False


def _unknown(raw: dict) -> int | None:
    """The unknown token's id, as the model of a tokenizer.json itself names it."""
    model = raw["model"]
    if "unk_id" in model:  # Unigram's
        return model["unk_id"]
    return _ids(raw).get(model.get("unk_token"))


def _named(folder: Path, raw: dict, *roles: str) -> list[int | None]:
    """The ids of the tokens that the files of NAMING give these roles."""
    ids = _ids(raw)
    named = _read(folder / NAMING[0]) | _read(folder / NAMING[1])
    tokens = [named.get(f"{role}_token") for role in roles]
    return [ids.get(token["content"] if isinstance(token, dict) else token) for token in tokens]


def _around(post_processor: dict | None) -> tuple[str | None, str | None]:
    """The one token that a tokenizer.json puts before a text, and the one after it."""
    for each in [post_processor, *(post_processor or {}).get("processors", [])]:
        kind = (each or {}).get("type")
        if kind in ("BertProcessing", "RobertaProcessing"):
            return each["cls"][0], each["sep"][0]
        if kind == "TemplateProcessing":
            parts = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in each["single"]]
            before, after = parts[: parts.index(None)], parts[parts.index(None) + 1 :]
            return before[0] if len(before) == 1 else None, after[0] if len(after) == 1 else None
    return None, None


def _of_the_ids(folder: Path) -> list:
    raw = _read(folder / "tokenizer.json")
    model = {key: value for key, value in raw["model"].items() if value}  # an older file lacks what is off
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [model, *(raw.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens"))]
