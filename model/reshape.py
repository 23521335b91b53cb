"""The command python -m halny.model.convert: a Hugging Face model with another vocabulary, or other layers.

Everything that can be refused is refused before anything is written. The new model is then written parameter by
parameter, each made from one of the old model, so that no more is held than one file of the new and a few copies of
its embedding. model/vocabulary.py says which rows make a row; layers are copied whole.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from halny.model.durable import in_its_words, in_words
from halny.model.exits import Failed, Refused, exit_code
from halny.model.hf_folder import MADE, check_out, few, name_of, read_carried
from halny.model.mistral import MistralConfig
from halny.model.tokenizer_files import SpecialIds, has_tokenizer, listed, pieces, read_chat_template
from halny.model.vocabulary import Vocabulary, moved_ids, new_rows, sources

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
        config, found, tokens, lines = for_tokenizer(config, carried, source, tokenizer, pad_to)
    else:
        n_rows = before.vocab_size
        found = [(i,) for i in range(n_rows)] + [()] * (-n_rows % (pad_to or 1))
        tokens = [i for i in sorted(pieces(source)) if i < n_rows] or list(range(n_rows))
        config, lines = replace(config, vocab_size=len(found)), report(n_rows, found)
    if tokenizer is not None or pad_to is not None:
        made["vocabulary"], said = counts(found), lines + said
    carried["config"][MADE] = made

    n_parameters = sum(prod(piece.shape) for _, placed in pieces_of(config) for piece in placed)
    n_bytes, dtype = n_parameters * weights.dtype.itemsize, str(weights.dtype).removeprefix("torch.")
    check_out(out, n_bytes)
    dtype = dtype.replace("bfloat", "bf").replace("float", "fp")
    print(*said, f"export     {out}: {n_parameters:,} parameters in {dtype}, {in_words(n_bytes)}", sep="\n", flush=True)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, _ in pieces_of(config):
            if name.startswith("layers."):
                _, i, rest = name.split(".", 2)
                yield name, weights.rows(f"layers.{order[int(i)]}.{rest}")
            elif name in ("embed.weight", "head.weight"):
                yield name, new_rows(weights.rows(name), found, tokens)
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
    return f"Made from the model {name_of(source)}{for_it} by halny (python -m halny.model.convert):\n\n{block}"


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


def for_tokenizer(
    config: MistralConfig, carried: dict, source: Path, tokenizer: Path, pad_to: int | None
) -> tuple[MistralConfig, list[tuple[int, ...]], list[int], list[str]]:
    """What follows from another tokenizer: (config, ``sources``, the old ids of tokens, lines for the report).

    ``carried`` follows in place. Of a tokenizer onto itself the rows that no token has stay too, unless padding asks
    for another number of them.
    """
    n_rows, name = config.vocab_size, tokenizer.resolve().name
    ends = SpecialIds(config.bos_id, config.eos_id, carried["config"].get("pad_token_id"))
    old = Vocabulary(source, str(source), n_rows, ends)
    new = Vocabulary(tokenizer, f"--tokenizer {tokenizer}")
    found, same = sources(old, new), new.pieces == old.pieces
    if same and pad_to is None:
        found = [found[i] if i in new.pieces else (i,) for i in range(n_rows)]
    found += [()] * (-len(found) % (pad_to or 1))

    def moved(keys: dict) -> dict:
        now, gone = moved_ids(keys, old, new, found)
        left.extend(f"{one}: {name} has no such token" for one in gone)
        left.extend(f"{key}: its ids are the old tokenizer's" for key in OF_IDS if now.get(key) and not same)
        return {key: value for key, value in now.items() if same or key not in OF_IDS}

    left: list[str] = []
    keys = moved({"bos_token_id": config.bos_id, "eos_token_id": config.eos_id} | carried["config"])
    keys |= {f"{role}_token_id": new.roles[role] for role in ("bos", "eos", "pad")
        if role in new.roles and keys.get(f"{role}_token_id") is None}  # fmt: skip
    config = replace(config, vocab_size=len(found), bos_id=keys.pop("bos_token_id", None),
        eos_id=next(iter(listed(keys.get("eos_token_id"))), None))  # fmt: skip
    if not isinstance(keys.get("eos_token_id"), list):  # several are in carried, one is in config
        keys.pop("eos_token_id", None)
    carried["config"] = keys
    if "generation_config" in carried:
        carried["generation_config"] = moved(carried["generation_config"])
    pieces_now = set(new.pieces.values())
    lost = {old.name(i) for i, piece in old.pieces.items() if i not in old.text and piece not in pieces_now}
    if lost and carried.pop("chat_template", None) is not None and read_chat_template(tokenizer) is None:
        left.append(f"the chat template: {name} has no {few(lost)}")
    lines = [*report(n_rows, found, old, new), *(f"left out   {one}" for one in dict.fromkeys(left))]
    return config, found, sorted(old.pieces) or list(range(n_rows)), lines


def counts(found: list[tuple[int, ...]]) -> dict[str, int]:
    """How many rows are kept, composed and made."""
    lengths = [len(ids) for ids in found]
    return {"kept": lengths.count(1), "composed": sum(n > 1 for n in lengths), "made": lengths.count(0)}


def report(
    n_before: int, found: list[tuple[int, ...]], old: Vocabulary | None = None, new: Vocabulary | None = None
) -> list[str]:
    """Lines on the new rows: how many of each kind, three that are composed, which are made."""
    n_kept, n_composed, n_made = counts(found).values()
    moved = sum(len(ids) == 1 and ids != (i,) for i, ids in enumerate(found))
    composed = [i for i, ids in enumerate(found) if len(ids) > 1]
    parts = [f"{n_kept:,} rows kept" + f" (moved {moved:,})" * bool(moved)]
    if composed:
        mean = sum(len(found[i]) for i in composed) / n_composed
        parts.append(f"{n_composed:,} composed of {mean:.1f} old pieces on average")
    if n_made:
        parts.append(f"{n_made:,} made (the mean of all)")
    lines = [f"vocabulary {n_before:,} -> {len(found):,} ids: {', '.join(parts)}"]
    if composed:
        examples = [f"{new.name(i)} = {' + '.join(map(old.name, found[i]))}" for i in composed[:3]]
        lines.append(f"composed   {', '.join(examples)}{', ...' * (n_composed > 3)}")
    if n_made:
        names = [new.name(i) for i, ids in enumerate(found) if not ids and new and i in new.pieces]
        n_others = n_made - len(names)
        others = f"{n_others:,} {'id' if n_others == 1 else 'ids'} of no token" if n_others else ""
        lines.append(f"made       {', '.join(filter(None, (few(set(names)), others)))}")
    return lines


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
