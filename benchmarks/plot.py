"""The figures of the benchmarks: python -m benchmarks.plot FILE.json...

    python -m benchmarks.plot scaling.json ops.json model.json --folder=docs

Each file's content says what it is.  benchmarks.scaling makes scaling.png,
benchmarks.ops ops.png, and benchmarks.model with --kernels makes kernels.png.
"""

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sparx_jax.plots import BLUE, GREEN, GREY, INK, ORANGE, add_legend, panel

DPI, WIDTH = 150, 6.6  # inches: 990 pixels
LEFT, RIGHT = 0.2, 0.25  # margins
PINK = "#CC79A7"  # Okabe and Ito's as well
# A kernel belongs to the first group of which its name contains a word; cuDNN says 2d
# only of its grouped convolutions, the dense ones are implicit_gemm.
GROUPS = {
    "scan": ("scan",),
    "depthwise convolution": ("depthwise", "conv2d", "wgrad2d"),
    "matrix products": ("nvjet", "cutlass", "gemm"),
    "everything else": ("",),
}
STYLES = {"gradient": "-", "forward": "--"}
LABELS = {"gradient": "with gradient", "forward": "forward"}
ASIDE = "#BBBBBB"  # the line to compare with


def new_figure(height: float, title: str, note: str) -> Figure:
    """Under a title and, smaller, what was measured."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    for text, top, style in (
        (title, 0.28, dict(size=11, weight="bold", color=INK)),
        (note, 0.47, dict(size=7.5, color=GREY)),
    ):
        figure.text(LEFT / WIDTH, 1 - top / height, text, parse_math=False, **style)
    return figure


def conditions(found: dict) -> str:
    device = found["processor"] if found["device"] == "cpu" else found["device"]
    return f"{device}, JAX {found['jax']}, {found['date']}"


def scaling_figure(found: dict) -> Figure:
    """Time and memory by the pixels of the image, a colour for each mixer."""
    title = "Cost of a token mixer by the size of the image"
    method = f"1 image, {found['dtype']}, {found['method']}"
    figure = new_figure(4.1, title, f"{method}; {conditions(found)}")
    mixers = list(dict.fromkeys(row["mixer"] for row in found["rows"]))
    colours = dict(zip(mixers, (BLUE, ORANGE, GREEN, PINK, INK), strict=False))
    width = (WIDTH - 1.6) / 2
    panels = {
        "Milliseconds": (0.6, lambda cost: cost["ms"][0]),
        "Memory for temporaries, MB": (WIDTH - RIGHT - width, lambda cost: cost["MB"]),
    }
    for name, (left, value) in panels.items():
        axes = panel(figure, left, 1.25, width, 2.3, name)
        draw_scaling(axes, found["rows"], colours, value)
    keys = [Line2D([], [], color=c, lw=1.6, label=m) for m, c in colours.items()]
    keys += [
        Line2D([], [], color=INK, lw=1.6, ls=style, label=LABELS[kind])
        for kind, style in STYLES.items()
    ]
    keys.append(Line2D([], [], color=ASIDE, lw=0.9, label="linear in pixels"))
    style = dict(frameon=False, fontsize=7.5, labelcolor=INK, handlelength=2)
    where = (0.5, 1 - 0.74 / figure.get_figheight())
    figure.legend(
        handles=keys, ncols=6, loc="center", bbox_to_anchor=where,
        columnspacing=1.1, **style,
    )  # fmt: skip
    return figure


def draw_scaling(axes: Axes, rows: list, colours: dict, value) -> None:
    """One panel, `value` of the costs of every row."""
    axes.set(xscale="log", yscale="log")
    measured = [row for row in rows if "forward" in row]
    for mixer, colour in colours.items():
        own = [row for row in measured if row["mixer"] == mixer]
        if not own:
            continue
        pixels = [row["pixels"] for row in own]
        for kind, style in STYLES.items():
            costs = [value(row[kind]) for row in own]
            above = 3 if style == "--" else 2  # or a solid line would hide it
            axes.plot(
                pixels, costs, style, marker="o", ms=3, lw=1.6, color=colour,
                zorder=above,
            )  # fmt: skip
        if len(own) < sum(row["mixer"] == mixer for row in rows):
            at = dict(xytext=(6, 0), textcoords="offset points", va="center")
            end = pixels[-1], value(own[-1]["gradient"])
            axes.annotate("no room beyond", end, size=7.5, color=colour, **at)
    pixels = sorted({row["pixels"] for row in rows})
    # Below every curve, so that it hides none.
    each = [value(row[kind]) / row["pixels"] for row in measured for kind in STYLES]
    start = 0.6 * min(each)
    axes.plot(pixels, [start * n for n in pixels], color=ASIDE, lw=0.9, zorder=1)
    edges = [f"{round(n**0.5)}²" for n in pixels]
    axes.set_xticks(pixels, edges)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.set_xlabel("pixels of the image", size=8, color=GREY)


def ops_figure(found: dict) -> Figure:
    """How many times faster than its peer each operation is."""
    rows = found["rows"][::-1]  # bars are drawn from below
    height = 1.55 + 0.3 * len(rows)
    title = "Our operations against plain JAX: how many times faster"
    method = f"{found['batch']} images, {found['dtype']}, {found['method']}"
    figure = new_figure(height, title, f"{method}; {conditions(found)}")
    left = 0.4 + 0.065 * max(len(row["name"]) for row in rows)
    axes = panel(figure, left, 0.95, WIDTH - left - 0.45, height - 1.5, "")
    axes.grid(False, axis="y")
    for kind, offset, colour in (("forward", 0.2, ORANGE), ("gradient", -0.2, BLUE)):
        places = [y + offset for y in range(len(rows))]
        ratios = [row[kind]["ratio"] for row in rows]
        widths = [(ratio or 1) - 1 for ratio in ratios]  # from equal, to either side
        axes.barh(places, widths, 0.38, 1, color=colour, label=LABELS[kind])
        for y, ratio in zip(places, ratios, strict=True):
            text = f"{ratio:.1f}" if ratio else "no room for the peer"
            at = dict(xytext=(3, 0), textcoords="offset points", va="center")
            axes.annotate(text, (max(ratio or 1, 1), y), size=6.5, color=INK, **at)
    axes.axvline(1, color=INK, lw=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("time of the peer / time of ours (line: equal)", size=8, color=GREY)
    add_legend(axes, ncols=2)
    return figure


def kernels_figure(found: dict) -> Figure:
    """Where an accelerator's time goes in one step, a bar for each measurement."""
    rows = [row for row in found["rows"] if row.get("kernels")][::-1]
    height = 1.75 + 0.6 * len(rows)
    models = ", ".join(dict.fromkeys(row["model"] for row in rows[::-1]))
    title = f"Where the time of {models} goes"
    method = f"{found['batch']} images of {found['image']} pixels a side"
    note = f"{method}, {found['dtype']}; {conditions(found)}"
    figure = new_figure(height, title, note)
    left = 1.2
    axes = panel(figure, left, 1.0, WIDTH - left - 0.8, height - 1.55, "")
    axes.grid(False, axis="y")
    costs = [by_group(row["kernels"]) for row in rows]
    longest = max(sum(cost.values()) for cost in costs)
    starts = [0.0] * len(rows)
    for group, colour in zip(GROUPS, (BLUE, ORANGE, GREEN, ASIDE), strict=True):
        widths = [cost[group] for cost in costs]
        axes.barh(range(len(rows)), widths, 0.6, starts, color=colour, label=group)
        ink = INK if colour == ASIDE else "white"
        for y, width in enumerate(widths):
            if width > 0.04 * longest:  # or else the number does not fit
                style = dict(size=7.5, ha="center", va="center", color=ink)
                axes.text(starts[y] + width / 2, y, f"{width:.1f}", **style)
            starts[y] += width
    for y, total in enumerate(starts):
        at = dict(xytext=(4, 0), textcoords="offset points", va="center")
        axes.annotate(f"{total:.1f} ms", (total, y), size=8, color=INK, **at)
    axes.set_yticks(range(len(rows)), [bar_name(row, rows) for row in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("milliseconds of kernels in one step", size=8, color=GREY)
    add_legend(axes, ncols=len(GROUPS))
    return figure


def by_group(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each of GROUPS."""
    total = dict.fromkeys(GROUPS, 0.0)
    for name, ms in kernels.items():
        total[
            next(g for g, words in GROUPS.items() if any(w in name for w in words))
        ] += ms
    return total


def bar_name(row: dict, rows: list) -> str:
    """The kind of step, and what else tells the rows apart."""
    parts = [row[key] for key in ("model", "method") if len({r[key] for r in rows}) > 1]
    return "\n".join([row["kind"], *parts])


def recognise(found) -> str | None:
    """The figure that a benchmark's results are for."""
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    if "mixer" in rows[0]:
        return "scaling"
    if "ratio" in rows[0].get("forward", ()):
        return "ops"
    return "kernels" if any(row.get("kernels") for row in rows) else None


FIGURES = {"scaling": scaling_figure, "ops": ops_figure, "kernels": kernels_figure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    args = parser.parse_args()
    for file in args.files:
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{file} cannot be read as JSON: {error}") from None
        name = recognise(found)
        if name is None:
            raise SystemExit(
                f"{file} holds no results of benchmarks.scaling, of benchmarks.ops or "
                "of benchmarks.model with --kernels"
            )
        args.folder.mkdir(parents=True, exist_ok=True)
        path = args.folder / f"{name}.png"
        FIGURES[name](found).savefig(path, metadata={"Software": None})
        print(f"{file} -> {path}")


if __name__ == "__main__":
    main()
