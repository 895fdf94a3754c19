"""Some steps of training a small Swin by PyTorch and timm, as a golden.

    PYTHON_WITH_TIMM -m tests.parity.trajectory

All but the loop is theirs: network, groups of weight decay, schedule, clipping, loss
and moving average.  Weights and pictures follow from names (`generate.py`).  The golden
has the numbers of each step and, of how far each array and its average moved, norm and
probe.  timm 1.0.31 and torch 2.13.0 made it.
"""

import json
from pathlib import Path

import numpy as np

from tests.parity import generate

SETTING = dict(
    steps=12,
    warmup_steps=4,
    batch=8,
    image_size=64,
    window=2,
    depths=(1, 1, 2, 1),
    dim=16,
    head_dim=8,
    classes=10,
    lr=4e-3,
    warmup_lr=1e-6,
    min_lr=1e-5,
    weight_decay=0.05,
    clip_norm=6.0,
    # Gradients of key biases are nothing but rounding, which Adam divides by itself.
    eps=1e-3,
    ema_decay=0.8,
    smoothing=0.1,
)
GOLDEN = Path(__file__).parent / "goldens/swin_trajectory.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(step):
    """uint8 pictures (n, h, w, c) and their labels, of which a colour tells."""
    n, size = SETTING["batch"], SETTING["image_size"]
    noise = generate.image(f"trajectory/{step}", (n, 3, size, size))
    labels = (np.arange(n) * 7 + step) % SETTING["classes"]
    pixels = 60 + 30 * noise + 10 * labels[:, None, None, None]
    images = np.clip(pixels, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return images, labels.astype(np.int32)


def moved(key, after, before):
    """Norm and probe of the way of an array."""
    way = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return [float(np.linalg.norm(way)), generate.probe(f"trajectory/{key}", way)]


def main():
    """Writes the golden."""
    import torch
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.swin_transformer import SwinTransformer
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV2

    s = SETTING
    model = SwinTransformer(
        img_size=s["image_size"],
        window_size=s["window"],
        embed_dim=s["dim"],
        depths=s["depths"],
        num_heads=[s["dim"] * 2**i // s["head_dim"] for i in range(4)],
        num_classes=s["classes"],
        drop_path_rate=0.0,
    )
    initial = {k: generate.tensor(k, p.shape) for k, p in model.named_parameters()}
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in initial.items()}, strict=False
    )
    model.train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=s["lr"], weight_decay=s["weight_decay"], eps=s["eps"]
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=s["steps"] - s["warmup_steps"],
        lr_min=s["min_lr"],
        warmup_t=s["warmup_steps"],
        warmup_lr_init=s["warmup_lr"],
        warmup_prefix=True,
        t_in_epochs=False,
    )
    ema, loss_of = ModelEmaV2(model, decay=s["ema_decay"]), SoftTargetCrossEntropy()
    mean, std = (torch.tensor(m).view(3, 1, 1) for m in (MEAN, STD))
    rows = []
    for step in range(s["steps"]):
        schedule.step_update(step)
        images, labels = map(torch.tensor, batch(step))
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        target = mixup_target(labels.long(), s["classes"], smoothing=s["smoothing"])
        loss = loss_of(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip_norm"])
        optimizer.step()
        ema.update(model)
        row = loss.item(), norm.item(), optimizer.param_groups[0]["lr"]
        rows.append(
            dict(zip(("train_loss", "grad_norm", "learning_rate"), row, strict=True))
        )
    shapes = {key: list(value.shape) for key, value in initial.items()}
    found = dict(steps=rows, shapes=shapes, raw={}, ema={})
    for kind, network in (("raw", model), ("ema", ema.module)):
        for key, value in network.named_parameters():
            found[kind][key] = moved(key, value.detach().numpy(), initial[key])
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
