"""Checkpoints as a Hugging Face folder, one or the mean of several: python -m halny.model.export RUN_DIR OUT

While the run goes on or long after it, on a machine without a GPU. The checksums of checkpoints are verified first;
then master weights are put together parameter by parameter, whatever number of ranks wrote them, so that no more is
held than one file of the export. The folder is what train.py's own export would be, to the bit, and there whole or not
at all.

With --average N, or several models by name and weight, the weights are their mean (model/run/average.py). What was
averaged is in the folder's README.md and in its config.json, under "halny".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from halny.model.convert import HfWeights, pieces, write_hf
from halny.model.data.batches import parse_sources
from halny.model.data.dataset import DataError
from halny.model.durable import in_words
from halny.model.estimate import sizes
from halny.model.exits import Failed, Refused, exit_code
from halny.model.hf_folder import CONFIG, MADE, check_out, name_of, read_carried, weights_fingerprint
from halny.model.hints import hint
from halny.model.run import checkpoint
from halny.model.run.average import Mean, Weights
from halny.model.run.checkpoint import CheckpointWeights
from halny.model.run.resolve import DTYPES
from halny.model.tokenizer_files import TOKENIZERS, differing, has_tokenizer
from halny.model.tokenizer_files import pieces as meanings


class Model(NamedTuple):
    """One of those that are averaged, or the only one."""

    weights: Weights
    share: int  # of the sum of all shares
    tokenizer: Path | None
    carried: dict  # what an export of it says beside its sizes: hf_folder.read_carried

    @property
    def name(self) -> str:
        """Which one it is, without the path of a machine."""
        path = self.weights.path.resolve()
        return name_of(path) if isinstance(self.weights, HfWeights) else f"{path.parent.parent.name}/{path.name}"


def export(
    sources: Sequence[str], out: Path, average: int | None = None, dtype: str | None = None,
    tokenizer: Path | None = None,
) -> None:  # fmt: skip
    """Write the Hugging Face folder ``out`` from ``sources``.

    One is a checkpoint, or a run: its newest, or the mean of its newest ``average``. Several, as in a:0.5 b:0.5, are
    checkpoints, runs or Hugging Face folders, of which the mean is taken. dtype None is the run's --export-dtype, or
    that of the first folder; tokenizer None the one of the run's data or --init-from, if it is still there, or the
    folder's. Raises Refused for what can be put right, a damaged checkpoint included, before anything is written.
    """
    models = [open_model(path, share) for path, share in named_models(sources, average)]
    mean, first = Mean([(model.weights, model.share) for model in models]), models[0]
    tokenizer = tokenizer or next((model.tokenizer for model in models if model.tokenizer), None)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise Refused(f"--tokenizer {tokenizer} is not a folder with a {' or a '.join(TOKENIZERS)}{hint(tokenizer)}")
    check_one_tokenizer(models)
    dtype = dtype or stored_dtype(first.weights)
    needed = sizes.parameters(mean.config) * DTYPES[dtype].itemsize
    check_out(out, needed)
    if inside := next((m.weights.path for m in models if m.weights.path.resolve().is_relative_to(out.resolve())), None):
        raise Refused(f"{out} is, or holds, {inside}, which is to be read; choose another folder to write")

    for model in models:
        if isinstance(model.weights, CheckpointWeights):
            path, step = model.weights.path, model.weights.step
            print(f"checkpoint {path}, step {step}: verifying its checksums", flush=True)
            if problem := checkpoint.damage(path):
                remedy = "move it away to average those that are left" if average else "name an earlier checkpoint"
                raise Refused(f"{path} is damaged ({problem}); {remedy}")
    carried, readme = first.carried, None
    if len(models) > 1:
        shares = said_of(models)
        for row in shares:
            print(f"average    {row['share']:.2%} of {row['model']}")
        ids = {model.name: (model.weights.config.bos_id, model.weights.config.eos_id) for model in models}
        if len(set(ids.values())) > 1:
            others = ", ".join(f"{bos} and {eos} in {name}" for name, (bos, eos) in list(ids.items())[1:])
            print("token ids  BOS {} and EOS {} of {}; {}".format(*ids[first.name], first.name, others))
        carried = first.carried | {"config": first.carried.get("config", {}) | {MADE: {"average": shares}}}
        readme = in_markdown(shares, dtype)
    print(f"export     {out}: {sizes.parameters(mean.config):,} parameters in {dtype}, {in_words(needed)}", flush=True)
    try:
        parameters = ((name, mean.rows(name)) for name, _ in pieces(mean.config))
        write_hf(mean.config, DTYPES[dtype], parameters, out, tokenizer=tokenizer, carried=carried, readme=readme)
    except (OSError, ValueError, SafetensorError) as error:  # the run deletes a checkpoint when its turn comes
        raise Failed(f"{out} was not written: {' '.join(str(error).split())}") from None
    print(f"tokenizer  {tokenizer or 'none found: copy its files into the folder, or name it with --tokenizer'}")


# ---- what is read


def named_models(sources: Sequence[str], average: int | None) -> list[tuple[Path, int]]:
    """The folders to read and their shares: checkpoints and Hugging Face folders, each run as those of its newest."""
    try:
        named = parse_sources(sources)
    except DataError as error:
        raise Refused(str(error)) from None
    if average is None:
        found = [(newest(path)[0], share) for path, share in named]
    elif len(named) > 1:
        raise Refused(f"--average {average} takes one run's newest checkpoints; leave it out, and {named[0][0]} and "
            "the others are averaged by their weights")  # fmt: skip
    elif average < 2:
        raise Refused(f"--average {average} is no mean; give 2 or more, or leave it out")
    else:
        found = [(path, 1) for path in newest(named[0][0], average)]
    if len({path.resolve() for path, _ in found}) < len(found):
        raise Refused(f"{' '.join(sources)}: one model is named twice; name it once, with the sum of its weights")
    return found


def newest(source: Path, n: int | None = None) -> list[Path]:
    """The newest n checkpoints of the run that ``source`` is, newest first; n None: its newest, or the model it is."""
    if (source / "checkpoints").is_dir() or (source / "status.json").is_file():
        found = checkpoint.complete(source / "checkpoints")
        if not found:
            raise Refused(f"{source} has no checkpoint yet")
        return checkpoint.newest_kept(source, n)[::-1] if n else found[-1:]
    if n is not None:
        raise Refused(f"--average {n}: {source} is no run, whose newest checkpoints it could take; name a folder with "
            "checkpoints/, or several models with their weights, as in a:0.5 b:0.5")  # fmt: skip
    if (source / "manifest.json").exists():
        return [source.resolve()]  # whose name tells the step, also for "."
    if (source / CONFIG).exists():
        return [source]
    what = "checkpoints/, manifest.json or, of a Hugging Face model, config.json"
    raise Refused(f"{source} is neither a run nor a checkpoint nor a model; name a folder with {what}{hint(source)}")


def open_model(path: Path, share: int) -> Model:
    if (path / "manifest.json").exists():
        weights = CheckpointWeights(path)
        if weights.recipe.get("export_dtype") not in DTYPES:
            raise Refused(f"{path} is damaged (its recipe has no export_dtype)")
        return Model(weights, share, find_tokenizer(path, weights.recipe), weights.carried)
    try:
        return Model(HfWeights(path), share, path if has_tokenizer(path) else None, read_carried(path)[0])
    except ValueError as error:
        raise Refused(str(error)) from None


def find_tokenizer(path: Path, recipe: dict) -> Path | None:
    """Where train.py's export takes it from: the data (the built-in corpus lies in the run folder), or --init-from."""
    try:
        places = [folder / "tokenizer" for folder, _ in parse_sources(recipe["data"] or ())]
    except DataError:  # moved away since
        places = []
    if not recipe["data"]:
        places.append(path.parent.parent / "data" / "tokenizer")
    if recipe["init_from"]:
        places.append(Path(recipe["init_from"]))
    return next(filter(has_tokenizer, places), None)


