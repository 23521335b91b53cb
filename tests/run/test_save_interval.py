"""--save-every auto: its interval against the exact optimum, when it is due, and a run that saves by it."""

import math
import re
import types

import pytest
import torch
from runs import SMALL, checkpoint, equal, ranks_run, saved_steps

from halny.model.durable import duration
from halny.model.estimate.choices import WRITING_COSTS, best_interval_s
from halny.model.exits import Refused
from halny.model.run import save_interval
from halny.model.run.ranks import World
from halny.model.run.recipe import Recipe, command_line
from halny.model.run.resolve import resolve
from halny.model.run.save_interval import SaveInterval

ONE = World(0, 1, torch.device("cpu"), mesh=None)


def waste(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """The share of time lost to saves and failures, exactly, for failures of a Poisson process and no restart."""
    return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s - 1


@pytest.mark.parametrize("stop_s, mtbf_s", [(0.01, 3600), (1.0, 3600), (1.0, 7.2e5), (30.0, 3600), (600.0, 3600)])
def test_no_other_interval_wastes_less(stop_s, mtbf_s):
    best = best_interval_s(stop_s, 0.0, mtbf_s)
    least = min(waste(best * 1.02**i, stop_s, mtbf_s) for i in range(-60, 61))
    assert waste(best, stop_s, mtbf_s) < least * 1.002
    assert best == pytest.approx(math.sqrt(2 * stop_s * mtbf_s), rel=0.25)


def test_the_writing_costs_a_little_and_is_the_least_interval():
    assert best_interval_s(1.0, 20.0, 1e5) == pytest.approx(best_interval_s(1.0 + WRITING_COSTS * 20, 0.0, 1e5))
    assert best_interval_s(0.001, 300.0, 600.0) == 300.0
    assert best_interval_s(50.0, 0.0, 10.0) == 10.0  # Daly: where a save takes longer than two failures


@pytest.fixture
def interval(monkeypatch):
    """SaveInterval of a rank with a clock that the test winds, and what it says."""

    def make(*arguments, world=ONE, took_s=0.0):
        clock, said = types.SimpleNamespace(now=1000.0), []
        monkeypatch.setattr(save_interval.time, "monotonic", lambda: clock.now)
        recipe = command_line(["--save-every", "auto", "--mtbf-hours", "10", *arguments])
        saver = types.SimpleNamespace(took_s=took_s)
        return SaveInterval(resolve(recipe, ONE), saver, world, said.append), clock, said

    return make


def test_it_is_due_by_the_clock_and_by_what_the_last_save_took(interval):
    auto, clock, said = interval()
    auto.saved(stop_s=2.0)
    seconds = best_interval_s(2.0, auto.writing_s, 36_000)
    clock.now += 0.9 * seconds
    assert not auto.due(7, False, 0.5)
    clock.now += 0.2 * seconds
    assert auto.due(8, False, 0.5)
    [line] = said
    assert f"every {duration(seconds)}, some {seconds / 0.5:,.0f} steps" in line and "stops the steps for 2 s" in line
    assert "(measured), with --mtbf-hours 10" in line
    auto.saved(stop_s=2.1)
    assert not auto.due(9, False, 0.5) and len(said) == 1  # about the same: nothing to say
    auto.saved(stop_s=20.0)
    assert not auto.due(10, False, 0.5) and len(said) == 2


def test_an_evaluated_step_is_saved_earlier_and_the_kept_ones_always(interval):
    auto, clock, _ = interval("--keep-every", "50")
    auto.saved(stop_s=2.0)
    clock.now += 0.6 * best_interval_s(2.0, auto.writing_s, 36_000)
    assert [auto.due(step, evaluated, 0.5) for step, evaluated in ((49, False), (49, True), (50, False))] == [
        False, True, True,
    ]  # fmt: skip


def test_rank_0_alone_asks(interval):
    other, clock, said = interval(world=World(1, 2, torch.device("cpu"), mesh=None))
    clock.now += 1e6
    assert not other.due(50, True, 0.5) and not said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--save-every", "auto"], "--save-every auto needs --mtbf-hours"),
        (["--mtbf-hours", "100"], "--mtbf-hours 100 belongs to --save-every auto"),
        (["--save-every", "often"], "--save-every must be a whole number or auto, got 'often'"),
        (["--save-every", "auto", "--mtbf-hours", "0"], "--mtbf-hours must be more than 0"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(Refused, match=re.escape(words)):
        resolve(command_line(arguments), ONE)


def test_a_whole_number_is_one_still():
    assert resolve(command_line(["--save-every", "50"]), ONE).recipe.save_every == 50
    assert resolve(Recipe(steps=100), ONE).recipe.save_every == 10


def test_a_run_of_two_ranks_saves_by_it_and_computes_the_same(small, tmp_path):
    command = [*SMALL, "--steps", 20, "--lr", "1e-3", "--eval-every", 0, "--data", small]
    auto = ("--save-every", "auto", "--mtbf-hours", "1e-5", "--keep", 100)
    run = ranks_run(*command, *auto, "--run-dir", "r", ranks=2, cwd=tmp_path)
    assert re.search(r"saving     every .* best by Young and Daly", run.out)
    assert len(saved_steps(tmp_path / "r")) > 1 and saved_steps(tmp_path / "r")[-1] == 20
    ranks_run(*command, "--run-dir", "whole", ranks=2, cwd=tmp_path)
    assert equal(checkpoint(tmp_path / "r", 20), checkpoint(tmp_path / "whole", 20))
