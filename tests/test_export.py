"""python -m halny.model.export: from a checkpoint to a folder that transformers and lm-evaluation-harness load."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import REPO, SMALL, checkpoint, flip_a_bit, largest_shard, ranks_run, snapshot

from halny.model import convert, export
from halny.model.convert import load_hf, pieces, save_hf, write_hf
from halny.model.data.writer import write_dataset
from halny.model.exits import FAILED, FINISHED, REFUSED
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.checkpoint import checksum_line

TEXT = "The wind comes down the mountains, and the trainer goes on.\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Six steps on three ranks, whose shards of 48, 112 and 256 rows are uneven; a tokenizer of 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    cwd = tmp_path_factory.mktemp("export")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (cwd / "tokenizer").mkdir()
    tokenizer.save(str(cwd / "tokenizer/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": letters[1], "eos_token": letters[2]}
    (cwd / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    ids = np.array(tokenizer.encode(TEXT * 8).ids)
    write_dataset([ids] * 4, cwd / "data", vocab_size=256, val_documents=[ids[:150]], tokenizer=cwd / "tokenizer")
    steps = ["--steps", 6, "--save-every", 3, "--keep", 2, "--lr", "1e-2", "--export-dtype", "bf16"]
    few = [*SMALL, "--batch-tokens", 384, *steps]
    ranks_run(*few, "--data", cwd / "data", "--run-dir", "r", ranks=3, cwd=cwd)
    return cwd / "r"


def test_export_of_the_last_step_is_the_runs_own_to_the_bit(run_dir, tmp_path):
    assert export.main([str(run_dir), str(tmp_path / "out")]) == FINISHED
    own = snapshot(run_dir / "export")
    assert snapshot(tmp_path / "out") == own and {"tokenizer.json", "model.safetensors"} <= own.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_of_a_mid_run_checkpoint_in_fp32(run_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = run_dir / "checkpoints/step-00000003", tmp_path / "out"
    assert export.main([str(source), str(out), "--dtype", "fp32"]) == FINISHED
    weights = checkpoint(run_dir, 3)
    model = Mistral(PRESETS["test"])
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    save_hf(model, tmp_path / "expected", tokenizer=run_dir.parent / "data/tokenizer")
    assert snapshot(out) == snapshot(tmp_path / "expected")

    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.float32
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"]])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_lm_evaluation_harness_reads_it(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    assert export.main([str(run_dir), str(tmp_path / "out"), "--dtype", "fp32"]) == FINISHED
    lm = huggingface.HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=2)
    context, continuation = TEXT[:19], TEXT[19:34]  # the harness moves a space at the end of the one to the other
    asked = [
        Instance("loglikelihood", doc={}, arguments=(context, end), idx=i)
        for i, end in enumerate((continuation, "zzz"))
    ]
    (likely, _), (unlikely, _) = lm.loglikelihood(asked, disable_tqdm=True)

    tokens = torch.tensor([lm.tok_encode(context + continuation)])
    n = len(lm.tok_encode(context))
    logits = load_hf(tmp_path / "out")(tokens).log_softmax(-1)
    ours = logits[0, n - 1 : -1].gather(1, tokens[0, n:, None]).sum().item()
    assert likely == pytest.approx(ours, abs=1e-3) and unlikely < likely / len(continuation) * 3

    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    assert rolling[0] < likely


def test_write_hf_holds_one_file_at_a_time(tmp_path):
    config, torch_dtype = PRESETS["test"], torch.bfloat16
    model = Mistral(config)
    model.init_weights(0)
    weights = dict(model.named_parameters())
    files_before: list[int] = []

    def parameters():
        for name, _ in pieces(config):
            files_before.append(len(list(tmp_path.glob(".out.partial*/*.safetensors"))))
            yield name, weights[name].detach()

    write_hf(config, torch_dtype, parameters(), tmp_path / "out", max_shard_bytes=20_000)
    save_hf(model, tmp_path / "expected", dtype=torch_dtype, max_shard_bytes=20_000)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4 < files_before[-1]


def test_export_is_whole_or_not_at_all(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert export.main([str(run_dir), str(out)]) == FINISHED
    before, calls = snapshot(tmp_path), []

    def full(*arguments, **options):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    assert export.main([str(run_dir), str(out), "--dtype", "fp32"]) == FAILED
    assert calls and snapshot(tmp_path) == before and "No space left" in capsys.readouterr().err


def damaged(run_dir: Path, tmp_path: Path) -> Path:
    source = shutil.copytree(run_dir / "checkpoints/step-00000006", tmp_path / "step-00000006")
    flip_a_bit(shard := largest_shard(source), shard.stat().st_size - 5)
    return source


def without_a_shard(run_dir: Path, tmp_path: Path) -> Path:
    """All checksums are right, but the files do not make up the model."""
    source = shutil.copytree(run_dir / "checkpoints/step-00000006", tmp_path / "step-00000006")
    (gone := largest_shard(source)).unlink()
    manifest = json.loads((source / "manifest.json").read_text())
    del manifest["files"][gone.name]
    (source / "manifest.json").write_text(json.dumps(manifest))
    (source / "manifest.json.sha256").write_bytes(checksum_line((source / "manifest.json").read_bytes()))
    return source


def stranger_in_the_way(run_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    return run_dir


def no_run(_run_dir: Path, tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


@pytest.mark.parametrize(
    "make, words",
    [
        (damaged, ["step-00000006", "wrong checksum"]),
        (without_a_shard, ["step-00000006", "gap"]),
        (stranger_in_the_way, ["mine.txt"]),
        (no_run, ["nowhere"]),
    ],
)
def test_export_refuses(make, words, run_dir, tmp_path, capsys):
    source = make(run_dir, tmp_path)
    before = snapshot(tmp_path)
    assert export.main([str(source), str(tmp_path / "out")]) == REFUSED
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert snapshot(tmp_path) == before


def test_export_without_the_data_says_so_and_takes_a_named_tokenizer(run_dir, tmp_path):
    moved = shutil.copytree(run_dir, tmp_path / "moved/r")
    manifest = moved / "checkpoints/step-00000006/manifest.json"
    content = manifest.read_text().replace(str(run_dir.parent / "data"), "gone")
    manifest.write_text(content)
    manifest.with_name("manifest.json.sha256").write_bytes(checksum_line(content.encode()))

    command = [sys.executable, "-m", "halny.model.export", moved, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    assert "none found" in done.stdout and not (tmp_path / "out/tokenizer.json").exists()
    assert export.main([*map(str, command[3:]), "--tokenizer", str(run_dir.parent / "tokenizer")]) == FINISHED
    assert (tmp_path / "out/tokenizer.json").exists()
