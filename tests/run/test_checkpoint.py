"""Where a checkpoint's copy lies on the host, and what one that cannot be read is not taken for.

What is saved and loaded is test_train.py's and test_faults.py's.
"""

import errno
import io
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from halny.kernels.adamw import MOMENTS, new_moments
from halny.model.exits import Refused
from halny.model.mistral import PRESETS, Mistral
from halny.model.record.run_folder import RunFolder
from halny.model.run.checkpoint import complete, newest_sound, prune
from halny.model.run.optimizer import Split
from halny.model.run.ranks import World, on_main
from halny.model.run.saver import Saver, blocks, host_tensors

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("ranks, moments", [(256, "fp32"), *((1, moments) for moments in MOMENTS)])
def test_a_7bs_copy_takes_little_more_than_its_bytes(ranks, moments):
    """In blocks that no allocator rounds up, each tensor inside one and beside the others."""
    with torch.device("meta"):
        model = Mistral(PRESETS["mistral-7b"])
    sizes = {}
    for name, p in model.named_parameters():
        state = {"weight": torch.empty_like(p, dtype=torch.float32), **new_moments(p, moments)}
        sizes |= {f"{kind}.{name}": x.nbytes // ranks for kind, x in state.items()}
    found, total = blocks(sizes), sum(sizes.values())
    assert all(size.bit_count() == 1 for size, _ in found)
    assert total <= sum(size for size, _ in found) < 1.02 * total < sum(rounded(n) for n in sizes.values()) / 1.1
    assert sorted(name for _, offsets in found for name in offsets) == sorted(sizes)
    for size, offsets in found:
        taken = sorted((offset, offset + sizes[name]) for name, offset in offsets.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert taken[-1][1] <= size and all(start % 64 == 0 for start, _ in taken)


def rounded(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def state_on(device: str) -> dict:
    state = {
        "model.split": Split(torch.ones(5, 7, dtype=torch.bfloat16, device=device), torch.ones(5, 7, device=device)),
        "model.scalar": torch.ones((), device=device),
        "exp_avg.none": torch.ones(0, 3, dtype=torch.bfloat16, device=device),
    }
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.uint8, torch.int8)):
        state[f"exp_avg.{i}"] = torch.ones(33 + i, 3, device=device).to(dtype)
    return state


def check_host_tensors(state: dict, pin: bool) -> None:
    """Of the shapes and dtypes that are saved; storages of their own, as DCP wants; none over another."""
    tensors = host_tensors(state, pin)
    assert sorted(tensors) == sorted(state)
    for i, (name, x) in enumerate(tensors.items()):
        wanted, dtype = (state[name].high, torch.float32) if name == "model.split" else (state[name], state[name].dtype)
        assert x.shape == wanted.shape and x.dtype == dtype and x.untyped_storage().nbytes() == x.nbytes
        assert not x.numel() or x.is_pinned() == pin
        x.fill_(i)
    for i, x in enumerate(tensors.values()):
        assert (x == i).all()


def test_a_run_folder_that_is_not_shared_is_said_to_be_so(tmp_path):
    """Rank 0 finds what the others wrote missing from its own disk."""
    saver = Saver.__new__(Saver)
    saver.world, saver._hosts = SimpleNamespace(is_main=True), ["nid01", "nid02"]
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    files = {f"shard-0000{n}-model-00001-of-00001.safetensors": {} for n in (1, 2)}
    with pytest.raises(
        OSError, match=r"lacks shard-00002-.* rank 1 on nid02 has written; --run-dir must be one folder"
    ):
        saver._finish(tmp_path, tmp_path / "final", {"files": files})


def test_tensors_share_blocks_and_nothing_else():
    check_host_tensors(state_on("cpu"), pin=False)


@pytest.mark.gpu
def test_they_are_pinned_on_a_gpu():
    check_host_tensors(state_on("cuda"), pin=True)


# ----------------------------------------------------------------------------------------- what cannot be read is sound


@pytest.fixture
def saved(tmp_path, alone) -> Path:
    """Three checkpoints of one tensor, of which the first is the best, as Saver writes them."""
    saver = Saver(tmp_path / "checkpoints", 3, None, alone)
    for step in (1, 2, 3):
        saver.save(step, {"model.x": torch.ones(4)}, {"evaluation": {"val_loss": float(step)}})
    saver.wait()
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), None)
    dist.destroy_process_group()


def refuse_to_read(monkeypatch, number: int, name: str) -> None:
    """The system opens no file of that name, of the checkpoint of step 3."""
    original = io.open

    def refusing(path, *args, **kwargs):
        if str(path).endswith(f"step-00000003/{name}"):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", refusing)  # Path.read_bytes
    monkeypatch.setattr("builtins.open", refusing)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(saved, alone, monkeypatch, number, name):
    said = []
    refuse_to_read(monkeypatch, number, name)
    with pytest.raises(Refused, match=f"step-00000003/{name} cannot be read: {os.strerror(number)}: .*move .* away"):
        newest_sound(saved, alone, said.append)
    monkeypatch.undo()
    assert not said and sorted(path.name for path in saved.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert newest_sound(saved, alone, said.append) == saved / "step-00000003" and not said


def test_nothing_is_deleted_while_a_checkpoint_cannot_be_read(saved, monkeypatch, capsys):
    refuse_to_read(monkeypatch, errno.EMFILE, "manifest.json")
    prune(saved, saved / "step-00000004", 1, None, "val_loss")
    assert len(complete(saved)) == 3 and "no older checkpoint is deleted" in capsys.readouterr().out
    monkeypatch.undo()
    prune(saved, saved / "step-00000004", 1, None, "val_loss")
    assert [path.name for path in complete(saved)] == ["step-00000001"]  # the best


def test_a_folder_that_may_not_be_listed_is_not_an_empty_one(saved, monkeypatch):
    def refusing(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refusing)
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        complete(saved)


def test_a_config_that_cannot_be_read_is_not_set_aside(tmp_path, alone, monkeypatch):
    """Its message is the system's own: another would advise --no-resume."""
    (tmp_path / "config.json").write_text("{}")

    def refusing(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "read_text", refusing)
    with pytest.raises(Refused, match=r"config\.json: Too many open files: raise this process's limit with ulimit -n$"):
        on_main(alone, RunFolder(tmp_path).check_config, {"recipe": {}, "model": {}, "data": ""}, ())
