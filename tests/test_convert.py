"""Weights to and from Hugging Face: bit for bit, plain and sharded; what is refused; what a crash leaves behind."""

import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halny.model import convert, hf_folder
from halny.model.convert import load_hf, load_hf_weights, save_hf
from halny.model.hf_folder import read_hf_config
from halny.model.mistral import PRESETS, Mistral, MistralConfig

SIZES = {
    "vocab_size": 259, "hidden_size": 48, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 18,
}  # fmt: skip
Q_0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def hf_model():
    """A small random Mistral of transformers, fp32, norm weights random too."""
    generator = torch.Generator().manual_seed(0)
    config = transformers.MistralConfig(
        **SIZES, sliding_window=None, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module")
def exported(hf_model, tmp_path_factory):
    """Its folder, as transformers writes it: one file, fp32. Not to be changed; ``folder`` is a copy."""
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_model.save_pretrained(path)
    return path


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "model"))


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


def assert_nothing_left(parent: Path, *names: str) -> None:
    assert sorted(entry.name for entry in parent.iterdir()) == sorted(names)


# ---- round trips


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_to_ours_and_back(exported, tmp_path, dtype, max_shard_bytes):
    theirs = transformers.MistralForCausalLM.from_pretrained(exported, dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    sharded = max_shard_bytes == 20_000
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == sharded

    model = load_hf(tmp_path / "theirs")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.rope_cos.dtype == torch.float32
    save_hf(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)

    assert_same_bits(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            big = sum(load_file(file)[name].nbytes for name in opened.keys())  # noqa: SIM118
            assert big <= max_shard_bytes or len(opened.keys()) == 1
        assert file.stat().st_mode == (tmp_path / "ours" / "config.json").stat().st_mode
    if sharded:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in theirs.state_dict().values())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert_nothing_left(tmp_path, "ours", "theirs")

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert_same_bits(again.state_dict(), theirs.state_dict())
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {key for key in before if before[key] != after[key]} <= {"_name_or_path", "transformers_version"}
    assert (again.generation_config.bos_token_id, again.generation_config.eos_token_id) == (1, 2)
    if dtype == torch.float32:
        tokens = torch.arange(40)[None] * 7 % 259
        torch.testing.assert_close(model(tokens), again(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 24])
def test_ours_to_a_folder_and_back(tmp_path, window):
    config = MistralConfig(**{**vars(PRESETS["test"]), "window": window, "norm_eps": 3e-6, "rope_theta": 777.0,
                              "bos_id": 5, "eos_id": 6})  # fmt: skip
    model = Mistral(config)
    save_hf(model, tmp_path / "new" / "parents" / "export")
    again = load_hf(tmp_path / "new" / "parents" / "export")
    assert again.config == config
    assert_same_bits(again.state_dict(), model.state_dict())
    tokens = torch.arange(60)[None]
    assert torch.equal(again(tokens), model(tokens))

    save_hf(model, tmp_path / "bf16", dtype=torch.bfloat16)
    rounded = {name: x.bfloat16() for name, x in model.state_dict().items()}
    assert_same_bits(load_hf(tmp_path / "bf16").state_dict(), rounded)
    assert_same_bits(
        load_hf(tmp_path / "bf16", dtype=torch.float64).state_dict(), {n: x.double() for n, x in rounded.items()}
    )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_mixed_dtypes_are_promoted(folder):
    edit_tensors(folder, lambda x: x.update({name: y.bfloat16() for name, y in x.items() if "norm" not in name}))
    assert {parameter.dtype for parameter in load_hf(folder).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_hf(folder, torch.float16).parameters()} == {torch.float16}


def test_load_into_an_existing_model_casts_and_reports(exported):
    with torch.device("meta"):
        model = Mistral(read_hf_config(exported)).bfloat16()
    model.to_empty(device="cpu")
    seen = []
    load_hf_weights(model, exported, progress=lambda done, total: seen.append((done, total)))
    assert_same_bits(model.state_dict(), load_hf(exported, torch.bfloat16).state_dict())
    total = sum(x.nbytes for x in tensors_of(exported).values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_buffers_of_old_exports_are_ignored(folder):
    edit_tensors(folder, lambda x: x.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(9)}))
    assert_same_bits(load_hf(folder).state_dict(), load_hf(folder).state_dict())


