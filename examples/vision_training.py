"""Training of ``vision.py``: on hidden patches, then on classes; and scores."""

from __future__ import annotations

import math
import time
from typing import Any

import class_scores as scores
import common
import torch
import vision_data as data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
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
    """Train epoch by epoch, each followed by a score on validation, and by everything saved.

    Returns:
        The best accuracy on validation, and the seconds it took, those before a run was continued included.
    """
    began, part = time.perf_counter(), parts["train"]
    steps = o.epochs * max(1, len(part.labels) // o.batch_size)
    groups = vision.parameter_groups(model, weight_decay=o.weight_decay, layer_decay=o.layer_decay, lr=o.lr)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    trained: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if o.ema:
        trained["mean"] = AveragedModel(model, avg_fn=averaging(o.ema))
    epoch, best, spent = 0, (-1.0, -math.inf), 0.0
    if o.resume:
        with common.plain_errors():
            epoch, saved = run.resume(trained)
        best, spent = (saved["accuracy"], saved["sureness"]), saved["seconds"]
    else:
        run.begin()
    scored = trained["mean"].module if o.ema else model
    bar = tqdm(initial=epoch, total=o.epochs, desc="train", unit="epoch", mininterval=0.5)
    while epoch < o.epochs:
        lr, loss = optimizer.param_groups[-1]["lr"], train_epoch(trained, part, classes, o)
        epoch += 1
        if not math.isfinite(loss):
            raise SystemExit(f"error: the training loss is {loss} in epoch {epoch}; try a smaller --lr")
        record, reached = {"train_loss": loss}, (-1.0, float(epoch))
        if "validation" in parts:
            validation = score(scored, parts["validation"], o)
            record |= {"validation_loss": validation.loss, "validation_accuracy": validation.accuracy}
            reached = validation.accuracy, -validation.loss  # of weights that are right as often, those that are surest
        seconds = spent + time.perf_counter() - began
        run.log(epoch=epoch, **record, lr=lr, seconds=seconds)
        bar.set_postfix({name.replace("_", " "): f"{value:.3f}" for name, value in record.items()})
        bar.update()
        if reached > best:
            best = reached
            run.save_weights(scored)
        run.save_state(epoch, trained, accuracy=best[0], sureness=best[1], seconds=seconds)
    bar.close()
    return best[0], spent + time.perf_counter() - began


def train_epoch(trained: dict[str, Any], part: data.Part, classes: int, o: Options) -> float:
    """Go through all images once, in random order; the mean loss of a step."""
    model = trained["model"]
    mixed = mixing(o, classes)
    model.train()
    losses = []
    for images, labels in part.batches(o.batch_size, train=True):
        images, targets = (images, labels) if mixed is None else mixed(images, labels)
        logits = in_half(model, images)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if mixed else o.smoothing)
        descend(loss, model, trained, o)
        if o.ema:
            trained["mean"].update_parameters(model)
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


def pretrain(model: vision.ViT, part: data.Part, run: common.Run, o: Options) -> None:
    """Train the model to restore hidden patches, epoch by epoch, each followed by everything saved; then its weights are written.

    A masked autoencoder, as in He et al. (2021, arXiv:2111.06377); its decoder has a single block here, and is thrown away.
    """
    hidden = vision.MaskedAutoencoder(
        model, decoder_dim=o.dim, decoder_depth=1, decoder_heads=o.heads, ratio=o.mask_ratio
    ).to(part.labels.device)
    steps = o.pretrain * max(1, len(part.labels) // o.batch_size)
    optimizer = torch.optim.AdamW(vision.parameter_groups(hidden, weight_decay=o.weight_decay, lr=o.lr), fused=True)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    trained: dict[str, Any] = {"model": hidden, "optimizer": optimizer, "schedule": schedule}
    epoch = 0
    if o.resume and run.state.exists():
        with common.plain_errors():
            epoch, _ = run.resume(trained)
    else:
        run.begin()
    bar = tqdm(initial=epoch, total=o.pretrain, desc="pretrain", unit="epoch", mininterval=0.5)
    while epoch < o.pretrain:
        hidden.train()
        losses = []
        for images, _ in part.batches(o.batch_size, train=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                loss = hidden(images).loss
            descend(loss, hidden, trained, o)
            losses.append(loss.detach())
        epoch += 1
        run.log(epoch=epoch, train_loss=float(torch.stack(losses).mean()))
        bar.set_postfix(loss=f"{float(torch.stack(losses).mean()):.3f}")
        bar.update()
        run.save_state(epoch, trained)
    bar.close()


def descend(loss: Tensor, model: nn.Module, trained: dict[str, Any], o: Options) -> None:
    """One step of the optimiser and of its schedule, along a gradient that is cut to --clip."""
    trained["optimizer"].zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    trained["optimizer"].step()
    trained["schedule"].step()
