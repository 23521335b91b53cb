"""What a run reads after its data were changed, beside a slow definition that counts sample by sample."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halny.model.data.batches import Corpus
from halny.model.data.dataset import DataError, Dataset, open_dataset
from halny.model.data.growth import begins_with, contents
from halny.model.data.history import Era, Share, from_json, gone_on, locate, samples_read, to_json
from halny.model.data.order import count_sources, grown_order, interleave, sample_order
from halny.model.data.writer import write_dataset

weight_lists = st.lists(st.integers(1, 2**20), min_size=1, max_size=5)
mixtures = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 99), min_size=1)


def era(first: int, **weights: int) -> Era:
    return Era(first, tuple(Share(name, weight, f"data/{name}") for name, weight in sorted(weights.items())))


@given(weights=weight_lists, seed=st.integers(0, 2**63 - 1), n=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_sources_are_counted_as_they_are_interleaved(weights, seed, n):
    source, _ = interleave(np.arange(n), weights, seed)
    assert count_sources(n, weights, seed).tolist() == [int((source == i).sum()) for i in range(len(weights))]


@given(eras=st.lists(st.tuples(st.integers(1, 90), mixtures), min_size=1, max_size=5), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_every_source_goes_on_where_it_was(eras, seed):
    """Sample by sample: whatever mixture a number belongs to, its source's next sample in line is the one."""
    history, first = [], 0
    for length, weights in eras:
        history.append(era(first, **weights))
        first += length
    expected, read = [], Counter()
    for begun, end in zip(history, [*(e.first for e in history[1:]), first], strict=True):
        assert samples_read(history, begun.first, seed) == read
        for s in interleave(np.arange(begun.first, end), begun.weights, seed)[0].tolist():
            expected.append((begun.names[s], read[begun.names[s]]))
            read[begun.names[s]] += 1
    assert samples_read(history, first, seed) == read
    source, within = locate(history, list("abcd"), np.arange(first), seed)
    assert [("abcd"[s], n) for s, n in zip(source.tolist(), within.tolist(), strict=True)] == expected
    some = np.random.default_rng(0).permutation(first)[: first // 4 * 4].reshape(-1, 4)  # as ranks ask for them
    located = locate(history, list("abcd"), some, seed)
    assert (located[0] == source[some]).all() and (located[1] == within[some]).all()


def make(out: Path, n_rows: int) -> Path:
    write_dataset([np.arange(4 * n_rows + 1)], out, vocab_size=100_000)
    return out


def corpus(*sources: str | Path) -> Corpus:
    return Corpus([str(source) for source in sources], seq_len=4)


def rows_of(corpus: Corpus, first: int, last: int) -> dict[str, list[int]]:
    """Of each source, by its folder's name, the rows that samples first to last - 1 are."""
    source, row = corpus.locate(np.arange(first, last), 6)
    return {s.dataset.path.name: row[source == i].tolist() for i, s in enumerate(corpus.sources)}


def went_on(before: Corpus, after: Corpus, number: int, may_change: bool = True) -> Corpus:
    after.go_on({"data_history": to_json(before.history)}, number, may_change)
    return after


def test_other_weights_repeat_nothing_and_pass_over_nothing(tmp_path):
    a, b, c = (make(tmp_path / name, n) for name, n in (("a", 2000), ("b", 1900), ("c", 30)))
    alone = corpus(a)
    mixed = went_on(alone, corpus(f"{a}:9", f"{b}:1"), 500)
    turned = went_on(mixed, corpus(f"{a}:1", f"{b}:8", f"{c}:1"), 1500)
    without = went_on(turned, corpus(f"{a}:1", f"{c}:1"), 2500)
    back = went_on(without, corpus(f"{b}:1"), 2600)
    assert [e.first for e in back.history] == [0, 500, 1500, 2500, 2600]
    parts = [rows_of(*part) for part in ((alone, 0, 500), (mixed, 500, 1500), (turned, 1500, 2500),
        (without, 2500, 2600), (back, 2600, 2700))]  # fmt: skip

    def of(parts, name: str) -> list[int]:
        return [row for part in parts for row in part.get(name, [])]

    read = {name: of(parts, name) for name in "abc"}
    assert [len(part["a"]) for part in parts[:4]] == pytest.approx([500, 900, 100, 50], abs=4)
    assert [len(part["b"]) for part in parts[1:3]] == pytest.approx([100, 800], abs=4) and len(parts[4]["b"]) == 100
    assert read["a"] == rows_of(alone, 0, 2000)["a"][: len(read["a"])]  # what it would have read alone, in that order
    assert read["b"] == rows_of(corpus(f"{a}:1", f"{b}:1"), 0, 3000)["b"][: len(read["b"])]
    assert sorted(read["c"][:30]) == sorted(read["c"][30:60]) == list(range(30))
    assert rows_of(turned, 0, 2500) == {name: of(parts[:3], name) for name in "abc"}


def test_epochs_are_of_what_was_and_will_be_read(tmp_path):
    a, b, c = (make(tmp_path / name, n) for name, n in (("a", 100), ("b", 200), ("c", 50)))
    begun = corpus(f"{a}:9", f"{b}:1")
    [line] = [line for line in begun.describe(1000, 0) if line.startswith(str(a))]
    assert "90.00% of the run's; 9.00 epochs; held out" in line
    turned = went_on(begun, corpus(f"{a}:1", f"{c}:3"), 480)
    lines = sorted(turned.describe(1000, 0))
    read = {name: len(rows) for name, rows in rows_of(begun, 0, 480).items()}
    then = {name: len(rows) for name, rows in rows_of(turned, 480, 1000).items()}
    assert read["a"] == pytest.approx(432, abs=3) and then["a"] == pytest.approx(130, abs=3)
    epochs = f"{(read['a'] + then['a']) / 100:.2f} epochs, {read['a'] / 100:.2f} of them before the data changed"
    assert f"25.00% of those to come; {epochs}" in lines[0]
    assert lines[1] == f"{b}: no longer read, after {read['b']} samples of it"
    assert f"; {then['c'] / 50:.2f} epochs, 0.00 of them before" in lines[2]
    shutil.rmtree(c)
    other = went_on(turned, corpus(make(c, 40)), 1000)
    assert f"{c} as it was: no longer read, after {then['c']} samples of it" in other.describe(1010, 0)


def test_the_config_of_an_older_halny_is_one_mixture(tmp_path):
    """It has no history, but the fingerprint of the whole and weights by path."""
    a, b = make(tmp_path / "a", 100), make(tmp_path / "b", 90)
    begun, turned = corpus(f"{a}:0.9", f"{b}:0.1"), corpus(f"{a}:1", f"{b}:9")
    config = {"recipe": {"data": [f"{a}:0.9", f"{b}:0.1"]}, "data": begun.fingerprint}
    for now, history in ((corpus(f"{a}:9", f"{b}:1"), begun.history),
            (turned, went_on(begun, corpus(f"{a}:1", f"{b}:9"), 64).history)):  # fmt: skip
        now.go_on(config, 64, True)
        assert now.history == history
    alone = {"recipe": {"data": None}, "data": corpus(a).fingerprint}
    turned.go_on(alone, 64, True)
    assert samples_read(turned.history, 64, 0) == {corpus(a).fingerprint: 64}
    moved = config | {"recipe": {"data": ["elsewhere:0.9", f"{b}:0.1"]}}
    same = corpus(f"{a}:9", f"{b}:1")
    same.go_on(moved, 64, False)
    assert same.history == begun.history
    turned.go_on(moved, 64, True)  # which source its samples were of cannot be told
    assert "elsewhere:0.9" in turned.describe(128, 0)[-1] and "after 64 samples" in turned.describe(128, 0)[-1]
    assert rows_of(turned, 64, 128) == rows_of(went_on(corpus(make(tmp_path / "c", 80)), turned, 64), 64, 128)


SHARE = {"fingerprint": "x", "weight": 1, "path": "x"}


@pytest.mark.parametrize("sources", [
    None, [], [1], [{}], [SHARE | {"else": 1}], [SHARE | {"weight": 0}], [SHARE | {"weight": "1"}],
    [SHARE | {"fingerprint": 1}], [SHARE | {"grown_from": "y"}], [SHARE | {"grown_from": []}],
    [SHARE | {"contents": {"tokens": 1}}], [SHARE | {"contents": [1]}],
])  # fmt: skip
def test_a_history_that_no_run_wrote_is_refused(sources):
    begun = {"first_sample": 0, "sources": [SHARE]}
    assert from_json([begun]) == [Era(0, (Share("x", 1, "x"),))]
    for records in ([begun | {"sources": sources}], [begun, {"first_sample": 8, "sources": sources}],
            [begun, begun], [begun | {"first_sample": 8}], [begun | {"first_sample": "0"}], [1], None):  # fmt: skip
        with pytest.raises(DataError, match=r"data_history .* is not readable"):
            from_json(records)


def test_a_change_is_one_only_once_and_where_the_run_goes_on():
    now, before = era(0, a=1, b=9), [era(0, a=9, b=1)]
    changed = gone_on(before, now.shares, 320, True)
    assert changed == [*before, now._replace(first=320)]
    assert gone_on(changed, now.shares, 480, False) == changed  # the same command again
    third = era(0, a=1, c=1)
    assert gone_on(changed, third.shares, 320, True) == [*before, third._replace(first=320)]  # no sample was read of it
    assert gone_on(changed, before[0].shares, 240, True) == [*before, before[0]._replace(first=240)]
    # Back to a checkpoint from before the change: what was read until then is read again, if it is there.
    assert gone_on(changed, now.shares, 240, False) == changed
    gone = gone_on(before, third.shares, 320, True)
    with pytest.raises(DataError, match=r"data/a data/c: samples 240 to 319 were also of data/b; with --allow-change"):
        gone_on(gone, third.shares, 240, False)
    assert gone_on(gone, third.shares, 240, True) == [*before, third._replace(first=240)]
    assert gone_on(gone, third.shares, 0, True) == [third]


# --- sources that grew ------------------------------------------------------------------------------------------------


@given(
    growths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
@example(growths=[(7, 14), (5, 0), (3, 9)], seed=0)  # at the end of an epoch, at once, at the end of what was left
@settings(max_examples=60, deadline=None)
def test_a_source_that_grew_reads_nothing_again_before_the_rest(growths, seed):
    """However often it grows: each sample is one that its epoch has not had, and all come to their turn."""
    sizes = np.cumsum([more for more, _ in growths]).tolist()
    read = [0, *np.cumsum([n for _, n in growths]).tolist()]
    end = read.pop() + 3 * sizes[-1]
    rows = grown_order(np.arange(end), sizes, read, seed).tolist()
    until = [*read, end][1]
    assert rows[:until] == sample_order(np.arange(until), sizes[0], seed).tolist()
    left, n_rows = set(), 0
    for number, row in enumerate(rows):
        for size, since in zip(sizes, read, strict=True):
            if since <= number and size > n_rows:
                left |= set(range(n_rows, size))
                n_rows = size
        left = left or set(range(n_rows))
        left.remove(row)
    some = np.random.default_rng(0).permutation(end)
    assert grown_order(some, sizes, read, seed).tolist() == [rows[i] for i in some]


def folder(out: Path, lengths, shard_tokens: int = 1000) -> Path:
    rng = np.random.default_rng(0)
    write_dataset((rng.integers(0, 999, n) for n in lengths), out, vocab_size=999, shard_tokens=shard_tokens)
    return out


@pytest.mark.parametrize("documents", [False, True])
def test_a_folder_that_grew_twice_repeats_nothing_and_passes_over_nothing(tmp_path, documents):
    lengths = np.random.default_rng(1).integers(1, 40, 900)
    folders = [folder(tmp_path / f"{n}", lengths[:n]) for n in (300, 500, 900)]
    first, second, third = (Corpus([str(f)], 16, documents) for f in folders)
    n = len(first.train[0])

    def rows(corpus: Corpus, begin: int, end: int) -> list[tuple]:
        """Of each sample where its pieces begin, and their lengths."""
        _, row = corpus.locate(np.arange(begin, end), 3)
        return [tuple(map(tuple, zip(*corpus.train[0].pieces(i), strict=True))) for i in row.tolist()]

    read = rows(first, 0, n + 20)
    went_on(first, second, n + 20)
    m = len(second.train[0])
    assert rows(second, 0, n + 20) == read and second.history[1].shares[0].grown_from == first.fingerprint
    read += rows(second, n + 20, m + 30)
    went_on(second, third, m + 30)
    whole = len(third.train[0])
    assert rows(third, 0, m + 30) == read
    read += rows(third, m + 30, n + whole)
    assert len(set(read[:n])) == n and len(set(read[n:])) == whole  # an epoch of the first, and then one of all
    assert len(set(rows(third, n + whole, n + 2 * whole))) == whole
    targets = {token for row in set(read) for start, length in row for token in range(start, start + length)}
    predicted = lengths.sum() - (len(lengths) if documents else 3)  # all but each document's first, or each part's
    assert len(targets) == sum(length for row in set(read) for _, length in row) == predicted
    [line] = third.describe(n + whole, 3)
    new, before = whole - third.train[0].sizes[1], (m + 30) / whole
    assert f"({new} of them new since it grew)" in line
    assert f"; {(n + whole) / whole:.2f} epochs, {before:.2f} of them before" in line
    went_on(third, third, n + whole, False)  # the same command again
    assert rows(third, 0, n + whole) == read
    assert gone_on(third.history, third.now, 0, False) == third.history  # back to the start: all of it is there


def test_which_folders_grew(tmp_path):
    lengths = [300, 300, 300, 50, 50]  # a full shard of 600 tokens and one of 400
    old = contents(Dataset(folder(tmp_path / "old", lengths, 600)))
    for name, (others, shard_tokens, grew) in {
        "filled up": ([*lengths, 90], 600, True),
        "a shard more": ([*lengths, 300], 600, True),
        "filled up and more": ([*lengths, 90, 300], 600, True),
        "the same": (lengths, 600, False),
        "fewer": (lengths[:-1], 600, False),
        "cut elsewhere": ([300, 300, 300, 60, 40, 50], 600, False),
        "other shards": ([*lengths, 90], 300, False),
        "others": ([200, *lengths], 600, False),
    }.items():
        assert begins_with(Dataset(folder(tmp_path / name, others, shard_tokens)), old) == grew, name
    raw = tmp_path / "raw.bin"
    np.arange(50, dtype="<u2").tofile(raw)
    raw = open_dataset(raw, "uint16")
    assert contents(raw) is None and not begins_with(raw, old)
    assert not begins_with(Dataset(tmp_path / "filled up"), contents(raw))


def test_a_source_that_grew_beside_the_old_one_is_another(tmp_path):
    """Two sources never share a place; and where both of a pair began with the same, one of them is a new source."""
    old = folder(tmp_path / "old", [100, 100])
    more, other = folder(tmp_path / "more", [100, 100, 50]), folder(tmp_path / "other", [100, 100, 60, 10])
    alone = corpus(old)
    beside = went_on(alone, corpus(f"{old}:1", f"{more}:1"), 20)
    assert [share.grown_from for share in beside.history[-1].shares] == [None, None]
    pair = went_on(alone, corpus(f"{other}:1", f"{more}:1"), 20)
    assert sorted([share.grown_from for share in pair.history[-1].shares], key=bool) == [None, alone.fingerprint]
    assert "\n".join(pair.describe(40, 0)).count("of them new since it grew") == 1
