"""One table of all models: size, work, connections and memory.

    python -m sparx_jax.summary 'sparx_mamba_*' --image_size 384
    python -m sparx_jax.summary sparx_mamba_t connector.mode=none num_classes=10
    python -m sparx_jax.summary sparx_mamba_t connector.stride=0,1,1,1 --plot wiring.png

Nothing is computed or compiled: networks are traced with shapes in place of arrays.

GMACs are for one image, by the rule of the papers (VMamba's): the multiply-adds of
all convolutions and matrix products, those of attention included, and 9 b l d n + b l d
for a selective scan in each direction.  Norms and activations count nothing.

Activation memory is what the forward pass of training keeps for the backward pass: the
arrays that `jax.vjp` saves, each once, without parameters and images.  It is before
XLA, whose fusion and rematerialisation need less and whose temporary arrays more.
"""

import argparse
import ast
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from sparx_jax import plots
from sparx_jax.checks import require
from sparx_jax.errors import UserError
from sparx_jax.models import ModelConfig, build, list_models, model_config

RULE = """\
GMACs: 10^9 multiply-adds for one image in convolutions and matrix products, and
9 b l d n + b l d for each selective scan.  Activations: what the forward pass of
training keeps for the backward pass, before XLA.  Published: ImageNet-1k, 224 x 224."""


class Published(NamedTuple):
    """What a paper says of a model at 224 x 224 pixels; None: nothing."""

    params: float | None
    """Millions."""
    gmacs: float | None
    top1: float
    """Percent on ImageNet-1k."""


# SparX-Mamba and SparX-Swin: Lou, Fu and Yu, arXiv:2409.09649.  VMamba: Liu et al.,
# arXiv:2401.10166.  Swin: Liu et al., arXiv:2103.14030, parameters as VMamba rounds.
PUBLISHED = {
    "sparx_mamba_t": Published(27, 5.2, 83.5),
    "sparx_mamba_s": Published(47, 9.3, 84.2),
    "sparx_mamba_b": Published(84, 15.9, 84.5),
    "sparx_swin_t": Published(None, None, 82.6),
    "vmamba_t": Published(30, 4.9, 82.6),
    "vmamba_s": Published(50, 8.7, 83.6),
    "vmamba_b": Published(89, 15.4, 83.9),
    "swin_t": Published(28, 4.5, 81.3),
    "swin_s": Published(50, 8.7, 83.0),
    "swin_b": Published(88, 15.4, 83.5),
}
UNPUBLISHED = Published(None, None, None)


def connections(config: ModelConfig) -> list[int]:
    """How many outputs the ganglion layers of each stage read."""
    stages = range(len(config.depths))
    return [sum(len(layer.sources) for layer in config.wiring(s)) for s in stages]


def parameters(config: ModelConfig) -> int:
    """Number of trained values."""
    params = _network(config).arrays[0]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.cache
def macs(config: ModelConfig, size: tuple[int, int]) -> int:
    """Multiply-adds for one image of `size` (rows, columns), by the rule above.

    Raises UserError on a size that the network cannot read.
    """
    network = _network(config)

    def forward(arrays, images):
        return nnx.merge(network.eval, *arrays)(images)

    images = _images(config, 1, size)
    return count_macs(jax.make_jaxpr(forward)(network.arrays, images).jaxpr)


@functools.cache
def activation_bytes(config: ModelConfig, size: tuple[int, int], batch: int) -> int:
    """Bytes saved for the backward pass of `batch` images of `size`.

    The scan keeps what its hand-written gradient needs, which all its methods but
    `sequential` share.  Raises UserError on a size that the network cannot read.
    """
    network = _network(config)

    def saved(arrays, images):
        def forward(arrays):
            return nnx.merge(network.train, *arrays)(images, key=jax.random.key(0))

        return jax.tree.leaves(jax.vjp(forward, arrays)[1])

    images = _images(config, batch, size)
    jaxpr = jax.make_jaxpr(saved)(network.arrays, images).jaxpr
    arrays = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    arrays -= {*jaxpr.invars, *jaxpr.constvars}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in arrays)


class _Network(NamedTuple):
    arrays: tuple[nnx.State, nnx.State]
    """Shapes of the parameters and of everything else."""
    eval: nnx.GraphDef
    train: nnx.GraphDef


@functools.cache
def _network(config):
    # Of the scan's methods `loop` is one call that has all its sizes, and soon traced.
    config = config.replace(scan_method="loop")
    model = nnx.eval_shape(lambda: build(config, seed=0))
    graphdef, *arrays = nnx.split(model, nnx.Param, ...)
    model.train()
    return _Network(tuple(arrays), graphdef, nnx.graphdef(model))


def _images(config, batch, size):
    return jax.ShapeDtypeStruct((batch, *size, config.in_channels), jnp.float32)


def count_macs(jaxpr: core.Jaxpr, scopes: str = "") -> int:
    """Multiply-adds of `jaxpr` by the rule above; `scopes`: what it was called in.

    Raises NotImplementedError on products in a loop of unknown length.
    """
    total = 0
    for eqn in jaxpr.eqns:
        inside, kind = f"{scopes}/{eqn.source_info.name_stack}", eqn.primitive.name
        if "four_scans" in inside:  # its operands
            x, _, dt_proj, _, a, _ = (v.aval for v in eqn.invars)
            total += 4 * x.size * (9 * a.shape[-1] + 1 + dt_proj.shape[1])
        elif kind in PRODUCTS:
            total += PRODUCTS[kind](eqn)
        else:
            inner = [count_macs(j, inside) for j in inner_jaxprs(eqn.params)]
            if kind == "cond":
                inner = [max(inner)]
            if kind == "while" and any(inner):
                raise NotImplementedError("products in a loop of unknown length")
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def _matrix_macs(eqn):
    (contracted, _), _ = eqn.params["dimension_numbers"]
    width = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return eqn.outvars[0].aval.size * width


