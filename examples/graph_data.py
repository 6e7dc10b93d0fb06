"""Graphs with what is to be said of them, or of their nodes: read from digits, files or PyTorch Geometric, split, and put into batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from labelled_series import stratified
from torch import Tensor

Metric = Literal["accuracy", "auc", "mae", "rmse"]
Parts = dict[str, Tensor]
NAMES = ("train", "validation", "test")
SPLIT_SEED = 0  # of what is held out where the data does not say: the same in every run, so that scores can be compared


class Batch(NamedTuple):
    """Some graphs, as models on PyTorch Geometric's interface take them, and the targets of ``rows`` of what a model returns."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    batch: Tensor
    num_graphs: int
    rows: Tensor | None
    y: Tensor

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Graphs:
    """Graphs one behind the other.

    Attributes:
        x: (nodes, features), numbers or categories.
        edge_index: (2, edges), counted from 0 within each graph.
        edge_attr: (edges, features), numbers or categories, or None.
        node_ptr, edge_ptr: where the nodes and the edges of each graph begin, and where the last one's end.
        places: (nodes, 2), where to draw a node, across and down; or None.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    node_ptr: Tensor
    edge_ptr: Tensor
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    def batch(self, index: Tensor, rows: Tensor | None, y: Tensor) -> Batch:
        """The graphs of an index."""
        nodes, edges = (ptr.diff()[index] for ptr in (self.node_ptr, self.edge_ptr))
        of_nodes, of_edges = _ranges(self.node_ptr[index], nodes), _ranges(self.edge_ptr[index], edges)
        first = (nodes.cumsum(0) - nodes).repeat_interleave(edges)
        x, edge_attr = self.x[of_nodes], None if self.edge_attr is None else self.edge_attr[of_edges]
        owner = torch.arange(len(index)).repeat_interleave(nodes)
        edge_index = self.edge_index[:, of_edges].long() + first
        return Batch(_wide(x), edge_index, None if edge_attr is None else _wide(edge_attr), owner, len(index), rows, y)


def _ranges(start: Tensor, count: Tensor) -> Tensor:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    return torch.arange(int(count.sum())) + (start - count.cumsum(0) + count).repeat_interleave(count)


def _wide(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()


class Data(NamedTuple):
    """A data set: ``y`` of each graph, or of each node of the only one, and the splits that it comes with, if any."""

    name: str
    graphs: Graphs
    y: Tensor
    of_nodes: bool
    metric: Metric
    splits: list[Parts]

    @property
    def outputs(self) -> int:
        return int(self.y.max()) + 1 if self.metric == "accuracy" else 1


# -- data sets ---------------------------------------------------------------------------------------------------------


def load(path: Path | None, pyg: str | None = None, downloads: Path = Path()) -> Data:
    """The data set that was asked for; the digits where none was."""
    if pyg is not None:
        try:
            return load_pyg(pyg, downloads)
        except OSError as error:  # of the network, or that nothing is there
            raise ValueError(f"--pyg: {pyg} cannot be downloaded; is it the name of a data set? {error}") from error
    if path is None:
        return load_digits()
    if path.is_dir():
        return load_folder(path)
    if path.suffix != ".npz" or not path.exists():
        raise ValueError(f"--data must be an .npz file or a folder; there is none at {path}")
    with np.load(path, allow_pickle=False) as file:
        held = dict(file.items())
    for key, read in (("edge_index_local", _graphs), ("x_indptr", _planetoid), ("node_features", _one_graph)):
        if key in held:
            try:
                return read(path.parent.name if path.stem == "graphs" else path.stem, held)
            except KeyError as error:
                raise ValueError(f"--data: {path} has {key}, but no {error}; it has {', '.join(held)}") from error
    raise ValueError(f"--data: {path} must have edge_index_local, x_indptr or node_features; it has {', '.join(held)}")


def load_digits() -> Data:
    """Handwritten digits, from files inside the package scikit-learn: a node for each pixel with ink, edges to the 8 around it.

    A node has its intensity and its place, an edge the step that it makes.
    """
    from sklearn.datasets import load_digits as read

    found = read()
    ink = torch.tensor(found.images, dtype=torch.float32) / 16
    number, row, column = (ink > 0).nonzero(as_tuple=True)
    nodes = (ink > 0).sum((1, 2))
    node_ptr = _ptr(nodes)
    index = torch.full((len(ink), 10, 10), -1)  # of the node at a pixel, with a border around
    index[number, row + 1, column + 1] = torch.arange(len(number))
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    beside = torch.stack([index[number, row + 1 + down, column + 1 + right] for down, right in steps], 1)
    target, step = (beside >= 0).nonzero(as_tuple=True)
    edges = torch.stack([beside[target, step], target]) - node_ptr[number[target]]
    x = torch.stack([ink[number, row, column], row / 3.5 - 1, column / 3.5 - 1], 1)
    edge_ptr = _ptr(torch.bincount(number[target], minlength=len(ink)))
    offsets = torch.tensor(steps, dtype=torch.float32)[step]
    places = torch.stack([column, row], 1).float()
    graphs = Graphs(x, edges, offsets, node_ptr, edge_ptr, places)
    return Data("digits", graphs, torch.tensor(found.target), False, "accuracy", [])


def _ptr(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _graphs(name: str, held: dict[str, Any]) -> Data:
    """Many graphs in one file: x, edge_index_local, edge_attr, node_ptr, edge_ptr, y, and indices train, val, test or scaffold_*."""
    y = torch.from_numpy(held["y"])
    edge_attr = _columns(torch.from_numpy(held["edge_attr"])) if "edge_attr" in held else None
    edges, pointers = torch.from_numpy(held["edge_index_local"]), [held[key] for key in ("node_ptr", "edge_ptr")]
    node_ptr, edge_ptr = (torch.from_numpy(pointer).long() for pointer in pointers)
    graphs = Graphs(_columns(torch.from_numpy(held["x"])), edges, edge_attr, node_ptr, edge_ptr)
    metric: Metric = "accuracy"
    if y.is_floating_point():
        of_two = set(y.unique().tolist()) <= {0.0, 1.0}
        metric = "auc" if of_two else "rmse" if "scaffold_train" in held else "mae"
    prefix = "scaffold_" if "scaffold_train" in held else ""
    given = {part: held[prefix + short] for part, short in zip(NAMES, ("train", "val", "test"), strict=True)}
    splits = [{part: torch.from_numpy(index).long() for part, index in given.items()}]
    return Data(name, graphs, y if metric == "accuracy" else y.float(), False, metric, splits)


def _columns(values: Tensor) -> Tensor:
    return values[:, None] if values.ndim == 1 else values


def _planetoid(name: str, held: dict[str, Any]) -> Data:
    """A citation network: sparse features x_*, edge_index, y, and indices train, val, test."""
    rows = np.repeat(np.arange(len(held["x_indptr"]) - 1), np.diff(held["x_indptr"]))
    x = torch.zeros(*held["x_shape"].tolist())
    x[rows, held["x_indices"]] = torch.from_numpy(held["x_data"])
    x = x / x.sum(1, keepdim=True).clamp(min=1)
    split = {part: torch.from_numpy(held[short]) for part, short in zip(NAMES, ("train", "val", "test"), strict=True)}
    y, edge_index = torch.from_numpy(held["y"]), torch.from_numpy(held["edge_index"])
    return Data(name, _alone(x, edge_index), y, True, "accuracy", [split])


def _one_graph(name: str, held: dict[str, Any]) -> Data:
    """A heterophilous graph (arXiv:2302.11640): node_features, node_labels, edges in one direction, and masks of splits."""
    y, edges = torch.from_numpy(held["node_labels"]), torch.from_numpy(held["edges"]).T
    both = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    masks = zip(*(held[f"{short}_masks"] for short in ("train", "val", "test")), strict=True)
    splits = [
        {part: torch.from_numpy(mask.nonzero()[0]) for part, mask in zip(NAMES, split, strict=True)} for split in masks
    ]
    x = torch.from_numpy(held["node_features"]).float()
    of_two = int(y.max()) == 1
    return Data(name, _alone(x, both), y.float() if of_two else y, True, "auc" if of_two else "accuracy", splits)


def _alone(x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None) -> Graphs:
    return Graphs(x, edge_index, edge_attr, torch.tensor([0, len(x)]), torch.tensor([0, edge_index.shape[1]]))


def load_folder(folder: Path) -> Data:
    """A file of graphs as those of Xu et al. (2018, arXiv:1810.00826) are, and ten folds in 10fold_idx: the node tags are categories.

    The file has the number of graphs; then of each the number of its nodes and its class, and a line for each node: tag, number of
    neighbours, neighbours.
    """
    file = next((path for path in sorted(folder.glob("*.txt")) if path.stem != "SOURCE"), None)
    if file is None:
        raise ValueError(f"--data: {folder} must have a file of graphs, such as PROTEINS.txt; there is no .txt file")
    lines = iter(file.read_text().split("\n"))
    tags, labels, sizes, degrees = [], [], [], []
    sources: list[int] = []
    targets: list[int] = []
    for _ in range(int(next(lines))):
        size, label = map(int, next(lines).split()[:2])
        edges = len(sources)
        for node in range(size):
            tag, count, *others = map(int, next(lines).split())
            tags.append(tag)
            sources += others[:count]
            targets += [node] * count
        labels.append(label)
        sizes.append(size)
        degrees.append(len(sources) - edges)
    x = torch.tensor(tags).unique(return_inverse=True)[1][:, None]
    y = torch.tensor(labels).unique(return_inverse=True)[1]
    edge_index = torch.tensor([sources, targets])
    graphs = Graphs(x, edge_index, None, _ptr(torch.tensor(sizes)), _ptr(torch.tensor(degrees)))
    splits = []
    for fold in range(1, 11):
        paths = {part: folder / "10fold_idx" / f"{part}_idx-{fold}.txt" for part in ("train", "test")}
        if all(path.exists() for path in paths.values()):
            splits.append({part: torch.tensor([*map(int, path.read_text().split())]) for part, path in paths.items()})
    return Data(file.stem, graphs, y, False, "accuracy", splits)


def load_pyg(name: str, downloads: Path) -> Data:
    """A data set of PyTorch Geometric's, downloaded when it is first asked for."""
    from torch_geometric import datasets

    root = str(downloads / name)
    if name in ("Cora", "CiteSeer", "PubMed"):
        one = datasets.Planetoid(root, name)[0]
        masks = zip(NAMES, (one.train_mask, one.val_mask, one.test_mask), strict=True)
        x = one.x / one.x.sum(1, keepdim=True).clamp(min=1)
        return Data(
            name, _alone(x, one.edge_index), one.y, True, "accuracy", [{k: m.nonzero()[:, 0] for k, m in masks}]
        )
    if name == "ZINC":
        sets = [datasets.ZINC(root, subset=True, split=part) for part in ("train", "val", "test")]
        found = [graph for part in sets for graph in part]
        ends = np.cumsum([len(part) for part in sets])
        split = {
            part: torch.arange(end - len(own), end) for part, own, end in zip(NAMES, sets, ends.tolist(), strict=True)
        }
        return Data(name, _together(found), torch.cat([graph.y for graph in found]), False, "mae", [split])
    found = list(datasets.TUDataset(root, name, use_node_attr=True))
    return Data(name, _together(found), torch.cat([graph.y for graph in found]), False, "accuracy", [])


