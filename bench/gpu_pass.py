"""A whole visit to a GPU machine in one command: the 7B step, tests, train.py itself, kernels, attention, opponents.

    python bench/gpu_pass.py --visit-s 840 [--only step,tests] [--out DIR]
    python bench/gpu_pass.py --smoke          here: the same parts at tiny sizes, under 4 minutes, no figures

bench/VISIT.md is the recipe for a visit. The most valuable part comes first. Each is a process of its own, ended when
its share of the time is over (what one leaves goes to those after it), and writes its file after every row, so neither
a crash nor a clock takes more than what was not done yet. In the end report.py's short tables are printed, and how each
part ended; the exit code is 1 if any failed.

A visit may be several calls, each with its own --only. What Triton and Inductor have compiled stays in their caches on
the machine as long as it is held.

In DIR (or $OUT, or bench/results/DATE-DEVICE): pass.json says what ran and how it ended, with the tests' counts;
log.txt is all that was printed; step.json, profile.json, trainer.json, kernels.json and attention.json are the parts'.
"""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

from bench import report
from bench.lib.clocks import bench_on
from bench.lib.command import command, parser_of
from bench.lib.process import ROOT
from bench.lib.results import BadResult, commit, new_result, repeatable, results_folder, write_json, write_result
from bench.merge import merge, read_folders
from halny.model.exits import Refused

FAILING = 10  # tests named in the summary
GRACE_S = 10  # between asking a part to end and killing it; between its own budget and its limit
TEST_BYTES = 35e9  # of GPU memory for each process that tests


