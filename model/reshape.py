"""The command python -m halny.model.convert: a Hugging Face model with another vocabulary, or other layers.

Everything that can be refused is refused before anything is written. The new model is then written parameter by
parameter, each made from one of the old model, so that no more is held than one file of the new and a few copies of
its embedding. model/vocabulary.py says which rows make a row; layers are copied whole.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from halny.model.durable import in_its_words, in_words
from halny.model.exits import Failed, Refused, exit_code
from halny.model.hf_folder import MADE, check_out, few, read_carried
from halny.model.mistral import MistralConfig
from halny.model.tokenizer_files import SpecialIds, has_tokenizer, listed, pieces, read_chat_template
from halny.model.vocabulary import Moved, Vocabulary, new_rows, sources

HELP = """
examples:
  python -m halny.model.convert mistral-7b grown --tokenizer polish-tokenizer --pad-to 64
  python -m halny.model.convert mistral-7b deeper --layers 0-23,8-31

--tokenizer makes the embedding and the head anew. A row is kept where both tokenizers have the piece, though it be
written in another way ("▁the", "Ġthe"), and where a special token has the role or the name of an old one; composed, as
the mean of the rows of the old pieces that spell a new one; or made, as the mean of all, where nothing spells it.
Weights keep their dtype, and all that is not named here is as it was.

Exit codes: 0 done, 2 refused, 1 failed, 130 interrupted, 143 terminated; but for 0, OUT is as it was.
"""
# Keys of a generation_config.json that hold ids of tokens, in forms of their own.
OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
    "sequence_bias")  # fmt: skip


def reshape(
    source: Path,
    out: Path,
    tokenizer: Path | None,
    pad_to: int | None,
    layers: str | None,
    *,
    HfWeights: Callable,
    write_hf: Callable,
    pieces_of: Callable,
) -> None:
    """Write the Hugging Face folder ``out`` from ``source``: for the tokenizer of another folder, padded, of layers.

    The last three are those of model/convert.py. Raises Refused before anything is written, Failed after.
    """
    if tokenizer is None and pad_to is None and layers is None:
        raise Refused("nothing to do: give --tokenizer, --pad-to or --layers; --help says what they are for")
    if pad_to is not None and pad_to < 1:
        raise Refused(f"--pad-to {pad_to}: a vocabulary is padded to a multiple of 1 or more; 64 is usual")
    for read in filter(None, (source, tokenizer)):
        ours, theirs = out.resolve(), read.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise Refused(f"{out} and {read} are one folder or in one another; what is read stays: name another OUT")
    try:
        weights = HfWeights(source)
        carried, _ = read_carried(source)
    except ValueError as error:
        raise Refused(one_line(error)) from None
    except OSError as error:
        raise Refused(f"{error.filename or source} cannot be read: {in_its_words(error)}") from None

    before, made, said = weights.config, {}, []
    config, order = before, list(range(before.n_layers))
    if layers is not None:
        order, made["layers"] = layer_order(layers, before.n_layers), layers
        config = replace(config, n_layers=len(order))
        said.append(f"layers     {layers}: {len(order)} where there were {before.n_layers}")
    if tokenizer is not None:
        config, rows, left = for_tokenizer(config, carried, source, tokenizer, pad_to)
        said = [*rows.lines(), *left, *said]
    else:
        rows = Rows.padded(pieces(source), before.vocab_size, pad_to or 1)
        config = replace(config, vocab_size=len(rows.found))
        said = (rows.lines() if pad_to is not None else []) + said
    if tokenizer is not None or pad_to is not None:
        made["vocabulary"] = rows.counts()
    carried["config"][MADE] = made

    n_parameters = sum(prod(piece.shape) for _, placed in pieces_of(config) for piece in placed)
    n_bytes, dtype = n_parameters * weights.dtype.itemsize, str(weights.dtype).removeprefix("torch.")
    check_out(out, n_bytes)
    dtype = dtype.replace("bfloat", "bf").replace("float", "fp")
    print(
        "\n".join([*said, f"export     {out}: {n_parameters:,} parameters in {dtype}, {in_words(n_bytes)}"]), flush=True
    )

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, _ in pieces_of(config):
            if name.startswith("layers."):
                _, i, rest = name.split(".", 2)
                yield name, weights.rows(f"layers.{order[int(i)]}.{rest}")
            elif name in ("embed.weight", "head.weight"):
                yield name, new_rows(weights.rows(name), rows.found, rows.tokens)
            else:
                yield name, weights.rows(name)

    beside = tokenizer or (source if has_tokenizer(source) else None)
    readme = in_a_readme(source, tokenizer, said)
    try:
        write_hf(config, weights.dtype, parameters(), out, tokenizer=beside, carried=carried, readme=readme)
    except (OSError, ValueError, SafetensorError) as error:
        raise Failed(f"{out} was not written: {one_line(error)}") from None
    print(f"tokenizer  {beside or 'none found: copy its files into the folder'}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def in_a_readme(source: Path, tokenizer: Path | None, said: list[str]) -> str:
    """What OUT says of itself; folders by their names, since where they lay is nobody's business."""
    for_it = "" if tokenizer is None else f", for the tokenizer {tokenizer.resolve().name}"
    block = "".join(f"    {line}\n" for line in said)
    return f"Made from the model {source.resolve().name}{for_it} by halny (python -m halny.model.convert):\n\n{block}"


