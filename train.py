"""Trains a model, or goes on where the last run in --workdir stopped.

python train.py --config=configs/digits.py --workdir=runs/digits
python train.py --config=configs/digits.py --workdir=runs/w --config.batch_size=32
"""

from sparx_jax.training import cli
from sparx_jax.training.loop import train

if __name__ == "__main__":
    cli.run(train)
