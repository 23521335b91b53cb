"""What a person sees of a run: rank 0's lines, and a bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

from halny.model.ranks import World


def say(world: World, text: str) -> None:
    """A line of the log, from rank 0, above the bar if there is one."""
    if world.is_main:
        with contextlib.suppress(OSError):  # a reader that left ("| head"), a full disk: no reason to stop training
            tqdm.write(text)
            sys.stdout.flush()


class Progress:
    """The loop's steps, from ``first`` to ``last``: a bar on a terminal, some twenty lines in a log file."""

    def __init__(self, world: World, first: int, last: int):
        self.world, self.first, self.last = world, first, last
        self.start = time.perf_counter()
        self.every = max(1, last // 20)
        self.slow_rank: int | None = None  # the one last complained about
        terminal = world.is_main and sys.stderr.isatty()
        self.bar = None
        if terminal:
            self.bar = tqdm(total=last, initial=first - 1, unit="step", dynamic_ncols=True)

    def show(self, m: dict) -> None:
        """A step's metrics line, as much of it as there is room for."""
        rate = f"{m['tokens_per_second_per_gpu']:,.0f} tokens/s" + ("/GPU" if self.world.device.type == "cuda" else "")
        mfu = [] if m["mfu"] is None else [f"mfu {m['mfu']:.1%}"]
        figures = [f"loss {m['loss']:.4f}", rate, *mfu, f"ppl {m['perplexity']:,.1f}", f"acc {m['accuracy']:.2%}",
            f"{m['peak_memory_gib']:.2f} GiB"]  # fmt: skip
        if self.bar is not None:  # as many as the window has room for, whole: tqdm would cut through a number
            room = (self.bar.format_dict["ncols"] or 80) - 46 - 2 * len(f"{self.bar.total}")
            fit = [f for i, f in enumerate(figures) if len("  ".join(figures[: i + 1])) <= room]
            self.bar.set_postfix_str("  ".join(fit), refresh=False)
            self.bar.update(m["step"] - self.bar.n)
        elif m["step"] % self.every == 0 or m["step"] in (self.first, self.last):
            done, left = m["step"] - self.first + 1, self.last - m["step"]
            eta = int((time.perf_counter() - self.start) / done * left)
            say(self.world, f"step {m['step']:>6}/{self.last}  {'  '.join(figures)}  lr {m['lr']:.2e}  "
                f"norm {m['grad_norm']:.2f}  eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}")  # fmt: skip

    def complain(self, slowest: dict | None) -> None:
        """Name a rank whose own work takes half as long again as the others', once."""
        if slowest and slowest["seconds"] > 1.5 * slowest["median"] and slowest["rank"] != self.slow_rank:
            self.slow_rank = slowest["rank"]
            say(self.world, f"rank {slowest['rank']} on {slowest['host']} is slow: a fixed matrix product takes it "
                f"{slowest['seconds'] * 1e3:.2f} ms, the others {slowest['median'] * 1e3:.2f}")  # fmt: skip

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
