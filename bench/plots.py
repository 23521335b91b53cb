"""Pictures of result files, one set for each device; and the training curves of several runs in one.

report.py calls both. Rows of several files may stand in one picture: its subtitle says their dates, and the line at the
ceiling is the newest file's.
"""

from __future__ import annotations

from pathlib import Path

from bench.lib.results import BadResult
from bench.merge import Device, best_of_each, grouped, sources_of
from halny.model.durable import replacing

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
            if name.partition(",")[0] == "halny":
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


def timed_groups(rows: list[dict], title, wanted) -> dict[str, list[dict]]:
    """title(row) -> the timed rows of the cases that wanted(row) picks, the best of each package; row is the first."""
    found = {}
    for group in grouped(rows).values():
        best = [row for row in best_of_each(group) if row["status"] == "ok"]
        if best and wanted(best[0]):
            found[title(best[0])] = best
    return found


def plots(device: Device) -> list[Path]:
    """PNG files in the device's newest folder: bandwidth, time of the call, head and loss, attention."""
    made, folder = [], device.newest_folder

    def draw(name: str, columns: list[dict], *arguments) -> None:
        if all(columns):
            bars(columns, *arguments, folder / name)
            made.append(folder / name)

    def about(rows: list[dict], text: str) -> str:
        dates = dict.fromkeys(source.date[:10] for source in sources_of(rows))
        return f"{device.name}, {' and '.join(dates)}; {text}"

    def ceiling(rows: list[dict], name: str) -> float:
        return sources_of(rows)[-1].ceilings[name]

    def op_mode(row: dict) -> str:
        return f"{row['operation']}, {row['mode']}"

    def sizes(row: dict) -> str:
        return " x ".join(f"{row['shape'][name]:,}" for name in ("tokens", "dim", "vocabulary")) + f", {row['mode']}"

    if rows := device.sections.get("kernels"):
        columns = [
            timed_groups(rows, op_mode, lambda r, m=modes: r["set"] == "7b" and r["ceiling"] == "copy_gb_s"
                         and r["mode"] in m and (r["mode"] != "both" or r["operation"] == "cross_entropy"))
            for modes in (("forward", "loss only", "update"), ("backward", "both"))
        ]  # fmt: skip
        copy, head = ceiling(rows, "copy_gb_s"), ceiling(rows, "head_tflop_s")
        draw("bandwidth.png", columns,
             lambda r: r["gb_s"], lambda r: f"{r['gb_s']:,.0f}", "GB/s of the bytes that must move",
             "Bandwidth at Mistral-7B's micro batch",
             about(rows, "cold cache, 16,384 tokens, bf16; further right is better"), copy,
             f"device copy {copy:,.0f}")  # fmt: skip
        for name, title in (("short", "512 tokens"), ("128k", "2,048 tokens, 128,256 words")):
            groups = timed_groups(
                rows, op_mode, lambda r, n=name: r["set"] == n and r["mode"] == "both" and r["ceiling"] == "copy_gb_s"
            )
            draw(f"time-{name}.png", [groups],
                 lambda r: r["wall_ms"]["median"], lambda r: f"{r['wall_ms']['median']:.3f}", "ms a call",
                 f"Forward and backward as called, {title}",
                 about(rows, "wall time, host included, bf16; further left is better"), None, "")  # fmt: skip
        columns = [
            timed_groups(rows, sizes,
                         lambda r, m=mode: r["operation"] == "linear_cross_entropy" and r["mode"] == m)
            for mode in ("both", "loss only")
        ]  # fmt: skip
        draw("linear-cross-entropy.png", columns,
             lambda r: r["tflop_s"], lambda r: f"{r['tflop_s']:,.0f} ({r['kernel_ms']['median']:.2f} ms)", "TFLOP/s",
             "Linear cross-entropy: the head and its loss as one operation",
             about(rows, "cold cache, bf16; further right is better"), head, f"cuBLAS {head:,.0f}")  # fmt: skip
    if rows := device.sections.get("attention"):
        square = ceiling(rows, "square_tflop_s")
        columns = [
            timed_groups(rows, lambda r: f"{r['mode']}, {r['set']}", lambda r, m=mode: r["mode"] == m)
            for mode in ("forward", "backward")
        ]
        draw("attention.png", columns, lambda r: r["tflop_s"], lambda r: f"{r['tflop_s']:,.0f}", "TFLOP/s",
             "Causal attention, 32 query and 8 key heads of 128, bf16",
             about(rows, "TFLOP/s of what the mask admits; further right is better"), square,
             f"cuBLAS {square:,.0f}")  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------------------- runs


def overlay(runs: list[Path], png: Path) -> None:
    """Loss, accuracy and speed of several runs of train.py over the tokens they have seen, in one picture.

    Over tokens and not steps, so that runs of different batches compare. Raises BadResult for a run without a step.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    from halny.model.record.run_folder import RunFolder

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
            evaluated = [line for line in lines if line.get(f"val_{name}") is not None and line["step"] in tokens]
            held_out = [(tokens[line["step"]], line[f"val_{name}"]) for line in evaluated]
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
    with replacing(png) as partial:
        figure.savefig(partial, dpi=120)
