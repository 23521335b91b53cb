"""What may happen to the files of shards while a run reads them, and what must not be said of a sound one."""

import errno
import os
import resource
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from halny.model.data import dataset, stream
from halny.model.data.dataset import DataError, Dataset, open_dataset
from halny.model.data.writer import write_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("stream") / "data"
    write_dataset(np.arange(400).reshape(80, 5), out, vocab_size=400, shard_tokens=10)
    return out


@pytest.fixture
def folder(written, tmp_path):
    """Tokens 0 to 399 in 40 shards of two documents."""
    return shutil.copytree(written, tmp_path / "data")


@pytest.fixture
def few_descriptors():
    """Room for no more than some twenty files beside those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def opened(folder: Path) -> list[str]:
    """The files below a folder that this process holds open.

    Only those: what earlier tests left open may close at any time.
    """
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(descriptor))
    return [name for name in names if name.startswith(f"{folder}/")]


def test_any_number_of_shards_takes_no_descriptors(folder, few_descriptors):
    with open(folder / "train-00000.npy"):
        assert len(opened(folder)) == 1  # what would be seen of a shard left open
    tokens = Dataset(folder).split("train")
    assert len(tokens.shards) == 40 and not opened(folder)
    assert tokens.read(0, 400).tolist() == list(range(400)) and not opened(folder)
    ranges = tokens.gather(list(range(3, 400, 10)), [2] * 40)  # as packed documents lie: a piece in each shard
    assert ranges.reshape(-1, 2).tolist() == [[n, n + 1] for n in range(3, 400, 10)]
    assert [int(shard.tokens[0]) for shard in tokens.shards] == list(range(0, 400, 10)) and not opened(folder)


RESOURCES = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.ESTALE]


def failing(number: int, of: str):
    """What stands in for a function that the system refuses on the files of that name."""

    def fail(function):
        def wrapped(path, *args, **kwargs):
            if of in str(path):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **kwargs)

        return wrapped

    return fail


@pytest.mark.parametrize("number", RESOURCES, ids=errno.errorcode.get)
@pytest.mark.parametrize("of", ["train-00003.npy", "train-00007.documents.npy"])
def test_what_the_system_refuses_is_no_damage(folder, monkeypatch, number, of):
    monkeypatch.setattr(np, "load", failing(number, of)(np.load))
    monkeypatch.setattr(dataset, "sha256", failing(number, of)(dataset.sha256))
    with pytest.raises(DataError) as opening:
        open_dataset(folder)
    monkeypatch.undo()
    data = open_dataset(folder)
    monkeypatch.setattr(dataset, "sha256", failing(number, of)(dataset.sha256))
    with pytest.raises(DataError) as verifying:
        data.verify()
    for message in (str(opening.value), str(verifying.value)):
        assert f"{of}: {os.strerror(number)}: " in message and "again with" not in message and "not a ." not in message
        assert "\n" not in message and ("ulimit -n" in message) == (number == errno.EMFILE)


@pytest.mark.parametrize("harm", ["missing", "short", "refused"])
def test_a_hiccup_is_waited_out_and_said(folder, monkeypatch, capsys, harm):
    tokens, shard = Dataset(folder).split("train"), folder / "train-00002.npy"
    content = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    elif harm == "short":
        os.truncate(shard, 60)
    else:
        monkeypatch.setattr(os, "open", failing(errno.EIO, shard.name)(os.open))

    def mend():
        time.sleep(0.25)
        monkeypatch.undo()
        if harm != "refused":
            shard.with_name("copy").write_bytes(content)
            shard.with_name("copy").replace(shard)

    mending = threading.Thread(target=mend)
    mending.start()
    began = time.monotonic()
    assert tokens.read(15, 10).tolist() == list(range(15, 25))
    assert time.monotonic() - began > 0.2
    mending.join()
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert len(said) == 1 and f"{shard}: cannot be read" in said[0] and "trying again" in said[0]


def test_a_file_that_stays_away_is_named_after_some_time(folder, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE_S", 0.3)
    tokens, began = Dataset(folder).split("train"), time.monotonic()
    (folder / "train-00002.npy").unlink()
    with pytest.raises(DataError, match=r"train-00002\.npy: cannot be read .*No such file.*; restore it as it was"):
        tokens.read(15, 10)
    assert time.monotonic() - began > 0.3


@pytest.mark.parametrize("raw", [False, True])
def test_what_counts_of_a_shard_is_its_content(folder, tmp_path, monkeypatch, capsys, raw):
    digest, digests = stream.hashlib.file_digest, []

    def counted(*args):
        digests.append(args)
        return digest(*args)

    monkeypatch.setattr(stream.hashlib, "file_digest", counted)
    if raw:
        shard = tmp_path / "tokens.bin"
        np.arange(400, dtype=np.uint16).tofile(shard)
        data = open_dataset(shard, "uint16")
        assert data.fingerprint
    else:
        data, shard = open_dataset(folder), folder / "train-00002.npy"
    tokens = data.split("train")

    def read_whole() -> int:
        digests.clear()
        assert tokens.read(20, 10).tolist() == list(range(20, 30))
        return len(digests)

    assert read_whole() == 0
    os.utime(shard, (1, 1))
    assert [read_whole(), read_whole()] == [1, 0]  # once is enough
    shutil.copy(shard, tmp_path / "copy")
    os.replace(tmp_path / "copy", shard)
    assert [read_whole(), read_whole()] == [1, 0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + b"\x01\x01")
    with pytest.raises(DataError, match=f"{shard.name}: was changed or replaced"):
        read_whole()
    shard.write_bytes(content + b"\0\0")
    with pytest.raises(DataError, match=f"{shard.name}: was changed or replaced"):
        read_whole()
    shard.write_bytes(content)
    assert read_whole() == 1
    assert capsys.readouterr().out.count(f"{shard}: was touched or replaced; ") == 1  # and not for each of thousands
