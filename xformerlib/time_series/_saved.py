"""A fitted Forecaster as one file: tensors, and everything else as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import shown
from ._arrays import ArrayLabels
from ._conformal import Conformal
from ._fitting import Covariates, Fitted
from ._frames import FrameLabels
from ._heads import Head, Point, Quantile, StudentT
from ._inputs import ForecastModel
from ._panel import Labels, Panel
from ._training import Evaluation, Scores

if TYPE_CHECKING:
    from ._forecaster import Forecaster

FORMAT = 1
PLAIN = (str, int, float, bool, type(None))
KEPT = (
    "lookback", "horizon", "freq", "past", "future", "static", "calendar", "head", "validation", "progress"
)  # fmt: skip


def save(forecaster: Forecaster, path: str | os.PathLike[str]) -> None:
    """Write a file beside ``path``, and put it there once it is complete."""
    fitted, panel = forecaster.fitted, forecaster.fitted.panel
    about = {
        "format": FORMAT,
        **_arguments(forecaster),
        "channels": fitted.model.channels,
        "labels": panel.labels.plain(),
        "lengths": panel.lengths,
        "evaluations": fitted.evaluations,
    }
    tensors = {
        "values": torch.cat(panel.values),
        "future": None if panel.future is None else torch.cat(panel.future),
        "static": panel.static,
        "level": panel.level,
        "scale": panel.scale,
        "future_scale": fitted.covariates.future,
        "static_scale": fitted.covariates.static,
        "conformal": None if fitted.conformal is None else fitted.conformal.widths,
    }
    weights = {name: value.cpu() for name, value in fitted.model.state_dict().items()}
    with _replacing(Path(_checked_path(path))) as beside:
        torch.save({"about": json.dumps(about), "weights": weights, "tensors": tensors}, beside)


@dataclass(frozen=True)
class Saved:
    """What a file holds: arguments of a Forecaster, and what its fitting left behind."""

    arguments: dict[str, Any]
    about: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Any]

    @property
    def channels(self) -> int:
        """How many targets the model has."""
        return int(self.about["channels"])

    def fitted(self, model: ForecastModel) -> Fitted:
        """The same again, with a new model that takes over the weights."""
        tensors, lengths = self.tensors, self.about["lengths"]
        panel = Panel(
            values=list(tensors["values"].split(lengths)),
            future=None if tensors["future"] is None else list(tensors["future"].split(lengths)),
            static=tensors["static"],
            labels=_labels(**self.about["labels"]),
            level=tensors["level"],
            scale=tensors["scale"],
        )
        model.load_state_dict(self.weights)
        return Fitted(
            model=model.eval(),
            panel=panel,
            covariates=Covariates(tensors["future_scale"], tensors["static_scale"]),
            conformal=None if tensors["conformal"] is None else Conformal(tensors["conformal"]),
            evaluations=[_evaluation(*one) for one in self.about["evaluations"]],
        )


def load(path: str | os.PathLike[str], absent: dict[str, Any]) -> Saved:
    """Read a file; ``absent`` are the arguments that could not be written."""
    file = torch.load(_checked_path(path), map_location="cpu", weights_only=True)
    about = json.loads(file["about"]) if isinstance(file, dict) and "about" in file else {}
    if about.get("format") != FORMAT:
        raise ValueError(f"path must be a file that Forecaster.save has written, of format {FORMAT}; got {path}")
    if set(about["absent"]) != absent.keys():
        raise TypeError(
            f"load must be given exactly the arguments that could not be written, {about['absent']}; got {sorted(absent)}"
        )
    arguments = {**about["arguments"], **absent}
    if "model" in about["named"]:
        from .. import time_series

        arguments["model"] = getattr(time_series, about["named"]["model"])
    if "head" in about["named"]:
        arguments["head"] = _head(*about["named"]["head"])
    return Saved(arguments, about, file["weights"], file["tensors"])


def _checked_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a file, a string or a pathlib.Path; got path={shown(path)}")
    return path


def _arguments(forecaster: Forecaster) -> dict[str, Any]:
    """Arguments that are plain values; those that are known by name; and the names of those that are neither."""
    from .. import time_series

    arguments = {
        "model": forecaster.model_class,
        **{name: getattr(forecaster, name) for name in KEPT},
        **forecaster.training,
        **forecaster.options,
    }
    named: dict[str, Any] = {}
    if getattr(time_series, forecaster.name, None) is forecaster.model_class:
        named["model"] = forecaster.name
    if type(forecaster.head) in (Point, Quantile, StudentT):
        named["head"] = [type(forecaster.head).__name__, vars(forecaster.head)]
    plain = {name: value for name, value in arguments.items() if name not in named and _is_plain(value)}
    absent = sorted(arguments.keys() - plain.keys() - named.keys())
    return {"arguments": plain, "named": named, "absent": absent}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN)


def _head(name: str, values: dict[str, Any]) -> Head:
    return Quantile(tuple(values["levels"])) if name == "Quantile" else {"Point": Point, "StudentT": StudentT}[name]()


def _labels(kind: str, **values: Any) -> Labels:
    if kind == "arrays":
        return ArrayLabels(**{**values, "lengths": tuple(values["lengths"])})
    return FrameLabels.from_plain(**values)


def _evaluation(step: int, loss: float, lr: float, validation: list[float] | None) -> Evaluation:
    return Evaluation(step, loss, lr, None if validation is None else Scores(*validation))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place once it is complete."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
