"""The picture of a classification run: how training went, and which classes were taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, VALIDATION = "#2e86ab", "#d1495b"
READABLE = 16  # classes of which the numbers of a matrix can be read


def draw(path: Path, title: str, classes: list[str], confusion: np.ndarray, course: list[dict[str, Any]]) -> None:
    """Losses and accuracy by epoch, and the confusion matrix of the test series.

    Args:
        path: the PNG file to write.
        title: of the matrix.
        classes: their names.
        confusion: how many series of each class (row) were taken for each (column).
        course: the records of metrics.jsonl, one an epoch.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    epochs = [record["epoch"] for record in course]
    for name, colour in (("train", TRAIN), ("validation", VALIDATION)):
        if f"{name}_loss" in course[0]:
            left.plot(epochs, [record[f"{name}_loss"] for record in course], color=colour, lw=2, label=f"{name} loss")
    if "validation_accuracy" in course[0]:
        errors = [1 - record["validation_accuracy"] for record in course]
        left.plot(epochs, errors, color=VALIDATION, lw=1.2, ls="--", label="validation error rate")
    left.set(xlabel="epoch", ylim=(0, None), title="training")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.spines[["top", "right"]].set_visible(False)
    left.grid(axis="y", color="0.9", lw=0.8)
    left.legend(frameon=False)

    share = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    right.imshow(share, cmap="Blues", vmin=0, vmax=1)
    right.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= READABLE:
        names = [name[:14] for name in classes]
        right.set_xticks(range(len(classes)), names, rotation=0 if max(map(len, names)) <= 2 else 90)
        right.set_yticks(range(len(classes)), names)
        for row, column in zip(*confusion.nonzero(), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            right.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
