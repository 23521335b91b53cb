"""Classifiers of quality: fitted to the tests' own pages, what is refused, and the same labels on every way."""

import datetime
import json
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from polish_texts import PAGES, small_set
from pyarrow import parquet

from bench import data as bench_data
from bench.lib.polish import DAMAGES
from halny.model import prepare_data, quality
from halny.model.data import documents as reading
from halny.model.data import label as labelling
from halny.model.data import morphology, quality_fit
from halny.model.data.dataset import DataError
from halny.model.data.label import label
from halny.model.data.quality import Calibration, Labeller, load_classifier, softmax
from halny.model.data.quality_fit import calibrate, calibration_error, fit, likeliest, report_on
from halny.model.prepare_data import prepare

pytest.importorskip("xgboost")
pytest.importorskip("morfeusz2", reason="no wheel for Linux on Arm")
CLEAN = PAGES["prose_bees"]
CYRILLIC = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 5


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_lines(folder: Path) -> list[dict]:
    parts = sorted(folder.glob("part-*.jsonl.zst"))
    content = b"".join(pyarrow.CompressedInputStream(pyarrow.OSFile(str(part)), "zstd").read() for part in parts)
    return [json.loads(line) for line in content.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", small_set())


@pytest.fixture(scope="module")
def classifier(labelled, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "quality"
    fit([labelled], out, progress=False)
    return out


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[Path]:
    """Documents of all kinds in three files, cut into many blocks; some are none."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4000)
    rows = [{"id": i, "text": row["text"]} for i, row in enumerate(small_set(seed=5))]
    rows[7] |= {"text": ""}
    rows[9] |= {"text": CYRILLIC}
    rows[11] |= {"text": "12 345, 67 !"}
    files = [write_lines(tmp_path / f"corpus/{name}.jsonl", rows[i::3]) for i, name in enumerate("abc")]
    files[1].write_text(files[1].read_text() + "no JSON\n")
    return files


LOW = [{"text": f"słowo numer {i}", "quality": "LOW"} for i in range(50)]

# --- fit --------------------------------------------------------------------------------------------------------------


def test_fit_tells_pages_apart_and_says_how_well(classifier, capsys):
    manifest = load_classifier(classifier).manifest
    held_out = manifest["report"]["held_out"]
    assert manifest["documents"] == {
        **{"read": 210, "conflicting": 0, "repeated": 0, "LOW by rule": 0},
        **{"HIGH": 70, "MEDIUM": 70, "LOW": 70},
    }
    assert 20 < held_out["documents"] == sum(map(sum, held_out["confusion"])) < 70
    assert held_out["accuracy"] > 0.8 and held_out["macro_f1"] > 0.8 and held_out["calibration_error"] < 0.2
    assert sum(row["documents"] for row in held_out["reliability"]) == held_out["documents"]
    assert (classifier / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert set(contents(classifier)) == {"classifier.json", "model.json", "reliability.png"}
    said = quality.summary(manifest)
    for expected in ("70 HIGH, 70 MEDIUM, 70 LOW", "macro F1", "most telling: ", "HIGH with a probability above 0.9"):
        assert expected in said


def test_fit_has_the_same_bytes_in_any_order_with_any_workers(classifier, labelled, tmp_path):
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    random.Random(3).shuffle(rows)
    names = {"text": "content", "quality": "label"}
    rows = [{names[key]: value for key, value in row.items()} for row in rows]
    first = write_lines(tmp_path / "in/1.jsonl", rows[:90] + rows[20:30])  # ten of them twice
    parquet.write_table(pyarrow.Table.from_pylist(rows[90:]), tmp_path / "in/2.parquet")
    manifest = fit([first.parent], tmp_path / "out", text_key="content", label_key="label", workers=2, progress=False)
    assert manifest["documents"]["repeated"] == 10
    ours, theirs = contents(tmp_path / "out"), contents(classifier)
    assert ours["model.json"] == theirs["model.json"] and ours["reliability.png"] == theirs["reliability.png"]
    manifests = [json.loads(each.pop("classifier.json")) for each in (ours, theirs)]
    counts = [manifest.pop("documents") for manifest in manifests]
    assert manifests[0] == manifests[1] and counts[0] == counts[1] | {"read": 220, "repeated": 10}


def test_another_seed_is_another_split(labelled, classifier, tmp_path):
    fit([labelled], tmp_path / "out", seed=1, progress=False)
    one, other = (load_classifier(path) for path in (classifier, tmp_path / "out"))
    assert one.manifest["report"]["held_out"]["confusion"] != other.manifest["report"]["held_out"]["confusion"]
    assert one.fingerprint != other.fingerprint


def test_two_labels_are_enough(labelled, tmp_path):
    rows = [json.loads(line) for line in labelled.read_text().splitlines() if "MEDIUM" not in line]
    manifest = fit([write_lines(tmp_path / "x.jsonl", rows)], tmp_path / "out", progress=False)
    assert manifest["classes"] == ["HIGH", "LOW"] and manifest["report"]["held_out"]["accuracy"] > 0.8
    assert Labeller(load_classifier(tmp_path / "out")).label([CLEAN])[0].quality == "HIGH"


def test_fit_can_be_stopped_while_trees_grow(labelled, tmp_path):
    code = "import sys; from halny.model import quality; from halny.model.data import quality_fit\n"
    code += "quality_fit.ROUNDS = 10**9\nsys.exit(quality.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fit", str(labelled), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "fitting" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "quality: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_texts_with_several_labels_and_without_words_are_left_out(labelled, tmp_path):
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    rows += [rows[0] | {"quality": "HIGH" if rows[0]["quality"] != "HIGH" else "LOW"}]
    rows += [{"text": CYRILLIC, "quality": "HIGH"}, {"text": "1 2 3", "quality": "LOW"}]
    manifest = fit([write_lines(tmp_path / "x.jsonl", rows)], tmp_path / "out", progress=False)
    assert manifest["documents"]["conflicting"] == 2 and manifest["documents"]["LOW by rule"] == 2
    assert sum(manifest["documents"][name] for name in ("HIGH", "MEDIUM", "LOW")) == 209
    said = quality.summary(manifest)
    assert "left out 2 that have one text and several labels" in said and "left out 2 that have no word" in said


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows + [{"text": i, "quality": "high"} for i in "abc"], "unknown .*: 'high' .3 documents.;"),
        (lambda rows: [{"text": "x"}, *rows], "x.jsonl:1: no label under 'quality' .keys of this document: 'text'.;"),
        (lambda rows: [row for row in rows if row["quality"] == "HIGH"], "only HIGH among the labelled documents"),
        (lambda rows: [r for r in rows if r["quality"] != "LOW"] + LOW[:49], "49 different documents are labelled LOW"),
        (lambda rows: [*rows, {"text": "", "quality": "LOW"}], "x.jsonl:211: an empty document; remove it .labelled"),
        (lambda rows: [], "no label at all"),
        (lambda rows: [row | {"quality": 1} for row in rows], "unknown labels .*'1' .210 documents."),
    ],
    ids=["unknown", "no label", "one class", "few", "empty", "nothing", "numbers"],
)  # fmt: skip
def test_fit_refuses_before_it_measures(labelled, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(quality_fit, "measure", None)
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    path = write_lines(tmp_path / "x.jsonl", change(rows))
    with pytest.raises(DataError, match=said) as refused:
        fit([path], tmp_path / "out", progress=False)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_too_few_that_can_be_judged(labelled, tmp_path):
    rows = [json.loads(line) for line in labelled.read_text().splitlines() if '"LOW"' not in line]
    rows += [{"text": f"{i} {i}", "quality": "LOW"} for i in range(60)] + [{"text": "Ala ma kota.", "quality": "LOW"}]
    with pytest.raises(DataError, match="1 different documents are labelled LOW"):
        fit([write_lines(tmp_path / "x.jsonl", rows)], tmp_path / "out", progress=False)


# --- calibration ------------------------------------------------------------------------------------------------------


def drawn(n: int, shares: list[float], temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Margins `temperature` times as large as the truth is sure of, of labels of which so many are of each class."""
    rng = np.random.default_rng(0)
    y = rng.choice(len(shares), n, p=shares)
    x = rng.normal(size=(n, len(shares))) + 2.0 * np.eye(len(shares))[y]
    return temperature * 2.0 * x, y  # log-likelihoods of unit normals at 2 and at 0, but for a constant


def test_calibration_finds_temperature_and_shares():
    shares, temperature = [0.7, 0.2, 0.1], 3.0
    margins, y = drawn(20_000, shares, temperature)
    found = likeliest(margins, y)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.biases == pytest.approx(np.log(np.array(shares) / shares[-1]), abs=0.15)
    calibrated = found.probabilities(margins)
    assert calibration_error(calibrated, y) < 0.01 < 0.05 < calibration_error(softmax(margins), y)
    assert calibrated.mean(0) == pytest.approx(shares, abs=0.01)


def test_calibration_is_used_only_where_it_helps():
    margins, y = drawn(3000, [0.5, 0.3, 0.2], 4.0)
    fold = np.arange(len(y)) % 5
    used, errors = calibrate(margins, y, fold)
    assert errors["after"] < errors["before"] and used.temperature > 2
    sure = 50.0 * np.eye(3)[y]
    assert calibrate(sure, y, fold) == (Calibration(1.0, [0.0] * 3), {"before": 0.0, "after": 0.0})


def test_report_by_hand():
    p = np.array([[0.95, 0.05, 0], [0.92, 0.08, 0], [0.6, 0.4, 0], [0.1, 0.85, 0.05], [0, 0.3, 0.7], [0, 0.45, 0.55]])
    y = np.array([0, 1, 0, 1, 2, 1])
    report = report_on(p, y, ["HIGH", "MEDIUM", "LOW"])
    assert report["confusion"] == [[2, 0, 0], [1, 1, 1], [0, 0, 1]] and report["accuracy"] == round(4 / 6, 4)
    assert report["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3, abs=1e-4)
    assert report["HIGH, p > 0.9"] == {"documents": 2, "are HIGH": 1, "of HIGH": 2}
    rows = {row["from"]: (row["documents"], row["probability"], row["right"]) for row in report["reliability"]}
    assert rows == {0.5: (1, 0.55, 0), 0.6: (1, 0.6, 1), 0.7: (1, 0.7, 1), 0.8: (1, 0.85, 1), 0.9: (2, 0.935, 0.5)}
    assert report["calibration_error"] == pytest.approx((0.55 + 0.4 + 0.3 + 0.15 + 2 * 0.435) / 6, abs=1e-4)


# --- a classifier's folder --------------------------------------------------------------------------------------------


def changed(classifier: Path, out: Path, **values) -> Path:
    out.mkdir()
    for name, content in contents(classifier).items():
        (out / name).write_bytes(content)
    manifest = json.loads((out / "classifier.json").read_text())
    (out / "classifier.json").write_text(json.dumps(manifest | values))
    return out


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: (path / "classifier.json").unlink(), "no classifier.json in it; name a folder that .* fit made"),
        (lambda path: (path / "classifier.json").write_text('{"format": '), "cut or changed since the fit"),
        (lambda path: (path / "classifier.json").write_text("[]"), "cut or changed since the fit"),
        (lambda path: (path / "model.json").unlink(), "cut or changed since the fit .*No such file"),
        (lambda path: (path / "model.json").write_bytes((path / "model.json").read_bytes()[:-1]), "model.json was cut"),
        (lambda path: (path / "model.json").write_bytes(b"{}"), "was cut or changed since the fit .2 bytes, SHA-256"),
    ],
)
def test_a_spoiled_classifier_is_refused(classifier, tmp_path, spoil, said):
    path = changed(classifier, tmp_path / "copy")
    spoil(path)
    with pytest.raises(DataError, match=said) as refused:
        load_classifier(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"features_version": 0}, "its features_version is 0, and this halny knows 1; .* fit it again"),
        ({"format": "other"}, "its format is 'other'"),
        ({"features": ["log_words", "beauty"]}, "fitted with other features .*beauty"),
        ({"medians": {}}, "cut or changed since the fit .no 'log_characters'"),
        ({"classes": ["HIGH", "BEST", "LOW"]}, "of the classes .*BEST"),
        ({"calibration": {"temperature": 1.0}}, "cut or changed since the fit"),
        ({"calibration": {"temperature": 9.0, "biases": [0.0] * 3}}, "reads its trees otherwise"),
    ],
)
def test_another_version_is_refused(classifier, tmp_path, values, said):
    with pytest.raises(DataError, match=said):
        load_classifier(changed(classifier, tmp_path / "copy", **values))


