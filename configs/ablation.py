"""Does the connector pay?  Networks of equal size that differ in it, on CIFAR-10.

Eight variants, `{mamba,swin}_{sparx,none,dense_ganglion,densenet}`.  Those of a family
have equally many parameters within 1 %: what a connector costs, the others spend on
width.  Only stage 3 has a connector, over seven layers as in SparX-Mamba-T.
Data: ROOT/train/<class>/*.png and ROOT/test/<class>/*.png, or .jpg.

All 24 runs took an hour and a half on 2 CPU cores; docs/ablation.md has their results.

python -m sparx_jax.sweep --config=configs/ablation.py --workdir=runs/ablation \\
    --config.data.root=ROOT --jobs=2 --sweep seed=0,1,2 --sweep \\
    variant=mamba_sparx,mamba_none,mamba_dense_ganglion,mamba_densenet,\\
swin_sparx,swin_none,swin_dense_ganglion,swin_densenet

Seeds come first, so that the runs of a variant follow one another at a distance and
all but the first find its program in the compilation cache.  One run is train.py with
--config=configs/ablation.py:mamba_none.  For a GPU (not run; meant for 90 %) add:

    --config.data.image_size=64 --config.train_epochs=100 --config.batch_size=256 \\
    --config.optimizer.warmup_epochs=5 --config.ema_decay=0.999 --config.data.workers=8
"""

from sparx_jax.errors import UserError
from sparx_jax.training.config import default_config

DEPTHS = (1, 1, 7, 1)
STRIDE = (0, 0, 2, 0)
# Widths of the stages, found by search: stage 3 comes near, its neighbours even it out.
DIMS = {
    "mamba_sparx": (16, 32, 40, 64),  # 388,346 parameters
    "mamba_none": (16, 32, 44, 76),  # 389,250
    "mamba_dense_ganglion": (16, 32, 36, 60),  # 389,242
    "mamba_densenet": (16, 28, 36, 52),  # 386,818
    "swin_sparx": (16, 32, 48, 64),  # 430,666
    "swin_none": (16, 40, 56, 64),  # 432,754
    "swin_dense_ganglion": (16, 40, 40, 72),  # 429,405
    "swin_densenet": (16, 24, 40, 72),  # 430,235
}
# One for a family, whatever the connector; from one trial of SparX-Mamba, no more.
LR = {"mamba": 8e-3, "swin": 3e-3}


def get_config(variant="mamba_sparx"):
    """The settings of one of the networks of `DIMS`."""
    if variant not in DIMS:
        raise UserError(f"unknown variant {variant!r}: use one of {', '.join(DIMS)}.")
    family, _, mode = variant.partition("_")
    config = default_config()
    config.model.name = f"sparx_{family}_nano"
    config.model.depths = DEPTHS
    config.model.dims = DIMS[variant]
    config.model.connector.mode = mode
    config.model.connector.stride = STRIDE
    if family == "swin":
        config.model.head_dim = 8
        config.model.window_size = 4

    config.data.image_size = 32
    config.data.crop = "padded"
    config.data.mean = (0.491, 0.482, 0.447)
    config.data.std = (0.247, 0.243, 0.262)

    config.batch_size = 128
    config.eval_batch_size = 500
    config.train_epochs = 2.0
    config.eval_every_epochs = 1000.0  # at the end only
    config.log_every_steps = 50
    config.optimizer.lr = LR[family]
    config.optimizer.warmup_epochs = 0.2
    config.ema_decay = 0.98
    return config
