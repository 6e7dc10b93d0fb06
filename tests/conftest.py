"""What all tests share: run-time type checks, the Hypothesis profile, seeds, and which tests need a GPU.

With ``ONEDNN=0`` in the environment they run without oneDNN, with ``THREADS=2`` on two threads.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import typechecking

typechecking.install()
capability = os.environ.get("ATEN_CPU_CAPABILITY")
if capability:  # torch looks up compiled code without it, and would find that of another processor
    found = Path(tempfile.gettempdir()) / f"inductor-{getuser()}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(found))
if os.environ.get("ONEDNN") == "0":  # a run without oneDNN, as where torch was built without it
    torch.backends.mkldnn.set_flags(False)
# The tensors of tests are small: with two threads, one mostly waits for the other.
torch.set_num_threads(int(os.environ.get("THREADS", "1")))


class _TorchRandom:
    """Lets Hypothesis seed torch before each example, so that a failure shown once is shown again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = _TorchRandom()  # Hypothesis keeps only a weak reference
hypothesis.register_random(torch_random)
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[torch.dtype]:
    """Makes numbers and modules of double precision unless a test says otherwise: where two results are to be equal."""
    yield from _default(torch.float64)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Runs a test in double precision, where results are to be equal, and in single, where they are to be close."""
    yield from _default(request.param)


def _default(dtype: torch.dtype) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers of the test's own."""
    return torch.Generator().manual_seed(0)
