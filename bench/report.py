"""Tables and plots from result files, and from nothing else.

    python bench/report.py [FOLDER ...] [--write README.md]
    python bench/report.py RUN [RUN ...] [--png curves.png]      training curves of several runs in one picture

A FOLDER is what bench/gpu_pass.py or bench/convergence.py left; by default all under bench/results/ are read, and of
everything measured on a device the newest figure is shown (bench/merge.py). Every table says which machine, date,
commit and command its rows are from; where they are from several, each row says which. The tables are Markdown,
printed; with --write the short form is put between the lines ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` of a
file, and everything into RESULTS.md beside the folders. The plots are PNG files in each device's newest folder
(bench/plots.py). A file that lacks a field, or holds another type in it, is refused by name. Rehearsals (--smoke) are
never rendered.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

from bench.lib.process import ROOT
from bench.lib.results import BadResult
from bench.lib.steps import MODE_LABELS, memory_words, mfu_words, way_words
from bench.merge import Device, Source, best_of_each, grouped, merge, read_folders, result_folders, sources_of
from bench.plots import overlay, plots
from bench.rates import rate_rows
from halny.model.durable import replacing
from halny.model.estimate import machines, step_time

RESULTS = ROOT / "bench" / "results"
FULL = "RESULTS.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
SHORT_FAILING = 20  # failing tests named in the short form

# ------------------------------------------------------------------------------------------------- where rows are from


def runs_of(rows: list[dict]) -> dict[Source, str]:
    """A number for each file that the rows are from, the oldest 1; nothing where there is only one."""
    sources = sources_of(rows)
    return {source: str(i + 1) for i, source in enumerate(sources)} if len(sources) > 1 else {}


def machine_line(source: Source, date: str | None = None) -> str:
    m, v = source.machine, source.machine["versions"]
    peers = ", ".join(f"{name} {v[name]}" for name in v if name not in ("python", "numpy", "transformers"))
    return f"{m['device']}, {date or source.date[:10]}, commit {m['commit']}, `{m['command']}`; {peers}."


def ceiling_line(source: Source) -> str:
    c = source.ceilings
    return (
        f"Ceilings measured in the same run: device copy {c['copy_gb_s']:,.0f} GB/s; cuBLAS in bf16 on random data "
        f"{c['step_tflop_s']:,.0f} TFLOP/s at the step's shapes, {c['head_tflop_s']:,.0f} at the head's, "
        f"{c['square_tflop_s']:,.0f} at 8192 x 8192 x 8192."
    )


def origin(rows: list[dict]) -> list[str]:
    """The lines above a table: the machine, once, or a list of the runs that its last column names."""
    runs = runs_of(rows)
    if not runs:
        source = sources_of(rows)[0]
        return [machine_line(source), *([ceiling_line(source)] if source.ceilings else [])]
    lines = [
        f"- run {n}: {machine_line(source, source.minute)}" + (f" {ceiling_line(source)}" if source.ceilings else "")
        for source, n in runs.items()
    ]
    return ["The rows are from several runs; the last column says which.", "\n".join(lines)]


def with_runs(head: list[str], lines: list[list[str]], of: list[list[dict]], rows: list[dict], left: int = 1) -> str:
    """A table of lines, each ``of`` some of the rows, with a column more where the rows are from several runs."""
    if runs := runs_of(rows):
        which = [", ".join(dict.fromkeys(runs[row["source"]] for row in some)) for some in of]
        lines = [[*filled(line, len(head)), run] for line, run in zip(lines, which, strict=True)]
        head = [*head, "run"]
    return table(head, lines, left)


def dagger(row: dict) -> str:
    """After the name of a figure that a newer attempt could not repeat (``since_list``)."""
    return " †" if row["since"] else ""


def when(source: Source) -> str:
    return f"{source.minute}, commit {source.machine['commit']}"


def since_list(rows: list[dict], name) -> list[str]:
    """What became of newer attempts at rows whose older figure stands, a line a reason."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if new := row["since"]:
            said = f"{new['status']} on {when(new['source'])}; the figure is of {when(row['source'])}. "
            names.setdefault(said + one_line(new["reason"]), []).append(name(row))
    lines = [f"- {'; '.join(which)}: {said}" for said, which in names.items()]
    return listed("† A newer attempt gave no figure:", lines)


