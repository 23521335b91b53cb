"""Hugging Face safetensors folders <-> halny's Mistral.

TABLE below is the whole mapping: ours is Hugging Face's with q, k, v (and gate, up) written one below the other, so a
row of ours is a row of exactly one tensor of theirs. Everything here follows from that.

Loading. FSDP shards rows, so a rank's part of a packed matrix is a few row ranges of q, k and v, and ``safe_open``
reads just those: no process ever holds the model, nor even one packed matrix. Everything that can be wrong with a
folder is found in config.json and the safetensors headers, before the first byte of a weight is copied.

Saving. Which tensor goes into which file follows from the shapes, so rank 0 knows every file name beforehand and holds
one file's tensors at a time; parameters are gathered one by one, and the other ranks drop what they gather. When rank 0
fails it goes on gathering, because the others would wait for it forever, and all raise together at the end.

A save is whole or absent (durable.py), and replaces nothing but an earlier export.

python -m halny.model.convert HF_DIR OUT gives a folder another tokenizer or other layers: reshape.py, on what is here.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from halny.model import reshape
from halny.model.durable import move_into_place, partial_folder, sync, write_json
from halny.model.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    README,
    README_MARK,
    SINGLE,
    check_replaceable,
    few,
    hf_config,
    read_hf_config,
    read_json,
)
from halny.model.hints import hint
from halny.model.mistral import Mistral, MistralConfig, local_rows, unwrapped
from halny.model.tokenizer_files import SpecialIds, copy_tokenizer, tokenizer_files

# Ours: Hugging Face's, whose rows follow one another in ours, each with its shape. v vocabulary, d model width,
# q channels of all query heads, k channels of all key (or value) heads, f MLP width.
TABLE: dict[str, dict[str, str]] = {
    "embed.weight": {"model.embed_tokens.weight": "vd"},
    "layers.{i}.attention_norm.weight": {"model.layers.{i}.input_layernorm.weight": "d"},
    "layers.{i}.attention.qkv.weight": {
        "model.layers.{i}.self_attn.q_proj.weight": "qd",
        "model.layers.{i}.self_attn.k_proj.weight": "kd",
        "model.layers.{i}.self_attn.v_proj.weight": "kd",
    },
    "layers.{i}.attention.out.weight": {"model.layers.{i}.self_attn.o_proj.weight": "dq"},
    "layers.{i}.mlp_norm.weight": {"model.layers.{i}.post_attention_layernorm.weight": "d"},
    "layers.{i}.mlp.gate_up.weight": {
        "model.layers.{i}.mlp.gate_proj.weight": "fd",
        "model.layers.{i}.mlp.up_proj.weight": "fd",
    },
    "layers.{i}.mlp.down.weight": {"model.layers.{i}.mlp.down_proj.weight": "df"},
    "norm.weight": {"model.norm.weight": "d"},
    "head.weight": {"lm_head.weight": "vd"},
}
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old versions of transformers exported

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

MAX_SHARD_BYTES = 5_000_000_000


class Piece(NamedTuple):
    """A Hugging Face tensor, and the row of our parameter at which it begins."""

    hf_name: str
    shape: tuple[int, ...]
    first_row: int


def pieces(config: MistralConfig) -> Iterator[tuple[str, list[Piece]]]:
    """TABLE written out for a config: (the name of our parameter, its pieces in order), layer by layer."""
    sizes = {
        "v": config.vocab_size,
        "d": config.dim,
        "q": config.n_heads * config.head_dim,
        "k": config.n_kv_heads * config.head_dim,
        "f": config.hidden_dim,
    }
    entries = [(i, ours) for ours in TABLE for i in (range(config.n_layers) if "{i}" in ours else [-1])]
    for i, ours in sorted(entries, key=lambda entry: entry[0]):
        placed, row = [], 0
        for hf_name, letters in TABLE[ours].items():
            placed.append(Piece(hf_name.format(i=i), tuple(sizes[letter] for letter in letters), row))
            row += placed[-1].shape[0]
        yield ours.format(i=i), placed


# ---- loading


def load_hf(path: str | Path, dtype: torch.dtype | None = None) -> Mistral:
    """``AutoModelForCausalLM.from_pretrained(path, dtype=dtype)`` for Mistral, on the CPU.

    dtype None keeps the stored one; where the folder holds several, all take the one they promote to. The RoPE tables
    are fp32 whatever the dtype.

    Raises what ``read_hf_config`` and ``load_hf_weights`` raise, and TypeError if dtype is not a floating-point one.
    """
    _check_dtype(dtype)
    config = read_hf_config(path)
    headers = _read_headers(path, config)
    dtype = dtype or _common_dtype(headers)
    with torch.device("meta"):
        model = Mistral(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    _copy_weights(model, headers, None)
    return model


def load_hf_weights(model: Mistral, path: str | Path, progress: Callable[[int, int], None] | None = None) -> None:
    """``model.load_state_dict(...)`` from a Hugging Face folder, in place; plain or sharded by FSDP2 along rows.

    The folder is ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names. Each rank reads
    only the rows that it owns, cast to its parameters' dtype; there is no collective. ``progress(done, total)`` is
    called after each read with bytes of this rank.

    Raises ValueError before anything is copied: as ``read_hf_config``; for a config that differs from model.config in
    more than window, max_seq_len, bos_id and eos_id (a different rope_theta fits every shape and means something else);
    for tensors missing, unexpected, misshapen or not of a floating-point dtype, files missing, truncated or corrupt, an
    index that does not match its files or names any outside the folder; for a model still on the meta device, or with
    other parameters than a Mistral's. And while it copies, on the rank whose rows they are, for weights that are not
    finite.
    """
    model, config = unwrapped(model), read_hf_config(path)
    for name, ours in asdict(model.config).items():
        theirs = getattr(config, name)
        if name not in ("window", "max_seq_len", "bos_id", "eos_id") and theirs != ours:
            raise ValueError(f"{path} has {name} {theirs}, but the model was built with {ours}")
    _reshard(model)
    _check_materialised(model)
    _copy_weights(model, _read_headers(path, config), progress)


def check_hf_weights(path: str | Path) -> MistralConfig:
    """The config of a folder whose weights can be loaded; reads config.json and headers, no weight.

    Raises what ``load_hf_weights`` would raise for the folder, before there is a model to load it into.
    """
    config = read_hf_config(path)
    _read_headers(path, config)
    return config


class _Header(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _read_headers(path: str | Path, config: MistralConfig) -> dict[str, _Header]:
    """Where each tensor of the folder is, after checking that they are exactly those of config."""
    folder, headers, problems = Path(path), {}, []
    for file, indexed in _list_files(folder).items():
        with _opened(file) as opened:
            held = {name for name in opened.keys() if not IGNORED.fullmatch(name)}  # noqa: SIM118, it is no dict
            if indexed is not None and held != indexed:
                wrong = few(indexed - held) if indexed - held else few(held - indexed)
                verb = "lacks" if indexed - held else "holds"
                raise ValueError(f"{file} {verb} {wrong}, against what {INDEX} says")
            for name in sorted(held):
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} has dtype {tensor.get_dtype()}; weights must be one of {', '.join(DTYPES)}"
                    )
                headers[name] = _Header(file, tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])

    expected = {piece.hf_name: piece.shape for _, placed in pieces(config) for piece in placed}
    if missing := expected.keys() - headers.keys():
        problems.append(f"missing {few(missing)}")
    if extra := headers.keys() - expected.keys():
        problems.append(f"unexpected {few(extra)}")
    if wrong := {
        f"{name} is {list(headers[name].shape)} and not {list(shape)}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    }:
        problems.append(f"misshapen {few(wrong)}")
    if problems:
        raise ValueError(f"{path} does not hold the tensors that its {CONFIG} describes: {'; '.join(problems)}")
    return headers


def _list_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's safetensors files, each with the names that the index puts there (None without an index)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        if pickles := sorted(folder.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{folder} holds only {pickles[0].name}, a pickle, which can run code when it is read; "
                "convert it to safetensors first (transformers' save_pretrained does)"
            )
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint(folder)}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{folder / INDEX} puts {name} into {file!r}, which is not a file of this folder")
        files.setdefault(folder / file, set())
        if not IGNORED.fullmatch(name):
            files[folder / file].add(name)
    if absent := {file.name for file in files if not file.is_file()}:
        raise ValueError(f"{folder / INDEX} names files that are not there: {few(absent)}")
    return files


class HfWeights:
    """The weights of a Hugging Face folder by our names, some rows of one parameter at a time, on the CPU.

    path, config  the folder, and its sizes
    dtype         the stored one; where the folder holds several, the one that they promote to
    Raises, when made, what ``check_hf_weights`` raises, and reads no weight.
    """

    def __init__(self, path: str | Path):
        self.path, self.config = Path(path), read_hf_config(path)
        self._headers, self._pieces = _read_headers(path, self.config), dict(pieces(self.config))
        self.dtype = _common_dtype(self._headers)

    def rows(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows low to high of our parameter of that name; ValueError where one is not finite."""
        placed = self._pieces[name]
        high = sum(piece.shape[0] for piece in placed) if high is None else high
        x = torch.empty(max(0, high - low), *placed[0].shape[1:], dtype=self.dtype)
        for hf_name, first, last, at in _overlaps(placed, low, high):
            file = self._headers[hf_name].file
            with _opened(file) as opened:
                rows = opened.get_slice(hf_name)[first:last]
            _check_finite(rows, file, hf_name)
            x[at : at + last - first] = rows
        return x


