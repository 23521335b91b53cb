"""What a run came to: summary.json and the lines that train.py prints at its end.

Tokens, speed and MFU are of the whole run, from metrics.jsonl, whatever number of starts and of ranks it took; where
the time went, and the energy, are of the last start.
"""

from __future__ import annotations

import functools
import time

import torch

from halny.model.estimate.roofline import palm_flops_per_token


def spent_on(what: str):
    """Decorates a function of a run: its seconds are added to ``run.spent[what]``, but for those spent inside it."""

    def decorate(function):
        @functools.wraps(function)
        def timed(run, *arguments, **options):
            began, before = time.perf_counter(), sum(run.spent.values())
            try:
                return function(run, *arguments, **options)
            finally:
                inside = sum(run.spent.values()) - before
                run.spent[what] = run.spent.get(what, 0.0) + time.perf_counter() - began - inside

        return timed

    return decorate


def energy_joules(device: torch.device) -> float | None:
    """What this GPU has drawn since its driver was loaded, in J; None where nothing tells.

    NVML's total energy counter, which Volta and later have; by UUID, because CUDA_VISIBLE_DEVICES renumbers.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no pynvml, no permission, MIG: its errors are as many as there are drivers
        return None


EVALUATED = ("step", "val_loss", "val_bits_per_byte")


def summarize(lines: list[dict], spec, spent: dict[str, float], wall_s: float, energy_j: float | None) -> dict:
    """``lines`` of metrics.jsonl; the run's RunSpec; ``spent`` seconds by what they were spent on, this start."""
    tokens = spec.recipe.batch_tokens
    rates = [(line["tokens_per_second_per_gpu"], line.get("mfu")) for line in lines if "loss" in line]
    gpu_s = sum(tokens / rate for rate, _ in rates)
    rate = tokens * len(rates) / gpu_s if gpu_s else None
    mfus = [(mfu, tokens / rate) for rate, mfu in rates if mfu is not None]
    palm = palm_flops_per_token(spec.model, spec.recipe.seq_len)
    evaluations = [line for line in lines if line.get("val_loss") is not None]
    best = min(evaluations, key=lambda line: line["val_loss"], default=None)
    return {
        "steps": len(rates),
        "tokens": tokens * len(rates),
        "gpu_seconds": gpu_s,
        "tokens_per_second_per_gpu": rate,
        "mfu": sum(mfu * s for mfu, s in mfus) / sum(s for _, s in mfus) if mfus else None,
        "mfu_palm": rate * palm / spec.peak_flops if rate and spec.peak_flops else None,
        "best_evaluation": best and {key: best[key] for key in EVALUATED if key in best},
        "this_start": {"wall_s": wall_s, "spent_s": dict(spent), "energy_j": energy_j},
    }


def in_lines(summary: dict) -> str:
    """As train.py prints it."""
    start = summary["this_start"]
    speed = summary["tokens_per_second_per_gpu"]
    mfu = summary["mfu"]
    lines = [
        f"summary    {summary['steps']:,} steps, {summary['tokens']:,} tokens"
        + (f", {speed:,.0f} tokens/s/GPU" if speed else "")
        + (f", MFU {mfu:.1%}, by PaLM's formula {summary['mfu_palm']:.1%}" if mfu is not None else ""),
        f"time       {start['wall_s']:,.1f} s since this start: "
        + ", ".join(f"{what} {seconds:,.1f}" for what, seconds in start["spent_s"].items()),
    ]
    if start["energy_j"] is not None:
        lines.append(f"energy     {start['energy_j'] / 3.6e6:,.3f} kWh drawn by the GPUs since this start")
    return "\n".join(lines)
