from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from torch import nn


@given(warmup=st.integers(0, 20), steps=st.integers(1, 60))
def test_the_schedule_rises_to_the_full_rate_and_falls_to_zero(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = common.cosine_schedule(optimizer, warmup=warmup, steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert min(rates) > 0 and max(rates) <= 0.5
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    if steps > warmup:
        assert max(rates) == 0.5
        assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with common.replacing(path) as beside:
        beside.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

    def cut_off() -> None:
        with common.replacing(path) as beside:
            beside.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    common.seed_everything(3)
    torch.save(common.random_state(), tmp_path / "state")
    first = draw()
    assert draw() != first
    common.set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first
    common.seed_everything(3)
    assert draw() == first


def test_parameters_are_counted_where_they_are_trained() -> None:
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    assert common.count_parameters(layer) == 12


def test_weights_carry_the_options_that_made_them(tmp_path: Path) -> None:
    run = common.Run(tmp_path / "new" / "run", {"dim": "3"})
    run.begin()
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    run.save_weights(model)
    run.load_weights(other)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    with safe_open(run.weights, "pt") as file:
        assert json.loads(file.metadata()["options"]) == {"dim": "3"}


def test_a_new_run_clears_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    run = common.Run(tmp_path, {})
    (tmp_path / "notes.txt").write_text("mine")
    run.log(step=1)
    run.save_state(1, {})
    run.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_drops_metrics_from_after_the_saved_state(tmp_path: Path) -> None:
    run = common.Run(tmp_path, {})
    run.log(step=1)
    run.save_state(1, {}, best=0.5)
    run.log(step=2)
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "tr')  # cut off within a line
    assert run.resume({}) == (1, {"best": 0.5})
    run.log(step=2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_resuming_needs_a_run_with_the_same_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*resume\.pt; leave --resume out"):
        common.Run(tmp_path, {}).resume({})
    common.Run(tmp_path, {"lr": "0.1", "dim": "8"}).save_state(1, {})
    with pytest.raises(ValueError, match=r"got lr='0.1' then, '0.2' now; give the same options"):
        common.Run(tmp_path, {"lr": "0.2", "dim": "8"}).resume({})


def test_devices() -> None:
    assert common.choose_device("cpu") == torch.device("cpu")
    assert common.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match="--device must be auto or a device of this machine"):
            common.choose_device(name)


def test_only_errors_of_the_user_are_told_without_a_traceback() -> None:
    def fail(error: Exception) -> None:
        with common.plain_errors():
            raise error

    with pytest.raises(SystemExit, match="error: radius must be"):
        fail(ValueError("radius must be >= 0"))
    with pytest.raises(RuntimeError):
        fail(RuntimeError("a fault of ours"))


@dataclass(frozen=True)
class Numbers:
    batch_size: float | None = 1
    share: float | None = 0.5
    seeds: tuple[int, ...] = (0,)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (lambda o: common.check_least(o, 1, "batch_size"), {"batch_size": 0}, "--batch-size must be >= 1; got 0"),
        (lambda o: common.check_least(o, 1, "batch_size"), {"batch_size": math.nan}, "--batch-size must be >= 1; got nan"),
        (lambda o: common.check_positive(o, "share"), {"share": 0.0}, "--share must be > 0; got 0.0"),
        (lambda o: common.check_shares(o, "share"), {"share": 1.0}, r"--share must be in \[0, 1\); got 1.0"),
        (lambda o: common.check_shares(o, "share"), {"share": -0.1}, r"--share must be in \[0, 1\); got -0.1"),
        (lambda o: common.check_different(o, "seeds"), {"seeds": ()}, r"--seeds must be one or several different ones"),
        (lambda o: common.check_different(o, "seeds"), {"seeds": (1, 1)}, r"got \(1, 1\)"),
        (lambda o: common.check_different(o, "seeds"), {"seeds": (0, -1)}, r"--seeds must be 0 or above; got \(0, -1\)"),
    ],
)  # fmt: skip
def test_options_are_checked_one_by_one(check: Callable[[Numbers], None], given: dict[str, Any], message: str) -> None:
    check(Numbers())
    with pytest.raises(ValueError, match=message):
        check(Numbers(**given))


def test_options_that_were_not_given_pass() -> None:
    common.check_least(Numbers(batch_size=None), 1, "batch_size")
    common.check_shares(Numbers(share=None), "share")


@dataclass(frozen=True)
class Options:
    run: Path
    seeds: tuple[int, ...] = (0,)
    resume: bool = False
    lr: float = 0.1


def test_a_run_among_several_has_a_directory_of_its_own_and_is_begun_if_it_never_was(tmp_path: Path) -> None:
    run, own = common.own_run(Options(tmp_path), 0)
    assert run.directory == tmp_path == own.run and run.options == {"lr": "0.1", "seed": "0"}
    assert common.own_run(Options(tmp_path, resume=True), 0)[
        1
    ].resume  # and is refused, as there is nothing to continue
    run, own = common.own_run(Options(tmp_path, seeds=(0, 3), resume=True), 3, "rotary")
    assert run.directory == tmp_path / "rotary" / "seed-3" == own.run and not own.resume
    run.begin()
    run.save_state(1, {})
    assert common.own_run(Options(tmp_path, seeds=(0, 3), resume=True), 3, "rotary")[1].resume
    assert not common.own_run(Options(tmp_path, seeds=(0, 3)), 3, "rotary")[1].resume
