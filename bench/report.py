"""Tables and plots from result files, and from nothing else.

    python bench/report.py [FOLDER] [--write README.md]
    python bench/report.py RUN [RUN ...] [--png curves.png]      training curves of several runs in one picture

FOLDER is what bench/gpu_pass.py left (default: the newest under bench/results/). The tables are Markdown, printed, or
with --write put between the lines ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` of a file; the plots are PNG
files beside the results. A file that lacks a field, or holds another type in it, is refused by name. Rehearsals
(--smoke) are never rendered.
"""
# ruff: noqa: E402  imports follow the change of sys.path

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not bench/: see kernels.py

from bench.measure import MODE_LABELS, BadResult, memory_words, read_result

RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
KERNEL_FILES = ("kernels.json", "attention.json")


def load(folder: Path) -> dict[str, dict]:
    """name -> result, of the files that are there. Raises BadResult for one that is damaged or a rehearsal."""
    names = (*KERNEL_FILES, "step.json", "profile.json", "aot.json", *convergence_files(folder))
    found = {name: read_result(folder / name) for name in names if (folder / name).exists()}
    for name, result in found.items():
        if result["smoke"]:
            raise BadResult(
                f"{name} is a rehearsal (smoke): it holds no performance figure, and none is rendered from it"
            )
    return found


def convergence_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("convergence*.json"))


def newest(results: Path) -> Path | None:
    """The folder of the latest date that holds a result, by name: DATE-DEVICE; one of a GPU before DATE-cpu."""
    folders = [p for p in results.iterdir() if p.is_dir() and any(p.glob("*.json"))] if results.is_dir() else []
    folders = [p for p in folders if "smoke" not in p.name]
    return max(folders, key=lambda p: (not p.name.endswith("-cpu"), p.name), default=None)


# -------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns aligned to the left, figures to the right."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def milliseconds(times: dict) -> str:
    """The median, in as many digits as it deserves; the spread (p5 to p95) where it passes 5% of it."""
    median, spread = times["median"], times["p95"] - times["p5"]
    digits = 1 if median >= 100 else 2 if median >= 10 else 3
    text = f"{median:.{digits}f}"
    return f"{text} ({times['p5']:.{digits}f} to {times['p95']:.{digits}f})" if spread > 0.05 * median else text


def rate(row: dict) -> str:
    return f"{row['gb_s']:,.0f} GB/s" if row["ceiling"] == "copy_gb_s" else f"{row['tflop_s']:,.0f} TFLOP/s"


