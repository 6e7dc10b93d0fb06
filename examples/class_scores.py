"""Scores of classifiers: which classes were taken for which, and the mean cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Score(NamedTuple):
    """How many items of each class (row) were taken for each (column), and the mean cross-entropy."""

    confusion: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the items whose class was found."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())

    @property
    def rank(self) -> tuple[float, float]:
        """Greater for a better score; of weights that are right as often, for those that are surest."""
        return self.accuracy, -self.loss


def score_of(logits: Tensor, labels: Tensor) -> Score:
    """The score of the logits of all items."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, -1)
    return Score(confusion.cpu(), float(F.cross_entropy(logits, labels)))


def summary(classes: list[str], ours: Score, items: str) -> str:
    """Accuracy, and the classes that were taken for others most often. ``items`` is what was classified, in the plural."""
    confusion = ours.confusion
    total, right = int(confusion.sum()), int(confusion.diagonal().sum())
    lines = [
        f"test accuracy     {ours.accuracy:.2%}: {right:,} of {total:,} {items}",
        f"most frequent     {float(confusion.sum(1).max() / total):.2%}: what one gets by always saying the same class",
    ]
    wrong = confusion - confusion.diagonal().diag()
    for pair in wrong.flatten().argsort(descending=True, stable=True)[:3].tolist():
        true, taken = divmod(pair, len(classes))
        if wrong[true, taken]:
            lines.append(f"taken for another {classes[true]} for {classes[taken]}: {int(wrong[true, taken])} times")
    return "\n".join(lines)
