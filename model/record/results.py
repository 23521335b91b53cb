"""What a finished run leaves beside its checkpoints: the Hugging Face export, curves, a sample of text, the summary."""

from __future__ import annotations

from pathlib import Path

import torch

from halny.model.convert import check_hf_weights, pieces, save_hf, write_hf
from halny.model.data.batches import Corpus
from halny.model.data.tokenizer import decode
from halny.model.durable import write_json
from halny.model.exits import Failed
from halny.model.mistral import Mistral
from halny.model.record.run_folder import RunFolder
from halny.model.record.summary import energy_joules, in_lines, summarize
from halny.model.run import fsdp
from halny.model.run.optimizer import ShardedAdamW, SplitAdamW, master_weights
from halny.model.run.ranks import World, everywhere, on_main, say
from halny.model.run.resolve import DTYPES, RunSpec
from halny.model.tokenizer_files import has_tokenizer


def leave_export(
    folder: RunFolder, spec: RunSpec, world: World, corpus: Corpus,
    model: Mistral, optimizer: ShardedAdamW | SplitAdamW, carried: dict, missing_only: bool,
) -> None:  # fmt: skip
    """The master weights as a Hugging Face folder, with the tokenizer of the data or of --init-from. A collective."""
    path, start = folder.path / "export", spec.recipe.init_from
    if missing_only and on_main(world, is_complete_export, path):
        return
    tokenizer, dtype = corpus.tokenizer or (start if has_tokenizer(start) else None), DTYPES[spec.recipe.export_dtype]
    try:
        if fsdp.is_sharded(model):
            save_hf(model, path, dtype=dtype, tokenizer=tokenizer, carried=carried)
        else:
            weights = dict(master_weights(model, optimizer))
            whole = ((name, weights[name].joined()) for name, _ in pieces(spec.model))
            write_hf(spec.model, dtype, whole, path, tokenizer=tokenizer, carried=carried)
    except ValueError as error:  # on all ranks: a tokenizer that is gone, say, or a weight beyond fp16
        raise Failed(f"the export could not be written: {error}; the same command again makes it") from None
    say(world, f"export     {path}")


def leave_curves(folder: RunFolder, world: World, missing_only: bool) -> None:
    path = folder.path / "curves.png"
    if world.is_main and not (missing_only and path.exists()):
        folder.plot_curves()
        say(world, f"curves     {path}")


def leave_sample(
    folder: RunFolder, spec: RunSpec, world: World, corpus: Corpus, model: Mistral, missing_only: bool
) -> None:
    """Text that the model continues from the beginning of the held-out split, or of the data. A collective."""
    path = folder.path / "sample.txt"
    if not corpus.tokenizer or (missing_only and on_main(world, path.exists)):
        return
    streams = [rows.stream for rows in corpus.held_out + corpus.train]
    stream = next((stream for stream in streams if len(stream) >= 16), streams[-1])
    prompt = torch.from_numpy(stream.read(0, min(16, len(stream))))
    ids = model.generate(prompt[None].to(world.device), 48, temperature=0.7, seed=spec.recipe.seed)[0].tolist()
    fsdp.reshard(model)
    if world.is_main:
        begins, text = decode(corpus.tokenizer, ids[: len(prompt)]), decode(corpus.tokenizer, ids)
        path.write_text(text + "\n", encoding="utf-8")
        say(world, f"prompt     {begins!r}\ncontinued  {text[len(begins) :]!r}")


def leave_summary(
    folder: RunFolder, spec: RunSpec, world: World, spent: dict[str, float], wall_s: float, energy_j: float | None
) -> None:
    """summary.json, and the same in lines; energy_j is what this rank's GPU had drawn when the steps began."""
    drawn = everywhere(None if energy_j is None else energy_joules(world.device) - energy_j)
    if world.is_main:
        summary = summarize(folder.lines(), spec, spent, wall_s, None if None in drawn else sum(drawn))
        write_json(folder.path / "summary.json", summary)
        say(world, in_lines(summary))


def is_complete_export(folder: Path) -> bool:
    try:
        check_hf_weights(folder)
    except ValueError:
        return False
    return True