def grouped(result: dict) -> dict[tuple[str, str, str], list[dict]]:
    """(operation, set, mode) -> its rows, in the file's order."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in result["rows"]:
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


def kernel_table(result: dict) -> str:
    lines = []
    for (operation, name, mode), rows in grouped(result).items():
        for i, row in enumerate(best_of_each(rows)):
            case = f"{operation}, {name}, {mode}" if i == 0 else ""
            who = f"**{row['provider']}**" if row["package"] == "halny" else row["provider"]
            if row["status"] == "ok":
                figures = [milliseconds(row["kernel_ms"]), rate(row), f"{row['of_ceiling']:.0%}"]
                peak = row.get("peak_bytes")
                wall = "" if row["mode"] == "backward" else milliseconds(row["wall_ms"])  # a kept graph hides the host
                figures += [wall, "" if peak is None else f"{peak / 2**30:.2f}"]
            else:
                figures = [row["status"], "", "", "", ""]
            lines.append([case, who, *figures])
    head = ["operation, shapes, mode", "provider", "kernel ms", "rate", "of the ceiling", "wall ms", "peak GiB"]
    return table(head, lines, left=2)


def missing_list(result: dict) -> list[str]:
    """Why a provider has no figure, once each."""
    reasons: dict[str, None] = {}
    for row in result["rows"]:
        if row["status"] != "ok":
            reasons[f"- {row['operation']}, {row['provider']}: {row['status']}. {row['reason']}"] = None
    return list(reasons)


def machine_line(result: dict) -> str:
    m, v = result["machine"], result["machine"]["versions"]
    peers = ", ".join(f"{name} {v[name]}" for name in v if name not in ("python", "numpy", "transformers"))
    return f"{m['device']}, {m['date'][:10]}, commit {m['commit']}, `{m['command']}`; {peers}."


def ceiling_line(result: dict) -> str:
    c = result["ceilings"]
    return (
        f"Ceilings measured in the same run: device copy {c['copy_gb_s']:,.0f} GB/s; cuBLAS in bf16 on random data "
        f"{c['step_tflop_s']:,.0f} TFLOP/s at the step's shapes, {c['head_tflop_s']:,.0f} at the head's, "
        f"{c['square_tflop_s']:,.0f} at 8192 x 8192 x 8192."
    )


def labelled(row: dict, figure: str) -> str:
    """A figure as it may stand in a cell: those of one rank emulated, and calculated ones, say so there."""
    return figure if row["mode"] == "one-gpu" or not figure else f"{figure}<br>{MODE_LABELS[row['mode']]}"


def span(values: list, form: str) -> str:
    low, high = sorted(values)
    return f"{low:{form}} to {high:{form}}"


def step_table(result: dict) -> str:
    """A row a case; what is not real training on one GPU is labelled in every cell."""
    rows = []
    for row in result["rows"]:
        if row["status"] != "ok":
            figures = [f"{row['status']}: {row['reason'][:200]}", "", "", "", ""]
        elif "range" in row:
            r = row["range"]
            figures = [span(r["tokens_per_second"], ",.0f"), span(r["step_ms"], ",.0f"),
                       f"{span(r['mfu'], '.1%')} ({span(r['mfu_palm'], '.1%')})", "",
                       f"{r['memory_bytes'] / 2**30:.1f} GiB"]  # fmt: skip
        else:
            mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_palm']:.1%})"
            memory = memory_words(row)
            ceiling = (row["ceiling_before"]["tflop_s"], row["ceiling_after"]["tflop_s"])
            share = f"{row['of_ceiling']:.1%} of {ceiling[0]:,.0f} before, {ceiling[1]:,.0f} after"
            figures = [f"{row['tokens_per_second']:,.0f}", step_milliseconds(row["step_ms"]), mfu, share, memory]
        rows.append([row["label"], *(labelled(row, figure) for figure in figures)])
    head = ["a step of", "tokens/s", "ms (p5 to p95, steps)", "MFU (PaLM's formula)",
            "of the matmul ceiling, TFLOP/s", "peak memory"]  # fmt: skip
    return table(head, rows)


def step_milliseconds(times: dict) -> str:
    return f"{times['median']:,.1f} ({times['p5']:,.1f} to {times['p95']:,.1f}, {times['n']})"


def conditions(result: dict) -> list[str]:
    """Clocks, power and temperature beside each case that ran, in words."""
    return [
        f"- {row['label']}: {w['sm_mhz']:,.0f} MHz, {w['watts']:,.0f} W, at most {w['celsius']:,.0f} °C"
        for row in result["rows"]
        if (w := row.get("nvidia_smi_beside"))
    ]


def ours_for(result: dict, opponent: dict) -> dict | None:
    """Our fastest real training on one GPU of as many layers."""
    rows = [r for r in result["rows"] if r["status"] == "ok" and r["mode"] == "one-gpu"]
    rows = [r for r in rows if r["n_layers"] == opponent["n_layers"]]
    return max(rows, key=lambda r: r["tokens_per_second"], default=None)


def opponents_table(result: dict) -> str:
    """Each opponent at its best, and what ours is over it: real training on one GPU both."""
    rows = []
    for row in result["opponents"]:
        if row["status"] != "ok":
            rows.append([row["label"], f"{row['status']}: {row['reason'][:200]}", "", "", "", "", ""])
            continue
        mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
        how = f"micro batch {row['micro_batch']}, {row['compiled']} compiled"
        how += ", gradient checkpointing" if row["checkpointing"] else ""
        ours = ours_for(result, row)
        ratio = "" if ours is None else (
            f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f} ({ours['moments']} moments, micro batch "
            f"{ours['micro_batch']})"
        )  # fmt: skip
        rows.append([row["label"], f"{row['tokens_per_second']:,.0f}", step_milliseconds(row["step_ms"]), mfu, memory,
                     how, ratio])  # fmt: skip
    head = ["opponent, one GPU", "tokens/s", "ms (p5 to p95, steps)", "MFU", "peak GiB", "at its best", "ours / theirs"]
    return table(head, rows)


def attempts_list(result: dict) -> list[str]:
    """Every way in which an opponent was tried."""
    lines = []
    for row in result["opponents"]:
        for a in row["attempts"]:
            kept = ", gradient checkpointing" if a["checkpointing"] else ""
            said = f"{a['tokens_per_second']:,.0f} tokens/s" if a["status"] == "ok" else f"{a['status']}: {a['reason']}"
            how = f"micro batch {a['micro_batch']}, {a['compiled']} compiled{kept}"
            lines.append(f"- {row['label']}, {how}: {said[:200]}")
    return lines


def gap_table(profile: dict) -> str:
    """Where a profiled step's time goes beside its floor, the largest gap first; labelled as ``step_table``."""
    sums = {k: sum(row[k] for row in profile["gaps"]) for k in ("ms", "kernels_ms", "floor_ms", "gap_ms")}
    rows = [
        [row["part"], *(labelled(profile, f"{row[k]:,.2f}") for k in ("ms", "kernels_ms", "floor_ms")),
         labelled(profile, f"{row['gap_ms']:+,.2f}")]
        for row in [*profile["gaps"], {"part": "the step", **sums}]
    ]  # fmt: skip
    return table(["part of the step", "own ms", "kernels' ms", "floor ms", "gap ms"], rows)


