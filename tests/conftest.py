"""Fixtures and markers that every test file shares; plain helper functions are in helpers.py."""

import pytest
import torch

from halny.kernels import dispatch

torch.set_num_threads(2)  # what CI has; more threads than cores make small operations crawl


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="marked gpu, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture
def launches():
    """The count of kernel launches by name, from zero: assert on it, so that no kernel test passes on the reference."""
    dispatch.launches.clear()
    yield dispatch.launches
    dispatch.launches.clear()


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the dispatch switches as it found them."""
    torch.manual_seed(0)
    switches = dispatch._reference_only, dispatch._checks_cuda_values
    yield
    assert switches == (dispatch._reference_only, dispatch._checks_cuda_values), "a dispatch switch was left on"
