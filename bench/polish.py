"""Labelled Polish text of Debian packages, for the quality classifier: prose HIGH, lists MEDIUM, damaged prose LOW.

    python bench/polish.py [--out DIR] [--debs FOLDER]

Downloads manpages-pl, libreoffice-help-pl and fortunes-pl (5.7 MB) with apt-get into FOLDER, unless they are there.
Writes into DIR:

    labelled.jsonl     {"text", "quality", "kind"}: kind says where a document is from, or how it was damaged
    prose.jsonl        {"text"} of all clean documents, to measure speed with
    one_clean.txt      a clean document that labelled.jsonl does not have
    one_unseen.txt     another such, with a damage that labelled.jsonl has nowhere

and prints how many documents and MB (10^6 bytes of text) there are of each label and kind. What is damage, and what
each kind is: lib/polish.py.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

from bench.lib.polish import CLEAN, DAMAGES, TRAINED, documents, fetch, labelled, part_of


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/polish"), help="(default: %(default)s)")
    parser.add_argument("--debs", type=Path, help="folder of the packages (default: DIR/debs)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = list(documents(fetch(args.debs or args.out / "debs")))
    clean = [document for document in found if document.kind in CLEAN]
    rows = list(labelled(found, args.seed))
    write_lines(args.out / "labelled.jsonl", rows)
    write_lines(args.out / "prose.jsonl", [{"text": document.text} for document in clean])

    rng = random.Random(args.seed)
    held_back = [
        document.text for document in clean if document.kind == "help" and part_of(document.text) == "held back"
    ]
    one, other = rng.sample(held_back, 2)
    unseen = rng.choice([kind for kind in DAMAGES if kind not in TRAINED])
    (args.out / "one_clean.txt").write_text(one + "\n")
    (args.out / "one_unseen.txt").write_text(DAMAGES[unseen](other, rng) + "\n")

    n_documents, n_bytes = Counter(), Counter()
    for row in rows:
        for key in ((row["quality"], row["kind"]), (row["quality"], "all")):
            n_documents[key] += 1
            n_bytes[key] += len(row["text"].encode())
    print(f"{'label':8} {'kind':20} {'documents':>10} {'MB':>7}")
    for quality in ("HIGH", "MEDIUM", "LOW"):
        for label, kind in sorted(key for key in n_documents if key[0] == quality):
            print(f"{label:8} {kind:20} {n_documents[label, kind]:10,} {n_bytes[label, kind] / 1e6:7.2f}")
    print(
        f"\n{len(clean):,} clean documents, {len(held_back):,} of help held back; one_unseen.txt is damaged by {unseen}"
    )


if __name__ == "__main__":
    main()
