"""What makes a file survive a power cut and tells whether it is still the same: used by every writer of halny."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, progress: Callable[[int], object] = lambda n_bytes: None) -> str:
    """The SHA-256 of a file, in hexadecimal; ``progress`` is told how many bytes more were read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def in_words(n_bytes: float) -> str:
    """905 kB, 87.1 GB: a size for a message."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """0.4 s, 35 s, 14 min, 2.5 h: a time for a message."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


MISSING = FileNotFoundError, NotADirectoryError, IsADirectoryError  # what is there is wrong; others may pass
REMEDIES = {
    errno.EMFILE: "raise this process's limit with ulimit -n",
    errno.ENFILE: "this machine has too many files open in all: close some, or raise fs.file-max",
    errno.ENOMEM: "free some of this machine's memory",
    errno.EACCES: "give this user the permission",
    errno.EPERM: "give this user the permission",
    errno.EIO: "look at the disk or the network file system, the file itself may be sound",
    errno.ESTALE: "mount the network file system again, the file itself may be sound",
    errno.ETIMEDOUT: "look at the network file system, the file itself may be sound",
}


def in_its_words(error: OSError) -> str:
    """What the system said, and what helps: an error of resources is no word on what is in the file."""
    words = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{words}: {REMEDIES[error.errno]}" if error.errno in REMEDIES else words


def folder_above(path: Path) -> Path:
    """``path``, or where there is no such folder yet the nearest one above it: on the disk that it will be on."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


@contextmanager
def replacing(path: Path, synced: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to. It takes that name when the block ends well, and goes away when it does not.

    A reader sees the old file or the new one, never half of it; ``synced`` holds that through a power cut.
    """
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        if synced:
            sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step, through a power cut too."""
    with replacing(path, synced=True) as partial:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def partial_folder(target: Path) -> Path:
    """The path of a folder beside ``target`` to grow in, ``.NAME.partial-HOST-PID``; tidies up after dead processes.

    One killed between the two renames of ``move_into_place`` leaves the old folder as ``.NAME.replaced-HOST-PID``; it
    gets its name back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    leftover = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced)-(.+)-(\d+)")
    for entry in sorted(target.parent.iterdir()):
        match = leftover.fullmatch(entry.name)
        if match is None or _is_alive(match[2], int(match[3])):
            continue
        if match[1] == "replaced" and not target.exists():
            os.rename(entry, target)
        else:
            shutil.rmtree(entry, ignore_errors=True)
    return _sibling(target, "partial")


def move_into_place(partial: Path, target: Path) -> None:
    """Give a folder its final name, in place of an older one."""
    if target.exists():
        replaced = _sibling(target, "replaced")
        os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(partial, target)
        sync(target.parent)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _is_alive(host: str, pid: int) -> bool:
    """Whether another process may still be at work; of other hosts' we cannot tell."""
    if host != socket.gethostname():
        return True
    if pid == os.getpid():
        return False  # an earlier process that had our number, as in a restarted container
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
