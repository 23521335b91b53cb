"""Where a step's time went, of a trace: kernels by category, held against what each must take, and the model's parts.

    tables          kernels by name -> categories -> time of each, and what is idle
    floors          the least time that each category can take, and the gaps to it
    regions         the parts of the model, named spans in the trace

profiler.py and bench/step.py --profile record the traces.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import profile

from halny.model.estimate import machines, roofline, sizes, step_time
from halny.model.estimate.work import Layout, Work

if TYPE_CHECKING:
    from halny.model.run.ranks import World


# --- tables -----------------------------------------------------------------------------------------------------------

# The first pattern that is found in a kernel's name decides. Names are those of cuBLAS, cuDNN, FlashAttention, NCCL,
# PyTorch and ours, and "aten::" ones for the CPU. What no pattern knows is "other", and listed by name. The order
# matters: FlashAttention's kernels are also CUTLASS's, and a product's name may tell how it copies its tiles.
CATEGORIES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d::|gloo:"),
    # All of cuDNN's, whose backward has helpers (compute_dot_do_o, convert_dq_to_16bits, matmul_dq): nothing else here
    # calls cuDNN. And all that Inductor generates: FlexAttention alone is compiled.
    ("attention", r"[Ff]lash|fmha|sdpa|cudnn|scaled_dot_product|flex_attention|^triton_(tem|red|per|poi)_fused"),
    ("norm, RoPE, SwiGLU", r"^rms_norm_|^rope_kernel|^swiglu_"),
    ("loss", r"^cross_entropy_kernel|^scale_kernel|[Ll]og_?[Ss]oft[Mm]ax|nll_loss"),
    ("matmul", r"gemm|gemv|nvjet|cublas|splitK|tensorop|aten::(add|b)?mm$"),
    ("copies", r"^Mem(cpy|set)|[Cc]opy|CatArray|chunk_cat|split_with_sizes|aten::cat$|fsdp::"),
    (
        "optimizer",
        r"^adamw_|^add_(rounded|wide)_|^block_norms_|multi_tensor_apply|[Ff]used_?[Aa]dam|_foreach_|linalg_vector_norm"
        r"|lpnorm_cleanup|NormTwoOps",
    ),
)


def category(kernel: str) -> str:
    """The part of a step that a GPU kernel belongs to, by its name."""
    return next((name for name, pattern in CATEGORIES if re.search(pattern, kernel)), "other")


def union_ms(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end), in the same unit; what is not covered is idle."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Where kernels of several categories run at once, the time is the first one's: computation hides communication.
PRECEDENCE = ("matmul", "attention", "norm, RoPE, SwiGLU", "loss", "optimizer", "other", "copies", "communication")


def shares_of_time(intervals: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Category -> the time that is its own: covered by it, and by none before it in PRECEDENCE. They never overlap."""
    shares, covered, so_far = {}, [], 0.0
    for name in PRECEDENCE:
        covered = covered + intervals.get(name, [])
        before, so_far = so_far, union_ms(covered)
        shares[name] = so_far - before
    return shares


def breakdown(kernels: list[tuple[str, float, float]], wall_ms: float) -> dict:
    """Of (name, start, end) in ms and their wall time: time by category, idle time, and the kernels of each.

    The wall time is that of steps being profiled, longer than others by what the profiler costs the host.
    ``categories_ms`` adds up the kernels' own durations, so on overlapping streams its sum can exceed the wall time;
    ``own_ms`` divides the wall time (``shares_of_time``), and with ``idle_ms``, what no kernel covers, adds up to it.
    Communication's own time is what computation leaves exposed; the rest of it is hidden.
    """
    by_name: dict[str, list[float]] = defaultdict(list)
    intervals: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, start, end in kernels:
        by_name[name].append(end - start)
        intervals[category(name)].append((start, end))
    parts: dict[str, float] = dict.fromkeys([name for name, _ in CATEGORIES] + ["other"], 0.0)
    listed = []
    for name, durations in by_name.items():
        parts[category(name)] += sum(durations)
        listed.append({"kernel": name[:200], "category": category(name), "n": len(durations), "ms": sum(durations)})
    own = shares_of_time(intervals)
    return {
        "wall_ms": wall_ms,
        "categories_ms": parts,
        "own_ms": own,
        "hidden_communication_ms": union_ms(intervals["communication"]) - own["communication"],
        "idle_ms": max(0.0, wall_ms - sum(own.values())),
        "kernels": sorted(listed, key=lambda k: -k["ms"])[:60],
        "other": sorted((k for k in listed if k["category"] == "other"), key=lambda k: -k["ms"])[:20],
    }


