"""Images with classes: read from digits, CIFAR-10 or a folder, split, and given out in batches that training sees altered."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from labelled_series import stratified
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vision_augment import Augment

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Of what is held out where the data comes without: the same in every run, so that scores can be compared.
SPLIT_SEED = 0

# -- data sets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Images and their classes. ``images`` is (N, channels, height, width) in bytes, or the files that hold them."""

    images: Tensor | list[Path]
    labels: Tensor

    def take(self, index: Tensor) -> Labelled:
        """Those of an index."""
        images = self.images[index] if isinstance(self.images, Tensor) else [self.images[i] for i in index.tolist()]
        return Labelled(images, self.labels[index])


class Data(NamedTuple):
    """A data set: names of its classes, and its parts; without a test part of its own where ``test`` is None."""

    name: str
    classes: list[str]
    train: Labelled
    test: Labelled | None


def load(folder: Path | None) -> Data:
    """The data set in a folder: CIFAR-10's batches, or images in one folder for each class; without one, the digits."""
    if folder is None:
        return load_digits()
    if folder.is_file():
        raise ValueError(f"--data must be a folder; {folder} is a file: unpack it first")
    if not folder.is_dir():
        raise ValueError(f"--data must be a folder; there is no folder {folder}")
    for inner in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if (inner / f"data_batch_1{suffix}").exists():
                return load_cifar10(inner, suffix)
    return load_folder(folder)


