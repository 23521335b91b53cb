"""Checkpoints: written beside the training, whole or not at all, and never loaded unless every byte is as it was.

A checkpoint is a folder ``step-NNNNNNNN``:

    shard-RRRRR-*.safetensors   each rank's shards of the fp32 master weights and AdamW's two moments, those as
                                --moments has them; what replicas (HSDP) have in common, one of them writes
    manifest.json               step, configuration, bytes and SHA-256 of every file, and what else a resume needs
    manifest.json.sha256        the manifest's own SHA-256, as sha256sum writes it

Nothing in it can run code: safetensors and JSON, no pickle. (torch's distributed checkpointing, DCP, writes and reads
the shards, on any number of ranks; its default metadata is a pickle, so its Hugging Face storage is used, which needs
none.)

**Saving** stops the training only for a copy of the state into pinned host memory. A thread on each rank then writes
the copy into ``.step-NNNNNNNN.partial``, reads the files back, compares every tensor with the copy, and syncs them;
rank 0 writes the manifest last, and renames the folder. Under its final name a checkpoint is complete. Only then are
older ones deleted. The threads have a gloo group of their own, so they agree without disturbing the training, and if
one fails all fail: ``Saver.failed`` tells the loop, which stops at its next step.

**Loading** believes nothing: names, sizes, SHA-256 of all files (the ranks share the work), dtypes and shapes against
what is to be filled. A damaged checkpoint is put aside under another name and the one before it used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from halny.kernels.dispatch import next_power_of_2
from halny.model.durable import in_words, sha256, sync, write_json
from halny.model.exits import Failed, Refused
from halny.model.mistral import Mistral, local_rows
from halny.model.optimizer import Split, master_weights
from halny.model.ranks import World, everywhere, on_main

FORMAT = 2
READERS = 4  # files read at once on a rank, to compare or to checksum them
BYTES_A_FILE = 500_000_000  # DCP serialises a whole file in memory, holding Python's lock for a fraction of a second


def training_state(model: Mistral, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor | Split]:
    """All tensors of a run by name: master weights and the moments of those that are trained, each rank's shards.

    Without an optimizer, the weights alone.
    """
    state, parameters = {}, dict(model.named_parameters())
    for name, weight in master_weights(model, optimizer):
        state[f"model.{name}"] = weight
        moments = optimizer.state.get(parameters[name], {}) if optimizer else {}
        state |= {f"{moment}.{name}": x for moment, x in moments.items() if moment != "step"}
    return state


# ---------------------------------------------------------------------------------------------------------- on the disk


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were renamed into place, oldest first. Folders of other names are not ours."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict:
    """Raises ValueError, saying why, for a manifest that is not as it was written, to the bit."""
    paths = [checkpoint / name for name in ("manifest.json", "manifest.json.sha256")]
    try:
        if missing := [path.name for path in paths if not path.is_file()]:  # a pipe would wait for a writer
            raise ValueError(f"{missing[0]} cannot be read: no such file")
        content, recorded = (path.read_bytes() for path in paths)
    except OSError as error:
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


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with every parts-th of a checkpoint's files (and with its manifest), or None."""
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
    except (OSError, ValueError) as error:
        return str(error)
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
        problems = [p for p in everywhere(damage(checkpoint, world.rank, world.size)) if p]
        if not problems:
            if before is None:
                on_main(world, _put_aside, damaged)
            return checkpoint
        say(f"checkpoint {checkpoint.name} is damaged ({problems[0]}); falling back to the one before")
        damaged.append(checkpoint)
    if candidates and before is None:
        raise Refused(f"every checkpoint in {folder} is damaged; --no-resume sets the run aside and starts anew")
    return None


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
    for checkpoint in complete(folder):
        with contextlib.suppress(ValueError):
            if not checkpoint.is_symlink() and read_manifest(checkpoint)["step"] < step_of(newest):
                older.append(checkpoint)
    found = best(folder, best_by) if best_by else None
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


# --------------------------------------------------------------------------------------------------------------- saving


