"""Groups of parameters: each parameter is in one, with the decay and the learning rate of its kind and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import xformerlib as xf
from xformerlib import positions, vision

SMALL: dict[str, Any] = {"size": 16, "patch": 4, "dim": 16, "heads": 2}
POSITIONS = {
    "none": None,
    "learned": "learned",
    "mixed": positions.Rotary(8, mixed=True, heads=2),
    "table": lambda: positions.RelativeBias(2, size=(4, 4), prefix=True),
    "network": lambda: positions.ContinuousBias(2),
    "shared table": positions.RelativeBias(2, size=(4, 4)),
}
MODELS = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 4),
        "position": st.sampled_from(sorted(POSITIONS)),
        "registers": st.integers(0, 2),
        "distillation": st.booleans(),
        "pool": st.sampled_from(["token", "mean", "attention"]),
        "qk_norm": st.sampled_from([None, "rms", "cosine"]),
        "layer_scale": st.sampled_from([None, 0.1]),
        "activation": st.sampled_from(["gelu", "swiglu"]),
        "stem": st.booleans(),
        "embed_norm": st.sampled_from([None, "layer"]),
        "norm": st.sampled_from(["pre", "post", "parallel"]),
    }
)


def build(options: dict[str, Any]) -> vision.ViT:
    options = {**SMALL, **options}
    stem = vision.ConvStem(16, layers=2) if options.pop("stem", False) else None
    return vision.ViT(5, embed=stem, **options | {"position": POSITIONS[options.get("position", "learned")]})


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@settings(max_examples=25)
@given(MODELS, st.sampled_from([None, 0.5, 1.0]), st.data())
def test_every_parameter_is_in_one_group_of_its_kind(
    options: dict[str, Any], layer_decay: float | None, data: st.DataObject
) -> None:
    model = build(options)
    for parameter in data.draw(st.lists(st.sampled_from(list(model.parameters())), max_size=3)):
        parameter.requires_grad_(False)
    groups = vision.parameter_groups(model, weight_decay=0.3, layer_decay=layer_decay, lr=2.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found, depth = by_name(model, groups), options["depth"]
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, group in found.items():
        matrix = name.endswith(("proj.weight", "qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight"))
        convolution = name.startswith("embed.convolutions")
        assert group["weight_decay"] == (0.3 if matrix or convolution else 0.0), name
        if name.startswith("encoder.blocks."):
            distance = depth - int(name.split(".")[2])
        elif name.startswith(("embed", "prefix_tokens")) or (
            name.startswith("encoder.position") and options["position"] == "learned"
        ):
            distance = depth + 1
        else:
            distance = 0
        assert group["lr"] == pytest.approx(2.0 * (layer_decay or 1.0) ** distance), name


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = vision.parameter_groups(build({"depth": 3}), weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("all", 0.1), ("all, no decay", 0.0)]
    assert all("lr" not in group for group in groups)


def test_the_groups_of_timm() -> None:
    """Those of ``param_groups_layer_decay``, but for the last norm: timm puts it to the last block, BEiT to the head."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=3, num_heads=2, num_classes=5)
    groups = param_groups_layer_decay(theirs, 0.1, theirs.no_weight_decay(), layer_decay=0.7)
    scales = by_name(theirs, groups)
    assert scales.keys() == dict(theirs.named_parameters()).keys()
    ours = vision.ViT(5, dim=16, depth=3, heads=2)
    mine = by_name(ours, vision.parameter_groups(ours, weight_decay=0.1, layer_decay=0.7, lr=1.0))
    pairs = {
        "cls_token": "prefix_tokens",
        "pos_embed": "encoder.position.table",
        "patch_embed.proj.weight": "embed.proj.weight",
        "patch_embed.proj.bias": "embed.proj.bias",
        "blocks.0.attn.qkv.weight": "encoder.blocks.0.attention.qkv.weight",
        "blocks.1.norm1.weight": "encoder.blocks.1.attention_residual.norm.weight",
        "blocks.2.mlp.fc2.bias": "encoder.blocks.2.feed_forward.down.bias",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
    }
    for other, own in pairs.items():
        assert mine[own]["lr"] == pytest.approx(scales[other]["lr_scale"]), own
        assert mine[own]["weight_decay"] == scales[other]["weight_decay"], own


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_of_all_stages_are_counted(version: Any) -> None:
    model = vision.Swin(5, window=2, dim=8, depths=(1, 3, 2), heads=(1, 2, 2), version=version)
    groups = vision.parameter_groups(model, weight_decay=0.1, layer_decay=0.5, lr=1.0)
    found = by_name(model, groups)
    assert found.keys() == dict(model.named_parameters()).keys()
    rates = {
        "embed.proj.weight": 0.5**7,
        "stages.0.blocks.0.attention.qkv.weight": 0.5**6,
        "merges.0.reduction.weight": 0.5**6,
        "stages.1.blocks.0.attention.qkv.weight": 0.5**5,
        "stages.1.blocks.2.feed_forward.up.bias": 0.5**3,
        "merges.1.norm.weight" if version == 1 else "merges.1.out_norm.weight": 0.5**3,
        "stages.2.blocks.1.attention.out.weight": 0.5,
        "norm.weight": 1.0,
        "head.weight": 1.0,
    }
    assert {name: found[name]["lr"] for name in rates} == rates
    assert found["merges.0.reduction.weight"]["weight_decay"] == 0.1
    tables = [name for name in found if "position" in name or "temperature" in name]
    assert tables and not any(found[name]["weight_decay"] for name in tables)


def test_any_model_of_blocks_has_layers() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 8)
            self.encoder = xf.Encoder(8, 2, 2, position=positions.Learned(8, 9))
            self.names = nn.Embedding(3, 8)
            self.out = nn.Linear(8, 2)

    model = Reader()
    found = by_name(model, vision.parameter_groups(model, weight_decay=0.1, layer_decay=0.5, lr=1.0))
    for name, rate, decay in (
        ("embedding.weight", 0.125, 0.0),
        ("encoder.position.table", 0.125, 0.0),
        ("encoder.blocks.1.attention.qkv.weight", 0.5, 0.1),
        ("encoder.norm.weight", 1.0, 0.0),
        ("names.weight", 1.0, 0.0),
        ("out.weight", 1.0, 0.1),
    ):
        assert (found[name]["lr"], found[name]["weight_decay"]) == (rate, decay), name


def test_a_schedule_scales_the_rate_of_each_layer() -> None:
    model = build({"depth": 2})
    groups = vision.parameter_groups(model, weight_decay=0.0, layer_decay=0.5, lr=0.1)
    wanted = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay must be >= 0; got weight_decay=-1"),
        ({"weight_decay": 0.1, "layer_decay": 0.5}, "lr, which it scales, must be given"),
        ({"weight_decay": 0.1, "layer_decay": 0.0, "lr": 1.0}, r"layer_decay must be in \(0, 1\]"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision.parameter_groups(build({"depth": 1}), **options)
