"""Saving beside the training: a copy on the host, written by a thread, under its name only when it is whole.

A save stops the training only for a copy of the state into pinned host memory. A thread on each rank then writes the
copy into ``.step-NNNNNNNN.partial``, reads the files back, compares every tensor with the copy, and syncs them; rank 0
writes the manifest last, and renames the folder. Under its final name a checkpoint is complete. Only then are older
ones deleted. The threads have a gloo group of their own, so they agree without disturbing the training, and if one
fails all fail: ``Saver.failed`` tells the loop, which stops at its next step. The format is checkpoint.py's.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from halny.kernels.dispatch import next_power_of_2
from halny.model.durable import in_words, sha256, sync, write_json
from halny.model.exits import Failed
from halny.model.mistral import Mistral, local_rows, named_weights
from halny.model.run.checkpoint import FORMAT, READERS, _line, checksum_line, one_line, prune
from halny.model.run.optimizer import Split, master_weights
from halny.model.run.ranks import World, everywhere

BYTES_A_FILE = 500_000_000  # DCP serialises a whole file in memory, holding Python's lock for a fraction of a second


def training_state(model: Mistral, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor | Split]:
    """All tensors of a run by name: master weights and the moments of those that are trained, each rank's shards.

    Without an optimizer, the weights alone.
    """
    state, parameters = {}, dict(named_weights(model))
    for name, weight in master_weights(model, optimizer):
        state[f"model.{name}"] = weight
        moments = optimizer.state.get(parameters[name], {}) if optimizer else {}
        state |= {f"{moment}.{name}": x for moment, x in moments.items() if moment != "step"}
    return state


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
        self._hosts = everywhere(socket.gethostname())
        self._me = f"rank {world.rank} on {self._hosts[world.rank]}"

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
            self._problem = f"{_could_not(step)}: {self._me}: {type(error).__name__}: {_line(error)}"

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
            problem = f"{_could_not(step)}: {self._me}: {_line(error)}"
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
        present = {path.name for path in partial.iterdir()}
        if missing := sorted(manifest["files"].keys() - present):
            rank = int(missing[0].split("-")[1]) - 1
            raise OSError(f"{partial} lacks {missing[0]}, which rank {rank} on {self._hosts[rank]} has written; "
                "--run-dir must be one folder that all of them share")  # fmt: skip
        if present != manifest["files"].keys():
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
