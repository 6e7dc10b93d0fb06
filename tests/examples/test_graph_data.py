from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graph as example
import graph_data as data
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from tests.examples.graphs import TINY, rings, saved


def test_digits_have_a_node_for_each_pixel_with_ink_and_edges_to_those_around() -> None:
    from sklearn.datasets import load_digits

    found, images = data.load(None), load_digits().images
    graphs = found.graphs
    assert len(graphs) == len(images) and graphs.places is not None and graphs.edge_attr is not None
    for number in (0, 7, 1796):
        batch = graphs.batch(torch.tensor([number]), None, found.y[[number]])
        image = torch.zeros(8, 8)
        places = graphs.places[graphs.node_ptr[number] : graphs.node_ptr[number + 1]].long()
        image[places[:, 1], places[:, 0]] = batch.x[:, 0]
        assert torch.equal(image, torch.tensor(images[number] / 16).float())
        near = (places[:, None] - places).abs().amax(-1) == 1
        adjacency = torch.zeros_like(near)
        adjacency[batch.edge_index[1], batch.edge_index[0]] = True
        assert torch.equal(adjacency, near) and batch.edge_index.shape[1] == int(near.sum())
        source, target = places[batch.edge_index]
        assert batch.edge_attr is not None
        assert torch.equal(batch.edge_attr.flip(1), (source - target).float())


@given(st.lists(st.integers(0, 39), min_size=1, max_size=8))
def test_a_batch_is_its_graphs_one_behind_the_other(index: list[int]) -> None:
    held = rings(lambda size: size.astype(np.float32), scaffold=False)
    found = data._graphs("rings", held)
    batch = data.batch_of(found, torch.tensor(index))
    first, edges = 0, 0
    for place, number in enumerate(index):
        nodes, links = slice(*held["node_ptr"][number : number + 2]), slice(*held["edge_ptr"][number : number + 2])
        size, count = nodes.stop - nodes.start, links.stop - links.start
        own = batch.edge_index[:, edges : edges + count] - first
        assert torch.equal(own, torch.tensor(held["edge_index_local"][:, links].astype(np.int64)))
        assert torch.equal(batch.x[first : first + size, 0], torch.tensor(held["x"][nodes].astype(np.int64)))
        assert batch.edge_attr is not None
        assert batch.edge_attr[edges : edges + count, 0].tolist() == held["edge_attr"][links].tolist()
        assert batch.batch[first : first + size].tolist() == [place] * size
        first, edges = first + size, edges + count
    assert len(batch.x) == first and batch.edge_index.shape[1] == edges and batch.num_graphs == len(index)


