"""What was measured of the rates that model/estimate/step_time.py assumes: matrix products, attention, memory.

The plan counts attention as three times its forward pass, and so does a profiled step here. bench/attention.py counts
3.5 times, with the product that the backward makes again, so its own TFLOP/s are higher by a sixth of the plan's for
the same milliseconds; what stands beside the plan's rate is counted as the plan does.
"""

from __future__ import annotations

from dataclasses import replace

from bench.lib.steps import SIZES
from bench.merge import Device
from halny.model.estimate import machines, roofline, sizes
from halny.model.mistral import PRESETS


def rate_rows(device: Device) -> list[tuple]:
    """(what, unit, field of Rates, the data sheet's peak, measured, the row it is from) of all that was measured.

    Field and peak are None where the plan assumes nothing of it, or does not know the GPU.
    """
    found = []
    gpu = machines.GPUS.get(device.name)
    peak, bandwidth = (gpu.bf16_flops / 1e12, gpu.hbm_bytes_per_second / 1e9) if gpu else (None, None)
    sections = device.sections
    with_ceilings = [s for s in device.sources if s.ceilings]
    if with_ceilings:
        newest = {"source": with_ceilings[-1], "mode": "one-gpu"}
        ceilings = newest["source"].ceilings
        found += [
            ("matrix products alone, the step's shapes", "TFLOP/s", "matmul", peak, ceilings["step_tflop_s"], newest),
            ("device copy", "GB/s", "memory", bandwidth, ceilings["copy_gb_s"], newest),
        ]
    attention = {
        row["mode"]: row
        for row in sections.get("attention", [])
        if row["package"] == "halny" and row["set"] == "4 x 4096" and row["status"] == "ok"
    }
    for mode in ("forward", "backward"):
        if row := attention.get(mode):
            found.append((f"attention, 4 x 4096, {mode}", "TFLOP/s", None, None, row["tflop_s"], row))
    forward, backward = attention.get("forward"), attention.get("backward")
    if forward and backward and forward["source"] is backward["source"]:
        ms = forward["kernel_ms"]["median"] + backward["kernel_ms"]["median"]
        what = "attention, 4 x 4096, forward and backward, as 3 times the forward's FLOPs"
        found.append((what, "TFLOP/s", "attention", peak, 3 * forward["flops"] / ms / 1e9, forward))
    for profile in sections.get("profile", []):
        step = next((row for row in sections.get("step", []) if row["label"] == profile["label"]), {})
        found += profiled_rates({k: step[k] for k in SIZES if k in step} | profile, peak)
    return found


def profiled_rates(profile: dict, peak: float | None) -> list[tuple]:
    """The matrix products' and attention's rates inside a profiled step: its FLOPs over their kernels' time."""
    if profile["status"] != "ok" or not all(k in profile for k in SIZES[:3]):
        return []
    config = replace(PRESETS["mistral-7b"], n_layers=profile["n_layers"])
    sequences = profile["micro_batch"] * profile.get("accumulation", 1)
    flops = {
        "matmul": 6 * sizes.matmul_parameters(config) * sequences * profile["seq_len"],
        "attention": roofline.attention_flops(config, [profile["seq_len"]] * sequences),
    }
    names = {"matmul": "matrix products in the step", "attention": "attention in the step, forward and backward"}
    found = []
    if alone := profile.get("ceiling_before"):
        what = "matrix products alone, beside the profiled step"
        found.append((what, "TFLOP/s", "matmul", peak, alone["tflop_s"], profile))
    for part, name in names.items():
        if ms := profile["categories_ms"].get(part):
            found.append((name, "TFLOP/s", part, peak, flops[part] / ms / 1e9, profile))
    return found
