"""The connector's table against a replay of the authors' lists."""

import itertools

import pytest

from sparx_jax.models import list_models, model_config, stage_wiring
from sparx_jax.models.wiring import ganglion_layers

WINDOWS = (None, 0, 1, 2, 3, 4)
DEPTHS = range(1, 25)


def replay(depth, stride, start, window, reads_stage_input):
    """What each layer concatenates, by walking through the stage as the authors do.

    Maps are named by the layer that made them, the stage input is -1.
    """
    ganglions = list(range(depth - 1, start - 1, -stride)) if stride else []
    inner = [-1] if reads_stage_input else []
    cross, read = [], []
    for layer in range(depth):
        if layer in ganglions:
            read.append(tuple(inner + cross))
            cross.append(layer)
            inner = []
            while window is not None and len(cross) > window:
                cross.pop(0)
        else:
            read.append(())
            inner.append(layer)
    return read


def sources(*args, **kwargs):
    return [layer.sources for layer in stage_wiring(*args, **kwargs)]


@pytest.mark.parametrize("reads_stage_input", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stride", range(5))
def test_table_equals_the_replay(stride, window, reads_stage_input):
    for depth, start in itertools.product(DEPTHS, range(4)):
        got = sources(
            depth,
            stride=stride,
            start=start,
            window=window,
            reads_stage_input=reads_stage_input,
        )
        expected = replay(depth, stride, start, window, reads_stage_input)
        assert got == expected, (depth, start)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stride", range(1, 5))
def test_widths_follow_the_papers_arithmetic(stride, window):
    """C (1 + d0) for the first ganglion, then C ((S - 1) + min(M, n))."""
    limit = 10**6 if window is None else window
    for depth, start in itertools.product(DEPTHS, range(4)):
        ganglions = ganglion_layers(depth, stride, start)
        table = sources(depth, stride=stride, start=start, window=window)
        for n, layer in enumerate(ganglions):
            width = stride - 1 + min(limit, n) if n else 1 + layer
            assert len(table[layer]) == width
        assert not any(table[i] for i in range(depth) if i not in ganglions)


def tables(name, **overrides):
    """Sources of every layer, by stage."""
    config = model_config(name, **overrides)
    return [[layer.sources for layer in config.wiring(stage)] for stage in range(4)]


@pytest.mark.parametrize("depth", DEPTHS)
def test_dense_ganglion_replays_with_every_layer_a_ganglion_and_no_window(depth):
    """Start and window have no say; the stride only where it is 0."""
    connector = dict(mode="dense_ganglion", stride=(1, 2, 3, 4), start=(9, 1, 2, 0))
    got = tables("sparx_mamba_t", depths=(depth,) * 4, connector=connector)
    assert got == [replay(depth, 1, 0, None, stage > 0) for stage in range(4)]


@pytest.mark.parametrize("depth", DEPTHS)
def test_densenet_reads_everything_before(depth):
    connector = dict(mode="densenet", stride=(1, 2, 3, 4), start=(9, 1, 2, 0))
    first, *others = tables("sparx_mamba_t", depths=(depth,) * 4, connector=connector)
    assert first == [tuple(range(layer)) for layer in range(depth)]
    assert others == [[tuple(range(-1, layer)) for layer in range(depth)]] * 3


@pytest.mark.parametrize("depth, connections", [(7, 28), (17, 153), (21, 231)])
def test_densenet_has_a_connection_for_each_pair(depth, connections):
    """In stage 1, which does not read its input, L fewer."""
    first, _, third, _ = tables(
        "sparx_mamba_t",
        depths=(depth,) * 4,
        connector=dict(mode="densenet", stride=(1, 1, 1, 1)),
    )
    assert sum(map(len, third)) == connections == depth * (depth + 1) / 2
    assert sum(map(len, first)) == depth * (depth - 1) / 2


# Settings of stage 3 of SparX-Swin-T and its connections, as the paper's table.
SWEEP = [
    (dict(stride=3, window=1), 7),
    (dict(stride=2, window=1), 7),
    (dict(stride=2, window=2), 9),
    (dict(stride=2, window=3), 10),
    (dict(stride=1, window=1), 7),
    (dict(stride=1, window=3), 16),
    (dict(stride=1, window=None), 22),
]


@pytest.mark.parametrize("settings, connections", SWEEP)
def test_connections_of_stage_3_are_those_of_the_sweep(settings, connections):
    depth = model_config("sparx_swin_t").depths[2]
    assert sum(map(len, sources(depth, start=0, **settings))) == connections


@pytest.mark.parametrize("mode", ["sparx", "dense_ganglion", "densenet"])
def test_stride_0_takes_a_stage_out_of_every_mode(mode):
    connector = dict(mode=mode, stride=(1, 0, 1, 0), start=(0,) * 4)
    connected = [any(table) for table in tables("swin_t", connector=connector)]
    assert connected == [True, False, True, False]


def test_ganglions_count_back_from_the_last_layer():
    assert ganglion_layers(7, 2, 0) == (0, 2, 4, 6)
    assert ganglion_layers(17, 3, 0) == (1, 4, 7, 10, 13, 16)
    assert ganglion_layers(7, 2, 3) == (4, 6)
    assert ganglion_layers(2, 1, 2) == ganglion_layers(2, 0, 0) == ()


def test_layers_read_only_the_past_and_each_map_once():
    for stride, window, depth in itertools.product(range(5), WINDOWS, DEPTHS):
        for layer, read in enumerate(
            sources(depth, stride=stride, start=0, window=window)
        ):
            assert all(-1 <= source < layer for source in read)
            assert len(set(read)) == len(read)


# The tables of stages 2, 3 and 4, and the connections of stage 3 that the paper counts.
STAGE_2 = [(), (-1, 0)]
STAGE_4 = [(-1,), (0,)]
RELEASED = {
    "sparx_mamba_t": (
        STAGE_2,
        [(-1,), (), (1, 0), (), (3, 0, 2), (), (5, 0, 2, 4)],
        STAGE_4,
        10,
    ),
    "sparx_mamba_s": (
        STAGE_2,
        [
            *[(), (-1, 0), (), (), (2, 3, 1), (), (), (5, 6, 1, 4)],
            *[(), (), (8, 9, 1, 4, 7), (), (), (11, 12, 4, 7, 10)],
            *[(), (), (14, 15, 7, 10, 13)],
        ],
        STAGE_4,
        24,
    ),
    "sparx_mamba_b": (
        STAGE_2,
        [
            *[(), (), (-1, 0, 1), (), (), (3, 4, 2), (), (), (6, 7, 2, 5)],
            *[(), (), (9, 10, 2, 5, 8), (), (), (12, 13, 5, 8, 11)],
            *[(), (), (15, 16, 8, 11, 14), (), (), (18, 19, 11, 14, 17)],
        ],
        [(), (), (-1, 0, 1)],
        30,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_variants_are_wired_as_published(name):
    stage_2, stage_3, stage_4, connections = RELEASED[name]
    assert tables(name) == [[()] * 2, stage_2, stage_3, stage_4]
    assert sum(map(len, stage_3)) == connections


def test_stride_1_without_limit_reads_every_layer_before():
    table = sources(5, stride=1, start=0, window=None)
    assert table == [(-1,), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize("name", list_models())
def test_mode_none_has_no_ganglion(name):
    connector = dict(mode="none", stride=(1, 1, 1, 1))
    depths = model_config(name).depths
    assert tables(name, connector=connector) == [[()] * depth for depth in depths]


def test_the_first_stage_reads_no_stage_input():
    """Its first layer then has nothing to read; the others read it as a ganglion."""
    connector = dict(stride=(1, 1, 1, 1), start=(0, 0, 0, 0), window=(None,) * 4)
    got = tables("sparx_mamba_t", depths=(3, 3, 3, 3), connector=connector)
    assert got == [[(), (0,), (0, 1)]] + [[(-1,), (0,), (0, 1)]] * 3