def test_text_generation_pipeline_works_from_an_export(exported, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(256))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "tokenizer")
    model = load_hf(exported)
    save_hf(model, tmp_path / "export", tokenizer=tmp_path / "tokenizer")
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "export"), device="cpu")
    text = pipeline("w1 w20 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[4, 23, 6]]), 8)[0].tolist()
    assert 2 not in ids
    assert text.replace(" ", "") == "".join(words[i] for i in ids)


# ---- config.json


def test_config_of_transformers_5_and_4(folder):
    expected = MistralConfig(
        vocab_size=259, dim=48, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=18, hidden_dim=37, window=None,
        max_seq_len=64, rope_theta=1e6, norm_eps=1e-5,
    )  # fmt: skip
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    assert read_hf_config(folder) == expected
    edit_config(folder, drop=("rope_parameters", "dtype"), rope_theta=1e6, torch_dtype="float32", rope_scaling=None)
    assert read_hf_config(folder) == expected
    edit_config(folder, rope_parameters={"rope_type": "default"})
    assert read_hf_config(folder) == expected
    edit_config(folder, layer_types=["full_attention"] * 2, eos_token_id=[7, 2])
    assert read_hf_config(folder).eos_id == 7


def test_config_of_mistral_7b(tmp_path):
    v01 = {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(v01))
    assert read_hf_config(tmp_path) == PRESETS["mistral-7b"]
    edit_config(tmp_path, sliding_window=None, rope_theta=1000000.0)
    assert read_hf_config(tmp_path) == MistralConfig(window=None, rope_theta=1e6)


@pytest.mark.parametrize("given", [{}, {"num_attention_heads": 8, "head_dim": None}])
def test_absent_and_null_keys_mean_what_they_mean_to_transformers(tmp_path, given):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **given}))
    ours, theirs = read_hf_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for name, (key, _) in hf_folder.FIELDS.items():
        want = theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, key)
        assert getattr(ours, name) == want, key
    edit_config(tmp_path, num_key_value_heads=None)  # transformers 4 only: as many as query heads
    assert read_hf_config(tmp_path).n_kv_heads == ours.n_heads


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters is .*yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters is .*llama3"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0; but in rope_parameters it is 1000000.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "layer_types is"),
        ({"num_key_value_heads": 2}, r"num_attention_heads \(3\) must be a multiple of num_key_value_heads \(2\)"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer, got '48'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer, got None"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be a positive integer, got 0"),
        ({"sliding_window": 0}, "sliding_window must be .*, got 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
    ],
)
def test_configs_that_are_not_plain_mistral_are_refused(folder, changes, named):
    edit_config(folder, **changes)
    for refuse in (read_hf_config, load_hf):
        with pytest.raises(ValueError, match=named) as error:
            refuse(folder)
        assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"), [("{", "is not JSON"), ("[]", "must hold a JSON object"), (None, "has no config.json")]
)
def test_broken_config_is_refused(folder, text, named):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        load_hf(folder)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_hf(folder / "nowhere")


# ---- weights that do not fit


