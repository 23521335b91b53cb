"""From shards to batches, each clever thing beside a slow and obvious definition of it."""

import itertools
import json
import math
import os
import shutil
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halny.model.data import batches, stream
from halny.model.data.batches import IGNORED, Corpus, Loader, read_batch, read_in_turn
from halny.model.data.dataset import DataError, TokenStream, open_dataset
from halny.model.data.order import BLOCK, interleave, sample_order, share_of, step_numbers
from halny.model.data.rows import Packing, _pack, best_fit_decreasing
from halny.model.data.writer import write_dataset
from halny.model.mistral import PRESETS, Mistral

CPU = torch.device("cpu")


def make(out: Path, lengths, val_lengths=(), shard_tokens: int = 64, vocab_size: int = 100_000) -> Path:
    """A data folder whose token ids are 0, 1, 2 ..., so that a token says where in its split it stands."""

    def documents(lengths):
        ends = itertools.accumulate(lengths)
        return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]

    write_dataset(
        documents(lengths), out, vocab_size=vocab_size, val_documents=documents(val_lengths), shard_tokens=shard_tokens
    )
    return out


def corpus_of(*folders, seq_len: int = 16, documents: bool = False) -> Corpus:
    return Corpus([str(folder) for folder in folders], seq_len, documents)


def whole(rows):
    """All rows of one source as one batch."""
    return read_batch([rows], np.zeros(len(rows), np.int64), np.arange(len(rows)))


# --- the order of samples ---------------------------------------------------------------------------------------------


def slow_order(n: int, seed: int, epoch: int) -> dict[int, int]:
    """The permutation of an epoch as a dictionary, place to sample, in Python's whole numbers."""
    golden, full = 0x9E3779B97F4A7C15, 2**64

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % full
        x = (x ^ x >> 27) * 0x94D049BB133111EB % full
        return x ^ x >> 31

    half = 1
    while 4**half < n:
        half += 1
    key = mix(mix((seed + golden) % full) ^ epoch)
    order = {}
    for place in range(n):
        x = place
        while True:
            left, right = divmod(x, 2**half)
            for turn in range(6):
                left, right = right, left ^ mix((key + turn * golden) % full ^ right) % 2**half
            x = left * 2**half + right
            if x < n:
                break
        order[place] = x
    return order


