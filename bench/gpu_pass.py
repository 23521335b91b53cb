"""A whole visit to a GPU machine in one command: tests, kernels, attention, the 7B step, opponents, machine code.

    python bench/gpu_pass.py [--budget-s 540] [--only tests,kernels] [--out DIR]
    python bench/gpu_pass.py --smoke                    here: the same parts at tiny sizes, under 3 minutes, no figures

The most valuable part comes first. Each is a process of its own, ended when its share of the budget is over (what one
leaves goes to those after it), and writes its file after every row, so neither a crash nor a clock takes more than what
was not done yet. The last lines are a summary; the exit code is 1 if any part failed. In DIR (or $OUT, or
bench/results/DATE-DEVICE), at most eight files:

    pass.json  what ran and how it ended; the tests' counts     kernels.json  attention.json  step.json  profile.json
    log.txt    everything that was printed                      aot.json      trace-rank-of-256.json.gz
"""
# ruff: noqa: E402  imports follow the change of sys.path

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not bench/: see kernels.py

import torch

from bench import measure, opponents, step
from halny.model import roofline
from halny.model.mistral import PRESETS

SUMMARY_LINES = 60
GRACE_S = 10  # between asking a part to end and killing it; between its own budget and its limit


@dataclass(frozen=True)
class Visit:
    """What every part is told."""

    smoke: bool
    out: Path
    scratch: Path
    commit: str

    def script(self, name: str, seconds: float, *more: str) -> list[str]:
        smoke = ["--smoke"] if self.smoke else []
        budget = str(max(1.0, seconds - GRACE_S))
        options = ["--out", str(self.out), "--commit", self.commit, "--budget-s", budget]
        return [sys.executable, f"bench/{name}.py", *smoke, *options, *more]


@dataclass(frozen=True)
class Part:
    name: str
    share: float  # of the time left, relative to the shares of the parts still to come
    command: Callable[[Visit, float], list[str]]  # given the seconds it may take


def tests_command(visit: Visit, seconds: float) -> list[str]:
    xml = visit.scratch / "tests.xml"
    # a line for each test as it ends, since the junit file is written at the end, and a compiler may outlast SIGINT
    options = [
        "-vv",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--durations=10",
        f"--junitxml={xml}",
    ]
    return [sys.executable, "-m", "pytest", "tests", "-m", "gpu", *options]


def aot_command(visit: Visit, seconds: float) -> list[str]:
    only = ["--only", "swiglu"] if visit.smoke else []
    return [sys.executable, "bench/aot.py", "--arch", "sm_90", "--json", str(visit.out / "aot.json"), *only]


def step_command(visit: Visit, seconds: float) -> list[str]:
    """All modes, one-gpu with what AdamW keeps in bf16, or where that leaves no room for one sequence in 8 bits."""
    moments = "bf16"
    if not visit.smoke:
        memory = torch.cuda.get_device_properties(0).total_memory
        if not roofline.most_micro_batch(PRESETS["mistral-7b"], memory, step.SEQ_LEN, "bf16", divides=1):
            moments = "8bit"
    return visit.script("step", seconds, "--moments", moments)


PARTS = (
    Part("tests", 80, tests_command),
    Part("kernels", 120, lambda v, s: v.script("kernels", s)),
    Part("attention", 60, lambda v, s: v.script("attention", s)),
    Part("step", 110, step_command),
    Part("opponents", 110, lambda v, s: v.script("opponents", s, "--only", "bf16")),
    Part("profile", 40, lambda v, s: v.script("step", s, "--profile", "--mode", "rank-of-256")),
    Part("aot", 15, aot_command),
)


# ------------------------------------------------------------------------------------------------------------- running