def events_of(trace: Path) -> list[dict]:
    """The events of a Chrome trace."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


ROUNDING_US = 0.01  # of a time in a trace: three decimals, as floating-point numbers that may be large
STAND_IN = "c10d::stand-in"  # spans of this name hold copies that take the place of a collective (bench/step.py)


def kernels_of(events: list[dict]) -> list[tuple[str, float, float]]:
    """(name, start, end) in ms of what ran on the GPU: kernels, copies, fills; no annotations.

    What runs inside a span of a stand-in, on its stream, has the span's name before its own.
    """
    spans: dict[tuple, list[tuple[float, float, str]]] = defaultdict(list)
    for e in events:
        if e.get("cat") == "gpu_user_annotation" and e["name"].startswith(STAND_IN):
            span = e["ts"] - ROUNDING_US, e["ts"] + e["dur"] + ROUNDING_US, e["name"]
            spans[e["pid"], e["tid"]].append(span)
    kernels = []
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start, end = e["ts"], e["ts"] + e["dur"]
            around = next((n for a, b, n in spans[e.get("pid"), e.get("tid")] if a <= start and end <= b), None)
            kernels.append((f"{around}: {e['name']}" if around else e["name"], start / 1e3, end / 1e3))
    return kernels


def operators_of(profiled: profile) -> list[tuple[str, float, float]]:
    """The same of operators on the CPU. They nest: each counts for what it does itself, laid end to end."""
    operators, at = [], 0.0
    for event in profiled.events():
        if not event.is_user_annotation:  # a region is no work of its own
            operators.append((event.name, at, at + event.self_cpu_time_total / 1e3))
            at += event.self_cpu_time_total / 1e3
    return operators


def category_lines(found: dict, n_steps: int = 1) -> list[str]:
    """A ``breakdown`` as a table: milliseconds a step and share of the wall time."""
    parts = sorted(found["categories_ms"].items(), key=lambda item: -item[1])
    return [
        f"  {name:20}{ms / n_steps:10.2f} ms {ms / found['wall_ms']:6.1%}"
        for name, ms in [*parts, ("idle", found["idle_ms"])]
    ]


# --- floors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """What the floors are divided by, and where that is from."""

    matmul: float  # FLOP/s
    attention: float  # FLOP/s, of roofline.attention_flops
    memory: float  # bytes/s
    basis: str


def ideal_speeds(gpu: machines.GPU) -> Speeds:
    """estimate/step_time.py's rates called ideal, on this GPU."""
    ideal = step_time.RATES["ideal"]
    matmul, attention = ideal.matmul * gpu.bf16_flops, ideal.attention * gpu.bf16_flops
    memory = ideal.memory * gpu.hbm_bytes_per_second
    basis = (
        f"assumed: matmuls at {matmul / 1e12:,.0f} TFLOP/s, attention at {attention / 1e12:,.0f}, all else at "
        f"{memory / 1e9:,.0f} GB/s"
    )
    return Speeds(matmul, attention, memory, basis)


@dataclass(frozen=True)
class Floors:
    """The least milliseconds of a step by category, and on what speeds that rests."""

    ms: dict[str, float]
    basis: str


def floors(work: Work, speeds: Speeds, layout: Layout, exposed_s: float = 0.0, stand_in: bool = False) -> Floors:
    """What a step must take at least: FLOPs and bytes of estimate/roofline.py over these speeds.

    layout              under FSDP its copies of weights and gradients have a floor too
    exposed_s           communication that no computation can hide
    stand_in            whether copies take the place of collectives (``STAND_IN``): their bytes, read once and written
                        once, as if nothing hid them; where matrix products do, the gap is below zero
    What is idle can be nothing.
    """
    config, tokens = work.config, work.accumulation * work.tokens
    matmul_flops = 6 * sizes.matmul_parameters(config) * tokens
    attention_flops = work.accumulation * roofline.attention_flops(config, [work.seq_len] * work.micro_batch)
    rows = sum(roofline.row_kernel_bytes(config, work.tokens, recompute=work.recompute))
    copied = roofline.fsdp_copy_bytes(config, layout.shard, layout.gathered_again) if layout.fsdp else 0
    if layout.fsdp and stand_in:
        replaced = roofline.collectives(
            config, layout.shard, gathered_again=layout.gathered_again, accumulation=work.accumulation
        )
        exposed_s += 2 * sum(c.count * c.bytes for c in replaced) / speeds.memory
    loss, other = roofline.loss_bytes(config, work.tokens), roofline.other_bytes(config, work.tokens)
    seconds = {
        "matmul": matmul_flops / speeds.matmul,
        "attention": attention_flops / speeds.attention,
        "norm, RoPE, SwiGLU": work.accumulation * rows / speeds.memory,
        "loss": work.accumulation * loss / speeds.memory,
        "optimizer": step_time.update_bytes(work, layout) / speeds.memory,
        "other": work.accumulation * other / speeds.memory,
        "copies": work.accumulation * copied / speeds.memory,
        "communication": exposed_s,
        "idle": 0.0,
    }
    return Floors({name: 1e3 * s for name, s in seconds.items()}, speeds.basis)