# ---- layers


def layer_order(text: str, n_layers: int) -> list[int]:
    """The numbers that "0-23,8-31" means, both ends of a range included; Refused where one is no layer's."""
    order = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise Refused(
                f"--layers {text}: {part.strip() or 'nothing'!r} is no layer and no range FIRST-LAST; "
                "write numbers and ranges with commas between them, as 0-23,8-31"
            )
        if last >= n_layers:
            absent = max(first, n_layers) if first >= n_layers else last
            raise Refused(f"--layers {text}: there is no layer {absent}; the model has layers 0 to {n_layers - 1}")
        order += range(first, last + 1)
    return order


# ---- vocabulary


@dataclass
class Rows:
    """What the rows of the embedding and the head are to be."""

    n_before: int
    found: list[tuple[int, ...]]  # as ``sources`` gives it
    tokens: list[int]  # the old ids, the mean of whose rows is a made one
    old: dict[int, str]  # pieces, for the report
    new: dict[int, str]

    @classmethod
    def padded(cls, held: dict[int, str], n: int, multiple: int) -> "Rows":
        """n rows as they are, and made ones up to a multiple."""
        tokens = [i for i in sorted(held) if i < n] or list(range(n))
        return cls(n, [(i,) for i in range(n)] + [()] * (-n % multiple), tokens, held, held)

    def counts(self) -> dict[str, int]:
        lengths = [len(ids) for ids in self.found]
        return {"kept": lengths.count(1), "composed": sum(n > 1 for n in lengths), "made": lengths.count(0)}

    def lines(self) -> list[str]:
        composed = {i: ids for i, ids in enumerate(self.found) if len(ids) > 1}
        moved = sum(len(ids) == 1 and ids != (i,) for i, ids in enumerate(self.found))
        made = [i for i, ids in enumerate(self.found) if not ids]
        parts = [f"{len(self.found) - len(composed) - len(made):,} rows kept" + f" (moved {moved:,})" * bool(moved)]
        if composed:
            mean = sum(map(len, composed.values())) / len(composed)
            parts.append(f"{len(composed):,} composed of {mean:.1f} old pieces on average")
        if made:
            parts.append(f"{len(made):,} made (the mean of all)")
        lines = [f"vocabulary {self.n_before:,} -> {len(self.found):,} ids: {', '.join(parts)}"]
        if composed:
            spelt = (f"{shown(self.new[i])} = {' + '.join(shown(self.old[k]) for k in composed[i])}" for i in composed)
            lines.append(f"composed   {', '.join(islice(spelt, 3))}" + ", ..." * (len(composed) > 3))
        if made:
            names = {shown(self.new[i]) for i in made if i in self.new}
            nameless = f"{len(made) - len(names):,} ids that no token has" if len(made) > len(names) else ""
            lines.append(f"made       {', '.join(filter(None, (few(names), nameless)))}")
        return lines


def shown(piece: str) -> str:
    return f'"{piece}"' if piece.isprintable() else ascii(piece)


