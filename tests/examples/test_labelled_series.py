from __future__ import annotations

import math
from pathlib import Path

import labelled_series as data
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from tests.closeness import assert_close

HEAD = "# a comment\n@problemName Hills\n@timeStamps false\n@univariate false\n@classLabel true up down\n@data\n"


def labelled(series: list[Tensor]) -> data.Labelled:
    return data.Labelled(series, torch.zeros(len(series), dtype=torch.long), torch.empty(len(series), 0))


# -- files -------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    series = [torch.randn(length, channels, generator=generator) for length in lengths]
    for x in series:
        x[torch.rand(x.shape, generator=generator) < 0.2] = torch.nan
        x[-1, 0] = 1.0  # the last step exists
    lines = []
    for i, x in enumerate(series):
        cells = [",".join("?" if math.isnan(v) else repr(v) for v in column.tolist()) for column in x.T]
        lines.append(":".join([*cells, ("up", "down")[i % 2]]))
    path = tmp_path_factory.mktemp("ts") / "Hills_TRAIN.ts"
    path.write_text("\ufeff" + HEAD + "\n\n".join(lines) + "\n", encoding="utf-8")
    classes, read = data.read_ts(path)
    assert classes == ["up", "down"]
    assert read.labels.tolist() == [i % 2 for i in range(len(series))]
    for own, other in zip(read.series, series, strict=True):
        assert torch.equal(own.nan_to_num(7.0), other.nan_to_num(7.0))


def test_steps_that_make_series_equally_long_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text(HEAD.upper().replace("UP DOWN", "up down") + "1,?,3,NaN,?:up\n?,2,?,?,?:down\n")
    _, read = data.read_ts(tmp_path / "a.ts")
    assert [len(x) for x in read.series] == [3, 2]
    assert read.series[1].isnan()[:, 0].tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2:up\n", "must be a .ts file, whose series come after a line @data"),
        (HEAD, "must hold series after its line @data; it holds none"),
        (HEAD.replace("@timeStamps false", "@timeStamps true"), "holds times beside the values"),
        (HEAD.replace("@classLabel true up down", "@classLabel false"), "must name two classes or more"),
        (HEAD.replace("@classLabel true up down", "@targetLabel true"), "must name two classes or more"),
        (HEAD + "1,2:up\n1,2:left\n", "line 8 of .* is of class 'left', which is not among up down"),
        (HEAD + "1,2:3,4:up\n\n1,2:up\n", "line 9 of .* has 1 dimensions, and the first series has 2"),
        (HEAD + "1,2:3:up\n", r"line 7 of .* as many steps each; got \[1, 2\] steps"),
        (HEAD + "up\n", r"one or more dimensions .*; got \[\] steps"),
        (HEAD + "1,two:up\n", "must hold numbers, or [?] where a value is missing; .*'two'"),
        (HEAD + "?,?:up\n", "must hold a value that was observed"),
        (HEAD + "1,inf:up\n", "and no infinite one"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_ts(tmp_path / "a.ts")


def test_a_data_set_is_a_pair_of_files_that_fit(tmp_path: Path) -> None:
    train, test = tmp_path / "Hills_TRAIN.ts", tmp_path / "Hills_TEST.ts"
    with pytest.raises(ValueError, match=r"has no NAME_TRAIN\.ts"):
        data.load(tmp_path)
    train.write_text(HEAD + "1,2,3:up\n3,2:down\n")
    with pytest.raises(ValueError, match=r"there is no .*Hills_TEST\.ts"):
        data.load(tmp_path)
    test.write_text(HEAD + "1:1:up\n")
    with pytest.raises(ValueError, match=r"the same classes and dimensions; .* 1 dimensions, .* and 2"):
        data.load(tmp_path)
    test.write_text(HEAD + "1,2:up\n")
    known = data.load(tmp_path)
    assert (known.name, known.classes, len(known.train.series), len(known.test.series)) == (
        "Hills",
        ["up", "down"],
        2,
        1,
    )
    (tmp_path / "Hollows_TRAIN.ts").write_text(HEAD)
    with pytest.raises(ValueError, match=r"has Hills_TRAIN\.ts, Hollows_TRAIN\.ts"):
        data.load(tmp_path)


def test_digits_are_columns_from_the_first_with_ink_to_the_last() -> None:
    known = data.load(None)
    assert (len(known.train.series), len(known.test.series), len(known.classes)) == (899, 898, 10)
    for x in known.train.series + known.test.series:
        assert x.shape[1] == 8 and x[0].any() and x[-1].any()
    assert {len(x) for x in known.test.series} > {4, 5, 6, 7, 8}


# -- what a model sees -------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=4), share=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_validation_is_that_share_of_each_class(counts: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    train, held_out = data.stratified(labels, share, seed)
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(len(labels)))
    for label, count in enumerate(counts):
        own = int((labels[held_out] == label).sum())
        assert own <= count - 1 and (abs(own - share * count) <= 0.5 or own == count - 1)
    assert torch.equal(data.stratified(labels, share, seed)[1], held_out)


@given(seed=st.integers(0, 99), scale=st.sampled_from(["train", "series"]), logarithm=st.booleans())
def test_scaling_is_by_train_and_says_the_same_in_any_unit(seed: int, scale: data.Scale, logarithm: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    series = [torch.randn(n, 2, generator=generator, dtype=torch.float64) * 10**n for n in (3, 5, 2, 4)]
    series[1][2, 0] = torch.nan
    parts = {"train": labelled(series[:3]), "test": labelled(series[3:])}
    made = data.scaled(parts, scale, logarithm)
    steps = torch.cat(made["train"].series)
    assert steps.shape == (10, 4 if logarithm else 2)
    assert_close(steps.nanmean(0), torch.zeros_like(steps[0]), scale=float(steps.nan_to_num().abs().max()))
    assert_close(steps.square().nanmean(0), torch.ones_like(steps[0]))
    assert made["train"].static.shape == (3, 2 if scale == "series" else 0)
    unit = torch.tensor([1e-3, 7.0])
    other = data.scaled(
        {k: p._replace(series=[x * unit for x in p.series]) for k, p in parts.items()}, scale, logarithm
    )
    for name in parts:
        for one, two in zip(made[name].series, other[name].series, strict=True):
            assert_close(one, two)
        assert_close(made[name].static, other[name].static)
    changed = data.scaled(parts | {"test": labelled([100 * series[3]])}, scale, logarithm)
    for one, two in zip(changed["train"].series, made["train"].series, strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
    if scale == "series":  # its strength is then told beside the steps
        assert_close(changed["test"].series[0], made["test"].series[0])
        assert not torch.allclose(changed["test"].static, made["test"].static)
    else:
        assert not torch.allclose(changed["test"].series[0], made["test"].series[0])


def test_what_never_varies_does_no_harm() -> None:
    series = [torch.zeros(3, 2), torch.zeros(4, 2)]
    for scale in ("train", "series"):
        made = data.scaled({"train": labelled(series)}, scale, True)["train"]  # type: ignore[arg-type]
        assert all((x == 0).all() for x in [*made.series, made.static])
