"""What a person sees of a run: in a terminal of any width, and in a log file."""

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios

import pytest
import torch
from runs import SMALL, ranks_run

from halny.model.record.journal import Progress
from halny.model.run.ranks import World

LINE = {
    "loss": 3.14159, "perplexity": 23.14, "accuracy": 0.25, "tokens_per_second_per_gpu": 12345.6, "mfu": 0.412,
    "peak_memory_gib": 1.5, "lr": 1e-3, "grad_norm": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_the_progress_line_fits_the_window_and_cuts_no_number(monkeypatch, columns):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    world = World(0, 1, torch.device("cpu"), mesh=None)
    with os.fdopen(slave, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        progress = Progress(world, 9_000, 17_350)
        progress.bar.mininterval = progress.bar.miniters = 0
        for step in (9_000, 9_001):
            progress.show(LINE | {"step": step})
        progress.close()
    with os.fdopen(master, "rb", buffering=0) as screen:
        shown = ""
        with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
            while chunk := screen.read(65536):
                shown += chunk.decode()
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", shown) if line.strip()]
    assert max(map(len, lines)) <= columns and "9001/17350" in lines[-1], lines
    figures = ["loss 3.1416", "12,346 tokens/s", "mfu 41.2%", "ppl 23.1", "acc 25.00%", "1.50 GiB"]
    room = {30: 0, 60: 0, 80: 1, 200: 6}[columns]
    fitting = [figure for figure in figures if figure in lines[-1]]
    assert fitting == figures[: len(fitting)] and len(fitting) >= room, lines
    if room:
        assert lines[-1].endswith(figures[len(fitting) - 1] + "]"), lines


def test_a_log_file_has_no_control_characters_a_short_start_and_each_warning_once(small, tmp_path):
    sets = [f"s{i}:{small}" for i in range(40)]
    command = [*SMALL, "--data", small, "--steps", 3, "--save-every", 3, "--eval-every", 0, "--run-dir", "r"]
    process = ranks_run(*command, "--eval-data", *sets, ranks=2, cwd=tmp_path, fault=("warns",))
    assert not re.search(r"[^\n -~]", process.err + process.out)
    before, first, _ = process.out.partition("step      1/3")
    assert first and 8 <= before.count("\n") < 30 and "and 32 more" in before, before
    assert process.err.count("UserWarning: injected warning") == 1, process.err
