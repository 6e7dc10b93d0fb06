"""The picture of what a Vision Transformer looks at: attention of its last layer, and through all layers, over the images."""

from __future__ import annotations

from pathlib import Path

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor

from xformerlib import Grid, plot, vision


def draw(path: Path, model: vision.ViT, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """A column for each image: the image, the attention of the last layer, and the rollout of all layers.

    The attention is the class token's, or the mean of all patches' where there is none; the mean of all heads.

    Args:
        path: the PNG file to write.
        model: in evaluation.
        images: a batch, as the model takes it.
        labels: their classes.
        classes: the names of classes.
    """
    model.eval()
    with torch.inference_mode():
        found = model(images).argmax(1)
    maps = vision.attention_maps(model, images)
    rows = [("last layer", seen(maps[-1])), ("all layers", seen(vision.rollout(maps)))]
    figure = Figure(figsize=(1.5 * len(images) + 0.5, 5.2), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, image in enumerate(images):
        true, taken = classes[int(labels[column])], classes[int(found[column])]
        plot.attention_on_image(image, torch.zeros(1, 1), ax=axes[0, column])
        axes[0, column].set_title(true if true == taken else f"{true}, taken for {taken}", fontsize=8)
        for line, (_, attention) in zip(axes[1:], rows, strict=True):
            plot.attention_on_image(image, attention[column], ax=line[column])
    for line, name in zip(axes[:, 0], ("image", *(name for name, _ in rows)), strict=True):
        line.text(-0.08, 0.5, name, transform=line.transAxes, rotation=90, ha="right", va="center", fontsize=9)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def seen(attention: vision.AttentionMap) -> Tensor:
    """How much of each patch reaches what the classes are read from, (B, height, width)."""
    weights, domain = attention
    assert isinstance(domain, Grid)
    if domain.prefix:
        return attention.of(0).mean(1)  # type: ignore[union-attr]
    return weights.mean((1, 2)).unflatten(1, domain.sizes)
