"""Throughput and memory of data preparation, beside the tokenizer alone on the same cores; then of train.py's loader.

    python bench/data.py                       MB/s and tokens/s: tokenizer alone, prepare_data, the loader
    python bench/data.py --memory --mb 2000    prepare_data of a generated corpus, and the peak memory of each process
    python bench/data.py --quality runs/polish                 labels of real prose, beside the tokenizer
    python bench/data.py --quality runs/polish --memory        peak memory where hardly a word is met twice

The corpus is generated: Polish-looking and English words, whose frequencies fall as in language, in documents of some 3
kB, as .jsonl. "tokenizer alone" is `encode_batch_fast` of the `tokenizers` library on texts that are already in memory,
a process a core; no JSON, no ids turned into arrays, nothing written. It is what prepare_data is held to: at least 85%.
MB are 10^6 bytes of text; the best of the rounds. Start-up is counted in neither, and said apart. Core-seconds (user
and system time of all processes) tell what the clock cannot where others compute too.

The loader (model/data/batches.py) reads what was prepared, as one process with one thread of it does: samples of 4096,
eight a batch, a batch a step, onto the CPU, the files in the page cache. A token is a position of a batch.

--quality takes the folder that `python bench/polish.py` made: classifiers are fitted to its labelled.jsonl, with and
without morphology, and its prose.jsonl is what is measured and labelled, as it is and with four documents in one. "new
words" is the first time that a process meets these texts, and must analyse each of their word forms; "known" is each
later time, the best of the rounds. A corpus is between the two, the nearer to the second the larger it is.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROUNDS, ALONE_S = 3, 8  # of both, one after the other; seconds of tokenizer alone in each
N_TEXTS = 400  # of the pool that tokenizer alone goes round


def words(rng: random.Random) -> list[str]:
    """The words of CPython's language reference, and as many made of Polish syllables."""
    from pydoc_data.topics import topics

    english = sorted({word for text in topics.values() for word in text.split()})
    syllables = re.findall(
        r"\w+", "za żół cić gę ślą jaź prze szło ści nie dzie la mi ło wy brzmie krze sło po wie trze sze ć"
    )
    polish = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in english]
    out = english + polish
    rng.shuffle(out)
    return out


def document(rng: random.Random, vocabulary: list[str]) -> str:
    # Zipf's law: the k-th word about 1/k as often, by drawing the logarithm of k evenly
    n = rng.randint(100, 800)
    drawn = [vocabulary[int(len(vocabulary) ** rng.random()) - 1] for _ in range(n)]
    for i in range(12, n, 12):
        drawn[i] += rng.choice([".\n", ".", ",", "."])
    return " ".join(drawn)


def make_corpus(path: Path, megabytes: float) -> int:
    """Writes about that many bytes of .jsonl; the bytes of text in it."""
    rng, text_bytes = random.Random(0), 0
    vocabulary = words(rng)
    pool = [json.dumps({"text": document(rng, vocabulary)}, ensure_ascii=False).encode() for _ in range(2000)]
    with open(path, "wb") as file:
        while file.tell() < megabytes * 1e6:
            line = rng.choice(pool)
            file.write(line[:-2] + b" %d" % file.tell() + line[-2:] + b"\n")  # no two alike
            text_bytes += len(line) - len(b'{"text": ""}')
    return text_bytes


