"""Hubs and trainers bring models back from what they keep of the arguments: masks, positions and parts included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import graph, masks, positions, time_series, vision

hub = pytest.importorskip("huggingface_hub")

MASK = (masks.Causal() | masks.Global(1)) & masks.Segments(torch.arange(17) // 20)


class HubViT(vision.ViT, hub.PyTorchModelHubMixin):
    """The mixin behind, as its documentation has it."""


class HubEncoder(hub.PyTorchModelHubMixin, xf.Encoder):
    """The mixin in front."""


class HubSwin(vision.Swin, hub.PyTorchModelHubMixin, library_name="mine", tags=["windows"]):
    """With arguments of the mixin."""


class HubPatchTST(time_series.PatchTST, hub.PyTorchModelHubMixin):
    pass


class HubGraph(graph.GraphTransformer, hub.PyTorchModelHubMixin):
    pass


class HubOwn(vision.ViT, hub.PyTorchModelHubMixin):
    """With a constructor of its own."""

    def __init__(self, classes: int, mask: masks.Mask | None = None) -> None:
        super().__init__(classes, size=16, patch=4, dim=16, depth=1, heads=2, mask=mask)


EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vit": (
        lambda: HubViT(
            10, size=16, patch=4, dim=16, depth=2, heads=2, mask=[MASK, masks.Local(2)], embed=vision.PatchEmbed(16, 4),
            position=["learned", positions.Rotary(8, scaling=positions.NTK(2.0))], pool=xf.Pooling(16, "mean"),
        ),
        (torch.randn(2, 3, 16, 16),),
    ),
    "encoder": (
        lambda: HubEncoder(16, 2, 2, mask=masks.Local(3), position=positions.Sinusoidal(16) + positions.DistanceDecay(2)),
        (torch.randn(2, 9, 16),),
    ),
    "swin": (lambda: HubSwin(5, window=(4, 2), dim=8, depths=(2, 2), heads=(2, 4)), (torch.randn(2, 3, 32, 32),)),
    "patchtst": (
        lambda: HubPatchTST(3, 32, 8, dim=16, depth=1, heads=2, head=time_series.Quantile((0.1, 0.9))),
        (torch.randn(2, 32, 3),),
    ),
    "graph": (
        lambda: HubGraph(3, 16, 2, 2, 2, mask=masks.Edges() | masks.Global(1), virtual_nodes=1, position=graph.RandomWalkBias(2, 3)),
        (torch.randn(4, 3), EDGES),
    ),
    "own": (lambda: HubOwn(4, masks.Local(1)), (torch.randn(2, 3, 16, 16),)),
}  # fmt: skip


def numbers(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.cat([part.flatten() for part in vars(x).values()])


@pytest.mark.parametrize("name", CASES)
def test_models_come_back_from_the_hub(name: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    model = make().eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "class" not in config
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(numbers(again(*inputs)), numbers(model(*inputs)))
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_what_cannot_be_written_is_refused_when_saving(tmp_path: Path) -> None:
    where = masks.Where(lambda b, h, q, k: q >= k)
    for arguments in ({"mask": where}, {"position": lambda: positions.RelativeBias(2)}, {"activation": nn.SiLU()}):
        model = HubEncoder(16, 1, 2, **arguments)
        with pytest.raises(TypeError, match="registered by name"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    masks.register(where.fn, name="where of the hub")
    model = HubEncoder(16, 1, 2, mask=where).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 5, 16)
    assert torch.equal(HubEncoder.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_lightning_brings_models_back(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Trained(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, mask: Any, position: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = xf.Encoder(16, 1, 2, mask=mask, position=position)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    mask, position = masks.Causal() & masks.Local(2), positions.Rotary(8)
    for arguments in ((mask, position), (mask.to_config(), position.to_config())):
        model = Trained(*arguments)
        logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(4, 6, 16)))
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        options = [{}, {"weights_only": True}]
        if arguments[0] is not mask:
            options.append({"hparams_file": f"{logger.log_dir}/hparams.yaml"})
        x = torch.randn(1, 6, 16)
        for option in options:
            again = Trained.load_from_checkpoint(tmp_path / "model.ckpt", **option)
            assert torch.equal(again.eval()(x), model.eval()(x))
