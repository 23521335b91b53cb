"""The files of a tokenizer, as data folders, checkpoints' exports and Hugging Face folders hold them."""

import json
from pathlib import Path

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # either is a tokenizer; the rest below only accompany one
TOKENIZER_FILES = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[str]:
    """The names of those that a folder has. Raises ValueError if none of them is a tokenizer."""
    if not has_tokenizer(folder):
        raise ValueError(f"tokenizer {folder} is not a folder with a {' or a '.join(TOKENIZERS)}")
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def pieces(folder: Path | None) -> dict[int, str]:
    """What each id means, as a folder's tokenizer.json says; nothing where there is none, or it says it otherwise."""
    if folder is None:
        return {}
    try:
        raw = json.loads((folder / "tokenizer.json").read_bytes())
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram's: piece and score, in the order of ids
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        added = {token["id"]: token["content"] for token in raw.get("added_tokens", [])}
        return {i: piece for piece, i in vocabulary.items()} | added
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
