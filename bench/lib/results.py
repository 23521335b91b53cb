"""Result files: where they lie, what they say of the machine, and what each kind of row must hold."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args, get_origin

import torch

from bench.lib.clocks import Bench
from bench.lib.process import ROOT, nvidia_smi
from bench.lib.steps import MODE_LABELS, SIZES
from halny.model import durable

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl"),
)


def results_folder(bench: Bench, partial: bool = False) -> Path:
    """bench/results/DATE-DEVICE; for a rehearsal, or a part that should not replace the whole, one that git ignores."""
    if bench.smoke or partial:
        return ROOT / "runs" / "bench"
    name = f"{datetime.now(UTC):%Y-%m-%d}-{bench.name}"
    return ROOT / "bench" / "results" / re.sub(r"[^A-Za-z0-9.]+", "-", name)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else "none"
    return found


def commit() -> str:
    """The commit of the code that runs, "+ changes" if it was edited since; "unknown" outside a git checkout."""
    try:
        options = dict(cwd=ROOT, capture_output=True, text=True, check=True)
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
        return f"{name} + changes" if changed else name
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def repeatable(argument: str) -> str:
    """A command's argument as it can be typed elsewhere: paths from the repository on, of others only the name."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def machine(bench: Bench, given_commit: str | None = None) -> dict:
    """What a reader needs to judge or repeat a figure."""
    described = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": bench.name,
        "versions": versions(),
        "commit": given_commit or commit(),
        "command": " ".join([Path(sys.executable).name, *map(repeatable, sys.argv)]),
        "nvidia_smi_before": nvidia_smi() if bench.on_gpu else None,
        "nvidia_smi_after": None,
    }  # fmt: skip
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        described |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return described


def new_result(kind: str, bench: Bench, given_commit: str | None = None) -> dict:
    """A result file without its rows."""
    note = {"note": "smoke: no performance figure"} if bench.smoke else {}
    return {"format": 1, "kind": kind, "smoke": bench.smoke} | note | {"machine": machine(bench, given_commit)}


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step, so that whoever is stopped leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, value)


def write_result(path: Path, value: dict) -> None:
    """The whole of a result file, once all is done. It is on the disk before BadResult says what is wrong with it."""
    if value["machine"].get("nvidia_smi_before"):
        value["machine"]["nvidia_smi_after"] = nvidia_smi()
    write_json(path, value)
    read_result(path)


class BadResult(ValueError):
    """A result file that does not say what it must; the message names file, row and field."""


# ------------------------------------------------------------------------------------------------------- what rows hold

OK, MAY = object(), object()  # defaults of fields: there if the row's status is "ok"; there or not


def row(kind: str, /, base: type = object, also: str = "", ok=(), may=(), **needed: type) -> type:
    """A dataclass of a kind of row: fields that each has, those of each that is ``ok``, those that some have.

    ``also`` names what is kept for whoever asks, and read by no table.
    """
    defaults = [(name, of, default) for some, default in ((ok, OK), (may, MAY)) for name, of in dict(some).items()]
    named = {"also": frozenset(also.split()) | getattr(base, "also", frozenset())}
    return make_dataclass(kind, [*needed.items(), *defaults], bases=(base,), namespace=named, kw_only=True)


# fmt: off
Machine = row("Machine", date=str, device=str, versions=dict, commit=str, command=str,
    also="nvidia_smi_before nvidia_smi_after memory_bytes multiprocessors l2_bytes")
Times = row("Times", median=float, p5=float, p95=float, n=int, rounds=list)
Row = row("Row", status=str, reason=str)

Ceilings = row("Ceilings", copy_gb_s=float, step_tflop_s=float, head_tflop_s=float, square_tflop_s=float,
    also="products copy")
KernelRow = row("KernelRow", Row, operation=str, set=str, shape=dict, dtype=str, mode=str, provider=str, package=str,
    call=str, bytes=int, flops=int, ceiling=str,
    ok=dict(kernel_ms=Times, wall_ms=Times, host_ms=Times, gb_s=float, tflop_s=float, of_ceiling=float, errors=dict),
    may=dict(peak_bytes=int | None), also="least_bytes burst copy_same_bytes_gb_s of_copy_same_bytes")

Figures = row("Figures", Row, label=str,  # of a step, ours or another's
    ok=dict(tokens_per_second=float, step_ms=Times, mfu=float | None, mfu_palm=float | None, n_layers=int,
            micro_batch=int, seq_len=int, flops_per_token=float, peak_memory_bytes=int | None),
    also="tflop_s peak_flops peak_reserved_bytes device_used_bytes")
Ceiling = row("Ceiling", tflop_s=float, also="ms flops products")
StepRow = row("StepRow", Figures, case=str, mode=str,
    ok=dict(of_ceiling=float, ceiling_before=Ceiling, ceiling_after=Ceiling),
    may=dict(moments=str, accumulation=int, estimated_bytes=int | None, stand_in_bytes=int,
             nvidia_smi_beside=dict | None),
    also="n_parameters tried sharding recomputed copy_gb_s loss collectives nvidia_smi_before nvidia_smi_after")
Attempt = row("Attempt", Row, micro_batch=int, compiled=str, checkpointing=bool, ok=dict(tokens_per_second=float),
    also="first_step_s graphs step_ms mfu mfu_palm flops_per_token peak_memory_bytes " + " ".join(Figures.also))
