"""A preparation that was killed goes on after its finished input files, to the bytes of an undisturbed one."""

import gzip
import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from halny.model import prepare_data
from halny.model.data import documents, encode, resume, tokenizer, writer
from halny.model.data.dataset import DataError, Dataset, is_dataset
from halny.model.data.workers import WorkerDied
from halny.model.data.writer import write_dataset
from halny.model.prepare_data import prepare

OPTIONS = {"keep": ["q=1"], "dedup": True, "val_fraction": 0.2, "shard_tokens": 900}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Blocks of some documents, saved after each file, and a tokenizer of a token a byte."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 400)
    monkeypatch.setattr(resume, "SHARE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process needs none
    made = tokenizer.Tokenizer("bytes", {"tokenizer.json": b"{}"}, 258, 256, 257)
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda name: made)
    monkeypatch.setattr(encode, "Encoder", lambda tokenizer: Bytes())


class Bytes:
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Inputs of eight files, with documents of every fate, the last file with nothing that stays."""
    rng, folder = random.Random(0), tmp_path / "in"
    folder.mkdir()

    def line() -> bytes:
        text = rng.choice(["", *("again and again " + str(rng.randint(0, 9)), "x" * rng.randint(1, 90)) * 5])
        return json.dumps({"text": text, "q": rng.choice([0, 1, 1, 1])}).encode() if rng.random() < 0.9 else b"not JSON"

    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.jsonl", "e.jsonl"):
        raw = b"\n".join(line() for _ in range(40))
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    (folder / "f.jsonl").write_bytes(b"not JSON\n" * 3)
    second = tmp_path / "second.jsonl"
    second.write_bytes((folder / "c.jsonl").read_bytes())  # duplicates all
    return [folder, second]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def changes(run, killed_at: int = -1) -> int | None:
    """How many changes `run` makes on the disk in a process of its own; None if SIGKILL ended that before one."""
    if (pid := os.fork()) == 0:
        count = itertools.count()

        def deadly(function):
            def call(self, *arguments, **options):
                if next(count) == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(self, *arguments, **options)
                if isinstance(self, writer.GrowingArray) and killed_at % 2 and not self.file.closed:
                    self.file.flush()  # else what was written is mostly in the buffer that dies
                return result

            return call

        for owner, names in {
            os: ["fsync", "rename"],
            Path: ["replace", "unlink", "write_bytes", "write_text"],
            writer.GrowingArray: ["append", "take", "finish"],
        }.items():
            for name in names:
                setattr(owner, name, deadly(getattr(owner, name)))
        try:
            run()
        finally:
            os._exit(min(next(count), 255))
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.parametrize("options", [OPTIONS, {"val_fraction": 1e-3}], ids=["all options", "the last document is cut"])
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(corpus, tmp_path, capsys, options):
    prepare(corpus, tmp_path / "whole", progress=False, **options)
    expected, out, rng, went_on = contents(tmp_path / "whole"), tmp_path / "out", random.Random(1), 0
    total = changes(lambda: prepare(corpus, tmp_path / "count", progress=False, **options))
    assert 100 < total < 255
    for moment in [*rng.sample(range(total - 30), 5), *range(total - 30, total, 6), total - 1]:
        assert changes(lambda: prepare(corpus, out, progress=False, **options), moment) is None
        assert not out.exists() or contents(out) == expected
        if rng.random() < 0.3:
            changes(lambda: prepare(corpus, out, progress=False, **options), rng.randint(0, 60))
        if not out.exists():
            capsys.readouterr()
            prepare(corpus, out, **options)
            went_on += "going on after" in capsys.readouterr().err
        assert contents(out) == expected and not (tmp_path / ".out.partial").exists(), moment
        shutil.rmtree(out)
    assert went_on > 4


def stop_in(monkeypatch, name: str, error: BaseException, line: int = 1) -> None:
    """Raises an error when a block of a file comes, of this line of it or one after."""
    encode_block = encode.encode_block

    def stopped(*arguments):
        block = arguments[-1]
        if any(Path(part.file).name == name and part.number >= line for part in block.parts):
            raise error
        return encode_block(*arguments)

    monkeypatch.setattr(encode, "encode_block", stopped)


def command(corpus: list[Path], out: Path, *more: str) -> int:
    flags = ["--keep", "q=1", "--dedup", "--val-fraction", "0.2", "--shard-tokens", "900"]
    return prepare_data.main([*map(str, corpus), "--out", str(out), *flags, *more])


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (WorkerDied("worker process 7 was killed"), 1, "worker process 7 was killed"),
        (DataError("d.jsonl: cannot be read"), 2, "d.jsonl: cannot be read"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_what_was_finished_is_kept_and_said_and_not_read_again(
    corpus, tmp_path, monkeypatch, capsys, error, code, said
):
    prepare(corpus, tmp_path / "whole", progress=False, **OPTIONS)
    monkeypatch.setattr(resume, "WORTH", 0)
    partial, read = tmp_path / ".out.partial", []
    with monkeypatch.context() as patched:
        stop_in(patched, "d.jsonl", error)
        assert command(corpus, tmp_path / "out") == code
    kept = f"3 of 7 input files are done and kept in {partial}; the same command goes on from there"
    err = capsys.readouterr().err
    assert said in err and kept in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and partial.exists() and not is_dataset(partial)
    with pytest.raises(DataError, match="is no data folder"):
        Dataset(partial)
    for other in (tmp_path / "out", partial):
        with pytest.raises(DataError, match=r"interrupted preparation|not empty"):
            write_dataset([np.arange(5)], other, vocab_size=9)
    read_lines = documents._read_lines
    monkeypatch.setattr(documents, "_read_lines", lambda file, kind: read.append(file.name) or read_lines(file, kind))
    assert command(corpus, tmp_path / "out") == 0
    assert "going on after 3 of 7 input files, done before" in capsys.readouterr().err
    assert read == ["d.jsonl", "e.jsonl", "f.jsonl", "second.jsonl"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not partial.exists()


def test_a_refusal_in_the_first_minute_leaves_nothing(corpus, tmp_path, monkeypatch, capsys):
    stop_in(monkeypatch, "d.jsonl", DataError("refused"))
    assert command(corpus, tmp_path / "out") == 2
    assert capsys.readouterr().err == "prepare_data: refused\n"
    assert sorted(tmp_path.iterdir()) == sorted(corpus)


def test_other_settings_and_other_inputs_are_refused(corpus, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_in(patched, "d.jsonl", KeyboardInterrupt())
        command(corpus, tmp_path / "out")
    capsys.readouterr()
    first, kept = corpus[0] / "a.jsonl", contents(tmp_path / ".out.partial")
    raw, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)

    def refused(*flags: str, inputs: list[Path] = corpus) -> str:
        assert command(inputs, tmp_path / "out", *flags) == 2
        assert contents(tmp_path / ".out.partial") == kept and not (tmp_path / "out").exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{tmp_path / '.out.partial'} holds" in err and "remove it" in err
        return err

    assert "shard_tokens was 900 and is 901" in refused("--shard-tokens", "901")
    assert "keep was ['q=1'] and is ['q=1', 'q>0']" in refused("--keep", "q>0")
    assert "EOS was 257 and is None" in refused("--no-eos")
    first.write_bytes(raw + b"\n")
    assert f"{first} has changed" in refused()
    first.unlink()
    assert f"{first} has gone" in refused()
    first.write_bytes(raw)
    os.utime(first, ns=times)
    (corpus[0] / "aa.jsonl").write_bytes(raw)
    assert "other files come before or between" in refused()
    (corpus[0] / "aa.jsonl").unlink()
    (more := tmp_path / "more.jsonl").write_bytes(raw)
    assert "inputs was ['in', 'second.jsonl'] and is ['in', 'second.jsonl', 'more.jsonl']" in refused(
        inputs=[*corpus, more]
    )


def test_files_that_were_not_yet_finished_may_change(corpus, tmp_path, monkeypatch):
    """What of them was written and not finished is cut off, of shards and of --dedup's digests."""
    for name in ("d.jsonl", "e.jsonl"):
        with monkeypatch.context() as patched:
            stop_in(patched, name, KeyboardInterrupt(), line=20)
            assert command(corpus, tmp_path / "out") == 130
        first, *_, last = (corpus[0] / name).read_bytes().splitlines()
        (corpus[0] / name).write_bytes(b'{"text": "another text altogether", "q": 1}\n' + last + b"\n" + first)
    (corpus[0] / "ee.jsonl").write_text('{"text": "and one more", "q": 1}')
    prepare(corpus, tmp_path / "whole", progress=False, **OPTIONS)
    prepare(corpus, tmp_path / "out", progress=False, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000.documents.npy", "digests.bin", "unfinished.json"])
def test_a_damaged_unfinished_folder_is_refused_with_the_remedy(corpus, tmp_path, monkeypatch, capsys, name):
    with monkeypatch.context() as patched:
        stop_in(patched, "d.jsonl", KeyboardInterrupt())
        command(corpus, tmp_path / "out")
    damaged = tmp_path / ".out.partial" / name
    os.truncate(damaged, damaged.stat().st_size // 3)
    capsys.readouterr()
    assert command(corpus, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "left by a killed preparation, and damaged" in err and "remove it to start anew" in err
