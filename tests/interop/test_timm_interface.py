"""timm's interface on our models: the same names give what they give there; and what a source is refused for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils import prune

import xformerlib as xf
from tests.closeness import InDefaultPrecision, assert_close, largest
from tests.interop.test_timm import made
from xformerlib import vision
from xformerlib.interop.timm import from_timm, to_timm

NAMES = {
    "vit_tiny_patch16_224": {"drop_rate": 0.1},
    "deit_tiny_distilled_patch16_224": {},
    "vit_medium_patch16_gap_240": {},
    "test_vit3": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "beit_base_patch16_224": {"embed_dim": 192, "num_heads": 3},
    "test_vit_relpos": {},
}  # fmt: skip
DEPTH = 60  # sums of a model of 12 blocks, one after the other
SWINS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")


def swin(name: str) -> nn.Module:
    size = 64 if "v2" in name else 56
    model = timm.create_model(
        name, pretrained=False, depths=(1, 2), num_heads=(2, 4), embed_dim=16, num_classes=10, img_size=size
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pairs() -> list[Any]:
    sources = [(name, lambda name=name: made(name, **NAMES[name])) for name in NAMES]
    sources += [(name, lambda name=name: swin(name)) for name in SWINS]
    return [pytest.param(make, id=name) for name, make in sources]


def images_of(theirs: Any) -> torch.Tensor:
    size = theirs.patch_embed.img_size
    return torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("make", pairs())
def test_names_give_what_they_give_there(make: Callable[[], Any]) -> None:
    with InDefaultPrecision():
        theirs = make()
    ours, images = from_timm(theirs), images_of(theirs)
    assert ours.num_features == theirs.num_features and ours.num_classes == theirs.num_classes
    with InDefaultPrecision():
        wanted = theirs.forward_features(images)
    features = ours.forward_features(images)
    assert_close(features, wanted, "features", depth=DEPTH)
    for pre_logits in (False, True):
        head = theirs.forward_head(wanted, pre_logits=pre_logits)
        assert_close(ours.forward_head(features, pre_logits=pre_logits), head, "head", depth=DEPTH)
    assert_close(ours.forward_head(features), ours(images), "logits", depth=DEPTH)
    assert_close(ours.forward_head(ours.features(images)), ours(images), "logits", depth=DEPTH)
    heads, theirs_heads = ours.get_classifier(), theirs.get_classifier()
    assert isinstance(heads, tuple) == isinstance(theirs_heads, tuple)
    for classes in (7, 0):
        ours.reset_classifier(classes)
        theirs.reset_classifier(classes)
        assert ours(images).shape == theirs(images).shape
        assert ours.num_classes == theirs.num_classes == classes
    with InDefaultPrecision():
        wanted = theirs(images)
    assert_close(ours(images), wanted, "without a head", depth=DEPTH)


@pytest.mark.parametrize("name", [*NAMES, *SWINS])
def test_weight_decay_spares_the_same(name: str) -> None:
    theirs = swin(name) if name in SWINS else made(name, **NAMES[name])
    ours = from_timm(theirs)
    assert ours.no_weight_decay() <= dict(ours.named_parameters()).keys()
    if name == "test_vit_relpos":
        return  # timm lets its relative networks decay
    counts = []
    for model in (ours, theirs):
        groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        counts.append(sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]))
    latent = sum(p.numel() for path, p in theirs.named_parameters() if path.endswith("latent"))
    assert counts[0] == counts[1] - latent


@pytest.mark.usefixtures("double")
def test_pools_are_changed_by_timms_names() -> None:
    theirs = made("vit_tiny_patch16_224")
    ours, images = from_timm(theirs), images_of(theirs)
    for pool in ("avg", "max", "avgmax", "token"):
        ours.reset_classifier(0, pool)
        theirs.reset_classifier(0, pool)
        assert_close(ours(images), theirs(images), pool, depth=DEPTH)
    for pool, model in (
        ("map", ours),
        ("prr", ours),
        ("token", vision.ViT(3, size=32, patch=8, dim=16, depth=1, heads=2, class_token=False)),
    ):
        with pytest.raises(ValueError, match="global_pool must be one of"):
            model.reset_classifier(3, pool)
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        ours.reset_classifier(-1)
    mapped = from_timm(made("vit_base_patch16_siglip_224", embed_dim=192, num_heads=3))
    mapped.reset_classifier(4, "map")
    assert mapped.head.out_features == 4 and mapped.pool.pool == "attention"


def test_a_new_head_is_part_of_the_config() -> None:
    model = vision.ViT(10, size=32, patch=8, dim=16, depth=1, heads=2).double()
    model.reset_classifier(3, "avg")
    assert model.head.weight.dtype == torch.float64
    read = xf.from_config(model.to_config())
    assert read.head.out_features == 3 and read.pool.pool == "mean"
    read.double().load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    assert torch.equal(read.eval()(images), model.eval()(images))
    with pytest.raises(TypeError, match="taken over from timm"):
        from_timm(made("vit_tiny_patch16_224")).to_config()


# -- checkpointing ---------------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, *inputs: Any) -> tuple[int, torch.Tensor]:
    """Bytes that the backward keeps, and the output."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(*inputs)
    return sum(kept.values()), out


CHECKPOINTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (
        lambda: vision.ViT(5, size=32, patch=4, dim=32, depth=4, heads=4, dropout=0.2, attention_dropout=0.1, drop_path=0.3),
        (2, 3, 32, 32),
    ),
    "swin": (lambda: vision.Swin(5, window=4, dim=16, depths=(2, 2), heads=(2, 4), dropout=0.1, drop_path=0.2), (2, 3, 32, 32)),
    "encoder": (lambda: xf.Encoder(32, 4, 4, dropout=0.2, attention_dropout=0.2, mask=xf.masks.Local(3)), (2, 40, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients_for_less_memory(name: str) -> None:
    make, shape = CHECKPOINTED[name]
    model, x = make().train(), torch.randn(shape)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        size, out = saved_bytes(model, x)
        out.square().sum().backward()
        found.append((size, out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, first, grads), (less, second, again) = found
    assert less < 0.6 * plain
    assert_close(first, second, "output", depth=4)
    assert_close(grads, again, "gradients", depth=8, scale=largest(grads))


def test_checkpointing_of_both_parts_of_an_autoencoder() -> None:
    model = vision.MaskedAutoencoder(
        vision.ViT(None, size=16, patch=4, dim=16, depth=2, heads=2), decoder_dim=8, decoder_depth=2, decoder_heads=2
    )
    model.set_grad_checkpointing()
    assert model.encoder.encoder.checkpoint and model.decoder.checkpoint
    model.set_grad_checkpointing(False)
    assert not model.encoder.encoder.checkpoint


# -- sources ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "deit_tiny_patch16_224"])
def test_the_normalisation_is_kept(name: str) -> None:
    theirs = timm.create_model(name, pretrained=False, depth=1)
    ours = from_timm(theirs)
    config = timm.data.resolve_model_data_config(theirs)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), from_timm(theirs)):
        assert timm.data.resolve_model_data_config(model) == config
    assert ours.pretrained_cfg is not theirs.pretrained_cfg
    if name == "vit_tiny_patch16_224":
        assert timm.data.resolve_model_data_config(to_timm(ours)) == config
    plain = vision.ViT(3, size=32, patch=8, dim=16, depth=1, heads=2)
    assert timm.data.resolve_model_data_config(plain)


def nothing(*_: Any) -> None:
    return None


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda model: model.blocks[0].register_forward_hook(nothing),
    "forward with kwargs": lambda model: model.blocks[0].register_forward_hook(nothing, with_kwargs=True),
    "forward pre": lambda model: model.blocks[1].attn.qkv.register_forward_pre_hook(nothing),
    "backward": lambda model: model.norm.register_full_backward_hook(nothing),
    "backward pre": lambda model: model.head.register_full_backward_pre_hook(nothing),
    "of the model": lambda model: model.register_forward_hook(nothing),
    "state dict": lambda model: model.register_state_dict_post_hook(nothing),
    "load": lambda model: model.register_load_state_dict_post_hook(nothing),
    "tensor": lambda model: model.head.weight.register_hook(lambda grad: 2 * grad),
    "accumulated": lambda model: model.head.weight.register_post_accumulate_grad_hook(nothing),
    "forward replaced": lambda model: setattr(model.blocks[0].mlp, "forward", lambda x: x),
    "method replaced": lambda model: setattr(model, "forward_features", lambda x: x),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.head),
    "pruned": lambda model: prune.l1_unstructured(model.head, "weight", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_refused(kind: str) -> None:
    theirs = made("vit_tiny_patch16_224")
    HOOKS[kind](theirs)
    with pytest.raises((ValueError, TypeError), match=r"hooks|of its own|parametrizations|no nn.Linear"):
        from_timm(theirs)


def test_removed_hooks_are_no_hindrance() -> None:
    theirs = made("vit_tiny_patch16_224")
    theirs.blocks[0].register_forward_hook(nothing).remove()
    from_timm(theirs)
