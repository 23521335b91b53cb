"""Checkpoints on the disk: found, verified, loaded, and the old ones deleted. What writes them is saver.py.


A checkpoint is a folder ``step-NNNNNNNN``:

    shard-RRRRR-*.safetensors   each rank's shards of the fp32 master weights and AdamW's two moments, those as
                                --moments has them; what replicas (HSDP) have in common, one of them writes
    manifest.json               step, configuration, bytes and SHA-256 of every file, and what else a resume needs
    manifest.json.sha256        the manifest's own SHA-256, as sha256sum writes it

Nothing in it can run code: safetensors and JSON, no pickle. (torch's distributed checkpointing, DCP, writes and reads
the shards, on any number of ranks; its default metadata is a pickle, so its Hugging Face storage is used, which needs
none.)

**Loading** believes nothing: names, sizes, SHA-256 of all files (the ranks share the work), dtypes and shapes against
what is to be filled. A damaged checkpoint is put aside under another name and the one before it used. One that the
system does not let us read (no descriptor left, no permission, an error of the disk) is no damaged one: the start is
refused, and everything stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from halny.model.convert import pieces
from halny.model.durable import MISSING, in_its_words, sha256
from halny.model.exits import Failed, Refused
from halny.model.mistral import MistralConfig
from halny.model.run.ranks import World, agreed, everywhere, on_main

FORMAT = 2
READERS = 4  # files read at once on a rank, to compare or to checksum them


# ---------------------------------------------------------------------------------------------------------- on the disk


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were renamed into place, oldest first. Folders of other names are not ours."""
    entries = folder.iterdir() if folder.is_dir() else ()  # not glob: that finds nothing where it may not look
    return sorted(path for path in entries if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict:
    """Raises ValueError, saying why, for a manifest that is not as it was written, to the bit.

    OSError where the system does not let us read it, which says nothing about the manifest.
    """
    paths = [checkpoint / name for name in ("manifest.json", "manifest.json.sha256")]
    try:
        if missing := [path.name for path in paths if not path.is_file()]:  # a pipe would wait for a writer
            raise ValueError(f"{missing[0]} cannot be read: no such file")
        content, recorded = (path.read_bytes() for path in paths)
    except MISSING as error:
        raise ValueError(f"{Path(error.filename).name} cannot be read: {error.strerror}") from None
    if recorded != checksum_line(content):
        raise ValueError("manifest.json has the wrong checksum")
    try:
        manifest = json.loads(content)
        step, files = manifest["step"], manifest["files"]
        if manifest["format"] != FORMAT or f"step-{step:08d}" != checkpoint.name:
            raise ValueError(f"it is of another format than {FORMAT}, or of another step")
        if not all(type(entry["bytes"]) is int and type(entry["sha256"]) is str for entry in files.values()):
            raise ValueError("an entry of its files is none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"manifest.json is not one: {_line(error)}") from None
    return manifest


def checksum_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()


def config_of(run_dir: Path) -> dict | None:
    """config.json of a run, or where it is missing what the newest checkpoint holds of it; None of a run that is new.

    Raises OSError or ValueError for one that is not readable.
    """
    checkpoints, path = complete(run_dir / "checkpoints"), run_dir / "config.json"
    if not path.exists():
        return read_manifest(checkpoints[-1])["config"] if checkpoints else None
    if not isinstance(config := json.loads(path.read_text()), dict):
        raise ValueError(f"{path} holds no object")
    return config


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with every parts-th of a checkpoint's files (and with its manifest), or None.

    Raises Refused where the system does not let us find out.
    """
    try:
        manifest = read_manifest(checkpoint)
        present = {path.name for path in checkpoint.iterdir() if path.is_file()}
        present -= {"manifest.json", "manifest.json.sha256"}
        if present != manifest["files"].keys():
            return f"files missing or too many: {', '.join(sorted(present ^ manifest['files'].keys()))}"
        files = list(manifest["files"].items())[part::parts]
        size = sum(entry["bytes"] for _, entry in files)
        with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", leave=False,
                  disable=None if part == 0 and size > 1e9 else True) as bar:  # fmt: skip
            for name, entry in files:
                if (checkpoint / name).stat().st_size != entry["bytes"]:
                    return f"{name} has the wrong size"
            with ThreadPoolExecutor(READERS) as pool:
                digests = pool.map(sha256, [checkpoint / name for name, _ in files])
                for (name, entry), digest in zip(files, digests, strict=True):
                    if digest != entry["sha256"]:
                        pool.shutdown(cancel_futures=True)
                        return f"{name} has the wrong checksum"
                    bar.update(entry["bytes"])
    except (*MISSING, ValueError) as error:
        return str(error)
    except OSError as error:
        raise Refused(f"{error.filename or checkpoint} cannot be read: {in_its_words(error)}; or move "
            f"{checkpoint.name} away to go on from the one before") from None  # fmt: skip
    return None


def best(folder: Path, metric: str) -> tuple[Path, float] | None:
    """The complete checkpoint with the lowest ``metric`` among those evaluated when saved, and that; or None.

    The evaluation is in the manifest, so which one is best outlives every crash with the checkpoints themselves.
    """
    found = []
    for checkpoint in complete(folder):
        with contextlib.suppress(ValueError):  # a damaged manifest: newest_sound puts that one aside
            value = read_manifest(checkpoint).get("evaluation", {}).get(metric)
            if value is not None:
                found.append((value, checkpoint))
    return min(found)[::-1] if found else None


def newest_sound(folder: Path, world: World, say: Callable[[str], None], before: int | None = None) -> Path | None:
    """The newest complete and undamaged checkpoint, every byte verified; None if there never was one.

    Damaged ones that are newer get another name, so that they neither count as kept nor are in the way. Raises Refused
    if all are damaged. With ``before``, the newest of a step below it, and nothing is renamed or refused.
    """
    candidates = [path for path in on_main(world, complete, folder) if before is None or step_of(path) < before]
    damaged: list[Path] = []
    for checkpoint in reversed(candidates):
        problems = [p for p in everywhere(agreed(damage, checkpoint, world.rank, world.size)) if p]
        if not problems:
            if before is None:
                on_main(world, _put_aside, damaged)
            return checkpoint
        say(f"checkpoint {checkpoint.name} is damaged ({problems[0]}); falling back to the one before")
        damaged.append(checkpoint)
    if candidates and before is None:
        raise Refused(f"every checkpoint in {folder} is damaged; --no-resume sets the run aside and starts anew")
    return None


def newest_kept(run_dir: Path, n: int) -> list[Path]:
    """The newest n complete checkpoints of a run, oldest first; Refused if it has kept fewer."""
    found = complete(run_dir / "checkpoints")
    if len(found) < n:
        raise Refused(f"--average {n}: {run_dir} has kept {len(found)} checkpoints; train.py keeps more with --keep {n}"
            ", or every so many with --keep-every")  # fmt: skip
    return found[-n:]


def newest_to_average(run_dir: Path, world: World, n: int) -> list[Path]:
    """What ``newest_kept`` finds, every byte of it verified; Refused if one is damaged. A collective."""
    chosen = on_main(world, newest_kept, run_dir, n)
    for checkpoint in chosen:
        for problem in everywhere(agreed(damage, checkpoint, world.rank, world.size)):
            if problem:
                raise Refused(f"{checkpoint} is damaged ({problem}); move it away to average those that are left")
    return chosen


def _put_aside(damaged: list[Path]) -> None:
    for checkpoint in damaged:
        checkpoint.rename(free_name(checkpoint.parent, f"damaged-{checkpoint.name}"))


def free_name(folder: Path, name: str) -> Path:
    return next(path for n in range(1, 100_000) if not (path := folder / f"{name}-{n}").exists())


def delete(checkpoint: Path) -> None:
    """Under another name first: a kill in the middle leaves no half of it under its own."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def delete_leftovers(folder: Path) -> None:
    """What a killed save or deletion left; for the one process that holds the run's lock."""
    for leftover in folder.glob(".*.partial"):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover)


def prune(folder: Path, newest: Path, keep: int, keep_every: int | None, best_by: str | None) -> None:
    """Delete what is older than ``newest``, which was just written, but for the newest keep - 1 and what is asked for.

    Whatever a manifest does not show to be an older checkpoint of this folder neither counts nor is touched: copies
    under another step, later steps, links.
    """
    older = []
    try:
        for checkpoint in complete(folder):
            with contextlib.suppress(ValueError):
                if not checkpoint.is_symlink() and read_manifest(checkpoint)["step"] < step_of(newest):
                    older.append(checkpoint)
        found = best(folder, best_by) if best_by else None
    except OSError as error:  # without having read them all, the best would be another
        tqdm.write(f"no older checkpoint is deleted ({error.filename or folder}: {in_its_words(error)})")
        return
    for old in older[: max(0, len(older) - (keep - 1))]:
        asked_for = keep_every and step_of(old) % keep_every == 0
        if not asked_for and (found is None or old != found[0]):
            try:
                delete(old)
            except OSError as error:  # no reason to stop: nothing is lost by keeping it
                tqdm.write(f"{old} cannot be deleted ({error.strerror or error})")


# -------------------------------------------------------------------------------------------------------------- loading


def load(checkpoint: Path, state: dict[str, Tensor], whole: bool = True) -> None:
    """Fill ``state`` (names, global shapes and dtypes of this run) in place, whatever number of ranks wrote it.

    With whole=False the checkpoint may hold more, which is left where it is.

    Raises Refused, naming the tensor, where the checkpoint holds another one: DCP itself would cast a dtype silently.
    """
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    with one_line(f"{checkpoint} could not be read"):
        found = reader.read_metadata().state_dict_metadata
        if strangers := sorted(found.keys() ^ state.keys() if whole else state.keys() - found.keys()):
            where = "checkpoint" if strangers[0] in found else "run"
            raise Refused(f"{checkpoint} is of another model: {strangers[0]} is only in the {where}")
        for name, x in state.items():
            theirs = found[name]
            if theirs.size != x.shape or theirs.properties.dtype != x.dtype:
                raise Refused(
                    f"{checkpoint} holds {name} as {theirs.properties.dtype} {list(theirs.size)}, this run has "
                    f"{x.dtype} {list(x.shape)}"
                )
            if sum(chunk.sizes.numel() for chunk in theirs.chunks) != x.numel():
                raise Refused(f"{checkpoint} holds only a part of {name}")
        dcp.load(state, storage_reader=reader)


class CheckpointWeights:
    """The master weights of a checkpoint by our names, some rows of one parameter at a time, whatever ranks wrote it.

    path, config, recipe, carried  the checkpoint, the sizes of its model, and what else its manifest has of the run
    Each file's header says at which row of the whole its part of a tensor begins (DCP_SHARDING_INFO). That the files
    make up exactly the parameters of the config is checked when the first is asked for; ``damage`` checks their bytes.
    Raises Refused for a checkpoint that is not whole.
    """

    dtype = torch.float32

    def __init__(self, path: Path):
        self.path = path
        try:
            manifest = read_manifest(path)
            self.step, of_run = manifest["step"], manifest["config"]
            self.config, self.recipe = MistralConfig(**of_run["model"]), of_run["recipe"]
            self.carried = of_run.get("carried", {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is damaged ({error})") from None
        except OSError as error:
            raise Refused(f"{error.filename or path} cannot be read: {in_its_words(error)}") from None
        self._shapes = {
            name: (sum(piece.shape[0] for piece in placed), *placed[0].shape[1:])
            for name, placed in pieces(self.config)
        }

    @functools.cached_property
    def _parts(self) -> dict[str, list[tuple[int, int, Path]]]:
        """Of each parameter its parts in order: first row, number of rows, file."""
        parts: dict[str, list[tuple[int, int, Path]]] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
                for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                    if name.startswith("model."):
                        (first, *rest), (rows, *_) = offsets[name]["saved_offsets"], opened.get_slice(name).get_shape()
                        if any(rest):
                            raise Refused(f"{file}: {name} is sharded along another dimension than the first")
                        parts.setdefault(name.removeprefix("model."), []).append((first, rows, file))
        if strangers := sorted(parts.keys() ^ self._shapes.keys()):
            raise Refused(f"{self.path} does not hold the model that its manifest describes: {strangers[0]}")
        for name, (n_rows, *_) in self._shapes.items():
            end = 0
            for first, rows, _ in sorted(parts[name]):
                if first != end:
                    raise Refused(f"{self.path}: {name} has a gap or an overlap at row {end}")
                end += rows
            if end != n_rows:
                raise Refused(f"{self.path}: {name} has {end} rows and not {n_rows}")
        return parts

    def rows(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows low to high of a parameter, fp32, on the CPU."""
        n_rows, *rest = self._shapes[name]
        high = n_rows if high is None else high
        x = torch.empty(max(0, high - low), *rest, dtype=self.dtype)
        for first, rows, file in self._parts[name]:
            start, end = max(low, first), min(high, first + rows)
            if start < end:
                with safe_open(file, "pt") as opened:
                    x[start - low : end - low] = opened.get_slice(f"model.{name}")[start - first : end - first]
        return x


@contextlib.contextmanager
def one_line(what_failed: str):
    """What DCP and safetensors raise, as a Failed. DCP's holds a traceback of every rank and is no Exception."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise Failed(f"{what_failed}: rank {rank}: {_line(cause)}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"{what_failed}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
