"""Which array of a PyTorch network is which of ours: one table, two ways.

The tables know the authors' networks, VMamba's and timm's Swin; what only we have
(SparX-Swin, a connector in a baseline) gets the names that follow from the same rows.
Of Swin, Microsoft's names are read too.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from einops import EinopsError, rearrange

from sparx_jax.errors import UserError
from sparx_jax.interop.windows import resize_position_bias

# Entries without a counterpart: torch counts batches for a kind of running average that
# these networks do not use, and some files keep what follows from the window size.
IGNORED = re.compile(r"\.(num_batches_tracked|relative_position_index|attn_mask)$")

# (part of our path, part of the torch name); all rows that match apply, in order: those
# of the skeleton, then the common ones.
_SKELETONS = {
    "sparx": (
        (r"^stem\.convs\.0", "patch_embed.0"),
        (r"^stem\.norms\.0", "patch_embed.1"),
        (r"^stem\.convs\.1", "patch_embed.3"),
        (r"^stem\.norms\.1", "patch_embed.4"),
        (r"^stem\.convs\.2", "patch_embed.6"),
        (r"^stem\.norms\.2", "patch_embed.7"),
        (r"^downsamples\.(\d)\.conv", r"layers.\1.downsample.0"),
        (r"^downsamples\.(\d)\.norm", r"layers.\1.downsample.1"),
        (r"^head_norm", "classifier.0"),
        (r"^head\.", "classifier.3."),
    ),
    "vmamba": (
        (r"^stem\.convs\.0", "patch_embed.0"),
        (r"^stem\.norms\.0", "patch_embed.2"),
        (r"^stem\.convs\.1", "patch_embed.5"),
        (r"^stem\.norms\.1", "patch_embed.7"),
        (r"^downsamples\.(\d)\.conv", r"layers.\1.downsample.1"),
        (r"^downsamples\.(\d)\.norm", r"layers.\1.downsample.3"),
        (r"^head_norm", "classifier.norm"),
        (r"^head\.", "classifier.head."),
    ),
    "timm": (
        (r"^stem", "patch_embed"),
        (r"^downsamples\.0\.", "layers.1.downsample."),
        (r"^downsamples\.1\.", "layers.2.downsample."),
        (r"^downsamples\.2\.", "layers.3.downsample."),
        (r"\.downsample\.proj", ".downsample.reduction"),
        (r"^head_norm", "norm"),
        (r"^head\.", "head.fc."),
        (r"\.mixer_norm\.", ".norm1."),
        (r"\.mixer\.out_proj", ".attn.proj"),
        (r"\.mixer\.", ".attn."),
        (r"\.project\.(kernel|bias)$", r".attn.qkv.\1"),
    ),
}
_RENAMES = (
    (r"^stage_norms", "norm"),
    (r"^stages", "layers"),
    (r"\.position\.", ".pos_embed."),
    (r"\.mixer_norm\.", ".norm."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.mixer_residual\.", ".layerscale_1."),
    (r"\.mlp_residual\.", ".layerscale_2."),
    (r"\.mlp\.expand", ".mlp.fc1"),
    (r"\.mlp\.conv", ".mlp.dwconv"),
    (r"\.mlp\.reduce", ".mlp.fc2"),
    (r"\.mixer\.conv", ".op.conv2d"),
    (r"\.mixer\.norm", ".op.out_norm"),
    (r"\.mixer\.out_proj", ".op.out_proj"),
    (r"\.mixer\.(x_proj|dt_proj)$", r".op.\1_weight"),
    (r"dt_proj_weight$", "dt_projs_weight"),
    (r"\.mixer\.dt_bias$", ".op.dt_projs_bias"),
    (r"\.mixer\.a_log$", ".op.A_logs"),
    (r"\.mixer\.skip$", ".op.Ds"),
    (r"\.mixer\.", ".op."),
    (r"\.position_bias$", ".relative_position_bias_table"),
    (r"\.project\.context_norm", ".op.d_norm"),
    (r"\.project\.context_conv\.", ".op.d_proj.0."),
    (r"\.project\.context_conv_norm", ".op.d_proj.1"),
    (r"\.project\.context_proj", ".op.d_proj.3"),
    (r"\.project\.value\.proj\.", ".op.v.0."),
    (r"\.project\.value\.proj_norm", ".op.v.1"),
    (r"\.project\.(q|k)(?:uery|ey)\.conv\.", r".op.\1.0.0."),
    (r"\.project\.(q|k)(?:uery|ey)\.conv_norm", r".op.\1.0.1"),
    (r"\.project\.(q|k)(?:uery|ey)\.proj\.", r".op.\1.1."),
    (r"\.project\.(q|k)(?:uery|ey)\.proj_norm", r".op.\1.2"),
    (r"\.project\.fuse_conv", ".op.in_proj.0"),
    (r"\.project\.fuse_proj", ".op.in_proj.2"),
    (r"\.project\.", ".op.in_proj."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.(mean|var)$", r".running_\1"),
)

# (our path, axes in torch, axes here); the first row that matches counts, those of the
# skeleton before the common ones.
_LINEAR = (
    (r"(stem\..*|downsamples\.\d\.conv\.)kernel$", "o i h w", "h w i o"),
    (r"(conv|position)\.kernel$", "c 1 h w", "h w c"),
    (r"fuse_proj\.kernel$", "(g o) i", "g i o"),
    (r"kernel$", "o i", "i o"),
    (r"x_proj$", "k e d", "k d e"),
)
_SKELETON_AXES = {"sparx": (), "vmamba": _LINEAR, "timm": _LINEAR}
_AXES = (
    (r"^(stem|downsamples)\..*kernel$", "o i h w", "h w i o"),
    (r"(conv|position)\.kernel$", "c 1 h w", "h w c"),
    (r"fuse_proj\.kernel$", "(g o) i 1 1", "g i o"),
    (r"^head\.kernel$", "o i", "i o"),
    (r"kernel$", "o i 1 1", "i o"),
    (r"x_proj$", "(k e) d 1", "k d e"),
    (r"dt_proj$", "k d r", "k r d"),
    (r"a_log$", "(k d) n", "k d n"),
    (r"skip$", "(k d)", "k d"),
    (r"_residual\.scale$", "c 1 1 1", "c"),
    (r"dt_bias$", "k d", "k d"),
    (r"position_bias$", "(y x) g", "y x g"),
    (r"", "c", "c"),
)

Arrays = Mapping[str, np.ndarray]


def skeleton(paths: Iterable[str]) -> str:
    """Whose network has arrays at these paths: its names and axes are used in torch."""
    paths = set(paths)
    if "stem.proj.kernel" in paths:
        return "timm"
    return "vmamba" if "stem.convs.0.bias" in paths else "sparx"


def torch_name(path: str, skeleton: str = "sparx") -> str:
    """The state-dict name of our array `path` ("stages.0.blocks.1.mlp_norm.scale")."""
    for pattern, replacement in (*_SKELETONS[skeleton], *_RENAMES):
        path = re.sub(pattern, replacement, path)
    return path


def from_torch(weights: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Our arrays, by path, from a torch state dict.

    Relative position biases of another window size are stretched to the network's.

    Args:
      weights: arrays by torch name.
      shapes: the shape of every array of the network, by path.

    Raises:
      UserError: the two do not match one to one, name by name and shape by shape, or
        a number is not finite.
    """
    whose, weights = skeleton(shapes), _timm_names(weights)
    names = {torch_name(path, whose): path for path in shapes}
    given = {name for name in map(str, weights) if not IGNORED.search(name)}
    missing, unknown = sorted(names.keys() - given), sorted(given - names.keys())
    if missing or unknown:
        raise UserError(
            "The weights are of another network: they lack "
            f"{_some(missing)}, which it needs, and hold {_some(unknown)}, which it "
            "has not; create the model that they were saved from."
        )
    arrays, wrong = {}, []
    for name, path in names.items():
        array, shape = np.asarray(weights[name]), tuple(shapes[path])
        if not np.isfinite(array).all():
            raise UserError(
                f"The weights are damaged: {name} holds NaN or infinity; use another "
                "copy of them."
            )
        if path.endswith("position_bias"):
            array = _fit_window(array, shape)
        there, here = _axes(path, whose)
        try:
            arrays[path] = rearrange(array, f"{there} -> {here}", **_sizes(here, shape))
        except EinopsError:
            wrong.append(f"{name} {array.shape}")
    if wrong:
        raise UserError(
            f"The weights are of a network of other widths: {_some(wrong)} do not fit; "
            "create the model that they were saved from (the number of classes too)."
        )
    return arrays


