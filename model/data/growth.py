"""Whether a data folder is one that a run has read before, with more documents after those: one that grew.

A preparation of more text begins with the shards of the earlier one, but for the last, which was filled up: its tokens
are hashed as the file that they were alone. What is kept of a folder for this is short: one hash of all full shards.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence

import numpy as np

from halny.model.data.dataset import CHUNK, Dataset, RawDataset
from halny.model.data.history import History, Share, lineages


def with_origins(now: Sequence[Share], datasets: Sequence[Dataset | RawDataset], before: History) -> tuple[Share, ...]:
    """The sources of now, whose data are these; those that grew since a mixture of before say from what."""
    lines, shares = lineages(before), []
    known = {share.fingerprint: share for era in before for share in era.shares}
    taken = {lines[share.fingerprint][0] for share in now if share.fingerprint in known}
    for share, dataset in zip(now, datasets, strict=True):
        origin = known[share.fingerprint].grown_from if share.fingerprint in known else None
        if share.fingerprint not in known:
            for old in reversed(known.values()):  # the newest first: it has more of the same
                if lines[old.fingerprint][0] not in taken and begins_with(dataset, old.contents):
                    taken.add(lines[old.fingerprint][0])
                    origin = old.fingerprint
                    break
        shares.append(share._replace(grown_from=origin))
    return tuple(shares)


def contents(dataset: Dataset | RawDataset) -> dict | None:
    """What tells the training documents of a data folder; None for raw files, which have no checksums of parts."""
    if isinstance(dataset, RawDataset):
        return None
    split = dataset.manifest["splits"]["train"]
    *full, last = [_checksums(file) for file in split["files"]]
    return {"tokens": split["tokens"], "shards": len(full), "sha256": _sha256(full), "last": last}


def begins_with(dataset: Dataset | RawDataset, earlier: dict | None) -> bool:
    """Whether a data folder has the training documents of an earlier one, then others. Reads one shard's tokens."""
    if isinstance(dataset, RawDataset) or earlier is None:
        return False
    files, n_full, last = dataset.manifest["splits"]["train"]["files"], earlier["shards"], earlier["last"]
    stream = dataset.split("train")
    if len(files) <= n_full or len(stream) <= earlier["tokens"]:
        return False
    if _sha256([_checksums(file) for file in files[:n_full]]) != earlier["sha256"]:
        return False
    if _checksums(files[n_full]) == last:
        return True
    ends = np.asarray(stream.shards[n_full].ends[: last["documents"]], dtype="<i8")
    if len(ends) < last["documents"] or ends[-1] != last["tokens"]:
        return False
    begin = sum(file["tokens"] for file in files[:n_full])
    parts = range(begin, begin + last["tokens"], CHUNK)
    tokens = (stream.gather([start], [min(CHUNK, parts.stop - start)]) for start in parts)
    dtype = np.dtype(dataset.manifest["dtype"])
    return _npy_sha256(tokens, dtype, last["tokens"]) == last["sha256"] and (
        _npy_sha256([ends], ends.dtype, len(ends)) == last["boundaries"]
    )


def _checksums(file: dict) -> dict:
    return {key: file[key] for key in ("tokens", "documents", "sha256")} | {"boundaries": file["boundaries"]["sha256"]}


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _npy_sha256(parts: Iterable[np.ndarray], dtype: np.dtype, length: int) -> str:
    """Of the .npy file of a 1-D array, which is given in parts."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    digest = hashlib.sha256(header.getvalue())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=dtype))
    return digest.hexdigest()