def stored_dtype(weights: Weights) -> str:
    """The dtype that an export of these is in, unless another is asked for."""
    if isinstance(weights, CheckpointWeights):
        return weights.recipe["export_dtype"]
    return next((name for name, dtype in DTYPES.items() if dtype == weights.dtype), "fp32")


def check_one_tokenizer(models: Sequence[Model]) -> None:
    """Refuse models whose tokens of a number mean different things, as far as their tokenizers are there."""
    known = [(model, meanings(model.tokenizer)) for model in models if model.tokenizer]
    for model, theirs in known[1:]:
        first, ours = known[0]
        ids, others = differing(ours, theirs)
        if others:
            i = ids[0]
            raise Refused(
                f"{model.weights.path} and {first.weights.path} have different tokenizers and so no mean: id {i} is "
                f"{theirs[i]!r} and {ours[i]!r}; python -m halny.model.convert --tokenizer gives one the other's"
            )


# ---- what is said


def said_of(models: Sequence[Model]) -> list[dict]:
    """For config.json: each model's share of the mean, and a checksum that tells it from any other."""
    total = sum(model.share for model in models)
    rows = []
    for model in models:
        row = {"model": model.name, "share": model.share / total}
        if isinstance(model.weights, CheckpointWeights):
            sha256 = (model.weights.path / "manifest.json.sha256").read_text().split()[0]
            row |= {"step": model.weights.step, "sha256_of_manifest": sha256}
        else:
            row |= {"fingerprint": weights_fingerprint(model.weights.path)}
        rows.append(row)
    return rows


def in_markdown(shares: list[dict], dtype: str) -> str:
    rows = [
        f"| {row['share']:.2%} | {row['model']} | {row.get('sha256_of_manifest') or row['fingerprint']} |"
        for row in shares
    ]
    head = "| share | model | SHA-256 of a checkpoint's manifest.json, or fingerprint of a folder's weights |"
    how = f"Each parameter is the weighted mean of theirs, summed in fp64 and rounded to fp32, then to {dtype}."
    return "\n".join([f"# The mean of {len(shares)} models", "", how, "", head, "| --: | --- | --- |", *rows, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m halny.model.export",
        description="Turn a checkpoint of train.py into a Hugging Face folder, without a GPU; or the mean of several.",
        epilog="Exit codes: 0 done, 2 refused, 1 failed, 130 interrupted, 143 terminated; but for 0, OUT is as it was.",
    )
    source = "a run (its newest checkpoint) or a checkpoint; or several to average, Hugging Face folders too, each with"
    source += " its share of the mean, as in a:0.5 b:0.5"
    parser.add_argument("sources", nargs="+", metavar="RUN_DIR|CHECKPOINT|MODEL:WEIGHT", help=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; an earlier export is replaced")
    newest_n = "the mean of the run's newest N checkpoints that are kept (train.py --keep N, --keep-every)"
    parser.add_argument("--average", type=int, metavar="N", help=newest_n)
    of_weights = "of the weights [the run's --export-dtype, or that of the first folder]"
    parser.add_argument("--dtype", choices=DTYPES, help=of_weights)
    its_files = "folder with its files [that of the run's data, or the first folder's own]"
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=its_files)
    given = parser.parse_intermixed_args(arguments)  # else `a:1 b:1 --dtype fp32 OUT` would take b:1 for OUT
    return exit_code("export", lambda: export(given.sources, given.out, given.average, given.dtype, given.tokenizer))


if __name__ == "__main__":
    sys.exit(main())
