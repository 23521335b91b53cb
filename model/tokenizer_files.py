"""The files of a tokenizer, as data folders, checkpoints' exports and Hugging Face folders hold them."""

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