def rename(tensors, before, after):
    tensors[after] = tensors.pop(before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.pop(Q_0), f"missing {Q_0}"),
        (lambda x: [x.pop(name) for name in list(x) if "mlp" in name], "missing .*, .*, .* and 3 more"),
        (lambda x: x.update(extra=torch.ones(2)), "unexpected extra"),
        (lambda x: rename(x, "lm_head.weight", "head"), "missing lm_head.weight; unexpected head"),
        (lambda x: x.update({Q_0: torch.ones(53, 48)}), rf"misshapen {Q_0} is \[53, 48\] and not \[54, 48\]"),
        (lambda x: x.update({Q_0: x[Q_0].T.contiguous()}), rf"misshapen {Q_0} is \[48, 54\] and not \[54, 48\]"),
        (lambda x: x.update({Q_0: torch.ones(54, 48, dtype=torch.int8)}), f"{Q_0} has dtype I8"),
        (lambda x: x.update({Q_0: torch.ones(54, 48).to(torch.float8_e4m3fn)}), f"{Q_0} has dtype F8_E4M3"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_before_anything_is_copied(folder, change, named):
    model = Mistral(read_hf_config(folder))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    edit_tensors(folder, change)
    for refuse in (load_hf, lambda path: load_hf_weights(model, path)):
        with pytest.raises(ValueError, match=named):
            refuse(folder)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("damage", [lambda x: x[:-10], lambda x: x[:20], lambda x: b"", lambda x: b"not one" * 99])
def test_damaged_files_are_refused_by_name(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated, corrupt or not a safetensors file"):
        load_hf(folder)


def test_weights_that_the_system_does_not_open_are_neither_missing_nor_corrupt(folder, monkeypatch):
    original = io.open

    def refusing(path, *args, **kwargs):
        if str(path).endswith(".safetensors"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", refusing)
    with pytest.raises(OSError, match=r"Too many open files: .*safetensors"):
        load_hf(folder)


def test_an_index_that_does_not_fit_is_refused(exported, tmp_path):
    save_hf(load_hf(exported), tmp_path / "export", max_shard_bytes=20_000)
    folder, index_file = tmp_path / "export", tmp_path / "export" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    assert_same_bits(tensors_of(folder), tensors_of(exported))
    shard = index["weight_map"][Q_0]

    def refused(named, **weight_map):
        index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], **weight_map}}))
        with pytest.raises(ValueError, match=named):
            load_hf(folder)

    refused("names files that are not there: gone.safetensors", **{Q_0: "gone.safetensors"})
    refused(f"{shard} lacks phantom", phantom=shard)
    shutil.copy(folder / shard, tmp_path / shard)
    for outside in (f"../{shard}", str(tmp_path / shard), "..", "a/../b", 7):
        refused(f"puts {Q_0} into .* not a file of this folder", **{Q_0: outside})
    other = next(file for file in index["weight_map"].values() if file != shard)
    refused(f"lacks {Q_0}|holds {Q_0}", **{Q_0: other})
    index_file.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_hf(folder)
    index_file.write_text(json.dumps(index))
    os.truncate(folder / shard, 100)
    with pytest.raises(ValueError, match=f"{shard} is truncated"):
        load_hf(folder)


def test_folders_without_safetensors_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.* convert it to safetensors"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("num_attention_heads", 9, "n_heads 9, but .* 3"), ("rope_parameters", {"rope_theta": 5.0}, "rope_theta 5.0")],
)
def test_weights_of_another_architecture_are_refused_even_if_they_fit(folder, key, value, named):
    model = load_hf(folder)
    more = {"head_dim": 6, "num_key_value_heads": 3} if key == "num_attention_heads" else {}
    edit_config(folder, **{key: value}, **more)
    with pytest.raises(ValueError, match=named):
        load_hf_weights(model, folder)
    edit_config(folder, **{"num_attention_heads": 3, "head_dim": 18, "num_key_value_heads": 1, "sliding_window": 9,
                           "rope_parameters": {"rope_theta": 1e6}})  # fmt: skip
    load_hf_weights(model, folder)  # the window is the model's own business


def test_wrong_arguments(exported, tmp_path):
    model = load_hf(exported)
    for dtype in (torch.int32, "bf16"):
        with pytest.raises(TypeError, match="dtype must be"):
            load_hf(exported, dtype)
        with pytest.raises(TypeError, match="dtype must be"):
            save_hf(model, tmp_path / "export", dtype=dtype)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_shard_bytes must be a positive integer"):
            save_hf(model, tmp_path / "export", max_shard_bytes=wrong)
    with torch.device("meta"):
        meta = Mistral(model.config)
    for wrong in (lambda: save_hf(meta, tmp_path / "export"), lambda: load_hf_weights(meta, exported)):
        with pytest.raises(ValueError, match="meta device"):
            wrong()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer .*empty is not a folder with a tokenizer\.json"):
        save_hf(model, tmp_path / "export", tokenizer=tmp_path / "empty")
    assert_nothing_left(tmp_path, "empty")


# ---- replacing, and dying while at it


