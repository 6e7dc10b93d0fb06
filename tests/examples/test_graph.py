from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import common
import graph as example
import graph_data as data
import graph_figure as figure
import graph_models as models
import graph_options
import graph_training as training
import numpy as np
import pytest
import torch
from graph_options import Optimizer, Options
from hypothesis import given, strategies as st

from tests.examples import checks
from xformerlib import graph

TINY = Options(dim=8, depth=1, heads=2, epochs=2, batch_size=16, test=0.9)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at something else: drawing takes longer than training."""
    monkeypatch.setattr(figure, "curves", lambda *_: None)
    monkeypatch.setattr(figure, "attention", lambda *_: None)


def rings(y: Any, *, scaffold: bool, graphs: int = 40) -> dict[str, Any]:
    """Rings of 4 to 7 nodes with categories, of which ``y`` makes what is to be said."""
    sizes = np.arange(graphs) % 4 + 4
    first = [np.arange(size) for size in sizes]
    edges = np.concatenate([np.stack([np.r_[i, (i + 1) % len(i)], np.r_[(i + 1) % len(i), i]]) for i in first], 1)
    prefix = "scaffold_" if scaffold else ""
    ends = {"train": slice(0, 24), "val": slice(24, 32), "test": slice(32, 40)}
    return {
        "x": np.concatenate([i % 3 for i in first]).astype(np.uint8),
        "edge_index_local": edges.astype(np.uint8),
        "edge_attr": (np.arange(edges.shape[1]) % 3).astype(np.uint8),
        "node_ptr": np.r_[0, sizes.cumsum()].astype(np.int32),
        "edge_ptr": np.r_[0, 2 * sizes.cumsum()].astype(np.int32),
        "y": y(sizes),
        **{prefix + name: np.arange(graphs)[own].astype(np.int32) for name, own in ends.items()},
    }


def one_graph(classes: int) -> dict[str, Any]:
    noise, labels = np.random.default_rng(0), np.arange(60) % classes
    masks = np.arange(60) // 2 % 4 == np.arange(4)[:, None]
    masks = np.stack([masks, masks[::-1]])
    return {
        "node_features": np.eye(classes, dtype=np.float32)[labels] + 0.1 * noise.normal(size=(60, classes)),
        "node_labels": labels,
        "edges": np.stack([np.arange(59), np.arange(1, 60)], 1),
        "train_masks": masks[:, 0] | masks[:, 1],
        "val_masks": masks[:, 2],
        "test_masks": masks[:, 3],
    }


# -- the whole script --------------------------------------------------------------------------------------------------


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    options = ["--epochs", "2", "--test", "0.9", "--batch-size", "16", "--run", str(tmp_path / "run")]
    done = checks.run_command("graph.py", *options)
    assert "2/2" in done.stderr  # the progress bar
    for word in ("digits: 10 classes for graphs", "33 nodes a graph", "test accuracy", "attention.png", "curves.png"):
        assert word in done.stdout
    run = tmp_path / "run"
    checks.assert_written(run, "attention.png", "curves.png")
    assert [record["epoch"] for record in checks.records(run)] == [1, 2, 2]


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    checks.assert_help_explains(Options, capsys)


def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, epochs=3, position="laplacian", run=tmp_path / "whole")
    checks.assert_continued(example.main, whole, monkeypatch, saved=2)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", get_args(graph_options.Model))
def test_every_model_lowers_the_loss_on_graphs(model: graph_options.Model, tmp_path: Path) -> None:
    found = _saved(tmp_path, rings(lambda size: size.astype(np.float32), scaffold=False))
    o = dataclasses.replace(TINY, model=model, dropout=0.0)
    task = example.task_of(o, found, 0, torch.device("cpu"))
    common.seed_everything(0)
    losses = _losses(models.build(o, found), task, steps=15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", get_args(graph_options.Model))
def test_every_model_lowers_the_loss_on_nodes(model: graph_options.Model, tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))
    o = dataclasses.replace(TINY, model=model, dropout=0.0)
    task = example.task_of(o, found, 0, torch.device("cpu"))
    common.seed_everything(0)
    losses = _losses(models.build(o, found), task, steps=15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("attend", "far"), [("edges", False), ("all", True)])
def test_nodes_of_gps_attend_to_whom_they_are_told(attend: Any, far: bool, tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))  # a path
    model = models.build(dataclasses.replace(TINY, attend=attend, messages="gine"), found).eval()
    batch = data.batch_of(found, torch.arange(60))
    moved = batch.x.clone()
    moved[30] += 5
    with torch.inference_mode():
        changed = (model(batch) - model(batch._replace(x=moved))).abs().amax(1) > 0
    near = torch.zeros(60, dtype=torch.bool)
    near[29:32] = True
    assert torch.equal(changed, torch.ones(60, dtype=torch.bool) if far else near)


@pytest.mark.parametrize(
    ("options", "told"), [({"model": "gine"}, True), ({"messages": "gine"}, True), ({"model": "gin"}, False)]
)
def test_gine_is_told_the_features_of_edges(options: dict[str, Any], told: bool, tmp_path: Path) -> None:
    found = _saved(tmp_path, rings(lambda size: size.astype(np.float32), scaffold=False))
    o = dataclasses.replace(TINY, **options)
    task, model = example.task_of(o, found, 0, torch.device("cpu")), models.build(o, found).eval()
    batch = data.batch_of(found, torch.arange(4))
    assert batch.edge_attr is not None
    others = batch._replace(edge_attr=(batch.edge_attr + 1) % 3)
    with torch.inference_mode():
        assert torch.equal(training.predict(model, task, batch), training.predict(model, task, others)) != told


def test_a_residual_layer_that_says_nothing_leaves_nodes_as_they_are(tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))
    batch = data.batch_of(found, torch.arange(60))
    for residual in (False, True):
        model = models.build(dataclasses.replace(TINY, model="gcn", residual=residual, head="mlp"), found).eval()
        for norm in model.norms:  # type: ignore[union-attr]
            torch.nn.init.zeros_(norm.weight)  # type: ignore[union-attr, arg-type]
        with torch.inference_mode():
            nodes = model.embed(batch.x)
            torch.testing.assert_close(model(batch), model.head(nodes if residual else torch.zeros_like(nodes)))


def test_adam_leads_weights_that_nothing_moves_to_zero(tmp_path: Path, no_picture: None) -> None:
    held = one_graph(3)
    held["node_features"][:, 0] = 0  # a feature that no node has
    np.savez(tmp_path / "tiny.npz", **held)
    left = {}
    for optimizer in get_args(Optimizer):
        o = dataclasses.replace(TINY, model="gcn", epochs=2, epoch_steps=10, lr=0.02, optimizer=optimizer)
        example.main(dataclasses.replace(o, data=tmp_path / "tiny.npz", run=tmp_path / optimizer))
        weights = torch.load(tmp_path / optimizer / "resume.pt", weights_only=True)["parts"]["model"]
        left[optimizer] = float(weights["embed.1.weight"][:, 0].abs().mean())
    assert left["adam"] < 0.9 * left["adamw"]


def test_epochs_of_several_steps_are_the_same_steps(tmp_path: Path, no_picture: None) -> None:
    np.savez(tmp_path / "tiny.npz", **one_graph(3))
    o = dataclasses.replace(TINY, data=tmp_path / "tiny.npz", model="gcn", epochs=6, run=tmp_path / "single")
    example.main(o)
    example.main(dataclasses.replace(o, epochs=2, epoch_steps=3, run=tmp_path / "several"))
    single, several = (
        torch.load(tmp_path / name / "resume.pt", weights_only=True)["parts"]["model"] for name in ("single", "several")
    )
    assert all(torch.equal(single[name], several[name]) for name in single)
    assert [record["epoch"] for record in common.Run(tmp_path / "several", {}).records()] == [1, 2, 2]


@pytest.mark.parametrize("options", [{"messages": "gcn"}, {"messages": "appnp"}, {"graph_weight": 0.0}])
def test_sgformer_passes_messages_as_it_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))
    o = dataclasses.replace(TINY, model="sgformer", **options)
    model, batch = models.build(o, found).eval(), data.batch_of(found, torch.arange(60))
    kinds = {"gcn": "GCNConv", "appnp": "APPNP"}
    assert {type(conv).__name__ for conv in model.convs} == {kinds[o.messages or "gcn"]}  # type: ignore[union-attr]
    with torch.inference_mode():
        alone = model(batch._replace(edge_index=batch.edge_index[:, :0]))
        assert torch.allclose(model(batch), alone, atol=1e-5) == (o.graph_weight == 0)


@pytest.mark.parametrize("model", ["gps", "exphormer", "gcn"])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_layers_have_the_norm_that_was_asked_for(model: Any, norm: Any, tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))
    built = models.build(dataclasses.replace(TINY, model=model, norm=norm), found)
    kinds = {type(module).__name__ for module in built.modules()}
    assert {"BatchNorm1d": "BatchNorm1d" in kinds, "LayerNorm": "LayerNorm" in kinds} == {
        "BatchNorm1d": norm == "batch", "LayerNorm": norm == "layer"
    }  # fmt: skip


def test_input_dropout_leaves_features_out_in_training(tmp_path: Path) -> None:
    found = _saved(tmp_path, one_graph(3))
    model = models.build(dataclasses.replace(TINY, model="gcn", dropout=0.0, input_dropout=0.9), found)
    batch = data.batch_of(found, torch.arange(60))
    assert isinstance(model.embed, torch.nn.Sequential)
    torch.nn.init.zeros_(model.embed[1].bias)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert not model.eval().embed(batch.x).eq(0).all(1).any()
        assert model.train().embed(batch.x).eq(0).all(1).any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": "gcn", "messages": "gine"}, "--messages"),
        ({"model": "sgformer", "messages": "attention"}, "--messages"),
        ({"model": "exphormer", "attend": "edges"}, "--attend"),
        ({"model": "gps", "residual": True}, "--residual"),
        ({"model": "sgformer", "norm": "layer"}, "--norm"),
        ({"model": "sgformer", "graph_weight": 1.5}, "--graph-weight"),
    ],
)
def test_options_that_a_model_has_no_use_for(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(TINY, **options).check()


def _saved(folder: Path, held: dict[str, Any]) -> data.Data:
    np.savez(folder / "tiny.npz", **held)
    return data.load(folder / "tiny.npz")


def _losses(model: torch.nn.Module, task: training.Task, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = data.batch_of(task.data, task.parts["train"])
    losses = []
    for _ in range(steps):
        loss = task.loss(training.predict(model, task, batch), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_edge_weights_are_those_of_the_last_layer_and_sum_to_one() -> None:
    found = data.load(None)
    o = dataclasses.replace(TINY, depth=2)
    batch = data.batch_of(found, torch.arange(5))
    for name in ("gps", "exphormer", "gat"):
        model = models.build(dataclasses.replace(o, model=name), found)
        weights = figure.edge_weights(model, batch)
        assert weights is not None
        edges, share = weights
        sums = torch.zeros(len(batch.x)).index_add(0, edges[1], share)
        torch.testing.assert_close(sums[edges[1]], torch.ones(len(share)))
        assert model(batch).shape == (5, 10)  # nothing of the looking stays
    assert figure.edge_weights(models.build(dataclasses.replace(o, model="gcn"), found), batch) is None


# -- data --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("held", "metric", "worst"),
    [
        (rings(lambda size: size.astype(np.float32), scaffold=False), "mae", 0.6),
        (rings(lambda size: size.astype(np.float32), scaffold=True), "rmse", 0.7),
        (rings(lambda size: (size > 5).astype(np.float32), scaffold=True), "auc", 0.9),
        (rings(lambda size: size - 4, scaffold=False), "accuracy", 0.9),
        (one_graph(2), "auc", 0.9),
        (one_graph(3), "accuracy", 0.9),
    ],
    ids=["values", "scaffolds", "yes-or-no", "classes", "two-classes-of-nodes", "classes-of-nodes"],
)
def test_each_kind_of_task_is_learned_and_scored_its_way(
    held: dict[str, Any], metric: str, worst: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "tiny.npz", **held)
    options = dataclasses.replace(
        TINY,
        data=tmp_path / "tiny.npz",
        pool="sum",
        dropout=0.0,
        epochs=30,
        batch_size=8,
        lr=2e-2,
        run=tmp_path / "run",
    )
    example.main(options)
    reached = checks.records(tmp_path / "run")[-1][f"test_{metric}"]
    assert reached < worst if metric in ("mae", "rmse") else reached > worst
    assert f"scored by {training.NAMES[metric]}" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "attention.png").exists()


def test_metrics_are_what_their_names_say() -> None:
    y, out = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[0.0], [0.0], [1.0]])
    found = data.load(None)._replace(y=y, metric="mae")
    task = training.Task(found, {}, torch.device("cpu"), False, mean=3.0, deviation=2.0)
    assert task.metric(out, y) == pytest.approx(2 / 3)  # 3, 3, 5 were said
    rmse = task._replace(data=found._replace(metric="rmse"))
    assert rmse.metric(out, y) == pytest.approx((4 / 3) ** 0.5)
    yes = task._replace(data=found._replace(metric="auc"))
    assert yes.metric(torch.tensor([[0.1], [0.4], [0.3], [0.9]]), torch.tensor([0.0, 0, 1, 1])) == pytest.approx(0.75)
    low, high = training.Score(0.2, 1.0), training.Score(0.3, 1.0)
    assert task.rank(low) > task.rank(high) and yes.rank(low) < yes.rank(high)


def test_a_citation_network(tmp_path: Path) -> None:
    features = np.array([[0, 1, 1], [0, 0, 0], [2, 0, 0], [0, 0, 3]], np.float32)
    rows, columns = features.nonzero()
    indices = {"train": np.array([0, 1]), "val": np.array([2]), "test": np.array([3])}
    found = _saved(
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


def test_several_splits_and_seeds(tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "tiny.npz", **one_graph(3))
    options = dataclasses.replace(
        TINY, data=tmp_path / "tiny.npz", model="gcn", splits=(0, 1), seeds=(0, 1), run=tmp_path / "run"
    )
    example.main(options)
    found = [checks.records(path.parent)[-1]["test_accuracy"] for path in (tmp_path / "run").rglob("metrics.jsonl")]
    assert len(found) == 4
    assert f"test accuracy over 4 runs: {np.mean(found):.4f} +- {np.std(found, ddof=1):.4f}" in capsys.readouterr().out


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


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("nowhere.npz")}, "--data must be an .npz file or a folder; there is none at nowhere.npz"),
        ({"data": checks.ROOT / "examples"}, "must have a file of graphs, such as PROTEINS.txt"),
        ({"data": Path("x.npz"), "pyg": "MUTAG"}, "--data and --pyg both say what to train on"),
        ({"dim": 9}, "--heads must divide --dim; got --heads 2, --dim 9"),
        ({"depth": 0}, "--depth must be >= 1; got 0"),
        ({"validation": 0.0}, "--validation must be > 0; got 0"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\); got 1"),
        ({"weight_decay": -1.0}, "--weight-decay must be >= 0"),
        ({"lr": 0.0}, "--lr must be > 0"),
        ({"seeds": (1, 1)}, "--seeds must be one or several different ones"),
        ({"splits": (-1,)}, "--splits must be 0 or above"),
        ({"splits": (1,)}, "--splits must be below 1 for digits; got 1"),
        ({"model": "sgformer", "position": "walk"}, "--position walk has no use in sgformer"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
        ({"resume": True}, "--resume continues a run, but there is no"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"run": tmp_path / "run", **options}
    checks.assert_refused(example.main, dataclasses.replace(TINY, **given), message)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have edge_index_local, x_indptr or node_features; it has a"):
        _saved(tmp_path, {"a": np.zeros(3)})
    held = rings(lambda size: size.astype(np.float32), scaffold=False)
    del held["node_ptr"]
    with pytest.raises(ValueError, match="has edge_index_local, but no 'node_ptr'"):
        _saved(tmp_path, held)
    found = data._graphs("", rings(lambda size: (size > 9).astype(np.float32), scaffold=False))
    with pytest.raises(ValueError, match="train must have both classes for ROC-AUC"):
        example.task_of(TINY, found, 0, torch.device("cpu"))


def test_the_models_are_those_of_the_library() -> None:
    found = data.load(None)
    kinds = {"gps": graph.GPS, "graphormer": graph.Graphormer, "exphormer": graph.Exphormer, "sgformer": graph.SGFormer}
    for name, kind in kinds.items():
        assert type(models.build(dataclasses.replace(TINY, model=name), found)) is kind