def _common_dtype(headers: dict[str, _Header]) -> torch.dtype:
    return reduce(torch.promote_types, (header.dtype for header in headers.values()))


def _overlaps(placed: list[Piece], low: int, high: int) -> Iterator[tuple[str, int, int, int]]:
    """What rows low to high of a parameter are of its pieces: (Hugging Face name, from row, to row, where in ours)."""
    for hf_name, shape, first_row in placed:
        start, end = max(low, first_row), min(high, first_row + shape[0])
        if start < end:
            yield hf_name, start - first_row, end - first_row, start - low


def _copy_weights(model: Mistral, headers: dict[str, _Header], progress: Callable[[int, int], None] | None) -> None:
    parameters = model.weights()
    reads = []  # (file, Hugging Face name, from row, to row, where to)
    for name, placed in pieces(model.config):
        local, start = local_rows(parameters[name])
        for hf_name, low, high, at in _overlaps(placed, start, start + local.shape[0]):
            reads.append((headers[hf_name].file, hf_name, low, high, local[at : at + high - low]))
    reads.sort(key=lambda read: read[0])
    done, total = 0, sum(target.numel() * headers[hf_name].dtype.itemsize for _, hf_name, _, _, target in reads)
    for file, in_file in groupby(reads, key=lambda read: read[0]):
        with _opened(file) as opened:
            for _, hf_name, low, high, target in in_file:
                rows = opened.get_slice(hf_name)[low:high]
                _check_finite(rows, file, hf_name)
                target.copy_(rows)
                done += rows.nbytes
                if progress is not None:
                    progress(done, total)


