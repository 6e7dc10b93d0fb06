"""Graphs: along edges, and all pairs of nodes of each of many small ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import masks, positions

from ._measure import Line, Setting, Side, Target, Work, attention_bytes, attention_flops, installed
from .windows import ours


def unique_edges(nodes: int, count: int, weights: Tensor | None = None) -> Tensor:
    """``count`` different directed edges between nodes drawn evenly, or by ``weights``."""
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.empty(0, dtype=torch.long)
    while drawn.numel() < count:
        shape = (2, count)
        if weights is None:
            ends = torch.randint(nodes, shape, generator=generator)
        else:
            ends = torch.multinomial(weights, 2 * count, replacement=True, generator=generator).view(shape)
        drawn = torch.cat([drawn, ends[0] * nodes + ends[1]]).unique()
    kept = drawn[torch.randperm(drawn.numel(), generator=generator)[:count]]
    return torch.stack([kept // nodes, kept % nodes])


def as_nodes(x: Tensor) -> Tensor:
    """``(1, H, N, D)`` as PyG's ``(N, H, D)``, of its own."""
    return x.detach()[0].transpose(0, 1).contiguous().requires_grad_(x.requires_grad)


def as_tokens(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


# -- edges ---------------------------------------------------------------------------------------------------------------


def edges(setting: Setting) -> Work:
    nodes, count, heads, dim = setting.size(20_000, 200), setting.size(200_000, 2000), 8, 32
    edge_index = unique_edges(nodes, count).to(setting.device)
    inputs, grad = setting.qkv(1, heads, nodes, dim)
    side, kernel = ours(setting, masks.Edges(), xf.Graph(edge_index, nodes), inputs, grad)

    def peer() -> Side:
        from torch_geometric.nn import TransformerConv

        conv = TransformerConv(heads * dim, dim, heads=heads)
        q, k, v = own = tuple(map(as_nodes, inputs))
        return Side(
            lambda: conv.propagate(edge_index, query=q, key=k, value=v, edge_attr=None), own, as_nodes(grad), as_tokens
        )

    return Work(side, installed(peer), kernel, attention_flops(count, heads, dim), attention_bytes(grad))


def many_edges(setting: Setting) -> Work:
    nodes = setting.size(50_000 if setting.device == "cpu" else 1_000_000, 200)
    edge_index = unique_edges(nodes, 10 * nodes).to(setting.device)
    inputs, grad = setting.qkv(1, 8, nodes, 32)
    side, kernel = ours(setting, masks.Edges(), xf.Graph(edge_index, nodes), inputs, grad)
    return Work(side, None, kernel, attention_flops(10 * nodes, 8, 32), attention_bytes(grad))


def edge_features(setting: Setting) -> Work:
    """Features of edges are projected and added to keys and values, in ours without a vector for each edge and head."""
    from xformerlib.kernels._pattern import Pattern
    from xformerlib.kernels._scores import Scores
    from xformerlib.kernels._sparse import edge_attention

    nodes, count, heads, dim, features = setting.size(12_000, 200), setting.size(1_000_000, 2000), 8, 16, 4
    edge_index = unique_edges(nodes, count, (torch.arange(nodes) + 10.0) ** -0.7).to(setting.device)
    edge_attr, weight = (
        setting.random(count, features, seed=5),
        setting.random(heads * dim, features, seed=6).requires_grad_(),
    )
    qkv, grad = setting.qkv(1, heads, nodes, dim)
    order = torch.argsort(edge_index[1] * nodes + edge_index[0])
    pattern = Pattern(edge_index[1, order], edge_index[0, order], nodes, nodes)
    scores, sorted_attr = Scores(None, (), 1 / math.sqrt(dim)), edge_attr[order]

    def forward() -> Tensor:
        by_head = weight.view(heads, dim, features)
        out, sums = edge_attention(*qkv, pattern, scores, qkv[0] @ by_head, sorted_attr)
        return out + sums @ by_head.transpose(1, 2)

    def peer() -> Side:
        from torch_geometric.nn import TransformerConv

        conv = TransformerConv(heads * dim, dim, heads=heads, edge_dim=features).to(setting.device, setting.dtype)
        with torch.no_grad():
            conv.lin_edge.weight.copy_(weight)
        q, k, v = own = tuple(map(as_nodes, qkv))
        return Side(
            lambda: conv.propagate(edge_index, query=q, key=k, value=v, edge_attr=edge_attr),
            (*own, conv.lin_edge.weight), as_nodes(grad), as_tokens,
        )  # fmt: skip

    flops = attention_flops(count, heads, dim + features)
    held = [pattern.row, pattern.col, pattern.rowptr, sorted_attr]
    return Work(Side(forward, (*qkv, weight), grad, held=held), installed(peer), "sparse", flops, attention_bytes(grad))


# -- batches of small graphs ---------------------------------------------------------------------------------------------


def zinc_sizes(count: int) -> Tensor:
    """Atoms of molecules as in ZINC: 9 to 37, 23 on average, a standard deviation of 4.5."""
    drawn = 23 + 4.5 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    return drawn.round().long().clamp(9, 37)


def protein_sizes(count: int) -> Tensor:
    """Nodes of graphs as in PROTEINS: log-normal from 4 on, 39 on average, most of them below that, and one of the largest, of 620."""
    drawn = torch.exp(math.log(22.5) + 0.85 * torch.randn(count, generator=torch.Generator().manual_seed(0)))
    return torch.cat([drawn.round().long().clamp(4, 300)[1:], torch.tensor([620])])


def molecules(sizes: Tensor) -> xf.Graph:
    """Each a chain with a bond from every fifth atom to the one five before it, which closes rings of six."""
    first = (sizes.cumsum(0) - sizes).tolist()
    bonds = []
    for start, size in zip(first, sizes.tolist(), strict=True):
        place = torch.arange(size)
        bonds += [torch.stack([place[:-1], place[1:]]) + start, torch.stack([place[:-5:5], place[5::5]]) + start]
    one_way = torch.cat(bonds, 1)
    batch = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
    return xf.Graph(torch.cat([one_way, one_way.flip(0)], 1), int(sizes.sum()), batch=batch)


def hop_rows(domain: xf.Graph, rows: int) -> Tensor:
    """The row of the hop table for each pair of each padded graph: ``(graphs, longest, longest)``."""
    numbered = positions.RelativeBias(1, buckets=rows)
    with torch.no_grad():
        numbered.table.copy_(torch.arange(rows)[:, None])
        longest = int(domain.sizes.max())
        result = torch.zeros(domain.num_graphs, longest, longest, dtype=torch.long)
        pair, first = numbered.pair(domain, domain), (domain.sizes.cumsum(0) - domain.sizes).tolist()
        for g, (start, size) in enumerate(zip(first, domain.sizes.tolist(), strict=True)):
            at = torch.arange(start, start + size)
            result[g, :size, :size] = pair.at(at[:, None], at[None])[0].long()
    return result


def small_graphs(setting: Setting, sizes: Tensor, heads: int, dim: int, rows: int | None) -> Work:
    """All pairs within each graph, with a learned score for each number of hops where ``rows`` is given."""
    domain = molecules(sizes)
    hops = None if rows is None else hop_rows(domain, rows).to(setting.device)
    domain = domain.to(setting.device)
    qkv, grad = setting.qkv(1, heads, domain.num_tokens, dim)
    bias = None if rows is None else positions.RelativeBias(heads, buckets=rows).to(setting.device)
    tables = () if bias is None else (bias.table,)
    ours = Side(lambda: xf.attention(*qkv, bias=bias, domain=domain), (*qkv, *tables), grad)

    def peer() -> Side:
        from torch_geometric.utils import to_dense_batch

        graph_of, count = domain.batch, domain.num_graphs

        def dense(x: Tensor) -> tuple[Tensor, Tensor]:
            padded, there = to_dense_batch(x, graph_of, batch_size=count)
            return padded.transpose(1, 2), there

        def forward() -> Tensor:
            (q, there), (k, _), (v, _) = map(dense, own)
            mask = there[:, None, None]
            if bias is not None and hops is not None:
                mask = F.embedding(hops, bias.table).permute(0, 3, 1, 2).masked_fill(~mask, float("-inf"))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[there]

        own = tuple(map(as_nodes, qkv))
        return Side(forward, (*own, *tables), as_nodes(grad), as_tokens, [] if hops is None else [hops])

    plan = xf.plan(None, domain, heads=heads, head_dim=dim, dtype=setting.dtype, device=setting.device, bias=bias)
    return Work(
        ours, installed(peer), plan.kernel, attention_flops(int((sizes**2).sum()), heads, dim), attention_bytes(grad)
    )


def zinc(setting: Setting) -> Work:
    return small_graphs(setting, zinc_sizes(setting.size(128, 16)), 8, 8, rows=20)


def proteins(setting: Setting) -> Work:
    sizes = protein_sizes(128)
    return small_graphs(setting, sizes.clamp(max=60)[-16:] if setting.quick else sizes, 8, 8, rows=None)


LINES = (
    Line(
        "edges", "20,000 nodes, 200,000 random edges, 8 heads x 32",
        "PyG TransformerConv, attention part", edges, Target(faster=10, smaller=8),
    ),
    Line("edges-many", "10 random edges for each of 50,000 nodes (CUDA: 1,000,000)", "-", many_edges),
    Line(
        "edge-features", "power-law graph, 12,000 nodes, 1,000,000 edges with 4 features, 8 heads x 16",
        "PyG TransformerConv(edge_dim), attention part", edge_features, Target(faster=4, smaller=20),
    ),
    Line(
        "molecules", "128 molecules (sizes as in ZINC), all pairs, hop table, 8 heads x 8",
        "to_dense_batch, SDPA, dense bias", zinc, Target(faster=2),
    ),
    Line(
        "proteins", "128 protein graphs (sizes as in PROTEINS), all pairs, 8 heads x 8",
        "to_dense_batch, SDPA, key mask", proteins, Target(faster=8, smaller=8),
    ),
)  # fmt: skip
