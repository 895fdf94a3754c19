"""The hierarchical backbone: stem, four wired stages, classifier."""

import math
from contextlib import nullcontext
from functools import partial, wraps
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.layers import init
from sparx_jax.layers.aggregator import make_fusion
from sparx_jax.layers.conv import pointwise
from sparx_jax.layers.norm import STAGE_NORM_EPS, LayerNorm, make_norm
from sparx_jax.layers.patch import Downsample, PatchMerging, PatchStem, Stem
from sparx_jax.layers.ss2d import SS2D
from sparx_jax.layers.window_attention import WindowAttention
from sparx_jax.models.block import Block
from sparx_jax.models.config import NUM_STAGES, ModelConfig
from sparx_jax.models.wiring import STAGE_INPUT
from sparx_jax.typing import Array, Float, Key

FEATURE_STRIDES = (4, 8, 16, 32)
"""Pixels of the image per pixel of each stage's map; where it does not divide the
image, the map is one larger."""

TOTAL_STRIDE = FEATURE_STRIDES[-1]
"""Pixels of the image per pixel of the last map; also the least height and width: the
last map of a smaller image would show mostly padding."""

CONV_NORMS = {"conv_batch_norm": "batch", "conv_layer_norm": "layer"}


class Stage(nnx.Module):
    """Layers at one resolution, connected by the stage's wiring."""

    def __init__(self, config: ModelConfig, stage: int, key: Key[Array, ""]):
        self.wiring = config.wiring(stage)
        self.remat_blocks = config.remat == "block"
        self.deterministic = True  # as `Backbone.deterministic`
        # Every layer and every part of it has its own key: changing the connector
        # leaves the initial weights of all else as they were, so ablations are fair.
        self.blocks = nnx.List(
            _block(config, stage, index, jax.random.fold_in(key, index))
            for index in range(config.depths[stage])
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        draws: Float[Array, "layers 2 b"] | None,
    ) -> list[Float[Array, "b h w c"]]:
        outputs = {STAGE_INPUT: x}
        call = _recompute(lambda block, *given: block(*given), self.remat_blocks, self)
        for index, block in enumerate(self.blocks):
            context = tuple(outputs[source] for source in self.wiring[index].sources)
            mine = (None, None) if draws is None else draws[index]
            outputs[index] = x = call(block, x, context, mine)
        return [outputs[index] for index in range(len(self.blocks))]


def _trains(module, modes=("deterministic", "use_running_average")):
    """Whether any part of it is in training mode."""
    parts = (part for _, part in nnx.iter_modules(module))
    return not all(getattr(part, mode, True) for part in parts for mode in modes)


def _recompute(call, on, module):
    if not on:
        return call
    # jax.checkpoint would lose new BatchNorm statistics.
    if _trains(module, ["use_running_average"]):
        return nnx.remat(call)
    # nnx.remat writes to every variable, which inside of a transformation that has the
    # network from outside is an error.
    return lambda module, *given: jax.checkpoint(partial(call, module))(*given)


def _block(config, stage, index, key):
    dim, dtype = config.dims[stage], jnp.dtype(config.dtype)
    first = sum(config.depths[:stage]) + index
    steps = sum(config.depths) - 1
    rngs = (nnx.Rngs(k) for k in jax.random.split(key, 3))

    def make():
        return dict(dtype=dtype, rngs=next(rngs))

    mixer, in_dim = _MIXERS[config.mixer](config, dim, index, make())
    sources = config.wiring(stage)[index].sources
    if sources:
        project = make_fusion(
            config.connector.fusion,
            dim,
            dim * len(sources),
            in_dim,
            reduction=config.reductions[stage],
            groups=config.attention_groups,
            **make(),
        )
    else:
        project = pointwise(dim, in_dim, bias=config.mixer_bias, **make())
    return Block(
        dim,
        project=project,
        mixer=mixer,
        mlp_dim=int(dim * config.mlp_ratio),
        drop_path=config.drop_path_rate * first / steps,
        scaled_residual=stage in config.scaled_residual_stages,
        norm=config.norm,
        position_conv=config.position_conv,
        mlp_conv=config.mlp_conv,
        **make(),
    )


