"""bench/convergence.py --average, on a text and a model so small that forty steps take a second."""

import json
import statistics

import numpy as np
import pytest
import torch

import train
from bench import convergence
from halny.model.data.order import sample_order, step_numbers

STEPS, FORK = 80, 64
SMALL = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=32, window=8, max_seq_len=32)


class SmallText:
    """A stand-in for convergence.Text: 40 samples of 16 tokens, each token the last one plus one or two."""

    def __init__(self, device: torch.device = torch.device("cpu")):  # noqa: B008
        self.vocab_size = 32
        draws = torch.randint(1, 3, (48, 17), generator=torch.Generator().manual_seed(1))
        ids = draws.cumsum(1).remainder(self.vocab_size).to(device)
        self.train, self.held_out = ((x[:, :-1].clone(), x[:, 1:].clone()) for x in (ids[:40], ids[40:]))

    def batch(self, step: int, seed: int):
        rows = sample_order(step_numbers(step, convergence.SAMPLES_A_STEP), 40, seed)
        return self.train[0][rows], self.train[1][rows]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as main does on a CPU; more only wait for each other
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # heads of 8 are too small for a GPU's kernels
    monkeypatch.setattr(convergence, "SIZES", SMALL)
    monkeypatch.setattr(convergence, "Text", SmallText)
    yield
    torch.set_num_threads(threads)


def straight(recipe: train.Recipe, seed: int, dtype: torch.dtype) -> tuple[list, list[list[np.ndarray]], object]:
    """A run without any branch: held-out losses and fp32 weights at every second step, and the model."""
    text = SmallText()
    model = convergence.fresh(text, seed)
    optimizer = convergence.Torch(model, 0.95, nearest=False, dtype=dtype)
    losses, weights = [], []
    for step, _ in convergence.trained(model, optimizer, text, recipe, range(1, STEPS + 1), seed):
        if step % 2 == 0:
            losses.append([step, convergence.held_out_loss(model, text)])
            weights.append([x.numpy().copy() for x in optimizer.masters])
    return losses, weights, model


def test_the_schedules_agree_up_to_the_decay():
    constant, decaying = convergence.schedules(STEPS)
    rates = [[train.learning_rate(recipe, step) for step in range(1, STEPS + 1)] for recipe in (constant, decaying)]
    assert rates[0][:FORK] == rates[1][:FORK] and rates[0][FORK:] == [convergence.LR] * (STEPS - FORK)
    assert all(a > b for a, b in zip(rates[0][FORK:], rates[1][FORK:], strict=True))
    assert rates[1][-1] == decaying.min_lr == convergence.LR / 10


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_branches_and_means_are_those_of_runs_from_the_start(dtype):
    """Bit for bit: what a branch took over is all that a run from the start has, and judging changes nothing."""
    curves = convergence.average(SmallText(), STEPS, 3, 0.95, dtype)["curves"]
    constant, decaying = convergence.schedules(STEPS)
    losses, weights, model = straight(constant, 3, train.DTYPES[dtype])
    assert next(model.parameters()).dtype == train.DTYPES[dtype]
    assert losses[0][1] > losses[-1][1] + 0.5, "it learns nothing, so the curves would agree whatever is done"
    decayed = straight(decaying, 3, train.DTYPES[dtype])[0]
    assert curves["last checkpoint"] == losses
    assert curves["decayed"] == [point for point in decayed if point[0] > FORK]
    assert decayed[: FORK // 2] == losses[: FORK // 2] and decayed[-1][1] != losses[-1][1]
    for k in (2, 16):
        curve = curves[f"mean of the last {k}"]
        assert [step for step, _ in curve] == list(range(2 * k, STEPS + 1, 2))
        for step, loss in (curve[0], curve[-1]):
            of = zip(*weights[step // 2 - k : step // 2], strict=True)
            for p, same in zip(model.parameters(), of, strict=True):
                mean = np.mean(np.stack(same).astype(np.float64), axis=0).astype(np.float32)
                p.data.copy_(torch.from_numpy(mean))
            assert loss == pytest.approx(convergence.held_out_loss(model, SmallText()), rel=1e-6), (k, step)


def test_the_mean_is_summed_in_fp64():
    """In fp32 each quarter of an ulp would be lost, one after another."""
    first, rest = torch.tensor([1.0]), torch.tensor([2.0**-25])
    mean = convergence.mean_of([[first, rest], *[[rest, rest]] * 15])
    assert mean[0].dtype == torch.float32
    assert mean[0].item() == np.float32((1 + 15 * 2.0**-25) / 16) > 1 / 16
    assert torch.equal(mean[1], rest)


def test_averaging_runs_and_tells(tmp_path, capsys):
    """Two seeds: the summary is that of the runs, at both steps, and the table shows it."""
    assert convergence.main(["--average", "--steps", str(STEPS), "--seeds", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "averaging.json").read_text())
    assert (tmp_path / "averaging.png").stat().st_size > 10_000
    setting = result["setting"]
    assert (setting["decay_steps"], setting["interval"], setting["dtype"]) == (16, 2, "fp32")
    rows = {(row["what"], row["step"]): row for row in result["summary"]}
    names = ["last checkpoint", *(f"mean of the last {k}" for k in (2, 4, 8, 16))]
    assert list(rows) == [(name, FORK) for name in names] + [(name, STEPS) for name in [*names, "decayed"]]
    for (name, step), row in rows.items():
        of, last = ([dict(run["curves"][x])[step] for run in result["runs"]] for x in (name, "last checkpoint"))
        assert row["held_out_loss"] == pytest.approx(statistics.mean(of))
        assert row["spread"] == pytest.approx(statistics.stdev(of))
        differences = [a - b for a, b in zip(of, last, strict=True)]
        assert row["difference"] == pytest.approx(statistics.mean(differences), abs=1e-12)
        assert row["spread_of_difference"] == pytest.approx(statistics.stdev(differences), abs=1e-12)
    decayed = rows["decayed", STEPS]
    heard = capsys.readouterr().out
    assert f"| {STEPS} | decayed | {decayed['held_out_loss']:.3f} | {decayed['spread']:.3f} | " in heard


def test_steps_that_hold_no_even_checkpoints_are_refused(tmp_path, capsys):
    for steps in ("20", "100"):
        assert convergence.main(["--average", "--steps", steps, "--out", str(tmp_path)]) == 2
        heard = capsys.readouterr()
        assert f"must be a multiple of 40, so that as many checkpoints lie evenly in them, got {steps}\n" in heard.err
        assert heard.err.count("\n") == 1 and not heard.out
    assert not list(tmp_path.iterdir())