def test_the_fingerprint_is_of_what_labels_depend_on(classifier, tmp_path):
    one = load_classifier(classifier).fingerprint
    report = {"report": {}, "documents": {}}
    assert load_classifier(changed(classifier, tmp_path / "1", **report)).fingerprint == one
    other = {"calibration": {"temperature": 2.0, "biases": [0.0] * 3}}
    whole = load_classifier(classifier)
    assert replace(whole, manifest=whole.manifest | other).fingerprint != one


def test_another_dictionary_is_said(classifier, tmp_path, capsys):
    copy = changed(classifier, tmp_path / "copy", morphology="morfeusz2 1.0, old")
    files = [write_lines(tmp_path / "x.jsonl", [{"text": CLEAN}])]
    label(files, tmp_path / "out", copy)
    prepare(files, tmp_path / "data", quality=copy, keep=["quality!=LOW"], val_fraction=0)
    said = capsys.readouterr().err
    assert (
        len(re.findall("was fitted with morfeusz2 1.0, old, and here is morfeusz2 .*: probabilities may be", said)) == 2
    )


def test_without_morfeusz(classifier, labelled, tmp_path, monkeypatch):
    """As on Arm: what needs it is refused with the remedy, what does not works."""
    find_spec = morphology.importlib.util.find_spec
    monkeypatch.setattr(
        morphology.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "morfeusz2" else find_spec(name, *more),
    )
    monkeypatch.setitem(sys.modules, "morfeusz2", None)
    with pytest.raises(DataError, match=r"morphology needs morfeusz2.*fit --no-morphology"):
        load_classifier(classifier)
    with pytest.raises(DataError, match="fit --no-morphology"):
        fit([labelled], tmp_path / "none", progress=False)
    manifest = fit([labelled], tmp_path / "without", morphology=False, progress=False)
    assert manifest["morphology"] is None and manifest["report"]["held_out"]["accuracy"] > 0.8
    assert Labeller(load_classifier(tmp_path / "without")).label([CLEAN])[0].quality == "HIGH"