def start(command: list[str], log) -> subprocess.Popen:
    """A part's process, leader of a group of its own, so that its children end with it."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)  # each script decides for itself
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, seconds: float) -> int | None:
    """Wait for a part; its exit code, or None if it had to be ended. Nothing of it is left behind, however it ends."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # interrupted, pytest still reports
            process.wait(GRACE_S)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_counts(xml: Path, said: list[str]) -> dict:
    """Counts and the failing names of a junit file; of the lines said if pytest did not get to write one."""
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "failing": []}
    try:
        found = list(ElementTree.parse(xml).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        for line in said:
            if ended := re.match(r"(tests/\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
                state = {"ERROR": "errors"}.get(ended[2], ended[2].lower())
                counts[state] += 1
                counts["failing"] += [ended[1]] if state in ("failed", "errors") else []
        return counts
    for test in found:
        outcome = {"failure": "failed", "error": "errors", "skipped": "skipped"}
        state = next((outcome[child.tag] for child in test if child.tag in outcome), "passed")
        counts[state] += 1
        if state in ("failed", "errors"):
            counts["failing"].append(f"{test.get('classname', '').replace('.', '/')}.py::{test.get('name')}")
    return counts


def run_parts(visit: Visit, parts: list[Part], budget_s: float, result: dict, log) -> None:
    """All parts in order, each within its share of what is left; result["parts"] is on disk after each."""
    end = time.monotonic() + budget_s
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        limit = left * part.share / sum(p.share for p in parts[i:])
        began = time.monotonic()
        entry = {"status": "not reached", "seconds": 0.0, "limit_s": limit, "exit_code": None, "said": ""}
        said = []
        if left > 5:
            place = log.tell()
            code = finish(start(part.command(visit, limit), log), limit)
            log.seek(place)
            said = [line for line in log.read().splitlines() if line.strip()]
            log.seek(0, os.SEEK_END)
            skipped = part.name == "tests" and code == 5  # pytest: nothing collected
            status = "ended at its limit" if code is None else "ok" if code == 0 or skipped else "failed"
            entry |= {"status": status, "exit_code": code, "seconds": time.monotonic() - began, "said": said[-1][:300]}
        if part.name == "tests":
            entry |= test_counts(visit.scratch / "tests.xml", said)
        result["parts"][part.name] = entry
        measure.write_json(visit.out / "pass.json", result)
        print(f"{part.name:10}{entry['status']:20}{entry['seconds']:6.0f} s   {entry['said'][:90]}", flush=True)


# ------------------------------------------------------------------------------------------------------------- summary


def kernel_lines(path: Path, smoke: bool) -> list[str]:
    """A line a case: halny's time in each mode, its share of the ceiling, and the best peer's time over it."""
    try:
        result = measure.read_result(path)
    except measure.BadResult as error:
        return [str(error)]
    states = [row["status"] for row in result["rows"]]
    lines = [f"{path.name}: " + ", ".join(f"{states.count(s)} {s}" for s in ("ok", "wrong", "failed", "absent"))]
    cases: dict[str, dict[str, list[dict]]] = {}
    for row in [] if smoke else result["rows"]:
        modes = cases.setdefault(f"{row['operation']} {row['set']}", {})
        modes.setdefault(row["mode"], []).append(row)
    for case, modes in cases.items():
        said = []
        for mode, rows in modes.items():
            timed = sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["kernel_ms"]["median"])
            ours = next((r for r in timed if r["package"] == "halny"), None)
            best = next((r for r in timed if r["package"] != "halny"), None)
            text = (
                f"{mode} none"
                if ours is None
                else f"{mode} {ours['kernel_ms']['median']:.3f} ms {ours['of_ceiling']:.0%}"
            )
            if ours and best:
                text += f" {best['provider']} x{best['kernel_ms']['median'] / ours['kernel_ms']['median']:.2f}"
            said.append(text)
        lines.append(f"  {case}: {'; '.join(said)}")
    return lines


def step_lines(path: Path, smoke: bool) -> list[str]:
    """A line a case that ran and a line an opponent, each figure in one line with its label."""
    try:
        result = measure.read_result(path)
    except measure.BadResult as error:
        return [str(error)]
    rows = [row for row in result["rows"] if "range" not in row and not (smoke and row["status"] == "ok")]
    others = [row for row in result.get("opponents", []) if not (smoke and row["status"] == "ok")]
    return [f"  {line}" for row in rows for line in step.lines_of(row, smoke)] + [
        f"  {opponents.words(row, smoke)}" for row in others
    ]


def profile_lines(path: Path, smoke: bool) -> list[str]:
    """A line a profile: its largest gaps."""
    try:
        found = measure.read_result(path)["profiles"]
    except measure.BadResult as error:
        return [str(error)]
    lines = []
    for profile in found:
        if profile["status"] != "ok":
            lines.append(f"  {profile['label']}: {profile['status']}, {profile['reason']}")
        elif not smoke:
            text = ", ".join(f"{row['part']} {row['gap_ms']:+.1f}" for row in profile["gaps"][:5])
            lines.append(f"  {profile['label']}: of {profile['wall_ms']:.1f} ms, largest gaps {text}")
    return lines


def trouble_lines(path: Path) -> list[str]:
    """The providers that were wrong or failed, once a case."""
    try:
        rows = measure.read_result(path)["rows"]
    except measure.BadResult:
        return []
    found = {f"  {r['operation']} {r['set']} {r['provider']} {r['status']}: {r['reason'][:90]}": None
             for r in rows if r["status"] in ("wrong", "failed")}  # fmt: skip
    return list(found)


def summary(visit: Visit, result: dict) -> list[str]:
    machine = result["machine"]
    lines = [
        f"{'smoke: no performance figure; ' if visit.smoke else ''}{machine['device']}, commit {machine['commit']}"
    ]
    troubles = []
    for name, part in result["parts"].items():
        lines.append(f"{name:10}{part['status']:20}{part['seconds']:6.0f} s   {part['said'][:90]}")
        if name == "tests":
            counts = ", ".join(f"{part[k]} {k}" for k in ("passed", "failed", "errors", "skipped"))
            lines.append(f"  {counts}")
            lines += [f"  failed: {test}" for test in part["failing"][:10]]
        if name == "opponents" or (name == "step" and "opponents" not in result["parts"]):
            lines += step_lines(visit.out / "step.json", visit.smoke)
        if name == "profile":
            lines += profile_lines(visit.out / "profile.json", visit.smoke)
    for name in ("kernels", "attention"):
        if name in result["parts"]:
            lines += kernel_lines(visit.out / f"{name}.json", visit.smoke)
            troubles += trouble_lines(visit.out / f"{name}.json")
    if len(lines) + len(troubles) > SUMMARY_LINES - 2:
        troubles = [*troubles[: max(0, SUMMARY_LINES - 3 - len(lines))], "  (more in the files)"]
    lines = (lines + troubles)[: SUMMARY_LINES - 1]
    return [*lines, f"files: {visit.out}"]


def main(arguments: list[str], parts: tuple[Part, ...] = PARTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="rehearse on the CPU at tiny sizes, without figures")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for everything [540]")
    parser.add_argument("--only", help=f"parts to run, with commas: {','.join(p.name for p in parts)} [all]")
    parser.add_argument("--out", type=Path, help="folder for the files [$OUT, or as bench/kernels.py]")
    parser.add_argument("--commit", help="commit to record where there is no git checkout")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",") if given.only else [part.name for part in parts]
    unknown = [name for name in wanted if name not in {part.name for part in parts}]
    if unknown:
        print(f"gpu_pass.py: --only {unknown[0]}: there are {', '.join(p.name for p in parts)}", file=sys.stderr)
        return 2
    if given.budget_s <= 0:
        print(f"gpu_pass.py: --budget-s must be positive, got {given.budget_s:g}", file=sys.stderr)
        return 2
    try:
        bench = measure.bench_on(given.smoke)
    except RuntimeError as error:
        print(f"gpu_pass.py: {error}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("halny") is None:
        print("gpu_pass.py: halny is not installed here; pip install -e . first", file=sys.stderr)
        return 2
    began = time.monotonic()
    out = given.out or Path(os.environ.get("OUT") or measure.results_folder(bench, bool(given.only)))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("w+", encoding="utf-8") as log:
        visit = Visit(given.smoke, out.resolve(), Path(scratch), given.commit or measure.commit())
        note = {"note": "smoke: no performance figure"} if given.smoke else {}
        result = {"format": 1, "kind": "pass", "smoke": given.smoke} | note
        result |= {"machine": measure.machine(bench, visit.commit), "parts": {}}
        chosen = [part for part in parts if part.name in wanted]
        with contextlib.suppress(KeyboardInterrupt):  # what is done is kept, and said below
            run_parts(visit, chosen, given.budget_s - (time.monotonic() - began), result, log)
        result["machine"]["nvidia_smi_after"] = measure.nvidia_smi() if bench.on_gpu else None
        measure.write_json(out / "pass.json", result)
    print("\n" + "\n".join(summary(visit, result)), flush=True)
    ended = [part["status"] for part in result["parts"].values()]
    return 0 if ended == ["ok"] * len(chosen) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part in progress ends with us
    sys.exit(main(sys.argv[1:]))
