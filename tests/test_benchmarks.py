"""The benchmarks run: every line, at sizes that say nothing about speed; and what they measure is what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _measure, graphs
from benchmarks.__main__ import LINES, main
from benchmarks._measure import Line, Setting, Side, Target, Work, check_agreement, fastest, memory

SETTING = Setting(quick=True, rounds=1)
ROOF = {"flops": 1e10, "bytes": 1e10}


def work(scale: float = 1.0, peer: Side | str | None = None) -> Work:
    x = torch.ones(4, requires_grad=True)
    return Work(Side(lambda: scale * x, [x], torch.ones(4)), peer, "sdpa", 1e6, 16)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyG and timm at import
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_line_runs_and_agrees_with_its_peer(line: Line) -> None:
    row = _measure.measure(line, SETTING, ROOF)
    absent = line.peer.endswith("on CUDA")  # not here, and the line says so
    assert (row["missing"] is not None) == absent
    assert row["seconds"] > 0
    assert (row["faster"] is None) == (line.peer == "-" or absent)
    assert row["kernel"] in ("sdpa", "windowed", "blocks", "packed", "sparse", "chunked", "-")  # "-": no attention
    json.dumps(row)


def test_names_are_unique() -> None:
    assert len({line.name for line in LINES}) == len(LINES)


def test_main_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "measured.json"
    assert main(["--quick", "--rounds", "1", "--threads", "1", "--only", "plan", "dense-vit", "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert [row["name"] for row in saved["lines"]] == ["plan", "dense-vit"]
    assert saved["machine"]["torch"] == torch.__version__ and saved["machine"]["matmul_gflops"] > 0
    printed = capsys.readouterr().out
    assert "dense-vit" in printed and "target" in printed


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit, match="--only"):
        main(["--only", "nothing-like-it"])


def test_a_failing_line_fails_the_run_but_not_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(setting: Setting) -> Work:
        raise RuntimeError("no such thing")

    lines = (Line("a", "", "-", broken), Line("b", "", "-", lambda setting: work()))
    monkeypatch.setattr(sys.modules["benchmarks.__main__"], "LINES", lines)
    assert main(["--quick", "--rounds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no such thing" in printed and "\nb " in printed


def test_a_missing_peer_is_said_to_be_missing() -> None:
    def peer() -> Side:
        raise ModuleNotFoundError("No module named 'nobody'", name="nobody")

    line = Line("a", "", "nobody's", lambda setting: work(peer=_measure.installed(peer)), Target(faster=2))
    row = _measure.measure(line, SETTING, ROOF)
    assert "nobody is not installed" in row["missing"]
    assert row["faster"] is None and row["reached"] is None


def test_sides_that_disagree_are_an_error() -> None:
    other = work(scale=1.01).ours
    with pytest.raises(AssertionError, match="different outputs"):
        _measure.measure(Line("a", "", "b", lambda setting: work(peer=other)), SETTING, ROOF)


@pytest.mark.parametrize("wrong", [math.nan, 3.0])
def test_gradients_are_compared_too(wrong: float) -> None:
    side, right = work().ours, torch.ones(4)
    with pytest.raises(AssertionError, match="gradients of input 0"):
        check_agreement(side, side, (right, right), (right, torch.full((4,), wrong)))


@pytest.mark.parametrize("elements", [2**12, 2**16])
def test_memory_is_the_peak_of_what_was_allocated(elements: int) -> None:
    x, kept = torch.ones(elements), []

    def step() -> tuple[torch.Tensor, ...]:
        y = x + 1
        y = y * 2  # two are held here
        kept.append(x.clone())
        return (y,)

    most, lasting, (result,) = memory(step, SETTING)
    assert result[0] == 4
    assert 0 <= most - 2 * 4 * elements < 64  # numbers become tensors, too
    assert lasting == 4 * elements


def test_tensors_made_beforehand_count_as_memory() -> None:
    side = work().ours
    peer = Side(side.forward, side.inputs, side.grad, held=[torch.ones(1000)])
    row = _measure.measure(Line("a", "", "b", lambda setting: work(peer=peer)), SETTING, ROOF)
    assert row["peer_bytes"] == row["bytes"] + 4000


def test_fastest_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now, took = [0.0], iter([5, 7, 3, 9, 4, 8])

    def step(name: str) -> None:
        calls.append(name)
        now[0] += next(took) / 64

    monkeypatch.setattr(_measure.time, "perf_counter", lambda: now[0])
    best, rounds = fastest([lambda: step("a"), lambda: step("b")], Setting(rounds=3))
    assert calls == ["a", "b"] * 3 and rounds == 3
    assert best == [3 / 64, 7 / 64]


@pytest.mark.parametrize(
    ("target", "row", "reached"),
    [
        (Target(faster=2), {"faster": 2.0}, True),
        (Target(faster=2, smaller=3), {"faster": 2.5, "smaller": 2.9}, False),
        (Target(bytes=100), {"bytes": 101}, False),
        (Target(seconds=1), {"seconds": 0.5}, True),
        (Target(faster=2), {"faster": None}, None),
        (Target(), {}, None),
    ],
)
def test_targets(target: Target, row: dict[str, Any], reached: bool | None) -> None:
    assert target.reached(row) is reached


def test_sizes_of_graphs_have_the_statistics_of_their_data_sets() -> None:
    zinc, proteins = graphs.zinc_sizes(128).double(), graphs.protein_sizes(128).double()
    assert zinc.min() >= 9 and zinc.max() <= 37 and abs(zinc.mean() - 23) < 1
    assert proteins.min() >= 4 and proteins.max() == 620 and abs(proteins.mean() - 39) < 4
    assert proteins.median() < 30  # a long tail


def test_edges_are_all_different() -> None:
    edges = graphs.unique_edges(50, 1000, torch.arange(1, 51) ** -1.0)
    assert edges.shape == (2, 1000) and edges.unique(dim=1).shape == (2, 1000)
    assert torch.bincount(edges[1], minlength=50)[:5].sum() > torch.bincount(edges[1], minlength=50)[-5:].sum()