def listed(title: str, lines: list[str]) -> list[str]:
    """Paragraphs: a title and its list; none without lines."""
    return [title, "\n".join(lines)] if lines else []


# -------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns aligned to the left, figures to the right."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(filled(cells, len(head))) + " |" for cells in (head, rule, *rows))


def filled(cells: list[str], n: int) -> list[str]:
    """The cells of a row without figures, and empty ones in the place of these."""
    return cells + [""] * (n - len(cells))


def one_line(text: str, most: int = 300) -> str:
    """Text as it may stand in a cell."""
    return " ".join(text.split()).replace("|", "\\|")[:most]


def milliseconds(times: dict) -> str:
    """The median, in as many digits as it deserves; the spread (p5 to p95) where it passes 5% of it."""
    median, spread = times["median"], times["p95"] - times["p5"]
    digits = 1 if median >= 100 else 2 if median >= 10 else 3
    text = f"{median:.{digits}f}"
    return f"{text} ({times['p5']:.{digits}f} to {times['p95']:.{digits}f})" if spread > 0.05 * median else text


def rate(row: dict) -> str:
    return f"{row['gb_s']:,.0f} GB/s" if row["ceiling"] == "copy_gb_s" else f"{row['tflop_s']:,.0f} TFLOP/s"


def kernel_figures(row: dict) -> list[str]:
    return [milliseconds(row["kernel_ms"]), rate(row), f"{row['of_ceiling']:.0%}"]


def kernel_table(rows: list[dict]) -> str:
    """Every case, and in it every package at its fastest."""
    lines, of = [], []
    for (operation, name, mode), group in grouped(rows).items():
        for i, row in enumerate(best_of_each(group)):
            case = f"{operation}, {name}, {mode}" if i == 0 else ""
            who = (f"**{row['provider']}**" if row["package"] == "halny" else row["provider"]) + dagger(row)
            if row["status"] == "ok":
                peak = row.get("peak_bytes")
                wall = "" if row["mode"] == "backward" else milliseconds(row["wall_ms"])  # a kept graph hides the host
                figures = [*kernel_figures(row), wall, "" if peak is None else f"{peak / 2**30:.2f}"]
            else:
                figures = [row["status"]]
            lines.append([case, who, *figures])
            of.append([row])
    head = ["operation, shapes, mode", "provider", "kernel ms", "rate", "of the ceiling", "wall ms", "peak GiB"]
    return with_runs(head, lines, of, rows, left=2)


def short_kernel_table(rows: list[dict]) -> str:
    """A line a case: halny, and the best of the others. In the column of runs "1, 2" is halny's run and the other's."""
    lines, of = [], []
    for (operation, _, mode), group in grouped(rows).items():
        ours = next((row for row in best_of_each(group) if row["package"] == "halny"), None)
        if ours is None:
            continue
        best = next((r for r in best_of_each(group) if r["status"] == "ok" and r["package"] != "halny"), None)
        figures = kernel_figures(ours) if ours["status"] == "ok" else [ours["status"], "", ""]
        other = [f"{best['provider']}{dagger(best)}, {milliseconds(best['kernel_ms'])}"] if best else []
        if best and ours["status"] == "ok":
            other.append(f"{best['kernel_ms']['median'] / ours['kernel_ms']['median']:.2f}")
        lines.append([f"{operation}, {mode}{dagger(ours)}", *figures, *other])
        of.append([row for row in (ours, best) if row])
    head = ["case", "halny, ms", "rate", "of the ceiling", "best of the others, ms", "others / halny"]
    return with_runs(head, lines, of, rows) if lines else ""


def backends_table(rows: list[dict]) -> str:
    """Attention: a line a case and mode, a column a backend, TFLOP/s by the mask; bold is what "auto" takes."""

    def backend_of(row: dict) -> str:
        return row["provider"].removeprefix("halny, ")

    timed = [row for row in rows if row["status"] == "ok" and row["mode"] != "both"]
    backends = list(dict.fromkeys(map(backend_of, timed)))
    lines, of = [], []
    for (_, name, mode), group in grouped(timed).items():
        cells = dict.fromkeys(backends, "")
        for row in group:
            said = f"{row['tflop_s']:,.0f} in {row['kernel_ms']['median']:.3g} ms{dagger(row)}"
            cells[backend_of(row)] = f"**{said}**" if row["package"] == "halny" else said
        lines.append([f"{name}, {mode}", *cells.values()])
        of.append(group)
    return with_runs(["case", *backends], lines, of, rows) if lines else ""


