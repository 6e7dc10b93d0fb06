from __future__ import annotations

import dataclasses
from pathlib import Path
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

from tests.closeness import assert_close
from tests.examples.graphs import TINY, one_graph, rings, saved
from xformerlib import graph


@pytest.mark.parametrize("model", get_args(graph_options.Model))
def test_every_model_lowers_the_loss_on_graphs(model: graph_options.Model, tmp_path: Path) -> None:
    found = saved(tmp_path, rings(lambda size: size.astype(np.float32), scaffold=False))
    o = dataclasses.replace(TINY, model=model, dropout=0.0)
    task = example.task_of(o, found, 0, torch.device("cpu"))
    common.seed_everything(0)
    losses = _losses(models.build(o, found), task, steps=15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", get_args(graph_options.Model))
def test_every_model_lowers_the_loss_on_nodes(model: graph_options.Model, tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))
    o = dataclasses.replace(TINY, model=model, dropout=0.0)
    task = example.task_of(o, found, 0, torch.device("cpu"))
    common.seed_everything(0)
    losses = _losses(models.build(o, found), task, steps=15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("attend", "far"), [("edges", False), ("all", True)])
def test_nodes_of_gps_attend_to_whom_they_are_told(attend: Any, far: bool, tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))  # a path
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
    found = saved(tmp_path, rings(lambda size: size.astype(np.float32), scaffold=False))
    o = dataclasses.replace(TINY, **options)
    task, model = example.task_of(o, found, 0, torch.device("cpu")), models.build(o, found).eval()
    batch = data.batch_of(found, torch.arange(4))
    assert batch.edge_attr is not None
    others = batch._replace(edge_attr=(batch.edge_attr + 1) % 3)
    with torch.inference_mode():
        assert torch.equal(training.predict(model, task, batch), training.predict(model, task, others)) != told


def test_a_residual_layer_that_says_nothing_leaves_nodes_as_they_are(tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))
    batch = data.batch_of(found, torch.arange(60))
    for residual in (False, True):
        model = models.build(dataclasses.replace(TINY, model="gcn", residual=residual, head="mlp"), found).eval()
        for norm in model.norms:  # type: ignore[union-attr]
            torch.nn.init.zeros_(norm.weight)  # type: ignore[union-attr, arg-type]
        with torch.inference_mode():
            nodes = model.embed(batch.x)
            assert_close(model(batch), model.head(nodes if residual else torch.zeros_like(nodes)))


@pytest.mark.parametrize("options", [{"messages": "gcn"}, {"messages": "appnp"}, {"graph_weight": 0.0}])
def test_sgformer_passes_messages_as_it_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))
    o = dataclasses.replace(TINY, model="sgformer", **options)
    model, batch = models.build(o, found).eval(), data.batch_of(found, torch.arange(60))
    kinds = {"gcn": "GCNConv", "appnp": "APPNP"}
    assert {type(conv).__name__ for conv in model.convs} == {kinds[o.messages or "gcn"]}  # type: ignore[union-attr]
    with torch.inference_mode():
        alone = model(batch._replace(edge_index=batch.edge_index[:, :0]))
        told = model(batch)
    if o.graph_weight == 0:
        assert_close(told, alone, depth=o.depth)
    else:
        assert not torch.allclose(told, alone, atol=1e-3)


@pytest.mark.parametrize("model", ["gps", "exphormer", "gcn"])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_layers_have_the_norm_that_was_asked_for(model: Any, norm: Any, tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))
    built = models.build(dataclasses.replace(TINY, model=model, norm=norm), found)
    kinds = {type(module).__name__ for module in built.modules()}
    assert {"BatchNorm1d": "BatchNorm1d" in kinds, "LayerNorm": "LayerNorm" in kinds} == {
        "BatchNorm1d": norm == "batch", "LayerNorm": norm == "layer"
    }  # fmt: skip


def test_input_dropout_leaves_features_out_in_training(tmp_path: Path) -> None:
    found = saved(tmp_path, one_graph(3))
    model = models.build(dataclasses.replace(TINY, model="gcn", dropout=0.0, input_dropout=0.9), found)
    batch = data.batch_of(found, torch.arange(60))
    assert isinstance(model.embed, torch.nn.Sequential)
    torch.nn.init.zeros_(model.embed[1].bias)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert not model.eval().embed(batch.x).eq(0).all(1).any()
        assert model.train().embed(batch.x).eq(0).all(1).any()


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
        assert_close(sums[edges[1]], torch.ones(len(share)))
        assert model(batch).shape == (5, 10)  # nothing of the looking stays
    assert figure.edge_weights(models.build(dataclasses.replace(o, model="gcn"), found), batch) is None


def test_the_models_are_those_of_the_library() -> None:
    found = data.load(None)
    kinds = {
        "gps": graph.GPS, "graphormer": graph.Graphormer, "exphormer": graph.Exphormer, "sgformer": graph.SGFormer,
        "agnn": graph.AGNN,
    }  # fmt: skip
    for name, kind in kinds.items():
        assert type(models.build(dataclasses.replace(TINY, model=name), found)) is kind
