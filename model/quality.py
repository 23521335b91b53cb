"""The quality of documents, HIGH, MEDIUM or LOW, by a classifier trained on yours: ``python -m halny.model.quality``.

    fit      labelled documents -> a classifier folder      model/data/quality_fit.py
    label    documents -> the same with their labels        model/data/label.py
    explain  one document -> what the classifier saw        here

Bielik-7B-v0.1 was trained on what such a classifier called HIGH with a probability above 0.9: an XGBoost model on 93
features of Polish text (SpeakLeash). Neither it nor its labels are public, so a team labels some thousand documents
itself. `prepare_data --quality` labels on the way, for `--keep`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from halny.model.data.command import Parser, exit_code
from halny.model.data.dataset import DataError
from halny.model.data.documents import ENDINGS, Fault, decode, read_text
from halny.model.data.features import FEATURES
from halny.model.data.label import label
from halny.model.data.quality import LABELS, SURE, Labeller, load_classifier
from halny.model.data.quality_fit import fit
from halny.model.durable import in_its_words

MOST_TELLING = 12  # features that are shown


def explain(text: str, folder: Path) -> str:
    """What a classifier makes of a text, to print (EXPLAIN below says what that is)."""
    classifier = load_classifier(folder)
    labeller = Labeller(classifier)
    classes, medians = classifier.manifest["classes"], classifier.manifest["medians"]
    values = labeller.features.measure(text)
    given = labeller.judge(values[None])[0]
    lines = [f"{given.quality}, probability {given.probability:.4f}"]
    if given.by_rule:
        lines.append("without being judged: it has no word, or most of its letters are of another script")
    else:
        probabilities = labeller.trees.probabilities(values[None])[0]
        others = ", ".join(f"{name} {p:.4f}" for name, p in zip(classes, probabilities, strict=True))
        lines.append(f"  {others}")
        moved = labeller.trees.contributions(values)[classes.index(given.quality)]
        order = np.argsort(-np.abs(moved), kind="stable")[:MOST_TELLING]
        heads = "".join(f"{'median of ' + name:>18}" for name in classes)
        for sign, towards in ((1, "towards"), (-1, "away from")):
            chosen = [i for i in order if sign * moved[i] > 0]
            if chosen:
                lines += ["", f"{towards + ' ' + given.quality:24}{'log-odds':>9}{'here':>12}{heads}"]
            for i in chosen:
                name = labeller.features.names[i]
                typical = "".join(f"{_short(x):>18}" for x in medians[name])
                lines.append(f"  {name:22}{moved[i]:+9.2f}{_short(values[i]):>12}{typical}  {FEATURES[i].definition}")
    lines += ["", f"{'all features':33}{'here':>12}  what it is"]
    lines += [
        f"  {feature.name:31}{_short(x):>12}  {feature.definition}"
        for feature, x in zip(FEATURES, values, strict=False)
    ]
    return "\n".join(lines)


def _short(x: float) -> str:
    return f"{x:.4g}"


def summary(manifest: dict) -> str:
    """What fit says at its end."""
    classes, report = manifest["classes"], manifest["report"]
    held_out, errors = report["held_out"], report["calibration_error_in_folds"]
    counts, width = manifest["documents"], 10
    lines = [
        f"documents: {', '.join(f'{counts[name]:,} {name}' for name in classes)}; {held_out['documents']:,} held out",
    ]
    for what, why in (
        ("repeated", "occurred before"),
        ("conflicting", "have one text and several labels"),
        ("LOW by rule", "have no word, or most letters of another script: always LOW"),
    ):
        if counts[what]:
            lines.append(f"  left out {counts[what]:,} that {why}")
    lines += [
        f"accuracy {held_out['accuracy']:.3f}, macro F1 {held_out['macro_f1']:.3f}, on those held out",
        "",
        f"{'labelled':{width}}" + "".join(f"{'as ' + name:>{width}}" for name in classes),
    ]
    for name, row in zip(classes, held_out["confusion"], strict=True):
        lines.append(f"{name:{width}}" + "".join(f"{n:>{width},}" for n in row))
    used = "calibrated" if errors["after"] < errors["before"] else "not calibrated, which would not lower it"
    lines += [
        "",
        f"expected calibration error {held_out['calibration_error']:.3f} on those held out; in the folds "
        f"{errors['before']:.3f} before and {errors['after']:.3f} after calibration ({used})",
        f"{'probability':>16}{'documents':>12}{'mean':>8}{'right':>8}",
    ]
    for row in held_out["reliability"]:
        span = f"{row['from']:.1f} to {row['to']:.1f}"
        lines.append(f"{span:>16}{row['documents']:>12,}{row['probability']:>8.3f}{row['right']:>8.3f}")
    if kept := held_out.get(f"HIGH, p > {SURE}"):
        right = f"{kept['are HIGH']:,} of them are HIGH, of {kept['of HIGH']:,} that are"
        lines += ["", f"called HIGH with a probability above {SURE}: {kept['documents']:,} documents; {right}"]
    telling = list(report["most_telling"].items())[:MOST_TELLING]
    lines += ["", "most telling: " + ", ".join(f"{name} {share:.1%}" for name, share in telling)]
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------------------------------

DESCRIPTION = """Labels documents HIGH, MEDIUM or LOW, by a classifier that is trained on documents which you labelled.

    python -m halny.model.quality fit labelled.jsonl --out quality/
    python -m halny.model.quality explain page.txt --model quality/
    python -m halny.model.quality label corpus/ --model quality/ --out labelled/
    python -m halny.model.prepare_data corpus/ --out data/ --quality quality/ \\
        --keep quality=HIGH --keep "quality_prob>0.9"