@given(n=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_sample_order_equals_the_slow_one(n, seed, epoch):
    numbers = np.arange(epoch * n, (epoch + 1) * n)
    assert dict(enumerate(sample_order(numbers, n, seed).tolist())) == slow_order(n, seed, epoch)


def test_sample_order_stays_what_earlier_runs_used():
    assert sample_order(np.arange(8), 1000, seed=0).tolist() == [663, 537, 46, 725, 603, 872, 461, 601]
    far = sample_order(np.arange(2**40, 2**40 + 4), 2**33 + 1, seed=3)
    assert far.tolist() == [2690266412, 7892145458, 846978743, 3269962030]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_sample_order_is_a_new_permutation_every_epoch(n):
    epochs = [sample_order(np.arange(e * n, (e + 1) * n), n, seed=7).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 64:
        other_seed = sample_order(np.arange(n), n, seed=8).tolist()
        assert len({tuple(x) for x in [*epochs, other_seed, range(n)]}) == 5
        for order in (*epochs, other_seed):  # no trace of the order it came from: rank correlation within 4 sigma
            assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 4 / math.sqrt(n)


def test_sample_order_is_a_function_of_the_number_alone():
    n, numbers = 1000, np.random.default_rng(0).integers(0, 5000, 300)
    alone = [int(sample_order(np.array([i]), n, seed=3)[0]) for i in numbers]
    assert sample_order(numbers, n, seed=3).tolist() == alone


@pytest.mark.parametrize("size, micro_batch", [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_every_division_of_a_step_has_the_same_samples(size, micro_batch):
    for step in (1, 2, 77):
        parts = [share_of(step_numbers(step, 8), rank, size, micro_batch) for rank in range(size)]
        assert all(part.shape == (8 // size // micro_batch, micro_batch) for part in parts)
        assert sorted(np.concatenate(parts, axis=None).tolist()) == list(range(8 * step - 8, 8 * step))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def slow_interleave(n: int, weights: list[int], seed: int) -> list[tuple[int, int]]:
    """(source, number within it) of samples 0 .. n - 1, dealt out one after the other with dictionaries of counts."""
    offered, line = Counter(), []
    for _ in range(-(-n // BLOCK) * BLOCK):
        for s, weight in enumerate(weights):
            offered[s] += 1
            share = Fraction(weight, sum(weights[s:]))
            if math.floor(offered[s] * share) > math.floor((offered[s] - 1) * share):
                line.append(s)
                break
    seen, dealt = Counter(), []
    for i in range(n):
        block, place = divmod(i, BLOCK)
        s = line[block * BLOCK + slow_order(BLOCK, seed, block)[place]]
        dealt.append((s, seen[s]))
        seen[s] += 1
    return dealt


weight_lists = st.lists(st.integers(1, 1000) | st.integers(1, 3 * 10**8), min_size=1, max_size=6)


@given(weights=weight_lists, seed=st.integers(0, 2**63 - 1), n=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_interleave_equals_the_slow_one(weights, seed, n):
    source, within = interleave(np.arange(n), weights, seed)
    slow = slow_interleave(n, weights, seed)
    assert list(zip(source.tolist(), within.tolist(), strict=True)) == slow
    some = np.random.default_rng(seed).integers(0, n, (3, 4))  # any numbers, in any order and shape, alone or not
    source, within = interleave(some, weights, seed)
    assert [*zip(source.ravel(), within.ravel(), strict=True)] == [slow[i] for i in some.ravel()]


@given(weights=weight_lists, seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**60))
@example(weights=[700, 300], seed=0, start=2**60)  # a product that would not fit int64
@settings(max_examples=40, deadline=None)
def test_every_window_of_a_mixture_has_its_proportions(weights, seed, start):
    source, within = interleave(np.arange(start, start + 10_000), weights, seed)
    for s, weight in enumerate(weights):
        expected = 10_000 * weight / sum(weights)
        assert abs((source == s).sum() - expected) <= 8 + len(weights)  # 0.14% of the window at most
        assert np.array_equal(np.diff(within[source == s]), np.ones(max(0, (source == s).sum() - 1)))
        if (source == s).any():  # and so it was from the first sample on
            earlier = start + int((source == s).argmax())
            assert abs(int(within[source == s][0]) - Fraction(earlier * weight, sum(weights))) <= 4 + len(weights)


def test_no_window_at_all_is_off_by_more_than_a_few():
    for weights in ([1, 1], [14, 5, 1], [333, 1, 666, 12, 7]):
        source, _ = interleave(np.arange(50_000), weights, seed=1)
        for s, weight in enumerate(weights):
            count = np.concatenate([[0], (source == s).cumsum()])
            windows = count[10_000:] - count[:-10_000]
            assert np.abs(windows - 10_000 * weight / sum(weights)).max() <= 10


def test_a_mixture_shows_no_pattern():
    source, _ = interleave(np.arange(100 * BLOCK), [7, 3], seed=0)
    assert len({tuple(block) for block in source.reshape(-1, BLOCK)}) > 95
    assert (source != interleave(np.arange(100 * BLOCK), [7, 3], seed=1)[0]).any()


def test_locate_gives_each_source_its_own_epochs(tmp_path):
    folders = [make(tmp_path / name, [n * 4 + 1]) for name, n in (("a", 5), ("b", 9), ("c", 31))]
    corpus = corpus_of(f"{folders[0]}:0.5", f"{folders[1]}:0.3", f"{folders[2]}:0.2", seq_len=4)
    sizes = {source.dataset.path.name: len(source.train) for source in corpus.sources}
    assert sizes == {"a": 5, "b": 9, "c": 31}
    source, row = corpus.locate(np.arange(400), seed=6)
    seen = defaultdict(list)
    for s, r in zip(source.tolist(), row.tolist(), strict=True):
        seen[corpus.sources[s].dataset.path.name].append(r)
    assert {name: len(found) for name, found in seen.items()} == pytest.approx({"a": 200, "b": 120, "c": 80}, abs=4)
    for name, n in sizes.items():
        epochs = [seen[name][i : i + n] for i in range(0, len(seen[name]) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    slow = slow_interleave(
        400, [source.weight for source in corpus.sources], 6
    )  # and the whole of it by the slow definitions
    for (s, k), *located in zip(slow, source.tolist(), row.tolist(), strict=True):
        key, n = batches._key(6, corpus.sources[s].dataset.fingerprint), len(corpus.sources[s].train)
        assert located == [s, slow_order(n, key, k // n)[k % n]]


def test_samples_of_a_run_stay_what_earlier_runs_read(tmp_path):
    """Recorded before runs had a history of their data: a run whose data do not change has none."""
    a, b = make(tmp_path / "a", [101]), make(tmp_path / "b", [201])
    mixture, alone = corpus_of(f"{a}:0.7", f"{b}:0.3", seq_len=4), corpus_of(a, seq_len=4)
    assert mixture.fingerprint == "1287817551800d04e0c15bb8de155b4c345ebe10754f58dd2e8eceb2ebf443d8"
    for first, *recorded in (
        (0, [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0], [24, 19, 1, 32, 8, 7, 23, 8, 0, 9, 12, 1]),
        (1000, [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1], [2, 8, 0, 18, 3, 37, 0, 16, 15, 6, 12, 10]),
        (2**40, [1, 1, 1, 0, 1, 1], [8, 21, 5, 6, 7, 12]),
    ):
        located = mixture.locate(np.arange(first, first + len(recorded[0])), seed=6)
        assert [x.tolist() for x in located] == recorded
    assert alone.locate(np.arange(1000, 1012), 6)[1].tolist() == [13, 0, 18, 1, 10, 9, 6, 11, 15, 2, 12, 21]


def test_neither_order_nor_place_nor_scale_of_the_sources_matters(tmp_path):
    a, b = make(tmp_path / "a", [100]), make(tmp_path / "b", [200])
    moved = tmp_path / "elsewhere:1"  # a colon in a name that exists
    shutil.copytree(a, moved)

    def seen(*folders):
        corpus = corpus_of(*folders)
        located = corpus.locate(np.arange(300), seed=1)
        return corpus.fingerprint, *(x.tolist() for x in located)

    one = seen(f"{a}:0.7", f"{b}:0.3")
    assert seen(f"{b}:6", f"{a}:14") == one == seen(f"{moved}:0.7", f"{b}:0.3")
    other = seen(f"{a}:0.69", f"{b}:0.31")
    assert other[0] != one[0] and other[1:] != one[1:]


def test_one_source_keeps_the_order_of_its_seed(tmp_path):
    a = make(tmp_path / "a", [1000])
    corpus, weighted = corpus_of(a), corpus_of(f"{a}:0.2")
    source, row = corpus.locate(np.arange(200), seed=5)
    assert not source.any() and row.tolist() == sample_order(np.arange(200), len(corpus.train[0]), 5).tolist()
    assert corpus.fingerprint == weighted.fingerprint == corpus.sources[0].dataset.fingerprint
    assert weighted.locate(np.arange(200), seed=5)[1].tolist() == row.tolist()


@pytest.mark.parametrize(
    "weights, words",
    [
        (["a:0", "b:1"], ["a:0", "1e-9"]),
        (["a:-1", "b:1"], ["a:-1"]),
        (["a:nan", "b:1"], ["a:nan"]),
        (["a:inf", "b:1"], ["a:inf"]),
        (["a:1e999999999", "b:1"], ["a:1e999999999"]),
        (["a:half", "b:1"], ["a:half"]),
        (["a:", "b:1"], ["a:"]),
        ([":1", "b:1"], [":1"]),
        (["a:0.5", "b"], ["b", "each needs a weight"]),
        (["a:1", "a:1"], ["a", "same tokens"]),
        (["a:1", "copy:2", "b:1"], ["a", "copy", "same tokens"]),
        (["a:1", "other:1"], ["other", "100000", "200000"]),
        (["a:1", "none:1"], ["none"]),
        (["a:1.00000000001", "b:1"], ["a:1.00000000001", "digits"]),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tmp_path, monkeypatch, weights, words):
    monkeypatch.chdir(tmp_path)
    make(Path("a"), [100])
    make(Path("b"), [200])
    make(Path("other"), [200], vocab_size=200_000)
    shutil.copytree("a", "copy")
    with pytest.raises(DataError) as refusal:
        Corpus(weights, 16)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("documents, lengths", [(False, [1]), (True, [1, 1, 1])])
def test_nothing_to_train_on_is_refused(tmp_path, documents, lengths):
    with pytest.raises(DataError, match="a has no tokens to train on"):
        corpus_of(make(tmp_path / "a", lengths), documents=documents)


def test_tokenizers_of_one_vocabulary_but_different_ids_are_refused(tmp_path):
    for name, n in (("a", 8), ("b", 9)):
        (tmp_path / f"tokenizer-{name}").mkdir()
        (tmp_path / f"tokenizer-{name}/tokenizer.json").write_text(name)
        write_dataset([np.arange(n)], tmp_path / name, vocab_size=9, tokenizer=tmp_path / f"tokenizer-{name}")
    with pytest.raises(DataError, match="different tokenizers"):
        corpus_of(tmp_path / "a:1", tmp_path / "b:1")


def test_one_tokenizer_written_by_two_versions_of_a_library_is_one(tmp_path):
    for n, name, merge in ((5, "a", "x y"), (6, "b", ["x", "y"]), (7, "c", ["y", "x"])):
        (tmp_path / f"tokenizer-{name}").mkdir()
        raw = {"model": {"type": "BPE", "vocab": {"x": 0, "y": 1, "xy": 2}, "merges": [merge]}}
        (tmp_path / f"tokenizer-{name}/tokenizer.json").write_text(json.dumps(raw))
        write_dataset([np.arange(n) % 3], tmp_path / name, vocab_size=3, tokenizer=tmp_path / f"tokenizer-{name}")
    assert corpus_of(tmp_path / "a:1", tmp_path / "b:1", seq_len=2).vocab_size == 3
    with pytest.raises(DataError, match="different tokenizers"):
        corpus_of(tmp_path / "a:1", tmp_path / "c:1", seq_len=2)


def test_raw_files_mix_with_data_folders(tmp_path):
    folder, raw = make(tmp_path / "a", [100], vocab_size=1000), tmp_path / "b.bin"
    np.arange(500, 900, dtype="<u2").tofile(raw)

    def open_one(path):
        return open_dataset(path, "uint16" if path == raw else None, 1024)

    corpus = Corpus([f"{folder}:1", f"{raw}:2"], 16, open_dataset=open_one)
    assert corpus.vocab_size == 1000
    [i] = [i for i, source in enumerate(corpus.sources) if source.dataset.path == raw]
    assert whole(corpus.train[i]).labels.flatten()[:399].tolist() == list(range(501, 900))
    with pytest.raises(DataError, match=r"b\.bin: a raw file does not say where documents end"):
        Corpus([str(raw)], 16, documents=True, open_dataset=open_one)


def test_raw_files_as_the_shell_names_them_are_one_source(tmp_path):
    for name, first in (("a", 0), ("b", 300)):
        np.arange(first, first + 300, dtype="<u2").tofile(tmp_path / f"{name}.bin")

    def open_one(path):
        return open_dataset(path, "uint16", 1024)

    together = Corpus([str(tmp_path / "b.bin"), str(tmp_path / "a.bin")], 16, open_dataset=open_one)
    assert together.fingerprint == Corpus([str(tmp_path / "*.bin")], 16, open_dataset=open_one).fingerprint
    assert whole(together.train[0]).labels.flatten()[:599].tolist() == list(range(1, 600))
    assert len(Corpus([f"{tmp_path}/a.bin:1", f"{tmp_path}/b.bin:1"], 16, open_dataset=open_one).sources) == 2
    with pytest.raises(DataError, match="needs a weight"):
        Corpus([str(tmp_path / "a.bin"), str(tmp_path / "nowhere.bin")], 16, open_dataset=open_one)


# --- windows and packing ----------------------------------------------------------------------------------------------


def test_windows_cover_the_stream_and_end_in_ignored_labels(tmp_path):
    [rows] = corpus_of(make(tmp_path / "a", [100, 102]), seq_len=64).train
    assert len(rows) == 4 and rows.n_targets == 201
    tokens, labels, cu_seqlens, _, lengths = whole(rows)
    assert cu_seqlens is None and lengths == [64] * 4 and tokens.dtype == labels.dtype == torch.int64
    assert tokens.flatten()[:201].tolist() == list(range(201))
    assert labels.flatten()[:201].tolist() == list(range(1, 202)) and (labels.flatten()[201:] == IGNORED).all()
    nothing = read_batch([rows], np.array([0]), np.array([-1]))
    assert nothing.labels.shape == (1, 64) and (nothing.labels == IGNORED).all()


document_lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths=document_lengths, seq_len=st.integers(1, 24), at_once=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_packing_predicts_every_token_but_the_first_once(lengths, seq_len, at_once):
    """The packing alone, from boundaries made by hand."""
    ends = np.array([0, *itertools.accumulate(lengths)])
    parts = [_pack(ends[i : i + at_once + 1], seq_len) for i in range(0, len(lengths), at_once)]
    predicted = Counter()
    for starts, sizes, counts in parts:
        assert counts.sum() == len(starts)
        for first, count in zip((counts.cumsum() - counts).tolist(), counts.tolist(), strict=True):
            row = slice(first, first + count)
            assert 1 <= sizes[row].sum() <= seq_len and (sizes[row] >= 1).all()
            for start, size in zip(starts[row].tolist(), sizes[row].tolist(), strict=True):
                document = int(np.searchsorted(ends, start, side="right")) - 1
                assert start + size < ends[document + 1]  # the last label is a token of the same document
                predicted.update(range(start + 1, start + size + 1))
    assert predicted == Counter(set(range(ends[-1])) - set(ends.tolist()))


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The rooms left in the bins: each item, longest first, into the fullest bin that has room for it."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@given(sizes=st.lists(st.integers(1, 30), max_size=200), capacity=st.integers(30, 60))
@settings(max_examples=60, deadline=None)
def test_best_fit_decreasing_equals_the_slow_one(sizes, capacity):
    bins = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=sizes).astype(int) if sizes else np.zeros(0, int)
    assert sorted((capacity - filled).tolist()) == slow_best_fit(sizes, capacity)


@pytest.mark.parametrize("mean, sigma", [(5.0, 1.5), (6.5, 1.0), (7.5, 1.2)])
def test_padding_is_under_one_per_cent(mean, sigma):
    """Lengths as of web pages, notes and books (log-normal); 20,000 documents are little for a corpus."""
    lengths = 2 + np.random.default_rng(0).lognormal(mean, sigma, 20_000).astype(np.int64)
    _, sizes, counts = _pack(np.concatenate([[0], lengths.cumsum()]), 4096)
    assert sizes.sum() == (lengths - 1).sum()
    assert 1 - sizes.sum() / (len(counts) * 4096) < 0.01


@given(lengths=st.lists(st.integers(1, 60), max_size=30).map(lambda some: [*some, 2]), at_once=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_batches_of_documents_never_cross_a_boundary(tmp_path_factory, lengths, at_once):
    folder = make(tmp_path_factory.mktemp("documents") / "d", lengths)
    ends = list(itertools.accumulate(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packing, "AT_ONCE", at_once)
        [rows] = corpus_of(folder, documents=True).train
    assert isinstance(rows, Packing) and rows.n_targets == sum(lengths) - len(lengths)
    tokens, labels, cu_seqlens, max_seqlen, lengths = whole(rows)
    boundaries = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32 and boundaries[0] == 0 and boundaries[-1] == tokens.numel()
    assert set(range(0, tokens.numel(), 16)) <= set(boundaries) and boundaries == sorted(set(boundaries))
    assert lengths == np.diff(boundaries).tolist() and max_seqlen == max(lengths) and type(max_seqlen) is int
    predicted = []
    for begin, end in itertools.pairwise(boundaries):
        piece, after = tokens.flatten()[begin:end].tolist(), labels.flatten()[begin:end].tolist()
        if IGNORED in after:
            assert set(after) == {IGNORED} and end % 16 == 0  # padding, at a row's end
            continue
        assert after == [t + 1 for t in piece] == list(range(piece[0] + 1, piece[0] + 1 + len(piece)))
        document = np.searchsorted(ends, piece[0], side="right")
        assert after[-1] < ends[document]
        predicted += after
    assert sorted(predicted) == sorted(set(range(ends[-1])) - {0, *ends})


@pytest.mark.parametrize("ends", [[12, 10, 15], [-1, 10, 15], [2**62, 10, 15]])
def test_documents_out_of_order_are_refused_before_anything_is_made_of_them(tmp_path, ends):
    folder = make(tmp_path / "a", [5, 5, 5])
    np.save(folder / "train-00000.documents.npy", np.array(ends))
    with pytest.raises(DataError, match=r"train-00000\.npy: the ends of its documents"):
        corpus_of(folder, documents=True)


def test_loss_of_a_packed_run_is_that_of_its_documents_alone(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n) for n in (30, 3, 1, 17, 17, 2, 9, 40, 33, 5)]
    write_dataset(documents, tmp_path / "d", vocab_size=256, shard_tokens=64)
    model = Mistral(PRESETS["test"])
    [rows] = corpus_of(tmp_path / "d", seq_len=40, documents=True).train
    in_turn = [np.array([2, 0]), np.array([-1]), np.arange(3, len(rows)), np.array([1])]
    packed = [read_batch([rows], np.zeros(len(numbers), np.int64), numbers) for numbers in in_turn]
    with torch.no_grad():
        sums = [model(*batch.inputs) for batch in packed]
        alone = [model(torch.tensor(d[None, :-1]), torch.tensor(d[None, 1:])) for d in documents if len(d) > 1]
    assert sum(s.n_tokens for s in sums) == sum(s.n_tokens for s in alone) == sum(len(d) - 1 for d in documents)
    assert sum(s.n_correct for s in sums) == sum(s.n_correct for s in alone)
    torch.testing.assert_close(sum(s.loss for s in sums), sum(s.loss for s in alone), rtol=1e-5, atol=0)


# --- the loader -------------------------------------------------------------------------------------------------------


def load(folders, first: int, last: int, *, documents: bool, rank: int = 0, size: int = 1, micro_batch: int = 2):
    steps = (share_of(step_numbers(step, 8), rank, size, micro_batch) for step in range(first, last + 1))
    return Loader(corpus_of(*folders, documents=documents), 3, steps, CPU)


def flat(step):
    return [x.tolist() if isinstance(x, torch.Tensor) else x for batch in step for x in batch]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_loader_resumes_at_any_step_and_divides_over_any_ranks(tmp_path, documents, mixed):
    rng = np.random.default_rng(0)
    folders = [make(tmp_path / name, rng.integers(1, 60, n)) for name, n in (("a", 40), ("b", 90))]
    folders = [f"{folders[0]}:0.7", f"{folders[1]}:0.3"] if mixed else folders[:1]
    steps = [flat(step) for step in load(folders, 1, 12, documents=documents)]
    assert len(steps) == 12
    for first in (2, 7, 12):
        assert [flat(step) for step in load(folders, first, 12, documents=documents)] == steps[first - 1 :]

    def rows_of(size, micro_batch):
        """Of each step the rows, sorted, whichever rank they went to."""
        options = dict(documents=documents, size=size, micro_batch=micro_batch)
        for step in zip(*(load(folders, 1, 5, rank=rank, **options) for rank in range(size)), strict=True):
            batches = itertools.chain.from_iterable(step)
            yield sorted(row for batch in batches for row in torch.stack(batch[:2], dim=1).tolist())

    alone = list(rows_of(1, 8))
    assert list(rows_of(1, 1)) == list(rows_of(2, 2)) == list(rows_of(4, 1)) == alone


def test_loader_gives_what_the_definitions_say(tmp_path):
    rng = np.random.default_rng(0)
    folders = [make(tmp_path / name, rng.integers(1, 60, n)) for name, n in (("a", 40), ("b", 90))]
    corpus = corpus_of(f"{folders[0]}:2", f"{folders[1]}:1", documents=True)
    loader = Loader(corpus, 9, [np.array([[4, 0, 7], [90, 91, 2]])], CPU)
    [got] = list(loader)
    for batch, numbers in zip(got, ([4, 0, 7], [90, 91, 2]), strict=True):
        for i, number in enumerate(numbers):
            expected = read_batch(corpus.train, *corpus.locate(np.array([number]), 9))
            assert torch.equal(batch.tokens[i], expected.tokens[0]) and torch.equal(batch.labels[i], expected.labels[0])
    assert loader.waited >= 0
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "deleted", "replaced", "changed"])
def test_a_shard_that_is_harmed_during_a_run_is_named(tmp_path, monkeypatch, harm, documents):
    monkeypatch.setattr(stream, "PATIENCE_S", 0.2)
    folder = make(tmp_path / "a", [50] * 20, shard_tokens=500)
    loader = load([folder], 1, 1000, documents=documents)
    next(loader)
    shard = folder / "train-00001.npy"
    if harm == "truncated":
        times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
        os.truncate(shard, shard.stat().st_size // 2)
        os.utime(shard, ns=times)
    elif harm == "emptied":
        os.truncate(shard, 0)
    elif harm == "deleted":
        shard.unlink()
    elif harm == "replaced":  # same size, same times, another file with another token
        copy = Path(shutil.copy2(shard, tmp_path / "copy"))
        copy.write_bytes(copy.read_bytes()[:-1] + b"\1")
        shutil.copystat(shard, copy)
        os.replace(copy, shard)
    elif harm == "changed":
        with shard.open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\0\1")
    with pytest.raises(DataError, match=r"train-00001\.npy: ") as error:
        for _ in range(5):  # what was read ahead is good; after that the shard is missed at once
            next(loader)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"train-00001\.npy: "):
        next(loader)


def test_a_shard_cut_short_in_the_middle_of_a_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE_S", 0.2)
    folder = make(tmp_path / "a", [1000], shard_tokens=500)
    cut = folder / "train-00000.npy"
    monkeypatch.setattr(TokenStream, "_check_is_the_same", lambda *_: os.truncate(cut, 512))
    with pytest.raises(DataError, match=r"train-00000\.npy: .*was cut short, it ends before byte"):
        open_dataset(folder).split("train").read(200, 100)


def test_any_error_of_the_thread_is_raised_by_next(tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(TokenStream, "gather", broken)
    with pytest.raises(MemoryError, match="no room"):
        next(load([make(tmp_path / "a", [100])], 1, 1, documents=False))


def test_held_out_rows_are_read_in_turn(tmp_path):
    a, b = (make(tmp_path / name, [50], val_lengths=lengths) for name, lengths in (("a", [33]), ("b", [20, 22])))
    corpus = corpus_of(f"{a}:1", f"{b}:1")
    n = sum(map(len, corpus.held_out))
    batch = read_in_turn(corpus.held_out, np.arange(n + 2))
    assert n == 5 and (batch.labels[n:] == IGNORED).all()
    parts = [whole(rows) for rows in corpus.held_out]
    assert torch.equal(batch.labels[:n], torch.cat([part.labels for part in parts]))
    assert torch.equal(batch.tokens[:n], torch.cat([part.tokens for part in parts]))
    _, labels, *_ = read_in_turn(corpus_of(make(tmp_path / "c", [50])).held_out, np.arange(3))  # nothing held out
    assert (labels == IGNORED).all()


@pytest.mark.gpu
def test_loader_on_a_gpu_gives_the_same(tmp_path):
    """Many more steps than are read ahead, each looked at late: pinned memory used again too early would show."""
    folder = make(tmp_path / "a", np.random.default_rng(0).integers(1, 60, 200), shard_tokens=1000)
    corpus = corpus_of(folder, documents=True)
    steps = [share_of(step_numbers(step, 8), 0, 1, 4) for step in range(1, 65)]
    on_gpu = list(Loader(corpus, 3, steps, torch.device("cuda", 0)))
    assert all(batch.tokens.is_cuda and batch.cu_seqlens.is_cuda for step in on_gpu for batch in step)
    assert [flat(step) for step in on_gpu] == [flat(step) for step in Loader(corpus, 3, steps, CPU)]