def test_an_xgboost_that_reads_the_trees_otherwise_is_refused(classifier, tmp_path):
    """As 3.0 does: it takes what 3.2 wrote, without a word, and leaves out the share of each class."""
    report = json.loads((classifier / "classifier.json").read_text())["of_medians"]
    copy = changed(classifier, tmp_path / "copy", of_medians=np.roll(report, 1, axis=1).tolist())
    with pytest.raises(
        DataError, match=r"XGBoost \d.* reads its trees otherwise than the one that wrote them .install xgboost-cpu 3"
    ):
        load_classifier(copy)


def test_without_xgboost(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(DataError, match=r"quality needs xgboost; pip install 'halny\[quality\]'"):
        load_classifier(classifier)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_label_does_not_depend_on_its_company(classifier):
    labeller, texts = Labeller(load_classifier(classifier)), list(PAGES.values())
    together = labeller.label(texts)
    assert together == [Labeller(load_classifier(classifier)).label([text])[0] for text in texts]
    assert together == labeller.label(texts[::-1])[::-1] and labeller.label([]) == []
    assert all(0.33 <= given.probability <= 1 for given in together)


def test_damage_that_it_never_saw_is_not_high(classifier):
    labeller = Labeller(load_classifier(classifier))
    assert labeller.label([CLEAN])[0].quality == "HIGH"
    for kind in DAMAGES:
        given = labeller.label([DAMAGES[kind](CLEAN, random.Random(0))])[0]
        assert given.quality != "HIGH" or given.probability < 0.9, kind


@pytest.mark.parametrize("text", [CYRILLIC, "中文维基百科 " * 40, "12 345", "!!! ???", "🙂" * 20, " \n"])
def test_what_no_training_set_knows_is_low_by_rule(classifier, text):
    assert Labeller(load_classifier(classifier)).label([text]) == [("LOW", 1.0, True)]


def test_label_keeps_documents_and_counts_what_is_none(classifier, corpus, tmp_path, capsys):
    record = label(corpus, tmp_path / "out", classifier)
    rows = read_lines(tmp_path / "out")
    read = [
        row
        for path in corpus
        for line in path.read_text().splitlines()
        if line != "no JSON"
        for row in [json.loads(line)]
    ]
    assert [{key: row[key] for key in ("id", "text")} for row in rows] == [row for row in read if row["text"]]
    assert all(list(row) == ["id", "text", "quality", "quality_prob"] for row in rows)
    labels = {name: sum(row["quality"] == name for row in rows) for name in ("HIGH", "MEDIUM", "LOW")}
    sure = {name: sum(row["quality"] == name and row["quality_prob"] > 0.9 for row in rows) for name in labels}
    assert (record["labels"], record["probability above 0.9"]) == (labels, sure) and min(labels.values()) > 50
    assert record["input"] == {"documents": 211, "skipped": {"empty": 1, "not JSON": 1}} and record["by_rule"] == 2
    assert record["classifier"] == load_classifier(classifier).fingerprint
    assert json.loads((tmp_path / "out/labels.json").read_text()) == record
    said = capsys.readouterr().err
    for expected in (
        f"HIGH   {labels['HIGH']} ({sure['HIGH']} with a prob",
        "skipped 1: empty",
        "209 documents labelled",
    ):
        assert expected in said


def test_label_has_the_same_bytes_with_any_workers(classifier, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "PART_BYTES", 50_000)
    for n in (None, 1, 2):
        label(corpus, tmp_path / f"out-{n}", classifier, workers=n, progress=False)
    assert contents(tmp_path / "out-None") == contents(tmp_path / "out-1") == contents(tmp_path / "out-2")
    assert len(list((tmp_path / "out-1").glob("part-*.jsonl.zst"))) > 2


def test_label_of_every_kind_of_file(classifier, tmp_path, capsys):
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = {"date": [moment], "raw": [b"\xc4\x85\xff"], "body": [CLEAN], "quality": ["old"], "n": [[1, {"a": None}]]}
    table["n"] = [[1, 2]]
    parquet.write_table(pyarrow.table(table), tmp_path / "1.parquet")
    (tmp_path / "2.txt").write_text(CLEAN)
    line = {"body": CLEAN, "odd": "\ud800", "big": 10**30, "quality_prob": 3}
    (tmp_path / "3.jsonl").write_text(json.dumps(line) + "\n")
    record = label(
        [tmp_path / f"{name}" for name in ("1.parquet", "2.txt", "3.jsonl")],
        tmp_path / "out",
        classifier,
        text_key="body",
    )
    rows = read_lines(tmp_path / "out")
    made = {key: rows[1][key] for key in ("quality", "quality_prob")}
    assert rows[0] == {"body": CLEAN, "date": "2024-01-02 03:04:05", "raw": "ą\ufffd", "n": [1, 2], **made}
    assert rows[1] == {"body": CLEAN, **made} and rows[2] == line | made
    assert record["replaced"] == 2 and "2 had quality or quality_prob before, replaced here" in capsys.readouterr().err


def test_label_refuses(classifier, corpus, tmp_path):
    for options, said in (
        (dict(strict=True), r"b.jsonl:3: an empty document.*refused because of --strict"),
        (dict(workers=0), "--workers 0: must be a positive number"),
        (dict(text_key="body"), "no documents in the input .skipped 210: no such key"),
    ):
        with pytest.raises(DataError, match=said):
            label(corpus, tmp_path / "out", classifier, progress=False, **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    with pytest.raises(DataError, match="exists and is not empty"):
        label(corpus, corpus[0].parent, classifier, progress=False)


@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_label_goes_on_after_an_interruption(classifier, labelled, corpus, tmp_path, monkeypatch, capsys, at):
    monkeypatch.setattr(labelling, "PART_BYTES", 20_000)
    label(corpus, tmp_path / "whole", classifier, progress=False)
    label_block = labelling.label_block

    def stopped(labeller, text_key, block):
        if any(Path(part.file).stem == at and part.number > 10 for part in block.parts):
            raise KeyboardInterrupt
        return label_block(labeller, text_key, block)

    arguments = ["label", *map(str, corpus), "--model", str(classifier), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "label_block", stopped)
        assert quality.main(arguments) == 130
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert ("nothing was written" if at == "a" else "input files are done and kept in") in said
    assert quality.main(arguments) == 0
    assert ("going on after" in capsys.readouterr().err) == (at != "a")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if at == "b":  # another classifier must not go on with it
        with monkeypatch.context() as patch:
            patch.setattr(labelling, "label_block", stopped)
            assert quality.main([*arguments[:-1], str(tmp_path / "other")]) == 130
        fit([labelled], tmp_path / "classifier", seed=1, progress=False)
        arguments[arguments.index("--model") + 1] = str(tmp_path / "classifier")
        assert quality.main([*arguments[:-1], str(tmp_path / "other")]) == 2
        assert "interrupted preparation of other settings or inputs (classifier was" in capsys.readouterr().err


# --- prepare_data --quality -------------------------------------------------------------------------------------------

KEEP = ["quality=HIGH", "quality_prob>0.9"]


@pytest.mark.parametrize("workers", [None, 2])
def test_preparing_labels_on_the_way_to_the_same_tokens(classifier, corpus, tmp_path, workers):
    record = label(corpus, tmp_path / "labelled", classifier, progress=False)
    prepare([tmp_path / "labelled"], tmp_path / "1", keep=KEEP, val_fraction=0.2, progress=False)
    options = dict(quality=classifier, keep=KEEP, val_fraction=0.2, workers=workers, progress=False)
    prepare(corpus, tmp_path / "2", **options)
    ones, others = contents_of_data(tmp_path / "1"), contents_of_data(tmp_path / "2")
    manifests = [json.loads(each.pop("manifest.json")) for each in (ones, others)]
    assert ones == others and len(ones) > 3
    counts = [manifest["input"] for manifest in manifests]
    assert counts[0]["dropped"] == counts[1]["dropped"] and counts[1]["skipped"] == {"empty": 1, "not JSON": 1}
    kept = sum(manifests[1]["splits"][split]["documents"] for split in ("train", "val"))
    assert kept == record["probability above 0.9"]["HIGH"] == 209 - sum(counts[1]["dropped"].values())
    fingerprint = load_classifier(classifier).fingerprint
    assert manifests[1]["settings"]["quality"]["fingerprint"] == fingerprint == record["classifier"]


def contents_of_data(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_preparing_asks_metadata_of_the_input_and_labels_of_the_classifier(classifier, tmp_path):
    rows = [{"text": CLEAN, "quality": "LOW", "lang": "pl"}, {"text": PAGES["menu"], "quality": "HIGH", "lang": "pl"}]
    rows += [{"text": PAGES["prose_bridge"], "lang": "de"}]
    files = [write_lines(tmp_path / "x.jsonl", rows)]
    prepare(
        files, tmp_path / "out", quality=classifier, keep=["lang=pl", "quality=HIGH"], val_fraction=0, progress=False
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["input"]["dropped"] == {"not lang=pl": 1, "not quality=HIGH": 1}
    assert manifest["splits"]["train"]["documents"] == 1
    (tmp_path / "page.txt").write_text(CLEAN)  # which has no metadata but what is made
    prepare(
        [tmp_path / "page.txt"],
        tmp_path / "txt",
        quality=classifier,
        keep=["quality=HIGH"],
        val_fraction=0,
        progress=False,
    )
    with pytest.raises(DataError, match=r"--keep lang=pl: .*page.txt has no metadata"):
        prepare([tmp_path / "page.txt"], tmp_path / "2", quality=classifier, keep=["lang=pl", *KEEP], progress=False)


def test_preparing_refuses_a_classifier_that_nothing_asks(classifier, corpus, tmp_path, capsys):
    arguments = [*map(str, corpus), "--out", str(tmp_path / "out"), "--quality"]
    assert prepare_data.main([*arguments, str(classifier), "--keep", "lang=pl"]) == 2
    assert "no --keep asks for what it labels; add --keep quality=HIGH" in capsys.readouterr().err
    assert prepare_data.main([*arguments, str(tmp_path), "--keep", "quality=HIGH"]) == 2
    assert "no classifier.json in it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare_data.main(["--merge", "a", "b", "--out", "c", "--quality", str(tmp_path)])
    assert "--merge joins documents as they were prepared, without --quality" in capsys.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------


def test_explain(classifier, tmp_path, capsys):
    for name, text in (("clean", CLEAN), ("damaged", DAMAGES["markup"](CLEAN, random.Random(0))), ("other", CYRILLIC)):
        (tmp_path / name).write_text(text)
        assert quality.main(["explain", str(tmp_path / name), "--model", str(classifier)]) == 0
        said, (given,) = capsys.readouterr().out, Labeller(load_classifier(classifier)).label([text])
        assert said.startswith(f"{given.quality}, probability {given.probability:.4f}\n")
        assert ("without being judged" in said) == given.by_rule
        assert (f"towards {given.quality}" in said) == (not given.by_rule)
        assert "share of words that the dictionary does not know" in said


def test_contributions_add_up_to_the_margin(classifier):
    labeller = Labeller(load_classifier(classifier))
    base = None
    for text in PAGES.values():
        values = labeller.features.measure(text)
        margins = labeller.trees.booster.inplace_predict(values[None], predict_type="margin")[0]
        rest = margins - labeller.trees.contributions(values).sum(1)
        base = rest if base is None else base
        assert rest == pytest.approx(base, abs=1e-3)  # the average over the training set


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "quality: the following arguments are required: fit|label|explain; see --help"),
        (["train"], "invalid choice: 'train'"),
        (["fit", "x.jsonl"], "the following arguments are required: --out; see --help"),
        (["fit", "none.jsonl", "--out", "o"], "none.jsonl: no such file or folder"),
        (["explain", "none.txt", "--model", "o"], "none.txt: cannot be read (No such file or directory)"),
        (["label", "none.jsonl", "--model", "o", "--out", "p"], "none.jsonl: no such file or folder"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = None
    with suppress(SystemExit):
        code = quality.main(arguments)
    printed = capsys.readouterr().err
    assert code in (2, None) and said in printed and len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [[], ["fit"], ["label"], ["explain"]])
def test_help_teaches_and_loads_nothing_heavy(verb):
    code = f"import sys; from halny.model.quality import main\ntry: main({[*verb, '--help']})\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Exit codes: 0 done" in done.stdout and len(done.stdout.splitlines()) > 12
    assert not {"xgboost", "morfeusz2", "torch", "transformers", "tokenizers", "matplotlib"} & set(done.stderr.split())


def test_the_trainer_imports_none_of_it():
    code = "import train, sys; sys.exit(bool({'halny.model.data.quality', 'xgboost', 'morfeusz2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_bench_runs(labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "ROUNDS", 1)
    (tmp_path / "labelled.jsonl").write_bytes(labelled.read_bytes())
    write_lines(tmp_path / "prose.jsonl", [{"text": text} for text in PAGES.values()])
    bench_data.quality_rates(tmp_path, tmp_path)
    rows = re.findall(r"^(tokenizer|features|labels).*?((?: +\d+\.\d\d){4})$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == ["tokenizer", *["features", "labels"] * 2]
    assert all(float(rate) > 0 for _, rates in rows for rate in rates.split())