@dataclass(frozen=True)
class Visit:
    """What every part is told."""

    smoke: bool
    out: Path
    scratch: Path
    commit: str
    data: Path | None = None  # a folder prepared for train.py

    def script(self, name: str, seconds: float, *more: str) -> list[str]:
        smoke = ["--smoke"] if self.smoke else []
        budget = str(max(1.0, seconds - GRACE_S))
        options = ["--out", str(self.out), "--commit", self.commit, "--budget-s", budget]
        return [sys.executable, f"bench/{name}.py", *smoke, *options, *more]

    def tests(self, which: str, beside: bool) -> list[str]:
        """pytest's command for the GPU's tests that ``which`` selects; side by side if pytest-xdist is there."""
        options = ["-vv", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=10"]
        options += ["-k", which]  # -vv: a line for each test as it ends, for ``test_counts``
        if beside and not self.smoke and importlib.util.find_spec("xdist"):
            options += ["-n", str(max(1, int(bench_on(smoke=False).memory_bytes / TEST_BYTES)))]
        return [sys.executable, "-m", "pytest", "tests", "-m", "gpu", *options]


@dataclass(frozen=True)
class Part:
    """One process. Neighbours that are not timed run side by side, so that compiling costs little of a visit."""

    name: str
    share: float  # of the time left, relative to the shares of the parts still to come
    command: Callable[[Visit, float], list[str]]  # given the seconds it may take
    timed: bool = True
    ahead_of: str | None = None  # the part that it prepares; it runs where that one does


LAST = "flex or two_to_the_31"  # tests that compile for long, or need much of the memory
PARTS = (
    Part("step", 210, lambda v, s: v.script("step", s, "--profile", "--moments", "8bit", "bf16")),
    Part("tests", 120, lambda v, s: v.tests(f"not ({LAST})", True), timed=False),
    Part("trainer", 75, lambda v, s: v.script("trainer", s, *(["--data", str(v.data)] if v.data else [])), timed=False),
    Part("warm kernels", 90, lambda v, s: v.script("kernels", s, *warm_up(v)), timed=False, ahead_of="kernels"),
    Part("warm attention", 90, lambda v, s: v.script("attention", s, *warm_up(v)), timed=False,
         ahead_of="attention"),
    # Liger-Kernel's variants in the CuTe DSL keep nothing that they compile, 20 s: for a visit with time to spare
    Part("kernels", 100, lambda v, s: v.script("kernels", s, "--without", "CuTe DSL")),
    Part("attention", 60, lambda v, s: v.script("attention", s)),
    Part("opponents", 110, lambda v, s: v.script("opponents", s)),
    Part("last tests", 90, lambda v, s: v.tests(LAST, False), timed=False),
)  # fmt: skip


def warm_up(visit: Visit) -> list[str]:
    return ["--warm-only", "--workers", "1" if visit.smoke else "6"]


# ------------------------------------------------------------------------------------------------------------- running


def start(command: list[str], log) -> subprocess.Popen:
    """A part's process, leader of a group of its own, so that its children end with it."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)  # each script decides for itself
    words = " ".join([Path(command[0]).name, *map(repeatable, command[1:])])  # may become a part's last words
    log.write(f"\n$ {words}\n")
    log.flush()
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int | None, float]]:
    """Wait for processes; each one's exit code, or None if it had to be ended, and how long it took.

    Nothing of them is left behind, however they end.
    """
    began, took = time.monotonic(), {}
    try:
        while len(took) < len(processes) and (passed := time.monotonic() - began) < seconds:
            took |= {i: passed for i, p in enumerate(processes) if i not in took and p.poll() is not None}
            time.sleep(0.05)
        late = [process for process in processes if process.poll() is None]
        for process in late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # interrupted, pytest still reports
        end = time.monotonic() + GRACE_S
        for process in late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    whole = time.monotonic() - began
    return [(None if p in late else p.returncode, took.get(i, whole)) for i, p in enumerate(processes)]


def test_counts(said: list[str]) -> dict:
    """Counts and the failing names, from the lines that pytest printed as each test ended, alone or side by side."""
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "failing": []}
    for line in said:
        alone = re.match(r"(tests/\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        beside = re.match(r"\[gw\d+\] \[[ \d]+%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+\.py::.+)", line)  # xdist
        if alone or beside:
            name, outcome = (alone[1], alone[2]) if alone else (beside[2], beside[1])
            state = {"ERROR": "errors"}.get(outcome, outcome.lower())
            counts[state] += 1
            counts["failing"] += [name] if state in ("failed", "errors") else []
    return counts


def last_words(said: list[str]) -> str:
    """Of a part's lines the one that says most: its last, unless a traceback's last line or an error came before it.

    The traceback of a process that was interrupted, because its time was over, says nothing.
    """
    if "KeyboardInterrupt" in said:
        starts = [i for i, line in enumerate(said) if line.startswith("Traceback ")]
        said = said[: starts[0]] if starts else [line for line in said if line != "KeyboardInterrupt"]
    errors = (line for line in reversed(said) if re.match(r"(\w+\.)*\w*(Error|Exception|Refused)\b", line))
    return next(errors, said[-1] if said else "")[:300]


def groups_of(parts: list[Part]) -> list[list[Part]]:
    """The parts in order, neighbours that are not timed together."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and not part.timed and not groups[-1][-1].timed:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def run_parts(visit: Visit, parts: list[Part], visit_s: float, result: dict, log) -> None:
    """All parts in order, each within its share of what is left; result["parts"] is on disk after each."""
    end, groups = time.monotonic() + visit_s, groups_of(parts)
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        shares = [max(part.share for part in one) for one in groups[i:]]
        limit = left * shares[0] / sum(shares)
        ended = run_group(visit, group, limit, log) if left > 5 else [(None, 0.0, [])] * len(group)
        for part, (code, seconds, said) in zip(group, ended, strict=True):
            is_test = "tests" in part.name
            good = code == 0 or (is_test and code == 5)  # pytest: nothing collected
            status = "ended at its limit" if code is None else "ok" if good else "failed"
            status = status if left > 5 else "not reached"
            words = last_words(said) if not good else said[-1][:300] if said else ""
            entry = {"status": status, "seconds": seconds, "limit_s": limit, "exit_code": code, "said": words}
            entry |= test_counts(said) if is_test else {}
            result["parts"][part.name] = entry
            write_json(visit.out / "pass.json", result)
            print(part_line(part.name, entry), flush=True)


def part_line(name: str, entry: dict) -> str:
    return f"{name:15}{entry['status']:20}{entry['seconds']:6.0f} s   {entry['said'][:90]}"


def run_group(visit: Visit, group: list[Part], limit: float, log) -> list[tuple[int | None, float, list[str]]]:
    """Parts side by side: each one's exit code, seconds and lines, which also go to the log, one part after another."""
    paths = [visit.scratch / f"{part.name}.log" for part in group]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
            processes = [start(part.command(visit, limit), file) for part, file in zip(group, files, strict=True)]
            ended = finish(processes, limit)
    finally:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        log.writelines(texts)
        log.flush()
    said = [[line for line in text.splitlines() if line.strip()] for text in texts]
    return [(code, seconds, lines) for (code, seconds), lines in zip(ended, said, strict=True)]


# ------------------------------------------------------------------------------------------------------------- summary


def summary(visit: Visit, result: dict) -> list[str]:
    """report.py's short tables of what was measured; how each part ended, last, with the names of tests that failed."""
    lines, machine = [], result["machine"]
    if not visit.smoke:
        try:
            lines += [*report.markdown(merge(read_folders([visit.out])), short=True).splitlines(), ""]
        except BadResult as error:
            lines.append(str(error))
    note = "smoke: no performance figure; " if visit.smoke else ""
    lines.append(f"{note}{machine['device']}, commit {machine['commit']}, files: {visit.out}")
    for name, part in result["parts"].items():
        lines.append(part_line(name, part))
        if "passed" in part:
            lines.append("  " + ", ".join(f"{part[k]} {k}" for k in ("passed", "failed", "errors", "skipped")))
            lines += [f"  failed: {test}" for test in part["failing"][:FAILING]]
    return lines


def names_of(parts: tuple[Part, ...]) -> list[str]:
    """Those that --only takes: what is only a preparation comes with what it is for."""
    return [part.name for part in parts if part.ahead_of is None]


def parser(parts: tuple[Part, ...]) -> argparse.ArgumentParser:
    made = parser_of(__doc__, "$OUT, or as bench/kernels.py")
    made.add_argument("--visit-s", type=float, default=840, help="seconds for everything [840]")
    made.add_argument("--only", help=f"parts to run, with commas: {','.join(names_of(parts))} [all]")
    made.add_argument("--data", type=Path, help="folder that train.py trains on [random tokens]; see bench/trainer.py")
    return made


@command
def main(arguments: list[str], parts: tuple[Part, ...] = PARTS) -> int:
    given = parser(parts).parse_args(arguments)
    names = names_of(parts)
    wanted = given.only.split(",") if given.only else names
    if unknown := [name for name in wanted if name not in names]:
        raise Refused(f"--only {unknown[0]}: there are {', '.join(names)}")
    if given.visit_s <= 0:
        raise Refused(f"--visit-s must be positive, got {given.visit_s:g}")
    if given.data and not given.data.exists():
        raise Refused(f"--data {given.data} does not exist")
    bench = bench_on(given.smoke)
    began = time.monotonic()
    out = given.out or Path(os.environ.get("OUT") or results_folder(bench, bool(given.only)))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("w+", encoding="utf-8") as log:
        data = given.data.resolve() if given.data else None
        visit = Visit(given.smoke, out.resolve(), Path(scratch), given.commit or commit(), data)
        result = new_result("pass", bench, visit.commit) | {"parts": {}}
        chosen = [part for part in parts if (part.ahead_of or part.name) in wanted]
        with contextlib.suppress(KeyboardInterrupt):  # what is done is kept, and said below
            run_parts(visit, chosen, given.visit_s - (time.monotonic() - began), result, log)
        write_result(out / "pass.json", result)
        for path in out.glob("warm-*.json"):  # of this machine only
            path.unlink()
    print("\n" + "\n".join(summary(visit, result)), flush=True)
    return 0 if all(result["parts"].get(name, {}).get("status") == "ok" for name in wanted) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part in progress ends with us
    sys.exit(main(sys.argv[1:]))
