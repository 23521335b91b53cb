"""What a run reads after its data were changed, beside a slow definition that counts sample by sample."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halny.model.data.batches import Corpus
from halny.model.data.dataset import DataError
from halny.model.data.history import Era, Share, from_json, gone_on, locate, samples_read, to_json
from halny.model.data.order import count_sources, interleave
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
    moved = config | {"recipe": {"data": ["elsewhere:0.9", f"{b}:0.1"]}}  # of which no source can be told
    turned.go_on(moved, 64, True)
    assert "elsewhere:0.9" in turned.describe(128, 0)[-1] and "after 64 samples" in turned.describe(128, 0)[-1]
    assert rows_of(turned, 64, 128) == rows_of(went_on(corpus(make(tmp_path / "c", 80)), turned, 64), 64, 128)


@pytest.mark.parametrize("harm", [
    None, [], {}, [1], [{}], [{"first_sample": 0}], [{"first_sample": 0, "sources": []}],
    [{"first_sample": 1, "sources": [{"fingerprint": "x", "weight": 1, "path": "x"}]}],
    [{"first_sample": 0, "sources": [{"fingerprint": "x", "weight": 0, "path": "x"}]}],
    [{"first_sample": 0, "sources": [{"fingerprint": "x", "weight": "1", "path": "x"}]}],
    [{"first_sample": 0, "sources": [{"fingerprint": "x", "weight": 1, "path": "x"}]}] * 2,
])  # fmt: skip
def test_a_history_that_no_run_wrote_is_refused(harm):
    with pytest.raises(DataError, match=r"data_history .* is not readable"):
        from_json(harm)


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
