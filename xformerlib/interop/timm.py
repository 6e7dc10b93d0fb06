"""Vision Transformers of timm as ours, and ours as timm's: the same weights, the same logits.

>>> import timm
>>> from xformerlib.interop.timm import from_timm
>>> theirs = timm.create_model("test_vit", pretrained=False).eval()
>>> ours, images = from_timm(theirs), torch.randn(2, 3, 160, 160)
>>> torch.allclose(ours(images), theirs(images), atol=1e-5)
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, overload

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from .._recorded import not_described
from ..vision import Swin, ViT
from ._timm_export import exported
from ._timm_swin import swin
from ._timm_vit import vit

_CONVERTERS: dict[type[nn.Module], Callable[[Any], Any]] = {
    VisionTransformer: vit,
    VisionTransformerDistilled: vit,
    Eva: vit,
    Beit: vit,
    VisionTransformerRelPos: vit,
    SwinTransformer: swin,
    SwinTransformerV2: swin,
}


@overload
def from_timm(
    model: VisionTransformer | VisionTransformerDistilled | Eva | Beit | VisionTransformerRelPos,
) -> ViT:
    """A plain Vision Transformer, with whatever positions and blocks."""


@overload
def from_timm(model: SwinTransformer | SwinTransformerV2) -> Swin:
    """A hierarchical one."""


def from_timm(model: nn.Module) -> ViT | Swin:
    """Our model with copies of the weights of one of timm's, which is left as it is.

        VisionTransformer, VisionTransformerDistilled, Eva, Beit, VisionTransformerRelPos      ViT(...)
        SwinTransformer, SwinTransformerV2                                                     Swin(...)

    What weights do not hold is read from the model: activations, the eps of norms, heads, rotary positions, pooling, rates of dropout and
    stochastic depth, training or evaluation mode, checkpointing; dtypes, devices and ``requires_grad`` carry over, and so does
    ``pretrained_cfg``, from which timm tells how images are to be normalised. The result has timm's interface (``forward_features``,
    ``reset_classifier``, ...) and takes images of any size; at sizes other than that of the model it gives what the model gives after
    ``set_input_size``, except where timm stretches a table of relative positions: there, convert after ``set_input_size``.

    What is the same function is not always the same weights: rotary positions turn the first half of a head's channels with the second,
    so rows of queries and keys may be in another order; fixed biases of keys, which are 0, become part of the fused bias; parallel
    branches (``vit_small_patch16_18x2_224``) become one with more heads and hidden channels, and the norms and layer scales of each
    part of its maps.

    Two things that happen in training only are left out: random coordinates (``rope_shift_coords``, ``rope_jitter_coords``,
    ``rope_rescale_coords``), and the dropout inside the networks of relative positions.

    Raises:
        TypeError: a model of another class, or weights that are not plain parameters.
        ValueError: hooks or methods that were put on a module of the source, since they may change what it computes; what ours cannot
            express, by name, such as differential attention or ``global_pool="prr"``; and parameters that were
            added to the model, such as adapters.

    Example:
        >>> import timm
        >>> model = from_timm(timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10))
        >>> model([torch.randn(3, 64, 96), torch.randn(3, 32, 32)]).shape
        torch.Size([2, 10])
    """
    convert = _CONVERTERS.get(type(model))
    if convert is None:
        names = ", ".join(kind.__name__ for kind in _CONVERTERS)
        raise TypeError(f"model must be one of timm's {names}; got {type(model).__name__}")
    ours = convert(model)
    if hasattr(model, "pretrained_cfg"):
        ours.pretrained_cfg = copy.deepcopy(model.pretrained_cfg)
    not_described(ours, "it was taken over from timm")
    return ours


def to_timm(model: ViT) -> VisionTransformer:
    """A plain ``ViT`` as timm's ``VisionTransformer``, with copies of its weights: the way back for what was trained here.

    Plain are: patches of images, learned positions of a ``Grid``, pre-norm blocks with full attention, any number of registers, each way
    to pool but ``"sum"``, layer scale, norms of queries and keys, of heads and of hidden channels, and ``"swiglu"``. The result takes
    images of any size (``dynamic_img_size=True``).

    Raises:
        TypeError: no ``ViT``.
        ValueError: what timm's model cannot express, by name.

    Example:
        >>> to_timm(ViT(10, size=32, patch=4, dim=64, depth=2, heads=4)).head
        Linear(in_features=64, out_features=10, bias=True)
    """
    theirs = exported(model)
    if hasattr(model, "pretrained_cfg"):
        vars(theirs)["pretrained_cfg"] = vars(theirs)["default_cfg"] = copy.deepcopy(model.pretrained_cfg)
    return theirs
