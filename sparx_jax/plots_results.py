"""The figure of an evaluation at several resolutions."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from sparx_jax.plots import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    WIDTH,
    add_legend,
    new_figure,
    panel,
)

# The last two are Okabe and Ito's as well.
COLOURS = (BLUE, ORANGE, GREEN, INK, "#CC79A7", "#E69F00")


def resolutions_figure(curves: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """A line for each data set; 12 inches wide.

    Args:
      curves: data set -> resolution in pixels -> top-1 in percent.
      title: above the figure.
    """
    note = "top-1, %, by the edge of the square images, pixels"
    figure = new_figure(4.6, title, note)
    axes = panel(figure, 0.75, 0.95, WIDTH - 1.1, 3.2, "")
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        sizes = sorted(curve)
        top1 = [curve[size] for size in sizes]
        axes.plot(sizes, top1, "o-", ms=4, lw=1.5, color=colour, mew=0, label=name)
    add_legend(axes, ncols=len(curves))
    axes.set_xticks(sorted({size for curve in curves.values() for size in curve}))
    axes.yaxis.set_major_formatter("{x:,.6g}")
    return figure
