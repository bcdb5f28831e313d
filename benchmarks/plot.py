"""Draws the figures of the README from the CSV files: python -m benchmarks.plot [--results FOLDER] [--device cpu|cuda].

recall_time: time against N for all providers. attention_speedup: against T. gpu_model: bars by workload. long_context:
tokens per second and memory against the context. roofline: what was reached of the ceilings of the run.
training_memory: peak against the segments.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import results
from benchmarks.results import Row, sizes

MARKERS = "osv^D<>pP*Xh"
OURS = "hmt"
Plot = Callable[[list[Row]], Figure | None]


def select(rows: Iterable[Row], benchmark: str, metric: str, task: str = "") -> list[Row]:
    found = [row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric) and row["value"]]
    return [row for row in found if row["workload"].startswith(task)]


def lines(axes: Any, rows: list[Row], size: str, of: Callable[[Row], float] = lambda row: float(row["value"])) -> None:
    """A line per provider of a number against one of the workload's sizes."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((int(sizes(row["workload"])[size]), of(row)) for row in rows if row["provider"] == provider)
        axes.plot(*zip(*points, strict=True), label=provider, **style(provider))
    axes.set_xscale("log")
    ticks = sorted({int(sizes(row["workload"])[size]) for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(size)
    axes.grid(alpha=0.3)


_looks: dict[str, int] = {}  # by provider, in the order of their appearance


def style(provider: str) -> dict[str, Any]:
    """The same in all panels and figures; ours is black."""
    index = _looks.setdefault(provider, len(_looks))
    look = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4, "color": f"C{index % 10}", "linewidth": 1}
    return look | ({"color": "black", "linewidth": 2} if provider in ("hmt", "hmt_kernels") else {})


def new_figure(columns: int, title: str) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(max(3.4 * columns, 5), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def legend(figure: Figure, axes: list[Any]) -> None:
    """One for all panels, below them."""
    entries = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=7)


def where(rows: list[Row]) -> str:
    row = rows[0]
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['date']}"


def recall_time(rows: list[Row]) -> Figure | None:
    of_recall = select(rows, "memory recall", "time", "recall")
    panels = sorted({row["workload"].partition(" D=")[2] for row in of_recall}, key=lambda name: (len(name), name))
    if not panels:
        return None
    figure, axes = new_figure(len(panels), f"Recall of one memory from N\n{where(of_recall)}")
    for panel, name in zip(axes, panels, strict=True):
        lines(panel, [row for row in of_recall if row["workload"].endswith(f"D={name}")], "N")
        panel.set_yscale("log")
        panel.set_title(f"D = {name.replace(' ', ', ')}", fontsize=9)
    axes[0].set_ylabel("time (us)")
    legend(figure, axes)
    return figure


def attention_speedup(rows: list[Row]) -> Figure | None:
    """Of the passes that were measured at the most lengths, for the batch and head dimension that come first."""
    passes = {metric: select(rows, "segment attention", metric) for metric in ("both", "forward")}
    metric = max(passes, key=lambda name: len({sizes(row["workload"])["T"] for row in passes[name]}))
    of_attention = [row for row in passes[metric] if row["ratio"]]
    kinds = [kind for kind in ("causal", "rotary", "hole") if select(of_attention, "segment attention", metric, kind)]
    if not kinds:
        return None
    dtype = collections.Counter(row["workload"].split()[-1] for row in of_attention).most_common(1)[0][0]
    shape = {name: sizes(of_attention[0]["workload"])[name] for name in ("B", "H", "D")}
    title = f"Speed-up of hmt_kernels over others, {' '.join('='.join(pair) for pair in shape.items())} {dtype}"
    figure, axes = new_figure(len(kinds), f"{title}\n{where(of_attention)}")
    for panel, kind in zip(axes, kinds, strict=True):
        shown = [
            row
            for row in select(of_attention, "segment attention", metric, kind)
            if row["workload"].endswith(dtype) and shape.items() <= sizes(row["workload"]).items()
        ]
        lines(panel, shown, "T", lambda row: float(row["ratio"]))
        panel.set_yscale("log")
        panel.set_title(kind, fontsize=9)
    axes[0].set_ylabel(f"time over ours, {'forward and backward' if metric == 'both' else metric}")
    legend(figure, axes)
    return figure


