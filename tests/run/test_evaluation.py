"""Evaluation: the numbers against the model called by hand, on any number of ranks; and the best checkpoint kept."""

import fcntl
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from runs import SMALL, checkpoint, lines, metrics, ranks_run, saved_steps, snapshot, status

from halny.model.convert import load_hf
from halny.model.data.batches import Corpus
from halny.model.data.dataset import DataError, Dataset
from halny.model.data.encode import held_out
from halny.model.data.merge import merge
from halny.model.data.writer import write_dataset
from halny.model.exits import REFUSED
from halny.model.prepare_data import prepare
from halny.model.run.evaluation import EvalSets, parse_named, perplexity_in_words


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict:
    """Folders of documents, and the documents: "de" has both splits, "noise" is nothing one can learn."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(3)
    lengths = {"de": [[30, 90, 7, 64, 65, 2], [40, 129]], "noise": [[300, 21], []]}
    found = {}
    for name, (train_lengths, val_lengths) in lengths.items():
        splits = [[rng.integers(0, 256, n) for n in of] for of in (train_lengths, val_lengths)]
        write_dataset(splits[0], folder / name, vocab_size=256, val_documents=splits[1])
        found[name] = (folder / name, splits)
    return found


@pytest.fixture(scope="module")
def trained(small, sets, tmp_path_factory) -> tuple:
    """Four steps on one rank, and their command."""
    cwd = tmp_path_factory.mktemp("trained")
    command = [*SMALL, "--data", small, "--steps", 4, "--micro-batch", 1, "--run-dir", "r", "--eval-every", 2]
    command += ["--eval-data", *(f"{name}:{folder}" for name, (folder, _) in sets.items())]
    ranks_run(*command, cwd=cwd)
    return cwd, command


def by_hand(model, pieces: list[np.ndarray]) -> dict:
    """Loss, perplexity and accuracy over pieces of tokens, each a forward pass of its own, in fp64 sums."""
    loss = n = correct = 0.0
    for piece in pieces:
        x = torch.from_numpy(np.asarray(piece, np.int64))[None]
        out = model(x[:, :-1], x[:, 1:])
        loss, n, correct = loss + out.loss.item(), n + out.n_tokens.item(), correct + out.n_correct.item()
    return {"loss": loss / n, "perplexity": math.exp(loss / n), "accuracy": correct / n, "n": n}


def windows(documents: list[np.ndarray], seq_len: int = 64) -> list[np.ndarray]:
    stream = np.concatenate(documents) if documents else np.zeros(0)
    return [stream[i : i + seq_len + 1] for i in range(0, len(stream) - 1, seq_len)]


@torch.no_grad()
def test_the_same_numbers_on_1_2_and_4_ranks_each_token_once(small, sets, trained, tmp_path):
    cwd, command = trained
    last = [line for line in lines(cwd / "r") if "val_loss" in line][-1]
    assert last["step"] == 4 and len(last) == 1 + 3 * 3
    model = load_hf(cwd / "r/export", dtype=torch.float32)
    for name, (_, splits) in sets.items():
        truth = by_hand(model, windows(splits[0]) + windows(splits[1]))
        for metric in ("loss", "perplexity", "accuracy"):
            assert last[f"val_{name}_{metric}"] == pytest.approx(truth[metric], rel=1e-5), (name, metric)
    before = snapshot(cwd / "r")
    for ranks in (1, 2, 4):  # the sets have 9, 5 and 3 rows: uneven on two and on four
        shown = ranks_run(*command, "--eval-only", ranks=ranks, cwd=cwd).out
        after = snapshot(cwd / "r")
        found = json.loads(after.pop("evaluation.json"))
        assert found.pop("weights") == "step 4 of r" and found == last, ranks
        assert after.items() >= before.items() and after.keys() - before.keys() <= {"stacks"}
        assert f"noise at step 4: loss {last['val_noise_loss']:.4f}" in shown and "step      " not in shown


@torch.no_grad()
def test_a_hugging_face_folder_is_evaluated_without_a_run(sets, trained, tmp_path):
    cwd, _ = trained
    shutil.copytree(cwd / "r/export", tmp_path / "hf")
    command = [*SMALL, "--init-from", "hf", "--eval-only", "--eval-data", f"de:{sets['de'][0]}", "--micro-batch", 2]
    ranks_run(*command, "--run-dir", "new", ranks=2, cwd=tmp_path)
    ranks_run(*command, "--run-dir", "documents", "--documents", cwd=tmp_path)
    model = load_hf(tmp_path / "hf", dtype=torch.float32)
    _, (training, held_out) = sets["de"]
    found = json.loads((tmp_path / "new/evaluation.json").read_text())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["evaluation.json"]
    assert found["weights"] == "hf" and "val_loss" not in found
    assert found["val_de_loss"] == pytest.approx(by_hand(model, windows(training) + windows(held_out))["loss"])
    found = json.loads((tmp_path / "documents/evaluation.json").read_text())
    truth = by_hand(model, [piece for document in training + held_out for piece in windows([document])])
    assert found["val_de_loss"] == pytest.approx(truth["loss"]) and found["val_de_accuracy"] == truth["accuracy"]
    assert truth["n"] == sum(len(document) - 1 for document in training + held_out)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_over_a_kill(sets, tmp_path):
    """On noise a model gets worse as it learns something else, so an early checkpoint is the best."""
    write_dataset([np.arange(2000) % 40], tmp_path / "cycle", vocab_size=256)
    command = [*SMALL, "--data", "cycle", "--steps", 10, "--lr", "5e-3", "--save-every", 1, "--eval-every", 2]
    command += ["--run-dir", "r", "--keep", 1, "--warmup-steps", 0, "--eval-data", f"noise:{sets['noise'][0]}"]
    killed = ranks_run(*command, cwd=tmp_path, fault=("killed_before_manifest", "8"), codes=[-signal.SIGKILL])
    assert killed and saved_steps(tmp_path / "r") == [2, 7]
    out = ranks_run(*command, cwd=tmp_path).out
    scores = {line["step"]: line["val_noise_loss"] for line in lines(tmp_path / "r") if "val_noise_loss" in line}
    assert min(scores, key=scores.get) == 2 and len(metrics(tmp_path / "r")) == 10 and len(scores) == 5
    assert saved_steps(tmp_path / "r") == [2, 10]
    manifest = json.loads((tmp_path / "r/checkpoints/step-00000002/manifest.json").read_text())
    assert manifest["evaluation"]["val_noise_loss"] == scores[2]
    assert f"step-00000002: val_noise_loss {scores[2]:.4f}" in out and checkpoint(tmp_path / "r", 2)


def test_what_the_run_trains_on_decides_nothing(small, sets):
    corpus = Corpus([str(small)], 64)
    for named, decides in (
        ({"same": small}, "val_loss"),
        ({"de": sets["de"][0], "same": small}, "val_loss"),
    ):
        assert EvalSets(corpus, named, 64, False, Dataset).decides == decides
    alone = Corpus([str(sets["noise"][0])], 64)  # nothing held out
    found = EvalSets(alone, {"same": sets["noise"][0], "de": sets["de"][0]}, 64, False, Dataset)
    assert found.decides == "val_de_loss" and "the run trains on them" in found.describe()[0]
    assert "the run trains on them" not in found.describe()[1]
    assert EvalSets(alone, {"same": sets["noise"][0]}, 64, False, Dataset).decides is None


def test_evaluations_without_anything_to_evaluate_on_are_refused(sets, tmp_path):
    command = [*SMALL, "--data", sets["noise"][0], "--steps", 2, "--run-dir", "r"]  # of which nothing is held out
    refused = ranks_run(*command, "--eval-every", 1, cwd=tmp_path, codes=[REFUSED])
    assert "--eval-every 1: nothing of the data was held out" in refused.err
    assert not (tmp_path / "r/metrics.jsonl").exists()
    assert "a checkpoint every 1 steps, no evaluation" in ranks_run(*command, cwd=tmp_path).out


def test_a_run_that_goes_on_can_be_evaluated(trained, tmp_path):
    """Its lock is another's, and nothing in its folder changes."""
    cwd, command = trained
    shutil.copytree(cwd / "r", tmp_path / "r")
    (tmp_path / "r/checkpoints/.step-00000009.partial").mkdir()  # a save under way
    with (tmp_path / "r/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = snapshot(tmp_path / "r")
        out = ranks_run(*command, "--eval-only", "--out", "new/scores.json", cwd=tmp_path).out
        assert "evaluation new/scores.json" in out and snapshot(tmp_path / "r") == before
    found = json.loads((tmp_path / "new/scores.json").read_text())
    assert found["step"] == 4 and found["val_loss"] == pytest.approx(lines(cwd / "r")[-1]["val_loss"], rel=1e-6)
    for flags, words in (
        (["--out", "x.json"], "--out x.json belongs to --eval-only"),
        (["--eval-only", "--out", "new"], "--out new cannot be written"),
    ):
        assert words in ranks_run(*command, *flags, cwd=tmp_path, codes=[REFUSED]).err


def test_large_perplexities_are_readable():
    assert [perplexity_in_words(x) for x in (12345.67, 999_999.9, 1e6, 1.01e304)] == [
        "12,345.7", "999,999.9", "1.00e+06", "1.01e+304",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["de", "de:", ":x", "a b:x", "../x:y", "ü:x"])
def test_a_set_needs_a_name_and_a_folder(text):
    with pytest.raises(DataError, match=re.escape(text)):
        parse_named([text])


def test_refused_before_anything_is_written(small, sets, trained, tmp_path):
    cwd, command = trained
    rng = np.random.default_rng(1)
    write_dataset([rng.integers(0, 4000, 500)], cwd / "other", vocab_size=4000)
    write_dataset([rng.integers(0, 256, 500)], cwd / "flipped", vocab_size=256)
    content = bytearray((cwd / "flipped/train-00000.npy").read_bytes())
    content[-5] ^= 1
    (cwd / "flipped/train-00000.npy").write_bytes(content)
    before = snapshot(cwd)
    for flags, words in (
        (["--eval-data", "x:other"], ["--eval-data other", "4000", "256"]),
        (["--eval-data", "x:nowhere"], ["--eval-data nowhere"]),
        (["--eval-data", "x:flipped"], ["flipped", "train-00000.npy"]),
        (["--eval-data", f"x:{small}", f"x:{small}"], ["--eval-data", "two sets of the name x"]),
        (["--eval-only", "--run-dir", "new"], ["--eval-only", "no checkpoint in new", "--init-from"]),
        (["--eval-only", "--no-resume"], ["--eval-only and --no-resume"]),
        (["--eval-only", "--lr", "1"], ["--lr was 0.002 and is 1.0"]),
    ):
        refused = ranks_run(*command, *flags, cwd=cwd, codes=[REFUSED])
        assert refused.err.count("\n") == 1 and all(word in refused.err for word in words), refused.err
        assert {k: v for k, v in snapshot(cwd).items() if k[:4] not in ("out-", "err-")} == {
            k: v for k, v in before.items() if k[:4] not in ("out-", "err-")
        }
    assert status(cwd / "r")["state"] == "finished"


# --- bits per byte ----------------------------------------------------------------------------------------------------

WORDS = "the wind from the mountains żółw źdźbło gęślą jaźń and ten more words 0123456789"
VOCABULARY = ["<s>", "</s>", *map(chr, range(2, 127)), *"ąćęłńóśźż", "th", "the", "in", "ou", "an", "or", "źń"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict:
    """One corpus, prepared with BOS and EOS, without BOS, and without both; and a tokenizer that has merges."""
    from tokenizers import Tokenizer, models, processors

    folder, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(5)
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("o", "u"), ("a", "n"), ("o", "r"), ("ź", "ń")]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(VOCABULARY)}, merges=merges))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # as Mistral's
    (folder / "tokenizer").mkdir()
    made.save(str(folder / "tokenizer/tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(named))
    texts = [" ".join(rng.choice(WORDS.split(), n)) for n in rng.integers(1, 14, 60).tolist()]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {"folder": folder, "texts": texts, "held out": [text for text in texts if held_out(text, 0.4)]}
    for name, flags in {"both": {}, "no bos": {"bos": False}, "neither": {"bos": False, "eos": False}}.items():
        found[name] = folder / name.replace(" ", "-")
        options = dict(tokenizer=folder / "tokenizer", val_fraction=0.4, progress=False, **flags)
        prepare([folder / "x.jsonl"], found[name], **options)
    return found


@pytest.mark.parametrize("name, documents", [("both", True), ("both", False), ("no bos", True), ("neither", False)])
@torch.no_grad()
def test_bits_per_byte_of_the_text_alone(prepared, tmp_path, name, documents):
    """The bits of every token of text that is a target, by the bytes of those tokens, all counted here from scratch."""
    command = [*SMALL, "--data", prepared[name], "--steps", 2, "--eval-every", 2, "--run-dir", "r", "--micro-batch", 1]
    command += ["--documents"] * documents
    out = ranks_run(*command, "--eval-data", f"all:{prepared[name]}", cwd=tmp_path).out
    last = [line for line in lines(tmp_path / "r") if "val_loss" in line][-1]
    model = load_hf(tmp_path / "r/export", dtype=torch.float32)
    for key, splits in (("val", ["val"]), ("val_all", ["train", "val"])):
        nats, n_bytes = 0.0, 0
        for split in splits:
            stream = Dataset(prepared[name]).split(split)
            ids = stream.read(0, len(stream))
            texts = np.split(ids, stream.shards[0].ends[:-1]) if documents else [ids]
            for piece in (piece for text in texts for piece in windows([text])):
                x = torch.from_numpy(piece)[None]
                logits, labels = model(x[:, :-1])[0].double(), x[0, 1:]
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                nats += losses[labels > 1].sum().item()
                n_bytes += sum(len(VOCABULARY[i].encode()) for i in labels.tolist() if i > 1)
        assert last[f"{key}_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6), key
        if name == "both":
            chosen = prepared["texts" if key == "val_all" else "held out"]
            assert n_bytes == sum(len(text.encode()) for text in chosen) > sum(map(len, chosen))
    shown = f"{last['val_bits_per_byte']:.4f} bits/byte"
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert shown in out and summary["best_evaluation"]["val_bits_per_byte"] == last["val_bits_per_byte"]
    if name == "both" and documents:
        for ranks in (2, 4):
            ranks_run(*command, "--eval-only", "--eval-data", f"all:{prepared[name]}", ranks=ranks, cwd=tmp_path)
            found = json.loads((tmp_path / "r/evaluation.json").read_text())
            assert {key: found[key] for key in last} == last


def test_the_space_before_a_text_is_no_byte_of_it(prepared, tmp_path):
    """Mistral's tokenizer puts it there, so a first token that nothing predicts has a byte less than its piece."""
    from tokenizers import Tokenizer

    prepare([prepared["folder"] / "x.jsonl"], tmp_path / "data", bos=False, val_fraction=0.4, progress=False)
    pieces = Tokenizer.from_file(str(tmp_path / "data/tokenizer/tokenizer.json"))
    first = [pieces.encode(text, add_special_tokens=False).tokens[0] for text in prepared["held out"]]
    assert all(piece.startswith("▁") for piece in first) and len({*first}) > 5
    sizes = [len(text.encode()) for text in prepared["held out"]]
    for documents, unpredicted in ((True, first), (False, first[:1])):
        sets = EvalSets(Corpus([str(tmp_path / "data")], 64, documents), {}, 64, documents, Dataset)
        without = sum(len(piece.removeprefix("▁").encode()) for piece in unpredicted)
        assert sets.texts["val"] == (sum(sizes) - without, (2,))


def test_special_tokens_that_texts_spell_out_are_text(prepared, tmp_path):
    path, chats = tmp_path / "x.jsonl", ["<s>one</s><s>two</s>", "plain ź", "more</s>"] * 9
    path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(chats)))
    options = dict(tokenizer=prepared["folder"] / "tokenizer", val_fraction=0.4, progress=False)
    prepare([path], tmp_path / "spelled", special_tokens=True, **options)
    prepare([path], tmp_path / "text", **options)
    for name, markers in (("spelled", ()), ("text", (0, 1))):
        data = Dataset(tmp_path / name)
        sets = EvalSets(Corpus([str(data.path)], 64, True), {}, 64, True, Dataset)
        assert sets.texts["val"] == (data.n_bytes("val"), markers) and data.n_bytes("val") > 100
    merge([tmp_path / "spelled", prepared["both"]], tmp_path / "merged", progress=False)
    assert Dataset(tmp_path / "merged").markers == ()
    for names, markers in ((["both", "neither"], (0, 1)), (["both"], ())):
        sources = [f"{prepared[name]}:1" for name in names] + [f"{tmp_path / 'spelled'}:1"] * (not markers)
        sets = EvalSets(Corpus(sources, 64), {}, 64, False, Dataset)
        assert sets.texts["val"].markers == markers


def test_data_without_a_count_of_bytes_say_so_and_work(prepared, sets, tmp_path):
    shutil.copytree(prepared["both"], tmp_path / "old")
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    for record in manifest["splits"].values():
        del record["bytes"]
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest))
    command = [*SMALL, "--data", "old", "--steps", 1, "--eval-every", 1, "--run-dir", "r"]
    out = ranks_run(*command, "--eval-data", f"new:{prepared['both']}", cwd=tmp_path).out
    (last,) = (line for line in lines(tmp_path / "r") if "val_loss" in line)
    assert "val_bits_per_byte" not in last and last["val_new_bits_per_byte"] > 0
    assert "evaluated  val: no bits per byte, since the data do not say how many bytes their text has" in out


def test_bits_per_byte_are_those_of_lm_evaluation_harness(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM

    command = [*SMALL, "--data", prepared["both"], "--documents", "--seq-len", 128, "--steps", 6, "--lr", "1e-2"]
    ranks_run(*command, "--run-dir", "r", "--eval-every", 6, cwd=tmp_path)
    (ours,) = (line["val_bits_per_byte"] for line in lines(tmp_path / "r") if "val_loss" in line)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": text}) + "\n" for text in prepared["held out"]))
    task = {
        "task": "held_out", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(held)}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    # By itself it puts BOS before a text, as the tokenizer has it, and then its own BOS before that.
    options = dict(device="cpu", dtype="float32", batch_size=4, add_bos_token=False)
    lm = HFLM(pretrained=str(tmp_path / "r/export"), **options)
    found = harness.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]["held_out"]
    print(f"bits per byte: ours {ours:.7f}, lm_eval's {found['bits_per_byte,none']:.7f}")
    assert found["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)
