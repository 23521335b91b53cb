"""For ``pytest bench``: say beneath the figures when they are none."""

import torch


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line("no GPU: tiny sizes on a CPU, to see that the calls work; no time here is a result")
