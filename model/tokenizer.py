"""Tokenizers for preparation: Mistral-7B-v0.1's own, made exact to the id, and folders of users.

**Mistral-7B-v0.1's tokenizer** comes as a SentencePiece model (mistral-common ships it), and transformers 5 reads such
a lone file wrongly: without the leading "▁", without BOS, and merging by id where SentencePiece merges by score. All
pieces of spaces only have the score -1e9, so "▁▁", id 259, must merge last and not first: "\\n  x" is 28705 13 28705
1318 and not 13 259 28744. So the fast tokenizer is made here, with its merges by falling score. Among equal scores
SentencePiece takes the leftmost pair, which a list of merges cannot say; ordering them by the length of the left half,
longest first, comes to the same (shortest first gets a run of 16 spaces wrong). tests/test_data.py holds it to
SentencePiece; once AutoTokenizer on the lone file passes there, all this can go. Tokenizer folders of users are read
from their tokenizer.json as it stands, since for some classes ("LlamaTokenizer") transformers 5 rebuilds the rest by
its own rules; the copy saved with the data says so.
"""

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from halny.model.dataset import DataError, one_line, to_json, tokenizer_files
from halny.model.durable import sha256

MISTRAL = "mistral-v0.1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"  # of its tokenizer.model


@dataclass(frozen=True)
class Tokenizer:
    name: str
    files: dict[str, bytes]  # what is saved with the data; tokenizer.json is among them and makes the ids
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encoder(self):
        """The `tokenizers` backend: no truncation or padding, and no special tokens found in text."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.files["tokenizer.json"].decode())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as text, that is
        return backend


def load_tokenizer(tokenizer: str | Path) -> Tokenizer:
    """The tokenizer of a folder that holds a tokenizer.json, or Mistral-7B-v0.1's own by the name "mistral-v0.1"."""
    if str(tokenizer) == MISTRAL:
        return mistral_tokenizer()
    folder = Path(tokenizer)
    if not folder.is_dir():
        raise DataError(f"--tokenizer {tokenizer}: no such folder; name one, or use --tokenizer {MISTRAL}")
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"--tokenizer {tokenizer}: no tokenizer.json in it, and only fast tokenizers are read; save one there with "
            f"save_pretrained of transformers, or use --tokenizer {MISTRAL}"
        )
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # advice about regular expressions and missing frameworks is not for our users
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        with tempfile.TemporaryDirectory() as saved:
            loaded.save_pretrained(saved)
            files = tokenizer_files(Path(saved))
    except Exception as error:  # a broken file makes transformers and tokenizers raise nearly anything
        raise DataError(
            f"--tokenizer {tokenizer}: cannot be read ({one_line(error)}); save it again or name another"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    for key in ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file"):
        config.pop(key, None)  # about this machine, not about the tokenizer
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it stands
    files["tokenizer_config.json"] = to_json(config)
    return Tokenizer(folder.resolve().name, files, len(loaded), loaded.bos_token_id, loaded.eos_token_id)


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
    config = {
        # Not "LlamaTokenizer": transformers 5 would rebuild the pipeline by its own rules (see the head of this file).
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
    }
    files = {"tokenizer.json": fast.to_str().encode(), "tokenizer_config.json": to_json(config)}
    return Tokenizer(MISTRAL, files, len(pieces), sp.bos_id(), sp.eos_id())
