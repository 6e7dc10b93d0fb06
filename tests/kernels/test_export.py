"""Dense models in torch.export: the same numbers, any batch, any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import masks, positions

pytestmark = pytest.mark.usefixtures("double")

ENCODERS: dict[str, Callable[[], xf.Encoder]] = {
    "full": lambda: xf.Encoder(16, 2, 2),
    "causal, rotary": lambda: xf.Encoder(16, 2, 2, mask=masks.Causal(), position=positions.Rotary(8), kv_heads=1),
    "causal, learned": lambda: xf.Encoder(16, 1, 2, mask=masks.Causal(), position=positions.Learned(16, 512)),
    "full, sinusoidal": lambda: xf.Encoder(16, 1, 2, position=positions.Sinusoidal(16)),
}


class Model(nn.Module):
    """A model that makes its domain itself, where it is not given one."""

    def __init__(self, encoder: nn.Module, domain: xf.Domain | None, inside: bool = False) -> None:
        super().__init__()
        self.encoder, self.domain, self.inside = encoder, domain, inside

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, xf.Sequence(x.shape[1]) if self.inside else self.domain)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_any_batch_and_any_length(name: str, strict: bool) -> None:
    model = Model(ENCODERS[name](), None, inside=strict).eval()
    shapes = ({0: Dim("batch", min=2, max=512), 1: Dim("tokens", min=2, max=512)},)
    program = export(model, (torch.randn(3, 24, 16),), dynamic_shapes=shapes, strict=strict).module()
    for batch, tokens in ((3, 24), (2, 7), (5, 100)):
        x = torch.randn(batch, tokens, 16)
        assert_close(program(x), model(x), depth=3)


@pytest.mark.parametrize("domain", [xf.Sequence(20, prefix=1), xf.Grid(4, 5, prefix=1)], ids=["sequence", "grid"])
def test_domains_of_fixed_size_stay_as_they_were(domain: xf.Domain) -> None:
    position = positions.Rotary(8) + positions.Learned(16, 20 if domain.ndim == 1 else (8, 8), prefix=1)
    model = Model(xf.Encoder(16, 1, 2, position=position), domain).eval()
    x = torch.randn(3, 21, 16)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=512)},), strict=False).module()
    assert_close(program(x[:2]), model(x[:2]), depth=2)  # nothing of the trace was left on the domain


@pytest.mark.usefixtures("precision")
def test_a_bias_is_exported_where_its_attention_is_dense() -> None:
    model = Model(xf.Encoder(16, 1, 2, position=positions.RelativeBias(2)), xf.Sequence(20)).eval()
    x = torch.randn(3, 20, 16)
    assert_close(export(model, (x,), strict=False).module()(x), model(x), depth=2)
