"""A checkpoint as a Hugging Face folder: python -m halny.model.export RUN_DIR OUT [--dtype bf16]

While the run goes on or long after it, on a machine without a GPU. The checkpoint's checksums are verified first; then
its master weights are put together parameter by parameter, whatever number of ranks wrote them, so that no more is
held than one file of the export. The folder is what train.py's own export would be, to the bit, and there whole or not
at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halny.model.convert import pieces, write_hf
from halny.model.data.batches import parse_sources
from halny.model.data.dataset import DataError
from halny.model.durable import in_its_words, in_words
from halny.model.estimate import sizes
from halny.model.exits import Failed, Refused, exit_code
from halny.model.hf_folder import check_out
from halny.model.hints import hint
from halny.model.mistral import MistralConfig
from halny.model.run import checkpoint
from halny.model.run.resolve import DTYPES
from halny.model.tokenizer_files import TOKENIZERS, has_tokenizer


def export(source: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None) -> None:
    """Write the Hugging Face folder ``out`` from ``source``, a checkpoint or a run, of which the newest is taken.

    dtype None is the run's --export-dtype; tokenizer None the one of the run's data or --init-from, if it is still
    there. Raises Refused for what can be put right, a damaged checkpoint included, before anything is written.
    """
    path = newest(source)
    try:
        manifest = checkpoint.read_manifest(path)
        config, recipe = MistralConfig(**manifest["config"]["model"]), manifest["config"]["recipe"]
        carried = manifest["config"].get("carried", {})
        dtype = dtype or recipe["export_dtype"]
        torch_dtype = DTYPES[dtype]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is damaged ({error})") from None
    except OSError as error:
        raise Refused(f"{error.filename or path} cannot be read: {in_its_words(error)}") from None
    tokenizer = tokenizer or find_tokenizer(path, recipe)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise Refused(f"--tokenizer {tokenizer} is not a folder with a {' or a '.join(TOKENIZERS)}{hint(tokenizer)}")
    needed = sizes.parameters(config) * torch_dtype.itemsize
    check_out(out, needed)

    print(f"checkpoint {path}, step {manifest['step']}: verifying its checksums", flush=True)
    if problem := checkpoint.damage(path):
        raise Refused(f"{path} is damaged ({problem}); name an earlier checkpoint")
    print(f"export     {out}: {sizes.parameters(config):,} parameters in {dtype}, {in_words(needed)}", flush=True)
    try:
        write_hf(config, torch_dtype, parameters(path, config), out, tokenizer=tokenizer, carried=carried)
    except (OSError, ValueError, SafetensorError) as error:  # the run deletes a checkpoint when its turn comes
        raise Failed(f"{out} was not written: {' '.join(str(error).split())}") from None
    print(f"tokenizer  {tokenizer or 'none found: copy its files into the folder, or name it with --tokenizer'}")


def newest(source: Path) -> Path:
    """The checkpoint that ``source`` is, or the newest of the run that it is."""
    if (source / "manifest.json").exists():
        return source.resolve()  # whose name tells the step, also for "."
    if not (source / "checkpoints").is_dir():
        raise Refused(f"{source} is neither a run nor a checkpoint; name a folder with checkpoints/ or manifest.json")
    found = checkpoint.complete(source / "checkpoints")
    if not found:
        raise Refused(f"{source} has no checkpoint yet")
    return found[-1]


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


def parameters(path: Path, config: MistralConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, whole master weight) in the order of ``pieces``, put together from the shards of all ranks.

    Each file's header says at which row of the whole its part of a tensor begins (DCP_SHARDING_INFO). Raises Refused
    before the first is read if they do not make up exactly the parameters of ``config``.
    """
    parts: dict[str, list[tuple[int, int, Path]]] = {}  # name -> (first row, rows, file)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                if name.startswith("model."):
                    (first, *rest), (rows, *_) = offsets[name]["saved_offsets"], opened.get_slice(name).get_shape()
                    if any(rest):
                        raise Refused(f"{file}: {name} is sharded along another dimension than the first")
                    parts.setdefault(name.removeprefix("model."), []).append((first, rows, file))
    shapes = {name: (sum(p.shape[0] for p in placed), *placed[0].shape[1:]) for name, placed in pieces(config)}
    if strangers := sorted(parts.keys() ^ shapes.keys()):
        raise Refused(f"{path} does not hold the model that its manifest describes: {strangers[0]}")
    for name, (n_rows, *_) in shapes.items():
        end = 0
        for first, rows, _ in sorted(parts[name]):
            if first != end:
                raise Refused(f"{path}: {name} has a gap or an overlap at row {end}")
            end += rows
        if end != n_rows:
            raise Refused(f"{path}: {name} has {end} rows and not {n_rows}")

    def whole() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            x = torch.empty(shape, dtype=torch.float32)
            for first, rows, file in parts[name]:
                with safe_open(file, "pt") as opened:
                    x[first : first + rows] = opened.get_tensor(f"model.{name}")
            yield name, x

    return whole()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m halny.model.export",
        description="Turn a checkpoint of train.py into a Hugging Face folder, without a GPU.",
        epilog="Exit codes: 0 done, 2 refused, 1 failed, 130 interrupted, 143 terminated; but for 0, OUT is as it was.",
    )
    parser.add_argument("source", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint) or one")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; an earlier export is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights [the run's --export-dtype]")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with its files [that of the run's data]")
    given = parser.parse_args(arguments)
    return exit_code("export", lambda: export(given.source, given.out, given.dtype, given.tokenizer))


if __name__ == "__main__":
    sys.exit(main())