def test_a_citation_network(tmp_path: Path) -> None:
    features = np.array([[0, 1, 1], [0, 0, 0], [2, 0, 0], [0, 0, 3]], np.float32)
    rows, columns = features.nonzero()
    indices = {"train": np.array([0, 1]), "val": np.array([2]), "test": np.array([3])}
    found = saved(
        tmp_path,
        {
            "x_indptr": np.r_[0, np.bincount(rows, minlength=4).cumsum()], "x_indices": columns,
            "x_data": features[rows, columns], "x_shape": np.array([4, 3]), "y": np.array([0, 1, 1, 0]),
            "edge_index": np.array([[0, 1], [1, 0]]), **indices,
        },
    )  # fmt: skip
    expected = torch.tensor([[0, 0.5, 0.5], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert torch.equal(found.graphs.x, expected) and found.of_nodes and found.metric == "accuracy"
    assert {name: part.tolist() for name, part in data.split(found, 0, 0.1, 0.1).items()} == {
        "train": [0, 1], "validation": [2], "test": [3]
    }  # fmt: skip


def test_a_folder_of_graphs_and_its_folds(tmp_path: Path) -> None:
    lines = ["40"]
    for number in range(40):
        lines += [f"3 {number % 2}", f"{number % 2} 1 1", "5 2 0 2", "5 1 1"]
    (tmp_path / "PAIRS.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "10fold_idx").mkdir()
    for fold in range(1, 11):
        test = np.arange(40) // 4 == fold - 1
        for name, part in (("train", ~test), ("test", test)):
            (tmp_path / "10fold_idx" / f"{name}_idx-{fold}.txt").write_text("\n".join(map(str, part.nonzero()[0])))
    found = data.load(tmp_path)
    assert (found.name, len(found.graphs), found.outputs, len(found.splits)) == ("PAIRS", 40, 2, 10)
    parts = data.split(found, 3, 0.25, 0.1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 28, "validation": 8, "test": 4}
    assert parts["test"].tolist() == [12, 13, 14, 15]
    assert len(torch.cat(list(parts.values())).unique()) == 40
    batch = data.batch_of(found, torch.tensor([0, 1]))
    assert batch.x[:, 0].tolist() == [0, 2, 2, 1, 2, 2]
    assert batch.edge_index.tolist() == [[1, 0, 2, 1, 4, 3, 5, 4], [0, 1, 1, 2, 3, 4, 4, 5]]
    with pytest.raises(ValueError, match="--splits must be below 10 for PAIRS; got 10"):
        data.split(found, 10, 0.1, 0.1)


def test_data_sets_of_pyg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_geometric import datasets
    from torch_geometric.data import Data

    def made(number: int) -> Data:
        edges = torch.tensor([[0, 1], [1, 0]])
        y = torch.tensor([number % 2])
        return Data(x=None if number < 9 else torch.tensor([number, 1]), edge_index=edges, y=y, num_nodes=2)

    asked: list[Any] = []

    def tu(root: str, name: str, **_: Any) -> list[Data]:
        asked.append((root, name))
        return [made(number) for number in range(6)]

    monkeypatch.setattr(datasets, "TUDataset", tu)
    found = data.load(None, "PAIRS", tmp_path)
    assert asked == [(str(tmp_path / "PAIRS"), "PAIRS")]
    assert len(found.graphs) == 6 and torch.equal(found.graphs.x, torch.ones(12, 1)) and found.outputs == 2
    assert data.batch_of(found, torch.tensor([1, 5])).edge_index.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2]]

    def missing(root: str, name: str, **_: Any) -> None:
        raise FileNotFoundError(f"https://there.is/none/{name}.zip")

    monkeypatch.setattr(datasets, "TUDataset", missing)
    with pytest.raises(ValueError, match=r"--pyg: PEARS cannot be downloaded; .* https://there.is/none/PEARS.zip"):
        data.load(None, "PEARS", tmp_path)

    sizes = {"train": 4, "val": 1, "test": 2}
    monkeypatch.setattr(datasets, "ZINC", lambda root, subset, split: [made(9)] * sizes[split])
    parts = data.split(data.load(None, "ZINC", tmp_path), 0, 0.1, 0.1)
    assert [part.tolist() for part in parts.values()] == [[0, 1, 2, 3], [4], [5, 6]]

    one = SimpleNamespace(x=torch.eye(3) * 2, edge_index=torch.tensor([[0], [1]]), y=torch.tensor([0, 1, 2]))
    for row, name in enumerate(("train_mask", "val_mask", "test_mask")):
        setattr(one, name, torch.arange(3) == row)
    monkeypatch.setattr(datasets, "Planetoid", lambda root, name: [one])
    found = data.load(None, "Cora", tmp_path)
    assert found.of_nodes and torch.equal(found.graphs.x, torch.eye(3))
    assert [part.tolist() for part in data.split(found, 0, 0.1, 0.1).values()] == [[0], [1], [2]]


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have edge_index_local, x_indptr or node_features; it has a"):
        saved(tmp_path, {"a": np.zeros(3)})
    held = rings(lambda size: size.astype(np.float32), scaffold=False)
    del held["node_ptr"]
    with pytest.raises(ValueError, match="has edge_index_local, but no 'node_ptr'"):
        saved(tmp_path, held)
    found = data._graphs("", rings(lambda size: (size > 9).astype(np.float32), scaffold=False))
    with pytest.raises(ValueError, match="train must have both classes for ROC-AUC"):
        example.task_of(TINY, found, 0, torch.device("cpu"))