def _window_attention(config, dim, index, make):
    mixer = WindowAttention(
        dim,
        head_dim=config.head_dim,
        window=config.window_size,
        shifted=index % 2 == ("even", "odd").index(config.shifted_layers),
        bias=config.mixer_bias,
        **make,
    )
    return mixer, WindowAttention.input_dim(dim)


def _ss2d(config, dim, index, make):
    own = config.downsample == "conv_batch_norm"
    mixer = SS2D(
        dim,
        inner_ratio=config.inner_ratio,
        state_dim=config.state_dim,
        scan_method=config.scan_method,
        conv_size=config.conv_size,
        conv_init=init.weights if own else init.torch_conv,
        norm=config.norm,
        bias=config.mixer_bias,
        **make,
    )
    return mixer, SS2D.input_dim(dim, config.inner_ratio)


# By name, what makes the mixer of a layer, and tells the channels that it takes.
_MIXERS = {"ss2d": _ss2d, "window_attention": _window_attention}


def _stem(config, make):
    if config.downsample == "patch":
        return PatchStem(config.in_channels, config.dims[0], **make)
    return Stem(
        config.in_channels,
        config.dims[0],
        num_convs=config.stem_convs,
        norm=CONV_NORMS[config.downsample],
        **make,
    )


def _downsample(config, dim, out_dim, make):
    if config.downsample == "patch":
        return PatchMerging(dim, out_dim, **make)
    return Downsample(dim, out_dim, norm=CONV_NORMS[config.downsample], **make)


def _forward(method):
    """Checks the images, and compiles where nobody else does.

    Called on arrays, outside any transformation, a forward pass would compile every
    operation by itself, which takes longer, and fuse nothing.  Inside jit, grad and the
    like, and in training mode, it just runs.
    """
    name = method.__name__

    @wraps(method)
    def call(self, images, *, key=None):
        images = jnp.asarray(images)
        _check(images, self.config.in_channels)
        captured = hasattr(self, "__captures__")  # by nnx.capture
        traced = captured or any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in (images, *jax.tree.leaves(nnx.state(self)))
        )
        if traced or _trains(self) or jax.config.jax_disable_jit:
            return method(self, images, key=key)
        result, written = _run(*nnx.split(self), name, images)
        if written:
            nnx.update(self, written)
        return result

    return call


def _check(images, channels):
    shape, dtype = images.shape, images.dtype
    if len(shape) != 4 or shape[-1] != channels:
        raise UserError(
            f"The images have shape {shape}; the network needs (batch, height, width, "
            f"{channels})."
        )
    if min(shape[1:3]) < TOTAL_STRIDE:
        raise UserError(
            f"The images are {shape[1]} x {shape[2]} pixels, too small for the "
            f"network, which needs at least {TOTAL_STRIDE} x {TOTAL_STRIDE}."
        )
    if shape[0] == 0:
        raise UserError("The batch of images is empty; the network needs one at least.")
    meshes = jax.typeof(images).sharding.mesh, jax.sharding.get_abstract_mesh()
    if any(mesh.explicit_axes for mesh in meshes):
        raise UserError(
            "The mesh has axes of explicit sharding; the network needs automatic ones: "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * axes)."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"The images are of type {dtype}; the network needs floating-point values, "
            "normalised as in its training."
        )


@partial(jax.jit, static_argnums=(0, 2))
def _run(graphdef, state, method, images):
    model = nnx.merge(graphdef, state)
    result = getattr(model, method)(images)
    # Ours write nothing in evaluation, but a part that somebody added may.
    return result, nnx.state(model, nnx.Not((nnx.Param, nnx.BatchStat)))


