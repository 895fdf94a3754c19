"""The cross-layer connector as a table: which earlier outputs each layer reads.

Pure Python.  The constructor's widths, the forward pass and the drawings all read the
table that `stage_wiring` returns, so they cannot disagree.
Source: Lou, Fu and Yu, "SparX", arXiv:2409.09649, section 3.
"""

from typing import NamedTuple

STAGE_INPUT = -1


class LayerWiring(NamedTuple):
    """What one layer of a stage reads besides the output of the layer before it."""

    sources: tuple[int, ...] = ()
    """Layer indices in the order of concatenation; -1 is the input of the stage."""

    @property
    def is_ganglion(self) -> bool:
        """Whether the layer aggregates earlier outputs."""
        return bool(self.sources)


def ganglion_layers(depth: int, stride: int, start: int) -> tuple[int, ...]:
    """Indices of the ganglion layers: every `stride`-th, counted back from the last.

    None lies before `start`; stride 0 means that the stage has none.
    """
    if stride == 0:
        return ()
    return tuple(reversed(range(depth - 1, start - 1, -stride)))


def stage_wiring(
    depth: int,
    *,
    stride: int,
    start: int,
    window: int | None,
    reads_stage_input: bool = True,
) -> tuple[LayerWiring, ...]:
    """The wiring of a stage of `depth` layers.

    A ganglion layer reads the normal layers since the ganglion before it (the first
    one also the stage input), then at most `window` earlier ganglions (None: all of
    them), each group oldest first.  Its concatenation has width `len(sources)` times
    that of the stage.  One that finds nothing to read (the first layer of a stage that
    does not read its input) has no sources, but others read it as a ganglion.

    >>> [wiring.sources for wiring in stage_wiring(7, stride=2, start=0, window=3)]
    [(-1,), (), (1, 0), (), (3, 0, 2), (), (5, 0, 2, 4)]
    """
    ganglions = ganglion_layers(depth, stride, start)
    inner = [STAGE_INPUT] if reads_stage_input else []
    cross: list[int] = []
    layers = []
    for index in range(depth):
        if index not in ganglions:
            layers.append(LayerWiring())
            inner.append(index)
            continue
        recent = cross if window is None else cross[max(0, len(cross) - window) :]
        layers.append(LayerWiring((*inner, *recent)))
        cross.append(index)
        inner = []
    return tuple(layers)


def densenet_wiring(
    depth: int, *, reads_stage_input: bool = True
) -> tuple[LayerWiring, ...]:
    """Every layer reads all that come before it, oldest first.

    >>> [wiring.sources for wiring in densenet_wiring(3)]
    [(-1,), (-1, 0), (-1, 0, 1)]
    """
    first = STAGE_INPUT if reads_stage_input else 0
    return tuple(LayerWiring(tuple(range(first, index))) for index in range(depth))
