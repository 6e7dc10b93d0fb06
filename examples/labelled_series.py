"""Series with a class each, of unequal length: read, scaled, split by class, and put one behind the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Scale = Literal["train", "series"]


class Labelled(NamedTuple):
    """Series and their classes: each of ``series`` is (steps, channels), NaN where a value is missing; ``labels`` are (series,).

    ``static`` are numbers that are known of a series as a whole, (series, constants); there need not be any.
    """

    series: list[Tensor]
    labels: Tensor
    static: Tensor

    def take(self, index: Tensor) -> Labelled:
        """Those of an index."""
        return Labelled([self.series[i] for i in index.tolist()], self.labels[index], self.static[index])

    def to(self, device: torch.device) -> Labelled:
        """The same on another device."""
        return Labelled([x.to(device) for x in self.series], self.labels.to(device), self.static.to(device))

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a classifier: all series one behind the other, and how many steps each has."""
        static = {"static": self.static} if self.static.shape[1] else {}
        return {"x": torch.cat(self.series), "lengths": [len(x) for x in self.series], **static}


class Data(NamedTuple):
    """A data set with the training and test parts that it was published with, and the names of its classes."""

    name: str
    classes: list[str]
    train: Labelled
    test: Labelled


def load(folder: Path | None) -> Data:
    """The data set in a folder; without one, the digits."""
    return load_digits() if folder is None else load_archive(folder)


def load_digits() -> Data:
    """Handwritten digits, 8 x 8 pixels, from files inside the package scikit-learn, as series: a step is a column of 8 pixels.

    Blank columns at both ends are left out, so that a 1 is shorter than most. The first half is to train, the second to test, as in
    scikit-learn's own example.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    series = []
    for image in images:
        ink = image.any(0).nonzero()[:, 0]
        series.append(image.T[int(ink[0]) : int(ink[-1]) + 1].contiguous())
    whole = Labelled(series, labels, torch.empty(len(labels), 0))
    train, test = (whole.take(half) for half in torch.arange(len(labels)).split(len(labels) // 2 + 1))
    return Data("digits of scikit-learn", [str(digit) for digit in range(10)], train, test)


def load_archive(folder: Path) -> Data:
    """A data set of timeseriesclassification.com (Dau et al. 2018, arXiv:1810.07758; Bagnall et al. 2018, arXiv:1811.00075)."""
    found = sorted(folder.glob("*_TRAIN.ts"))
    if len(found) != 1:
        raise ValueError(
            f"--data must be a folder with one pair of files NAME_TRAIN.ts and NAME_TEST.ts; {folder} "
            + (f"has {', '.join(path.name for path in found)}" if found else "has no NAME_TRAIN.ts")
        )
    name = found[0].name.removesuffix("_TRAIN.ts")
    other = folder / f"{name}_TEST.ts"
    if not other.is_file():
        raise ValueError(f"--data must be a folder with both {found[0].name} and {other.name}; there is no {other}")
    (classes, train), (of_test, test) = read_ts(found[0]), read_ts(other)
    channels = [part.series[0].shape[1] for part in (train, test)]
    if of_test != classes or channels[0] != channels[1]:
        raise ValueError(
            f"{found[0]} and {other} must have the same classes and dimensions; got {len(classes)} classes ({' '.join(classes)}) and "
            f"{channels[0]} dimensions, {len(of_test)} ({' '.join(of_test)}) and {channels[1]}"
        )
    return Data(name, classes, train, test)


def read_ts(path: Path) -> tuple[list[str], Labelled]:
    """The names of the classes and the series of a file in the format ``.ts``.

    After a head of lines that begin with ``@`` there is one series a line: the values of each dimension with commas between them, the
    dimensions with colons between them, and last the class. ``?`` and ``NaN`` are missing values. Steps at the end of which nothing
    was observed, as some files have them to make all series as long, are left out.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:  # some heads hold bytes of other encodings
        lines = [line.strip() for line in file]
    classes, first = _head(path, lines)
    series: list[Tensor] = []
    labels: list[int] = []
    for number, line in enumerate(lines[first:], first + 1):
        if not line or line.startswith("#"):
            continue
        *dimensions, label = line.split(":")
        try:
            x = _values(dimensions)
            if series and x.shape[1] != series[0].shape[1]:
                raise ValueError(f"has {x.shape[1]} dimensions, and the first series has {series[0].shape[1]}")
            if label.strip() not in classes:
                raise ValueError(f"is of class {label.strip()!r}, which is not among {' '.join(classes)}")
        except ValueError as error:
            raise ValueError(f"line {number} of {path} {error}") from error
        series.append(x)
        labels.append(classes.index(label.strip()))
    if not series:
        raise ValueError(f"{path} must hold series after its line @data; it holds none")
    return classes, Labelled(series, torch.tensor(labels), torch.empty(len(labels), 0))


