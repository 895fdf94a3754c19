"""SparX-Mamba-T on CIFAR-10 enlarged to 64 x 64, for one GPU: a few minutes.

What was run of it (docs/training.md): T for 15 of its 50 epochs, and a smaller network.
Data: ROOT/train/<class>/*.png and ROOT/test/<class>/*.png, or .jpg.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10 \\
        --config.data.root=ROOT

Another network: --config=configs/cifar10.py:sparx_mamba_nano.
"""

from sparx_jax.training.config import default_config


def get_config(variant="sparx_mamba_t"):
    """The recipe, for any network of `sparx_jax.list_models()`."""
    config = default_config()
    config.model.name = variant
    config.model.dtype = "bfloat16"
    config.model.drop_path_rate = 0.1

    config.data.image_size = 64
    config.data.crop = "padded"
    config.data.crop_padding = 8
    config.data.mean = (0.491, 0.482, 0.447)
    config.data.std = (0.247, 0.243, 0.262)
    config.data.workers = 14  # of the 16 cores that it ran on

    config.mixing.cutmix = 1.0
    config.mixing.probability = 0.5

    config.batch_size = 512
    config.eval_batch_size = 1000
    config.train_epochs = 50.0
    config.eval_every_epochs = 10.0
    config.log_every_steps = 100
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_epochs = 3.0
    config.ema_decay = 0.99
    return config