def load_digits() -> Data:
    """Handwritten digits, 8 x 8 pixels in 17 shades of grey, from files inside the package scikit-learn."""
    from sklearn.datasets import load_digits as read

    found = read()
    images = torch.tensor(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return Data(
        "digits", [str(name) for name in found.target_names], Labelled(images, torch.tensor(found.target)), None
    )


class _Arrays(pickle.Unpickler):
    """Reads arrays and what holds them, and nothing that a file could run."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ("_reconstruct", "ndarray", "dtype", "encode"):
            raise ValueError(f"--data: a batch of CIFAR-10 holds arrays; got {module}.{name}")
        return super().find_class(module, name)


def load_cifar10(folder: Path, suffix: str) -> Data:
    """CIFAR-10 (Krizhevsky 2009) from the files of its python or its binary version."""

    def read(name: str) -> Labelled:
        path = folder / f"{name}{suffix}"
        if not path.exists():
            raise ValueError(f"--data: {folder} has a first batch of CIFAR-10, but no {path.name}")
        if suffix:
            rows = np.fromfile(path, np.uint8).reshape(-1, 1 + 3072)
            labels, pixels = rows[:, 0], rows[:, 1:]
        else:
            with path.open("rb") as file:
                held = _Arrays(file, encoding="bytes").load()
            labels, pixels = np.array(held[b"labels"]), held[b"data"]
        return Labelled(torch.tensor(pixels).view(-1, 3, 32, 32), torch.tensor(labels.astype(np.int64)))

    batches = [read(f"data_batch_{number}") for number in range(1, 6)]
    pixels = torch.cat([batch.images for batch in batches if isinstance(batch.images, Tensor)])
    return Data(
        "CIFAR-10", CIFAR10, Labelled(pixels, torch.cat([batch.labels for batch in batches])), read("test_batch")
    )


def load_folder(folder: Path) -> Data:
    """Images in one folder for each class, or in such folders within train/ and test/ (or val/)."""
    if not (folder / "train").is_dir():
        classes = _classes(folder)
        return Data(folder.name, classes, _files(folder, classes), None)
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    classes = _classes(folder / "train")
    if test is not None and (unknown := set(_classes(test)) - set(classes)):
        raise ValueError(f"--data: {test} has classes that {folder / 'train'} has not: {', '.join(sorted(unknown))}")
    return Data(
        folder.name, classes, _files(folder / "train", classes), None if test is None else _files(test, classes)
    )


def _classes(folder: Path) -> list[str]:
    names = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and _images(inner))
    if len(names) < 2:
        raise ValueError(
            f"--data: {folder} must have a folder of images for each of at least two classes; got {names}. "
            f"Images end in {', '.join(SUFFIXES)}; or give the folder of CIFAR-10's batches"
        )
    return names


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _files(folder: Path, classes: list[str]) -> Labelled:
    found = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
    return Labelled([path for path, _ in found], torch.tensor([label for _, label in found]))


# -- parts -------------------------------------------------------------------------------------------------------------


def split(data: Data, validation: float, test: float) -> dict[str, Labelled]:
    """Train, validation and test, each with its share of every class. The same ones at every call.

    A test part that the data comes with is kept as it is. Without validation, two parts.
    """
    train, held_out = data.train, data.test
    if held_out is None:
        index, rest = stratified(train.labels, test, SPLIT_SEED)
        held_out, train = train.take(rest), train.take(index)
    parts = {"train": train, "test": held_out}
    if validation:
        index, rest = stratified(train.labels, validation, SPLIT_SEED)
        parts |= {"train": train.take(index), "validation": train.take(rest)}
    for name, part in parts.items():
        if not len(part.labels):
            raise ValueError(f"{name} would be empty: there are too few images in each class; give other shares")
    return {name: parts[name] for name in ("train", "validation", "test") if name in parts}


class Part(Protocol):
    """What training and scoring see of a part."""

    labels: Tensor

    def batches(self, size: int, *, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the model takes them, and labels: in training, in random order, altered, and in full batches only."""


class Pixels:
    """Images of one size, all in memory on the device, where a batch is altered as a whole."""

    def __init__(self, part: Labelled, augment: Augment, device: torch.device) -> None:
        assert isinstance(part.images, Tensor)
        self.images, self.labels, self.augment = part.images.to(device), part.labels.to(device), augment

    def batches(self, size: int, *, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for index in _order(len(self.labels), size, train):
            index = index.to(self.labels.device)
            images = self.images[index].float() / 255
            yield self.augment(images) if train else self.augment.normalised(images), self.labels[index]


class Files(Dataset[tuple[Tensor, int]]):
    """Images of any size, each read and altered by itself, on several processes, as timm does it.

    What happens to an image depends on the state of the main process alone, however many processes there are.
    """

    def __init__(self, part: Labelled, augment: Augment, workers: int, device: torch.device) -> None:
        self.part, self.labels, self.workers, self.device = part, part.labels.to(device), workers, device
        self.transforms = {train: augment.timm(train) for train in (False, True)}

    def batches(self, size: int, *, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        seed = int(torch.randint(1 << 31, ())) if train else 0
        items = [[(i, seed, train) for i in index.tolist()] for index in _order(len(self.labels), size, train)]
        workers = min(self.workers, _cores())
        order = DataLoader(self, batch_sampler=items, num_workers=workers, generator=torch.Generator())
        for images, labels in order:
            yield images.to(self.device), labels.to(self.device)

    def __getitem__(self, item: tuple[int, int, bool]) -> tuple[Tensor, int]:
        index, seed, train = item
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            for start in (random.seed, np.random.seed, torch.manual_seed):
                start((seed + 1_000_003 * index) % (1 << 32))
            image = self.transforms[train](_open(self.part.images[index]))
        random.setstate(states[0])
        np.random.set_state(states[1])
        return image, int(self.part.labels[index])


def _order(images: int, size: int, train: bool) -> list[Tensor]:
    """Which images are in each batch; in training full batches of an even number, as mixing takes pairs."""
    if not train:
        return list(torch.arange(images).split(size))
    size = min(size, images - images % 2)
    return [index for index in torch.randperm(images).split(size) if len(index) == size]


def _open(image: Tensor | Path) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as file:
            return file.convert("RGB")
    return Image.fromarray(
        image.permute(1, 2, 0).numpy().squeeze(-1) if len(image) == 1 else image.permute(1, 2, 0).numpy()
    )


def in_memory(part: Labelled, size: int) -> Labelled:
    """The same with files read, as bytes of one size: the middle of each image, resized."""
    if isinstance(part.images, Tensor):
        return part
    images = [np.asarray(ImageOps.fit(_open(path), (size, size))) for path in part.images]
    return Labelled(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), part.labels)


def statistics(part: Labelled) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, which is scaled to values from 0 to 1; those of ImageNet for files."""
    if not isinstance(part.images, Tensor):
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    channels = part.images.movedim(1, 0).flatten(1)
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
    values, total = torch.arange(256) / 255.0, counts.sum(1)
    mean = counts @ values.double() / total
    spread = ((values - mean[:, None]).square() * counts).sum(1) / total
    return tuple(mean.tolist()), tuple(spread.sqrt().clamp(min=1 / 255).tolist())


def _cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