def kernel_name(row: dict) -> str:
    return f"{row['operation']}, {row['set']}, {row['mode']}, {row['provider']}"


def missing_list(rows: list[dict], device: Device, section: str) -> list[str]:
    """Why a provider or a case has no figure, once each."""
    reasons: dict[str, None] = {}
    runs = runs_of([*rows, *device.unmeasured])
    for row in rows:
        if row["status"] != "ok":
            run = f" (run of {row['source'].minute})" if runs else ""
            reasons[f"- {row['operation']}, {row['provider']}: {row['status']}{run}. {row['reason']}"] = None
    for one in device.unmeasured:
        if one["section"] == section:
            reasons[f"- {one['case']}: {one['said']} (run of {one['source'].minute})"] = None
    return list(reasons)


def kernel_parts(device: Device, section: str, short: bool) -> list[str]:
    rows = device.sections.get(section, [])
    if not short:
        without = listed("Without a figure:", missing_list(rows, device, section))
        backends = [backends_table(rows)] if section == "attention" else []
        timed = [*origin(rows), *backends, kernel_table(rows), *since_list(rows, kernel_name)] if rows else []
        return [*timed, *without]
    shown, made = [row for row in rows if row["set"] == "7b"], short_kernel_table
    shapes = "Mistral-7B's micro batch of 16,384 tokens, bf16, cold cache; others are those in bench/lib/peers.py."
    if section == "attention":
        shown, made = rows, backends_table
        shapes = (
            "TFLOP/s of what the mask admits; causal, 32 query and 8 key heads of 128, bf16; documents have 700 tokens "
            'on average. Bold is what backend="auto" takes.'
        )
    parts = [*origin(shown), shapes, made(shown)] if shown else []
    ours = [row for row in rows if row["package"] == "halny"]
    parts += since_list(ours, kernel_name)
    parts += listed("Of halny's without a figure:", missing_list(ours, device, section))
    without = sum(row["package"] != "halny" and row["status"] != "ok" for row in rows)
    if without:
        parts.append(f"{without} rows of other packages have no figure, at all shapes; {FULL} says why.")
    return parts


def labelled(row: dict, figure: str) -> str:
    """A figure as it may stand in a cell: those of one rank emulated say so there."""
    return figure if row["mode"] == "one-gpu" or not figure else f"{figure}<br>{MODE_LABELS[row['mode']]}"


def step_table(rows: list[dict]) -> str:
    """A row a case; what is not real training on one GPU is labelled in every cell."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            figures = [why_none(row)]
        else:
            mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_palm']:.1%})"
            before, after = (row[f"ceiling_{when}"]["tflop_s"] for when in ("before", "after"))
            share = f"{row['of_ceiling']:.1%} of {before:,.0f} before, {after:,.0f} after"
            figures = [f"{row['tokens_per_second']:,.0f}", step_milliseconds(row["step_ms"]), mfu, share,
                       memory_words(row)]  # fmt: skip
        lines.append([row["label"] + dagger(row), *(labelled(row, figure) for figure in figures)])
    head = ["a step of", "tokens/s", "ms (p5 to p95, steps)", "MFU (PaLM's formula)",
            "of the matmul ceiling, TFLOP/s", "peak memory"]  # fmt: skip
    return with_runs(head, lines, [[row] for row in rows], rows)


def why_none(row: dict) -> str:
    """In the place of a row's first figure."""
    return f"{row['status']}: {one_line(row['reason'], 200)}"


def step_milliseconds(times: dict) -> str:
    return f"{times['median']:,.1f} ({times['p5']:,.1f} to {times['p95']:,.1f}, {times['n']})"


