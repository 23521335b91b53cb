"""A model's vocabulary for another tokenizer: which old rows of the embedding and the head make each new row.

Pieces are compared by what they stand for in running text (tokenizer_files.spelled): SentencePiece's "▁the" and the
"Ġthe" of a byte-level BPE are one piece. A new row is

kept      the old row to the bit, where the old tokenizer has the piece too. SentencePiece may have two pieces for a
          byte, the ordinary "A" and the byte token "<0x41>": each takes the row of its own kind, else of the other.
          Special tokens stand for no text and follow their role, so the new end of a text takes the row of the old
          end, whatever both are called; without a role they follow their name;
composed  the mean of the rows of the old pieces that spell it. These are what the old tokenizer's model makes of the
          text of the piece, bytes included where it falls back on them; normalizer and pre-tokenizer are left out,
          since they would put a space before it;
made      the mean of the rows of all old tokens, where neither is possible: a new special token, an id that is no
          token's. So a new token starts out neither likely nor loud (Hewitt 2021, "Initializing new word embeddings").
"""

import re
from collections import defaultdict
from pathlib import Path

from torch import Tensor

from halny.model.exits import Refused
from halny.model.hints import hint
from halny.model.tokenizer_files import (
    BYTE_LEVEL,
    SPACE,
    SpecialIds,
    is_byte_level,
    listed,
    named_beside,
    pieces,
    special_ids,
    spelled,
    tokenizer_files,
    unknown_id,
)

# Of a token with several roles the first counts: one that both begins and ends texts is predicted only as their end.
ROLES = ("eos", "bos", "unk", "pad")
CHARACTERS = {byte: character for character, byte in BYTE_LEVEL.items()}
RUNS = re.compile("[\udc80-\udcff]|[^\udc80-\udcff]+")  # a byte that is no UTF-8, as surrogateescape has it; text


class Vocabulary:
    """The tokens of a tokenizer folder, less those at or beyond ``n_rows``, for which a model has no row.

    pieces  id -> piece, as the files have it
    text    id -> the bytes that it stands for, of the ordinary ones
    roles   eos, bos, unk, pad -> id, where known
    added   ids of added tokens, which the tokenizer's model itself does not make
    ``ends`` are what begins, ends and pads a text where the folder names nothing. Refused, ``said`` naming the folder,
    if it has no tokenizer.json, or one whose pieces are of a kind not known.
    """

    def __init__(self, folder: Path, said: str, n_rows: int | None = None, ends: SpecialIds | None = None):
        from tokenizers import Tokenizer  # here, since train.py imports this file and does not need it

        if not (folder / "tokenizer.json").is_file():
            remedy = hint(folder) or "; save one there with save_pretrained of transformers"
            raise Refused(f"{said} has no tokenizer.json{remedy}")
        try:
            tokenizer_files(folder)
        except ValueError as error:  # a stand-in of Git LFS
            raise Refused(str(error)) from None
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # a broken file makes the library raise nearly anything
            why = " ".join(str(error).split())
            raise Refused(f"{said}: its tokenizer.json cannot be read ({why}); save it again") from None
        if not (text := spelled(folder)):
            raise Refused(
                f"{said}: its tokenizer.json is no byte-level BPE and none of SentencePiece's kinds (BPE, Unigram); "
                "what its pieces spell is not known, so name another"
            )
        known = named_beside(folder) | pieces(folder)
        self.pieces = {i: piece for i, piece in known.items() if n_rows is None or i < n_rows}
        self.text = {i: spells for i, spells in text.items() if i in self.pieces}
        named, unknown = special_ids(folder), unknown_id(folder)
        bos, eos, pad = (own if own is not None else end for own, end in zip(named, ends or SpecialIds(), strict=True))
        roles = {"eos": eos, "bos": bos, "unk": unknown, "pad": pad}
        self.roles = {role: roles[role] for role in ROLES if roles[role] in self.pieces}
        self.added = {i for i in backend.get_added_tokens_decoder() if i in self.pieces}
        self.byte_level, self._model = is_byte_level(folder), backend.model
        self._byte_tokens = {spells: i for i, spells in self.text.items() if self.is_byte_token(i)}

    def name(self, i: int) -> str:
        """For a report: in quotes what an id stands for in running text, and for a special token its piece."""
        text = self.text[i].decode("utf-8", "backslashreplace") if i in self.text else self.pieces[i]
        return f'"{text}"' if text.isprintable() else ascii(text)

    def is_byte_token(self, i: int) -> bool:
        """Whether an ordinary id is SentencePiece's "<0x0A>": no other piece is longer than what it spells."""
        return len(self.pieces[i]) > len(self.text[i])

    def spell(self, data: bytes) -> tuple[int, ...]:
        """The ids by which the tokenizer's model spells these bytes; none where it cannot, or not by ids with a row."""
        ids = []
        if self.byte_level:
            ids = self._ids("".join(CHARACTERS[byte] for byte in data))
        else:
            for run in RUNS.findall(data.decode("utf-8", "surrogateescape")):
                if "\udc80" <= run[0] <= "\udcff":
                    ids.append(self._byte_tokens.get(run.encode("utf-8", "surrogateescape")))
                else:
                    ids += self._ids(run.replace(" ", SPACE))
        # which the unknown token does not, nor a model that skips what it does not know
        return tuple(ids) if b"".join(self.text.get(i, b"") for i in ids) == data else ()

    def _ids(self, text: str) -> list[int]:
        return [token.id for token in self._model.tokenize(text)]