class Backbone(nnx.Module):
    """A hierarchical network whose ganglion layers, if any, read many earlier layers.

    `feature_strides` and `feature_dims` describe the maps of `forward_features`.

    Built in evaluation mode.  `model.train()` switches BatchNorm to batch statistics
    and drop path on; the call then needs a `key` if `drop_path_rate` is positive.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        key, dtype = rngs.params(), jnp.dtype(config.dtype)
        part = lambda index: nnx.Rngs(jax.random.fold_in(key, index))  # noqa: E731
        dims = config.dims
        self.config = config
        self.feature_strides = FEATURE_STRIDES
        self.feature_dims = dims
        self.deterministic = True  # the name that nnx's train() and eval() set
        self.stem = _stem(config, dict(dtype=dtype, rngs=part(0)))
        self.stages = nnx.List(
            Stage(config, i, jax.random.fold_in(key, 100 + i))
            for i in range(NUM_STAGES)
        )
        self.downsamples = nnx.List(
            _downsample(config, a, b, dict(dtype=dtype, rngs=part(200 + i)))
            for i, (a, b) in enumerate(pairwise(dims))
        )
        norms = [LayerNorm(d, eps=STAGE_NORM_EPS) for d in dims]
        self.stage_norms = nnx.List(norms) if config.stage_norms else None
        self.head_norm = (
            None if config.stage_norms else make_norm(config.norm, dims[-1])
        )
        head = dict(kernel_init=init.weights, bias_init=init.biases, rngs=part(300))
        classes = config.num_classes
        self.head = nnx.Linear(dims[-1], classes, **head) if classes else None

    @_forward
    def __call__(
        self, images: Float[Array, "b h w rgb"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b classes"]:
        """Logits in float32, or pooled features if `num_classes` is 0."""
        last = self.forward_layers(images, key=key)[-1][-1]
        with self._precision():
            last = (self.stage_norms[-1] if self.stage_norms else self.head_norm)(last)
            pooled = last.astype(jnp.float32).mean((1, 2))
            return pooled if self.head is None else self.head(pooled)

    @_forward
    def forward_features(
        self, images: Float[Array, "b h w rgb"], *, key: Key[Array, ""] | None = None
    ) -> list[Float[Array, "b h2 w2 c"]]:
        """The four stage outputs before the downsample, at strides 4, 8, 16 and 32.

        Normalised per pixel if `stage_norms` is set.
        """
        maps = [outputs[-1] for outputs in self.forward_layers(images, key=key)]
        if self.stage_norms is None:
            return maps
        return [norm(x) for norm, x in zip(self.stage_norms, maps, strict=True)]

    @_forward
    def forward_layers(
        self, images: Float[Array, "b h w rgb"], *, key: Key[Array, ""] | None = None
    ) -> list[list[Float[Array, "b h2 w2 c"]]]:
        """The output of every layer, by stage."""
        with self._precision():
            x = self.stem(images.astype(self.config.dtype))
            layers, draws = [], None
            if key is not None:
                shape = len(self.stages), max(self.config.depths), 2, len(images)
                # At once: dozens of draws take long to compile.  XLA:CPU unrolls short
                # axes, hence two instead of four; of one, a batch split over devices
                # would not stay split.
                shape_2d = math.prod(shape[:3]), len(images)
                draws = jax.random.uniform(jax.random.fold_in(key, 0), shape_2d)
                draws = draws.reshape(shape)
            stages = self.config.remat == "stage"
            call = _recompute(Stage.__call__, stages, self)
            for i, stage in enumerate(self.stages):
                if i:
                    x = self.downsamples[i - 1](x)
                layers.append(call(stage, x, None if draws is None else draws[i]))
                x = layers[-1][-1]
            return layers

    def _precision(self):
        # Accelerators would multiply float32 matrices in TF32 or bfloat16.
        if self.config.dtype == "float32":
            return jax.default_matmul_precision("float32")
        return nullcontext()