def conditions(rows: list[dict]) -> list[str]:
    """Clocks, power and temperature beside each case that ran, in words."""
    return [
        f"- {row['label']}: {w['sm_mhz']:,.0f} MHz, {w['watts']:,.0f} W, at most {w['celsius']:,.0f} °C"
        for row in rows
        if (w := row.get("nvidia_smi_beside"))
    ]


def ours_for(steps: list[dict], opponent: dict) -> list[dict]:
    """Our real training on one GPU of as many layers: what keeps as much as the opponent, and our fastest.

    An opponent with fp32 weights and moments is matched by our fp32 moments, whose masters are fp32 as well. None of
    ours keeps as little as bf16 weights without masters, so there the fastest stands alone.
    """
    rows = [r for r in steps if r["status"] == "ok" and r["mode"] == "one-gpu"]
    rows = sorted((r for r in rows if r["n_layers"] == opponent["n_layers"]), key=lambda r: -r["tokens_per_second"])
    alike = [r for r in rows if r["moments"] == "fp32" and opponent["name"].endswith("fp32")]
    return [*alike[:1], *(r for r in rows[:1] if r not in alike[:1])]


def opponents_table(opponents: list[dict], steps: list[dict]) -> str:
    """Each opponent at its best, and what ours is over it: real training on one GPU both."""
    rows = []
    for row in opponents:
        if row["status"] != "ok":
            rows.append([row["label"] + dagger(row), why_none(row)])
            continue
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
        ratios = []
        for ours in ours_for(steps, row):
            run = "" if ours["source"].date == row["source"].date else f", run of {when(ours['source'])}"
            kept = f"{ours['moments']} moments, micro batch {ours['micro_batch']}{run}"
            ratios.append(f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f} ({kept})")
        rows.append([row["label"] + dagger(row), f"{row['tokens_per_second']:,.0f}", step_milliseconds(row["step_ms"]),
                     mfu_words(row), memory, way_words(row), "<br>".join(ratios)])  # fmt: skip
    head = ["opponent, one GPU", "tokens/s", "ms (p5 to p95, steps)", "MFU", "peak GiB", "at its best", "ours / theirs"]
    return with_runs(head, rows, [[row] for row in opponents], opponents)


def attempts_list(opponents: list[dict]) -> list[str]:
    """Every way in which an opponent was tried."""
    lines = []
    for row in opponents:
        for a in row["attempts"]:
            said = f"{a['tokens_per_second']:,.0f} tokens/s" if a["status"] == "ok" else f"{a['status']}: {a['reason']}"
            lines.append(f"- {row['label']}, {way_words(a)}: {said[:200]}")
    return lines


def gap_line(profile: dict) -> str:
    """A profiled step in one sentence: each part's own time, its floor in brackets, the longest first."""
    parts = sorted((row for row in profile["gaps"] if row["ms"] >= 1), key=lambda row: -row["ms"])
    said = ", ".join(f"{row['part']} {row['ms']:,.1f} ({row['floor_ms']:,.1f})" for row in parts)
    return f"{profile['label']}{dagger(profile)}, one profiled step of {profile['wall_ms']:,.1f} ms: {said}."


def gap_table(profile: dict) -> str:
    """Where a profiled step's time goes beside its floor, the largest gap first; labelled as ``step_table``."""
    sums = {k: sum(row[k] for row in profile["gaps"]) for k in ("ms", "kernels_ms", "floor_ms", "gap_ms")}
    rows = [
        [row["part"], *(labelled(profile, f"{row[k]:,.2f}") for k in ("ms", "kernels_ms", "floor_ms")),
         labelled(profile, f"{row['gap_ms']:+,.2f}")]
        for row in [*profile["gaps"], {"part": "the step", **sums}]
    ]  # fmt: skip
    return table(["part of the step", "own ms", "kernels' ms", "floor ms", "gap ms"], rows)


