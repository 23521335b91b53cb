"""What a checkpoint costs the training: measured here at a small size, calculated for a 7B.

    python bench/checkpoint.py [--dim 512] [--folder DIR]        needs no GPU, and uses one if there is one

Measured: model/run/checkpoint.py's Saver on one rank, the state of a real model and its AdamW. "stalled" is how long
``save`` keeps the training (the copy, and a look whether the weights are finite), "on disk" how long until the folder
has its final name. The first save also allocates the copy's memory, pinned on a GPU.

Calculated: the same copy for Mistral-7B at bandwidths that are stated, not measured: a share of the time between saves.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from halny.model.durable import in_words
from halny.model.estimate.memory import checkpoint_bytes
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.ranks import start_distributed
from halny.model.run.saver import Saver, training_state

# (what, ranks, seconds between saves, copy into pinned host memory in bytes/s a rank, where the figure comes from)
CASES = [
    ("7B, 256 GH200", 256, 1800, 300e9, "NVLink-C2C, 450 GB/s a direction by data sheet, two thirds of it assumed"),
    ("7B, 256 H100", 256, 1800, 25e9, "PCIe 5 x16, 64 GB/s by standard, two GPUs assumed to share it"),
    ("7B, one GH200", 1, 3600, 300e9, "as above"),
    ("7B, one H200", 1, 3600, 50e9, "PCIe 5 x16 alone"),
]
PINNING = 2e9  # bytes/s, assumed: what the first save costs beside its copy


def measure(dim: int, folder: Path, saves: int = 4) -> None:
    import torch

    world = start_distributed(600)
    config = replace(PRESETS["tiny"], dim=dim, n_heads=dim // 32, n_kv_heads=dim // 64, hidden_dim=3 * dim)
    model = Mistral(config).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    saver, state = Saver(folder, 1, None, world), training_state(model, optimizer)
    n_bytes = sum(x.numel() * x.element_size() for x in state.values())
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    print(f"measured on one {device}: a checkpoint of {in_words(n_bytes)}")
    print(f"{'save':>6} {'stalled, ms':>12} {'copied at':>14} {'on disk, s':>12}")
    for i in range(saves):
        saver.save(i + 1, state, {})
        stalled = saver.stalled_s
        saver.wait()
        print(f"{i + 1:>6} {stalled * 1e3:>12.1f} {in_words(n_bytes / stalled) + '/s':>14} {saver.took_s:>12.2f}")


def calculate() -> None:
    config = PRESETS["mistral-7b"]
    print("\ncalculated from stated bandwidths, not measured")
    print(f"{'case':<16} {'a rank':>9} {'every':>7} {'copy at':>11} {'stalled':>9} {'share':>9} {'first':>8}  source")
    for what, ranks, every, bandwidth, source in CASES:
        size = checkpoint_bytes(config, shards=ranks)
        stall = size / bandwidth
        print(f"{what:<16} {in_words(size):>9} {every // 60:>3} min {in_words(bandwidth) + '/s':>11} {stall:>7.3f} s "
            f"{stall / every:>9.4%} {stall + size / PINNING:>6.1f} s  {source}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dim", type=int, default=512, help="width of the measured model [512: 0.5 GB]")
    parser.add_argument("--folder", type=Path, help="where to write [a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options.dim, Path(folder))
    calculate()
