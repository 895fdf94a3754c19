"""Wiring mistakes, made by moving weights: the network itself stays compiled.

Labels are those of `goldens/sensitivities.json`, where the reference made the same
mistakes in its code.  Each function takes and returns arrays by torch name; `WEIGHTS`
holds them by model.
"""

import numpy as np

DIRECTIONS = 4
PER_DIRECTION = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")


def _edit(*endings):
    """Lifts a function of one array to all arrays whose name ends so."""

    def lift(edit):
        return lambda weights: {
            key: edit(array) if key.endswith(endings) else array
            for key, array in weights.items()
        }

    return lift


def _constant(value, *endings):
    return _edit(*endings)(lambda array: np.full_like(array, value))


def _directions(*order):
    """Direction i of the scan gets the weights of direction order[i]."""

    @_edit(*PER_DIRECTION)
    def reorder(array):
        by_direction = array.reshape(DIRECTIONS, -1, *array.shape[1:])
        return by_direction[list(order)].reshape(array.shape)

    return reorder


def _projections(weights, edit):
    """Applies `edit` to the parts (direction, rows, channel): dt, b and c."""
    weights = dict(weights)
    for key in [key for key in weights if key.endswith("x_proj_weight")]:
        array = weights[key].reshape(DIRECTIONS, -1, weights[key].shape[1])
        rank = array.shape[1] - 2  # one state
        parts = edit(array[:, :rank], array[:, rank:-1], array[:, -1:])
        weights[key] = np.concatenate(parts, 1).reshape(weights[key].shape)
    return weights


def _averaged(weights):
    """Outputs are linear in the rows of c and in the skip weights."""
    weights = _projections(weights, lambda dt, b, c: (dt, b, c / DIRECTIONS))
    return _edit("Ds")(lambda array: array / DIRECTIONS)(weights)


@_edit("pos_embed.weight", "mlp.dwconv.weight")
def _without_identity(array):
    array = array.copy()
    array[:, :, 1, 1] -= 1
    return array


def _only(names, mistake):
    """Makes `mistake` in the arrays whose name contains `names`."""
    return lambda weights: {
        key: made if names in key else weights[key]
        for key, made in mistake(weights).items()
    }


def _swapped_halves(array):
    return np.concatenate(np.split(array, 2)[::-1])


_SPARX_MAMBA = {
    "scan directions ordered row, row-flip, col, col-flip": _directions(0, 2, 1, 3),
    "scan directions ordered col first": _directions(1, 0, 3, 2),
    "flipped directions swapped (row-flip <-> col-flip)": _directions(0, 1, 3, 2),
    "merge averages instead of sums": _averaged,
    "A = -exp(A_logs) replaced by -1": _constant(0, "A_logs"),
    "D skip term dropped": _constant(0, "Ds"),
    "dt bias dropped": _constant(0, "dt_projs_bias"),
    "B and C swapped": lambda w: _projections(w, lambda dt, b, c: (dt, c, b)),
    "scan contribution dropped (only D*u)": lambda w: _projections(
        w, lambda dt, b, c: (dt, b, 0 * c)
    ),
    "k and v halves swapped": _edit("d_proj.3.weight", "d_proj.3.bias")(
        _swapped_halves
    ),
    "layer scale bias dropped": _constant(0, "layerscale_1.bias", "layerscale_2.bias"),
    "pos_embed conv without residual": _only("pos_embed", _without_identity),
    "MLP depthwise conv without residual": _only("mlp.dwconv", _without_identity),
}


def _rows_slowest(array):
    """Of the 2 x 2 merged pixels, which lie column by column."""
    merged = array.reshape(*array.shape[:-1], 2, 2, -1)
    return merged.swapaxes(-3, -2).reshape(array.shape)


_SWIN = {
    "patch merging concatenates row offset slowest": _edit(
        "downsample.norm.weight", "downsample.norm.bias", "downsample.reduction.weight"
    )(_rows_slowest),
    "relative position index transposed": _edit("relative_position_bias_table")(
        lambda array: array[::-1]
    ),
}

WEIGHTS = {
    "sparx_mamba_t": _SPARX_MAMBA,
    "swin_tiny_patch4_window7_224": _SWIN,
    "vmambav2v_tiny_224": {
        label: _SPARX_MAMBA[label]
        for label in ["scan directions ordered row, row-flip, col, col-flip"]
    },
}

# For the fast suite, the weakest first.
SAMPLE = [
    "merge averages instead of sums",
    "flipped directions swapped (row-flip <-> col-flip)",
    "k and v halves swapped",
]
