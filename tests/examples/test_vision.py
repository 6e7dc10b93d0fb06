from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import common
import confusion_figure
import numpy as np
import pytest
import torch
import vision as example
import vision_augment as augment
import vision_data as data
import vision_figure as figure
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves
from vision_options import Options

from tests.closeness import assert_close
from tests.examples import checks

TINY = Options(dim=8, depth=1, heads=2, epochs=2, batch_size=16, threads=1, workers=0, test=0.9)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at something else: drawing takes longer than training."""
    monkeypatch.setattr(figure, "draw", lambda *_: None)
    monkeypatch.setattr(confusion_figure, "draw", lambda *_: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red and blue images of several sizes, with noise."""
    noise = np.random.default_rng(0)
    for label, colour in enumerate(("blue", "red")):
        for index in range(10):
            pixels = noise.integers(0, 60, (16 + index, 20, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * label] += 150
            path = tmp_path / "images" / colour / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


# -- the whole script --------------------------------------------------------------------------------------------------


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    says, pictures = ("digits: 10 classes, 8 x 8 pixels", "4 x 4 tokens"), ("attention.png", "confusion.png")
    options = "--test 0.9 --batch-size 16 --threads 1"
    checks.assert_command_trains("vision.py", tmp_path / "run", options, says, pictures)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    checks.assert_help_explains(Options, capsys)


def test_a_trained_model_knows_most_digits(tmp_path: Path, no_picture: None) -> None:
    example.main(dataclasses.replace(TINY, dim=32, epochs=6, test=0.2, lr=1e-2, run=tmp_path))
    assert checks.records(tmp_path)[-1]["test_accuracy"] > 0.8


@pytest.mark.parametrize(
    "options",
    [{}, {"ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "rand_augment": 9, "erase": 0.5, "flip": True, "dropout": 0.1}],
)
def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, epochs=3, **options, run=tmp_path / "whole")
    checks.assert_continued(example.main, whole, monkeypatch, saved=2)


@pytest.mark.parametrize("saved", [1, 3])
def test_pre_training_is_continued_where_it_was(
    saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, patch=2, pretrain=2, run=tmp_path / "whole")
    checks.assert_continued(example.main, whole, monkeypatch, saved)
    losses = [record["train_loss"] for record in checks.records(whole.run / "pretrain")]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_what_an_earlier_run_has_left_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    options = dataclasses.replace(TINY, patch=2, pretrain=2, run=tmp_path / "run")
    example.main(options)
    checks.cut_off(example.main, options, monkeypatch, saved=1)  # in pre-training
    assert not (options.run / "metrics.jsonl").exists()
    (options.run / "pretrain" / "resume.pt").unlink()
    with pytest.raises(SystemExit, match="error: --resume continues a run, but there is no"):
        example.main(dataclasses.replace(options, resume=True))


def test_several_seeds_are_several_runs(tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]) -> None:
    checks.assert_seeds_are_runs(example.main, dataclasses.replace(TINY, epochs=1, run=tmp_path / "run"))
    assert "test accuracy over 2 seeds" in capsys.readouterr().out


def test_positions_are_compared_in_a_table(
    tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names: Any = ("none", "learned", "sincos", "rotary", "relative")
    options = dataclasses.replace(TINY, epochs=1, positions=names, seeds=(0, 1), run=tmp_path, patch=2, test=0.95)
    example.main(options)
    table = (tmp_path / "positions.md").read_text()
    assert table.strip() in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(names)
    sizes = {row[0]: int(row[1].replace(",", "")) for row in rows}
    assert sizes["none"] == sizes["sincos"] == sizes["rotary"]
    assert sizes["learned"] == sizes["none"] + 17 * 8 and sizes["relative"] == sizes["none"] + 2 * (7 * 7 + 3)
    accuracy = [checks.records(tmp_path / "rotary" / f"seed-{seed}")[-1]["test_accuracy"] for seed in (0, 1)]
    assert rows[3][3].startswith(f"{np.mean(accuracy):.2%} +- ")
    # What is done is not done again, and what was never begun is begun.
    (tmp_path / "relative" / "seed-1" / "resume.pt").unlink()
    example.main(dataclasses.replace(options, resume=True))
    assert (tmp_path / "positions.md").read_text().split("|")[:18] == table.split("|")[:18]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["batch", "timm"])
def test_a_folder_of_images(way: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = dataclasses.replace(
        TINY, data=folder, size=16, patch=8, augment=way, epochs=8, lr=1e-2, batch_size=4, validation=0.0, test=0.2,
        pool="mean", drop_path=0.0, run=tmp_path / "run",
    )  # fmt: skip
    example.main(options)
    out = capsys.readouterr().out
    assert "images: 2 classes, 16 x 16 pixels" in out and "train 16, test 4" in out
    assert "is little for attention" in out  # 2 x 2 tokens
    assert checks.records(tmp_path / "run")[-1]["test_accuracy"] == 1.0
    assert (tmp_path / "run" / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_images_one_by_one_are_altered_alike_by_any_number_of_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = data.load(folder).train
    made = augment.Augment(16, 0, True, 9, 0.5, (0.5,) * 3, (0.2,) * 3)
    results = []
    for workers, cores in ((0, 2), (2, 2), (2, 1)):  # torch warns of more processes than there are cores
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        common.seed_everything(3)
        files = data.Files(part, made, workers, torch.device("cpu"))
        results.append([*files.batches(6, train=True), *files.batches(20, train=False), torch.rand(1)])
    for one, *others in zip(*(tree_leaves(result) for result in results), strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert [len(images) for images, _ in results[0][:-1]] == [6, 6, 6, 20]


def test_train_and_test_of_a_folder_are_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "val" / "red").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "set" / "val" / "red" / "one.PNG")
    with pytest.raises(ValueError, match="at least two classes; got \\['red'\\]"):
        data.load(tmp_path / "set")
    (tmp_path / "set" / "val" / "blue").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "set" / "val" / "blue" / "two.jpg")
    found = data.load(tmp_path / "set")
    parts = data.split(found, 0.2, 0.5)
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 16, "validation": 4, "test": 2}
    assert data.in_memory(parts["test"], 4).images.shape == (2, 3, 4, 4)
    (tmp_path / "set" / "val" / "red").rename(tmp_path / "set" / "val" / "green")
    with pytest.raises(ValueError, match=r"has classes that .* has not: green"):
        data.load(tmp_path / "set")


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_both_versions_of_cifar10(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    labels = np.arange(24).reshape(6, 4) % 10
    for name, x, y in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], pixels, labels, strict=True):
        if suffix:
            np.concatenate([y[:, None].astype(np.uint8), x], 1).tofile(folder / f"{name}.bin")
        else:
            (folder / name).write_bytes(pickle.dumps({b"labels": y.tolist(), b"data": x}))
    found = data.load(tmp_path)
    assert found.name == "CIFAR-10" and found.test is not None
    assert isinstance(found.train.images, Tensor) and isinstance(found.test.images, Tensor)
    assert found.train.labels.tolist() == labels[:5].flatten().tolist()
    assert torch.equal(found.train.images, torch.tensor(pixels[:5]).reshape(20, 3, 32, 32))
    assert torch.equal(found.test.images, torch.tensor(pixels[5]).reshape(4, 3, 32, 32))
    (folder / f"data_batch_4{suffix}").unlink()
    with pytest.raises(ValueError, match=f"but no data_batch_4{suffix}"):
        data.load(tmp_path)


