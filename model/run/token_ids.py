"""Which ids begin, end and fill up a text, as a run's exports say it, and what else they take over from --init-from.

Fresh weights learn the markers that the data have, whatever the preset says. Weights that someone trained before keep
what their folder says, and learn beside it to end a text as the data do. What has been settled here lies in the run's
config.json and in every checkpoint's manifest ("model" and "carried"), for when the folder is gone.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from halny.model.data.batches import Corpus
from halny.model.data.dataset import Dataset
from halny.model.exits import Refused
from halny.model.hf_folder import few, read_carried
from halny.model.mistral import MistralConfig
from halny.model.run.recipe import Recipe
from halny.model.run.resolve import RunSpec, earlier_config
from halny.model.tokenizer_files import SpecialIds, listed, pieces


def settle_token_ids(spec: RunSpec, corpus: Corpus | None) -> tuple[MistralConfig, dict, list[str]]:
    """The model's config with its ids, what ``save_hf`` takes as ``carried``, and lines for the log.

    Raises Refused for an --init-from whose files cannot be read as JSON.
    """
    start, datasets = spec.recipe.init_from, [source.dataset for source in corpus.sources] if corpus else []
    data = next((d.special_ids for d in datasets if d.tokenizer or d.special_ids != SpecialIds()), None)
    if start is None:
        model, carried = of_fresh_weights(spec.model, data)
        of = "as in the data" if data else f"of --model {spec.recipe.model}, since the data do not say"
        return model, carried, [_in_words(model, carried, of)]
    found, left = _said_by_start(spec.recipe, corpus)
    written = [SpecialIds(**d.manifest["document"]) for d in datasets if isinstance(d, Dataset)]
    around = written[0] if written else SpecialIds()  # what documents have, not what their tokenizer names
    model, carried, said = of_earlier_weights(spec.model, found, around._replace(pad_id=data and data.pad_id))
    said = [f"token ids  {line}" for line in said]
    if left:
        said.append(f"export     without {', '.join(left)} of --init-from {start}")
    return model, carried, [_in_words(model, carried, f"of --init-from {start}"), *said]


def _said_by_start(recipe: Recipe, corpus: Corpus | None) -> tuple[dict, list[str]]:
    """What --init-from says of itself, and what of this exports will lack."""
    if not recipe.init_from.is_dir():  # gone since the first checkpoint
        return (earlier_config(recipe) or {}).get("carried", {}), []
    try:
        found, left = read_carried(recipe.init_from)
    except ValueError as error:
        raise Refused(f"--init-from: {error}") from None
    held = set(pieces(corpus.tokenizer if corpus else None).values())
    if held and (lost := set(pieces(recipe.init_from).values()) - held):
        left.append(f"{few(lost)} of the tokenizer (that of --data, which was not prepared with it)")
        if found.pop("chat_template", None) is not None:  # which may well speak of them
            left.append("the chat template")
    return found, left


def of_fresh_weights(model: MistralConfig, data: SpecialIds | None) -> tuple[MistralConfig, dict]:
    """(model, carried) with the ids of the data, where those say."""
    if data is None:
        return model, {}
    bos, eos, pad = _within(model, data)
    return replace(model, bos_id=bos, eos_id=eos), {} if pad is None else {"config": {"pad_token_id": pad}}


def of_earlier_weights(
    model: MistralConfig, carried: dict, around: SpecialIds
) -> tuple[MistralConfig, dict, list[str]]:
    """(model, carried, what has changed) of --init-from, trained on texts with these ids around them."""
    carried, said, around = copy.deepcopy(carried), [], _within(model, around)
    config, generation = carried.setdefault("config", {}), carried.get("generation_config")
    if around.eos_id is not None:
        before = config.get("eos_token_id", model.eos_id)
        ends = _and_end(before, around.eos_id)
        if ends != before:
            named = listed(before) or "no end"
            said.append(f"texts of --data end with {around.eos_id}, and --init-from names {named}: exports name both")
            if isinstance(ends, list):
                config["eos_token_id"] = ends
            else:
                model = replace(model, eos_id=ends)
        if generation is not None:
            generation["eos_token_id"] = _and_end(generation.get("eos_token_id"), around.eos_id)
    if around.bos_id not in (None, model.bos_id):
        said.append(f"texts of --data begin with {around.bos_id}, and --init-from says {model.bos_id}: exports say "
            f"{around.bos_id}")  # fmt: skip
        model = replace(model, bos_id=around.bos_id)
        if generation is not None:
            generation["bos_token_id"] = around.bos_id
    if around.pad_id is not None and config.get("pad_token_id") is None:
        config["pad_token_id"] = around.pad_id
    return model, carried, said


def _within(model: MistralConfig, ids: SpecialIds) -> SpecialIds:
    """The ids, less those that the model has no row for: transformers refuses a config with such a pad token."""
    return SpecialIds(*(i if i is not None and i < model.vocab_size else None for i in ids))


def _and_end(ids: int | list[int] | None, end: int) -> int | list[int]:
    """The ends of a text and one more; as they were if it is among them."""
    if end in listed(ids):
        return ids
    return end if ids is None else [*listed(ids), end]


def _in_words(model: MistralConfig, carried: dict, of: str) -> str:
    config = carried.get("config", {})
    ends = ", ".join(map(str, listed(config.get("eos_token_id", model.eos_id)))) or "none"
    bos, pad = ("none" if i is None else i for i in (model.bos_id, config.get("pad_token_id")))
    return f"token ids  BOS {bos}, EOS {ends}, pad {pad}: {of}"