def for_tokenizer(
    config: MistralConfig, carried: dict, source: Path, tokenizer: Path, pad_to: int | None
) -> tuple[MistralConfig, Rows, list[str]]:
    """(config, rows, lines on what is left out) of a model for another tokenizer; ``carried`` follows, in place."""
    n, name = config.vocab_size, tokenizer.resolve().name
    old = Vocabulary(source, str(source), n, SpecialIds(config.bos_id, config.eos_id))
    new = Vocabulary(tokenizer, f"--tokenizer {tokenizer}")
    found, same = sources(old, new), new.pieces == old.pieces
    if same and pad_to is None:  # onto itself: the rows of no token stay too
        found = [found[i] if i in new.pieces else (i,) for i in range(n)]
    found += [()] * (-len(found) % (pad_to or 1))

    moved = Moved(old, new, found)
    keys, left = move_ids({"bos_token_id": config.bos_id, "eos_token_id": config.eos_id} | carried["config"], moved)
    for role in ("bos", "eos", "pad"):
        if keys.get(f"{role}_token_id") is None and role in new.roles:
            keys[f"{role}_token_id"] = new.roles[role]
    bos, ends = keys.pop("bos_token_id", None), keys.get("eos_token_id")
    if not isinstance(ends, list):  # of several carried["config"] has all
        keys.pop("eos_token_id", None)
    config = replace(config, vocab_size=len(found), bos_id=bos, eos_id=[*listed(ends), None][0])
    carried["config"] = keys
    if "generation_config" in carried:
        carried["generation_config"], more = move_ids(carried["generation_config"], moved)
        left = list(dict.fromkeys(left + more))

    lines = [f"left out   {one}: {name} has no such token" for one in left]
    for key in OF_IDS if not same else ():
        if carried.get("generation_config", {}).pop(key, None):
            lines.append(f"left out   {key}: its ids are the old tokenizer's")
    lost = {shown(old.pieces[i]) for i in old.pieces.keys() - old.text.keys()} - set(map(shown, new.pieces.values()))
    if lost and carried.pop("chat_template", None) is not None and read_chat_template(tokenizer) is None:
        lines.append(f"left out   the chat template: {name} has no {few(lost)}")
    return config, Rows(n, found, sorted(old.pieces), old.pieces, new.pieces), lines


def move_ids(keys: dict, moved: Moved) -> tuple[dict, list[str]]:
    """The keys of a config with the ids of tokens moved, and those of them left out whose token is gone."""
    now, gone = dict(keys), []
    for key, value in keys.items():
        if not key.endswith("_token_id") or value is None:
            continue
        ids = {i: moved(key, i) for i in listed(value)}
        gone += [f"{key} {i} ({shown(moved.old.pieces.get(i, ''))})" for i, at in ids.items() if at is None]
        there = list(dict.fromkeys(at for at in ids.values() if at is not None))
        there = there or listed(moved.new.roles.get(key.removesuffix("_token_id")))
        now[key] = there if isinstance(value, list) else [*there, None][0]
        if not there:
            del now[key]
    return now, gone


# ---- the command line


def main(arguments: list[str] | None, *, HfWeights: Callable, write_hf: Callable, pieces_of: Callable) -> int:
    """model/convert.py, which imports this file, hands in what of it the command stands on."""
    parser = argparse.ArgumentParser(
        prog="python -m halny.model.convert",
        description="Give a Hugging Face folder of a Mistral another tokenizer, a padded vocabulary, or other layers.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="the model, which stays as it is")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; an earlier export is replaced")
    parser.add_argument("--tokenizer", type=Path, metavar="NEW", help="folder with the tokenizer.json to change to")
    parser.add_argument("--pad-to", type=int, metavar="N", help="add rows up to a multiple of N, as 64 [none]")
    parser.add_argument("--layers", metavar="LIST", help="the layers in their new order, from 0, as 0-23,8-31 [all]")
    given = parser.parse_args(arguments)
    parts = {"HfWeights": HfWeights, "write_hf": write_hf, "pieces_of": pieces_of}
    return exit_code("convert", lambda: reshape(**vars(given), **parts))