def tokenizer_alone(seconds: float, barrier, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    from halny.model.data.tokenizer import mistral_tokenizer

    backend = Tokenizer.from_str(mistral_tokenizer().files["tokenizer.json"].decode())
    backend.encode_special_tokens = True
    rng = random.Random(0)
    vocabulary = words(rng)
    texts = [document(rng, vocabulary) for _ in range(N_TEXTS)]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
    barrier.wait()
    began, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        done += size
        del encodings
    passed, cpu = time.perf_counter() - began, time.process_time() - cpu
    results.put((done / passed, done / size * tokens / passed, done / cpu))


def throughput_alone(n_processes: int, seconds: float) -> tuple[float, float, float]:
    """Bytes a second, tokens a second, bytes a second of one core's time."""
    context = get_context("spawn")
    barrier, results = context.Barrier(n_processes), context.Queue()
    processes = [context.Process(target=tokenizer_alone, args=(seconds, barrier, results)) for _ in range(n_processes)]
    for process in processes:
        process.start()
    rates = [results.get() for _ in processes]
    for process in processes:
        process.join()
    text, tokens, a_core = map(sum, zip(*rates, strict=True))
    return text, tokens, a_core / len(rates)


def run_prepare(corpus: Path, out: Path, n_workers: int, extra: list[str]) -> tuple[float, float, dict[str, int]]:
    """Seconds of a preparation, of cores, and the peak memory (VmHWM, bytes) of each of its processes."""
    command = [sys.executable, "-m", "halny.model.prepare_data", str(corpus), "--out", str(out)]
    began, cpu = time.perf_counter(), cpu_of_children()
    process = subprocess.Popen([*command, "--workers", str(n_workers), *extra])
    peaks = {}

    def watch() -> None:
        while process.poll() is None:
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                    pid, parent = int(fields["Pid"]), int(fields["PPid"])
                    if process.pid in (pid, parent) and "VmHWM" in fields:
                        name = "parent" if pid == process.pid else f"worker {pid}"
                        peaks[name] = int(fields["VmHWM"].split()[0]) * 1024
                except (OSError, ValueError, KeyError):
                    continue  # it ended meanwhile
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise SystemExit(f"prepare_data ended with code {code}")
    return time.perf_counter() - began, cpu_of_children() - cpu, peaks


def make_second_source(first: Path, out: Path) -> None:
    """The first half of a data folder's documents in the opposite order: other tokens to mix with."""
    from halny.model.data.dataset import Dataset
    from halny.model.data.writer import write_dataset

    dataset = Dataset(first)
    stream = dataset.split("train")
    ends = np.concatenate([[0], stream.shards[0].ends])[: stream.n_documents // 2].tolist()
    documents = (stream.read(start, end - start) for start, end in zip(ends[-2::-1], ends[:0:-1], strict=True))
    write_dataset(documents, out, vocab_size=dataset.vocab_size, tokenizer=dataset.tokenizer)


def loader_tokens_per_second(sources: list[str], documents: bool, seconds: float) -> float:
    import torch

    from halny.model.data.batches import Corpus, Loader
    from halny.model.data.order import share_of, step_numbers

    seq_len, micro_batch = 4096, 8
    corpus = Corpus(sources, seq_len, documents)
    steps = (share_of(step_numbers(step, micro_batch), 0, 1, micro_batch) for step in range(1, 10**9))
    loader = Loader(corpus, 0, steps, torch.device("cpu"))
    for _ in range(4):  # what is read ahead, and a little more
        next(loader)
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        tokens += sum(batch.tokens.numel() for batch in next(loader))
    return tokens / (time.perf_counter() - began)


def best_rate(work, texts: list[str], size: int) -> tuple[float, float]:
    """MB/s of the first call, and of the best of the ROUNDS after it."""
    rates = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        work(texts)
        rates.append(size / 1e6 / (time.perf_counter() - began))
    return rates[0], max(rates[1:])


def measurer(morphology: bool):
    from halny.model.data.features import Features

    features = Features(morphology)
    return lambda texts: [features.measure(text) for text in texts]


def labeller(classifier):
    from halny.model.data.quality import Labeller

    return Labeller(classifier).label


def quality_rates(folder: Path, scratch: Path) -> None:
    from halny.model.data.quality import load_classifier
    from halny.model.data.quality_fit import fit
    from halny.model.data.tokenizer import Encoder, mistral_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    short = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    long = ["\n\n".join(short[i : i + 4]) for i in range(0, len(short), 4)]
    size = sum(len(text.encode()) for text in short)
    sizes = [f"{size / len(texts) / 1e3:.1f} kB" for texts in (short, long)]
    print(f"{size / 1e6:.2f} MB of prose, in documents of {' and of '.join(sizes)}; one process, one thread\n")
    heads = [f"{name}, {kb}" for kb in sizes for name in ("new words", "known")]
    print(f"{'MB/s per core':34}" + "".join(f"{head:>22}" for head in heads))

    def show(name: str, make) -> None:
        rates = [rate for texts in (short, long) for rate in best_rate(make(), texts, size)]
        print(f"{name:34}" + "".join(f"{rate:22.2f}" for rate in rates), flush=True)

    encoder = Encoder(mistral_tokenizer())
    show("tokenizer (Mistral's)", lambda: encoder.encode)
    for name, morphology in (("without morphology", False), ("with morphology", True)):
        began = time.perf_counter()
        fit([folder / "labelled.jsonl"], scratch / name, morphology=morphology, workers=1, progress=False)
        took, classifier = time.perf_counter() - began, load_classifier(scratch / name)
        show(f"features, {name}", partial(measurer, morphology))
        show(f"labels, {name}", partial(labeller, classifier))
        print(f"  (fitted in {took:.1f} s)")


def make_novel_corpus(path: Path, megabytes: float) -> int:
    """Documents of words that hardly come twice; the bytes of text in it."""
    rng, text_bytes = random.Random(0), 0
    with open(path, "w") as file:
        while text_bytes < megabytes * 1e6:
            text = re.sub("(.{9})", r"\1 ", "".join(rng.choices("aeiouykłstrnzwmpdcąę", k=3000)))
            text_bytes += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return text_bytes


def quality_memory(folder: Path, scratch: Path, megabytes: float, n_workers: int) -> None:
    from halny.model.data.quality_fit import fit

    fit([folder / "labelled.jsonl"], scratch / "classifier", progress=False)
    extra = ["--quality", str(scratch / "classifier"), "--keep", "quality_prob>0"]
    for size in (megabytes / 4, megabytes):
        text_bytes, out = make_novel_corpus(scratch / "corpus.jsonl", size), scratch / f"out-{size}"
        seconds, _, peaks = run_prepare(scratch / "corpus.jsonl", out, n_workers, extra)
        print(f"{text_bytes / 1e6:,.0f} MB of words that hardly come twice, {seconds:,.0f} s")
        show_peaks(peaks)


def show_peaks(peaks: dict[str, int]) -> None:
    for name, peak in sorted(peaks.items()):
        print(f"{name:16} {peak / 1e6:6.0f} MB at its peak", flush=True)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tokens_of(out: Path) -> int:
    manifest = json.loads((out / "manifest.json").read_text())
    return sum(split["tokens"] for split in manifest["splits"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=60, help="size of the generated corpus (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="peak memory of each process instead")
    parser.add_argument("--quality", type=Path, metavar="DIR", help="labels instead, of what bench/polish.py made")
    args = parser.parse_args()
    if args.quality and not (args.quality / "prose.jsonl").is_file():
        parser.error(f"--quality {args.quality}: no prose.jsonl in it; python bench/polish.py --out {args.quality}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.workers} processes, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        if args.quality and args.memory:
            return quality_memory(args.quality, Path(folder), args.mb, args.workers)
        if args.quality:
            return quality_rates(args.quality, Path(folder))
        corpus = Path(folder) / "corpus.jsonl"
        text_bytes = make_corpus(corpus, args.mb)
        if args.memory:
            seconds, _, peaks = run_prepare(corpus, Path(folder) / "out", args.workers, [])
            print(f"{text_bytes / 1e6:,.0f} MB of text, {tokens_of(Path(folder) / 'out'):,} tokens, {seconds:,.0f} s")
            show_peaks(peaks)
            return
        small = Path(folder) / "small.jsonl"
        small.write_text('{"text": "start-up"}\n')
        start_up, start_cpu, _ = run_prepare(small, Path(folder) / "start", args.workers, ["--val-fraction", "0"])
        print(f"start-up of prepare_data: {start_up:.1f} s, taken off below\n")
        best = {}
        for i in range(ROUNDS):
            rates = {"tokenizer alone": throughput_alone(args.workers, ALONE_S)}
            seconds, cpu, _ = run_prepare(corpus, Path(folder) / f"out-{i}", args.workers, [])
            tokens = tokens_of(Path(folder) / f"out-{i}")
            seconds, cpu = seconds - start_up, cpu - start_cpu
            rates["prepare_data"] = (text_bytes / seconds, tokens / seconds, text_bytes / cpu)
            for name, rate in rates.items():
                best[name] = np.maximum(best.get(name, 0), rate)
        print(f"{'':16} {'MB/s':>8} {'M tokens/s':>12} {'MB/core-second':>16}")
        for name, rate in best.items():
            share = rate / best["tokenizer alone"]
            print(f"{name:16} {rate[0] / 1e6:8.2f} {rate[1] / 1e6:12.3f} {rate[2] / 1e6:16.2f}", end="")
            print(f"   {share[0]:4.0%} of tokenizer alone, {share[2]:.0%} by core-seconds")

        one, other = str(Path(folder) / "out-0"), str(Path(folder) / "second")
        make_second_source(Path(one), Path(other))
        print(f"\n{'loader':32} {'M tokens/s':>12}")
        for name, sources in (("one source", [one]), ("a mixture", [f"{one}:0.7", f"{other}:0.3"])):
            for documents in (False, True):
                rate = max(loader_tokens_per_second(sources, documents, 2) for _ in range(ROUNDS))
                print(f"{name + (', --documents' if documents else ''):32} {rate / 1e6:12.1f}")


if __name__ == "__main__":
    main()