The last one labels on the way; preparing labelled/ with the same --keep gives the same tokens.
Needs pip install 'halny[quality]'.
"""
FIT = f"""LABELLED is .jsonl, .jsonl.gz, .jsonl.zst or .parquet, or folders of them: documents with a text and one of
{", ".join(LABELS)}, at least 50 of each of two; some thousand are better. Take a random sample of the corpus to label:
probabilities hold for texts of which as many are HIGH as among those.

One document in five, chosen by a hash of its text, is kept from the training, and what is printed is measured on it.
The same documents in any order give the same bytes. DIR gets classifier.json, model.json and reliability.png.
"""
LABEL = """INPUT is what prepare_data reads. Documents come out as they came in, in their order, with "quality" and
"quality_prob" (the probability of that label) beside their own keys, as numbered .jsonl.zst files. Empty documents and
what is no document are counted and left out. Documents without a word, or with most letters of another script, are LOW
without being judged. The first million characters of a document decide.

Killed or stopped, the same command goes on after the input files that were finished. The same input gives the same
bytes, whatever the number of workers.
"""
EXPLAIN = """Shows the class and probability of a document, what moved it towards and away from that class, in log-odds,
beside the medians of each class that the classifier was fitted to, and all features with their definitions.
Contributions are TreeSHAP's: with the average over the training set they add up to the margin of the class.
"""
EPILOG = "Exit codes: 0 done; 1 a worker died; 2 refused; 130 interrupted; 143 terminated (no DIR unless 0)."


def _arguments() -> Parser:
    parser = Parser(prog="python -m halny.model.quality", description=DESCRIPTION, epilog=EPILOG)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="fit|label|explain", parser_class=Parser)
    reading = argparse.ArgumentParser(add_help=False)
    add = reading.add_argument
    add("--text-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes (default: as many as cores)")

    def verb(name: str, short: str, long: str, **options):
        return verbs.add_parser(name, help=short, description=long, epilog=EPILOG, **options)

    add = verb("fit", "train a classifier on labelled documents", FIT, parents=[reading]).add_argument
    add("inputs", nargs="+", type=Path, metavar="LABELLED", help="labelled documents, files or folders")
    add("--out", type=Path, required=True, metavar="DIR", help="classifier folder to make; must not exist, or be empty")
    add("--label-key", default="quality", metavar="KEY", help="key of the label (default: %(default)s)")
    alone = "leave out what needs morfeusz2: for machines without it (no wheel for Linux on Arm, GH200)"
    add("--no-morphology", dest="morphology", action="store_false", help=alone)
    add("--seed", type=int, default=0, metavar="N", help="of the split and the trees (default: %(default)s)")
    add = verb("label", "label documents", LABEL, parents=[reading]).add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=f"{', '.join(ENDINGS)} files or folders of them")
    add("--model", type=Path, required=True, metavar="DIR", help="classifier folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist, or be empty")
    add("--strict", action="store_true", help="refuse the input at the first document that would be skipped")
    add = verb("explain", "show what a classifier makes of one document", EXPLAIN).add_argument
    add("text", type=Path, metavar="TEXTFILE", help="a document, as UTF-8")
    add("--model", type=Path, required=True, metavar="DIR", help="classifier folder")
    return parser


def _read(file: Path) -> str:
    """A file as preparation reads a .txt, whatever its ending."""
    try:
        content = read_text(file)[0].data
        if isinstance(content, Fault):
            raise content
        return decode(content, str(file), 1)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({in_its_words(error)}); check the path") from None
    except Fault as fault:
        raise DataError(str(fault)) from None


def main(argv: list[str] | None = None) -> int:
    args = vars(_arguments().parse_args(argv))
    verb = args.pop("verb")

    def work() -> int:
        if verb == "fit":
            print(summary(fit(**args)))
        elif verb == "label":
            label(args.pop("inputs"), args.pop("out"), args.pop("model"), **args)
        else:
            print(explain(_read(args["text"]), args["model"]))
        return 0

    return exit_code("quality", work)


if __name__ == "__main__":
    sys.exit(main())
