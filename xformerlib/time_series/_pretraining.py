"""Self-supervision: patches that are hidden from a model, which learns by restoring them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate
from .._autograd import touching
from .._recorded import Recorded
from ._losses import mse
from ._parts import instance_norm, patches
from ._patch import PatchTST


class MaskedPatches(Recorded):
    """Masked pre-training of a ``PatchTST`` (Nie et al. 2022, arXiv:2211.14730, section 3.2): hide patches, and restore them.

        z, inverse = instance_norm(x shown);   restored_p = inverse(W encoder(tokens)_p + b),   tokens of hidden patches from zeros
        loss       = mean over hidden values of ((restored - x) / scale)^2,   scale as in ``instance_norm`` of all that was observed

    As in the paper: 40 % of the patches of each channel, drawn anew at each call, in patches that do not overlap, so that no value of a
    hidden one stands in another; one linear map from each token to the values of its patch. The encoder is the model's own, not a copy:
    what it learns here, the model begins with. Different from the paper's code, which normalises by the whole series: level and scale
    are those of what is shown, so that nothing of a hidden patch reaches the encoder.

    Missing values are neither shown nor asked for. A patch of which nothing was observed does not exist, and is not hidden either.

    Args:
        model: with ``stride == patch``. The paper takes 512 steps in patches of 12.
        share: of the existing patches of each channel that is hidden, rounded to whole ones.

    Example:
        >>> model = PatchTST(7, 96, 24, patch=12, stride=12, dim=16, heads=4, hidden=32)
        >>> pretraining = MaskedPatches(model)
        >>> loss = pretraining(torch.randn(8, 96, 7))
        >>> loss.backward()
        >>> model.embed.weight.grad.abs().sum() > 0
        tensor(True)
    """

    def __init__(self, model: PatchTST, *, share: Rate = 0.4) -> None:
        super().__init__()
        if not isinstance(model, PatchTST):
            raise TypeError(f"model must be a PatchTST; got {type(model).__name__}")
        if model.stride != model.patch:
            raise ValueError(
                "model must have patches that do not overlap, stride == patch, lest the values of a hidden one show in its neighbours; "
                f"got patch={model.patch} and stride={model.stride}"
            )
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1); got share={share}")
        self.model, self.share = model, share
        self.restore = nn.Linear(model.embed.out_features, model.patch)

    def forward(
        self,
        x: Float[Tensor, "batch lookback channels"],
        observed: Bool[Tensor, "batch lookback channels"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss on patches hidden at random; arguments as in a call of the model."""
        series = self.model.series(x, observed=observed)
        hidden = self.hidden(series.observed)
        restored = self.restored(x, hidden, observed=observed)
        units = instance_norm(series.values, series.observed)[1].scale
        error = (restored - series.values) / units
        loss = mse(error, torch.zeros_like(error), series.observed & hidden)
        return touching(loss, self.model.project.parameters())

    def hidden(self, observed: Bool[Tensor, "batch lookback channels"]) -> Bool[Tensor, "batch lookback channels"]:
        """Whole patches, drawn at random from those of which something was observed."""
        exists = self._cut(observed).any(-1)
        count = (exists.sum(-1, keepdim=True) * self.share).round()
        noise = torch.rand(exists.shape, device=exists.device).masked_fill(~exists, 2)
        chosen = exists & (noise.argsort(-1).argsort(-1) < count)
        steps = chosen.repeat_interleave(self.model.patch, -1)[..., : observed.shape[1]]
        return steps.transpose(1, 2)

    def restored(
        self,
        x: Float[Tensor, "batch lookback channels"],
        hidden: Bool[Tensor, "batch lookback channels"],
        *,
        observed: Bool[Tensor, "batch lookback channels"] | None = None,
    ) -> Float[Tensor, "batch lookback channels"]:
        """All values, as the model restores them from patches that are not hidden."""
        series = self.model.series(x, observed=observed)
        z, inverse = instance_norm(series.values, series.observed & ~hidden)
        tokens = self.restore(self.model.encode(z, series.observed)).flatten(1)[:, : z.shape[1]]
        return inverse(tokens.unflatten(0, (-1, self.model.channels)).transpose(1, 2))

    def _cut(self, observed: Bool[Tensor, "batch lookback channels"]) -> Bool[Tensor, "batch channels patches size"]:
        """In patches; the last is filled up with steps that do not exist."""
        steps, patch = observed.shape[1], self.model.patch
        return patches(F.pad(observed.transpose(1, 2), (0, -steps % patch)), patch, patch)