def _together(found: list[Any]) -> Graphs:
    """Graphs of PyTorch Geometric's; nodes without features have a feature of 1."""
    x = [torch.ones(graph.num_nodes, 1) if graph.x is None else _columns(graph.x) for graph in found]
    edge_attr = None if found[0].edge_attr is None else torch.cat([_columns(graph.edge_attr) for graph in found])
    node_ptr, edge_ptr = (
        _ptr(torch.tensor([getattr(graph, count) for graph in found])) for count in ("num_nodes", "num_edges")
    )
    return Graphs(torch.cat(x), torch.cat([graph.edge_index for graph in found], 1), edge_attr, node_ptr, edge_ptr)


# -- parts -------------------------------------------------------------------------------------------------------------


def split(data: Data, number: int, validation: float, test: float) -> Parts:
    """Indices of train, validation and test: those that the data comes with, and what is missing held out. The same at every call."""
    if number >= max(1, len(data.splits)):
        raise ValueError(f"--splits must be below {max(1, len(data.splits))} for {data.name}; got {number}")
    given = data.splits[number] if data.splits else {"train": torch.arange(len(data.y))}
    parts = dict(given)
    for name, share in (("test", test), ("validation", validation)):
        if name not in parts:
            strata = data.y if data.metric == "accuracy" else torch.zeros(len(data.y))
            kept, out = stratified(strata[parts["train"]], share, SPLIT_SEED)
            parts |= {"train": parts["train"][kept], name: parts["train"][out]}
    for name in NAMES:
        if not len(parts[name]):
            raise ValueError(f"{name} would be empty: there are too few graphs; give other shares")
    return {name: parts[name] for name in NAMES}


def batches(data: Data, part: Tensor, size: int, *, shuffle: bool = False) -> list[Tensor]:
    """Which of a part are in each batch; all nodes of one graph are in the same."""
    if data.of_nodes:
        return [part]
    return list((part[torch.randperm(len(part))] if shuffle else part).split(size))


def batch_of(data: Data, index: Tensor) -> Batch:
    """The graphs of an index, or the one graph with the targets of some of its nodes."""
    if data.of_nodes:
        return data.graphs.batch(torch.tensor([0]), index, data.y[index])
    return data.graphs.batch(index, None, data.y[index])
