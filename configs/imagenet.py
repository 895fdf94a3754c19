"""Recipes for ImageNet-1K at 224 x 224 pixels: the SparX and the Swin authors'.

    python train.py --config=configs/imagenet.py:VARIANT --workdir=runs/VARIANT \\
        --config.data.root=/path/to/imagenet

`root` holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG. For the archives as TFDS
prepares them (python -m sparx_jax.data.prepare imagenet2012) add

        --config.data.name=tfds --config.data.eval_split=validation

    python eval.py ... --datasets=val,real,v2,a,r --resolutions=224,384,512

makes the tables of robustness and of resolutions; see sparx_jax/data/eval_sets.py.

    variant        epochs  batch  top-1, %, of the papers  time of 300 epochs
    sparx_mamba_t   310    2048   83.5                     unknown
    sparx_mamba_s   310    2048   84.2                     unknown
    sparx_mamba_b   310    2048   84.5                     unknown
    sparx_swin_t    300    1024   82.6 (docs/differences)   unknown
    sparx_swin_s    300    1024   none                     unknown
    sparx_swin_b    300    1024   none                     unknown
    swin_t          300    1024   81.3                     unknown
    swin_s          300    1024   83.0                     unknown
    swin_b          300    1024   83.5                     unknown
    vmamba_t        300    1024   82.6                     23 h
    vmamba_s        300    1024   83.6                     43 h
    vmamba_b        300    1024   83.9                     54 h

Hardware: the authors had 8 GPUs with 256 or 128 images each; any mesh whose devices
divide the batch sees the same batches. Time: computed from the 571, 314 and 247
images a second that VMamba's README gives for training its PyTorch code on an A100,
for 8 of them; this program was not timed on such machines. On 16 TPU v4 (v4-32)
`python -m sparx_jax.compile` predicted 0.27 s a step of sparx_mamba_t, 15 h in all. The
host has to keep up: an image's transforms took 4.8 ms of a core (measured, AMD EPYC;
timm's 1.09 times as long), so 300 epochs take 512 core hours, and the 16 workers set
below 32 h.

Not trained here yet: no accuracy of this program on ImageNet is known.
"""

from sparx_jax.errors import UserError
from sparx_jax.training.config import default_config

# variant: (drop path rate, crop ratio of the evaluation)
VARIANTS = {
    "sparx_mamba_t": (0.2, 0.9),
    "sparx_mamba_s": (0.3, 0.95),
    "sparx_mamba_b": (0.5, 0.95),
    "sparx_swin_t": (0.2, 0.875),
    "sparx_swin_s": (0.3, 0.875),
    "sparx_swin_b": (0.5, 0.875),
    "swin_t": (0.2, 0.875),
    "swin_s": (0.3, 0.875),
    "swin_b": (0.5, 0.875),
    "vmamba_t": (0.2, 0.875),
    "vmamba_s": (0.3, 0.875),
    "vmamba_b": (0.6, 0.875),
}


def get_config(variant: str = "sparx_mamba_t"):
    """The settings of one variant.

    Source: the authors' train scripts and the defaults of their trainer. Ours are the
    type bfloat16 (theirs: mixed precision), the number of workers and the batch of the
    evaluation.
    """
    if variant not in VARIANTS:
        raise UserError(
            f"--config=configs/imagenet.py:{variant} is none of its variants: "
            f"{', '.join(VARIANTS)}."
        )
    config = default_config()
    config.model.name = variant
    config.model.drop_path_rate, config.data.crop_ratio = VARIANTS[variant]
    config.model.dtype = "bfloat16"

    config.data.name = "folder"
    config.data.tfds_name = "imagenet2012"  # for name = "tfds"
    config.data.eval_split = "val"
    config.data.image_size = 224  # pixels
    config.data.crop = "resized"
    config.data.scale = (0.08, 1.0)  # share of the area
    config.data.interpolation = "random"  # bilinear or bicubic
    config.data.flip = True  # half of the images
    config.data.rand_augment = "rand-m9-mstd0.5-inc1"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.workers = 16  # processes a host

    config.mixing.mixup = 0.8
    config.mixing.cutmix = 1.0
    config.mixing.probability = 1.0
    config.mixing.switch = 0.5
    config.mixing.erasing = 0.25  # probability; noise a pixel
    config.label_smoothing = 0.1

    config.batch_size = 2048  # images: 8 GPUs x 256
    config.eval_batch_size = 2048
    config.train_epochs = 300.0
    config.cooldown_epochs = 10.0
    config.optimizer.lr = 4e-3  # for this batch size
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.warmup_lr = 1e-6
    config.optimizer.min_lr = 1e-5
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 5.0  # of the whole gradient
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.use_ema = True
    config.ema_decay = 0.9998  # a step
    return config if variant.startswith("sparx_mamba") else _as_swin(config)


def _as_swin(config):
    """What differs in Swin's recipe; VMamba adds its drop path rates and an average.

    Source: Liu et al., arXiv:2103.14030; configs/vssm of MzeroMiko/VMamba.  For
    SparX-Swin no source gives a recipe: Swin's, so that the comparison is fair.
    """
    config.data.interpolation = "bicubic"
    config.batch_size = 1024
    config.eval_batch_size = 1024
    config.cooldown_epochs = 0.0
    config.optimizer.lr = 1e-3  # their files have all three rates for a batch of 512
    config.use_ema = config.model.name.startswith("vmamba")
    config.ema_decay = 0.9999
    return config