@pytest.fixture
def two_models():
    config = PRESETS["test"]
    return Mistral(config), Mistral(config)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_an_export_is_replaced_whole(two_models, tmp_path):
    old, new = two_models
    save_hf(old, tmp_path / "export", max_shard_bytes=20_000)
    save_hf(new, tmp_path / "export")
    assert_same_bits(load_hf(tmp_path / "export").state_dict(), new.state_dict())
    assert_nothing_left(tmp_path / "export", "config.json", "generation_config.json", "model.safetensors")
    (tmp_path / "empty").mkdir()
    save_hf(new, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(tmp_path / "export")
    assert_nothing_left(tmp_path, "export", "empty")


@pytest.mark.parametrize("stranger", ["notes.txt", "pytorch_model.bin", "model-1-of-2.safetensors", "tokenizer.json/x"])
def test_a_folder_with_anything_else_in_it_is_left_alone(two_models, tmp_path, stranger):
    save_hf(two_models[0], tmp_path / "export")
    file = tmp_path / "export" / stranger
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    before = {entry.name for entry in (tmp_path / "export").iterdir()}
    with pytest.raises(ValueError, match=f"holds {stranger.split('/')[0]}, which is no part of an export"):
        save_hf(two_models[1], tmp_path / "export")
    assert file.read_text() == "mine" and before == {entry.name for entry in (tmp_path / "export").iterdir()}
    assert_same_bits(load_hf(tmp_path / "export").state_dict(), two_models[0].state_dict())
    assert_nothing_left(tmp_path, "export")


def test_a_file_in_the_way_is_left_alone(two_models, tmp_path):
    (tmp_path / "export").write_text("mine")
    with pytest.raises(ValueError, match="export is a file"):
        save_hf(two_models[0], tmp_path / "export")
    assert (tmp_path / "export").read_text() == "mine"


def test_a_stranger_that_arrives_while_writing_is_left_alone(two_models, tmp_path, monkeypatch):
    save_hf(two_models[0], tmp_path / "export")

    def slow(*args, **kwargs):
        (tmp_path / "export" / "notes.txt").write_text("mine")
        save_file(*args, **kwargs)

    monkeypatch.setattr(convert, "save_file", slow)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        save_hf(two_models[1], tmp_path / "export")
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"
    assert_nothing_left(tmp_path, "export")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [True, False], ids=["over-an-export", "new"])
def test_a_failure_half_way_leaves_what_was_there(two_models, tmp_path, monkeypatch, error, earlier):
    old, new = two_models
    if earlier:
        save_hf(old, tmp_path / "export")
        before = contents(tmp_path / "export")
    calls = []

    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(convert, "save_file", fails_at_the_third)
    with pytest.raises(type(error)):
        save_hf(new, tmp_path / "export", max_shard_bytes=20_000)
    if earlier:
        assert contents(tmp_path / "export") == before
    assert_nothing_left(tmp_path, *(["export"] if earlier else []))


def test_a_failing_rename_puts_the_old_export_back(two_models, tmp_path, monkeypatch):
    save_hf(two_models[0], tmp_path / "export")
    before, rename = contents(tmp_path / "export"), os.rename

    def fails_to_bring_in(source, target):
        if ".partial-" in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(convert.os, "rename", fails_to_bring_in)
    with pytest.raises(OSError, match="no"):
        save_hf(two_models[1], tmp_path / "export")
    assert contents(tmp_path / "export") == before
    assert_nothing_left(tmp_path, "export")


