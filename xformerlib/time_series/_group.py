"""Group attention: patches attend along time, and among the series of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate, Size, check_options, check_size
from .._autograd import outside_graphs
from .._options import EncoderOptions
from ..blocks import Encoder
from ..domains import Timeline
from ..masks import Mask, Segments
from ..positions import Rotary
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm
from ._variates import segments_in, segments_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GroupTransformer(ForecastModel):
    """Patches attend along time within a series, and at the same time among the series of a group, in turn.

        token_(i, p) = MLP [z_i, known_i, time] of patch p            of series i, over look-back and horizon
        time:    (i, p) attends to (i, p') for all p', rotary positions
        group:   (i, p) attends to (i', p) for all i' of the group of i
        y_(i, p)     = inverse(MLP token_(i, p)),   p in the horizon

    The encoder of Chronos-2 (Ansari et al. 2025, arXiv:2510.15821). Targets and covariates are series of one group; what is known of
    their horizon is what tells them apart. Nothing in the weights belongs to a certain series: they fit any number in a group, and
    any length of look-back. A group is a row of ``x``, all its columns and future covariates; with ``groups``, several rows.

    Both attentions are ``Segments`` masks on tokens that are packed, so that the work is that of the pairs within series and groups, where
    the authors' code attends among the whole batch under a dense mask. A patch of the look-back in which nothing was observed does not
    exist and takes no time. Turned by the same angle, tokens of one patch score as without rotary positions.

    Different here: each of the two attentions is followed by a feed-forward layer, not the second alone; scores are scaled; series
    are standardised, without the inverse hyperbolic sine after it; no register token between look-back and horizon; covariates of the
    horizon are standardised with their look-back. The sizes are for training on a data set of one's own (pretrained, the paper's have
    dim=768, depth=12). The paper's forecast is ``head=Quantile(levels)`` with 21 levels.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``. There is no use for static covariates.
        patch: steps in a patch.
        dim, depth, heads, hidden: channels, pairs of blocks, attention heads, and the width of feed-forward layers and MLPs.
        dropout: of branches and feed-forward layers.
        block: further arguments of ``Encoder``, such as ``{"qk_norm": "rms"}``.

    Example:
        >>> model = GroupTransformer(1, 96, 24, dim=32, depth=1, heads=2, hidden=64)
        >>> x, groups = torch.randn(5, 96, 1), torch.tensor([0, 0, 1, 1, 1])  # the first two series, and the other three
        >>> model(x, groups=groups).shape
        torch.Size([5, 24, 1])
    """

    takes: ClassVar[frozenset[str]] = frozenset({"past", "future", "head"})
    any_length: ClassVar[bool] = True

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        patch: Size = 16,
        dim: Size = 128,
        depth: Size = 3,
        heads: Size = 8,
        hidden: Size = 512,
        dropout: Rate = 0.1,
        block: EncoderOptions | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.patch = check_size("patch", patch)
        self.embed = _MLP(3 * patch, hidden, dim)
        options: dict[str, Any] = {
            "norm_layer": "rms", "activation": "relu", "bias": False, "qkv_bias": False, "out_bias": False,
            **check_options(type(self).__name__, block, EncoderOptions, "block"),
        }  # fmt: skip
        position = Rotary(dim // heads)
        depth = 2 * check_size("depth", depth)
        self.encoder = Encoder(dim, depth, heads, position=position, hidden=hidden, dropout=dropout, **options)
        self.project = _MLP(dim, hidden, patch * self.head.size)

    def forward(
        self,
        x: Float[Tensor, "batch lookback columns"],
        observed: Bool[Tensor, "batch lookback columns"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        future: Shaped[Tensor, "batch steps known"] | None = None,
        static: Shaped[Tensor, "batch constants"] | None = None,
        groups: Int[Tensor, " batch"] | None = None,
    ) -> Any:
        """Forecast the ``horizon`` steps after the look-back.

        Args:
            x, observed, times, future, static: as in ``ForecastModel``.
            groups: rows of ``x`` with the same number are one group; each row is one of its own if not given.
        """
        checked = self.series(x, observed=observed, times=times, future=future, static=static)
        if groups is not None and (not isinstance(groups, Tensor) or groups.dtype not in (torch.int32, torch.int64)):
            raise TypeError(
                f"groups must be a tensor of integers; got {getattr(groups, 'dtype', type(groups).__name__)}"
            )
        if groups is not None and groups.shape != x.shape[:1]:
            raise ValueError(f"groups must be one number for each of the {len(x)} rows of x; got {tuple(groups.shape)}")
        return self.forecast(checked, groups)

    def forecast(self, series: Series, groups: Int[Tensor, " batch"] | None = None) -> Any:
        """Normalise, cut, attend in turn, project."""
        z, inverse = instance_norm(series.values, series.observed)
        cut = segments_of(series, z, self.channels, self.horizon, self.patch)
        count = segments_in(self.horizon, self.patch)
        first = count - cut.exists.shape[2]  # the horizon begins at patch 0
        time = torch.arange(first * self.patch, count * self.patch, device=z.device).to(z.dtype) / self.lookback
        time = time.view(-1, self.patch).expand_as(cut.values)
        # How many tokens there are is known only to the data. As a decorator, ``disable`` would load the compiler with the package.
        encode = outside_graphs(self._encode, "groups are found by reading data")
        encoded = encode(torch.cat([cut.values, cut.known.to(z.dtype), time], -1), cut.exists, first, groups)
        ahead = encoded.unflatten(0, (len(z), self.channels, count))
        y = self.project(ahead).unflatten(-1, (self.patch, -1)).flatten(2, 3)[:, :, : self.horizon]
        return self.head.forecast(y.transpose(1, 2), inverse.first(self.channels))

    def _encode(
        self,
        patches: Float[Tensor, "batch series patches features"],
        exists: Bool[Tensor, "batch series patches"],
        first: int,
        groups: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "targets dim"]:
        """The tokens of targets in the horizon, in order."""
        row, variable, patch = exists.nonzero().unbind(1)
        domain = Timeline(patch + first)
        masks = attention_masks(row * exists.shape[1] + variable, patch, row if groups is None else groups[row])
        tokens = self.embed(patches[exists])
        tokens = self.encoder(tokens, domain, mask=masks * (len(self.encoder.blocks) // 2))
        return tokens[(variable < self.channels) & (patch + first >= 0)]


def attention_masks(
    series: Int[Tensor, " tokens"], patch: Int[Tensor, " tokens"], group: Int[Tensor, " tokens"]
) -> tuple[Mask, Mask]:
    """Along time: tokens of the same series. In the group: tokens of the same patch of series of the same group."""
    group = group.unique(return_inverse=True)[1]
    patches = int(patch.max()) + 1 if len(patch) else 0
    return Segments(series), Segments(group * patches + patch)


class _MLP(nn.Module):
    """W_2 relu(W_1 x) + W_skip x, as patches are embedded and projected in TimesFM (arXiv:2310.10688) and Chronos-2."""

    def __init__(self, inputs: int, hidden: Size, outputs: int) -> None:
        super().__init__()
        self.up, self.down, self.skip = (
            nn.Linear(inputs, hidden),
            nn.Linear(hidden, outputs),
            nn.Linear(inputs, outputs),
        )

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.down(F.relu(self.up(x))) + self.skip(x)