def profile_parts(profiles: list[dict], short: bool) -> list[str]:
    parts, runs = [], runs_of(profiles)
    for profile in profiles:
        run = f" (run {runs[profile['source']]})" if runs else ""
        if profile["status"] != "ok":
            parts.append(f"{profile['label']}{run}: {profile['status']}, {profile['reason'][:200]}.")
            continue
        if short:
            parts.append(f"- {gap_line(profile)}{run}")
            continue
        hidden = f"{profile['hidden_communication_ms']:,.1f} ms of communication are hidden behind computation"
        basis = profile["floors"]["basis"]
        parts += [f"One profiled step{run}, {profile['label']}{dagger(profile)}: {hidden}; floors {basis}.",
                  gap_table(profile)]  # fmt: skip
        if profile["other"]:
            other = ", ".join(f"`{k['kernel'][:60]}` {k['ms']:.2f} ms" for k in profile["other"][:5])
            parts.append(f"Other, {MODE_LABELS[profile['mode']]}: {other}.")
    if short:
        lines = [part for part in parts if part.startswith("- ")]
        said = ("Milliseconds of the step that are each part's own, and in brackets its floor: FLOPs and bytes over "
                "rates measured in the same process; attention's rate is assumed.")  # fmt: skip
        parts = [said, "\n".join(lines), *(part for part in parts if part not in lines)]
    return [*parts, *since_list(profiles, lambda row: row["label"])]


def trainer_table(rows: list[dict], short: bool) -> str:
    """What was tried on train.py itself: how it ended, how long it took, what it says; in full its figures too."""

    def words(value) -> str | None:
        if isinstance(value, list) and 0 < len(value) <= 4:
            values = [words(x) for x in value]
            return None if None in values else " and ".join(values)
        if isinstance(value, (bool, str)):
            return one_line(str(value)) or None
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:,.4g}" if isinstance(value, float) else None

    lines = []
    for row in rows:
        figures = {} if short else {name.replace("_", " "): words(value) for name, value in row["figures"].items()}
        said = [one_line(row["reason"]), *(f"{name} {value}" for name, value in figures.items() if value)]
        remark = "; ".join(x for x in said if x)
        lines.append([row["name"] + dagger(row), row["status"], f"{row['seconds']:,.0f}", remark])
    return with_runs(["what", "status", "seconds", "remark"], lines, [[row] for row in rows], rows, left=4)


def pass_parts(visits: list[dict], short: bool) -> list[str]:
    """The tests' counts of the newest visit that ran them; in full of every visit, and how each of its parts ended."""
    parts, seen = [], set()
    for visit in reversed(visits):
        source = visit["source"]
        about = f"{when(source)}, `{source.machine['command']}`"
        for name, entry in visit["parts"].items():
            if "passed" not in entry or (short and name in seen):
                continue
            seen.add(name)
            counts = ", ".join(f"{entry.get(k, 0)} {k}" for k in ("passed", "failed", "errors", "skipped"))
            ended = "" if entry.get("status") in ("ok", "failed") else f", {entry.get('status')}"
            parts.append(f"GPU tests{'' if name == 'tests' else f' ({name})'}: {counts}{ended}; {about}.")
            failing = [f"- `{test}`" for test in entry.get("failing", [])]
            if short and len(failing) > SHORT_FAILING:
                failing = [*failing[:SHORT_FAILING], f"- and {len(failing) - SHORT_FAILING} more"]
            parts += listed("Failing:", failing)
        if not short:
            lines = [
                [name, entry.get("status", ""), f"{entry.get('seconds') or 0:,.0f}", one_line(entry.get("said", ""))]
                for name, entry in visit["parts"].items()
            ]
            parts += [f"The parts of the visit of {about}:", table(["part", "status", "seconds", "said"], lines, 4)]
    return parts


def aot_table(found: list[dict]) -> str:
    def widths(counts: dict) -> str:
        return " ".join(f"{n}x{w}" for w, n in sorted(counts.items(), key=lambda item: -int(item[0])))

    rows = [
        [
            r["kernel"], r["arch"], *(str(r[k]) for k in ("warps", "registers", "spills", "shared_bytes")),
            "" if r["occupancy"] is None else f"{r['occupancy']:.0%}", f"{widths(r['loads'])} / {widths(r['stores'])}",
        ]
        for r in found
    ]  # fmt: skip
    head = ["kernel, shape, dtype", "arch", "warps", "registers", "spills", "shared bytes", "occupancy",
            "loads / stores"]  # fmt: skip
    return with_runs(head, rows, [[row] for row in found], found, left=2)