def _check_finite(rows: Tensor, file: Path, name: str) -> None:
    if not rows.isfinite().all():
        raise ValueError(f"{file}: {name} holds a number that is not finite (NaN or infinite)")


@contextmanager
def _opened(file: Path):
    try:
        with file.open("rb"), safe_open(file, framework="pt") as opened:  # whose "no such file" stands for all reasons
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated, corrupt or not a safetensors file ({error}){hint(file)}") from None


# ---- saving


def save_hf(
    model: Mistral,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    carried: dict | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """``MistralForCausalLM.save_pretrained(path)``, whole or not at all: what transformers 4 and 5 load as it is.

    Writes ``model.safetensors`` (or numbered files of at most max_shard_bytes, a larger tensor having one to itself,
    and their index), config.json, generation_config.json, and the tokenizer's files from the folder ``tokenizer``, as
    they are. dtype None writes each parameter in its own. ``carried`` is what ``read_carried`` took from the folder
    that the model began as: further keys of config.json, generation settings, a chat template. An export that is there
    already is replaced only once the new one is complete.

    A collective if the model is sharded: every rank calls it, with equal arguments, and rank 0 writes, holding one
    file's tensors at a time. ``group`` is the process group over which rank 0 tells the others how it went (default:
    the default one). A model that is not sharded is written by whichever process calls.

    Raises ValueError for a path that holds anything but an earlier export, a tokenizer folder without a tokenizer, a
    max_shard_bytes below 1, a model on the meta device or with other parameters than a Mistral's, adapters for one, a
    weight that fp16, where dtype is that, cannot hold; TypeError for a dtype that is not a floating-point one; what the
    file system raises. What goes wrong on rank 0 is raised on every rank, elsewhere as ValueError or RuntimeError, and
    leaves ``path`` as it was.
    """
    _check_dtype(dtype)
    _check_shard_bytes(max_shard_bytes)
    model = unwrapped(model)
    _reshard(model)
    _check_materialised(model)
    weights = model.weights()
    sharded = any(isinstance(parameter, DTensor) for parameter in weights.values())
    target, partial = Path(os.path.realpath(path)), None
    writes = not sharded or dist.get_rank() == 0

    error = None
    if writes:
        try:
            partial = _begin(target, tokenizer)
        except Exception as caught:
            error = caught
    _raise_everywhere(error, sharded, group)

    tensors = _whole_tensors(model.config, weights, dtype)
    try:
        if writes:
            stored = {name: dtype or parameter.dtype for name, parameter in weights.items()}
            _write(model.config, stored, tensors, partial, tokenizer, carried, max_shard_bytes)
            check_replaceable(target)  # again: writing took a while
            move_into_place(partial, target)
    except Exception as caught:
        error = caught
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # renamed away by now, if all went well
    for _ in tensors:  # the part that other ranks play; and rank 0 after a failure, for their sake
        pass
    _raise_everywhere(error, sharded, group)


def write_hf(
    config: MistralConfig,
    dtype: torch.dtype,
    parameters: Iterator[tuple[str, Tensor]],
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    carried: dict | None = None,
    readme: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """``save_hf`` by one process and without a model: of parameters (our names, whole) in the order of ``pieces``.

    Writes the same bytes as ``save_hf`` of a model with these parameters, takes them one by one and holds one file's
    tensors at a time. ``readme`` is the text of a README.md beside them. Raises what ``save_hf`` raises, and what
    ``parameters`` raises; then ``path`` is as it was.
    """
    _check_dtype(dtype)
    _check_shard_bytes(max_shard_bytes)
    target = Path(os.path.realpath(path))
    partial = _begin(target, tokenizer)
    tensors = (
        (piece.hf_name, whole[piece.first_row : piece.first_row + piece.shape[0]])
        for (_, placed), (_, x) in zip(pieces(config), parameters, strict=True)
        for whole in [x.to(dtype)]
        for piece in placed
    )
    try:
        stored = {name: dtype for name, _ in pieces(config)}
        if readme is not None:
            (partial / README).write_text(f"{README_MARK}\n\n{readme}", encoding="utf-8")
            sync(partial / README)
        _write(config, stored, tensors, partial, tokenizer, carried, max_shard_bytes)
        check_replaceable(target)  # again: writing took a while
        move_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed away by now, if all went well


def _whole_tensors(
    config: MistralConfig, weights: dict[str, Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) one after another; one collective for each of our parameters that is sharded."""
    for name, placed in pieces(config):
        whole = weights[name].detach()
        whole = whole.to(dtype or whole.dtype)  # before it travels
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        for hf_name, shape, first_row in placed:
            yield hf_name, whole[first_row : first_row + shape[0]]


def _raise_everywhere(error: Exception | None, sharded: bool, group: dist.ProcessGroup | None) -> None:
    """Raise rank 0's error, if there is one, on every rank."""
    if sharded:
        told = [error and (isinstance(error, ValueError), f"rank 0 could not save: {error}")]
        dist.broadcast_object_list(told, src=0, group=group)
        if error is None and told[0] is not None:
            refused, message = told[0]
            raise (ValueError if refused else RuntimeError)(message)
    if error is not None:
        raise error


def _write(
    config: MistralConfig,
    stored: dict[str, torch.dtype],  # of our parameters
    tensors: Iterator[tuple[str, Tensor]],
    partial: Path,
    tokenizer: str | Path | None,
    carried: dict | None,
    max_shard_bytes: int,
) -> None:
    numbers, total, size, n_files = {}, 0, 0, 1
    for name, placed in pieces(config):
        for piece in placed:
            n_bytes = prod(piece.shape) * stored[name].itemsize
            if size and size + n_bytes > max_shard_bytes:
                n_files, size = n_files + 1, 0
            numbers[piece.hf_name] = n_files
            size, total = size + n_bytes, total + n_bytes

    def file_of(hf_name: str) -> str:
        return SINGLE if n_files == 1 else f"model-{numbers[hf_name]:05}-of-{n_files:05}.safetensors"

    carried = carried or {}
    described = hf_config(config, reduce(torch.promote_types, stored.values()), carried)
    ids = {key: value for key, value in described.items() if key.endswith("_token_id")}
    write_json(partial / CONFIG, described)
    write_json(partial / GENERATION_CONFIG, carried.get("generation_config") or {"_from_model_config": True, **ids})
    shown = None if total > 1e9 else True  # None: on a terminal
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=shown)
    for file, in_file in groupby(tensors, key=lambda item: file_of(item[0])):
        held = {}
        for hf_name, tensor in in_file:
            held[hf_name] = tensor.cpu().contiguous()
            bar.update(tensor.nbytes)
        for hf_name, tensor in held.items():
            if tensor.dtype == torch.float16 and not tensor.isfinite().all():
                raise ValueError(f"{hf_name} holds a number beyond fp16's largest, 65,504; bf16 has the range of fp32")
        # transformers refuses a file whose metadata does not name the format
        save_file(held, partial / file, metadata={"format": "pt"})
        shutil.copymode(partial / CONFIG, partial / file)  # save_file makes files that only their owner may read
        sync(partial / file)
        del held  # before the next file's are gathered
    bar.close()
    if n_files > 1:
        weight_map = {hf_name: file_of(hf_name) for hf_name in sorted(numbers)}
        write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is not None:
        special = SpecialIds(config.bos_id, config.eos_id, described.get("pad_token_id"))
        for file in copy_tokenizer(Path(tokenizer), partial, special, carried.get("chat_template")):
            sync(file)
    sync(partial)


def _begin(target: Path, tokenizer: str | Path | None) -> Path:
    """Check the tokenizer and that target may be written, and make the partial folder."""
    if tokenizer is not None:
        tokenizer_files(Path(tokenizer))
    partial = partial_folder(target)  # first: it may put an older export back
    check_replaceable(target)
    partial.mkdir()
    return partial


# ---- both


def _reshard(model: Mistral) -> None:
    """Put back FSDP's shards: after a forward pass without backward its root shows gathered compute-dtype copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_materialised(model: Mistral) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device, without memory for weights; call its to_empty() first")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype must be None or one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")


def _check_shard_bytes(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"max_shard_bytes must be a positive integer, got {n!r}")


# ---- the command


def main(arguments: list[str] | None = None) -> int:
    """python -m halny.model.convert"""
    return reshape.main(arguments, HfWeights=HfWeights, write_hf=write_hf, pieces_of=pieces)


if __name__ == "__main__":
    sys.exit(main())
