"""What the examples share: seeding, device, schedule, checks of options, and the directory of a run with its metrics and checkpoints."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def seed_everything(seed: int) -> None:
    """Start every random number generator from ``seed``, and have torch compute the same bits each time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        # cuBLAS repeats its bits only with a workspace of fixed size; it reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def choose_device(name: str) -> torch.device:
    """``"auto"`` is the GPU where there is one, and the CPU otherwise; anything else is torch's own name of a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise ValueError(
            f"--device must be auto or a device of this machine, such as cpu; got {name!r}: {error}"
        ) from error


def count_parameters(model: nn.Module) -> int:
    """The number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def cosine_schedule(optimizer: Optimizer, *, warmup: int, steps: int) -> LambdaLR:
    """Rise linearly over ``warmup`` steps, then fall to zero at ``steps`` along half a cosine (Loshchilov & Hutter, 2017)."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def check_least(options: Any, least: float, *names: str) -> None:
    """Raise ValueError unless each of the options has at least such a value, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}; got {value}")


def check_positive(options: Any, *names: str) -> None:
    """Raise ValueError unless each of the options is above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0; got {getattr(options, name)}")


def check_shares(options: Any, *names: str) -> None:
    """Raise ValueError unless each of the options is a share, or None: from 0 to below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1); got {value}")


def check_different(options: Any, *names: str) -> None:
    """Raise ValueError unless each of the options is one value or several, none of them twice, and no number below 0."""
    for name in names:
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name.replace('_', '-')} must be one or several different ones; got {values}")
        if any(isinstance(value, int) and value < 0 for value in values):
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or above; got {values}")


def check_heads(options: Any) -> None:
    """Raise ValueError unless the width of the model can be shared out among the heads."""
    if options.dim % options.heads:
        raise ValueError(f"--heads must divide --dim; got --heads {options.heads}, --dim {options.dim}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with the message alone where the user's input is at fault (ValueError); a traceback would only hide it."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place beside ``path`` to write to, and put it in the place of ``path`` once it is complete.

    Whoever reads ``path``, and a run that is cut off at any moment, finds the old file or the new one, never a part.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """The state of every random number generator that :func:`seed_everything` has started."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()  # torch.load reads no arrays unless told to
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Let every generator go on from a state that :func:`random_state` has returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def what_determines(options: Any, seed: int) -> dict[str, str]:
    """The options, a dataclass, that the result of a run depends on: the others may differ when it is continued."""
    free = ("run", "resume", "device", "eval_batch_size", "seeds", "workers")
    return {name: str(value) for name, value in asdict(options).items() if name not in free} | {"seed": str(seed)}


@dataclass(frozen=True)
class Run:
    """The directory of one training run, and what lies in it.

    ``metrics.jsonl``      one JSON object a line, each with the step it was taken at
    ``model.safetensors``  the weights that did best on validation
    ``resume.pt``          all that training needs to go on: the last weights, optimiser, schedule, step, random states

    ``resume.pt`` is complete in itself, so that a run cut off between the writing of two files still goes on rightly.

    Attributes:
        directory: where the files are.
        options: what determines the result; a run is continued only with the options that it was begun with.
    """

    directory: Path
    options: dict[str, Any]

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        return self.directory / "model.safetensors"

    @property
    def state(self) -> Path:
        return self.directory / "resume.pt"

    def begin(self) -> None:
        """Make the directory, and clear what an earlier run has left in it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics, self.weights, self.state):
            path.unlink(missing_ok=True)

    def start(self, parts: dict[str, Any], *, resume: bool) -> tuple[int, dict[str, float]]:
        """Begin a run, at step 0, or go on with one; return the step and the values that were saved with it."""
        if not resume:
            self.begin()
            return 0, {}
        with plain_errors():
            return self.resume(parts)

    def log(self, **record: float) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """What has been logged."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def written(self) -> str:
        """The names of the files in the directory."""
        return ", ".join(path.name for path in sorted(self.directory.iterdir()))

    def save_weights(self, model: nn.Module) -> None:
        """Write the model's weights, with the options beside them as the file's metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with replacing(self.weights) as path:
            save_file(tensors, path, metadata={"options": json.dumps(self.options)})

    def load_weights(self, model: nn.Module) -> None:
        """Read the weights that :meth:`save_weights` has written into ``model``."""
        model.load_state_dict(load_file(self.weights))

    def save_state(self, step: int, parts: dict[str, Any], **values: float) -> None:
        """Write the state after ``step`` steps: the ``state_dict`` of each part, random states, and further ``values``."""
        state = {
            "step": step,
            "values": values,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "random": random_state(),
            "options": self.options,
            "metrics_size": self.metrics.stat().st_size if self.metrics.exists() else 0,
        }
        with replacing(self.state) as path:
            torch.save(state, path)

    def resume(self, parts: dict[str, Any]) -> tuple[int, dict[str, float]]:
        """Put every part and random generator where :meth:`save_state` has left it; return the step and the values.

        What ``metrics.jsonl`` holds from after that step is dropped: those steps are about to be taken again.

        Raises:
            ValueError: if there is nothing to continue, or it was begun with other options.
        """
        if not self.state.exists():
            raise ValueError(f"--resume continues a run, but there is no {self.state}; leave --resume out to begin one")
        state = torch.load(self.state, map_location="cpu", weights_only=True)
        self._check_options(state["options"])
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        with self.metrics.open("ab") as file:
            file.truncate(min(state["metrics_size"], file.tell()))
        return state["step"], state["values"]

    def _check_options(self, begun: dict[str, Any]) -> None:
        changed = [name for name in self.options if begun.get(name) != self.options[name]]
        if changed:
            listing = ", ".join(f"{name}={begun.get(name)!r} then, {self.options[name]!r} now" for name in changed)
            raise ValueError(
                f"--resume needs the options that the run in {self.directory} was begun with; got {listing}; "
                "give the same options, or another run directory"
            )


Given = TypeVar("Given")


def own_run(options: Given, seed: int, *folders: str) -> tuple[Run, Given]:
    """The run of one seed, and the options that are its own.

    Its directory is ``--run``, or one within it: for each of ``folders``, and for the seed where there are several. Of several
    runs the first ones may have been cut off: with --resume, those that were never begun are begun.
    """
    given: Any = options  # a dataclass; its type is that of the result
    directory = given.run.joinpath(*folders, *([f"seed-{seed}"] if len(given.seeds) > 1 else []))
    run = Run(directory, what_determines(given, seed))
    resume = given.resume and (run.state.exists() or directory == given.run)
    return run, replace(given, run=directory, resume=resume)
