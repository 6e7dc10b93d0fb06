"""What holds of every example: its command runs, its help is whole, and a run that was cut off ends as if it never was."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import common
import pytest
import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The same without what differs from one run to the next."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(run)]


def run_command(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example as its users do, from the root of the repository."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def assert_written(run: Path, *pictures: str) -> None:
    """A run has left its files, and nothing else."""
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "model.safetensors", "resume.pt", *pictures}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def assert_command_trains(
    script: str, run: Path, options: str, says: tuple[str, ...], pictures: tuple[str, ...]
) -> None:
    """A command of two epochs shows how far it is, says what it does, and writes a line for each epoch and one of the test."""
    done = run_command(script, *options.split(), "--epochs", "2", "--run", str(run))
    assert "2/2" in done.stderr  # the progress bar
    for word in (*says, *pictures, "test accuracy"):
        assert word in done.stdout
    assert_written(run, *pictures)
    assert [record["epoch"] for record in records(run)] == [1, 2, 2]


def assert_help_explains(options: type, capsys: pytest.CaptureFixture[str]) -> None:
    """--help says of every option what it is."""
    with pytest.raises(SystemExit) as stop:
        tyro.cli(options, args=["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(options):
        explained = re.search(rf"--{field.name.replace('_', '-')},? [A-Z{{\[-]\S+(.*?)\(default:", text)
        assert explained and len(explained[1].split()) >= 2, field.name


def assert_refused(main: Callable[[Any], object], options: Any, message: str) -> None:
    """The options are refused with a message alone, before anything is written."""
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(options)
    assert not options.run.exists()


def cut_off(
    main: Callable[[Any], object],
    options: Any,
    monkeypatch: pytest.MonkeyPatch,
    saved: int,
    moment: Literal["before", "after"] = "after",
) -> None:
    """Run until the state is saved for the time that ``saved`` counts, and stop just before it is written, or just after."""
    save_state, calls = common.Run.save_state, []

    def stop(run: common.Run, *args: Any, **values: float) -> None:
        calls.append(run)
        if len(calls) < saved or moment == "after":
            save_state(run, *args, **values)
        if len(calls) == saved:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            main(options)


def assert_continued(
    main: Callable[[Any], object],
    whole: Any,
    monkeypatch: pytest.MonkeyPatch,
    saved: int,
    moment: Literal["before", "after"] = "after",
) -> None:
    """A run that was cut off and continued ends as the whole one: the same metrics, weights, state and random numbers."""
    parted = dataclasses.replace(whole, run=whole.run.with_name("parted"))
    main(whole)
    cut_off(main, parted, monkeypatch, saved, moment)
    torch.rand(5)
    main(dataclasses.replace(parted, resume=True))
    assert untimed(parted.run) == untimed(whole.run)
    assert (parted.run / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    ends = [torch.load(options.run / "resume.pt", weights_only=True) for options in (whole, parted)]
    for end in ends:
        del end["random"]["python"]  # the type checks of tests draw from it, to look at one item of a sequence
    for name in ("step", "parts", "random", "options"):
        for one, other in zip(*(tree_leaves(end[name]) for end in ends), strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_seeds_are_runs(main: Callable[[Any], object], options: Any) -> None:
    """With several seeds each has a run of its own, that of the seed alone; one that was never begun is begun by --resume."""
    main(dataclasses.replace(options, seeds=(0, 1)))
    first, second = (untimed(options.run / f"seed-{seed}") for seed in (0, 1))
    assert first != second
    alone = dataclasses.replace(options, seeds=(1,), run=options.run.with_name("alone"))
    main(alone)
    assert untimed(alone.run) == second
    for path in (options.run / "seed-1").iterdir():
        path.unlink()
    main(dataclasses.replace(options, seeds=(0, 1), resume=True))
    assert [untimed(options.run / f"seed-{seed}") for seed in (0, 1)] == [first, second]