class Saver:
    """Writes checkpoints beside the training; keeps the newest ``keep`` and those of every ``keep_every``-th step.

    Also kept is the ``best`` by the metric ``best_by``, if there is one.

    stalled_s  how long the last save held up the training, in seconds; took_s: until it was on the disk under its name
    failed     whether one could not be written; ``wait`` says why
    saved      called on rank 0 with each checkpoint that is on the disk; it must not wait
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        world: World,
        best_by: str | None = None,
        saved: Callable[[Path], None] = lambda checkpoint: None,
    ):
        self.folder, self.keep, self.keep_every, self.world, self.saved = folder, keep, keep_every, world, saved
        self.best_by = best_by
        self.stalled_s = self.took_s = 0.0
        self._group = dist.new_group(backend="gloo")  # made by all ranks; used by the threads alone
        self._host: dict[str, Tensor] = {}  # where the copies lie, from one save to the next
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    @property
    def failed(self) -> bool:
        return self._problem is not None

    def save(self, step: int, state: dict[str, Tensor | Split], facts: dict) -> None:
        """Copy ``state`` and begin to write it; ``facts`` go into the manifest. Waits for an earlier save to finish.

        Raises Failed, on all ranks and with the earlier checkpoints as they were, if that one could not be written, if
        this one will not fit on the disk, or if a weight is not finite.
        """
        self.wait()
        began = time.perf_counter()
        weights = (x.high if isinstance(x, Split) else x for name, x in state.items() if name.startswith("model."))
        fine = all(bool(x.isfinite().all()) for x, _ in map(local_rows, weights))
        if not all(everywhere(fine)):
            raise Failed(f"step {step}: a weight is not finite, so no checkpoint was written")
        n_bytes = sum(
            x.high.numel() * 4 if isinstance(x, Split) else x.numel() * x.element_size() for x in state.values()
        )
        self._check_space(step, n_bytes)
        staged = self._stage(state)
        self.stalled_s = time.perf_counter() - began
        facts = facts | {"stalled_s": round(self.stalled_s, 4)}
        arguments = (step, staged, facts, began)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    def _stage(self, state: dict[str, Tensor | Split]) -> dict[str, Tensor]:
        """A copy in host memory, pinned beside a GPU; split weights are put together on the way, one at a time.

        Not DCP's stager: in torch 2.11 it cannot copy a DTensor (KeyError: <class 'type'>).
        """
        if not self._host:
            self._host = host_tensors(state, pin=self.world.device.type == "cuda")
        staged = {}
        for name, x in state.items():
            local = x.joined() if isinstance(x, Split) else local_rows(x)[0]
            host = self._host[name].copy_(local, non_blocking=True)
            staged[name] = DTensor(host, x._spec, requires_grad=False) if isinstance(x, DTensor) else host
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return staged

    def wait(self) -> None:
        """Until nothing is being written; raises Failed if that went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            raise Failed(self._problem)

    def _check_space(self, step: int, n_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free if self.world.is_main else 0
        free = everywhere(free)[0]
        if free < n_bytes * 1.01:
            raise Failed(
                f"the checkpoint of step {step} takes {in_words(n_bytes)} and {self.folder} has {in_words(free)} free; "
                "earlier ones are as they were: make room and start the same command again"
            )

    # --- the thread

    def _run(self, step: int, staged: dict[str, Tensor], facts: dict, began: float) -> None:
        try:
            with self._beside_the_training():
                self._write(step, staged, facts)
            self.took_s = time.perf_counter() - began
        except Failed as failure:
            self._problem = str(failure)
        except BaseException as error:  # DCP's are no Exceptions; and none may end this thread unheard
            self._problem = f"{_could_not(step)}: rank {self.world.rank}: {type(error).__name__}: {_line(error)}"

    def _beside_the_training(self) -> contextlib.AbstractContextManager:
        """On a GPU a stream of this thread's own, on the rank's device.

        Beside a GPU DCP's writer waits for the current stream before each tensor, though all lie in host memory. In a
        new thread that is the stream that trains, of device 0: several hundred waits, each for what is queued of a
        step, and on other ranks a CUDA context on a GPU that is not theirs.
        """
        if self.world.device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self.world.device)
        return torch.cuda.stream(torch.cuda.Stream(self.world.device))

    def _write(self, step: int, staged: dict[str, Tensor], facts: dict) -> None:
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._all(step, self._begin, partial)
        files, written = {}, 0
        for name, x in staged.items():
            shards = x.device_mesh.size(-1) if isinstance(x, DTensor) else 1
            files[name] = 1 + written // (BYTES_A_FILE * shards)
            written += x.numel() * x.element_size()
        writer = dcp.HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)
        with one_line(_could_not(step)):
            dcp.save(staged, storage_writer=writer, process_group=self._group)
        listed = self._all(step, self._read_back, partial, staged)
        listed = {name: entry for part in listed for name, entry in sorted(part.items())}
        self._all(step, self._finish, partial, final, {"format": FORMAT, "step": step, **facts, "files": listed})
        if self.world.is_main:
            self.saved(final)

    def _all(self, step: int, action: Callable, *arguments) -> list:
        """``action`` on every rank, and its results from all; if it fails on one, all fail with that one's reason."""
        result = problem = None
        try:
            result = action(*arguments)
        except Exception as error:
            problem = f"{_could_not(step)}: rank {self.world.rank}: {_line(error)}"
        outcomes = everywhere((result, problem), self._group)
        if problems := [problem for _, problem in outcomes if problem]:
            raise Failed(problems[0])
        return [result for result, _ in outcomes]

    def _begin(self, partial: Path) -> None:
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _read_back(self, partial: Path, staged: dict[str, Tensor]) -> dict[str, dict]:
        """This rank's files as they stand, compared with the copy they were made from: name -> bytes, SHA-256."""

        def read(path: Path) -> dict:
            sync(path)
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dictionary)
                    x, _ = local_rows(staged[name])
                    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]  # NaN equals nothing
                    if not torch.equal(file.get_tensor(name).view(bits), x.view(bits)):
                        raise OSError(f"{path.name} does not hold what was written: {name} differs")
            return {"bytes": path.stat().st_size, "sha256": sha256(path)}

        paths = sorted(partial.glob(f"shard-{self.world.rank + 1:05d}-*"))
        with ThreadPoolExecutor(READERS) as pool:
            return {path.name: entry for path, entry in zip(paths, pool.map(read, paths), strict=True)}

    def _finish(self, partial: Path, final: Path, manifest: dict) -> None:
        if not self.world.is_main:
            return
        if {path.name for path in partial.iterdir()} != manifest["files"].keys():
            raise OSError(f"{partial} holds other files than the ranks wrote")
        write_json(partial / "manifest.json", manifest)
        (partial / "manifest.json.sha256").write_bytes(checksum_line((partial / "manifest.json").read_bytes()))
        sync(partial / "manifest.json.sha256")
        sync(partial)
        partial.rename(final)
        sync(self.folder)
        prune(self.folder, final, self.keep, self.keep_every, self.best_by)