def test_leftovers_of_dead_processes_are_tidied_and_of_living_ones_left(two_models, tmp_path, monkeypatch):
    old, new = two_models
    here, dead = socket.gethostname(), dead_pid()
    save_hf(old, tmp_path / "export")
    before = contents(tmp_path / "export")
    # killed between its two renames: the old export is under a side name, and none under its own
    os.rename(tmp_path / "export", tmp_path / f".export.replaced-{here}-{dead}")
    others = [
        f".export.partial-{here}-{os.getppid()}",
        f".export.partial-elsewhere-{dead}",
        f".exporter.partial-{here}-{dead}",
    ]
    for name in (f".export.partial-{here}-{dead}", f".export.partial-{here}-{os.getpid()}", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")

    def fails(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(convert, "save_file", fails)
        save_hf(new, tmp_path / "export")
    assert contents(tmp_path / "export") == before
    assert_nothing_left(tmp_path, "export", *others)
    save_hf(new, tmp_path / "export")
    assert_same_bits(load_hf(tmp_path / "export").state_dict(), new.state_dict())
    assert_nothing_left(tmp_path, "export", *others)


# ---- FSDP

WORKER = """
    import json, os, sys
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from halny.model import convert
    from halny.model.hf_folder import read_hf_config
    from halny.model.mistral import Mistral, local_rows

    source, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    options = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    with torch.device("meta"):
        model = Mistral(read_hf_config(source))
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.to_local().data.fill_(torch.nan)

    read = []  # (name, rows) of every read, from safetensors itself

    class CountedSlice:
        def __init__(self, name, part):
            self.name, self.part = name, part
            self.get_shape, self.get_dtype = part.get_shape, part.get_dtype
        def __getitem__(self, rows):
            read.append((self.name, rows.start, rows.stop))
            return self.part[rows]

    class Counted:  # has no get_tensor, which would read the whole
        def __init__(self, *args, **kwargs):
            self.real = real_safe_open(*args, **kwargs)
        def __enter__(self):
            self.opened = self.real.__enter__()
            self.keys = self.opened.keys
            return self
        def __exit__(self, *args):
            return self.real.__exit__(*args)
        def get_slice(self, name):
            return CountedSlice(name, self.opened.get_slice(name))

    real_safe_open, convert.safe_open = convert.safe_open, Counted
    progress = []
    convert.load_hf_weights(model, source, progress=lambda *bytes: progress.append(bytes))
    convert.safe_open = real_safe_open
    found["read"], found["progress"] = read, progress[-1]
    plain = convert.load_hf(source)
    found["uneven"], found["local_bytes"] = [], 0
    for (name, parameter), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        local, first = local_rows(parameter)
        assert torch.equal(local, whole[first : first + len(local)]), name
        found["local_bytes"] += local.nbytes
        if 2 * len(local) != len(whole):
            found["uneven"].append(name)

    with torch.no_grad():
        model(torch.arange(8)[None])  # leaves the root's parameters gathered, in bf16
    convert.save_hf(model, out / "sharded", max_shard_bytes=20_000)  # of the shards
    for parameter in model.parameters():
        parameter.to_local().data.zero_()
    with torch.no_grad():
        model(torch.arange(8)[None])
    convert.load_hf_weights(model, source)  # into the shards, not into the gathered copies
    convert.save_hf(model, out / "sharded-bf16", dtype=torch.bfloat16, group=dist.new_group(backend="gloo"))

    real_save_file, calls = convert.save_file, []
    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real_save_file(*args, **kwargs)
    convert.save_file = fails_at_the_third
    for key, options in {"disk": {}, "tokenizer": {"tokenizer": out}}.items():
        try:
            convert.save_hf(model, out / "sharded", max_shard_bytes=20_000, **options)
        except Exception as error:
            found[key] = [type(error).__name__, str(error)]
    found["calls"] = len(calls)
    found["imports_transformers"] = "transformers" in sys.modules
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destroy_process_group aborts now and then at world size 2
"""


def test_fsdp_on_two_ranks(exported, tmp_path):
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    out = tmp_path / "out"
    out.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "worker.py"), str(exported), str(out)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert {"embed.weight", "head.weight"} <= set(found[0]["uneven"])

    # between them the ranks read every row once, and each no more than it keeps
    tensors = tensors_of(exported)
    rows = sorted((name, row) for rank in found for name, low, high in rank["read"] for row in range(low, high))
    assert rows == sorted((name, row) for name, x in tensors.items() for row in range(len(x)))
    for rank in found:
        assert sum(tensors[name][low:high].nbytes for name, low, high in rank["read"]) == rank["local_bytes"]
        assert rank["progress"] == [rank["local_bytes"]] * 2

    plain = load_hf(exported)
    save_hf(plain, tmp_path / "plain", max_shard_bytes=20_000)
    save_hf(plain, tmp_path / "plain-bf16", dtype=torch.bfloat16)
    assert contents(out / "sharded") == contents(tmp_path / "plain")
    assert contents(out / "sharded-bf16") == contents(tmp_path / "plain-bf16")
    assert_same_bits(tensors_of(out / "sharded"), tensors)

    # rank 0's failures reach both, and neither hangs or touches the export
    assert [rank["calls"] for rank in found] == [3, 0]
    assert [rank["disk"][0] for rank in found] == ["OSError", "RuntimeError"]
    assert [rank["tokenizer"][0] for rank in found] == ["ValueError", "ValueError"]
    for rank in found:
        assert "No space left on device" in rank["disk"][1] and "tokenizer.json" in rank["tokenizer"][1]
    assert not found[0]["imports_transformers"]
    assert_nothing_left(out, "rank-0.json", "rank-1.json", "sharded", "sharded-bf16")