def test_a_batch_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": os.system}))
    with pytest.raises(ValueError, match=r"a batch of CIFAR-10 holds arrays; got posix\.system"):
        data.load(tmp_path)


@given(validation=st.floats(0, 0.5), test=st.floats(0.05, 0.5))
def test_parts_share_no_image_and_are_the_same_every_time(validation: float, test: float) -> None:
    labels = torch.arange(200) % 4
    found = data.Data("", list("abcd"), data.Labelled([Path(str(i)) for i in range(200)], labels), None)
    validation = 0.0 if validation < 0.05 else validation
    parts, again = (data.split(found, validation, test) for _ in range(2))
    assert parts.keys() == {"train", "test"} | ({"validation"} if validation else set())
    files = [[int(str(path)) for path in part.images] for part in parts.values()]
    assert sorted(index for part in files for index in part) == list(range(200))
    for name, part in parts.items():
        assert part.images == again[name].images
        assert torch.equal(part.labels, torch.tensor([int(str(path)) for path in part.images]) % 4)
    assert parts["test"].labels.bincount().tolist() == [round(test * 50)] * 4


def test_training_takes_full_batches_of_an_even_number_and_scoring_takes_all() -> None:
    for images, size, batches in ((10, 4, [4, 4]), (7, 64, [6]), (64, 64, [64])):
        order = data._order(images, size, True)
        assert [len(index) for index in order] == batches
        assert len(set(torch.cat(order).tolist())) == sum(batches)
        assert torch.equal(torch.cat(data._order(images, size, False)), torch.arange(images))


