"""All result files as one set of rows: of everything that was measured on a device its newest figure, and whose it is.

What a row is of, ``rows_of`` says. Of several rows of the same thing on the same device the newest stands, by the date
in its file, except that one with figures (status "ok") is not hidden by a newer one that failed, was absent or was not
reached: the figure stays, and the newer attempt goes with it, to be said beside the table (``row["since"]``). A newer
row that was found *wrong* does replace the figure: what computes something else has no speed.

A table may so hold rows of several files. Each row carries its own (``row["source"]``), with machine and ceilings; its
share of a ceiling is that of its own run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.lib.results import BadResult, read_result


@dataclass(frozen=True, eq=False)
class Source:
    """A result file, without its rows."""

    folder: Path
    name: str
    machine: dict
    ceilings: dict | None
    n_rows: int

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def date(self) -> str:
        return self.machine["date"]

    @property
    def minute(self) -> str:
        return self.date[:16].replace("T", " ")


@dataclass
class Device:
    """What is known of a device: section -> its rows, each with "source" and "since"; what has no row, and why."""

    name: str
    sections: dict[str, list[dict]] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)  # oldest first
    unmeasured: list[dict] = field(default_factory=list)  # section, case, said, source

    @property
    def newest_folder(self) -> Path:
        return self.sources[-1].folder


def rows_of(value: dict) -> Iterator[tuple[str, tuple, dict]]:
    """(section, what of it the row is a row of, the row) of a result file."""
    kind = value["kind"]
    if kind == "kernels":
        for row in once(value["rows"]):
            yield section_of(row), tuple(row[k] for k in ("operation", "set", "mode", "dtype", "provider")), row
    elif kind == "step":  # the label says micro batch and moments, and how many layers
        for row in value["rows"]:
            yield "step", (row["case"], row["label"], row.get("accumulation", 1)), row
        for row in value.get("opponents", []):
            yield "opponents", (row["name"],), row
    elif kind == "profile":
        for row in value["profiles"]:
            yield "profile", (row["case"], row["label"]), row
    elif kind == "aot":
        for row in value["rows"]:
            yield "aot", (row["kernel"], row["arch"]), row
    elif kind == "trainer":
        for row in value["rows"]:
            yield "trainer", (row["name"],), row
    elif kind in ("convergence", "averaging"):
        row = {"setting": value["setting"], "summary": value["summary"]}
        yield kind, (json.dumps(value["setting"], sort_keys=True),), row
    elif kind == "pass":  # every visit is one of its own
        yield "pass", (value["machine"]["date"],), {"parts": value["parts"]}


def once(rows: list[dict]) -> list[dict]:
    """Attention's rows, "auto" in one with those of the backend that it took, as bench/attention.py measures it now.

    Files of 2026-11-27 have both, and in them they differ by up to 12%, for reasons that LOG.md tells: of the two the
    backend's own stands, which is the slower.
    """
    autos = {(row["set"], row["mode"]): row for row in rows if section_of(row) == "attention" and " -> " in row["call"]}
    found = []
    for row in rows:
        auto = autos.get((row["set"], row["mode"]))
        if auto and row["status"] == "ok" and row["provider"] == auto["call"].partition(" -> ")[2]:
            row = row | {"package": "halny", "provider": f"halny, {row['provider']}", "call": auto["call"]}
            found = [other for other in found if other is not auto]
        found.append(row)
    return found


def section_of(row: dict) -> str:
    return "attention" if row["operation"] == "attention" else "kernels"


def result_folders(results: Path) -> list[Path]:
    """The folders of results that hold a file; rehearsals that were left there do not count."""
    folders = sorted(results.iterdir()) if results.is_dir() else []
    return [p for p in folders if p.is_dir() and "smoke" not in p.name and any(p.glob("*.json"))]


def read_folders(folders: Iterable[Path]) -> list[tuple[Source, dict]]:
    """Every result file, the oldest first. Raises BadResult, by folder and name, for a damaged one or a rehearsal."""
    found = []
    for folder in (folder.resolve() for folder in folders):
        for path in sorted(folder.glob("*.json")):
            try:
                value = read_result(path)
            except BadResult as problem:
                raise BadResult(f"{folder.name}/{problem}") from None
            if value["smoke"]:
                raise BadResult(
                    f"{folder.name}/{path.name} is a rehearsal (smoke): it holds no performance figure, and none is "
                    "rendered from it"
                )
            n_rows = sum(1 for _ in rows_of(value))
            found.append((Source(folder, path.name, value["machine"], value.get("ceilings"), n_rows), value))
    return sorted(found, key=lambda one: (one[0].date, str(one[0].folder), one[0].name))


def merge(files: list[tuple[Source, dict]]) -> list[Device]:
    """The devices, GPUs first, among them the one measured last; then the CPU, then what needed no device."""
    devices: dict[str, Device] = {}
    standing: dict[tuple, dict] = {}
    for source, value in files:
        name = source.machine["device"]
        devices.setdefault(name, Device(name)).sources.append(source)
        command = value.get("opponents_command", source.machine["command"])  # bench/opponents.py adds to step.json
        of_opponents = replace(source, machine=source.machine | {"command": command})
        for section, identity, row in rows_of(value):
            key, its = (name, section, identity), of_opponents if section == "opponents" else source
            standing[key] = newer(standing.get(key), row | {"source": its, "since": None})
    for (name, section, _), row in standing.items():
        devices[name].sections.setdefault(section, []).append(row)
    for device in devices.values():
        device.unmeasured = unmeasured(device, files)
    order = sorted(devices.values(), key=lambda d: d.sources[-1].date, reverse=True)
    return sorted(order, key=lambda d: (d.name.startswith("none"), d.name == "CPU"))


def newer(old: dict | None, row: dict) -> dict:
    """Which of the two stands."""
    if old is None or status(old) != "ok" or status(row) in ("ok", "wrong"):
        return row
    return old | {"since": row}


def status(row: dict) -> str:
    return row.get("status", "ok")  # rows of machine code and losses have none: they are there or not


def unmeasured(device: Device, files: list[tuple[Source, dict]]) -> list[dict]:
    """Cases of kernels.json and attention.json that were not reached, unless another file has them, or broke."""
    timed: dict[str, str] = {}  # case -> the date of its newest figure
    for row in device.sections.get("kernels", []) + device.sections.get("attention", []):
        if row["status"] == "ok":
            case = f"{row['operation']} {row['set']}"
            timed[case] = max(timed.get(case, ""), row["source"].date)
    found = {}
    for source, value in files:
        if value["kind"] != "kernels" or source.machine["device"] != device.name:
            continue
        broken = [(said.partition(":")[0], said.partition(":")[2].strip()) for said in value.get("broken", [])]
        for case, said in [*((case, "not reached") for case in value.get("not_reached", [])), *broken]:
            section = "attention" if case.startswith("attention ") else "kernels"
            found.pop(case, None)  # what was said of it before
            if said == "not reached" and case in timed:
                continue
            if timed.get(case, "") <= source.date:
                found[case] = {"section": section, "case": case, "said": said, "source": source}
    return list(found.values())


# --------------------------------------------------------------------------------------------------------- of the rows


def sources_of(rows: Iterable[dict]) -> list[Source]:
    """Whose the rows are, the oldest file first."""
    return sorted({row["source"] for row in rows}, key=lambda s: (s.date, str(s.folder), s.name))


def grouped(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """(operation, set, mode) -> its rows, in the files' order."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["operation"], row["set"], row["mode"]), []).append(row)
    return groups


def best_of_each(rows: list[dict]) -> list[dict]:
    """Of every package its fastest right way, the fastest first; then of those without one what became of them."""
    timed: dict[str, dict] = {}
    for row in sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["kernel_ms"]["median"]):
        timed.setdefault(row["package"], row)
    rest: dict[str, dict] = {}
    for row in rows:
        if row["package"] not in timed:
            rest.setdefault(row["package"], row)
    return [*timed.values(), *rest.values()]