def _head(path: Path, lines: list[str]) -> tuple[list[str], int]:
    """The names of the classes, and where the lines of series begin."""
    first = next((number for number, line in enumerate(lines, 1) if line.lower() == "@data"), None)
    if first is None:
        raise ValueError(f"{path} must be a .ts file, whose series come after a line @data; it has no such line")
    told = {key.lower(): rest for key, *rest in (line.split() for line in lines[:first] if line.startswith("@"))}
    if told.get("@timestamps") == ["true"]:
        raise ValueError(
            f"{path} holds times beside the values (@timeStamps true), which is not read: give values alone"
        )
    labelled, *classes = told.get("@classlabel") or ["false"]
    if labelled.lower() != "true" or len(classes) < 2:
        raise ValueError(f"{path} must name two classes or more in a line such as '@classLabel true A B', and does not")
    return classes, first


def _values(dimensions: list[str]) -> Tensor:
    """One line of a .ts file, without the class: (steps, channels)."""
    cells = [[cell.strip() for cell in dimension.split(",")] for dimension in dimensions]
    lengths = {len(dimension) for dimension in cells}
    if len(lengths) != 1:
        raise ValueError(f"must have one or more dimensions of as many steps each; got {sorted(lengths)} steps")
    try:
        x = np.array([[math.nan if cell == "?" else float(cell) for cell in dimension] for dimension in cells]).T
    except ValueError as error:
        raise ValueError(f"must hold numbers, or ? where a value is missing; {error}") from error
    seen = (~np.isnan(x)).any(1)
    if not seen.any() or np.isinf(x).any():
        raise ValueError("must hold a value that was observed, and no infinite one")
    return torch.tensor(x[: int(np.flatnonzero(seen)[-1]) + 1], dtype=torch.float32)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of train and validation: of each class about this share is validation, and at least one series is train."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        count = min(round(share * len(own)), len(own) - 1)
        held_out[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def scaled(parts: dict[str, Labelled], scale: Scale, logarithm: bool) -> dict[str, Labelled]:
    """All parts with values of about one size: mean 0 and deviation 1 over the steps of ``parts["train"]``.

    Args:
        parts: of a data set; one of them is "train".
        scale: "series" first divides each channel of each series by its largest absolute value, of which the logarithm becomes a static
            number; "train" by its deviation in train.
        logarithm: adds log10(|x| + 0.001) of each channel as a further one, which tells small values apart.
    """
    size = _spread(torch.cat(parts["train"].series))[1]
    made = {name: _features(part, size if scale == "train" else None, logarithm) for name, part in parts.items()}
    level, deviation = _spread(torch.cat(made["train"].series))
    own_level, own_deviation = _spread(made["train"].static)
    return {
        name: part._replace(
            series=[(x - level) / deviation for x in part.series], static=(part.static - own_level) / own_deviation
        )
        for name, part in made.items()
    }


def _features(part: Labelled, size: Tensor | None, logarithm: bool) -> Labelled:
    """Values by ``size``, or by the largest of each series, which is then known of it."""
    if size is None:
        largest = torch.stack([x.nan_to_num().abs().amax(0) for x in part.series])
        sizes = torch.where(largest > 0, largest, 1)
        part = part._replace(static=torch.cat([part.static, sizes.log10()], 1))
    else:
        sizes = size.expand(len(part.series), -1)
    series = [x / own for x, own in zip(part.series, sizes, strict=True)]
    if logarithm:
        series = [torch.cat([x, (x.abs() + 1e-3).log10()], 1) for x in series]
    return part._replace(series=series)


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column over the rows where it was observed; a deviation of 0 counts as 1."""
    mean = x.nanmean(0).nan_to_num()
    deviation = (x - mean).square().nanmean(0).sqrt().nan_to_num()
    return mean, torch.where(deviation > 1e-6 * mean.abs(), deviation, 1)
