"""The table of models says what the papers say and counts what it claims to count."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import sparx_jax
from sparx_jax import ops, summary
from sparx_jax.errors import UserError
from sparx_jax.models import list_models, model_config
from sparx_jax.summary import select

README = Path(__file__).parents[1] / "README.md"
MANIFESTS = Path(__file__).parent / "parity/manifests"
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=3)
TINY_WORDS = "depths=1,1,1,1 dims=8,12,16,20 num_classes=3".split()
SMALL = (64, 64)


def gmacs(config, *sizes):
    sizes = sizes or (224,)
    return [round(summary.macs(config, (size, size)) / 1e9, 2) for size in sizes]


def stage_3(stride, window, name="sparx_mamba_t"):
    connector = dict(stride=(0, 1, stride, 1), window=(None, None, window, None))
    return model_config(name, connector=connector)


def macs_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return summary.count_macs(jax.make_jaxpr(function)(*arrays).jaxpr)


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("sparx_mamba_t", 5.25),
        pytest.param("sparx_mamba_s", 9.26, marks=pytest.mark.slow),
        pytest.param("sparx_mamba_b", 15.90, marks=pytest.mark.slow),
    ],
)
def test_sizes_are_those_of_the_authors_modules(name, work):
    """Also to four decimals, but for their residual scales: depthwise 1 x 1 filters."""
    config = model_config(name)
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    counted = manifest["flops_224_batch1"]
    theirs = counted["matmul_conv_gmacs"] + counted["scan_gflops_9BLDN_plus_BLD"]
    scales = sum(
        2 * config.depths[stage] * config.dims[stage] * (224 // (4 << stage)) ** 2
        for stage in config.scaled_residual_stages
    )
    assert summary.parameters(config) == manifest["params"]
    assert gmacs(config) == [work]
    ours = (summary.macs(config, (224, 224)) + scales) / 1e9
    assert ours == pytest.approx(theirs, abs=1.01e-4)  # a sum of two rounded numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "window", "millions", "work"),
    [
        (1, 1, 27.40, 5.25),
        (1, 2, 28.45, 5.45),
        (1, 3, 29.28, 5.61),
        (1, None, 30.54, 5.86),
        (2, 1, 26.42, 5.13),
        (2, 2, 26.84, 5.21),
        (3, 1, 26.10, 5.09),
        (3, 2, 26.31, 5.13),
    ],
)
def test_sizes_of_other_connections_in_stage_3(stride, window, millions, work):
    config = stage_3(stride, window)
    assert round(summary.parameters(config) / 1e6, 2) == millions
    assert gmacs(config) == [work]


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("swin_t", "swin_tiny_patch4_window7_224"),
        pytest.param("vmamba_t", "vmambav2v_tiny_224", marks=pytest.mark.slow),
    ],
)
def test_work_of_the_baselines_is_that_of_their_modules(name, manifest):
    counted = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    counted = counted["flops_224_batch1"]
    theirs = counted["matmul_conv_gmacs"] + counted["scan_gflops_9BLDN_plus_BLD"]
    ours = summary.macs(model_config(name), (224, 224)) / 1e9
    assert ours == pytest.approx(theirs, abs=1.01e-4)


@pytest.mark.parametrize(
    ("name", "millions", "work"),
    [
        ("sparx_swin_t", 25.4, 4.90),
        pytest.param("sparx_swin_s", 44.2, 8.66, marks=pytest.mark.slow),
        pytest.param("sparx_swin_b", 83.7, 16.0, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_sparx_swin_are_those_of_its_design(name, millions, work):
    config = model_config(name)
    assert summary.parameters(config) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert gmacs(config) == pytest.approx([work], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "window", "work"),
    [
        (3, 1, 4.74),
        (2, 1, 4.78),
        (2, 2, 4.86),
        (2, 3, 4.90),
        (1, 1, 4.90),
        (1, 3, 5.26),
        (1, None, 5.51),
    ],
)
def test_work_of_other_connections_in_stage_3_of_sparx_swin(stride, window, work):
    assert gmacs(stage_3(stride, window, "sparx_swin_t")) == [work]


def test_size_without_the_connector():
    config = model_config("sparx_mamba_t", connector={"mode": "none"})
    assert round(summary.parameters(config) / 1e6, 2) == 20.70
    assert gmacs(config) == [4.39]
    assert summary.connections(config) == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("sparx_mamba_t", [15.44, 27.44, 109.77]),
        # The figure to compare with is 194, which is 4 times 48.4, the rounded one.
        ("sparx_mamba_s", [27.21, 48.37, 193.46]),
        ("sparx_mamba_b", [46.72, 83.05, 332.20]),
    ],
)
def test_work_at_384_512_and_1024_pixels(name, work):
    assert gmacs(model_config(name), 384, 512, 1024) == work


@pytest.mark.parametrize(
    ("stride", "window", "count"),
    [(1, 1, 7), (1, 3, 16), (1, None, 22), (2, 1, 7), (2, 2, 9), (2, 3, 10), (3, 1, 7)],
)
def test_connections_are_those_of_the_wiring(stride, window, count):
    assert summary.connections(stage_3(stride, window)) == [0, 2, count, 2]


def test_products_and_convolutions_count_their_multiply_adds():
    assert macs_of(lambda x, y: x @ y, (5, 2, 3), (5, 3, 7)) == 5 * 2 * 3 * 7
    convolve = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x,
        w,
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    grouped = macs_of(convolve, (1, 8, 6, 4), (3, 3, 2, 10))
    assert grouped == (4 * 3 * 10) * (3 * 3 * 2)
    depthwise = macs_of(ops.depthwise_conv, (2, 8, 6, 4), (5, 5, 4))
    assert depthwise == (2 * 8 * 6 * 4) * 25


def test_work_inside_calls_loops_and_branches_is_found():
    def product(x):
        return x @ x

    def repeated(x):
        return lax.scan(lambda c, _: (jax.jit(product)(c), None), x, length=6)

    def chosen(x):
        return lax.cond(x[0, 0] > 0, product, lambda x: product(product(x)), x)

    def searched(x):
        return lax.while_loop(lambda x: x[0, 0] > 0, product, x)

    assert macs_of(jax.checkpoint(jax.jit(product)), (3, 3)) == 27
    assert macs_of(repeated, (3, 3)) == 6 * 27
    assert macs_of(chosen, (3, 3)) == 2 * 27
    with pytest.raises(NotImplementedError, match="unknown length"):
        macs_of(searched, (3, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_scan_counts_by_its_formula_wherever_it_is_called(wrap):
    b, side, d, n, r = 3, 5, 4, 6, 2
    scan = wrap(lambda *x: ops.ss2d(*x, method="loop"))
    shapes = (b, side, side, d), (4, d, r + 2 * n), (4, r, d), (4, d), (4, d, n), (4, d)
    scans, projections = 9 * n + 1, r + 2 * n + r
    assert macs_of(scan, *shapes) == 4 * b * side**2 * d * (scans + projections)


@pytest.mark.slow
def test_memory_is_the_saved_arrays():
    """Those of a picture, and a few that are made of parameters only."""
    config = model_config("sparx_mamba_t", **TINY, drop_path_rate=0.1)
    one, two, three = (summary.activation_bytes(config, SMALL, b) for b in (1, 2, 3))
    assert three - two == two - one
    assert 0.9 * one < two - one < one


@pytest.mark.slow
def test_memory_is_less_without_the_connector_and_in_bfloat16():
    options = [{}, {"connector": {"mode": "none"}}, {"dtype": "bfloat16"}]
    full, *less = (
        summary.activation_bytes(model_config("sparx_mamba_t", **TINY, **o), SMALL, 1)
        for o in options
    )
    assert max(less) < full


@pytest.mark.slow
def test_models_come_by_family_then_by_size():
    names = list(select("sparx_mamba_*"))
    assert names == [f"sparx_mamba_{size}" for size in ("nano", "t", "s", "b")]
    assert sorted(select("*")) == list_models()


def test_settings_are_python_values_or_text():
    words = (
        "connector.mode=none connector.window=1,2,None,0 mlp_ratio=2.5 dtype=bfloat16"
    )
    (title, config), *rest = select("sparx_mamba_t", words.split()).items()
    connector = dict(mode="none", window=(1, 2, None, 0))
    changes = dict(connector=connector, mlp_ratio=2.5, dtype="bfloat16")
    assert config == model_config("sparx_mamba_t", **changes)
    assert title == f"sparx_mamba_t {words}" and not rest


@pytest.mark.slow
def test_published_figures_stand_beside_unchanged_models_only():
    name = "sparx_mamba_nano"
    configs = {"sparx_mamba_t": model_config(name, **TINY), name: model_config(name)}
    lines = summary.table(configs, size=SMALL).split("\n")
    assert lines[1].split()[-3:] == ["27", "5.2", "83.5"]
    assert lines[2].split()[-1] == "MiB"


def test_the_command_prints_the_table_and_draws_the_wiring(tmp_path, capsys):
    path = tmp_path / "wiring.png"
    words = ["sparx_mamba_nano", "--plot", str(path), *TINY_WORDS]
    summary.main([*words, "--image_size=64x96", "--batch=2"])
    head, row, *_ = capsys.readouterr().out.split("\n")
    assert "2 x 64 x 96" in head
    assert row.startswith(" ".join(["sparx_mamba_nano", *TINY_WORDS]))
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("resnet", "no model matches 'resnet'"),
        ("connector.strid=1", "unknown model setting 'connector.strid'"),
        ("depths=1,2", "model.depths=(1, 2) must be"),
        ("num_classes=-1", "model.num_classes=-1 must be"),
        ("sparx_mamba_t nano", "'nano' is not understood"),
        ("dtype=bfloat16 dtype=float32", "'dtype=float32' is not understood"),
        ("connector=1 connector.mode=none", "'connector.mode=none' is not understood"),
        ("--image_size 64x", "--image_size='64x' must be"),
        ("sparx_mamba_nano --image_size 16", "16 x 16 pixels, too small"),
        ("--batch 0", "--batch=0 must be"),
        ("--batch many", "--batch"),
        ("--plt a.png", "--plt"),
        ("sparx_mamba_nano --plot /nowhere/a.png", "--plot=/nowhere/a.png cannot"),
        ("sparx_mamba_nano --plot .", "--plot='.' must be a file that ends in .png"),
    ],
)
def test_bad_input_is_told_in_one_sentence(capsys, words, expected):
    with pytest.raises(SystemExit) as status:
        summary.main(words.split())
    output = capsys.readouterr()
    assert status.value.code == 78 and not output.out
    assert expected in output.err and output.err.count("\n") == 1


def test_settings_that_are_no_settings_are_told_by_select():
    with pytest.raises(UserError, match="not understood"):
        select("*", ["mode"])


@pytest.mark.slow
def test_the_readme_has_the_current_table():
    """If this fails, renew it with the command that stands above it in the README."""
    _, _, rest = README.read_text().partition("<!-- summary -->\n")
    written = rest.partition("<!-- /summary -->")[0].strip()
    assert written == summary.table(select("*"), markdown=True)


def test_the_package_offers_what_the_readme_calls():
    called = set(re.findall(r"sparx_jax\.(\w+)\(", README.read_text()))
    assert called and called <= set(sparx_jax.__all__)
    assert all(callable(getattr(sparx_jax, name)) for name in sparx_jax.__all__)
