"""A Hugging Face model folder, but for its weights: which files it holds, and config.json <-> MistralConfig."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch

from halny.model.durable import folder_above, in_words
from halny.model.exits import Refused
from halny.model.hints import hint
from halny.model.mistral import MistralConfig
from halny.model.tokenizer_files import is_tokenizer_file, read_chat_template

# MistralConfig's fields: the key of config.json, and what transformers takes where it is absent.
FIELDS: dict[str, tuple[str, int | float | None]] = {
    "vocab_size": ("vocab_size", 32000),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", 8),  # null: n_heads
    "head_dim": ("head_dim", None),  # null: dim // n_heads
    "hidden_dim": ("intermediate_size", 14336),
    "window": ("sliding_window", 4096),
    "max_seq_len": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "bos_id": ("bos_token_id", 1),
    "eos_id": ("eos_token_id", 2),
    "rope_theta": ("rope_theta", 10000.0),  # in transformers 5 inside rope_parameters
}
# Keys of config.json under which the computation is Mistral's for these values only. Absent is fine.
ONLY = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "rope_scaling": (None, {}),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
# What model/export.py and model/convert.py say of how they made a folder: an object with a key for each of them.
MADE = "halny"
# Keys that say where a folder comes from, or name code that does not come along: an export has its own, or none.
NOT_CARRIED = ("auto_map", "_name_or_path", "transformers_version", "_commit_hash", MADE)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
EXPORT_FILES = {SINGLE, INDEX, CONFIG, GENERATION_CONFIG}  # with SHARD and a tokenizer's: all that save_hf ever writes
README, README_MARK = "README.md", "<!-- written by halny, and replaced with the export -->"  # never another README.md
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def weights_fingerprint(folder: Path) -> str:
    """A hash by which one folder's weights are told from another's, wherever it lies: of each file its name, its size
    and 64 pieces, the first of which holds what safetensors says of the tensors. To read a 7B whole takes minutes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in range(0, size, max(2**16, size // 64)):
                file.seek(at)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def name_of(folder: Path) -> str:
    """What to call a folder without the path of a machine: its name, before it the run's if it is a run's export."""
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "export" else path.name


def read_hf_config(path: str | Path) -> MistralConfig:
    """``transformers.MistralConfig.from_pretrained(path)`` as a MistralConfig, without transformers.

    Reads the old top-level ``rope_theta`` and transformers 5's ``rope_parameters``; absent keys take transformers'
    defaults. Of several end-of-sequence ids the first is kept; ``read_carried`` has them all.

    Raises ValueError, naming the file, key and value, for a folder or config.json that is missing or not JSON, and for
    what is not plain Mistral: another model type, architecture or activation, RoPE scaling, tied embeddings, biases,
    attention dropout, layers of differing kinds, quantisation.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder{hint(path)}")
    file = Path(path) / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} has no {CONFIG}, so it is not a Hugging Face model folder{hint(path)}")
    hf = read_json(file)

    def refuse(key: str, why: str = "halny does not support that"):
        raise ValueError(f"{file}: {key} is {hf.get(key)!r}; {why}")

    if hf.get("model_type") != "mistral":
        refuse("model_type", f"it must be 'mistral'{hint(path)}")
    if hf.get("architectures") not in (None, ["MistralForCausalLM"]):
        refuse("architectures", "it must be ['MistralForCausalLM']")
    for key, allowed in ONLY.items():
        if key in hf and hf[key] not in allowed:
            refuse(key)
    rope = hf.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and rope.keys() <= {"rope_type", "rope_theta"}
    if not plain or rope.get("rope_type", "default") != "default":
        refuse("rope_parameters", "halny has no RoPE scaling: only rope_type 'default' with a rope_theta")

    fields = {ours: hf.get(key, default) for ours, (key, default) in FIELDS.items()}
    if rope.get("rope_theta") is not None:
        if "rope_theta" in hf and hf["rope_theta"] != rope["rope_theta"]:
            refuse("rope_theta", f"but in rope_parameters it is {rope['rope_theta']!r}")
        fields["rope_theta"] = rope["rope_theta"]
    dim, n_heads = fields["dim"], fields["n_heads"]
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = n_heads
    if fields["head_dim"] is None and isinstance(dim, int) and isinstance(n_heads, int) and n_heads:
        fields["head_dim"] = dim // n_heads
    if isinstance(fields["eos_id"], list) and fields["eos_id"]:
        fields["eos_id"] = fields["eos_id"][0]
    try:
        config = MistralConfig(**fields)
    except ValueError as error:  # with the file's own names
        message = re.sub(r"\w+", lambda word: FIELDS.get(word[0], word)[0], str(error))
        raise ValueError(f"{file}: {message}") from None
    kind = "full_attention" if config.window is None else "sliding_attention"
    if hf.get("layer_types") not in (None, [kind] * config.n_layers):
        refuse("layer_types", f"with sliding_window {config.window} each of {config.n_layers} must be {kind!r}")
    return config


def hf_config(config: MistralConfig, dtype: torch.dtype, carried: dict | None = None) -> dict:
    """config.json, with the keys of transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype), and those
    that ``read_carried`` took from another."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{key: getattr(config, ours) for ours, (key, _) in FIELDS.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **(carried or {}).get("config", {}),
        "dtype": name,
        "torch_dtype": name,
    }


