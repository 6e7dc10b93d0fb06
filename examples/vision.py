"""Train a Vision Transformer from scratch on small data, and see what it takes for what, and what it looks at.

    python examples/vision.py                                   # handwritten digits, under a minute on 2 cores
    python examples/vision.py --positions none learned sincos rotary relative --seeds 0 1 2     # what positions are worth
    python examples/vision.py --data cifar-10-batches-py --patch 4 --dim 256 --depth 7 --flip --shift 4 ...
    python examples/vision.py --data my-images --size 224 --augment timm --patch 16 ...
    python examples/vision.py --help

The data is the digits that the package scikit-learn ships. --data takes the folder of CIFAR-10's batches, python or binary
version (https://www.cs.toronto.edu/~kriz/cifar.html), or a folder with a folder of images for each class, within train/ and
test/ if there are these. Nothing is downloaded.

Where the data comes without a test part, one is held out, the same for every run. A share of the rest is held out for
validation. The weights that do best on validation are scored once on test. What is written: metrics.jsonl, model.safetensors,
resume.pt (for --resume), confusion.png and attention.png; with several --positions, positions.md; with --pretrain, the first three
of pre-training in a folder pretrain.
"""

from __future__ import annotations

import dataclasses
import math
import time
from statistics import mean, stdev
from typing import Any, NamedTuple

import class_scores as scores
import common
import confusion_figure
import torch
import tyro
import vision_data as data
import vision_figure as figure
import vision_training as training
from torch import Tensor
from vision_augment import Augment
from vision_options import Options, Position

from xformerlib import positions, vision

# -- the task: images, and the model for them --------------------------------------------------------------------------


class Task(NamedTuple):
    """A data set, split, and ready to be trained on."""

    name: str
    classes: list[str]
    size: int
    channels: int
    parts: dict[str, data.Part]


def load(o: Options, device: torch.device) -> Task:
    """The images that were asked for."""
    found = data.load(o.data)
    parts = data.split(found, o.validation, o.test)
    images = parts["train"].images
    if isinstance(images, Tensor):
        if o.size not in (None, images.shape[-1]):
            raise ValueError(f"--size is for a folder of images; these have {images.shape[-1]} pixels: leave it out")
        size, channels, one_by_one = images.shape[-1], images.shape[1], o.augment == "timm"
    elif o.size is None:
        raise ValueError("--size, pixels on each side, must be given for a folder of images; got none")
    else:
        size, channels, one_by_one = o.size, 3, o.augment != "batch"
    if not one_by_one:
        parts = {name: data.in_memory(part, size) for name, part in parts.items()}
    if one_by_one and o.shift is not None:
        raise ValueError("--shift is for --augment batch: timm crops images at random; leave it out")
    shift = size // 8 if o.shift is None else o.shift
    augment = Augment(size, shift, o.flip, o.rand_augment, o.erase, *data.statistics(parts["train"]))
    made: dict[str, data.Part] = {
        name: data.Files(part, augment, o.workers, device) if one_by_one else data.Pixels(part, augment, device)
        for name, part in parts.items()
    }
    return Task(found.name, found.classes, size, channels, made)


def tokenizer(o: Options, task: Task) -> vision.Tokenizer:
    """What makes tokens of such images."""
    if o.patch is None:
        return vision.ConvStem(o.dim, layers=o.stem or 1, channels=task.channels)
    return vision.PatchEmbed(o.dim, o.patch, channels=task.channels)