def host_tensors(state: dict[str, Tensor | Split], pin: bool) -> dict[str, Tensor]:
    """Uninitialised tensors for this rank's part of ``state``, in blocks of powers of two bytes.

    torch's allocator of pinned memory rounds each allocation up to one; tensor by tensor, a 7B's state on one rank
    would pin 15% more than it has. Each tensor has a storage of its own inside its block, because DCP copies one whose
    storage is larger than it is.
    """
    forms = {}
    for name, x in state.items():
        local = x.high if isinstance(x, Split) else local_rows(x)[0]
        forms[name] = local.shape, torch.float32 if isinstance(x, Split) else local.dtype
    tensors = {}
    for size, offsets in blocks({name: shape.numel() * dtype.itemsize for name, (shape, dtype) in forms.items()}):
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pin).numpy()  # kept by the tensors
        for name, offset in offsets.items():
            shape, dtype = forms[name]
            tensors[name] = (
                torch.frombuffer(block, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
                if shape.numel()
                else torch.empty(shape, dtype=dtype)
            )
    return tensors


def blocks(sizes: dict[str, int], alignment: int = 64) -> list[tuple[int, dict[str, int]]]:
    """(bytes, a power of two; name -> offset) of blocks that have room for all: the largest first, each where it fits.

    A block is not much more than a 32nd of the whole, so that what the last ones leave free is little.
    """
    sizes = {name: -(-size // alignment) * alignment for name, size in sizes.items()}
    largest = next_power_of_2(max(alignment, sum(sizes.values()) // 32, *sizes.values()))
    offsets: list[dict[str, int]] = []
    used: list[int] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        i = next((i for i, n in enumerate(used) if n + sizes[name] <= largest), len(used))
        if i == len(used):
            offsets.append({})
            used.append(0)
        offsets[i][name] = used[i]
        used[i] += sizes[name]
    return [(next_power_of_2(max(n, alignment)), names) for n, names in zip(used, offsets, strict=True)]


def _could_not(step: int) -> str:
    return f"the checkpoint of step {step} could not be written, earlier ones are as they were"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