def read_carried(path: str | Path) -> tuple[dict, list[str]]:
    """What an export of a model that began as this folder says of it beside its sizes, and what of this is left behind.

    The first is for ``save_hf`` and can be written as JSON: {"config": keys of config.json, all of several eos_token_id
    and pad_token_id among them, "generation_config": that file, "chat_template": the tokenizer's, if it has one}. The
    second names keys. Raises ValueError for a config.json that ``read_hf_config`` refuses.
    """
    folder = Path(path)
    known = hf_config(read_hf_config(folder), torch.float32)
    hf, left = read_json(folder / CONFIG), []
    several = isinstance(hf.get("eos_token_id"), list)
    ours = known.keys() - {"initializer_range", "use_cache", *(("eos_token_id",) if several else ())}
    carried = {"config": {key: x for key, x in hf.items() if key not in {*ours, *ONLY, *NOT_CARRIED, "layer_types"}}}
    left += [f"{CONFIG}: {key}" for key in NOT_CARRIED if key in hf]
    if (folder / GENERATION_CONFIG).is_file():
        found = read_json(folder / GENERATION_CONFIG)
        carried["generation_config"] = {key: x for key, x in found.items() if key not in NOT_CARRIED}
        left += [f"{GENERATION_CONFIG}: {key}" for key in NOT_CARRIED if key in found]
    if (template := read_chat_template(folder)) is not None:
        carried["chat_template"] = template
    return carried, left


def read_json(file: Path) -> dict:
    """The JSON object in a file; ValueError, naming the file, for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8 alike
        raise ValueError(f"{file} is not JSON: {error}{hint(file)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def check_out(target: Path, n_bytes: int) -> None:
    """Refused unless ``save_hf`` may write there, and there is room for so many bytes."""
    try:
        check_replaceable(target)
    except ValueError as error:
        raise Refused(str(error)) from None
    existing = folder_above(target)
    if (free := shutil.disk_usage(existing).free) < n_bytes:
        raise Refused(f"{target} takes {in_words(n_bytes)}, and {existing} has {in_words(free)} free; make room")


def check_replaceable(target: Path) -> None:
    """ValueError unless ``save_hf`` may write there: nothing, an empty folder, or an earlier export and no more."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, so no export can be written there")
    with os.scandir(target) as entries:
        strangers = {entry.name for entry in entries if not _is_of_an_export(entry)}
    if strangers:
        raise ValueError(f"{target} is not replaced: it holds {few(strangers)}, which is no part of an export")


def _is_of_an_export(entry: os.DirEntry) -> bool:
    if entry.is_dir(follow_symlinks=False):
        with os.scandir(entry) as inside:
            files = list(inside)
        return bool(files) and all(
            file.is_file(follow_symlinks=False) and is_tokenizer_file(f"{entry.name}/{file.name}") for file in files
        )
    name = entry.name
    if name == README and entry.is_file(follow_symlinks=False):
        with open(entry, encoding="utf-8", errors="replace") as file:
            return file.read(len(README_MARK)) == README_MARK
    known = name in EXPORT_FILES or SHARD.fullmatch(name) is not None or is_tokenizer_file(name)
    return known and entry.is_file(follow_symlinks=False)


def few(names: set[str]) -> str:
    """At most three names, and how many more."""
    first, rest = sorted(names)[:3], len(names) - 3
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
