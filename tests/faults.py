"""Faults for test_faults.py and soak.py: each breaks something inside a rank before its run starts.

    python tests/faults.py FAULT [ARGUMENT ...] -- [train.py's arguments]        the same by hand, or under torchrun

A fault is a function here; its arguments arrive as texts. Most let the first saves pass, so that there is something to
fall back to.
"""

import contextlib
import errno
import importlib.util
import itertools
import os
import runpy
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from halny.kernels import chunk_cat
from halny.model import convert
from halny.model.data import dataset, stream
from halny.model.data.batches import Corpus
from halny.model.mistral import Mistral
from halny.model.run import checkpoint, fsdp, ranks, saver, watch
from halny.model.run.saver import Saver


def install(name: str, *arguments: str) -> None:
    globals()[name](*arguments)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, call: int, action) -> None:
    """Make the call-th call (from 1) of owner.name do ``action`` first."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def killed_while_writing(save: str) -> None:
    """SIGKILL when the first shard of a save is half written."""

    def half(writer, *_) -> None:
        (Path(writer.path) / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"\x40" * 5000)
        die()

    before(saver.dcp.HuggingFaceStorageWriter, "write_data", int(save), half)


def weights_are_believed() -> None:
    """What --init-from holds is not looked at: a NaN in it stands for one that training has made."""
    convert._check_finite = lambda *_: None


def saves_take(seconds: str) -> None:
    """A disk that was slow, as the run believes afterwards."""
    original = Saver._run

    def run(self, *arguments) -> None:
        original(self, *arguments)
        self.took_s = float(seconds)

    Saver._run = run


def killed_before_manifest(save: str) -> None:
    before(Saver, "_finish", int(save), lambda *_: die())


def killed_after_rename(save: str) -> None:
    """SIGKILL when the checkpoint has its name and nothing after that was done."""
    original, renames = Path.rename, itertools.count(1)

    def rename(self, target):
        result = original(self, target)
        if Path(target).name.startswith("step-") and next(renames) == int(save):
            die()
        return result

    Path.rename = rename


def traced(file: str) -> None:
    """Append what happens to the disk to a file: syncs, renames, deletions, in their order."""
    sync, delete, rename = saver.sync, checkpoint.delete, Path.rename

    def note(what: str, path) -> None:
        with open(file, "a") as stream:
            stream.write(f"{what} {Path(path).name}\n")

    def traced_sync(path):
        sync(path)
        note("sync", path)

    def traced_delete(path):
        note("delete", path)
        delete(path)

    def traced_rename(self, target):
        result = rename(self, target)
        note("rename", target)
        return result

    saver.sync, checkpoint.delete, Path.rename = traced_sync, traced_delete, traced_rename


def writer_dies(save: str) -> None:
    def end(*_):
        raise SystemExit("the writer died")

    before(Saver, "_write", int(save), end)


def save_fails_on_rank(guilty: str, save: str) -> None:
    def fail(*_):
        raise RuntimeError("injected on this rank alone")

    if rank() == int(guilty):
        before(Saver, "_read_back", int(save), fail)


def disk_fills_unseen(save: str) -> None:
    """The look at the free space is passed, and then there is none: ENOSPC in the middle of a shard."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before(saver.dcp.HuggingFaceStorageWriter, "write_data", int(save), full)


def fills(folder: str, forward: str) -> None:
    """Another program takes all the room there is, before a forward pass."""

    def fill(*_) -> None:
        with open(Path(folder) / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    before(Mistral, "forward", int(forward), fill)


def disk_lies(save: str) -> None:
    """A shard comes back from the disk with one bit changed."""

    def flip(_self, partial, _staged) -> None:
        path = next(partial.glob(f"shard-{rank() + 1:05d}-*"))
        with open(path, "r+b") as file:
            file.seek(-50, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-50, os.SEEK_END)
            file.write(bytes([byte ^ 16]))

    before(Saver, "_read_back", int(save), flip)


def slow_save(seconds: str, save: str) -> None:
    before(Saver, "_finish", int(save), lambda *_: time.sleep(float(seconds)))


# ----------------------------------------------------------------------------------------------------------------- data


def impatient(seconds: str) -> None:
    """No fault: a shard that cannot be read is waited for no longer than this."""
    stream.PATIENCE_S = float(seconds)


def traced_hashes(file: str) -> None:
    """No fault: the name of each data file that a rank reads to hash it, one a line."""
    original = dataset.sha256

    def traced(path, *args):
        with open(file, "a") as stream:
            stream.write(f"{path}\n")
        return original(path, *args)

    dataset.sha256 = traced


def unreadable(guilty: str, rows: str, patience: str) -> None:
    """On one rank no shard can be read any more, for a step or an evaluation, after so many rows."""
    impatient(patience)
    original, left = stream.TokenStream._read, itertools.count(int(rows), -1)

    def read(self, *args):
        if next(left) <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, *args)

    if rank() == int(guilty):
        stream.TokenStream._read = read