def _convolution_macs(eqn):
    kernel = eqn.invars[1].aval  # its input axis is that of one group
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return eqn.outvars[0].aval.size * kernel.size // kernel.shape[out_axis]


# Primitives that the rule counts, each with its multiply-adds.
PRODUCTS = {"dot_general": _matrix_macs, "conv_general_dilated": _convolution_macs}


def inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Those that an equation calls; of several platforms' the default, the last."""
    kinds = (core.ClosedJaxpr, core.Jaxpr)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, kinds))
    found = [getattr(x, "jaxpr", x) for x in leaves if isinstance(x, kinds)]
    return found[-1:] if params.get("branches_platforms") else found


def table(
    configs: dict[str, ModelConfig],
    *,
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    markdown: bool = False,
) -> str:
    """A line for each model, and below them what the figures mean.

    Raises UserError on a size that a network cannot read.
    """
    images = f"{batch} x {size[0]} x {size[1]}"
    head = ["model", "params M", "GMACs", "connections", f"activations, {images}"]
    head += ["published M", "published GMACs", "published top-1 %"]
    rows = [head] + [_row(name, c, size, batch) for name, c in configs.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        quoted = [[f"`{name}`", *cells] for name, *cells in rows[1:]]
        rows = [head, ["---"] + ["---:"] * (len(head) - 1), *quoted]
        lines = [f"| {' | '.join(row)} |" for row in rows]
    else:
        rows = [[row[0].ljust(widths[0]), *row[1:]] for row in rows]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", RULE])


def _row(name, config, size, batch):
    stages, published = connections(config), PUBLISHED.get(name, UNPUBLISHED)
    return [
        name,
        f"{parameters(config) / 1e6:.2f}",
        f"{macs(config, size) / 1e9:.2f}",
        f"{sum(stages)} = {' + '.join(map(str, stages))}",
        _bytes(activation_bytes(config, size, batch)),
        *("" if figure is None else str(figure) for figure in published),
    ]


def _bytes(count):
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def select(pattern: str, settings: Sequence[str] = ()) -> dict[str, ModelConfig]:
    """Models by name, each name followed by the `settings`; by family, then by size.

    A setting is `name=value` of a field of `ModelConfig`, dotted for those of its
    parts; values are Python's (`0,1,1,1` is a tuple), everything else is text.  Raises
    UserError if no model matches, or on a setting that is unknown or wrong.
    """
    names, overrides = list_models(pattern), _overrides(settings)
    if not names:
        raise UserError(
            f"no model matches {pattern!r}; the models are: {', '.join(list_models())}."
        )
    configs = {name: model_config(name, **overrides) for name in names}
    names.sort(key=lambda name: (name.rpartition("_")[0], parameters(configs[name])))
    return {" ".join([name, *settings]): configs[name] for name in names}


def _overrides(settings):
    overrides = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, name = path.split(".")
        node = overrides
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict) or name in node:
            raise UserError(
                f"{setting!r} is not understood: give each setting once, as name=value."
            )
        node[name] = _value(text)
    return overrides


def _value(text) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError):
        return text


def _size(text):
    sides = text.split("x")
    ok = len(sides) <= 2 and all(side.isdecimal() for side in sides)
    require("--image_size", text, ok, "one number of pixels, or two as in 256x192")
    return int(sides[0]), int(sides[-1])


def _write_wiring(path, configs):
    try:
        plots.write_wiring(path, configs)
    except OSError as error:
        raise UserError(
            f"--plot={path} cannot be written ({error.strerror or error}): give a file "
            "in a folder that is there and may be written."
        ) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; bad input ends with one sentence and exit code 78."""
    parser = _Parser(prog="python -m sparx_jax.summary", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    words = "a pattern of names (all, if left out), then settings of ModelConfig"
    parser.add_argument("words", nargs="*", metavar="PATTERN|setting=value", help=words)
    size = dict(type=_size, default=(224, 224), metavar="N|HxW")
    parser.add_argument("--image_size", help="pixels: 224, or 256x192", **size)
    parser.add_argument("--batch", type=int, default=1, help="images, for memory")
    parser.add_argument("--markdown", action="store_true", help="as in the README")
    parser.add_argument("--plot", metavar="FILE.png", help="draws the wiring")
    try:
        options = parser.parse_intermixed_args(arguments)
        require("--batch", options.batch, options.batch >= 1, "at least 1")
        ok = options.plot is None or Path(options.plot).suffix == ".png"
        require("--plot", options.plot, ok, "a file that ends in .png")
        pattern = [word for word in options.words[:1] if "=" not in word]
        settings = options.words[len(pattern) :]
        configs = select(*(pattern or ["*"]), settings)
        if options.plot:
            _write_wiring(options.plot, configs)
        layout = dict(batch=options.batch, markdown=options.markdown)
        print(table(configs, size=options.image_size, **layout))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(os.EX_CONFIG) from None


if __name__ == "__main__":
    main()