def floors_of_run(work: Work, layout: Layout, world: World) -> Floors | None:
    """The floors of a run's bf16 step on a GPU that machines.py knows, at the rates called ideal; else None."""
    cluster = step_time.cluster_of_run(world.device_name, world.size, world.node_size)
    if cluster is None or work.compute_bytes != 2:
        return None
    exposed_s = step_time.step(work, cluster, layout, step_time.RATES["ideal"]).exposed
    return floors(work, ideal_speeds(cluster.gpu), layout, exposed_s)


def gaps(found: dict, least: Floors, n_steps: int = 1) -> list[dict]:
    """Of a ``breakdown`` of so many steps: a row a category, the largest gap first; ms a step.

    ms is the category's own time, so the rows add up to the step; kernels_ms the durations of its kernels, more where
    they run beside others; gap_ms is ms - floor_ms, below zero where kernels beat the floor's speeds.
    """
    own = {**found["own_ms"], "idle": found["idle_ms"]}
    rows = [
        {
            "part": name,
            "ms": ms / n_steps,
            "kernels_ms": found["categories_ms"].get(name, 0.0) / n_steps,
            "floor_ms": least.ms[name],
            "gap_ms": ms / n_steps - least.ms[name],
        }
        for name, ms in own.items()
    ]
    return sorted(rows, key=lambda row: -row["gap_ms"])


def gap_lines(found: dict, least: Floors, n_steps: int = 1, label: str = "") -> list[str]:
    """``gaps`` as a table, with the step's sum below. ``label`` ends each line that has a figure."""
    rows, columns = gaps(found, least, n_steps), ("ms", "kernels_ms", "floor_ms", "gap_ms")
    rows.append({"part": "the step", **{k: sum(row[k] for row in rows) for k in columns}})
    hidden = found["hidden_communication_ms"] / n_steps
    end = f"   {label}" if label else ""
    return [
        f"  {'':20}{'own ms':>10}{'kernels':>10}{'floor':>10}{'gap':>10}",
        *(f"  {row['part']:20}" + "".join(f"{row[k]:{'+' * (k == 'gap_ms')}10.2f}" for k in columns) + end
          for row in rows),
        f"  hidden behind computation: {hidden:.2f} ms of communication{end}",
        f"  own: covered by nothing before it of {', '.join(PRECEDENCE)}",
        f"  floors {least.basis}",
    ]  # fmt: skip


# --- regions ----------------------------------------------------------------------------------------------------------

# Region -> the spans it consists of. FSDP marks its own: the gathering of parameters, the reduction of gradients.
REGIONS: tuple[tuple[str, str], ...] = (
    ("data", r"data$"),
    ("gather", r"FSDP::all_gather"),
    ("embedding", r"embedding$"),
    ("attention", r"attention$"),
    ("MLP", r"MLP$"),
    ("loss", r"loss$"),
    ("reduce", r"FSDP::post_backward_reduce"),
    ("optimizer", r"optimizer$"),
)


def regions_ms(events: list[dict]) -> dict[str, float]:
    """Milliseconds in each region: on the GPU where the trace has that, else on the host."""
    on_gpu = any(e.get("cat") == "gpu_user_annotation" for e in events)
    spans = [e for e in events if e.get("cat") == ("gpu_user_annotation" if on_gpu else "user_annotation")]
    return {region: sum(e["dur"] for e in spans if re.match(pattern, e["name"])) / 1e3 for region, pattern in REGIONS}
