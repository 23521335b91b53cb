"""For ``pytest bench``: say above the figures when they are none."""

import torch


def pytest_report_header():
    return (
        [] if torch.cuda.is_available() else "no GPU: tiny sizes on a CPU, to see that calls work; no time is a result"
    )