# -- what training sees ------------------------------------------------------------------------------------------------


def test_a_shifted_image_is_a_crop_of_the_padded_one() -> None:
    images = torch.rand(40, 2, 5, 6)
    moved = augment.shifted(images, 2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = set()
    for image, whole in zip(moved, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(whole[:, i : i + 5, j : j + 6], image)]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 10


def test_about_half_of_the_images_are_mirrored() -> None:
    images = torch.rand(200, 1, 2, 3)
    turned = augment.flipped(images, True)
    same = (turned == images).flatten(1).all(1)
    assert torch.equal(turned[~same], images[~same].flip(-1)) and 60 < int(same.sum()) < 140


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_stays_in_range_and_changes_most_images(channels: int) -> None:
    images = torch.rand(200, channels, 8, 8)
    changed = augment.rand_augment(images, 9)
    assert changed.shape == images.shape and changed.isfinite().all()
    assert float(changed.min()) >= -1e-6 and float(changed.max()) <= 1 + 1e-6
    assert ((changed - images).abs().flatten(1).amax(1) > 0.05).float().mean() > 0.9


def test_erased_rectangles_have_the_sizes_that_were_asked_for() -> None:
    images = torch.full((400, 1, 32, 32), 9.0)
    gone = augment.erased(images, 0.5) != 9
    share = gone.flatten(1).float().mean(1)
    assert 0.35 < float((share > 0).float().mean()) < 0.65
    assert float(share.max()) < 0.36 and float(share[share > 0].min()) > 0.01
    for rows, columns in ((one.any(1), one.any(0)) for one in gone[:50, 0]):
        assert int(rows.sum()) * int(columns.sum()) == int((rows[:, None] & columns).sum())
    assert torch.equal(augment.erased(images, 0.0), images)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("nowhere")}, "--data must be a folder; there is no folder nowhere"),
        ({"data": checks.ROOT / "README.md"}, r"README\.md is a file: unpack it first"),
        ({"data": checks.ROOT / "docs"}, "must have a folder of images for each of at least two classes"),
        ({"size": 16}, "--size is for a folder of images; these have 8 pixels"),
        ({"patch": 3}, r"multiples of patch=\(3, 3\); got \(8, 8\)"),
        ({"patch": 2, "stem": 1}, "--patch and --stem both say how tokens are made"),
        ({"patch": 0}, "--patch must be >= 1; got 0"),
        ({"dim": 9}, "--heads must divide --dim; got --heads 2, --dim 9"),
        ({"augment": "timm", "shift": 1}, "--shift is for --augment batch"),
        ({"pretrain": 1}, "--pretrain hides patches .* give their size with --patch"),
        ({"mask_ratio": 1.0}, "--mask-ratio must be between 0 and 1"),
        ({"validation": 1.0}, r"--validation must be in \[0, 1\)"),
        ({"test": 0.0}, "test would be empty"),
        ({"rand_augment": 11}, "--rand-augment must be from 0 to 10"),
        ({"mixup": -1.0}, "--mixup must be >= 0; got -1"),
        ({"cutmix": 1.0, "batch_size": 7}, "--batch-size must be even; got 7"),
        ({"lr": 0.0}, "--lr must be > 0; got 0"),
        ({"layer_decay": 2.0}, r"--layer-decay must be in \(0, 1\]; got 2"),
        ({"seeds": (1, 1)}, "--seeds must be one or several different ones"),
        ({"positions": ()}, "--positions must be one or several different ones"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
        ({"resume": True}, "--resume continues a run, but there is no"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"run": tmp_path / "run", **options}
    checks.assert_refused(example.main, dataclasses.replace(TINY, **given), message)


def test_a_folder_needs_a_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--size, pixels on each side, must be given for a folder"):
        example.main(dataclasses.replace(TINY, data=folder, test=0.3, validation=0.2, run=tmp_path / "run"))


def test_the_mean_of_weights_follows_quickly_at_first() -> None:
    import vision_training as training

    mean, weights = torch.zeros(()), torch.ones(())
    step = training.averaging(0.9)
    for index in range(200):
        mean = step(mean, weights, torch.tensor(index))
        assert_close(mean if index == 0 else torch.tensor(0.9), torch.tensor(0.9))
    assert_close(mean, torch.ones(()))
