"""Training of ``vision.py``: on hidden patches, then on classes; and scores."""

from __future__ import annotations

from typing import Any

import class_scores as scores
import common
import torch
import vision_data as data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from training import Rank, Trained, fit
from vision_options import Options

from xformerlib import vision


@torch.inference_mode()
def score(model: nn.Module, part: data.Part, o: Options) -> scores.Score:
    """Classify every image; --eval-batch-size makes no difference."""
    model.eval()
    found = [(in_half(model, images), labels) for images, labels in part.batches(o.eval_batch_size, train=False)]
    return scores.score_of(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


def in_half(model: nn.Module, images: Tensor) -> Tensor:
    """The logits: on CUDA computed in bfloat16, and given as they are there."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        return model(images).float()


def train(
    model: vision.ViT, parts: dict[str, data.Part], classes: int, run: common.Run, o: Options
) -> tuple[float, float]:
    """Train, and keep the weights that did best on validation.

    Returns:
        The best accuracy on validation, -inf without one, and the seconds it took, those before a run was continued included.
    """
    steps = o.epochs * max(1, len(parts["train"].labels) // o.batch_size)
    groups = vision.parameter_groups(model, weight_decay=o.weight_decay, layer_decay=o.layer_decay, lr=o.lr)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    average = AveragedModel(model, avg_fn=averaging(o.ema)) if o.ema else None
    trained = Trained(model, optimizer, schedule, o.clip, average)

    def validate() -> tuple[dict[str, float], Rank]:
        found = score(trained.scored, parts["validation"], o)
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}, found.rank

    return fit(
        trained,
        run,
        epochs=o.epochs,
        resume=o.resume,
        train=lambda: train_epoch(trained, parts["train"], classes, o),
        validate=validate if "validation" in parts else None,
    )


def train_epoch(trained: Trained, part: data.Part, classes: int, o: Options) -> float:
    """Go through all images once, in random order; the mean loss of a step."""
    mixed = mixing(o, classes)
    trained.model.train()
    losses = []
    for images, labels in part.batches(o.batch_size, train=True):
        images, targets = (images, labels) if mixed is None else mixed(images, labels)
        logits = in_half(trained.model, images)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if mixed else o.smoothing)
        trained.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def mixing(o: Options, classes: int) -> Any:
    """MixUp and CutMix (arXiv:1710.09412, arXiv:1905.04899) of pairs of images and of their labels, by timm; or None."""
    if not (o.mixup or o.cutmix):
        return None
    from timm.data.mixup import Mixup

    return Mixup(o.mixup, o.cutmix, label_smoothing=o.smoothing, num_classes=classes)


def averaging(decay: float) -> Any:
    """The running mean of weights: of about as many steps as there were at first, of 1 / (1 - decay) later."""

    def step(average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        return average.lerp(current, 1 - min(decay, (1 + int(steps)) / (10 + int(steps))))

    return step


def pretrain(model: vision.ViT, part: data.Part, run: common.Run, o: Options, *, resume: bool) -> None:
    """Train the model to restore hidden patches.

    A masked autoencoder, as in He et al. (2021, arXiv:2111.06377); its decoder has a single block here, and is thrown away.
    """
    hidden = vision.MaskedAutoencoder(
        model, decoder_dim=o.dim, decoder_depth=1, decoder_heads=o.heads, ratio=o.mask_ratio
    ).to(part.labels.device)
    steps = o.pretrain * max(1, len(part.labels) // o.batch_size)
    optimizer = torch.optim.AdamW(vision.parameter_groups(hidden, weight_decay=o.weight_decay, lr=o.lr), fused=True)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    trained = Trained(hidden, optimizer, schedule, o.clip)
    fit(
        trained,
        run,
        epochs=o.pretrain,
        resume=resume,
        train=lambda: restore_epoch(trained, part, o),
        validate=None,
        name="pretrain",
    )


def restore_epoch(trained: Trained, part: data.Part, o: Options) -> float:
    """Hide patches of all images once, and restore them; the mean loss of a step."""
    trained.model.train()
    losses = []
    for images, _ in part.batches(o.batch_size, train=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = trained.model(images).loss
        trained.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())
