"""Result files: where they lie, what they say of the machine, and what each kind of row must hold."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.lib.clocks import Bench
from bench.lib.process import ROOT, nvidia_smi
from bench.lib.steps import MODE_LABELS

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl"),
)


def results_folder(bench: Bench, partial: bool = False) -> Path:
    """bench/results/DATE-DEVICE; for a rehearsal, or a part that should not replace the whole, one that git ignores."""
    if bench.smoke or partial:
        return ROOT / "runs" / "bench"
    name = f"{datetime.now(UTC):%Y-%m-%d}-{torch.cuda.get_device_name(bench.device)}"
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
        "device": torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU",
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


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step, so that whoever is stopped leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class BadResult(ValueError):
    """A result file that does not say what it must; the message names file and field."""


NUMBER = (int, float)
MACHINE = {"date": str, "device": str, "versions": dict, "commit": str, "command": str}
TIMES = {"median": NUMBER, "p5": NUMBER, "p95": NUMBER, "n": int, "rounds": list}
CEILINGS = {"copy_gb_s": NUMBER, "step_tflop_s": NUMBER, "head_tflop_s": NUMBER, "square_tflop_s": NUMBER}
ROW_WORDS = ("operation", "set", "dtype", "mode", "provider", "package", "call", "status", "reason", "ceiling")
ROW = {
    **dict.fromkeys(ROW_WORDS, str),
    **{"shape": dict, "bytes": int, "flops": int},
}
TIMED_ROW = {"kernel_ms": TIMES, "wall_ms": TIMES, "host_ms": TIMES, "gb_s": NUMBER, "tflop_s": NUMBER,
             "of_ceiling": NUMBER, "errors": dict}  # fmt: skip
AOT_ROW = {"kernel": str, "arch": str, "warps": int, "registers": int, "spills": int, "shared_bytes": int,
           "loads": dict, "stores": dict, "occupancy": (int, float, type(None))}  # fmt: skip
STEP_ROW = {"case": str, "mode": str, "label": str, "status": str, "reason": str}
MAYBE = (int, float, type(None))
TIMED_STEP = {"tokens_per_second": NUMBER, "step_ms": TIMES, "mfu": MAYBE, "mfu_palm": MAYBE, "n_layers": int,
              "micro_batch": int, "seq_len": int, "flops_per_token": NUMBER, "peak_memory_bytes": MAYBE}  # fmt: skip
OF_CEILING = {"of_ceiling": NUMBER, "ceiling_before": {"tflop_s": NUMBER}, "ceiling_after": {"tflop_s": NUMBER}}
RANGE = {"tokens_per_second": list, "step_ms": list, "mfu": list, "mfu_palm": list, "memory_bytes": int}
OPPONENT = {"name": str, "label": str, "status": str, "reason": str, "attempts": list}
GAP = {"part": str, "ms": NUMBER, "kernels_ms": NUMBER, "floor_ms": NUMBER, "gap_ms": NUMBER}
PROFILE = {"wall_ms": NUMBER, "idle_ms": NUMBER, "hidden_communication_ms": NUMBER, "categories_ms": dict,
           "other": list, "gaps": [GAP], "floors": {"basis": str}}  # fmt: skip
CONVERGENCE_SETTING = {
    "weights": int,
    "steps": int,
    "seeds": int,
    "beta2": NUMBER,
    "samples_a_step": int,
    "seq_len": int,
}
CONVERGENCE_ROW = {
    "optimizer": str, "held_out_loss": NUMBER, "spread": NUMBER, "difference": NUMBER, "spread_of_difference": NUMBER,
}  # fmt: skip
TRAINER_ROW = {"name": str, "status": str, "reason": str, "seconds": NUMBER, "from_s": NUMBER, "to_s": NUMBER,
               "command": str, "figures": dict, "said": list}  # fmt: skip
KINDS: dict[str, dict] = {
    "kernels": {"ceilings": CEILINGS, "rows": [ROW]},
    "step": {"rows": [STEP_ROW]},
    "aot": {"rows": [AOT_ROW]},
    "profile": {"profiles": [STEP_ROW]},
    "pass": {"parts": dict},
    "trainer": {"rows": [TRAINER_ROW]},
    "convergence": {"setting": CONVERGENCE_SETTING, "summary": [CONVERGENCE_ROW]},
}


def check(value, form, where: str) -> None:
    """BadResult unless value has the form: a type or types, a dict of required fields, or [form of every entry]."""
    if isinstance(form, dict):
        check(value, dict, where)
        for name, inner in form.items():
            if name not in value:
                raise BadResult(f"{where}.{name} is missing")
            check(value[name], inner, f"{where}.{name}")
    elif isinstance(form, list):
        check(value, list, where)
        for i, entry in enumerate(value):
            check(entry, form[0], f"{where}[{i}]")
    else:
        kinds = form if isinstance(form, tuple) else (form,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadResult(f"{where} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.60}")


def read_result(path: Path) -> dict:
    """A result file of this folder, checked. Raises BadResult naming file and field."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadResult(f"{path.name} is no JSON file that can be read: {error}") from None
    where = path.name
    check(value, {"format": int, "kind": str, "smoke": bool, "machine": MACHINE}, where)
    if value["format"] != 1 or value["kind"] not in KINDS:
        raise BadResult(
            f"{where} has format {value['format']} and kind {value['kind']!r}, which this code does not read"
        )
    check(value, KINDS[value["kind"]], where)
    if value["kind"] == "kernels":
        check_rows(value["rows"], f"{where}.rows", lambda row: TIMED_ROW)
    if value["kind"] == "step":
        check(value.get("opponents", []), [OPPONENT], f"{where}.opponents")
        timed = TIMED_STEP | OF_CEILING
        check_rows(value["rows"], f"{where}.rows", lambda row: {"range": RANGE} if "range" in row else timed)
        check_rows(value.get("opponents", []), f"{where}.opponents", lambda row: TIMED_STEP)
    if value["kind"] == "profile":
        check_rows(value["profiles"], f"{where}.profiles", lambda row: PROFILE)
    for rows in ("rows", "profiles"):
        if value["kind"] in ("step", "profile"):
            check_labels(value.get(rows, []), f"{where}.{rows}")
    return value


def check_rows(rows: list[dict], where: str, form: Callable[[dict], dict]) -> None:
    """BadResult unless every row that has figures has those of its form."""
    for i, row in enumerate(rows):
        if row["status"] == "ok":
            check(row, form(row), f"{where}[{i}]")


def check_labels(rows: list[dict], where: str) -> None:
    """BadResult unless every row of a mode of bench/step.py says in its label which that is."""
    for i, row in enumerate(rows):
        if row["mode"] not in MODE_LABELS or MODE_LABELS[row["mode"]] not in row["label"]:
            said = MODE_LABELS.get(row["mode"], "one that is known")
            raise BadResult(f"{where}[{i}] is of mode {row['mode']!r}, so its label must say {said!r}, "
                            f"got {row['label']!r:.60}")  # fmt: skip
