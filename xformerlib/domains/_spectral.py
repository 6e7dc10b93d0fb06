"""Spectra and random walks of a batch of graphs. Pure functions of tensors; everything is worked out in float64."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ._graph_facts import Stack, Topology, stacks

# Dense eigendecomposition up to this many nodes, a filtered subspace iteration beyond.
LARGEST_DENSE_SPECTRUM = 1000
# The iteration stops when every residual is below TOLERANCE times its eigenvalue, or after this many products with the Laplacian.
TOLERANCE = 1e-6
MOST_PRODUCTS = 50_000
# How much one Chebyshev filter may enlarge the lowest part of the spectrum before the vectors are made orthogonal again.
AMPLIFICATION = 1e10


# Eigenvalues of a small graph that are closer than this, of a spectrum in [0, 2], count as one: rounding leaves 1e-15 between them.
SAME_EIGENVALUE = 1e-9


# -- Laplacian eigenvectors ----------------------------------------------------------------------------------------


def laplacian_eigenvectors(
    topology: Topology, k: int
) -> tuple[Float64[Tensor, "graphs k"], Float64[Tensor, "nodes k"]]:
    """The k lowest nontrivial eigenpairs of each graph's symmetric normalised Laplacian, padded with 0 where there are fewer."""
    device = topology.graph.device
    values = torch.zeros(topology.size.numel(), k, dtype=torch.float64, device=device)
    vectors = torch.zeros(topology.num_nodes, k, dtype=torch.float64, device=device)
    simple = undirected(topology)
    component = components(simple.source, simple.target, simple.num_nodes)
    is_root = component == torch.arange(component.numel(), device=device)
    trivial = torch.bincount(topology.graph[is_root], minlength=topology.size.numel())
    for stack in stacks(simple, LARGEST_DENSE_SPECTRUM):
        if stack.n > LARGEST_DENSE_SPECTRUM:
            theta, v = _lowest_of_large(stack, component[stack.nodes[0]], k)
        else:
            theta, v = _lowest_of_small(stack, trivial[stack.graphs], k)
        values[stack.graphs], vectors[stack.nodes] = theta, _with_canonical_signs(v)
    return values, vectors


def undirected(topology: Topology) -> Topology:
    """The simple undirected graphs underneath: each pair of neighbours once in each direction, no self-loops."""
    n = max(1, topology.num_nodes)
    both = torch.cat([topology.source * n + topology.target, topology.target * n + topology.source])
    keys = torch.unique(both)
    source, target = keys // n, keys % n
    proper = source != target
    return topology._replace(source=source[proper], target=target[proper])


def components(source: Int[Tensor, " edges"], target: Int[Tensor, " edges"], num_nodes: int) -> Int[Tensor, " nodes"]:
    """The lowest node number in the connected component of each node; edges must be given in both directions.

    Parents are hooked and shortened in rounds, logarithmically many in practice (Zhang, Azad and Hu 2020, "FastSV").
    """
    parent = torch.arange(num_nodes, device=source.device)
    while True:
        grandparent = parent[parent]
        offered = grandparent[target]
        hooked = parent.scatter_reduce(0, parent[source], offered, "amin")
        hooked = hooked.scatter_reduce(0, source, offered, "amin")
        hooked = torch.minimum(hooked, grandparent)
        if torch.equal(hooked, parent):
            return parent
        parent = hooked