def profile_parts(result: dict) -> list[str]:
    parts = []
    for profile in result["profiles"]:
        if profile["status"] != "ok":
            parts.append(f"{profile['label']}: {profile['status']}, {profile['reason'][:200]}.")
            continue
        hidden = f"{profile['hidden_communication_ms']:,.1f} ms of communication are hidden behind computation"
        said = f"One profiled step, {profile['label']}: {hidden}; floors {profile['floors']['basis']}."
        parts += [said, gap_table(profile)]
        if profile["other"]:
            other = ", ".join(f"`{k['kernel'][:60]}` {k['ms']:.2f} ms" for k in profile["other"][:5])
            parts.append(f"Other, {MODE_LABELS[profile['mode']]}: {other}.")
    return parts


def aot_table(result: dict) -> str:
    def widths(counts: dict) -> str:
        return " ".join(f"{n}x{w}" for w, n in sorted(counts.items(), key=lambda item: -int(item[0])))

    rows = [
        [
            r["kernel"], r["arch"], *(str(r[k]) for k in ("warps", "registers", "spills", "shared_bytes")),
            "" if r["occupancy"] is None else f"{r['occupancy']:.0%}", f"{widths(r['loads'])} / {widths(r['stores'])}",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    head = [
        "kernel, shape, dtype",
        "arch",
        "warps",
        "registers",
        "spills",
        "shared bytes",
        "occupancy",
        "loads / stores",
    ]
    return table(head, rows, left=2)


def convergence_table(result: dict) -> str:
    rows = [
        [row["optimizer"], f"{row['held_out_loss']:.3f}", f"{row['spread']:.3f}", f"{row['difference']:+.3f}",
         f"{row['spread_of_difference']:.3f}"]
        for row in result["summary"]
    ]  # fmt: skip
    head = ["moments", "held-out loss", "between seeds", "less fp32 AdamW's, same seed", "between seeds"]
    return table(head, rows)


def convergence_line(result: dict) -> str:
    s, machine = result["setting"], result["machine"]
    return (
        f"{s['weights']:,} weights in bf16, {s['steps']} steps of {s['samples_a_step']} x {s['seq_len']} tokens, beta2 "
        f"{s['beta2']:g}, {s['seeds']} seeds; {machine['device']}, commit {machine['commit']}: `{machine['command']}`"
    )


def markdown(results: dict[str, dict]) -> str:
    """Everything the files hold."""
    parts = []
    for name, title in zip(KERNEL_FILES, ("Kernels", "Attention"), strict=True):
        if name in results:
            result = results[name]
            parts += [f"### {title}", machine_line(result), ceiling_line(result), kernel_table(result)]
            missing = missing_list(result)
            if missing:
                parts += ["Without a figure:", "\n".join(missing)]
    if "step.json" in results:
        result = results["step.json"]
        if result["rows"]:
            parts += ["### Step", machine_line(result), step_table(result)]
            if beside := conditions(result):
                parts.append("\n".join(beside))
        if result.get("opponents"):
            parts += ["### Beside others", opponents_table(result)]
            if tried := attempts_list(result):
                parts += ["All that was tried:", "\n".join(tried)]
    if "profile.json" in results:
        parts += ["### Where the time goes", machine_line(results["profile.json"])]
        parts += profile_parts(results["profile.json"])
    for name in sorted(name for name in results if name.startswith("convergence")):
        result = results[name]
        parts += ["### Convergence", convergence_line(result), convergence_table(result)]
    if "aot.json" in results:
        versions = results["aot.json"]["machine"]["versions"]
        parts += ["### Machine code", f"Compiled by triton {versions.get('triton', 'unknown')}; nothing here is timed.",
                  aot_table(results["aot.json"])]  # fmt: skip
    return "\n\n".join(parts)


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the markers. Raises BadResult if they are not there once each, in order."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise BadResult(f"{path.name} must hold the lines {BEGIN} and {END} once each, in this order")
    before, _, rest = old.partition(BEGIN)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    partial.replace(path)


# --------------------------------------------------------------------------------------------------------------- plots

OURS, PEER, INK = "#c2410c", "#94a3b8", "#1f2937"  # halny in one strong colour, all others in one quiet one


def bars(columns: list[dict[str, list[dict]]], value, label, xlabel: str, title: str, subtitle: str,
         ceiling: float | None, ceiling_label: str, path: Path) -> None:  # fmt: skip
    """Horizontal bars in columns of groups, a group a case, the fastest first; a line at the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    longest = max(sum(1.35 + len(rows) for rows in groups.values()) for groups in columns)
    height, width = 1.5 + 0.26 * longest, 9 if len(columns) == 1 else 6.4 * len(columns)
    figure, all_axes = plt.subplots(1, len(columns), figsize=(width, height), dpi=130, squeeze=False)
    figure.text(0.012, 1 - 0.16 / height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.42 / height, subtitle, fontsize=8.5, color="#4b5563", va="top")
    top = max([ceiling or 0.0] + [value(row) for groups in columns for rows in groups.values() for row in rows])
    behind = dict(facecolor="white", edgecolor="none", pad=0.6)  # so that the line does not run through a figure
    for ax, groups in zip(all_axes[0], columns, strict=True):
        y, names = 0.0, {}
        for case, rows in groups.items():
            ax.text(0, y, case, fontsize=9, fontweight="bold", color=INK, va="center", ha="left")
            for row in rows:
                y += 1.0
                names[y] = row["provider"]
                ax.barh(y, value(row), height=0.72, color=OURS if row["package"] == "halny" else PEER)
                place = value(row) + 0.012 * top
                ax.text(place, y, label(row), fontsize=8, va="center", color=INK, bbox=behind)
            y += 1.35
        ax.tick_params(axis="y", length=0)
        ax.tick_params(colors=INK, labelsize=8.5)
        ax.set_yticks(list(names), list(names.values()))
        for tick, name in zip(ax.get_yticklabels(), names.values(), strict=True):
            if name == "halny":
                tick.set_fontweight("bold")
                tick.set_color(OURS)
        ax.set_ylim(longest - 0.6, -0.7)
        ax.set_xlim(0, top * 1.18)
        ax.set_xlabel(xlabel, fontsize=8.5, color=INK)
        ax.spines[["top", "right", "left"]].set_visible(False)
        if ceiling:
            ax.axvline(ceiling, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
            ax.text(ceiling, -0.75, f"{ceiling_label} ", fontsize=8, color=INK, ha="right", va="bottom")
    figure.subplots_adjust(
        left=1.75 / width, right=0.985, top=1 - 0.95 / height, bottom=0.48 / height, wspace=2.1 / (width / len(columns))
    )
    figure.savefig(path)
    plt.close(figure)


def timed_groups(result: dict, title, wanted) -> dict[str, list[dict]]:
    """title(row) -> the timed rows of the cases that wanted(row) picks, the best of each package; row is the first."""
    found = {}
    for rows in grouped(result).values():
        best = [row for row in best_of_each(rows) if row["status"] == "ok"]
        if best and wanted(best[0]):
            found[title(best[0])] = best
    return found


def plots(results: dict[str, dict], folder: Path) -> list[Path]:
    """PNG files in the folder: bandwidth, time of the call, head and loss, attention."""
    made = []

    def draw(name: str, columns: list[dict], *arguments) -> None:
        if all(columns):
            bars(columns, *arguments, folder / name)
            made.append(folder / name)

    def about(result: dict, text: str) -> str:
        return f"{result['machine']['device']}, {result['machine']['date'][:10]}; {text}"

    def op_mode(row: dict) -> str:
        return f"{row['operation']}, {row['mode']}"

    def sizes(row: dict) -> str:
        return " x ".join(f"{row['shape'][name]:,}" for name in ("tokens", "dim", "vocabulary")) + f", {row['mode']}"

    if "kernels.json" in results:
        result = results["kernels.json"]
        columns = [
            timed_groups(result, op_mode, lambda r, m=modes: r["set"] == "7b" and r["ceiling"] == "copy_gb_s"
                         and r["mode"] in m and (r["mode"] != "both" or r["operation"] == "cross_entropy"))
            for modes in (("forward", "loss only", "update"), ("backward", "both"))
        ]  # fmt: skip
        copy, head = result["ceilings"]["copy_gb_s"], result["ceilings"]["head_tflop_s"]
        draw("bandwidth.png", columns,
             lambda r: r["gb_s"], lambda r: f"{r['gb_s']:,.0f}", "GB/s of the bytes that must move",
             "Bandwidth at Mistral-7B's micro batch",
             about(result, "cold cache, 16,384 tokens, bf16; further right is better"), copy,
             f"device copy {copy:,.0f}")  # fmt: skip
        for name, title in (("short", "512 tokens"), ("128k", "2,048 tokens, 128,256 words")):
            groups = timed_groups(
                result, op_mode, lambda r, n=name: r["set"] == n and r["mode"] == "both" and r["ceiling"] == "copy_gb_s"
            )
            draw(f"time-{name}.png", [groups],
                 lambda r: r["wall_ms"]["median"], lambda r: f"{r['wall_ms']['median']:.3f}", "ms a call",
                 f"Forward and backward as called, {title}",
                 about(result, "wall time, host included, bf16; further left is better"), None, "")  # fmt: skip
        columns = [
            timed_groups(result, sizes,
                         lambda r, m=mode: r["operation"] == "linear_cross_entropy" and r["mode"] == m)
            for mode in ("both", "loss only")
        ]  # fmt: skip
        draw("linear-cross-entropy.png", columns,
             lambda r: r["tflop_s"], lambda r: f"{r['tflop_s']:,.0f} ({r['kernel_ms']['median']:.2f} ms)", "TFLOP/s",
             "Linear cross-entropy: the head and its loss as one operation",
             about(result, "cold cache, bf16; further right is better"), head, f"cuBLAS {head:,.0f}")  # fmt: skip
    if "attention.json" in results:
        result = results["attention.json"]
        square = result["ceilings"]["square_tflop_s"]
        columns = [
            timed_groups(result, lambda r: f"{r['mode']}, {r['set']}", lambda r, m=mode: r["mode"] == m)
            for mode in ("forward", "backward")
        ]
        draw("attention.png", columns, lambda r: r["tflop_s"], lambda r: f"{r['tflop_s']:,.0f}", "TFLOP/s",
             "Causal attention, 32 query and 8 key heads of 128, bf16",
             about(result, "TFLOP/s of what the mask admits; further right is better"), square,
             f"cuBLAS {square:,.0f}")  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------------------- runs


def overlay(runs: list[Path], png: Path) -> None:
    """Loss, accuracy and speed of several runs of train.py over the tokens they have seen, in one picture.

    Over tokens and not steps, so that runs of different batches compare. Raises BadResult for a run without a step.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    from halny.model.run_folder import RunFolder

    figure = Figure(figsize=(15, 4.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    columns = ("loss", "accuracy", "tokens_per_second_per_gpu")
    for i, run in enumerate(runs):
        lines = RunFolder(run).lines()
        tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
        if not tokens:
            raise BadResult(f"{run} has no step in its metrics.jsonl; name a run of train.py that has begun")
        color = colormaps["tab10"](i % 10)
        for axes, name in zip(panels, columns, strict=True):
            points = [(tokens[line["step"]], line[name]) for line in lines if line.get(name) is not None]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.7, label=str(run))
            held_out = [
                (tokens[line["step"]], line[f"val_{name}"])
                for line in lines
                if line.get(f"val_{name}") is not None and line["step"] in tokens
            ]
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o--", color=color, linewidth=1, markersize=5)
    for axes, title in zip(panels, ("loss", "accuracy", "tokens/s/GPU"), strict=True):
        axes.set(title=title, xlabel="tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False,
                  title="line: training, dots: held out")  # fmt: skip
    partial = png.with_name(f".{png.stem}.partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(png)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="*", type=Path,
        help="folder of result files [the newest in bench/results/]; or run folders of train.py")  # fmt: skip
    parser.add_argument("--png", type=Path, default=Path("curves.png"), metavar="FILE",
        help="where the curves of run folders go [curves.png]")  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the tables between {BEGIN} and {END} of FILE")
    given = parser.parse_args(arguments)
    try:
        if any((folder / "metrics.jsonl").exists() for folder in given.folder):
            overlay(given.folder, given.png)
            print(f"curves of {len(given.folder)} run(s): {given.png}")
            return 0
        if len(given.folder) > 1:
            raise BadResult(f"{given.folder[0]} and the rest are no runs of train.py; name one folder of results")
        folder = given.folder[0] if given.folder else newest(RESULTS)
        results = load(folder) if folder else {}
        if not results:
            where = folder or "bench/results/"
            print(f"no results in {where}: nothing has been measured; bench/gpu_pass.py makes them on a GPU")
            return 0
        text = markdown(results)
        if given.write:
            write_between(given.write, text)
        else:
            print(text)
        for path in plots(results, folder):
            print(f"plot: {path}", file=sys.stderr)
    except (BadResult, OSError) as problem:
        print(f"report.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
