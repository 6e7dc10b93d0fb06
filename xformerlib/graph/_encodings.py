"""What pairs of nodes, atoms and bonds are told apart by: walks between nodes, distances in space, columns of categories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Size, check_positive, check_size
from .._autograd import is_compiling, no_autocast
from .._projection import dtype_of
from .._recorded import Recorded
from ..domains import Domain, Graph, Points
from ..positions import Bias, PairBias
from ..positions._base import at_least_fp32, no_meaning, placed
from ..positions._bias import EveryPair, Network, in_blocks
from ..positions._pairs import PlacePair
from ..positions._tables import rows_of_batch
from ._pairs import NodePairBias

# Values of the columns of an atom and of a bond in the Open Graph Benchmark: atomic number, chirality, degree, formal charge, hydrogens,
# radical electrons, hybridisation, aromatic, in a ring; kind of bond, stereochemistry, conjugated.
ATOM_SIZES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
BOND_SIZES = (5, 6, 2)


class RandomWalkBias(NodePairBias):
    """A small network of where random walks go, relative random-walk probabilities (RRWP) of GRIT (Ma et al. 2023, arXiv:2305.17589).

        b_ij = W2 relu(W1 [I, P, P^2, ..., P^(K - 1)]_ij + b1) + b2,   P = D^-1 A

    the probabilities that a walk from query i is at key j after 0, 1, ..., K - 1 steps. It is evaluated for the pairs within each graph
    and no others; in the models of this package once for all layers. GRIT keeps a vector for each pair, which its layers change; this is
    a score for each head, which any attention takes. Pairs with virtual nodes score 0.

    Args:
        heads: attention heads, of the queries.
        steps: K.
        hidden: width of the network.

    Weights:
        ``inner`` (W1, b1) and ``outer`` (W2, b2), drawn as ``torch.nn.Linear`` draws them.

    Raises:
        ValueError: a domain that is not a Graph, more than 2^28 pairs times steps.

    Example:
        >>> ring = xf.Graph(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
        >>> i = torch.arange(3)
        >>> RandomWalkBias(4, steps=8).pair(ring).at(i[:, None], i[None, :]).shape
        torch.Size([4, 3, 3])
    """

    def __init__(self, heads: Size, steps: Size, *, hidden: Size = 64) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        self.steps = check_size("steps", steps)
        self.inner = nn.Linear(steps, check_size("hidden", hidden))
        self.outer = nn.Linear(hidden, heads)

    def reset_parameters(self) -> None:
        """Draw the network anew."""
        self.inner.reset_parameters()
        self.outer.reset_parameters()

    def table(self, domain: Domain, dtype: torch.dtype | None) -> Float[Tensor, "pairs heads"]:
        """The scores of all pairs within graphs."""
        if not isinstance(domain, Graph):
            raise no_meaning(
                self, domain, "Walks need edges; use ContinuousBias(heads), which is defined on every domain."
            )
        dtype = at_least_fp32(dtype or dtype_of(self))
        return Network.of(self.inner, self.outer, F.relu, dtype).scores(domain.walks(self.steps, dtype))

    def extra_repr(self) -> str:
        return f"{self.heads}, steps={self.steps}"


class GaussianBias(Bias):
    """A network of the distance in space, seen through Gaussians: Graphormer-3D (Shi et al. 2022, arXiv:2203.04810) and Uni-Mol (Zhou et
    al. 2023).

        b_ij = W2 gelu(W1 psi(a d_ij + c) + b1) + b2,   psi_k(u) = exp(-((u - mu_k) / s_k)^2 / 2) / (sqrt(2 pi) s_k)

    Means, widths, a and c are learned, as there; there a and c depend on the kinds of the two atoms, which ``Points`` do not know. Scores
    are computed for each pair when it is met, in the backward again. Coordinates that require grad get one.

    Args:
        heads: attention heads, of the queries.
        kernels: Gaussians, and the width of the network.
        max_distance: means are drawn from 0 to here, and widths; the papers' 3 (in angstrom).

    Weights:
        ``means`` and ``widths`` (kernels,), drawn evenly up to ``max_distance``; ``factor`` a = 1 and ``shift`` c = 0; ``inner`` (W1, b1)
        and ``outer`` (W2, b2).

    Raises:
        ValueError: a domain that is not Points.

    Example:
        >>> GaussianBias(4).pair(xf.Points(torch.randn(10, 3))).at(torch.tensor([0, 1]), torch.tensor([5, 7])).shape
        torch.Size([4, 2])
    """

    def __init__(self, heads: Size, kernels: Size = 128, *, max_distance: float = 3.0) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        self.max_distance = check_positive("max_distance", max_distance)
        self.means = nn.Parameter(torch.empty(check_size("kernels", kernels)))
        self.widths = nn.Parameter(torch.empty(kernels))
        self.factor, self.shift = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.inner = nn.Linear(kernels, kernels)
        self.outer = nn.Linear(kernels, heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Gaussians and network anew."""
        nn.init.uniform_(self.means, 0, self.max_distance)
        nn.init.uniform_(self.widths, 0, self.max_distance)
        nn.init.ones_(self.factor)
        nn.init.zeros_(self.shift)
        self.inner.reset_parameters()
        self.outer.reset_parameters()

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        if not isinstance(domain, Points):
            raise no_meaning(
                self,
                domain,
                "It is of distances in space; use ContinuousBias(heads), which is defined on every domain.",
            )
        dtype = at_least_fp32(dtype or self.means.dtype)
        gaussians = tuple(part.to(dtype) for part in (self.means, self.widths, self.factor, self.shift))
        network = Network.of(self.inner, self.outer, F.gelu, dtype)
        if network.weights:
            return _GaussianPair(domain, keys, gaussians, network)
        q_places, k_places = placed(domain), placed(keys)
        return EveryPair(
            domain,
            keys,
            lambda b, q, k: network.scores(_seen(_distances(q_places, k_places, b, q, k, dtype), *gaussians)),
            self.heads,
        )

    def extra_repr(self) -> str:
        return f"{self.heads}, kernels={self.means.numel()}"


class _GaussianPair(PlacePair):
    """The network evaluated at each pair of points."""

    def __init__(self, domain: Domain, keys: Domain, gaussians: tuple[Tensor, ...], network: Network) -> None:
        rows, weights = rows_of_batch(domain, keys), (*gaussians, *network.weights)
        super().__init__(domain, keys, weights, heads=network.weights[1].shape[0], batch_size=rows)
        self.network = network

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = _distances(self.domain, self.keys, b, q, k, self.weights[0].dtype)
        scores = in_blocks(self._block, distance.reshape(-1, 1), self.weights)
        return scores.reshape(*distance.shape[:-1], self.heads).movedim(-1, 0)

    def _block(self, distance: Float[Tensor, "pairs 1"], *weights: Tensor) -> Float[Tensor, "pairs heads"]:
        with no_autocast(distance.device):
            return self.network.using(weights[4:]).scores(_seen(distance, *weights[:4]))


def _distances(
    domain: Domain, keys: Domain, b: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype
) -> Float[Tensor, "*pairs 1"]:
    return domain.distance(keys, b, q, k).to(dtype)[..., None]


def _seen(
    distance: Float[Tensor, "*pairs 1"],
    means: Float[Tensor, " kernels"],
    widths: Float[Tensor, " kernels"],
    factor: Float[Tensor, ""],
    shift: Float[Tensor, ""],
) -> Float[Tensor, "*pairs kernels"]:
    """Distances as the Gaussians see them."""
    width = widths.abs() + 1e-5  # as in the papers' code
    return torch.exp(-0.5 * ((factor * distance + shift - means) / width) ** 2) / (math.sqrt(2 * math.pi) * width)


class _Columns(Recorded):
    """The sum of a learned row for the value of each column.

    Args:
        dim: channels.
        sizes: how many values each column has.
    """

    first: Int[Tensor, " columns"]

    def __init__(self, dim: Size, sizes: Sequence[int]) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.sizes = tuple(check_size("sizes", size) for size in sizes)
        if not self.sizes:
            raise ValueError("sizes must name the values of at least one column; got none")
        size = torch.tensor(self.sizes)
        self.register_buffer("first", size.cumsum(0) - size, persistent=False)
        self.table = nn.Parameter(torch.empty(int(size.sum()), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows anew, of each column by Glorot and Bengio's rule."""
        with torch.no_grad():
            for part in self.table.split(self.sizes):
                nn.init.xavier_uniform_(part)

    def forward(self, x: Shaped[Tensor, "rows *columns"]) -> Float[Tensor, "rows dim"]:
        """A row for each atom or bond."""
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"categories must be integers; got {x.dtype}. Use x.long() if they are whole numbers.")
        x = x[:, None] if x.ndim == 1 and len(self.sizes) == 1 else x
        if x.ndim != 2 or x.shape[1] != len(self.sizes):
            raise ValueError(
                f"categories must be (rows, {len(self.sizes)}), a column for each of sizes; got {tuple(x.shape)}"
            )
        if not is_compiling() and x.numel():
            wrong = ((x < 0) | (x >= x.new_tensor(self.sizes))).any(0)
            if bool(wrong.any()):
                c = int(wrong.int().argmax())
                raise ValueError(
                    f"column {c} must hold values from 0 to {self.sizes[c] - 1}; got values from {int(x[:, c].min())} to "
                    f"{int(x[:, c].max())}. Give other sizes."
                )
        return F.embedding_bag(x.long() + self.first, self.table, mode="sum")

    def extra_repr(self) -> str:
        return f"{self.dim}, sizes={self.sizes}"


class AtomEncoder(_Columns):
    """Atoms as vectors: the sum of a learned row for each categorical feature, as in the Open Graph Benchmark (Hu et al. 2020,
    arXiv:2005.00687). Give it to a model as ``in_channels``.

    Args:
        dim: channels.
        sizes: how many values each column has. Default: the benchmark's nine, from atomic number to ring membership.

    Shapes:
        x (atoms, columns) integers, or (atoms,) for a single column. Returns (atoms, dim).

    Weights:
        ``table`` (sum of sizes, dim), the rows of the columns one below the other.

    Raises:
        TypeError, ValueError: values that are no integers or out of range.

    Example:
        >>> AtomEncoder(64)(torch.zeros(5, 9).long()).shape
        torch.Size([5, 64])
        >>> AtomEncoder(64, sizes=[28])(torch.arange(5)).shape  # the kinds of atoms in ZINC
        torch.Size([5, 64])
    """

    def __init__(self, dim: Size, sizes: Sequence[int] = ATOM_SIZES) -> None:
        super().__init__(dim, sizes)


class BondEncoder(_Columns):
    """Bonds as vectors: the sum of a learned row for each categorical feature, as in the Open Graph Benchmark (Hu et al. 2020,
    arXiv:2005.00687).

    Args:
        dim: channels.
        sizes: how many values each column has. Default: the benchmark's three, kind of bond, stereochemistry, conjugated.

    Shapes:
        edge_attr (bonds, columns) integers, or (bonds,) for a single column. Returns (bonds, dim).

    Weights:
        ``table`` (sum of sizes, dim), the rows of the columns one below the other.

    Raises:
        TypeError, ValueError: values that are no integers or out of range.

    Example:
        >>> BondEncoder(16)(torch.zeros(7, 3).long()).shape
        torch.Size([7, 16])
    """

    def __init__(self, dim: Size, sizes: Sequence[int] = BOND_SIZES) -> None:
        super().__init__(dim, sizes)