def _lowest_of_small(stack: Stack, trivial: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nontrivial eigenpairs of a stack of small graphs, ``(graphs, k)`` and ``(graphs, n, k)``, by one batched decomposition."""
    # On the CPU whatever the device: where eigenvalues coincide, LAPACK and a GPU would choose different eigenvectors.
    adjacency = stack.adjacency(torch.float64).cpu()
    degree = adjacency.sum(-1)
    scale = degree.clamp(min=1).rsqrt()
    laplacian = torch.diag_embed((degree > 0).double()) - scale[:, :, None] * adjacency * scale[:, None, :]
    theta, v = torch.linalg.eigh(laplacian)
    theta, v = (result.to(trivial.device) for result in (theta, _with_canonical_bases(theta, v)))
    # The zeros, one of each connected component, come first.
    pick = trivial[:, None] + torch.arange(k, device=trivial.device)
    exists = pick < stack.n
    pick = pick.clamp(max=stack.n - 1)
    theta = theta.gather(1, pick).masked_fill(~exists, 0)
    v = v.gather(2, pick[:, None, :].expand(-1, stack.n, -1)).masked_fill(~exists[:, None, :], 0)
    return theta, v


def _with_canonical_bases(
    theta: Float64[Tensor, "graphs n"], v: Float64[Tensor, "graphs n n"]
) -> Float64[Tensor, "graphs n n"]:
    """Eigenvectors that depend on the graph alone where eigenvalues coincide, and not on how a solver rounds.

    A solver returns any orthonormal basis V of an eigenspace; LAPACK's depends on where in memory the matrix is. The basis here is what
    Gram and Schmidt make of the projections V V' r of fixed vectors r, and V V' is the same for every V.
    """
    same = (theta.diff(dim=-1) > SAME_EIGENVALUE).long().cumsum(-1)
    space = torch.cat([same.new_zeros(len(same), 1), same], -1)
    together = space[:, :, None] == space[:, None, :]
    multiple = (together.sum(-1) > 1).any(-1)
    if not bool(multiple.any()):
        return v
    some = v[multiple]
    # In the basis V, one block of this matrix for each eigenspace.
    probes = _probes(some.shape[1], some.shape[2], v)
    turn = torch.linalg.qr((some.mT @ probes).masked_fill(~together[multiple], 0)).Q
    v = v.clone()
    v[multiple] = some @ turn
    return v


def _with_canonical_signs(v: Float64[Tensor, "graphs n k"]) -> Float64[Tensor, "graphs n k"]:
    """Eigenvectors with the sign that makes the sum of cubes positive, which does not depend on the order of nodes.

    Where the sum vanishes (the vector is antisymmetric), the product with a fixed vector is made positive.
    """
    cubes, size = v.pow(3).sum(1), v.abs().pow(3).sum(1)
    decisive = torch.where(cubes.abs() > 1e-6 * size, cubes, (v * _probes(v.shape[1], 1, v)).sum(1))
    return torch.where(decisive[:, None, :] < 0, -v, v)


def _probes(n: int, count: int, like: Tensor) -> Float64[Tensor, "n count"]:
    """Fixed vectors in general position."""
    return torch.randn(n, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(like.device)


class _Laplacian:
    """The symmetric normalised Laplacian of one large graph, restricted to the complement of its null space."""

    def __init__(self, stack: Stack, component: Int[Tensor, " n"]) -> None:
        n, device = stack.n, component.device
        degree = torch.bincount(stack.target, minlength=n).double()
        scale = degree.clamp(min=1).rsqrt()
        itself = torch.arange(n, device=device)
        row, col = torch.cat([itself, stack.target]), torch.cat([itself, stack.source])
        values = torch.cat([torch.ones_like(degree), -scale[stack.target] * scale[stack.source]])
        order = torch.argsort(row * n + col)
        self.indices, self.values = torch.stack([row[order], col[order]]), values[order]
        self.on_diagonal = (self.indices[0] == self.indices[1]).double()
        # The null vector of a component is the square root of its degrees.
        roots, self.component = torch.unique(component, return_inverse=True)
        self.num_components = roots.numel()
        weight = degree.clamp(min=1)
        volume = torch.zeros(self.num_components, dtype=torch.float64, device=device).index_add_(
            0, self.component, weight
        )
        self.null = (weight / volume[self.component]).sqrt()[:, None]
        self.matrix = self._sparse(self.values)

    def _sparse(self, values: Tensor) -> Tensor:
        size = (self.component.numel(), self.component.numel())
        return torch.sparse_coo_tensor(self.indices, values, size, is_coalesced=True, check_invariants=False)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, x)

    def project(self, x: Tensor) -> Tensor:
        """``x`` without its part in the null space."""
        part = x.new_zeros(self.num_components, x.shape[1]).index_add_(0, self.component, self.null * x)
        return x - self.null * part[self.component]

    def filter(self, x: Tensor, low: float, degree: int) -> Tensor:
        """A Chebyshev polynomial of the Laplacian times ``x``: at most 1 on [low, 2], growing fast below."""
        centre, half = (2 + low) / 2, (2 - low) / 2
        mapped = self._sparse((self.values - centre * self.on_diagonal) / half)  # takes [low, 2] to [-1, 1]
        before, now = x, torch.sparse.mm(mapped, x)
        for _ in range(degree - 1):
            before, now = now, torch.sparse.addmm(before, mapped, now, beta=-1, alpha=2)
        return now


def _lowest_of_large(stack: Stack, component: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nontrivial eigenpairs of one graph, ``(1, k)`` and ``(1, n, k)``, by Chebyshev-filtered subspace iteration.

    A block method, so that multiple eigenvalues are found; only products with the sparse Laplacian (Zhou et al. 2006,
    "Self-consistent-field calculations using Chebyshev-filtered subspace iteration").
    """
    laplacian = _Laplacian(stack, component)
    rank = stack.n - laplacian.num_components
    wanted, width = min(k, rank), min(2 * k + 8, rank)
    values, vectors = (
        component.new_zeros(1, k, dtype=torch.float64),
        component.new_zeros(1, stack.n, k, dtype=torch.float64),
    )
    if wanted == 0:
        return values, vectors
    start = torch.randn(stack.n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, products = start.to(component.device), 0
    while True:
        basis = torch.linalg.qr(laplacian.project(x)).Q
        theta, turn = torch.linalg.eigh(basis.mT @ laplacian(basis))
        x = basis @ turn
        residual = (laplacian(x[:, :wanted]) - x[:, :wanted] * theta[:wanted]).norm(dim=0)
        converged = bool((residual <= TOLERANCE * theta[:wanted]).all())
        if converged or products >= MOST_PRODUCTS:
            break
        low = min(float(theta[-1]), 1.9)
        degree = math.ceil(math.acosh(AMPLIFICATION) / math.acosh((2 + low) / (2 - low)))
        x, products = laplacian.filter(x, low, degree), products + degree
    if not converged:
        warnings.warn(
            f"Laplacian eigenvectors of a graph of {stack.n} nodes did not converge in {products} products with the Laplacian; the "
            f"largest residual is {float(residual.max()):.1e}. Ask for fewer of them.",
            stacklevel=2,
        )
    values[0, :wanted], vectors[0, :, :wanted] = theta[:wanted], x[:, :wanted]
    return values, vectors