def gpu_model(rows: list[Row]) -> Figure | None:
    """Bars of the time that every provider takes for a workload, over ours with CUDA graphs."""
    timed = [row for row in rows if row["benchmark"] == "model on a GPU" and row["unit"] == "ms" and row["ratio"]]
    workloads = list(dict.fromkeys(row["workload"] for row in timed))
    if not workloads:
        return None
    figure, (axes,) = new_figure(1, f"Time over that with CUDA graphs\n{where(timed)}")
    figure.set_size_inches(8, 0.8 + 0.75 * len(workloads))
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    for row in timed:
        place = workloads.index(row["workload"]) + 0.2 * (providers.index(row["provider"]) - len(providers) / 2)
        label = row["provider"] if row is next(r for r in timed if r["provider"] == row["provider"]) else None
        bar = axes.barh(place, float(row["ratio"]), 0.18, label=label, color=style(row["provider"])["color"])
        axes.bar_label(bar, [f" {float(row['value']):.0f} ms"], fontsize=7)
    axes.set_yticks(range(len(workloads)), workloads, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    legend(figure, [axes])
    return figure


def long_context(rows: list[Row]) -> Figure | None:
    panels = [
        ("speed", "tokens per second"),
        ("peak memory", "peak memory of the process (MiB)"),
        ("kept per token of context", "bytes kept per token of context"),
    ]
    found = [panel for panel in panels if select(rows, "long context", panel[0], "generate")]
    if not found:
        return None
    shown = select(rows, "long context", found[0][0], "generate")
    figure, axes = new_figure(len(found), f"Generating after a long context\n{where(shown)}")
    for panel, (metric, label) in zip(axes, found, strict=True):
        lines(panel, select(rows, "long context", metric, "generate"), "context")
        if metric == "peak memory":
            panel.set_ylim(bottom=0)
        else:
            panel.set_yscale("log")
        panel.set_ylabel(label)
    legend(figure, axes)
    return figure


def roofline(rows: list[Row]) -> Figure | None:
    """Of the best form of ours and of the others: operations per second over operations per byte."""
    counted = [row for row in rows if row.get("flops") and row["unit"] in results.TIMES and row["roofline"]]
    rates = select(rows, "roofline", "rate")
    bandwidths = select(rows, "roofline", "bandwidth")
    if not counted or not rates or not bandwidths:
        return None
    figure, (axes,) = new_figure(1, f"Reached of the ceilings\n{where(counted)}")
    bandwidth = max(float(row["value"]) for row in bandwidths)
    intensities = [float(row["flops"]) / float(row["bytes"]) for row in counted]
    ends = [min(intensities) / 2, max(intensities) * 2]
    for row in {row["workload"]: row for row in rates}.values():
        rate = float(row["value"])
        corner = rate / bandwidth
        xs = sorted([*ends, min(max(corner, ends[0]), ends[1])])
        axes.plot(xs, [min(rate, bandwidth * x) / 1e9 for x in xs], linewidth=1, label=row["workload"])
    for benchmark in dict.fromkeys(row["benchmark"] for row in counted):
        for ours in (True, False):
            points = [row for row in counted if row["benchmark"] == benchmark and _is_ours(row) == ours]
            if not points:
                continue
            x = [float(row["flops"]) / float(row["bytes"]) for row in points]
            y = [float(r["flops"]) * results.TIMES[r["unit"]] / float(r["value"]) / 1e9 for r in points]
            look = {"s": 18, "alpha": 1.0} if ours else {"s": 8, "alpha": 0.35}
            axes.scatter(x, y, label=f"{benchmark}, {'ours' if ours else 'others'}", **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations per byte that the task needs")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.3)
    legend(figure, [axes])
    return figure


def _is_ours(row: Row) -> bool:
    return row["provider"].startswith(OURS)


def training_memory(rows: list[Row]) -> Figure | None:
    depth = select(rows, "training depth", "extra peak memory", "train")
    lengths = sorted({sizes(row["workload"])["L"] for row in depth}, key=int)
    if not lengths:
        return None
    figure, axes = new_figure(len(lengths), f"Extra peak memory of a training step\n{where(depth)}")
    for panel, length in zip(axes, lengths, strict=True):
        lines(panel, [row for row in depth if sizes(row["workload"])["L"] == length], "segments")
        panel.set_ylim(bottom=0)
        panel.set_title(f"segments of {length} tokens", fontsize=9)
    axes[0].set_ylabel("MiB")
    legend(figure, axes)
    return figure


FIGURES: dict[str, Plot] = {
    "recall_time": recall_time,
    "attention_speedup": attention_speedup,
    "gpu_model": gpu_model,
    "long_context": long_context,
    "roofline": roofline,
    "training_memory": training_memory,
}


def draw(folder: Path, device: str) -> list[Path]:
    """Write <figure>_<device>.png for every figure that the CSV files of a folder have rows for."""
    rows = [row for path in sorted(folder.glob(f"*_{device}.csv")) for row in results.read(path)]
    if not rows:
        print(f"no figures for {device}: {folder} holds no CSV file of it", file=sys.stderr)
        return []
    written: list[Path] = []
    for name, plot in FIGURES.items():
        figure = plot(rows)
        if figure is None:
            print(f"{name}: not drawn, {folder} holds no rows for it", file=sys.stderr)
            continue
        path = folder / f"{name}_{device}.png"
        partial = path.with_suffix(".partial")
        figure.savefig(partial, format="png", dpi=100)
        partial.replace(path)
        written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="FOLDER", help="where the CSV files are"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of this device only")
    arguments = parser.parse_args()
    if not arguments.results.is_dir():
        parser.error(f"--results must be a folder, got {arguments.results}")
    devices = [arguments.device] if arguments.device else ["cpu", "cuda"]
    try:
        paths = [path for device in devices for path in draw(arguments.results, device)]
    except ValueError as error:
        parser.error(str(error))
    print(*paths, sep="\n")
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main())