Opponent = row("Opponent", Figures, name=str, attempts=list[Attempt], ok=dict(compiled=str, checkpointing=bool),
    also="first_step_s graphs")

Gap = row("Gap", part=str, ms=float, kernels_ms=float, floor_ms=float, gap_ms=float)
Floors = row("Floors", basis=str, also="ms")
Profile = row("Profile", Row, case=str, mode=str, label=str,
    ok=dict(wall_ms=float, idle_ms=float, hidden_communication_ms=float, categories_ms=dict, other=list,
            gaps=list[Gap], floors=Floors),
    also="moments own_ms kernels text trace_bytes trace_kept " + " ".join(SIZES))

MachineCode = row("MachineCode", kernel=str, arch=str, warps=int, registers=int, spills=int, shared_bytes=int,
    loads=dict, stores=dict, occupancy=float | None)
TrainerRow = row("TrainerRow", Row, name=str, seconds=float, from_s=float, to_s=float, command=str, figures=dict,
    said=list)
Part = row("Part", status=str, seconds=float, said=str,
    also="limit_s exit_code fingerprint date passed failed errors skipped failing")
Setting = row("Setting", weights=int, steps=int, seeds=int, beta2=float, samples_a_step=int, seq_len=int,
    also="beta1 eps lr clip weight_decay model train_tokens held_out_tokens threads")
OverSeeds = row("OverSeeds", held_out_loss=float, spread=float, difference=float, spread_of_difference=float)
Losses = row("Losses", OverSeeds, optimizer=str)
Averages = row("Averages", OverSeeds, what=str, step=int)
SettingOfAverages = row("SettingOfAverages", Setting, decay_steps=int, interval=int, dtype=str,
    also="schedule warmup_steps min_lr ks")

File = row("File", format=int, kind=str, smoke=bool, machine=Machine, also="note")
FILES = {
    "kernels": row("Kernels", File, ceilings=Ceilings, rows=list[KernelRow],
                   may=dict(not_reached=list, broken=list), also="excluded seconds lost ceilings_after resumed"),
    "step": row("Steps", File, rows=list[StepRow], may=dict(opponents=list[Opponent], opponents_command=str)),
    "profile": row("Profiles", File, profiles=list[Profile]),
    "aot": row("Aot", File, rows=list[MachineCode]),
    "pass": row("Pass", File, parts=dict[str, Part]),
    "trainer": row("Trainer", File, rows=list[TrainerRow]),
    "convergence": row("Convergence", File, setting=Setting, summary=list[Losses], also="runs"),
    "averaging": row("Averaging", File, setting=SettingOfAverages, summary=list[Averages], also="runs"),
}
# fmt: on


def check(value, form, where: str) -> None:
    """BadResult unless value is of the form: a class of ``row``, a list or dictionary of one, or types of JSON."""
    of = get_args(form)
    if get_origin(form) is list:
        check(value, list, where)
        for i, entry in enumerate(value):
            check(entry, of[0], f"{where}[{i}]")
    elif get_origin(form) is dict:
        check(value, dict, where)
        for name, entry in value.items():
            check(entry, of[1], f"{where}.{name}")
    elif is_dataclass(form):
        check(value, dict, where)
        is_ok, known = value.get("status", "ok") == "ok", {field.name: field for field in fields(form)}
        for name, field in known.items():
            if name in value:
                check(value[name], field.type, f"{where}.{name}")
            elif field.default is MISSING or (field.default is OK and is_ok):
                raise BadResult(f"{where}.{name} is missing")
        if unknown := sorted(value.keys() - known.keys() - form.also):
            raise BadResult(f"{where}.{unknown[0]} is no field of a {form.__name__}")
    else:
        kinds = of or (form,)
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if not fits and not (float in kinds and type(value) is int):
            raise BadResult(f"{where} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.60}")


def check_finite(value, where: str) -> None:
    """BadResult if there is a number that is none, however deep."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadResult(f"{where} must be finite, got {value}")
    for key, inner in value.items() if isinstance(value, dict) else ():
        check_finite(inner, f"{where}.{key}")
    for i, inner in enumerate(value if isinstance(value, list) else ()):
        check_finite(inner, f"{where}[{i}]")


def read_result(path: Path) -> dict:
    """A result file of this folder, checked. Raises BadResult naming file, row and field."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadResult(f"{path.name} is no JSON file that can be read: {error}") from None
    check(value, dict, path.name)
    if value.get("format") != 1 or value.get("kind") not in FILES:
        said = f"format {value.get('format')} and kind {value.get('kind')!r}"
        raise BadResult(f"{path.name} has {said}, which this code does not read")
    check_finite(value, path.name)
    check(value, FILES[value["kind"]], path.name)
    name = {"step": "rows", "profile": "profiles"}.get(value["kind"])
    for i, one in enumerate(value[name] if name else []):
        said = MODE_LABELS.get(one["mode"], "one that is known")
        if said not in one["label"]:
            where = f"{path.name}.{name}[{i}] is of mode {one['mode']!r}"
            raise BadResult(f"{where}, so its label must say {said!r}, got {one['label']!r:.60}")
    return value
