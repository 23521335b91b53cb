"""Fixtures and markers that every test file shares; plain helper functions are in helpers.py."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from halny.kernels import dispatch
from halny.model.data.writer import write_dataset

torch.set_num_threads(2)  # what CI has; more threads than cores make small operations crawl


def pytest_configure(config):
    """``-m gpu`` is a run on the GPU. Any other is one on the CPU, also where there is a GPU.

    Hidden, it is hidden from the runs of train.py too that tests start: two ranks would want one GPU each.
    """
    if "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr:
        # for deterministic products; PyTorch looks at its first product in cuBLAS, and never again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _compiling(item) -> int:
    """How much a test compiles: what compiles most comes last on a GPU, in case time runs out."""
    return 2 if "attention" in item.nodeid else int("cross_entropy" in item.nodeid and "full_size" not in item.nodeid)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        items.sort(key=_compiling)
        return
    no_gpu = pytest.mark.skip(reason="marked gpu: needs a GPU, and to be asked for by -m gpu")
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
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes test on the same GPU
    assert switches == (dispatch._reference_only, dispatch._checks_cuda_values), "a dispatch switch was left on"


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A data folder of 255 + 1 token ids whose fourth and last sample of 64 has only 9 targets."""
    rng = np.random.default_rng(0)

    def documents(n_tokens):  # a noisy cycle through 40 tokens: something to learn
        return [(np.arange(n_tokens) * 7 % 40 + rng.integers(0, 3, n_tokens)).astype(np.int64)]

    out = tmp_path_factory.mktemp("data") / "small"
    write_dataset(documents(3 * 64 + 10), out, vocab_size=256, val_documents=documents(150))
    return out