def convergence_table(found: dict) -> str:
    rows = [
        [row["optimizer"], f"{row['held_out_loss']:.3f}", f"{row['spread']:.3f}", f"{row['difference']:+.3f}",
         f"{row['spread_of_difference']:.3f}"]
        for row in found["summary"]
    ]  # fmt: skip
    head = ["moments", "held-out loss", "between seeds", "less fp32 AdamW's, same seed", "between seeds"]
    return table(head, rows)


def convergence_line(found: dict) -> str:
    s, machine = found["setting"], found["source"].machine
    return (
        f"{s['weights']:,} weights in {s.get('dtype', 'bf16')}, {s['steps']} steps of {s['samples_a_step']} x "
        f"{s['seq_len']} tokens, beta2 {s['beta2']:g}, {s['seeds']} seeds; {machine['device']}, "
        f"{machine['date'][:10]}, commit {machine['commit']}: `{machine['command']}`"
    )


def averaging_table(found: dict) -> str:
    rows = [
        [f"{row['step']:,}", row["what"], f"{row['held_out_loss']:.3f}", f"{row['spread']:.3f}",
         f"{row['difference']:+.3f}", f"{row['spread_of_difference']:.3f}"]
        for row in found["summary"]
    ]  # fmt: skip
    head = ["at step", "model", "held-out loss", "between seeds", "less the last checkpoint's, same seed",
            "between seeds"]  # fmt: skip
    return table(head, rows, left=2)


def averaging_line(found: dict) -> str:
    s = found["setting"]
    return (
        f"fp32 AdamW at a constant rate, checkpoints {s['interval']} steps apart; decayed: the same run, from step "
        f"{s['steps'] - s['decay_steps']:,} on with the decay of wsd."
    )


# ------------------------------------------------------------------------------------- what the plan assumes, beside it


def rates_parts(device: Device) -> list[str]:
    """What step_time.py assumes of a GPU, its share of the data sheet's peak, beside what was measured."""
    found = rate_rows(device) if device.name != "CPU" else []
    if not found:
        return []
    of = [row for *_, row in found]
    lines = []
    for what, unit, name, base, measured, row in found:
        assumed = ["", ""]
        if name and base:
            assumed = [f"{getattr(step_time.RATES[x], name) * base:,.0f}" for x in ("good", "leading")]
        share = f" ({measured / base:.1%})" if base else ""
        figure = f"{measured:,.0f} {unit}{share}"
        lines.append([what, *assumed, labelled(row, figure) if "label" in row else figure])
    head = ["rate (share of the data sheet's peak)", "assumed, good", "assumed, leading", "measured"]
    said = "Rates that `train.py --plan` assumes (`RATES` in step_time.py), beside what was measured."
    if device.name not in machines.GPUS:
        said += " This GPU is not in model/estimate/machines.py: nothing is assumed of it."
    runs = runs_of(of)
    named = [f"- run {n}: {machine_line(source, source.minute)}" for source, n in runs.items()]
    above = "\n".join(named) if runs else machine_line(sources_of(of)[0])
    return [said, above, with_runs(head, lines, [[row] for row in of], of)]


# ----------------------------------------------------------------------------------------------------------- documents


def sections_of(device: Device, short: bool) -> list[tuple[str, list[str]]]:
    """(title, paragraphs) of everything known of a device, the whole step first."""
    found = []
    have = device.sections
    if rows := have.get("step"):
        beside = conditions(rows) if not short else []
        found.append(("Step", [*origin(rows), step_table(rows), *since_list(rows, lambda row: row["label"]),
                               *(["\n".join(beside)] if beside else [])]))  # fmt: skip
    if rows := have.get("profile"):
        found.append(("Where the time goes", [*origin(rows), *profile_parts(rows, short)]))
    if rows := have.get("opponents"):
        tried = listed("All that was tried:", attempts_list(rows)) if not short else []
        found.append(("Beside others", [*origin(rows), opponents_table(rows, have.get("step", [])),
                                        *since_list(rows, lambda row: row["label"]), *tried]))  # fmt: skip
    for section, title in (("attention", "Attention"), ("kernels", "Kernels")):
        found.append((title, kernel_parts(device, section, short)))
    if not short:
        found.append(("Rates that the plan assumes", rates_parts(device)))
    if rows := have.get("trainer"):
        said = "train.py as a user starts it. Runs went on beside each other, so their speeds are no benchmark."
        found.append(("The trainer itself", [*origin(rows), said, trainer_table(rows, short),
                                             *since_list(rows, lambda row: row["name"])]))  # fmt: skip
    if rows := have.get("pass"):
        found.append(("Visits" if not short else "Tests", pass_parts(rows, short)))
    for row in sorted(have.get("convergence", []), key=lambda row: row["setting"]["beta2"], reverse=True):
        found.append(("Convergence", [convergence_line(row), convergence_table(row)]))
    for row in have.get("averaging", []):
        found.append(("Averaging", [convergence_line(row), averaging_line(row), averaging_table(row)]))
    if (rows := have.get("aot")) and not short:
        found.append(("Machine code", [*origin(rows), "Nothing here is timed.", aot_table(rows)]))
    return [(title, parts) for title, parts in found if parts]