def build(o: Options, task: Task, position: Position) -> vision.ViT:
    """The model for such images, with a position."""
    embed = tokenizer(o, task)
    grid = embed.grid((task.size, task.size))
    made: dict[Position, Any] = {
        "none": lambda: None,
        "learned": lambda: "learned",
        "sincos": lambda: positions.Sinusoidal(o.dim),
        "rotary": lambda: positions.Rotary(o.dim // o.heads, theta=100.0, coordinates="normalized"),
        "relative": lambda: lambda: positions.RelativeBias(o.heads, size=grid, prefix=o.pool == "token"),
    }
    return vision.ViT(
        len(task.classes), size=task.size, embed=embed, dim=o.dim, depth=o.depth, heads=o.heads,
        class_token=o.pool == "token", pool=o.pool, position=made[position](), dropout=o.dropout, drop_path=o.drop_path,
    )  # fmt: skip


# -- the run -----------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came of one run."""

    position: Position
    validation: float
    test: float
    seconds: float


def main(o: Options) -> None:
    began = time.perf_counter()
    with common.plain_errors():
        o.check()
        device = common.choose_device(o.device)
        task = load(o, device)
        sizes = {position: common.count_parameters(build(o, task, position)) for position in o.positions}
    torch.set_num_threads(o.threads)
    grid = tokenizer(o, task).grid((task.size, task.size))
    print(describe(task, grid, sizes, device))
    results = [run_one(o, task, position, seed, device) for position in o.positions for seed in o.seeds]
    if len(o.positions) > 1:
        table = compared(results, sizes)
        print(f"\n{table}")
        with common.replacing(o.run / "positions.md") as path:
            path.write_text(table + "\n", encoding="utf-8")
    elif len(results) > 1:
        print(f"test accuracy over {len(results)} seeds: {spread([result.test for result in results])}")
    print(f"{time.perf_counter() - began:.0f} seconds")


def run_one(o: Options, task: Task, position: Position, seed: int, device: torch.device) -> Result:
    """Train with one position and seed, score once on test, and draw."""
    folders = [position] if len(o.positions) > 1 else []
    run, own = common.own_run(dataclasses.replace(o, positions=(position,)), seed, *folders)
    common.seed_everything(seed)
    model = build(o, task, position).to(device)
    if o.pretrain and not (own.resume and run.state.exists()):
        before = common.Run(run.directory / "pretrain", run.options)
        goes_on = o.resume and (before.state.exists() or run.directory == o.run)
        if not goes_on:
            run.begin()  # of what an earlier run has left, --resume must not take anything for this one's
        training.pretrain(model, task.parts["train"], before, own, resume=goes_on)
        own = dataclasses.replace(own, resume=False)
    best, spent = training.train(model, task.parts, len(task.classes), run, own)

    # The weights that did best on validation, scored once on every test image.
    run.load_weights(model)
    course = run.records()
    ours = training.score(model, task.parts["test"], o)
    run.log(epoch=o.epochs, test_accuracy=ours.accuracy, test_loss=ours.loss, seconds=spent)
    title = f"{task.name}: {ours.accuracy:.1%} of test right"
    confusion_figure.draw(run.directory / "confusion.png", title, task.classes, ours.confusion.numpy(), course)
    figure.draw(run.directory / "attention.png", model, *next(task.parts["test"].batches(8, train=False)), task.classes)
    print(f"\n{scores.summary(task.classes, ours, 'images')}")
    print(f"\n{position}, seed {seed}, {spent:.0f} seconds; in {run.directory}: {run.written()}")
    return Result(position, best, ours.accuracy, spent)


# -- words -------------------------------------------------------------------------------------------------------------


def describe(task: Task, grid: tuple[int, ...], sizes: dict[Position, int], device: torch.device) -> str:
    """What is about to be trained, and on what."""
    counts = ", ".join(f"{name} {len(part.labels):,}" for name, part in task.parts.items())
    tokens = " x ".join(map(str, grid))
    few = "" if min(grid) > 2 else ", which is little for attention: give a smaller --patch, or fewer convolutions"
    models = ", ".join(f"{position} {parameters:,}" for position, parameters in sizes.items())
    return (
        f"data     {task.name}: {len(task.classes)} classes, {task.size} x {task.size} pixels\n"
        f"images   {counts}; each {tokens} tokens{few}\n"
        f"model    ViT, parameters by position: {models}; on {device}"
    )


def compared(results: list[Result], sizes: dict[Position, int]) -> str:
    """A table of positions: accuracies over the seeds, in Markdown."""
    lines = ["| position | parameters | validation | test | seconds |", "|---|---|---|---|---|"]
    for position, parameters in sizes.items():
        own = [result for result in results if result.position == position]
        validation, test = (spread([getattr(result, name) for result in own]) for name in ("validation", "test"))
        seconds = mean(result.seconds for result in own)
        lines.append(f"| {position} | {parameters:,} | {validation} | {test} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation; a dash where nothing was measured."""
    if not math.isfinite(values[0]):
        return "-"
    return f"{mean(values):.2%}" + (f" +- {stdev(values):.2%}" if len(values) > 1 else "")


if __name__ == "__main__":
    main(tyro.cli(Options))
