"""What a path that is not the folder asked for probably is, and what to do: the end of a refusal, or nothing."""

import re
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is Git LFS's stand-in of three lines, as a clone without git-lfs leaves it."""
    try:
        if file.stat().st_size >= 1024:
            return False
        with file.open("rb") as opened:
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def hint(path: str | Path) -> str:
    """What to append to a refusal of a path that is no Hugging Face folder, or no file of one: a remedy, or nothing."""
    folder = Path(path)
    if is_lfs_pointer(folder):
        return f"; {folder.name} is a Git LFS pointer, not the file itself: run git lfs pull in {folder.parent}"
    if not folder.exists():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
            download = f"hf download {path} --local-dir {folder.name}"
            return f"; if it is a model of the Hugging Face hub, download it first: {download}"
        return ""
    if (folder / "adapter_config.json").is_file():
        return "; it is a LoRA adapter: merge it into its base model (merge_and_unload, save_pretrained), and name that"
    if snapshots := [*folder.glob("snapshots/*/"), *folder.glob("models--*/snapshots/*/")]:
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        return f"; it is a folder of Hugging Face's cache, where models lie deeper: name {newest}, for example"
    if (folder / "checkpoints").is_dir():
        made = "name its export/" if (folder / "export").is_dir() else "make one with python -m halny.model.export"
        return f"; it is a run of train.py, not a Hugging Face folder: {made}"
    if folder.name.startswith("step-") and (folder / "manifest.json").is_file():
        return "; it is a checkpoint of train.py: python -m halny.model.export makes a Hugging Face folder of it"
    if pointer := next((file for file in sorted(folder.glob("*")) if is_lfs_pointer(file)), None):
        return hint(pointer)
    return ""
