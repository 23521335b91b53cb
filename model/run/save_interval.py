"""When to save: every so many steps, or (--save-every auto) at the interval that costs least (estimate/choices.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from halny.model.durable import duration
from halny.model.estimate.choices import best_interval_s, expect_save
from halny.model.run.ranks import World
from halny.model.run.recipe import AUTO
from halny.model.run.resolve import RunSpec
from halny.model.run.saver import Saver


class SaveInterval:
    """Tells after which steps a checkpoint is due: by their number or, for auto, by the time since the last.

    auto goes by rank 0's clock, since ranks that judged for themselves would part: ``due`` is true there alone, and
    ``ask_everywhere`` takes it to all. What a save takes is an estimate until one was made.
    """

    def __init__(self, spec: RunSpec, saver: Saver, world: World, say: Callable[[str], None]):
        self._recipe, self._saver, self._is_main, self._say = spec.recipe, saver, world.is_main, say
        self._last = time.monotonic()
        expected = expect_save(spec.model, spec.recipe.moments, spec.layout.shard, world.device_name)
        self._stop_s, self._expected_writing_s = expected
        self._known, self._said_s = "estimated", 0.0

    @property
    def writing_s(self) -> float:
        """Of a checkpoint, beside the training: as the last one took, or as is expected of the first."""
        return self._saver.took_s or self._expected_writing_s

    def due(self, step: int, evaluated: bool, step_s: float) -> bool:
        """Whether to save after this step, for ``ask_everywhere``; ``evaluated``: an evaluation comes first.

        auto saves with an evaluation, too, if half the interval is over, since of those evaluated the best is kept;
        and at the steps that --keep-every names. step_s: of a step, 0 if that is not known yet.
        """
        recipe = self._recipe
        if recipe.save_every != AUTO:
            return step % recipe.save_every == 0
        if not self._is_main:
            return False
        interval_s = best_interval_s(self._stop_s, self.writing_s, recipe.mtbf_hours * 3600)
        if step_s and abs(math.log(interval_s / (self._said_s or 1e-9))) > math.log(1.2):
            self._said_s = interval_s
            self._say(
                f"saving     every {duration(interval_s)}, some {max(1, round(interval_s / step_s)):,} steps, best by "
                f"Young and Daly where a save stops the steps for {duration(self._stop_s)} and is written in "
                f"{duration(self.writing_s)} ({self._known}), with --mtbf-hours {recipe.mtbf_hours:g}"
            )
        wanted = recipe.keep_every is not None and step % recipe.keep_every == 0
        return wanted or time.monotonic() - self._last >= interval_s * (0.5 if evaluated else 1.0)

    def saved(self, stop_s: float) -> None:
        """A save has begun, and stopped the training for so long."""
        self._last, self._stop_s, self._known = time.monotonic(), stop_s, "measured"