def sources(old: Vocabulary, new: Vocabulary) -> list[tuple[int, ...]]:
    """Of each new id the old ids whose mean is its row: one that is kept, several that compose it, none (made)."""
    named = {piece: i for i, piece in old.pieces.items()}
    role_of = {new.roles[role]: role for role in reversed(ROLES) if role in old.roles and role in new.roles}
    alike = defaultdict(list)
    for i, spells in old.text.items():
        alike[spells, old.is_byte_token(i)].append(i)

    def of(i: int) -> tuple[int, ...]:
        if i in role_of:
            return (old.roles[role_of[i]],)
        piece, spells = new.pieces.get(i), new.text.get(i)
        if spells is not None:
            is_byte = new.is_byte_token(i)
            same = alike.get((spells, is_byte)) or alike.get((spells, not is_byte))
            if same:  # of several, as of a tokenizer onto itself, the one that is written alike
                return (min(same, key=lambda k: (old.pieces[k] != piece, k != i, k)),)
        if piece in named and (spells is None or (i in new.added and named[piece] not in old.text)):
            return (named[piece],)  # special in either, as "<|im_start|>" is in one tokenizer and not in the next
        return () if spells is None else old.spell(spells)

    return [of(i) for i in range(1 + max(new.pieces))]


def new_rows(x_vd: Tensor, found: list[tuple[int, ...]], tokens: list[int]) -> Tensor:
    """The rows that ``sources`` found of an embedding or a head; ``tokens`` are the ids whose mean is a made one.

    Kept ones are copied; means are taken in fp64 and then rounded to x's dtype.
    """
    out = x_vd.new_empty(len(found), x_vd.shape[1])
    kept = [i for i, ids in enumerate(found) if len(ids) == 1]
    out[kept] = x_vd[[found[i][0] for i in kept]]
    if made := [i for i, ids in enumerate(found) if not ids]:
        out[made] = x_vd[tokens].double().mean(0).to(x_vd.dtype)
    for i, ids in enumerate(found):
        if len(ids) > 1:
            out[i] = x_vd[list(ids)].double().mean(0)
    return out


def moved_ids(keys: dict, old: Vocabulary, new: Vocabulary, found: list[tuple[int, ...]]) -> tuple[dict, list[str]]:
    """A config's keys with the ids under eos_token_id and the like moved, and in words those whose token is gone.

    An id goes to the token with its role, if the key names that role, else to the token that its row went to, of
    several to the one of the same name. A role's key under which none is left names the new token of that role.
    """
    at: dict[int, int] = {}
    for i, ids in enumerate(found):
        if len(ids) == 1 and (ids[0] not in at or new.pieces.get(i) == old.pieces.get(ids[0])):
            at[ids[0]] = i
    now, gone = dict(keys), []
    for key, value in keys.items():
        if key.endswith("_token_id") and value is not None:
            role = key.removesuffix("_token_id")
            own = {old.roles[role]: new.roles[role]} if role in old.roles and role in new.roles else {}
            places = {i: own.get(i, at.get(i)) for i in listed(value)}
            lost = [i for i in places if places[i] is None]
            gone += [f"{key} {i}" + (f" ({old.name(i)})" if i in old.pieces else "") for i in lost]
            there = list(dict.fromkeys(place for place in places.values() if place is not None))
            if there := there or listed(new.roles.get(role)):
                now[key] = there if isinstance(value, list) else there[0]
            else:
                del now[key]
    return now, gone