# -------------------------------------------------------------------------------------------------------------- numbers


def loss_times(factor: str, guilty: str, *forwards: str) -> None:
    """On one rank the losses of some forward passes (from 1; one a step where nothing accumulates) times a factor."""
    original, calls = Mistral.forward, itertools.count(1)

    def forward(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if torch.is_grad_enabled() and str(next(calls)) in forwards and rank() == int(guilty):
            result = result._replace(loss=result.loss * float(factor))
        return result

    Mistral.forward = forward


def traced_samples(file: str) -> None:
    """Write down the place of every sample read for training, and the state of torch's generator around each step."""
    import train

    locate, train_step = Corpus.locate, train.train_step

    def traced_locate(corpus, numbers, seed):
        source, row = locate(corpus, numbers, seed)
        step = 1 + numbers.min() // (numbers.size * int(os.environ["WORLD_SIZE"]))
        with open(f"{file}-{rank()}", "a") as stream:
            stream.write(f"{step} {row.ravel().tolist()}\n")
        return source, row

    def traced_train_step(*args, **kwargs):
        state = torch.get_rng_state()
        values = train_step(*args, **kwargs)
        assert torch.equal(state, torch.get_rng_state()), "a step drew random numbers"
        return values

    Corpus.locate, train.train_step = traced_locate, traced_train_step


# ------------------------------------------------------------------------------------------------------ ranks and wires


def signals_itself(number: str, guilty: str, where: str) -> None:
    """One rank gets a signal as an evaluation, a save, its writing or a load begins."""
    import train

    places = {
        "evaluation": (train, "evaluate"),
        "save": (Saver, "save"),
        "writing": (Saver, "_finish"),
        "loading": (checkpoint, "load"),
    }
    if rank() == int(guilty):
        before(*places[where], 1, lambda *_: os.kill(os.getpid(), int(number)))


def hangs(guilty: str, forward: str) -> None:
    """One rank stays in a forward pass for ever."""
    if rank() == int(guilty):
        before(Mistral, "forward", int(forward), lambda *_: time.sleep(1000))


def raises(guilty: str, forward: str) -> None:
    def fail(*_):
        raise RuntimeError("injected into a forward pass")

    if rank() == int(guilty):
        before(Mistral, "forward", int(forward), fail)


def out_of_memory(guilty: str, forward: str) -> None:
    def fail(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 171.19 "
            "MiB is free. Process 4711 has 1.50 GiB memory in use. Including non-PyTorch memory, this process has "
            "77.50 GiB memory in use. Of the allocated memory 76.10 GiB is allocated by PyTorch, and 812.48 MiB is "
            "reserved by PyTorch but unallocated."
        )

    if rank() == int(guilty):
        before(Mistral, "forward", int(forward), fail)


def warns() -> None:
    """Every rank warns of the same thing in every forward pass."""
    original = Mistral.forward

    def forward(*args, **kwargs):
        warnings.warn("injected warning", stacklevel=1)
        return original(*args, **kwargs)

    Mistral.forward = forward


def wrong_all_reduce(guilty: str) -> None:
    """On one rank the sum of a large tensor comes back with one number changed, as from a broken network library."""
    original = dist.all_reduce

    def all_reduce(x, *args, **kwargs):
        result = original(x, *args, **kwargs)
        if x.numel() > 1000 and rank() == int(guilty):
            x[777] += 1
        return result

    dist.all_reduce = all_reduce


def wrong_gather(guilty: str) -> None:
    """On one rank the gathered weights of a layer differ from what the others see."""
    original = FSDPModule.unshard

    def unshard(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if rank() == int(guilty):
            with torch.no_grad():
                next(self.parameters()).view(-1)[3] += 1e-3
        return result

    FSDPModule.unshard = unshard


def nodes_of(ranks: str) -> None:
    """No fault: so many ranks take themselves for a node."""
    os.environ["LOCAL_WORLD_SIZE"] = ranks


def another_folder(guilty: str, patience: str) -> None:
    """Each rank is a node, and one is in a folder of its own, as on a disk: relative paths lead elsewhere."""
    nodes_of("1")
    ranks.PATIENCE_S = float(patience)
    if rank() == int(guilty):
        Path("elsewhere").mkdir(exist_ok=True)
        os.chdir("elsewhere")


def slow_device(guilty: str, factor: str, operation: str = "mm") -> None:
    """On one rank an operation of torch is done so many times over, each as a rank a node: a throttled device."""
    nodes_of("1")
    owner = torch if operation == "mm" else torch.Tensor
    original = getattr(owner, operation)

    def repeated(*args, **kwargs):
        for _ in range(int(factor)):
            result = original(*args, **kwargs)
        return result

    if rank() == int(guilty):
        setattr(owner, operation, repeated)


def unfit(guilty: str) -> None:
    """What a preflight must find: a network that lies and other software on one rank, and a full disk."""
    wrong_all_reduce(guilty)
    if rank() == int(guilty):
        torch.__version__ = "0.0"
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1000)


def small_gpu(memory_bytes: str) -> None:
    """No fault: the layout is chosen as on a GPU of so much memory, and overlap is set up as on one."""
    ranks.World.memory_bytes = int(memory_bytes)
    fsdp.has_streams = lambda device: True


def counted_collectives(file: str, memory_bytes: str | None = None) -> None:
    """No fault: append the gradient reductions of FSDP to one file a rank, one a line; as ``small_gpu``."""
    if memory_bytes:
        small_gpu(memory_bytes)
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    def note(what: str) -> None:
        with open(f"{file}-{rank()}", "a") as stream:
            stream.write(what + "\n")

    for owner, name in ((dist, "all_reduce"), (dist, "reduce_scatter_tensor"), (dist, "reduce_scatter_single")):
        if not hasattr(owner, name):
            continue
        original = getattr(owner, name)

        def counted(*args, original=original, name=name, **kwargs):
            if sys._getframe(1).f_code.co_filename == collectives.__file__:
                note(name.removesuffix("_tensor").removesuffix("_single"))
            return original(*args, **kwargs)

        setattr(owner, name, counted)


def slow_rank(guilty: str, factor: str) -> None:
    """One rank's probe reads so many times longer, as on a throttled device."""
    original = watch.Probe.seconds

    def seconds(self):
        value = original(self)
        return value and value * (float(factor) if rank() == int(guilty) else 1)

    watch.Probe.seconds = seconds


def tensorboard_dies(scalar: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def die(*_):
        raise RuntimeError("the lights went out")

    before(SummaryWriter, "add_scalar", int(scalar), die)


def without(package: str) -> None:
    """As if it were not installed."""
    original = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == package else original(name, *args)


if __name__ == "__main__":
    end = sys.argv.index("--")
    script = Path(__file__).parent.parent / "train.py"
    fault, sys.argv = sys.argv[1:end], [str(script), *sys.argv[end + 1 :]]
    install(*fault)
    runpy.run_path(str(script), run_name="__main__")


def copied_by_kernel(file: str) -> None:
    """No fault: chunk_cat runs its kernel, whatever --kernels says; its launches to one file a rank, one a line."""
    launch, chunk_cat.runs_kernel = chunk_cat.launch, lambda x: True

    def counted(kernel, *args, **constants) -> None:
        with open(f"{file}-{rank()}", "a") as stream:
            stream.write("launch\n")
        launch(kernel, *args, **constants)

    chunk_cat.launch = counted
