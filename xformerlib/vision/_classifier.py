"""timm's interface on models of images, for training loops and tools that know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._dropout import Dropout
from .._pooling import Pool, Pooling
from .._recorded import Recorded, describe
from .._sublayers import Cosine
from ..blocks import Encoder
from ..domains import Sequence
from ..positions import Position
from ._kept import Features
from ._patches import draw_linear

# What timm calls the ways to pool.
POOLS: dict[str, Pool] = {"token": "token", "avg": "mean", "max": "max", "avgmax": "mean-max", "map": "attention"}


class Classifier(Recorded, ABC):
    """Base of models that make logits of images: ``features``, ``pooled``, a head, and timm's names for these.

    Attributes:
        pool: what the head sees.
        head: logits of the pooled vector; an ``Identity`` without classes.
        pretrained_cfg: only of a model that was taken over from timm; what it says there: normalisation, size of images, labels.
    """

    pool: Pooling
    head: nn.Module
    head_dropout: Dropout
    pretrained_cfg: dict[str, Any]

    @abstractmethod
    def features(self, images: Any) -> Features:
        """The tokens after the last block and norm."""

    @abstractmethod
    def pooled(self, features: Features) -> Float[Tensor, "batch dim"]:
        """One vector for each image, which the head sees."""

    @abstractmethod
    def _heads(self) -> list[str]:
        """The names of the heads."""

    @property
    def num_features(self) -> int:
        """Channels of a token after the last block."""
        return self.pool.dim

    @property
    def num_classes(self) -> int:
        """Logits; 0 without a head."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 0

    def forward_features(self, images: Float[Tensor, "batch channels *sizes"]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of ``features``, as a tensor; for a list of images or images with holes call ``features``."""
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor; got {type(images).__name__}. Of a list of images: features(images)."
            )
        return self.features(images).tokens

    def forward_head(
        self, x: Float[Tensor, "batch tokens dim"] | Features, pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """The logits of ``forward_features`` or ``features``; with ``pre_logits`` the vector that the head sees."""
        x = x if isinstance(x, Features) else Features(x, Sequence(x.shape[1] - self.prefix, prefix=self.prefix))  # type: ignore[arg-type]
        vectors = self._vectors(x)
        outputs = (
            vectors if pre_logits else [getattr(self, name)(v) for name, v in zip(self._heads(), vectors, strict=True)]
        )
        return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]

    def _vectors(self, features: Features) -> list[Tensor]:
        """What each of the heads sees."""
        return [self.head_dropout(self.pooled(features))]

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The head; of a model with several all of them."""
        heads = tuple(getattr(self, name) for name in self._heads())
        return heads if len(heads) > 1 else heads[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, of other classes: for fine-tuning.

        Args:
            num_classes: of the new head; 0 for none, so that the output is the pooled vector.
            global_pool: another way to pool, by our name or timm's ("avg", "avgmax"); None leaves it as it is.

        Raises:
            ValueError: a way to pool that the model has no parts for.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be a whole number >= 0; got num_classes={num_classes!r}")
        changed: dict[str, Any] = {"classes": num_classes or None}
        if global_pool is not None:
            changed["pool"] = self._repool(global_pool)
            if hasattr(self, "pool_norm"):  # which stays where it is
                changed["pool_norm"] = not isinstance(self.pool_norm, nn.Identity)
        weight = next(p for p in self.parameters() if p.is_floating_point())
        for name in self._heads():
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
                draw_linear(head)
            setattr(self, name, head.train(self.training))
        describe(self, **changed)

    def _repool(self, name: str) -> str:
        """Pool in another way, and return our name of it."""
        pool = POOLS.get(name, name)
        refused = pool not in get_args(Pool) or (pool == "token" and not self.prefix) or len(self._heads()) > 1
        if pool != self.pool.pool and (refused or pool == "attention"):
            kinds = ", ".join(map(repr, POOLS))
            raise ValueError(
                f"global_pool must be one of {kinds}, 'token' only with a class token and 'map' only where the model has it already; got "
                f"global_pool={name!r} for {type(self).__name__}, which pools by {self.pool.pool!r}. Build the model with pool=... instead."
            )
        if pool != self.pool.pool:
            self.pool = Pooling(self.num_features, pool).train(self.training)  # type: ignore[arg-type]
        return pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes from block to block for the backward, and compute the rest again; as ``Encoder(checkpoint=True)``."""
        for module in self.modules():
            if isinstance(module, Encoder):
                module.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters with two axes or more that weight decay should spare: tokens, positions and temperatures."""
        spared = {
            id(p) for module in self.modules() if isinstance(module, (Position, Cosine)) for p in module.parameters()
        }
        return {name for name, p in self.named_parameters() if id(p) in spared or name == "prefix_tokens"}
