"""Pictures of result files, one set for each device; and the training curves of several runs in one.

report.py calls both. Rows of several files may stand in one picture: its title says their dates, and the line at the
ceiling is the newest file's. matplotlib is imported where it draws: a visit's machine may lack it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.lib.results import BadResult
from bench.merge import Device, best_of_each, grouped, sources_of
from halny.model.durable import replacing
from halny.model.record.run_folder import RunFolder

OURS, PEER, INK = "#c2410c", "#94a3b8", "#1f2937"  # halny in one strong colour, all others in one quiet one


def bars(columns: list[dict[str, list[dict]]], rate: str, title: str, xlabel: str, ceiling: float, path: Path) -> None:
    """Horizontal bars of row[rate] in columns of groups, a group a case, the fastest first; a line at the ceiling."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    n_lines = max(sum(1.4 + len(rows) for rows in groups.values()) for groups in columns)
    size = 9 if len(columns) == 1 else 6.4 * len(columns), 1.2 + 0.26 * n_lines
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    behind = dict(facecolor="white", edgecolor="none", pad=0.6)  # so that no line runs through a figure
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    for ax, groups in zip(figure.subplots(1, len(columns), sharex=True, squeeze=False)[0], columns, strict=True):
        y, names = 0.0, {}
        for case, rows in groups.items():
            ax.text(0, y, case, fontsize=9, fontweight="bold", color=INK, va="center")
            for row in rows:
                y += 1.0
                names[y] = row["provider"]
                bar = ax.barh(y, row[rate], height=0.72, color=OURS if row["package"] == "halny" else PEER)
                ax.bar_label(bar, fmt="{:,.0f}", padding=4, fontsize=8, color=INK, bbox=behind)
            y += 1.4
        ax.set_yticks(list(names), list(names.values()), fontsize=8.5)
        for tick, name in zip(ax.get_yticklabels(), names.values(), strict=True):
            ours = name.startswith("halny")
            tick.set(color=OURS if ours else INK, fontweight="bold" if ours else "normal")
        ax.tick_params(axis="y", length=0)
        ax.set(xmargin=0.13, ylim=(n_lines - 0.6, -0.7))
        ax.set_xlabel(xlabel, fontsize=8.5, color=INK)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.axvline(ceiling, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def timed_groups(rows: list[dict], title: Callable[[dict], str], wanted: Callable[[dict], bool]) -> dict:
    """title(row) -> the timed rows of the cases that wanted(row) picks, the best of each package; row is the first."""
    found = {}
    for group in grouped(rows).values():
        best = [row for row in best_of_each(group) if row["status"] == "ok"]
        if best and wanted(best[0]):
            found[title(best[0])] = best
    return found


def plots(device: Device) -> list[Path]:
    """PNG files in the device's newest folder: bandwidth, head and loss, attention; those that have rows."""
    kernels, attention = (device.sections.get(name, []) for name in ("kernels", "attention"))

    def sizes(row: dict) -> str:
        return " x ".join(f"{row['shape'][name]:,}" for name in ("tokens", "dim", "vocabulary")) + f", {row['mode']}"

    pictures = {
        "bandwidth": (kernels, "gb_s", "copy_gb_s", "bandwidth at 16,384 tokens, bf16, cold cache", "GB/s",
            [timed_groups(kernels, lambda r: f"{r['operation']}, {r['mode']}", lambda r, m=modes: r["set"] == "7b"
                          and r["ceiling"] == "copy_gb_s" and r["mode"] in m
                          and (r["mode"] != "both" or r["operation"] == "cross_entropy"))
             for modes in (("forward", "loss only", "update"), ("backward", "both"))]),
        "linear-cross-entropy": (kernels, "tflop_s", "head_tflop_s", "the head and its loss as one, bf16", "TFLOP/s",
            [timed_groups(kernels, sizes, lambda r, m=mode: r["operation"] == "linear_cross_entropy" and r["mode"] == m)
             for mode in ("both", "loss only")]),
        "attention": (attention, "tflop_s", "square_tflop_s", "causal attention, 32/8 heads of 128, bf16",
            "TFLOP/s of what the mask admits",
            [timed_groups(attention, lambda r: f"{r['mode']}, {r['set']}", lambda r, m=mode: r["mode"] == m)
             for mode in ("forward", "backward")]),
    }  # fmt: skip
    made = []
    for name, (rows, rate, ceiling_name, title, xlabel, columns) in pictures.items():
        if all(columns):
            sources = sources_of(rows)
            dates = " and ".join(dict.fromkeys(source.date[:10] for source in sources))
            ceiling, path = sources[-1].ceilings[ceiling_name], device.newest_folder / f"{name}.png"
            limit = "device copy" if ceiling_name == "copy_gb_s" else "cuBLAS"
            about = f"{xlabel}; further right is better; the line: {limit}, {ceiling:,.0f}"
            bars(columns, rate, f"{device.name}, {dates}: {title}", about, ceiling, path)
            made.append(path)
    return made


# ---------------------------------------------------------------------------------------------------------- runs


def overlay(runs: list[Path], png: Path) -> None:
    """Loss, accuracy and speed of several runs of train.py over the tokens they have seen, in one picture.

    Over tokens and not steps, so that runs of different batches compare; and held-out bits per byte where a run has
    them, by which runs of different tokenizers compare. Raises BadResult for a run without a step.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    read = [RunFolder(run).lines() for run in runs]
    columns = {"loss": "loss", "accuracy": "accuracy", "tokens_per_second_per_gpu": "tokens/s/GPU"}
    if any("val_bits_per_byte" in line for lines in read for line in lines):
        columns["bits_per_byte"] = "bits per byte"
    figure = Figure(figsize=(5 * len(columns), 4.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(columns))
    for i, (run, lines) in enumerate(zip(runs, read, strict=True)):
        tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
        if not tokens:
            raise BadResult(f"{run} has no step in its metrics.jsonl; name a run of train.py that has begun")
        color = colormaps["tab10"](i % 10)
        for axes, name in zip(panels, columns, strict=True):
            points = [(tokens[line["step"]], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.7, label=str(run))
            evaluated = [line for line in lines if line.get(f"val_{name}") is not None and line["step"] in tokens]
            held_out = [(tokens[line["step"]], line[f"val_{name}"]) for line in evaluated]
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o--", color=color, linewidth=1, markersize=5)
    for axes, title in zip(panels, columns.values(), strict=True):
        axes.set(title=title, xlabel="tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False,
                  title="line: training, dots: held out")  # fmt: skip
    with replacing(png) as partial:
        figure.savefig(partial, dpi=120)