def to_torch(arrays: Arrays) -> dict[str, np.ndarray]:
    """The torch state dict of our arrays, without torch's counters of batches."""
    weights, whose = {}, skeleton(arrays)
    for path, array in arrays.items():
        there, here = _axes(path, whose)
        array = rearrange(np.asarray(array), f"{here} -> {there}")
        weights[torch_name(path, whose)] = np.ascontiguousarray(array)
    return weights


def _timm_names(weights):
    """Microsoft's Swin has each downsample in the stage before, and another head."""
    if "layers.0.downsample.reduction.weight" not in weights:
        return weights

    def renamed(name):
        if found := re.match(r"layers\.(\d)\.(downsample\..*)", name):
            return f"layers.{int(found[1]) + 1}.{found[2]}"
        return re.sub(r"^head\.", "head.fc.", name)

    return {renamed(name): array for name, array in weights.items()}


def _fit_window(table, shape):
    """The bias table, stretched if it is that of a square window of another size."""
    span = math.isqrt(len(table)) if table.ndim == 2 else 0
    # A window has an odd number of offsets; what is none does not fit later.
    if span == shape[0] or span**2 != len(table) or span % 2 == 0:
        return table
    table = resize_position_bias(table.reshape(span, span, -1), shape[0] // 2 + 1)
    return table.reshape(-1, table.shape[-1])


def _axes(path, skeleton):
    rows = (*_SKELETON_AXES[skeleton], *_AXES)
    return next(row[1:] for row in rows if re.search(row[0], path))


def _sizes(axes, shape):
    return dict(zip(axes.split(), shape, strict=True))


def _some(names):
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
