"""A small SparX-Mamba on 1,437 handwritten digits, tested on 360 others.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from sparx_jax.training.config import default_config


def get_config():
    """The settings of the quickstart."""
    config = default_config()
    config.model.name = "sparx_mamba_nano"
    config.model.drop_path_rate = 0.05

    config.data.name = "digits"
    config.data.image_size = 32
    config.data.crop = "padded"
    config.data.crop_padding = 3
    config.data.flip = False
    config.data.mean = (0.3, 0.3, 0.3)
    config.data.std = (0.35, 0.35, 0.35)

    config.batch_size = 64
    config.eval_batch_size = 120
    config.train_epochs = 16.0
    config.eval_every_epochs = 2.0
    config.log_every_steps = 20
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_epochs = 2.0
    config.ema_decay = 0.98
    return config