def markdown(devices: list[Device], short: bool = False) -> str:
    """Everything the files hold; or the short form, which leaves out what RESULTS.md has besides."""
    parts = []
    for device in devices:
        for title, paragraphs in sections_of(device, short):
            parts += [f"### {title}: {device.name}", *paragraphs]
    return "\n\n".join(parts)


def full(devices: list[Device], pictures: list[Path], path: Path) -> str:
    """RESULTS.md."""
    begin = "Made by `python bench/report.py --write README.md` from the JSON files beside it; edit those, not this."
    drawn = [f"![{picture.stem}]({link(picture, path)})" for picture in pictures]
    return "\n\n".join(["# Results", begin, files_table(devices), markdown(devices), *drawn]) + "\n"


def link(to: Path, of: Path) -> str:
    """The way from one file to another, as Markdown has it."""
    return Path(os.path.relpath(to.resolve(), of.resolve().parent)).as_posix()


def files_table(devices: list[Device]) -> str:
    """Every file that was read, and how many of its rows are the newest of their kind."""
    lines = []
    for device in devices:
        rows = [row for rows in device.sections.values() for row in rows]
        for source in device.sources:
            shown = sum(row["source"].path == source.path for row in rows)
            lines.append([f"{source.folder.name}/{source.name}", device.name, source.minute, source.machine["commit"],
                          f"{shown} of {source.n_rows}"])  # fmt: skip
    return table(["file", "device", "date", "commit", "rows below"], lines, left=4)


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the markers. Raises BadResult if they are not there once each, in order."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise BadResult(f"{path.name} must hold the lines {BEGIN} and {END} once each, in this order")
    before, _, rest = old.partition(BEGIN)
    write_whole(path, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="*", type=Path,
        help="folders of result files [all in bench/results/]; or run folders of train.py")  # fmt: skip
    parser.add_argument("--png", type=Path, default=Path("curves.png"), metavar="FILE",
        help="where the curves of run folders go [curves.png]")  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE",
        help=f"put the short form between {BEGIN} and {END} of FILE, all into {FULL} beside the folders")  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        if any((folder / "metrics.jsonl").exists() for folder in given.folder):
            overlay(given.folder, given.png)
            print(f"curves of {len(given.folder)} run(s): {given.png}")
            return 0
        folders = given.folder or result_folders(RESULTS)
        devices = merge(read_folders(folders))
        if not devices:
            where = ", ".join(map(str, given.folder)) or "bench/results/"
            print(f"no results in {where}: nothing has been measured; bench/gpu_pass.py makes them on a GPU")
            return 0
        if not given.write:
            print(markdown(devices))
        pictures = [path for device in devices for path in plots(device)]
        if given.write:
            everything = folders[0].resolve().parent / FULL
            said = "All shapes, modes and packages, what failed and why, the plan's rates beside these, plots"
            said += f": [{FULL}]({link(everything, given.write)})."
            write_between(given.write, f"{said}\n\n{markdown(devices, short=True)}")
            write_whole(everything, full(devices, pictures, everything))
        for path in pictures:
            print(f"plot: {path}", file=sys.stderr)
    except (BadResult, OSError) as problem:
        print(f"report.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
